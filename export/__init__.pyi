"""Names of `xfm_fast.export`, which `xfm_fast/export.py` imports on first use."""

from .engines import export_engines
from .expected import Examples, generated_examples, make_examples
from .library import Samples
from .manifest import Manifest
from .model_repository import write_model_repository
from .onnx import export_onnx
from .quantise import quantize_int8
from .request import EngineRequest, ExportRequest, OnnxRequest, RepositoryOptions, TensorRTRequest
from .runtimes.aoti import PackageRequest, export_packages
from .session import Session
from .verification import verify, verify_export

__all__ = [
    "EngineRequest",
    "Examples",
    "ExportRequest",
    "Manifest",
    "OnnxRequest",
    "PackageRequest",
    "RepositoryOptions",
    "Samples",
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
