"""Orders of rows: permutations, spread, replacements."""

from collections import Counter
from math import factorial

from hypothesis import given
from hypothesis import strategies as st

from xfm_fast.data.streams import permuted, replacement, shuffled


@given(
    st.integers(1, 700),
    st.integers(0, 2**63),
    st.integers(0, 5),
    st.one_of(st.none(), st.integers(1, 800)),
)
def test_an_epoch_visits_every_row_once(
    count: int, seed: int, epoch: int, window: int | None
) -> None:
    assert sorted(
        shuffled(position, count, seed, epoch, window) for position in range(count)
    ) == list(range(count))


def test_orders_of_few_rows_are_about_equally_likely() -> None:
    seeds = 6000
    for count in (3, 4):
        seen = Counter(
            tuple(shuffled(position, count, seed, 0) for position in range(count))
            for seed in range(seeds)
        )
        expected = seeds / factorial(count)
        assert len(seen) == factorial(count)
        assert sum((times - expected) ** 2 / expected for times in seen.values()) < 3 * factorial(
            count
        )


def test_large_numbers_of_rows() -> None:
    positions = [permuted(position, 10**12, 7) for position in range(1000)]
    assert len(set(positions)) == 1000
    assert 0 <= min(positions) < 10**11
    assert 9 * 10**11 < max(positions) < 10**12


def test_a_window_reads_few_runs_at_a_time() -> None:
    count, window = 6400, 640
    order = [shuffled(position, count, 1, 0, window) for position in range(count)]
    run = window // 32
    for start in range(0, count, window):
        block = order[start : start + window]
        assert len({row // run for row in block}) == 32
        # Within the window rows are mixed: neighbours rarely stay together.
        assert sum(abs(a - b) == 1 for a, b in zip(block, block[1:], strict=False)) < 30
    # Runs themselves come from all over the file.
    assert max(order[:window]) - min(order[:window]) > count * 0.7


@given(st.integers(1, 300), st.integers(1, 300))
def test_replacements_reach_every_row(count: int, stride: int) -> None:
    for position in (0, count // 2, count - 1):
        tried = [replacement(position, attempt, count, stride) for attempt in range(count)]
        assert tried[0] == position
        assert sorted(tried) == list(range(count))
