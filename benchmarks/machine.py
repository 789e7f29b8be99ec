"""This machine's offer: processor, memory, accelerators, optional packages, counters of energy, chosen kernels."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

import xfm_fast
from xfm_fast.errors import UnavailableError
from xfm_fast.kernels import roofline
from xfm_fast.kernels.backend import compiler_versions
from xfm_fast.kernels.cpu import waiting
from xfm_fast.kernels.cpu.races import compare_all
from xfm_fast.kernels.cpu.workspace import keeps_freed_memory

# Package -> (import name, the extra that installs it).
OPTIONAL = {
    "triton": ("triton", "installed with xfm-fast on Linux"),
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx"),
    "onnxruntime": ("onnxruntime", "export"),
    "openvino": ("openvino", "openvino"),
    "flash-attn": ("flash_attn", "flash-attn"),
    "transformers": ("transformers", "hf"),
    "timm": ("timm", "hf"),
}
_OTHER_NAMES = {
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
}
# Feature -> the name of the same thing in /proc/cpuinfo, and in torch.cpu where that knows it.
_FEATURES = {
    "AVX2": ("avx2", "_is_avx2_supported"),
    "AVX-512": ("avx512f", "_is_avx512_supported"),
    "AVX-512 BF16": ("avx512_bf16", "_is_avx512_bf16_supported"),
    "AVX-512 VNNI": ("avx512_vnni", "_is_vnni_supported"),
    "AVX VNNI": ("avx_vnni", None),
    "AMX": ("amx_tile", "_is_amx_tile_supported"),
    "AMX BF16": ("amx_bf16", None),
    "AMX INT8": ("amx_int8", None),
    "NEON": ("asimd", None),
    "SVE": ("sve", None),
    "ARM BF16": ("bf16", None),
    "ARM I8MM": ("i8mm", None),
}
_TYPES = ("fp32", "bf16")
_BF16_FEATURES = ("AVX-512 BF16", "AMX BF16", "ARM BF16")


@dataclass(frozen=True)
class Package:
    """An optional package: its version, or None with the extra that brings it."""

    name: str
    version: str | None
    extra: str
    detail: str = ""

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return self.extra if " " in self.extra else f'pip install "xfm-fast[{self.extra}]"'


@cache
def _cpuinfo() -> dict[str, str]:
    """Facts of the first processor as Linux tells them; empty elsewhere."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return {}


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags as Linux lists them; empty where the system does not say."""
    return frozenset((_cpuinfo().get("flags") or _cpuinfo().get("Features", "")).split())


@cache
def cpu_features() -> dict[str, bool]:
    """The instruction sets that matter to matrix products on this architecture, present or not."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    found = {}
    for name, (flag, probe) in _FEATURES.items():
        if arm != (name.startswith("ARM") or name in ("NEON", "SVE")):
            continue
        supported = flag in cpu_flags()
        if probe is not None and not supported:
            with suppress(Exception):  # private functions: absent from some versions of PyTorch
                supported = bool(getattr(torch.cpu, probe)())
        found[name] = supported
    return found


def has_native_bf16() -> bool:
    """True where the processor multiplies bf16 itself; elsewhere bf16 is emulated and slower than fp32."""
    features = cpu_features()
    return any(features.get(name, False) for name in _BF16_FEATURES)


def choose_dtypes(
    asked: Sequence[str],
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> tuple[list[str], dict[str, str]]:
    """The types to measure on a device, and those that it does not offer with the reason.

    Args:
        asked: names; none and `auto` stand for what the processor multiplies itself.

    Raises:
        UnavailableError: one that was asked for is unknown.
    """
    if asked and asked != ("auto",):
        unknown = [name for name in asked if name not in _TYPES]
        if unknown:
            raise UnavailableError(f"dtype {', '.join(unknown)!r} is unknown; choose from {', '.join(_TYPES)}")
        return list(dict.fromkeys(asked)), {}
    if device.type == "cuda" or has_native_bf16():
        return [*_TYPES], {}
    return ["fp32"], {"bf16": "not offered by this CPU (no AVX-512 BF16, AMX or ARM BF16); --dtype bf16 emulates it"}


def choose_device(asked: str | None) -> torch.device:
    """The device to measure: a GPU where there is one.

    Raises:
        UnavailableError: the one that was asked for is unknown or absent.
    """
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked not in ("cpu", "cuda"):
        raise UnavailableError(f"device {asked!r} is unknown; choose cpu or cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("device 'cuda' was asked for, but PyTorch sees no GPU; leave --device out")
    return torch.device(asked)


def data_sheet(device: torch.device) -> roofline.GPU | None:
    """The peak rates of a GPU that is known; None otherwise."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu for gpu in roofline.GPUS if gpu.name in name), None)


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    if found := _cpuinfo().get("model name") or _cpuinfo().get("Model"):
        return found
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    return platform.processor() or platform.machine()


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of every CUDA device."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "compute_capability": f"{p.major}.{p.minor}", "memory_gb": round(p.total_memory / 1e9, 1)}
        for p in properties
    ]


def optional_packages() -> list[Package]:
    """Every optional package with its version and, for ONNX Runtime, its execution providers."""
    packages = []
    for name, (module, extra) in OPTIONAL.items():
        found = None
        if importlib.util.find_spec(module) is not None:
            found = next((v for n in (name, *_OTHER_NAMES.get(name, ())) if (v := _version(n))), "unknown version")
        detail = ""
        if found and name == "onnxruntime":
            try:
                providers = importlib.import_module("onnxruntime").get_available_providers()
                detail = ", ".join(provider.removesuffix("ExecutionProvider") for provider in providers)
            except Exception as error:  # a broken installation is worth a line, not a traceback
                detail = f"does not import ({type(error).__name__}: {error})"
        packages.append(Package(name, found, extra, detail))
    return packages


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def ptxas_version() -> str | None:
    """Of the assembler of Triton's kernels for the GPU at hand, else for Hopper; None without Triton."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    with suppress(Exception):  # without Triton, without its NVIDIA backend, of a version that has no such function
        return compiler_versions(10 * capability[0] + capability[1])[1]
    return None


def commit() -> dict[str, Any]:
    """Commit of the source tree that runs, and whether it was changed; nulls outside a git checkout."""
    folder = Path(__file__).resolve().parents[1]
    unknown = {"commit": None, "dirty": None}
    if not (folder / ".git").exists():
        return unknown
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return {"commit": head, "dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return unknown


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def default_threads() -> int:
    """Threads that torch takes by itself, at most one per physical core that this process may use."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), physical, len(_allowed_cores()) or physical))


def _allowed_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def describe() -> dict[str, Any]:
    """Everything a reader needs to place a measurement: hardware, system, versions, commit."""
    names = ("numpy", "triton", "tokenizers", "safetensors", "pillow", "torchvision", "scikit-image", "scikit-learn")
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cpu_features": [name for name, present in cpu_features().items() if present],
        "cpu_flags": sorted(cpu_flags()),
        "native_bf16": has_native_bf16(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "cores_allowed": len(_allowed_cores()),
        "threads": torch.get_num_threads(),
        "threads_wait": waiting.describe(os.environ),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "freed_memory_kept": keeps_freed_memory(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "memory_available_gb": round(psutil.virtual_memory().available / 1e9, 1),
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
        "gpus": gpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: _version(name) for name in names} | {"ptxas": ptxas_version()},
        "xfm_fast": xfm_fast.__version__,
        **commit(),
    }


def as_dict(packages: list[Package]) -> list[dict[str, Any]]:
    """Packages as plain values, for JSON."""
    return [asdict(package) for package in packages]


def choose_paths() -> list[dict[str, Any]]:
    """Compare every operation that has alternatives, in every dtype that this processor is good at.

    Returns:
        Operation, dtype, the chosen implementation and why, FLOP/s of each that passed, and why others were left out.
    """
    return [
        {
            "operation": found.operation,
            "dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(found.dtype, str(found.dtype)),
            "chosen": found.chosen,
            "reason": found.reason,
            "flops_per_s": {name: race.flops / s for name, s in found.seconds.items() if 0 < s < float("inf")},
            "rejected": found.rejected,
        }
        for found, race in compare_all([torch.float32, *([torch.bfloat16] if has_native_bf16() else [])])
    ]


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
        if device.type != "cuda":
            self._open_rapl(powercap)
            return
        try:
            self._nvml, handle = _nvml_handle(device)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except ImportError:
            self.reason = "no energy counter: the package nvidia-ml-py (pynvml) is not installed"
        except Exception as error:  # NVML has one exception class a failure, all of which mean: not offered
            self.reason = f"NVML does not count energy here ({error})"
        else:
            self._handle, self.source = handle, "NVML, the whole board"

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
