"""One packed pass of the fusion encoder for all pairs of a step: true pairs, negatives, masked captions, boxes.

Texts lie image by image, so that all texts of an image are one query sequence over its memory, and the last layer
computes nothing but the tokens that a head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xfm_fast.models.fusion import FusionEncoder, ImageMemory, PackedMemory
from xfm_fast.packing import ImageGroups, Reads, Sequences, offsets, ragged_rows


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """P texts, each with the group of image tokens that it attends to, and the tokens of it that are read.

    Sizes are numbers of the host: a pass asks the device for nothing.

    Attributes:
        starts: `[P]` int64 rows of the texts' first tokens in a table of token embeddings.
        lengths: `[P]` int64 tokens that a text takes up.
        groups: `[P]` int64 groups of the memory.
        read_starts, read_counts: `[P]` int64 which entries of a table of places are read of a text. Its entry 0 holds
            the place 0: the first token.
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
    places: Tensor,
    memory: ImageMemory | PackedMemory,
    texts: Sequences | None = None,
) -> Tensor:
    """Fuse texts with what they are paired with.

    Args:
        encoder: the fusion encoder.
        table: `[S, width]` token embeddings, those of a text one after the other.
        pairs: which texts with which groups.
        places: `[...]` int64 places within a text that are read; see `Pairs.read_starts`.
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
    read = places.index_select(0, ragged_rows(pairs.read_starts[order], read_counts, pairs.reads))
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
    place_of = torch.empty_like(order).index_copy(0, order, torch.arange(order.shape[0], device=order.device))
    return fused.index_select(0, ragged_rows(cu_reads[:-1].long()[place_of], pairs.read_counts, pairs.reads))
