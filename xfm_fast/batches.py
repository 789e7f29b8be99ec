"""What one step of pretraining reads: the four kinds of batch, as loaders make them and losses take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class _Batch:
    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Self:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, from which copies to a GPU do not block."""
        return self._map(Tensor.pin_memory)


@dataclass(frozen=True, kw_only=True)
class TextBatch(_Batch):
    """B texts and their masked copies.

    Attributes:
        input_ids: `[B, L]` int64.
        attention_mask: `[B, L]`, non-zero for real tokens.
        masked_input_ids: `[B, L]` ids in which some tokens were replaced.
        masked_positions: `[B, M]` where to predict, 0 where there is nothing more to predict.
        masked_labels: `[B, M]` original ids at those places, -100 where there is nothing to predict.
    """

    input_ids: Tensor
    attention_mask: Tensor
    masked_input_ids: Tensor
    masked_positions: Tensor
    masked_labels: Tensor


@dataclass(frozen=True, kw_only=True)
class PairBatch(TextBatch):
    """B images and a caption of each.

    Attributes:
        image: `[B, 3, R, R]` normalised pixels.
        image_ids: `[B]`, equal for captions of the same image; None when all images differ.
        patch_mask: `[B, N]` boolean, the patches that masked image modelling hides.
    """

    image: Tensor
    image_ids: Tensor | None = None
    patch_mask: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RegionBatch(TextBatch):
    """R texts about regions of B images.

    Attributes:
        image: `[B, 3, R, R]` normalised pixels.
        image_index: `[R]` image of each text.
        region_mask: `[R, 1 + N]`, non-zero for token 0 and the patches of the region.
        boxes: `[R, 4]` (cx, cy, w, h) relative to the image.
        is_image: `[R]`, non-zero where the text describes the whole image and there is no box to predict.
    """

    image: Tensor
    image_index: Tensor
    region_mask: Tensor
    boxes: Tensor
    is_image: Tensor


@dataclass(frozen=True, kw_only=True)
class ImageBatch(_Batch):
    """B images without text.

    Attributes:
        image: `[B, 3, R, R]` normalised pixels.
        patch_mask: `[B, N]` boolean, the patches that masked image modelling hides.
    """

    image: Tensor
    patch_mask: Tensor | None = None


Batch = TextBatch | PairBatch | RegionBatch | ImageBatch
