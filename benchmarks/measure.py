"""How everything is measured: contenders take turns in one process, between probes of what the machine does just then.

The machine's speed drifts, so every round runs every contender, in an order that turns, with a matrix product and a
copy timed before, between and after the rounds. Medians are reported with bootstrap intervals, ratios from samples of
the same rounds. A result counts only where it agrees with the reference as far as rounding explains the difference.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.kernels.cpu import llvm
from xfm_fast.kernels.cpu.gemm import compiled_linear
from xfm_fast.memory import PeakMemory

from .machine import EnergyMeter, GpuState
from .record import Comparison, Conditions, Energy, Interval, Latency, Memory, Probe, Row, finite
from .timing import DTYPES, one_line, rotated, timed
from .timing import FP32_BAND as FP32_BAND
from .timing import parity_band as parity_band
from .timing import relative_error as relative_error

# One layer's worth of work for the MLP of a base-size encoder; on a GPU a product that fills it.
PROBE_SHAPE = {"cpu": (1280, 768, 3072), "cuda": (8192, 8192, 8192)}
# Beyond any cache, and a millisecond of a GPU's time.
_COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
# A probe that moves by more than this says that something else ran on the machine.
CONTENTION = 0.10
# An emulated type may take seconds for one product.
_PROBE_S = 0.5
_RESAMPLES = 2000
_ENOUGH = 3
"""Samples from which an interval is told."""

# 16-bit results of the model differ from fp32 by the rounding of three encoders and of their embeddings, in spacings of
# the type. The official algorithm's own error at a few requests is one draw: luck may make it a third of that, and then
# says nothing about another order of summation.
MODEL_ROUNDING = 3.5


@dataclass
class Progress:
    """Listeners to a benchmark; the defaults are silent.

    Attributes:
        begin: called with the number of stages.
        stage: called with the name of a stage when it begins.
        step: called with what runs next within a stage, and how long the stage still takes where that is known.
    """

    begin: Callable[[int], None] = lambda stages: None
    stage: Callable[[str], None] = lambda name: None
    step: Callable[[str], None] = lambda what: None


class Sample(NamedTuple):
    """One run: its output and seconds, and the memory that it took, of the process or of CUDA's allocator."""

    output: Any
    seconds: float
    memory: Memory


def sample(run: Callable[[], Any], device: torch.device, *, waits: bool = False) -> Sample:
    """Run once and see its time and its memory; `waits` as in `timed`."""
    if device.type != "cuda":
        with PeakMemory() as seen:
            output, seconds = timed(run, device)
        memory = Memory(peak_bytes=seen.peak, grown_bytes=seen.peak - seen.start, method=seen.method)
        return Sample(output, seconds, memory)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, seconds = timed(run, device, waits=waits)
    peak = torch.cuda.max_memory_allocated()
    return Sample(output, seconds, Memory(peak_bytes=peak, grown_bytes=peak - before, method="CUDA allocator"))


Block = Callable[[], list[float]]
"""Runs once or a few times and returns the seconds of each run."""


class Watched:
    """A block of one run that also sees its memory; the last output and the highest peak are kept."""

    def __init__(self, run: Callable[[], Any], device: torch.device, *, waits: bool = False) -> None:
        self._run, self._device, self._waits = run, device, waits
        self.output: Any = None
        self.memory: Memory | None = None

    def __call__(self) -> list[float]:
        self.output, seconds, memory = sample(self._run, self._device, waits=self._waits)
        if self.memory is None or memory.peak_bytes > self.memory.peak_bytes:
            self.memory = memory
        return [seconds]


def _best_rate(amount: float, run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """`amount` a second in the fastest of a few runs."""
    best, spent = math.inf, 0.0
    for _ in range(repeats):
        _, seconds = timed(run, device)
        best, spent = min(best, seconds), spent + seconds
        if spent > _PROBE_S:
            break
    return amount / best


class GemmProbe:
    """This machine's rate at matrix products, in FLOP/s: on a CPU the best of MKL (`F.linear`), oneDNN and our own."""

    def __init__(self, dtype: torch.dtype, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self.shape = rows, inputs, outputs = PROBE_SHAPE[device.type]
        generator = torch.Generator().manual_seed(0)
        self.flops, self._device = 2 * rows * inputs * outputs, device
        x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
        weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(device, dtype)
        candidates: dict[str, Callable[[], object]] = {"cuBLAS" if x.is_cuda else "MKL": lambda: F.linear(x, weight)}
        if not x.is_cuda:
            candidates |= _onednn(x, weight)
            if llvm.why_not(dtype) is None:
                candidates["LLVM"] = lambda: compiled_linear(x, weight, None)
        with torch.no_grad():
            for run in candidates.values():
                # The first call of a library prepares it, which may take longer than all that is timed.
                run()
            rates = {name: _best_rate(self.flops, run, device, 4) for name, run in candidates.items()}
        self.library = max(rates, key=rates.__getitem__)
        self._run = candidates[self.library]

    def __call__(self, repeats: int = 3) -> float:
        """Best rate of a few products."""
        with torch.no_grad():
            return _best_rate(self.flops, self._run, self._device, repeats)


def _onednn(x: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    """OneDNN's products by name, as far as this build of PyTorch has them: the operations are private."""
    try:
        product = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        weights = {"oneDNN": weight, "oneDNN, packed weight": packed}
    except (RuntimeError, AttributeError, NotImplementedError):
        return {}
    usable: dict[str, Callable[[], object]] = {}
    for name, given in weights.items():
        try:
            product(x, given, None, "none", [], "")
        except (RuntimeError, AttributeError, NotImplementedError):
            continue
        usable[name] = lambda given=given: product(x, given, None, "none", [], "")
    return usable


def moved(rates: Sequence[float]) -> bool:
    """True where a probe left its median by more than `CONTENTION`."""
    middle = statistics.median(rates)
    return max(abs(rate / middle - 1) for rate in rates) > CONTENTION


@dataclass
class Readings:
    """Results of the probes, in order."""

    gemm: dict[str, list[float]]
    copies: list[float] = field(default_factory=list)
    clocks_mhz: list[float] = field(default_factory=list)
    temperatures_c: list[float] = field(default_factory=list)

    def rate(self, dtype: str) -> float | None:
        """Median FLOP/s at matrix products; None where the type was not probed."""
        return statistics.median(self.gemm[dtype]) if self.gemm.get(dtype) else None

    def conditions(self, dtype: str) -> Conditions | None:
        """Conditions of a row of this type."""
        gemm = self.gemm.get(dtype)
        if not gemm:
            return None
        remarks = []
        if moved(gemm):
            remarks.append(f"the matrix rate moved by more than {CONTENTION:.0%}")
        if self.clocks_mhz and moved(self.clocks_mhz):
            remarks.append(f"the GPU's clock went from {self.clocks_mhz[0]:.0f} to {self.clocks_mhz[-1]:.0f} MHz")
        if self.temperatures_c and self.temperatures_c[-1] - self.temperatures_c[0] > 10:
            remarks.append(f"the GPU warmed from {self.temperatures_c[0]:.0f} to {self.temperatures_c[-1]:.0f} °C")
        return Conditions(
            gemm_flops_per_s=list(gemm), copy_bytes_per_s=list(self.copies), contended=moved(gemm),
            drift=gemm[-1] / gemm[0], clocks_mhz=list(self.clocks_mhz), temperatures_c=list(self.temperatures_c),
            note="; ".join(remarks),
        )  # fmt: skip


class MachineProbes:
    """The probes of some types on a device: products, copies and, of a GPU, clock and temperature, read together."""

    def __init__(self, dtypes: Sequence[str], device: torch.device) -> None:
        self._device, self._gpu = device, GpuState(device)
        self._gemm = {name: GemmProbe(DTYPES[name], device) for name in dtypes}
        self._source = torch.ones(_COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
        self._target = torch.empty_like(self._source)
        self._copy()

    def _copy(self) -> float:
        """Bytes a second that a large copy reads and writes."""
        return _best_rate(2 * self._source.nbytes, lambda: self._target.copy_(self._source), self._device)

    def readings(self) -> Readings:
        """An empty list of readings."""
        return Readings({name: [] for name in self._gemm})

    def read(self, into: Readings) -> None:
        """Take one reading of everything."""
        for name, probe in self._gemm.items():
            into.gemm[name].append(probe())
        into.copies.append(self._copy())
        state = self._gpu()
        if state is not None:
            into.clocks_mhz.append(state.clock_mhz)
            into.temperatures_c.append(state.temperature_c)

    def describe(self) -> dict[str, Probe]:
        """A reading of its own for the head of a document."""
        return {
            name: Probe(
                library=probe.library, shape=list(probe.shape), gemm_flops_per_s=probe(),
                copy_bytes_per_s=self._copy(), copy_buffer_bytes=self._source.nbytes,
            )
            for name, probe in self._gemm.items()
        }  # fmt: skip


@dataclass
class Samples:
    """Results of the rounds, by the key of a contender: its name and, behind a blank, its type.

    Attributes:
        rounds: seconds of every run, round by round.
        failures: one line for each contender that raised an error, which takes no part from then on.
        joules, busy_s: counted during the blocks, and how long these took; empty without a counter.
        interrupted: stopped by Ctrl-C; whole blocks were kept.
    """

    rounds: dict[str, list[list[float]]]
    readings: Readings
    failures: dict[str, str] = field(default_factory=dict)
    joules: dict[str, float] = field(default_factory=dict)
    busy_s: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False

    def seconds(self, key: str) -> list[float]:
        """Seconds of every run of a contender."""
        return [second for block in self.rounds.get(key, []) for second in block]

    def share_of_rate(self, key: str, flops: float) -> float | None:
        """Median of FLOP/s over the matrix rate that was probed before and after the same round."""
        rates = self.readings.gemm.get(key.rsplit(" ", 1)[1], [])
        shares = shares_of_rate(flops, [statistics.median(block) for block in self.rounds[key]], rates)
        return statistics.median(shares) if shares else None

    def against(self, key: str) -> list[Comparison]:
        """The time of every other contender over that of `key`, from samples of the same rounds."""
        dtype, ours, found = key.rsplit(" ", 1)[1], self.seconds(key), []
        for other in self.rounds:
            contender, its_dtype = other.rsplit(" ", 1)
            theirs = self.seconds(other)
            if other != key and ours and theirs:
                found.append(compared(contender, its_dtype, dtype, theirs, ours))
        return found

    def energy(self, key: str, items: int, source: str) -> Energy | None:
        """Joules an item."""
        if key not in self.joules:
            return None
        done = items * len(self.seconds(key))
        return Energy(
            joules_per_item=self.joules[key] / done, watts=self.joules[key] / self.busy_s[key], source=source
        )  # fmt: skip


def compared(contender: str, its_dtype: str, dtype: str, theirs: Sequence[float], ours: Sequence[float]) -> Comparison:
    """How many times as fast `ours` of a type are as another contender's samples of the same rounds."""
    low, high = ratio_interval(theirs, ours)
    ratio = statistics.median(theirs) / statistics.median(ours)
    same = its_dtype == dtype
    return Comparison(contender=contender, dtype=its_dtype, like_for_like=same, ratio=ratio, low=low, high=high)


def interleave(
    blocks: Mapping[str, Block], probes: MachineProbes | None = None, *, rounds: int, budget_s: float,
    most_rounds: int = 15, warmups: Mapping[str, int] | int = 0, deadline: float = math.inf,
    meter: EnergyMeter | None = None, on_step: Callable[[str], None] = lambda what: None, grad: bool = False,
) -> Samples:  # fmt: skip
    """Run the block of every contender once a round, in an order that turns, with the probes before, between and after.

    A contender that raises an error takes no further part; the others go on.

    Args:
        blocks: by key, a contender's name and type.
        rounds: at least so many, as far as the deadline allows, and one in any case.
        budget_s: more than `rounds` are run while all of them take no longer than this, up to `most_rounds`.
        warmups: untimed blocks of each before the first round.
        deadline: `time.perf_counter()` by which the last round has to end, unless it is the first.
        meter: counts energy where it can.
        on_step: told what runs next, for a progress display.
        grad: leave automatic differentiation on.
    """
    out = Samples({name: [] for name in blocks}, Readings({}) if probes is None else probes.readings())

    def read() -> None:
        if probes is not None:
            probes.read(out.readings)

    with nullcontext() if grad else torch.no_grad():
        try:
            for name, block in blocks.items():
                for _ in range(warmups if isinstance(warmups, int) else warmups.get(name, 0)):
                    on_step(f"{name}, warm-up")
                    _attempt(name, block, out)
            started, done = time.perf_counter(), 0
            read()
            while len(out.failures) < len(blocks):
                left = str(rounds)
                if done:
                    now = time.perf_counter()
                    each = (now - started) / done
                    end = deadline if done < rounds else min(started + budget_s, deadline)
                    if done >= most_rounds or now + each > end:
                        break
                    planned = min(most_rounds, max(rounds, int(budget_s / each)))
                    left = f"{planned}, about {max(1, each * (planned - done)):.0f} s left"
                for name in rotated(list(blocks), done):
                    on_step(f"{name}, {done + 1} of {left}")
                    seconds = _attempt(name, blocks[name], out, meter)
                    if seconds is not None:
                        out.rounds[name].append(seconds)
                read()
                done += 1
        except KeyboardInterrupt:
            out.interrupted = True
            while probes is not None and len(out.readings.copies) < 2:
                read()
    return out


def _attempt(name: str, block: Block, out: Samples, meter: EnergyMeter | None = None) -> list[float] | None:
    if name in out.failures:
        return None
    counter = None if meter is None or meter.source is None else meter
    before, begun = counter.joules() if counter else 0.0, time.perf_counter()
    try:
        seconds = block()
    except Exception as error:  # a baseline of another library may fail in any way; the run goes on
        out.failures[name] = one_line(error)
        return None
    if counter:
        out.joules[name] = out.joules.get(name, 0.0) + counter.joules() - before
        out.busy_s[name] = out.busy_s.get(name, 0.0) + time.perf_counter() - begun
    return seconds


def filled(row: Row, key: str, samples: Samples, memory: Memory | None = None) -> Row:
    """A row with what the rounds gave for its contender; `partial` where they were interrupted, or `failed`."""
    seconds = samples.seconds(key)
    if key in samples.failures:
        return row.model_copy(update={"status": "failed", "reason": samples.failures[key]})
    if not seconds:
        return row.model_copy(update={"status": "partial", "reason": "interrupted before its first sample"})
    updates: dict[str, Any] = {
        "status": "partial" if samples.interrupted else "measured",
        "reason": f"interrupted after {len(seconds)} samples" if samples.interrupted else None,
        "against": samples.against(key) if row.ours else [],
        "memory": memory,
        "conditions": samples.readings.conditions(row.dtype),
    }
    if row.mode == "single-stream":
        return row.model_copy(update=updates | {"latency": latency(seconds)})
    return row.model_copy(update=updates | {"seconds": seconds, "throughput": throughput(row.items, seconds)})


def differing(row: Row, error: float, band: float) -> dict[str, Any]:
    """Status and reason of a row whose result is not the reference's."""
    parity = row.parity and row.parity.model_copy(update={"error": finite(error), "passed": False})
    return {
        "status": "parity failed", "reason": f"error {error:.1e} exceeds {band:.1e}; no speed is reported",
        "parity": parity,
    }  # fmt: skip


def agreeing(rows: Sequence[Row]) -> list[Row]:
    """Rows of one work, their comparisons only with rows that have numbers: no ratio to a result that differs."""
    there = {(row.contender, row.dtype) for row in rows if row.measured}
    for row in rows:
        row.against = [other for other in row.against if (other.contender, other.dtype) in there]
    return list(rows)


def shares_of_rate(flops: float, seconds: Sequence[float], rates: Sequence[float]) -> list[float]:
    """FLOP/s of every sample over the mean of the probes before and after its round."""
    return [flops / s / ((a + b) / 2) for s, a, b in zip(seconds, rates, rates[1:], strict=False)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed: one that was measured."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def bootstrap(
    statistic: Callable[..., Any], *series: Sequence[float], paired: bool = False
) -> tuple[float, float] | None:
    """Interval of 95% of a statistic by resampling; None for fewer than three samples.

    Args:
        statistic: of the arrays of all series along `axis`.
        series: samples of one thing, or of two.
        paired: two series are resampled together: they are of the same rounds.
    """
    if min(map(len, series)) < _ENOUGH:
        return None
    # The name of this argument in every SciPy; newer ones add another.
    seed: Any = {"random_state": np.random.default_rng(0)}
    # scipy's statistics take a second to load, and a process that measures one thing needs none.
    from scipy import stats

    found = stats.bootstrap(
        series, statistic, paired=paired, vectorized=True, n_resamples=_RESAMPLES, method="percentile", **seed
    ).confidence_interval
    return float(found.low), float(found.high)


def ratio_interval(
    slow: Sequence[float], fast: Sequence[float], *, paired: bool = True
) -> tuple[float, float] | tuple[None, None]:
    """Interval of median(slow) / median(fast).

    Args:
        paired: both are of the same rounds, which are resampled together, so that drift common to both cancels.
    """
    rounds = min(len(slow), len(fast)) if paired else None

    def ratio(a: Any, b: Any, axis: int = -1) -> Any:
        return np.median(a, axis) / np.median(b, axis)

    return bootstrap(ratio, slow[:rounds], fast[:rounds], paired=paired) or (None, None)


def interval(values: Sequence[float], share: float) -> Interval:
    """A percentile with its bootstrap interval; the median of an even number lies between two values."""

    def statistic(chosen: Any, axis: int = -1) -> Any:
        method = "linear" if share == 0.5 else "inverted_cdf"
        return np.quantile(chosen, share, axis=axis, method=method)

    low, high = bootstrap(statistic, values) or (None, None)
    return Interval(value=float(statistic(values)), low=low, high=high)


def latency(seconds: Sequence[float]) -> Latency:
    """Percentiles of requests."""
    p50, p90, p99 = (interval(seconds, share) for share in (0.5, 0.9, 0.99))
    return Latency(samples=list(seconds), p50=p50, p90=p90, p99=p99, mean=statistics.fmean(seconds))


def throughput(items: int, seconds: Sequence[float]) -> Interval:
    """Items a second of runs of `items`."""
    time_s = interval(seconds, 0.5)
    low = None if time_s.high is None else items / time_s.high
    high = None if time_s.low is None else items / time_s.low
    return Interval(value=items / time_s.value, low=low, high=high)
