"""Times and errors of single calls and their statistics; needs nothing but PyTorch and NumPy."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# fp32 results agree to this, relative to the largest value.
FP32_BAND = 1e-5
# A graph holds as many runs as take this long, so that its launch does not count.
_GRAPH_S = 1e-3
_MAX_RUNS = 100
_WARM_UPS, _HOST_RUNS = 3, 10
_RESAMPLES = 2000
# Samples from which an interval is given.
_MIN_SAMPLES = 3

TimedBy = Literal["clock", "events", "graph replay"]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Return the largest |a - b| over the largest |b|; infinite for different shapes and for NaN."""
    if ours.shape != reference.shape:
        return math.inf
    ours, reference = ours.double(), reference.double()
    error = float((ours - reference).abs().max() / reference.abs().max())
    return error if math.isfinite(error) else math.inf


def why_not_compiled(device: torch.device) -> str | None:
    """Return why torch.compile cannot compile for a device, or None."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler (g++ or clang++), and none is on the PATH"
    return None


def parity_band(dtype: torch.dtype, reference_error: float = 0.0, fp32: float = FP32_BAND) -> float:
    """Return the relative error that rounding explains.

    `reference_error` is the error of the reference itself against a wider dtype. In fp32 the band is three times that
    and at least `fp32`; in other dtypes it is twice that and the spacing of their numbers.
    """
    if dtype == torch.float32:
        return max(fp32, 3 * reference_error)
    return 2 * reference_error + torch.finfo(dtype).eps


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return output and seconds of a run, on a GPU between two events of the stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        output = run()
        return output, time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    output = run()
    after.record()
    torch.cuda.synchronize()
    return output, before.elapsed_time(after) / 1e3


def rotated(names: list[str], shift: int) -> list[str]:
    """Return the order of a round: one further every round, reversed every other round."""
    shift %= len(names)
    order = names[shift:] + names[:shift]
    return order if shift % 2 == 0 else order[::-1]


def one_line(error: BaseException) -> str:
    """Format an error of any library for a cell of a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def percentile(values: Sequence[float], share: float) -> float:
    """Return the empirical quantile (inverted CDF)."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def bootstrap(
    statistic: Callable[..., Any], *series: Sequence[float], paired: bool = False
) -> tuple[float, float] | None:
    """Return the 95% interval of a statistic of one or two series, reduced along their last axis.

    `paired` series come from the same rounds and are resampled together. None for fewer than three samples.
    """
    sizes = [len(values) for values in series]
    if min(sizes) < _MIN_SAMPLES:
        return None
    generator = np.random.default_rng(0)

    def draw(size: int) -> np.ndarray:
        return generator.integers(0, size, (_RESAMPLES, size))

    indices = [draw(sizes[0])] * len(sizes) if paired else [draw(size) for size in sizes]
    resampled = [np.asarray(values)[rows] for values, rows in zip(series, indices, strict=True)]
    low, high = np.percentile(statistic(*resampled), (2.5, 97.5))
    return float(low), float(high)


def ratio_interval(
    slow: Sequence[float], fast: Sequence[float], *, paired: bool = True
) -> tuple[float, float] | tuple[None, None]:
    """Return the interval of median(slow) / median(fast).

    `paired` rounds are resampled together, so that common drift cancels.
    """
    rounds = min(len(slow), len(fast)) if paired else None

    def ratio(a: Any, b: Any) -> Any:
        return np.median(a, -1) / np.median(b, -1)

    return bootstrap(ratio, slow[:rounds], fast[:rounds], paired=paired) or (None, None)


class Clocked:
    """A call timed repeatedly; on a GPU by graph replay, which takes the host out of the measurement.

    `prepare` makes the call on the stream that is recorded, because a backward pass runs on the stream of its forward
    pass. A call that cannot be recorded, for the `reason`, is timed by events around launches from the host.
    """

    def __init__(self, prepare: Callable[[], Callable[[], object]], device: torch.device) -> None:
        self._prepare, self.device = prepare, device
        self._call: Callable[[], object] | None = None
        self._stream: Any = None
        self._runs = 1
        self.by: TimedBy = "clock" if device.type != "cuda" else "events"
        self.host_s: float | None = None
        self.reason: str | None = None

    @property
    def extra(self) -> dict[str, Any]:
        """Fields of `Result.extra`."""
        host = {} if self.host_s is None else {"host_s": self.host_s}
        return {"timed_by": self.by} | host

    def __call__(self) -> list[float]:
        """Return the seconds of one run, as a `Block`."""
        if self._call is None:
            self._call = self._prepare() if self.device.type != "cuda" else self._record_on_gpu()
        # A call without a graph stays on the stream that it was prepared on.
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return [timed(self._call, self.device)[1] / self._runs]

    def _record_on_gpu(self) -> Callable[[], object]:
        stream = self._stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run = self._prepare()
            for _ in range(_WARM_UPS):
                run()
            stream.synchronize()
            start = time.perf_counter()
            for _ in range(_HOST_RUNS):
                run()
            self.host_s = (time.perf_counter() - start) / _HOST_RUNS
            stream.synchronize()
            _, seconds = timed(run, self.device)
        torch.cuda.current_stream().wait_stream(stream)
        runs = min(_MAX_RUNS, max(1, math.ceil(_GRAPH_S / max(seconds, 1e-7))))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(runs):
                    run()
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:  # every library has its own reasons not to be recorded
            torch.cuda.synchronize()
            self.reason = one_line(error)
            return run
        self._runs, self.by = runs, "graph replay"
        return graph.replay
