"""A bf16 export by ONNX Runtime on the CPU, its arithmetic in fp32: for comparisons, since it is not what was exported.

It tells whether the graphs are right and what the rounding of weights, inputs and outputs costs. That of the
arithmetic it leaves out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from xfm_fast.errors import StorageError
from xfm_fast.export.manifest import GraphRecord, Manifest, TensorRecord
from xfm_fast.export.runtimes import LoadedGraph
from xfm_fast.export.runtimes.onnx_sessions import OnnxSessions
from xfm_fast.export.shape_slots import Slot
from xfm_fast.export.widening import widen


class WidenedOnnx:
    """A `Runtime`."""

    def __init__(self, manifest: Manifest) -> None:
        self._wide = OnnxSessions(manifest.model_copy(update={"dtype": "fp32"}), torch.device("cpu"))
        self.device, self.enqueues = self._wide.device, self._wide.enqueues
        self.description = f"{self._wide.description}, bf16 graphs computed in fp32"

    def load(self, record: GraphRecord, path: Path) -> LoadedGraph:
        """See `Runtime.load`."""
        try:
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / path.name
                widen(path, out)
                return _WidenedGraph(self._wide.load(_widened(record), out))
        except OSError as error:
            raise StorageError(
                f"{path.name} could not be copied in fp32 to {tempfile.gettempdir()} ({error.strerror or error}); free "
                "space there, or set TMPDIR to another folder"
            ) from error


class _WidenedGraph:
    """A `LoadedGraph` with bf16 outside and fp32 inside."""

    def __init__(self, wide: LoadedGraph) -> None:
        self._wide = wide

    def run(self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        given = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        return {name: value.bfloat16() for name, value in self._wide.run(given, slot, sizes).items()}


def _widened(record: GraphRecord) -> GraphRecord:
    def wide(tensors: list[TensorRecord]) -> list[TensorRecord]:
        narrow = {"bfloat16": "float32"}
        return [tensor.model_copy(update={"dtype": narrow.get(tensor.dtype, tensor.dtype)}) for tensor in tensors]

    return record.model_copy(update={"inputs": wide(record.inputs), "outputs": wide(record.outputs)})
