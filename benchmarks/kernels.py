"""`xfm-fast bench kernels`: every operation against its alternatives. Correctness first, then time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from xfm_fast.benchmarks.kernel_cases import Case, Run, cases
from xfm_fast.benchmarks.suite import Document, Progress
from xfm_fast.errors import InputError
from xfm_fast.kernels import roofline

_ROUNDS = 7
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class KernelOptions:
    """What to measure.

    Attributes:
        dtype: fp32, fp16 or bf16; None for bf16 on a GPU and fp32 on a CPU.
        small: shapes of milliseconds, to see that everything runs.
    """

    dtype: str | None = None
    small: bool = False


@dataclass(frozen=True)
class KernelRow:
    """One contender in one direction.

    Attributes:
        seconds: median of interleaved rounds; None when it could not run or is wrong.
        samples: every round.
        error: largest error against fp64, relative to the largest value; None for a bound, which computes less.
        share_of_floor: the floor of the GPU's data sheet over the measured time; None on a CPU.
    """

    case: str
    direction: str
    contender: str
    seconds: float | None
    samples: tuple[float, ...]
    flops_per_s: float | None
    bytes_per_s: float | None
    share_of_floor: float | None
    error: float | None
    note: str = ""

    def as_dict(self) -> dict[str, object]:
        """For a JSON document."""
        return asdict(self)


def run(options: KernelOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure every case on the GPU, or on the CPU without one. Ctrl-C keeps the cases that are complete.

    Raises:
        InputError: an unknown type.
    """
    progress = progress or Progress()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if name not in _DTYPES:
        raise InputError(f"--dtype {name!r} is unknown; choose one of {', '.join(_DTYPES)}")
    document = Document.begun(options, command, benchmark="kernels", device=device.type)
    made, gpu = cases(device, _DTYPES[name], small=options.small), data_sheet(device)
    progress.begin(len(made))
    try:
        for case in made:
            progress.stage(case.name)
            document.rows.extend(row.as_dict() | {"dtype": name} for row in measure(case, device, gpu))
    except KeyboardInterrupt:
        document.content["interrupted"] = True
    return document


def measure(case: Case, device: torch.device, gpu: roofline.GPU | None) -> list[KernelRow]:
    """Both directions of one case, all contenders interleaved."""
    contenders: dict[str, Run] = {"xfm-fast": case.ours, **case.others, **case.bounds}
    truth = case.truth(*(t.double() for t in case.inputs))
    plain = _error(case.truth(*case.inputs), truth)
    allowed = 2 * plain + 4 * torch.finfo(case.inputs[0].dtype).eps
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    errors: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    for name, run in contenders.items():
        try:
            out = run(*case.inputs)
            errors[name] = None if name in case.bounds else _error(out, truth)
            if not (errors[name] or 0) <= allowed:
                notes[name] = f"wrong: error {errors[name]:.1e} exceeds {allowed:.1e}"
                continue
            forward[name] = lambda run=run: run(*case.inputs)
            differentiated = _backward(run, case.inputs)
            if differentiated is not None:
                backward[name] = differentiated
        except (RuntimeError, ValueError, TypeError, ImportError) as failure:
            notes[name] = str(failure).strip().splitlines()[0]
    rows: list[KernelRow] = []
    # The loss of a vocabulary is counted with its gradients: one row for both.
    directions = [("forward", forward, case.work), ("backward", backward, case.backward_work)]
    if case.backward_work is None:
        directions = [("forward and backward", {n: _both(contenders[n], case.inputs) for n in backward}, case.work)]
    for direction, runs, work in directions:
        assert work is not None
        with torch.no_grad() if direction == "forward" else torch.enable_grad():
            samples = _interleaved(runs, device)
        for name in contenders:
            found = (samples.get(name), work, gpu, errors.get(name), notes.get(name, ""))
            rows.append(_row(case, direction, name, *found))
    return rows


def _row(
    case: Case,
    direction: str,
    name: str,
    samples: list[float] | None,
    work: roofline.Work,
    gpu: roofline.GPU | None,
    error: float | None,
    note: str,
) -> KernelRow:
    if samples is None:
        return KernelRow(case.name, direction, name, None, (), None, None, None, error, note or "not measured")
    seconds = statistics.median(samples)
    share = None if gpu is None else work.floor(gpu) / seconds
    rates = (work.flops / seconds, work.bytes / seconds)
    return KernelRow(case.name, direction, name, seconds, tuple(samples), *rates, share, error, note)


def _error(value: Tensor, truth: Tensor) -> float:
    if value.shape != truth.shape:
        return float("nan")
    return float((value.double() - truth).abs().max() / truth.abs().max())


def _leaves(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in inputs)


def _backward(run: Run, inputs: tuple[Tensor, ...]) -> Callable[[], object] | None:
    """None for what has no gradient, such as a copy."""
    leaves = _leaves(inputs)
    with torch.enable_grad():
        out = run(*leaves)
    if not out.requires_grad:
        return None
    upstream = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True, allow_unused=True)


def _both(run: Run, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    leaves = _leaves(inputs)

    def step() -> object:
        out = run(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return step


def _interleaved(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for number in range(_ROUNDS):
        order = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for name in order:
            samples[name].append(_once(runs[name], device))
    return samples


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    # do_bench flushes the second-level cache between its own repetitions and reports milliseconds.
    from triton.testing import do_bench

    milliseconds: Any = do_bench(run, warmup=5, rep=20)
    return float(milliseconds) / 1e3


def data_sheet(device: torch.device) -> roofline.GPU | None:
    """The peak rates of a GPU that is known; None otherwise."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu for gpu in (roofline.H100, roofline.A100) if gpu.name in name), None)
