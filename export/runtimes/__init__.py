"""Runtimes of exported graphs: one module per library, torch tensors in and out.

The modules have other names than the packages that they import.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from xfm_fast.errors import ExportError, UnavailableError

from ..manifest import GraphRecord, Manifest
from ..request import RuntimeName
from ..slots import Slot

RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)

Precision = Literal["fp32", "bf16"]
"""In which type OpenVINO computes an fp32 graph; bf16 trades digits for speed on processors that have it."""

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}

_MODULES: dict[RuntimeName, str] = {
    "onnxruntime": "onnx_sessions",
    "openvino": "openvino_models",
    "tensorrt-rtx": "tensorrt_engines",
    "tensorrt": "tensorrt_engines",
    "aoti": "aoti_packages",
}


class LoadedGraph(Protocol):
    """A graph that is ready to run."""

    def run(self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """All outputs by name, for contiguous inputs on the runtime's device with the sizes of a slot."""
        ...


class Runtime(Protocol):
    """A library on a device."""

    description: str
    device: torch.device
    enqueues: bool

    def load(self, record: GraphRecord, path: Path) -> LoadedGraph:
        """Read a graph; raises `ExportError` where the library cannot load it."""
        ...


def choose_runtime(manifest: Manifest, folder: Path) -> RuntimeName:
    """The runtime that `auto` stands for; raises `ExportError` for AOTInductor packages, which run code on loading."""
    if manifest.kind == "aoti":
        raise ExportError(
            f"{folder} holds AOTInductor packages, native code that runs when it is loaded; if you trust "
            "their origin, ask for it by name: runtime='aoti', or --runtime aoti on the command line"
        )
    if manifest.kind != "onnx":
        return manifest.kind
    preferred: tuple[RuntimeName, ...] = ("onnxruntime", "openvino")
    if manifest.consumer == "openvino":
        preferred = ("openvino", "onnxruntime")
    for name in preferred:
        if importlib.util.find_spec(name) is not None:
            return name
    return preferred[0]


def open_runtime(
    name: str, manifest: Manifest, device: torch.device | str | None, precision: Precision | None
) -> Runtime:
    """The runtime of a name, on a device, for an export; `precision` is for OpenVINO."""
    if name not in _MODULES:
        raise UnavailableError(f"runtime {name!r} is unknown; choose from auto, {', '.join(RUNTIMES)}")
    kind = "onnx" if name in ("onnxruntime", "openvino") else name
    if manifest.kind != kind:
        fitting = "aoti" if manifest.kind == "aoti" else "auto"
        raise ExportError(
            f"runtime {name!r} runs {kind} and this export holds {manifest.kind}; load it with runtime={fitting!r}, or "
            f"export again with xfm-fast export {kind}"
        )
    if precision is not None and name != "openvino":
        raise UnavailableError(f"precision={precision!r} is a matter of OpenVINO; {name} computes in the export's type")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return module.open_runtime(name, manifest, None if device is None else torch.device(device), precision)


def failed_run(description: str, graph: str, inputs: Mapping[str, Tensor], reason: str) -> ExportError:
    """The error of a graph that loaded but does not run."""
    shapes = ", ".join(f"{name} {[*value.shape]}" for name, value in inputs.items())
    return ExportError(f"{description} failed in graph {graph!r} on {shapes} ({reason}); try smaller batches")


def first_line(error: Exception) -> str:
    """The first line of a library's error message, or the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def empty_outputs(record: GraphRecord, shapes: Mapping[str, torch.Size], device: torch.device) -> dict[str, Tensor]:
    """Uninitialised memory for the outputs of a graph."""
    return {
        output.name: torch.empty(shapes[output.name], dtype=TORCH_DTYPES[output.dtype], device=device)
        for output in record.outputs
    }
