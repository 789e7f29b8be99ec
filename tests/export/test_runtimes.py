"""Every runtime gives what the model gives; TensorRT's is driven through a stand-in that behaves as its API says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from xfm_fast import XFM, Retriever
from xfm_fast.errors import ExportError, InputError, UnavailableError
from xfm_fast.export.expected import Reference
from xfm_fast.export.manifest import EngineTarget, Manifest, record_files
from xfm_fast.export.onnx import export_onnx
from xfm_fast.export.request import DEFAULT_GRAPHS, GraphName
from xfm_fast.export.runtimes import RUNTIMES, open_runtime
from xfm_fast.export.runtimes import tensorrt as engine_runtime
from xfm_fast.export.runtimes.onnx_runtime import OnnxRuntime, session_options
from xfm_fast.export.runtimes.tensorrt import TensorRT
from xfm_fast.export.session import Session
from xfm_fast.export.slots import graph_profiles, parse_profiles
from xfm_fast.export.verification import verify

pytest.importorskip("onnxruntime", reason="the stand-in for engines computes with onnxruntime")

import onnxruntime

from tests.export.conftest import pixels_of, texts_of
from tests.export.tensorrt_stand_in import tensorrt_module

PROFILES = (
    "latency:batch=1,texts=1..8..16,length=1..8..24",
    "bulk:batch=1..4..6,texts=1..4..6,length=1..8..24",
)


@pytest.fixture(scope="module")
def engines(exported_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder whose engines name the ONNX files that the stand-in runs."""
    folder = tmp_path_factory.mktemp("engines")
    manifest = Manifest.load(exported_fp32)
    records = []
    for record in manifest.graphs:
        (folder / f"{record.name}.engine").write_text(
            json.dumps([record.name, str(exported_fp32 / record.file)])
        )
        profiles = graph_profiles(record, parse_profiles(PROFILES))
        files = {"file": f"{record.name}.engine", "files": [f"{record.name}.engine"]}
        records.append(record.model_copy(update=files | {"profiles": profiles}))
    target = EngineTarget(library="tensorrt", version="10.14.1", compute_capabilities=[89])
    names = [record.file for record in records]
    (folder / "reference.safetensors").write_bytes(
        (exported_fp32 / "reference.safetensors").read_bytes()
    )
    changes = {"kind": "tensorrt", "consumer": "tensorrt", "graphs": records, "target": target}
    manifest.model_copy(update=changes | {"files": record_files(folder, names)}).save(folder)
    return folder


@pytest.fixture
def stand_in(engines: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a module `tensorrt` with its engines."""
    module = tensorrt_module(
        graphs={record.name: record for record in Manifest.load(engines).graphs}
    )

    class OnStandIn(TensorRT):
        def __init__(self, manifest: Manifest, device: Any = None) -> None:
            super().__init__(manifest, torch.device("cpu"), cuda=module.cuda)

    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(RUNTIMES, "tensorrt", OnStandIn)
    return module


def _same_retrieval(model: XFM, session: Session, tolerance: float = 1e-4) -> None:
    """More images and texts than any profile takes at once."""
    pixels, (ids, mask) = pixels_of(model, 7), texts_of(41, 20)
    results = []
    for subject in (model, session):
        retriever = Retriever(subject)
        images, texts = retriever.embed_images([pixels]), retriever.embed_texts([(ids, mask)])
        results.append(
            (
                images.embeds,
                images.features,
                texts.tokens,
                texts.features,
                retriever.rerank(images, texts).scores,
            )
        )
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).abs().max() < tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "form"),
    [
        ("onnxruntime", "fixed"),
        ("openvino", "padded"),
        ("openvino", "packed"),
        ("openvino", "fixed"),
    ],
)
def test_every_runtime_gives_what_the_model_gives(
    runtime: str,
    form: str,
    small_model: XFM,
    exported_fp32: Path,
    exported_packed: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip(RUNTIMES[runtime].package)
    folder = {"padded": exported_fp32, "packed": exported_packed}.get(form, tmp_path)
    if form == "fixed":
        export_onnx(
            small_model, folder, graphs=DEFAULT_GRAPHS, fixed={"batch": 2, "texts": 4, "length": 20}
        )
    session = Session.load(folder, runtime)
    assert session.description.startswith(runtime)
    _same_retrieval(small_model, session)
    with pytest.raises(InputError, match="pixels"):
        session.run("vision", {"pixels": torch.zeros(1, 3, 8, 8)})
    if form == "fixed":
        with pytest.raises(InputError, match="length 21"):
            session.encode_text(torch.full((1, 21), 5))
    with pytest.raises(UnavailableError, match="mps"):
        Session(folder, runtime, device="mps")
    with pytest.raises(UnavailableError, match="fp8"):
        Session(folder, runtime, precision="fp8")


def test_engines_give_what_the_model_gives(engines: Path, small_model: XFM, stand_in: Any) -> None:
    session = Session.load(engines)
    assert session.description == "tensorrt 10.14.1, a stand-in"
    _same_retrieval(small_model, session)
    assert {profile for profile, _ in stand_in.engines["fusion"].runs} == {0, 1}
    wide: list[tuple[GraphName, dict[str, int], str]] = [
        ("vision", {"batch": 7}, "batch 7"),
        ("fusion", {"batch": 2, "texts": 9, "length": 4}, "batch 2, texts 9, length 4"),
    ]
    for graph, sizes, reason in wide:
        with pytest.raises(InputError, match=reason):
            session.run(graph, session.example_inputs(graph, sizes))
    with pytest.raises(InputError, match="length 30"):
        session.encode_text(torch.full((1, 30), 5), torch.ones(1, 30))
    stand_in.engines["vision"].broken = True
    with pytest.raises(ExportError, match="Cask convolution failed"):
        session.encode_image(pixels_of(small_model, 2))


def test_a_context_for_each_profile_and_each_captured_shape(
    engines: Path, small_model: XFM, stand_in: Any
) -> None:
    session, log = Session.load(engines), stand_in.cuda.log
    vision = stand_in.engines["vision"]
    assert [context.profile for context in vision.contexts] == [0, 1, 0]
    # A captured graph has memory of its own, of its size.
    shared, captured = (context.memories[-1] for context in vision.contexts[1:])
    assert captured[1] == 1 << 10
    assert not shared[0] <= captured[0] < shared[0] + shared[1]
    log.clear()
    embeds = session.encode_image(pixels_of(small_model, 1))
    assert log[-1] == "replay"
    copy = embeds.clone()
    negated = session.encode_image(-pixels_of(small_model, 1))
    # The memory of a captured graph is used again; what was handed out is not.
    assert torch.equal(embeds, copy)
    assert not torch.equal(negated, copy)
    log.clear()
    session.encode_image(pixels_of(small_model, 3))
    assert log == ["engine waits for caller", "caller waits for engine"]
    assert vision.runs[-1] == (1, {"pixels": (3, 3, *[small_model.config.image_size] * 2)})


def test_requests_between_captured_shapes_are_padded(
    engines: Path, small_model: XFM, stand_in: Any
) -> None:
    """Shapes around the tuned one are captured; what lies between two is padded to the larger, and hidden."""
    session = Session.load(engines)
    text = stand_in.engines["text"]
    # Of the profile for single texts: half of 8 tokens, 8, 16, and the greatest.
    tuned = [context for context in text.contexts[2:] if context.profile == 0]
    assert [context.shapes["input_ids"][1] for context in tuned] == [4, 8, 16, 24]
    assert len({context.memories[-1] for context in tuned}) == 1, "they run in turn, in one memory"
    for length, ran in ((24, 24), (9, 16), (5, 8), (4, 4), (2, 4), (1, 1)):
        ids, mask = torch.arange(5, 5 + length)[None], torch.ones(1, length, dtype=torch.long)
        stand_in.cuda.log.clear()
        outputs = session.run("text", {"input_ids": ids, "attention_mask": mask})
        assert text.runs[-1][1]["input_ids"] == (1, ran)
        assert ("replay" in stand_in.cuda.log) == (ran != 1), (
            "a captured shape of four times the work is not run"
        )
        with torch.no_grad():
            expected = small_model.encode_text(ids, mask)
        assert outputs["text_embeds"].shape == expected.shape
        assert (outputs["text_embeds"] - expected).abs().max() < 1e-4
    # Two axes: 5 texts of 3 tokens run as 8 of 4.
    sizes = {"batch": 1, "texts": 5, "length": 4}
    session.run("fusion", session.example_inputs("fusion", sizes))
    assert stand_in.engines["fusion"].runs[-1][1]["attention_mask"] == (1, 8, 4)


def test_engines_are_verified_through_a_session(
    engines: Path, stand_in: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(engines, tmp_path / "copy"))
    assert Reference.load(folder).texts > 16, "more than a profile takes at once"
    manifest = verify(folder)
    assert (manifest.status, manifest.reason) == ("verified", "")
    record = manifest.verification
    assert record is not None
    assert record.runtime == "tensorrt 10.14.1, a stand-in"
    shapes = [shape for check in record.checks if check.graph == "fusion" for shape in check.shapes]
    assert max(shape[2] for shape in shapes) == 21
    assert {(1, 1), (4, 1), (1, 16)} <= {(*shape[:2],) for shape in shapes}


def test_engines_of_another_version_or_machine_are_refused(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(engines)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError, match=r"\.\[tensorrt\]"):
        open_runtime("tensorrt", manifest)
    for version, gpu, device, reason in (
        ("10.15.0", 89, None, r"10\.15\.0"),
        ("10.14.1", 89, "cpu", "cpu"),
        ("10.14.1", None, None, "NVIDIA GPU"),
        ("10.14.1", 75, None, "SM75"),
    ):
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_module(version))
        monkeypatch.setattr(engine_runtime, "local_capability", lambda gpu=gpu: gpu)
        with pytest.raises((ExportError, UnavailableError), match=reason):
            open_runtime("tensorrt", manifest, device)


def test_signals_survive_sessions_of_openvino() -> None:
    """With AMX, two of its cores freed one after the other leave a signal stack that is gone."""
    pytest.importorskip("openvino", reason="optional")
    program = """
import faulthandler, gc, os, signal
from xfm_fast.export.runtimes.openvino import core
faulthandler.enable()
first, second = core(), core()
for each in (first, second):
    each.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
del first, each
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_attention_that_openvino_does_not_read(
    exported_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino", reason="optional")
    folder = Path(shutil.copytree(exported_fp32, tmp_path / "attention"))
    Manifest.load(folder).model_copy(update={"attention": "opset23"}).save(folder)
    monkeypatch.setattr(openvino, "__version__", "2026.3.1-20000-abcdef")
    with pytest.raises(ExportError, match=r"attention as opset23, which OpenVINO 2026\.3"):
        Session.load(folder, "openvino")


def test_gemms_on_a_gpu_are_not_rounded_to_tf32(
    exported_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turn off the default of ONNX Runtime's CUDA provider, which has an error a hundred times that of fp32."""
    manifest, calls = Manifest.load(exported_fp32), []
    runtime = OnnxRuntime(manifest, torch.device("cpu"))
    runtime.device = torch.device("cuda", 1)
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda *_, providers: calls.extend(providers) or MagicMock(),
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=77))
    runtime.load(manifest.graph("text"), exported_fp32 / "text.onnx")
    options = {"device_id": 1, "use_tf32": 0, "user_compute_stream": "77"}
    assert calls == [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


def test_norms_are_not_fused_with_sums_on_a_cpu(exported_fp32: Path, tmp_path: Path) -> None:
    """Keep the fused kernel, which is slower on a CPU, for GPUs."""
    onnx = pytest.importorskip("onnx")
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(
        str(exported_fp32 / "text.onnx"), options, providers=["CPUExecutionProvider"]
    )
    operators = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert "LayerNormalization" in operators
    assert "SkipLayerNormalization" not in operators
    with pytest.raises(RuntimeError):
        session_options("cuda").get_session_config_entry(
            "optimization.disable_specified_optimizers"
        )


def test_bytes_do_not_saturate_on_processors_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
    assert session_options().get_session_config_entry("session.x64quantprecision") == "1"
