"""A stand-in for `tensorrt`, which cannot be installed without a GPU driver: as much of it as exporting calls.

It follows TensorRT 10's documented Python API and records what it is told. Its builder's engines are bytes that say
what they were built from. `make_plugin_module` is `tensorrt.plugin`, with the checks that the real one makes of
signatures, and symbolic integers that only know what the real ones know.
"""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any


def make_tensorrt(version: str = "10.14.1.48", *, builds: bool = True, inputs: tuple[str, ...] = ("x",)) -> Any:
    """The module; `record` holds what was asked of it. Networks have inputs of these names, whatever is parsed."""
    trt: Any = types.ModuleType("tensorrt")
    trt.__version__ = version
    trt.record = {"flags": [], "network": None, "profiles": [], "cleared": [], "cache_in": None, "level": None}
    trt.float16, trt.bfloat16, trt.float32 = "HALF", "BF16", "FLOAT"

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class IProgressMonitor:
        pass

    class Cache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> bytes:
            return self.content + b"+timed"

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

        def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
            self.shapes[name] = shapes

    class Config:
        """Has no compute capabilities to set, unlike that of TensorRT for RTX."""

        __slots__ = ("builder_optimization_level", "cache", "hardware_compatibility_level", "progress_monitor")

        def __init__(self) -> None:
            self.cache: Cache | None = None

        def set_flag(self, flag: str) -> None:
            trt.record["flags"].append(flag)

        def clear_flag(self, flag: str) -> None:
            trt.record["cleared"].append(flag)

        def create_timing_cache(self, content: bytes) -> Cache:
            return Cache(content)

        def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
            trt.record["cache_in"] = cache.content
            if cache.content.startswith(b"other machine"):
                return ignore_mismatch
            self.cache = cache
            return True

        def get_timing_cache(self) -> Cache | None:
            return self.cache

        def add_optimization_profile(self, profile: Profile) -> int:
            trt.record["profiles"].append(profile.shapes)
            return len(trt.record["profiles"]) - 1

    class Network:
        num_inputs, num_layers, num_outputs = len(inputs), 0, 0

        def get_input(self, number: int) -> Any:
            return types.SimpleNamespace(name=inputs[number])

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Network:
            trt.record["network"] = flags
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            trt.record["level"] = getattr(config, "hardware_compatibility_level", None)
            config.progress_monitor.phase_start("Building engine", None, 2)
            if not config.progress_monitor.step_complete("Building engine", 0):
                return None
            config.progress_monitor.phase_finish("Building engine")
            return b"plan of TensorRT" if builds else None

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Network, logger: Any) -> None:
            pass

        def parse_from_file(self, path: str) -> bool:
            return True

    trt.ILogger, trt.IProgressMonitor, trt.Builder, trt.OnnxParser = ILogger, IProgressMonitor, Builder, OnnxParser
    trt.IBuilderConfig, trt.INetworkDefinition, trt.IOptimizationProfile = Config, Network, Profile
    flags = ("VERSION_COMPATIBLE", "TF32", "REFIT", "STRIP_PLAN")
    trt.BuilderFlag = types.SimpleNamespace(**{flag: flag for flag in flags})
    trt.HardwareCompatibilityLevel = types.SimpleNamespace(
        AMPERE_PLUS="AMPERE_PLUS", SAME_COMPUTE_CAPABILITY="SAME_COMPUTE_CAPABILITY"
    )
    trt.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1, PREFER_AOT_PYTHON_PLUGINS=3)
    return trt


class Symbol:
    """An integer that is known when the engine runs. Like the real one it knows `+ - * //` with a number on its right
    alone, and its result keeps no type: a kernel's argument must be wrapped anew."""

    def __init__(self, value: Any) -> None:
        self.value = value.value if isinstance(value, Symbol) else int(value)

    def _with(self, other: Any) -> int:
        return other.value if isinstance(other, Symbol) else int(other)

    def __add__(self, other: Any) -> Symbol:
        return Symbol(self.value + self._with(other))

    def __sub__(self, other: Any) -> Symbol:
        return Symbol(self.value - self._with(other))

    def __mul__(self, other: Any) -> Symbol:
        return Symbol(self.value * self._with(other))

    def __floordiv__(self, other: Any) -> Symbol:
        return Symbol(self.value // self._with(other))


def make_plugin_module(trt: Any) -> Any:
    """`tensorrt.plugin`; `registered` and `implemented` hold the functions by their ids."""
    trtp: Any = types.ModuleType("tensorrt.plugin")
    trtp.registered, trtp.implemented = {}, {}

    class TensorDesc:
        def __init__(self, shape: tuple[Any, ...], dtype: Any) -> None:
            self.shape_expr, self.dtype = tuple(Symbol(size) for size in shape), dtype

        def like(self) -> TensorDesc:
            return TensorDesc(self.shape_expr, self.dtype)

    class SymInt32(Symbol):
        pass

    class SymIntExprs(list):
        @classmethod
        def from_tuple(cls, values: Any) -> SymIntExprs:
            assert all(isinstance(value, SymInt32) for value in values)
            return cls(values)

    class KernelLaunchParams:
        def __init__(self) -> None:
            for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z"):
                setattr(self, name, 1)
            self.shared_mem = 0

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem"):
                raise AttributeError(name)
            self.__dict__[name] = SymInt32(value)

    def register(plugin_id: str) -> Any:
        def decorate(function: Any) -> Any:
            assert plugin_id not in trtp.registered, "already has a definition"
            signature, attributes = inspect.signature(function), False
            for parameter in signature.parameters.values():
                assert isinstance(parameter.annotation, type), f"{parameter} has no class as its annotation"
                assert parameter.default is inspect.Parameter.empty
                if issubclass(parameter.annotation, TensorDesc):
                    assert not attributes, "tensors come before attributes"
                else:
                    assert parameter.annotation in (int, float, str, bool, bytes)
                    attributes = True
            assert typing.get_origin(signature.return_annotation) is tuple
            assert all(issubclass(part, TensorDesc) for part in typing.get_args(signature.return_annotation))
            trtp.registered[plugin_id] = function
            return function

        return decorate

    def aot_impl(plugin_id: str) -> Any:
        def decorate(function: Any) -> Any:
            wanted = [*inspect.signature(trtp.registered[plugin_id]).parameters, "outputs", "tactic"]
            signature = inspect.signature(function)
            assert list(signature.parameters) == wanted, f"expected input arg schema {wanted}"
            assert typing.get_origin(signature.parameters["outputs"].annotation) is tuple
            results = typing.get_args(signature.return_annotation)
            assert results[:2] == (str | bytes, str | bytes)
            assert issubclass(results[2], KernelLaunchParams)
            assert issubclass(results[3], SymIntExprs)
            trtp.implemented[plugin_id] = function
            return function

        return decorate

    trtp.TensorDesc, trtp.SymInt32, trtp.SymIntExprs = TensorDesc, SymInt32, SymIntExprs
    trtp.KernelLaunchParams, trtp.register, trtp.aot_impl = KernelLaunchParams, register, aot_impl
    trtp.from_shape_expr = TensorDesc
    return trtp
