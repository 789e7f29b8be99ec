"""TensorRT and TensorRT for RTX: the libraries, and engines that read and write torch tensors in place.

Their Python modules are the same but for the name and these differences:

| | `tensorrt` | `tensorrt-rtx` |
|---|---|---|
| builds | on the GPU that it builds for, timing kernels on it | anywhere, for a list of compute capabilities |
| kernels chosen | while building | while loading; there is a runtime cache |
| strongly typed | since version 11 always, before by a flag | always |

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
from collections.abc import Callable, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xfm_fast.errors import ExportError, StorageError, UnavailableError

from ..request import EngineRequest, TensorRTRequest
from ..tensorrt import first_error, local_capability, message_logger, start
from . import Exporter, Runtime, failed_run, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..manifest import GraphRecord, Manifest
    from ..slots import SizeRange, Slot
    from . import RunGraph

_RTX_MAGIC = b"vtrt"
_RTX_HEADER = 24

# Engines expect this of every address; views into a batch may start elsewhere.
_ALIGNMENT = 256
# Entries of a captured shape for one of a request, at most: launches cost less than to compute more.
_MOST_PADDING = 2

_log = logging.getLogger(__name__)


def check_engine_file(
    path: Path, runtime: type[Runtime], *, expected_bytes: int | None = None
) -> None:
    """Raise `ExportError` for a missing, empty, truncated or foreign engine, before a runtime asserts on it."""
    again = f"copy the file again or build it with xfm-fast export --to {runtime.name}"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_RTX_HEADER)
    except OSError as error:
        raise ExportError(
            f"engine {path} cannot be read ({error.strerror or error}); {again}"
        ) from None
    if not size:
        raise ExportError(f"engine {path} is empty; {again}")
    is_rtx = head.startswith(_RTX_MAGIC)
    complete = not is_rtx or len(head) == _RTX_HEADER
    if is_rtx != (runtime.name == TensorRTForRTX.name) or not complete:
        raise ExportError(
            f"engine {path} cannot be loaded, it is not an engine of {runtime.title}; {again}"
        )
    stored_bytes = int.from_bytes(head[16:24], "little") if is_rtx else None
    for expected in (stored_bytes, expected_bytes):
        if expected is not None and size != expected:
            state = "truncated" if size < expected else "damaged"
            raise ExportError(f"engine {path} is {state} ({size:,} of {expected:,} bytes); {again}")


@register
class TensorRT(Runtime):
    """All calls are serialised, since graphs share memory; `cuda` is `torch.cuda` or a stand-in."""

    name = kind = package = extra = "tensorrt"
    title = "TensorRT"
    request = TensorRTRequest
    artefact = "engines for the GPU here"
    devices = ("cuda",)

    def __init__(
        self, manifest: Manifest, device: torch.device | None = None, *, cuda: Any = None
    ) -> None:
        import torch

        self.library = self.import_library()
        self.version: str = self.library.__version__
        self.manifest, self.cuda = manifest, torch.cuda if cuda is None else cuda
        if cuda is None:
            device = self._device(device)
        assert device is not None
        self.device = device
        self.description = f"{self.name} {self.version}, {self.cuda.get_device_name(device)}"
        self.errors: list[str] = []
        # The runtime keeps no reference to it.
        self._logger = message_logger(self.library, self.errors)
        self._runtime: Any = start(
            f"{self.title} {self.version}", self.library.Runtime, self._logger, self.errors
        )
        if manifest.target is not None and manifest.target.version_compatible:
            # The engine carries the runtime of the version that built it.
            self._runtime.engine_host_code_allowed = True
        # The legacy default stream would make every launch wait. One stream for all keeps launches in order, whichever
        # stream their callers are on.
        self.stream: Any = self.cuda.Stream(device)
        self.lock = threading.Lock()
        self.activations = _Activations(device, 0)

    def _device(self, device: torch.device | None) -> torch.device:
        import torch

        # A wrong version shows on a machine without a GPU too.
        self.manifest.require_target(library_version=self.version, compute_capability=None)
        if device is not None and device.type != "cuda":
            raise UnavailableError(
                f"{self.title} runs on NVIDIA GPUs, not on {device}; use device='cuda'"
            )
        capability = local_capability()
        if capability is None:
            raise UnavailableError(
                f"{self.title} needs an NVIDIA GPU and PyTorch finds none here; export to ONNX for this machine: "
                "xfm-fast export"
            )
        self.manifest.require_target(library_version=self.version, compute_capability=capability)
        if device is None or device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    @classmethod
    def exporter(cls) -> Exporter:
        """See `Runtime.exporter`."""
        from .. import engines

        def start_export(
            model: Any, folder: str | Path, request: EngineRequest | None = None, **options: Any
        ) -> contextlib.AbstractContextManager[Callable[[], Manifest]]:
            return engines.engine_graphs(model, folder, cls.name, request, **options)

        return Exporter(
            lambda request: engines.check_request(cls.name, request),
            start_export,
        )

    def allocate(self, size: int, graph: str) -> _Activations:
        """Allocate an activation buffer; raises `ExportError` if memory is short."""
        try:
            return _Activations(self.device, size)
        except RuntimeError as error:
            raise ExportError(
                f"graph {graph!r} needs {size / 1e6:.0f} MB of GPU memory for its activations, which are not free "
                f"({' '.join(str(error).split())[:200]}); build it with smaller profiles"
            ) from None

    def load(self, record: GraphRecord, path: Path) -> RunGraph:
        """See `Runtime.load`."""
        sizes = {file.name: file.bytes for file in self.manifest.files}
        check_engine_file(path, type(self), expected_bytes=sizes.get(path.name))
        self.errors.clear()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ExportError(f"engine {path} cannot be read ({error.strerror or error})") from None
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise ExportError(
                f"{self.title} {self.version} does not load {path.name} ({first_error(self.errors)}); "
                f"build it on this machine with xfm-fast export --to {self.name}"
            )
        return _Engine(self, engine, record, path).run


@register
class TensorRTForRTX(TensorRT):
    """See `TensorRT`."""

    name = kind = extra = "tensorrt-rtx"
    package = "tensorrt_rtx"
    title = "TensorRT for RTX"
    request = EngineRequest
    artefact = "engines for the GPUs of --sm, built on any machine"


class _Activations:
    """An activation buffer: address and size in bytes, and the CUDA event after its last use by captured graphs."""

    def __init__(self, device: torch.device, size: int) -> None:
        import torch

        self._memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=device)
        self.span = -(-self._memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT, size
        self.free: Any = None


class _Engine:
    """A loaded engine: a context per profile, and CUDA graphs of selected shapes."""

    def __init__(self, runtime: TensorRT, engine: Any, record: GraphRecord, path: Path) -> None:
        from ..slots import graph_slots

        self._runtime, self._engine, self._record = runtime, engine, record
        self._cuda, self._device = runtime.cuda, runtime.device
        self._stream: Any = runtime.stream
        self._kernels = KernelCache(runtime, engine, path)
        slots = graph_slots(record)
        # GPU memory of the contexts: the requirement of the largest profile.
        self._size = int(engine.device_memory_size_v2)
        if runtime.activations.span[1] < self._size:
            larger = runtime.allocate(self._size, record.name)
            # What was launched may still be using the smaller one.
            runtime.stream.synchronize()
            runtime.activations = larger
        self._contexts = [self._context(slot.index) for slot in slots]
        self._bound_memory: list[tuple[int, int] | None] = [None] * len(slots)
        self._captured: list[_Captured] = []
        if not self._kernels.captures:
            for slot in slots:
                self._capture(slot)
        # Kernels are compiled by the first runs, and in the background by later ones.
        self._cold = {slot.index for slot in slots}
        weakref.finalize(self, self._kernels.save).atexit = False

    def run(
        self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]
    ) -> dict[str, Tensor]:
        with self._runtime.lock:
            captured = self._captured_for(slot, sizes)
            if captured is None:
                outputs = self._launch(inputs, slot, sizes)
            else:
                outputs = captured.replay(inputs, sizes)
            if slot.index in self._cold:
                self._cold.remove(slot.index)
                if not self._cold:
                    self._kernels.save()
            return outputs

    def _captured_for(self, slot: Slot, sizes: Mapping[str, int]) -> _Captured | None:
        """Return the smallest captured shape that a request fits into without excessive padding."""
        best, volume = None, _MOST_PADDING * prod(sizes.values()) + 1
        for captured in self._captured:
            if captured.profile != slot.index or prod(captured.sizes.values()) >= volume:
                continue
            if all(size <= captured.sizes[axis] for axis, size in sizes.items()):
                best, volume = captured, prod(captured.sizes.values())
        return best

    def _launch(
        self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]
    ) -> dict[str, Tensor]:
        from ..slots import empty_tensors

        outputs = empty_tensors(self._record.outputs, sizes, self._device)
        current = self._cuda.current_stream(self._device)
        # Referenced until the caller's stream waits for the engine's, so that this memory is not reused before.
        bound = {
            name: value.clone() if value.data_ptr() % _ALIGNMENT else value
            for name, value in inputs.items()
        }
        self._stream.wait_stream(current)
        context, memory = self._contexts[slot.index], self._runtime.activations
        # Replaced where an engine loaded later needs more. Setting the same memory again could discard captured graphs.
        if self._bound_memory[slot.index] != memory.span:
            context.set_device_memory(*memory.span)
            self._bound_memory[slot.index] = memory.span
        self._enqueue(context, bound, outputs)
        current.wait_stream(self._stream)
        return outputs

    def _context(self, profile: int) -> Any:
        context = self._kernels.context()
        if context is None:
            raise ExportError(
                f"{self._runtime.title} makes no context for profile {profile} of graph {self._record.name!r} "
                f"({first_error(self._runtime.errors)}); free memory of the GPU, or build it with smaller profiles"
            )
        if self._record.profiles:
            context.set_optimization_profile_async(profile, self._stream.cuda_stream)
        return context

    def _enqueue(
        self, context: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        self._runtime.errors.clear()
        accepted = [
            context.set_input_shape(name, tuple(value.shape)) for name, value in inputs.items()
        ]
        for name, value in (*inputs.items(), *outputs.items()):
            accepted.append(context.set_tensor_address(name, value.data_ptr()))
        if not all(accepted) or not context.execute_async_v3(self._stream.cuda_stream):
            raise failed_run(
                self._runtime.description,
                self._record.name,
                inputs,
                first_error(self._runtime.errors),
            )

    def _capture(self, slot: Slot) -> None:
        """Capture shapes around the tuned one of a slot with a single batch size."""
        if not slot.ranges["batch"].single or not all(
            size.best or size.single for size in slot.ranges.values()
        ):
            return
        profiled = bool(self._record.profiles)
        size = (
            self._engine.get_device_memory_size_for_profile_v2(slot.index)
            if profiled
            else self._size
        )
        memory = self._runtime.allocate(int(size), self._record.name)
        for shape in product(*map(_steps, slot.ranges.values())):
            sizes = dict(zip(slot.ranges, shape, strict=True))
            if not self._capture_shape(slot, sizes, memory):
                return

    def _capture_shape(self, slot: Slot, sizes: dict[str, int], memory: _Activations) -> bool:
        """Capture one shape and return whether that worked."""
        from ..slots import empty_tensors, trim_tensor

        inputs = empty_tensors(self._record.inputs, sizes, self._device)
        for value in inputs.values():
            value.zero_()
        outputs = empty_tensors(self._record.outputs, sizes, self._device)
        context = self._context(slot.index)
        context.set_device_memory(*memory.span)
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
            _log.info(
                "graph %r runs without a CUDA graph at %s: %s", self._record.name, sizes, error
            )
            return False

        # The function is kept by this object, and must not keep it.
        cuda, device, record = self._cuda, self._device, self._record

        def replay(values: Mapping[str, Tensor], to: Mapping[str, int]) -> dict[str, Tensor]:
            """Copy in, replay and copy out on the caller's stream; `to` may be smaller than the captured sizes."""
            current = cuda.current_stream(device)
            if memory.free is not None:
                current.wait_event(memory.free)
            for tensor in record.inputs:
                buffer, value = inputs[tensor.name], values[tensor.name]
                if buffer.shape != value.shape:
                    buffer.zero_()
                trim_tensor(buffer, tensor.axes, to).copy_(value, non_blocking=True)
            graph.replay()
            results = {
                tensor.name: trim_tensor(outputs[tensor.name], tensor.axes, to).clone()
                for tensor in record.outputs
            }
            memory.free = cuda.Event()
            memory.free.record(current)
            return results

        # The graph points into the context and its memory.
        self._captured.append(_Captured(slot.index, sizes, replay, (context, memory)))
        return True


def _steps(allowed: SizeRange) -> list[int]:
    """List half of the tuned size, the tuned size, and its doublings up to the maximum."""
    maximum = allowed.most or allowed.least
    size = max((allowed.best or allowed.least) // 2, allowed.least)
    steps = []
    while size < maximum:
        steps.append(size)
        size *= 2
    return [*steps, maximum]


class _Captured(NamedTuple):
    """A CUDA graph of a shape, and what it points into; other graphs use the activations in turn."""

    profile: int
    sizes: Mapping[str, int]
    replay: Callable[[Mapping[str, Tensor], Mapping[str, int]], dict[str, Tensor]]
    held: tuple[Any, _Activations]


class KernelCache:
    """Execution contexts of an engine; for RTX with a file of the kernels that earlier loads on this GPU compiled."""

    def __init__(self, runtime: TensorRT, engine: Any, path: Path) -> None:
        self._engine, self._trt = engine, runtime.library
        self.captures = False
        self._config: Any = None
        self._cache: Any = None
        if not hasattr(engine, "create_runtime_config") or runtime.name != TensorRTForRTX.name:
            return
        major, minor = runtime.cuda.get_device_capability(runtime.device)
        self._path = path.with_name(f"{path.stem}.sm{major}{minor}.{runtime.version}.kernels")
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
        """Create a context; None if memory is short."""
        if self._config is None:
            return self._engine.create_execution_context(
                self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            )
        return self._engine.create_execution_context(self._config)

    def save(self) -> None:
        """Write the compiled kernels; an unwritable folder costs the next load its time."""
        from xfm_fast.io import write_bytes

        if self._cache is None:
            return
        content = bytes(memoryview(self._cache.serialize()))
        if content == getattr(self, "_stored", None):
            return
        with contextlib.suppress(StorageError):
            write_bytes({self._path: content})
