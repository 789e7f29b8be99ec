"""Times and errors of single calls, without the schema of results: all that a machine needs that has only PyTorch."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# fp32 results agree to this, relative to the largest value.
FP32_BAND = 1e-5
# A graph holds as many runs as take this long, so that its own start does not count.
_GRAPH_S = 1e-3
_MOST_RUNS = 100
_WARM_UPS, _HOST_RUNS = 3, 10

TimedBy = Literal["clock", "events", "graph replay"]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest |a - b| / largest |b|; infinite for another shape and for NaN."""
    if ours.shape != theirs.shape:
        return math.inf
    error = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
    return error if math.isfinite(error) else math.inf


def why_not_compiled(device: torch.device) -> str | None:
    """The reason why torch.compile has nothing to compile with on a device; None if it has."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler (g++ or clang++), and none is on the PATH"
    return None


def parity_band(dtype: torch.dtype, own: float = 0.0, fp32: float = FP32_BAND) -> float:
    """The relative error that rounding explains, from that of the reference itself, `own`, against a wider dtype.

    In fp32 it is three times that, and `fp32` in any case; in other dtypes twice that and the spacing of their numbers.
    """
    return max(fp32, 3 * own) if dtype == torch.float32 else 2 * own + torch.finfo(dtype).eps


def timed(
    run: Callable[[], Any], device: torch.device, *, waits: bool = False
) -> tuple[Any, float]:
    """Output and seconds, on a GPU between two events of the stream, unless the run `waits` for its results itself."""
    events = (
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    )
    for event in events[:1]:
        event.record()
    start = time.perf_counter()
    output = run()
    seconds = time.perf_counter() - start
    for event in events[1:]:
        event.record()
        torch.cuda.synchronize()
    return output, seconds if waits or not events else events[0].elapsed_time(events[1]) / 1e3


def rotated(names: list[str], shift: int) -> list[str]:
    """The order of a round: begun one further every time, and backwards every other time."""
    shift %= len(names)
    order = names[shift:] + names[:shift]
    return order if shift % 2 == 0 else order[::-1]


def one_line(error: BaseException) -> str:
    """An error of any library for a cell of a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def record_graph(run: Callable[[], object], runs: int, stream: Any) -> Callable[[], object]:
    """A CUDA graph of some runs, as a function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(runs):
            run()
    return graph.replay


class Clocked:
    """A call that is timed over and over: on a GPU by replaying a graph of it, so that the host has no part in it.

    `prepare` makes the call on the stream that is recorded, because a backward pass runs on the stream of its forward
    pass. What no graph can hold, for the `reason`, is timed by events around calls as the host issues them.
    """

    def __init__(
        self,
        prepare: Callable[[], Callable[[], object]],
        device: torch.device,
        recorder: Callable[[Callable[[], object], int, Any], Callable[[], object]] | None = None,
    ) -> None:
        self._prepare, self.device = prepare, device
        self._record = recorder or record_graph
        self._call: Callable[[], object] | None = None
        self._stream: Any = None
        self._runs = 1
        self.by: TimedBy = "clock" if device.type != "cuda" else "events"
        self.host_s: float | None = None
        self.reason: str | None = None

    @property
    def extra(self) -> dict[str, Any]:
        """Further facts of a row."""
        return {"timed_by": self.by} | ({} if self.host_s is None else {"host_s": self.host_s})

    def __call__(self) -> list[float]:
        """Seconds of one run, as a `Block`."""
        if self._call is None:
            self._call = self._prepare() if self.device.type != "cuda" else self._on_gpu()
        # Without a graph the work goes on running on the stream that it was prepared on.
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return [timed(self._call, self.device)[1] / self._runs]

    def _on_gpu(self) -> Callable[[], object]:
        stream = self._stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run = self._prepare()
            for _ in range(_WARM_UPS):
                run()
            stream.synchronize()
            begun = time.perf_counter()
            for _ in range(_HOST_RUNS):
                run()
            self.host_s = (time.perf_counter() - begun) / _HOST_RUNS
            stream.synchronize()
            each = timed(run, self.device)[1]
        torch.cuda.current_stream().wait_stream(stream)
        runs = min(_MOST_RUNS, max(1, math.ceil(_GRAPH_S / max(each, 1e-7))))
        try:
            replay = self._record(run, runs, stream)
            replay()
            torch.cuda.synchronize()
        except Exception as error:  # every library has its own reasons not to be recorded
            torch.cuda.synchronize()
            self.reason = one_line(error)
            return run
        self._runs, self.by = runs, "graph replay"
        return replay
