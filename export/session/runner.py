"""The graphs of an export folder, loaded and warm: each takes any sizes that its slots allow, padded where need be."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import ExportError, UnavailableError
from xfm_fast.memory import resident_bytes

from ..consumers import DTYPES
from ..graphs import GraphName
from ..manifest import Manifest
from ..runtimes import TORCH_DTYPES, LoadedGraph, Precision, Runtime, choose_runtime, empty_outputs, open_runtime
from ..slots import (  # fmt: skip
    Slot,
    axes_of,
    choose_slot,
    graph_slots,
    largest,
    output_shapes,
    pad_tensor,
    request_sizes,
    tensor_shape,
    trim_tensor,
)

_WARM_SIZES = {"batch": 1, "texts": 4, "length": 16}


@dataclass(frozen=True)
class LoadReport:
    """The cost of loading a graph.

    Attributes:
        load_seconds: reading and preparing it.
        warm_seconds: its first runs, one for every slot.
        memory_bytes: by which memory in use grew: of the process, or of the GPU.
    """

    load_seconds: float
    warm_seconds: float
    memory_bytes: int


class GraphRunner:
    """Runs the graphs of a folder; the constructor reads none of them yet, `warm_up` does.

    Attributes:
        manifest: of the export.
        config: sizes of the model.
        device: where results are; inputs are brought there.
        dtype: of embeddings and results.
        loaded: by graph, what loading took.
    """

    def __init__(
        self,
        folder: str | Path,
        runtime: str | Runtime = "auto",
        device: torch.device | str | None = None,
        *,
        precision: Precision | None = None,
        verify_files: bool = True,
        manifest: Manifest | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder, check_files=verify_files) if manifest is None else manifest
        self.config: XFMConfig = self.manifest.xfm_config
        if isinstance(runtime, str):
            name = choose_runtime(self.manifest, self.folder) if runtime == "auto" else runtime
            runtime = open_runtime(name, self.manifest, device, precision)
        self.runtime: Runtime = runtime
        self.device: torch.device = self.runtime.device
        self.dtype: torch.dtype = DTYPES[self.manifest.dtype]
        self.loaded: dict[GraphName, LoadReport] = {}
        self._graphs: dict[GraphName, LoadedGraph] = {}
        self._slots = {record.name: graph_slots(record) for record in self.manifest.graphs}
        self._ready = False

    @property
    def ready(self) -> bool:
        """True when all graphs are loaded and warm."""
        return self._ready

    @property
    def description(self) -> str:
        """Library, version and device."""
        return self.runtime.description

    def warm_up(self) -> None:
        """Load every graph and run it once in every slot; `ready` is true afterwards.

        Raises:
            ExportError: a graph cannot be loaded or run.
        """
        for record in self.manifest.graphs:
            if record.name in self._graphs:
                continue
            before, started = self.memory_in_use(), time.perf_counter()
            graph = self.runtime.load(record, self.folder / record.file)
            loaded = time.perf_counter()
            self._graphs[record.name] = graph
            for slot in self._slots[record.name]:
                self.call(record.name, self.example_inputs(record.name, slot))
            self.synchronize()
            self.loaded[record.name] = LoadReport(
                loaded - started, time.perf_counter() - loaded, max(self.memory_in_use() - before, 0)
            )
        self._ready = True

    def slots(self, graph: GraphName) -> Sequence[Slot]:
        """The shapes that a graph accepts."""
        self.require(graph)
        return self._slots[graph]

    def example_inputs(self, graph: GraphName, slot: Slot, sizes: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """Inputs of zeros, ids and full masks, at the given sizes, or at those that the slot was tuned for."""
        sizes = slot.example(_WARM_SIZES) if sizes is None else sizes
        made = {}
        for tensor in self.manifest.graph(graph).inputs:
            filling = {"attention_mask": 1, "input_ids": self.config.eos_token_id}.get(tensor.name, 0)
            made[tensor.name] = torch.full(
                tensor_shape(tensor, sizes), filling, dtype=TORCH_DTYPES[tensor.dtype], device=self.device
            )
        return made

    def synchronize(self) -> None:
        """Wait for results that are still being computed, on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory_in_use(self) -> int:
        """Bytes: of this process, or of the whole GPU."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return total - free
        return resident_bytes()

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One graph: all inputs by name, all outputs by name.

        Sizes that no slot has are padded to the next one, and the results are cut to what was asked for.

        Raises:
            InputError: inputs that do not fit the graph, or sizes beyond every profile; names axis, size and range.
            ExportError: the graph is not in this export.
            UnavailableError: the session is not ready.
        """
        with torch.inference_mode():
            return self.call(self.require(graph), inputs)

    def call(self, name: GraphName, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        record = self.manifest.graph(name)
        sizes = request_sizes(record, inputs)
        slot, padded = choose_slot(name, self._slots[name], sizes)
        prepared = {}
        for tensor in record.inputs:
            value = inputs[tensor.name].detach().to(self.device, TORCH_DTYPES[tensor.dtype])
            filling = self.config.pad_token_id if tensor.name == "input_ids" else 0
            prepared[tensor.name] = pad_tensor(value, axes_of(tensor), padded, filling).contiguous()
        outputs = self._graphs[name].run(prepared, slot, padded)
        if padded == sizes:
            return outputs
        return {output.name: trim_tensor(outputs[output.name], axes_of(output), sizes) for output in record.outputs}

    def require(self, name: str) -> GraphName:
        if name not in self.manifest.graph_names:
            raise ExportError(
                f"graph {name!r} is not in {self.folder} (it has: {', '.join(self.manifest.graph_names)}); export it "
                f"with --graphs"
            )
        if not self._ready:
            raise UnavailableError("this session is not ready; call warm_up() first, or open it with Session.load")
        return name

    def parts(self, name: GraphName, batch: Tensor) -> Sequence[Tensor]:
        """The rows of a batch in parts that the graph takes."""
        most = largest(self._slots[name], "batch")
        if not len(batch):
            return ()
        return (batch,) if most is None else batch.split(most)

    def joined(self, name: GraphName, passes: Sequence[dict[str, Tensor]], batch: int) -> dict[str, Tensor]:
        if len(passes) == 1:
            return passes[0]
        if not passes:
            return self.zeros(name, {"batch": batch})
        return {output: torch.cat([made[output] for made in passes]) for output in passes[0]}

    def zeros(self, name: GraphName, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        record = self.manifest.graph(name)
        made = empty_outputs(record, output_shapes(record, sizes), self.device)
        return {output: value.zero_() for output, value in made.items()}
