"""One packed pass of the fusion encoder for all pairs of a step: true pairs, negatives, masked captions, boxes.

Texts are grouped by image, so all texts of an image are one query sequence over its memory, and the
last layer computes only the tokens that a head reads.
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
    """P texts with the groups of image tokens that they attend to, and the tokens that heads read.

    Sizes are Python numbers, so a pass never synchronises.
    """

    starts: Tensor  # [P] int64 rows of the first tokens in a table of token embeddings
    lengths: Tensor  # [P] int64 rows per text
    groups: Tensor  # [P] int64 groups of the memory
    read_starts: Tensor  # [P] int64 first entry in a table of read positions; entry 0 is token 0
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
        """Build pairs with heads that read the first token."""
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
    def joined(cls, batches: Sequence[Pairs]) -> Pairs:
        """Concatenate pairs of several losses."""
        real = None
        if any(pairs.real is not None for pairs in batches):
            real = torch.cat(
                [pairs.lengths if pairs.real is None else pairs.real for pairs in batches]
            )
        return cls(
            starts=torch.cat([pairs.starts for pairs in batches]),
            lengths=torch.cat([pairs.lengths for pairs in batches]),
            groups=torch.cat([pairs.groups for pairs in batches]),
            read_starts=torch.cat([pairs.read_starts for pairs in batches]),
            read_counts=torch.cat([pairs.read_counts for pairs in batches]),
            tokens=sum(pairs.tokens for pairs in batches),
            reads=sum(pairs.reads for pairs in batches),
            longest=max(pairs.longest for pairs in batches),
            most_reads=max(pairs.most_reads for pairs in batches),
            real=real,
        )


def fuse_pairs(
    encoder: FusionEncoder,
    table: Tensor,
    pairs: Pairs,
    positions: Tensor,
    memory: ImageMemory | PackedMemory,
    texts: Sequences | None = None,
) -> Tensor:
    """Fuse texts with their groups of image tokens: `[pairs.reads, width]`, in the order of the pairs.

    `table` `[S, width]` holds token embeddings, text by text; `positions` are the read positions within
    a text (see `Pairs.read_starts`). With `texts`, the layout of the table, the first self-attention runs
    once per text of the table rather than per pair, since it is independent of the image; in training its
    dropout is then shared too.
    """
    groups, order = pairs.groups.sort(stable=True)
    lengths, read_counts = pairs.lengths[order], pairs.read_counts[order]
    cu_seqlens, cu_reads = offsets(lengths), offsets(read_counts)
    rows = ragged_rows(pairs.starts[order], lengths, pairs.tokens)
    key_mask = None
    if pairs.real is not None:
        # Rows beyond the real tokens of a text are tokens of its neighbours, or of the last text.
        rows = rows.clamp_max(table.shape[0] - 1)
        token_index = ragged_rows(torch.zeros_like(lengths), lengths, pairs.tokens)
        real = torch.repeat_interleave(pairs.real[order], lengths, output_size=pairs.tokens)
        key_mask = token_index < real
    sequences = Sequences(cu_seqlens=cu_seqlens, key_mask=key_mask, max_seqlen=pairs.longest)
    read_index = ragged_rows(pairs.read_starts[order], read_counts, pairs.reads)
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), read_counts, output_size=pairs.reads)
    read_rows = positions.index_select(0, read_index) + starts
    group_index = torch.arange(memory.cu_keys.shape[0], device=groups.device)
    cu_texts = torch.searchsorted(groups, group_index)
    if texts is not None:
        table = encoder.first_self_attention(table, texts)
    fused = encoder(
        table.index_select(0, rows),
        sequences,
        memory,
        ImageGroups(cu_texts),
        self_attended=texts is not None,
        reads=Reads(cu_seqlens=cu_reads, max_seqlen=pairs.most_reads, rows=read_rows),
    )
    ranks = torch.arange(order.shape[0], device=order.device)
    rank_of_pair = torch.empty_like(order).index_copy(0, order, ranks)
    fused_starts = cu_reads[:-1].long()[rank_of_pair]
    return fused.index_select(0, ragged_rows(fused_starts, pairs.read_counts, pairs.reads))


@dataclass(frozen=True)
class TextTable:
    """Token embeddings of texts, text by text."""

    tokens: Tensor  # [S, width]
    starts: Tensor  # [G] int64, texts of all processes
    lengths: Tensor  # [G] int64
    first: int = 0  # index of this process's first text

    @classmethod
    def of(cls, packed: Tensor, layout: TextLayout, world: World) -> TextTable:
        """Gather the texts of all processes (smaller messages than images), with the gradient of `packed`."""
        if world.size == 1:
            return cls(packed, layout.starts, layout.lengths)
        texts, length = layout.packing.shape
        starts = torch.arange(texts * world.size, device=packed.device) * length
        rows = ragged_rows(starts[:texts], layout.lengths, layout.tokens)
        padded = packed.new_zeros(texts * length, packed.shape[1]).index_copy(0, rows, packed)
        gather = world.gather_with_gradient if packed.requires_grad else world.gather
        return cls(gather(padded), starts, world.gather(layout.lengths), world.rank * texts)

    def local(self, texts: int) -> tuple[Tensor, Tensor]:
        """Return starts and lengths of this process's texts."""
        end = self.first + texts
        return self.starts[self.first : end], self.lengths[self.first : end]


def fixed_capacity(device: torch.device, world: World) -> bool:
    """Return whether negative texts occupy as many rows as the longest text, whatever is drawn.

    That avoids a synchronisation on an accelerator. With several processes no such bound exists (any
    number of texts may draw an image of one process), and the draw is copied to the host asynchronously.
    """
    return device.type != "cpu" and world.size == 1


def matching_pairs(
    layout: TextLayout, table: TextTable, negatives: HardNegatives, world: World
) -> Callable[[], Pairs]:
    """Return a function that builds the ITM pairs of this process: positives, negative images, negative texts.

    `negatives` are numbered over all processes, for the pairs of this process or of all. Call the
    function as late as possible: the draw may still be on its way to the host.
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
    """Build pairs whose negative texts occupy as many rows as the longest text."""
    texts, longest = layout.lengths.shape[0], layout.packing.longest
    images = torch.arange(texts, device=table.starts.device)
    drawn = Pairs.first_token(
        table.starts[negatives.texts],
        torch.full_like(images, longest),
        images,
        tokens=texts * longest,
        longest=longest,
        real=table.lengths[negatives.texts],
    )
    positives = Pairs.first_token(
        table.starts, table.lengths, images, tokens=layout.tokens, longest=longest
    )
    return Pairs.joined([positives, replace(positives, groups=negatives.images), drawn])


def _exact_pairs(draw: HostCopy, table: TextTable, texts: int) -> Pairs:
    """Build the pairs whose image belongs to this process, each text in its real length."""
    images, negative_texts, lengths = draw.wait()
    positives = torch.arange(table.first, table.first + texts)
    drawn_here = host.true_places((images >= table.first) & (images < table.first + texts))
    text_index = torch.cat([positives, drawn_here, negative_texts])
    groups = torch.cat([positives, images[drawn_here], positives]) - table.first
    sizes = lengths[text_index]
    tokens, longest = host.integer(sizes.sum()), host.integer(sizes.max())
    device = table.starts.device
    text_index = text_index.to(device, non_blocking=True)
    groups, sizes = groups.to(device, non_blocking=True), sizes.to(device, non_blocking=True)
    starts = table.starts[text_index]
    return Pairs.first_token(starts, sizes, groups, tokens=tokens, longest=longest)
