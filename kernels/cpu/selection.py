"""Which of several equivalent implementations this CPU runs fastest: measured once per process, verified first.

PyTorch sends fp32 products to MKL, which is the best choice on some processors and reaches less than half of what
oneDNN does on others; no flag tells them apart. So the candidates are timed, interleaved, on a product of the model's
own width. A candidate that fails, is absent from this PyTorch, or is less accurate than the first one is left out.

Candidates round differently, and where they are close the clock may choose another one in the next process. Under
`torch.use_deterministic_algorithms(True)` nothing is timed and the first candidate runs, so that results repeat to the
bit from process to process.

The clock is the processor time of one thread: on a busy machine wall time says who was interrupted, and two threads
wait for each other's interruptions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import host

# A challenger has to be faster by this factor: a choice that flips with the noise of the clock is worse than none.
_MARGIN = 0.96
_ROUNDS = 7
# What another order of summation may add to the error of a product, relative to its largest value.
_SUMMATION = 4e-6


@dataclass(frozen=True)
class Selection:
    """The outcome of one comparison: the chosen candidate, and the seconds (of one thread) of those that passed."""

    operation: str
    dtype: torch.dtype
    chosen: str
    seconds: dict[str, float]
    rejected: dict[str, str]


_selections: dict[tuple[str, torch.dtype], Selection] = {}
_lock = threading.Lock()


def select(
    operation: str,
    candidates: dict[str, Callable[..., Tensor]],
    make_arguments: Callable[[torch.dtype], tuple[Any, ...]],
    dtype: torch.dtype,
) -> str:
    """Name of the fastest of `candidates`, of which the first is trusted, on the arguments that are made for it."""
    if torch.are_deterministic_algorithms_enabled():
        return next(iter(candidates))
    key = (operation, dtype)
    found = _selections.get(key)
    # What was settled may be of another version, or false.
    if found is None or found.chosen not in candidates:
        with _lock:
            found = _selections.get(key)
            if found is None or found.chosen not in candidates:
                found = _compare(operation, candidates, make_arguments, dtype)
                _selections[key] = found
    return found.chosen


def selections() -> list[Selection]:
    """Every comparison made so far in this process."""
    return list(_selections.values())


def settle(operation: str, dtype: torch.dtype, chosen: str) -> None:
    """Take a candidate without comparing, for all of this process.

    Candidates round differently, so a training run that goes on elsewhere has to go on with those it began with.
    """
    with _lock:
        _selections[operation, dtype] = Selection(operation, dtype, chosen, {}, {})


def _compare(
    operation: str,
    candidates: dict[str, Callable[..., Tensor]],
    make_arguments: Callable[[torch.dtype], tuple[Any, ...]],
    dtype: torch.dtype,
) -> Selection:
    trusted_name, trusted = next(iter(candidates.items()))
    rejected: dict[str, str] = {}
    # Weights made in inference mode would be packed at every call, which those of a model are not.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        arguments = make_arguments(dtype)
        wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        truth = trusted(*wide)
        allowed = 2 * _error(trusted(*arguments), truth) + 2 * torch.finfo(dtype).eps + _SUMMATION
        usable = {trusted_name: trusted}
        for name, candidate in list(candidates.items())[1:]:
            try:
                error = _error(candidate(*arguments), truth)
            except (RuntimeError, AttributeError, TypeError, NotImplementedError) as failure:
                rejected[name] = str(failure).splitlines()[0]
                continue
            if error <= allowed:
                usable[name] = candidate
            else:
                rejected[name] = f"relative error {error:.1e} exceeds {allowed:.1e}"
        seconds = _thread_seconds(usable, arguments) if len(usable) > 1 else {trusted_name: float("nan")}
    fastest = min(seconds, key=seconds.__getitem__)
    chosen = fastest if seconds[fastest] < _MARGIN * seconds[trusted_name] else trusted_name
    return Selection(operation, dtype, chosen, seconds, rejected)


def _thread_seconds(candidates: dict[str, Callable[..., Tensor]], arguments: tuple[Any, ...]) -> dict[str, float]:
    """The best processor time of each candidate on one thread."""
    seconds = dict.fromkeys(candidates, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_ROUNDS):
            for name, candidate in candidates.items():
                start = time.thread_time()
                candidate(*arguments)
                seconds[name] = min(seconds[name], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return seconds


def _error(value: Tensor, truth: Tensor) -> float:
    return host.number((value.double() - truth).abs().max() / truth.abs().max())
