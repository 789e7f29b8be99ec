"""Weight gradients of linear layers, `dout^T x`, with the bias gradients on the way.

A task is a block of the result. It walks the summed rows in pieces: the block's columns of dout are packed once per
piece and stay in the second level of cache, two vectors of columns of x at a time are packed in the first, and the
accumulators of a tile stay in registers. The order of summation depends on sizes only, so threads change no bit.
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
# Rows of the highest block: a piece of it leaves room in the second level of cache for data on its way.
_HEIGHT = 384
# Prefetch distance in units: rows of a block are too far from each other for the hardware prefetcher.
_AHEAD = 16
_POINTERS = ("dout", "x", "out", "sums", "scratch")
_ROWS = ("dout_row", "x_row", "rows", "outputs", "inputs")
_BLOCKS = ("units", "terms", "block_rows", "block_columns", "blocks_across", "scratch_bytes")


class _WeightGradient:
    """Emits the kernel; `half`: dout and x are bf16, `wide`: the result is fp32 for either dtype."""

    name = "weight_gradient"

    def __init__(self, half: bool, wide: bool, level: Level) -> None:
        # A unit of 32 bits is an element of one row in fp32, of a pair of rows in bf16.
        self.half, self.unit, self.narrow = half, INT32 if half else FP32, half and not wide
        self.tile_rows, self.lanes, self.tile_columns = level.rows, level.lanes, 2 * level.lanes
        self.b = b = Builder(self.name, _POINTERS, (*_ROWS, *_BLOCKS), level)
        self.args = b.args
        b.task_loop(self._block)

    def _block(self, task: Any, thread: Any) -> None:
        b, args = self.b, self.args
        across = args["blocks_across"]
        self.row = row = b.mul(b.sdiv(task, across), args["block_rows"])
        self.column = column = b.mul(b.srem(task, across), args["block_columns"])
        self.end = end = b.minimum_int(b.add(row, args["block_rows"]), args["outputs"])
        stop = b.minimum_int(b.add(column, args["block_columns"]), args["inputs"])
        sums = self._locate_scratch(thread)
        # Of the blocks of a row, the first computes the bias gradient.
        self.has_sums = b.and_(b.is_not_null(args["sums"]), b.icmp_signed("==", column, 0))
        zero = b.splat(0.0)
        b.loop(0, b.shl(sums, 1), self.lanes, lambda n: b.write(zero, self.piece_sums, n))

        def piece(first: Any) -> None:
            count = b.minimum_int(b.sub(args["units"], first), args["terms"])
            b.loop(0, count, 1, lambda u: self._pack_rows(b.add(first, u), u))
            with b.if_then(self.has_sums):
                b.loop(row, end, self.tile_rows, self._add_piece_sums)

            def columns(at: Any) -> None:
                b.loop(0, count, 1, lambda u: self._pack_columns(b.add(first, u), u, at))
                b.loop(row, end, self.tile_rows, lambda i: self._tile(i, first, at, count))

            b.loop(column, stop, self.tile_columns, columns)

        b.loop(0, args["units"], args["terms"], piece)
        with b.if_then(self.has_sums):
            b.loop(row, end, self.tile_rows, self._store_sums)

    def _locate_scratch(self, thread: Any) -> Any:
        """Compute the addresses of a thread's buffers; return the number of sums of dout's columns."""
        b, args = self.b, self.args
        terms = args["terms"]
        # More than a tile has, so that tiles begin in different sets of the cache.
        self.packed_tile = b.add(b.mul(terms, self.tile_rows), self.lanes)
        self.accumulators = b.at(args["scratch"], b.mul(thread, args["scratch_bytes"]), BYTE)
        self.panel = b.at(self.accumulators, self.tile_rows * self.tile_columns, FP32)
        tiles = b.sdiv(args["block_rows"], self.tile_rows)
        # Sums of the block's columns of dout, over the piece and over all pieces.
        sums = b.mul(tiles, self.lanes)
        self.piece_sums = b.at(self.panel, b.mul(terms, self.tile_columns), self.unit)
        self.total_sums = b.at(self.piece_sums, sums, FP32)
        self.tiles = b.at(self.total_sums, sums, FP32)
        self.earlier = b.at(self.tiles, b.mul(tiles, self.packed_tile), self.unit)
        return sums

    def _tile(self, row: Any, first: Any, column: Any, terms: Any) -> None:
        """Multiply a packed tile with the panel and add the result to `out`."""
        b = self.b
        multiply_add = b.dot_bf16 if self.half else b.multiply_add
        accumulators = b.microkernel(
            [b.at(self._packed(row), n, self.unit) for n in range(self.tile_rows)],
            self.panel,
            terms,
            self.unit,
            multiply_add,
            b.splat(0.0),
            stride=self.tile_columns,
            row_step=self.tile_rows,
        )
        for n, value in enumerate(accumulators):
            b.write(value, self.accumulators, n * self.lanes)
        self._add_to_out(first, row, column)

    def _add_piece_sums(self, row: Any) -> None:
        b, offset = self.b, self._sums_offset(row)
        piece, total = (b.at(sums, offset, FP32) for sums in (self.piece_sums, self.total_sums))
        b.write(b.fadd(b.read(total, FP32), b.read(piece, FP32)), total)
        b.write(b.splat(0.0), piece)

    def _store_sums(self, row: Any) -> None:
        b = self.b
        mask = self._mask(b.minimum_int(b.sub(self.end, row), self.tile_rows))
        sums = b.read(self.total_sums, FP32, self._sums_offset(row))
        b.store_masked(sums, b.at(self.args["sums"], row, FP32), mask)

    def _tile_index(self, row: Any) -> Any:
        return self.b.sdiv(self.b.sub(row, self.row), self.tile_rows)

    def _sums_offset(self, row: Any) -> Any:
        """Return the offset of a tile's sums: each tile has a vector, whose first `tile_rows` elements are used."""
        return self.b.mul(self._tile_index(row), self.lanes)

    def _packed(self, row: Any) -> Any:
        """Return the address of the packed tile of a row."""
        b = self.b
        return b.at(self.tiles, b.mul(self._tile_index(row), self.packed_tile), self.unit)

    def _pack_rows(self, unit: Any, index: Any) -> None:
        """Pack a unit of all tiles, and add it to the sums of dout."""
        b = self.b
        ahead = b.mul(self.args["dout_row"], _AHEAD * (2 if self.half else 1))

        def tile(row: Any) -> None:
            # A vector exceeds a tile: the next unit, or the gap between tiles, takes the surplus.
            out = b.at(self._packed(row), b.mul(index, self.tile_rows), self.unit)
            vectors = self._read_unit("dout", unit, row, self.args["outputs"], ahead)
            b.write(self._join(vectors), out)
            with b.if_then(self.has_sums):
                sums = b.at(self.piece_sums, self._sums_offset(row), FP32)
                added = vectors[0]
                if self.half:
                    added = b.fadd(*(b.bf16_to_fp32(vector) for vector in vectors))
                b.write(b.fadd(b.read(sums, FP32), added), sums)

        b.loop(self.row, self.end, self.tile_rows, tile)

    def _pack_columns(self, unit: Any, index: Any, column: Any) -> None:
        """Pack a unit of two vectors of columns of x."""
        b = self.b
        for n in (0, self.lanes):
            out = b.at(self.panel, b.add(b.mul(index, self.tile_columns), n), self.unit)
            at = b.add(column, n)
            vectors = self._read_unit("x", unit, at, self.args["inputs"], self.tile_columns)
            b.write(self._join(vectors), out)

    def _join(self, vectors: Values) -> Any:
        """Return a vector of units from vectors of the rows of a unit."""
        return self.b.interleave(*vectors) if self.half else vectors[0]

    def _read_unit(self, name: str, unit: Any, column: Any, columns: Any, ahead: Any) -> Values:
        """Load vectors of the rows of a unit, zero past the last column and row; prefetch `ahead`."""
        b, args = self.b, self.args

        def read(row: Any, limit: Any, element: Any) -> Any:
            index = b.add(b.mul(row, args[f"{name}_row"]), column)
            address = b.at(args[name], index, element)
            b.prefetch(b.at(address, ahead, element))
            return b.load_masked(address, self._mask(b.sub(limit, column)), element)

        if not self.half:
            return [read(unit, columns, FP32)]
        first = b.shl(unit, 1)
        second = b.add(first, 1)
        limit = b.select(b.icmp_signed("<", second, args["rows"]), columns, b.int64(0))
        return [read(first, columns, INT16), read(second, limit, INT16)]

    def _mask(self, count: Any) -> Any:
        """Return the mask of a vector's first `count` elements."""
        b = self.b
        lanes = ir.Constant(b.vector(INT32), list(range(self.lanes)))
        limit = b.trunc(b.minimum_int(count, self.lanes), INT32)
        return b.icmp_signed("<", lanes, b.broadcast(limit))

    def _add_to_out(self, first: Any, row: Any, column: Any) -> None:
        """Add a tile to earlier pieces in `out`; for a bf16 result they accumulate in fp32 until the last piece."""
        b, args = self.b, self.args
        later = b.icmp_signed(">", first, 0)
        last = b.icmp_signed(">=", b.add(first, args["terms"]), args["units"])

        def add_row(i: Any) -> None:
            accumulators = b.at(self.accumulators, b.mul(i, self.tile_columns), FP32)
            index = b.add(row, i)
            element = BF16 if self.narrow else FP32
            out = b.at(args["out"], b.add(b.mul(index, args["inputs"]), column), element)
            block_row = b.mul(b.sub(index, self.row), args["block_columns"])
            offset = b.add(block_row, b.sub(column, self.column))
            earlier = b.at(self.earlier, offset, FP32)

            def add_vector(n: Any) -> None:
                count = b.sub(args["inputs"], b.add(column, n))
                value, address = b.read(accumulators, FP32, n), b.at(out, n, element)
                wide = b.at(earlier, n, FP32)

                def add_earlier() -> Any:
                    if self.narrow:
                        return b.fadd(value, b.read(wide, FP32))
                    return b.fadd(value, b.load_masked(address, self._mask(count)))

                total = b.compute_if(later, add_earlier, value)
                if not self.narrow:
                    self._write_columns(total, address, count)
                    return
                with b.if_else(last) as (then, otherwise):
                    with then:
                        rounded = b.bitcast(b.fp32_to_bf16(total), b.vector(INT16))
                        self._write_columns(rounded, address, count)
                    with otherwise:
                        b.write(total, wide)

            columns = b.minimum_int(b.sub(args["inputs"], column), self.tile_columns)
            b.loop(0, columns, self.lanes, add_vector)

        b.loop(0, b.minimum_int(b.sub(self.end, row), self.tile_rows), 1, add_row)

    def _write_columns(self, value: Any, address: Any, count: Any) -> None:
        """Store the first `count` elements of a vector."""
        b = self.b
        with b.if_else(b.icmp_signed(">=", count, self.lanes)) as (then, otherwise):
            with then:
                b.write(value, address)
            with otherwise:
                # Masked stores are slow on AVX2.
                b.store_masked(value, address, self._mask(count))


def weight_gradient(
    dout: Tensor,
    x: Tensor,
    *,
    wide: bool = False,
    sums: Tensor | None = None,
    level: Level | None = None,
) -> Tensor:
    """Return `dout^T x`: `[n, M]`, `[n, K]` → `[M, K]`, of any sizes, in fp32 if `wide`.

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
    tile_columns, units = 2 * level.lanes, -(-rows // TOGETHER[x.dtype])
    terms = -(-units // -(-units // _TERMS))
    blocks = -(-outputs // _HEIGHT)
    block_rows = -(-outputs // (blocks * level.rows)) * level.rows
    # Fewer blocks than threads are divided by columns; each part packs the block's columns of dout.
    block_columns = -(-inputs // (-(-threads // blocks) * tile_columns)) * tile_columns
    blocks_down, blocks_across = -(-outputs // block_rows), -(-inputs // block_columns)
    packed_tiles = block_rows // level.rows * (terms * level.rows + 3 * level.lanes)
    words = level.rows * tile_columns + terms * tile_columns + packed_tiles
    if half and not wide:
        words += block_rows * block_columns
    scratch_bytes = whole_pages(4 * words)
    scratch = scratch_address("compiled weight gradient", scratch_bytes * threads)
    sums_address = 0 if sums is None else sums.data_ptr()
    pointers = (dout.data_ptr(), x.data_ptr(), out.data_ptr(), sums_address, scratch)
    strides = dout.stride(0), x.stride(0)
    blocks = units, terms, block_rows, block_columns, blocks_across, scratch_bytes
    run = kernel(_WeightGradient, half, wide, level)
    run((*pointers, *strides, rows, outputs, inputs, *blocks), blocks_down * blocks_across, threads)
    return out
