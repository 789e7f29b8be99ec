"""Graphs that a server runs, seen as a runtime, so that a `Session` plans their passes as it does for local ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..manifest import GraphRecord
from ..slots import Slot

Infer = Callable[[str, Mapping[str, Tensor], Sequence[str]], dict[str, Tensor]]
"""Runs a model by its name: inputs by name and the names of the outputs → outputs that the caller owns.

Raises `ExportError` when the model is not there or fails.
"""


def model_name(prefix: str, graph: str) -> str:
    """The name of the model that serves a graph."""
    return f"{prefix}_{graph}"


class ServedRuntime:
    """A `Runtime` whose graphs are models of the server.

    Args:
        infer: how a model is run.
        prefix: of the names of the models.
        device: of the tensors that go in and come out.
    """

    enqueues = False

    def __init__(self, infer: Infer, prefix: str, device: torch.device) -> None:
        self.description = f"models {prefix}_* of the server ({device})"
        self.device = device
        self._infer, self._prefix = infer, prefix

    def load(self, record: GraphRecord, path: Path) -> ServedGraph:
        """The model of a graph; the server has loaded it, or has not yet."""
        return ServedGraph(self._infer, model_name(self._prefix, record.name), [out.name for out in record.outputs])


class ServedGraph:
    """A `LoadedGraph` in the server."""

    def __init__(self, infer: Infer, name: str, outputs: Sequence[str]) -> None:
        self._infer, self._name, self._outputs = infer, name, outputs

    def run(self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """See `LoadedGraph`."""
        return self._infer(self._name, inputs, self._outputs)
