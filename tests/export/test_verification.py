"""Verification finds what is wrong with an export, and says nothing where nothing is."""

from __future__ import annotations

import errno
import shutil
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.agreement import deterministic_algorithms
from xfm_fast.errors import ExportError, InputError, StorageError, UnavailableError
from xfm_fast.export import expected
from xfm_fast.export.consumers import DTYPES, DType, profile
from xfm_fast.export.expected import Reference, generated_examples, make_examples, make_reference
from xfm_fast.export.graphs import Graph, GraphName, in_dtype, is_memory
from xfm_fast.export.manifest import GraphRecord, Manifest, new_manifest
from xfm_fast.export.onnx import export_onnx
from xfm_fast.export.pipeline import build_graphs, graph_interface
from xfm_fast.export.request import GRAPHS
from xfm_fast.export.session import Session
from xfm_fast.export.verification import (
    THRESHOLDS,
    Threshold,
    default_runner,
    rank_agreement,
    verify,
    verify_export,
)
from xfm_fast.kernels import derived
from xfm_fast.models.xfm import XFM

Spoil = Callable[[str, dict[str, Tensor]], None]


class EagerRunner:
    """Runs the graphs in PyTorch, and spoils what they return."""

    description = "PyTorch"

    def __init__(
        self, model: XFM, dtype: DType, spoil: Spoil = lambda graph, outputs: None, *, all_tokens: bool = False
    ) -> None:
        built = build_graphs(model, profile("onnxruntime", dtype), GRAPHS, all_tokens=all_tokens)
        self.graphs: dict[str, Graph] = {name: in_dtype(graph, DTYPES[dtype]) for name, graph in built.items()}
        self.spoil = spoil
        self.seen: dict[str, list[list[int]]] = {}

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen = self.graphs[graph]
        values = [inputs[spec.name] for spec in chosen.inputs]
        self.seen.setdefault(graph, []).append([*values[0].shape])
        with torch.no_grad():
            outputs = dict(zip([spec.name for spec in chosen.outputs], chosen(*values), strict=True))
        self.spoil(graph, outputs)
        return outputs


def test_a_comparison_keeps_little_in_memory(small_model: XFM, exported_fp32: Path) -> None:
    """What the kernels pack of weights, what a runtime lays out anew, and memory for the largest shape: none stays."""
    derived.clear()
    make_reference(small_model, generated_examples(small_model.config, images=1, texts=1), GRAPHS, "fp32")
    assert derived.remembered(small_model.parameters()) == []
    manifest = Manifest.load(exported_fp32)
    session: Any = default_runner(exported_fp32, manifest)
    session = session._runner("text")
    options = session._graphs["text"]._session.get_session_options()
    assert not options.enable_cpu_mem_arena
    assert options.get_session_config_entry("session.disable_prepacking") == "1"


def write_export(
    folder: Path,
    model: XFM,
    dtype: DType = "fp32",
    names: tuple[GraphName, ...] = GRAPHS,
    *,
    fixed: dict[str, int] | None = None,
    all_tokens: bool = False,
) -> Path:
    """A folder with a manifest and a reference but without graphs, for runners that need none."""
    fixed = fixed or {}
    spelling = profile("onnxruntime", dtype)
    built = build_graphs(model, spelling, names, fixed=fixed, all_tokens=all_tokens)
    records = [
        GraphRecord(
            name=name, file=f"{name}.onnx", files=[], build_seconds=0, **graph_interface(g, dtype, model, fixed)
        )
        for name, g in built.items()
    ]
    folder.mkdir(exist_ok=True)
    new_manifest(
        source="a small model", weights_sha256="", tokenizer_sha256=None, config=model.config.model_dump(), dtype=dtype,
        consumer="onnxruntime", opset=23, attention="opset23", all_tokens=all_tokens, fixed=fixed, versions={},
        graphs=records, files=[],
    ).save(folder)  # fmt: skip
    return folder


def judged(folder: Path, model: XFM, dtype: DType = "fp32", spoil: Spoil = lambda graph, outputs: None) -> Manifest:
    all_tokens = Manifest.load(folder).all_tokens
    return verify_export(folder, model, runner=EagerRunner(model, dtype, spoil, all_tokens=all_tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("all_tokens", [False, True], ids=["first", "all"])
def test_graphs_in_pytorch_are_verified(small_model: XFM, tmp_path: Path, dtype: DType, all_tokens: bool) -> None:
    manifest = judged(write_export(tmp_path, small_model, dtype, all_tokens=all_tokens), small_model, dtype)
    assert (manifest.status, manifest.reason) == ("verified", "")
    record = manifest.verification
    assert record is not None
    outputs = {(check.graph, check.output) for check in record.checks}
    given = {(graph.name, output.name) for graph in manifest.graphs for output in graph.outputs}
    # Keys and values of all layers are judged as one.
    assert outputs >= {(graph, "memory" if is_memory(name) else name) for graph, name in given}
    assert (("fusion", "fused_tokens") in outputs) == all_tokens
    assert [ranks.graph for ranks in record.ranks] == ["fusion", "match"]
    if dtype == "fp32":
        assert all(check.max_error is not None and check.max_error < 1e-5 for check in record.checks)
        assert all(ranks.identical == 1 for ranks in record.ranks)
    assert Manifest.load(tmp_path) == manifest


def test_shapes_cover_the_range(small_model: XFM, tmp_path: Path) -> None:
    folder = write_export(tmp_path, small_model)
    runner = EagerRunner(small_model, "fp32")
    verify_export(folder, small_model, runner=runner)
    examples = generated_examples(small_model.config)
    images, (texts, longest) = len(examples.pixels), examples.input_ids.shape
    assert longest == 40
    assert {shape[0] for shape in runner.seen["vision"]} == {1, 2, images}
    lengths = {shape[1] for shape in runner.seen["text"]}
    assert {1, 2, 3, 5, 8, 13, 21, 34, 40} <= lengths
    assert {shape[0] for shape in runner.seen["text"]} == {1, 3, texts}
    shapes = {tuple(shape[:2]) for shape in runner.seen["fusion"]}
    assert shapes == {(1, 1), (1, texts), (images, 1), (images, texts)}
    record = Manifest.load(folder).verification
    assert record is not None
    assert {check.graph: len(check.shapes) for check in record.checks}["text"] > 10


def test_fixed_axes_keep_their_size(small_model: XFM, tmp_path: Path) -> None:
    fixed = {"batch": 3, "texts": 5, "length": 16}
    folder = write_export(tmp_path, small_model, fixed=fixed)
    runner = EagerRunner(small_model, "fp32")
    manifest = verify_export(folder, small_model, runner=runner)
    assert manifest.status == "verified"
    assert {tuple(shape[:3]) for shape in runner.seen["fusion"]} == {(3, 5, 16)}
    assert {tuple(shape) for shape in runner.seen["text"]} == {(3, 16)}
    assert {shape[0] for shape in runner.seen["match"]} == {3}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_alone(small_model: XFM, tmp_path: Path, name: GraphName) -> None:
    manifest = judged(write_export(tmp_path, small_model, names=(name,)), small_model)
    assert manifest.status == "verified"
    assert manifest.verification is not None
    assert {check.graph for check in manifest.verification.checks} == {name}


def _shift(output: str, amount: float) -> Spoil:
    def spoil(graph: str, outputs: dict[str, Tensor]) -> None:
        if output in outputs:
            outputs[output] = outputs[output].clone()
            outputs[output].view(-1)[-1] += amount

    return spoil


@pytest.mark.parametrize(
    "output",
    ["image_embeds", "image_feature", "text_feature", "memory_values_1", "fused", "match_logits", "boxes", "scores"],
)
@pytest.mark.parametrize("amount", [1e-3, float("nan"), float("inf")])
def test_one_wrong_number_fails(small_model: XFM, tmp_path: Path, output: str, amount: float) -> None:
    folder = write_export(tmp_path, small_model)
    manifest = judged(folder, small_model, spoil=_shift(output, amount))
    assert manifest.status == "failed"
    said = {"scores": "match scores", "memory_values_1": "image_memory memory"}.get(output, output)
    assert said in manifest.reason
    assert Manifest.load(folder).status == "failed"


def test_padding_of_text_embeddings_is_nobodys_business(small_model: XFM, tmp_path: Path) -> None:
    def spoil(graph: str, outputs: dict[str, Tensor]) -> None:
        # The shortest text of the last batch has one token; everything behind it is padding.
        if graph == "text" and outputs["text_embeds"].shape[0] > 3:
            outputs["text_embeds"] = outputs["text_embeds"].clone()
            outputs["text_embeds"][0, 1:] = 1e6

    assert judged(write_export(tmp_path, small_model), small_model, spoil=spoil).status == "verified"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rounding_band_is_narrow(small_model: XFM, tmp_path: Path, dtype: DType) -> None:
    """Ten times the rounding error of the type is no rounding error."""
    folder = write_export(tmp_path, small_model, dtype)
    rounding = make_reference(small_model, generated_examples(small_model.config), GRAPHS, dtype).rounding
    manifest = judged(folder, small_model, dtype, spoil=_shift("fused", 10 * rounding["fused"]))
    assert "fusion fused" in manifest.reason


def test_wrong_angle_fails_where_the_error_passes(
    small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = Threshold(absolute=10, rounding=0, cosine=0.99999, tie=1e-5, ranks=0.99)
    monkeypatch.setitem(THRESHOLDS, "fp32", loose)
    manifest = judged(write_export(tmp_path, small_model), small_model, spoil=_shift("image_feature", 0.1))
    assert manifest.reason == "differs from the model: vision image_feature"


def test_wrong_order_fails_where_the_error_passes(
    small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = Threshold(absolute=10, rounding=0, cosine=0.9, tie=1e-5, ranks=0.99)
    monkeypatch.setitem(THRESHOLDS, "fp32", loose)

    def spoil(graph: str, outputs: dict[str, Tensor]) -> None:
        if graph == "match":
            outputs["scores"] = -outputs["scores"]

    manifest = judged(write_export(tmp_path, small_model), small_model, spoil=spoil)
    assert manifest.reason == "differs from the model: ranks by match"


def test_ranks() -> None:
    truth = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    same = rank_agreement(truth * 2, truth, tie=0)
    assert same is not None
    assert (same.candidates, same.agreeing, same.identical) == (4, 1, 1)
    swapped = rank_agreement(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), truth, tie=0)
    assert swapped is not None
    assert (swapped.agreeing, swapped.identical) == (0.5, 0.5)
    # A tie may swap: both stand right, though their places differ.
    tied = rank_agreement(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), truth, tie=1)
    assert tied is not None
    assert (tied.agreeing, tied.identical) == (1, 0.5)
    # One candidate that falls to the end stands wrong, and so do all that it should be above.
    fallen = rank_agreement(torch.tensor([[-1.0, 2.0, 1.0, 0.0]]), truth, tie=0)
    assert fallen is not None
    assert fallen.agreeing == 0


def test_pairs_without_a_score_have_no_rank() -> None:
    truth = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    found = truth.clone()
    found[0, 1:] = torch.nan
    found[1, 0] = torch.nan
    agreement = rank_agreement(found, truth, tie=0)
    assert agreement is not None
    assert agreement.candidates == 2
    assert rank_agreement(torch.full_like(truth, torch.nan), truth, tie=0) is None


def test_reference_is_what_the_model_says(small_model: XFM) -> None:
    examples = generated_examples(small_model.config, images=2, texts=12)
    reference = make_reference(small_model, examples, GRAPHS, "fp32")
    with torch.no_grad():
        embeds = small_model.encode_text(examples.input_ids, examples.attention_mask)
        memory = small_model.image_memory(small_model.encode_image(examples.pixels))
        index = torch.arange(2).repeat_interleave(12)
        fused = small_model.fuse(embeds.repeat(2, 1, 1), examples.attention_mask.repeat(2, 1), memory, index)
        torch.testing.assert_close(
            reference.tensors["scores"].flatten(), small_model.match_logits(fused)[:, 1], rtol=0, atol=1e-5
        )
    assert not reference.rounding


def test_reference_survives_the_disk(small_model: XFM, tmp_path: Path) -> None:
    made = make_reference(small_model, generated_examples(small_model.config, texts=3), ("vision",), "bf16")
    made.save(tmp_path)
    read = Reference.load(tmp_path)
    assert read.rounding == made.rounding
    assert {*made.rounding} == {"image_embeds", "image_feature"}
    assert all(torch.equal(read.tensors[name], value) for name, value in made.tensors.items())
    assert "text_embeds" not in read.tensors


def test_model_is_left_as_it_is(make_model: Callable[..., XFM]) -> None:
    model = make_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_reference(model, generated_examples(model.config, texts=3), GRAPHS, "bf16")
    assert model.training
    assert model.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_reference_copies_one_encoder_at_a_time(small_model: XFM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model stays in memory, and a copy of it in 16 bits is half of that again."""
    made: weakref.WeakSet[XFM] = weakref.WeakSet()
    convert = expected.in_dtype

    def watched(part: XFM, dtype: torch.dtype) -> XFM:
        assert not made
        assert len([name for name, _ in part.named_children() if name.endswith("_encoder")]) == 1
        narrow = convert(part, dtype)
        if dtype != torch.float32:
            made.add(narrow)
        return narrow

    monkeypatch.setattr(expected, "in_dtype", watched)
    examples = generated_examples(small_model.config, images=2, texts=3)
    with deterministic_algorithms():
        by_parts = make_reference(small_model, examples, GRAPHS, "bf16")
        monkeypatch.setattr(expected, "_part", lambda model, large, dtype: convert(model, dtype))
        assert make_reference(small_model, examples, GRAPHS, "bf16").rounding == by_parts.rounding


def test_examples_have_every_length(small_model: XFM) -> None:
    config = small_model.config
    rows = [[0, 10 + number, 50 + number, 2] for number in range(20)]
    pixels = torch.zeros(1, 3, config.image_size, config.image_size)
    examples = make_examples(pixels, rows, config, origin="test")
    lengths = examples.attention_mask.sum(1).tolist()
    assert lengths[:9] == [1, 2, 3, 5, 8, 13, 21, 34, 40]
    assert lengths[9:] == [4] * 11
    for ids, length in zip(examples.input_ids.tolist(), lengths, strict=True):
        assert ids[0] == config.bos_token_id
        assert ids[length:] == [config.pad_token_id] * (40 - length)
        assert length < 2 or ids[length - 1] == config.eos_token_id
    short = make_examples(pixels, rows, config, origin="test", longest=6)
    assert short.input_ids.shape == (20, 6)
    with pytest.raises(InputError, match="0 texts"):
        make_examples(pixels, [], config, origin="test")


def test_fp32_files_on_onnx_runtime(exported_fp32: Path) -> None:
    manifest = Manifest.load(exported_fp32)
    assert (manifest.status, manifest.reason) == ("verified", "")
    assert manifest.verification is not None
    assert manifest.verification.runtime.startswith("onnxruntime")
    assert all(check.max_error is not None and check.max_error < 1e-4 for check in manifest.verification.checks)


def test_a_wrong_weight_in_a_file_is_found(exported_fp32: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "edited"
    shutil.copytree(exported_fp32, folder)
    loaded = onnx.load(str(folder / "vision.onnx"))
    bias = next(tensor for tensor in loaded.graph.initializer if tensor.name.endswith("norm1.bias"))
    bias.raw_data = bytes(len(bias.raw_data))
    onnx.save(loaded, str(folder / "vision.onnx"))
    with pytest.raises(ExportError, match=r"vision\.onnx was edited"):
        verify(folder)
    manifest = verify(folder, check_files=False)
    assert manifest.status == "failed"
    assert "vision image_embeds" in manifest.reason
    assert (folder / "vision.onnx").is_file()
    # The same folder with the right file is verified again.
    shutil.copy(exported_fp32 / "vision.onnx", folder)
    assert verify(folder).status == "verified"


@pytest.mark.parametrize(
    ("graphs", "spoilt", "said"),
    [
        (("match",), "match", "match scores"),
        pytest.param(GRAPHS, "fusion", "fusion fused", marks=pytest.mark.slow),
    ],
    ids=["match", "all"],
)
def test_bf16_graphs_are_compared_in_fp32(
    small_model: XFM, tmp_path: Path, graphs: tuple[GraphName, ...], spoilt: str, said: str
) -> None:
    """Within the band of bf16; a graph that lost a weight is found."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    export_onnx(small_model, tmp_path, consumer="tensorrt", dtype="bf16", graphs=graphs)
    manifest = verify_export(tmp_path, small_model)
    assert (manifest.status, manifest.reason) == ("verified", "")
    assert manifest.verification is not None
    assert manifest.verification.runtime.endswith("CPU, bf16 graphs computed in fp32")
    errors = {check.output: check.max_error for check in manifest.verification.checks}
    # Rounded weights alone make more than the errors of fp32.
    assert all(error is not None and error > 1e-4 for error in errors.values())
    with pytest.raises(UnavailableError, match="bf16"):
        Session.load(tmp_path)
    loaded = onnx.load(str(tmp_path / f"{spoilt}.onnx"))
    bias = next(tensor for tensor in loaded.graph.initializer if tensor.name.endswith("LayerNorm.bias"))
    bias.raw_data = bytes(len(bias.raw_data))
    onnx.save(loaded, str(tmp_path / f"{spoilt}.onnx"))
    manifest = verify(tmp_path, check_files=False)
    assert manifest.status == "failed"
    assert said in manifest.reason


def test_no_room_for_the_copy_in_fp32(small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("xfm_fast.export.runtimes.onnx_sessions.widen", full)
    folder = write_export(tmp_path, small_model, "bf16")
    with pytest.raises(StorageError, match="No space left on device"):
        verify_export(folder, small_model)


def test_without_a_runtime_nothing_is_called_verified(
    small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    manifest = verify_export(write_export(tmp_path, small_model), small_model)
    assert (manifest.status, manifest.verification) == ("unverified", None)
    assert manifest.reason == "onnxruntime is not installed; pip install 'xfm-fast[export]'"


def test_export_without_a_reference(small_model: XFM, tmp_path: Path) -> None:
    folder = write_export(tmp_path, small_model)
    with pytest.raises(ExportError, match=r"reference\.safetensors"):
        verify(folder)
    (folder / "reference.safetensors").write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"reference\.safetensors is damaged"):
        verify(folder)


def test_a_comparison_has_one_graph_loaded_and_the_memory_of_images(
    exported_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    from xfm_fast.export.runtimes.onnx_sessions import OnnxSessions

    load, most = OnnxSessions.load, list[set[str]]()
    alive: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()

    def counted(self: OnnxSessions, record: GraphRecord, path: Path) -> object:
        alive[record.name] = made = load(self, record, path)
        most.append({*alive})
        return made

    monkeypatch.setattr(OnnxSessions, "load", counted)
    assert verify(shutil.copytree(exported_fp32, tmp_path / "copied")).status == "verified"
    assert all(len(names - {"image_memory"}) == 1 for names in most if names != {"image_memory"}), most
    assert len(most) == 5, "each graph is loaded once"
