"""ONNX files for every consumer, type and opset: valid, clean, and the same function as the graph they came from."""

from __future__ import annotations

import errno
import gc
import getpass
import importlib.util
import socket
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.export.conftest import build_model
from xfm_fast import XFMConfig, __version__
from xfm_fast.errors import InputError, StorageError, UnavailableError
from xfm_fast.export import onnx as onnx_files
from xfm_fast.export.consumers import CONSUMERS, DTYPES, DType, Profile, profile
from xfm_fast.export.graphs import AttentionForm, Graph, GraphName, build, in_dtype, memory_names, random_inputs
from xfm_fast.export.onnx import OnnxFile, write_onnx
from xfm_fast.models.xfm import XFM

onnx = pytest.importorskip("onnx", reason="exports to ONNX need onnx")
pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="running exports needs onnxruntime")

# Errors of single layers: fp32 sums in another order; fp16 rounds every result.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-2}
METADATA = {"xfm_fast.dtype": "fp32", "xfm_fast.config": "{}"}
ONE_LAYER = {"vision_depth": 1, "text_layers": 1, "fusion_layers": 1}
NOT_READ = ("openvino", "bf16")
# What the consumers ask for, each spelling once, and the opsets beside their defaults.
SPELLINGS = [
    *sorted({(p.form, p.opset, d) for c in CONSUMERS for d in DTYPES if (c, d) != NOT_READ for p in [profile(c, d)]}),
    pytest.param("primitives", 22, "fp32", marks=pytest.mark.slow),
    pytest.param("opset23", 24, "fp32", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., XFM]) -> XFM:
    return make_model(**ONE_LAYER)


@pytest.fixture(scope="module")
def written(model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OnnxFile]:
    """Writes a graph once for each combination of arguments."""
    done: dict[Any, OnnxFile] = {}

    def write(name: GraphName, form: AttentionForm = "opset23", opset: int = 23, dtype: DType = "fp32", **options: Any):
        key = (name, form, opset, dtype, repr(sorted(options.items())))
        if key not in done:
            graph = in_dtype(build(name, model, form), DTYPES[dtype])
            folder = tmp_path_factory.mktemp("onnx")
            done[key] = write_onnx(graph, folder / f"{name}.onnx", Profile(form, opset), dtype, **options)
        return done[key]

    return write


def _run(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {n: t.numpy() for n, t in inputs.items()})]


def _assert_same(model: XFM, name: GraphName, path: Path, sizes: dict[str, int], dtype: DType = "fp32") -> None:
    graph = build(name, model, "opset23")
    values = random_inputs(graph, sizes, torch.float32)
    typed = [value.to(DTYPES[dtype]) if value.is_floating_point() else value for value in values]
    found = _run(path, {spec.name: value for spec, value in zip(graph.inputs, typed, strict=True)})
    with torch.no_grad():
        expected = graph(*values)
    for spec, mine, theirs in zip(graph.outputs, found, expected, strict=True):
        assert mine.shape == spec.shape(sizes)
        torch.testing.assert_close(
            mine.float(), theirs, rtol=0, atol=TOLERANCE[dtype] * max(1.0, float(theirs.abs().max()))
        )


@pytest.mark.parametrize(("form", "opset", "dtype"), SPELLINGS)
def test_every_spelling_is_valid_and_the_same_function(
    model: XFM, written: Callable[..., OnnxFile], form: AttentionForm, opset: int, dtype: DType
) -> None:
    file = written("fusion", form, opset, dtype)
    loaded = onnx.load(str(file.path))
    onnx.checker.check_model(loaded, full_check=True)
    assert {entry.domain: entry.version for entry in loaded.opset_import}[""] == opset == file.opset
    kinds = [(node.domain, node.op_type) for node in loaded.graph.node]
    # The operator stands where it costs TensorRT no copy: in the cross-attention.
    assert kinds.count(("", "Attention")) == (form == "opset23")
    assert kinds.count(("", "Softmax")) == (1 if form == "opset23" else 2)
    assert {domain for domain, _ in kinds} == {""}
    assert not loaded.functions
    types = {tensor.data_type for tensor in loaded.graph.initializer if len(tensor.dims) == 2}
    assert types == {
        {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}.get(dtype, onnx.TensorProto.BFLOAT16)
    }
    if dtype != "bf16":  # ONNX Runtime has no bf16 kernels for the CPU.
        for sizes in ({"batch": 1, "texts": 1, "length": 1}, {"batch": 3, "texts": 2, "length": 40}):
            _assert_same(model, "fusion", file.path, sizes, dtype)


@pytest.mark.parametrize("name", ["vision", "text", "image_memory", pytest.param("match", marks=pytest.mark.slow)])
def test_other_graphs_are_the_same_function_at_every_size(
    model: XFM, written: Callable[..., OnnxFile], name: GraphName
) -> None:
    file = written(name, **({"metadata": METADATA} if name == "text" else {}))
    for sizes in ({"batch": 1, "texts": 1, "length": 1}, {"batch": 5, "texts": 4, "length": 40}):
        _assert_same(model, name, file.path, sizes)


def test_shape_inference_knows_every_output(written: Callable[..., OnnxFile]) -> None:
    inferred = onnx.shape_inference.infer_shapes(onnx.load(str(written("fusion").path)), strict_mode=True)
    dims = {
        out.name: [d.dim_param or d.dim_value for d in out.type.tensor_type.shape.dim] for out in inferred.graph.output
    }
    assert dims["match_logits"] == ["batch", "texts", 2]
    assert dims["boxes"] == ["batch", "texts", 4]


def test_attention_reads_the_memory_where_it_lies(model: XFM, written: Callable[..., OnnxFile]) -> None:
    """Runtimes copy what they cut: keys and values of a layer are inputs, which nothing but its attention reads."""
    graph = onnx.load(str(written("fusion").path)).graph
    layers = [value.name for value in graph.input if value.name.startswith("memory_")]
    assert layers == memory_names(model.config.fusion_layers)
    for place, name in enumerate(layers):
        (reader,) = [node for node in graph.node if name in node.input]
        assert (reader.op_type, [*reader.input].index(name)) == ("Attention", 1 + place % 2)
    assert not [node for node in graph.node if node.op_type == "Gather"]


def test_fixed_axes_are_numbers(model: XFM, written: Callable[..., OnnxFile]) -> None:
    file = written("text", fixed={"batch": 1, "length": 12})
    loaded = onnx.load(str(file.path))
    shapes = {
        put.name: [d.dim_param or d.dim_value for d in put.type.tensor_type.shape.dim] for put in loaded.graph.input
    }
    assert shapes == {"input_ids": [1, 12], "attention_mask": [1, 12]}
    assert not {
        d.dim_param
        for info in (*loaded.graph.value_info, *loaded.graph.output)
        for d in info.type.tensor_type.shape.dim
    } - {""}
    _assert_same(model, "text", file.path, {"batch": 1, "length": 12})


def test_one_fixed_axis_leaves_the_others_dynamic(model: XFM, written: Callable[..., OnnxFile]) -> None:
    file = written("text", fixed={"length": 12})
    for batch in (1, 3):
        _assert_same(model, "text", file.path, {"batch": batch, "length": 12})


@pytest.mark.parametrize(
    ("fixed", "message"),
    [({"texts": 3}, "axis 'texts' cannot be fixed; choose from batch, length"), ({"batch": 0}, "batch=0 is no size")],
)
def test_axes_that_cannot_be_fixed(model: XFM, tmp_path: Path, fixed: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_onnx(build("text", model, "opset23"), tmp_path / "x.onnx", Profile("opset23", 23), "fp32", fixed=fixed)
    assert not list(tmp_path.iterdir())


def test_names_are_clean_and_metadata_is_there(written: Callable[..., OnnxFile]) -> None:
    file = written("text", metadata=METADATA)
    content = file.path.read_bytes()
    root = Path(onnx_files.__file__).resolve().parents[1]
    here = [str(root), str(Path(torch.__file__).parent), "site-packages", str(Path.home()), '.py"', "stack_trace"]
    # In a container the user may be called root, which is no telling name.
    here += [name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 6]
    for name in here:
        assert name.encode() not in content, name
    loaded = onnx.load_from_string(content)
    assert (loaded.producer_name, loaded.producer_version, loaded.graph.name) == ("xfm-fast", __version__, "text")
    assert {entry.key: entry.value for entry in loaded.metadata_props} == METADATA
    parts = [*loaded.graph.node, *loaded.graph.value_info, *loaded.graph.initializer, *loaded.functions]
    parts += [node for function in loaded.functions for node in function.node]
    assert not [part.name for part in parts if part.doc_string or part.metadata_props]


def test_weights_beyond_the_limit_lie_beside_the_file(model: XFM, tmp_path: Path) -> None:
    graph, spelling = build("image_memory", model, "opset23"), Profile("opset23", 23)
    assert all(parameter.requires_grad for parameter in graph.parameters())
    path = tmp_path / "image_memory.onnx"
    file = write_onnx(graph, path, spelling, "fp32", largest_file=1000)
    assert [part.name for part in file.files] == ["image_memory.onnx", "image_memory.onnx.data"]
    assert path.stat().st_size < 4000 < (tmp_path / "image_memory.onnx.data").stat().st_size
    onnx.checker.check_model(str(path), full_check=True)
    _assert_same(model, "image_memory", path, {"batch": 2})
    assert all(parameter.requires_grad for parameter in graph.parameters())
    whole = write_onnx(graph, path, spelling, "fp32")
    assert [part.name for part in tmp_path.iterdir()] == ["image_memory.onnx"] == [part.name for part in whole.files]


def test_a_file_is_written_weight_by_weight_as_protobuf_writes_it(
    written: Callable[..., OnnxFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No message ever holds the weights, and what is written is the same message as that of a reader."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a copy of all weights")

    monkeypatch.setattr(onnx, "save", refuse)
    for name, dtype in (("text", "fp32"), ("vision", "bf16")):
        content = written(name, dtype=dtype).path.read_bytes()
        loaded = onnx.load_from_string(content)
        assert sum(len(weight.raw_data) for weight in loaded.graph.initializer) > len(content) / 2
        again = loaded.SerializeToString()
        assert len(again) == len(content)
        assert onnx.load_from_string(again) == loaded
        assert not [weight.name for weight in loaded.graph.initializer if weight.external_data]
        onnx.checker.check_model(loaded, full_check=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nothing_of_a_graph_stays_once_it_is_written(
    model: XFM, dtype: DType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that a graph joined are as many again as those of its products; exporters would keep them in circles, and
    those of a copy in 16 bits.
    """
    made: list[weakref.ref[Tensor]] = []
    own = {id(parameter) for parameter in model.parameters()}
    write = onnx_files.write_onnx

    def left() -> list[Tensor]:
        return [tensor for ref in made if (tensor := ref()) is not None and tensor.numel()]

    def watched(graph: Graph, *given: Any, **options: Any) -> OnnxFile:
        assert not left()
        tensors = (*graph.buffers(), *graph.parameters())
        made.extend(weakref.ref(tensor) for tensor in tensors if id(tensor) not in own)
        return write(graph, *given, **options)

    monkeypatch.setattr(onnx_files, "write_onnx", watched)
    gc.disable()
    try:
        onnx_files.export_onnx(model, tmp_path, dtype=dtype, graphs=("text", "image_memory", "fusion"))
    finally:
        gc.enable()
    assert len(made) >= 2 + 2 + 2
    assert not left()


def test_failed_write_leaves_what_was_there(model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image_memory.onnx"
    path.write_bytes(b"earlier")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_files, "_write_whole", full)
    with pytest.raises(StorageError, match=r"image_memory\.onnx"):
        write_onnx(build("image_memory", model, "opset23"), path, Profile("opset23", 23), "fp32")
    assert path.read_bytes() == b"earlier"
    assert [part.name for part in tmp_path.iterdir()] == ["image_memory.onnx"]


def test_the_oldest_opset_of_bf16_has_all_that_pixels_need(written: Callable[..., OnnxFile]) -> None:
    spelling = profile("tensorrt", "bf16", 22)
    assert written("vision", spelling.form, spelling.opset, "bf16").opset == 22


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("onnx", "fp32", None), "consumer 'onnx' is unknown; choose from onnxruntime"),
        (("onnxruntime", "int4", None), "dtype 'int4' is unknown; choose from fp32, fp16, bf16"),
        (("tensorrt", "fp16", 19), "opset 19 is not supported; choose 20"),
        (("tensorrt", "fp16", 99), "opset 99 is not supported"),
        (("tensorrt", "bf16", 21), "opset 21 has no bf16 convolution; choose 22 to 24, or --dtype fp16"),
        (("openvino", "bf16", 22), "OpenVINO takes no bf16 tensors; export with --dtype fp32 and load the session"),
    ],
)
def test_unsupported_choices(arguments: tuple[str, str, int | None], message: str) -> None:
    with pytest.raises(UnavailableError, match=message):
        profile(*arguments)


def test_profiles() -> None:
    assert {profile(consumer, "fp32") for consumer in CONSUMERS} == {Profile("primitives", 20)}
    assert profile("onnxruntime", "fp16") == profile("tensorrt", "fp16") == Profile("opset23", 23)
    assert profile("tensorrt-rtx", "bf16") == Profile("opset23", 23)
    for dtype in DTYPES:
        assert profile("tensorrt", dtype) == profile("tensorrt-rtx", dtype) == profile("onnxruntime", dtype)
    assert profile("openvino", "fp16") == Profile("primitives", 20)
    assert profile("tensorrt", "fp16", 22) == Profile("primitives", 22)
    forms = {profile(c, d).form for c in CONSUMERS for d in DTYPES if (c, d) != NOT_READ}
    assert forms == {*get_args(AttentionForm)}


@pytest.mark.parametrize("form", ["primitives", pytest.param("opset23", marks=pytest.mark.slow)])
def test_graphs_of_base_width_hold_nothing_that_could_be_folded(form: AttentionForm, tmp_path: Path) -> None:
    """As wide as the base model, where exporters no longer fold constants, and two layers deep, which is quick."""
    layers = 2
    config = XFMConfig.preset("base").replace(
        vision_depth=layers, text_layers=layers, fusion_layers=layers, vocab_size=300
    )
    model = XFM(config).eval()
    spelling = Profile(form, 20 if form == "primitives" else 23)
    # Of a layer: queries, keys and values at once, the output, and two of the MLP; fusion has those of the
    # cross-attention besides, less the memory's. The heads: a feature, two of the match, two of the boxes. Token 0 of
    # the last layer of fusion has its query by itself.
    counts: tuple[tuple[GraphName, int, int, int], ...] = (
        ("vision", 4 * layers + 1, layers, 1),
        ("text", 4 * layers + 1, layers, 3),
        ("image_memory", 1, 0, 2 * layers),
        ("fusion", 6 * layers + 4 + 1, 2 * layers, 0),
    )
    for name, products, attentions, gathers in counts:
        path = tmp_path / f"{name}.onnx"
        write_onnx(build(name, model, form), path, spelling, "fp32")
        graph = onnx.load(path).graph
        found = Counter(node.op_type for node in graph.node)
        own = layers if name in ("text", "fusion") else 0
        inner = 2 * (attentions if form == "primitives" else own)
        assert found["MatMul"] + found["Gemm"] - inner == products, (name, found)
        assert found["GatherND"] == 0, (name, found)
        assert found["Gather"] == gathers, (name, found)
        if form != "primitives":
            assert found["Attention"] == attentions - own


@pytest.mark.parametrize("name", ["vision", "fusion"])
def test_one_file_for_every_reader(name: GraphName, exported_fp32: Path) -> None:
    """The default export is read by onnx's own evaluator, by OpenVINO and by TensorRT for RTX as by ONNX Runtime."""
    from onnx.reference import ReferenceEvaluator

    path = exported_fp32 / f"{name}.onnx"
    graph = build(name, build_model(), "primitives")
    sizes = {"batch": 2, "texts": 3, "length": 7}
    values = dict(zip([spec.name for spec in graph.inputs], random_inputs(graph, sizes, torch.float32), strict=True))
    expected = _run(path, values)
    feed = {key: value.numpy() for key, value in values.items()}
    found = {"onnx": ReferenceEvaluator(str(path)).run(None, feed)}
    if importlib.util.find_spec("openvino"):
        import openvino

        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found["openvino"] = [*compiled(feed).values()]
    for results in found.values():
        for mine, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(np.array(mine)), theirs, rtol=0, atol=1e-5)
