"""The four kinds of pretraining batches, between data loaders and losses.

A prepared batch carries its layout: the numbers and positions of tokens, targets and visible patches.
Loaders compute it on the host (`prepare`; `to` and `pin_memory` call it), so a step on an accelerator
never synchronises for a size.
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
    """Positions of the tokens and masked-LM targets of B unpadded sequences."""

    packing: Packing
    lengths: Tensor  # [B] int64 real tokens
    targets: Tensor  # [M] int64 masked positions within their sequence, counting real tokens only
    target_counts: Tensor  # [B] int64
    labels: Tensor  # [M] original ids
    most_targets: int  # largest count in the batch

    @classmethod
    def of(cls, batch: TextBatch) -> TextLayout:
        """Compute the layout of a batch.

        Raises `InputError` for mismatched shapes and, on CPU, targets outside of a text.
        """
        texts, length = batch.check_texts()
        real = batch.attention_mask.bool()
        is_target = batch.masked_labels != IGNORED
        slots = is_target.shape[1]
        if on_host(real):
            _check_targets(batch, real, is_target)
            targets = host.true_places(is_target)
            counts = is_target.sum(1)
            most_targets = host.integer(counts.max()) if texts else 0
        else:
            # Unprepared batches on an accelerator keep the padding of the targets, so their number is known.
            targets = torch.arange(is_target.numel(), device=real.device)
            counts = torch.full((texts,), slots, device=real.device)
            most_targets = slots
        positions = batch.masked_positions.long().flatten()[targets]
        positions = positions + targets // max(slots, 1) * length
        packed_positions = real.long().cumsum(1).flatten()[positions] - 1
        return cls(
            packing=_with_longest(Packing.from_mask(real)),
            lengths=real.sum(1),
            targets=packed_positions.clamp_min(0),
            target_counts=counts,
            labels=batch.masked_labels.long().flatten()[targets],
            most_targets=most_targets,
        )

    @property
    def cu_targets(self) -> Tensor:
        """`[B + 1]` int32 offsets of the sequences in the targets."""
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
    """Patches that R region captions attend to, and the captions with a box to predict."""

    visible: Packing  # of the [R, 1 + N] tokens that each region attends to
    boxed: Tensor  # [Q] int64 captions of a region rather than a whole image
    boxed_tokens: int  # real tokens of the boxed captions

    @classmethod
    def of(cls, batch: RegionBatch) -> RegionLayout:
        """Compute the layout of a batch; raises `InputError` for mismatched shapes."""
        texts, _ = batch.check_texts()
        mask = batch.region_mask
        if mask.ndim != 2 or mask.shape[0] != texts:
            raise InputError(
                f"region_mask is {[*mask.shape]}; {texts} texts need [{texts}, 1 + patches]"
            )
        if batch.is_image.shape != (texts,):
            raise InputError(
                f"is_image is {[*batch.is_image.shape]}; there must be one for each of the {texts} texts"
            )
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


def _check_targets(batch: TextBatch, real: Tensor, is_target: Tensor) -> None:
    """Raise `InputError` for a target outside of its text or at padding."""
    positions = batch.masked_positions.long()
    outside = is_target & ((positions < 0) | (positions >= real.shape[1]))
    padded = is_target & ~outside & ~real.gather(1, positions.clamp(0, max(real.shape[1] - 1, 0)))
    wrong = outside | padded
    if host.any_true(wrong):
        flat = host.integer(wrong.flatten().long().argmax())
        text, slot = divmod(flat, wrong.shape[1])
        position = host.integer(positions[text, slot])
        length = host.integer(real[text].sum())
        raise InputError(
            f"masked_positions[{text}] contains {position} of {length} real tokens; label unused positions {IGNORED}"
        )


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {
            field.name: _map_tensors(getattr(value, field.name), change) for field in fields(value)
        }
        return type(value)(**changed)
    return value


@dataclass(frozen=True, kw_only=True)
class TensorBatch:
    """Base of all batches. Tensors are fields, or fields of dataclasses in fields."""

    def prepare(self) -> Self:
        """Return the batch with its layout; raises `InputError` for tensors that do not fit together."""
        return self

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Self:
        """Move the batch to a device; it is prepared before it leaves the CPU."""
        batch = self if torch.device(device).type == "cpu" else self.prepare()
        return _map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Prepare the batch and copy it to page-locked memory, so copies to a GPU do not block."""
        return _map_tensors(self.prepare(), Tensor.pin_memory)


@dataclass(frozen=True, kw_only=True)
class TextBatch(TensorBatch):
    """B captions and their masked copies."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L], non-zero for real tokens
    masked_input_ids: Tensor  # [B, L] ids, some of them replaced
    masked_positions: Tensor  # [B, M] positions to predict, 0 where unused
    masked_labels: Tensor  # [B, M] original ids at these positions, -100 where unused
    layout: TextLayout | None = None  # set by `prepare`; reset to None when a tensor is replaced

    def prepare(self) -> Self:
        return replace(self, layout=TextLayout.of(self)) if self.layout is None else self

    def check_texts(self) -> tuple[int, int]:
        """Return (B, L) after checking the shapes of the text tensors."""
        if self.input_ids.ndim != 2:
            raise InputError(f"input_ids are {[*self.input_ids.shape]}; texts must be [B, L]")
        texts, length = self.input_ids.shape
        for name in ("attention_mask", "masked_input_ids"):
            _check_shape(name, getattr(self, name), self.input_ids.shape, "input_ids")
        if self.masked_positions.ndim != 2 or self.masked_positions.shape[0] != texts:
            raise InputError(
                f"masked_positions are {[*self.masked_positions.shape]}; {texts} texts need [{texts}, M]"
            )
        _check_shape(
            "masked_labels", self.masked_labels, self.masked_positions.shape, "masked_positions"
        )
        return texts, length


def _check_shape(name: str, tensor: Tensor, shape: torch.Size, like: str) -> None:
    if tensor.shape != shape:
        raise InputError(
            f"{name} is {[*tensor.shape]} and {like} {[*shape]}; both must have the same shape"
        )


@dataclass(frozen=True, kw_only=True)
class PairBatch(TextBatch):
    """B images with one caption each."""

    image: Tensor  # [B, 3, R, R] normalised pixels
    image_ids: Tensor | None = None  # [B], equal for captions of one image; None: all differ
    patch_mask: Tensor | None = None  # [B, N] boolean, patches hidden by masked image modelling


@dataclass(frozen=True, kw_only=True)
class RegionBatch(TextBatch):
    """R captions of regions in B images."""

    image: Tensor  # [B, 3, R, R] normalised pixels
    image_index: Tensor  # [R] image of each caption
    region_mask: Tensor  # [R, 1 + N], non-zero for token 0 and the patches of the region
    boxes: Tensor  # [R, 4] (cx, cy, w, h) relative to the image
    is_image: Tensor  # [R], non-zero for captions of the whole image, which have no box
    regions: RegionLayout | None = None  # set by `prepare`, like `layout`

    def prepare(self) -> Self:
        if self.regions is None:
            return replace(self, regions=RegionLayout.of(self)).prepare()
        return super().prepare()


@dataclass(frozen=True, kw_only=True)
class ImageBatch(TensorBatch):
    """B images without captions."""

    image: Tensor  # [B, 3, R, R] normalised pixels
    patch_mask: Tensor | None = None  # [B, N] boolean, patches hidden by masked image modelling


Batch = TextBatch | PairBatch | RegionBatch | ImageBatch
