"""Passes of a session: texts that share one, with little padding, in few passes, none beyond a budget of tokens.

An export says how its graphs take texts. Padded ones are sorted by length first, so that they are padded little. A pass
has a price of its own (weights are read once more, kernels start), so not every length gets one. Packed ones lie in
rows, of whatever lengths, and passes are as large as the budget lets them be.
In the fusion graph, T texts run on each of B memories: the texts of an image run together, so that its memory is read
once for all of them, and images whose texts look alike (the same number, lengths that pad to the same) share a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import TypeVar

from xfm_fast.errors import InputError

from ..layout import Rows, in_rows
from ..slots import Slot, choose_slot, largest

Part = TypeVar("Part")


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


@dataclass(frozen=True)
class FusionPass:
    """One run of the graph.

    Attributes:
        images: `[B]` memories.
        texts: `[B][T]` texts of each.
        length: tokens that each text is padded to.
    """

    images: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]
    length: int

    @property
    def tokens(self) -> int:
        """Padded tokens of the pass."""
        return len(self.images) * len(self.texts[0]) * self.length


@dataclass(frozen=True)
class PassLimits:
    """The numbers that decide the size of passes.

    Attributes:
        budget: padded tokens of a pass, at most, but for a single text.
        pass_tokens: what a pass costs beside its tokens, in tokens.
        step: lengths are padded to its multiples, so that few shapes occur.
    """

    budget: int
    pass_tokens: int
    step: int = 1

    def padded(self, length: int, slots: Sequence[Slot]) -> int:
        """The length that texts of a length are padded to: the next step, and what the closest slot takes."""
        stepped = -(-length // self.step) * self.step
        taken = []
        for allowed in (slot.ranges["length"] for slot in slots):
            if allowed.most is None or length <= allowed.most:
                taken.append(max(stepped if allowed.most is None else min(stepped, allowed.most), allowed.least))
        return min(taken, default=length)


def plan_passes(
    image_of: Sequence[int], lengths: Sequence[int], slots: Sequence[Slot], limits: PassLimits
) -> list[FusionPass]:
    """Passes that hold every pair once.

    Args:
        image_of: memory of each text.
        lengths: tokens of each text.
        slots: those of the fusion graph.

    Raises:
        InputError: a text is longer than any slot takes.
    """
    for length in sorted(set(lengths))[-1:]:
        choose_slot("fusion", slots, {"length": length})
    # Where rows of texts that are not there are computed too, the fewest passes are the cheapest.
    full = min(slot.ranges["texts"].least for slot in slots) > 1
    price = limits.budget if full else limits.pass_tokens
    most_texts = largest(slots, "texts")

    groups: dict[int, list[int]] = {}
    for text, image in enumerate(image_of):
        groups.setdefault(image, []).append(text)
    units: list[tuple[int, tuple[int, ...], int]] = []
    for image, texts in groups.items():
        sizes = [lengths[text] for text in texts]
        for batch in token_batches(
            sizes, limits.budget, pass_tokens=price, most=most_texts, padded=lambda length: limits.padded(length, slots)
        ):
            units.append((image, tuple(texts[row] for row in batch.rows), batch.length))
    return [FusionPass(*work) for work in _stacked(units, slots, limits, "texts")]


@dataclass(frozen=True)
class RowPass:
    """One run of a packed graph.

    Attributes:
        images: `[B]` memories.
        rows: `[B][R]` texts of every row.
        length: tokens of a row.
    """

    images: tuple[int, ...]
    rows: tuple[tuple[tuple[int, ...], ...], ...]
    length: int

    @property
    def tokens(self) -> int:
        """Padded tokens of the pass."""
        return len(self.images) * len(self.rows[0]) * self.length


def row_batches(
    texts: Sequence[int], lengths: Sequence[int], slots: Sequence[Slot], limits: PassLimits, width: int, graph: str
) -> list[Rows]:
    """Divide texts into passes of a packed graph: rows of one length each, tokens of texts within the budget.

    Args:
        texts: by number.
        lengths: tokens of every text there is.
        slots: those of the graph.
        width: of the model.
        graph: `text` or `fusion`.

    Raises:
        InputError: a text is longer than any slot takes.
    """
    if not texts:
        return []
    longest = max(lengths[text] for text in texts)
    choose_slot(graph, slots, {"length": longest})
    tokens = sum(lengths[text] for text in texts)
    most = largest(slots, "batch" if graph == "text" else "texts") or len(texts)
    order = sorted(texts, key=lengths.__getitem__)
    for count in range(max(ceil(tokens / limits.budget), ceil(len(texts) / most)), len(texts) + 1):
        # By turns, so that each has its share of short and long ones.
        found = [
            in_rows(
                order[part::count], lengths, width, most_rows=largest(slots, "rows"),
                most_length=largest(slots, "length"), padded=lambda length: limits.padded(length, slots),
            )
            for part in range(count)
        ]  # fmt: skip
        made = [rows for rows in found if rows is not None]
        if len(made) == len(found):
            return made
    raise AssertionError("a text alone fits into every slot that takes its length")


def plan_rows(
    image_of: Sequence[int], lengths: Sequence[int], slots: Sequence[Slot], limits: PassLimits, width: int
) -> list[RowPass]:
    """Passes of the packed fusion graph that hold every pair once; see `plan_passes`."""
    groups: dict[int, list[int]] = {}
    for text, image in enumerate(image_of):
        groups.setdefault(image, []).append(text)
    units = [
        (image, rows.texts, rows.length)
        for image, texts in groups.items()
        for rows in row_batches(texts, lengths, slots, limits, width, "fusion")
    ]
    return [RowPass(*work) for work in _stacked(units, slots, limits, "rows")]


def _stacked(
    units: Sequence[tuple[int, tuple[Part, ...], int]], slots: Sequence[Slot], limits: PassLimits, axis: str
) -> list[tuple[tuple[int, ...], tuple[tuple[Part, ...], ...], int]]:
    """Units of one image each, those with the same number of texts or rows put into common passes."""
    by_count: dict[int, list[tuple[int, tuple[Part, ...], int]]] = {}
    for unit in units:
        by_count.setdefault(len(unit[1]), []).append(unit)
    passes = []
    for count, alike in by_count.items():
        # Every unit is a row of `count` parts; padding counts for all of them.
        rows = token_batches(
            [length * count for *_, length in alike],
            limits.budget,
            pass_tokens=limits.pass_tokens,
            # A profile may take many memories or many texts of each, but not both.
            most=largest([slot for slot in slots if slot.padded({axis: count}) is not None], "batch"),
        )
        for batch in rows:
            # In the order of the images, so that neighbouring memories need no copy.
            chosen = sorted((alike[row] for row in batch.rows), key=lambda unit: unit[0])
            images, texts, sizes = zip(*chosen, strict=True)
            passes.append((images, texts, max(sizes)))
    return passes
