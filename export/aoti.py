"""AOTInductor packages: each graph compiled to machine code by PyTorch, without ONNX or TensorRT.

A package needs PyTorch only, without this project. Loading one runs native code: load only packages that you trust.
"""

from __future__ import annotations

import errno
import os
import platform
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xfm_fast.errors import ExportError, StorageError, UnavailableError
from xfm_fast.models.xfm import XFM

from .consumers import DTYPES, DType, Profile, data_type
from .expected import Examples
from .graphs import Graph, frozen, tracing_call
from .manifest import GraphRecord, Manifest, PackageTarget, package_versions
from .pipeline import Progress, export_graphs, silent
from .request import PackageRequest, with_changes
from .runtimes import first_line

DEVICES = ("cpu", "cuda")

_BF16_CAPABILITY = 80
# Extensions that compilers make use of for arithmetic, by the names that Linux gives them on x86-64.
_EXTENSIONS = ("amx", "avx", "bmi", "f16c", "fma", "gfni", "sse", "vaes", "vpclmul")
# While one is compiled its weights lie in a library, in an object file and in the package.
_COPIES = 3
# Attention is decomposed by PyTorch here and not by the graphs.
_SPELLING = Profile("primitives", 0)
# Subgraphs of weights only (such as the joined QKV bias of vision) are computed on loading, not in every call.
_COMPILER = {"aot_inductor.use_runtime_constant_folding": True}


def export_packages(
    model: XFM,
    folder: str | Path,
    request: PackageRequest | None = None,
    *,
    source: str = "a model in memory",
    tokenizer_sha256: str | None = None,
    examples: Examples | None = None,
    companions: Mapping[str, bytes] = {},
    progress: Progress = silent,
    **changes: Any,
) -> Manifest:
    """Compile graphs of a model to `<graph>.pt2` for this machine, and write `manifest.json`."""
    request = with_changes(request, PackageRequest, changes)
    check_compiling(request.device, request.dtype)

    def write(graph: Graph, record: GraphRecord, content: Manifest) -> list[str]:
        progress(f"compiling {record.name}")
        path = Path(folder, record.file)
        write_package(graph, path, content.dtype, request.device, fixed=graph.own_sizes(content.fixed))
        return [path.name]

    return export_graphs(
        model, Path(folder), request, _SPELLING, write, suffix=".pt2",
        room=lambda sizes: sum(sizes) + _COPIES * max(sizes), kind="aoti", consumer="aoti", opset=None,
        versions=package_versions("torch", "triton"), package=local_target(request.device), source=source,
        tokenizer_sha256=tokenizer_sha256, examples=examples, companions=companions, progress=progress,
    )  # fmt: skip


def write_package(
    graph: Graph, path: Path, dtype: DType, device: str, *, fixed: Mapping[str, int] | None = None
) -> None:
    """Compile a graph, its parameters in `dtype`, to `path`; a failure leaves no partial file."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.utils import fresh_cache

    try:
        # The compiler's files go to the folder with enough space and are removed afterwards.
        with (
            tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch,
            warnings.catch_warnings(action="ignore"),  # about the compiler's own code
            frozen(graph),
        ):
            program = trace(graph, dtype, device, fixed or {})
            made = Path(scratch) / path.name
            with fresh_cache(dir=scratch):
                aoti_compile_and_package(program, package_path=str(made), inductor_configs=_COMPILER)
            made.replace(path)
    except OSError as error:
        raise _not_written(path, error.strerror or str(error)) from error
    except Exception as error:  # the compiler's own classes, which share no public base
        full = os.strerror(errno.ENOSPC)
        if full in str(error):
            # The C++ compiler's last words, somewhere in its output.
            raise _not_written(path, full) from error
        raise ExportError(
            f"PyTorch {torch.__version__} does not compile {path.stem} for {device} in {dtype} ({first_line(error)}); "
            "export it to ONNX, or upgrade PyTorch"
        ) from error


def _not_written(path: Path, reason: str) -> StorageError:
    return StorageError(f"{path} could not be written ({reason}); free space or choose another folder")


def trace(graph: Graph, dtype: DType, device: str, fixed: Mapping[str, int]) -> torch.export.ExportedProgram:
    """The exported program of a graph with parameters in `dtype`, on a device."""
    inputs, shapes = tracing_call(graph, DTYPES[dtype], fixed)
    with torch.no_grad(), frozen(graph):
        program = torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
    if device == "cuda":
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(program, device)
    return program


def local_target(device: str) -> PackageTarget:
    """The package target of this machine."""
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
    """Instruction-set extensions of this processor, sorted; empty where the system does not list them."""
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        return []
    x86 = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    if x86 is not None:
        return sorted({name for name in x86 if name.startswith(_EXTENSIONS)})
    return sorted(next((line.partition(":")[2].split() for line in lines if line.startswith("Features")), []))


def check_compiling(device: str, dtype: str) -> None:
    """Check the compiler, device and dtype before a checkpoint is read."""
    if device not in DEVICES:
        raise UnavailableError(f"device {device!r} is unknown; choose from {', '.join(DEVICES)}")
    data_type(dtype)
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UnavailableError("--device cuda needs an NVIDIA GPU and PyTorch finds none here; use --device cpu")
        major, minor = torch.cuda.get_device_capability()
        if dtype == "bf16" and 10 * major + minor < _BF16_CAPABILITY:
            raise UnavailableError(f"this GPU (SM{major}{minor}) has no bf16 arithmetic; use --dtype fp16")
    elif dtype != "fp32" and not _computes(dtype):
        others = [name for name in ("fp32", "bf16", "fp16") if name != dtype and (name == "fp32" or _computes(name))]
        raise UnavailableError(
            f"this processor has no {dtype} arithmetic and would emulate it; use --dtype {' or '.join(others)}"
        )
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of a private module, whose classes move
        raise ExportError(
            "compiling a package needs a C++ compiler and none is found here; install g++ or clang++, or name one in "
            "the environment variable CXX"
        ) from error


def check_package(target: PackageTarget, here: PackageTarget) -> None:
    """Raise `ExportError` unless this machine runs packages compiled for `target`."""
    facts: list[tuple[str, Any, Any]] = [
        ("torch", target.torch, here.torch),
        ("architecture", target.architecture, here.architecture),
        ("compute capability", target.compute_capability, here.compute_capability),
    ]
    # GPU packages contain launch code for this processor too.
    if here.instructions and (lacking := sorted(set(target.instructions) - set(here.instructions))):
        facts.append(("instructions", ", ".join(lacking), "none of these"))
    for name, built, present in facts:
        if built != present:
            raise ExportError(
                f"these packages were compiled for {name} {built} and this machine has {present}; build again with "
                f"xfm-fast export aoti --device {target.device}"
            )


def _computes(dtype: str) -> bool:
    """Whether this processor has native GEMMs in a dtype."""
    probe = {"bf16": "_is_mkldnn_bf16_supported", "fp16": "_is_mkldnn_fp16_supported"}[dtype]
    try:
        return bool(getattr(torch.ops.mkldnn, probe)())
    except (AttributeError, RuntimeError):
        return False
