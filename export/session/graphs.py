"""The graphs of an export in a runtime, with their inputs padded to the sizes that they accept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import torch
from torch import Tensor

from xfm_fast.errors import ExportError, UnavailableError, XFMError, explain_types

from ..manifest import MANIFEST_FILE, Manifest
from ..request import GraphName, Precision
from ..runtimes import Runtime, choose_runtime, first_line, open_runtime
from ..slots import (
    TORCH_DTYPES,
    Slot,
    choose_slot,
    empty_tensors,
    graph_slots,
    largest,
    pad_tensor,
    request_sizes,
    trim_tensor,
)

if TYPE_CHECKING:
    from ..runtimes import RunGraph

# Inputs that are filled up with the padding token.
_PADDED = ("input_ids", "packed_ids")
TOKENS = (*_PADDED, "token_ids")
"""Inputs that hold ids of tokens."""


class GraphSession:
    """Runs the graphs of an export folder.

    Several threads may call a session: ONNX Runtime runs their calls in parallel, other runtimes serialise calls of the
    same graph. Load and warm up in one thread; the constructor reads no graph, `warm_up` does.

    Attributes:
        manifest: The export's `manifest.json`.
        device: Device of the results; inputs are moved there.
        padding_id: Token that fills up ids.
        example_id: Token of the inputs that warm up.
    """

    padding_id: int = 0
    example_id: int = 0

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
        self.manifest = (
            Manifest.load(self.folder, check_files=verify_files) if manifest is None else manifest
        )
        if isinstance(runtime, str):
            name = choose_runtime(self.manifest, self.folder) if runtime == "auto" else runtime
            runtime = open_runtime(name, self.manifest, device, precision)
            self.manifest.require_files(self.folder)
        self.runtime: Runtime = runtime
        self.device: torch.device = self.runtime.device
        self._graphs: dict[GraphName, RunGraph] = {}
        try:
            self._slots = {record.name: graph_slots(record) for record in self.manifest.graphs}
        except (LookupError, TypeError, ValueError) as error:
            raise ExportError(
                f"{MANIFEST_FILE} in {folder} describes inputs that no graph has ({type(error).__name__}: {error}); "
                "export again"
            ) from None
        self._ready = False

    @classmethod
    @explain_types
    def load(
        cls,
        folder: str | Path,
        runtime: str = "auto",
        device: torch.device | str | None = None,
        *,
        precision: Precision | None = None,
        verify_files: bool = True,
    ) -> Self:
        """Load an export and run every graph once in every profile.

        Args:
            folder: An export.
            runtime: A name in `xfm_fast.export.runtimes.RUNTIMES`, or `auto` for the runtime of the export. `auto`
                never loads packages, which run native code: name their runtime for packages that you trust. Treat
                TensorRT engines with the same care.
            device: `cpu`, `cuda` or `cuda:1`; by default a GPU where runtime and machine have one.
            precision: Dtype of the arithmetic, where the runtime offers it for fp32 exports; by default the export's.
            verify_files: Compare sizes and checksums of all files with the manifest, which reads them once more.

        Raises:
            ExportError: The files differ from the manifest, the export failed verification, it is for another runtime,
                version or GPU, it holds packages and `runtime` is `auto`, or a graph does not load.
            UnavailableError: The runtime is not installed, or lacks the device or dtype.
        """
        session_class = cast("type[Self]", cls.class_of(Path(folder)))
        session = session_class(
            folder, runtime, device, precision=precision, verify_files=verify_files
        )
        if session.manifest.status == "failed":
            raise ExportError(
                f"{folder} differs from the model that it was made from ({session.manifest.reason}); export it again, "
                "in another dtype or for another consumer"
            )
        session.warm_up()
        return session

    @classmethod
    def class_of(cls, folder: Path) -> type[GraphSession]:
        """Return the class that `load` opens an export with."""
        return cls

    @property
    def ready(self) -> bool:
        """True when all graphs are loaded and warm."""
        return self._ready

    @property
    def description(self) -> str:
        """Library, version and device."""
        return self.runtime.description

    def warm_up(self) -> None:
        """Load every graph and run it once in every slot; `ready` is True afterwards.

        Raises:
            ExportError: A graph does not load or run.
        """
        for record in self.manifest.graphs:
            if record.name in self._graphs:
                continue
            self._graphs[record.name] = self.runtime.load(record, self.folder / record.file)
            try:
                for slot in self._slots[record.name]:
                    self.call(record.name, self.example_inputs(record.name, slot.example()))
                self.synchronize()
            except (LookupError, RuntimeError, TypeError, ValueError) as error:
                if isinstance(error, XFMError):
                    raise
                raise ExportError(
                    f"graph {record.name!r} does not run as {MANIFEST_FILE} describes it ({first_line(error)}); export "
                    "it again"
                ) from error
        self._ready = True

    def slots(self, graph: GraphName) -> Sequence[Slot]:
        """Return the shapes that a graph accepts."""
        self.require(graph)
        return self._slots[graph]

    def example_inputs(self, graph: GraphName, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Return inputs of zeros, ids and full masks, at some sizes."""
        inputs = empty_tensors(self.manifest.graph(graph).inputs, sizes, self.device)
        for name, value in inputs.items():
            value.fill_(self.example_id if name in TOKENS else int(name.endswith("_mask")))
        return inputs

    def synchronize(self) -> None:
        """Wait for pending GPU work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare(
        self, name: GraphName, inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Slot, dict[str, int]]:
        """Return inputs of a graph in its dtypes, padded to the closest slot; the slot and the padded sizes."""
        record = self.manifest.graph(name)
        slot, padded = choose_slot(name, self._slots[name], request_sizes(record, inputs))
        prepared = {}
        for tensor in record.inputs:
            value = inputs[tensor.name].detach().to(self.device, TORCH_DTYPES[tensor.dtype])
            filling = self.padding_id if tensor.name in _PADDED else 0
            prepared[tensor.name] = pad_tensor(value, tensor.axes, padded, filling).contiguous()
        return prepared, slot, padded

    def call(self, name: GraphName, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph without checking its ids and masks, see `run`."""
        record = self.manifest.graph(name)
        sizes = request_sizes(record, inputs)
        prepared, slot, padded = self.prepare(name, inputs)
        outputs = self._graphs[name](prepared, slot, padded)
        if padded == sizes:
            return outputs
        return {
            output.name: trim_tensor(outputs[output.name], output.axes, sizes)
            for output in record.outputs
        }

    def require(self, name: str) -> GraphName:
        """Raise unless the export has the graph and the session is ready."""
        if name not in self.manifest.graph_names:
            raise ExportError(
                f"graph {name!r} is not in {self.folder} (it has: {', '.join(self.manifest.graph_names)}); export it "
                f"with --graphs"
            )
        if not self._ready:
            raise UnavailableError(
                "this session is not ready; call warm_up() first, or open it with Session.load"
            )
        return name

    def pieces(
        self, graph: GraphName, axis: str, count: int, *limits: int, **sizes: int
    ) -> Sequence[slice]:
        """Slice 0 to `count` within the limits and the largest size of an axis, in the slots that take `sizes`."""
        slots = [slot for slot in self.slots(graph) if slot.padded(sizes) is not None]
        top = largest(slots, axis)
        size = max(1, min(*limits, count, count if top is None else top))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def longest(self, graph: GraphName, axis: str) -> int | None:
        """Return the largest size of an axis; None if it is unbounded or the graph has no such axis."""
        slots = [slot for slot in self._slots[graph] if axis in slot.ranges]
        return largest(slots, axis) if slots else None

    def in_batches(
        self, graph: GraphName, inputs: Mapping[str, Tensor], *limits: int
    ) -> dict[str, Tensor]:
        """Run a graph on any number of rows, in passes that it accepts."""
        passes = []
        for rows in self.pieces(graph, "batch", len(next(iter(inputs.values()))), *limits):
            passes.append(self.call(graph, {name: value[rows] for name, value in inputs.items()}))
        if len(passes) == 1:
            return passes[0]
        if passes:
            return {name: torch.cat([outputs[name] for outputs in passes]) for name in passes[0]}
        record = self.manifest.graph(graph)
        sizes = request_sizes(record, inputs)
        empty = empty_tensors(record.outputs, sizes, self.device)
        return {
            tensor.name: trim_tensor(empty[tensor.name], tensor.axes, sizes)
            for tensor in record.outputs
        }

    def fingerprint(self) -> str:
        """Hash the files and the runtime, which together decide the results."""
        sums = sorted(record.sha256 for record in self.manifest.files)
        return hashlib.sha256(" ".join([self.description, *sums]).encode()).hexdigest()
