"""Golden batches as typed ones, and what the tests of a step share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.agreement import inputs_of, with_weights
from tests.conftest import config
from xfm_fast.batches import Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.models.xfm import XFM


@cache
def model_of(case: str, **overrides: object) -> XFM:
    return with_weights(XFM(config(case, **overrides)), case, torch.float64)


def texts_of(x: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    names = {
        "input_ids": "text_ids",
        "attention_mask": "text_atts",
        "masked_input_ids": "text_ids_masked",
        "masked_positions": "masked_pos",
        "masked_labels": "masked_ids",
    }
    return {ours: x[prefix + theirs] for ours, theirs in names.items()}


def pair_batch(case: str, *, ids: bool = False) -> PairBatch:
    x = inputs_of(f"{case}/inputs", torch.float64)
    return PairBatch(
        **texts_of(x, ""),
        image=x["image"],
        image_ids=x["idx"] if ids else None,
        patch_mask=x["image_mask"],
    )


def region_batch(case: str) -> RegionBatch:
    x = inputs_of(f"{case}/inputs", torch.float64)
    return RegionBatch(
        **texts_of(x, "r_"),
        image=x["r_image"],
        image_index=x["r_idx_to_group_img"],
        region_mask=x["r_image_atts"],
        boxes=x["r_target_bbox"],
        is_image=x["r_is_image"],
    )


def text_batch(case: str) -> TextBatch:
    return TextBatch(**texts_of(inputs_of(f"{case}/inputs", torch.float64), "t_"))


def image_batch(case: str) -> ImageBatch:
    x = inputs_of(f"{case}/inputs", torch.float64)
    return ImageBatch(image=x["image"], patch_mask=x["image_mask"])


BATCHES: dict[str, Callable[[str], Batch]] = {
    "pairs": pair_batch,
    "pairs with ids": lambda case: pair_batch(case, ids=True),
    "regions": region_batch,
    "images": image_batch,
    "texts": text_batch,
}


def rows(batch: Batch, *, image: slice | None = None, text: slice) -> dict[str, Any]:
    """The tensors of a part of a batch; images are cut like texts unless told otherwise."""
    return {
        name: value[text if image is None or name != "image" else image]
        for name, value in vars(batch).items()
        if isinstance(value, Tensor)
    }


def negatives_of(case: str, batch: Batch) -> tuple[Tensor, Tensor]:
    x, prefix = (
        inputs_of(f"{case}/inputs", torch.float64),
        "r_" if isinstance(batch, RegionBatch) else "",
    )
    return x[f"{prefix}itm_image_neg_idx"], x[f"{prefix}itm_text_neg_idx"]


def gradients(model: XFM, loss: Tensor) -> dict[str, Tensor | None]:
    """Of every parameter, which keeps none of them."""
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([*losses.values()]).sum()
