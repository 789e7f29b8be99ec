"""Models to export, and exports of them that tests of this folder share: made once in a test process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xfm_fast.config import XFMConfig
from xfm_fast.models.xfm import XFM

# Two layers of everything, so that what is special about the last one shows.
_SIZES = {"vision_depth": 2, "text_layers": 2, "fusion_layers": 2}


def build_model(**changes: Any) -> XFM:
    """A small model in which nothing is zero or one, so that every term takes part in comparisons."""
    model = XFM(XFMConfig.preset("tiny", **{**_SIZES, **changes}), heads=("contrastive", "matching", "boxes"))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., XFM]:
    """`build_model`, which takes changes of the configuration."""
    return build_model


@pytest.fixture(scope="session")
def small_model() -> XFM:
    """The model behind the shared exports; not to be changed."""
    return build_model()


def _exported(model: XFM, folder: Path, dtype: str) -> Path:
    pytest.importorskip("onnx", reason="exports to ONNX need onnx")
    pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
    from xfm_fast.export.graphs import GRAPHS
    from xfm_fast.export.onnx import export_onnx
    from xfm_fast.export.verification import verify_export

    export_onnx(model, folder, dtype=dtype, graphs=GRAPHS, source="a small model")
    verify_export(folder, model)
    return folder


@pytest.fixture(scope="session")
def exported_fp32(small_model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five graphs in fp32 for ONNX Runtime, with manifest and reference; copy it before changing it."""
    return _exported(small_model, tmp_path_factory.mktemp("exported") / "fp32", "fp32")


@pytest.fixture(scope="session")
def exported_fp16(small_model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in fp16."""
    return _exported(small_model, tmp_path_factory.mktemp("exported") / "fp16", "fp16")
