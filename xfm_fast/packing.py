"""Unpadded (varlen) batches: sequences packed one after another, and grouped by their image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from xfm_fast.errors import InputError
from xfm_fast.kernels import host


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Offsets of the sequences in a packed tensor `[T, ...]`."""

    cu_seqlens: Tensor  # [P + 1] int32 offsets
    key_mask: Tensor | None = None  # [T] boolean, False for padding tokens that are queries only
    max_seqlen: int | None = None  # upper bound of the lengths; avoids a device synchronisation

    @classmethod
    def from_lengths(cls, lengths: Tensor, longest: int | None = None) -> Sequences:
        """Sequences of the lengths `[P]`; `longest` is an upper bound, where the host knows one."""
        return cls(cu_seqlens=offsets(lengths), max_seqlen=longest)

    def repeated(self, times: int) -> Sequences:
        """The layout of `times` concatenated copies."""
        copies = self.cu_seqlens.diff().repeat(times)
        mask = None if self.key_mask is None else self.key_mask.repeat(times)
        return Sequences(cu_seqlens=offsets(copies), key_mask=mask, max_seqlen=self.max_seqlen)

    @property
    def longest(self) -> int:
        """Length of the longest sequence in tokens, or `max_seqlen` if given."""
        # A compiler cannot enter the lock of a cached property.
        return self._max_length if self.max_seqlen is None else self.max_seqlen

    @cached_property
    def _max_length(self) -> int:
        lengths = self.cu_seqlens.diff()
        if not lengths.numel():
            return 0
        return host.integer(lengths.max()) if on_host(lengths) else int(lengths.max())


@dataclass(frozen=True, kw_only=True)
class Reads(Sequences):
    """The tokens of packed sequences that the last layer computes, sequence by sequence.

    `cu_seqlens` are offsets of the sequences in `rows`.
    """

    rows: Tensor  # [Q] int64 rows of the packed tensor, grouped by sequence

    @classmethod
    def first_tokens(cls, sequences: Sequences) -> Reads:
        """Token 0 of every sequence."""
        cu = sequences.cu_seqlens
        ones = torch.arange(cu.shape[0], dtype=cu.dtype, device=cu.device)
        return cls(cu_seqlens=ones, max_seqlen=1, rows=cu[:-1])


@dataclass(frozen=True, kw_only=True)
class Packing(Sequences):
    """Positions of the packed tokens in a padded batch `[P, L]`. `pack` and `unpad` move data."""

    positions: Tensor  # [T] flat positions in the padded batch, in packed order
    shape: tuple[int, int]  # (P, L) of the padded batch
    order: Tensor | None = (
        None  # [P] index of the sequence at each packed position; None for the original order
    )
    whole: bool = False  # True without padding: nothing moves

    @classmethod
    def from_mask(
        cls,
        attention_mask: Tensor,
        *,
        order: Tensor | None = None,
        keep_padding: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Packing:
        """Pack the tokens whose mask `[P, L]` is non-zero, in any pattern, with the sequences in `order` `[P]`.

        `keep_padding` packs padding tokens too, as queries that no query attends to (only the official VQA decoder
        reads them). `lengths` are the real tokens per sequence, where the host knows them: then a GPU is not
        synchronised, and only their number and sum are checked. Raises `InputError` for lengths that do not fit the
        mask.
        """
        mask = attention_mask.bool()
        rows = mask if order is None else mask[order]
        texts, length = rows.shape
        if lengths is not None and (
            len(lengths) != texts or any(not 0 <= n <= length for n in lengths)
        ):
            raise InputError(
                f"lengths are {[*lengths]}; they must be {texts} numbers from 0 to {length}"
            )
        kept = torch.ones_like(rows) if keep_padding else rows
        longest = None
        if keep_padding:
            positions, longest = torch.arange(texts * length, device=rows.device), length
        elif lengths is None or on_host(kept):
            positions = (
                host.true_places(kept) if on_host(kept) else kept.flatten().nonzero().flatten()
            )
            if lengths is not None and sum(lengths) != len(positions):
                raise InputError(
                    f"lengths add up to {sum(lengths)}; the mask shows {len(positions)} tokens"
                )
        else:
            # Unlike `nonzero`, sorting does not synchronise for the number of tokens.
            positions = (
                kept.flatten().to(torch.uint8).argsort(descending=True, stable=True)[: sum(lengths)]
            )
        if lengths is not None and not keep_padding:
            longest = max(lengths, default=0)
        if order is not None:
            positions = order[positions // length] * length + positions % length
        return cls(
            positions=positions,
            cu_seqlens=offsets(kept.sum(1)),
            shape=(texts, length),
            order=order,
            key_mask=rows.flatten() if keep_padding else None,
            max_seqlen=longest,
        )

    def to(self, device: torch.device) -> Packing:
        """Move the layout to another device."""
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def pack(self, padded: Tensor) -> Tensor:
        """`[P, L, ...]` → `[T, ...]`."""
        if self.whole:
            return padded.flatten(0, 1)
        return padded.flatten(0, 1).index_select(0, self.positions)

    def unpad(self, packed: Tensor) -> Tensor:
        """`[T, ...]` → `[P, L, ...]`, zeros at padding: the inverse of `pack`."""
        texts, length = self.shape
        if self.whole:
            return packed.view(texts, length, *packed.shape[1:])
        padded = packed.new_zeros(texts * length, *packed.shape[1:])
        return padded.index_copy(0, self.positions, packed).view(texts, length, *packed.shape[1:])

    def restore(self, per_text: Tensor) -> Tensor:
        """Reorder rows `[P, ...]` from packed order to the order of the padded batch."""
        if self.order is None:
            return per_text
        return torch.empty_like(per_text).index_copy(0, self.order, per_text)


@dataclass(frozen=True)
class ImageGroups:
    """Sequences grouped by image: the texts of an image form one long query sequence in cross-attention."""

    cu_texts: Tensor  # [B + 1] offsets of the images in the ordered sequences
    order: Tensor | None = (
        None  # [P] permutation that groups the sequences; None if they are grouped already
    )

    @classmethod
    def from_index(
        cls, image_index: Tensor, images: int, device: torch.device | None = None
    ) -> ImageGroups:
        """Group P texts by image: `image_index` `[P]` integers below `images`, on the host to avoid a synchronisation.

        `device` is where the texts are, by default the device of the index.
        """
        index = image_index.long()
        if index.is_cpu and device is not None and device.type != "cpu":
            groups = cls.from_index(index, images)
            order = None if groups.order is None else groups.order.to(device, non_blocking=True)
            return cls(groups.cu_texts.to(device, non_blocking=True), order)
        order = (
            None
            if index.numel() < 2 or bool((index.diff() >= 0).all())
            else index.argsort(stable=True)
        )
        return cls(offsets(torch.bincount(index, minlength=images)), order)

    def token_offsets(self, cu_seqlens: Tensor) -> Tensor:
        """`[B + 1]` offsets of the images in the packed tokens, from the offsets of the sequences."""
        return cu_seqlens.index_select(0, self.cu_texts)


def offsets(lengths: Tensor) -> Tensor:
    """`[S]` lengths → `[S + 1]` int32 offsets."""
    cumulative = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cumulative[1:])
    return cumulative


def ragged_rows(starts: Tensor, lengths: Tensor, total: int | None = None) -> Tensor:
    """Concatenate the ranges `starts[i] ... starts[i] + lengths[i] - 1`: `[sum(lengths)]` int64.

    `total`, the sum of the lengths, avoids a synchronisation on an accelerator.
    """
    first = torch.repeat_interleave(
        starts - (lengths.cumsum(0) - lengths), lengths, output_size=total
    )
    return first + torch.arange(first.shape[0], device=starts.device)


def on_host(tensor: Tensor) -> bool:
    """Return True if Python can read the values without synchronising a device or breaking a trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
