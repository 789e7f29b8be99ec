"""Engines: real ones by TensorRT for RTX, which needs no GPU to build; TensorRT by what is asked of its module."""

from __future__ import annotations

import errno
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import pytest

from tests.export.conftest import TARGETS
from xfm_fast.errors import ExportError, UnavailableError
from xfm_fast.export import engines
from xfm_fast.export.expected import generated_examples
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.runtimes import tensorrt as engine_library
from xfm_fast.export.runtimes import tensorrt as tensorrt_engines
from xfm_fast.export.runtimes.tensorrt import TensorRTRequest, check_engine_file, load_library
from xfm_fast.export.slots import graph_profiles, parse_profiles
from xfm_fast.export.verification import verify
from xfm_fast.models.xfm import XFM

PROFILES = ("latency:batch=1,texts=1..8..16,length=1..16..40",)
# What is used of TensorRT's `IBuilderConfig`.
_CONFIG = (
    "add_optimization_profile", "builder_optimization_level", "clear_flag", "create_timing_cache", "get_timing_cache",
    "hardware_compatibility_level", "progress_monitor", "set_flag", "set_timing_cache",
)  # fmt: skip


def rtx() -> engine_library.Library:
    pytest.importorskip("tensorrt_rtx", reason="builds engines with tensorrt-rtx")
    return load_library("tensorrt-rtx")


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Puts a GPU in place, and a recorder of calls for TensorRT: that they are calls of it, `real_tensorrt` shows."""

    def install(version: str = "10.14.1.48", *, gpu: int | None = 89) -> Any:
        module = MagicMock(__version__=version)
        severities = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
        module.ILogger = type("ILogger", (), {name: number for number, name in enumerate(severities)})
        module.IProgressMonitor, module.IStreamWriter = (type(name, (), {}) for name in ("Monitor", "Writer"))
        module.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        builder = module.Builder.return_value
        builder.build_serialized_network_to_stream.side_effect = lambda _, __, writer: writer.write(b"plan of TensorRT")
        network = builder.create_network.return_value
        network.num_inputs, network.get_input.return_value.name = 1, "x"
        # It has no compute capabilities to set, unlike that of TensorRT for RTX.
        config = builder.create_builder_config.return_value = MagicMock(spec_set=_CONFIG)
        config.add_optimization_profile.return_value = 0
        config.get_timing_cache.return_value.serialize.return_value = b"timed"
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(engine_library, "local_capability", lambda: gpu)
        return module

    return install


class Watcher:
    """Progress, remembered; raises Ctrl-C in the phase of this name."""

    def __init__(self, interrupted_in: str = "") -> None:
        self.graphs: list[tuple[str, int, int]] = []
        self.phases: list[tuple[str, int, int, int]] = []
        self.interrupted_in = interrupted_in

    def graph(self, name: str, number: int, count: int) -> None:
        self.graphs.append((name, number, count))

    def phase(self, name: str, done: int, steps: int, depth: int) -> None:
        self.phases.append((name, done, steps, depth))
        if name == self.interrupted_in:
            raise KeyboardInterrupt


def test_bf16_engines_of_all_graphs_and_their_manifest(bf16_engines: Path) -> None:
    library = rtx()
    manifest = Manifest.load(bf16_engines)
    assert manifest.kind == "tensorrt-rtx"
    assert manifest.graph_names == ("vision", "text", "image_memory", "fusion")
    assert manifest.target is not None
    assert manifest.target.compute_capabilities == list(TARGETS)
    assert manifest.target.version == library.version
    assert manifest.versions["tensorrt-rtx"] == library.version
    assert [profile.name for profile in manifest.graph("fusion").profiles] == ["latency", "bulk"]
    for graph in manifest.graphs:
        assert graph.build_seconds > 0
        record = next(record for record in manifest.files if record.name == graph.file)
        check_engine_file(bf16_engines / graph.file, library, expected_bytes=record.bytes)
    manifest.require_target(library_version=library.version, compute_capability=89)
    with pytest.raises(ExportError, match="SM90"):
        manifest.require_target(library_version=library.version, compute_capability=90)
    # The graphs that were kept are an export of their own.
    assert Manifest.load(bf16_engines / engines.ONNX_FOLDER).kind == "onnx"
    assert (manifest.status, manifest.graphs_verification) == ("unverified", None), "no examples were given"


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_graphs_behind_engines_are_compared_on_the_cpu(
    small_model: XFM, tmp_path: Path, quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx()
    examples = generated_examples(small_model.config)

    def export(folder: Path) -> Manifest:
        return engines.export_engines(
            small_model, folder, "tensorrt-rtx", dtype="fp16", sm="89", graphs=("image_memory",), keep_onnx=True,
            profile=("bulk:batch=1..4",), quantize=quantize, examples=examples,
        )  # fmt: skip

    monkeypatch.setattr(tensorrt_engines, "local_capability", lambda: None)
    manifest = export(tmp_path / "good")
    assert (manifest.status, manifest.verification) == ("graphs verified", None)
    assert manifest.graphs_verification is not None
    assert [check.output for check in manifest.graphs_verification.checks] == ["memory"]
    # What lies beside the engines is what they were built from, 8-bit products included.
    kept = verify(tmp_path / "good" / engines.ONNX_FOLDER)
    assert (kept.status, kept.options.get("arithmetic")) == ("verified", quantize)

    def twist(record: Any, path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        graph = onnx.load(path)
        for node in graph.graph.node:
            for part in node.attribute:
                # Heads and tokens change places.
                if part.name == "perm":
                    part.ints[1], part.ints[2] = part.ints[2], part.ints[1]
        onnx.save(graph, path)

    if quantize is None:
        monkeypatch.setattr(engines, "make_rewrite", lambda *_, **__: twist)
        quantize = "int8"
        with pytest.raises(ExportError, match="image_memory"):
            export(tmp_path / "bad")


def test_flags_of_every_build() -> None:
    library = rtx()
    config = library.trt.Builder(engine_library.message_logger(library.trt, [])).create_builder_config()
    library.configure(config, TensorRTRequest(), (89,))
    flags = library.trt.BuilderFlag
    assert not config.get_flag(flags.TF32), "fp32 is not rounded to TF32"
    assert config.get_flag(flags.REQUIRE_USER_ALLOCATION), "a CUDA graph captures no allocation"


def test_an_interrupted_build_stops_and_leaves_nothing(bf16_engines: Path, tmp_path: Path) -> None:
    library, manifest = rtx(), Manifest.load(bf16_engines)
    record = manifest.graph("image_memory")
    with pytest.raises(KeyboardInterrupt):
        engines.build_engine(
            library, bf16_engines / "onnx" / "image_memory.onnx", tmp_path / "x.engine", TensorRTRequest(), TARGETS,
            record.profiles, progress=Watcher("Cloning network graph"),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [0, 10, 3000])
def test_a_truncated_engine_is_named(bf16_engines: Path, tmp_path: Path, kept: int) -> None:
    library, whole = rtx(), (bf16_engines / "text.engine").read_bytes()
    path = tmp_path / "text.engine"
    path.write_bytes(whole[:kept])
    with pytest.raises(ExportError, match=r"text\.engine (is empty|is truncated|cannot be loaded)"):
        check_engine_file(path, library)
    shutil.copytree(bf16_engines, tmp_path / "copy")
    (tmp_path / "copy" / "text.engine").write_bytes(whole[:kept])
    with pytest.raises(ExportError, match=r"text\.engine is truncated"):
        Manifest.load(tmp_path / "copy")


def test_engines_of_other_libraries_are_named(tensorrt: Callable[..., Any], tmp_path: Path) -> None:
    tensorrt()
    library = load_library("tensorrt")
    path = tmp_path / "text.engine"
    path.write_bytes(b"vtrt" + bytes(60))
    with pytest.raises(ExportError, match="built by TensorRT for RTX"):
        check_engine_file(path, library)
    path.write_bytes(b"some plan")
    check_engine_file(path, library, expected_bytes=9)
    with pytest.raises(ExportError, match=r"truncated \(9 of 10 bytes\)"):
        check_engine_file(path, library, expected_bytes=10)
    with pytest.raises(ExportError, match="no engine of TensorRT for RTX"):
        check_engine_file(path, rtx())
    with pytest.raises(ExportError, match="cannot be read"):
        check_engine_file(tmp_path / "absent", library)


def onnx_of(path: Path, nodes: list[Any], inputs: dict[str, tuple[int, list[Any]]], output: int) -> Path:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph(
        nodes, "g", [onnx.helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [onnx.helper.make_tensor_value_info("o", output, None)],
    )  # fmt: skip
    domains = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("other", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=domains, ir_version=10), path)
    return path


def failing(kind: str, path: Path) -> Path:
    """A graph of one node, which TensorRT for RTX cannot build."""
    onnx = pytest.importorskip("onnx")
    half, single, bf16 = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    shape, square = [2, 2, 16, 32], [4, 4]

    def made(operator: str, name: str, output: int, inputs: dict[str, tuple[int, list[Any]]], domain: str = "") -> Path:
        node = onnx.helper.make_node(operator, list(inputs), ["o"], name=name, domain=domain)
        return onnx_of(path, [node], inputs, output)

    match kind:
        case "fp32 attention":
            return made("Attention", "node_att", single, dict.fromkeys("qkv", (single, shape)))
        case "bias of another type":
            bias = {"bias": (single, [2, 2, 16, 16])}
            return made("Attention", "node_att", half, dict.fromkeys("qkv", (half, shape)) | bias)
        case "mixed product":
            return made("MatMul", "node_mm", half, {"q": (half, square), "k": (single, square)})
        case "unknown operator":
            return made("Bogus", "node_bogus", half, {"q": (half, square)}, "other")
        case _:
            return made("MatMul", "node_mm", bf16, {"q": (bf16, square), "k": (bf16, square)})


@pytest.mark.parametrize(
    ("kind", "message", "targets"),
    [
        ("fp32 attention", r"build graph 'g' at node_att: .*--dtype bf16", TARGETS),
        ("bias of another type", r"at node_att: .*--dtype bf16", TARGETS),
        ("mixed product", r"read graph 'g' at node_mm: ", TARGETS),
        ("unknown operator", r"read graph 'g' at node_bogus: .*--opset", TARGETS),
        ("bf16 on SM75", r"--dtype fp16, or leave out targets below SM80", (75,)),
    ],
)
def test_failures_of_the_builder_name_layer_and_remedy(
    kind: str, message: str, targets: tuple[int, ...], tmp_path: Path
) -> None:
    library, path = rtx(), failing(kind, tmp_path / "g.onnx")
    with pytest.raises(ExportError, match=message):
        engines.build_engine(library, path, tmp_path / "g.engine", TensorRTRequest(), targets, [])
    assert [file.name for file in tmp_path.iterdir()] == ["g.onnx"]


def test_a_layer_that_no_message_names_is_found_by_halving(
    exported_fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real network, cut for real, with a builder that rejects one layer and does not say which."""
    library, manifest = rtx(), Manifest.load(exported_fp16)
    culprit = "node_layer_norm_2"

    real, made = library.trt, []

    class Stubborn:
        """The real builder, but for networks that hold the layer."""

        def __init__(self, logger: Any) -> None:
            self.real, self.builds = real.Builder(logger), 0
            made.append(self)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def build_serialized_network_to_stream(self, network: Any, config: Any, writer: Any) -> bool:
            self.builds += 1
            wanted = {network.get_output(number).name for number in range(network.num_outputs)}
            reached = set()
            for number in reversed(range(network.num_layers)):
                layer = network.get_layer(number)
                if wanted & {layer.get_output(place).name for place in range(layer.num_outputs)}:
                    reached.add(layer.metadata or "")
                    inputs = (layer.get_input(place) for place in range(layer.num_inputs))
                    wanted |= {tensor.name for tensor in inputs if tensor is not None}
            return not any(f"{culprit}]" in each or f"{culprit}|" in each for each in reached)

    class Module:
        Builder = Stubborn

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    monkeypatch.setattr(library, "trt", Module())
    record = manifest.graph("text")
    with pytest.raises(ExportError, match=f"graph 'text' at {culprit}:"):
        engines.build_engine(
            library, exported_fp16 / "text.onnx", tmp_path / "t.engine", TensorRTRequest(), TARGETS,
            graph_profiles(record, parse_profiles(PROFILES)),
        )  # fmt: skip
    assert 2 < made[0].builds < 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version_compatible": True}, "--version-compatible"),
        ({"hardware_compatible": "ampere_plus"}, "--sm 75,80"),
        ({"timing_cache": Path("cache")}, "--timing-cache"),
    ],
)
def test_what_tensorrt_for_rtx_lacks_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnavailableError, match=message):
        rtx().check(TensorRTRequest(sm="89", **options), "bf16")


def test_a_disk_that_fills_while_the_engine_is_written(
    bf16_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library writes the engine itself, and no exception may pass through it."""
    library = rtx()

    def full(data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_files(writers: dict[Path, Callable[[Any], None]]) -> None:
        for write in writers.values():
            write(SimpleNamespace(write=full))

    monkeypatch.setattr(engines, "write_files", write_files)
    with pytest.raises(OSError, match="No space left on device"):
        engines.build_engine(
            library, bf16_engines / "onnx" / "image_memory.onnx", tmp_path / "x.engine", TensorRTRequest(), TARGETS,
            Manifest.load(bf16_engines).graph("image_memory").profiles,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def one_input() -> Iterator[Any]:
    from xfm_fast.export.manifest import ProfileRecord

    for name, most in (("latency", 1), ("bulk", 8)):
        yield ProfileRecord(name=name, least={"x": [1, 3]}, best={"x": [1, 3]}, most={"x": [most, 3]})


def test_tensorrt_is_told_what_it_needs(tensorrt: Callable[..., Any], tmp_path: Path) -> None:
    trt = tensorrt()
    library, builder = load_library("tensorrt"), trt.Builder.return_value
    config, shapes = builder.create_builder_config.return_value, builder.create_optimization_profile.return_value
    options = TensorRTRequest(
        timing_cache=tmp_path / "timings", version_compatible=True, hardware_compatible="ampere_plus"
    )
    (tmp_path / "timings").write_bytes(b"earlier")
    targets = library.check(options, "bf16")
    engine = tmp_path / "g.engine"
    engines.build_engine(library, tmp_path / "g.onnx", engine, options, targets, list(one_input()))
    assert engine.read_bytes() == b"plan of TensorRT"
    assert targets == (89,)
    builder.create_network.assert_called_with(1 << 1)  # strongly typed
    assert config.clear_flag.mock_calls == [call(trt.BuilderFlag.TF32)]
    assert config.set_flag.mock_calls == [call(trt.BuilderFlag.VERSION_COMPATIBLE)]
    assert config.hardware_compatibility_level is trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert shapes.set_shape.mock_calls == [call("x", (1, 3), (1, 3), (most, 3)) for most in (1, 8)]
    assert config.add_optimization_profile.mock_calls == [call(shapes)] * 2
    config.create_timing_cache.assert_called_once_with(b"earlier")
    config.set_timing_cache.assert_called_once_with(config.create_timing_cache.return_value, False)
    assert (tmp_path / "timings").read_bytes() == b"timed"


def test_an_engine_of_which_nothing_was_written(tensorrt: Callable[..., Any], tmp_path: Path) -> None:
    """A module over libraries of another version may call the wrong function, and be told that all is well."""
    tensorrt().Builder.return_value.build_serialized_network_to_stream.side_effect = lambda *_: True
    with pytest.raises(ExportError, match="graph 'g'"):
        engines.build_engine(
            load_library("tensorrt"), tmp_path / "g.onnx", tmp_path / "g.engine", TensorRTRequest(), (89,), []
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("version", "gpu", "options", "message"),
    [
        ("10.14", None, {}, "no NVIDIA GPU"),
        ("10.14", 89, {"sm": "80,89"}, "SM80, SM89"),
        ("10.14", 75, {}, "SM75 has no bf16"),
        ("10.14", 75, {"hardware_compatible": "ampere_plus"}, "SM75"),
        ("10.13.3", 89, {}, r"tensorrt>=10\.14"),
    ],
)
def test_what_tensorrt_lacks_is_refused(
    tensorrt: Callable[..., Any], version: str, gpu: int | None, options: dict[str, Any], message: str
) -> None:
    tensorrt(version, gpu=gpu)
    with pytest.raises(UnavailableError, match=message):
        load_library("tensorrt").check(TensorRTRequest(**options), "bf16")


def test_a_tensorrt_that_was_never_tried(tensorrt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a word of its own, and is refused only where it lacks what a build calls."""
    module = tensorrt("13.2.0.1")
    with pytest.warns(UserWarning, match=r"TensorRT 13\.2\.0\.1"):
        assert load_library("tensorrt").check(TensorRTRequest(), "bf16") == (89,)
    del module.Builder.create_builder_config, module.BuilderFlag.TF32
    lacks = r"13\.2\.0\.1 lacks Builder\.create_builder_config, BuilderFlag\.TF32"
    with pytest.raises(UnavailableError, match=lacks):
        load_library("tensorrt").check(TensorRTRequest(), "bf16")
    with warnings.catch_warnings(action="error"):
        tensorrt("11.9.9")
        load_library("tensorrt").check(TensorRTRequest(), "bf16")
        library = rtx()
        library.check(TensorRTRequest(sm="89"), "bf16")
    monkeypatch.setattr(engine_library.LibraryForRTX, "newest", 0)
    with pytest.warns(UserWarning, match=rf"TensorRT for RTX {library.version} .* 'tensorrt-rtx<1'"):
        library.check(TensorRTRequest(sm="89"), "bf16")
