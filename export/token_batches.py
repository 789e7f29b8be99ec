"""Which texts share a padded pass: little padding, few passes, none beyond a budget of tokens.

Packed batches have no shapes that an engine could plan for, so texts are padded; sorted by length first, they are
padded little. A pass has a price of its own (weights are read once more, kernels start), so not every length gets one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf

from xfm_fast.errors import InputError


@dataclass(frozen=True)
class TokenBatch:
    """Texts that run in one pass.

    Attributes:
        rows: their numbers, in the order in which they lie in the pass.
        length: tokens that each is padded to.
    """

    rows: tuple[int, ...]
    length: int

    @property
    def tokens(self) -> int:
        """Padded tokens of the pass."""
        return len(self.rows) * self.length


def token_batches(
    lengths: Sequence[int],
    budget: int,
    *,
    pass_tokens: int = 0,
    most: int | None = None,
    padded: Callable[[int], int] = lambda length: length,
) -> list[TokenBatch]:
    """Divide texts into passes so that padded tokens, plus a price for every pass, are fewest.

    Texts of one length stay together unless they exceed the budget, so the search is over the distinct lengths. Every
    text is in exactly one batch; `rows` says where results belong, which restores the order.

    Args:
        lengths: tokens of every text.
        budget: padded tokens of a pass, at most; a single text may exceed it.
        pass_tokens: what a pass costs beside its tokens, in tokens.
        most: texts of a pass, at most.
        padded: the length that a text of some length is padded to, not falling.

    Raises:
        InputError: a budget or limit below 1.
    """
    if budget < 1 or (most is not None and most < 1):
        raise InputError(f"a pass of {budget} tokens and {most} texts holds nothing; give positive numbers")
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    # The texts below bounds[n] are those of the n shortest distinct lengths.
    bounds = [place for place in range(len(rows)) if not place or lengths[rows[place]] > lengths[rows[place - 1]]]
    bounds.append(len(rows))
    batches: list[TokenBatch] = []
    for start, stop in _cuts(
        bounds, [padded(lengths[rows[stop - 1]]) for stop in bounds[1:]], budget, most, pass_tokens
    ):
        group = rows[start:stop]
        fit = _fitting(padded(lengths[group[-1]]), budget, most)
        pieces = ceil(len(group) / fit)
        for piece in range(pieces):
            chosen = group[piece * len(group) // pieces : (piece + 1) * len(group) // pieces]
            batches.append(TokenBatch(tuple(chosen), padded(lengths[chosen[-1]])))
    return batches


def _fitting(length: int, budget: int, most: int | None) -> int:
    """Texts of a length that fit into a pass."""
    fit = max(budget // max(length, 1), 1)
    return fit if most is None else min(fit, most)


def _cuts(
    bounds: Sequence[int], sizes: Sequence[int], budget: int, most: int | None, pass_tokens: int
) -> list[tuple[int, int]]:
    """The cheapest division of the lengths into runs, as places in the sorted texts. `sizes[n]`: padded length n."""
    best, previous = [0.0], [0]
    for stop in range(1, len(bounds)):
        length = sizes[stop - 1]
        fit = _fitting(length, budget, most)
        cheapest, place = inf, 0
        for start in range(stop):
            texts = bounds[stop] - bounds[start]
            cost = best[start] + texts * length + pass_tokens * ceil(texts / fit)
            if cost < cheapest:
                cheapest, place = cost, start
        best.append(cheapest)
        previous.append(place)
    runs: list[tuple[int, int]] = []
    stop = len(bounds) - 1
    while stop > 0:
        runs.append((bounds[previous[stop]], bounds[stop]))
        stop = previous[stop]
    return runs[::-1]
