"""Rows of tokens: LayerNorm, of text embeddings too, or a conversion, in up to two dtypes; rotary positions; means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import llvmlite.ir as ir
import torch
from torch import Tensor

from . import Level, levels
from .builder import BF16, FP32, INT64, Builder, fp32_bits, kernel

Source = Literal["norm", "embeddings", "conversion"]
_TABLES = ("words", "positions", "types")
_INDICES = tuple(f"{name}_ids" for name in _TABLES)
_POINTERS = ("x", *_INDICES, *_TABLES, "weight", "bias", "out", "narrow", "invalid")
# Of `torch.nn.functional.normalize`.
_SMALLEST_NORM = 1e-12
_STRIDES = ("x_row", "out_row", "narrow_row")
_NUMBERS = (*_STRIDES, "width", "eps", *(f"{name}_count" for name in _TABLES))


class _Rows:
    """Emits the kernel of one row a task.

    Args:
        source: The LayerNorm of a row, that of its embeddings, or the row itself.
        half: Whether rows, tables and `out` are bf16 instead of fp32.
        half_weight: Whether weight and bias are bf16.
        level: Instruction set.
    """

    name = "rows"

    def __init__(self, source: Source, half: bool, half_weight: bool, level: Level) -> None:
        self.source, self.element = source, BF16 if half else FP32
        self.weight = BF16 if half_weight else FP32
        self.b = b = Builder(self.name, _POINTERS, _NUMBERS, level)
        b.task_loop(self._row)

    def _row(self, row: Any, thread: Any) -> None:
        b, args, width = self.b, self.b.args, self.b.args["width"]
        out = b.at(args["out"], row * args["out_row"], self.element)
        narrow = b.at(args["narrow"], row * args["narrow_row"], BF16)
        has_narrow = b.is_not_null(args["narrow"])
        x = b.at(args["x"], row * args["x_row"], self.element)
        if self.source == "embeddings":
            self._embed(row, out)
            x = out

        def read(i: Any) -> Any:
            return b.read_fp32(x, self.element, i)

        def sum_row(accumulate: Callable[[Any, Any], Any]) -> Any:
            (total,) = b.loop(
                0, width, b.lanes, lambda i, total: [accumulate(i, total)], b.splat(0.0)
            )
            return b.reduce_add(total)

        compute = read
        if self.source != "conversion":
            compute = normaliser(b, read, width, sum_row, self.weight)
        writes_out = b.is_not_null(args["out"])

        def write(i: Any) -> None:
            value = compute(i)
            with b.if_then(writes_out):
                b.write_fp32(value, out, self.element, i)
            if b.level.bf16:
                with b.if_then(has_narrow):
                    b.write(b.fp32_to_bf16(value), narrow, i)

        b.loop(0, width, b.lanes, write)

    def _embed(self, row: Any, out: Any) -> None:
        """Write the sum of a token's rows; a token outside its table is reported and takes row 0."""
        b, args, width = self.b, self.b.args, self.b.args["width"]
        zero = ir.Constant(INT64, 0)

        def table_row(name: str) -> Any:
            ids = args[f"{name}_ids"]
            i = b.compute_if(b.is_not_null(ids), lambda: b.load_scalar(ids, row, INT64).value, zero)
            fits = b.icmp_unsigned("<", i, args[f"{name}_count"].value)
            with b.if_then(b.not_(fits)):
                b.store(ir.Constant(INT64, 1), args["invalid"])
            return b.at(args[name], b.index(b.select(fits, i, zero)) * width, self.element)

        words, positions, types = map(table_row, _TABLES)
        has_types = b.is_not_null(args["types"])

        def add(i: Any) -> None:
            total = b.read_fp32(words, self.element, i)
            # In the order of PyTorch's sums.
            total = b.compute_if(
                has_types,
                lambda: b.fadd(total, b.read_fp32(types, self.element, i)),
                total,
            )
            total = b.fadd(total, b.read_fp32(positions, self.element, i))
            b.write_fp32(total, out, self.element, i)

        b.loop(0, width, b.lanes, add)


def normaliser(
    b: Builder,
    read: Callable[[Any], Any],
    width: Any,
    sum_row: Callable[[Callable[[Any, Any], Any]], Any],
    element: Any,
) -> Callable[[Any], Any]:
    """Compute a row's statistics; return the function that normalises the vector at an index.

    Args:
        b: Builder of a kernel with the arguments weight, bias (or null) and eps.
        read: Loads a vector of the row in fp32.
        width: Elements of the row.
        sum_row: Adds up the row by a function of (index, accumulator).
        element: Of weight and bias.
    """
    args, count = b.args, b.uitofp(width.value, FP32)
    mean = b.broadcast(b.fdiv(sum_row(lambda i, total: b.fadd(total, read(i))), count))

    def add_square(i: Any, total: Any) -> Any:
        deviation = b.fsub(read(i), mean)
        return b.multiply_add(deviation, deviation, total)

    eps = b.bitcast(b.int32(args["eps"]), FP32)
    variance = b.fdiv(sum_row(add_square), count)
    deviation = b.intrinsic("llvm.sqrt.f32", FP32, b.fadd(variance, eps))
    rstd = b.broadcast(b.fdiv(ir.Constant(FP32, 1.0), deviation))
    has_bias = b.is_not_null(args["bias"])

    def normalise(i: Any) -> Any:
        scaled = b.fmul(b.fsub(read(i), mean), rstd)
        weight = b.read_fp32(args["weight"], element, i)
        return b.compute_if(
            has_bias,
            lambda: b.multiply_add(scaled, weight, b.read_fp32(args["bias"], element, i)),
            b.fmul(scaled, weight),
        )

    return normalise


def _run(
    source: Source,
    x: Tensor,
    out: Tensor | None,
    narrow: Tensor | None,
    norm: tuple[Tensor, Tensor | None, float] | None,
    embedding: tuple[int, ...] = (0,) * 7,
    counts: tuple[int, ...] = (0,) * 3,
) -> None:
    rows, width = x.shape
    weight, bias, eps = norm or (None, None, 0.0)
    half_weight = weight is not None and weight.dtype == torch.bfloat16
    *indexed, invalid = embedding
    addresses = (0 if t is None else t.data_ptr() for t in (weight, bias, out, narrow))
    run = kernel(_Rows, source, x.dtype == torch.bfloat16, half_weight, levels()[0])
    pointers = (x.data_ptr(), *indexed, *addresses, invalid)
    strides = (0 if t is None else t.stride(0) for t in (x, out, narrow))
    run((*pointers, *strides, width, fp32_bits(eps), *counts), rows, torch.get_num_threads())


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor | None,
    narrow: Tensor | None = None,
) -> None:
    """Write the LayerNorm of x `[n, K]` to `out` in its dtype, and to `narrow` in bf16."""
    _run("norm", x, out, narrow, (weight, bias, eps))


def to_bf16(x: Tensor, narrow: Tensor) -> None:
    """Round fp32 x `[n, K]` to bf16."""
    _run("conversion", x, None, narrow, None)


def embed(
    indices: Sequence[Tensor | None],
    tables: Sequence[Tensor | None],
    norm: tuple[Tensor, Tensor | None, float],
    out: Tensor,
    narrow: Tensor | None,
    invalid: Tensor,
) -> None:
    """Write the LayerNorm of the sum of rows of words, positions and types to `out`, and to `narrow` in bf16.

    `indices` `[n]` are int64, None for row 0; types may have no table. `invalid` `[1]` in int64 becomes 1 for an index
    outside its table.
    """
    addresses = (0 if t is None else t.data_ptr() for t in (*indices, *tables, invalid))
    # Without a table, row 0 is in it.
    counts = (1 if table is None else table.shape[0] for table in tables)
    _run("embeddings", out, out, narrow, norm, tuple(addresses), tuple(counts))


class Positions(NamedTuple):
    """Where tables of rotary positions apply.

    Of `period` tokens of a text the first `prefix` have no position; from text to text a table advances by `step` rows,
    0 if it is shared. `half`: tables are bf16 instead of fp32.
    """

    period: int
    prefix: int
    step: int
    half: bool


class _Rotate:
    """Emits the kernel of one token a task; `half`: its heads are bf16, `half_tables`: the tables are."""

    name = "rotate"

    def __init__(self, half: bool, half_tables: bool, level: Level) -> None:
        self.element, self.table = (BF16 if each else FP32 for each in (half, half_tables))
        numbers = ("x_row", "heads", "size", "period", "prefix", "step")
        self.b = b = Builder(self.name, ("x", "cos", "sin"), numbers, level)
        b.task_loop(self._token)

    def _token(self, token: Any, thread: Any) -> None:
        b, args = self.b, self.b.args
        size, half = args["size"], args["size"] >> 1
        text, place = token // args["period"], token % args["period"]
        row = (text * args["step"] + place - args["prefix"]) * size
        cos, sin = (b.at(args[name], row, self.table) for name in ("cos", "sin"))
        x = b.at(args["x"], token * args["x_row"], self.element)

        def rotate(head: Any) -> None:
            first = b.at(x, head * size, self.element)
            second = b.at(first, half, self.element)

            def vector(i: Any) -> None:
                values = [b.read_fp32(each, self.element, i) for each in (first, second)]
                for out, entry, sign in ((first, i, -1), (second, i + half, 1)):
                    value, other = values[::-sign]
                    turned = b.fmul(b.read_fp32(sin, self.table, entry), other)
                    turned = b.fneg(turned) if sign < 0 else turned
                    result = b.multiply_add(b.read_fp32(cos, self.table, entry), value, turned)
                    b.write_fp32(result, out, self.element, i)

            b.loop(0, half, b.lanes, vector)

        with b.if_then(place >= args["prefix"]):
            b.loop(0, args["heads"], 1, rotate)


def rotate(x: Tensor, heads: int, tables: tuple[Tensor, Tensor], positions: Positions) -> None:
    """Apply rotary positions to the first `heads` heads of D channels of x `[n, K]`, in place.

    Tables of cosines and sines `[..., D]`, contiguous; halves of D are whole vectors.
    """
    cos, sin = tables
    run = kernel(_Rotate, x.dtype == torch.bfloat16, positions.half, levels()[0])
    pointers = (x.data_ptr(), cos.data_ptr(), sin.data_ptr())
    numbers = (x.stride(0), heads, cos.shape[-1], *positions[:3])
    run((*pointers, *numbers), x.shape[0], torch.get_num_threads())


class _Pool:
    """Emits the kernel of one text a task: the mean of its rows, divided by its norm if `normalised`."""

    name = "pool"

    def __init__(self, half: bool, normalised: bool, level: Level) -> None:
        self.element, self.normalised = BF16 if half else FP32, normalised
        self.b = b = Builder(
            self.name, ("x", "offsets", "out"), ("x_row", "width", "period"), level
        )
        b.task_loop(self._text)

    def _text(self, text: Any, thread: Any) -> None:
        b, args, width = self.b, self.b.args, self.b.args["width"]
        packed = b.is_not_null(args["offsets"])
        first, last = (
            b.index(
                b.compute_if(
                    packed,
                    partial(self._offset, index),
                    (index * args["period"]).value,
                )
            )
            for index in (text, text + 1)
        )
        count = b.broadcast(b.uitofp((last - first).value, FP32))
        out = b.at(args["out"], text * width, self.element)

        def mean(i: Any, squares: Any) -> list[Any]:
            def add(row: Any, total: Any) -> list[Any]:
                x = b.at(args["x"], row * args["x_row"], self.element)
                return [b.fadd(total, b.read_fp32(x, self.element, i))]

            (total,) = b.loop(first, last, 1, add, b.splat(0.0))
            value = b.fdiv(total, count)
            b.write_fp32(value, out, self.element, i)
            return [b.multiply_add(value, value, squares)]

        (squares,) = b.loop(0, width, b.lanes, mean, b.splat(0.0))
        if not self.normalised:
            return
        norm = b.intrinsic("llvm.sqrt.f32", FP32, b.reduce_add(squares))
        norm = b.maximum(b.broadcast(norm), b.splat(_SMALLEST_NORM))

        def divide(i: Any) -> None:
            quotient = b.fdiv(b.read_fp32(out, self.element, i), norm)
            b.write_fp32(quotient, out, self.element, i)

        b.loop(0, width, b.lanes, divide)

    def _offset(self, index: Any) -> Any:
        return self.b.load_scalar(self.b.args["offsets"], index, INT64).value


def pool(x: Tensor, offsets: Tensor | None, out: Tensor, *, normalised: bool) -> None:
    """Write the mean of each text's rows of x `[n, K]` to `out` `[texts, K]`, divided by its norm if `normalised`.

    `offsets` `[texts + 1]` int64 are the bounds of texts; without them all have one length.
    """
    texts, width = out.shape
    run = kernel(_Pool, x.dtype == torch.bfloat16, normalised, levels()[0])
    pointers = x.data_ptr(), 0 if offsets is None else offsets.data_ptr(), out.data_ptr()
    run((*pointers, x.stride(0), width, len(x) // texts), texts, torch.get_num_threads())
