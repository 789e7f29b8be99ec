"""Where the weights of a run come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.small_runs import in_processes, noise, numbers, process_of_a_run, run, small_recipe
from xfm_fast.checkpoint import read_state_dict
from xfm_fast.data.patch_codes import PatchCodebook
from xfm_fast.errors import CheckpointError, ConfigError, InputError, XFMError
from xfm_fast.models.xfm import XFM
from xfm_fast.training.gradient_flow import check, gradient_flow_of
from xfm_fast.training.loop import train
from xfm_fast.training.recipe import Recipe, load_recipe
from xfm_fast.training.setup import CODEBOOK_FILE, build_model

SIZES: dict[str, Any] = {"preset": "tiny", "vision_depth": 1, "text_layers": 1, "fusion_layers": 1}


@pytest.fixture
def saved(tmp_path: Path) -> XFM:
    model = XFM(small_recipe(tmp_path).model)
    model.save_pretrained(tmp_path / "saved")
    return model


def begun(folder: Path, **sizes: Any) -> XFM:
    return build_model(small_recipe(folder, model=SIZES | sizes, init={"checkpoint": str(folder / "saved")}))


def test_a_folder_gives_the_weights_and_the_recipe_the_rest(saved: XFM, tmp_path: Path) -> None:
    """What the folder's own configuration says of dropout and the like is of the run that wrote it."""
    model = begun(tmp_path, hidden_dropout=0.3, num_masking_patches=5)
    assert (model.config.hidden_dropout, model.config.num_masking_patches) == (0.3, 5)
    for (name, ours), theirs in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_folder_at_another_resolution(saved: XFM, tmp_path: Path) -> None:
    model = begun(tmp_path, image_size=48)
    saved.set_image_size(48)
    assert model.config.image_size == 48
    for (name, ours), theirs in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_folder_of_another_model_is_refused(saved: XFM, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="text_layers=1"):
        begun(tmp_path, text_layers=2)


def test_a_folder_without_all_heads(tmp_path: Path) -> None:
    XFM(small_recipe(tmp_path).model, heads=("contrastive", "mlm")).save_pretrained(tmp_path / "saved")
    assert begun(tmp_path).heads == ("mlm", "contrastive")


CODES = {"mim_guidance": False, "image_codes": {"codes": 4}}
HEAD = {"image_codes.head.weight", "image_codes.head.bias"}


def by_brightness(image: Tensor) -> Tensor:
    patches = torch.nn.functional.avg_pool2d(image.mean(1, keepdim=True), 8).flatten(1)
    return (patches * 20).clamp(-1.9, 1.9).add(2).long()


def test_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("pretrain_tiny_shapes", ["method.mim_guidance=false", "method.image_codes.codes=64"])
    assert "mim" in recipe.losses_of("pairs")
    assert recipe.losses_of("images") == ("mim",)
    assert recipe.active_updates == recipe.updates
    with pytest.raises(ConfigError, match="method"):
        load_recipe("pretrain_tiny_shapes", ["method.image_codes.codes=64"])
    with pytest.raises(ConfigError, match=r"image_codes\.code.*codes"):
        load_recipe("pretrain_tiny_shapes", ["method.mim_guidance=false", "method.image_codes.code=64"])
    # A tokenizer alone says nothing of how many codes it has.
    with pytest.raises(InputError, match="codes"):
        run(small_recipe(tmp_path / "run"), image_tokenizer=by_brightness)
    # Nothing is left of what was refused.
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "weights", "message"),
    [
        ([{"desc": "a red circle above a blue square"}] * 8, "damaged.th", r"damaged\.th"),
        ([{"desc": "a red circle"}, {"desc": 3}, {"words": "?"}, {"desc": None}] * 4, None, "bad_share"),
    ],
    ids=["no weights", "broken rows"],
)
def test_a_refused_start_leaves_no_file(tmp_path: Path, rows: list[Any], weights: str | None, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.txt").touch()
    stream = {"kind": "text", "paths": str(tmp_path / "rows.jsonl"), "batch_size": 4, "max_tokens": 20}
    init = {}
    if weights is not None:
        (tmp_path / weights).write_bytes(bytes(range(64)))
        init = {"checkpoint": str(tmp_path / weights)}
    recipe = small_recipe(folder, streams={"text": stream}, updates=[["text"]], tokenizer="train", init=init)
    with pytest.raises(XFMError, match=message):
        train(recipe)
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["mine.txt"]


def test_a_tokenizer_of_the_users(tmp_path: Path) -> None:
    """Its codes are learnt; a run that was stopped goes on to the bit; what is saved is a model like any other."""

    def stop(step: int, *_: object) -> None:
        if step == 6:
            raise InterruptedError

    options: dict[str, Any] = {"image_tokenizer": by_brightness}
    whole, parts = (small_recipe(tmp_path / name, method=CODES, ema=0.5) for name in ("whole", "parts"))
    result = run(whole, **options)
    with pytest.raises(InterruptedError):
        run(parts, on_step=stop, **options)
    run(parts, **options)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    # A guess is worth log(4) = 1.39.
    assert numbers(tmp_path / "whole")[0]["loss/images/mim"] == pytest.approx(1.39, abs=0.5)
    assert not any(name.startswith("image_codes") for name in result.model.state_dict())
    for folder in ("model", "average", "checkpoints/step-00000008/model"):
        XFM.from_pretrained(tmp_path / "whole" / folder)
    heads = [read_state_dict(tmp_path / f"whole/checkpoints/step-{step:08d}/training.safetensors") for step in (4, 8)]
    assert {f"model/{name}" for name in HEAD} <= heads[0].keys()
    assert not torch.equal(*(head["model/image_codes.head.weight"] for head in heads))
    with pytest.raises(CheckpointError, match="groups"):
        run(small_recipe(tmp_path / "whole", ema=0.5))


def codes_from(file: Path, folder: Path, **changes: Any) -> Recipe:
    return small_recipe(folder, method={"mim_guidance": False, "image_codes": {"source": str(file)}}, **changes)


@pytest.mark.slow
def test_a_head_in_shards(tmp_path: Path) -> None:
    """With FSDP it is sharded like the rest, and a killed run goes on as one that was not."""
    torch.manual_seed(0)
    PatchCodebook(torch.randn(9, 192)).save(tmp_path / "book")
    settings: dict[str, Any] = {"parallel": "fsdp", "steps": 6}
    whole = codes_from(tmp_path / "book", tmp_path / "whole", **settings)
    assert in_processes(process_of_a_run, 2, tmp_path / "a", whole, {}) == [0, 0]
    recipe = codes_from(tmp_path / "book", tmp_path / "parts", **settings)
    assert in_processes(process_of_a_run, 2, tmp_path / "b", recipe, {"kill_at": 5}) == [-9, -9]
    assert in_processes(process_of_a_run, 2, tmp_path / "c", recipe, {}) == [0, 0]
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    XFM.from_pretrained(tmp_path / "parts/model")
    assert check(gradient_flow_of(tmp_path / "parts")) == []
    with pytest.raises(CheckpointError, match="groups"):
        run(small_recipe(tmp_path / "parts", **settings))


def test_a_codebook_is_learnt_once(tmp_path: Path) -> None:
    sizes = ["steps=1", "shapes.train=60", "shapes.val=5", "shapes.test=5", f"data={tmp_path / 'world'}"]
    sizes += [f"streams.{name}.batch_size=4" for name in ("text", "regions", "images", "pairs")]
    folder = tmp_path / "run"
    options = ["method.mim_guidance=false", "method.image_codes.codes=32", f"checkpoint.folder={folder}"]
    train(load_recipe("pretrain_tiny_shapes", [*sizes, *options]))
    book = PatchCodebook.load(folder / CODEBOOK_FILE, 8)
    assert len(book.centres) == 32
    written = (folder / CODEBOOK_FILE).stat().st_mtime_ns
    train(load_recipe("pretrain_tiny_shapes", [*sizes, *options, "steps=2"]))
    assert (folder / CODEBOOK_FILE).stat().st_mtime_ns == written
    # The vocabulary that the run learnt lies with its weights.
    assert XFM.from_pretrained(folder / "model").encode("a red circle").ndim == 1
    assert (folder / "model" / "tokenizer.json").is_file()


def test_gradients_flow_as_they_should() -> None:
    options = ["model={preset: tiny}", "streams.regions=null", "method.mim_guidance=false", "method.image_codes={}"]
    report = gradient_flow_of("pretrain_tiny_shapes", options)
    assert check(report) == []
    assert {loss for _, loss in report.norms} == {"mlm", "mim", "itc", "itm", "imlm"}
    assert report.norms["images", "mim"]["vision"]


def test_a_run_needs_its_codebook(tmp_path: Path) -> None:
    recipe = codes_from(tmp_path / "nowhere.safetensors", tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        train(recipe, sources=noise(recipe))
