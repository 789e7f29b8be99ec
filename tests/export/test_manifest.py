"""A manifest describes an export, and loading one names precisely what does not match."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xfm_fast.errors import ExportError, InputError, StorageError, UnavailableError
from xfm_fast.export import manifest, onnx, pipeline
from xfm_fast.export.manifest import (
    EngineTarget,
    Manifest,
    QuantisationRecord,
    new_manifest,
    record_files,
)
from xfm_fast.export.onnx import export_onnx
from xfm_fast.export.pipeline import build_graphs, weights_sha256
from xfm_fast.export.request import DEFAULT_GRAPHS, ExportRequest
from xfm_fast.export.runtimes import Spelling
from xfm_fast.models.xfm import XFM


def _manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "source": "a model", "weights_sha256": "0", "tokenizer_sha256": None, "config": {}, "dtype": "fp32",
        "consumer": "onnxruntime", "opset": 20, "attention": "primitives", "all_tokens": False, "fixed": {},
        "versions": {}, "graphs": [], "files": [],
    }  # fmt: skip
    return new_manifest(**fields | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a folder with two files and their manifest."""
    (tmp_path / "vision.onnx").write_bytes(b"v" * 100)
    (tmp_path / "text.onnx").write_bytes(b"t" * 50)
    _manifest(files=record_files(tmp_path, ["vision.onnx", "text.onnx", "text.onnx"])).save(
        tmp_path
    )
    return tmp_path


def test_fields_of_earlier_exports_are_read() -> None:
    quantisation = {
        "kind": "int8",
        "budget": 0.99,
        "cosine": 0.999,
        "products": 2,
        "kept": [],
        "smoothed": 1,
    }
    timed = {"wide_milliseconds": 2.0, "milliseconds": 1.0}
    later = {"tables": [], "launches": [], "wide_launches": []}
    assert (
        QuantisationRecord.model_validate(quantisation | timed).model_dump()
        == quantisation | timed | later
    )
    assert QuantisationRecord.model_validate(quantisation).milliseconds == 0


@pytest.mark.parametrize("content", [b"v" * 30, b"v" * 99 + b"!", b"v" * 100 + b"!", None])
def test_changed_files_are_named(folder: Path, content: bytes | None) -> None:
    (folder / "vision.onnx").unlink()
    if content is not None:
        (folder / "vision.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"vision\.onnx") as caught:
        Manifest.load(folder)
    assert "text.onnx" not in str(caught.value)
    (folder / "text.onnx").unlink()
    with pytest.raises(ExportError, match=r"text\.onnx .*vision\.onnx"):
        Manifest.load(folder)
    Manifest.load(folder, check_files=False)


FILE = {"name": "x", "bytes": 1, "sha256": ""}


@pytest.mark.parametrize(
    "change",
    [
        {"format": manifest.FORMAT_VERSION + 1, "xfm_fast": "9.0"},
        {"files": [FILE | {"name": "../x"}]},
    ],
    ids=str,
)
def test_damaged_manifests(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportError, match=r"manifest\.json"):
        Manifest.load(folder)


def test_engines_belong_to_their_gpus_and_library() -> None:
    _manifest().require_target(library_version="1.0", compute_capability=75)
    target = EngineTarget(library="tensorrt", version="10.14.1", compute_capabilities=[80, 89])
    manifest = _manifest(kind="tensorrt", target=target)
    for capability in (89, None):
        manifest.require_target(library_version="10.14.1", compute_capability=capability)
    for version, capability, reason in (("10.14.1", 75, "SM75"), ("10.15.0", 80, r"10\.15\.0")):
        with pytest.raises(ExportError, match=reason):
            manifest.require_target(library_version=version, compute_capability=capability)
    wide = target.model_copy(
        update={"version_compatible": True, "hardware_compatibility": "ampere_plus"}
    )
    manifest = _manifest(kind="tensorrt", target=wide)
    manifest.require_target(library_version="10.15.0", compute_capability=90)
    for version, capability, reason in (("10.14.1", 75, "SM75"), ("10.9.0", 80, r"10\.9")):
        with pytest.raises(ExportError, match=reason):
            manifest.require_target(library_version=version, compute_capability=capability)


def test_export_describes_itself(exported_fp32: Path, small_model: XFM) -> None:
    library = pytest.importorskip("onnx")
    loaded = Manifest.load(exported_fp32)
    assert loaded.graph_names == DEFAULT_GRAPHS
    assert loaded.xfm_config == small_model.config
    graphs = build_graphs(
        small_model, Spelling("primitives", 20), ExportRequest(graphs=DEFAULT_GRAPHS)
    )
    assert loaded.weights_sha256 == weights_sha256(small_model, graphs.values())
    assert {record.name for record in loaded.files} | {"manifest.json"} == {
        p.name for p in exported_fp32.iterdir()
    }
    fusion = loaded.graph("fusion")
    assert [(tensor.dtype, tensor.dims) for tensor in fusion.inputs[:2]] == [
        ("float32", ["batch", "texts", "length", 64]), ("int64", ["batch", "texts", "length"]),
    ]  # fmt: skip
    assert fusion.axes["length"].most == small_model.config.max_text_length
    for graph in loaded.graphs:
        file = library.load(str(exported_fp32 / graph.file))
        entries = {
            entry.key.removeprefix("xfm_fast."): entry.value for entry in file.metadata_props
        }
        assert json.loads(entries["config"]) == small_model.config.model_dump()
        facts = [entries[name] for name in ("graph", "weights_sha256", "dtype", "consumer")]
        assert facts == [graph.name, loaded.weights_sha256, "fp32", "onnxruntime"]
        assert [put.name for put in file.graph.output] == [tensor.name for tensor in graph.outputs]
        dims = {
            put.name: [d.dim_param or d.dim_value for d in put.type.tensor_type.shape.dim]
            for put in file.graph.input
        }
        assert dims == {tensor.name: tensor.dims for tensor in graph.inputs}


def test_a_hash_is_of_the_weights_that_graphs_read(make_model: Callable[..., XFM]) -> None:
    model = make_model()
    graphs = build_graphs(model, Spelling("primitives", 20), ExportRequest(graphs=("vision",)))
    before = weights_sha256(model, graphs.values())
    with torch.no_grad():
        model.get_parameter("itm_head.0.bias")[0] += 1
        assert weights_sha256(model, graphs.values()) == before, (
            "vision does not read the matching head"
        )
        model.vision_proj.bias[0] += 1
    assert weights_sha256(model, graphs.values()) != before


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing a graph fails, as on a full disk."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(onnx, "write_onnx", refuse)


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"consumer": "toaster"}, UnavailableError, "'toaster'"),
        ({"dtype": "fp8"}, UnavailableError, "'fp8'"),
        ({"graphs": ("vision", "audio")}, UnavailableError, "'audio'"),
        ({"graphs": ()}, InputError, "no graph"),
        ({"fixed": {"texts": 3}, "graphs": ("vision",)}, InputError, "'texts'"),
        ({"fixed": {"length": 65}}, InputError, "length=65"),
    ],
)
def test_bad_requests_end_before_a_graph_is_traced(
    small_model: XFM, tmp_path: Path, options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        export_onnx(small_model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_export")
def test_a_full_disk(small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen first, it leaves an earlier export; while graphs are written, no manifest outlives its files."""
    _manifest().save(tmp_path)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(
            pipeline.shutil, "disk_usage", lambda folder: usage(1 << 30, 1 << 30, 1_000_000)
        )
        with pytest.raises(StorageError, match=r"0\.00 GB"):
            export_onnx(small_model, tmp_path)
    assert Manifest.load(tmp_path).source == "a model"
    with pytest.raises(StorageError, match="the disk is full"):
        export_onnx(small_model, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        export_onnx(small_model, tmp_path / "file")
