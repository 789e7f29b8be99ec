"""Passes of a session: captions batched with little padding, in few passes, each within a token budget.

Padded graphs take captions sorted by length; a pass has a fixed price (reading the weights, launching kernels), so not
every length gets its own pass. Packed graphs take rows of captions of any length. In the fusion graph, T captions run
on each of B memories: captions of an image share a pass, and images with similar captions share one too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import TypeVar

from xfm_fast.errors import InputError

from ..layout import Rows, pack_rows
from ..slots import Slot, choose_slot, largest

Part = TypeVar("Part")


@dataclass(frozen=True)
class TokenBatch:
    """Captions of one pass by number, in the order of the pass, each padded to `length` tokens."""

    rows: tuple[int, ...]
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return len(self.rows) * self.length


def token_batches(
    lengths: Sequence[int],
    budget: int,
    *,
    pass_tokens: int = 0,
    most: int | None = None,
    padded: Callable[[int], int] = lambda length: length,
) -> list[TokenBatch]:
    """Divide captions into passes with the fewest padded tokens plus `pass_tokens` per pass."""
    if budget < 1 or (most is not None and most < 1):
        raise InputError(f"a pass of {budget} tokens and {most} texts holds nothing; give positive numbers")
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    # rows[:bounds[n]] are the captions of the n shortest distinct lengths.
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
    """Captions of a length that fit into a pass."""
    fit = max(budget // max(length, 1), 1)
    return fit if most is None else min(fit, most)


def _cuts(
    bounds: Sequence[int], sizes: Sequence[int], budget: int, most: int | None, pass_tokens: int
) -> list[tuple[int, int]]:
    """The cheapest division of the sorted lengths into runs; `sizes[n]` is padded length n."""
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
    """One run of the padded fusion graph: `[B]` memories and `[B][T]` captions of `length` tokens."""

    images: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return len(self.images) * len(self.texts[0]) * self.length


@dataclass(frozen=True)
class PassLimits:
    """Token budget of a pass, price of a pass in tokens, and the multiple that lengths are padded to."""

    budget: int
    pass_tokens: int
    step: int = 1

    def padded(self, length: int, slots: Sequence[Slot]) -> int:
        """The padded length of captions: the next multiple of `step` within the closest slot."""
        stepped = -(-length // self.step) * self.step
        taken = []
        for allowed in (slot.ranges["length"] for slot in slots):
            if allowed.most is None or length <= allowed.most:
                taken.append(max(stepped if allowed.most is None else min(stepped, allowed.most), allowed.least))
        return min(taken, default=length)


def plan_passes(
    image_of: Sequence[int], lengths: Sequence[int], slots: Sequence[Slot], limits: PassLimits
) -> list[FusionPass]:
    """Passes of the padded fusion graph, every pair once; raises `InputError` where a caption exceeds all slots."""
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
    return [FusionPass(*work) for work in _combine(units, slots, limits, "texts")]


@dataclass(frozen=True)
class RowPass:
    """One run of the packed fusion graph: `[B]` memories and `[B][R]` rows of captions, `length` tokens a row."""

    images: tuple[int, ...]
    rows: tuple[tuple[tuple[int, ...], ...], ...]
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return len(self.images) * len(self.rows[0]) * self.length


def row_batches(
    texts: Sequence[int], lengths: Sequence[int], slots: Sequence[Slot], limits: PassLimits, width: int, graph: str
) -> list[Rows]:
    """Divide captions into passes of a packed graph; raises `InputError` where a caption exceeds all slots."""
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
            pack_rows(
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
    """Passes of the packed fusion graph, every pair once."""
    groups: dict[int, list[int]] = {}
    for text, image in enumerate(image_of):
        groups.setdefault(image, []).append(text)
    units = [
        (image, rows.texts, rows.length)
        for image, texts in groups.items()
        for rows in row_batches(texts, lengths, slots, limits, width, "fusion")
    ]
    return [RowPass(*work) for work in _combine(units, slots, limits, "rows")]


def _combine(
    units: Sequence[tuple[int, tuple[Part, ...], int]], slots: Sequence[Slot], limits: PassLimits, axis: str
) -> list[tuple[tuple[int, ...], tuple[tuple[Part, ...], ...], int]]:
    """Combine units of one image each into passes of equal numbers of captions or rows."""
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
