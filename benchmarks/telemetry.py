"""Counters of the platform: energy of the processor (RAPL) or of the GPU (NVML), clock and temperature of the GPU."""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since some moment, where the platform counts them.

    Attributes:
        source: what counts; None where nothing does, and then `reason` says why.
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        self.source: str | None = None
        self.reason: str | None = None
        self._packages: list[_Package] = []
        self._handle: Any = None
        if device.type == "cuda":
            self._open_nvml(device)
        else:
            self._open_rapl(powercap)

    def joules(self) -> float:
        """The counter; differences between two calls mean something, and none may be a day apart."""
        if self._handle is not None:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        return sum(package.joules() for package in self._packages)

    def _open_rapl(self, powercap: Path) -> None:
        if not powercap.is_dir():
            self.reason = f"no energy counter: {powercap} is absent (virtual machines hide it)"
            return
        # Packages; their parts (cores, memory) have one more number in their name.
        folders = sorted(path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1)
        if not folders:
            self.reason = f"no energy counter: {powercap} lists no RAPL package"
            return
        try:
            self._packages = [_Package(folder) for folder in folders]
        except (OSError, ValueError) as error:
            self.reason = f"the RAPL counter cannot be read ({error}); it is root's on most systems"
            return
        self.source = f"RAPL, {len(folders)} package{'s' if len(folders) > 1 else ''}"

    def _open_nvml(self, device: torch.device) -> None:
        try:
            self._nvml, handle = _nvml_handle(device)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except ImportError:
            self.reason = "no energy counter: the package nvidia-ml-py (pynvml) is not installed"
        except Exception as error:  # NVML has one exception class a failure, all of which mean: not offered
            self.reason = f"NVML does not count energy here ({error})"
        else:
            self._handle, self.source = handle, "NVML, the whole board"


class _Package:
    """A counter in microjoules that starts again at its range."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = int(self._file.read_text())
        self._total = 0

    def joules(self) -> float:
        now = int(self._file.read_text())
        self._total += now - self._last if now >= self._last else now + self._range - self._last
        self._last = now
        return self._total / 1e6


class GpuReading(NamedTuple):
    """Clock of the multiprocessors in MHz, temperature in °C."""

    clock_mhz: float
    temperature_c: float


class GpuState:
    """Clock and temperature of a GPU at this moment; None on a CPU and without NVML."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        if device.type == "cuda":
            with suppress(Exception):  # whatever is missing, a run goes on without these two numbers
                self._nvml, self._handle = _nvml_handle(device)

    def __call__(self) -> GpuReading | None:
        if self._handle is None:
            return None
        clock = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
        warmth = self._nvml.nvmlDeviceGetTemperature(self._handle, self._nvml.NVML_TEMPERATURE_GPU)
        return GpuReading(float(clock), float(warmth))


def _nvml_handle(device: torch.device) -> tuple[Any, Any]:
    """By its unique identifier: NVML numbers GPUs in another order than CUDA_VISIBLE_DEVICES."""
    nvml: Any = importlib.import_module("pynvml")
    nvml.nvmlInit()
    identifier = str(torch.cuda.get_device_properties(device).uuid)
    return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{identifier.removeprefix('GPU-')}")
