"""Several contenders in one process, a block of runs each in every round: what drifts drifts for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from xfm_fast.benchmarks.measuring import rotated
from xfm_fast.benchmarks.probes import MachineProbes, Readings
from xfm_fast.benchmarks.telemetry import EnergyMeter

Block = Callable[[], list[float]]
"""Runs a few times and returns the seconds of each run."""


@dataclass
class Samples:
    """What the rounds gave, by the key of a contender.

    Attributes:
        seconds: of every run.
        failures: one line for each contender that raised an error, which takes no part from then on.
        joules, busy_s: counted during the blocks, and how long these took; empty without a counter.
        interrupted: stopped by Ctrl-C; whole blocks were kept.
    """

    seconds: dict[str, list[float]]
    readings: Readings
    failures: dict[str, str] = field(default_factory=dict)
    joules: dict[str, float] = field(default_factory=dict)
    busy_s: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


def run_rounds(
    blocks: Mapping[str, Block],
    probes: MachineProbes,
    meter: EnergyMeter,
    *,
    rounds: int,
    budget_s: float,
    most_rounds: int,
    on_step: Callable[[str], None] = lambda what: None,
) -> Samples:
    """Run the block of every contender once a round, in an order that turns, with the probes before, between and after.

    Args:
        rounds: at least so many, if the first `budget_s` seconds last for them, and one in any case.
        budget_s: time for all rounds; more than `rounds` are run within it, up to `most_rounds`.
        on_step: told what runs next.
    """
    out = Samples({name: [] for name in blocks}, probes.readings())
    try:
        started = time.perf_counter()
        probes.read(out.readings)
        done = 0
        while done == 0 or (done < most_rounds and _room(started, done, budget_s * (2 if done < rounds else 1))):
            for name in rotated(list(blocks), done):
                if name not in out.failures:
                    on_step(f"{name}, round {done + 1}")
                    _one(name, blocks[name], meter, out)
            probes.read(out.readings)
            done += 1
            if len(out.failures) == len(blocks):
                break
    except KeyboardInterrupt:
        out.interrupted = True
        if len(out.readings.copies) < 2:
            probes.read(out.readings)
    return out


def _room(started: float, done: int, budget_s: float) -> bool:
    elapsed = time.perf_counter() - started
    return elapsed + elapsed / done <= budget_s


def _one(name: str, block: Block, meter: EnergyMeter, out: Samples) -> None:
    counted = meter.source is not None
    before, begun = meter.joules() if counted else 0.0, time.perf_counter()
    try:
        seconds = block()
    except Exception as error:  # a baseline of another library may fail in any way; the run goes on
        out.failures[name] = one_line(error)
        return
    if counted:
        out.joules[name] = out.joules.get(name, 0.0) + meter.joules() - before
        out.busy_s[name] = out.busy_s.get(name, 0.0) + time.perf_counter() - begun
    out.seconds[name] += seconds


def one_line(error: BaseException) -> str:
    """An error of any library for a cell of a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
