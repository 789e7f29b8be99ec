"""Passes hold every text once, pad little, respect the budget, and cost what a search over all divisions finds."""

from __future__ import annotations

from itertools import combinations
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfm_fast.errors import InputError
from xfm_fast.export.slots import PassLimits, SizeRange, Slot, plan_passes, token_batches

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


def _slot(
    batch: SizeRange, texts: SizeRange, length: SizeRange, name: str = "dynamic", index: int = 0
) -> Slot:
    return Slot(name, index, {"batch": batch, "texts": texts, "length": length})


ANY = SizeRange(1, None)
DYNAMIC = [_slot(ANY, ANY, SizeRange(1, 512))]


@given(LENGTHS, st.integers(1, 300), st.integers(0, 50), st.none() | st.integers(1, 9))
def test_every_text_is_in_one_pass_that_fits(
    lengths: list[int], budget: int, price: int, limit: int | None
) -> None:
    batches = token_batches(lengths, budget, pass_tokens=price, limit=limit)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
    for batch in batches:
        assert batch.length == max(lengths[row] for row in batch.rows)
        assert len(batch.rows) * batch.length <= budget or len(batch.rows) == 1
        assert limit is None or len(batch.rows) <= limit


@given(
    st.lists(st.sampled_from([3, 5, 6, 11, 13, 20]), min_size=1, max_size=25),
    st.integers(20, 90),
    st.integers(0, 40),
)
def test_divides_as_the_search_over_all_divisions_does(
    lengths: list[int], budget: int, price: int
) -> None:
    distinct = sorted(set(lengths))

    def cost(runs: list[list[int]]) -> int:
        total = 0
        for run in runs:
            texts = sum(lengths.count(length) for length in run)
            total += texts * run[-1] + price * ceil(texts / max(budget // run[-1], 1))
        return total

    cheapest = min(
        cost([distinct[a:b] for a, b in zip((0, *cuts), (*cuts, len(distinct)), strict=True)])
        for count in range(len(distinct))
        for cuts in combinations(range(1, len(distinct)), count)
    )
    batches = token_batches(lengths, budget, pass_tokens=price)
    # Pieces of a run are padded to their own longest text, which only saves.
    assert sum(len(batch.rows) * batch.length + price for batch in batches) <= cheapest


ROWS_OF_ANY = [
    Slot("dynamic", 0, {"batch": ANY, "rows": ANY, "texts": ANY, "length": SizeRange(1, 512)})
]
LATENCY = {
    "batch": SizeRange(1, 1),
    "rows": SizeRange(1, 4),
    "texts": SizeRange(1, 16),
    "length": SizeRange(1, 48),
}
BULK = {
    "batch": SizeRange(1, 4),
    "rows": SizeRange(1, 3),
    "texts": SizeRange(1, 6),
    "length": SizeRange(1, 48),
}


@pytest.mark.parametrize("packed_width", [None, 64], ids=["padded", "packed"])
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=40), st.integers(40, 400)
)
def test_passes_of_fusion_hold_every_pair_once(
    packed_width: int | None, pairs: list[tuple[int, int]], budget: int
) -> None:
    image_of, lengths = [image for image, _ in pairs], [length for _, length in pairs]
    axes = (
        ("batch", "texts", "length")
        if packed_width is None
        else ("batch", "rows", "texts", "length")
    )
    bounded = [
        Slot(str(index), index, {axis: ranges[axis] for axis in axes})
        for index, ranges in enumerate([LATENCY, BULK])
    ]
    for slots in (DYNAMIC if packed_width is None else ROWS_OF_ANY, bounded):
        limits = PassLimits(budget, pass_tokens=20, step=8 if len(slots) > 1 else 1)
        passes = plan_passes("fusion", image_of, lengths, slots, limits, packed_width=packed_width)
        seen = [
            (i, t)
            for work in passes
            for i, rows in zip(work.images, work.rows, strict=True)
            for r in rows
            for t in r
        ]
        assert sorted(seen) == sorted(zip(image_of, range(len(pairs)), strict=True))
        for work in passes:
            assert len({len(rows) for rows in work.rows}) == 1
            assert all(
                sum(lengths[text] for text in row) <= work.length
                for rows in work.rows
                for row in rows
            )
            sizes = {"batch": len(work.images), "rows": len(work.rows[0]), "length": work.length}
            sizes["texts"] = max(sum(map(len, rows)) for rows in work.rows)
            assert any(
                slot.padded({axis: sizes[axis] for axis in axes}) is not None for slot in slots
            )
            if packed_width is None and len(work.images) * len(work.rows[0]) > 1:
                assert work.tokens <= budget
            for rows in work.rows:
                assert (
                    sum(map(len, rows)) == 1
                    or sum(lengths[text] for row in rows for text in row) <= budget + 40
                )


def test_rows_follow_the_tokens() -> None:
    lengths = [40, *[3 + n % 20 for n in range(31)]]
    (work,) = plan_passes(
        "text", None, lengths, ROWS_OF_ANY, PassLimits(2048, 32), packed_width=768
    )
    assert sum(lengths) <= work.tokens <= 1.05 * sum(lengths)
    padded = token_batches(lengths, 2048, pass_tokens=32)
    assert work.tokens < sum(len(batch.rows) * batch.length + 32 for batch in padded)
    # Beyond the budget, passes of about as many tokens each.
    several = plan_passes("text", None, lengths, ROWS_OF_ANY, PassLimits(200, 32), packed_width=768)
    sizes = [sum(lengths[text] for row in work_.rows[0] for text in row) for work_ in several]
    assert len(several) == ceil(sum(lengths) / 200)
    assert max(sizes) - min(sizes) <= 40
    with pytest.raises(InputError, match="length 513"):
        plan_passes("text", None, [513], ROWS_OF_ANY, PassLimits(2048, 32), packed_width=768)
