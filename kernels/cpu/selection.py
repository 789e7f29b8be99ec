"""Autotuning on CPU: the fastest of several equivalent implementations, verified and timed once per process.

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
from collections.abc import Callable
from dataclasses import dataclass
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
RULE = (
    f"{_FAVOURED}, where it can be, is taken unless another measured faster by more than the noise of the comparison. "
    "Otherwise the first, aten for most, is taken unless another measured faster by more than that. "
    f"What needs a second copy of a weight ({_COPIES}) has to be {1 - 1 / _FAVOUR:.0%} faster than all that need none."
)
"""How a choice follows from what was measured, for readers of choices."""
_ODD = " of odd sizes"
_ROUNDS = 7
_SCHEMA = 1
# What another order of summation may add to the error of a product, relative to its largest value.
_SUMMATION = 4e-6
# The most units in the last place of the largest value that a candidate may err, however the trusted one errs.
_CEILING = 8


@dataclass(frozen=True)
class Selection:
    """The result of a comparison: the choice, and seconds of one thread per valid candidate, the trusted first.

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
        """Why this one, in a sentence."""
        where = {
            "measured": "",
            "file": f" (from the file in {CHOICES})",
            "settled": " (settled by the program)",
        }
        if len(self.seconds) < 2:
            return (
                f"{self.chosen} is the only one here" if self.seconds else "not compared"
            ) + where[self.source]
        other = min(
            (name for name in self.seconds if name != self.chosen), key=self.seconds.__getitem__
        )
        fast, slow = sorted((self.seconds[other], self.seconds[self.chosen]))
        gain = (
            f"{slow / fast:.1f} times faster"
            if slow >= 2 * fast
            else f"{1 - fast / slow:.1%} faster"
        )
        if self.seconds[self.chosen] <= self.seconds[other]:
            return f"{self.chosen} measured {gain} than {other}{where[self.source]}"
        margin = 1 - 1 / (_FAVOUR if _COPIES in other else 1 + self.noise)
        return f"{other} measured {gain} than {self.chosen}, below the {margin:.0%} that justify it{where[self.source]}"


class Race(NamedTuple):
    """Implementations of an operation, of which the first is trusted, and the operands that they are timed on.

    `alike=False`: all are trusted, and differ by more than the order of summation. `why_not`: a reason why this machine
    lacks the operation.
    """

    candidates: dict[str, Callable[..., Tensor]]
    example: Callable[[torch.dtype], tuple[Any, ...]]
    flops: int
    alike: bool = True
    why_not: Callable[[], str | None] = lambda: None


RACES: dict[str, Race] = {}
"""Every operation by name, registered by the module that runs it."""


def register(operation: str, race: Race, *, any_size: bool = False) -> None:
    """Add an operation; unless our kernel takes `any_size`, also the race of the others on sizes that it lacks."""
    RACES[operation] = race
    others = {name: run for name, run in race.candidates.items() if name != _FAVOURED}
    if not any_size and len(others) < len(race.candidates):
        RACES[operation + _ODD] = race._replace(candidates=others)


def races() -> dict[str, Race]:
    """The operations of this machine by name, of the modules that are imported: `kernels.ops` imports all."""
    return {
        name: race
        for name, race in RACES.items()
        if len(race.candidates) > 1 and race.why_not() is None
    }


def operands(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal random numbers for an example, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


_selections: dict[tuple[str, torch.dtype], Selection] = {}
# A candidate may make choices of its own.
_lock = threading.RLock()


def select(operation: str, dtype: torch.dtype, *, whole: bool = True) -> str:
    """The fastest candidate for an operation; `whole=False` for sizes that our kernel lacks.

    InputError for an unusable file in XFM_CPU_CHOICES.
    """
    if not whole and operation + _ODD in RACES:
        operation += _ODD
    candidates = RACES[operation].candidates
    if len(candidates) == 1:
        return next(iter(candidates))
    if torch.are_deterministic_algorithms_enabled() and (operation, dtype) not in _file_choices():
        return next(iter(candidates))
    return compare(operation, dtype).chosen


def compare(operation: str, dtype: torch.dtype) -> Selection:
    """The comparison of `select`: from the file of choices, or measured once."""
    race, key = RACES[operation], (operation, dtype)
    found = _selections.get(key)
    if (
        found is None
        # What was settled may be of another version, or false.
        or found.chosen not in race.candidates
        or (torch.are_deterministic_algorithms_enabled() and found.source == "measured")
    ):
        with _lock:
            given = _file_choices().get(key)
            if given is not None and given.chosen not in race.candidates:
                raise InputError(
                    f"{os.environ[CHOICES]} chooses {given.chosen!r} for {operation} in {dtype}; known are "
                    f"{', '.join(race.candidates)}; write it again: xfm-fast tune --cpu"
                )
            found = given or _selections.get(key)
            if found is None or found.chosen not in race.candidates:
                found = _among(operation, race, dtype) or _compare(operation, race, dtype)
            _selections[key] = found
    return found


def _among(operation: str, race: Race, dtype: torch.dtype) -> Selection | None:
    """For odd sizes, the result of an earlier comparison restricted to these candidates."""
    whole = (
        _selections.get((operation.removesuffix(_ODD), dtype)) if operation.endswith(_ODD) else None
    )
    seconds = (
        {}
        if whole is None
        else {name: time for name, time in whole.seconds.items() if name in race.candidates}
    )
    if whole is None or not seconds:
        return None
    chosen = whole.chosen if whole.chosen in race.candidates else _fastest(seconds, whole.noise)
    return Selection(operation, dtype, chosen, seconds, whole.rejected, whole.source, whole.noise)


def processor() -> str:
    """The processor by the system's name for it, on Linux with family and model, since names are ambiguous."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in reversed(lines))
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    parts = [facts.get("model name", platform.machine())]
    parts += [
        f"{key.removeprefix('cpu ')} {facts[key]}"
        for key in ("cpu family", "model")
        if key in facts
    ]
    return ", ".join(parts)


def choices() -> dict[str, Any]:
    """Every comparison of this process as a document, for a file that XFM_CPU_CHOICES may name."""
    found = [
        {
            "operation": s.operation,
            "dtype": str(s.dtype).removeprefix("torch."),
            "chosen": s.chosen,
            "seconds": {name: value for name, value in s.seconds.items() if value == value},
            "rejected": s.rejected,
            "noise": s.noise,
        }
        for s in selections()
    ]
    return {
        "schema": _SCHEMA,
        "processor": processor(),
        "torch": torch.__version__,
        "choices": found,
    }


def _file_choices() -> dict[tuple[str, torch.dtype], Selection]:
    """The choices in the file of XFM_CPU_CHOICES; empty without one."""
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
        for what, here in (("processor", processor()), ("torch", torch.__version__)):
            if document[what] != here:
                raise InputError(
                    f"{path} was written for {what} {document[what]!r} and this is {here!r}; {remedy}"
                )
        found = {}
        for each in document["choices"]:
            dtype, chosen = getattr(torch, each["dtype"]), str(each["chosen"])
            seconds = {name: float(time) for name, time in each["seconds"].items()}
            if seconds and (
                chosen not in seconds or not all(0 < time < math.inf for time in seconds.values())
            ):
                raise ValueError(f"{each['operation']} chooses {chosen!r} of the times {seconds}")
            parts = (each["operation"], dtype, chosen, seconds, dict(each["rejected"]))
            noise = float(each.get("noise", 0.0))
            found[each["operation"], dtype] = Selection(*parts, source="file", noise=noise)
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
    return found


def selections() -> list[Selection]:
    """Every comparison of this process."""
    return list(_selections.values())


def set_choice(operation: str, dtype: torch.dtype, chosen: str) -> None:
    """Select a candidate for the whole process without timing: a resumed training run has to use its first choices."""
    with _lock:
        _selections[operation, dtype] = Selection(operation, dtype, chosen, {}, {}, "settled")


def _compare(operation: str, race: Race, dtype: torch.dtype) -> Selection:
    trusted_name, trusted = next(iter(race.candidates.items()))
    rejected: dict[str, str] = {}
    # Weights created in inference mode would be packed at every call, unlike a model's.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        arguments = race.example(dtype)
        truth, allowed = None, math.inf
        if race.alike:
            wide = [
                a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
                for a in arguments
            ]
            truth = trusted(*wide)
            unit = torch.finfo(dtype).eps
            allowed = (
                min(2 * _error(trusted(*arguments), truth) + 2 * unit, _CEILING * unit) + _SUMMATION
            )
        usable = {trusted_name: trusted}
        for name, candidate in list(race.candidates.items())[1:]:
            try:
                value = candidate(*arguments)
            # What a damaged installation of a library raises, too.
            except (RuntimeError, AttributeError, TypeError, ImportError, OSError) as failure:
                rejected[name] = (str(failure).splitlines() or [type(failure).__name__])[0]
                continue
            error = 0.0 if truth is None else _error(value, truth)
            if error <= allowed:
                usable[name] = candidate
            else:
                rejected[name] = f"relative error {error:.1e} exceeds {allowed:.1e}"
        seconds, noise = {trusted_name: float("nan")}, 0.0
        if len(usable) > 1:
            seconds, noise = thread_seconds(usable, arguments)
    return Selection(operation, dtype, _fastest(seconds, noise), seconds, rejected, noise=noise)


def _fastest(seconds: dict[str, float], noise: float = 0.0) -> str:
    """The selection by seconds; the first candidate is trusted."""
    worth = {name: time * (_FAVOUR if _COPIES in name else 1.0) for name, time in seconds.items()}
    trusted, first = next(iter(seconds)), min(worth, key=worth.__getitem__)
    if seconds.get(_FAVOURED, math.inf) <= (1 + noise) * worth[first]:
        return _FAVOURED
    return first if (1 + noise) * worth[first] < seconds[trusted] else trusted


def thread_seconds(
    candidates: dict[str, Callable[..., Tensor]], arguments: tuple[Any, ...]
) -> tuple[dict[str, float], float]:
    """The best processor time of each candidate on one thread, and the spread of the two best rounds."""
    rounds: dict[str, list[float]] = {name: [] for name in candidates}
    weights = sum(a.numel() * a.element_size() for a in arguments if isinstance(a, Parameter))
    count = min(_ROUNDS * len(candidates), _COLD_BYTES // weights) if weights else 0
    copies = [
        tuple(
            Parameter(a.detach().clone(), False) if isinstance(a, Parameter) else a
            for a in arguments
        )
        for _ in range(count)
    ] or [arguments]
    calls = cycle(copies)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, candidate in candidates.items():
            # A model packs each weight once.
            for each in copies if _COPIES in name else ():
                candidate(*each)
        for _ in range(_ROUNDS):
            for name, candidate in candidates.items():
                operands = next(calls)
                start = time.thread_time()
                candidate(*operands)
                rounds[name].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    best = {name: sorted(times)[:2] for name, times in rounds.items()}
    noise = median((second - first) / first if first else 0.0 for first, second in best.values())
    return {name: first for name, (first, _) in best.items()}, min(
        max(noise, _LEAST_NOISE), _FAVOUR - 1
    )


def _error(value: Tensor, truth: Tensor) -> float:
    return host.number((value.double() - truth).abs().max() / truth.abs().max())
