"""Engines without weights, and the weights of other models in the same engines."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.cli.runner import invoke
from tests.export.conftest import once
from xfm_fast import checkpoint
from xfm_fast.errors import ExportError, InputError, UnavailableError
from xfm_fast.export import export_onnx, verification
from xfm_fast.export.engines import library as engine_library
from xfm_fast.export.engines.build import build_engines, export_engines
from xfm_fast.export.engines.refit import check_structure, refit_engines
from xfm_fast.export.expected import generated_examples
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.model_repository.repository import plan_models
from xfm_fast.export.request import DEFAULT_GRAPHS, RepositoryOptions, TensorRTRequest
from xfm_fast.models.xfm import XFM

onnx = pytest.importorskip("onnx", reason="engines are built from ONNX files")
pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
pytest.importorskip("onnxruntime", reason="the graphs are compared by onnxruntime")


def _tuned(model: XFM) -> XFM:
    """A model of the same sizes with other weights."""
    torch.manual_seed(3)
    made = XFM(model.config, heads=model.heads)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name != "temp":
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


@pytest.fixture(scope="module")
def engines(small_model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a folder of engines without weights is made of; those of TensorRT for RTX take a GPU to build."""

    def make(folder: Path) -> None:
        folder.mkdir()
        onnx = tmp_path_factory.mktemp("refit")
        exported = export_onnx(small_model, onnx, consumer="tensorrt", dtype="fp32", source="the first model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.14.1.48"))
            patch.setattr(
                "xfm_fast.export.engines.build.build_engine",
                lambda _, __, engine, *___, **____: engine.write_bytes(b"plan"),
            )
            request = TensorRTRequest(dtype="fp32", refittable=True)
            build_engines(exported, onnx, folder, engine_library.load_library("tensorrt"), (89,), request=request)

    return once(tmp_path_factory, "refittable", make)


def test_weights_lie_beside_engines_that_have_none(engines: Path) -> None:
    manifest = Manifest.load(engines)
    assert [(graph.file, graph.weights) for graph in manifest.graphs] == [
        (f"{name}.engine", f"{name}.onnx") for name in DEFAULT_GRAPHS
    ]
    assert all(graph.files == [graph.file, graph.weights] for graph in manifest.graphs)
    assert {record.name for record in manifest.files} >= {name for graph in manifest.graphs for name in graph.files}
    manifest.require_files(engines)
    manifest.graphs[0].weights = "elsewhere.onnx"
    with pytest.raises(ExportError, match=r"lies in 'elsewhere\.onnx', which manifest\.json does not list"):
        manifest.require_files(engines)


@pytest.mark.slow
def test_engines_get_the_weights_of_another_model(
    engines: Path, small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the library and a GPU; what is joined and gathered for export is made anew from the other weights."""
    other, before = _tuned(small_model), Manifest.load(engines)
    computed = Mock(wraps=verification.make_reference)
    monkeypatch.setattr(verification, "make_reference", computed)
    made = refit_engines(
        other, engines, tmp_path / "out", source="the second model", examples=generated_examples(other.config),
        companions={"task.json": b"{}"},
    )  # fmt: skip
    assert (made.status, made.source, made.kind) == ("graphs verified", "the second model", "tensorrt")
    assert made.examples == generated_examples(other.config).origin
    assert computed.call_count == 1, "the graphs and the engines are compared with the same results of the model"
    assert made.weights_sha256 != before.weights_sha256
    assert (made.target, made.options) == (before.target, before.options)
    direct = export_onnx(other, tmp_path / "direct", consumer="tensorrt", dtype="fp32")
    assert made.weights_sha256 == direct.weights_sha256
    for graph in made.graphs:
        assert graph.profiles == before.graph(graph.name).profiles
        assert (tmp_path / "out" / graph.file).read_bytes() == (engines / graph.file).read_bytes()
        weights, wanted = (onnx.load(tmp_path / folder / f"{graph.name}.onnx").graph for folder in ("out", "direct"))
        assert weights.initializer == wanted.initializer
        assert weights.initializer != onnx.load(engines / f"{graph.name}.onnx").graph.initializer
    assert {"task.json", "reference.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}
    # Those with other weights take others in their turn.
    again = refit_engines(small_model, tmp_path / "out", tmp_path / "again")
    assert (again.weights_sha256, again.status) == (before.weights_sha256, "unverified")


def test_a_model_of_another_structure_is_named_before_a_graph_is_exported(
    engines: Path, small_model: XFM, make_model: Callable[..., XFM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xfm_fast.export.engines.refit.export_onnx", lambda *_, **__: pytest.fail("exported"))
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"built for a model of vision_depth 2 and this one has 3; build .*tensorrt"):
        refit_engines(make_model(vision_depth=3), engines, out)
    with pytest.raises(InputError, match="image_size 32 and this one has 48"):
        refit_engines(make_model(image_size=48), engines, out)
    headless = XFM(small_model.config, heads=("contrastive", "matching")).eval()
    with pytest.raises(InputError, match=r"graph 'fusion' of this model has the outputs fused .*boxes"):
        refit_engines(headless, engines, out)
    with pytest.raises(InputError, match="holds the engines themselves"):
        refit_engines(small_model, engines, engines)
    assert not out.exists()
    with pytest.raises(pytest.fail.Exception, match="exported"):
        # What only training reads is no part of a graph.
        refit_engines(make_model(drop_path_rate=0.05, hidden_dropout=0.0), engines, out)


def test_engines_that_hold_their_weights_take_no_others(
    engines: Path, exported_fp32: Path, small_model: XFM, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="holds onnx and no engines; a fine-tuned model is exported with"):
        refit_engines(small_model, exported_fp32, tmp_path / "out")
    folder = Path(shutil.copytree(engines, tmp_path / "whole"))
    manifest = Manifest.load(folder)
    for graph in manifest.graphs:
        graph.weights = None
    manifest.save(folder)
    with pytest.raises(ExportError, match="hold their weights; build them once more with xfm-fast export tensorrt --r"):
        refit_engines(small_model, folder, tmp_path / "out")
    (folder / "text.onnx").unlink()
    with pytest.raises(ExportError, match=r"text\.onnx is missing"):
        refit_engines(small_model, folder, tmp_path / "out")


@pytest.mark.parametrize("part", ["node", "constant", "size", "weight", "axis"])
def test_graphs_of_another_structure_are_told_apart(engines: Path, tmp_path: Path, part: str) -> None:
    known, found = engines / "fusion.onnx", tmp_path / "fusion.onnx"
    model = onnx.load(known)
    graph = model.graph
    weight = next(each for each in graph.initializer if each.name.endswith("LayerNorm.weight"))
    constant = next(each for each in graph.initializer if each.data_type == onnx.TensorProto.INT64)
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(values + 1, weight.name))
    onnx.save(model, found)
    check_structure("fusion", known, found)
    match part:
        case "node":
            node = next(each for each in graph.node if each.op_type == "LayerNormalization")
            node.attribute[0].f *= 2
            name = f"node {node.name} is another"
        case "constant":
            numbers = onnx.numpy_helper.to_array(constant)
            constant.CopyFrom(onnx.numpy_helper.from_array(numbers + 1, constant.name))
            name = f"weight {constant.name} is another"
        case "size":
            weight.CopyFrom(onnx.numpy_helper.from_array(values[1:], weight.name))
            name = f"weight {weight.name} is another"
        case "weight":
            name = f"weight {weight.name} is missing"
            graph.initializer.remove(weight)
        case _:
            graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
            name = f"{graph.input[0].name} is another"
    onnx.save(model, found)
    with pytest.raises(InputError, match=f"graph 'fusion' of this model is not the one .*: {name}"):
        check_structure("fusion", known, found)


@pytest.mark.slow
def test_the_command(engines: Path, small_model: XFM, tmp_path: Path) -> None:
    other = _tuned(small_model)
    checkpoint.save_pretrained(other.state_dict(), other.config, tmp_path / "model")
    done = invoke(["export", "refit", str(engines), str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 3, done.output
    assert "graphs verified" in done.output
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.source, manifest.graph_names) == ("checkpoint model", DEFAULT_GRAPHS)
    done = invoke(["export", "refit", str(engines), "--preset", "tiny", "--out", str(tmp_path / "other")])
    assert done.exit_code == 2
    assert "vision_depth 2" in done.output
    assert "refit" in invoke(["export", "--help"]).output


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"plugins": True}, {"keep_onnx": True}])
def test_what_does_not_go_with_other_weights_is_refused(
    options: dict[str, Any], small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.14.1.48"))
    monkeypatch.setattr(engine_library, "local_capability", lambda: 89)
    with pytest.raises(InputError, match="leave out --"):
        export_engines(small_model, tmp_path / "out", "tensorrt", refittable=True, **options)
    assert not (tmp_path / "out").exists()


def test_triton_serves_them_by_a_session(engines: Path) -> None:
    manifest = Manifest.load(engines)
    models = plan_models(manifest, RepositoryOptions(pipeline="graphs"), None)
    assert {model.backend for model in models} == {"python"}
    with pytest.raises(ExportError, match="tensorrt backend does not run engines without weights; use the python back"):
        plan_models(manifest, RepositoryOptions(pipeline="graphs", backend="tensorrt"), None)


def test_tensorrt_for_rtx_wants_a_gpu_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is exported; its builder says that a check of its own failed."""
    pytest.importorskip("tensorrt_rtx", reason="asks tensorrt-rtx for its targets")
    library, request = engine_library.load_library("tensorrt-rtx"), TensorRTRequest(sm="89", refittable=True)
    monkeypatch.setattr(engine_library, "local_capability", lambda: None)
    with pytest.raises(UnavailableError, match="only on a machine with an NVIDIA GPU, and there is none here; leave"):
        library.check(request, "bf16")
    monkeypatch.setattr(engine_library, "local_capability", lambda: 89)
    assert library.check(request, "bf16") == (89,)
    builder = library.trt.Builder(engine_library.message_logger(library.trt, [], logging.getLogger(__name__)))
    config = builder.create_builder_config()
    library.configure(config, request, (89,))
    assert all(config.get_flag(getattr(library.trt.BuilderFlag, flag)) for flag in ("REFIT", "STRIP_PLAN"))
