"""AOTInductor packages: each graph compiled to machine code by PyTorch's own compiler, without ONNX or TensorRT.

A package holds PyTorch's own operators alone, so that a PyTorch without this project loads it. It is native code that
runs when it is loaded: load only those that you made or whose origin you trust.
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
from .request import PackageRequest, completed
from .runtimes import first_line

DEVICES = ("cpu", "cuda")

_BF16_CAPABILITY = 80
# Extensions that compilers make use of for arithmetic, by the names that Linux gives them on x86-64.
_EXTENSIONS = ("amx", "avx", "bmi", "f16c", "fma", "gfni", "sse", "vaes", "vpclmul")
# While one is compiled its weights lie in a library, in an object file and in the package.
_COPIES = 3
# Attention is decomposed by PyTorch here and not by the graphs.
_SPELLING = Profile("primitives", 0)
# What depends on weights alone (such as the joined bias of queries, keys and values in vision) is
# computed when a package is loaded, and not at every call.
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
    """Compile graphs of a model to `<graph>.pt2`, and write `manifest.json` beside them.

    Args:
        model: is left as it is.
        folder: made if it is not there. Packages of the same name in it are replaced.
        request: which graphs, and their form. Packages are bound to the processor and GPU that compiled them.
        source, tokenizer_sha256, examples, companions, progress: see `pipeline.export_graphs`.
        changes: fields of the request.

    Raises:
        UnavailableError: a device, type or graph that is unknown or that this machine or model does not offer.
        InputError: a fixed axis or size that no graph can have.
        StorageError: the folder cannot be written, or has no room for the files.
        ExportError: there is no C++ compiler, or a graph cannot be compiled.
    """
    request = completed(request, PackageRequest, changes)
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
    """Compile a graph to `path`, in an existing folder; nothing half-written stays.

    Args:
        graph: result of `graphs.build`, its parameters in `dtype`.
        fixed: axes that get a constant size; the others stay dynamic.

    Raises:
        ExportError: PyTorch cannot trace or compile it.
        StorageError: the package cannot be written.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.utils import fresh_cache

    try:
        # Whatever the compiler writes goes where room was found, and is gone afterwards.
        with (
            tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch,
            warnings.catch_warnings(action="ignore"),  # about the compiler's own code
            frozen(graph),
        ):
            program = traced(graph, dtype, device, fixed or {})
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


def traced(graph: Graph, dtype: DType, device: str, fixed: Mapping[str, int]) -> torch.export.ExportedProgram:
    """The graph, whose parameters are in `dtype`, as a program on a device."""
    inputs, shapes = tracing_call(graph, DTYPES[dtype], fixed)
    with torch.no_grad(), frozen(graph):
        program = torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
    if device == "cuda":
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(program, device)
    return program


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

    Raises:
        UnavailableError: an unknown device or type, or one that this machine lacks or would have to emulate.
        ExportError: there is no C++ compiler.
    """
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


def _computes(dtype: str) -> bool:
    """True where the products of a type run in it on this processor."""
    probe = {"bf16": "_is_mkldnn_bf16_supported", "fp16": "_is_mkldnn_fp16_supported"}[dtype]
    try:
        return bool(getattr(torch.ops.mkldnn, probe)())
    except (AttributeError, RuntimeError):
        return False
