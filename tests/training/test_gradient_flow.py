"""Which loss trains which part of the model, and that losses without the stop-gradient are the official ones."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.agreement import assert_gradient_norms, with_weights
from tests.conftest import CASES, config, load_json
from tests.objectives.steps import negatives_of, pair_batch
from tests.training.synthetic import synthetic_batch
from xfm_fast.batches import PairBatch, RegionBatch, TextBatch
from xfm_fast.config import XFMConfig
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import box_giou_loss, box_l1_loss, pretraining_losses
from xfm_fast.training.distributed import end_groups
from xfm_fast.training.recipe_fields import LOSSES_OF_KIND

Norms = dict[tuple[str, str], dict[str, float]]
CONFIG = XFMConfig.preset("tiny")
KINDS = tuple(LOSSES_OF_KIND)
# The parts that each loss trains (arXiv 2301.05065).
TRAINED = {
    "mlm": {"language", "heads"},
    "itc": {"language", "vision", "heads", "temperature"},
    "itm": {"vision", "fusion", "heads"},
    "imlm": {"vision", "fusion", "heads"},
    "bbox_l1": {"vision", "fusion", "heads"},
    "bbox_giou": {"vision", "fusion", "heads"},
    "mim": {"vision"},
}


def part_of(name: str) -> str:
    """The part of a parameter; the word matrix of the fusion encoder is the output matrix of its head."""
    prefixes = {
        "vision_encoder.": "vision", "text_encoder.roberta.": "language", "fusion_encoder.roberta.encoder.": "fusion",
    }  # fmt: skip
    found = (part for prefix, part in prefixes.items() if name.startswith(prefix))
    return next(found, "temperature" if name == "temp" else "heads")


def gradient_norms(model: XFM, kinds: tuple[str, ...] = KINDS, **options: Any) -> Norms:
    """(kind of batch, loss) → part → norm of its gradient, without the parts that are not in the graph."""
    members: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        members[part_of(name)].append(parameter)
    norms: Norms = defaultdict(dict)
    for kind in kinds:
        for loss, value in pretraining_losses(model.eval(), synthetic_batch(kind, CONFIG), **options).items():
            for part, parameters in members.items():
                found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
                if arrived := [gradient.norm() for gradient in found if gradient is not None]:
                    norms[kind, loss][part] = float(torch.stack(arrived).norm())
    return norms


def test_each_loss_trains_its_parts() -> None:
    norms = gradient_norms(XFM(CONFIG))
    assert {(kind, loss) for kind, losses in LOSSES_OF_KIND.items() for loss in losses} == set(norms)
    for (_, loss), of_loss in norms.items():
        assert set(of_loss) == TRAINED[loss], loss
        assert all(0 < norm < float("inf") for norm in of_loss.values()), of_loss


def test_without_the_stop_gradient_fusion_losses_reach_the_language_encoder() -> None:
    norms = gradient_norms(XFM(CONFIG), stop_gradient=False)
    reached = {row for row, of_loss in norms.items() if set(of_loss) - TRAINED[row[1]] == {"language"}}
    fusion = {"itm", "imlm", "bbox_l1", "bbox_giou"}
    assert reached == {(kind, loss) for kind, losses in LOSSES_OF_KIND.items() for loss in fusion.intersection(losses)}


def test_masked_language_modelling_of_pairs_by_the_configuration() -> None:
    model = XFM(CONFIG)
    model.config = CONFIG.replace(detach_text_for_mlm=False)
    reached = {loss for (_, loss), of_loss in gradient_norms(model, ("pairs",)).items() if of_loss.get("language")}
    assert reached == {"itc", "imlm"}


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_batches_are_what_loaders_make(kind: str, size: int) -> None:
    batch, again = (synthetic_batch(kind, CONFIG, size=size, seed=3) for _ in range(2))
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
