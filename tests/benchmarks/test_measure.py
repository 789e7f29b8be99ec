"""Interleaving, intervals, probes, parity bands and peak memory."""

from __future__ import annotations

import random
import statistics
import time

import numpy as np
import pytest
import torch

from xfm_fast.benchmarks.measure import (
    FP32_BAND,
    GemmProbe,
    Watched,
    bootstrap,
    interleave,
    moved,
    parity_band,
    percentile,
    ratio_interval,
    relative_error,
    sample,
    shares_of_rate,
)
from xfm_fast.benchmarks.record import Memory
from xfm_fast.memory import PeakMemory

CPU = torch.device("cpu")


def test_every_variant_runs_once_a_round_in_changing_order() -> None:
    ran: list[str] = []

    def work(name: str) -> Watched:
        return Watched(lambda: ran.append(name), CPU)

    works = {name: work(name) for name in "abc"}
    measured = interleave(works, warmups={"a": 2}, rounds=4, budget_s=0, most_rounds=9)
    assert ran[:2] == ["a", "a"]
    rounds = [ran[2 + 3 * i : 5 + 3 * i] for i in range(4)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert {order[0] for order in rounds} > {"a"}
    assert all(len(measured.seconds(name)) == 4 for name in works)
    assert all(seen.memory is not None and seen.memory.peak_bytes > 0 for seen in works.values())


def test_progress_says_whose_turn_it_is_and_how_long_it_takes() -> None:
    said: list[str] = []
    interleave({"a fp32": lambda: [0.0]}, rounds=3, budget_s=0, warmups=1, on_step=said.append)
    assert said[:2] == ["a fp32, warm-up", "a fp32, 1 of 3"]
    assert said[2].startswith("a fp32, 2 of 3, about 1 s left")


def test_a_contender_that_fails_takes_no_further_part() -> None:
    def broken() -> list[float]:
        raise RuntimeError("out of\nluck")

    measured = interleave({"a fp32": lambda: [1.0], "b fp32": broken}, rounds=3, budget_s=0)
    assert measured.failures == {"b fp32": "RuntimeError: out of luck"}
    assert (len(measured.seconds("a fp32")), measured.seconds("b fp32")) == (3, [])


def test_short_work_gets_more_rounds_and_a_deadline_ends_them() -> None:
    def measure(budget_s: float, deadline: float = float("inf")) -> int:
        measured = interleave({"a": lambda: [0.0]}, rounds=3, most_rounds=6, budget_s=budget_s, deadline=deadline)
        return len(measured.seconds("a"))

    assert measure(budget_s=5) == 6
    assert measure(budget_s=0) == 3
    assert measure(budget_s=5, deadline=time.perf_counter()) == 1


def test_interruption_keeps_whole_samples() -> None:
    runs = 0

    def work() -> list[float]:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise KeyboardInterrupt
        return [0.0]

    measured = interleave({"a": work}, rounds=5, budget_s=0)
    assert measured.interrupted
    assert len(measured.seconds("a")) == 2


def test_interval_holds_the_ratio_and_drift_cancels() -> None:
    fast = [1.0, 2.0, 4.0, 1.5]
    assert ratio_interval([3 * s for s in fast], fast) == pytest.approx((3, 3), rel=0.75)
    low, high = ratio_interval([3.0, 3.1, 2.9], [1.0, 1.02, 0.98])
    assert low is not None
    assert high is not None
    assert low <= 3 <= high
    assert high - low < 0.4


def test_probe_multiplies_at_a_rate() -> None:
    probe = GemmProbe(torch.float32)
    assert probe.library
    assert probe.flops == 2 * 1280 * 768 * 3072
    assert probe(1) > 1e8


def test_shares_use_the_probes_around_each_round() -> None:
    assert shares_of_rate(100, [1.0, 2.0], [100.0, 300.0, 100.0]) == [0.5, 0.25]
    assert shares_of_rate(10, [2.0, 5.0], [10.0] * 3) == [0.5, 0.2]
    assert not moved([100.0, 105.0, 96.0])
    assert moved([100.0, 120.0, 100.0])


def test_errors_and_what_rounding_allows() -> None:
    one = torch.tensor([1.0, -4.0])
    assert relative_error(one, one * 1.5) == pytest.approx(1 / 3)
    assert relative_error(one * float("nan"), one) == relative_error(one[:1], one) == float("inf")
    assert parity_band(torch.float32) == FP32_BAND == 1e-5
    assert parity_band(torch.float32, 1e-5) == pytest.approx(3e-5)
    assert parity_band(torch.bfloat16, 0.01) == pytest.approx(0.02 + 2**-7)


def test_peak_memory_sees_what_was_freed_again() -> None:
    with PeakMemory() as memory:
        block = torch.ones(20_000_000)
        del block
    assert memory.peak - memory.start > 60e6
    assert memory.method in ("high-water mark", "sampled")


class _Event:
    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _Event.clock

    def elapsed_time(self, other: _Event) -> float:
        return other.at - self.at


def test_sample_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name, value in {"memory_allocated": 100, "max_memory_allocated": 170}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "Event", _Event)

    def run() -> str:
        calls.append("run")
        _Event.clock += 250
        return "output"

    found = sample(run, torch.device("cuda"))
    assert found == ("output", 0.25, Memory(peak_bytes=170, grown_bytes=70, method="CUDA allocator"))
    assert calls == ["synchronize", "reset_peak_memory_stats", "run", "synchronize"]


def test_percentiles_were_measured() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert percentile([7.0], 0.99) == 7.0


def test_bootstrap_brackets_the_median() -> None:
    draw = random.Random(1)
    values = [draw.gauss(10, 1) for _ in range(200)]
    bounds = bootstrap(np.median, values)
    assert bounds is not None
    assert bounds[0] < statistics.median(values) < bounds[1]
    # The standard error of a median is 1.25 σ / √n.
    assert bounds[1] - bounds[0] == pytest.approx(2 * 1.96 * 1.25 / 200**0.5, rel=0.35)
    assert bootstrap(np.median, values[:2]) is None
