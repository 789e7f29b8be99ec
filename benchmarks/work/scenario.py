"""Scenarios under MLPerf's names: single stream (latency), offline (throughput), server (requests a second in time).

Source of the names and of what each measures: MLPerf Inference (arXiv 1911.02549). The server scenario simulates
no time. Arrival times are drawn in advance (a Poisson process, seeded); then the backend answers by the wall clock.
Whenever it is free it takes all requests that have arrived, up to its largest batch. The latency of a request runs from
its arrival until the batch that it was in is answered. The rate that a backend can bear is searched.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from ..machine import Readings
from ..measure import BENCHMARKS, Benchmark, Call, Case, Run
from ..options import ScenarioOptions
from ..record import MODES, OFFICIAL, OURS, Comparison, Mode, Result
from ..timing import one_line, percentile, rotated
from .model import Scale, case, make_engines, note_paths, prepare
from .requests import SCENARIOS, Workload

LATE_SHARE = 0.01
"""Of the requests that may exceed the bound: it is one on the 99th percentile."""
# A bound that all backends can be held to: what the official algorithm takes for one request, and some waiting.
_BOUND_FACTOR = 4.0
# Below this a bound would measure the scheduler of the operating system.
_MIN_BOUND_S = 0.025
_BOUND_SAMPLES = 5
# Of the rate without pauses, where the search for a rate that holds begins.
_FIRST_SHARE = 0.7
# Below this the wait for an arrival spins: sleeping overshoots by as much.
_SPIN_S = 0.0005


def _cases(run: Run, scenario: str) -> Iterator[Case]:
    """Yield one case per arrival pattern."""
    options: ScenarioOptions = run.options
    scale = Scale.of(scenario, options, run.device)
    modes: list[Mode] = [mode for mode in MODES if not options.mode or mode in options.mode]
    run.progress.begin(2 + len(modes))
    material = prepare(run, scale.image_size, work=scenario)
    workload = scale.workload(scenario, material)
    engines = make_engines(
        run, material, scenario, scale.image_size, options.baselines, options.official
    )
    for mode in modes:
        batch = scale.batch if mode == "offline" else 1
        run.progress.stage(f"{workload.title(batch)}, {mode}")
        yield case(
            run,
            workload,
            engines,
            batch=batch,
            mode=mode,
            block=scale.block,
            rounds=scale.rounds,
            budget_s=scale.budget_s,
            max_rounds=60,
            warmups=0,
            deadline=time.perf_counter() + 2 * scale.budget_s,
            search=partial(search_rates, workload, scale) if mode == "server" else None,
        )
    note_paths(run)


for _name, _about in SCENARIOS.items():
    BENCHMARKS[_name] = Benchmark(
        "scenario", "Beside other runtimes", OFFICIAL, _cases, _about, {"scenario": _name}
    )


def search_rates(
    workload: Workload, scale: Scale, run: Run, calls: dict[str, Call], rows: dict[str, Result]
) -> None:
    """Find the highest rate of Poisson arrivals at which each backend keeps the bound on the latency.

    After Ctrl-C the results hold the trials until then.
    """
    readings, batch = Readings(), workload.first(scale.batch)
    singles, searches, failures = dict[str, float](), dict[str, RateSearch](), dict[str, str]()

    def probe() -> None:
        if run.probes is not None:
            run.probes.read(readings)

    probe()
    for key, call in calls.items():
        run.progress.step(f"{key}, pace")
        try:
            singles[key] = statistics.median(
                _seconds(call, [index]) for index in range(_BOUND_SAMPLES)
            )
            rate = max(1 / singles[key], len(batch) / _seconds(call, batch))
            searches[key] = RateSearch(_FIRST_SHARE * rate, scale.trials, scale.resolution)
        except Exception as error:
            failures[key] = one_line(error)
    bound_s, origin = _bound(run.options, singles)
    turn = 0
    try:
        while open_searches := [key for key, search in searches.items() if not search.done]:
            for key in rotated(open_searches, turn):
                rate = searches[key].next_rate()
                run.progress.step(f"{key}, {rate:.3g} requests/s")
                # Long enough that a rate which is too high by the resolution of the search piles up to the bound.
                shortest = rate * bound_s / (scale.resolution - 1)
                requests = min(scale.trial_requests, rate * scale.trial_s)
                try:
                    trial = serve(
                        calls[key],
                        rate,
                        int(max(10, shortest, requests)),
                        largest_batch=scale.batch,
                        bound_s=bound_s,
                        seed=run.options.seed,
                    )
                except Exception as error:
                    failures[key] = one_line(error)
                    del searches[key]
                else:
                    searches[key].trials.append(trial)
            probe()
            turn += 1
    finally:
        probe()
        for key, reason in failures.items():
            rows[key].status, rows[key].reason = "failed", reason
        for key, search in searches.items():
            _fill(rows[key], search, bound_s, searches)
            rows[key].contended = readings.contended(rows[key].dtype)
            rows[key].extra |= {"bound_origin": origin, "largest_batch": scale.batch}


def _fill(row: Result, search: RateSearch, bound_s: float, searches: dict[str, RateSearch]) -> None:
    """Enter a search into its result; ours is compared with all that held a rate."""
    served = search.served
    if not search.done:
        row.status, row.reason = "partial", f"interrupted after {len(search.trials)} trials"
    elif served is None:
        row.reason = (
            f"the bound broke at every rate that was tried, down to {search.worst:.3g} a second"
        )
    elif search.worst == math.inf:
        row.reason = "the bound held at every rate that was tried"
    trials = {f"{trial.rate:.6g}": percentile(trial.latencies, 0.99) for trial in search.trials}
    row.extra |= {"max_qps": search.best, "bound_s": bound_s, "trials": trials}
    if served is not None:
        for share in (50, 90, 99):
            row.extra[f"p{share}_s"] = percentile(served.latencies, share / 100)
    if row.backend != OURS:
        return
    for key, baseline in searches.items():
        if baseline is not search and baseline.best > 0:
            backend, dtype = key.rsplit(" ", 1)
            ratio, same = search.best / baseline.best, dtype == row.dtype
            row.against.append(
                Comparison(backend=backend, dtype=dtype, like_for_like=same, ratio=ratio)
            )


def _bound(options: ScenarioOptions, single: dict[str, float]) -> tuple[float, str]:
    """Return the latency bound in seconds and where it comes from."""
    if options.p99_ms is not None:
        return options.p99_ms / 1e3, "--p99-ms"
    key = f"{OFFICIAL} fp32"
    if key not in single:
        key = next(iter(single), key)
    seconds = single.get(key, 1.0)
    bound = _BOUND_FACTOR * seconds
    origin = f"{_BOUND_FACTOR:.0f} times one request of {key} ({seconds * 1e3:.3g} ms)"
    if bound < _MIN_BOUND_S:
        return _MIN_BOUND_S, f"{origin}, but at least {_MIN_BOUND_S * 1e3:.0f} ms"
    return bound, origin


def _seconds(answer: Call, indices: list[int]) -> float:
    start = time.perf_counter()
    answer(indices)
    return time.perf_counter() - start


class Trial(NamedTuple):
    """Latencies at one rate, in order of arrival; it `held` if at most 1% of them exceeded the bound."""

    rate: float
    latencies: list[float]
    held: bool


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Draw the seconds from the start at which `count` requests arrive, `rate` a second on average."""
    draw = random.Random(seed)
    now, arrivals = 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        arrivals.append(now)
    return arrivals


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
) -> Trial:
    """Answer `requests` requests that arrive at `rate` a second, in batches of their indices.

    A trial ends once more than 1% of the requests were later than `bound_s`.
    """
    arrivals = poisson_arrivals(rate, requests, seed)
    allowed = int(LATE_SHARE * requests)
    latencies: list[float] = []
    late, done = 0, 0
    start = clock()
    while done < requests and late <= allowed:
        while (wait := arrivals[done] - (clock() - start)) > 0:
            sleep(wait - _SPIN_S if wait > _SPIN_S else 0)
        now = clock() - start
        size = 1
        while size < largest_batch and done + size < requests and arrivals[done + size] <= now:
            size += 1
        answer(range(done, done + size))
        finished = clock() - start
        for arrival in arrivals[done : done + size]:
            latencies.append(finished - arrival)
            late += latencies[-1] > bound_s
        done += size
    return Trial(rate, latencies, late <= allowed)


@dataclass
class RateSearch:
    """Finds the highest rate that holds: up or down by a factor of 2 until one holds and one fails, then bisection.

    Rates are compared by their logarithms; the search ends when the two are within `resolution`, or after
    `max_trials`. `start` is the first rate.
    """

    start: float
    max_trials: int
    resolution: float = 1.1
    trials: list[Trial] = field(default_factory=list)

    @property
    def served(self) -> Trial | None:
        """The trial of the highest rate that held."""
        held = (trial for trial in self.trials if trial.held)
        return max(held, key=lambda trial: trial.rate, default=None)

    @property
    def best(self) -> float:
        """The highest rate that held, 0 before any did."""
        return 0.0 if self.served is None else self.served.rate

    @property
    def worst(self) -> float:
        """The lowest rate that failed; one that failed by chance below one that held does not count."""
        failed = (trial.rate for trial in self.trials if not trial.held)
        return min((rate for rate in failed if rate > self.best), default=math.inf)

    @property
    def done(self) -> bool:
        """Whether the search has ended."""
        narrow = self.best > 0 and self.worst / self.best <= self.resolution
        return narrow or len(self.trials) >= self.max_trials

    def next_rate(self) -> float:
        """Return the rate to try now."""
        if not self.trials:
            return self.start
        if self.best == 0:
            return self.worst / 2
        return 2 * self.best if self.worst == math.inf else (self.best * self.worst) ** 0.5
