"""The gradient-flow report tells the method from its violations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from xfm_fast.batches import RegionBatch, TextBatch
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, ConfigError, InputError
from xfm_fast.models.convert import to_official_file
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.training.gradient_flow import PARTS, REACHES, check, gradient_flow, gradient_flow_of
from xfm_fast.training.recipe import load_recipe
from xfm_fast.training.recipe_fields import LOSSES_OF_KIND, LossName
from xfm_fast.training.synthetic_batches import synthetic_batch

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
