"""Engines: real ones by TensorRT for RTX, which needs no GPU to build; TensorRT by the calls of its module."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import call

import pytest

from tests.export.conftest import TARGETS
from tests.export.tensorrt_stand_in import tensorrt_module
from xfm_fast.errors import ExportError, InputError, UnavailableError
from xfm_fast.export import engines
from xfm_fast.export.engines import BuilderForRTX, build_engine, find_builder
from xfm_fast.export.expected import generated_examples
from xfm_fast.export.manifest import AxisRecord, GraphRecord, Manifest, ProfileRecord, TensorRecord
from xfm_fast.export.request import EngineRequest, TensorRTRequest
from xfm_fast.export.runtimes.tensorrt import TensorRT, TensorRTForRTX, check_engine_file
from xfm_fast.export.slots import DEFAULT_PROFILES, PACKED_PROFILES, graph_profiles, parse_profiles
from xfm_fast.export.tensorrt import message_logger
from xfm_fast.export.verification import verify
from xfm_fast.models.xfm import XFM


@pytest.fixture
def rtx() -> BuilderForRTX:
    pytest.importorskip("tensorrt_rtx", reason="builds engines with tensorrt-rtx")
    return BuilderForRTX()


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Installs the stand-in for TensorRT, and a GPU."""

    def install(version: str = "10.14.1.48", *, gpu: int | None = 89) -> Any:
        module = tensorrt_module(version)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(engines, "local_capability", lambda: gpu)
        return module

    return install


def test_bf16_engines_of_all_graphs_and_their_manifest(
    bf16_engines: Path, rtx: BuilderForRTX
) -> None:
    manifest = Manifest.load(bf16_engines)
    assert (manifest.kind, manifest.graph_names) == (
        "tensorrt-rtx",
        ("vision", "text", "image_memory", "fusion"),
    )
    assert manifest.target is not None
    assert manifest.target.compute_capabilities == list(TARGETS)
    assert manifest.target.version == manifest.versions["tensorrt-rtx"] == rtx.version
    assert [profile.name for profile in manifest.graph("fusion").profiles] == ["latency", "bulk"]
    for graph in manifest.graphs:
        record = next(record for record in manifest.files if record.name == graph.file)
        check_engine_file(bf16_engines / graph.file, TensorRTForRTX, expected_bytes=record.bytes)
    with pytest.raises(ExportError, match="SM90"):
        manifest.require_target(library_version=rtx.version, compute_capability=90)
    # The graphs that were kept are an export of their own.
    assert Manifest.load(bf16_engines / engines.ONNX_FOLDER).kind == "onnx"
    assert (manifest.status, manifest.graphs_verification) == ("unverified", None), (
        "no examples were given"
    )


@pytest.mark.usefixtures("rtx")
def test_the_graphs_of_engines_are_compared_on_the_cpu(small_model: XFM, tmp_path: Path) -> None:
    manifest = engines.export_engines(
        small_model, tmp_path, "tensorrt-rtx", dtype="fp16", sm="89", graphs=("image_memory",), keep_onnx=True,
        profile=("bulk:batch=1..4",), quantize="int8", examples=generated_examples(small_model.config),
    )  # fmt: skip
    assert manifest.status in ("graphs verified", "verified")
    assert manifest.graphs_verification is not None
    assert [check.output for check in manifest.graphs_verification.checks] == ["memory"]
    # The kept graphs are those that the engines were built from, 8-bit GEMMs included.
    size = verify(tmp_path / engines.ONNX_FOLDER)
    assert (size.status, size.options.get("arithmetic")) == ("verified", "int8")


def test_flags_of_every_build(rtx: BuilderForRTX) -> None:
    config = rtx.trt.Builder(message_logger(rtx.trt, [])).create_builder_config()
    rtx.configure(config, EngineRequest(), (89,))
    flags = rtx.trt.BuilderFlag
    assert not config.get_flag(flags.TF32), "fp32 is not rounded to TF32"
    assert config.get_flag(flags.REQUIRE_USER_ALLOCATION), "a CUDA graph captures no allocation"


def test_an_interrupted_build_leaves_nothing(
    bf16_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rtx: BuilderForRTX
) -> None:
    """Ctrl-C in a phase of the builder, and a full disk while it writes."""
    profiles = Manifest.load(bf16_engines).graph("image_memory").profiles
    arguments = (
        rtx,
        bf16_engines / "onnx" / "image_memory.onnx",
        tmp_path / "x.engine",
        EngineRequest(),
        TARGETS,
    )

    def interrupt(phase: str) -> None:
        if phase == "Cloning network graph":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(*arguments, profiles, progress=interrupt)

    def full(data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_files(writers: dict[Path, Callable[[Any], None]]) -> None:
        for write in writers.values():
            write(SimpleNamespace(write=full))

    monkeypatch.setattr(engines, "write_files", write_files)
    with pytest.raises(OSError, match="No space left on device"):
        build_engine(*arguments, profiles)
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_engines_are_named(bf16_engines: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "text.engine", (bf16_engines / "text.engine").read_bytes()
    for size in (0, 10, 3000):
        path.write_bytes(content[:size])
        with pytest.raises(ExportError, match=r"text\.engine"):
            check_engine_file(path, TensorRTForRTX)
    path.write_bytes(content)
    check_engine_file(path, TensorRTForRTX)
    with pytest.raises(ExportError, match=r"text\.engine"):
        check_engine_file(path, TensorRT)
    path.write_bytes(b"some plan")
    check_engine_file(path, TensorRT, expected_bytes=9)
    for runtime, size in ((TensorRT, 10), (TensorRTForRTX, 9)):
        with pytest.raises(ExportError, match=r"text\.engine"):
            check_engine_file(path, runtime, expected_bytes=size)
    shutil.copytree(bf16_engines, tmp_path / "copy")
    (tmp_path / "copy" / "text.engine").write_bytes(content[:3000])
    with pytest.raises(ExportError, match=r"text\.engine is truncated"):
        Manifest.load(tmp_path / "copy")


def test_failures_of_the_builder_name_the_layer(tmp_path: Path, rtx: BuilderForRTX) -> None:
    onnx = pytest.importorskip("onnx")
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, [4, 4]) for name in "xy"
    )
    node = onnx.helper.make_node("Bogus", ["x"], ["y"], name="the_node", domain="other")
    domains = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("other", 1)]
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=domains, ir_version=10), tmp_path / "g.onnx"
    )
    with pytest.raises(ExportError, match="'g' at the_node"):
        build_engine(rtx, tmp_path / "g.onnx", tmp_path / "g.engine", EngineRequest(), TARGETS, [])
    assert [file.name for file in tmp_path.iterdir()] == ["g.onnx"]


def test_calls_of_a_build_with_tensorrt(tensorrt: Callable[..., Any], tmp_path: Path) -> None:
    trt = tensorrt()
    library, builder = find_builder("tensorrt"), trt.Builder.return_value
    config, shapes = (
        builder.create_builder_config.return_value,
        builder.create_optimization_profile.return_value,
    )
    profiles = [
        ProfileRecord(
            name=str(limit), least={"x": [1, 3]}, best={"x": [1, 3]}, most={"x": [limit, 3]}
        )
        for limit in (1, 8)
    ]
    request = TensorRTRequest(
        level=2,
        timing_cache=tmp_path / "timings",
        version_compatible=True,
        hardware_compatible="ampere_plus",
    )
    (tmp_path / "timings").write_bytes(b"earlier")
    targets = library.check(request, "bf16")
    build_engine(library, tmp_path / "g.onnx", tmp_path / "g.engine", request, targets, profiles)
    assert (tmp_path / "g.engine").read_bytes() == b"plan of TensorRT"
    assert targets == (89,)
    builder.create_network.assert_called_with(1 << 1)  # strongly typed
    assert config.clear_flag.mock_calls == [call(trt.BuilderFlag.TF32)]
    assert config.builder_optimization_level == 2
    assert config.set_flag.mock_calls == [call(trt.BuilderFlag.VERSION_COMPATIBLE)]
    assert config.hardware_compatibility_level is trt.HardwareCompatibilityLevel.AMPERE_PLUS
    config.create_timing_cache.assert_called_once_with(b"earlier")
    assert (tmp_path / "timings").read_bytes() == b"timed"
    assert shapes.set_shape.mock_calls == [
        call("x", (1, 3), (1, 3), (limit, 3)) for limit in (1, 8)
    ]
    assert config.add_optimization_profile.mock_calls == [call(shapes)] * 2
    # A module over libraries of another version may succeed and write nothing.
    builder.build_serialized_network_to_stream.side_effect = lambda *_: True
    with pytest.raises(ExportError, match="graph 'other'"):
        build_engine(
            library, tmp_path / "other.onnx", tmp_path / "other.engine", EngineRequest(), (89,), []
        )
    assert not (tmp_path / "other.engine").exists()


@pytest.mark.parametrize(
    ("version", "gpu", "sm", "reason"),
    [
        ("10.14", None, (), "no NVIDIA GPU"),
        ("10.14", 89, "80,89", "SM80, SM89"),
        ("10.14", 75, (), "SM75 has no bf16"),
        ("10.13.3", 89, (), r"tensorrt>=10\.14"),
        ("", 89, "50", "SM50"),
        ("", 89, "90", r"not for SM90; change --sm, or use --to tensorrt"),
        ("", None, (), "--sm"),
    ],
)
def test_unavailable_targets_are_refused(
    tensorrt: Callable[..., Any], version: str, gpu: int | None, sm: Any, reason: str
) -> None:
    """Cover versions of TensorRT, and TensorRT for RTX."""
    tensorrt(version or "10.14", gpu=gpu)
    if not version:
        pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UnavailableError, match=reason):
        find_builder("tensorrt" if version else "tensorrt-rtx").check(EngineRequest(sm=sm), "bf16")


TEXT = GraphRecord(
    name="text",
    file="text.engine",
    files=["text.engine"],
    inputs=[
        TensorRecord(name=name, dtype="int64", dims=["batch", "length"])
        for name in ("input_ids", "attention_mask")
    ],
    outputs=[TensorRecord(name="text_feature", dtype="float16", dims=["batch", 32])],
    axes={"batch": AxisRecord(least=1, most=None), "length": AxisRecord(least=1, most=64)},
    build_seconds=0,
)


def test_profiles() -> None:
    texts = [
        "latency:batch=1, length=1..16..40",
        "bulk:batch=1..8..64,length=2..40",
        "again:batch=1,length=1..16..40",
    ]
    profiles = parse_profiles(texts)
    assert parse_profiles(map(str, profiles)) == profiles
    latency, bulk = graph_profiles(TEXT, profiles)
    assert latency.least == {"input_ids": [1, 1], "attention_mask": [1, 1]}
    assert (latency.best["input_ids"], latency.most["input_ids"]) == ([1, 16], [1, 40])
    # Two numbers: tuned for the greatest.
    assert (bulk.least["input_ids"], bulk.best["input_ids"], bulk.most["input_ids"]) == (
        [1, 2],
        [8, 40],
        [64, 40],
    )
    assert graph_profiles(TEXT.model_copy(update={"axes": {}}), DEFAULT_PROFILES) == []
    assert parse_profiles([]) == DEFAULT_PROFILES
    assert parse_profiles([], packed=True) == PACKED_PROFILES


@pytest.mark.parametrize(
    "text",
    ["batch=1", "a:", "a:height=1", "a:batch=1,batch=2", "a:batch=1-8", "a:batch=0..8", "a:batch=1..9..8",
     "a:batch=1..2..3..4", "a:batch=1", "a:batch=1,length=1..65"],
)  # fmt: skip
def test_bad_profiles_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="profile"):
        graph_profiles(TEXT, parse_profiles([text]))
