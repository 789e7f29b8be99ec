"""AOTInductor packages: each graph compiled to machine code by PyTorch, without ONNX or TensorRT.

A package needs PyTorch only, without this project. Loading one runs native code: load only packages that you trust.
"""

from __future__ import annotations

import platform
import tempfile
import warnings
from collections.abc import Mapping
from collections.abc import (
    Sequence as Sequence,
)  # the command line resolves inherited annotations here
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xfm_fast.errors import ExportError, UnavailableError

from ..request import DType as DType
from ..request import ExportRequest
from . import (
    LoadedGraph,
    RunFunction,
    Runtime,
    Spelling,
    data_type,
    failed_run,
    first_line,
    register,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..graphs import Graph
    from ..manifest import GraphRecord, Manifest, PackageTarget

# Extensions that compilers make use of for arithmetic, by the names that Linux gives them.
_EXTENSIONS = (
    "amx",
    "asimd",
    "avx",
    "bf16",
    "bmi",
    "f16c",
    "fma",
    "gfni",
    "i8mm",
    "sse",
    "sve",
    "vaes",
    "vpclmul",
)
# Subgraphs of weights only (such as the joined QKV bias of vision) are computed on loading, not in every call.
_COMPILER = {"aot_inductor.use_runtime_constant_folding": True}


@dataclass(frozen=True)
class PackageRequest(ExportRequest):
    """Graphs as AOTInductor packages.

    Attributes:
        device: Device of this machine that runs the packages.
    """

    device: Literal["cpu", "cuda"] = "cpu"

    def check(self) -> None:
        """Check device and dtype before a checkpoint is read."""
        import torch

        data_type(self.dtype)
        if self.device != "cpu" and not (self.device == "cuda" and torch.cuda.is_available()):
            raise UnavailableError(
                f"device {self.device!r} is not available to PyTorch here; use --device cpu"
            )


@register
class AOTInductor(Runtime):
    """Packages of one PyTorch and one kind of machine; calls of one graph are serialised."""

    name = kind = "aoti"
    title = "AOTInductor"
    package = "torch"
    request = PackageRequest
    exporter = f"{__name__}:export_packages"
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
        for name in ("torch", "architecture", "compute_capability"):
            if getattr(target, name) != getattr(here, name):
                lacking.append(f"{name} {getattr(target, name)} (here {getattr(here, name)})")
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

    def load(self, record: GraphRecord, path: Path) -> LoadedGraph:
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
            return {
                tensor.name: value for tensor, value in zip(record.outputs, results, strict=True)
            }

        return RunFunction(run)


def export_packages(
    model: Any,
    folder: str | Path,
    request: PackageRequest | None = None,
    *,
    consumer: str = "aoti",
    **given: Any,
) -> Manifest:
    """Compile graphs of a model to `<graph>.pt2` for this machine, and write `manifest.json`."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.utils import fresh_cache

    from ..graphs import trace
    from ..manifest import package_versions
    from ..pipeline import export_graphs, split_request

    request, facts = split_request(request, PackageRequest, given)
    request.check()

    def write(graph: Graph, record: GraphRecord, content: Manifest) -> list[str]:
        try:
            # The compiler's files go to the folder with enough space and are removed afterwards.
            with (
                tempfile.TemporaryDirectory(dir=folder, prefix=f".{record.file}.") as scratch,
                warnings.catch_warnings(action="ignore"),  # about the compiler's own code
                fresh_cache(dir=scratch),
            ):
                program = trace(graph, request.dtype, content.fixed, request.device)
                made = Path(scratch, record.file)
                aoti_compile_and_package(
                    program, package_path=str(made), inductor_configs=_COMPILER
                )
                made.replace(Path(folder, record.file))
        except Exception as error:  # the compiler's own classes, which share no public base
            raise ExportError(
                f"PyTorch does not compile {record.name} for {request.device} in {request.dtype} "
                f"({first_line(error)}); see that {folder} has space, export to ONNX, or upgrade PyTorch"
            ) from error
        return [record.file]

    # During compilation the weights lie in a library, in an object file and in the package. PyTorch decomposes
    # attention by itself.
    return export_graphs(
        model, Path(folder), request, Spelling("primitives", 0), write, suffix=".pt2", kind="aoti",
        room=lambda sizes: sum(sizes) + 3 * max(sizes), consumer=consumer, opset=None,
        versions=package_versions("torch", "triton"), package=local_target(request.device), **facts,
    )  # fmt: skip


def local_target(device: Literal["cpu", "cuda"]) -> PackageTarget:
    """The package target of this machine; instruction sets where the system lists them."""
    import torch

    from ..manifest import PackageTarget

    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    flags = next(
        (
            line.partition(":")[2].split()
            for line in lines
            if line.startswith(("flags", "Features"))
        ),
        [],
    )
    major, minor = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return PackageTarget(
        torch=torch.__version__,
        device=device,
        architecture=platform.machine(),
        instructions=sorted({flag for flag in flags if flag.startswith(_EXTENSIONS)}),
        compute_capability=10 * major + minor or None,
    )
