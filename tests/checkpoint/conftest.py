"""The tiny official model, state dicts and files that tests of checkpoints share, and when two are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import config, load_tensors
from xfm_fast.checkpoint import to_ours
from xfm_fast.config import XFMConfig


@pytest.fixture(scope="module")
def tiny() -> tuple[XFMConfig, dict[str, Tensor]]:
    cfg = config("tiny_b")
    return cfg, to_ours(load_tensors("tiny_b/weights"), cfg)[0]


WORDS = "text_encoder.roberta.embeddings.word_embeddings.weight"
STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(2.5), "ids": torch.arange(4)}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert value.shape == right[name].shape, name
        assert value.is_meta or torch.equal(value, right[name]), name


def meta(keys: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Tensors with the listed shapes and dtypes and no memory; tied names are one object."""
    tensors: dict[str, Tensor] = {}
    for name, entry in keys.items():
        twin = next((tensors[tied] for tied in entry.get("tied_with", []) if tied in tensors), None)
        tensors[name] = (
            twin
            if twin is not None
            else torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        )
    return tensors


def assert_same_shapes(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    describe = {name: (tuple(value.shape), value.dtype) for name, value in left.items()}
    assert describe == {name: (tuple(value.shape), value.dtype) for name, value in right.items()}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
