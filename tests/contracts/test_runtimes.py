"""A runtime from outside the package is one class: exported for, verified, opened as a session, and measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xfm_fast import XFM, XFMConfig
from xfm_fast.benchmarks.backends.ours import export_engine
from xfm_fast.benchmarks.backends.registry import export_backends
from xfm_fast.errors import UnavailableError
from xfm_fast.export import Session, export_onnx, generated_examples, verify
from xfm_fast.export.runtimes import RUNTIMES, Runtime, open_runtime, register

reference = pytest.importorskip("onnx.reference", reason="the toy runtime is onnx's own evaluator")
pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")


class Toy(Runtime):
    """The evaluator of the package `onnx`."""

    name = "toy"
    title = "the evaluator of onnx"
    package = "onnx"

    def load(self, record: Any, path: Path) -> Any:
        return ToyGraph(record, path)


class ToyGraph:
    def __init__(self, record: Any, path: Path) -> None:
        self.names = [tensor.name for tensor in record.outputs]
        self.graph = reference.ReferenceEvaluator(str(path))

    def run(self, inputs: Mapping[str, Tensor], *sizes: Any) -> dict[str, Tensor]:
        results = self.graph.run(
            self.names, {name: value.numpy() for name, value in inputs.items()}
        )
        return {
            name: torch.from_numpy(value) for name, value in zip(self.names, results, strict=True)
        }


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    registry: Any = RUNTIMES
    register(Toy)
    yield
    del registry["toy"]


def test_a_runtime_from_outside(tmp_path: Path) -> None:
    model = XFM(XFMConfig.preset("tiny", vision_depth=1, text_layers=1, fusion_layers=1)).eval()
    export_onnx(
        model, tmp_path, consumer="toy", graphs=("vision",),
        examples=generated_examples(model.config, images=2, texts=3, longest=8), compared=False,
    )  # fmt: skip
    manifest = verify(tmp_path, "toy")
    assert (manifest.status, manifest.consumer) == ("verified", "toy")
    assert manifest.verification is not None
    assert manifest.verification.runtime.startswith("toy ")
    session = Session.load(tmp_path)
    assert session.description == manifest.verification.runtime, (
        "auto takes the runtime that an export is made for"
    )
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        expected = model.encode_image(pixels)
    torch.testing.assert_close(session.encode_image(pixels), expected, rtol=0, atol=1e-5)
    # What a benchmark measures beside xfm-fast.
    (backend, *_) = export_backends(Toy)
    assert (backend.name, backend.why_absent(torch.device("cpu"))) == ("toy", None)
    engine = export_engine(model, "toy", "fp32", "embed-image", tmp_path, torch.device("cpu"))
    measured = engine.embed_images(pixels)
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-5)
    with pytest.raises(UnavailableError, match="cuda"):
        open_runtime("toy", manifest, "cuda")
