"""Quantisation of rows, or of their LayerNorm: rotated, to uint8, with a step per row, as in `reference.as_int8`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import llvmlite.ir as ir
import numpy as np
import torch
from torch import Tensor

from ...reference import int8_strides
from ..workspace import scratch
from . import NO_FRACTIONS, ZERO_BYTE, Level, levels
from .builder import (
    BF16,
    BYTE,
    FP32,
    INT16,
    INT32,
    Builder,
    Values,
    fp32_bits,
    kernel,
    scratch_address,
    whole_pages,
)
from .rows import normaliser

_TASKS_PER_THREAD = 3

Norm = tuple[Tensor, Tensor, float]
"""Weight and bias of a LayerNorm, in the dtype of its input, and its eps."""


class Quantisation(NamedTuple):
    """Quantisation of rows: `half`: rows and steps are bf16; `strides` of their rotation."""

    half: bool
    strides: tuple[int, ...]


def quantise_row(
    b: Builder,
    mode: Quantisation,
    x: Any,
    inputs: Any,
    out: Any,
    *,
    half_step: bool | None = None,
) -> Any:
    """Emit the quantisation of a row of `inputs` channels to uint8, and return its step in fp32."""
    half_step = mode.half if half_step is None else half_step
    element = BF16 if mode.half else FP32
    # Magnitudes compare like their bits, and NaN is the largest: then the step is NaN too.
    magnitude = b.splat(0x7FFFFFFF, INT32)

    def maximum(x: Any, y: Any) -> Any:
        return b.select(b.icmp_signed("<", x, y), y, x)

    count = 2 ** len(mode.strides)

    def rotated(i: Any) -> Values:
        values = [b.read_fp32(x, element, i + n * b.lanes) for n in range(count)]
        for stride in mode.strides:
            step = stride // b.lanes
            for n in (n for n in range(count) if not n & step):
                first, second = values[n], values[n + step]
                values[n], values[n + step] = b.fadd(first, second), b.fsub(first, second)
        return values

    def accumulate(i: Any, *largest: Any) -> Values:
        results = [*largest]
        for n, value in enumerate(rotated(i)):
            bits = b.and_(b.bitcast(value, b.vector(INT32)), magnitude)
            results[n % 4] = maximum(results[n % 4], bits)
        return results

    starts = [b.splat(0, INT32)] * 4
    first, second, third, fourth = b.loop(0, inputs, count * b.lanes, accumulate, *starts)
    largest = maximum(maximum(first, second), maximum(third, fourth))
    largest = b.intrinsic(f"llvm.vector.reduce.smax.v{b.lanes}i32", INT32, largest)
    step = _step(b, half_step, b.bitcast(b.broadcast(largest), b.vector(FP32)))
    inverse = b.fdiv(b.splat(1.0), step)
    shift = b.splat(NO_FRACTIONS + ZERO_BYTE)

    def quantise(i: Any) -> None:
        for n, value in enumerate(rotated(i)):
            level = b.bitcast(b.multiply_add(value, inverse, shift), b.vector(INT32))
            b.write(b.trunc(level, b.vector(BYTE)), out, i + n * b.lanes)

    b.loop(0, inputs, count * b.lanes, quantise)
    return b.extract_element(step, ir.Constant(INT32, 0))


def _sum_row(b: Builder, inputs: Any, accumulate: Callable[[Any, Any], Any]) -> Any:
    """Sum a row by four independent accumulators; `inputs` is a multiple of four vectors."""

    def fold(i: Any, *accumulators: Any) -> Values:
        return [accumulate(i + n * b.lanes, value) for n, value in enumerate(accumulators)]

    starts = [b.splat(0.0)] * 4
    first, second, third, fourth = b.loop(0, inputs, 4 * b.lanes, fold, *starts)
    return b.reduce_add(b.fadd(b.fadd(first, second), b.fadd(third, fourth)))


def _step(b: Builder, half: bool, largest: Any) -> Any:
    """Return the step of a row with this largest magnitude."""
    step = b.fdiv(b.maximum(largest, b.splat(float(np.float32(1e-30)))), b.splat(127.0))
    if not half:
        return step
    # Rounded down, it would leave the largest value without a level.
    enlarged = b.fmul(step, b.splat(1 + torch.finfo(torch.bfloat16).eps / 2))
    return b.bf16_to_fp32(b.bitcast(b.fp32_to_bf16(enlarged), b.vector(INT16)))


class _QuantiseRows:
    """Emits the kernel that quantises rows, or their LayerNorm if `normed`."""

    name = "bytes"

    def __init__(self, mode: Quantisation, normed: bool, level: Level) -> None:
        self.mode, self.normed, self.element = mode, normed, BF16 if mode.half else FP32
        pointers = ("x", "out", "steps", "weight", "bias", "scratch")
        numbers = ("x_row", "rows", "inputs", "chunk", "eps", "scratch_bytes")
        self.b = Builder(self.name, pointers, numbers, level)
        self.b.task_loop(self._chunk)

    def _chunk(self, task: Any, thread: Any) -> None:
        b, args = self.b, self.b.args
        first = task * args["chunk"]

        def row(i: Any) -> None:
            mode, x = self.mode, b.at(args["x"], i * args["x_row"], self.element)
            out = b.at(args["out"], i * args["inputs"], BYTE)
            if self.normed:
                normed = b.at(args["scratch"], thread * args["scratch_bytes"], BYTE)
                self._layer_norm(x, normed)
                mode, x = mode._replace(half=False), normed
            step = quantise_row(b, mode, x, args["inputs"], out, half_step=self.mode.half)
            b.store(step, b.at(args["steps"], i, FP32))

        b.loop(first, b.minimum_int(first + args["chunk"], args["rows"]), 1, row)

    def _layer_norm(self, x: Any, out: Any) -> None:
        """Normalise a row to fp32."""
        b, args = self.b, self.b.args
        normalise = normaliser(
            b,
            lambda i: b.read_fp32(x, self.element, i),
            args["inputs"],
            partial(_sum_row, b, args["inputs"]),
            self.element,
        )
        b.loop(0, args["inputs"], b.lanes, lambda i: b.write(normalise(i), out, i))


def int8_rows(x: Tensor, *, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
    """Quantise rows `[n, K]` in fp32 or bf16, after `norm`: uint8 in scratch memory, and the step of each row."""
    (rows, inputs), threads, level = x.shape, torch.get_num_threads(), levels()[0]
    out = scratch("compiled bytes", (rows, inputs), torch.uint8)
    steps = scratch("compiled steps", (rows,), torch.float32)
    chunk = max(1, -(-rows // (_TASKS_PER_THREAD * threads)))
    weight = bias = None
    norm_addresses, eps_bits, scratch_bytes = (0, 0, 0), 0, 0
    if norm is not None:
        weight, bias, eps = norm[0].contiguous(), norm[1].contiguous(), norm[2]
        eps_bits = fp32_bits(eps)
        scratch_bytes = whole_pages(4 * inputs)
        buffer = scratch_address("compiled norm", scratch_bytes * threads)
        norm_addresses = weight.data_ptr(), bias.data_ptr(), buffer
    pointers = (x.data_ptr(), out.data_ptr(), steps.data_ptr(), *norm_addresses)
    numbers = (x.stride(0), rows, inputs, chunk, eps_bits, scratch_bytes)
    mode = Quantisation(x.dtype == torch.bfloat16, int8_strides(inputs))
    run = kernel(_QuantiseRows, mode, norm is not None, level)
    run((*pointers, *numbers), -(-rows // chunk), threads)
    return out, steps
