"""The real Python module of TensorRT without its libraries: NVIDIA's bindings over stubs of the C functions in them.

Classes, flags and signatures of a version are then there, on any machine, but nothing behind them. `Checked` objects
stand for those that the library would make: they have the attributes of the real class alone, and take a call only if a
signature in its documentation does. As a script, `python real_tensorrt.py FOLDER SCENARIO` runs one of the scenarios
below, because a process can load one version only.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STUB = """
void *createInferBuilder_INTERNAL(void *logger, int version) { return 0; }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { return 0; }
void *createInferRuntime_INTERNAL(void *logger, int version) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return 0; }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return 0; }
void *getBuilderPluginRegistry(int capability) { return 0; }
void *getPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void *logger, const char *space) { return 1; }
"""


def compile_stubs(compiler: str, folder: Path, major: int) -> None:
    """Write the three libraries of a major version of TensorRT."""
    source = folder / "stub.c"
    source.write_text(STUB)
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = f"lib{name}.so.{major}"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-w", source, "-o", folder / library, f"-Wl,-soname,{library}", "-ldl"],
            check=True,
        )


def load_bindings(folder: str) -> Any:
    """The module from a folder that `pip install --target` made, under the name that it has in an installation."""
    sys.path.insert(0, folder)
    trt = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = trt
    return trt


class Checked:
    """An object of a class of TensorRT, without a library behind it.

    Args:
        kind: the class.
        answers: what properties and methods give, by `Class.name`, or functions that give it; by default a number,
            true, or a `Checked` object of the documented class.
        calls: receives the names of what was called and set.
    """

    def __init__(self, trt: Any, kind: type, answers: dict[str, Any], calls: list[str]) -> None:
        self.__dict__.update(_trt=trt, _kind=kind, _answers=answers, _calls=calls)

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._kind, name)  # an AttributeError is the real class's own
        if isinstance(member, property):
            return self._result(name, member.fget.__doc__ or "")
        return lambda *args, **kwargs: self._call(name, member, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        member = getattr(self._kind, name)
        assert isinstance(member, property), f"{self._kind.__name__}.{name} is no property"
        assert member.fset is not None, f"{self._kind.__name__}.{name} cannot be set"
        wanted = re.search(r"-> (.*)", member.fget.__doc__ or "")
        assert wanted is not None
        assert fits(self._trt, value, wanted[1]), f"{self._kind.__name__}.{name} is {wanted[1]}, not {value!r}"
        self._calls.append(f"{self._kind.__name__}.{name}")

    def _call(self, name: str, member: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = [*signatures(name, member.__doc__ or "")]
        for parameters, result in known:
            if accepts(self._trt, parameters[1:], args, kwargs):
                self._calls.append(f"{self._kind.__name__}.{name}")
                return self._result(name, f"-> {result}", *args)
        raise TypeError(f"{self._kind.__name__}.{name} takes {known}, not {args} {kwargs}")

    def _result(self, name: str, documented: str, *args: Any) -> Any:
        place = f"{self._kind.__name__}.{name}"
        if place in self._answers:
            answer = self._answers[place]
            return answer(*args) if callable(answer) else answer
        found = re.search(r"-> (.*)", documented)
        last = re.split(r"[.:]", found[1].strip())[-1] if found else ""
        plain: dict[str, Any] = {
            "int": 1,
            "bool": True,
            "str": "x",
            "float": 1.0,
            "None": None,
            "IHostMemory": b"timed",
        }
        if last in plain:
            return plain[last]
        return Checked(self._trt, getattr(self._trt, _PYTHON.get(last, last)), self._answers, self._calls)


# C++ names that are left in the documentation.
_PYTHON = {"IParserError": "ParserError"}


def signatures(name: str, documentation: str) -> Any:
    """Parameters, as (name, type, has a default), and the result of every overload that documentation describes."""
    for line in documentation.splitlines():
        if (found := re.match(rf"\s*(?:\d+\. )?{name}\((.*)\) -> (.*)$", line)) and "*args" not in found[1]:
            parts = re.split(r", (?=\w+:)", found[1])
            split = [re.match(r"(\w+): (.*?)(?: = (.*))?$", part) for part in parts]
            yield [(part[1], part[2], part[3] is not None) for part in split if part], found[2]


def accepts(trt: Any, parameters: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = dict(zip([name for name, _, _ in parameters], args, strict=False)) | kwargs
    kinds = {name: kind for name, kind, _ in parameters}
    needed = {name for name, _, optional in parameters if not optional}
    return (
        len(args) <= len(parameters)
        and needed <= {*given} <= {*kinds}
        and all(fits(trt, value, kinds[name]) for name, value in given.items())
    )


def fits(trt: Any, value: Any, kind: str) -> bool:
    """True where a value may be passed as what the documentation calls a type."""
    last = re.split(r"[.:]", kind.strip())[-1]
    plain: dict[str, Callable[[Any], bool]] = {
        "int": lambda v: isinstance(v, int),
        "SupportsInt": lambda v: isinstance(v, int),
        "bool": lambda v: isinstance(v, bool),
        "str": lambda v: isinstance(v, str),
        "buffer": lambda v: isinstance(v, (bytes, bytearray, memoryview)),
        "Buffer": lambda v: isinstance(v, (bytes, bytearray, memoryview)),
        "tuple": lambda v: isinstance(v, tuple),
        "Dims": lambda v: isinstance(v, (tuple, list)) and all(isinstance(size, int) for size in v),
    }
    if last in plain:
        return plain[last](value)
    wanted = getattr(trt, last)
    return issubclass(value._kind, wanted) if isinstance(value, Checked) else isinstance(value, wanted)


class CheckedModule:
    """`tensorrt` with `Checked` objects in the place of those that only a library can make."""

    def __init__(self, trt: Any, **answers: Any) -> None:
        self._trt, self.calls = trt, []
        self._answers = {key.replace("__", "."): value for key, value in answers.items()}

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._trt, name)
        if name not in ("Builder", "OnnxParser", "Runtime"):
            return real

        def make(*args: Any) -> Checked:
            known = [*signatures("__init__", real.__init__.__doc__)]
            assert any(accepts(self._trt, parameters[1:], args, {}) for parameters, _ in known), (name, known, args)
            return Checked(self._trt, real, self._answers, self.calls)

        return make


def install(trt: Any, **answers: Any) -> CheckedModule:
    """Put a checked module in the place of `tensorrt`, and a GPU in that of this machine's."""
    from xfm_fast.export.runtimes import tensorrt as library

    module: Any = CheckedModule(trt, **answers)
    sys.modules["tensorrt"] = module
    library.local_capability = lambda: 89
    return module


def tiny_graph(folder: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"], name="negate")], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph), folder / "g.onnx")
    return folder / "g.onnx"


def checking(trt: Any, scratch: Path) -> None:
    """What is no part of the interface is refused."""
    module = install(trt)
    builder = module.Builder(trt.Logger())
    config = builder.create_builder_config()
    for wrong in (
        lambda: builder.create_networks(),
        lambda: builder.create_network("flags"),
        lambda: builder.create_network(1, 2),
        lambda: config.set_flag(3),
        lambda: config.set_timing_cache(b"", False),
        lambda: setattr(config, "builder_optimization_level", "high"),
        lambda: setattr(config, "optimisation_level", 3),
        lambda: module.OnnxParser(trt.Logger()),
        lambda: trt.BuilderFlag.TF33,
    ):
        with pytest.raises((AttributeError, TypeError, AssertionError)):
            wrong()


def build(trt: Any, scratch: Path) -> None:
    """A build with every option, twice, so that the timing cache is read as well; and failures, to be explained."""
    from xfm_fast.errors import ExportError
    from xfm_fast.export.engines import build_engine
    from xfm_fast.export.manifest import ProfileRecord
    from xfm_fast.export.runtimes.tensorrt import CALLED, TensorRTRequest, load_library

    onnx, profile = tiny_graph(scratch), ProfileRecord(name="p", least={"x": [1]}, best={"x": [2]}, most={"x": [4]})
    streamed = {"Builder__build_serialized_network_to_stream": lambda _, __, writer: writer.write(b"plan") == 4}
    module = install(trt, ITensor__name="x", **streamed)
    library = load_library("tensorrt")
    assert library.version == trt.__version__
    everything = TensorRTRequest(
        level=3, timing_cache=scratch / "timings", version_compatible=True, hardware_compatible="ampere_plus"
    )
    build_engine(library, onnx, scratch / "g.engine", TensorRTRequest(), (89,), [profile])
    assert {*module.calls} <= {*CALLED}
    for request in (everything, everything):
        targets = library.check(request, "bf16")
        build_engine(library, onnx, scratch / "g.engine", request, targets, [profile])
    assert [(scratch / name).read_bytes() for name in ("g.engine", "timings")] == [b"plan", b"timed"]
    for called in ("IBuilderConfig.set_timing_cache", "IOptimizationProfile.set_shape", "OnnxParser.parse_from_file"):
        assert called in module.calls, called
    module = install(trt, OnnxParser__parse_from_file=False, ITensor__name="x", ParserError__node_name="negate")
    with pytest.raises(ExportError, match="at negate"):
        build_engine(load_library("tensorrt"), onnx, scratch / "g.engine", TensorRTRequest(), (89,), [profile])
    module = install(trt, Builder__build_serialized_network_to_stream=False, ITensor__name="x")
    with pytest.raises(ExportError, match="cannot build graph"):
        build_engine(load_library("tensorrt"), onnx, scratch / "g.engine", TensorRTRequest(), (89,), [profile])
    assert "INetworkDefinition.mark_output" in module.calls
    # A version that was never tried, and has all that a build calls.
    library.trt, library.newest = trt, 9  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.warns(UserWarning, match=f"TensorRT {trt.__version__} is newer than version 9"):
        assert library.check(TensorRTRequest(), "bf16") == (89,)


def run(trt: Any, scratch: Path) -> None:
    """An engine loaded, captured and run, over two profiles."""
    import torch

    from tests.export.test_runtimes import FakeCuda
    from xfm_fast.config import XFMConfig
    from xfm_fast.export.manifest import AxisRecord, GraphRecord, ProfileRecord, TensorRecord, new_manifest
    from xfm_fast.export.runtimes.tensorrt import TensorRT
    from xfm_fast.export.slots import choose_slot, graph_slots

    module = install(trt)
    shapes = {"inputs": ("image_embeds", [2, 3]), "outputs": ("memory_keys_0", [1, 2, 3])}
    tensors: dict[str, Any] = {
        side: [TensorRecord(name=name, dtype="float32", dims=["batch", *rest])] for side, (name, rest) in shapes.items()
    }
    shape = lambda size: {"image_embeds": [size, 2, 3]}  # noqa: E731
    profiles = [
        ProfileRecord(name=str(most), least=shape(1), best=shape(best), most=shape(most))
        for best, most in ((1, 1), (2, 4))
    ]
    record = GraphRecord(
        name="image_memory", file="g.engine", files=["g.engine"], axes={"batch": AxisRecord(least=1, most=4)},
        build_seconds=0, profiles=profiles, **tensors,
    )  # fmt: skip
    manifest = new_manifest(
        kind="tensorrt", source="", weights_sha256="", tokenizer_sha256=None, dtype="fp32", consumer="tensorrt",
        config=XFMConfig.preset("tiny").model_dump(), opset=23, attention="opset23", all_tokens=False, fixed={},
        versions={}, graphs=[record], files=[],
    )  # fmt: skip
    (scratch / "g.engine").write_bytes(b"plan")
    cuda: Any = FakeCuda()
    runtime = TensorRT(manifest, torch.device("cpu"), cuda=cuda)
    graph = runtime.load(record, scratch / "g.engine")
    for size in (1, 3):
        slot, sizes = choose_slot(record.name, graph_slots(record), {"batch": size})
        graph.run({"image_embeds": torch.zeros(size, 2, 3)}, slot, sizes)
    for called in (
        "Runtime.deserialize_cuda_engine", "IExecutionContext.set_device_memory", "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_optimization_profile_async",
    ):  # fmt: skip
        assert called in module.calls, (called, module.calls)


def lacking(trt: Any, scratch: Path) -> None:
    """Bindings without libraries that work: the real classes, which make nothing, end in an error of ours."""
    from xfm_fast.errors import UnavailableError
    from xfm_fast.export.engines import build_engine
    from xfm_fast.export.runtimes.tensorrt import TensorRTRequest, load_library

    with pytest.raises(UnavailableError, match="could not start"):
        build_engine(load_library("tensorrt"), tiny_graph(scratch), scratch / "g", TensorRTRequest(), (89,), [])


SCENARIOS = {made.__name__: made for made in (checking, build, run, lacking)}

if __name__ == "__main__":
    SCENARIOS[sys.argv[2]](load_bindings(sys.argv[1]), Path(sys.argv[3]))
