"""The harness: backends of a case agree with its reference, then run in interleaved rounds of one process.

The machine's speed drifts, so every round runs every backend, in rotating order, with GEMM and copy probes before,
between and after the rounds. Medians have bootstrap intervals, ratios come from samples of the same rounds. A backend
is timed only if its result agrees with the reference as far as rounding explains the difference.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xfm_fast.errors import InputError, UnavailableError, XFMError
from xfm_fast.kernels import roofline
from xfm_fast.kernels.backend import resolve
from xfm_fast.kernels.ladder import watching
from xfm_fast.kernels.prepared import NotPreparedError
from xfm_fast.memory import PeakMemory

from . import machine
from .machine import MachineProbes, Readings
from .record import (
    SCHEMA_VERSION,
    Comparison,
    Direction,
    Document,
    Extra,
    Mode,
    Parity,
    Probe,
    Result,
    Status,
    finite,
    is_ours,
)
from .timing import DTYPES, FP32_BAND, one_line, parity_band, relative_error, rotated, timed

_RESAMPLES = 2000
# Samples from which an interval is given.
_ENOUGH = 3
# 16-bit results of the model differ from fp32 by the rounding of three encoders and of their embeddings, in spacings of
# the dtype. The official algorithm's own error at a few requests is one draw, and may be a third of that by luck.
MODEL_ROUNDING = 3.5

Call = Callable[..., Any]
Block = Callable[[], list[float]]
"""Runs once or a few times and returns the seconds of each run; its `extra` and `reason`, if any, go into the row."""


@dataclass
class Progress:
    """Listeners to a benchmark: `begin` gets the number of stages, `stage` a name, `step` what runs next within it."""

    begin: Callable[[int], None] = lambda stages: None
    stage: Callable[[str], None] = lambda name: None
    step: Callable[[str], None] = lambda what: None


class Difference(NamedTuple):
    """Largest difference between two results, relative to the largest value, and a remark."""

    error: float
    note: str = ""


def tensors_differ(ours: Tensor, theirs: Tensor) -> Difference:
    """`relative_error` as a `Difference`."""
    return Difference(relative_error(ours, theirs))


@dataclass
class Backend:
    """One way to do the work of a case, in one dtype.

    Attributes:
        name: stable; `label` is for readers.
        build: makes the call to time. It may raise any error of its library.
        check: gives the result to compare with the reference; by default the call does.
        lacking: status and reason if it does not run.
        band: allowed error, if rounding in the dtype does not explain it.
        optional: its result may differ; then it is not offered.
        bound: it computes a part of the work or similar work, and is not compared.
        parity: if it was compared before.
        extra: known before it runs.
        detail: further `extra`, computed after the timing with the median in seconds.
    """

    name: str
    dtype: str
    build: Callable[[], Any]
    label: str = ""
    check: Call | None = None
    lacking: tuple[Status, str | None] | None = None
    band: float | None = None
    optional: bool = False
    bound: bool = False
    parity: Parity | None = None
    extra: Extra = field(default_factory=dict)
    detail: Callable[[float], Extra] = lambda median_s: {}

    def __post_init__(self) -> None:
        self.label = self.label or self.name
        if self.bound:
            self.extra = {"bounds": 1} | self.extra

    @property
    def key(self) -> str:
        """Name and dtype."""
        return f"{self.name} {self.dtype}"


@dataclass
class Case:
    """An amount of work, the backends that do it, and the reference that they have to agree with.

    Attributes:
        work: kind of work; `name` has the call or the amount, `conditions` the inputs, for readers.
        items: of one run, counted in `unit`.
        judge: name of the reference; if it is a backend too, its first result is the reference.
        reference: the reference's result in a dtype, in fp32 the truth; None where backends were compared before.
        wide: the reference can be computed in fp64 too.
        compare: the difference of two results.
        fp32_band: error allowed in fp32; `rounding`: least error of 16-bit results, in spacings of the dtype.
        count: `extra` that follows from a result, such as `needed_flops` and `bytes`.
        block: makes of a call what is timed; by default one run, whose memory is watched.
        search: measures the calls of the backends that agree in another way than by rounds, and fills in their results.
        grad: leave automatic differentiation on.
        watched: a result of a fallback to PyTorch is absent; for backends that no compiler traces.
        rounds, budget_s, most_rounds, warmups, deadline: see `interleave`.
    """

    work: str
    name: str
    backends: Sequence[Backend]
    unit: str = "calls"
    items: int = 1
    mode: Mode | Direction = "offline"
    judge: str = ""
    reference: Callable[[str], Any] | None = None
    wide: bool = False
    compare: Callable[[Any, Any], Difference] = tensors_differ
    fp32_band: float = FP32_BAND
    rounding: float = 0.0
    count: Callable[[Backend, Any], Extra] = lambda backend, result: {}
    block: Callable[[Call], Block] | None = None
    search: Callable[[Run, dict[str, Call], dict[str, Result]], None] | None = None
    grad: bool = False
    watched: bool = False
    rounds: int = 5
    budget_s: float = 0.0
    most_rounds: int = 15
    warmups: int = 1
    deadline: float = math.inf
    conditions: str = ""

    def repeated(self, rows: Iterable[Result], note: str = "", **changes: Any) -> Case:
        """The same backends at other work, with the status and comparison of their results at this one."""
        known, backends = (
            {f"{row.backend} {row.dtype}": row for row in rows if row.place == self.place},
            [],
        )
        for backend in self.backends:
            row = known.get(backend.key)
            if row is not None:
                lacking = (
                    None if row.status in ("measured", "partial") else (row.status, row.reason)
                )
                parity = row.parity and replace(row.parity, note=row.parity.note + note)
                backend = replace(backend, lacking=lacking, parity=parity)
            backends.append(backend)
        return replace(self, backends=backends, reference=None, **changes)

    @property
    def place(self) -> tuple[str, ...]:
        """As `Result.place`."""
        return self.work, self.mode, self.name

    def result(self, backend: Backend) -> Result:
        """A result without numbers."""
        status, reason = backend.lacking or ("measured", None)
        return Result(
            work=self.work,
            name=self.name,
            conditions=self.conditions,
            mode=self.mode,
            backend=backend.name,
            label=backend.label,
            dtype=backend.dtype,
            status=status,
            reason=reason,
            unit=self.unit,
            items=self.items,
            parity=backend.parity,
            extra=dict(backend.extra),
        )


class Watched:
    """A block of one run that keeps its peak memory."""

    def __init__(self, run: Call, device: torch.device) -> None:
        self._run, self._device = run, device
        self.extra: Extra = {}

    def __call__(self) -> list[float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _, seconds = timed(self._run, self._device)
            peak, method = torch.cuda.max_memory_allocated(), "CUDA allocator"
        else:
            with PeakMemory() as memory:
                _, seconds = timed(self._run, self._device)
            peak, before, method = memory.peak, memory.start, memory.method
        known = self.extra.get("peak_bytes")
        if not isinstance(known, int) or peak > known:
            self.extra = {"peak_bytes": peak, "grown_bytes": peak - before, "memory_method": method}
        return [seconds]


class Comparator:
    """Compares results of a case with its reference, which is computed once per dtype."""

    def __init__(self, case: Case) -> None:
        self._case = case
        # Results may be large: only the one in fp32 is kept, and errors of the reference itself by dtype.
        self._exact: list[Any] = []
        self._own: dict[str, float] = {}

    def _reference(self, dtype: str) -> Any:
        assert self._case.reference is not None
        if dtype == "fp32" and self._exact:
            return self._exact[0]
        with torch.set_grad_enabled(self._case.grad):
            result = self._case.reference(dtype)
        if dtype == "fp32":
            self._exact = [result]
        return result

    def _own_error(self, dtype: str) -> float:
        """Error of the reference itself against fp32; in fp32 against fp64, if that can be computed."""
        if dtype not in self._own:
            wider = "fp32" if dtype != "fp32" or not self._case.wide else "fp64"
            pair = self._reference(dtype), self._reference(wider)
            self._own[dtype] = self._case.compare(*pair).error if wider != dtype else 0.0
        return self._own[dtype]

    def parity(self, backend: Backend, result: Any) -> Parity:
        """The difference from the reference, and the one that rounding explains."""
        case, kind = self._case, DTYPES.get(backend.dtype, torch.float32)
        judge = backend.name == case.judge
        if judge and backend.dtype == "fp32" and not self._exact:
            self._exact = [result]
        error, note = case.compare(result, self._reference("fp32"))
        if judge and backend.dtype != "fp32":
            self._own.setdefault(backend.dtype, error)
        band = backend.band
        if band is None and kind == torch.float32 and error <= case.fp32_band:
            band = case.fp32_band
        if band is None:
            least = 0.0 if kind == torch.float32 else case.rounding * torch.finfo(kind).eps
            band = parity_band(
                kind, max(self._own_error(backend.dtype), least), fp32=case.fp32_band
            )
        cosine = None
        if backend.dtype == "int8" and isinstance(result, Tensor):
            pair = (value.double().flatten() for value in (result, self._reference("fp32")))
            cosine = finite(float(torch.cosine_similarity(*pair, dim=0)))
        return Parity(
            error=finite(error), band=band, passed=error <= band, note=note,
            against=f"{case.judge} fp32" if any(one.name == case.judge for one in case.backends) else case.judge,
            cosine=cosine,
        )  # fmt: skip


@dataclass
class Samples:
    """Seconds of every run, round by round, and one line of each error, by the key of a backend: its name and dtype.

    A backend that raised an error takes no further part; Ctrl-C stops all, and whole blocks are kept.
    """

    rounds: dict[str, list[list[float]]]
    readings: Readings = field(default_factory=Readings)
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    def seconds(self, key: str) -> list[float]:
        """Seconds of every run of a backend."""
        return [second for block in self.rounds.get(key, []) for second in block]


def compared(key: str, dtype: str, theirs: Sequence[float], ours: Sequence[float]) -> Comparison:
    """How many times as fast `ours` in a dtype are as the samples of another backend from the same rounds."""
    backend, its_dtype = key.rsplit(" ", 1)
    low, high = ratio_interval(theirs, ours)
    ratio = statistics.median(theirs) / statistics.median(ours)
    same = its_dtype == dtype
    return Comparison(
        backend=backend, dtype=its_dtype, like_for_like=same, ratio=ratio, low=low, high=high
    )


def interleave(
    blocks: Mapping[str, Block], probes: MachineProbes | None = None, *, rounds: int, budget_s: float = 0.0,
    most_rounds: int = 15, warmups: int = 0, deadline: float = math.inf,
    on_step: Callable[[str], None] = lambda what: None, grad: bool = False,
) -> Samples:  # fmt: skip
    """Run the block of every backend once a round, in rotating order, with the probes before, between and after.

    After `warmups` untimed blocks of each, `rounds` are run, and up to `most_rounds` while all of them take less than
    `budget_s`. A round after the first ends before the `deadline`, a time of `time.perf_counter()`.
    """
    out = Samples({name: [] for name in blocks})

    def read() -> None:
        if probes is not None:
            probes.read(out.readings)

    def attempt(name: str, *, warmup: bool = False) -> None:
        if name in out.failures:
            return
        try:
            seconds = blocks[name]()
        except (
            Exception
        ) as error:  # a backend of another library may fail in any way; the run goes on
            out.failures[name] = one_line(error)
            return
        if not warmup:
            out.rounds[name].append(seconds)

    with torch.set_grad_enabled(grad):
        try:
            for name in blocks:
                for _ in range(warmups):
                    on_step(f"{name}, warm-up")
                    attempt(name, warmup=True)
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
                    attempt(name)
                read()
                done += 1
        except KeyboardInterrupt:
            out.interrupted = True
            while probes is not None and len(out.readings.copies) < 2:
                read()
    return out


class Run:
    """A benchmark that has begun: its options, document, machine probes and progress display.

    Attributes:
        dtypes: to measure; `absent` are those that this machine does not offer, with the reason.
        scratch: a folder for files of this run.
        keep: called with the document when it has new results.
    """

    def __init__(
        self, document: Document, options: Any, progress: Progress, dtypes: Sequence[str], scratch: Path,
        keep: Callable[[Document], None],
    ) -> None:  # fmt: skip
        self.document, self.options, self.progress, self.scratch, self.keep = (
            document,
            options,
            progress,
            scratch,
            keep,
        )
        self.device = torch.device(document.device)
        self.dtypes, self.absent = machine.choose_dtypes(dtypes, self.device)
        self.probes: MachineProbes | None = None

    def probe(self) -> None:
        """Prepare the machine probes."""
        self.probes = MachineProbes(self.dtypes, self.device)
        self.document.probes = {
            name: Probe(**rates) for name, rates in self.probes.describe().items()
        }

    def add(self, rows: Sequence[Result]) -> None:
        """Add results to the document."""
        self.document.rows += rows
        self.keep(self.document)

    def measure(self, case: Case) -> list[Result]:
        """Measure a case and add its results.

        Raises:
            KeyboardInterrupt: the rounds were interrupted; the results are there.
        """
        rows = {backend.key: case.result(backend) for backend in case.backends}
        calls: dict[str, Call] = {}
        counted: dict[str, Extra] = {}
        comparator = Comparator(case)
        # The judge first: its result is the reference.
        for backend in sorted(case.backends, key=lambda one: one.name != case.judge):
            row = rows[backend.key]
            if backend.lacking is not None:
                continue
            self.progress.step(f"comparing {backend.key}")
            try:
                with (
                    torch.set_grad_enabled(case.grad),
                    watching() if case.watched else nullcontext({}) as ran,
                ):
                    call, result = backend.build(), None
                    if case.reference is not None and not backend.bound:
                        result = (backend.check or call)()
                        row.parity = comparator.parity(backend, result)
                    counted[backend.key] = case.count(backend, result)
                    del result
            except Exception as error:  # of any library: its own row alone is lost
                row.status, row.reason = "failed", one_line(error)
                if backend.dtype == "int8" and isinstance(error, XFMError):
                    row.status = "not offered"
                elif isinstance(error, NotPreparedError) or (
                    isinstance(error, UnavailableError) and not is_ours(backend.name)
                ):
                    row.status, row.reason = "absent", str(error)
                continue
            if ran:
                row.extra["ran"] = ", ".join(f"{name}: {how}" for name, how in sorted(ran.items()))
            if (reason := why_fallback(ran, self.device)) is not None:
                row.status, row.reason, row.parity = "absent", reason, None
                continue
            if row.parity is None or row.parity.passed:
                calls[backend.key] = call
                continue
            error = math.inf if row.parity.error is None else row.parity.error
            row.reason = f"error {error:.1e} exceeds {row.parity.band:.1e}; no speed is reported"
            row.status = "parity failed"
            if backend.optional:
                row.status, row.parity = "not offered", None
        del comparator
        ours = [backend for backend in case.backends if is_ours(backend.name)]
        if ours and not any(backend.key in calls for backend in ours):
            # Nothing to compare with.
            unmeasured = [row for row in rows.values() if row.status != "measured"]
            self.add(unmeasured)
            return unmeasured
        for key in calls:
            rows[key].extra |= counted[key]
        if case.search is not None:
            try:
                case.search(self, calls, rows)
            finally:
                self.add(list(rows.values()))
            return list(rows.values())
        block = case.block or (lambda call: Watched(call, self.device))
        blocks = {key: block(call) for key, call in calls.items()}
        samples = interleave(
            blocks, self.probes, rounds=case.rounds, budget_s=case.budget_s, most_rounds=case.most_rounds,
            warmups=case.warmups, deadline=case.deadline, on_step=self.progress.step, grad=case.grad,
        )  # fmt: skip
        for backend in case.backends:
            if backend.key in blocks:
                _fill(rows[backend.key], backend, samples, blocks[backend.key], self)
        there = {(row.backend, row.dtype) for row in rows.values() if row.measured}
        for row in rows.values():
            row.against = [other for other in row.against if (other.backend, other.dtype) in there]
        self.add(list(rows.values()))
        if samples.interrupted:
            raise KeyboardInterrupt
        return list(rows.values())


def why_fallback(ran: Mapping[str, str], device: torch.device) -> str | None:
    """Return the reason why PyTorch would be measured in the place of an operation's kernel, or None."""
    fell = [name for name, how in ran.items() if how == "reference"]
    if not fell:
        own = ran and set(ran.values()) == {"torch"}
        return f"{', '.join(ran)} is PyTorch's own kernel on this device" if own else None
    why = "it does not take these arguments"
    try:
        resolve(
            "cpu" if device.type == "cpu" else "triton",
            torch.empty(0, device=device),
            has_flash=True,
        )
    except InputError as error:
        why = str(error)
    return f"{', '.join(fell)} would be PyTorch's under this name: {why}"


Benchmark = Callable[..., Document]
"""Measures on this machine: `(options, progress=None, command=(), keep=..., **given)`; see `benchmark`."""

BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(
    name: str, *, title: str, reference: str
) -> Callable[[Callable[..., Any]], Benchmark]:
    """Register a benchmark: a generator of cases from a `Run`, each measured before the next is made.

    It becomes a function of options, a progress display, the command line and `keep`, which is called with the document
    when it has new results; Ctrl-C ends it and keeps what was measured, marked as interrupted. Speed-ups refer to the
    backend `reference`.
    """

    def register(cases: Callable[..., Any]) -> Benchmark:
        def measure(
            options: Any, progress: Progress | None = None, command: Sequence[str] = (),
            keep: Callable[[Document], None] = lambda document: None, **given: Any,
        ) -> Document:  # fmt: skip
            begun = time.perf_counter()
            asked: Any = SimpleNamespace(**{"device": "cpu", "dtype": ()} | vars(options))
            device = machine.choose_device(asked.device)
            dtypes = (
                asked.dtype
                if isinstance(asked.dtype, tuple)
                else [n for n in DTYPES if n == asked.dtype]
            )
            torch.set_num_threads(machine.default_threads())
            torch.manual_seed(0)
            named = vars(options) | {
                key: value for key, value in given.items() if isinstance(value, str)
            }
            plain = {
                key: str(value)
                if isinstance(value, Path)
                else list(value)
                if isinstance(value, tuple)
                else value
                for key, value in named.items()
            }
            document = Document(
                schema_version=SCHEMA_VERSION, benchmark=name, title=title, reference=reference,
                date=datetime.now(UTC).isoformat(timespec="seconds"), command=list(command), options=plain,
                device=device.type, machine=machine.describe(),
            )  # fmt: skip
            with TemporaryDirectory(prefix="xfm-bench-", ignore_cleanup_errors=True) as scratch:
                run = Run(document, options, progress or Progress(), dtypes, Path(scratch), keep)
                try:
                    with closing(cases(run, **given)) as listed:
                        for case in listed:
                            run.measure(case)
                except KeyboardInterrupt:
                    document.interrupted = True
            document.duration_s = time.perf_counter() - begun
            return document

        BENCHMARKS[name] = measure
        return measure

    return register


def _fill(row: Result, backend: Backend, samples: Samples, block: Block, run: Run) -> None:
    """Fill in the times, comparisons, memory and efficiency of the rounds."""
    key, seconds = backend.key, samples.seconds(backend.key)
    if key in samples.failures:
        row.status, row.reason = "failed", samples.failures[key]
        return
    if samples.interrupted:
        when = f"after {len(seconds)} samples" if seconds else "before its first sample"
        row.status, row.reason = "partial", f"interrupted {when}"
    if not seconds:
        return
    row.seconds = seconds
    if row.ours:
        row.against = [
            compared(other, row.dtype, samples.seconds(other), seconds)
            for other in samples.rounds
            if other != key and samples.seconds(other)
        ]
    readings = samples.readings
    row.contended = readings.contended(row.dtype)
    if note := readings.note(row.dtype):
        row.extra["note"] = note
    interval = bootstrap(partial(np.median, axis=-1), seconds) if row.mode == "offline" else None
    if interval is not None:
        row.extra |= {"rate_low": row.items / interval[1], "rate_high": row.items / interval[0]}
    row.extra = getattr(block, "extra", {}) | row.extra
    row.reason = row.reason or getattr(block, "reason", None)
    median = statistics.median(seconds)
    needed, own = row.number("needed_flops"), row.number("flops")
    if needed is not None:
        # The arithmetic of a run over the rates of the machine.
        sheet, rates = machine.data_sheet(run.device), readings.gemm.get(row.dtype, [])
        medians = [statistics.median(block) for block in samples.rounds[key]]
        for name, flops in (("mfu", needed), ("utilisation", own)):
            if flops is not None and (shares := shares_of_rate(flops, medians, rates)):
                row.extra[name] = statistics.median(shares)
        if sheet is not None and row.dtype != "fp32":
            # The data sheet is of 16-bit products; those of fp8 are twice as fast.
            row.extra["mfu_data_sheet"] = (
                needed / median / sheet.flops_per_s / (2 if row.dtype == "fp8" else 1)
            )
        if sheet is not None and (traffic := row.number("bytes")) is not None:
            row.extra["share_of_floor"] = (
                roofline.Work("", "", needed, traffic).floor(sheet) / median
            )
    if not samples.interrupted:
        row.extra |= backend.detail(median)


def shares_of_rate(flops: float, seconds: Sequence[float], rates: Sequence[float]) -> list[float]:
    """FLOP/s of every sample over the mean of the probes before and after its round."""
    return [flops / s / ((a + b) / 2) for s, a, b in zip(seconds, rates, rates[1:], strict=False)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def bootstrap(
    statistic: Callable[..., Any], *series: Sequence[float], paired: bool = False
) -> tuple[float, float] | None:
    """Interval of 95% of a statistic of one or two series along their last axis; None for fewer than three samples.

    `paired` series are of the same rounds, and are resampled together.
    """
    sizes = [len(each) for each in series]
    if min(sizes) < _ENOUGH:
        return None
    draw = np.random.default_rng(0)
    chosen = [draw.integers(0, size, (_RESAMPLES, size)) for size in sizes[: 1 if paired else None]]
    places = chosen * len(series) if paired else chosen
    found = statistic(
        *(np.asarray(each)[place] for each, place in zip(series, places, strict=True))
    )
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


def ratio_interval(
    slow: Sequence[float], fast: Sequence[float], *, paired: bool = True
) -> tuple[float, float] | tuple[None, None]:
    """Interval of median(slow) / median(fast); `paired` rounds are resampled together, so that common drift cancels."""
    rounds = min(len(slow), len(fast)) if paired else None
    interval = bootstrap(
        lambda a, b: np.median(a, -1) / np.median(b, -1),
        slow[:rounds],
        fast[:rounds],
        paired=paired,
    )
    return interval or (None, None)
