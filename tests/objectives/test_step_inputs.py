"""What a step refuses, in one error that names the thing, its value and the remedy; and what it accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.steps import (
    image_batch,
    model_of,
    pair_batch,
    region_batch,
    rows,
    text_batch,
    total,
)
from xfm_fast.batches import IGNORED, Batch, ImageBatch, PairBatch, RegionBatch
from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses

CASE = "tiny_a"


def changed(value: Tensor, *place: int, to: float) -> Tensor:
    value = value.clone()
    value[place] = to
    return value


def step(batch: Batch, **options: Any) -> dict[str, Tensor]:
    return pretraining_losses(model_of(CASE), batch, **options)


PAIR, REGION, TEXT, IMAGE = (
    pair_batch(CASE),
    region_batch(CASE),
    text_batch(CASE),
    image_batch(CASE),
)
OWN = torch.arange(4)

# A call, and a part of the message: the thing with its value.
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "unknown loss": (lambda: step(PAIR, losses={"mlm"}), "'mlm'"),
    "other patch mask": (lambda: step(PAIR, patch_mask=torch.ones(4, 17)), "[4, 17]"),
    "NaN box": (
        lambda: step(replace(REGION, boxes=changed(REGION.boxes, 2, 1, to=float("nan")))),
        "boxes of text 2",
    ),
    "image index": (
        lambda: step(replace(REGION, image_index=changed(REGION.image_index, 1, to=2))),
        "image_index",
    ),
    "id": (
        lambda: step(replace(PAIR, masked_input_ids=changed(PAIR.masked_input_ids, 0, 1, to=211))),
        "of 211",
    ),
    "label": (
        lambda: step(replace(TEXT, masked_labels=changed(TEXT.masked_labels, 0, 0, to=211))),
        "of 211",
    ),
    "position beyond the text": (
        lambda: step(replace(PAIR, masked_positions=changed(PAIR.masked_positions, 1, 0, to=12))),
        "masked_positions[1]",
    ),
    "position in the padding": (
        lambda: step(replace(PAIR, masked_positions=changed(PAIR.masked_positions, 3, 0, to=4))),
        "masked_positions[3]",
    ),
    "too few negatives": (lambda: step(PAIR, hard_negatives=(OWN, OWN[1:])), "text_negative_index"),
    "negative beyond the batch": (
        lambda: step(PAIR, hard_negatives=(OWN, OWN + 1)),
        "text_negative_index",
    ),
    "one pair": (lambda: step(PairBatch(**rows(PAIR, text=slice(1)))), "1 pair(s)"),
    "one image": (lambda: step(replace(PAIR, image_ids=torch.full((4,), 7))), "image id 7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, named = REFUSED[name]
    with pytest.raises(InputError) as caught:
        call()
    assert named in str(caught.value)


def test_a_model_without_the_head() -> None:
    config = XFMConfig.preset("tiny", vocab_size=211, image_size=32)
    model = XFM(config, heads=("contrastive", "mlm")).double().eval()
    with pytest.raises(UnavailableError, match="'matching'"):
        pretraining_losses(model, PAIR)
    assert set(pretraining_losses(model, PAIR, losses={"itc"})) == {"itc"}
    with pytest.raises(UnavailableError, match="'mlm'"):
        pretraining_losses(XFM(config, heads=("contrastive",)).double().eval(), TEXT)


def test_the_temperature_is_clamped_in_place() -> None:
    model = model_of(CASE, temperature=0.3)
    for value, clamped in ((0.7, 0.5), (1e-4, 0.001), (0.2, 0.2)):
        with torch.no_grad():
            model.temp.fill_(value)
        losses = step_of(model, PAIR)
        assert model.temp.item() == pytest.approx(clamped)
        # A second step clamps again while the first still waits for its backward.
        with torch.no_grad():
            model.temp.fill_(0.9)
        step_of(model, REGION)
        total(losses).backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.temp.fill_(0.9)
        step_of(model, TEXT)
        step_of(model, IMAGE)
    assert model.temp.item() == pytest.approx(0.9)


def step_of(model: XFM, batch: Batch) -> dict[str, Tensor]:
    return pretraining_losses(model, batch)


def test_nothing_to_predict_anywhere() -> None:
    model = model_of(CASE)
    none = torch.full_like(PAIR.masked_labels, IGNORED)
    losses = pretraining_losses(model, replace(PAIR, masked_labels=none))
    assert losses["imlm"].item() == 0
    total(losses).backward()
    empty = replace(PAIR, masked_labels=none[:, :0], masked_positions=none[:, :0])
    assert pretraining_losses(model, empty)["imlm"].item() == 0
    boxless = pretraining_losses(model, replace(REGION, is_image=torch.ones(5)))
    assert boxless["bbox_l1"].item() == boxless["bbox_giou"].item() == 0
    total(boxless).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad(set_to_none=True)


def test_a_mask_is_drawn_where_none_is_given() -> None:
    for batch in (replace(PAIR, patch_mask=None), ImageBatch(image=IMAGE.image)):
        drawn = []
        for seed in (4, 4, 5):
            torch.manual_seed(seed)
            drawn.append(step(batch, losses={"mim"})["mim"].item())
        assert drawn[0] == pytest.approx(drawn[1], rel=1e-12)
        assert drawn[0] != pytest.approx(drawn[2], rel=1e-9)
    # The argument goes before the mask of the batch.
    given = torch.zeros(4, 16)
    given[:, 3] = 1
    expected = step(replace(PAIR, patch_mask=given), losses={"mim"})["mim"].item()
    assert step(PAIR, patch_mask=given, losses={"mim"})["mim"].item() == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize(
    "batch", [PAIR, REGION, TEXT, IMAGE], ids=lambda batch: type(batch).__name__
)
def test_half_precision_is_close(batch: Batch) -> None:
    model = model_of(CASE, hidden_dropout=0.0).float()
    if isinstance(batch, PairBatch | RegionBatch | ImageBatch):
        batch = replace(batch, image=batch.image.float())
    negatives = None
    if isinstance(batch, PairBatch | RegionBatch):
        own = torch.arange(len(batch.input_ids))
        negatives = own.roll(1), own.roll(2)
    exact = pretraining_losses(model, batch, hard_negatives=negatives)
    with torch.autocast("cpu", torch.bfloat16):
        half = pretraining_losses(model, batch, hard_negatives=negatives)
    total(half).backward()
    for name, value in exact.items():
        assert half[name].item() == pytest.approx(value.item(), rel=0.05), name
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad(set_to_none=True)
