"""One packed pass of the fusion encoder for all pairs of a step: true pairs, negatives, masked captions, boxes.

Texts are grouped by image, so all texts of an image are one query sequence over its memory, and the last layer computes
only the tokens that a head reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from xfm_fast.batches import TextLayout
from xfm_fast.kernels import host
from xfm_fast.models.fusion import FusionEncoder, ImageMemory, PackedMemory
from xfm_fast.objectives.losses import HardNegatives, HostCopy, World
from xfm_fast.packing import ImageGroups, Reads, Sequences, offsets, ragged_rows


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """P texts, each with the group of image tokens that it attends to and the tokens that heads read.

    Sizes are Python numbers, so a pass never synchronises.
    """

    starts: Tensor  # [P] int64 rows of the first tokens in a table of token embeddings
    lengths: Tensor  # [P] int64 rows per text
    groups: Tensor  # [P] int64 groups of the memory
    read_starts: Tensor  # [P] int64 first entry of a text in a table of read positions; entry 0 is the first token
    read_counts: Tensor  # [P] int64 entries per text
    tokens: int  # sum of `lengths`
    reads: int  # sum of `read_counts`
    longest: int  # upper bound of `lengths`
    most_reads: int  # upper bound of `read_counts`
    real: Tensor | None = None  # [P] int64 attended tokens, if fewer than `lengths`; None for all

    @classmethod
    def first_token(
        cls,
        starts: Tensor,
        lengths: Tensor,
        groups: Tensor,
        *,
        tokens: int,
        longest: int,
        real: Tensor | None = None,
    ) -> Pairs:
        """Pairs with heads that read the first token."""
        return cls(
            starts=starts,
            lengths=lengths,
            groups=groups,
            read_starts=torch.zeros_like(starts),
            read_counts=torch.ones_like(starts),
            tokens=tokens,
            reads=starts.shape[0],
            longest=longest,
            most_reads=1,
            real=real,
        )

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """Concatenate several kinds of pairs."""

        def cat(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        bounded = any(part.real is not None for part in parts)
        real = [part.lengths if part.real is None else part.real for part in parts]
        return cls(
            starts=cat("starts"),
            lengths=cat("lengths"),
            groups=cat("groups"),
            read_starts=cat("read_starts"),
            read_counts=cat("read_counts"),
            tokens=sum(part.tokens for part in parts),
            reads=sum(part.reads for part in parts),
            longest=max(part.longest for part in parts),
            most_reads=max(part.most_reads for part in parts),
            real=torch.cat(real) if bounded else None,
        )


def fuse_pairs(
    encoder: FusionEncoder,
    table: Tensor,
    pairs: Pairs,
    positions: Tensor,
    memory: ImageMemory | PackedMemory,
    texts: Sequences | None = None,
) -> Tensor:
    """Fuse texts with their groups of image tokens: `[pairs.reads, width]`, the read tokens in the order of the pairs.

    `table` `[S, width]` holds token embeddings, text by text; `positions` are the read positions within a text (see
    `Pairs.read_starts`). With `texts`, the layout of the table, the first self-attention runs once per text of the
    table rather than per pair, since it is independent of the image; in training its dropout is then shared too.
    """
    groups, order = pairs.groups.sort(stable=True)
    lengths, read_counts = pairs.lengths[order], pairs.read_counts[order]
    cu_seqlens, cu_reads = offsets(lengths), offsets(read_counts)
    rows = ragged_rows(pairs.starts[order], lengths, pairs.tokens)
    key_mask = None
    if pairs.real is not None:
        # Rows beyond the real tokens of a text are tokens of its neighbours, or of the last text.
        rows = rows.clamp_max(table.shape[0] - 1)
        within = ragged_rows(torch.zeros_like(lengths), lengths, pairs.tokens)
        key_mask = within < torch.repeat_interleave(
            pairs.real[order], lengths, output_size=pairs.tokens
        )
    sequences = Sequences(cu_seqlens=cu_seqlens, key_mask=key_mask, max_seqlen=pairs.longest)
    read = positions.index_select(
        0, ragged_rows(pairs.read_starts[order], read_counts, pairs.reads)
    )
    read = read + torch.repeat_interleave(
        cu_seqlens[:-1].long(), read_counts, output_size=pairs.reads
    )
    number = memory.cu_keys.shape[0]
    cu_texts = torch.searchsorted(groups, torch.arange(number, device=groups.device))
    if texts is not None:
        table = encoder.first_self_attention(table, texts)
    fused = encoder(
        table.index_select(0, rows),
        sequences,
        memory,
        ImageGroups(cu_texts),
        self_attended=texts is not None,
        reads=Reads(cu_seqlens=cu_reads, max_seqlen=pairs.most_reads, rows=read),
    )
    rank_of = torch.empty_like(order).index_copy(
        0, order, torch.arange(order.shape[0], device=order.device)
    )
    return fused.index_select(
        0, ragged_rows(cu_reads[:-1].long()[rank_of], pairs.read_counts, pairs.reads)
    )


@dataclass(frozen=True)
class TextTable:
    """Token embeddings of texts, and the rows of each text."""

    tokens: Tensor  # [S, width]
    starts: Tensor  # [G] int64, texts of all processes
    lengths: Tensor  # [G] int64
    first: int = 0  # index of this process's first text

    @classmethod
    def of(cls, packed: Tensor, layout: TextLayout, world: World) -> TextTable:
        """Gather the texts of all processes, with a gradient if `packed` has one. Texts are smaller to send than
        images.
        """
        if world.size == 1:
            return cls(packed, layout.starts, layout.lengths)
        texts, length = layout.packing.shape
        row = torch.arange(texts, device=packed.device) * length
        padded = packed.new_zeros(texts * length, packed.shape[1])
        padded = padded.index_copy(0, ragged_rows(row, layout.lengths, layout.tokens), packed)
        starts = torch.arange(texts * world.size, device=packed.device) * length
        tokens = (
            world.gather_with_gradient(padded) if packed.requires_grad else world.gather(padded)
        )
        return cls(tokens, starts, world.gather(layout.lengths), world.rank * texts)

    def own(self, texts: int) -> tuple[Tensor, Tensor]:
        """Starts and lengths of this process's texts."""
        end = self.first + texts
        return self.starts[self.first : end], self.lengths[self.first : end]


def fixed_capacity(device: torch.device, world: World) -> bool:
    """Return True if negative texts occupy as many rows as the longest text, so sizes are independent of the draw.

    That avoids a synchronisation on an accelerator. With several processes no such bound exists (any number of texts
    may draw an image of the same process), and the draw is copied to the host asynchronously.
    """
    return device.type != "cpu" and world.size == 1


def matching_pairs(
    layout: TextLayout, table: TextTable, negatives: HardNegatives, world: World
) -> Callable[[], Pairs]:
    """Return a function that builds the ITM pairs of this process: positives, negative images, negative texts.

    `negatives` are numbered over all processes, one for each of this process's pairs or of all. Call the function as
    late as possible: the draw may still be on its way to the host.
    """
    if fixed_capacity(table.starts.device, world):
        return partial(_bounded_pairs, layout, table, negatives)
    texts = layout.lengths.shape[0]
    images, negative_texts = (index.long() for index in negatives)
    if images.shape[0] == texts:
        images = world.gather(images)
    if negative_texts.shape[0] != texts:
        negative_texts = negative_texts[table.first : table.first + texts]
    draw = HostCopy(images, negative_texts, table.lengths)
    return partial(_exact_pairs, draw, table, texts)


def _bounded_pairs(layout: TextLayout, table: TextTable, negatives: HardNegatives) -> Pairs:
    """Pairs whose sizes are independent of the draw: negative texts occupy as many rows as the longest text."""
    texts, longest = layout.lengths.shape[0], layout.packing.longest
    own = torch.arange(texts, device=table.starts.device)
    drawn = Pairs.first_token(
        table.starts[negatives.texts],
        torch.full_like(own, longest),
        own,
        tokens=texts * longest,
        longest=longest,
        real=table.lengths[negatives.texts],
    )
    positives = Pairs.first_token(
        table.starts, table.lengths, own, tokens=layout.tokens, longest=longest
    )
    return Pairs.joined([positives, replace(positives, groups=negatives.images), drawn])


def _exact_pairs(draw: HostCopy, table: TextTable, texts: int) -> Pairs:
    """Pairs whose image belongs to this process, each text in its own length."""
    images, negative_texts, lengths = draw.wait()
    own = torch.arange(table.first, table.first + texts)
    drawn_here = host.true_places((images >= table.first) & (images < table.first + texts))
    chosen = torch.cat([own, drawn_here, negative_texts])
    groups = torch.cat([own, images[drawn_here], own]) - table.first
    sizes = lengths[chosen]
    tokens, longest = host.integer(sizes.sum()), host.integer(sizes.max())
    chosen, groups, sizes = (
        t.to(table.starts.device, non_blocking=True) for t in (chosen, groups, sizes)
    )
    return Pairs.first_token(table.starts[chosen], sizes, groups, tokens=tokens, longest=longest)
