"""Interleaving, intervals, probe and peak memory."""

import time
from collections.abc import Callable

import pytest
import torch

from xfm_fast.benchmarks.measuring import (
    GemmProbe,
    contended,
    interleave,
    ratio_interval,
    shares_of_peak,
)
from xfm_fast.memory import PeakMemory


def test_every_variant_runs_once_a_round_in_changing_order() -> None:
    ran: list[str] = []

    def work(name: str) -> Callable[[], object]:
        return lambda: ran.append(name)

    measured = interleave(
        {"a": work("a"), "b": work("b"), "c": work("c")}, [], warmups={"a": 2}, rounds=4, budget_s=0, most_rounds=9
    )
    assert ran[:2] == ["a", "a"]
    rounds = [ran[2 + 3 * i : 5 + 3 * i] for i in range(4)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert {order[0] for order in rounds} > {"a"}
    assert all(len(series.seconds) == len(series.peak_bytes) == 4 for series in measured.series.values())


def test_short_work_gets_more_rounds_and_a_deadline_ends_them() -> None:
    def measure(budget_s: float, deadline: float = float("inf")) -> int:
        measured = interleave(
            {"a": lambda: None}, [], warmups={}, rounds=3, most_rounds=6, budget_s=budget_s, deadline=deadline
        )
        return len(measured.series["a"].seconds)

    assert measure(budget_s=5) == 6
    assert measure(budget_s=0) == 3
    assert measure(budget_s=5, deadline=time.perf_counter()) == 1


def test_interruption_keeps_whole_samples() -> None:
    runs = 0

    def work() -> None:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise KeyboardInterrupt

    measured = interleave({"a": work}, [], warmups={}, rounds=5, budget_s=0)
    assert measured.interrupted
    assert len(measured.series["a"].seconds) == 2


def test_interval_holds_the_ratio_and_drift_cancels() -> None:
    fast = [1.0, 2.0, 4.0, 1.5]
    assert ratio_interval([3 * s for s in fast], fast) == pytest.approx((3, 3), rel=0.75)
    low, high = ratio_interval([3.0, 3.1, 2.9], [1.0, 1.02, 0.98])
    assert low <= 3 <= high
    assert high - low < 0.4


def test_probe_multiplies_at_a_rate() -> None:
    probe = GemmProbe(torch.float32)
    assert probe.library
    assert probe.flops == 2 * 1280 * 768 * 3072
    assert probe(1) > 1e8


def test_shares_use_the_probes_around_each_round() -> None:
    assert shares_of_peak(100, [1.0, 2.0], [100.0, 300.0, 100.0]) == [0.5, 0.25]
    assert not contended([100.0, 105.0, 96.0])
    assert contended([100.0, 120.0, 100.0])


def test_peak_memory_sees_what_was_freed_again() -> None:
    with PeakMemory() as memory:
        block = torch.ones(20_000_000)
        del block
    assert memory.peak - memory.start > 60e6
    assert memory.method in ("high-water mark", "sampled")
