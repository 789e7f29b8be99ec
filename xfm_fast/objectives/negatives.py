"""The pairs of image-text matching: which texts the fusion encoder sees with which images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from xfm_fast.batches import TextLayout
from xfm_fast.kernels import host
from xfm_fast.objectives.fusion_pass import Pairs
from xfm_fast.objectives.gathering import HostCopy, World
from xfm_fast.objectives.matching import HardNegatives
from xfm_fast.packing import ragged_rows


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
        everyone = torch.arange(texts * world.size, device=packed.device) * length
        tokens = world.gather_with_gradient(padded) if packed.requires_grad else world.gather(padded)
        return cls(tokens, everyone, world.gather(layout.lengths), world.rank * texts)

    def own(self, texts: int) -> tuple[Tensor, Tensor]:
        """Starts and lengths of this process's texts."""
        end = self.first + texts
        return self.starts[self.first : end], self.lengths[self.first : end]


def fixed_capacity(device: torch.device, world: World) -> bool:
    """Whether texts drawn as negatives take up as much as the longest text, so that no size depends on the draw.

    So it is on an accelerator, where the host would have to wait for the draw. Several processes have no such bound
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
        What makes the pairs, to be called as late as possible: the draw may still be on its way to the host.
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
