"""8-bit engines: which inputs calibrate a graph, where the nodes go, and that the result builds and stays close."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from xfm_fast.errors import ExportError, UnavailableError
from xfm_fast.export import quantise
from xfm_fast.export.engines import build as engines
from xfm_fast.export.engines.library import load_library
from xfm_fast.export.engines.profiles import DEFAULT_PROFILES
from xfm_fast.export.expected import Examples, generated_examples
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.request import EngineRequest
from xfm_fast.models.xfm import XFM


@pytest.fixture
def examples(small_model: XFM) -> Examples:
    return generated_examples(small_model.config, images=2, texts=20, longest=12)


@pytest.mark.parametrize("name", ["vision", "text", "image_memory", "fusion", "match"])
def test_inputs_of_calibration(small_model: XFM, examples: Examples, exported_fp16: Path, name: str) -> None:
    record = Manifest.load(exported_fp16, check_files=False).graph(name)
    feeds = list(quantise.calibration_inputs(small_model, record, examples, "fp16"))
    images, texts = len(examples.pixels), 2  # 20 texts, 16 at once
    assert len(feeds) == {"text": texts, "vision": images, "image_memory": images}.get(name, images * texts)
    for feed in feeds:
        for tensor in record.inputs:
            array = feed[tensor.name]
            assert str(array.dtype) == tensor.dtype
            assert len(array.shape) == len(tensor.dims)
            fixed = [(size, dim) for size, dim in zip(array.shape, tensor.dims, strict=True) if isinstance(dim, int)]
            assert all(size == dim for size, dim in fixed)
    if name == "fusion":
        memories = {feed["memory"].tobytes() for feed in feeds}
        assert len(memories) == images


@pytest.fixture
def quantised(small_model: XFM, examples: Examples, exported_fp16: Path, tmp_path: Path) -> Path:
    pytest.importorskip("onnxruntime")
    record = Manifest.load(exported_fp16, check_files=False).graph("fusion")
    path = tmp_path / "fusion.onnx"
    shutil.copy(exported_fp16 / "fusion.onnx", path)
    quantise.quantising(small_model, examples, "int8", "fp16")(record, path)
    return path


def test_int8_products_stay_close(small_model: XFM, examples: Examples, exported_fp16: Path, quantised: Path) -> None:
    import onnx
    import onnxruntime as ort

    assert [file.name for file in quantised.parent.iterdir()] == ["fusion.onnx"]
    graph = onnx.load(quantised).graph
    count = Counter(node.op_type for node in graph.node)
    products = [node for node in graph.node if node.op_type == "MatMul"]
    dequantised = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    assert products
    assert all(set(node.input) <= dequantised for node in products)
    assert count["QuantizeLinear"] < count["DequantizeLinear"]  # weights are stored in 8 bits
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            assert types.get(node.input[0], onnx.TensorProto.INT8) == onnx.TensorProto.INT8
    record = Manifest.load(exported_fp16, check_files=False).graph("fusion")
    feed = next(quantise.calibration_inputs(small_model, record, examples, "fp16"))
    found, expected = (
        torch.from_numpy(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["fused"], feed)[0]).float()
        for path in (quantised, exported_fp16 / "fusion.onnx")
    )
    similar = torch.cosine_similarity(found, expected, dim=-1)
    assert 0.97 < similar.min() < 1
    assert not torch.equal(found, expected)


@pytest.mark.slow
def test_int8_engine(quantised: Path, exported_fp16: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    record = Manifest.load(exported_fp16, check_files=False).graph("fusion")
    library = load_library("tensorrt-rtx")
    options = EngineRequest(sm="80,89,120").complete
    built = engines.build_engine(
        library, quantised, tmp_path / "int8.engine", options, library.check(options, "int8"),
        engines.graph_profiles(record, DEFAULT_PROFILES),
    )  # fmt: skip
    engines.check_engine_file(built.path, library, expected_bytes=built.bytes)


def test_what_cannot_be_quantised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    missing = {"modelopt"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    assert quantise.check_quantisation("int8", "fp16") == "int8"
    for kind, dtype, message in (
        ("int4", "fp16", "choose from int8, fp8"),
        ("fp8", "fp16", r"pip install 'xfm-fast\[modelopt\]', or use --quantize int8 with --dtype fp16"),
        ("int8", "bf16", "or use --dtype fp16"),
    ):
        with pytest.raises(UnavailableError, match=message):
            quantise.check_quantisation(kind, dtype)  # pyright: ignore[reportArgumentType]
    missing.add("onnxruntime")
    with pytest.raises(UnavailableError, match=r"pip install 'xfm-fast\[export\]'"):
        quantise.check_quantisation("int8", "fp16")


def test_modelopt_is_given_the_users_images(
    small_model: XFM, examples: Examples, exported_fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for modelopt, which this checks no further than its documented arguments."""
    pytest.importorskip("onnxruntime")
    given: dict[str, Any] = {}

    def quantize(path: str, **options: Any) -> None:
        given.update(options)
        Path(options["output_path"]).write_bytes(b"quantised " + Path(path).read_bytes()[:8])

    module: Any = ModuleType("modelopt.onnx.quantization")
    module.quantize = quantize
    for name in ("modelopt", "modelopt.onnx"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    record = Manifest.load(exported_fp16, check_files=False).graph("vision")
    path = Path(shutil.copy(exported_fp16 / "vision.onnx", tmp_path / "vision.onnx"))
    rewrite = quantise.quantising(small_model, examples, "fp8", "fp16")
    rewrite(record, path)
    assert path.read_bytes() == b"quantised " + (exported_fp16 / "vision.onnx").read_bytes()[:8]
    assert [file.name for file in tmp_path.iterdir()] == ["vision.onnx"]
    assert (given["quantize_mode"], given["high_precision_dtype"], given["calibration_eps"]) == ("fp8", "fp16", ["cpu"])
    reader = given["calibration_data_reader"]
    pixels = examples.pixels.half().numpy()
    np.testing.assert_array_equal(reader.get_first()["pixels"], pixels[:1])
    for _ in range(2):
        found = [feed["pixels"] for feed in iter(reader.get_next, None)]
        np.testing.assert_array_equal(np.concatenate(found), pixels)
        reader.rewind()

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("unsupported\nmodel")

    module.quantize = broken
    with pytest.raises(ExportError, match=r"graph 'vision' could not be quantised to fp8 \(unsupported model\)"):
        rewrite(record, path)


def test_bf16_graphs_are_widened(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    from xfm_fast.export.runtimes.onnx_sessions import widen

    weight = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    narrow = torch.from_numpy(weight).bfloat16()
    stored = helper.make_tensor("w", TensorProto.BFLOAT16, (3, 4), narrow.view(torch.int16).numpy().tobytes(), raw=True)
    nodes = [
        helper.make_node("Cast", ["mask"], ["m"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Add", ["y", "m"], ["z"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.BFLOAT16, (2, 3)),
        helper.make_tensor_value_info("mask", TensorProto.INT64, (2, 4)),
    ]
    outputs = [helper.make_tensor_value_info("z", TensorProto.BFLOAT16, (2, 4))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [stored])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "n.onnx")
    widen(tmp_path / "n.onnx", tmp_path / "w.onnx")
    (kept,) = onnx.load(tmp_path / "w.onnx").graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(kept), narrow.float().numpy())
    x, mask = np.ones((2, 3), np.float32), np.ones((2, 4), np.int64)
    session = ort.InferenceSession(tmp_path / "w.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x, "mask": mask})[0], x @ narrow.float().numpy() + 1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("fp8", "bf16"), ("int8", "bf16"), ("fp8", "fp16")])
def test_engine_by_modelopt(
    small_model: XFM, examples: Examples, tmp_path: Path, kind: quantise.Quantisation, dtype: str
) -> None:
    """NVIDIA's quantiser itself, and an engine of what it made."""
    pytest.importorskip("modelopt.onnx.quantization", reason="needs xfm-fast[modelopt]")
    pytest.importorskip("tensorrt_rtx")
    onnx = pytest.importorskip("onnx")
    manifest = engines.export_engines(
        small_model, tmp_path, "tensorrt-rtx", dtype=dtype, graphs=("vision", "fusion"),
        sm="89,120", quantize=kind, keep_onnx=True, examples=examples,
    )  # fmt: skip
    assert [record.file for record in manifest.graphs] == ["vision.engine", "fusion.engine"]
    for record in manifest.graphs:
        graph = onnx.load(tmp_path / "onnx" / f"{record.name}.onnx").graph
        assert sum(node.op_type == "QuantizeLinear" for node in graph.node) >= 12
