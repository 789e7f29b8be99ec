"""Interleaved rounds: every backend runs once a round, in rotating order, with machine probes between rounds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from xfm_fast.memory import PeakMemory

from .machine import MachineProbes, Readings
from .record import Comparison, Extra
from .timing import one_line, ratio_interval, rotated, timed

Block = Callable[[], list[float]]
"""Runs once or a few times and returns the seconds of each run; its `extra` and `reason`, if any, go into the row."""


class Watched:
    """A block of one run that records its peak memory."""

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        self._run, self._device = run, device
        self._peak = -1
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
        if peak > self._peak:
            self._peak = peak
            self.extra = {"peak_bytes": peak, "grown_bytes": peak - before, "memory_method": method}
        return [seconds]


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
        """Return the seconds of every run of a backend."""
        return [second for block in self.rounds.get(key, []) for second in block]


def compared(key: str, dtype: str, baseline: Sequence[float], ours: Sequence[float]) -> Comparison:
    """Compare `ours`, in a dtype, with the samples of another backend from the same rounds."""
    name, baseline_dtype = key.rsplit(" ", 1)
    low, high = ratio_interval(baseline, ours)
    return Comparison(
        backend=name,
        dtype=baseline_dtype,
        like_for_like=baseline_dtype == dtype,
        ratio=statistics.median(baseline) / statistics.median(ours),
        low=low,
        high=high,
    )


def interleave(
    blocks: Mapping[str, Block],
    probes: MachineProbes | None = None,
    *,
    rounds: int,
    budget_s: float = 0.0,
    max_rounds: int = 15,
    warmups: int = 0,
    deadline: float = math.inf,
    on_step: Callable[[str], None] = lambda what: None,
    grad: bool = False,
) -> Samples:
    """Run the block of every backend once a round, in rotating order, with the probes before, between and after.

    After `warmups` untimed blocks of each, `rounds` are run, and up to `max_rounds` while all of them take less than
    `budget_s`. A round after the first ends before the `deadline`, a time of `time.perf_counter()`.
    """
    samples = Samples({name: [] for name in blocks})

    def probe() -> None:
        if probes is not None:
            probes.read(samples.readings)

    def run(name: str, step: str) -> list[float] | None:
        if name in samples.failures:
            return None
        on_step(f"{name}, {step}")
        try:
            return blocks[name]()
        except Exception as error:  # of any library: the other backends go on
            samples.failures[name] = one_line(error)
            return None

    with torch.set_grad_enabled(grad):
        try:
            for name in blocks:
                for _ in range(warmups):
                    run(name, "warm-up")
            start, done = time.perf_counter(), 0
            probe()
            while len(samples.failures) < len(blocks):
                remaining = str(rounds)
                if done:
                    now = time.perf_counter()
                    round_s = (now - start) / done
                    end = deadline if done < rounds else min(start + budget_s, deadline)
                    if done >= max_rounds or now + round_s > end:
                        break
                    planned = min(max_rounds, max(rounds, int(budget_s / round_s)))
                    seconds_left = max(1, round_s * (planned - done))
                    remaining = f"{planned}, about {seconds_left:.0f} s left"
                for name in rotated(list(blocks), done):
                    seconds = run(name, f"{done + 1} of {remaining}")
                    if seconds is not None:
                        samples.rounds[name].append(seconds)
                probe()
                done += 1
        except KeyboardInterrupt:
            samples.interrupted = True
            while probes is not None and len(samples.readings.copies) < 2:
                probe()
    return samples
