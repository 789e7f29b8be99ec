"""Masks of masked language modelling (tokens, short runs) and masked image modelling (blocks of patches)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from xfm_fast.errors import InputError

ATTEMPTS = 10
"""Failed rectangle draws before the rest is filled with single patches."""
_LOWEST_ASPECT = math.log(0.3)


@dataclass(frozen=True)
class MaskingOptions:
    """Masking rates. Captions: `MaskingOptions(0.5, 15)`; text: `MaskingOptions(0.15, 20)`.

    Attributes:
        probability: share of a text's tokens, including special tokens.
        most: maximum masked tokens per text.
        skipgram_probability: probability of masking a run of tokens instead of one.
        skipgram_size: maximum run length; lengths from 2 are equally likely.
        whole_word: mask whole words, and runs of words. The official option of that name has no
            effect with RoBERTa's vocabulary.
    """

    probability: float
    most: int
    skipgram_probability: float = 0.2
    skipgram_size: int = 3
    whole_word: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise InputError(
                f"probability={self.probability} is not a share of a text's tokens; use one in (0, 1]"
            )
        if self.most < 1:
            raise InputError(f"most={self.most} must be at least 1")
        if not 0 <= self.skipgram_probability <= 1:
            raise InputError(
                f"skipgram_probability={self.skipgram_probability} is not a probability; use one in [0, 1]"
            )

    def count(self, length: int) -> int:
        """Return the number of masked tokens: at least one, at most `most` and all but the first."""
        return min(self.most, max(1, round(length * self.probability)), length - 1)


class EncodedText(NamedTuple):
    """Token ids of a text and their masked copy."""

    ids: list[int]
    """`<s> tokens </s>`, not padded."""
    masked_ids: list[int]
    """Token ids with masks, the model input."""
    positions: list[int]
    """Masked positions, ascending."""
    labels: list[int]
    """Original ids at these positions."""


def mask_tokens(
    ids: list[int],
    options: MaskingOptions,
    rng: Generator,
    *,
    vocab_size: int,
    mask_token_id: int,
    word_starts: Sequence[bool] | None = None,
) -> EncodedText:
    """Mask exactly `options.count(len(ids))` tokens.

    Start positions come in random order, each masks one token or, with `skipgram_probability`, a
    run truncated at the end of the text; a random subset of any excess is dropped. The first token
    is never masked. A masked token becomes `<mask>` in 80% of cases, a random token of the
    vocabulary in 10%, and is unchanged in 10%. Whole words that exceed the count are left out, so
    fewer tokens may be masked (more only if the first word is longer than the count). `word_starts`
    `[len(ids)]` is required for `whole_word`.
    """
    if len(ids) < 2:
        raise InputError(
            f"a text of {len(ids)} token(s) has none to mask after <s>; it must have at least 2"
        )
    starts = list(range(1, len(ids)))
    if options.whole_word:
        if word_starts is None or len(word_starts) != len(ids):
            count = "none" if word_starts is None else f"{len(word_starts)}"
            raise InputError(
                f"whole words need a word start for each of {len(ids)} tokens, got {count}"
            )
        starts = [start for start in starts if start == 1 or word_starts[start]]
    # (start, end) of every token, or word, after the first token.
    units = list(zip(starts, [*starts[1:], len(ids)], strict=True))
    positions = _draw_positions(units, options.count(len(ids)), options, rng)
    masked_ids = list(ids)
    # One draw of each distribution per text: a generator call costs more than the arithmetic here.
    fates = rng.random(len(positions)).tolist()
    substitutes = rng.integers(vocab_size, size=len(positions)).tolist()
    for position, fate, substitute in zip(positions, fates, substitutes, strict=True):
        if fate < 0.8:
            masked_ids[position] = mask_token_id
        elif fate < 0.9:
            masked_ids[position] = substitute
    labels = [ids[position] for position in positions]
    return EncodedText(ids, masked_ids, positions, labels)


def _draw_positions(
    units: list[tuple[int, int]], count: int, options: MaskingOptions, rng: Generator
) -> list[int]:
    """Draw runs of units until they have `count` tokens, and return the positions of these tokens."""
    order = rng.permutation(len(units)).tolist()
    runs = [1] * len(units)
    if options.skipgram_size >= 2 and options.skipgram_probability > 0:
        is_run = rng.random(len(units)) < options.skipgram_probability
        lengths = rng.integers(2, options.skipgram_size + 1, size=len(units))
        runs = np.where(is_run, lengths, 1).tolist()
    drawn: set[int] = set()
    total = 0
    for first, run in zip(order, runs, strict=True):
        if total >= count:
            break
        if first in drawn:
            continue
        for unit in range(first, min(first + run, len(units))):
            if unit not in drawn:
                drawn.add(unit)
                total += units[unit][1] - units[unit][0]
    masked = sorted(drawn)
    if total > count:
        # A random subset of units of at most `count` tokens, or one unit if the first is longer.
        subset, total = [], 0
        for index in rng.permutation(len(masked)).tolist():
            start, end = units[masked[index]]
            if not subset or total + end - start <= count:
                subset.append(masked[index])
                total += end - start
        masked = subset
    positions = sorted(position for unit in masked for position in range(*units[unit]))
    return positions[: options.most]


def block_mask(grid: int, count: int, min_area: int, rng: Generator) -> NDArray[np.bool_]:
    """Draw a BEiT block mask `[grid * grid]` with exactly `count` ones (arXiv 2106.08254).

    Rectangles: area uniform between `min_area` and the number of patches left, log aspect ratio
    uniform in ±log(0.3), position uniform; one counts if it is smaller than the grid, masks at
    least one new patch and not too many. After `ATTEMPTS` failures in a row uniformly random
    patches fill the rest.
    """
    if not 0 <= count <= grid * grid:
        raise InputError(f"count={count} patches cannot be hidden among {grid * grid}; lower it")
    if min_area < 1:
        raise InputError(f"min_area={min_area} is not the area of a rectangle; use at least 1")
    # The grid is one integer, a bit per patch: overlap and union of rectangles are then single
    # operations.
    columns = _columns(grid)
    mask, remaining = 0, count
    while remaining:
        for area_draw, aspect_draw, top_draw, left_draw in rng.random((ATTEMPTS, 4)).tolist():
            area = min_area + area_draw * (remaining - min_area)
            aspect = math.exp(_LOWEST_ASPECT * (1 - 2 * aspect_draw))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= grid or width >= grid:
                continue
            top, left = int(top_draw * (grid - height + 1)), int(left_draw * (grid - width + 1))
            rectangle = (((1 << width) - 1) * columns[height]) << (top * grid + left)
            new = (rectangle & ~mask).bit_count()
            if 0 < new <= remaining:
                mask |= rectangle
                remaining -= new
                break
        else:
            break
    bits = np.frombuffer(mask.to_bytes((grid * grid + 7) // 8, "little"), dtype=np.uint8)
    out = np.unpackbits(bits, count=grid * grid, bitorder="little").view(np.bool_)
    if remaining:
        out[rng.choice(np.flatnonzero(~out), remaining, replace=False)] = True
    return out


@lru_cache
def _columns(grid: int) -> list[int]:
    """Return the bit masks of a column of patches for every height, at the top left corner."""
    return [sum(1 << (row * grid) for row in range(height)) for height in range(grid)]
