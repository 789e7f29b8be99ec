"""Padding-free batches: texts packed one after the other, and grouped by the image they are paired with."""

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
    """Texts that lie one after the other in a packed tensor `[T, ...]`.

    Attributes:
        cu_seqlens: `[P + 1]` int32 offsets of the texts.
        key_mask: `[T]` boolean, False for tokens that are queries only (padding that was kept). None otherwise.
        max_seqlen: an upper bound of the lengths where the host knows one, so that it need not ask the device.
    """

    cu_seqlens: Tensor
    key_mask: Tensor | None = None
    max_seqlen: int | None = None

    @classmethod
    def from_lengths(cls, lengths: Tensor, longest: int | None = None) -> Sequences:
        """Texts of the given lengths `[P]`; `longest` is an upper bound of them where the host knows one."""
        return cls(cu_seqlens=offsets(lengths), max_seqlen=longest)

    def repeated(self, times: int) -> Sequences:
        """The layout of `times` copies of such texts behind each other."""
        copies = self.cu_seqlens.diff().repeat(times)
        mask = None if self.key_mask is None else self.key_mask.repeat(times)
        return Sequences(cu_seqlens=offsets(copies), key_mask=mask, max_seqlen=self.max_seqlen)

    @property
    def longest(self) -> int:
        """Length of the longest text in tokens; `max_seqlen` where that is given."""
        # A compiler cannot enter the lock of a cached property, and need not where this is known.
        return self._measured if self.max_seqlen is None else self.max_seqlen

    @cached_property
    def _measured(self) -> int:
        lengths = self.cu_seqlens.diff()
        if not lengths.numel():
            return 0
        return host.integer(lengths.max()) if on_host(lengths) else int(lengths.max())


@dataclass(frozen=True, kw_only=True)
class Reads(Sequences):
    """The tokens of packed texts that are read, text by text: all that a last layer has to compute.

    `cu_seqlens` are the offsets of the texts in the list of reads.

    Attributes:
        rows: `[Q]` int64 rows of the packed tensor, those of a text together.
    """

    rows: Tensor

    @classmethod
    def first_tokens(cls, sequences: Sequences) -> Reads:
        """Token 0 of every text."""
        cu = sequences.cu_seqlens
        ones = torch.arange(cu.shape[0], dtype=cu.dtype, device=cu.device)
        return cls(cu_seqlens=ones, max_seqlen=1, rows=cu[:-1])


@dataclass(frozen=True, kw_only=True)
class Packing(Sequences):
    """The positions of a padded batch `[P, L]` whose tokens are packed. `pack` and `unpad` move data.

    Attributes:
        positions: `[T]` flat positions in the padded batch, in packed order.
        shape: (P, L) of the padded batch.
        order: `[P]` the text at each position of the packed sequence; None when they keep their order.
        whole: whether there is no padding, so that nothing moves.
    """

    positions: Tensor
    shape: tuple[int, int]
    order: Tensor | None = None
    whole: bool = False

    @classmethod
    def from_mask(
        cls,
        attention_mask: Tensor,
        *,
        order: Tensor | None = None,
        keep_padding: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Packing:
        """Pack the tokens whose mask is non-zero (any pattern of them, not only prefixes).

        Args:
            attention_mask: `[P, L]`, non-zero for real tokens.
            order: `[P]` permutation in which the texts are to lie.
            keep_padding: keep padding tokens as queries that no query attends to. The official code computes them; only
                its VQA decoder reads them.
            lengths: how many tokens of each text are real, in the order of the mask, where the host knows it: then
                nothing waits for a GPU. The host is believed, but for their number.

        Raises:
            InputError: not one length for each text, or none between 0 and L.
        """
        mask = attention_mask.bool()
        rows = mask if order is None else mask[order]
        texts, length = rows.shape
        if lengths is not None and (len(lengths) != texts or any(not 0 <= n <= length for n in lengths)):
            raise InputError(f"lengths are {[*lengths]}; they must be {texts} numbers from 0 to {length}")
        kept = torch.ones_like(rows) if keep_padding else rows
        longest = None
        if keep_padding:
            positions, longest = torch.arange(texts * length, device=rows.device), length
        elif lengths is None or on_host(kept):
            positions = host.true_places(kept) if on_host(kept) else kept.flatten().nonzero().flatten()
            if lengths is not None and sum(lengths) != len(positions):
                raise InputError(f"lengths add up to {sum(lengths)}; the mask shows {len(positions)} tokens")
        else:
            # Sorting leaves the number of tokens to the host, which `nonzero` asks the device for.
            positions = kept.flatten().to(torch.uint8).argsort(descending=True, stable=True)[: sum(lengths)]
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
        """The same layout on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def pack(self, padded: Tensor) -> Tensor:
        """`[P, L, ...]` → `[T, ...]`."""
        if self.whole:
            return padded.flatten(0, 1)
        return padded.flatten(0, 1).index_select(0, self.positions)

    def unpad(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`: `[T, ...]` → `[P, L, ...]`, zeros where there is padding."""
        texts, length = self.shape
        if self.whole:
            return packed.view(texts, length, *packed.shape[1:])
        padded = packed.new_zeros(texts * length, *packed.shape[1:])
        return padded.index_copy(0, self.positions, packed).view(texts, length, *packed.shape[1:])

    def restore(self, per_text: Tensor) -> Tensor:
        """Rows in packed order back into the order of the padded batch: `[P, ...]` → `[P, ...]`."""
        if self.order is None:
            return per_text
        return torch.empty_like(per_text).index_copy(0, self.order, per_text)


@dataclass(frozen=True)
class ImageGroups:
    """Texts grouped by image: all texts of an image are one long query sequence of the cross-attention.

    Attributes:
        cu_texts: `[B + 1]` offsets of the images in the (ordered) list of texts.
        order: `[P]` the permutation that groups the texts; None when they are grouped already.
    """

    cu_texts: Tensor
    order: Tensor | None = None

    @classmethod
    def from_index(cls, image_index: Tensor, images: int, device: torch.device | None = None) -> ImageGroups:
        """Group P texts by their image.

        Args:
            image_index: `[P]` integers below `images`. On the host it is read without waiting for a GPU.
            images: B.
            device: where the texts are, by default where the index is.
        """
        index = image_index.long()
        if index.is_cpu and device is not None and device.type != "cpu":
            groups = cls.from_index(index, images)
            order = None if groups.order is None else groups.order.to(device, non_blocking=True)
            return cls(groups.cu_texts.to(device, non_blocking=True), order)
        order = None if index.numel() < 2 or bool((index.diff() >= 0).all()) else index.argsort(stable=True)
        return cls(offsets(torch.bincount(index, minlength=images)), order)

    def token_offsets(self, cu_seqlens: Tensor) -> Tensor:
        """Offsets of the images in the packed tokens, from the offsets of the texts: `[B + 1]`."""
        return cu_seqlens.index_select(0, self.cu_texts)


def offsets(lengths: Tensor) -> Tensor:
    """`[S]` lengths → `[S + 1]` int32 offsets."""
    cumulative = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cumulative[1:])
    return cumulative


def ragged_rows(starts: Tensor, lengths: Tensor, total: int | None = None) -> Tensor:
    """Rows `starts[i], ..., starts[i] + lengths[i] - 1` for every i, one after the other: `[sum(lengths)]` int64.

    `total` is that sum; to give it spares an accelerator a synchronisation.
    """
    first = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths, output_size=total)
    return first + torch.arange(first.shape[0], device=starts.device)


def on_host(tensor: Tensor) -> bool:
    """True if Python may look at the values without waiting for a device or breaking a trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
