"""One packed pass of the fusion encoder for all pairs of a step: true pairs, negatives, masked captions, boxes.

Texts lie image by image, so that all texts of an image are one query sequence over its memory, and the last layer
computes nothing but the tokens that a head reads.
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
from xfm_fast.objectives.losses import HardNegatives
from xfm_fast.objectives.world import HostCopy, World
from xfm_fast.packing import ImageGroups, Reads, Sequences, offsets, ragged_rows


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """P texts, each with the group of image tokens that it attends to, and the tokens of it that are read.

    Sizes are numbers of the host: a pass asks the device for nothing.

    Attributes:
        starts: `[P]` int64 rows of the texts' first tokens in a table of token embeddings.
        lengths: `[P]` int64 tokens that a text takes up.
        groups: `[P]` int64 groups of the memory.
        read_starts, read_counts: `[P]` int64 which entries of a table of positions are read of a text. Its entry 0
            holds position 0: the first token.
        tokens, reads: sums of `lengths` and `read_counts`.
        longest, most_reads: bounds of them.
        real: `[P]` int64 tokens that are attended to, where a text may take up more; None where all are.
    """

    starts: Tensor
    lengths: Tensor
    groups: Tensor
    read_starts: Tensor
    read_counts: Tensor
    tokens: int
    reads: int
    longest: int
    most_reads: int
    real: Tensor | None = None

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
        """Pairs of which heads read the first token."""
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
        """Several kinds of pairs as one list."""

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
    """Fuse texts with what they are paired with.

    Args:
        encoder: the fusion encoder.
        table: `[S, width]` token embeddings, those of a text one after the other.
        pairs: which texts with which groups.
        positions: `[...]` int64 positions within a text that are read; see `Pairs.read_starts`.
        memory: keys and values of the groups.
        texts: how the table divides into texts; the first self-attention, which does not depend on the image, is then
            done once per text of the table, and not for every pair. In training its dropout is shared, too.

    Returns:
        `[pairs.reads, width]`: what is read of the pairs, in their order.
    """
    groups, order = pairs.groups.sort(stable=True)
    lengths, read_counts = pairs.lengths[order], pairs.read_counts[order]
    cu_seqlens, cu_reads = offsets(lengths), offsets(read_counts)
    rows = ragged_rows(pairs.starts[order], lengths, pairs.tokens)
    key_mask = None
    if pairs.real is not None:
        # What a text takes up beyond its real tokens are tokens of its neighbours, or of the last text.
        rows = rows.clamp_max(table.shape[0] - 1)
        within = ragged_rows(torch.zeros_like(lengths), lengths, pairs.tokens)
        key_mask = within < torch.repeat_interleave(pairs.real[order], lengths, output_size=pairs.tokens)
    sequences = Sequences(cu_seqlens=cu_seqlens, key_mask=key_mask, max_seqlen=pairs.longest)
    read = positions.index_select(0, ragged_rows(pairs.read_starts[order], read_counts, pairs.reads))
    read = read + torch.repeat_interleave(cu_seqlens[:-1].long(), read_counts, output_size=pairs.reads)
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
    rank_of = torch.empty_like(order).index_copy(0, order, torch.arange(order.shape[0], device=order.device))
    return fused.index_select(0, ragged_rows(cu_reads[:-1].long()[rank_of], pairs.read_counts, pairs.reads))


@dataclass(frozen=True)
class TextTable:
    """Token embeddings of texts, and where each text lies.

    Attributes:
        tokens: `[S, width]`.
        starts, lengths: `[G]` int64 of the texts of all processes.
        first: number of this process's first text.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    first: int = 0

    @classmethod
    def of(cls, packed: Tensor, layout: TextLayout, world: World) -> TextTable:
        """The texts of all processes, with a gradient if `packed` has one. They travel so that no image has to."""
        if world.size == 1:
            return cls(packed, layout.starts, layout.lengths)
        texts, length = layout.packing.shape
        row = torch.arange(texts, device=packed.device) * length
        padded = packed.new_zeros(texts * length, packed.shape[1])
        padded = padded.index_copy(0, ragged_rows(row, layout.lengths, layout.tokens), packed)
        starts = torch.arange(texts * world.size, device=packed.device) * length
        tokens = world.gather_with_gradient(padded) if packed.requires_grad else world.gather(padded)
        return cls(tokens, starts, world.gather(layout.lengths), world.rank * texts)

    def own(self, texts: int) -> tuple[Tensor, Tensor]:
        """Starts and lengths of this process's texts."""
        end = self.first + texts
        return self.starts[self.first : end], self.lengths[self.first : end]


def fixed_capacity(device: torch.device, world: World) -> bool:
    """True if texts drawn as negatives take up as much as the longest text, so that no size depends on the draw.

    That is so on an accelerator, where the host would have to wait for the draw. Several processes have no such bound
    (any number of texts may draw an image of the same process): there the draw is copied to the host while other work
    is under way.
    """
    return device.type != "cpu" and world.size == 1


def matching_pairs(layout: TextLayout, table: TextTable, negatives: HardNegatives, world: World) -> Callable[[], Pairs]:
    """Positives, every text with its negative image, every image with its negative text: those that belong here.

    Args:
        layout: of this process's texts.
        table: the texts of all processes.
        negatives: one for each of this process's pairs, or for each of all, numbered over all.
        world: the processes.

    Returns:
        A function that makes the pairs, to be called as late as possible: the draw may be on its way to the host.
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
    """Sizes do not depend on the negatives: texts drawn as such take up as much as the longest one."""
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
    positives = Pairs.first_token(table.starts, table.lengths, own, tokens=layout.tokens, longest=longest)
    return Pairs.joined([positives, replace(positives, groups=negatives.images), drawn])


def _exact_pairs(draw: HostCopy, table: TextTable, texts: int) -> Pairs:
    """The pairs whose image this process owns, each text in its own length."""
    images, negative_texts, lengths = draw.wait()
    own = torch.arange(table.first, table.first + texts)
    drawn_here = host.true_places((images >= table.first) & (images < table.first + texts))
    chosen = torch.cat([own, drawn_here, negative_texts])
    groups = torch.cat([own, images[drawn_here], own]) - table.first
    sizes = lengths[chosen]
    tokens, longest = host.integer(sizes.sum()), host.integer(sizes.max())
    chosen, groups, sizes = (t.to(table.starts.device, non_blocking=True) for t in (chosen, groups, sizes))
    return Pairs.first_token(table.starts[chosen], sizes, groups, tokens=tokens, longest=longest)
