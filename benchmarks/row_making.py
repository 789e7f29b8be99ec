"""From samples to the numbers of a row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from xfm_fast.benchmarks.contenders.engine import Stages
from xfm_fast.benchmarks.contenders.registry import DTYPES, OURS
from xfm_fast.benchmarks.entrants import Entrant
from xfm_fast.benchmarks.kernels import data_sheet
from xfm_fast.benchmarks.measuring import bootstrap, percentile, ratio_interval, sample_on_cpu, sample_on_cuda
from xfm_fast.benchmarks.operations import operation_shares, shares
from xfm_fast.benchmarks.probes import Readings
from xfm_fast.benchmarks.rounds import Samples
from xfm_fast.benchmarks.rows import (
    Comparison,
    Efficiency,
    Energy,
    Interval,
    Latency,
    Memory,
    Mode,
    Row,
    Share,
    Tokens,
)
from xfm_fast.benchmarks.telemetry import EnergyMeter
from xfm_fast.benchmarks.workloads import Workload

_STAGED_RUNS = 3
# A run of more than this is staged once.
_LONG_S = 1.0


def interval(values: Sequence[float], share: float) -> Interval:
    """A percentile with its bootstrap interval; the median of an even number lies between two values."""

    def statistic(chosen: Sequence[float]) -> float:
        return statistics.median(chosen) if share == 0.5 else percentile(chosen, share)

    bounds = bootstrap(values, statistic)
    low, high = (None, None) if bounds is None else bounds
    return Interval(value=statistic(values), low=low, high=high)


def latency(seconds: Sequence[float]) -> Latency:
    """Of requests."""
    p50, p90, p99 = (interval(seconds, share) for share in (0.5, 0.9, 0.99))
    return Latency(samples=list(seconds), p50=p50, p90=p90, p99=p99, mean=statistics.fmean(seconds))


def throughput(items: int, seconds: Sequence[float]) -> Interval:
    """Items a second of runs of `items`."""
    time = interval(seconds, 0.5)
    low = None if time.high is None else items / time.high
    high = None if time.low is None else items / time.low
    return Interval(value=items / time.value, low=low, high=high)


def blank(entrant: Entrant, workload: Workload, mode: Mode, batch: int) -> Row:
    """A row without numbers: what was to be measured, or why it was not."""
    return Row(
        scenario=workload.scenario,
        mode=mode,
        contender=entrant.contender.name,
        label=entrant.contender.label,
        dtype=entrant.dtype,
        name=workload.name(batch),
        point=workload.point.model_copy(update={"batch": batch}),
        status=entrant.status,  # pyright: ignore[reportArgumentType]
        reason=entrant.reason,
        unit=workload.unit,
        items=workload.items * batch,
        parity=entrant.parity,
        cost=entrant.cost,
    )


def sampled(
    row: Row, entrant: Entrant, workload: Workload, numbers: Sequence[int], output: Any, samples: Samples, peak: Memory,
    meter: EnergyMeter,
) -> Row:  # fmt: skip
    """A row with what the rounds gave for its entrant; `partial` where they were interrupted.

    Args:
        numbers: requests of a run, and `output` their answer.
        peak: memory of a run.
    """
    seconds = samples.seconds.get(entrant.key, [])
    if not seconds:
        return row.model_copy(update={"status": "partial", "reason": "interrupted before its first sample"})
    middle = statistics.median(seconds)
    joules, note = energy(entrant.key, samples, meter, row.items)
    updates: dict[str, Any] = {
        "status": "partial" if samples.interrupted else "measured",
        "reason": f"interrupted after {len(seconds)} samples" if samples.interrupted else None,
        "against": against(entrant.key, samples.seconds) if entrant.contender.name == OURS else [],
        "tokens": tokens(entrant, workload, numbers, middle),
        "efficiency": efficiency(entrant, workload, numbers, output, middle, samples.readings),
        "memory": peak,
        "energy": joules,
        "energy_note": note,
        "conditions": samples.readings.conditions(entrant.dtype),
    }
    if row.mode == "single-stream":
        return row.model_copy(update=updates | {"latency": latency(seconds)})
    return row.model_copy(update=updates | {"seconds": list(seconds), "throughput": throughput(row.items, seconds)})


def efficiency(
    entrant: Entrant, workload: Workload, numbers: Sequence[int], answer: Any, seconds: float, readings: Readings
) -> Efficiency:
    """Of a run of some requests that took `seconds`."""
    gemm, copies = readings.rate(entrant.dtype), statistics.median(readings.copies)
    needed = workload.flops(numbers, "ours", answer)
    assert needed is not None
    own = workload.flops(numbers, entrant.contender.schedule, answer)
    moved = workload.traffic(numbers, DTYPES[entrant.dtype].itemsize)
    intensity = needed / moved
    roof = min(gemm, intensity * copies)
    gpu = data_sheet(entrant.device)
    return Efficiency(
        flops=own,
        needed_flops=needed,
        mfu=needed / seconds / gemm,
        mfu_data_sheet=needed / seconds / gpu.flops_per_s if gpu is not None and entrant.dtype == "bf16" else None,
        utilisation=None if own is None else own / seconds / gemm,
        bytes=moved,
        intensity=intensity,
        roof=roof,
        roof_bound="compute" if gemm <= intensity * copies else "memory",
        share_of_roof=needed / seconds / roof,
    )


def tokens(entrant: Entrant, workload: Workload, numbers: Sequence[int], seconds: float) -> Tokens | None:
    """Of a run; None where there are no texts, or the contender's own padding is not known."""
    counts = workload.tokens(numbers, entrant.contender.schedule)
    if counts is None:
        return None
    useful, computed = counts
    return Tokens(
        useful=useful, padded=computed, useful_per_s=useful / seconds, padded_per_s=computed / seconds
    )  # fmt: skip


def memory(run: Any, device: torch.device) -> tuple[Memory, Any]:
    """Peak of one run, and what the run returned."""
    sample = sample_on_cuda(run) if device.type == "cuda" else sample_on_cpu(run)
    found = Memory(peak_bytes=sample.peak_bytes, grown_bytes=sample.grown_bytes, method=sample.memory_method)
    return found, sample.output


def stages(answer: Any, numbers: Sequence[int], device: torch.device, seconds: float) -> list[Share]:
    """Median times of the parts of a run, from runs of their own; empty where the contender names no parts."""
    found: dict[str, list[float]] = {}
    for _ in range(1 if seconds > _LONG_S else _STAGED_RUNS):
        clock = Stages(device)
        answer(numbers, clock)
        for name, value in clock.seconds.items():
            found.setdefault(name, []).append(value)
    return shares({name: statistics.median(values) for name, values in found.items()})


def operations(entrant: Entrant, answer: Any, numbers: Sequence[int]) -> list[Share]:
    """Kinds of operations of a run, for contenders that run in PyTorch."""
    if entrant.contender.schedule == "own":
        return []
    return operation_shares(lambda: answer(numbers), entrant.device)


def energy(key: str, samples: Samples, meter: EnergyMeter, items: int) -> tuple[Energy | None, str | None]:
    """Joules an item of the runs of a contender, or why they are not known."""
    if meter.source is None:
        return None, meter.reason
    if key not in samples.joules:
        return None, "not counted"
    joules, busy = samples.joules[key], samples.busy_s[key]
    done = items * len(samples.seconds[key])
    return Energy(joules_per_item=joules / done, watts=joules / busy, source=meter.source), None


def against(key: str, samples: dict[str, list[float]]) -> list[Comparison]:
    """Everybody else's time over that of `key`, from samples of the same rounds."""
    ours, found = samples[key], []
    for other, seconds in samples.items():
        if other == key or not seconds or not ours:
            continue
        contender, dtype = other.rsplit(" ", 1)
        enough = min(len(ours), len(seconds)) >= _STAGED_RUNS
        low, high = ratio_interval(seconds, ours) if enough else (None, None)
        ratio = statistics.median(seconds) / statistics.median(ours)
        found.append(Comparison(contender=contender, dtype=dtype, ratio=ratio, low=low, high=high))
    return found
