"""Bounding-box prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from xfm_fast.errors import InputError


def _check_boxes(predicted: Tensor, target: Tensor, is_image: Tensor | None) -> None:
    if predicted.ndim != 2 or predicted.shape[1] != 4 or predicted.shape != target.shape:
        raise InputError(f"boxes are {[*predicted.shape]} and {[*target.shape]}; both must be [R, 4]: (cx, cy, w, h)")
    if is_image is not None and is_image.shape != predicted.shape[:1]:
        raise InputError(
            f"is_image is {[*is_image.shape]}; there must be one for each of the {predicted.shape[0]} boxes"
        )


def _mean_over_boxes(loss: Tensor, is_image: Tensor | None) -> Tensor:
    """Sum over boxes divided by their number, without those that are whole images."""
    if is_image is None:
        return loss.sum() / max(loss.shape[0], 1)
    whole = is_image.bool()
    return loss.masked_fill(whole, 0).sum() / (~whole).sum().clamp_min(1)


def box_l1_loss(predicted: Tensor, target: Tensor, is_image: Tensor | None = None) -> Tensor:
    """L1 distance of boxes, summed over the four coordinates, averaged over boxes.

    Args:
        predicted, target: `[R, 4]` boxes (cx, cy, w, h) relative to the image.
        is_image: `[R]`, non-zero for captions of a whole image, which have no box to predict and do not count.

    Returns:
        A scalar; zero (the official code: NaN) when no box counts.

    Raises:
        InputError: shapes that do not belong together.
    """
    _check_boxes(predicted, target, is_image)
    return _mean_over_boxes((predicted - target).abs().sum(1), is_image)


def box_giou_loss(predicted: Tensor, target: Tensor, is_image: Tensor | None = None) -> Tensor:
    """`1 - GIoU` (arXiv 1902.09630), averaged over boxes; arguments and result as for `box_l1_loss`.

    Every box gets its own loss, the degenerate ones too (see `generalized_iou`). The official code sets the loss of
    the *whole batch* to zero as soon as one box has a negative side, and gives NaN for two coinciding boxes without
    area.
    """
    _check_boxes(predicted, target, is_image)
    return _mean_over_boxes(1 - generalized_iou(predicted, target), is_image)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of boxes, pair by pair.

    Args:
        a, b: `[R, 4]` boxes (cx, cy, w, h).

    Returns:
        `[R]` in [-1, 1]. A side that is negative counts as zero. Two boxes without area have intersection over union
        0, and where even their hull has no area, GIoU 0; gradients stay finite in all these cases.
    """
    low_a, high_a, area_a = _corners(a)
    low_b, high_b, area_b = _corners(b)
    intersection = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp_min(0).prod(1)
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(1)
    union = area_a + area_b - intersection
    return _quotient(intersection, union) - _quotient(hull - union, hull)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    centre, sides = boxes[:, :2], boxes[:, 2:].clamp_min(0)
    low, high = centre - sides / 2, centre + sides / 2
    # From the corners, not from the sides: intersection, union and hull then round alike, and identical boxes get 1.
    return low, high, (high - low).prod(1)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0, with a finite gradient: the division never sees the zero."""
    empty = denominator <= 0
    return (numerator / denominator.masked_fill(empty, 1)).masked_fill(empty, 0)
