"""How a row is measured: variants interleaved in one process, a matrix-product probe between rounds, peak memory."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.memory import PeakMemory

# One layer's worth of work for the MLP of a base-size encoder.
PROBE_SHAPE = (1280, 768, 3072)
# A probe that moves by more than this says that something else ran on the machine.
CONTENTION = 0.10
# An emulated dtype may take seconds for one product.
_PROBE_S = 0.5
_RESAMPLES = 2000


class GemmProbe:
    """This machine's rate at matrix products, in FLOP/s: the better of MKL (`F.linear`) and oneDNN for the dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        rows, inputs, outputs = PROBE_SHAPE
        generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.flops = 2 * rows * inputs * outputs
        self._x = torch.randn(rows, inputs, generator=generator).to(dtype)
        self._weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
        self._candidates = self._usable()
        rates = {name: self._rate(run, 4) for name, run in self._candidates.items()}
        self.library = max(rates, key=rates.__getitem__)

    def _usable(self) -> dict[str, Callable[[], Tensor]]:
        x, weight = self._x, self._weight
        rows = x.shape[0]
        candidates: dict[str, Callable[[], Tensor]] = {"MKL": lambda: F.linear(x, weight)}
        try:
            product = torch.ops.mkldnn._linear_pointwise
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            others: dict[str, Callable[[], Tensor]] = {
                "oneDNN": lambda: product(x, weight, None, "none", [], ""),
                "oneDNN, packed weight": lambda: product(x, packed, None, "none", [], ""),
            }
        except (RuntimeError, AttributeError, NotImplementedError):
            return candidates
        for name, run in others.items():
            try:
                run()
            except (RuntimeError, AttributeError, NotImplementedError):
                continue
            candidates[name] = run
        return candidates

    def _rate(self, run: Callable[[], Tensor], repeats: int) -> float:
        best, spent = float("inf"), 0.0
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
            spent += time.perf_counter() - start
            if spent > _PROBE_S:
                break
        return self.flops / best

    def __call__(self, repeats: int = 3) -> float:
        """Best rate of a few products."""
        with torch.no_grad():
            return self._rate(self._candidates[self.library], repeats)


class Sample(NamedTuple):
    """One run of a variant.

    Attributes:
        peak_bytes: highest memory while it ran, of the process or, on a GPU, of PyTorch's allocator.
        grown_bytes: how far that is above what was in use before.
        memory_method: how it was found.
    """

    output: Any
    seconds: float
    peak_bytes: int
    grown_bytes: int
    memory_method: str


def sample_on_cpu(run: Callable[[], Any]) -> Sample:
    """Run once by the clock."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        output = run()
        seconds = time.perf_counter() - start
    return Sample(output, seconds, memory.peak, memory.peak - memory.start, memory.method)


def sample_on_cuda(run: Callable[[], Any]) -> Sample:
    """Run once between two events of the current CUDA stream: from the first kernel's start to the last one's end."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    output = run()
    ended.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return Sample(output, begun.elapsed_time(ended) / 1e3, peak, peak - before, "CUDA allocator")


@dataclass
class Series:
    """All samples of one variant of a row."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    grown_bytes: list[int] = field(default_factory=list)
    output: Any = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self, items: int) -> dict[str, Any]:
        """For a results document; `items` are done by one run."""
        return {
            "seconds": self.seconds,
            "median_s": self.median,
            "throughput": items / self.median,
            "peak_bytes": max(self.peak_bytes),
            "grown_bytes": max(self.grown_bytes),
        }


@dataclass
class Measurement:
    """Interleaved samples of several variants, and what the probes said between the rounds."""

    series: dict[str, Series]
    probes: dict[torch.dtype, list[float]]
    memory_method: str = ""
    interrupted: bool = False


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    probes: Sequence[GemmProbe],
    *,
    warmups: Mapping[str, int],
    rounds: int,
    budget_s: float,
    most_rounds: int = 15,
    deadline: float = float("inf"),
    on_step: Callable[[str], None] = lambda _: None,
    sample: Callable[[Callable[[], Any]], Sample] = sample_on_cpu,
) -> Measurement:
    """Run every variant once a round, the order rotated from round to round, with a probe before, between and after.

    Args:
        variants: name to the work; what the last run returns is kept as `output`.
        probes: one per dtype that a share of the peak is wanted for.
        warmups: untimed runs of each variant before the first round.
        rounds: at least this many samples of each.
        budget_s: further rounds are added while the timed part is shorter than this.
        deadline: `time.perf_counter()` after which no round begins but the first.
        on_step: told what runs next, for a progress display.
        sample: how one run is timed.
    """
    names = list(variants)
    out = Measurement({name: Series() for name in names}, {probe.dtype: [] for probe in probes})

    def probe_all() -> None:
        for probe in probes:
            out.probes[probe.dtype].append(probe())

    with torch.no_grad():
        try:
            for name in names:
                for _ in range(warmups.get(name, 0)):
                    on_step(f"{name}, warm-up")
                    variants[name]()
            started = time.perf_counter()
            done = 0
            probe_all()
            while (
                done == 0
                or (done < rounds and time.perf_counter() < deadline)
                or (done < most_rounds and _room(started, done, min(budget_s, deadline - started)))
            ):
                for name in rotated(names, done):
                    on_step(f"{name}, round {done + 1}")
                    _record(out, name, sample(variants[name]))
                probe_all()
                done += 1
        except KeyboardInterrupt:
            out.interrupted = True
    return out


def _room(started: float, done: int, budget_s: float) -> bool:
    elapsed = time.perf_counter() - started
    return elapsed + elapsed / done <= budget_s


def rotated(names: list[str], shift: int) -> list[str]:
    """The order of a round: begun one further every time, and backwards every other time."""
    shift %= len(names)
    order = names[shift:] + names[:shift]
    return order if shift % 2 == 0 else order[::-1]


def _record(out: Measurement, name: str, sample: Sample) -> None:
    series = out.series[name]
    # Recorded together, so that an interruption leaves whole samples.
    series.output = sample.output
    series.seconds.append(sample.seconds)
    series.peak_bytes.append(sample.peak_bytes)
    series.grown_bytes.append(sample.grown_bytes)
    out.memory_method = sample.memory_method


def ratio_interval(slow: Sequence[float], fast: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of median(slow) / median(fast); rounds are resampled, so that drift common to both cancels."""
    rounds = min(len(slow), len(fast))
    draw = random.Random(0)
    ratios = []
    for _ in range(_RESAMPLES):
        chosen = [draw.randrange(rounds) for _ in range(rounds)]
        ratios.append(statistics.median(slow[i] for i in chosen) / statistics.median(fast[i] for i in chosen))
    ratios.sort()
    tail = (1 - level) / 2
    return ratios[int(tail * _RESAMPLES)], ratios[min(_RESAMPLES - 1, int((1 - tail) * _RESAMPLES))]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed: one that was measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def bootstrap(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float], level: float = 0.95
) -> tuple[float, float] | None:
    """Interval of a statistic of independent samples by resampling; None for fewer than three."""
    if len(values) < 3:
        return None
    draw = random.Random(0)
    found = sorted(statistic(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES // 2))
    tail = (1 - level) / 2
    return found[int(tail * len(found))], found[min(len(found) - 1, int((1 - tail) * len(found)))]


def shares_of_peak(flops: int, seconds: Sequence[float], probes: Sequence[float]) -> list[float]:
    """Rate of every sample over the mean of the probes before and after its round."""
    return [flops / s / ((a + b) / 2) for s, a, b in zip(seconds, probes, probes[1:], strict=False)]


def contended(probes: Sequence[float]) -> bool:
    """Whether the probe moved by more than `CONTENTION` while a row was measured."""
    middle = statistics.median(probes)
    return max(abs(rate / middle - 1) for rate in probes) > CONTENTION
