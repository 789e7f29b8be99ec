"""The harness: backends of a case agree with its reference, then run in interleaved rounds of one process.

The machine's speed drifts, so every round runs every backend, in rotating order, with GEMM and copy probes before,
between and after the rounds. Medians have bootstrap intervals, ratios come from samples of the same rounds. A backend
is timed only if its result agrees with the reference as far as rounding explains the difference.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xfm_fast.errors import InputError, UnavailableError, XFMError
from xfm_fast.kernels import roofline
from xfm_fast.kernels.backend import resolve
from xfm_fast.kernels.ladder import watching
from xfm_fast.kernels.prepared import NotPreparedError

from . import machine
from .machine import MachineProbes
from .record import (
    SCHEMA_VERSION,
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
from .rounds import Block, Samples, Watched, compared, interleave
from .timing import DTYPES, FP32_BAND, bootstrap, one_line, parity_band, relative_error

# 16-bit results of the model differ from fp32 by the rounding of three encoders and of their embeddings, in spacings of
# the dtype. The official algorithm's own error at a few requests is one draw, and may be a third of that by luck.
MODEL_ROUNDING = 3.5
# GEMM rates relative to the 16-bit rate of a GPU's data sheet.
_GEMM_RATE = {"fp8": 2.0, "tf32": 0.5}

Call = Callable[..., Any]


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


def tensors_differ(ours: Tensor, reference: Tensor) -> Difference:
    """Return `relative_error` as a `Difference`."""
    return Difference(relative_error(ours, reference))


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
        parity: an earlier comparison, of other work.
        extra: `Result.extra` known before it runs.
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
        fp32_band: error allowed in fp32; `rounding`: minimum error of 16-bit results, in spacings of the dtype.
        count: `extra` that follows from a result, such as `needed_flops` and `bytes`.
        block: makes of a call what is timed; by default one run, whose memory is watched.
        search: measures the agreeing backends instead of the rounds, and fills in their results.
        grad: leave automatic differentiation on.
        watched: a result that fell back to PyTorch is absent; for backends that no compiler traces.
        rounds, budget_s, max_rounds, warmups, deadline: see `interleave`.
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
    max_rounds: int = 15
    warmups: int = 1
    deadline: float = math.inf
    conditions: str = ""

    def repeated(self, rows: Iterable[Result], note: str = "", **changes: Any) -> Case:
        """Return the same backends at other work, keeping the status and comparison of their results here."""
        results = {f"{row.backend} {row.dtype}": row for row in rows if row.place == self.place}
        backends = []
        for backend in self.backends:
            row = results.get(backend.key)
            if row is not None:
                ran = row.status in ("measured", "partial")
                parity = row.parity and replace(row.parity, note=row.parity.note + note)
                lacking = None if ran else (row.status, row.reason)
                backend = replace(backend, lacking=lacking, parity=parity)
            backends.append(backend)
        return replace(self, backends=backends, reference=None, **changes)

    @property
    def place(self) -> tuple[str, ...]:
        """As `Result.place`."""
        return self.work, self.mode, self.name

    def result(self, backend: Backend) -> Result:
        """Return a result without numbers."""
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


class Comparator:
    """Compares results of a case with its reference, which is computed once per dtype."""

    def __init__(self, case: Case) -> None:
        self._case = case
        # Results may be large: only the one in fp32 is kept, and errors of the reference itself by dtype.
        self._exact: list[Any] = []
        self._reference_errors: dict[str, float] = {}

    def _reference(self, dtype: str) -> Any:
        assert self._case.reference is not None
        if dtype == "fp32" and self._exact:
            return self._exact[0]
        with torch.set_grad_enabled(self._case.grad):
            result = self._case.reference(dtype)
        if dtype == "fp32":
            self._exact = [result]
        return result

    def _reference_error(self, dtype: str) -> float:
        """Return the error of the reference itself against fp32, or in fp32 against fp64 if that can be computed."""
        if dtype not in self._reference_errors:
            error = 0.0
            if dtype != "fp32" or self._case.wide:
                result = self._reference(dtype)
                truth = self._reference("fp64" if dtype == "fp32" else "fp32")
                error = self._case.compare(result, truth).error
            self._reference_errors[dtype] = error
        return self._reference_errors[dtype]

    def parity(self, backend: Backend, result: Any) -> Parity:
        """Return the difference from the reference, and how much of it rounding explains."""
        case, dtype = self._case, backend.dtype
        is_judge = backend.name == case.judge
        if is_judge and dtype == "fp32" and not self._exact:
            self._exact = [result]
        error, note = case.compare(result, self._reference("fp32"))
        if is_judge and dtype != "fp32":
            self._reference_errors.setdefault(dtype, error)
        band = self._band(dtype, error) if backend.band is None else backend.band
        cosine = None
        if dtype == "int8" and isinstance(result, Tensor):
            pair = (value.double().flatten() for value in (result, self._reference("fp32")))
            cosine = finite(float(torch.cosine_similarity(*pair, dim=0)))
        among_backends = any(backend.name == case.judge for backend in case.backends)
        return Parity(
            error=finite(error),
            band=band,
            passed=error <= band,
            note=note,
            against=f"{case.judge} fp32" if among_backends else case.judge,
            cosine=cosine,
        )

    def _band(self, name: str, error: float) -> float:
        """Return the error allowed in a dtype; the reference's own error counts only where the plain band is missed."""
        case, dtype = self._case, DTYPES.get(name, torch.float32)
        if dtype == torch.float32:
            if error <= case.fp32_band:
                return case.fp32_band
            return parity_band(dtype, self._reference_error(name), fp32=case.fp32_band)
        rounding = case.rounding * torch.finfo(dtype).eps
        return parity_band(dtype, max(self._reference_error(name), rounding))


@dataclass
class Run:
    """A benchmark that has begun: its options, document, machine probes and progress display.

    Attributes:
        dtypes: to measure; `absent` are those that this machine does not offer, with the reason.
        scratch: a folder for files of this run.
        keep: called with the document when it has new results.
    """

    document: Document
    options: Any
    progress: Progress
    dtypes: list[str]
    absent: dict[str, str]
    scratch: Path
    keep: Callable[[Document], None]
    probes: MachineProbes | None = None

    @property
    def device(self) -> torch.device:
        """The device to measure."""
        return torch.device(self.document.device)

    def probe(self) -> None:
        """Prepare the machine probes."""
        self.probes = MachineProbes(self.dtypes, self.device)
        rates = self.probes.describe()
        self.document.probes = {dtype: Probe(**values) for dtype, values in rates.items()}

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
        calls = self._compare(case, rows)
        ours = [backend.key for backend in case.backends if is_ours(backend.name)]
        if ours and not any(key in calls for key in ours):
            # There is nothing to compare the other backends with.
            unmeasured = [row for row in rows.values() if row.status != "measured"]
            self.add(unmeasured)
            return unmeasured
        interrupted = False
        try:
            if case.search is not None:
                case.search(self, calls, rows)
            else:
                interrupted = self._time(case, calls, rows)
        finally:
            self.add(list(rows.values()))
        if interrupted:
            raise KeyboardInterrupt
        return list(rows.values())

    def _compare(self, case: Case, rows: Mapping[str, Result]) -> dict[str, Call]:
        """Build every backend and return the calls of those that agree; the rows of the others get the reason."""
        calls: dict[str, Call] = {}
        comparator = Comparator(case)
        # The judge first: its result is the reference.
        for backend in sorted(case.backends, key=lambda backend: backend.name != case.judge):
            if backend.lacking is not None:
                continue
            self.progress.step(f"comparing {backend.key}")
            try:
                call = self._admit(case, backend, rows[backend.key], comparator)
            except Exception as error:  # of any library: its own row alone is lost
                rows[backend.key].status, rows[backend.key].reason = _failure(backend, error)
                continue
            if call is not None:
                calls[backend.key] = call
        return calls

    def _admit(
        self, case: Case, backend: Backend, row: Result, comparator: Comparator
    ) -> Call | None:
        """Build and compare one backend; return its call if it may be timed."""
        watch = watching() if case.watched else nullcontext({})
        with torch.set_grad_enabled(case.grad), watch as ran:
            call, result = backend.build(), None
            if case.reference is not None and not backend.bound:
                result = (backend.check or call)()
                row.parity = comparator.parity(backend, result)
            extra = case.count(backend, result)
        if ran:
            row.extra["ran"] = ", ".join(f"{name}: {how}" for name, how in sorted(ran.items()))
        if (reason := why_fallback(ran, self.device)) is not None:
            row.status, row.reason, row.parity = "absent", reason, None
            return None
        if row.parity is None or row.parity.passed:
            row.extra |= extra
            return call
        error = math.inf if row.parity.error is None else row.parity.error
        row.reason = f"error {error:.1e} exceeds {row.parity.band:.1e}; no speed is reported"
        row.status = "parity failed"
        if backend.optional:
            row.status, row.parity = "not offered", None
        return None

    def _time(self, case: Case, calls: Mapping[str, Call], rows: Mapping[str, Result]) -> bool:
        """Fill in the results of interleaved rounds; return whether Ctrl-C ended them."""
        block = case.block or (lambda call: Watched(call, self.device))
        blocks = {key: block(call) for key, call in calls.items()}
        samples = interleave(
            blocks,
            self.probes,
            rounds=case.rounds,
            budget_s=case.budget_s,
            max_rounds=case.max_rounds,
            warmups=case.warmups,
            deadline=case.deadline,
            on_step=self.progress.step,
            grad=case.grad,
        )
        for backend in case.backends:
            if backend.key in blocks:
                _fill(rows[backend.key], backend, samples, blocks[backend.key], self.device)
        measured = {(row.backend, row.dtype) for row in rows.values() if row.measured}
        for row in rows.values():
            row.against = [
                other for other in row.against if (other.backend, other.dtype) in measured
            ]
        return samples.interrupted


def _failure(backend: Backend, error: Exception) -> tuple[Status, str]:
    """Return the status and reason of a backend that raised an error."""
    if backend.dtype == "int8" and isinstance(error, XFMError):
        return "not offered", one_line(error)
    foreign = isinstance(error, UnavailableError) and not is_ours(backend.name)
    if foreign or isinstance(error, NotPreparedError):
        return "absent", str(error)
    return "failed", one_line(error)


def why_fallback(ran: Mapping[str, str], device: torch.device) -> str | None:
    """Return why PyTorch would be measured under the name of an operation's kernel, or None."""
    fallbacks = [name for name, how in ran.items() if how == "reference"]
    if not fallbacks:
        if ran and set(ran.values()) == {"torch"}:
            return f"{', '.join(ran)} is PyTorch's own kernel on this device"
        return None
    backend, tensor = "cpu" if device.type == "cpu" else "triton", torch.empty(0, device=device)
    try:
        resolve(backend, tensor, has_flash=True)
        why = "it does not take these arguments"
    except InputError as error:
        why = str(error)
    return f"{', '.join(fallbacks)} would be PyTorch's under this name: {why}"


@dataclass(frozen=True)
class Benchmark:
    """Cases to measure on this machine: a generator of `Case` from a `Run`, each measured before the next is made.

    Attributes:
        name: stored in the document.
        reference: the backend that speed-ups refer to.
        about: its line in `xfm-fast bench list`.
        inputs: arguments of `cases`.
    """

    name: str
    title: str
    reference: str
    cases: Callable[..., Iterator[Case]]
    about: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        options: Any,
        progress: Progress | None = None,
        command: Sequence[str] = (),
        keep: Callable[[Document], None] = lambda document: None,
        **inputs: Any,
    ) -> Document:
        """Measure every case.

        `keep` is called with the document when it has new results. Ctrl-C ends the run; what was measured is kept,
        marked as interrupted.
        """
        start, inputs = time.perf_counter(), {**self.inputs, **inputs}
        device = machine.choose_device(getattr(options, "device", "cpu"))
        dtype = getattr(options, "dtype", ())
        if not isinstance(dtype, tuple):
            dtype = (dtype,) if dtype in DTYPES else ()
        torch.set_num_threads(machine.default_threads())
        torch.manual_seed(0)
        words = {name: value for name, value in inputs.items() if isinstance(value, str)}
        document = Document(
            schema_version=SCHEMA_VERSION,
            benchmark=self.name,
            title=self.title,
            reference=self.reference,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=list(command),
            options={name: _as_json(value) for name, value in (vars(options) | words).items()},
            device=device.type,
            machine=machine.describe(),
        )
        dtypes, absent = machine.choose_dtypes(dtype, device)
        with TemporaryDirectory(prefix="xfm-bench-", ignore_cleanup_errors=True) as scratch:
            progress = progress or Progress()
            run = Run(document, options, progress, dtypes, absent, Path(scratch), keep)
            generator: Any = self.cases(run, **inputs)
            try:
                with closing(generator) as cases:
                    for case in cases:
                        run.measure(case)
            except KeyboardInterrupt:
                document.interrupted = True
        document.duration_s = time.perf_counter() - start
        return document


BENCHMARKS: dict[str, Benchmark] = {}
"""What `xfm-fast bench NAME` runs and `xfm-fast bench list` shows."""


def benchmark(
    name: str, *, title: str, reference: str, about: str = ""
) -> Callable[[Callable[..., Iterator[Case]]], Benchmark]:
    """Register a generator of cases in `BENCHMARKS`."""

    def register(cases: Callable[..., Iterator[Case]]) -> Benchmark:
        BENCHMARKS[name] = Benchmark(name, title, reference, cases, about)
        return BENCHMARKS[name]

    return register


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _fill(
    row: Result, backend: Backend, samples: Samples, block: Block, device: torch.device
) -> None:
    """Enter times, comparisons, memory and efficiency of the rounds into a row."""
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
            compared(baseline, row.dtype, samples.seconds(baseline), seconds)
            for baseline in samples.rounds
            if baseline != key and samples.seconds(baseline)
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
    medians = [statistics.median(times) for times in samples.rounds[key]]
    row.extra |= _efficiency(row, device, medians, readings.gemm.get(row.dtype, []))
    if not samples.interrupted:
        row.extra |= backend.detail(statistics.median(seconds))


def _efficiency(
    row: Result, device: torch.device, seconds: Sequence[float], rates: Sequence[float]
) -> Extra:
    """Return the arithmetic of a run over the rates of the machine, probed and of the data sheet."""
    needed, traffic = row.number("needed_flops"), row.number("bytes")
    extra: Extra = {}
    if needed is None or row.median_s is None:
        return extra
    for name, flops in (("mfu", needed), ("utilisation", row.number("flops"))):
        if flops is not None and (shares := shares_of_rate(flops, seconds, rates)):
            extra[name] = statistics.median(shares)
    sheet = machine.data_sheet(device)
    if sheet is not None and row.dtype != "fp32":
        peak = sheet.flops_per_s * _GEMM_RATE.get(row.dtype, 1.0)
        extra["mfu_data_sheet"] = needed / row.median_s / peak
    if sheet is not None and traffic is not None:
        extra["share_of_floor"] = roofline.Work("", "", needed, traffic).floor(sheet) / row.median_s
    return extra


def shares_of_rate(flops: float, seconds: Sequence[float], rates: Sequence[float]) -> list[float]:
    """Return the FLOP/s of every sample over the mean of the probes before and after its round."""
    around = zip(seconds, rates, rates[1:], strict=False)
    return [flops / time_s / ((before + after) / 2) for time_s, before, after in around]
