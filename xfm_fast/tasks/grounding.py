"""Visual grounding: predict the box of a referring expression.

Official recipe (RefCOCO+): 384 pixels, 20 expressions per GPU, lr 2e-5, 15 epochs, optionally after two epochs on
region captions at 224 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.models import inputs
from xfm_fast.models.processor import pixel_boxes
from xfm_fast.objectives import box_giou_loss, box_l1_loss
from xfm_fast.tasks.task_model import TaskModel

__all__ = [
    "GroundingLosses",
    "GroundingModel",
    "box_accuracy",
    "grounding_accuracy",
    "pixel_boxes",
    "pixel_iou",
]


class GroundingLosses(NamedTuple):
    """The two loss terms, to be summed."""

    l1: Tensor
    giou: Tensor

    @property
    def total(self) -> Tensor:
        return self.l1 + self.giou


class GroundingModel(TaskModel):
    """X-FM with its box head, trained with the box losses of pretraining."""

    def __init__(self, config: XFMConfig) -> None:
        super().__init__(config, heads=("boxes",))

    def boxes(
        self,
        pixels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Predict boxes `[P, 4]` (cx, cy, w, h) of expressions `[P, L]`; `image_index` `[P]` maps them to images."""
        mask = inputs.check_tokens(input_ids, attention_mask, self.config)
        memory = self.image_memory(self.encode_image(pixels))
        text = self.encode_text(input_ids, mask)
        fused = self.fuse(text, mask, memory, image_index, first_token_only=True)
        # In bf16 a coordinate would be off by up to a 512th of the image.
        with torch.autocast(fused.device.type, enabled=False):
            return self.predict_boxes(fused.to(self.dtype))

    def forward(
        self,
        pixels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        target: Tensor,
        image_index: Tensor | None = None,
        is_image: Tensor | None = None,
    ) -> GroundingLosses:
        """Losses against `target` `[P, 4]`; whole-image captions (`is_image` `[P]`) are excluded."""
        predicted = self.boxes(pixels, input_ids, attention_mask, image_index)
        return GroundingLosses(box_l1_loss(predicted, target, is_image), box_giou_loss(predicted, target, is_image))


def pixel_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU `[P]` of (x, y, w, h) boxes in the pixel convention of the RefCOCO evaluation.

    Right and bottom edges are inclusive (x + w - 1), so boxes that share one row or column do not overlap, and one-
    pixel boxes have IoU 0. Boxes without area have IoU 0 (the official code divides by zero).
    """
    low = torch.maximum(a[:, :2], b[:, :2])
    high = torch.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - 1
    overlapping = (low < high).all(1)
    shared = (high - low + 1).prod(1) * overlapping
    union = a[:, 2:].prod(1) + b[:, 2:].prod(1) - shared
    return torch.where(union > 0, shared / union.where(union > 0, torch.ones_like(union)), torch.zeros_like(union))


def grounding_accuracy(
    boxes: Tensor, sizes: Tensor, reference: Tensor, splits: Sequence[str] | None = None, *, threshold: float = 0.5
) -> dict[str, float]:
    """`box_accuracy` of relative (cx, cy, w, h) predictions `[P, 4]` on images of `sizes` (width, height) `[P, 2]`."""
    count = boxes.shape[0]
    if sizes.shape != (count, 2):
        raise InputError(
            f"{count} boxes and sizes {[*sizes.shape]} do not belong together; there must be one of each per expression"
        )
    return box_accuracy(pixel_boxes(boxes, sizes), reference, splits, threshold=threshold)


def box_accuracy(
    boxes: Tensor, reference: Tensor, splits: Sequence[str] | None = None, *, threshold: float = 0.5
) -> dict[str, float]:
    """Share of (x, y, w, h) boxes with IoU of at least `threshold`: `all`, or by split."""
    count = boxes.shape[0]
    names = ["all"] * count if splits is None else list(splits)
    if not count or reference.shape != (count, 4) or len(names) != count:
        raise InputError(
            f"{count} boxes, reference boxes {[*reference.shape]} and {len(names)} splits do not belong together; "
            "there must be one of each per expression"
        )
    grouped: dict[str, list[bool]] = {}
    for name, hit in zip(names, (pixel_iou(boxes, reference) >= threshold).tolist(), strict=True):
        grouped.setdefault(name, []).append(hit)
    return {name: sum(hits) / len(hits) for name, hits in grouped.items()}
