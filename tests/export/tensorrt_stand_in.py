"""A stand-in for TensorRT and `torch.cuda`: builds are recorded, and engines compute by ONNX Runtime.

An engine is the text of a JSON list: the graph's name and its ONNX file. A context asserts that it got all that the
library needs before it runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

import numpy as np
import onnxruntime
import torch

from xfm_fast.export.manifest import GraphRecord

TYPES = {"float32": ctypes.c_float, "int64": ctypes.c_int64}
# What is used of TensorRT's `IBuilderConfig`, which has no compute capabilities to set, unlike TensorRT for RTX.
_CONFIG = (
    "add_optimization_profile", "builder_optimization_level", "clear_flag", "create_timing_cache", "get_timing_cache",
    "hardware_compatibility_level", "progress_monitor", "set_flag", "set_timing_cache",
)  # fmt: skip


class FakeCuda:
    """The used part of `torch.cuda`, on CPU tensors; `log` has the calls of streams."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capturing: Any = None
        self.caller = self.Stream(name="caller")

    def Stream(self, device: Any = None, name: str = "engine") -> Any:
        return SimpleNamespace(
            name=name,
            cuda_stream=0,
            wait_stream=lambda waited: self.log.append(f"{name} waits for {waited.name}"),
            wait_event=lambda event: self.log.append(f"{name} waits for an event"),
            synchronize=lambda: None,
        )

    def CUDAGraph(self) -> Any:
        work: list[Any] = []

        def replay() -> None:
            self.log.append("replay")
            for launch in work:
                launch()

        return SimpleNamespace(work=work, replay=replay)

    def Event(self) -> Any:
        return SimpleNamespace(record=lambda stream: None)

    def current_stream(self, device: torch.device) -> Any:
        return self.caller

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.capturing = graph
        yield
        self.capturing = None

    def get_device_name(self, device: torch.device) -> str:
        return "a stand-in"

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        return (8, 9)


class FakeContext:
    """Runs an ONNX file on the addresses and shapes that it was given."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memories: list[tuple[int, int]] = []

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        self.memories.append((address, size))

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        profile = self.engine.record.profiles[self.profile]
        self.shapes[name] = shape
        limits = zip(profile.least[name], shape, profile.most[name], strict=True)
        return all(low <= size <= high for low, size, high in limits)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.broken:
            self.engine.logger.log(1, "Cask convolution failed")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if self.engine.cuda.capturing is not None:
            self.engine.cuda.capturing.work.append(lambda: self._run(shapes, addresses))
        else:
            self._run(shapes, addresses)
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine, record = self.engine, self.engine.record
        engine.runs.append((self.profile, shapes))
        need = engine.get_device_memory_size_for_profile_v2(self.profile)
        assert self.memories[-1][1] >= need, "activations do not fit"
        feeds = {
            tensor.name: _memory(addresses[tensor.name], shapes[tensor.name], tensor.dtype)
            for tensor in record.inputs
        }
        results: Any = engine.session.run([output.name for output in record.outputs], feeds)
        for output, result in zip(record.outputs, results, strict=True):
            _memory(addresses[output.name], result.shape, output.dtype)[...] = result


class FakeEngine:
    # Larger for graphs that are loaded later, so that the shared memory has to grow.
    NEEDS: ClassVar = {
        "vision": 1 << 20,
        "text": 1 << 19,
        "image_memory": 1 << 21,
        "fusion": 1 << 22,
    }

    def __init__(self, cuda: FakeCuda, logger: Any, record: GraphRecord, onnx: str) -> None:
        self.cuda, self.logger, self.record = cuda, logger, record
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.runs: list[tuple[int, dict[str, tuple[int, ...]]]] = []
        self.contexts: list[FakeContext] = []
        self.broken = False
        self.device_memory_size_v2 = self.NEEDS[record.name]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return self.device_memory_size_v2 if profile else 1 << 10

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user managed"
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


def _memory(address: int, shape: tuple[int, ...], dtype: str) -> Any:
    ctype = TYPES[dtype] * int(np.prod(shape))
    return np.frombuffer(ctype.from_address(address), dtype=dtype).reshape(shape)


def tensorrt_module(
    version: str = "10.14.1", graphs: Mapping[str, GraphRecord] | None = None
) -> Any:
    """Make a module `tensorrt`; engines of `graphs` go into `module.engines` and run with `module.cuda`."""
    module = MagicMock(__version__=version, cuda=FakeCuda(), engines={})
    module.__spec__ = ModuleSpec("tensorrt", None)
    severities = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    module.ILogger = type("ILogger", (), {name: level for level, name in enumerate(severities)})
    module.IProgressMonitor, module.IStreamWriter = (
        type(name, (), {}) for name in ("Monitor", "Writer")
    )
    module.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    builder = module.Builder.return_value
    builder.build_serialized_network_to_stream.side_effect = lambda _, __, writer: writer.write(
        b"plan of TensorRT"
    )
    network = builder.create_network.return_value
    network.num_inputs, network.get_input.return_value.name = 1, "x"
    config = builder.create_builder_config.return_value = MagicMock(spec_set=_CONFIG)
    config.add_optimization_profile.return_value = 0
    config.get_timing_cache.return_value.serialize.return_value = b"timed"

    def runtime(logger: Any) -> Any:
        def deserialize(content: bytes) -> FakeEngine | None:
            if not content.startswith(b"["):
                logger.log(1, "Magic tag does not match")
                return None
            name, onnx = json.loads(content)
            module.engines[name] = FakeEngine(module.cuda, logger, (graphs or {})[name], onnx)
            return module.engines[name]

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    module.Runtime = runtime
    return module
