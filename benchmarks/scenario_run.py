"""Scenarios under MLPerf's names: single stream (latency), offline (throughput), server (requests a second in time).

Source of the names and of what each measures: MLPerf Inference (arXiv 1911.02549).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from xfm_fast.benchmarks.contenders.registry import OFFICIAL, OURS
from xfm_fast.benchmarks.entrants import Entrant
from xfm_fast.benchmarks.measuring import rotated
from xfm_fast.benchmarks.rounds import Block, Samples, run_rounds
from xfm_fast.benchmarks.row_making import blank, latency, memory, operations, sampled, stages
from xfm_fast.benchmarks.rows import MODES, Comparison, Document, Memory, Mode, Row, Server, Share
from xfm_fast.benchmarks.scenario_setting import ScenarioOptions, Setting, opened
from xfm_fast.benchmarks.server import RateSearch, Served, serve
from xfm_fast.benchmarks.suite import Progress
from xfm_fast.errors import InputError, UnavailableError

# A bound that all contenders can be held to: what the official algorithm takes for one request, and some waiting.
_BOUND_FACTOR = 4.0
# Below this a bound would measure the scheduler of the operating system.
_LEAST_BOUND_S = 0.025
_BOUND_SAMPLES = 5
_MOST_ROUNDS = 60
# Of the rate without pauses, where the search for a rate that holds begins.
_FIRST_SHARE = 0.7


def run(
    options: ScenarioOptions,
    modes: Sequence[str] = MODES,
    *,
    p99_s: float | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> Document:
    """Measure a scenario on this machine. An interruption (Ctrl-C) keeps what was measured so far and marks it.

    Args:
        modes: of `MODES`.
        p99_s: bound of the server scenario; by default four times what the official algorithm takes for one request.

    Raises:
        XFMError: an option, the checkpoint or the data cannot be used.
    """
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise UnavailableError(f"mode {', '.join(unknown) or 'none'!r} is unknown; choose from {', '.join(MODES)}")
    if p99_s is not None and p99_s <= 0:
        raise InputError(f"a bound of {p99_s} s on the latency cannot be kept; give one above zero")
    chosen: list[Mode] = [mode for mode in MODES if mode in modes]
    with opened(options, "scenario", progress, command) as setting:
        _Run(setting, p99_s).measure(chosen)
    return setting.finish()


class _Run:
    def __init__(self, setting: Setting, p99_s: float | None) -> None:
        self.setting, self.p99_s = setting, p99_s
        self.workload = setting.workload()
        self.answers: dict[str, Callable[..., Any]] = {}
        self.entrants: list[Entrant] = []

    def measure(self, modes: Sequence[Mode]) -> None:
        setting = self.setting
        setting.progress.begin(3 + len(modes))
        setting.progress.stage("building and comparing")
        self.entrants = setting.checked(self.workload, setting.scale.image_size)
        self._note_cold_start()
        if any(e.status == "parity failed" and e.contender.name == OURS for e in self.entrants):
            setting.document.rows += [
                blank(entrant, self.workload, mode, 1)
                for mode in modes
                for entrant in self.entrants
                if not entrant.runs
            ]
            return
        self._warm_up()
        measured: dict[Mode, Callable[[], None]] = {
            "single-stream": self._single_stream, "offline": self._offline, "server": self._server
        }  # fmt: skip
        for mode in modes:
            setting.progress.stage(mode)
            measured[mode]()

    def _warm_up(self) -> None:
        """Requests of every shape alone, and a batch: libraries prepare for shapes when they first see them."""
        for entrant in self._running():
            self.setting.progress.step(f"{entrant.key}, warm-up")
            try:
                answer = entrant.answer(self.workload)
                for number in self.workload.distinct():
                    answer([number])
                answer(self.workload.batch(self.setting.scale.batch))
            except Exception as error:  # whatever a library raises becomes a row that says so
                entrant.fail(error)
            else:
                self.answers[entrant.key] = answer

    def _note_cold_start(self) -> None:
        setting = self.setting
        first = next((e.cost.first_call_s for e in self.entrants if e.contender.name == OURS and e.cost), 0.0)
        setting.document.cold_start = {
            "process_to_suite_s": setting.process_s,
            "load_s": setting.load_s,
            "first_call_s": first,
            "total_s": setting.process_s + setting.load_s + first,
        }

    def _running(self) -> list[Entrant]:
        return [entrant for entrant in self.entrants if entrant.runs]

    def _single_stream(self) -> None:
        counters = dict.fromkeys(self.answers, 0)

        def block(key: str) -> list[float]:
            answer, seconds = self.answers[key], []
            # The first request finds the caches as another contender left them.
            answer([counters[key]])
            for _ in range(self.setting.scale.block):
                counters[key] += 1
                seconds.append(_seconds(answer, [counters[key]]))
            return seconds

        self._in_rounds("single-stream", 1, block)

    def _offline(self) -> None:
        numbers = self.workload.batch(self.setting.scale.batch)

        def block(key: str) -> list[float]:
            return [_seconds(self.answers[key], numbers)]

        self._in_rounds("offline", len(numbers), block)

    def _in_rounds(self, mode: Mode, batch: int, block: Callable[[str], list[float]]) -> None:
        setting, scale = self.setting, self.setting.scale
        numbers = self.workload.batch(batch)
        peaks: dict[str, Memory] = {}
        outputs: dict[str, Any] = {}
        for entrant in self._running():
            setting.progress.step(f"{entrant.key}, memory")
            try:
                peaks[entrant.key], outputs[entrant.key] = memory(
                    lambda key=entrant.key: self.answers[key](numbers), setting.device
                )
            except Exception as error:
                entrant.fail(error)
        blocks: dict[str, Block] = {e.key: lambda key=e.key: block(key) for e in self._running()}
        samples = run_rounds(
            blocks, setting.probes, setting.meter, rounds=scale.rounds, budget_s=scale.budget_s,
            most_rounds=_MOST_ROUNDS, on_step=setting.progress.step,
        )  # fmt: skip
        for entrant in self.entrants:
            if entrant.key in samples.failures:
                entrant.status, entrant.reason = "failed", samples.failures[entrant.key]
            row = blank(entrant, self.workload, mode, batch)
            if entrant.runs:
                row = sampled(
                    row, entrant, self.workload, numbers, outputs[entrant.key], samples, peaks[entrant.key],
                    setting.meter,
                )  # fmt: skip
            if row.status == "measured":
                setting.progress.step(f"{entrant.key}, stages")
                row = row.model_copy(update=self._parts(entrant, numbers, samples))
            setting.document.rows.append(row)
        if samples.interrupted:
            raise KeyboardInterrupt

    def _parts(self, entrant: Entrant, numbers: list[int], samples: Samples) -> dict[str, list[Share]]:
        answer, middle = self.answers[entrant.key], statistics.median(samples.seconds[entrant.key])
        return {
            "stages": stages(answer, numbers, entrant.device, middle),
            "operations": operations(entrant, answer, numbers),
        }

    def _server(self) -> None:
        setting, scale = self.setting, self.setting.scale
        readings = setting.probes.readings()
        setting.probes.read(readings)
        alone, rates = self._paces()
        bound_s, origin = self._bound(alone)
        searches = {key: RateSearch(_FIRST_SHARE * rate, scale.trials, scale.resolution) for key, rate in rates.items()}
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
            row = blank(entrant, self.workload, "server", 1)
            search = searches.get(entrant.key)
            if entrant.runs and search is not None:
                row = self._server_row(row, search, best.get(entrant.key), bound_s, origin, interrupted)
                update: dict[str, Any] = {"conditions": readings.conditions(entrant.dtype)}
                if entrant.contender.name == OURS:
                    update["against"] = _rates_against(entrant.key, searches)
                row = row.model_copy(update=update)
            setting.document.rows.append(row)
        if interrupted:
            raise KeyboardInterrupt

    def _trial(
        self, key: str, searches: dict[str, RateSearch], best: dict[str, Served], bound_s: float
    ) -> None:  # fmt: skip
        scale, search = self.setting.scale, searches[key]
        rate = search.next_rate()
        self.setting.progress.step(f"{key}, {rate:.3g} requests/s")
        # Long enough that a rate which is too high by the resolution of the search piles up to the bound.
        least = rate * bound_s / (scale.resolution - 1)
        requests = int(max(10, least, min(scale.trial_requests, rate * scale.trial_s)))
        try:
            served = serve(
                self.answers[key], rate, requests, largest_batch=scale.batch, bound_s=bound_s,
                seed=self.setting.options.seed,
            )  # fmt: skip
        except Exception as error:  # a baseline that breaks under load becomes a failed row
            next(entrant for entrant in self.entrants if entrant.key == key).fail(error)
            del searches[key]
            return
        search.record(served.trial)
        if served.trial.held and served.trial.rate >= search.best:
            best[key] = served

    def _paces(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of a request alone, and requests a second without a pause, in batches if that is faster."""
        alone: dict[str, float] = {}
        rates: dict[str, float] = {}
        batch = self.workload.batch(self.setting.scale.batch)
        for entrant in self._running():
            self.setting.progress.step(f"{entrant.key}, pace")
            answer = self.answers[entrant.key]
            try:
                seconds = [_seconds(answer, [number]) for number in range(_BOUND_SAMPLES)]
                together = _seconds(answer, batch)
            except Exception as error:
                entrant.fail(error)
            else:
                alone[entrant.key] = statistics.median(seconds)
                rates[entrant.key] = max(1 / alone[entrant.key], len(batch) / together)
        return alone, rates

    def _bound(self, single: dict[str, float]) -> tuple[float, str]:
        if self.p99_s is not None:
            return self.p99_s, "asked for"
        reference = f"{OFFICIAL} fp32"
        key = reference if reference in single else next(iter(single), reference)
        seconds = single.get(key, 1.0)
        wanted, origin = _BOUND_FACTOR * seconds, f"{_BOUND_FACTOR:.0f} times one request of {key}"
        if wanted < _LEAST_BOUND_S:
            return _LEAST_BOUND_S, f"{origin} ({seconds * 1e3:.3g} ms), but at least {_LEAST_BOUND_S * 1e3:.0f} ms"
        return wanted, f"{origin} ({seconds * 1e3:.3g} ms)"

    def _server_row(
        self, row: Row, search: RateSearch, best: Served | None, bound_s: float, origin: str, interrupted: bool
    ) -> Row:
        status, reason = "measured", None
        if interrupted and not search.done:
            status, reason = "partial", f"interrupted after {len(search.trials)} trials"
        elif best is None:
            reason = f"the bound broke at every rate that was tried, down to {search.worst:.3g} a second"
        elif search.worst == float("inf"):
            reason = "the bound held at every rate that was tried"
        server = Server(
            max_qps=search.best, bound_s=bound_s, bound_origin=origin, largest_batch=self.setting.scale.batch,
            seed=self.setting.options.seed, trials=search.trials,
        )  # fmt: skip
        found = None if best is None else latency(best.latencies)
        return row.model_copy(update={"status": status, "reason": reason, "server": server, "latency": found})


def _seconds(answer: Callable[..., Any], numbers: list[int]) -> float:
    begun = time.perf_counter()
    answer(numbers)
    return time.perf_counter() - begun


def _rates_against(key: str, searches: dict[str, RateSearch]) -> list[Comparison]:
    """How many times the rate of the others ours is; whoever held none is left out."""
    found = []
    for other, search in searches.items():
        if other != key and search.best > 0:
            contender, dtype = other.rsplit(" ", 1)
            found.append(Comparison(contender=contender, dtype=dtype, ratio=searches[key].best / search.best))
    return found
