"""`open_model` loads every kind of source bit for bit, and every command takes every kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cli.runner import invoke
from tests.search.conftest import write_picture
from xfm_fast.checkpoint import to_official
from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import VOCABULARY
from xfm_fast.encoders import open_encoder
from xfm_fast.errors import CheckpointError, ConfigError, InputError, UnavailableError, XFMError
from xfm_fast.loading import Source, open_model
from xfm_fast.models import hub
from xfm_fast.models.xfm import XFM
from xfm_fast.serve.options import SourceOptions
from xfm_fast.tokenizer import CaptionTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of save_pretrained, the official file of the same weights, its sizes, and its vocabulary."""
    place = tmp_path_factory.mktemp("sources")
    words = CaptionTokenizer.train_on_texts([" ".join(VOCABULARY)], 500)
    torch.manual_seed(0)
    model = XFM(
        XFMConfig.preset(
            "tiny", vocab_size=words.vocab_size, vision_depth=1, text_layers=1, fusion_layers=1
        )
    )
    model.tokenizer = words
    model.save_pretrained(place / "model")
    torch.save({"model": to_official(model.state_dict(), model.config)}, place / "official.th")
    (place / "sizes.json").write_text(_sizes(model.config))
    words.save(place / "tokenizer.json")
    return place


def _sizes(config: XFMConfig) -> str:
    return json.dumps(
        {
            "image_res": config.image_size, "patch_size": config.patch_size, "vision_width": config.vision_width,
            "vision_depth": config.vision_depth, "vision_heads": config.vision_heads,
            "text_width": config.text_width, "text_layers": config.text_layers, "text_heads": config.text_heads,
            "text_intermediate": config.text_intermediate, "vocab": config.vocab_size,
            "max_pos": config.max_positions, "fusion_layers": config.fusion_layers, "embed_dim": config.embed_dim,
            "num_masking_patches": config.num_masking_patches, "min_num_patches": config.min_num_patches,
        }
    )  # fmt: skip


@pytest.fixture(params=["folder", "run", "hub", "official"])
def source(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Source:
    """The same weights from every kind of source."""
    if request.param == "folder":
        return Source(str(folder / "model"), device="cpu")
    if request.param == "run":
        (tmp_path / "run").mkdir()
        (tmp_path / "run/model").symlink_to(folder / "model")
        return Source(str(tmp_path / "run"), device="cpu")
    if request.param == "hub":
        local = hub.local_folder
        monkeypatch.setattr(
            hub,
            "local_folder",
            lambda name, **_: folder / "model" if name == "org/x" else local(name),
        )
        monkeypatch.setattr(
            "huggingface_hub.hf_hub_download", lambda _, file: str(folder / "model" / file)
        )
        return Source("org/x", device="cpu")
    sizes = str(folder / "sizes.json")
    return Source(
        str(folder / "official.th"), config=sizes, tokenizer=folder / "tokenizer.json", device="cpu"
    )


def _same(model: XFM, state: dict[str, Tensor]) -> None:
    assert {*model.state_dict()} == {*state}
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_every_source_is_the_same_model(source: Source, folder: Path) -> None:
    expected = XFM.from_pretrained(folder / "model")
    opened = open_model(source)
    _same(opened.model, expected.state_dict())
    assert opened.model.tokenizer.sha256() == expected.tokenizer.sha256()
    assert not opened.model.training
    assert opened.name in ("model", "run", "org/x", "official")
    assert str(folder) not in opened.origin
    larger = open_model(replace(source, image_size=48))
    assert larger.model.config.image_size == 48
    assert larger.model.encode_image(torch.zeros(1, 3, 48, 48)).shape[1] == 37


def test_every_command_takes_every_source(source: Source, folder: Path, tmp_path: Path) -> None:
    from xfm_fast.serve.model import XFMModel

    options = [f"--model={source.model}", "--device=cpu"]
    if source.config is not None:
        options += [f"--config={source.config}", f"--tokenizer={source.tokenizer}"]
    for number in range(3):
        write_picture(tmp_path / "photos" / f"{number}.png", number)
    for command in (
        ["index", tmp_path / "photos"],
        ["search", tmp_path / "photos", "a red circle", "--json"],
    ):
        done = invoke([*command, *options])
        assert done.exit_code == 0, done.stderr
    assert len(json.loads(done.stdout)["hits"]) == 3
    served = XFMModel(SourceOptions(**vars(source)), 0)
    assert served.heads == ("contrastive", "matching")
    if source.config is not None:
        pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
        done = invoke(
            ["export", *options, "--out", tmp_path / "exported", "--graphs", "image_memory"]
        )
        assert done.exit_code == 0, done.stderr


def test_random_weights_are_the_same_each_time_and_never_zero() -> None:
    before = torch.get_rng_state()
    first, second = (open_model(Source(random="tiny", device="cpu")).model for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    _same(first, second.state_dict())
    assert not [name for name, value in first.named_parameters() if not value.abs().max() > 0]
    assert first.encode("a red circle").shape == (first.config.embed_dim,)


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({}, InputError, "--random"),
        ({"model": "{}/model", "random": "tiny"}, InputError, "--random"),
        ({"model": "{}/model", "config": "tiny"}, InputError, "--config"),
        ({"random": "small"}, ConfigError, "small"),
        ({"model": "{}/nothing"}, CheckpointError, "nothing"),
        ({"model": "{}/official.th"}, CheckpointError, "vision_depth=1"),
    ],
)
def test_wrong_options(
    options: dict[str, str], error: type[XFMError], part: str, folder: Path
) -> None:
    given = {name: value.format(folder) for name, value in options.items()}
    with pytest.raises(error, match=part):
        open_model(Source(**given))  # pyright: ignore[reportArgumentType]


def test_heads_and_tasks_that_a_command_needs(folder: Path, tmp_path: Path) -> None:
    XFM.from_pretrained(folder / "model", heads=["matching"]).save_pretrained(tmp_path / "blind")
    with pytest.raises(UnavailableError, match="contrastive"):
        open_encoder(tmp_path / "blind")
    (tmp_path / "blind/task.json").write_text('{"format": 1, "task": {"kind": "nlvr2"}}')
    with pytest.raises(UnavailableError, match="nlvr2"):
        open_model(Source(str(tmp_path / "blind")), tasks=("retrieval",))
