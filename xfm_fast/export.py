"""Export: ONNX files, TensorRT engines and AOTInductor packages of a model, and the sessions that run them.

    request = OnnxRequest(dtype="fp16", graphs=("vision", "text"))
    export_onnx(model, "exported", request, examples=examples)
    session = Session.load("exported")

Every export writes a folder with `manifest.json`: sizes, checksums, and the comparison with the model on examples.
`quantize_int8` and `write_model_repository` derive further folders. A runtime is a class of the registry
`export.runtimes`. Names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

# The folder `export` has no `__init__.py`, which would hide a distribution of its name from programs that start in
# the checkout; type checkers read its `__init__.pyi`.
__path__ = [str(Path(__file__).with_suffix(""))]

_HOMES = {
    "EngineRequest": "request",
    "TensorRTRequest": "request",
    "Examples": "expected",
    "ExportRequest": "request",
    "Manifest": "manifest",
    "OnnxRequest": "request",
    "PackageRequest": "runtimes.aoti",
    "RepositoryOptions": "request",
    "Samples": "library",
    "Session": "session",
    "export_engines": "engines",
    "export_onnx": "onnx",
    "export_packages": "runtimes.aoti",
    "generated_examples": "expected",
    "make_examples": "expected",
    "quantize_int8": "quantise",
    "verify": "verification",
    "verify_export": "verification",
    "write_model_repository": "model_repository",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
