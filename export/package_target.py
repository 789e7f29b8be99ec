"""Where compiled packages run: what this machine is, what it must have to compile, and what a package asks of it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from xfm_fast.errors import ExportError, UnavailableError
from xfm_fast.export.consumers import DTYPES
from xfm_fast.export.manifest import PackageTarget

DEVICES = ("cpu", "cuda")

_BF16_CAPABILITY = 80
# Extensions that compilers make use of for arithmetic, by the names that Linux gives them on x86-64.
_EXTENSIONS = ("amx", "avx", "bmi", "f16c", "fma", "gfni", "sse", "vaes", "vpclmul")


def local_target(device: str) -> PackageTarget:
    """This machine, as a package that is compiled on it for a device is bound to it."""
    capability = None
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    return PackageTarget(
        torch=torch.__version__,
        device="cuda" if device == "cuda" else "cpu",
        architecture=platform.machine(),
        instructions=instructions(),
        compute_capability=capability,
    )


def instructions(listing: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Extensions of the instruction set of this processor, sorted; none where the system does not list them."""
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        return []
    x86 = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    if x86 is not None:
        return sorted({name for name in x86 if name.startswith(_EXTENSIONS)})
    return sorted(next((line.partition(":")[2].split() for line in lines if line.startswith("Features")), []))


def check_compiling(device: str, dtype: str) -> None:
    """See that packages can be compiled here, before a checkpoint is read or a graph is traced.

    Args:
        device: `cpu` or `cuda`.
        dtype: fp32, fp16 or bf16.

    Raises:
        UnavailableError: an unknown device or type, or one that this machine lacks or would have to emulate.
        ExportError: there is no C++ compiler.
    """
    if device not in DEVICES:
        raise UnavailableError(f"device {device!r} is unknown; choose from {', '.join(DEVICES)}")
    if dtype not in DTYPES:
        raise UnavailableError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    if device == "cuda":
        _check_gpu(dtype)
    elif dtype != "fp32" and not _computes(dtype):
        others = [name for name in ("fp32", "bf16", "fp16") if name != dtype and (name == "fp32" or _computes(name))]
        raise UnavailableError(
            f"this processor has no {dtype} arithmetic and would emulate it; use --dtype {' or '.join(others)}"
        )
    _check_compiler()


def check_package(target: PackageTarget, here: PackageTarget) -> None:
    """Compare what a package was compiled for with this machine.

    Raises:
        ExportError: names what differs and the remedy.
    """
    again = f"build again with xfm-fast export aoti --device {target.device}"
    if target.torch != here.torch:
        raise ExportError(
            f"these packages were compiled by torch {target.torch} and this process has {here.torch}; install "
            f"torch=={target.torch} or {again}"
        )
    if target.architecture != here.architecture:
        raise ExportError(
            f"these packages hold machine code of {target.architecture} and this machine is {here.architecture}; "
            f"{again} on it"
        )
    # A GPU's kernels do the work, but the code that launches them is of this processor too.
    lacking = sorted(set(target.instructions) - set(here.instructions)) if here.instructions else []
    if lacking:
        raise ExportError(
            f"these packages may use instructions that this processor lacks ({', '.join(lacking)}); {again} on it"
        )
    if target.compute_capability != here.compute_capability:
        raise ExportError(
            f"these packages were compiled for SM{target.compute_capability} and this GPU is "
            f"SM{here.compute_capability}; {again} on it"
        )


def _check_gpu(dtype: str) -> None:
    if not torch.cuda.is_available():
        raise UnavailableError("--device cuda needs an NVIDIA GPU and PyTorch finds none here; use --device cpu")
    major, minor = torch.cuda.get_device_capability()
    if dtype == "bf16" and 10 * major + minor < _BF16_CAPABILITY:
        raise UnavailableError(f"this GPU (SM{major}{minor}) has no bf16 arithmetic; use --dtype fp16")


def _computes(dtype: str) -> bool:
    """Whether the products of a type run in it on this processor."""
    probe = {"bf16": "_is_mkldnn_bf16_supported", "fp16": "_is_mkldnn_fp16_supported"}[dtype]
    try:
        return bool(getattr(torch.ops.mkldnn, probe)())
    except (AttributeError, RuntimeError):
        return False


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of a private module, whose classes move
        raise ExportError(
            "compiling a package needs a C++ compiler and none is found here; install g++ or clang++, or name one in "
            "the environment variable CXX"
        ) from error
