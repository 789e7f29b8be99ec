"""Scenarios under MLPerf's names: single stream (latency), offline (throughput), server (requests a second in time).

Source of the names and of what each measures: MLPerf Inference (arXiv 1911.02549). In the server scenario nothing is
simulated. Arrival times are drawn in advance (a Poisson process, seeded); then the contender answers by the wall clock.
Whenever it is free it takes all requests that have arrived, up to its largest batch. The latency of a request runs from
its arrival until the batch that it was in is answered. The rate that a contender can bear is searched.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from xfm_fast.errors import InputError, UnavailableError

from .. import machine
from ..contenders.registry import SCENARIOS
from ..measure import Progress, latency, percentile, rotated
from ..options import ScenarioOptions
from ..record import MODES, OFFICIAL, Comparison, Document, Mode, Server, Trial
from .entrants import Entrant, blank
from .setting import Scale, Setting, opened

LATE_SHARE = 0.01
"""Of the requests that may exceed the bound: it is one on the 99th percentile."""
# A bound that all contenders can be held to: what the official algorithm takes for one request, and some waiting.
_BOUND_FACTOR = 4.0
# Below this a bound would measure the scheduler of the operating system.
_LEAST_BOUND_S = 0.025
_BOUND_SAMPLES = 5
# Of the rate without pauses, where the search for a rate that holds begins.
_FIRST_SHARE = 0.7
# Below this the wait for an arrival spins: sleeping overshoots by as much.
_SPIN_S = 0.0005
ELSEWHERE = {
    "train-step": "a step of pretraining or of a task, forward and backward: xfm-fast bench train-step",
    "kernels": "every operation against its alternatives: xfm-fast bench kernels",
}


def run(
    work: str, options: ScenarioOptions, progress: Progress | None = None, command: Sequence[str] = ()
) -> Document:  # fmt: skip
    """Measure a kind of work on this machine. An interruption (Ctrl-C) keeps what was measured so far and marks it.

    Raises:
        XFMError: an option, the checkpoint or the data cannot be used.
    """
    known(work)
    unknown = [mode for mode in options.mode if mode not in MODES]
    if unknown:
        raise UnavailableError(f"mode {', '.join(unknown)!r} is unknown; choose from {', '.join(MODES)}")
    if options.p99_ms is not None and options.p99_ms <= 0:
        raise InputError(f"a bound of {options.p99_ms} ms on the latency cannot be kept; give one above zero")
    device = machine.choose_device(options.device)
    scale = Scale.of(work, options, device)
    progress = progress or Progress()
    chosen: list[Mode] = [mode for mode in MODES if not options.mode or mode in options.mode]
    progress.begin(3 + len(chosen))
    with opened(options, "scenario", device, progress, command) as setting:
        setting.prepare(scale.image_size, work=work)
        setting.document.options["scenario"] = work
        _Scenario(work, setting, scale, options).measure(chosen)
    return setting.finish()


def known(work: str) -> None:
    """Refuse what is no kind of work.

    Raises:
        UnavailableError: it is a command of its own, or unknown.
    """
    if work in ELSEWHERE:
        raise UnavailableError(f"scenario {work!r} is a command of its own: xfm-fast bench {work}")
    if work not in SCENARIOS:
        raise UnavailableError(f"scenario {work!r} is unknown; choose from {', '.join(SCENARIOS)}")


class _Scenario:
    def __init__(self, work: str, setting: Setting, scale: Scale, options: ScenarioOptions) -> None:
        self.setting, self.scale, self.options = setting, scale, options
        self.workload = scale.workload(work, setting.material)
        self.entrants: list[Entrant] = []

    def measure(self, modes: Sequence[Mode]) -> None:
        setting, scale, options = self.setting, self.scale, self.options
        setting.progress.stage("building and comparing")
        self.entrants = setting.entrants(self.workload.work, scale.image_size, options.baselines, options.official)
        setting.check(self.entrants, self.workload)
        if any(entrant.status == "parity failed" and entrant.ours for entrant in self.entrants):
            wrong = [entrant for entrant in self.entrants if not entrant.runs]
            setting.document.rows += [blank(entrant, self.workload, mode, 1) for mode in modes for entrant in wrong]
            return
        for entrant in self._running():
            setting.progress.step(f"{entrant.key}, warm-up")
            with entrant.trying():
                # Requests of every shape alone, and a batch: libraries prepare for shapes when they first see them.
                answer = entrant.answer(self.workload)
                for number in self.workload.distinct():
                    answer([number])
                answer(self.workload.batch(scale.batch))
        for mode in modes:
            setting.progress.stage(f"{self.workload.name(scale.batch if mode == 'offline' else 1)}, {mode}")
            if mode == "server":
                self._server()
                continue
            setting.measure(
                self.workload, self.entrants, mode, scale.batch if mode == "offline" else 1, rounds=scale.rounds,
                budget_s=scale.budget_s, deadline=time.perf_counter() + 2 * scale.budget_s, block=scale.block,
                split=True,
            )  # fmt: skip

    def _running(self) -> list[Entrant]:
        return [entrant for entrant in self.entrants if entrant.runs]

    def _server(self) -> None:
        setting = self.setting
        readings = setting.probes.readings()
        setting.probes.read(readings)
        alone, rates = self._paces()
        bound_s, origin = self._bound(alone)
        searches = {
            key: RateSearch(_FIRST_SHARE * rate, self.scale.trials, self.scale.resolution)
            for key, rate in rates.items()
        }
        best: dict[str, Served] = {}
        interrupted, turn = False, 0
        try:
            while any(not search.done for search in searches.values()):
                for key in rotated(list(searches), turn):
                    if not searches[key].done:
                        self._trial(key, searches, best, bound_s)
                setting.probes.read(readings)
                turn += 1
        except KeyboardInterrupt:
            interrupted = True
            setting.probes.read(readings)
        for entrant in self.entrants:
            row, search = blank(entrant, self.workload, "server", 1), searches.get(entrant.key)
            if entrant.runs and search is not None:
                served = best.get(entrant.key)
                row.status, row.reason = "measured", None
                if interrupted and not search.done:
                    row.status, row.reason = "partial", f"interrupted after {len(search.trials)} trials"
                elif served is None:
                    row.reason = f"the bound broke at every rate that was tried, down to {search.worst:.3g} a second"
                elif search.worst == math.inf:
                    row.reason = "the bound held at every rate that was tried"
                row.server = Server(
                    max_qps=search.best, bound_s=bound_s, bound_origin=origin, largest_batch=self.scale.batch,
                    seed=self.options.seed, trials=search.trials,
                )  # fmt: skip
                row.latency = None if served is None else latency(served.latencies)
                row.conditions = readings.conditions(entrant.dtype)
                # How many times the rate of the others ours is; one that held none is left out.
                for other, its in searches.items() if entrant.ours else ():
                    if other != entrant.key and its.best > 0:
                        contender, dtype = other.rsplit(" ", 1)
                        compared = Comparison(
                            contender=contender, dtype=dtype, like_for_like=dtype == entrant.dtype,
                            ratio=search.best / its.best,
                        )  # fmt: skip
                        row.against.append(compared)
            setting.document.rows.append(row)
        if interrupted:
            raise KeyboardInterrupt

    def _trial(self, key: str, searches: dict[str, RateSearch], best: dict[str, Served], bound_s: float) -> None:
        scale, search = self.scale, searches[key]
        entrant = next(entrant for entrant in self.entrants if entrant.key == key)
        rate = search.next_rate()
        self.setting.progress.step(f"{key}, {rate:.3g} requests/s")
        # Long enough that a rate which is too high by the resolution of the search piles up to the bound.
        least = rate * bound_s / (scale.resolution - 1)
        requests = int(max(10, least, min(scale.trial_requests, rate * scale.trial_s)))
        with entrant.trying():
            served = serve(
                entrant.answer(self.workload), rate, requests, largest_batch=scale.batch, bound_s=bound_s,
                seed=self.options.seed,
            )  # fmt: skip
            search.record(served.trial)
            if served.trial.held and served.trial.rate >= search.best:
                best[key] = served
        if not entrant.runs:
            del searches[key]

    def _paces(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of a request alone, and requests a second without a pause, in batches if that is faster."""
        alone: dict[str, float] = {}
        rates: dict[str, float] = {}
        batch = self.workload.batch(self.scale.batch)
        for entrant in self._running():
            self.setting.progress.step(f"{entrant.key}, pace")
            with entrant.trying():
                answer = entrant.answer(self.workload)
                seconds = statistics.median(_seconds(answer, [number]) for number in range(_BOUND_SAMPLES))
                rates[entrant.key] = max(1 / seconds, len(batch) / _seconds(answer, batch))
                alone[entrant.key] = seconds
        return alone, rates

    def _bound(self, single: dict[str, float]) -> tuple[float, str]:
        if self.options.p99_ms is not None:
            return self.options.p99_ms / 1e3, "asked for"
        reference = f"{OFFICIAL} fp32"
        key = reference if reference in single else next(iter(single), reference)
        seconds = single.get(key, 1.0)
        wanted, origin = _BOUND_FACTOR * seconds, f"{_BOUND_FACTOR:.0f} times one request of {key}"
        if wanted < _LEAST_BOUND_S:
            return _LEAST_BOUND_S, f"{origin} ({seconds * 1e3:.3g} ms), but at least {_LEAST_BOUND_S * 1e3:.0f} ms"
        return wanted, f"{origin} ({seconds * 1e3:.3g} ms)"


def _seconds(answer: Callable[..., Any], numbers: list[int]) -> float:
    begun = time.perf_counter()
    answer(numbers)
    return time.perf_counter() - begun


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
    """One trial; `latencies` of the requests that were answered, in order of arrival."""

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
    worst: float = math.inf
    trials: list[Trial] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.trials) >= self.most or (self.best > 0 and self.worst / self.best <= self.resolution)

    def next_rate(self) -> float:
        """The rate to try now."""
        if not self.trials:
            return self.start
        if self.best == 0:
            return self.worst / self.factor
        if self.worst == math.inf:
            return self.best * self.factor
        return (self.best * self.worst) ** 0.5

    def record(self, trial: Trial) -> None:
        """Learn from a trial. A rate that failed by chance below one that held does not lower what was reached."""
        self.trials.append(trial)
        if trial.held:
            self.best = max(self.best, trial.rate)
        elif trial.rate > self.best:
            self.worst = min(self.worst, trial.rate)
