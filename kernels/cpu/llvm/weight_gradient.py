"""Gradients of weights: GEMMs that sum over the rows of two matrices, in fp32, with the bias gradients on the way.

A task is a block of the result. It goes through the summed rows a piece at a time: the block's part of a piece is
packed once and stays in the second level of cache, its part of two vectors of columns is packed in the first, and every
tile of sums stays in registers. The order of summation depends on the sizes only, so threads change no bit.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import torch
from torch import Tensor

from . import TOGETHER, Level, levels
from .builder import (
    BF16,
    BYTE,
    FP32,
    INT16,
    INT32,
    Builder,
    Values,
    kernel,
    scratch_address,
    whole_pages,
)

# 32-bit units of the longest piece: with them two vectors of columns fill two thirds of the first level of cache.
_TERMS = 256
# Rows of the highest block, of which a piece leaves room in the second level of cache for what is on its way.
_HEIGHT = 384
# Prefetch distance in units: rows of a block are too far from each other for the hardware prefetcher.
_AHEAD = 16
_POINTERS = ("dout", "x", "out", "sums", "scratch")
_NUMBERS = (
    "dout_row",
    "x_row",
    "rows",
    "outputs",
    "inputs",
    "units",
    "terms",
    "height",
    "width",
    "across",
    "room",
)


class _WeightGradient:
    """Writes the kernel; `half`: bf16 factors, `wide`: an fp32 result for any factors."""

    name = "weight_gradient"

    def __init__(self, half: bool, wide: bool, level: Level) -> None:
        # Rows are taken one by one in fp32 and in pairs in bf16, so that units of a column have 32 bits.
        self.half, self.unit, self.narrow = half, INT32 if half else FP32, half and not wide
        self.high, self.lanes, self.columns = level.rows, level.lanes, 2 * level.lanes
        self.b = b = Builder(self.name, _POINTERS, _NUMBERS, level)
        self.given = b.given
        b.tasks(self._block)

    def _block(self, task: Any, thread: Any) -> None:
        b, given = self.b, self.given
        self.row = row = b.mul(b.sdiv(task, given["across"]), given["height"])
        self.column = column = b.mul(b.srem(task, given["across"]), given["width"])
        self.end = end = b.minimum_int(b.add(row, given["height"]), given["outputs"])
        stop = b.minimum_int(b.add(column, given["width"]), given["inputs"])
        terms, columns = given["terms"], self.columns
        # Some more than a tile has, so that tiles begin in different sets of the cache.
        self.tile_units = b.add(b.mul(terms, self.high), self.lanes)
        self.sums = b.at(given["scratch"], b.mul(thread, given["room"]), BYTE)
        self.panel = b.at(self.sums, self.high * self.columns, FP32)
        tiles = b.sdiv(given["height"], self.high)
        # Sums of the block's rows of dout: of the piece, and of all pieces.
        summed = b.mul(tiles, self.lanes)
        self.piece_sums = b.at(self.panel, b.mul(terms, columns), self.unit)
        self.row_sums = b.at(self.piece_sums, summed, FP32)
        self.tiles = b.at(self.row_sums, summed, FP32)
        self.before = b.at(self.tiles, b.mul(tiles, self.tile_units), self.unit)
        # Of blocks that are divided, the first part sums for all.
        self.sums_wanted = b.and_(b.is_not_null(given["sums"]), b.icmp_signed("==", column, 0))

        def nothing_yet(n: Any) -> None:
            b.write(b.splat(0.0), b.at(self.piece_sums, n, FP32))

        # Those of all pieces too.
        b.loop(0, b.shl(summed, 1), self.lanes, nothing_yet)

        def piece(first: Any) -> None:
            count = b.minimum_int(b.sub(given["units"], first), terms)
            b.loop(0, count, 1, lambda u: self._lay_out_rows(b.add(first, u), u))
            with b.if_then(self.sums_wanted):
                b.loop(row, end, self.high, self._add_piece_sums)

            def some_columns(at: Any) -> None:
                b.loop(0, count, 1, lambda u: self._lay_out_columns(b.add(first, u), u, at))

                def tile(i: Any) -> None:
                    rows = [b.at(self._tile(i), n, self.unit) for n in range(self.high)]
                    add, zero = b.dot_bf16 if self.half else b.multiply_add, b.splat(0.0)
                    sums = b.tile(
                        rows,
                        2,
                        self.panel,
                        self.columns,
                        count,
                        self.unit,
                        add,
                        zero,
                        apart=self.high,
                    )
                    for n, value in enumerate(sums):
                        b.write(value, b.at(self.sums, n * self.lanes, FP32))
                    self._finish(first, i, at)

                b.loop(row, end, self.high, tile)

            b.loop(column, stop, self.columns, some_columns)

        b.loop(0, given["units"], terms, piece)
        with b.if_then(self.sums_wanted):
            b.loop(row, end, self.high, self._finish_sums)

    def _add_piece_sums(self, row: Any) -> None:
        b, place = self.b, self._sums_place(row)
        of_piece, of_all = (b.at(base, place, FP32) for base in (self.piece_sums, self.row_sums))
        b.write(b.fadd(b.read(of_all, FP32), b.read(of_piece, FP32)), of_all)
        b.write(b.splat(0.0), of_piece)

    def _finish_sums(self, row: Any) -> None:
        b = self.b
        mask = self._mask(b.minimum_int(b.sub(self.end, row), self.high))
        b.store_masked(
            b.read(b.at(self.row_sums, self._sums_place(row), FP32), FP32),
            b.at(self.given["sums"], row, FP32),
            mask,
        )

    def _sums_place(self, row: Any) -> Any:
        """A vector for every tile, of which as many elements count as it has rows."""
        b = self.b
        return b.mul(b.sdiv(b.sub(row, self.row), self.high), self.lanes)

    def _tile(self, row: Any) -> Any:
        """Where the tile of a row is laid out."""
        b = self.b
        number = b.sdiv(b.sub(row, self.row), self.high)
        return b.at(self.tiles, b.mul(number, self.tile_units), self.unit)

    def _lay_out_rows(self, unit: Any, place: Any) -> None:
        b = self.b
        ahead = b.mul(self.given["dout_row"], _AHEAD * (2 if self.half else 1))

        def some(i: Any) -> None:
            # A vector is longer than a tile is high: the next unit, or what lies between tiles, takes what is too much.
            into = b.at(self._tile(i), b.mul(place, self.high), self.unit)
            parts = self._parts("dout", unit, i, self.given["outputs"], ahead)
            b.write(self._units(parts), into)
            with b.if_then(self.sums_wanted):
                sums = b.at(self.piece_sums, self._sums_place(i), FP32)
                added = b.fadd(*(b.bf16_to_fp32(part) for part in parts)) if self.half else parts[0]
                b.write(b.fadd(b.read(sums, FP32), added), sums)

        b.loop(self.row, self.end, self.high, some)

    def _lay_out_columns(self, unit: Any, place: Any, column: Any) -> None:
        b = self.b
        for n in (0, self.lanes):
            into = b.at(self.panel, b.add(b.mul(place, self.columns), n), self.unit)
            at = b.add(column, n)
            b.write(
                self._units(self._parts("x", unit, at, self.given["inputs"], self.columns)), into
            )

    def _units(self, parts: Values) -> Any:
        """A vector of them."""
        return self.b.interleave(*parts) if self.half else parts[0]

    def _parts(self, name: str, unit: Any, column: Any, columns: Any, ahead: Any) -> Values:
        """Vectors of the rows of a unit, zeros past the last column and row; prefetches `ahead`."""
        b = self.b

        def some(row: Any, limit: Any, element: Any) -> Any:
            place = b.at(
                self.given[name], b.add(b.mul(row, self.given[f"{name}_row"]), column), element
            )
            b.prefetch(b.at(place, ahead, element))
            return b.load_masked(place, self._mask(b.sub(limit, column)), element)

        if not self.half:
            return [some(unit, columns, FP32)]
        first = b.shl(unit, 1)
        second = b.add(first, 1)
        limit = b.select(b.icmp_signed("<", second, self.given["rows"]), columns, b.number(0))
        return [some(first, columns, INT16), some(second, limit, INT16)]

    def _mask(self, count: Any) -> Any:
        """Which elements of a vector are among so many."""
        b = self.b
        places = ir.Constant(b.vector(INT32), list(range(self.lanes)))
        return b.icmp_signed(
            "<", places, b.broadcast(b.trunc(b.minimum_int(count, self.lanes), INT32))
        )

    def _finish(self, first: Any, row: Any, column: Any) -> None:
        """Write the sums of a tile, plus earlier pieces; for bf16 they accumulate in fp32 until the last piece."""
        b, given = self.b, self.given
        later = b.icmp_signed(">", first, 0)
        last = b.icmp_signed(">=", b.add(first, given["terms"]), given["units"])

        def of_row(i: Any) -> None:
            sums = b.at(self.sums, b.mul(i, self.columns), FP32)
            number = b.add(row, i)
            element = BF16 if self.narrow else FP32
            out = b.at(given["out"], b.add(b.mul(number, given["inputs"]), column), element)
            place = b.add(
                b.mul(b.sub(number, self.row), given["width"]), b.sub(column, self.column)
            )
            before = b.at(self.before, place, FP32)

            def vector(n: Any) -> None:
                count = b.sub(given["inputs"], b.add(column, n))
                found, into, wide = (
                    b.read(b.at(sums, n, FP32), FP32),
                    b.at(out, n, element),
                    b.at(before, n, FP32),
                )
                if not self.narrow:
                    added = b.where(
                        later, lambda: b.fadd(found, b.load_masked(into, self._mask(count))), found
                    )
                    self._write(added, into, count)
                    return
                added = b.where(later, lambda: b.fadd(found, b.read(wide, FP32)), found)
                with b.if_else(last) as (whole, partly):
                    with whole:
                        self._write(b.bitcast(b.fp32_to_bf16(added), b.vector(INT16)), into, count)
                    with partly:
                        b.write(added, wide)

            b.loop(
                0, b.minimum_int(b.sub(given["inputs"], column), self.columns), self.lanes, vector
            )

        b.loop(0, b.minimum_int(b.sub(self.end, row), self.high), 1, of_row)

    def _write(self, value: Any, place: Any, count: Any) -> None:
        b = self.b
        with b.if_else(b.icmp_signed(">=", count, self.lanes)) as (whole, some):
            with whole:
                b.write(value, place)
            with some:
                # Only here, because AVX2 takes long for it.
                b.store_masked(value, place, self._mask(count))


def weight_gradient(
    dout: Tensor,
    x: Tensor,
    *,
    wide: bool = False,
    sums: Tensor | None = None,
    level: Level | None = None,
) -> Tensor:
    """`dout^T x`: `[n, M]`, `[n, K]` → `[M, K]`, of any sizes, in fp32 if `wide`.

    dout and x are both fp32, or both bf16 where the level has it; a copy is made of strided columns. `sums` `[M]`, fp32
    and contiguous, receives the sum of dout over all rows.
    """
    level, threads, half = level or levels()[0], torch.get_num_threads(), x.dtype == torch.bfloat16
    dout, x = (t if t.stride(1) == 1 else t.contiguous() for t in (dout, x))
    (rows, outputs), inputs = dout.shape, x.shape[1]
    out = torch.empty(outputs, inputs, dtype=torch.float32 if wide else x.dtype)
    if not rows or not out.numel():
        if sums is not None:
            torch.sum(dout, 0, dtype=torch.float32, out=sums)
        return out.zero_()
    columns, units = 2 * level.lanes, -(-rows // TOGETHER[x.dtype])
    terms = -(-units // -(-units // _TERMS))
    blocks = -(-outputs // _HEIGHT)
    height = -(-outputs // (blocks * level.rows)) * level.rows
    # Where blocks are fewer than threads they are divided; every part lays out the block's rows.
    width = -(-inputs // (-(-threads // blocks) * columns)) * columns
    blocks, across = -(-outputs // height), -(-inputs // width)
    laid_out = terms * columns + height // level.rows * (terms * level.rows + 3 * level.lanes)
    room = whole_pages(4 * (level.rows * columns + laid_out + (half and not wide) * height * width))
    place = scratch_address("compiled weight gradient", room * threads)
    addresses = (
        dout.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        0 if sums is None else sums.data_ptr(),
        place,
    )
    sizes = (rows, outputs, inputs, units, terms, height, width, across, room)
    run = kernel(_WeightGradient, half, wide, level)
    run((*addresses, dout.stride(0), x.stride(0), *sizes), blocks * across, threads)
    return out
