"""Why an evaluation costs what it costs: FLOPs of the official procedure, and what each saving leaves of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xfm_fast import flops
from xfm_fast.benchmarks.rows import ReceiptStep
from xfm_fast.benchmarks.scenarios import MAX_TOKENS
from xfm_fast.config import XFMConfig


@dataclass(frozen=True)
class Sizes:
    """Of a collection: `lengths` are those of a sample of its texts."""

    images: int
    texts: int
    k: int
    lengths: list[int]

    @property
    def pairs(self) -> int:
        """That the official evaluation scores: both directions, each for itself."""
        return flops.official_pairs(self.images, self.texts, self.k)


def receipt(config: XFMConfig, sizes: Sizes, scored: int | None = None) -> list[ReceiptStep]:
    """FLOPs of the evaluation, from the official procedure to ours, one saving after the other.

    Args:
        sizes: of the collection.
        scored: pairs that are left when those of both directions are scored once, where that is known.
    """
    pairs, sample = sizes.pairs, sizes.lengths
    vision = flops.image_encoder(config, sizes.images).total
    vision += flops.contrastive_features(config, sizes.images, sizes.texts).total
    text = flops.text_encoder(config, sample).total * sizes.texts / len(sample)
    padded = flops.text_encoder(config, [MAX_TOKENS]).total * sizes.texts
    head = flops.matching_head(config, 1).total
    memory = flops.image_memory(config, 1).total

    def fusion(lengths: Sequence[int], *, first_only: bool = False, shared: bool = False) -> float:
        whole = flops.fusion(config, lengths, first_token_only=first_only, self_attended=shared).total
        return whole / len(lengths) + head

    first = flops.first_self_attention(config, sample).total * sizes.texts / len(sample)
    shared_memory = vision + sizes.images * memory
    steps = [
        ("official procedure", vision + padded + pairs * (fusion([MAX_TOKENS]) + memory)),
        ("keys and values of an image once", shared_memory + padded + pairs * fusion([MAX_TOKENS])),
        ("no padding", shared_memory + text + pairs * fusion(sample)),
        ("last layer for token 0 alone", shared_memory + text + pairs * fusion(sample, first_only=True)),
        (
            "first self-attention of a text once",
            shared_memory + text + first + pairs * fusion(sample, first_only=True, shared=True),
        ),
    ]
    if scored is not None:
        last = scored * fusion(sample, first_only=True, shared=True)
        steps.append(("pairs of both directions once", shared_memory + text + first + last))
    before = steps[0][1]
    found = []
    for saving, count in steps:
        found.append(ReceiptStep(saving=saving, flops=count, factor=before / count))
        before = count
    return found
