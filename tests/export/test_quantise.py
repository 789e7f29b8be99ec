"""8 bits: scales, the nodes of a graph, the GEMMs that a budget takes back, and bad requests."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.conftest import scenes_examples
from xfm_fast.errors import ExportError, InputError, UnavailableError
from xfm_fast.export import engines, export_onnx, quantise, quantize_int8, verify
from xfm_fast.export.expected import Reference
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.quantise import Fitted, Scheme, Seen, Site, fit, observe, quantise_graph, sites
from xfm_fast.export.request import GRAPHS, GraphName, Quantisation
from xfm_fast.export.runtimes.onnx_runtime import widen
from xfm_fast.export.session import Session
from xfm_fast.models.xfm import XFM

onnx = pytest.importorskip("onnx", reason="8 bits are written into ONNX graphs")
ort = pytest.importorskip("onnxruntime", reason="calibration runs graphs by onnxruntime")

INT8, UINT8, FP8 = Scheme("int8"), Scheme("int8", unsigned=True), Scheme("fp8")


def test_scales_clip_outliers_and_smooth_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(256, 32, generator=generator), torch.randn(32, 48, generator=generator)

    def fitted(values: torch.Tensor, scheme: Scheme = INT8, norm: str = "norm") -> Fitted:
        site = Site("x", ("gemm",), ("layer",), (weight,), norm)
        return fit(site, Seen(values.amin(0), values.amax(0), values), scheme)

    assert fitted(rows).error < 0.02
    uneven = rows.clone()
    uneven[:, 3] *= 60
    smoothed, plain = fitted(uneven), fitted(uneven, norm="")
    assert int(smoothed.smoothing.argmax()) == 3
    assert smoothed.error < plain.error / 2
    assert (plain.smoothing == 1).all()
    far = torch.randn(4096, 32, generator=generator)
    far[0, 0] = 8.0
    assert fitted(far, norm="").scale * 127 < 8
    # Without negative values all levels of unsigned 8 bits are for positive ones.
    assert fitted(rows.abs(), UINT8).zero == 0
    assert fitted(rows.abs(), UINT8).error < 0.95 * fitted(rows.abs()).error


@pytest.mark.parametrize(
    ("scheme", "kind"), [(UINT8, "fp32"), (INT8, "fp16"), (FP8, "fp32")], ids=["uint8", "int8", "fp8"]
)
def test_nodes_of_a_graph(exported_fp32: Path, exported_fp16: Path, scheme: Scheme, kind: str, tmp_path: Path) -> None:
    """The nodes compute what the fit promises, in a graph of any dtype."""
    folder = {"fp32": exported_fp32, "fp16": exported_fp16}[kind]
    widen(folder / "vision.onnx", tmp_path / "vision.onnx")
    wide, reference = onnx.load(tmp_path / "vision.onnx"), Reference.load(exported_fp32)
    found, feeds = sites(wide), [{"pixels": reference.tensors["pixels"][:2].numpy()}]
    assert found[1].layers == ("encoder.blocks.0.attn.proj",)
    seen, truths = observe(wide, found, feeds)
    chosen = [fit(*each, scheme) for each in zip(found, seen, strict=True)]
    model = quantise_graph(onnx.load(folder / "vision.onnx"), chosen, scheme)
    onnx.checker.check_model(model, full_check=True)
    count = Counter(node.op_type for node in model.graph.node)
    assert (count["QuantizeLinear"], count["DequantizeLinear"]) == (len(found), 2 * len(found))
    # Two of the four tensors of a layer come from a LayerNorm, whose scale takes the smoothing.
    assert sum(site.norm != "" for site in found) == len(found) // 2
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types = onnx.TensorProto
    assert stored[f"{found[0].tensor}.{scheme.kind}.scale"] == (types.FLOAT if kind == "fp32" else types.FLOAT16)
    assert stored[f"{found[0].gemms[0]}.weight"] == (types.FLOAT8E4M3FN if scheme is FP8 else types.INT8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = feeds[0]["pixels"].astype(np.float32 if kind == "fp32" else np.float16)
    (made,) = session.run(["image_embeds"], {"pixels": pixels})
    cosine = torch.cosine_similarity(
        torch.from_numpy(made).double(), torch.from_numpy(truths[0]["image_embeds"]).double(), dim=-1
    )
    assert (0.98 if scheme is FP8 else 0.995) < cosine.min() < 0.9999999


def _part(exported: Path, graph: GraphName, folder: Path) -> Path:
    """A copy of an export with one graph."""
    shutil.copytree(exported, folder)
    manifest = Manifest.load(folder)
    manifest.graphs = [manifest.graph(graph)]
    manifest.save(folder)
    return folder


def test_heads_keep_their_type(exported_fp32: Path) -> None:
    layers = [layer for site in sites(onnx.load(exported_fp32 / "fusion.onnx")) for layer in site.layers]
    assert len(layers) > 10
    assert not [layer for layer in layers if "head" in layer]


@pytest.mark.slow
@pytest.mark.parametrize("consumer", ["onnxruntime", "openvino"])
def test_int8_keeps_the_ranks_of_trained_weights(trained_model: XFM, tmp_path: Path, consumer: Any) -> None:
    pytest.importorskip(consumer)
    examples = scenes_examples(trained_model, 0, 4)
    export_onnx(trained_model, tmp_path / "fp32", consumer=consumer, graphs=GRAPHS, examples=examples)
    scores = Reference.load(tmp_path / "fp32").tensors["scores"]
    assert (scores.amax(1) - scores.amin(1)).min() > 1, "the model ranks nothing: it is not trained"
    manifest = quantize_int8(tmp_path / "fp32", tmp_path / "int8")
    if consumer == "openvino":
        manifest = verify(tmp_path / "int8", "openvino")
    assert (manifest.status, manifest.reason) == ("verified", "")
    assert manifest.options["calibration"] == "4 scenes of shapes"
    assert manifest.verification is not None
    ranks = {check.graph: check.agreement for check in manifest.verification.ranks}
    assert {*ranks} == {"fusion", "match", "all"}
    assert all(agreement >= 0.95 for agreement in ranks.values()), ranks
    assert all(check.cosine is None or 0.99 <= check.cosine < 1 for check in manifest.verification.checks)
    records = [graph.quantisation for graph in manifest.graphs]
    assert all(record is not None and not record.kept and record.cosine > 0.99 for record in records)
    sizes = {record.name: record.bytes for record in Manifest.load(tmp_path / "fp32").files}
    assert {record.name: record.bytes for record in manifest.files}["fusion.onnx"] < 0.5 * sizes["fusion.onnx"]


def test_a_budget_takes_back_the_worst_gemms(
    exported_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In packed graphs, with two GEMMs made coarse, so that the choice is the same on every processor."""
    suffering = {"stack.layer.0.intermediate.dense", "stack.layer.1.output.dense"}

    def coarse(site: Site, *given: Any) -> Fitted:
        fitted = fit(site, *given)
        worse = 20 if suffering & {*site.layers} else 1
        return fitted._replace(scale=worse * fitted.scale, error=worse * fitted.error)

    monkeypatch.setattr(quantise, "fit", coarse)
    manifest = quantize_int8(exported_packed, tmp_path / "int8")
    assert manifest.packed
    assert manifest.options["budget"] == 0.99
    assert all(graph.quantisation is not None for graph in manifest.graphs)
    record = manifest.graph("fusion").quantisation
    assert record is not None
    assert {*record.kept} == suffering
    assert record.cosine > 0.99
    graph = onnx.load(tmp_path / "int8" / "fusion.onnx").graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == record.products - len(record.kept)


def test_coarse_levels_lose_the_ranks(exported_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification fails, and no session is made of such an export."""
    fine = Scheme.scale
    monkeypatch.setattr(Scheme, "scale", lambda *given: (20 * fine(*given)[0], fine(*given)[1]))
    manifest = quantize_int8(_part(exported_fp32, "fusion", tmp_path / "fp32"), tmp_path / "int8", budget=0.01)
    assert manifest.status == "failed"
    assert "ranks by" in manifest.reason
    with pytest.raises(ExportError, match="differs from the model"):
        Session.load(tmp_path / "int8")


def test_budgets_that_cannot_be_met(exported_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[Any, float]] = [("fp32", 0.0), ("fp32", 1.0), ("fp32", float("nan")), ("bf16", 0.9995)]
    for dtype, budget in cases:
        with pytest.raises(InputError, match=f"--budget {budget}"):
            quantise.check_quantisation("int8", dtype, budget)
    assert quantise.check_quantisation("int8", "fp16", 0.9995) == "int8"
    with pytest.raises(UnavailableError, match="int4"):
        quantise.check_quantisation("int4", "fp16", 0.9)
    monkeypatch.setattr(quantise, "least_cosine", lambda *_: 0.5)
    with pytest.raises(ExportError, match=r"--budget 0\.99 .* int8"):
        quantize_int8(_part(exported_fp32, "image_memory", tmp_path / "fp32"), tmp_path / "int8")
    assert [*(tmp_path / "int8").iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("int8", "fp16"), ("fp8", "bf16")])
def test_engines_in_8_bits(trained_model: XFM, tmp_path: Path, kind: Quantisation, dtype: Any) -> None:
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
    assert all(record.quantisation is not None and not record.quantisation.kept for record in manifest.graphs)
