"""A runtime from outside the package is one class: the command exports for it, and it is verified, opened, measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cli.runner import invoke
from xfm_fast import XFM, XFMConfig
from xfm_fast.benchmarks.backends.ours import export_engine
from xfm_fast.benchmarks.backends.registry import export_backends
from xfm_fast.errors import UnavailableError
from xfm_fast.export import Session, runtimes
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.runtimes import RUNTIMES, Runtime, choose_runtime, open_runtime, register

reference = pytest.importorskip("onnx.reference", reason="the toy runtime is onnx's own evaluator")
pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")


class Toy(Runtime):
    """The evaluator of the package `onnx`."""

    name = "toy"
    title = "the evaluator of onnx"
    package = "onnx"

    def load(self, record: Any, path: Path) -> Any:
        names = [tensor.name for tensor in record.outputs]
        graph = reference.ReferenceEvaluator(str(path))

        def run(inputs: Mapping[str, Tensor], *sizes: Any) -> dict[str, Tensor]:
            results = graph.run(names, {name: value.numpy() for name, value in inputs.items()})
            return {
                name: torch.from_numpy(value) for name, value in zip(names, results, strict=True)
            }

        return run


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(Toy)
    yield
    del RUNTIMES["toy"]


def test_a_runtime_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = XFM(XFMConfig.preset("tiny", vision_depth=1, text_layers=1, fusion_layers=1)).eval()
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "exported"
    options = ["--graphs", "vision", "--out", str(out)]
    done = invoke(["export", str(tmp_path / "model"), "--to", "toy", *options])
    assert done.exit_code == 0, done.output
    manifest = Manifest.load(out)
    assert (manifest.kind, manifest.status, manifest.consumer) == ("onnx", "verified", "toy")
    done = invoke(["export", "verify", str(out), "--runtime", "toy"])
    assert done.exit_code == 0, done.output
    manifest = Manifest.load(out)
    assert manifest.verification is not None
    assert manifest.verification.runtime.startswith("toy ")
    session = Session.load(out)
    assert session.description == manifest.verification.runtime, (
        "auto takes the runtime that an export is made for"
    )
    # An export for another library is opened by ONNX Runtime, whatever was registered first.
    monkeypatch.setattr(runtimes, "RUNTIMES", {"toy": Toy, **RUNTIMES})
    pytest.importorskip("onnxruntime")
    foreign = manifest.model_copy(update={"consumer": "tensorrt"})
    assert choose_runtime(foreign, out) == "onnxruntime"
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        expected = model.encode_image(pixels)
    torch.testing.assert_close(session.encode_image(pixels), expected, rtol=0, atol=1e-5)
    # What a benchmark measures beside xfm-fast.
    (backend, *_) = export_backends(Toy)
    assert (backend.name, backend.why_absent(torch.device("cpu"))) == ("toy", None)
    engine = export_engine(model, "toy", "fp32", "embed-image", tmp_path, torch.device("cpu"))
    torch.testing.assert_close(engine.embed_images(pixels), expected, rtol=0, atol=1e-5)
    with pytest.raises(UnavailableError, match="cuda"):
        open_runtime("toy", manifest, "cuda")


def test_the_command_reads_the_registry() -> None:
    text = invoke(["export", "--help"]).output
    assert "toy: the evaluator of onnx, ONNX graphs" in " ".join(text.replace("│", " ").split())
    done = invoke(["export", "--to", "toys", "--random", "tiny", "--out", "unused"])
    assert done.exit_code == 2
    assert all(name in done.stderr for name in ("toys", *RUNTIMES))
    done = invoke(["export", "--to", "toy", "--for", "openvino", "--random", "tiny", "--out", "x"])
    assert done.exit_code == 2
    assert "--for does not apply to --to toy" in done.stderr
