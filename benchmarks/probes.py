"""Probes of the machine beside a measurement: GEMM and copy rates, clock and temperature of a GPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.kernels.cpu import llvm
from xfm_fast.kernels.cpu.gemm import compiled_linear

from .machine import GpuState
from .record import Probe
from .timing import DTYPES, timed

# The MLP of one layer of a base-size encoder; on a GPU a GEMM that fills it.
PROBE_SHAPE = {"cpu": (1280, 768, 3072), "cuda": (8192, 8192, 8192)}
# Beyond any cache, and a millisecond of a GPU's time.
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
# A probe that moves by more than this shows that something else ran on the machine.
CONTENTION = 0.10
# An emulated dtype may take seconds for one GEMM.
_PROBE_S = 0.5


def _best_rate(amount: float, run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """`amount` per second in the fastest of a few runs."""
    best, spent = math.inf, 0.0
    for _ in range(repeats):
        _, seconds = timed(run, device)
        best, spent = min(best, seconds), spent + seconds
        if spent > _PROBE_S:
            break
    return amount / best


class GemmProbe:
    """This machine's GEMM rate in FLOP/s: on a CPU the best of MKL (`F.linear`), oneDNN and our own kernels."""

    def __init__(self, dtype: torch.dtype, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        rows, inputs, outputs = PROBE_SHAPE[device.type]
        generator = torch.Generator().manual_seed(0)
        self.flops, self._device = 2 * rows * inputs * outputs, device
        x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
        weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(device, dtype)
        candidates: dict[str, Callable[[], object]] = {"cuBLAS" if x.is_cuda else "MKL": lambda: F.linear(x, weight)}
        if not x.is_cuda:
            candidates |= _onednn(x, weight)
            if llvm.why_not(dtype) is None:
                candidates["LLVM"] = lambda: compiled_linear(x, weight, None)
        with torch.no_grad():
            for run in candidates.values():
                # The first call of a library prepares it, which may take longer than all that is timed.
                run()
            rates = {name: _best_rate(self.flops, run, device, 4) for name, run in candidates.items()}
        self.library = max(rates, key=rates.__getitem__)
        self._run = candidates[self.library]

    def __call__(self, repeats: int = 3) -> float:
        """Best rate of a few GEMMs."""
        with torch.no_grad():
            return _best_rate(self.flops, self._run, self._device, repeats)


def _onednn(x: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    """OneDNN's GEMMs by name, as far as this build of PyTorch has them: the ops are private."""
    try:
        product = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    except (RuntimeError, AttributeError, NotImplementedError):
        return {}
    usable: dict[str, Callable[[], object]] = {}
    for name, given in {"oneDNN": weight, "oneDNN, packed weight": packed}.items():
        try:
            product(x, given, None, "none", [], "")
        except (RuntimeError, AttributeError, NotImplementedError):
            continue
        usable[name] = lambda given=given: product(x, given, None, "none", [], "")
    return usable


def moved(rates: Sequence[float]) -> bool:
    """True if a probe left its median by more than `CONTENTION`."""
    middle = statistics.median(rates)
    return max(abs(rate / middle - 1) for rate in rates) > CONTENTION


@dataclass
class Readings:
    """Readings of the probes, in order of time; `gemm` by dtype."""

    gemm: dict[str, list[float]] = field(default_factory=dict)
    copies: list[float] = field(default_factory=list)
    clocks_mhz: list[float] = field(default_factory=list)
    temperatures_c: list[float] = field(default_factory=list)

    def contended(self, dtype: str) -> bool:
        """True if the GEMM rate in a dtype moved."""
        return bool(self.gemm.get(dtype)) and moved(self.gemm[dtype])

    def note(self, dtype: str) -> str:
        """What is remarkable about the machine meanwhile."""
        remarks = [f"the GEMM rate moved by more than {CONTENTION:.0%}"] if self.contended(dtype) else []
        if self.clocks_mhz and moved(self.clocks_mhz):
            remarks.append(f"the GPU's clock went from {self.clocks_mhz[0]:.0f} to {self.clocks_mhz[-1]:.0f} MHz")
        if self.temperatures_c and self.temperatures_c[-1] - self.temperatures_c[0] > 10:
            remarks.append(f"the GPU warmed from {self.temperatures_c[0]:.0f} to {self.temperatures_c[-1]:.0f} °C")
        return "; ".join(remarks)


class MachineProbes:
    """The probes of some dtypes on a device."""

    def __init__(self, dtypes: Sequence[str], device: torch.device) -> None:
        self._device, self._gpu = device, GpuState(device)
        self._gemm = {name: GemmProbe(DTYPES[name], device) for name in dtypes}
        self._source = torch.ones(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
        self._target = torch.empty_like(self._source)
        self._copy()

    def _copy(self) -> float:
        """Bytes per second that a large copy reads and writes."""
        return _best_rate(2 * self._source.nbytes, lambda: self._target.copy_(self._source), self._device)

    def read(self, into: Readings) -> None:
        """Add one reading of everything."""
        for name, probe in self._gemm.items():
            into.gemm.setdefault(name, []).append(probe())
        into.copies.append(self._copy())
        state = self._gpu()
        if state is not None:
            into.clocks_mhz.append(state.clock_mhz)
            into.temperatures_c.append(state.temperature_c)

    def describe(self) -> dict[str, Probe]:
        """A reading for the head of a document."""
        return {
            name: Probe(library=probe.library, gemm_flops_per_s=probe(), copy_bytes_per_s=self._copy())
            for name, probe in self._gemm.items()
        }
