"""ONNX files of every dtype and opset: valid, clean, and the same function as the graph that they are made of."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.export.conftest import build_model
from xfm_fast import __version__
from xfm_fast.export import onnx as onnx_files
from xfm_fast.export.graphs import DTYPES, build, in_dtype, memory_names
from xfm_fast.export.onnx import write_onnx
from xfm_fast.export.pipeline import random_inputs
from xfm_fast.export.request import AttentionForm, DType, GraphName
from xfm_fast.export.runtimes import Spelling
from xfm_fast.export.runtimes.openvino import core as openvino_core
from xfm_fast.models.xfm import XFM

onnx = pytest.importorskip("onnx", reason="exports to ONNX need onnx")
pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="running exports needs onnxruntime")

# Errors of single layers: fp32 sums in another order; fp16 rounds every result.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-2}
METADATA = {"xfm_fast.dtype": "fp32", "xfm_fast.config": "{}"}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., XFM]) -> XFM:
    return make_model(vision_depth=1, text_layers=1, fusion_layers=1)


@pytest.fixture(scope="module")
def written(model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a graph once for each combination of arguments."""
    done: dict[Any, Path] = {}

    def write(
        name: GraphName,
        form: AttentionForm = "opset23",
        opset: int = 23,
        dtype: DType = "fp32",
        **options: Any,
    ):
        key = (name, form, opset, dtype, repr(sorted(options.items())))
        if key not in done:
            graph = in_dtype(build(name, model, form), DTYPES[dtype])
            done[key] = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
            write_onnx(graph, done[key], Spelling(form, opset), dtype, **options)
        return done[key]

    return write


def _run(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(value)
        for value in session.run(None, {n: t.numpy() for n, t in inputs.items()})
    ]


def _assert_same(
    model: XFM, name: GraphName, path: Path, sizes: dict[str, int], dtype: DType = "fp32"
) -> None:
    graph = build(name, model, "opset23")
    values = random_inputs(graph, sizes, torch.float32)
    typed = [value.to(DTYPES[dtype]) if value.is_floating_point() else value for value in values]
    results = _run(
        path, {spec.name: value for spec, value in zip(graph.inputs, typed, strict=True)}
    )
    with torch.no_grad():
        expected = graph(*values)
    for spec, output, truth in zip(graph.outputs, results, expected, strict=True):
        assert output.shape == spec.shape(sizes)
        torch.testing.assert_close(
            output.float(),
            truth,
            rtol=0,
            atol=TOLERANCE[dtype] * max(1.0, float(truth.abs().max())),
        )


@pytest.mark.parametrize(
    ("form", "opset", "dtype"),
    [
        pytest.param("primitives", 20, "fp32", marks=pytest.mark.slow),
        ("opset23", 23, "fp16"),
        pytest.param("opset23", 24, "bf16", marks=pytest.mark.slow),
    ],
)
def test_every_spelling_is_valid_and_the_same_function(
    model: XFM, written: Callable[..., Path], form: AttentionForm, opset: int, dtype: DType
) -> None:
    path = written("fusion", form, opset, dtype)
    loaded = onnx.load(str(path))
    onnx.checker.check_model(loaded, full_check=True)
    assert {entry.domain: entry.version for entry in loaded.opset_import}[""] == opset
    operators = [(node.domain, node.op_type) for node in loaded.graph.node]
    # The operator stands where it costs TensorRT no copy: in the cross-attention.
    assert operators.count(("", "Attention")) == (form == "opset23")
    assert operators.count(("", "Softmax")) == (1 if form == "opset23" else 2)
    assert {domain for domain, _ in operators} == {""}
    data_type = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}.get(
        dtype, onnx.TensorProto.BFLOAT16
    )
    assert {tensor.data_type for tensor in loaded.graph.initializer if len(tensor.dims) == 2} == {
        data_type
    }
    if dtype != "bf16":  # ONNX Runtime has no bf16 kernels for the CPU.
        for sizes in (
            {"batch": 1, "texts": 1, "length": 1},
            {"batch": 3, "texts": 2, "length": 40},
        ):
            _assert_same(model, "fusion", path, sizes, dtype)


@pytest.mark.parametrize("name", ["text", pytest.param("match", marks=pytest.mark.slow)])
def test_graphs_are_the_same_function_at_every_size(
    model: XFM, written: Callable[..., Path], name: GraphName
) -> None:
    path = written(name, metadata=METADATA)
    for sizes in ({"batch": 1, "texts": 1, "length": 1}, {"batch": 5, "texts": 4, "length": 40}):
        _assert_same(model, name, path, sizes)


def test_attention_reads_the_memory_where_it_lies(model: XFM, written: Callable[..., Path]) -> None:
    """Runtimes copy what they cut: keys and values of a layer are inputs, which nothing but its attention reads."""
    graph = onnx.load(str(written("fusion", dtype="fp16"))).graph
    layers = [value.name for value in graph.input if value.name.startswith("memory_")]
    assert layers == memory_names(model.config.fusion_layers)
    for index, name in enumerate(layers):
        (reader,) = [node for node in graph.node if name in node.input]
        assert (reader.op_type, [*reader.input].index(name)) == ("Attention", 1 + index % 2)
    assert not [node for node in graph.node if node.op_type == "Gather"]


def test_names_are_clean_and_metadata_is_there(written: Callable[..., Path]) -> None:
    content = written("text", metadata=METADATA).read_bytes()
    root = Path(onnx_files.__file__).resolve().parents[1]
    for name in [
        str(root),
        str(Path(torch.__file__).parent),
        "site-packages",
        str(Path.home()),
        "stack_trace",
    ]:
        assert name.encode() not in content, name
    loaded = onnx.load_from_string(content)
    assert (loaded.producer_name, loaded.producer_version, loaded.graph.name) == (
        "xfm-fast",
        __version__,
        "text",
    )
    assert {entry.key: entry.value for entry in loaded.metadata_props} == METADATA
    messages = [*loaded.graph.node, *loaded.graph.value_info, *loaded.graph.initializer]
    assert not [
        message.name for message in messages if message.doc_string or message.metadata_props
    ]
    # Written weight by weight, and the same as protobuf writes it.
    assert onnx.load_from_string(again := loaded.SerializeToString()) == loaded
    assert len(again) == len(content)
    assert not [weight.name for weight in loaded.graph.initializer if weight.external_data]


def test_weights_beyond_the_limit_lie_beside_the_file(model: XFM, tmp_path: Path) -> None:
    graph, spelling = build("image_memory", model, "opset23"), Spelling("opset23", 23)
    path = tmp_path / "image_memory.onnx"
    files = write_onnx(graph, path, spelling, "fp32", largest_file=1000)
    assert [message.name for message in files] == ["image_memory.onnx", "image_memory.onnx.data"]
    assert path.stat().st_size < 4000 < (tmp_path / "image_memory.onnx.data").stat().st_size
    onnx.checker.check_model(str(path), full_check=True)
    _assert_same(model, "image_memory", path, {"batch": 2})
    assert all(parameter.requires_grad for parameter in graph.parameters()), (
        "the model is left as it was"
    )
    assert write_onnx(graph, path, spelling, "fp32") == [path]
    assert [*tmp_path.iterdir()] == [path]


def test_one_file_for_every_reader(exported_fp32: Path) -> None:
    """Read the default export by onnx's own evaluator and by OpenVINO as by ONNX Runtime."""
    from onnx.reference import ReferenceEvaluator

    path = exported_fp32 / "fusion.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    graph = build("fusion", build_model(), "primitives")
    sizes = {"batch": 2, "texts": 3, "length": 7}
    values = dict(
        zip(
            [spec.name for spec in graph.inputs],
            random_inputs(graph, sizes, torch.float32),
            strict=True,
        )
    )
    expected = _run(path, values)
    feed = {key: value.numpy() for key, value in values.items()}
    results_by_reader = {"onnx": ReferenceEvaluator(str(path)).run(None, feed)}
    if importlib.util.find_spec("openvino"):
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino_core().compile_model(str(path), "CPU", options)
        results_by_reader["openvino"] = [*compiled(feed).values()]
    for results in results_by_reader.values():
        for output, truth in zip(results, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(np.array(output)), truth, rtol=0, atol=1e-5)


def test_weights_have_the_names_of_their_parameters(exported_fp32: Path) -> None:
    """Include weights that were transposed for a GEMM, whatever the optimiser calls a folded constant."""
    for graph, weight in {
        "vision": "encoder.blocks.0.mlp.fc1.weight",
        "text": "encoder.encoder.layer.1.output.dense.weight",
        "fusion": "stack.layer.0.crossattention.self.query.weight",
    }.items():
        weights = onnx.load(exported_fp32 / f"{graph}.onnx").graph.initializer
        matrices = [tensor.name for tensor in weights if len(tensor.dims) == 2]
        assert weight in matrices
        assert not [name for name in matrices if name.startswith("val_")]
