"""Batches of one step of pretraining, of four kinds, as loaders make them and losses take them.

A batch also knows its layout: how many tokens, targets and visible patches there are, and where. Loaders, which run on
the host anyway, find that out (`prepare`; `to` and `pin_memory` do it by themselves), so that a step on an accelerator
never has to ask the device for a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from xfm_fast.errors import InputError
from xfm_fast.kernels import host
from xfm_fast.packing import Packing, offsets, on_host

IGNORED = -100
"""Target of a token that the language-modelling losses leave out."""


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """The places of the tokens and the targets of B texts once padding is left out.

    Attributes:
        packing: of the real tokens.
        lengths: `[B]` int64 numbers of real tokens.
        targets: `[M]` int64, the masked tokens as places among the real tokens of their text; text by text.
        target_counts: `[B]` int64 of each text.
        labels: `[M]` their original ids.
        most_targets: of any text.
    """

    packing: Packing
    lengths: Tensor
    targets: Tensor
    target_counts: Tensor
    labels: Tensor
    most_targets: int

    @classmethod
    def of(cls, batch: TextBatch) -> TextLayout:
        """The layout of a batch.

        Raises:
            InputError: shapes that disagree; on CPU also a target outside of its text.
        """
        texts, length = batch.check_texts()
        real = batch.attention_mask.bool()
        packing = _with_longest(Packing.from_mask(real))
        wanted = batch.masked_labels != IGNORED
        if on_host(real):
            _check_targets(batch, real, wanted)
            rows = host.true_places(wanted)
            counts = wanted.sum(1)
            most = host.integer(counts.max()) if texts else 0
            row_of = rows // max(wanted.shape[1], 1)
        else:
            # Unprepared batches on an accelerator carry the padding of the targets along: their number is known.
            rows = torch.arange(wanted.numel(), device=real.device)
            most = wanted.shape[1]
            counts = torch.full((texts,), most, device=real.device)
            row_of = rows // max(most, 1)
        places = batch.masked_positions.long().flatten()[rows] + row_of * length
        within = real.long().cumsum(1).flatten()[places] - 1
        return cls(
            packing=packing,
            lengths=real.sum(1),
            targets=within.clamp_min(0),
            target_counts=counts,
            labels=batch.masked_labels.long().flatten()[rows],
            most_targets=most,
        )

    @property
    def cu_targets(self) -> Tensor:
        """`[B + 1]` int32 offsets of the texts in the targets."""
        return offsets(self.target_counts)

    @property
    def tokens(self) -> int:
        return self.packing.positions.shape[0]

    @property
    def starts(self) -> Tensor:
        """`[B]` int64 packed rows of the first tokens."""
        return self.packing.cu_seqlens[:-1].long()


@dataclass(frozen=True, kw_only=True)
class RegionLayout:
    """The patches that the texts of R regions see, and those texts that have a box to predict.

    Attributes:
        visible: of the `[R, 1 + N]` tokens that each region sees.
        boxed: `[Q]` int64 texts that describe a region, not a whole image.
        boxed_tokens: real tokens of these texts.
    """

    visible: Packing
    boxed: Tensor
    boxed_tokens: int

    @classmethod
    def of(cls, batch: RegionBatch) -> RegionLayout:
        """The layout of a batch.

        Raises:
            InputError: shapes that disagree.
        """
        texts, _ = batch.check_texts()
        mask = batch.region_mask
        if mask.ndim != 2 or mask.shape[0] != texts:
            raise InputError(f"region_mask is {[*mask.shape]}; {texts} texts need [{texts}, 1 + patches]")
        if batch.is_image.shape != (texts,):
            raise InputError(f"is_image is {[*batch.is_image.shape]}; there must be one for each of the {texts} texts")
        boxed, real = torch.arange(texts, device=mask.device), batch.attention_mask.bool()
        if on_host(real):
            boxed = host.true_places(~batch.is_image.bool())
            real = real[boxed]
        return cls(
            visible=_with_longest(Packing.from_mask(mask)),
            boxed=boxed,
            boxed_tokens=Packing.from_mask(real).positions.shape[0],
        )


def _with_longest(packing: Packing) -> Packing:
    return replace(packing, max_seqlen=packing.longest)


def _check_targets(batch: TextBatch, real: Tensor, wanted: Tensor) -> None:
    positions = batch.masked_positions.long()
    outside = wanted & ((positions < 0) | (positions >= real.shape[1]))
    padded = wanted & ~outside & ~real.gather(1, positions.clamp(0, max(real.shape[1] - 1, 0)))
    wrong = outside | padded
    if host.any_true(wrong):
        flat = host.integer(wrong.flatten().long().argmax())
        text, number = divmod(flat, wrong.shape[1])
        position = host.integer(positions[text, number])
        length = host.integer(real[text].sum())
        raise InputError(
            f"masked_positions of text {text} hold {position}, outside of its {length} real tokens; give places of "
            f"real tokens, and the label {IGNORED} where there is nothing to predict"
        )


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: _map_tensors(getattr(value, field.name), change) for field in fields(value)})
    return value


@dataclass(frozen=True, kw_only=True)
class TensorBatch:
    """What a training loop needs of a batch. Its tensors are fields, or fields of dataclasses in fields."""

    def prepare(self) -> Self:
        """The batch with its layout, which it then carries from device to device.

        Raises:
            InputError: tensors that do not belong together.
        """
        return self

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Self:
        """The batch on another device; one that leaves the CPU is prepared first."""
        batch = self if torch.device(device).type == "cpu" else self.prepare()
        return _map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch, prepared, in page-locked memory, from which copies to a GPU do not block."""
        return _map_tensors(self.prepare(), Tensor.pin_memory)


@dataclass(frozen=True, kw_only=True)
class TextBatch(TensorBatch):
    """B texts and their masked copies.

    Attributes:
        input_ids: `[B, L]` int64.
        attention_mask: `[B, L]`, non-zero for real tokens.
        masked_input_ids: `[B, L]` ids in which some tokens were replaced.
        masked_positions: `[B, M]` where to predict, 0 where there is nothing more to predict.
        masked_labels: `[B, M]` original ids at those places, -100 where there is nothing to predict.
        layout: see `prepare`; None again where one of the tensors is replaced.
    """

    input_ids: Tensor
    attention_mask: Tensor
    masked_input_ids: Tensor
    masked_positions: Tensor
    masked_labels: Tensor
    layout: TextLayout | None = None

    def prepare(self) -> Self:
        return self if self.layout is not None else replace(self, layout=TextLayout.of(self))

    def check_texts(self) -> tuple[int, int]:
        """(B, L), when the shapes of the text tensors agree."""
        if self.input_ids.ndim != 2:
            raise InputError(f"input_ids are {[*self.input_ids.shape]}; texts must be [B, L]")
        texts, length = self.input_ids.shape
        for name in ("attention_mask", "masked_input_ids"):
            _check_shape(name, getattr(self, name), self.input_ids.shape, "input_ids")
        if self.masked_positions.ndim != 2 or self.masked_positions.shape[0] != texts:
            raise InputError(f"masked_positions are {[*self.masked_positions.shape]}; {texts} texts need [{texts}, M]")
        _check_shape("masked_labels", self.masked_labels, self.masked_positions.shape, "masked_positions")
        return texts, length


def _check_shape(name: str, tensor: Tensor, shape: torch.Size, like: str) -> None:
    if tensor.shape != shape:
        raise InputError(f"{name} is {[*tensor.shape]} and {like} {[*shape]}; both must have the same shape")


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
        regions: see `prepare` and `layout`.
    """

    image: Tensor
    image_index: Tensor
    region_mask: Tensor
    boxes: Tensor
    is_image: Tensor
    regions: RegionLayout | None = None

    def prepare(self) -> Self:
        return super().prepare() if self.regions is not None else replace(self, regions=RegionLayout.of(self)).prepare()


@dataclass(frozen=True, kw_only=True)
class ImageBatch(TensorBatch):
    """B images without text.

    Attributes:
        image: `[B, 3, R, R]` normalised pixels.
        patch_mask: `[B, N]` boolean, the patches that masked image modelling hides.
    """

    image: Tensor
    patch_mask: Tensor | None = None


Batch = TextBatch | PairBatch | RegionBatch | ImageBatch
