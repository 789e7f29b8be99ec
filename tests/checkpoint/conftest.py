"""The tiny official model."""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.conftest import config, load_tensors
from xfm_fast.checkpoint import to_ours
from xfm_fast.config import XFMConfig


@pytest.fixture(scope="module")
def tiny() -> tuple[XFMConfig, dict[str, Tensor]]:
    cfg = config("tiny_b")
    return cfg, to_ours(load_tensors("tiny_b/weights"), cfg)[0]
