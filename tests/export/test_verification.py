"""Verification finds what is wrong with an export, and raises no alarm where nothing is."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.export.conftest import Spoil, eager, write_export
from xfm_fast.errors import ExportError, UnavailableError
from xfm_fast.export.expected import generated_examples, make_reference
from xfm_fast.export.findings import THRESHOLDS, Threshold, rank_agreement
from xfm_fast.export.graphs import is_memory
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.request import DType
from xfm_fast.export.session import Session
from xfm_fast.export.verification import verify, verify_export
from xfm_fast.models.xfm import XFM


def judged(folder: Path, model: XFM, dtype: DType = "fp32", **spoil: Any) -> Manifest:
    all_tokens = Manifest.load(folder).all_tokens
    return verify_export(folder, model, runtime=eager(model, dtype, all_tokens=all_tokens, **spoil))


@pytest.mark.parametrize(
    ("dtype", "all_tokens"),
    [("fp32", True), pytest.param("fp16", False, marks=pytest.mark.slow), ("bf16", False)],
)
def test_graphs_in_pytorch_are_verified(
    small_model: XFM, tmp_path: Path, dtype: DType, all_tokens: bool
) -> None:
    manifest = judged(
        write_export(tmp_path, small_model, dtype, all_tokens=all_tokens), small_model, dtype
    )
    assert (manifest.status, manifest.reason) == ("verified", "")
    record = manifest.verification
    assert record is not None
    outputs = {(check.graph, check.output) for check in record.checks}
    expected = {(graph.name, output.name) for graph in manifest.graphs for output in graph.outputs}
    # Keys and values of all layers are judged as one.
    assert outputs >= {(graph, "memory" if is_memory(name) else name) for graph, name in expected}
    assert (("fusion", "fused_tokens") in outputs) == all_tokens
    assert [ranks.graph for ranks in record.ranks] == ["fusion", "match"]
    if dtype == "fp32":
        assert all(
            check.max_error is not None and check.max_error < 1e-5 for check in record.checks
        )
        assert all(ranks.identical == 1 for ranks in record.ranks)
    assert Manifest.load(tmp_path) == manifest


def test_fixed_axes_keep_their_size(small_model: XFM, tmp_path: Path) -> None:
    runtime = eager(small_model)
    folder = write_export(tmp_path, small_model, fixed={"batch": 3, "texts": 5, "length": 16})
    assert verify_export(folder, small_model, runtime=runtime).status == "verified"
    assert {shape[:3] for shape in runtime.shapes["fusion"]} == {(3, 5, 16)}
    assert runtime.shapes["text"] == {(3, 16)}


def _shift(output: str, amount: float) -> Spoil:
    def spoil(graph: str, outputs: dict[str, Tensor]) -> None:
        if output in outputs:
            outputs[output] = outputs[output].clone()
            outputs[output].view(-1)[-1] += amount

    return spoil


@pytest.mark.parametrize(
    ("output", "amount", "words"),
    [
        ("text_feature", float("nan"), "text text_feature"),
        ("memory_values_1", 1e-3, "image_memory memory"),
        ("fused", float("inf"), "fusion fused"),
        ("scores", 1e-3, "match scores"),
    ],
)
def test_one_wrong_number_fails(
    small_model: XFM, tmp_path: Path, output: str, amount: float, words: str
) -> None:
    folder = write_export(tmp_path, small_model)
    manifest = judged(folder, small_model, spoil=_shift(output, amount))
    assert manifest.status == Manifest.load(folder).status == "failed"
    assert words in manifest.reason


def test_padding_of_text_embeddings_does_not_count(small_model: XFM, tmp_path: Path) -> None:
    def spoil(graph: str, outputs: dict[str, Tensor]) -> None:
        # The shortest text of the last batch has one token; everything behind it is padding.
        if graph == "text" and outputs["text_embeds"].shape[0] > 3:
            outputs["text_embeds"] = outputs["text_embeds"].clone()
            outputs["text_embeds"][0, 1:] = 1e6

    assert (
        judged(write_export(tmp_path, small_model), small_model, spoil=spoil).status == "verified"
    )


def test_rounding_band_is_narrow(small_model: XFM, tmp_path: Path) -> None:
    """Ten times the rounding error of the dtype is no rounding error."""
    folder = write_export(tmp_path, small_model, "bf16")
    rounding = make_reference(
        small_model, generated_examples(small_model.config), ("fusion",), "bf16"
    ).rounding
    manifest = judged(folder, small_model, "bf16", spoil=_shift("fused", 10 * rounding["fused"]))
    assert "fusion fused" in manifest.reason


def test_angles_and_orders_are_judged_where_the_error_passes(
    small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_export(tmp_path, small_model)
    monkeypatch.setitem(
        THRESHOLDS, "fp32", Threshold(absolute=10, rounding=0, cosine=0.99999, tie=1e-5, ranks=0.99)
    )
    assert judged(folder, small_model, spoil=_shift("image_feature", 0.1)).reason.endswith(
        "vision image_feature"
    )

    def spoil(graph: str, outputs: dict[str, Tensor]) -> None:
        if graph == "match":
            outputs["scores"] = -outputs["scores"]

    assert judged(folder, small_model, spoil=spoil).reason.endswith("ranks by match")


def test_ranks() -> None:
    for scores, tie, agreeing, identical in (
        ([6.0, 4.0, 2.0, 0.0], 0, 1, 1),
        ([3.0, 1.0, 2.0, 0.0], 1, 1, 0.5),  # a tie may swap
        ([-1.0, 2.0, 1.0, 0.0], 0, 0, 0),  # the first falls to the end
        ([3.0, float("nan"), 2.0, 0.0], 0, 1, 1),  # pairs without a score have no rank
    ):
        truth = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
        count = len(scores) - sum(math.isnan(score) for score in scores)
        assert rank_agreement(torch.tensor([scores]), truth, tie) == (count, agreeing, identical)


def _lose_a_weight(path: Path, ending: str) -> None:
    onnx = pytest.importorskip("onnx")
    loaded = onnx.load(str(path))
    bias = next(tensor for tensor in loaded.graph.initializer if tensor.name.endswith(ending))
    bias.raw_data = bytes(len(bias.raw_data))
    onnx.save(loaded, str(path))


def test_a_wrong_weight_in_a_file_is_found(exported_fp32: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported_fp32, tmp_path / "edited"))
    _lose_a_weight(folder / "vision.onnx", "norm1.bias")
    with pytest.raises(ExportError, match=r"vision\.onnx was edited"):
        verify(folder)
    manifest = verify(folder, check_files=False)
    assert manifest.status == "failed"
    assert "vision image_embeds" in manifest.reason
    # The same folder with the right file is verified again.
    shutil.copy(exported_fp32 / "vision.onnx", folder)
    assert verify(folder).status == "verified"


def test_bf16_graphs_are_compared_in_fp32(
    bf16_engines: Path, small_model: XFM, tmp_path: Path
) -> None:
    """Within the band of bf16; a graph that lost a weight is found."""
    pytest.importorskip("onnxruntime")
    shutil.copytree(bf16_engines / "onnx", tmp_path, dirs_exist_ok=True)
    manifest = Manifest.load(tmp_path)
    manifest.graphs = [manifest.graph("text")]
    manifest.save(tmp_path)
    manifest = verify_export(tmp_path, small_model)
    assert (manifest.status, manifest.reason) == ("verified", "")
    assert manifest.verification is not None
    assert "fp32" in manifest.verification.runtime
    # Rounded weights alone make more than the errors of fp32.
    assert all(
        check.max_error is not None and check.max_error > 1e-4
        for check in manifest.verification.checks
    )
    with pytest.raises(UnavailableError, match="bf16"):
        Session.load(tmp_path)
    _lose_a_weight(tmp_path / "text.onnx", "LayerNorm.bias")
    manifest = verify(tmp_path, check_files=False)
    assert manifest.status == "failed"
    assert "text text_embeds" in manifest.reason


def test_without_a_runtime_nothing_is_verified(
    small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    manifest = verify_export(write_export(tmp_path, small_model), small_model)
    assert (manifest.status, manifest.verification) == ("unverified", None)
    assert ".[export]" in manifest.reason


def test_export_without_a_reference(small_model: XFM, tmp_path: Path) -> None:
    folder = write_export(tmp_path, small_model)
    for _ in ("missing", "damaged"):
        with pytest.raises(ExportError, match=r"reference\.safetensors"):
            verify(folder)
        (folder / "reference.safetensors").write_bytes(b"nothing")
