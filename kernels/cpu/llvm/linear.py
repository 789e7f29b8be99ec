"""Linear layers with a fused epilogue: sums stay in registers until GELU, LayerScale and residual are applied.

Two kernels in fp32 and bf16 read the weights in place: for many rows, a task packs the weights of some columns in
panels of two vectors for all tiles of rows; for few rows, dot products of a few columns are reduced at their end. int8
and frozen weights are stored in panels, and one kernel multiplies any number of rows; those of int8 are quantised by
another kernel or by every thread. With AMX, tiles multiply the same panels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import llvmlite.ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference import int8_strides
from ..workspace import HugePages
from . import ZERO_BYTE, Level, activation, fits, levels
from .builder import (
    BF16,
    BYTE,
    FP32,
    INT16,
    INT32,
    INT64,
    POINTER,
    Builder,
    Values,
    kernel,
    scratch_address,
    split_rows,
    whole_pages,
)
from .quantise import Norm, Quantisation, int8_rows, quantise_row
from .tiles import ROWS, Tiles, state_bytes

# Below these rows weights are not packed, and every thread quantises all rows by itself.
_FEW = 64
# Rows and columns of tiles of few rows, by lanes: their accumulators and operands fill the registers. Rows that fit in
# one tile use each weight as it arrives from memory; with more, tiles leave room in the cache for each other.
_ONE_TILE = {16: (14, 2), 8: (6, 2)}
_FEW_TILES = {16: (7, 4), 8: (6, 2)}
_FEW_COLUMNS = 64
# 32-bit units of a dot product that run before the next columns: a tile's rows stay in the first level of cache.
_TERMS = 768
# Prefetch distance in stored panels, in bytes, and in weights that are read in place, in rows.
_AHEAD, _ROWS_AHEAD = 8192, 8
# Heights of tiles of stored panels, by lanes. Tiles of more rows than one has are at least half as high as the highest.
_HEIGHTS = {16: (2, 4, 6, 8, 9, 10, 11, 12, 13, 14), 8: (1, 2, 3, 4, 5, 6)}
# Bytes of packed weights, which share the second level of cache with rows on their way through.
_PANELS_BYTES = 400 << 10
_MAX_PANELS = 4
# With AMX, in larger caches: weights that stay in the second level, while rows stream through it. Rows of a block of
# tiles, and units that run before the next panel: a block's rows stay in the first level, past which weights stream.
_TILED_BYTES, _TILED_PANELS, _MOST_FEW_PANELS = 1200 << 10, 32, 8
_TILED_ROWS, _TILED_TERMS = 2 * ROWS, 24 * ROWS
# Rows of a chunk, where columns are too few to keep all threads busy.
_CHUNK = 96
_TASKS_PER_THREAD = 3
Dtype = Literal["fp32", "bf16", "int8"]
# log2 of the channels of a 32-bit unit.
_SHIFT: dict[Dtype, int] = {"fp32": 0, "bf16": 1, "int8": 2}

_OPERANDS = ("x", "weight", "bias", "gamma", "residual", "out")
_POINTERS = (*_OPERANDS, "scratch", "steps", "scales", "weight_sums")
_STRIDES = ("x_row", "weight_row", "residual_row", "out_row")
_SIZES = ("rows", "inputs", "outputs", "columns", "chunk", "chunks", "scratch_bytes")
_NUMBERS = (*_STRIDES, *_SIZES, "gelu")


class _Linear:
    """Emits the kernel for many rows, or for any number of int8 rows.

    Args:
        dtype: Of the rows, and of the weight unless `wide`.
        half: Whether residual, bias, gamma and result are bf16 instead of fp32.
        transposed: Whether the weight is `[K, M]`; not for int8.
        quantisation: How float rows become int8; None for quantised rows, and for other dtypes.
        wide: Whether the weight of bf16 rows is fp32.
        stored: Whether the weight is stored in panels, as int8 weights are.
        level: Instruction set.
    """

    name, few, tiled = "linear", False, False

    def __init__(
        self,
        dtype: Dtype,
        half: bool,
        transposed: bool,
        quantisation: Quantisation | None,
        wide: bool,
        stored: bool,
        level: Level,
    ) -> None:
        self.dtype, self.half, self.transposed, self.stored = dtype, half, transposed, stored
        self.quantisation, self.wide, self.level = quantisation, wide, level
        # A unit of 32 bits is a channel in fp32, a pair of channels in bf16, four of them in int8.
        self.unit, self.element = FP32 if dtype == "fp32" else INT32, BF16 if half else FP32
        self.accumulator = INT32 if dtype == "int8" else FP32
        self.b = b = Builder(self.name, _POINTERS, _NUMBERS, level)
        self.args = args = b.args
        self.height, self.columns, self.sums_bytes = _sums(self.few, stored, self.tiled, level)
        if quantisation is None:
            args["x_row"] = args["x_row"] >> _SHIFT[dtype]
        if not transposed and not wide:
            args["weight_row"] = args["weight_row"] >> _SHIFT[dtype]
        args["inputs"] = args["inputs"] >> _SHIFT[dtype]
        self._emit()

    def _emit(self) -> None:
        if self.stored:
            self.b.task_loop(self._stored_task, self._quantise_rows if self.quantisation else None)
        else:
            self.b.task_loop(self._few_rows_task if self.few else self._packed_task)

    def _bounds(self, task: Any, thread: Any) -> tuple[Any, Any, Any, Any]:
        """Return first and last column, first and last row of a task; locate the thread's scratch memory."""
        b, args = self.b, self.args
        self.sums = b.at(args["scratch"], thread * args["scratch_bytes"], BYTE)
        self.panels = b.at(self.sums, self.sums_bytes, BYTE)
        chunk, block = task % args["chunks"], task // args["chunks"]
        column, row = block * args["columns"], chunk * args["chunk"]
        stop = b.minimum_int(column + args["columns"], args["outputs"])
        return column, stop, row, b.minimum_int(row + args["chunk"], args["rows"])

    def _packed_task(self, task: Any, thread: Any) -> None:
        b, args, lanes = self.b, self.args, self.level.lanes
        column, stop, row, end = self._bounds(task, thread)
        b.loop(column, stop, lanes, lambda at: self._pack(column, at, 0, args["inputs"]))

        def tile(first: Any) -> None:
            rows = self._tile_addresses(first, end, self.height)

            def columns(at: Any) -> None:
                with b.if_then(b.is_not_null(args["residual"])):
                    self._prefetch_residual(first, end, at)
                self._multiply_panel(rows, self._panel(column, at), [self._zero()] * 2)
                count = b.minimum_int(stop - at, 2 * lanes)
                self._epilogue(first, end, at, count, self.height)

            b.loop(column, stop, 2 * lanes, columns)

        b.loop(row, end, self.height, tile)

    def _panel(self, first: Any, column: Any) -> Any:
        """Return the address of the panel of a column, packed by a task whose columns begin with `first`."""
        b, width = self.b, 2 * self.level.lanes
        return b.at(self.panels, (column - first) // width * self.args["inputs"] * width, self.unit)

    def _pack(self, first: Any, column: Any, start: Any, units: Any) -> None:
        """Pack units of a vector of columns, from `start`, into their panel."""
        b, args, lanes = self.b, self.args, self.level.lanes
        out = b.at(self._panel(first, column), column - first & lanes, self.unit)
        out = b.at(out, b.index(start) * (2 * lanes), self.unit)
        if self.transposed:
            b.loop(
                0,
                units,
                1,
                lambda u: self._pack_transposed(
                    column, u + start, b.at(out, u * (2 * lanes), self.unit)
                ),
            )
            return
        offset = b.index(start) * (2 if self.wide else 1)
        rows = [b.at(self._row("weight", column + i), offset, self.unit) for i in range(lanes)]
        ahead = args["weight_row"] * lanes
        b.pack(rows, units, self.unit, out, ahead, narrowing=self.wide)

    def _quantise_rows(self, thread: Any) -> None:
        """Quantise all rows to the thread's own scratch memory, from which its tasks read."""
        b, args, mode = self.b, self.args, self.quantisation
        assert mode is not None
        x, x_row, units = args["x"], args["x_row"], args["inputs"]
        offset = thread * args["scratch_bytes"] + self.sums_bytes
        out = b.at(args["scratch"], offset, BYTE)
        args["x"], args["x_row"] = out, units
        args["steps"] = b.at(out, args["rows"] * units, INT32)
        channels, element = units << _SHIFT["int8"], BF16 if mode.half else FP32

        def row(i: Any) -> None:
            source = b.at(x, i * x_row, element)
            step = quantise_row(b, mode, source, channels, b.at(out, i * units, INT32))
            b.store(step, b.at(args["steps"], i, FP32))

        b.loop(0, args["rows"], 1, row)

    def _stored_task(self, task: Any, thread: Any) -> None:
        b, args, lanes = self.b, self.args, self.level.lanes
        column, stop, row, end = self._bounds(task, thread)

        def emit_tiles(height: int) -> None:
            def tile(first: Any) -> None:
                rows = self._tile_addresses(first, end, height)

                def columns(at: Any) -> None:
                    panel = b.at(args["weight"], at * args["inputs"], self.unit)
                    starts = [self._zero()] * 2
                    if self.dtype == "int8":
                        starts = [self._zero_sums(at + n * lanes) for n in range(2)]
                    self._multiply_panel(rows, panel, starts, _AHEAD)
                    count = b.minimum_int(stop - at, 2 * lanes)
                    self._epilogue(first, end, at, count, height)

                b.loop(column, stop, 2 * lanes, columns)

            b.loop(row, end, height, tile)

        b.choose_height(self.height, end - row, emit_tiles, _HEIGHTS[lanes])

    def _zero_sums(self, column: Any) -> Any:
        """Return what rows of the zero byte take from the sums of a GEMM."""
        return self.b.read(self.args["weight_sums"], INT32, column)

    def _multiply_panel(self, rows: Values, panel: Any, starts: Values, ahead: int = 0) -> None:
        """Store the sums of a tile of rows times a panel; `starts` has the first accumulator of each vector."""
        b, lanes, terms = self.b, self.level.lanes, self.args["inputs"]
        sums = b.microkernel(
            rows, panel, terms, self.unit, self._multiply_add, starts, stride=2 * lanes, ahead=ahead
        )
        for i, value in enumerate(sums):
            b.write(value, b.at(self.sums, i * lanes, self.accumulator))

    def _prefetch_residual(self, first: Any, end: Any, column: Any) -> None:
        """Prefetch the residual of a tile during its GEMM."""
        b, last = self.b, end - 1
        for i in range(self.height):
            row = b.minimum_int(first + i, last) * self.args["residual_row"]
            address = b.at(self.args["residual"], row + column, self.element)
            for channel in range(0, 2 * self.level.lanes, 64 // (2 if self.half else 4)):
                b.prefetch(b.at(address, channel, self.element))

    def _pack_transposed(self, column: Any, unit: Any, out: Any) -> None:
        """Pack one unit of a vector of columns of a `[K, M]` weight, whose rows are scaled by their factors."""
        b, args = self.b, self.args
        element = FP32 if self.dtype == "fp32" or self.wide else BF16

        def scaled(row: Any) -> Any:
            address = b.at(args["weight"], row * args["weight_row"] + column, element)
            factor = b.compute_if(
                b.is_not_null(args["scales"]),
                lambda: b.load_scalar(args["scales"], row, FP32),
                ir.Constant(FP32, 1.0),
            )
            return b.fmul(b.read_fp32(address, element), b.broadcast(factor))

        if self.dtype == "fp32":
            b.write(scaled(unit), out)
            return
        first = unit << 1
        halves = [b.fp32_to_bf16(scaled(first + n)) for n in range(2)]
        b.write(b.interleave(*(b.bitcast(half, b.vector(INT16)) for half in halves)), out)

    def _few_rows_task(self, task: Any, thread: Any) -> None:
        b, lanes, inputs = self.b, self.level.lanes, self.args["inputs"]
        column, stop, row, end = self._bounds(task, thread)

        def emit_tiles(height: int, width: int) -> None:
            def tile(first: Any) -> None:
                rows = self._tile_addresses(first, end, height)

                def terms(start: Any) -> None:
                    terms_end = b.minimum_int(start + _TERMS, inputs)

                    def columns(at: Any) -> None:
                        self._dot(rows, at, at - column, start, terms_end, width)

                    b.loop(column, stop, width, columns)

                b.loop(0, inputs, _TERMS, terms)
                self._epilogue(first, end, column, stop - column, height)

            b.loop(row, end, height, tile)

        highest, width = _ONE_TILE[lanes]
        rows = end - row
        with b.if_else(rows <= highest) as (then, otherwise):
            with then:
                b.choose_height(highest, rows, lambda height: emit_tiles(height, width))
            with otherwise:
                emit_tiles(*_FEW_TILES[lanes])

    def _dot(
        self, rows: Values, column: Any, out_column: Any, start: Any, end: Any, width: int
    ) -> None:
        """Add the terms from `start` to `end` of the dot products of a tile; prefetch the next columns."""
        b, lanes, args = self.b, self.level.lanes, self.args
        weights = [self._row("weight", column + n) for n in range(width)]
        ahead = args["weight_row"] * _ROWS_AHEAD

        def term(u: Any, *sums: Any) -> Values:
            addresses = [b.at(weight, u, self.unit) for weight in weights]
            for address in addresses:
                b.prefetch(b.at(address, ahead, self.unit), cache=2)
            factors, results = [b.read(address, self.unit) for address in addresses], []
            for i, row in enumerate(rows):
                x = b.read(row, self.unit, u)
                for n, factor in enumerate(factors):
                    results.append(self._multiply_add(x, factor, sums[width * i + n]))
            return results

        sums = b.loop(start, end, lanes, term, *[self._zero()] * (width * len(rows)))
        sums += [self._zero()] * (-len(sums) % lanes)
        later = start > 0
        for base in range(0, len(sums), lanes):
            reduced = b.horizontal_sums(sums[base : base + lanes])
            for i in range(base // width, min((base + lanes) // width, len(rows))):
                first = i * width - base
                value = b.shuffle(reduced, reduced, range(first, first + width))
                out = b.at(self.sums, out_column + i * self.columns, self.accumulator)

                def add_earlier(value: Any = value, out: Any = out) -> Any:
                    return b.fadd(value, b.read(out, self.accumulator, count=width))

                b.write(b.compute_if(later, add_earlier, value), out)

    def _multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        b = self.b
        operations = {"fp32": b.multiply_add, "bf16": b.dot_bf16, "int8": b.dot_int8}
        return operations[self.dtype](x, y, z)

    def _zero(self) -> Any:
        return self.b.splat(0, self.accumulator)

    def _row(self, name: str, index: Any) -> Any:
        """Return the address of a row of x or of the weight."""
        b = self.b
        return b.at(self.args[name], index * self.args[f"{name}_row"], self.unit)

    def _tile_addresses(self, first: Any, end: Any, height: int) -> Values:
        """Return the addresses of the rows of a tile; the last row is repeated past the end."""
        b, last = self.b, end - 1
        return [self._row("x", b.minimum_int(first + i, last)) for i in range(height)]

    def _epilogue(self, first: Any, end: Any, column: Any, columns: Any, height: int) -> None:
        """Finish the sums of a tile."""
        b = self.b

        def row(i: Any) -> None:
            sums = b.at(self.sums, i * self.columns, self.accumulator)
            b.loop(0, columns, b.lanes, lambda n: self._finish(sums, first + i, column, n))

        b.loop(0, b.minimum_int(end - first, height), 1, row)

    def _finish(
        self, sums: Any, row: Any, column: Any, n: Any, *, gelu: bool | None = None
    ) -> None:
        """Apply bias, GELU, LayerScale and residual to a vector of sums, `n` columns on, and store the result.

        `gelu`: whether it is applied, if known when the code is written.
        """
        b, args = self.b, self.args

        def apply_if(name: str, operation: Callable[..., Any], x: Any, start: Any) -> Any:
            base = b.at(args[name], start, self.element)
            return b.compute_if(
                b.is_not_null(args[name]),
                lambda: operation(x, b.read_fp32(base, self.element, n)),
                x,
            )

        value = b.read(sums, self.accumulator, n)
        if self.dtype == "int8":
            # The bias of an int8 layer is always fp32.
            bias, has_bias = b.at(args["bias"], column, FP32), b.is_not_null(args["bias"])
            added = b.compute_if(has_bias, lambda: b.read(bias, FP32, n), b.splat(0.0))
            value = self._dequantise(value, row, column + n, added)
        else:
            value = apply_if("bias", b.fadd, value, column)
        gelu_of = partial(activation.gelu, b, rounded=self.half or self.dtype == "int8")
        if gelu is None:
            value = b.compute_if(args["gelu"] > 0, lambda x=value: gelu_of(x), value)
        elif gelu:
            value = gelu_of(value)
        value = apply_if("gamma", b.fmul, value, column)
        value = apply_if("residual", b.fadd, value, row * args["residual_row"] + column)
        out = b.at(args["out"], row * args["out_row"] + column, self.element)
        b.write_fp32(value, out, self.element, n)

    def _dequantise(self, sums: Any, row: Any, column: Any, bias: Any) -> Any:
        """Return `sums · scale · step + bias` in fp32."""
        b, args = self.b, self.args
        if self.tiled:
            sums = b.add(sums, self._zero_sums(column))
        step = b.broadcast(b.load_scalar(args["steps"], row, FP32))
        scaled = b.fmul(b.sitofp(sums, b.vector(FP32)), b.read(args["scales"], FP32, column))
        return b.multiply_add(scaled, step, bias)


class _LinearOfFewRows(_Linear):
    name, few = "linear_of_few_rows", True


class _LinearOfTiles(_Linear):
    """Emits the kernel of bf16 or int8 rows for AMX.

    Products leave the vector units idle: between those of a panel runs the epilogue of the panel before, and between
    those of a task's first block the weights are packed.
    """

    name, tiled = "linear_of_tiles", True

    def _emit(self) -> None:
        self.tiles = Tiles(self.b, self.dtype)
        self.b.task_loop(self._task, self._start)
        self.tiles.release()

    def _start(self, thread: Any) -> None:
        """Locate what follows the sums, configure the tiles and quantise the rows."""
        b, args = self.b, self.args
        state = b.at(args["scratch"], thread * args["scratch_bytes"] + self._state_offset, BYTE)
        self.unfinished = b.at(state, state_bytes(self.level), BYTE)
        self.copies = b.at(self.unfinished, 64, BYTE)
        self.tiles.configure(state)
        if self.quantisation is not None:
            self._quantise_rows(thread)

    @property
    def _state_offset(self) -> int:
        return 4 * _TILED_ROWS * 2 * self.level.lanes * _TILED_PANELS

    def _task(self, task: Any, thread: Any) -> None:
        b, args, height, width = self.b, self.args, self.height, self.columns
        column, stop, row, end = self._bounds(task, thread)
        inputs, base = args["inputs"], self.sums
        blocks = (inputs + (_TILED_TERMS - 1)) // _TILED_TERMS
        step = b.round_up((inputs + (blocks - 1)) // blocks, ROWS)
        b.store(INT64(0), self.unfinished)

        def block(first: Any) -> None:
            rows, is_first = b.minimum_int(end - first, height), b.equal(first, row)

            def terms(start: Any) -> None:
                units = b.minimum_int(inputs - start, step)
                left = self._left(first, end, start, units)
                share = (b.index(height * ROWS) + (units - 1)) // units

                def columns(at: Any) -> None:
                    # Sums that one block of units completes are finished before the next ones are stored.
                    panel = b.select(b.equal(blocks, 1), INT64(0), ((at - column) // width).value)
                    sums = b.at(base, b.index(panel) * (height * width), self.accumulator)
                    earlier = self._earlier()

                    def multiply(tiles: int, *, packing: bool = False) -> None:
                        count = (share + (tiles - 1)) // tiles

                        def interleave(u: Any, tile: int) -> None:
                            if packing:
                                self._pack_next(column, stop, at + tile * b.lanes, start + u)
                            position = (u // ROWS * tiles + tile) * count
                            self._finish_rows(earlier, position, count)
                            with b.if_then(b.is_not_null(args["residual"])):
                                self._prefetch_rows(first + position, end, at, count)

                        right = b.at(self._weights(column, at), start * width, self.unit), width
                        self.tiles.multiply(
                            tiles,
                            left,
                            right,
                            units,
                            (sums, width),
                            add=start > 0,
                            between=interleave,
                            stream=True,
                        )

                    if self.stored:
                        with b.if_else(rows <= ROWS) as (short, tall):
                            with short:
                                multiply(1)
                            with tall:
                                multiply(2)
                    else:
                        with b.if_else(is_first) as (unpacked, packed):
                            with unpacked:
                                with b.if_then(b.equal(start, 0)):
                                    for n in range(2):
                                        self._pack_next(
                                            column, stop, at + n * b.lanes, start - ROWS
                                        )
                                multiply(2, packing=True)
                            with packed:
                                multiply(2)
                    complete = start + units >= inputs
                    count = b.select(complete, rows.value, INT64(0))
                    unfinished = (count, first.value, at.value, b.ptrtoint(sums, INT64))
                    for slot, value in enumerate((*unfinished, (stop - at).value)):
                        b.store(value, b.at(self.unfinished, slot, INT64))

                b.loop(column, stop, width, columns)

            b.loop(0, inputs, step, terms)

        b.loop(row, end, height, block)
        earlier = self._earlier()
        self._finish_rows(earlier, b.index(0), earlier.rows)

    def _left(self, first: Any, end: Any, start: Any, units: Any) -> tuple[Any, Any]:
        """Return the address of units of a block's rows, and the units from row to row.

        Of the last block the rows are copied, and its last one repeated.
        """
        b, args = self.b, self.args
        direct = b.at(self._row("x", first), start, self.unit)
        if self.quantisation is not None:
            return direct, args["x_row"]
        whole = first + self.height <= end

        def copy(i: Any) -> None:
            source = b.at(self._row("x", b.minimum_int(first + i, end - 1)), start, INT32)
            out = b.at(self.copies, i * _TILED_TERMS, INT32)
            b.loop(0, units, b.lanes, lambda u: b.write(b.read(source, INT32, u), out, u))

        with b.if_then(b.not_(whole)):
            b.loop(0, b.select(first + ROWS >= end, INT64(ROWS), INT64(self.height)), 1, copy)
        stride = b.select(whole, args["x_row"].value, INT64(_TILED_TERMS))
        return b.select(whole, direct, self.copies), b.index(stride)

    def _weights(self, first: Any, column: Any) -> Any:
        """Return the address of the panel of a column."""
        if self.stored:
            return self.b.at(self.args["weight"], column * self.args["inputs"], self.unit)
        return self._panel(first, column)

    def _pack_next(self, first: Any, stop: Any, column: Any, unit: Any) -> None:
        """Pack what the products after `unit` read of a vector of a panel; the last units twice."""
        b = self.b
        following = b.minimum_int(unit + ROWS, self.args["inputs"] - ROWS)
        with b.if_then(column < stop):
            self._pack(first, column, following, ROWS)

    def _earlier(self) -> _Unfinished:
        """Return the sums that the products before left unfinished."""
        values = [self.b.load_scalar(self.unfinished, slot, INT64) for slot in range(5)]
        rows, first, column, sums, columns = values
        return _Unfinished(rows, first, column, self.b.inttoptr(sums.value, POINTER), columns)

    def _finish_rows(self, earlier: _Unfinished, start: Any, count: Any) -> None:
        """Finish rows of the sums of a panel, as many as the products of a unit hide."""
        b, lanes = self.b, self.level.lanes

        def row(i: Any, *, gelu: bool) -> None:
            sums = b.at(earlier.sums, i * self.columns, self.accumulator)

            def finish(n: int) -> None:
                self._finish(sums, earlier.first + i, earlier.column, b.index(n), gelu=gelu)

            finish(0)
            with b.if_then(earlier.columns > lanes):
                finish(lanes)

        # Of a loop without branches for GELU, LLVM keeps the constants in registers.
        with b.if_else(self.args["gelu"] > 0) as branches:
            for gelu, branch in zip((True, False), branches, strict=True):
                with branch:
                    stop = b.minimum_int(start + count, earlier.rows)
                    b.loop(start, stop, 1, partial(row, gelu=gelu))

    def _prefetch_rows(self, first: Any, end: Any, column: Any, count: Any) -> None:
        """Prefetch rows of the residual of a panel during its products."""
        b, args = self.b, self.args

        def row(i: Any) -> None:
            start = b.at(args["residual"], i * args["residual_row"] + column, self.element)
            for line in range(0, self.columns, 64 // (2 if self.half else 4)):
                b.prefetch(b.at(start, line, self.element))

        b.loop(first, b.minimum_int(first + count, end), 1, row)


class _Unfinished(NamedTuple):
    """Sums of a panel without their epilogue: their rows, the first one, column, address and remaining columns."""

    rows: Any
    first: Any
    column: Any
    sums: Any
    columns: Any


def _sums(few: bool, stored: bool, tiled: bool, level: Level) -> tuple[int, int, int]:
    """Return the rows and columns whose sums are stored before an epilogue, and the bytes that precede the panels."""
    height = _ONE_TILE[level.lanes][0] if few or stored else level.rows
    columns = _FEW_COLUMNS if few and not stored else 2 * level.lanes
    if not tiled:
        return height, columns, 4 * height * columns
    height, columns = _TILED_ROWS, 2 * level.lanes
    # Of all panels; then the tiles' state, a line that tells which sums are unfinished, and copies of rows.
    sums = 4 * height * (columns * _TILED_PANELS + _TILED_TERMS)
    return height, columns, sums + state_bytes(level) + 64


def takes(x: Tensor, weight: Tensor, *addends: Tensor | None, turned: bool = False) -> bool:
    """Return whether a kernel takes x `[n, K]`, a weight `[M, K]` (`turned`: `[K, M]`), bias, residual and gamma."""
    tensors = [t for t in (x, weight, *addends) if t is not None]
    inputs, outputs = weight.shape if turned else weight.shape[::-1]
    wide = weight.dtype == torch.float32
    if not fits(outputs, inputs, x.dtype):
        return False
    for t in tensors:
        if t.dtype != x.dtype and not (t is weight and wide):
            return False
        if t.layout != torch.strided or t.stride(-1) != 1:
            return False
    if x.dtype == torch.float32:
        return True
    # Kernels read pairs of bf16.
    return x.stride(0) % 2 == 0 and (wide or weight.stride(0) % 2 == 0)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    gelu: bool = False,
    turned: bool = False,
    factors: Tensor | None = None,
    stored: Tensor | None = None,
    out: Tensor | None = None,
    few: bool | None = None,
    level: Level | None = None,
) -> Tensor:
    """Return `residual + gamma · (x W^T + b)` for x `[n, K]`, weight `[M, K]`, or its GELU, in `out` `[n, M]`.

    A `turned` weight is `[K, M]`, its rows times `factors` `[K]` in fp32. All operands have one dtype, as in `takes`; a
    weight may be fp32 with bf16 operands. Of a weight that is `stored` in panels (`in_panels`), only these are read.
    `few` and `level` select a kernel instead of the fastest.
    """
    out = torch.empty(x.shape[0], weight.shape[turned], dtype=x.dtype) if out is None else out
    level, half = level or levels()[0], x.dtype == torch.bfloat16
    if turned:
        few = False
    elif few is None:
        # Tiles multiply faster than vectors even where weights are packed for one of them.
        few = x.shape[0] < (ROWS if half and level.tiles else _FEW)
    if few and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    return _run(
        "bf16" if half else "fp32",
        x,
        weight,
        (bias, gamma, residual),
        out,
        few=few,
        level=level,
        scales=_Scales(scales=0 if factors is None else factors.data_ptr()),
        gelu=gelu,
        transposed=turned,
        stored=stored,
    )


def in_panels(units: Tensor, level: Level | None = None, memory: HugePages | None = None) -> Tensor:
    """Pack 32-bit units `[M, U]` of a weight in the order of a GEMM: `[⌈M / 2 lanes⌉, U, 2 lanes]`."""
    width = 2 * (level or levels()[0]).lanes
    panels = F.pad(units, (0, 0, 0, -len(units) % width)).view(-1, width, units.shape[1])
    panels = panels.transpose(1, 2)
    if memory is None:
        return panels.contiguous()
    return memory.empty((*panels.shape,), panels.dtype).copy_(panels)


class Panels(NamedTuple):
    """An int8 weight `[M, K]`: `levels` `[⌈M / 2 lanes⌉, K / 4, 2 lanes]`, four per int32, `in_panels`.

    Per channel, `steps` `[M]` in fp32, and `sums` `[⌈M / 2 lanes⌉ · 2 lanes]` of its levels in int32 times minus the
    zero byte, from which a GEMM starts.
    """

    levels: Tensor
    steps: Tensor
    sums: Tensor


def int8_panels(rows: Tensor, steps: Tensor) -> Panels:
    """Pack a weight of signed levels `[M, K]`, with a step per row `[M]`."""
    panels = in_panels(rows.view(torch.int32))
    sums = -ZERO_BYTE * rows.sum(1, dtype=torch.int32)
    return Panels(panels, steps, F.pad(sums, (0, panels[:, 0].numel() - len(sums))))


def int8_linear(
    x: Tensor,
    weight: Panels,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    gelu: bool = False,
    norm: Norm | None = None,
    level: Level | None = None,
) -> Tensor:
    """Write `residual + norm(x) W^T + b`, or its GELU, to `out`; residual and out `[n, M]` both fp32 or both bf16.

    x is `[n, K]` in fp32 or bf16, K a multiple of the lanes times four, M one of the lanes; the bias `[M]` is fp32. Of
    few rows without `norm`, every thread quantises all.
    """
    if not out.numel():
        return out
    few = norm is None and len(x) < _FEW
    steps = quantisation = None
    if few:
        quantisation = Quantisation(x.dtype == torch.bfloat16, int8_strides(x.shape[1]))
    else:
        x, steps = int8_rows(x, norm=norm)
    scales = _Scales(
        0 if steps is None else steps.data_ptr(),
        weight.steps.data_ptr(),
        weight.sums.data_ptr(),
    )
    return _run(
        "int8",
        x,
        weight.levels,
        (bias, None, residual),
        out,
        few=few,
        level=level,
        scales=scales,
        quantisation=quantisation,
        gelu=gelu,
        stored=weight.levels,
    )


class _Scales(NamedTuple):
    """Addresses of the steps of rows, of the scales of the weight's columns and of its sums."""

    steps: int = 0
    scales: int = 0
    weight_sums: int = 0


def _run(
    dtype: Dtype,
    x: Tensor,
    weight: Tensor,
    addends: tuple[Tensor | None, Tensor | None, Tensor | None],
    out: Tensor,
    *,
    few: bool,
    level: Level | None,
    scales: _Scales,
    quantisation: Quantisation | None = None,
    gelu: bool,
    transposed: bool = False,
    stored: Tensor | None = None,
) -> Tensor:
    """Launch the kernel of a linear layer; `addends` are bias, gamma and residual."""
    if not out.numel():
        return out
    level, threads = level or levels()[0], torch.get_num_threads()
    (rows, inputs), outputs, residual = x.shape, out.shape[1], addends[2]
    half, wide = out.dtype == torch.bfloat16, dtype == "bf16" and weight.dtype == torch.float32
    in_place, weight = stored is None, weight if stored is None else stored
    tiled = bool(level.tiles) and dtype != "fp32" and not (few and stored is None)
    emitter = _LinearOfTiles if tiled else _LinearOfFewRows if few and in_place else _Linear
    width, scratch_bytes = 2 * level.lanes, _sums(few, not in_place, tiled, level)[2]
    columns = _FEW_COLUMNS if in_place else width
    if few and tiled:
        # Of few panels, each copies the rows and finishes its own sums.
        panels = outputs // (width * (threads if threads == 1 else _TASKS_PER_THREAD * threads))
        columns = width * max(1, min(panels, _MOST_FEW_PANELS))
    chunk, chunks = rows, 1
    if quantisation is not None:
        # Tiles read whole blocks of rows.
        scratch_bytes += -(-rows // _TILED_ROWS) * _TILED_ROWS * (inputs + 4)
    if not few:
        panel_bytes = width * inputs * x.element_size()
        panels = min(_PANELS_BYTES // panel_bytes, _MAX_PANELS)
        if tiled:
            # Threads divide the columns before the rows, as every task packs its weights and copies its rows.
            share = max(_MAX_PANELS, outputs // (width * threads))
            panels = min(_TILED_BYTES // panel_bytes, _TILED_PANELS, share)
        columns = max(1, panels) * width
        if in_place:
            scratch_bytes += columns // width * panel_bytes
        blocks = -(-outputs // columns)
        step = _TILED_ROWS if tiled else 1
        # One thread has nobody to share with, and would pack the weights again.
        limit = -(-_TASKS_PER_THREAD * threads // blocks) if threads > 1 else 1
        chunk, chunks = split_rows(-(-rows // step), limit, _CHUNK // step)
        chunk *= step
    scratch_bytes = whole_pages(scratch_bytes)
    scratch = scratch_address("compiled linear", scratch_bytes * threads)
    pointers = (0 if t is None else t.data_ptr() for t in (x, weight, *addends, out))
    strides = (0 if t is None else t.stride(0) for t in (x, weight, residual, out))
    sizes = (rows, inputs, outputs, columns, chunk, chunks, scratch_bytes)
    run = kernel(emitter, dtype, half, transposed, quantisation, wide, not in_place, level)
    run(
        (*pointers, scratch, *scales, *strides, *sizes, int(gelu)),
        -(-outputs // columns) * chunks,
        threads,
    )
    return out
