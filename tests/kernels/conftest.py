"""Every library in its turn, whichever this machine runs faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xfm_fast.kernels.cpu import selection

LIBRARIES = ("aten", "onednn", "onednn-packed", "onednn+gelu", "tiled", "transposed")
_compare = selection._compare
_compared: dict[tuple[str, torch.dtype], selection.Selection] = {}


def compared(
    operation: str,
    candidates: dict[str, Callable[..., Tensor]],
    example: Callable[[torch.dtype], tuple[Any, ...]],
    dtype: torch.dtype,
) -> selection.Selection:
    """What the processor said once about these candidates; one that runs but errs is a failure, not a rejection."""
    key = (operation, dtype)
    if key not in _compared:
        _compared[key] = _compare(operation, candidates, example, dtype)
    rejected = _compared[key].rejected
    assert not any("relative error" in reason for reason in rejected.values()), f"{operation}: {rejected}"
    return _compared[key]


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Wherever one of several implementations is chosen, this one is, if it is among them and the processor has it."""

    def forced(operation: str, candidates: Any, example: Any, dtype: torch.dtype) -> selection.Selection:
        found = compared(operation, candidates, example, dtype)
        usable = [name for name in candidates if name not in found.rejected]
        chosen = request.param if request.param in usable else usable[0]
        return selection.Selection(operation, dtype, chosen, found.seconds, found.rejected)

    monkeypatch.setattr(selection, "_compare", forced)
    monkeypatch.setattr(selection, "_selections", {})
    return request.param


def each_library(*names: str) -> pytest.MarkDecorator:
    """A test that runs with each of these libraries."""
    return pytest.mark.parametrize("library", names or LIBRARIES, indirect=True)
