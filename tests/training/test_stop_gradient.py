"""The ablation without stop-gradient: the language encoder gets the true gradient, on any number of processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.agreement import inputs_of, with_weights
from tests.conftest import CASES, config, load_json
from xfm_fast.batches import PairBatch, RegionBatch
from xfm_fast.config import XFMConfig
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import box_giou_loss, box_l1_loss, pretraining_losses
from xfm_fast.training.synthetic_batches import synthetic_batch


@pytest.mark.parametrize(("loss", "official"), [("itm", "itm_finetune"), ("imlm", "imlm_nodetach")])
@pytest.mark.parametrize("case", CASES)
def test_undetached_losses_have_the_official_gradients(case: str, loss: str, official: str) -> None:
    x = inputs_of(f"{case}/inputs", torch.float64)
    batch = PairBatch(
        image=x["image"], input_ids=x["text_ids"], attention_mask=x["text_atts"], masked_input_ids=x["text_ids_masked"],
        masked_positions=x["masked_pos"], masked_labels=x["masked_ids"],
    )  # fmt: skip
    model = with_weights(XFM(config(case)), case, torch.float64)
    negatives = x["itm_image_neg_idx"], x["itm_text_neg_idx"]
    found = pretraining_losses(model, batch, hard_negatives=negatives, losses=(loss,), stop_gradient=False)[loss]
    found.backward()
    golden = load_json(f"{case}/grads")[official]
    assert found.item() == pytest.approx(golden["value"], rel=1e-8)
    largest = max(norm for norm in golden["grad_norm"].values() if norm is not None)
    reached = 0
    for name, parameter in model.named_parameters():
        truth = golden["grad_norm"][name]
        if truth is None:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.norm().item() == pytest.approx(truth, rel=1e-8, abs=1e-12 * largest), name
            reached += name.startswith("text_encoder.")
    assert reached > 20


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
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    """Negatives are texts of the other process too, to which the gradient has to travel back."""
    expected = _step(0, 1, str(tmp_path))
    spawned: Any = mp.spawn
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spawned(_process, (2, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "gradients", weights_only=True)
    assert_same(found, expected)
