"""Exports: graphs of a model as ONNX files, engines of TensorRT, packages of PyTorch's compiler, and what runs them.

    request = OnnxRequest(dtype="fp16", graphs=("vision", "text"))
    export_onnx(model, "exported", request, examples=examples)
    session = Session.load("exported")

A request says what is exported. `export_onnx`, `export_engines` and `export_packages` write a folder whose
`manifest.json` says what lies in it, and whether it was found to agree with the model on examples; `verify_export` and
`verify` compare later. `quantize_int8` and `write_model_repository` make other folders of an export, and a `Session`
runs it under the names of the model. Names are imported when they are first used.
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
