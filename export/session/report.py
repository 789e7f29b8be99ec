"""The cost and the gain of a session, graph by graph: rates, latencies, transfers, loading, artifacts and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xfm_fast.errors import InputError
from xfm_fast.memory import PeakMemory

from ..graphs import GraphName
from ..slots import Slot
from . import Session

LEAST_RUNS = 10
"""Percentiles of fewer runs say nothing."""

# Of graphs without a profile that knows better: one request at a time, and a batch.
_SINGLE = {"batch": 1, "texts": 1, "length": 16, "past": 8, "rows": 1}
_BULK: dict[str, dict[str, int]] = {
    "vision": {"batch": 8},
    "image_memory": {"batch": 8},
    "text": {"batch": 32, "length": 16, "rows": 32},
    "fusion": {"batch": 1, "texts": 64, "length": 16, "rows": 64},
    "match": {"batch": 1, "texts": 64, "length": 16},
    "nlvr2": {"batch": 8},
    "decoder_memory": {"batch": 8},
    "decoder_step": {"batch": 8, "texts": 8},
}


@dataclass(frozen=True)
class ShapeRow:
    """A graph at one shape. Times are in seconds; those of transfers and enqueueing are None on a CPU.

    Attributes:
        slot: profile that ran it.
        sizes: by axis.
        items: images or texts of a run; `item` says which.
        runs: how many were timed.
        throughput: items a second, runs following each other without a pause.
        p50, p90, p99: latency of a run: inputs and outputs on the session's device, its results waited for.
        enqueue: median time until the call comes back.
        host_to_device, device_to_host: median time to bring the inputs there and the outputs back, pinned.
        peak_bytes: greatest growth of memory in use during a run: resident memory, or that of PyTorch on the GPU.
    """

    slot: str
    sizes: dict[str, int]
    items: int
    item: str
    runs: int
    throughput: float
    p50: float
    p90: float
    p99: float
    enqueue: float | None
    host_to_device: float | None
    device_to_host: float | None
    peak_bytes: int


@dataclass(frozen=True)
class GraphReport:
    """A graph: what it took to get it, and how it runs.

    Attributes:
        build_seconds: export and engine build, from the manifest.
        artifact_bytes: size of its files.
        load_seconds, warm_seconds, memory_bytes: see `session.LoadReport`.
    """

    graph: GraphName
    build_seconds: float
    artifact_bytes: int
    load_seconds: float
    warm_seconds: float
    memory_bytes: int
    rows: list[ShapeRow]


@dataclass(frozen=True)
class SessionReport:
    """All graphs of a session."""

    runtime: str
    dtype: str
    threads: int
    graphs: list[GraphReport]

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def measure_session(
    session: Session, *, seconds: float = 2.0, progress: Callable[[str], None] = lambda message: None
) -> SessionReport:
    """Measure every graph of a session at the shapes that its profiles are tuned for and at their largest.

    Graphs without profiles run one request at a time and a batch.

    Args:
        session: a ready one.
        seconds: spent on timing each shape, but at least `LEAST_RUNS` runs.
        progress: is told what is being measured.

    Raises:
        InputError: seconds below zero.
        UnavailableError: the session is not ready.
    """
    if seconds < 0:
        raise InputError(f"seconds={seconds}; give the time to spend on each shape")
    sizes = {record.name: record.bytes for record in session.manifest.files}
    graphs = []
    for record in session.manifest.graphs:
        rows = []
        for slot, shape in report_shapes(record.name, session.slots(record.name)):
            progress(f"{record.name} {shape}")
            rows.append(_measured(session, record.name, slot, shape, seconds))
        loaded = session.loaded[record.name]
        graphs.append(
            GraphReport(
                graph=record.name,
                build_seconds=record.build_seconds,
                artifact_bytes=sum(sizes[name] for name in record.files),
                load_seconds=loaded.load_seconds,
                warm_seconds=loaded.warm_seconds,
                memory_bytes=loaded.memory_bytes,
                rows=rows,
            )
        )
    arithmetic = session.manifest.options.get("arithmetic") or session.manifest.dtype
    return SessionReport(session.description, arithmetic, torch.get_num_threads(), graphs)


def report_shapes(graph: GraphName, slots: Any) -> Iterator[tuple[Slot, dict[str, int]]]:
    """The shapes to measure a graph at, each once."""
    seen = set()
    for slot in slots:
        tuned = all(allowed.best is not None for allowed in slot.ranges.values())
        if tuned:
            shapes = [
                {axis: allowed.best for axis, allowed in slot.ranges.items()},
                {axis: allowed.most for axis, allowed in slot.ranges.items()},
            ]
        else:
            shapes = [slot.example(_SINGLE), slot.example(_SINGLE | _BULK[graph])]
        for shape in shapes:
            key = tuple(sorted(shape.items()))
            if key not in seen:
                seen.add(key)
                yield slot, shape


def _measured(session: Session, graph: GraphName, slot: Slot, sizes: Mapping[str, int], seconds: float) -> ShapeRow:
    inputs = session.example_inputs(graph, slot, sizes)

    def run() -> dict[str, Tensor]:
        return session.run(graph, inputs)

    outputs, peak = _peak(session, run)
    latencies, enqueued = [], []
    finish = time.perf_counter() + seconds
    while len(latencies) < LEAST_RUNS or time.perf_counter() < finish:
        started = time.perf_counter()
        run()
        enqueued.append(time.perf_counter() - started)
        session.synchronize()
        latencies.append(time.perf_counter() - started)
    p50, p90, p99 = np.percentile(latencies, (50, 90, 99)).tolist()
    items = sizes["batch"] * sizes.get("texts", 1)
    on_gpu, seconds_each = session.runtime.enqueues, float(np.mean(latencies))
    if on_gpu:
        # The next run is enqueued before the last one ends.
        session.synchronize()
        started = time.perf_counter()
        for _ in latencies:
            run()
        session.synchronize()
        seconds_each = (time.perf_counter() - started) / len(latencies)
    return ShapeRow(
        slot=slot.name,
        sizes=dict(sizes),
        items=items,
        item="images" if graph in ("vision", "image_memory") else "texts",
        runs=len(latencies),
        throughput=items / seconds_each,
        p50=p50,
        p90=p90,
        p99=p99,
        enqueue=float(np.median(enqueued)) if on_gpu else None,
        host_to_device=_transfer(session, inputs, session.device) if on_gpu else None,
        device_to_host=_transfer(session, outputs, torch.device("cpu")) if on_gpu else None,
        peak_bytes=peak,
    )


def _peak(session: Session, run: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], int]:
    """The outputs of a first run, and by how much memory grew at most."""
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
        torch.cuda.reset_peak_memory_stats(session.device)
        before = torch.cuda.memory_allocated(session.device)
        outputs = run()
        torch.cuda.synchronize(session.device)
        return outputs, torch.cuda.max_memory_allocated(session.device) - before
    with PeakMemory() as memory:
        outputs = run()
    return outputs, memory.peak - memory.start


def _transfer(session: Session, tensors: Mapping[str, Tensor], target: torch.device) -> float:
    """Median seconds to copy tensors between pinned host memory and the device."""
    pinned = session.device.type == "cuda"
    sources = list(tensors.values())
    if target.type != "cpu":
        sources = [value.cpu().pin_memory() if pinned else value.cpu() for value in sources]
    targets = [
        torch.empty(v.shape, dtype=v.dtype, device=target, pin_memory=pinned and target.type == "cpu") for v in sources
    ]
    times = []
    for _ in range(LEAST_RUNS):
        session.synchronize()
        started = time.perf_counter()
        for source, copy in zip(sources, targets, strict=True):
            copy.copy_(source, non_blocking=True)
        session.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times))
