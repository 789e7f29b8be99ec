"""A manifest says what an export is, and loading one says precisely what does not match."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xfm_fast import __version__
from xfm_fast.errors import ExportError, InputError, StorageError, UnavailableError
from xfm_fast.export import manifest, onnx, pipeline
from xfm_fast.export.consumers import profile
from xfm_fast.export.manifest import EngineTarget, FileRecord, Manifest, new_manifest, record_files
from xfm_fast.export.onnx import export_onnx
from xfm_fast.export.pipeline import build_graphs, graph_bytes, prepare_folder, weights_sha256
from xfm_fast.export.request import GRAPHS, OnnxRequest, parse_fixed, parse_graphs
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
    """A folder with two files and their manifest."""
    (tmp_path / "vision.onnx").write_bytes(b"v" * 100)
    (tmp_path / "text.onnx").write_bytes(b"t" * 50)
    _manifest(files=record_files(tmp_path, ["vision.onnx", "text.onnx", "text.onnx"])).save(tmp_path)
    return tmp_path


def test_there_and_back(folder: Path) -> None:
    loaded = Manifest.load(folder)
    assert [(record.name, record.bytes) for record in loaded.files] == [("text.onnx", 50), ("vision.onnx", 100)]
    assert loaded.files[1].sha256 == hashlib.sha256(b"v" * 100).hexdigest()
    assert (loaded.xfm_fast, loaded.status) == (__version__, "unverified")
    loaded.save(folder)
    assert Manifest.load(folder) == loaded


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"v" * 30, r"vision\.onnx is truncated \(30 of 100 bytes\)"),
        (b"v" * 99 + b"!", r"vision\.onnx was edited \(its size is right, its sha256 differs\)"),
        (b"v" * 100 + b"!", r"vision\.onnx was edited \(101 bytes instead of 100\)"),
        (None, r"vision\.onnx is missing"),
    ],
)
def test_changed_file_is_named(folder: Path, content: bytes | None, message: str) -> None:
    (folder / "vision.onnx").unlink()
    if content is not None:
        (folder / "vision.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=message) as caught:
        Manifest.load(folder)
    assert "text.onnx" not in str(caught.value)
    Manifest.load(folder, check_files=False)


def test_all_changed_files_are_named(folder: Path) -> None:
    (folder / "text.onnx").unlink()
    (folder / "vision.onnx").write_bytes(b"v" * 99 + b"!")
    with pytest.raises(ExportError, match=r"text\.onnx .*vision\.onnx "):
        Manifest.load(folder)


def _rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_manifests_of_other_versions(folder: Path) -> None:
    _rewrite(folder, format=manifest.FORMAT_VERSION + 1, xfm_fast="9.0", a_new_field=1)
    with pytest.raises(ExportError, match="format 3"):
        Manifest.load(folder)
    _rewrite(folder, format=0)
    with pytest.raises(ExportError, match="format 0"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "no manifest of xfm-fast"),
        ('{"name": "x"}', "no format number"),
        ('{"format": true, "graphs": 3}', "no format number"),
    ],
)
def test_damaged_manifest(folder: Path, content: str, message: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ExportError, match=message):
        Manifest.load(folder)


def test_damaged_field_is_named(folder: Path) -> None:
    _rewrite(folder, dtype="int3")
    with pytest.raises(ExportError, match="damaged at dtype"):
        Manifest.load(folder)


def test_no_manifest(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent", Path(__file__)):
        with pytest.raises(ExportError, match=r"manifest\.json"):
            Manifest.load(place)


def test_names_cannot_leave_the_folder(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_bytes(b"x")
    for name in ("../secret", str(secret), "sub/../../secret"):
        _rewrite(folder, files=[{"name": name, "bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}])
        with pytest.raises(ExportError, match="is no file of this folder"):
            Manifest.load(folder)


def test_unknown_graph_is_named(folder: Path) -> None:
    with pytest.raises(ExportError, match="graph 'match'"):
        Manifest.load(folder).graph("match")


def _target(**changes: Any) -> Manifest:
    fields = {"library": "tensorrt", "version": "10.14.1", "compute_capabilities": [80, 89]}
    return _manifest(kind="tensorrt", target=EngineTarget(**fields | changes))


def test_engines_belong_to_their_gpus_and_library() -> None:
    _target().require_target(library_version="10.14.1", compute_capability=89)
    _target().require_target(library_version="10.14.1", compute_capability=None)
    _manifest().require_target(library_version="1.0", compute_capability=75)
    with pytest.raises(ExportError, match="SM75"):
        _target().require_target(library_version="10.14.1", compute_capability=75)
    for version in ("10.13.0", "10.15.0"):
        with pytest.raises(ExportError, match=rf"built by tensorrt 10\.14\.1 and this machine has {version}; install"):
            _target().require_target(library_version=version, compute_capability=80)


def test_compatible_engines_run_elsewhere_too() -> None:
    _target(version_compatible=True).require_target(library_version="10.15.0", compute_capability=80)
    with pytest.raises(ExportError, match=r"10\.9"):
        _target(version_compatible=True).require_target(library_version="10.9.0", compute_capability=80)
    wide = _target(hardware_compatibility="ampere_plus")
    wide.require_target(library_version="10.14.1", compute_capability=90)
    with pytest.raises(ExportError, match="this GPU is SM75"):
        wide.require_target(library_version="10.14.1", compute_capability=75)


def test_commit_is_that_of_our_own_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ls-files": "x", "rev-parse": "abc", "status": ""}
    monkeypatch.setattr(manifest, "_git", lambda folder, command, *rest: answers[command])
    manifest.commit.cache_clear()
    assert manifest.commit() == "abc"
    answers["status"] = " M file"
    manifest.commit.cache_clear()
    assert manifest.commit() == "abc+"

    def untracked(*arguments: Any) -> str:
        raise subprocess.CalledProcessError(1, "git")

    monkeypatch.setattr(manifest, "_git", untracked)
    manifest.commit.cache_clear()
    assert manifest.commit() is None
    manifest.commit.cache_clear()


def test_export_describes_itself(exported_fp32: Path, small_model: XFM) -> None:
    library = pytest.importorskip("onnx")
    loaded = Manifest.load(exported_fp32)
    assert loaded.graph_names == GRAPHS
    assert loaded.xfm_config == small_model.config
    graphs = build_graphs(small_model, profile("onnxruntime", "fp32"), GRAPHS)
    assert loaded.weights_sha256 == weights_sha256(small_model, graphs.values())
    assert {record.name for record in loaded.files} | {"manifest.json"} == {p.name for p in exported_fp32.iterdir()}
    fusion = loaded.graph("fusion")
    assert fusion.inputs[0].dims == ["batch", "texts", "length", 64]
    assert fusion.inputs[0].dtype == "float32"
    assert fusion.inputs[1].dtype == "int64"
    assert fusion.axes["length"].most == small_model.config.max_text_length
    assert all(graph.build_seconds > 0 for graph in loaded.graphs)
    for graph in loaded.graphs:
        file = library.load(str(exported_fp32 / graph.file))
        entries = {entry.key: entry.value for entry in file.metadata_props}
        assert entries["xfm_fast.graph"] == graph.name
        assert json.loads(entries["xfm_fast.config"]) == small_model.config.model_dump()
        assert entries["xfm_fast.weights_sha256"] == loaded.weights_sha256
        assert (entries["xfm_fast.dtype"], entries["xfm_fast.consumer"]) == ("fp32", "onnxruntime")
        assert [put.name for put in file.graph.input] == [tensor.name for tensor in graph.inputs]
        assert [put.name for put in file.graph.output] == [tensor.name for tensor in graph.outputs]
        dims = [[d.dim_param or d.dim_value for d in put.type.tensor_type.shape.dim] for put in file.graph.input]
        assert dims == [tensor.dims for tensor in graph.inputs]


def test_estimate_is_close_and_not_below(exported_fp32: Path, small_model: XFM) -> None:
    for name, graph in build_graphs(small_model, profile("onnxruntime", "fp32"), GRAPHS).items():
        size = (exported_fp32 / f"{name}.onnx").stat().st_size
        room = pipeline._ROOM_PER_GRAPH
        assert size <= graph_bytes(graph, small_model, "fp32") <= 1.2 * size + room


def test_weights_are_told_apart(make_model: Callable[..., XFM]) -> None:
    model = make_model()
    graphs = build_graphs(model, profile("onnxruntime", "fp32"), ("vision",))
    before = weights_sha256(model, graphs.values())
    with torch.no_grad():
        model.get_parameter("itm_head.0.bias")[0] += 1
        assert weights_sha256(model, graphs.values()) == before, "vision does not read the matching head"
        model.vision_proj.bias[0] += 1
    assert weights_sha256(model, graphs.values()) != before


class TestBeforeAnythingIsExported:
    """Every bad request ends before a graph is traced."""

    @pytest.fixture(autouse=True)
    def _nothing_is_exported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")

        def refuse(*arguments: Any, **options: Any) -> None:
            raise AssertionError("exported")

        monkeypatch.setattr(onnx, "write_onnx", refuse)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"consumer": "toaster"}, UnavailableError, "consumer 'toaster' is unknown"),
            ({"dtype": "fp8"}, UnavailableError, "dtype 'fp8' is unknown"),
            ({"opset": 17}, UnavailableError, "opset 17 is not supported"),
            ({"graphs": ("vision", "audio")}, UnavailableError, "graph 'audio' is unknown"),
            ({"graphs": ()}, InputError, "names no graph"),
            ({"graphs": ("text", "text")}, InputError, "graph 'text' is named twice"),
            ({"fixed": {"width": 3}}, InputError, "axis 'width' cannot be fixed; choose from batch, length, texts"),
            ({"fixed": {"texts": 3}, "graphs": ("vision",)}, InputError, "'texts' cannot be fixed; choose from batch$"),
            ({"fixed": {"batch": 0}}, InputError, "batch=0 is no size"),
            ({"fixed": {"length": 65}}, InputError, "length=65 exceeds the 64 positions"),
        ],
    )
    def test_options(
        self, small_model: XFM, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            export_onnx(small_model, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_folder_that_cannot_be_made(self, small_model: XFM, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StorageError, match="file/out"):
            export_onnx(small_model, tmp_path / "file" / "out")

    def test_unwritable_folder(self, small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: Any, **options: Any) -> None:
            raise PermissionError(13, "Permission denied")

        # Who runs as root may write everywhere, whatever the mode of the folder.
        monkeypatch.setattr(pipeline.tempfile, "TemporaryFile", refuse)
        with pytest.raises(StorageError, match="Permission denied"):
            export_onnx(small_model, tmp_path)

    def test_full_disk(self, small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "manifest.json").write_text("of an earlier export")
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda folder: usage(1 << 30, 1 << 30, 1_000_000))
        with pytest.raises(StorageError, match=r"has 0\.00 GB free and the export needs about 0\.0\d GB; free space"):
            export_onnx(small_model, tmp_path)
        assert (tmp_path / "manifest.json").read_text() == "of an earlier export"


def test_room_is_needed_for_what_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="--out"):
        prepare_folder(tmp_path / "file", 1)
    (tmp_path / "file").unlink()
    prepare_folder(tmp_path / "a" / "b", 1)
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(StorageError, match="GB free"):
        prepare_folder(tmp_path, free + (1 << 40))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_earlier_manifest_does_not_outlive_its_files(
    small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    _manifest().save(tmp_path)

    def die(*arguments: Any, **options: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(onnx, "write_onnx", die)
    with pytest.raises(StorageError, match="the disk is full"):
        export_onnx(small_model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_lists_of_options() -> None:
    assert parse_graphs("text, vision") == ("text", "vision")
    for none in ("", " ", ",", " , "):
        with pytest.raises(InputError, match="names no graph"):
            parse_graphs(none)
    for given in ([""], [], ("",), ""):
        with pytest.raises(InputError, match="names no graph"):
            OnnxRequest(graphs=given)
    assert parse_fixed("batch=1, length = 40") == {"batch": 1, "length": 40}
    assert parse_fixed("") == {}
    with pytest.raises(UnavailableError, match="graph 'audio'"):
        parse_graphs("vision,audio")
    for wrong in ("batch", "batch=", "batch=two", "=2", "batch=-1", "batch=1.5"):
        with pytest.raises(InputError, match="axis=size"):
            parse_fixed(wrong)


def test_file_records_name_what_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read back"):
        record_files(tmp_path, ["absent"])
    problems = manifest.mismatches(tmp_path, [FileRecord(name="absent", bytes=1, sha256="")])
    assert list(problems) == ["absent is missing"]
