"""This machine: hardware, versions, optional packages, and probes of its rates during a measurement.

It needs no schema of results, so that it runs where only PyTorch is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

import xfm_fast
from xfm_fast.errors import UnavailableError
from xfm_fast.kernels import ops, roofline  # noqa: F401, where all operations of `races` register
from xfm_fast.kernels.backend import compiler_versions
from xfm_fast.kernels.cpu import llvm, waiting
from xfm_fast.kernels.cpu.gemm import compiled
from xfm_fast.kernels.cpu.selection import compare, races
from xfm_fast.kernels.cpu.workspace import keeps_freed_memory

from .timing import DTYPES, timed

# Optional packages: import name, the extra or the way to install it, and further names of distributions.
_OPTIONAL: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "triton": ("triton", "installed with xfm-fast on Linux", ()),
    "tensorrt": ("tensorrt", "tensorrt", ("tensorrt-cu13", "tensorrt-cu12")),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12")),
    "onnxruntime": (
        "onnxruntime",
        "export",
        ("onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
    ),
    "openvino": ("openvino", "openvino", ()),
    "flash-attn": ("flash_attn", "flash-attn", ()),
    "transformers": ("transformers", "hf", ()),
    "timm": ("timm", "hf", ()),
}
_REPORTED = (
    "numpy",
    "triton",
    "tokenizers",
    "safetensors",
    "pillow",
    "torchvision",
    "scikit-image",
    "scikit-learn",
    "transformers",
    "sentence-transformers",
    "timm",
    "onnxruntime",
    "openvino",
)
"""Packages whose versions a document has."""
# Instruction sets: the flag of Linux, and the function of torch.cpu that detects it on other systems.
_FEATURES = {
    "AVX2": ("avx2", "_is_avx2_supported"),
    "AVX-512": ("avx512f", "_is_avx512_supported"),
    "AVX-512 BF16": ("avx512_bf16", "_is_avx512_bf16_supported"),
    "AVX-512 VNNI": ("avx512_vnni", "_is_vnni_supported"),
    "AVX VNNI": ("avx_vnni", ""),
    "AMX": ("amx_tile", "_is_amx_tile_supported"),
    "AMX BF16": ("amx_bf16", ""),
    "AMX INT8": ("amx_int8", ""),
    "NEON": ("asimd", ""),
    "SVE": ("sve", ""),
    "ARM BF16": ("bf16", ""),
    "ARM I8MM": ("i8mm", ""),
}
_BF16_FEATURES = ("AVX-512 BF16", "AMX BF16", "ARM BF16")
# The MLP of one layer of a base-size encoder; on a GPU a GEMM that fills it.
PROBE_SHAPE = {"cpu": (1280, 768, 3072), "cuda": (8192, 8192, 8192)}
# Beyond any cache, and a millisecond of a GPU's time.
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
# A probe that moves by more than this shows that something else ran on the machine.
CONTENTION = 0.10
# An emulated dtype may take seconds for one GEMM.
_PROBE_S = 0.5


@cache
def _cpuinfo() -> dict[str, str]:
    """Read Linux's facts of the first processor; empty elsewhere."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    return facts


def cpu_flags() -> frozenset[str]:
    """Return the instruction-set flags of Linux; empty elsewhere."""
    return frozenset((_cpuinfo().get("flags") or _cpuinfo().get("Features", "")).split())


@cache
def cpu_features() -> dict[str, bool]:
    """Return the instruction sets of this architecture that matter to GEMMs, present or not."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    features = {}
    for name, (flag, probe) in _FEATURES.items():
        if arm != (name.startswith("ARM") or name in ("NEON", "SVE")):
            continue
        features[name] = flag in cpu_flags()
        if probe and not features[name]:
            with suppress(Exception):  # private functions: absent from some versions of PyTorch
                features[name] = bool(getattr(torch.cpu, probe)())
    return features


def has_native_bf16() -> bool:
    """Return whether the processor multiplies bf16 itself; otherwise bf16 is emulated and slower than fp32."""
    return any(cpu_features().get(name, False) for name in _BF16_FEATURES)


def choose_dtypes(
    names: Sequence[str],
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> tuple[list[str], dict[str, str]]:
    """Return the dtypes to measure on a device, and those that it does not offer with the reason.

    No names and `auto` stand for what the processor multiplies itself. Raises `UnavailableError` for an unknown one.
    """
    if names and names != ("auto",):
        if unknown := [name for name in names if name not in DTYPES]:
            raise UnavailableError(
                f"dtype {', '.join(unknown)!r} is unknown; choose from {', '.join(DTYPES)}"
            )
        return list(dict.fromkeys(names)), {}
    if device.type == "cuda" or has_native_bf16():
        return [*DTYPES], {}
    return ["fp32"], {
        "bf16": "not offered by this CPU (no AVX-512 BF16, AMX or ARM BF16); --dtype bf16 emulates it"
    }


def choose_device(name: str | None) -> torch.device:
    """Return the device to measure, by default a GPU if there is one; raises `UnavailableError` if it is absent."""
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UnavailableError(f"PyTorch finds no device {name!r} here; use --device cpu or auto")
    return torch.device(name)


def data_sheet(device: torch.device) -> roofline.GPU | None:
    """Return the peak rates of a GPU with a known data sheet, or None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu for gpu in roofline.GPUS if gpu.name in name), None)


def optional_packages() -> list[dict[str, str | None]]:
    """Return optional packages: `name`, `version` (None if absent), `remedy`, execution providers as `detail`."""
    packages = []
    for name, (module, extra, aliases) in _OPTIONAL.items():
        present, detail = None, ""
        if importlib.util.find_spec(module) is not None:
            versions = filter(None, map(_version, (name, *aliases)))
            present = next(versions, "unknown version")
        if present and name == "onnxruntime":
            try:
                providers = importlib.import_module("onnxruntime").get_available_providers()
                detail = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
            except Exception as error:  # a broken installation is worth a line, not a traceback
                detail = f"does not import ({type(error).__name__}: {error})"
        remedy = extra if " " in extra else f'pip install ".[{extra}]"'
        packages.append({"name": name, "version": present, "remedy": remedy, "detail": detail})
    return packages


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def default_threads() -> int:
    """Return the threads that PyTorch takes by itself, at most one per physical core that this process may use."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), physical, allowed_cores() or physical))


def allowed_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Return what a reader needs to place a measurement: hardware, system, versions, commit."""
    cpu = _cpuinfo().get("model name") or _cpuinfo().get("Model")
    if not cpu and sys.platform == "darwin":
        cpu = _output("sysctl", "-n", "machdep.cpu.brand_string")
    gpus: list[dict[str, Any]] = []
    arch, ptxas, commit = 90, None, None
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": gpu.name,
                "compute_capability": f"{gpu.major}.{gpu.minor}",
                "memory_gb": round(gpu.total_memory / 1e9, 1),
            }
        )
        if index == 0:
            arch = 10 * gpu.major + gpu.minor
    # Without Triton, without its NVIDIA backend, or of a version without this function.
    with suppress(Exception):
        ptxas = compiler_versions(arch)[1]
    folder = Path(__file__).resolve().parents[1]
    if (folder / ".git").exists():
        commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    dirty = bool(_output("git", "-C", str(folder), "status", "--porcelain")) if commit else None
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cpu_features": [name for name, present in cpu_features().items() if present],
        "cpu_flags": sorted(cpu_flags()),
        "native_bf16": has_native_bf16(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "cores_allowed": allowed_cores(),
        "threads": torch.get_num_threads(),
        "threads_wait": waiting.describe(os.environ),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "freed_memory_kept": keeps_freed_memory(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "memory_available_gb": round(psutil.virtual_memory().available / 1e9, 1),
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
        "gpus": gpus,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: _version(name) for name in _REPORTED} | {"ptxas": ptxas},
        "xfm_fast": xfm_fast.__version__,
        "commit": commit,
        "dirty": dirty,
    }


def _output(*command: str) -> str | None:
    """Return the output of a command, or None if it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, timeout=20
        ).strip()
    return None


def choose_paths() -> list[dict[str, Any]]:
    """Compare every operation that has alternatives, in every dtype that this processor multiplies itself.

    Returns:
        Operation, dtype, the chosen implementation and why, FLOP/s of each that passed, and why others were left out.
    """
    paths = []
    for name, dtype in DTYPES.items():
        if name == "bf16" and not has_native_bf16():
            continue
        for operation, race in races().items():
            selection = compare(operation, dtype)
            rates = {
                candidate: race.flops / seconds
                for candidate, seconds in selection.seconds.items()
                if 0 < seconds < math.inf
            }
            paths.append(
                {
                    "operation": selection.operation,
                    "dtype": name,
                    "chosen": selection.chosen,
                    "reason": selection.reason,
                    "flops_per_s": rates,
                    "rejected": selection.rejected,
                }
            )
    return paths


def gpu_counters(device: torch.device) -> Callable[[], tuple[float, float]]:
    """Return a function that reads clock in MHz and temperature in °C by NVML; raises any error of the library."""
    nvml: Any = importlib.import_module("pynvml")
    nvml.nvmlInit()
    # NVML numbers GPUs in another order than CUDA_VISIBLE_DEVICES.
    identifier = str(torch.cuda.get_device_properties(device).uuid)
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{identifier.removeprefix('GPU-')}")

    def read() -> tuple[float, float]:
        clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        return float(clock), float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))

    read()
    return read


def _best_rate(
    amount: float, run: Callable[[], object], device: torch.device, repeats: int = 3
) -> float:
    """Return `amount` per second in the fastest of a few runs."""
    times: list[float] = []
    while len(times) < repeats and sum(times) <= _PROBE_S:
        times.append(timed(run, device)[1])
    return amount / min(times)


class GemmProbe:
    """This machine's GEMM rate in FLOP/s: on a CPU the best of MKL (`F.linear`), oneDNN and our own kernels."""

    def __init__(self, dtype: torch.dtype, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        rows, inputs, outputs = PROBE_SHAPE[device.type]
        generator = torch.Generator().manual_seed(0)
        self.flops, self._device = 2 * rows * inputs * outputs, device
        x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
        weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(device, dtype)
        candidates: dict[str, Callable[[], object]] = {
            "cuBLAS" if x.is_cuda else "MKL": lambda: F.linear(x, weight)
        }
        if not x.is_cuda:
            candidates |= _onednn(x, weight)
            if llvm.why_not(dtype) is None:
                candidates["LLVM"] = lambda: compiled(x, weight, None)
        rates = {}
        with torch.no_grad():
            for name, run in candidates.items():
                with suppress(
                    RuntimeError, AttributeError, NotImplementedError
                ):  # private ops of this build
                    # The first call of a library prepares it, which may take longer than all that is timed.
                    run()
                    rates[name] = _best_rate(self.flops, run, device, 4)
        self.library = max(rates, key=rates.__getitem__)
        self._run = candidates[self.library]

    def __call__(self, repeats: int = 3) -> float:
        """Return the best rate of a few GEMMs."""
        with torch.no_grad():
            return _best_rate(self.flops, self._run, self._device, repeats)


def _onednn(x: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    """Return oneDNN's GEMMs by name, if this build of PyTorch has them: the ops are private."""
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    except (RuntimeError, AttributeError, NotImplementedError):
        return {}
    return {
        "oneDNN": lambda: linear(x, weight, None, "none", [], ""),
        "oneDNN, packed weight": lambda: linear(x, packed, None, "none", [], ""),
    }


def moved(rates: Sequence[float]) -> bool:
    """Return whether a probe left its median by more than `CONTENTION`."""
    median = statistics.median(rates)
    return max(abs(rate / median - 1) for rate in rates) > CONTENTION


@dataclass
class Readings:
    """Readings of the probes, in order of time; `gemm` by dtype, `gpu` the clock in MHz and the temperature in °C."""

    gemm: dict[str, list[float]] = field(default_factory=dict)
    copies: list[float] = field(default_factory=list)
    gpu: list[tuple[float, float]] = field(default_factory=list)

    def contended(self, dtype: str) -> bool:
        """Return whether the GEMM rate in a dtype moved, or in any if this one is not probed."""
        probed = [self.gemm[dtype]] if dtype in self.gemm else [*self.gemm.values()]
        return any(moved(rates) for rates in probed if rates)

    def note(self, dtype: str) -> str:
        """Return warnings about contention during the run."""
        warnings = []
        if self.contended(dtype):
            warnings.append(f"the GEMM rate moved by more than {CONTENTION:.0%}")
        if self.gpu:
            (first_mhz, cold), (last_mhz, warm) = self.gpu[0], self.gpu[-1]
            if moved([mhz for mhz, _ in self.gpu]):
                warnings.append(f"the GPU's clock went from {first_mhz:.0f} to {last_mhz:.0f} MHz")
            if warm - cold > 10:
                warnings.append(f"the GPU warmed from {cold:.0f} to {warm:.0f} °C")
        return "; ".join(warnings)


class MachineProbes:
    """Probes of the GEMM rate in some dtypes, of the copy rate, and of a GPU's clock and temperature."""

    def __init__(self, dtypes: Sequence[str], device: torch.device) -> None:
        self._device, self._gpu = device, None
        if device.type == "cuda":
            with suppress(Exception):  # without NVML these two numbers are missing
                self._gpu = gpu_counters(device)
        self._gemm = {name: GemmProbe(DTYPES[name], device) for name in dtypes}
        self._source = torch.ones(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
        self._target = torch.empty_like(self._source)
        self._copy()

    def _copy(self) -> float:
        """Return bytes per second that a large copy reads and writes."""
        return _best_rate(
            2 * self._source.nbytes, lambda: self._target.copy_(self._source), self._device
        )

    def read(self, into: Readings) -> None:
        """Add one reading of everything."""
        for name, probe in self._gemm.items():
            into.gemm.setdefault(name, []).append(probe())
        into.copies.append(self._copy())
        if self._gpu is not None:
            into.gpu.append(self._gpu())

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return a reading for the head of a document: the fields of `record.Probe` by dtype."""
        rates = {}
        for dtype, probe in self._gemm.items():
            rates[dtype] = {
                "library": probe.library,
                "gemm_flops_per_s": probe(),
                "copy_bytes_per_s": self._copy(),
            }
        return rates
