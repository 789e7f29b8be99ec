"""The gradient-flow report tells the method from its violations."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch import Tensor

from tests.agreement import assert_gradient_norms, with_weights
from tests.conftest import CASES, config, load_json
from tests.objectives.steps import negatives_of, pair_batch
from xfm_fast.batches import PairBatch, RegionBatch, TextBatch
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, ConfigError, InputError
from xfm_fast.models.convert import to_official_file
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import box_giou_loss, box_l1_loss, pretraining_losses
from xfm_fast.training.distributed import end_groups
from xfm_fast.training.gradient_flow import PARTS, REACHES, check, gradient_flow, gradient_flow_of, synthetic_batch
from xfm_fast.training.recipe import load_recipe
from xfm_fast.training.recipe_fields import LOSSES_OF_KIND, LossName

CONFIG = XFMConfig.preset("tiny")
KINDS = tuple(LOSSES_OF_KIND)


@pytest.fixture
def model() -> XFM:
    return XFM(CONFIG)


def batches(kinds: tuple[str, ...] = KINDS) -> list:
    return [synthetic_batch(kind, CONFIG) for kind in kinds]


def test_the_method_holds(model: XFM) -> None:
    model.train()
    report = gradient_flow(model, batches())
    assert check(report) == []
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(report.norms) == {(kind, loss) for kind, losses in LOSSES_OF_KIND.items() for loss in losses}
    # Where the method stops gradients there is not even a zero: nothing is in the graph.
    for (_, loss), norms in report.norms.items():
        assert {part for part, norm in norms.items() if norm is not None} == REACHES[loss]


def test_no_loss_reaches_the_language_encoder_through_the_fusion_encoder(model: XFM) -> None:
    """The first of the two techniques, said without the table of the module under test."""
    norms = gradient_flow(model, batches(("pairs", "regions"))).norms
    stopped: list[tuple[str, LossName]] = [
        ("pairs", "itm"), ("pairs", "imlm"), ("regions", "bbox_l1"), ("regions", "bbox_giou"),
    ]  # fmt: skip
    for row in stopped:
        assert norms[row]["language"] is None
        assert norms[row]["vision"]
    assert norms["pairs", "itc"]["language"]


def test_without_the_stop_gradient_the_check_fails(model: XFM) -> None:
    violations = check(gradient_flow(model, batches(), stop_gradient=False))
    reached = {tuple(line.split()[:3:2]) for line in violations}
    assert reached == {(loss, kind) for kind in ("pairs", "regions") for loss in LOSSES_OF_KIND[kind]} - {
        ("itc", "pairs"), ("itc", "regions"), ("mim", "pairs"),
    }  # fmt: skip
    assert all("reaches language with a gradient of norm" in line for line in violations)


def test_masked_language_modelling_through_the_config(model: XFM) -> None:
    model.config = CONFIG.replace(detach_text_for_mlm=False)
    violations = check(gradient_flow(model, batches(("pairs",))))
    assert len(violations) == 1
    assert violations[0].startswith("imlm on pairs reaches language")


@pytest.mark.parametrize(
    ("frozen", "part", "lines"),
    [("vision_encoder", "vision", 10), ("text_encoder.roberta", "language", 3), ("fusion_encoder", "fusion", 6)],
)
def test_a_frozen_encoder_is_found(model: XFM, frozen: str, part: str, lines: int) -> None:
    model.get_submodule(frozen).requires_grad_(False)
    violations = [line for line in check(gradient_flow(model, batches())) if f" gives {part} no gradient" in line]
    assert len(violations) == lines


def test_gradients_that_are_not_finite_are_found(model: XFM) -> None:
    with torch.no_grad():
        model.text_proj.weight.fill_(float("nan"))
    violations = check(gradient_flow(model, batches(("pairs",))))
    assert any(line.startswith("itc on pairs gives") and line.endswith("norm nan") for line in violations)


def test_norms_are_those_of_backward(model: XFM) -> None:
    batch = synthetic_batch("text", CONFIG)
    report = gradient_flow(model, [batch])
    pretraining_losses(model.eval(), batch)["mlm"].backward()
    parameters = model.text_encoder.roberta.parameters()
    squares = [parameter.grad.square().sum() for parameter in parameters if parameter.grad is not None]
    assert report.norms["text", "mlm"]["language"] == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-5)


def test_report_is_shown_and_written(model: XFM) -> None:
    report = gradient_flow(model, batches(), stop_gradient=False)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    for part in PARTS:
        assert part in text
    assert "imlm (regions)" in text
    data = json.loads(report.to_json())
    assert len(data["violations"]) == 6
    assert {row["loss"] for row in data["rows"]} == set(REACHES)
    assert next(row for row in data["rows"] if row["loss"] == "mim")["norms"]["language"] is None


def test_of_a_recipe() -> None:
    sizes = ["model={preset: tiny}", "streams.pairs.losses=[itc, itm]", "streams.text=null", "streams.images=null"]
    # Sequences of the tiny preset are shorter than those of the recipe.
    report = gradient_flow_of("pretrain_tiny_shapes", sizes)
    assert check(report) == []
    assert {loss for kind, loss in report.norms if kind == "pairs"} == {"itc", "itm"}
    assert {kind for kind, _ in report.norms} == {"pairs", "regions"}
    ablated = gradient_flow_of("pretrain_tiny_shapes", [*sizes, "method.stop_gradient=false"])
    assert any(line.startswith("itm on pairs reaches language") for line in check(ablated))


def test_of_a_model(model: XFM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert check(gradient_flow_of(tmp_path)) == []
    with torch.no_grad():
        model.vision_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    found = [line for line in check(gradient_flow_of(tmp_path)) if "vision" in line]
    assert [line.split()[2] for line in found] == ["pairs", "regions"]
    assert all(line.startswith("itc") and "gives vision no gradient" in line for line in found)
    with pytest.raises(CheckpointError, match="holds no model"):
        gradient_flow_of(tmp_path.parent)
    with pytest.raises(ConfigError, match="steps=3 would change a recipe"):
        gradient_flow_of(tmp_path, ["steps=3"])


def test_of_a_run(model: XFM, tmp_path: Path) -> None:
    """Its newest checkpoint, with the recipe that lies there."""
    for step, options in ((9, []), (10, ["method.stop_gradient=false", "streams.regions=null", "streams.text=null"])):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        model.save_pretrained(folder / "model")
        recipe = load_recipe("pretrain_tiny_shapes", ["model={preset: tiny}", *options])
        (folder / "state.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    report = gradient_flow_of(tmp_path)
    assert {kind for kind, _ in report.norms} == {"pairs", "images"}
    assert [line.split()[0] for line in check(report)] == ["itm", "imlm"]
    assert check(gradient_flow_of(tmp_path / "checkpoints/step-00000009")) == []


def test_nothing_to_follow(model: XFM) -> None:
    with pytest.raises(InputError, match="no batch gives a loss"):
        gradient_flow(model, [])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_synthetic_batches_are_what_loaders_make(size: int) -> None:
    for kind in KINDS:
        batch = synthetic_batch(kind, CONFIG, size=size, seed=3)
        again = synthetic_batch(kind, CONFIG, size=size, seed=3)
        for name, value in vars(batch).items():
            assert value is None or torch.equal(value, getattr(again, name))
        if isinstance(batch, TextBatch):
            assert (batch.input_ids.gather(1, batch.masked_positions) == batch.masked_labels).all()
            assert (batch.masked_input_ids.gather(1, batch.masked_positions) == CONFIG.mask_token_id).all()
            assert batch.attention_mask.gather(1, batch.masked_positions).all()
            assert (batch.masked_positions > 0).all()
            ends = batch.attention_mask.sum(1) - 1
            assert (batch.input_ids.gather(1, ends[:, None]) == CONFIG.eos_token_id).all()
        if isinstance(batch, RegionBatch):
            assert batch.region_mask[:, 1:].any(1).all()
            centres, halves = batch.boxes[:, :2], batch.boxes[:, 2:] / 2
            corners = torch.cat([centres - halves, centres + halves])
            assert (corners >= -1e-6).all()
            assert (corners <= 1 + 1e-6).all()
            assert batch.image_index.max() == len(batch.image) - 1
    with pytest.raises(InputError, match="kind 'video'"):
        synthetic_batch("video", CONFIG)
    with pytest.raises(InputError, match="lengthen them"):
        synthetic_batch("text", CONFIG, length=4)


def test_an_official_file_is_held_to_the_official_pretraining(model: XFM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    to_official_file(tmp_path / "ours", tmp_path / "official.th")
    sizes = ["model={preset: tiny}", "streams.text.max_tokens=40"]
    assert check(gradient_flow_of(tmp_path / "official.th", sizes)) == []
    ablated = gradient_flow_of(tmp_path / "official.th", [*sizes, "method.stop_gradient=false"])
    assert any("language" in line for line in check(ablated))
    (tmp_path / "torn.th").write_bytes((tmp_path / "official.th").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"torn\.th"):
        gradient_flow_of(tmp_path / "torn.th", sizes)


@pytest.mark.parametrize(("loss", "official"), [("itm", "itm_finetune"), ("imlm", "imlm_nodetach")])
@pytest.mark.parametrize("case", CASES)
def test_undetached_losses_have_the_official_gradients(case: str, loss: str, official: str) -> None:
    batch = pair_batch(case)
    model = with_weights(XFM(config(case)), case, torch.float64)
    found = pretraining_losses(
        model, batch, hard_negatives=negatives_of(case, batch), losses=(loss,), stop_gradient=False
    )[loss]
    found.backward()
    golden = load_json(f"{case}/grads")[official]
    assert found.item() == pytest.approx(golden["value"], rel=1e-8)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_gradient_norms(gradients, golden["grad_norm"], loss, rel=1e-8, small=1e-12)
    reached = [name for name, norm in golden["grad_norm"].items() if norm is not None]
    assert sum(name.startswith("text_encoder.") for name in reached) > 20


def gradients(model: XFM) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(name.startswith("text_encoder.") for name in expected)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-9 * (1 + gradient.abs().max()), name


def test_boxes_against_the_plain_model() -> None:
    torch.manual_seed(0)
    model = XFM(XFMConfig.preset("tiny")).double().eval()
    batch = synthetic_batch("regions", model.config, size=5)
    assert isinstance(batch, RegionBatch)
    losses = pretraining_losses(model, batch, losses=("bbox_l1", "bbox_giou"), stop_gradient=False)
    torch.stack([*losses.values()]).sum().backward()
    found = gradients(model)
    model.zero_grad()
    _, whole = model.encode_regions(batch.image, batch.image_index, batch.region_mask)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    boxes = model.predict_boxes(model.fuse(text, batch.attention_mask, model.image_memory(whole)))
    target = batch.boxes.double()
    (box_l1_loss(boxes, target, batch.is_image) + box_giou_loss(boxes, target, batch.is_image)).backward()
    expected = gradients(model)
    assert_same(found, expected)


def _step(rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    """Gradients of the mean over processes, as DDP takes it, for the part of the batch that this process has."""
    torch.manual_seed(0)
    model = XFM(XFMConfig.preset("tiny")).double().eval()
    whole = synthetic_batch("pairs", model.config, size=4)
    assert isinstance(whole, PairBatch)
    part = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    batch = PairBatch(**{n: t[part] for n, t in vars(whole).items() if isinstance(t, Tensor)})  # pyright: ignore[reportArgumentType]
    negatives = torch.tensor([1, 0, 0, 2])[part], torch.tensor([2, 3, 1, 1])[part]
    losses = pretraining_losses(
        model, batch, hard_negatives=negatives, losses=("itc", "itm", "imlm"), stop_gradient=False
    )
    torch.stack([*losses.values()]).sum().backward()
    found = gradients(model)
    for gradient in found.values():
        if world_size > 1:
            dist.all_reduce(gradient)
            gradient /= world_size
    return found


def _process(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size)
    try:
        found = _step(rank, world_size, folder)
        if rank == 0:
            torch.save(found, f"{folder}/gradients")
    finally:
        end_groups()


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    """Negatives are texts of the other process too, to which the gradient has to travel back."""
    expected = _step(0, 1, str(tmp_path))
    spawned: Any = mp.spawn
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spawned(_process, (2, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "gradients", weights_only=True)
    assert_same(found, expected)
