"""Autotuning on CPU: select the fastest of several equivalent implementations, verified and timed once per process.

The candidates are timed in interleaved rounds on a GEMM of the model's width, with the weight in memory as in a model:
a parameter argument is another copy at each call. A candidate that fails, is missing from this PyTorch, or is less
accurate than the first is dropped. The clock is the processor time of one thread, which interruptions do not move.

Candidates round differently. A file from `xfm-fast tune --cpu`, named by XFM_CPU_CHOICES, fixes them for every process
on the same processor; under `torch.use_deterministic_algorithms(True)` without it, the first candidate runs.
"""

from __future__ import annotations

import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from xfm_fast.errors import InputError

from .. import host

CHOICES = "XFM_CPU_CHOICES"
"""The environment variable that names a file of choices."""

# A candidate that needs a second copy of every weight (a packed layout) has to be faster by this factor than candidates
# without a copy, and these by more than the noise of the comparison, at least 1%, than our kernels or the first.
_FAVOURED, _COPIES, _FAVOUR = "llvm", "packed", 1.1
_LEAST_NOISE = 0.01
# Weights are read in turn from copies of so many bytes together, more than most caches hold.
_COLD_BYTES = 32 << 20
# Copies of weights that the candidates quantise, which takes longer than the comparison.
_QUANTISED = 4
RULE = (
    f"{_FAVOURED}, where available, is selected unless another measured faster by more than the noise of the "
    "comparison. Otherwise the first, mostly aten, is selected unless another measured faster by more than that. "
    f"Candidates with a second copy of a weight ({_COPIES}) have to be {1 - 1 / _FAVOUR:.0%} faster than all others."
)
"""How a choice follows from the measurements, for readers of choices."""
_ODD = " of odd sizes"
_ROUNDS = 7
_SCHEMA = 1
# Error that another order of summation may add to a GEMM, relative to its largest value.
_SUMMATION = 4e-6
# Units in the last place of the largest value that a candidate may err, whatever the error of the reference.
_CEILING = 8


@dataclass(frozen=True)
class Selection:
    """The result of a comparison: the choice, and seconds of one thread per valid candidate, the reference first.

    `noise` is the share of the seconds that chance explains.
    """

    operation: str
    dtype: torch.dtype
    chosen: str
    seconds: dict[str, float]
    rejected: dict[str, str]
    source: Literal["measured", "file", "settled"] = "measured"
    noise: float = 0.0

    @property
    def reason(self) -> str:
        """The reason for the choice, in a sentence."""
        if self.source == "file":
            source = f" (from the file in {CHOICES})"
        else:
            source = " (settled by the program)" if self.source == "settled" else ""
        if len(self.seconds) < 2:
            reason = f"{self.chosen} is the only one here" if self.seconds else "not compared"
            return reason + source
        rivals = [name for name in self.seconds if name != self.chosen]
        rival = min(rivals, key=self.seconds.__getitem__)
        fast, slow = sorted((self.seconds[rival], self.seconds[self.chosen]))
        gain = f"{1 - fast / slow:.1%} faster"
        if slow >= 2 * fast:
            gain = f"{slow / fast:.1f} times faster"
        if self.seconds[self.chosen] <= self.seconds[rival]:
            return f"{self.chosen} measured {gain} than {rival}{source}"
        margin = 1 - 1 / (_FAVOUR if _COPIES in rival else 1 + self.noise)
        return f"{rival} measured {gain} than {self.chosen}, below the {margin:.0%} that justify it{source}"


class Race(NamedTuple):
    """Candidates of an operation and its benchmark inputs; the first candidate is the reference.

    `alike=False`: results are not compared, because they differ by more than the order of summation. `why_not`: returns
    the reason why this machine lacks the operation.
    """

    candidates: dict[str, Callable[..., Tensor]]
    example: Callable[[torch.dtype], tuple[Any, ...]]
    flops: int
    alike: bool = True
    why_not: Callable[[], str | None] = lambda: None


RACES: dict[str, Race] = {}
"""Every operation by name, registered by the module that runs it."""


def register(operation: str, race: Race, *, any_size: bool = False) -> None:
    """Add an operation; unless our kernel takes `any_size`, also the race of libraries for sizes that it lacks."""
    RACES[operation] = race
    libraries = {name: run for name, run in race.candidates.items() if name != _FAVOURED}
    if not any_size and len(libraries) < len(race.candidates):
        RACES[operation + _ODD] = race._replace(candidates=libraries)


def races() -> dict[str, Race]:
    """Return the operations of this machine by name, from the imported modules: `kernels.ops` imports all."""
    return {
        name: race
        for name, race in RACES.items()
        if len(race.candidates) > 1 and race.why_not() is None
    }


def operands(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return normal random numbers for an example, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


_selections: dict[tuple[str, torch.dtype], Selection] = {}
# A candidate may make choices of its own.
_lock = threading.RLock()


def select(operation: str, dtype: torch.dtype, *, fits: bool = True) -> str:
    """Return the fastest candidate for an operation; `fits=False` for sizes that our kernel lacks.

    InputError for an unusable file in XFM_CPU_CHOICES.
    """
    if not fits and operation + _ODD in RACES:
        operation += _ODD
    candidates = RACES[operation].candidates
    if len(candidates) == 1:
        return next(iter(candidates))
    if torch.are_deterministic_algorithms_enabled():
        from_file = (operation, dtype) in _file_choices()
        return compare(operation, dtype).chosen if from_file else next(iter(candidates))
    selection = _selections.get((operation, dtype))
    if selection is not None and selection.chosen in candidates:
        return selection.chosen
    return compare(operation, dtype).chosen


def compare(operation: str, dtype: torch.dtype) -> Selection:
    """Return the comparison of an operation: from the file of choices, or measured once."""
    race, key = RACES[operation], (operation, dtype)
    selection = _selections.get(key)
    # A settled choice may come from another version, or be wrong.
    if selection is not None and selection.chosen in race.candidates:
        deterministic = torch.are_deterministic_algorithms_enabled()
        if not deterministic or selection.source != "measured":
            return selection
    with _lock:
        stored = _file_choices().get(key)
        if stored is not None and stored.chosen not in race.candidates:
            raise InputError(
                f"{os.environ[CHOICES]} chooses {stored.chosen!r} for {operation} in {dtype}; known are "
                f"{', '.join(race.candidates)}; write it again: xfm-fast tune --cpu"
            )
        selection = stored or _selections.get(key)
        if selection is None or selection.chosen not in race.candidates:
            selection = _restrict(operation, race, dtype) or _compare(operation, race, dtype)
        _selections[key] = selection
    return selection


def _restrict(operation: str, race: Race, dtype: torch.dtype) -> Selection | None:
    """Return the comparison for sizes that our kernel has, restricted to these candidates; None without one."""
    full = _selections.get((operation.removesuffix(_ODD), dtype))
    if full is None or not operation.endswith(_ODD):
        return None
    seconds = {name: time for name, time in full.seconds.items() if name in race.candidates}
    if not seconds:
        return None
    chosen = full.chosen if full.chosen in race.candidates else _fastest(seconds, full.noise)
    return replace(full, operation=operation, chosen=chosen, seconds=seconds)


def processor() -> str:
    """Return the system's name of the processor, on Linux with family and model, since names are ambiguous."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in reversed(lines))
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    names = [facts.get("model name", platform.machine())]
    for key in ("cpu family", "model"):
        if key in facts:
            names.append(f"{key.removeprefix('cpu ')} {facts[key]}")
    return ", ".join(names)


def choices() -> dict[str, Any]:
    """Return all comparisons of this process as a document, for a file that XFM_CPU_CHOICES may name."""
    rows = []
    for selection in selections():
        times = selection.seconds.items()
        rows.append(
            {
                "operation": selection.operation,
                "dtype": str(selection.dtype).removeprefix("torch."),
                "chosen": selection.chosen,
                "seconds": {name: time for name, time in times if not math.isnan(time)},
                "rejected": selection.rejected,
                "noise": selection.noise,
            }
        )
    identity = {"schema": _SCHEMA, "processor": processor(), "torch": torch.__version__}
    return identity | {"choices": rows}


def _file_choices() -> dict[tuple[str, torch.dtype], Selection]:
    """Return the choices in the file of XFM_CPU_CHOICES; none without one."""
    path = os.environ.get(CHOICES)
    return _read(path) if path else {}


@cache
def _read(path: str) -> dict[tuple[str, torch.dtype], Selection]:
    remedy = f"write it anew with xfm-fast tune --cpu --out {path}, or unset {CHOICES}"
    try:
        document = json.loads(Path(path).read_text())
        if document["schema"] != _SCHEMA:
            raise InputError(
                f"{path} has schema {document['schema']}; this version reads {_SCHEMA}; {remedy}"
            )
        for key, here in (("processor", processor()), ("torch", torch.__version__)):
            if document[key] != here:
                raise InputError(
                    f"{path} was written for {key} {document[key]!r} and this is {here!r}; {remedy}"
                )
        selections = {}
        for row in document["choices"]:
            selection = _read_row(row)
            selections[selection.operation, selection.dtype] = selection
    except OSError as error:
        raise InputError(
            f"{CHOICES} names {path}, which cannot be read: {error.strerror}; {remedy}"
        ) from error
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path} is no file of choices ({type(error).__name__}: {error}); {remedy}"
        ) from error
    return selections


def _read_row(row: dict[str, Any]) -> Selection:
    name = str(row["chosen"])
    seconds = {candidate: float(value) for candidate, value in row["seconds"].items()}
    valid = all(0 < value < math.inf for value in seconds.values())
    if seconds and (name not in seconds or not valid):
        raise ValueError(f"{row['operation']} chooses {name!r} of the times {seconds}")
    return Selection(
        operation=row["operation"],
        dtype=getattr(torch, row["dtype"]),
        chosen=name,
        seconds=seconds,
        rejected=dict(row["rejected"]),
        source="file",
        noise=float(row.get("noise", 0.0)),
    )


def selections() -> list[Selection]:
    """Return all comparisons of this process."""
    return list(_selections.values())


def set_choice(
    operation: str, dtype: torch.dtype, candidate: str, seconds: Mapping[str, float] | None = None
) -> None:
    """Select a candidate for the process without timing: a resumed training run has to repeat its first choices.

    `seconds` are those of the comparison then, from which choices between two comparisons follow.
    """
    times = dict(seconds or {})
    with _lock:
        _selections[operation, dtype] = Selection(operation, dtype, candidate, times, {}, "settled")


def _compare(operation: str, race: Race, dtype: torch.dtype) -> Selection:
    (first, reference), *others = race.candidates.items()
    usable, rejected = {first: reference}, dict[str, str]()
    # Weights created in inference mode would be packed at every call, unlike a model's.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        arguments = race.example(dtype)
        truth, allowed = None, math.inf
        if race.alike:
            truth = reference(*map(_double, arguments))
            unit = torch.finfo(dtype).eps
            error = 2 * _error(reference(*arguments), truth) + 2 * unit
            allowed = min(error, _CEILING * unit) + _SUMMATION
        for name, candidate in others:
            try:
                value = candidate(*arguments)
            # Damaged installations of a library raise the last two.
            except (RuntimeError, AttributeError, TypeError, ImportError, OSError) as failure:
                rejected[name] = (str(failure).splitlines() or [type(failure).__name__])[0]
                continue
            error = 0.0 if truth is None else _error(value, truth)
            if error <= allowed:
                usable[name] = candidate
            else:
                rejected[name] = f"relative error {error:.1e} exceeds {allowed:.1e}"
        seconds, noise = {first: float("nan")}, 0.0
        if len(usable) > 1:
            seconds, noise = thread_seconds(usable, arguments, quantises=not race.alike)
    return Selection(operation, dtype, _fastest(seconds, noise), seconds, rejected, noise=noise)


def _double(argument: Any) -> Any:
    floating = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if floating else argument


def _fastest(seconds: dict[str, float], noise: float = 0.0) -> str:
    """Return the choice by seconds; the first candidate is the reference."""
    worth = {name: time * (_FAVOUR if _COPIES in name else 1.0) for name, time in seconds.items()}
    reference, fastest = next(iter(seconds)), min(worth, key=worth.__getitem__)
    if seconds.get(_FAVOURED, math.inf) <= (1 + noise) * worth[fastest]:
        return _FAVOURED
    return fastest if (1 + noise) * worth[fastest] < seconds[reference] else reference


def thread_seconds(
    candidates: dict[str, Callable[..., Tensor]],
    arguments: tuple[Any, ...],
    *,
    quantises: bool = False,
) -> tuple[dict[str, float], float]:
    """Return the best processor time of each candidate on one thread, and the spread of the two best rounds."""
    rounds: dict[str, list[float]] = {name: [] for name in candidates}
    weights = sum(a.numel() * a.element_size() for a in arguments if isinstance(a, Parameter))
    most = _QUANTISED if quantises else _ROUNDS * len(candidates)
    count = min(most, _COLD_BYTES // weights) if weights else 0
    copies = [tuple(map(_copy_parameter, arguments)) for _ in range(count)] or [arguments]
    calls = cycle(copies)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, candidate in candidates.items():
            # A model packs each weight once.
            for operands in copies if quantises or _COPIES in name else ():
                candidate(*operands)
        for _ in range(_ROUNDS):
            for name, candidate in candidates.items():
                operands = next(calls)
                start = time.thread_time()
                candidate(*operands)
                rounds[name].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    best, spreads = {}, []
    for name, times in rounds.items():
        first, second = sorted(times)[:2]
        best[name] = first
        spreads.append((second - first) / first if first else 0.0)
    return best, min(max(median(spreads), _LEAST_NOISE), _FAVOUR - 1)


def _copy_parameter(argument: Any) -> Any:
    if not isinstance(argument, Parameter):
        return argument
    return Parameter(argument.detach().clone(), requires_grad=False)


def _error(value: Tensor, truth: Tensor) -> float:
    return host.number((value.double() - truth).abs().max() / truth.abs().max())
