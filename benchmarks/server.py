"""The server scenario: requests arrive at random, wait, are answered in batches, and the rate is searched.

Nothing is simulated. Arrival times are drawn in advance (a Poisson process, seeded); then the contender answers by the
wall clock. Whenever it is free it takes all requests that have arrived, up to its largest batch. The latency of a
request runs from its arrival until the batch that it was in is answered.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xfm_fast.benchmarks.measuring import percentile
from xfm_fast.benchmarks.rows import Trial

LATE_SHARE = 0.01
"""Of the requests that may exceed the bound: it is one on the 99th percentile."""

# Below this the wait for an arrival spins: sleeping overshoots by as much.
_SPIN_S = 0.0005


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests arrive, `rate` a second on average."""
    draw = random.Random(seed)
    now, arrivals = 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        arrivals.append(now)
    return arrivals


@dataclass(frozen=True)
class Served:
    """What one trial was like; `latencies` of the requests that were answered, in order of arrival."""

    trial: Trial
    latencies: list[float]


def serve(
    answer: Callable[[Sequence[int]], object],
    rate: float,
    requests: int,
    *,
    largest_batch: int,
    bound_s: float,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Served:
    """Answer `requests` requests that arrive at `rate` a second.

    Args:
        answer: runs the requests of these numbers as a batch and returns when their results are there.
        largest_batch: of requests answered together.
        bound_s: on the 99th percentile of latency. A trial ends once more requests than allowed were late.
        seed: of the arrivals.
        clock, sleep: for tests.
    """
    arrivals = poisson_arrivals(rate, requests, seed)
    allowed = int(LATE_SHARE * requests)
    latencies: list[float] = []
    sizes: list[int] = []
    late, done = 0, 0
    begun = clock()
    while done < requests and late <= allowed:
        wait = arrivals[done] - (clock() - begun)
        while wait > 0:
            sleep(wait - _SPIN_S if wait > _SPIN_S else 0)
            wait = arrivals[done] - (clock() - begun)
        now = clock() - begun
        size = 1
        while size < largest_batch and done + size < requests and arrivals[done + size] <= now:
            size += 1
        answer(range(done, done + size))
        finished = clock() - begun
        for arrival in arrivals[done : done + size]:
            latencies.append(finished - arrival)
            late += latencies[-1] > bound_s
        sizes.append(size)
        done += size
    elapsed = clock() - begun
    trial = Trial(
        rate=rate,
        served_per_s=done / elapsed,
        requests=done,
        late=late,
        p50=percentile(latencies, 0.5),
        p90=percentile(latencies, 0.9),
        p99=percentile(latencies, 0.99),
        mean_batch=statistics.fmean(sizes),
        held=late <= allowed,
        cut=done < requests,
    )
    return Served(trial, latencies)


@dataclass
class RateSearch:
    """Finds the highest rate that holds: up or down by a factor until one holds and one fails, then bisection.

    Rates are compared by their logarithms; the search ends when the two are within `resolution`, or after `most`
    trials.

    Attributes:
        start: first rate; what the contender gives without a pause is a good one.
        best: highest rate that held, 0 before any did; `worst`: lowest that failed.
    """

    start: float
    most: int
    resolution: float = 1.1
    factor: float = 2.0
    best: float = 0.0
    worst: float = float("inf")
    trials: list[Trial] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.trials) >= self.most or (self.best > 0 and self.worst / self.best <= self.resolution)

    def next_rate(self) -> float:
        """What to try now."""
        if not self.trials:
            return self.start
        if self.best == 0:
            return self.worst / self.factor
        if self.worst == float("inf"):
            return self.best * self.factor
        return (self.best * self.worst) ** 0.5

    def record(self, trial: Trial) -> None:
        """Learn from a trial. A rate that failed by chance below one that held does not lower what was reached."""
        self.trials.append(trial)
        if trial.held:
            self.best = max(self.best, trial.rate)
        elif trial.rate > self.best:
            self.worst = min(self.worst, trial.rate)
