"""What the machine does at this moment: its rate at matrix products and its rate at copies, on a CPU or a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from xfm_fast.benchmarks.measuring import CONTENTION, PROBE_SHAPE, GemmProbe
from xfm_fast.benchmarks.rows import Conditions, Probe
from xfm_fast.benchmarks.telemetry import GpuState

# Beyond any cache, and a millisecond of a GPU's time.
_COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
_CUDA_SHAPE = (8192, 8192, 8192)
_REPEATS = 3


def _best(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of a few runs."""
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
            run()
            ended.record()
            torch.cuda.synchronize(device)
            best = min(best, begun.elapsed_time(ended) / 1e3)
        else:
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
    return best


class CopyProbe:
    """Bytes a second that a large copy reads and writes."""

    def __init__(self, device: torch.device) -> None:
        self.buffer_bytes = _COPY_BYTES[device.type]
        self._device = device
        self._source = torch.ones(self.buffer_bytes // 4, dtype=torch.float32, device=device)
        self._target = torch.empty_like(self._source)
        self()

    def __call__(self) -> float:
        return 2 * self.buffer_bytes / _best(lambda: self._target.copy_(self._source), self._device, _REPEATS)


class _CudaGemm:
    """Rate of one large product on a GPU."""

    library = "cuBLAS"

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        rows, inputs, outputs = _CUDA_SHAPE
        self._x = torch.randn(rows, inputs, dtype=dtype, device=device)
        self._weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
        self._flops, self._device = 2 * rows * inputs * outputs, device
        F.linear(self._x, self._weight)

    def __call__(self) -> float:
        return self._flops / _best(lambda: F.linear(self._x, self._weight), self._device, _REPEATS)


@dataclass
class Readings:
    """What the probes said, in order."""

    gemm: dict[str, list[float]]
    copies: list[float] = field(default_factory=list)
    clocks_mhz: list[float] = field(default_factory=list)
    temperatures_c: list[float] = field(default_factory=list)

    def rate(self, dtype: str) -> float:
        """Median FLOP/s at matrix products."""
        return statistics.median(self.gemm[dtype])

    def conditions(self, dtype: str) -> Conditions:
        """For a row of this type."""
        gemm = self.gemm[dtype]
        remarks = []
        if _moved(gemm):
            remarks.append(f"the matrix rate moved by more than {CONTENTION:.0%}")
        if self.clocks_mhz and _moved(self.clocks_mhz):
            remarks.append(f"the GPU's clock went from {self.clocks_mhz[0]:.0f} to {self.clocks_mhz[-1]:.0f} MHz")
        if self.temperatures_c and self.temperatures_c[-1] - self.temperatures_c[0] > 10:
            remarks.append(f"the GPU warmed from {self.temperatures_c[0]:.0f} to {self.temperatures_c[-1]:.0f} °C")
        return Conditions(
            gemm_flops_per_s=list(gemm),
            copy_bytes_per_s=list(self.copies),
            contended=_moved(gemm),
            drift=gemm[-1] / gemm[0],
            clocks_mhz=list(self.clocks_mhz),
            temperatures_c=list(self.temperatures_c),
            note="; ".join(remarks),
        )


class MachineProbes:
    """Both probes of some types on a device; the probes of a run are read together."""

    def __init__(self, dtypes: Sequence[str], device: torch.device, types: dict[str, torch.dtype]) -> None:
        self._gpu = GpuState(device)
        self._copy = CopyProbe(device)
        self._gemm: dict[str, GemmProbe | _CudaGemm] = {
            name: _CudaGemm(types[name], device) if device.type == "cuda" else GemmProbe(types[name]) for name in dtypes
        }

    def readings(self) -> Readings:
        """An empty list of readings."""
        return Readings({name: [] for name in self._gemm})

    def read(self, into: Readings) -> None:
        """Take one reading of everything."""
        for name, probe in self._gemm.items():
            into.gemm[name].append(probe())
        into.copies.append(self._copy())
        state = self._gpu()
        if state is not None:
            into.clocks_mhz.append(state.clock_mhz)
            into.temperatures_c.append(state.temperature_c)

    def describe(self) -> dict[str, Probe]:
        """A reading of its own for the head of a document."""
        return {
            name: Probe(
                library=probe.library,
                shape=[*(_CUDA_SHAPE if isinstance(probe, _CudaGemm) else PROBE_SHAPE)],
                gemm_flops_per_s=probe(),
                copy_bytes_per_s=self._copy(),
                copy_buffer_bytes=self._copy.buffer_bytes,
            )
            for name, probe in self._gemm.items()
        }


def _moved(values: Sequence[float]) -> bool:
    middle = statistics.median(values)
    return max(abs(value / middle - 1) for value in values) > CONTENTION
