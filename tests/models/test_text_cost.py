"""What one caption costs beside arithmetic on a CPU: kernels, operations of PyTorch and calls of Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import xfm_fast
from xfm_fast import XFM, XFMConfig
from xfm_fast.kernels.cpu import int8, llvm, selection
from xfm_fast.kernels.cpu.llvm import builder

_CODE = str(Path(xfm_fast.__file__).parent)
# In fewer, what there was to be saved was saved: lower a number here and in docs/kernels.md.
COSTS = (1, 51, 48)
"""Calls of compiled code, operations (views among them) and functions of ours in a call, whatever its layers."""


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _functions(run: Callable[[], object]) -> int:
    """The functions of ours that are called; a comprehension is part of its function in some versions of Python."""
    count = 0

    def seen(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        code = frame.f_code
        count += (
            event == "call"
            and code.co_filename.startswith(_CODE)
            and not code.co_name.startswith("<")
        )

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_calls_of_a_caption(kind: str, int8_chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    missing = llvm.why_not(torch.int8 if kind == "int8" else dtype) or (
        int8.why_not() if kind == "int8" else None
    )
    if missing is not None:
        pytest.skip(f"no compiled kernels of {kind} here: {missing}")
    monkeypatch.setattr(selection, "_selections", {})
    monkeypatch.setattr(
        selection, "_compare",
        lambda operation, race, dtype: selection.Selection(
            operation, dtype, "llvm" if "llvm" in race.candidates else next(iter(race.candidates)), {}, {}, "settled"
        ),
    )  # fmt: skip
    launches, launch = list[int](), builder.Kernel.__call__
    monkeypatch.setattr(
        builder.Kernel,
        "__call__",
        lambda kernel, *given: launches.append(1) or launch(kernel, *given),
    )

    def costs(layers: int) -> tuple[int, int, int]:
        sizes = {
            "text_width": 128,
            "text_heads": 2,
            "text_intermediate": 256,
            "text_layers": layers,
        }
        model = XFM(XFMConfig.preset("tiny").model_copy(update=sizes)).eval().to(dtype)
        ready = model.quantise() if kind == "int8" else model.freeze()
        ids = torch.randint(5, ready.config.vocab_size, (1, 13))
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            for _ in range(2):
                ready.encode_text(ids, mask)
            launches.clear()
            with _Operations() as operations:
                ready.encode_text(ids, mask)
            kernels = len(launches)
            return kernels, operations.count, _functions(lambda: ready.encode_text(ids, mask))

    few, more = costs(2), costs(4)
    assert few == more
    assert all(cost <= limit for cost, limit in zip(more, COSTS, strict=True))
