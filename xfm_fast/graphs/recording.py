"""Record and replay: what a graph can contain, the graphs of one program by size, and of any module."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels.derived import held, remembered

Size = tuple[int, ...]
Call = TypeVar("Call")
_WARM_UPS = 3
# Cached graphs per module; the least recently used is dropped.
_MOST_CALLS = 16


class Recording(Protocol):
    """Recorded work, and the memory that each replay writes its results to."""

    outputs: Any

    def replay(self) -> None:
        """Run the work again on the current content of the inputs' memory."""
        ...


Recorder = Callable[[Callable[[], Any]], Recording]
"""Runs and records the work."""


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any) -> None:
        self.graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self.graph.replay()


def record(run: Callable[[], Any], pool: Any = None) -> Recording:
    """Record work as a CUDA graph, after warm-up runs that compile kernels and prepare weights.

    `pool` (`torch.cuda.graph_pool_handle()`) is for graphs that share their temporary memory. Raises `InputError` with
    the reason if CUDA cannot record the work.
    """
    # Work on the default stream cannot be recorded, and the warm-up has to be over before recording begins.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side):
            outputs = run()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"CUDA cannot record this work ({reason}); run the model without graphs") from error
    return _CudaRecording(graph, outputs)


class NoHostReads(TorchDispatchMode):
    """Context in which operations that a graph cannot contain raise an error with their name.

    These are operations whose result the host reads (`item`, `equal`, a truth value) or whose size depends on values
    (`nonzero`, indexing by a mask), and copies between devices. Our own operators count as one operation each.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        why = _needs_the_host(func, args, kwargs)
        if why is not None:
            raise InputError(
                f"{func.__name__.partition('.')[0]} {why}, which a graph cannot contain; run the model without graphs"
            )
        return func(*args, **kwargs)


def _needs_the_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why an operation synchronises with the host, or None."""
    aten = torch.ops.aten
    if func is aten.equal.default and args[0].device.type == "cpu":
        # Cached weights are compared with their source on a CPU only, without a synchronisation.
        return None
    if torch.Tag.data_dependent_output in func.tags:
        return "lets the host read a tensor"
    if torch.Tag.dynamic_output_shape in func.tags:
        if func is aten.index.Tensor:
            by_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
            return "by a mask has a size that depends on values" if by_mask else None
        known = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None
        return None if known else "has a size that depends on values"
    if func is aten._to_copy.default and kwargs.get("device") not in (None, args[0].device):
        return f"copies from {args[0].device.type} to {torch.device(kwargs['device']).type}"
    if func is aten.copy_.default and args[0].device != args[1].device:
        return f"copies from {args[1].device.type} to {args[0].device.type}"
    return None


def why_not_captured(module: nn.Module) -> str | None:
    """Why a module cannot be captured on any device, with the remedy; None if it can."""
    for path, part in module.named_modules():
        if part.training:
            dropout = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
            what = f"dropout of {path} is active" if dropout else f"{path or 'the model'} is in training mode"
            return f"{what}, and a graph would repeat its random numbers; call model.eval() first"
    for name, parameter in module.named_parameters():
        if parameter.is_inference():
            return (
                f"{name} is an inference tensor, whose changes are not tracked; load the model outside "
                "torch.inference_mode()"
            )
    return None


def require_gpu(module: nn.Module) -> None:
    """Raise `UnavailableError` unless the module is on a GPU."""
    devices = {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}
    if devices != {"cuda"}:
        where = ", ".join(sorted(devices)) or "no device"
        raise UnavailableError(f"CUDA graphs need a model on a GPU, not on {where}; call model.cuda() first")


class Program(ABC, Generic[Call]):
    """Work of one kind, at several sizes.

    A call is the caller's input after validation. The buffers of a size are the memory that its graph reads.
    """

    name: str

    @abstractmethod
    def needs(self, call: Call) -> Size:
        """The size of a call."""

    @abstractmethod
    def buffers(self, size: Size) -> dict[str, Tensor]:
        """Memory for calls up to a size, initialised with valid values."""

    @abstractmethod
    def run(self, size: Size, buffers: dict[str, Tensor]) -> Any:
        """Compute on the content of the buffers."""

    @abstractmethod
    def fill(self, call: Call, size: Size, buffers: dict[str, Tensor]) -> None:
        """Copy a call into the buffers, and padding into the rest."""

    @abstractmethod
    def result(self, call: Call, outputs: Any) -> Any:
        """Copy the call's part of the outputs."""


class _Graph(NamedTuple):
    buffers: dict[str, Tensor]
    recording: Recording
    stamp: tuple[int, int]
    held: list[Any]


class Sizes(Generic[Call]):
    """The graphs of one program, by size."""

    def __init__(self, program: Program[Call], model: nn.Module, sizes: Iterable[Size], recorder: Recorder) -> None:
        self.program, self.model, self.recorder = program, model, recorder
        # Sorted so that the first size that fits is the smallest.
        self.sizes = sorted(set(sizes), key=lambda size: (size[-1:], size))
        self._parameters = tuple(model.parameters())
        self._lock = threading.Lock()
        self._device = next((p.device for p in self._parameters if p.is_cuda), None)
        self._done: Any = None
        self._graphs = {size: self._record(size) for size in self.sizes}

    def _stamp(self) -> tuple[int, int]:
        # Graphs read weights in place, but not tensors cached from weights before recording.
        parameters = self._parameters
        return sum(p._version for p in parameters), sum(p.data_ptr() for p in parameters)

    @torch.no_grad()
    def _record(self, size: Size) -> _Graph:
        buffers = self.program.buffers(size)
        # The first run caches tensors computed from weights, with copies from the host.
        self.program.run(size, buffers)
        with NoHostReads():
            self.program.run(size, buffers)
        with held():
            recording = self.recorder(lambda: self.program.run(size, buffers))
        return _Graph(buffers, recording, self._stamp(), remembered(self._parameters))

    @torch.no_grad()
    def __call__(self, call: Call) -> Any:
        needed = self.program.needs(call)
        size = next((s for s in self.sizes if all(n <= most for n, most in zip(needed, s, strict=True))), None)
        if size is None:
            raise InputError(
                f"{self.program.name} needs size {needed}, captured are "
                f"{', '.join(map(str, self.sizes)) or 'no sizes'}; capture it too"
            )
        with self._lock:
            # The lock orders hosts. On another stream, the last call may still read the buffers.
            if self._done is not None:
                torch.cuda.current_stream(self._device).wait_event(self._done)
            graph = self._graphs[size]
            if graph.stamp != self._stamp():
                graph = self._graphs[size] = self._record(size)
            self.program.fill(call, size, graph.buffers)
            graph.recording.replay()
            result = self.program.result(call, graph.recording.outputs)
            if self._device is not None:
                self._done = torch.cuda.current_stream(self._device).record_event()
            return result


class CallGraphs:
    """Any module, captured at its first call for each input shape; arguments other than tensors are constants.

    Calls with gradients or in training mode run the module itself. At most `most` graphs are kept; the least recently
    used is dropped.
    """

    def __init__(
        self, run: Callable[..., Any], module: nn.Module, recorder: Recorder | None = None, most: int = _MOST_CALLS
    ) -> None:
        self.run, self.module, self.most = run, module, most
        self._recorder, self._lock = recorder, threading.Lock()
        self._graphs: OrderedDict[Any, Sizes[list[Any]]] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()):
            return self.run(*args, **kwargs)
        if why_not_captured(self.module) is not None:
            return self.run(*args, **kwargs)
        leaves, form = pytree.tree_flatten((args, kwargs))
        key = (str(form), tuple((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves))
        try:
            hash(key)
        except TypeError:
            raise InputError(
                "an argument is neither a tensor nor hashable; call accelerate with cuda_graphs=False"
            ) from None
        with self._lock:
            if key not in self._graphs:
                program = _Calls(self.run, leaves, form)
                self._graphs[key] = Sizes(program, self.module, [()], self._recorder or record)
                while len(self._graphs) > self.most:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return self._graphs[key](leaves)


class _Calls(Program[list[Any]]):
    name = "the module"

    def __init__(self, run: Callable[..., Any], leaves: Sequence[Any], form: pytree.TreeSpec) -> None:
        self.call, self.leaves, self.form = run, list(leaves), form

    def needs(self, call: list[Any]) -> Size:
        return ()

    def buffers(self, size: Size) -> dict[str, Tensor]:
        return {str(i): leaf.clone() for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)}

    def run(self, size: Size, buffers: dict[str, Tensor]) -> Any:
        leaves = [buffers.get(str(i), leaf) for i, leaf in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        return self.call(*args, **kwargs)

    def fill(self, call: list[Any], size: Size, buffers: dict[str, Tensor]) -> None:
        for name, buffer in buffers.items():
            buffer.copy_(call[int(name)], non_blocking=True)

    def result(self, call: list[Any], outputs: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, outputs)
