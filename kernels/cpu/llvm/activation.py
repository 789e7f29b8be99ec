"""Activations in fp32, and the kernel that applies one to the rows of a hidden layer, with or without a gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import llvmlite.ir as ir
import numpy as np
import torch
from torch import Tensor

from . import Level, levels
from .builder import BF16, FP32, INT32, Builder, coefficients, kernel

Activation = Literal["gelu", "tanh_gelu", "quick_gelu", "silu", "relu"]
_TASKS_PER_THREAD = 3
# Edge beyond which Φ is taken for 0 or 1, and degree of its polynomial. GELU's error is 8 · 10⁻⁷; where its result is
# rounded, to bf16 or from sums of bytes, 2 · 10⁻⁶ is allowed.
_EXACT, _ROUNDED = (5.5, 14), (5.0, 12)
# Factors of x and of x³ in the argument of the sigmoid by which x is multiplied.
_SIGMOIDS: dict[Activation, tuple[float, float]] = {
    "silu": (1.0, 0.0),
    "quick_gelu": (1.702, 0.0),
    "tanh_gelu": (2 * (2 / np.pi) ** 0.5, 2 * 0.044715 * (2 / np.pi) ** 0.5),
}


def gelu(b: Builder, x: Any, *, rounded: bool) -> Any:
    """Return `x Φ(x)`, where `Φ(x) - 1/2` is `x` times a polynomial of `x²`; `rounded` if the result will be."""
    zero = b.splat(0.0)
    edge, degree = _ROUNDED if rounded else _EXACT
    above = b.maximum(x, b.splat(-edge))
    inside = b.minimum(above, b.splat(edge))
    u = b.multiply_add(b.fmul(inside, inside), b.splat(2 / edge**2), b.splat(-1.0))
    quotient = b.polynomial(u, coefficients(_cdf_quotient(edge), degree))
    product = b.fmul(above, b.multiply_add(inside, quotient, b.splat(0.5)))
    # -inf · 0 is NaN, as in PyTorch; other values are unchanged.
    return b.multiply_add(b.minimum(x, zero), zero, product)


@cache
def _cdf_quotient(edge: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return `(Φ(x) - 1/2) / x` as a function of `2 x² / edge² - 1`."""

    def quotient(u: np.ndarray) -> np.ndarray:
        x = np.sqrt(np.maximum((u + 1) / 2, 1e-12)) * edge
        return (torch.special.ndtr(torch.from_numpy(x)).numpy() - 0.5) / x

    return quotient


def _apply(b: Builder, activation: Activation, x: Any, *, rounded: bool) -> Any:
    """Return an activation of an fp32 vector."""
    if activation == "gelu":
        return gelu(b, x, rounded=rounded)
    if activation == "relu":
        return b.maximum(x, b.splat(0.0))
    factor, cubic = (float(value * np.log2(np.e)) for value in _SIGMOIDS[activation])
    slope = b.splat(factor)
    if cubic:
        slope = b.multiply_add(b.fmul(x, x), b.splat(cubic), slope)
    argument = b.fmul(x, slope)
    # Of a negative argument, so that no power is infinite.
    bits = b.or_(b.bitcast(argument, b.vector(INT32)), b.splat(-(2**31), INT32))
    power = b.exp2(b.bitcast(bits, x.type))
    positive = b.fcmp_ordered(">=", argument, b.splat(0.0))
    sigmoid = b.fdiv(
        b.select(positive, b.splat(1.0), power),
        b.fadd(b.splat(1.0), power),
    )
    return b.fmul(x, sigmoid)


class _Activate:
    """Emits the kernel; `half`: rows are bf16 instead of fp32."""

    name = "activate"

    def __init__(self, activation: Activation, half: bool, level: Level) -> None:
        self.activation: Activation = activation
        self.half, self.element = half, BF16 if half else FP32
        pointers, strides = ("x", "gate", "out"), ("x_row", "gate_row", "out_row")
        self.b = b = Builder(self.name, pointers, (*strides, "rows", "width", "chunk"), level)
        b.task_loop(self._task)

    def _task(self, task: Any, thread: Any) -> None:
        b, args = self.b, self.b.args
        first = task * args["chunk"]

        def row(i: Any) -> None:
            x, gate, out = (
                b.at(args[name], i * args[f"{name}_row"], self.element)
                for name in ("x", "gate", "out")
            )
            with b.if_else(b.is_not_null(args["gate"])) as (gated, alone):
                for branch, factor in ((gated, gate), (alone, None)):
                    with branch:
                        b.loop(0, args["width"], b.lanes, partial(self._vector, x, factor, out))

        b.loop(first, b.minimum_int(first + args["chunk"], args["rows"]), 1, row)

    def _vector(self, x: Any, gate: Any, out: Any, i: Any) -> None:
        b = self.b
        value = _apply(b, self.activation, b.read_fp32(x, self.element, i), rounded=self.half)
        if self.half:
            # Rounded before the gate too, as by PyTorch.
            value = b.bf16_to_fp32(b.bitcast(b.fp32_to_bf16(value), b.vector(ir.IntType(16))))
        if gate is not None:
            value = b.fmul(value, b.read_fp32(gate, self.element, i))
        b.write_fp32(value, out, self.element, i)


def activate(activation: Activation, x: Tensor, gate: Tensor | None, out: Tensor) -> None:
    """Write `activation(x) · gate` to `out`, all `[n, K]` of one dtype; K a multiple of the lanes."""
    (rows, width), threads = x.shape, torch.get_num_threads()
    chunk = max(1, -(-rows // (_TASKS_PER_THREAD * threads)))
    operands = (x, gate, out)
    pointers = (0 if t is None else t.data_ptr() for t in operands)
    strides = (0 if t is None else t.stride(0) for t in operands)
    run = kernel(_Activate, activation, x.dtype == torch.bfloat16, levels()[0])
    run((*pointers, *strides, rows, width, chunk), -(-rows // chunk), threads)
