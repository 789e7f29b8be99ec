"""The plainest way to run exported ONNX files: ONNX Runtime on the CPU, a session per graph, nothing tuned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfm_fast.errors import ExportError, UnavailableError
from xfm_fast.export.manifest import Manifest


class OnnxRunner:
    """Runs the graphs of a folder; sessions are made when they are first needed.

    Raises:
        UnavailableError: `onnxruntime` is not installed, or cannot run the type of the export on a CPU.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UnavailableError(
                "onnxruntime is not installed, so nothing here runs the export; pip install 'xfm-fast[export]'"
            ) from None
        if manifest.dtype == "bf16":
            raise UnavailableError("no runtime on this machine runs bf16: ONNX Runtime has no bf16 kernels for the CPU")
        self.description = f"onnxruntime {onnxruntime.__version__}, CPU"
        self._library: Any = onnxruntime
        self._folder, self._manifest = folder, manifest
        self._sessions: dict[str, Any] = {}

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `verification.Runner`."""
        session = self._session(graph)
        names = [output.name for output in self._manifest.graph(graph).outputs]
        arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in inputs.items()}
        return {name: torch.from_numpy(value) for name, value in zip(names, session.run(names, arrays), strict=True)}

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            path = self._folder / self._manifest.graph(graph).file
            options = self._library.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = torch.get_num_threads()
            try:
                self._sessions[graph] = self._library.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # the library's own classes, which share no public base
                raise ExportError(
                    f"{self.description} does not load {path.name} ({error}); export it for another consumer or opset"
                ) from error
        return self._sessions[graph]
