"""Contenders in a type, built and compared with the official algorithm before anything is timed, and their rows."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from .. import machine
from ..contenders.engine import Built, Clock, NoStages, Stages, wait_for
from ..contenders.official_finetuning import official_engine
from ..contenders.registry import Contender, Setup
from ..material.inputs import Subjects
from ..measure import DTYPES, MODEL_ROUNDING, Samples, one_line, parity_band
from ..record import OFFICIAL, OURS, Cost, Efficiency, Mode, Parity, Row, Share, Status, Tokens, finite
from .requests import Answer, Workload

_STAGED_RUNS = 3
# A run of more than this is staged once.
_LONG_S = 1.0
# The first kind with a fragment that a name holds takes it.
_KINDS = (
    ("attention", ("attention", "attn", "softmax", "exp2", "bmm", "baddbmm")),
    ("matrix products", ("linear", "addmm", "mm", "mlp", "conv", "gemm", "cutlass", "nvjet")),
    ("norms", ("norm",)),
    ("GELU", ("gelu",)),
    ("copies and lookups", ("copy", "cat", "index", "embedding", "gather", "contiguous", "pad", "fill", "clone")),
)


@dataclass
class Entrant:
    """A contender in a type; `reason` says why it does not run, and then there is no engine.

    Attributes:
        status: `measured` as long as nothing is wrong with it.
        parity: of the workload that was checked last.
    """

    contender: Contender
    dtype: str
    device: torch.device
    built: Built | None = None
    cost: Cost | None = None
    parity: Parity | None = None
    status: Status = "measured"
    reason: str | None = None
    _prepared: tuple[Workload, Callable[..., Any]] | None = field(default=None, repr=False)

    def build(self, setup: Setup, absent_dtypes: Mapping[str, str]) -> None:
        """Build the engine, or say why there is none: the processor or the contender lacks the type, or it fails."""
        if self.dtype in absent_dtypes:
            self.status, self.reason = "not offered", absent_dtypes[self.dtype]
        elif self.dtype not in self.contender.dtypes:
            self.status, self.reason = "not offered", f"{self.contender.label} does not run in {self.dtype} here"
        else:
            with self.trying():
                self.built = self.contender.build(setup)

    @property
    def key(self) -> str:
        return f"{self.contender.name} {self.dtype}"

    @property
    def ours(self) -> bool:
        return self.contender.name == OURS

    @property
    def runs(self) -> bool:
        return self.status == "measured"

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Whatever a library raises inside becomes a row that says so, and the contender takes no further part."""
        try:
            yield
        except Exception as error:
            self.status, self.reason = "failed", one_line(error)

    def answer(self, workload: Workload) -> Callable[..., Any]:
        """How it answers requests: a function of their numbers, and of a clock for the stages, that waits for results.

        Raises:
            Exception: whatever the library raises.
        """
        if self._prepared is not None and self._prepared[0] is workload:
            return self._prepared[1]
        assert self.built is not None
        with torch.inference_mode():
            prepared: Answer = workload.prepare(self.built.engine, DTYPES[self.dtype])

        def answer(numbers: Sequence[int], clock: Clock | None = None) -> Any:
            with torch.inference_mode():
                result = prepared([number % workload.requests for number in numbers], clock or NoStages())
                wait_for(self.device)
            return result

        self._prepared = workload, answer
        return answer


def check(
    entrants: Sequence[Entrant], workload: Workload, subjects: Subjects, on_step: Callable[[str], None],
    count: int | None = None,
) -> None:  # fmt: skip
    """Compare answers to a request or two, or `count`, with the official algorithm in fp32; set `parity` and `cost`."""
    numbers = workload.batch(count or (2 if workload.work.startswith("embed") else 1))
    reference = _Reference(subjects, workload, numbers)
    for entrant in entrants:
        if not entrant.runs or entrant.built is None:
            continue
        on_step(f"comparing {entrant.key}")
        with entrant.trying():
            answer = entrant.answer(workload)
            begun = time.perf_counter()
            answer(numbers[:1])
            first_call_s = time.perf_counter() - begun
            error, note = workload.compare(numbers, answer(numbers), reference.expected)
            if entrant.cost is None:
                built = entrant.built
                entrant.cost = Cost(
                    build_s=built.build_s, load_s=built.load_s, first_call_s=first_call_s,
                    artifact_bytes=built.artifact_bytes,
                )  # fmt: skip
            band = entrant.contender.band or reference.band(entrant.dtype, error)
            entrant.parity = Parity(
                error=finite(error), band=band, passed=error <= band, against=f"{OFFICIAL} fp32", note=note
            )
            if not entrant.parity.passed:
                entrant.status = "parity failed"
                entrant.reason = f"error {error:.1e} exceeds {band:.1e}; no speed is reported"


class _Reference:
    """The official algorithm's answer in fp32, and how far its own answers in other types are from it."""

    def __init__(self, subjects: Subjects, workload: Workload, numbers: Sequence[int]) -> None:
        self._subjects, self._workload, self._numbers = subjects, workload, numbers
        self.expected = self._answer(torch.float32)
        self._own: dict[str, float] = {}

    def _answer(self, dtype: torch.dtype) -> Any:
        with torch.inference_mode():
            size = self._workload.config.image_size
            engine: Any = official_engine(self._subjects.model(size, dtype, self._workload.work))
            return self._workload.prepare(engine, dtype)(self._numbers, NoStages())

    def band(self, dtype: str, error: float) -> float:
        """The error that rounding explains; that of the algorithm itself is looked at only where it decides."""
        kind, fp32 = DTYPES[dtype], dtype == "fp32"
        if fp32 and error <= parity_band(kind):
            return parity_band(kind)
        if dtype not in self._own:
            other = self._answer(torch.float64 if fp32 else kind)
            pair = (self.expected, other) if fp32 else (other, self.expected)
            self._own[dtype] = self._workload.compare(self._numbers, *pair).error
        least = 0.0 if fp32 else MODEL_ROUNDING * torch.finfo(kind).eps
        return parity_band(kind, max(self._own[dtype], least))


def blank(entrant: Entrant, workload: Workload, mode: Mode, batch: int) -> Row:
    """A row without numbers: what was to be measured, or why it was not."""
    return Row(
        work=workload.work, mode=mode, contender=entrant.contender.name, label=entrant.contender.label,
        dtype=entrant.dtype, name=workload.name(batch), point=workload.point.model_copy(update={"batch": batch}),
        status=entrant.status, reason=entrant.reason, unit=workload.unit, items=workload.items * batch,
        parity=entrant.parity, cost=entrant.cost,
    )  # fmt: skip


def efficiency(
    entrant: Entrant, workload: Workload, numbers: Sequence[int], answer: Any, seconds: float, samples: Samples
) -> Efficiency | None:
    """Arithmetic of a run of some requests that took `seconds`; None where what it needs depends on its course."""
    gemm, copies = samples.readings.rate(entrant.dtype), statistics.median(samples.readings.copies)
    needed = workload.flops(numbers, "ours", answer)
    if needed is None:
        return None
    assert gemm is not None
    own = workload.flops(numbers, entrant.contender.schedule, answer)
    moved = workload.traffic(numbers, DTYPES[entrant.dtype].itemsize)
    intensity = needed / moved
    roof = min(gemm, intensity * copies)
    gpu = machine.data_sheet(entrant.device)
    return Efficiency(
        flops=own,
        needed_flops=needed,
        mfu=samples.share_of_rate(entrant.key, needed),
        mfu_data_sheet=needed / seconds / gpu.flops_per_s if gpu is not None and entrant.dtype == "bf16" else None,
        utilisation=None if own is None else samples.share_of_rate(entrant.key, own),
        bytes=moved,
        intensity=intensity,
        roof=roof,
        roof_bound="compute" if gemm <= intensity * copies else "memory",
        share_of_roof=needed / seconds / roof,
    )


def tokens(entrant: Entrant, workload: Workload, numbers: Sequence[int], seconds: float) -> Tokens | None:
    """Tokens of a run; None where there are no texts, or the contender's own padding is not known."""
    counts = workload.tokens(numbers, entrant.contender.schedule)
    if counts is None:
        return None
    useful, computed = counts
    return Tokens(useful=useful, padded=computed, useful_per_s=useful / seconds, padded_per_s=computed / seconds)


def stages(answer: Callable[..., Any], numbers: Sequence[int], device: torch.device, seconds: float) -> list[Share]:
    """Median times of the parts of a run, from runs of their own; empty where the contender names no parts."""
    found: dict[str, list[float]] = {}
    for _ in range(1 if seconds > _LONG_S else _STAGED_RUNS):
        clock = Stages(device)
        answer(numbers, clock)
        for name, value in clock.seconds.items():
            found.setdefault(name, []).append(value)
    return _shares({name: statistics.median(values) for name, values in found.items()})


def kind_of(operation: str) -> str:
    """The kind of an operator or kernel, by its name."""
    name = operation.lower()
    return next((kind for kind, fragments in _KINDS if any(f in name for f in fragments)), "everything else")


def operation_shares(run: Callable[[], object], device: torch.device) -> list[Share]:
    """Profile one run in all of its threads; an operator's time is without that of those it calls.

    Empty for what PyTorch cannot see.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # A batch may be computed in shares, a thread each.
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    with _silence(), profile(activities=activities, experimental_config=everywhere) as profiler:
        run()
    seconds: dict[str, float] = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0:
            kind = kind_of(event.key)
            seconds[kind] = seconds.get(kind, 0.0) + own / 1e6
    return _shares(seconds)


@contextmanager
def _silence() -> Iterator[None]:
    """Some builds of the profiler write a line to the process's own streams whenever it starts and stops."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, stream in zip((1, 2), kept, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        os.close(nowhere)


def _shares(seconds: dict[str, float]) -> list[Share]:
    """Times with their shares of the sum, the longest first."""
    whole = sum(seconds.values())
    if whole <= 0:
        return []
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    return [Share(name=name, seconds=value, share=value / whole) for name, value in ranked]
