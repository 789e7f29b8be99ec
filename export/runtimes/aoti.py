"""AOTInductor packages: each graph compiled to machine code by PyTorch, without ONNX or TensorRT.

A package needs PyTorch only, without this project. Loading one runs native code: load only packages that you trust.
"""

from __future__ import annotations

import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xfm_fast.errors import ExportError, UnavailableError

from ..request import ExportRequest
from . import (
    Exporter,
    Runtime,
    Spelling,
    check_dtype,
    failed_run,
    first_line,
    register,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..graphs import Graph
    from ..manifest import GraphRecord, Manifest, PackageTarget
    from . import RunGraph

# Instruction sets that compilers use for arithmetic: prefixes of the flags in /proc/cpuinfo.
_EXTENSIONS = re.compile("amx|asimd|avx|bf16|bmi|f16c|fma|gfni|i8mm|sse|sve|vaes|vpclmul")
# Subgraphs of weights only (such as the joined QKV bias of vision) are computed on loading, not in every call.
_COMPILER = {"aot_inductor.use_runtime_constant_folding": True}


@dataclass(frozen=True)
class PackageRequest(ExportRequest):
    """Graphs as AOTInductor packages.

    Attributes:
        device: Device of this machine that runs the packages.
    """

    device: Literal["cpu", "cuda"] = "cpu"


@register
class AOTInductor(Runtime):
    """Packages for one PyTorch and one kind of machine; calls of the same graph are serialised."""

    name = kind = "aoti"
    title = "AOTInductor"
    package = "torch"
    request = PackageRequest
    artefact = "packages of native code that runs when it is loaded"
    automatic = False

    def __init__(self, manifest: Manifest, device: torch.device | None = None) -> None:
        import torch

        target = manifest.package
        if target is None:
            raise ExportError(
                "the manifest of these packages does not say what they were compiled for; export again"
            )
        if device is not None and device.type != target.device:
            raise UnavailableError(
                f"these packages were compiled for {target.device}, not for {device.type}"
            )
        if target.device == "cuda" and not torch.cuda.is_available():
            raise UnavailableError(
                "these packages were compiled for an NVIDIA GPU and PyTorch finds none here"
            )
        here = local_target(target.device)
        lacking = sorted({*target.instructions} - {*here.instructions}) if here.instructions else []
        for field in ("torch", "architecture", "compute_capability"):
            if getattr(target, field) != getattr(here, field):
                lacking.append(f"{field} {getattr(target, field)} (here {getattr(here, field)})")
        if lacking:
            raise ExportError(
                f"these packages were compiled for a machine with {', '.join(lacking)}; build them again here with "
                f"xfm-fast export --to aoti --device {target.device}"
            )
        self.device = torch.device("cpu")
        if target.device == "cuda":
            index = None if device is None else device.index
            self.device = torch.device(
                "cuda", torch.cuda.current_device() if index is None else index
            )
        self.description = f"AOTInductor of torch {torch.__version__}, {target.device.upper()}"

    @classmethod
    def exporter(cls) -> Exporter:
        """See `Runtime.exporter`."""
        return Exporter(check_request, _start)

    def load(self, record: GraphRecord, path: Path) -> RunGraph:
        """See `Runtime.load`."""
        from torch._inductor import aoti_load_package

        try:
            index = self.device.index
            package: Any = aoti_load_package(str(path), device_index=-1 if index is None else index)
        except Exception as error:  # of the loader, which has no errors of its own
            raise ExportError(
                f"{self.description} does not load {path.name} ({first_line(error)}); build it on this machine"
            ) from error

        def run(inputs: Mapping[str, Tensor], slot: Any, sizes: Any) -> dict[str, Tensor]:
            try:
                results = package(*(inputs[tensor.name] for tensor in record.inputs))
            except Exception as error:
                raise failed_run(
                    self.description, record.name, inputs, first_line(error)
                ) from error
            names = [tensor.name for tensor in record.outputs]
            return dict(zip(names, results, strict=True))

        return run


def check_request(request: PackageRequest) -> None:
    """Check the dtype and the device of a request."""
    import torch

    check_dtype(request.dtype)
    if request.device != "cpu" and not (request.device == "cuda" and torch.cuda.is_available()):
        raise UnavailableError(
            f"device {request.device!r} is not available to PyTorch here; use --device cpu"
        )


@contextmanager
def _start(
    model: Any, folder: str | Path, request: PackageRequest | None = None, **options: Any
) -> Iterator[Callable[[], Manifest]]:
    manifest = export_packages(model, folder, request, **options)
    yield lambda: manifest


def export_packages(
    model: Any, folder: str | Path, request: PackageRequest | None = None, **options: Any
) -> Manifest:
    """Compile graphs of a model to `<graph>.pt2` for this machine, and write `manifest.json`."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.utils import fresh_cache

    from ..manifest import package_versions
    from ..pipeline import export_graphs, split_request, trace

    request, facts = split_request(request, PackageRequest, options)
    check_request(request)

    def write(graph: Graph, record: GraphRecord, content: Manifest) -> list[str]:
        try:
            # The compiler's files go to the folder with enough space and are removed afterwards.
            with (
                tempfile.TemporaryDirectory(dir=folder, prefix=f".{record.file}.") as scratch,
                warnings.catch_warnings(action="ignore"),  # about the compiler's own code
                fresh_cache(dir=scratch),
            ):
                program = trace(graph, request.dtype, content.fixed, request.device)
                package = Path(scratch, record.file)
                aoti_compile_and_package(
                    program, package_path=str(package), inductor_configs=_COMPILER
                )
                package.replace(Path(folder, record.file))
        except Exception as error:  # the compiler's own classes, which share no public base
            raise ExportError(
                f"PyTorch does not compile {record.name} for {request.device} in {request.dtype} "
                f"({first_line(error)}); see that {folder} has space, export to ONNX, or upgrade PyTorch"
            ) from error
        return [record.file]

    return export_graphs(
        model,
        Path(folder),
        request,
        Spelling("primitives", 0),  # PyTorch decomposes attention by itself
        write,
        suffix=".pt2",
        # During compilation the weights lie in a library, in an object file and in the package.
        room=lambda sizes: sum(sizes) + 3 * max(sizes),
        runtime=AOTInductor.name,
        kind=AOTInductor.kind,
        consumer=AOTInductor.name,
        opset=None,
        versions=package_versions("torch", "triton"),
        package=local_target(request.device),
        **facts,
    )


def local_target(device: Literal["cpu", "cuda"]) -> PackageTarget:
    """Describe this machine as a target; instruction sets only where the system lists them."""
    import torch

    from ..manifest import PackageTarget

    flags: list[str] = []
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text().splitlines() if listing.exists() else ():
        if line.startswith(("flags", "Features")):
            flags = line.partition(":")[2].split()
            break
    major, minor = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return PackageTarget(
        torch=torch.__version__,
        device=device,
        architecture=platform.machine(),
        instructions=sorted({flag for flag in flags if _EXTENSIONS.match(flag)}),
        compute_capability=10 * major + minor or None,
    )
