"""OpenVINO on the CPU; its tensors are views of torch tensors."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfm_fast.errors import ExportError, UnavailableError

from ..manifest import GraphRecord, Manifest
from ..slots import Slot, output_shapes
from . import Precision, empty_outputs, failed_run

_HINTS = {"fp32": "f32", "bf16": "bf16"}
_FIRST_WITH_ATTENTION = (2026, 4)
"""The oldest version that was seen to read the operator `Attention` of opset 23."""


def open_runtime(
    name: str, manifest: Manifest, device: torch.device | None, precision: Precision | None
) -> OpenVinoModels:
    """See `runtimes.open_runtime`."""
    return OpenVinoModels(manifest, device, precision)


class OpenVinoModels:
    """A `Runtime`; calls of one graph are serialised."""

    def __init__(self, manifest: Manifest, device: torch.device | None, precision: Precision | None) -> None:
        try:
            import openvino
        except ImportError:
            raise UnavailableError("openvino is not installed; pip install 'xfm-fast[openvino]'") from None
        if device is not None and device.type != "cpu":
            raise UnavailableError(f"OpenVINO is used on the CPU here, not on {device}; use device='cpu'")
        if manifest.dtype == "bf16":
            raise UnavailableError(
                "OpenVINO reads no bf16 tensors from NumPy; export with --dtype fp32 and load with precision='bf16'"
            )
        version = openvino.__version__
        known = tuple(int(part) for part in version.split("-")[0].split(".")[:2])
        if manifest.attention == "function" or (manifest.attention == "opset23" and known < _FIRST_WITH_ATTENTION):
            raise ExportError(
                f"this export spells attention as {manifest.attention}, which OpenVINO {version} does not read; export "
                "it with --for openvino"
            )
        if precision is not None and precision not in _HINTS:
            raise UnavailableError(f"precision {precision!r} is unknown; choose from {', '.join(_HINTS)}")
        self._library: Any = openvino
        self._core: Any = openvino.Core()
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in capabilities:
            raise UnavailableError("this processor has no bf16 arithmetic; leave out precision='bf16'")
        self._precision = precision or "fp32"
        self.device = torch.device("cpu")
        self.enqueues = False
        self.description = f"openvino {openvino.__version__.split('-')[0]}, CPU, {self._precision}"

    def load(self, record: GraphRecord, path: Path) -> _OpenVinoGraph:
        """See `Runtime.load`."""
        options = {
            # The default is the fastest dtype, which is bf16 on some processors.
            "INFERENCE_PRECISION_HINT": _HINTS[self._precision],
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            compiled = self._core.compile_model(str(path), "CPU", options)
        except Exception as error:
            raise ExportError(
                f"{self.description} does not load {path.name} ({_reason(error)}); export it again with --for openvino"
            ) from error
        return _OpenVinoGraph(self._library, compiled, record, self.description)


class _OpenVinoGraph:
    """A `LoadedGraph`."""

    def __init__(self, library: Any, compiled: Any, record: GraphRecord, description: str) -> None:
        self._library, self._record, self._description = library, record, description
        self._request: Any = compiled.create_infer_request()
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        outputs = empty_outputs(self._record, output_shapes(self._record, sizes), torch.device("cpu"))
        with self._lock:
            for name, value in {**inputs, **outputs}.items():
                self._request.set_tensor(name, self._library.Tensor(value.numpy(), shared_memory=True))
            try:
                self._request.infer()
            except Exception as error:
                raise failed_run(self._description, self._record.name, inputs, _reason(error)) from error
        return outputs


def _reason(error: Exception) -> str:
    """The message of an error without the places in the library's source."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("Exception from", "Check '")))[:300]
