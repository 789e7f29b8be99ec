"""TensorRT and TensorRT for RTX: engines that read and write torch tensors in place.

Every profile has its own execution context, because switching profiles is slow. Contexts of all engines run on one
stream and share one activation buffer of the largest profile. Profiles with a single batch size capture CUDA graphs
around the tuned shape, with their own contexts and memory; a request between two shapes is padded to the larger one.
TensorRT for RTX captures graphs itself (`WHOLE_GRAPH_CAPTURE`) while it compiles kernels in the background.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfm_fast.checkpoint.files import write_bytes
from xfm_fast.errors import ExportError, StorageError, UnavailableError

from ..engines import check_engine_file
from ..engines.library import Library, first_error, load_library, local_capability, message_logger, start
from ..manifest import GraphRecord, Manifest
from ..slots import SizeRange, Slot, axes_of, graph_slots, output_shapes, tensor_shape, trim_tensor
from . import TORCH_DTYPES, Precision, empty_outputs

# Engines expect this of every address; views into a batch may start elsewhere.
_ALIGNMENT = 256
# Entries of a captured shape for one of a request, at most: launches cost less than to compute more.
_MOST_PADDING = 2

_log = logging.getLogger(__name__)


def open_runtime(
    name: str, manifest: Manifest, device: torch.device | None, precision: Precision | None
) -> TensorRTEngines:
    """See `runtimes.open_runtime`."""
    library = load_library(name)  # pyright: ignore[reportArgumentType]
    # A wrong version shows on a machine without a GPU too.
    manifest.require_target(library_version=library.version, compute_capability=None)
    if device is not None and device.type != "cuda":
        raise UnavailableError(f"{library.label} runs on NVIDIA GPUs, not on {device}; use device='cuda'")
    capability = local_capability()
    if capability is None:
        raise UnavailableError(
            f"{library.label} needs an NVIDIA GPU and PyTorch finds none here; export to ONNX for this machine: "
            "xfm-fast export onnx"
        )
    manifest.require_target(library_version=library.version, compute_capability=capability)
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    return TensorRTEngines(library, manifest, torch.device("cuda", index), torch.cuda)


class TensorRTEngines:
    """A `Runtime` whose calls are all serialised, since graphs share memory; `cuda` is `torch.cuda` or a fake."""

    def __init__(self, library: Library, manifest: Manifest, device: torch.device, cuda: Any) -> None:
        self.library, self.manifest, self.device, self.cuda = library, manifest, device, cuda
        self.enqueues = True
        self.description = f"{library.consumer} {library.version}, {cuda.get_device_name(device)}"
        self.errors: list[str] = []
        # The runtime keeps no reference to it.
        self._logger = message_logger(library.trt, self.errors, _log)
        self._runtime: Any = start(library, library.trt.Runtime, self._logger, self.errors)
        if manifest.target is not None and manifest.target.version_compatible:
            # Such an engine carries the runtime of the version that built it.
            self._runtime.engine_host_code_allowed = True
        # The legacy default stream would make every launch wait. One stream for all keeps launches in order, whichever
        # stream their callers are on.
        self.stream: Any = cuda.Stream(device)
        self.lock = threading.Lock()
        self.activations = _Activations(device, 0)

    def reserve(self, size: int, graph: str) -> None:
        """Grow the shared activation buffer to `size` bytes; raises `ExportError` where memory is short."""
        if self.activations.place[1] < size:
            larger = self.allocate(size, graph)
            # What was launched may still be using the smaller one.
            self.stream.synchronize()
            self.activations = larger

    def allocate(self, size: int, graph: str) -> _Activations:
        """A new activation buffer; raises `ExportError` where memory is short."""
        try:
            return _Activations(self.device, size)
        except RuntimeError as error:
            raise ExportError(
                f"graph {graph!r} needs {size / 1e6:.0f} MB of GPU memory for its activations, which are not free "
                f"({' '.join(str(error).split())[:200]}); build it with smaller profiles"
            ) from None

    def load(self, record: GraphRecord, path: Path) -> _Engine:
        """See `Runtime.load`."""
        sizes = {file.name: file.bytes for file in self.manifest.files}
        check_engine_file(path, self.library, expected_bytes=sizes.get(path.name))
        self.errors.clear()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ExportError(f"engine {path} cannot be read ({error.strerror or error})") from None
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise ExportError(
                f"{self.library.label} {self.library.version} does not load {path.name} ({first_error(self.errors)}); "
                f"build it on this machine with xfm-fast export {self.library.consumer}"
            )
        return _Engine(self, engine, record, path)


class _Activations:
    """An activation buffer; `place` is its address and size in bytes."""

    def __init__(self, device: torch.device, size: int) -> None:
        self._memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=device)
        self.place = -(-self._memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT, size


class _Engine:
    """A `LoadedGraph`: a context per profile, and CUDA graphs of selected shapes."""

    def __init__(self, runtime: TensorRTEngines, engine: Any, record: GraphRecord, path: Path) -> None:
        self._runtime, self._engine, self._record = runtime, engine, record
        self._cuda, self._device = runtime.cuda, runtime.device
        self._stream: Any = runtime.stream
        self._kernels = _KernelCache(runtime.library, engine, path, self._cuda.get_device_capability(self._device))
        slots = graph_slots(record)
        runtime.reserve(self.activation_bytes, record.name)
        self._contexts = [self._context(slot.number) for slot in slots]
        self._bound_memory: list[tuple[int, int] | None] = [None] * len(slots)
        self._captured: dict[tuple[int, tuple[tuple[str, int], ...]], _Captured] = {}
        if not self._kernels.captures:
            for slot in slots:
                self._capture(slot)
        # Kernels are compiled by the first runs, and in the background by later ones.
        self._cold = {slot.number for slot in slots}
        weakref.finalize(self, self._kernels.save).atexit = False

    @property
    def activation_bytes(self) -> int:
        """GPU memory of the contexts: the requirement of the largest profile."""
        return int(self._engine.device_memory_size_v2)

    @property
    def captured(self) -> int:
        """Number of shapes that run as a CUDA graph."""
        return len(self._captured)

    def run(self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        with self._runtime.lock:
            captured = self._fitting(slot, sizes)
            outputs = self._launch(inputs, slot, sizes) if captured is None else captured.replay(inputs, sizes)
            if slot.number in self._cold:
                self._cold.remove(slot.number)
                if not self._cold:
                    self._kernels.save()
            return outputs

    def _fitting(self, slot: Slot, sizes: Mapping[str, int]) -> _Captured | None:
        """The smallest captured shape that a request fits into without excessive padding."""
        work = prod(sizes.values())
        fitting = [
            (prod(shape.values()), captured)
            for (number, _), captured in self._captured.items()
            for shape in [captured.sizes]
            if number == slot.number and all(size <= shape[axis] for axis, size in sizes.items())
        ]
        most, captured = min(fitting, key=lambda choice: choice[0], default=(0, None))
        return captured if most <= _MOST_PADDING * work else None

    def _launch(self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        outputs = empty_outputs(self._record, output_shapes(self._record, sizes), self._device)
        current = self._cuda.current_stream(self._device)
        # Referenced until the caller's stream waits for the engine's, so that this memory is not reused before.
        bound = {name: value.clone() if value.data_ptr() % _ALIGNMENT else value for name, value in inputs.items()}
        self._stream.wait_stream(current)
        context, memory = self._contexts[slot.number], self._runtime.activations
        # Replaced where an engine loaded later needs more. Setting the same memory again could discard captured graphs.
        if self._bound_memory[slot.number] != memory.place:
            context.set_device_memory(*memory.place)
            self._bound_memory[slot.number] = memory.place
        self._enqueue(context, bound, outputs)
        current.wait_stream(self._stream)
        return outputs

    def _context(self, profile: int) -> Any:
        context = self._kernels.context()
        if context is None:
            raise ExportError(
                f"{self._runtime.library.label} makes no context for profile {profile} of graph {self._record.name!r} "
                f"({first_error(self._runtime.errors)}); free memory of the GPU, or build it with smaller profiles"
            )
        if self._record.profiles:
            context.set_optimization_profile_async(profile, self._stream.cuda_stream)
        return context

    def _enqueue(self, context: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self._runtime.errors.clear()
        accepted = True
        for name, value in inputs.items():
            accepted &= bool(context.set_input_shape(name, tuple(value.shape)))
            accepted &= bool(context.set_tensor_address(name, value.data_ptr()))
        for name, value in outputs.items():
            accepted &= bool(context.set_tensor_address(name, value.data_ptr()))
        if not accepted or not context.execute_async_v3(self._stream.cuda_stream):
            shapes = ", ".join(f"{name} {[*value.shape]}" for name, value in inputs.items())
            raise ExportError(
                f"{self._runtime.description} failed in graph {self._record.name!r} on {shapes} "
                f"({first_error(self._runtime.errors)})"
            )

    def _capture(self, slot: Slot) -> None:
        """Capture shapes around the tuned one of a slot with a single batch size."""
        if not slot.ranges["batch"].single or not all(size.best or size.single for size in slot.ranges.values()):
            return
        profiled = bool(self._record.profiles)
        size = self._engine.get_device_memory_size_for_profile_v2(slot.number) if profiled else self.activation_bytes
        memory, turn = self._runtime.allocate(int(size), self._record.name), _Turn()
        for chosen in product(*map(_steps, slot.ranges.values())):
            if not self._capture_shape(slot, dict(zip(slot.ranges, chosen, strict=True)), memory, turn):
                return

    def _capture_shape(self, slot: Slot, sizes: dict[str, int], memory: _Activations, turn: _Turn) -> bool:
        """Capture one shape; False where it cannot be captured."""
        inputs = {}
        for tensor in self._record.inputs:
            shape = tensor_shape(tensor, sizes)
            inputs[tensor.name] = torch.zeros(shape, dtype=TORCH_DTYPES[tensor.dtype], device=self._device)
        outputs = empty_outputs(self._record, output_shapes(self._record, sizes), self._device)
        context = self._context(slot.number)
        context.set_device_memory(*memory.place)
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        # The first run of a shape does work that cannot be recorded.
        self._enqueue(context, inputs, outputs)
        self._stream.synchronize()
        capturable = getattr(context, "is_stream_capturable", None)
        if capturable is not None and not capturable(self._stream.cuda_stream):
            return False
        graph = self._cuda.CUDAGraph()
        try:
            with self._cuda.graph(graph, stream=self._stream):
                self._enqueue(context, inputs, outputs)
        except (RuntimeError, ExportError) as error:
            _log.info("graph %r runs without a CUDA graph at %s: %s", self._record.name, sizes, error)
            return False
        self._captured[_key(slot, sizes)] = _Captured(
            self._cuda, self._device, (context, memory, turn), graph, self._record, sizes, inputs, outputs
        )
        return True


def _steps(allowed: SizeRange) -> list[int]:
    """Half of the tuned size, the tuned size, and its doublings up to the maximum."""
    most = allowed.most or allowed.least
    size, steps = max((allowed.best or allowed.least) // 2, allowed.least), []
    while size < most:
        steps.append(size)
        size *= 2
    return [*steps, most]


@dataclass
class _Turn:
    """The CUDA event after the last use of memory that captured graphs share."""

    free: Any = None


@dataclass
class _Captured:
    """A CUDA graph with the memory that it reads and writes."""

    cuda: Any
    device: torch.device
    # The graph points into the context and the activation buffer; other graphs use that buffer in turn.
    kept: tuple[Any, _Activations, _Turn]
    graph: Any
    record: GraphRecord
    sizes: Mapping[str, int]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def replay(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Copy in, replay and copy out on the caller's stream; `sizes` may be smaller than those of the graph."""
        stream, turn = self.cuda.current_stream(self.device), self.kept[2]
        if turn.free is not None:
            stream.wait_event(turn.free)
        for tensor in self.record.inputs:
            place, given = self.inputs[tensor.name], inputs[tensor.name]
            if place.shape != given.shape:
                place.zero_()
            trim_tensor(place, axes_of(tensor), sizes).copy_(given, non_blocking=True)
        self.graph.replay()
        results = {
            tensor.name: trim_tensor(self.outputs[tensor.name], axes_of(tensor), sizes).clone()
            for tensor in self.record.outputs
        }
        turn.free = self.cuda.Event()
        turn.free.record(stream)
        return results


class _KernelCache:
    """Execution contexts of an engine; for RTX with a file of the kernels that earlier loads on this GPU compiled."""

    def __init__(self, library: Library, engine: Any, path: Path, capability: tuple[int, int]) -> None:
        self._engine, self._trt = engine, library.trt
        self.captures = False
        self._config: Any = None
        self._cache: Any = None
        if not hasattr(engine, "create_runtime_config") or library.consumer != "tensorrt-rtx":
            return
        major, minor = capability
        self._path = path.with_name(f"{path.stem}.sm{major}{minor}.{library.version}.kernels")
        self._config = engine.create_runtime_config()
        self._cache = self._config.create_runtime_cache()
        with contextlib.suppress(OSError):
            self._stored = self._path.read_bytes()
            self._cache.deserialize(self._stored)
        self._config.set_runtime_cache(self._cache)
        self._config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._config.set_execution_context_allocation_strategy(strategy)
        self.captures = True

    def context(self) -> Any:
        """A new context; None where memory is short."""
        if self._config is None:
            return self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return self._engine.create_execution_context(self._config)

    def save(self) -> None:
        """Write the compiled kernels; an unwritable folder costs the next load its time."""
        if self._cache is None:
            return
        content = bytes(memoryview(self._cache.serialize()))
        if content == getattr(self, "_stored", None):
            return
        with contextlib.suppress(StorageError):
            write_bytes({self._path: content})


def _key(slot: Slot, sizes: Mapping[str, int]) -> tuple[int, tuple[tuple[str, int], ...]]:
    return slot.number, tuple(sorted(sizes.items()))
