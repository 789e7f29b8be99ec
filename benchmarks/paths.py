"""Which implementation each operation takes on this CPU, found by running it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xfm_fast.benchmarks import machine
from xfm_fast.kernels import ops
from xfm_fast.kernels.cpu import attention, products
from xfm_fast.kernels.cpu.selection import Selection, selections

_WIDTH, _HEADS, _WINDOW = 128, 2, (4, 4)
# What the selections of these names time.
_ATTENTION: dict[str, Callable[[torch.dtype], tuple[Any, ...]]] = {
    "attention": attention._plain_example,
    "short attention": attention._short_example,
    "biased attention": attention._biased_example,
}
_LINEAR: dict[str, Callable[[torch.dtype], tuple[Any, ...]]] = {
    **products.EXAMPLES,
    "trained linear": products._trained_example,
    "input gradient": products._input_example,
}


def choose_paths() -> list[dict[str, Any]]:
    """Run every operation that has alternatives in every dtype that this processor is good at.

    Returns:
        Operation, dtype, the chosen implementation, FLOP/s of each that passed, and why others were left out.
    """
    dtypes = [torch.float32, *([torch.bfloat16] if machine.has_native_bf16() else [])]
    with torch.no_grad():
        for dtype in dtypes:
            _exercise(dtype)
    return [_described(selection) for selection in selections()]


def _exercise(dtype: torch.dtype) -> None:
    x, weight = torch.ones(16, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    bias = torch.ones(_WIDTH, dtype=dtype)
    ops.linear(x, weight, bias)
    ops.linear_gelu(x, weight, bias)
    ops.linear_residual(x, weight, bias, x)
    height, width = _WINDOW
    tokens = torch.ones(1, height * width + 1, _HEADS, 64, dtype=dtype)
    table = torch.zeros((2 * height - 1) * (2 * width - 1) + 3, _HEADS, dtype=dtype)
    ops.relpos_attention(tokens, tokens, tokens, table, _WINDOW)
    # Long enough to be a product of its own.
    queries, keys = torch.ones(100, _HEADS, 64, dtype=dtype), torch.ones(577, _HEADS, 64, dtype=dtype)
    ops.varlen_attention(queries, keys, keys, torch.tensor([0, 100]), torch.tensor([0, 577]), 100, 577)


def _example_flops(operation: str) -> int:
    """Operations of what the selection times."""
    if "attention" in operation:
        q, k, *_ = _ATTENTION[operation](torch.float32)
        return 4 * q.numel() * k.shape[1]
    if operation == "weight gradient":
        dout, x = products._weight_example(torch.float32)
        return 2 * dout.numel() * x.shape[1]
    x, weight, *_ = _LINEAR.get(operation, products.EXAMPLES["linear"])(torch.float32)
    return 2 * x.shape[0] * weight.numel()


def _described(selection: Selection) -> dict[str, Any]:
    flops = _example_flops(selection.operation)
    rates = {name: flops / s for name, s in selection.seconds.items() if 0 < s < float("inf")}
    return {
        "operation": selection.operation,
        "dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(selection.dtype, str(selection.dtype)),
        "chosen": selection.chosen,
        "flops_per_s": rates,
        "rejected": selection.rejected,
    }
