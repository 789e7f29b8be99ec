"""Gradients of weights: products whose terms are the rows that two matrices share, summed in fp32.

A task is a block of the result. It goes through the terms a piece at a time: what the piece has of the block's rows is
laid out once and stays in the second level of cache, what it has of two vectors of columns is laid out in the first,
and every tile of sums stays in registers. The order of summation follows from the sizes alone, not from the threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.ir as ir
import torch
from torch import Tensor

from . import TOGETHER, Level, levels, why_not
from .builder import BF16, BYTE, FP32, INT16, INT32, Builder, Kernel, scratch_address, whole_pages

# 32-bit units of a piece: with them two vectors of columns fill most of the first level of cache.
_TERMS = 256
# Rows of a block, whose piece shares the second level of cache with the columns on their way.
_HEIGHT = 384
_TASKS_PER_THREAD = 1
_AHEAD = 8
_POINTERS = ("dout", "x", "out", "scratch")
_NUMBERS = ("dout_row", "x_row", "rows", "outputs", "inputs", "terms", "height", "width", "across", "room")


class _WeightGradient:
    """Writes the kernel.

    Args:
        half: bf16 instead of fp32.
        level: of the processor.
    """

    def __init__(self, half: bool, level: Level) -> None:
        self.half, self.level, self.columns = half, level, 2 * level.lanes
        # Rows are read as they are in fp32 and in pairs in bf16, so that units have 32 bits.
        self.unit, self.element = (INT32, BF16) if half else (FP32, FP32)
        self.b = b = Builder("weight_gradient", _POINTERS, _NUMBERS, level)
        self.given = b.given
        b.tasks(self._block)

    def _block(self, task: Any, thread: Any) -> None:
        b, given = self.b, self.given
        row = b.mul(b.sdiv(task, given["across"]), given["height"])
        column = b.mul(b.srem(task, given["across"]), given["width"])
        end = b.least(b.add(row, given["height"]), given["outputs"])
        stop = b.least(b.add(column, given["width"]), given["inputs"])
        units = b.ashr(b.add(given["rows"], b.number(1)), b.number(1)) if self.half else given["rows"]
        terms, size = given["terms"], self._tile_units()
        self.sums = b.at(given["scratch"], b.mul(thread, given["room"]), BYTE)
        self.panel = b.at(self.sums, self.level.rows * self.columns, FP32)
        self.tiles = b.at(self.panel, b.mul(terms, b.number(self.columns)), FP32)
        self.wide = b.at(self.tiles, b.mul(b.sdiv(given["height"], b.number(self.level.rows)), size), FP32)

        def tile(i: Any) -> Any:
            return b.at(self.tiles, b.mul(b.sdiv(b.sub(i, row), b.number(self.level.rows)), size), FP32)

        def piece(first: Any) -> None:
            count = b.least(b.sub(units, first), terms)

            def lay_out_rows(u: Any) -> None:
                # Every vector is longer than a tile is high: what is too much is overwritten by the next unit.
                def some(i: Any) -> None:
                    place = b.at(tile(i), b.mul(u, b.number(self.level.rows)), FP32)
                    b.write(self._units("dout", b.add(first, u), i, given["outputs"]), place)

                b.loop(row, end, self.level.rows, some)

            b.loop(0, count, 1, lay_out_rows)

            def columns(at: Any) -> None:
                def lay_out(u: Any) -> None:
                    for n in (0, self.level.lanes):
                        place = b.at(self.panel, b.add(b.mul(u, b.number(self.columns)), b.number(n)), FP32)
                        b.write(self._units("x", b.add(first, u), b.add(at, b.number(n)), given["inputs"]), place)

                b.loop(0, count, 1, lay_out)

                def some_rows(i: Any) -> None:
                    rows = [b.at(tile(i), n, self.unit) for n in range(self.level.rows)]
                    add, zero = (b.dot_add if self.half else b.multiply_add), b.filled(0.0)
                    sums = b.tile(rows, 2, self.panel, self.columns, count, self.unit, add, zero, self.level.rows)
                    for n, value in enumerate(sums):
                        b.write(value, b.at(self.sums, n * self.level.lanes, FP32))
                    where = b.sub(i, row), b.sub(at, column)
                    later, last = b.icmp_signed(">", first, b.number(0)), b.icmp_signed(">=", b.add(first, terms), units)
                    self._finish(i, end, at, where, later, last)

                b.loop(row, end, self.level.rows, some_rows)

            b.loop(column, stop, self.columns, columns)

        b.loop(0, units, terms, piece)

    def _tile_units(self) -> Any:
        """Units of a piece of a tile's rows, and some more: so tiles begin in different sets of the cache."""
        b = self.b
        return b.add(b.mul(self.given["terms"], b.number(self.level.rows)), b.number(self.level.lanes))

    def _units(self, name: str, unit: Any, column: Any, columns: Any) -> Any:
        """A vector of them; zeros behind the last column and the last row."""
        b, stride = self.b, self.given[f"{name}_row"]

        def some(row: Any, limit: Any, element: Any) -> Any:
            place = b.at(self.given[name], b.add(b.mul(row, stride), column), element)
            ahead = b.mul(stride, b.number(_AHEAD * (2 if self.half else 1))) if name == "dout" else b.number(self.columns)
            if _AHEAD or name == "x":
                b.fetch(b.at(place, ahead, element))
            return b.read_some(place, self._there(b.sub(limit, column)), element)

        if not self.half:
            return some(unit, columns, FP32)
        first = b.shl(unit, b.number(1))
        second = b.add(first, b.number(1))
        limit = b.select(b.icmp_signed("<", second, self.given["rows"]), columns, b.number(0))
        return b.alternated(some(first, columns, INT16), some(second, limit, INT16))

    def _there(self, count: Any) -> Any:
        """Which elements of a vector are among so many."""
        b, lanes = self.b, self.level.lanes
        places = ir.Constant(b.vector(INT32), list(range(lanes)))
        return b.icmp_signed("<", places, b.spread(b.trunc(b.least(count, lanes), INT32)))

    def _finish(self, row: Any, end: Any, column: Any, where: tuple[Any, Any], later: Any, last: Any) -> None:
        """The sums of a tile to their place, added to those of the pieces before."""
        b, given, lanes = self.b, self.given, self.level.lanes
        inputs = given["inputs"]

        def some(i: Any) -> None:
            sums = b.at(self.sums, b.mul(i, b.number(self.columns)), FP32)
            out = b.at(given["out"], b.add(b.mul(b.add(row, i), inputs), column), self.element)
            wide = b.at(self.wide, b.add(b.mul(b.add(where[0], i), given["width"]), where[1]), FP32)

            def vector(n: Any) -> None:
                count = b.sub(inputs, b.add(column, n))
                there = self._there(count)
                found, into = b.read(b.at(sums, n, FP32), FP32), b.at(out, n, self.element)
                if self.half:
                    before = b.at(wide, n, FP32)
                    found = b.where(later, lambda: b.fadd(found, b.read(before, FP32)), found)
                    with b.if_else(last) as (whole, partly):
                        with whole:
                            self._put(b.bitcast(b.narrowed(found), b.vector(INT16)), into, there, count)
                        with partly:
                            b.write(found, before)
                else:
                    found = b.where(later, lambda: b.fadd(found, b.read_some(into, there)), found)
                    self._put(found, into, there, count)

            b.loop(0, b.least(b.sub(inputs, column), self.columns), lanes, vector)

        b.loop(0, b.least(b.sub(end, row), self.level.rows), 1, some)

    def _put(self, value: Any, place: Any, there: Any, count: Any) -> None:
        # Where all are there, because AVX2 takes long to write some.
        b = self.b
        with b.if_else(b.icmp_signed(">=", count, b.number(self.level.lanes))) as (whole, partly):
            with whole:
                b.write(value, place)
            with partly:
                b.write_some(value, place, there)


@cache
def _kernel(half: bool, level: Level, terms: int = 0) -> Kernel:
    return Kernel("weight_gradient", level, (half, terms), __file__, lambda: _WeightGradient(half, level).b)


def takes(dout: Tensor, x: Tensor) -> bool:
    """Whether there is a kernel for `[n, M]` and `[n, K]`."""
    both = (dout, x)
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and why_not(x.dtype) is None
        and all(t.dtype == x.dtype and t.layout == torch.strided and t.stride(-1) == 1 for t in both)
    )


def weight_gradient(dout: Tensor, x: Tensor, *, level: Level | None = None) -> Tensor:
    """`dout^T x`: `[n, M]`, `[n, K]` → `[M, K]`, of their type.

    Args:
        level: whose kernel runs; the best of this processor by default.
    """
    level, threads, half = level or levels()[0], torch.get_num_threads(), x.dtype == torch.bfloat16
    (rows, outputs), inputs = dout.shape, x.shape[1]
    out = torch.empty(outputs, inputs, dtype=x.dtype)
    if not rows or not out.numel():
        return out.zero_()
    columns = 2 * level.lanes
    high = -(-outputs // _HEIGHT)
    across = min(-(-_TASKS_PER_THREAD * threads // high), -(-inputs // columns))
    height = -(-outputs // (high * level.rows)) * level.rows
    width = -(-inputs // (across * columns)) * columns
    high, across = -(-outputs // height), -(-inputs // width)
    units = -(-rows // TOGETHER[x.dtype])
    terms = -(-units // -(-units // _TERMS))
    tiles = (height // level.rows) * (terms * level.rows + level.lanes)
    floats = (level.rows + terms) * columns + tiles + half * height * width
    room = whole_pages(4 * floats)
    place = scratch_address("compiled weight gradient", room * threads)
    strides = (dout.stride(0), x.stride(0))
    numbers = (*strides, rows, outputs, inputs, terms, height, width, across, room)
    _kernel(half, level, _AHEAD)((dout.data_ptr(), x.data_ptr(), out.data_ptr(), place, *numbers), high * across, threads)
    return out
