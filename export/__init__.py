"""Export: ONNX files, TensorRT engines and AOTInductor packages of a model, and the sessions that run them.

    request = OnnxRequest(dtype="fp16", graphs=("vision", "text"))
    export_onnx(model, "exported", request, examples=examples)
    session = Session.load("exported")

Every export writes a folder with `manifest.json`: sizes, checksums, and the comparison with the model on examples.
`quantize_int8` and `write_model_repository` derive further folders. Names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aoti import export_packages as export_packages
    from .engines.build import export_engines as export_engines
    from .expected import Examples as Examples
    from .expected import generated_examples as generated_examples
    from .expected import make_examples as make_examples
    from .manifest import Manifest as Manifest
    from .model_repository.repository import write_model_repository
    from .onnx import export_onnx as export_onnx
    from .quantise import quantize_int8 as quantize_int8
    from .request import EngineRequest as EngineRequest
    from .request import ExportRequest as ExportRequest
    from .request import OnnxRequest as OnnxRequest
    from .request import PackageRequest as PackageRequest
    from .request import RepositoryOptions as RepositoryOptions
    from .request import TensorRTRequest as TensorRTRequest
    from .session import Session as Session
    from .verification import verify as verify
    from .verification import verify_export as verify_export

_HOMES = {
    "EngineRequest": "request",
    "Examples": "expected",
    "ExportRequest": "request",
    "Manifest": "manifest",
    "OnnxRequest": "request",
    "PackageRequest": "request",
    "RepositoryOptions": "request",
    "Session": "session",
    "TensorRTRequest": "request",
    "export_engines": "engines.build",
    "export_onnx": "onnx",
    "export_packages": "aoti",
    "generated_examples": "expected",
    "make_examples": "expected",
    "quantize_int8": "quantise",
    "verify": "verification",
    "verify_export": "verification",
    "write_model_repository": "model_repository.repository",
}

__all__ = [
    "EngineRequest",
    "Examples",
    "ExportRequest",
    "Manifest",
    "OnnxRequest",
    "PackageRequest",
    "RepositoryOptions",
    "Session",
    "TensorRTRequest",
    "export_engines",
    "export_onnx",
    "export_packages",
    "generated_examples",
    "make_examples",
    "quantize_int8",
    "verify",
    "verify_export",
    "write_model_repository",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
