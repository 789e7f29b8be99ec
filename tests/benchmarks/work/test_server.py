"""The server scenario on a clock of the test's own: arrivals, batches, latencies, and the search for a rate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import pytest

from xfm_fast.benchmarks.record import Trial
from xfm_fast.benchmarks.work.scenario import RateSearch, Served, poisson_arrivals, serve


class _Machine:
    """Answers a batch in a given time, on a clock that moves only when it works or sleeps."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.batches: list[list[int]] = []

    def answer(self, numbers: Sequence[int]) -> None:
        self.batches.append(list(numbers))
        self.now += self.seconds(len(numbers))

    def sleep(self, seconds: float) -> None:
        # A wait of no length would never end.
        self.now += max(seconds, 1e-6)

    def serve(self, rate: float, requests: int, largest: int = 1, bound_s: float = 1e9) -> Served:
        return serve(
            self.answer, rate, requests, largest_batch=largest, bound_s=bound_s, seed=3, clock=lambda: self.now,
            sleep=self.sleep,
        )  # fmt: skip


def test_arrivals_are_poisson_and_repeat_with_the_seed() -> None:
    arrivals = poisson_arrivals(50.0, 20_000, seed=1)
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    assert arrivals == poisson_arrivals(50.0, 20_000, seed=1) != poisson_arrivals(50.0, 20_000, seed=2)
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.03)
    # Of an exponential distribution the standard deviation is the mean.
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)


def test_latency_is_that_of_a_queue_with_one_server() -> None:
    machine = _Machine(lambda size: 0.01)
    served = machine.serve(60.0, 500)
    free, expected = 0.0, []
    for arrival in poisson_arrivals(60.0, 500, seed=3):
        free = max(free, arrival) + 0.01
        expected.append(free - arrival)
    assert served.latencies == pytest.approx(expected, abs=1e-4)
    assert [number for batch in machine.batches for number in batch] == list(range(500))
    assert served.trial.held
    assert not served.trial.cut
    assert served.trial.p99 > served.trial.p90 > served.trial.p50 >= 0.01


def test_waiting_requests_are_answered_together() -> None:
    # Alone 10 ms each cannot bear 400 a second; eight in 12 ms can.
    machine = _Machine(lambda size: 0.01 + 0.0003 * size)
    served = machine.serve(400.0, 400, largest=8, bound_s=0.05)
    assert served.trial.held
    assert 2 < served.trial.mean_batch <= 8
    assert max(len(batch) for batch in machine.batches) == 8


def test_an_overloaded_trial_ends_early() -> None:
    served = _Machine(lambda size: 0.01).serve(300.0, 1000, bound_s=0.05)
    assert not served.trial.held
    assert served.trial.cut
    assert served.trial.requests < 200
    # One percent of the requests may be late, and one more ends the trial.
    assert served.trial.late == 11


@pytest.mark.parametrize(("capacity", "start"), [(137.0, 1.0), (137.0, 5000.0), (137.0, 130.0), (0.02, 1.0)])
def test_the_search_closes_in_on_the_capacity(capacity: float, start: float) -> None:
    search = RateSearch(start, most=40)
    while not search.done:
        rate = search.next_rate()
        search.record(_trial(rate, held=rate <= capacity))
    assert search.best <= capacity < search.worst
    assert search.worst / search.best <= 1.1


def test_the_search_ends_when_nothing_holds() -> None:
    search = RateSearch(10.0, most=5)
    while not search.done:
        search.record(_trial(search.next_rate(), held=False))
    assert (search.best, len(search.trials)) == (0.0, 5)
    assert search.worst == 10 / 2**4


def _trial(rate: float, *, held: bool) -> Trial:
    return Trial(
        rate=rate, served_per_s=rate, requests=100, late=0 if held else 9, p50=0.1, p90=0.1, p99=0.1, mean_batch=1.0,
        held=held, cut=not held,
    )  # fmt: skip
