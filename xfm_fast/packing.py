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
        """Lay out sequences of lengths `[P]`; `longest` is an upper bound, if the host knows one."""
        return cls(cu_seqlens=offsets(lengths), max_seqlen=longest)

    def repeated(self, times: int) -> Sequences:
        """Lay out `times` concatenated copies."""
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
        """Read token 0 of every sequence."""
        starts = sequences.cu_seqlens
        one_each = torch.arange(starts.shape[0], dtype=starts.dtype, device=starts.device)
        return cls(cu_seqlens=one_each, max_seqlen=1, rows=starts[:-1])


@dataclass(frozen=True, kw_only=True)
class Packing(Sequences):
    """Positions of the packed tokens in a padded batch `[P, L]`."""

    positions: Tensor  # [T] flat positions in the padded batch, in packed order
    shape: tuple[int, int]  # (P, L) of the padded batch
    order: Tensor | None = None  # [P] original index of the packed sequences; None: unchanged
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

        `keep_padding` packs padding tokens too, as queries that no query attends to (only the official
        VQA decoder reads them). `lengths` are the real tokens per sequence, if the host knows them:
        then a GPU is not synchronised, and only their number and sum are checked. Raises `InputError`
        for lengths that do not fit the mask.
        """
        mask = attention_mask.bool()
        real = mask if order is None else mask[order]
        texts, length = real.shape
        if lengths is not None and (
            len(lengths) != texts or any(not 0 <= n <= length for n in lengths)
        ):
            raise InputError(
                f"lengths are {[*lengths]}; they must be {texts} numbers from 0 to {length}"
            )
        packed = torch.ones_like(real) if keep_padding else real
        longest = None if lengths is None else max(lengths, default=0)
        if keep_padding:
            positions, longest = torch.arange(texts * length, device=real.device), length
        elif on_host(real):
            positions = host.true_places(real)
            if lengths is not None and sum(lengths) != len(positions):
                raise InputError(
                    f"lengths add up to {sum(lengths)}; the mask shows {len(positions)} tokens"
                )
        elif lengths is None:
            positions = real.flatten().nonzero().flatten()
        else:
            # Unlike `nonzero`, sorting does not synchronise for the number of tokens.
            flags = real.flatten().to(torch.uint8)
            positions = flags.argsort(descending=True, stable=True)[: sum(lengths)]
        if order is not None:
            positions = order[positions // length] * length + positions % length
        return cls(
            positions=positions,
            cu_seqlens=offsets(packed.sum(1)),
            shape=(texts, length),
            order=order,
            key_mask=real.flatten() if keep_padding else None,
            max_seqlen=longest,
        )

    def to(self, device: torch.device) -> Packing:
        """Move the layout to another device."""
        fields = vars(self).items()
        moved = {name: value.to(device) for name, value in fields if isinstance(value, Tensor)}
        return replace(self, **moved)

    def pack(self, padded: Tensor) -> Tensor:
        """Pack `[P, L, ...]` to `[T, ...]`."""
        tokens = padded.flatten(0, 1)
        return tokens if self.whole else tokens.index_select(0, self.positions)

    def unpad(self, packed: Tensor) -> Tensor:
        """Invert `pack`: `[T, ...]` → `[P, L, ...]`, zeros at padding."""
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
    order: Tensor | None = None  # [P] permutation that groups the sequences; None if grouped

    @classmethod
    def from_index(
        cls, image_index: Tensor, images: int, device: torch.device | None = None
    ) -> ImageGroups:
        """Group P texts by image: `image_index` `[P]` integers below `images`.

        An index on the host avoids a synchronisation. `device` is that of the texts, by default that
        of the index.
        """
        index = image_index.long()
        if index.is_cpu and device is not None and device.type != "cpu":
            groups = cls.from_index(index, images)
            order = None if groups.order is None else groups.order.to(device, non_blocking=True)
            return cls(groups.cu_texts.to(device, non_blocking=True), order)
        order = None
        if index.numel() > 1 and not bool((index.diff() >= 0).all()):
            order = index.argsort(stable=True)
        return cls(offsets(torch.bincount(index, minlength=images)), order)

    def token_offsets(self, cu_seqlens: Tensor) -> Tensor:
        """Return the offsets `[B + 1]` of the images in the packed tokens."""
        return cu_seqlens.index_select(0, self.cu_texts)


def offsets(lengths: Tensor) -> Tensor:
    """Return the int32 offsets `[S + 1]` of sequences of lengths `[S]`."""
    cumulative = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cumulative[1:])
    return cumulative


def ragged_rows(starts: Tensor, lengths: Tensor, total: int | None = None) -> Tensor:
    """Concatenate the ranges `starts[i] ... starts[i] + lengths[i] - 1`: `[sum(lengths)]` int64.

    `total`, the sum of the lengths, avoids a synchronisation on an accelerator.
    """
    packed_starts = lengths.cumsum(0) - lengths
    shifts = torch.repeat_interleave(starts - packed_starts, lengths, output_size=total)
    return shifts + torch.arange(shifts.shape[0], device=starts.device)


def on_host(tensor: Tensor) -> bool:
    """Return whether Python can read the values without synchronising a device or breaking a trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
