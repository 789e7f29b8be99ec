"""Linear layers: each tile of the GEMM stays in registers until GELU, LayerScale and residual are applied.

Two kernels in fp32 and bf16 read the weights in place: of many rows, a task packs the weights of some columns in panels
of two vectors for all tiles of rows; of few rows, dot products of a few columns are reduced at their end. int8 weights
are a copy in panels, and one kernel multiplies any number of rows, quantised by another or by every thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import llvmlite.ir as ir
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..workspace import scratch
from . import GELU_ZERO_BYTE, NO_FRACTIONS, ZERO_BYTE, Level, fits, levels
from .builder import (
    BF16,
    BYTE,
    FP32,
    INT16,
    INT32,
    Builder,
    Values,
    coefficients,
    divided,
    kernel,
    scratch_address,
    whole_pages,
)

# Below these rows weights are not laid out, and every thread rounds all of them to bytes by itself.
_FEW = 64
# Rows and columns of tiles of few rows, by lanes: their sums and operands fill the registers. If the rows fit into one
# tile, what comes from memory is multiplied at once; of more rows, tiles leave room in the cache for each other.
_ONE_TILE = {16: (14, 2), 8: (6, 2)}
_FEW_TILES = {16: (7, 4), 8: (6, 2)}
_FEW_COLUMNS = 64
# 32-bit units of a row that are multiplied before the next columns are, so that all rows of a tile stay in the first
# level of cache.
_TERMS = 768
# Bytes from what is read of a panel to what is fetched of it.
_AHEAD = 4096
# Bytes of laid out weights, which share the second level of cache with rows on their way through.
_PANELS_BYTES = 400 << 10
_MOST_PANELS = 4
# Rows of a chunk, where columns are too few to keep all threads busy.
_CHUNK = 96
_TASKS_PER_THREAD = 3
# Beyond an edge the normal distribution is taken for 0 or 1; its polynomial up to there has a degree. GELU misses by 8
# units of 10⁻⁷; where its result is rounded, to bf16 or from sums of bytes, by 2 of 10⁻⁶ may do.
_EXACT, _ROUNDED = (5.5, 14), (5.0, 12)
Kind = Literal["fp32", "bf16", "int8"]
# By which power of two there are fewer units than channels.
_SHIFT: dict[Kind, int] = {"fp32": 0, "bf16": 1, "int8": 2}

_POINTERS = (
    "x",
    "weight",
    "bias",
    "gamma",
    "residual",
    "out",
    "scratch",
    "steps",
    "scales",
    "weight_sums",
)
_NUMBERS = (
    "x_row",
    "weight_row",
    "residual_row",
    "out_row",
    "rows",
    "inputs",
    "outputs",
    "columns",
    "chunk",
)
_NUMBERS += ("chunks", "room", "gelu", "zero")


class _Linear:
    """Writes a kernel of factors of a `kind`, fp32, bf16 or int8; result and addends are bf16 if `half`, else fp32.

    Of many rows, the weight may be `[K, M]` (`turned`, not in int8) or fp32 beside bf16 (`wide`); `rounded` is how
    float rows are quantised, None for int8 rows.
    """

    name, few = "linear", False

    def __init__(
        self,
        kind: Kind,
        half: bool,
        turned: bool,
        rounded: Rounded | None,
        wide: bool,
        level: Level,
    ) -> None:
        self.kind, self.half, self.level, self.turned, self.rounded = (
            kind,
            half,
            level,
            turned,
            rounded,
        )
        self.wide = wide
        # Rows are read as channels in fp32, pairs of them in bf16 and fours of them in bytes, 32 bits each.
        self.unit, self.element = FP32 if kind == "fp32" else INT32, BF16 if half else FP32
        self.summed = INT32 if kind == "int8" else FP32
        self.b = b = Builder(self.name, _POINTERS, _NUMBERS, level)
        self.given = given = b.given
        self.height, self.columns = _height(kind, self.few, level), _columns(kind, self.few, level)
        self.sums_bytes = 4 * self.height * self.columns
        if rounded is None:
            given["x_row"] = b.ashr(given["x_row"], _SHIFT[kind])
        if not turned and not wide:
            given["weight_row"] = b.ashr(given["weight_row"], _SHIFT[kind])
        given["inputs"] = b.ashr(given["inputs"], _SHIFT[kind])
        if kind == "int8":
            b.tasks(self._bytes, self._round if rounded else None)
        else:
            b.tasks(self._few if self.few else self._many)

    def _bounds(self, task: Any, thread: Any) -> tuple[Any, Any, Any, Any]:
        """Columns and rows of a task, each from and to."""
        b, given = self.b, self.given
        self.base = b.at(given["scratch"], b.mul(thread, given["room"]), BYTE)
        chunk, block = b.srem(task, given["chunks"]), b.sdiv(task, given["chunks"])
        column, row = b.mul(block, given["columns"]), b.mul(chunk, given["chunk"])
        stop = b.minimum_int(b.add(column, given["columns"]), given["outputs"])
        return column, stop, row, b.minimum_int(b.add(row, given["chunk"]), given["rows"])

    def _many(self, task: Any, thread: Any) -> None:
        b, given, lanes = self.b, self.given, self.level.lanes
        column, stop, row, end = self._bounds(task, thread)
        panels = b.at(self.base, self.sums_bytes, BYTE)
        size = b.mul(given["inputs"], 2 * lanes)

        def panel(at: Any) -> Any:
            return b.at(panels, b.mul(b.sdiv(b.sub(at, column), 2 * lanes), size), self.unit)

        def lay_out(at: Any) -> None:
            place = b.at(panel(at), b.and_(b.sub(at, column), lanes), self.unit)
            if self.turned:
                b.loop(0, given["inputs"], 1, lambda u: self._lay_out_turned(at, u, place))
                return
            rows = [self._row("weight", b.add(at, i)) for i in range(lanes)]
            ahead = b.mul(given["weight_row"], lanes)
            b.lay_out(rows, given["inputs"], self.unit, place, ahead, narrowing=self.wide)

        b.loop(column, stop, lanes, lay_out)

        def tile(first: Any) -> None:
            rows = self._rows("x", first, end)

            def some_columns(at: Any) -> None:
                with b.if_then(b.is_not_null(given["residual"])):
                    self._fetch_residual(first, end, at)
                self._panel(rows, panel(at), [self._nothing()] * 2)
                self._finish(first, end, at, b.minimum_int(b.sub(stop, at), 2 * lanes))

            b.loop(column, stop, 2 * lanes, some_columns)

        b.loop(row, end, self.height, tile)

    def _round(self, thread: Any) -> None:
        """Quantise all rows to a thread's own memory, from which its tasks read."""
        b, given = self.b, self.given
        x, x_row, units = given["x"], given["x_row"], given["inputs"]
        place = b.at(given["scratch"], b.add(b.mul(thread, given["room"]), self.sums_bytes), BYTE)
        given["x"], given["x_row"] = place, units
        given["steps"] = b.at(place, b.mul(given["rows"], units), INT32)
        assert self.rounded is not None
        how, channels = self.rounded, b.shl(units, _SHIFT["int8"])
        element = BF16 if how.half else FP32

        def row(i: Any) -> None:
            of_row = b.at(x, b.mul(i, x_row), element)
            step = _round_row(b, how, of_row, channels, b.at(place, b.mul(i, units), INT32))
            b.store(step, b.at(given["steps"], i, FP32))

        b.loop(0, given["rows"], 1, row)

    def _bytes(self, task: Any, thread: Any) -> None:
        b, given, lanes = self.b, self.given, self.level.lanes
        column, stop, row, end = self._bounds(task, thread)
        shifts = given["weight_sums"]

        def all_of(height: int) -> None:
            def tile(first: Any) -> None:
                rows = self._rows("x", first, end, height)

                def some_columns(at: Any) -> None:
                    panel = b.at(given["weight"], b.mul(at, given["inputs"]), self.unit)
                    # Sums begin with what the byte that stands for 0 adds to them.
                    starts = [
                        b.read(b.at(shifts, b.add(at, n * lanes), INT32), INT32) for n in range(2)
                    ]
                    zero = b.broadcast(b.trunc(given["zero"], INT32))
                    self._panel(
                        rows, panel, [b.neg(b.mul(start, zero)) for start in starts], _AHEAD
                    )
                    self._finish(first, end, at, b.minimum_int(b.sub(stop, at), 2 * lanes), height)

                b.loop(column, stop, 2 * lanes, some_columns)

            b.loop(row, end, height, tile)

        b.heights(self.height, b.sub(end, row), all_of)

    def _panel(self, rows: Values, panel: Any, starts: Values, ahead: int = 0) -> None:
        """The sums of a tile of rows and the columns of a panel, of which two vectors are what they begin with."""
        b, lanes, terms = self.b, self.level.lanes, self.given["inputs"]
        sums = b.tile(rows, 2, panel, 2 * lanes, terms, self.unit, self._add, starts, ahead=ahead)
        for i, value in enumerate(sums):
            b.write(value, b.at(self.base, i * lanes, self.summed))

    def _fetch_residual(self, first: Any, end: Any, column: Any) -> None:
        """Prefetch the residual of a tile during its GEMM."""
        b, last = self.b, self.b.sub(end, 1)
        for i in range(self.height):
            row = b.mul(b.minimum_int(b.add(first, i), last), self.given["residual_row"])
            place = b.at(self.given["residual"], b.add(row, column), self.element)
            for channel in range(0, 2 * self.level.lanes, 64 // (2 if self.half else 4)):
                b.prefetch(b.at(place, channel, self.element))

    def _lay_out_turned(self, column: Any, unit: Any, place: Any) -> None:
        """A vector of columns, of one row of the weight in fp32, of two in turn in bf16; rows times their factors."""
        b, lanes, given = self.b, self.level.lanes, self.given
        into = b.at(place, b.mul(unit, 2 * lanes), self.unit)
        element = FP32 if self.kind == "fp32" or self.wide else BF16

        def scaled(row: Any) -> Any:
            at = b.at(given["weight"], b.add(b.mul(row, given["weight_row"]), column), element)
            factor = b.where(
                b.is_not_null(given["scales"]),
                lambda: b.load(b.at(given["scales"], row, FP32), typ=FP32),
                ir.Constant(FP32, 1.0),
            )
            return b.fmul(b.load_fp32(at, element), b.broadcast(factor))

        if self.kind == "fp32":
            b.write(scaled(unit), into)
            return
        first = b.shl(unit, 1)
        rows = [
            b.bitcast(b.fp32_to_bf16(scaled(b.add(first, n))), b.vector(INT16)) for n in range(2)
        ]
        b.write(b.interleave(*rows), into)

    def _few(self, task: Any, thread: Any) -> None:
        b, lanes = self.b, self.level.lanes
        column, stop, row, end = self._bounds(task, thread)

        def all_of(height: int, width: int) -> None:
            def tile(first: Any) -> None:
                rows = self._rows("x", first, end, height)

                def some_terms(start: Any) -> None:
                    terms = start, b.minimum_int(b.add(start, _TERMS), self.given["inputs"])
                    b.loop(
                        column,
                        stop,
                        width,
                        lambda at: self._dots(rows, at, b.sub(at, column), terms, width),
                    )

                b.loop(0, self.given["inputs"], _TERMS, some_terms)
                self._finish(first, end, column, b.sub(stop, column), height)

            b.loop(row, end, height, tile)

        most, width = _ONE_TILE[lanes]
        rows = b.sub(end, row)
        with b.if_else(b.icmp_signed("<=", rows, most)) as (one, several):
            with one:
                b.heights(most, rows, lambda height: all_of(height, width))
            with several:
                all_of(*_FEW_TILES[lanes])

    def _dots(
        self, rows: Values, column: Any, place: Any, terms: tuple[Any, Any], width: int
    ) -> None:
        """Some terms of the dot products of rows with rows of the weight, with the next ones prefetched."""
        b, lanes, given = self.b, self.level.lanes, self.given
        weights = [self._row("weight", b.add(column, n)) for n in range(width)]
        ahead = b.mul(given["weight_row"], width)

        def term(u: Any, *sums: Any) -> Values:
            places = [b.at(weight, u, self.unit) for weight in weights]
            for at in places:
                b.prefetch(b.at(at, ahead, self.unit))
            columns, found = [b.read(at, self.unit) for at in places], []
            for i, row in enumerate(rows):
                x = b.read(b.at(row, u, self.unit), self.unit)
                found += [self._add(x, columns[n], sums[width * i + n]) for n in range(width)]
            return found

        sums = b.loop(*terms, lanes, term, *[self._nothing()] * (width * len(rows)))
        sums += [self._nothing()] * (-len(sums) % lanes)
        later = b.icmp_signed(">", terms[0], 0)
        for start in range(0, len(sums), lanes):
            whole = b.sums(sums[start : start + lanes])
            for i in range(start // width, min((start + lanes) // width, len(rows))):
                first = i * width - start
                some = b.shuffle(whole, whole, range(first, first + width))
                into = b.at(self.base, b.add(place, i * self.columns), self.summed)
                b.write(
                    b.where(
                        later,
                        lambda x=some, at=into: b.fadd(x, b.read(at, self.summed, width)),
                        some,
                    ),
                    into,
                )

    def _add(self, x: Any, y: Any, z: Any) -> Any:
        b = self.b
        return {"fp32": b.multiply_add, "bf16": b.dot_bf16, "int8": b.dot_int8}[self.kind](x, y, z)

    def _nothing(self) -> Any:
        return self.b.splat(0, self.summed)

    def _row(self, name: str, number: Any) -> Any:
        """The address of a row."""
        b = self.b
        return b.at(self.given[name], b.mul(number, self.given[f"{name}_row"]), self.unit)

    def _rows(self, name: str, first: Any, end: Any, height: int = 0) -> Values:
        """Addresses of the rows of a tile, of which the last is repeated where there are no more."""
        b, last = self.b, self.b.sub(end, 1)
        return [
            self._row(name, b.minimum_int(b.add(first, i), last))
            for i in range(height or self.height)
        ]

    def _finish(self, first: Any, end: Any, column: Any, columns: Any, height: int = 0) -> None:
        """Bias, GELU, LayerScale and residual for the sums of a tile, and the result to its place."""
        b, given, lanes = self.b, self.given, self.level.lanes
        rows = b.minimum_int(b.sub(end, first), height or self.height)

        def row(i: Any) -> None:
            number = b.add(first, i)
            sums = b.at(self.base, b.mul(i, self.columns), self.summed)
            out = b.at(given["out"], b.add(b.mul(number, given["out_row"]), column), self.element)
            residual = b.at(
                given["residual"], b.add(b.mul(number, given["residual_row"]), column), self.element
            )
            # That of bytes is always in fp32.
            bias = b.at(given["bias"], column, FP32 if self.kind == "int8" else self.element)
            gamma = b.at(given["gamma"], column, self.element)

            def vector(n: Any) -> None:
                def read(base: Any, element: Any = self.element) -> Any:
                    return b.load_fp32(b.at(base, n, element), element)

                found = b.read(b.at(sums, n, self.summed), self.summed)
                if self.kind == "int8":
                    nothing = b.splat(0.0)
                    added = b.where(
                        b.is_not_null(given["bias"]),
                        lambda: b.read(b.at(bias, n, FP32), FP32),
                        nothing,
                    )
                    found = self._rescaled(found, number, b.add(column, n), added)
                else:
                    found = b.where(
                        b.is_not_null(given["bias"]), lambda x=found: b.fadd(x, read(bias)), found
                    )
                active = b.icmp_signed("!=", given["gelu"], 0)
                found = b.where(active, lambda x=found: self._gelu(x), found)
                found = b.where(
                    b.is_not_null(given["gamma"]), lambda x=found: b.fmul(x, read(gamma)), found
                )
                found = b.where(
                    b.is_not_null(given["residual"]),
                    lambda x=found: b.fadd(x, read(residual)),
                    found,
                )
                b.write(b.fp32_to_bf16(found) if self.half else found, b.at(out, n, self.element))

            b.loop(0, columns, lanes, vector)

        b.loop(0, rows, 1, row)

    def _rescaled(self, sums: Any, row: Any, column: Any, bias: Any) -> Any:
        """Sums of int8 products in fp32, with the bias."""
        b, given = self.b, self.given
        step = b.broadcast(b.load(b.at(given["steps"], row, FP32), typ=FP32))
        scaled = b.fmul(
            b.sitofp(sums, b.vector(FP32)), b.read(b.at(given["scales"], column, FP32), FP32)
        )
        return b.multiply_add(scaled, step, bias)

    def _gelu(self, x: Any) -> Any:
        """`x Φ(x)`, of which `Φ(x) - 1/2` is `x` times a polynomial of `x²`."""
        b = self.b
        edge, degree = _ROUNDED if self.half or self.kind == "int8" else _EXACT
        above = b.maximum(x, b.splat(-edge))
        inside = b.minimum(above, b.splat(edge))
        u = b.multiply_add(b.fmul(inside, inside), b.splat(2 / edge**2), b.splat(-1.0))
        quotient = b.polynomial(u, coefficients(_quotient(edge), degree))
        product = b.fmul(above, b.multiply_add(inside, quotient, b.splat(0.5)))
        # -inf · 0 is no number, here as in PyTorch; all else stays what it is.
        nothing = b.splat(0.0)
        return b.multiply_add(b.minimum(x, nothing), nothing, product)


class _LinearOfFewRows(_Linear):
    name, few = "linear_of_few_rows", True


@cache
def _quotient(edge: float) -> Callable[[np.ndarray], np.ndarray]:
    """`(Φ(x) - 1/2) / x`, of `2 x² / edge² - 1`."""

    def quotient(u: np.ndarray) -> np.ndarray:
        x = np.sqrt(np.maximum((u + 1) / 2, 1e-12)) * edge
        return (torch.special.ndtr(torch.from_numpy(x)).numpy() - 0.5) / x

    return quotient


class Rounded(NamedTuple):
    """Quantisation of rows, as in the reference's `as_int8`; `half`: rows and steps in bf16, `gelu`: GELU rows."""

    half: bool
    gelu: bool


def _round_row(
    b: Builder, how: Rounded, x: Any, inputs: Any, out: Any, half_step: bool | None = None
) -> Any:
    """Quantise a row of this many channels to uint8, and return its step in fp32."""
    half_step = how.half if half_step is None else half_step
    lanes, element = b.lanes, BF16 if how.half else FP32
    # Magnitudes compare like their bits, and NaN is the largest: then the step is NaN too.
    magnitude = b.splat(0x7FFFFFFF, INT32)

    def largest_of(most: Any, found: Any) -> Any:
        return b.select(b.icmp_signed("<", most, found), found, most)

    def larger(i: Any, most: Any) -> Any:
        found = b.bitcast(b.load_fp32(b.at(x, i, element), element), b.vector(INT32))
        return largest_of(most, b.and_(found, magnitude))

    most = _by_fours(b, inputs, larger, largest_of, b.splat(0, INT32))
    largest = b.intrinsic(f"llvm.vector.reduce.smax.v{lanes}i32", INT32, most)
    step = _step(b, how.gelu, half_step, b.bitcast(b.broadcast(largest), b.vector(FP32)))
    inverse = b.fdiv(b.splat(1.0), step)
    shift = b.splat(NO_FRACTIONS + (GELU_ZERO_BYTE if how.gelu else ZERO_BYTE))

    def levels(i: Any) -> None:
        value = b.load_fp32(b.at(x, i, element), element)
        rounded = b.bitcast(b.multiply_add(value, inverse, shift), b.vector(INT32))
        b.write(b.trunc(rounded, b.vector(BYTE)), b.at(out, i, BYTE))

    b.loop(0, inputs, lanes, levels)
    return b.extract_element(step, ir.Constant(INT32, 0))


def _by_fours(
    b: Builder,
    inputs: Any,
    of_vector: Callable[[Any, Any], Any],
    of_two: Callable[[Any, Any], Any],
    start: Any,
) -> Any:
    """A row folded into one vector, by four that do not wait for each other; as many channels as rows in bytes have."""

    def fold(i: Any, *held: Any) -> Values:
        return [of_vector(b.add(i, n * b.lanes), one) for n, one in enumerate(held)]

    first, second, third, last = b.loop(0, inputs, 4 * b.lanes, fold, *[start] * 4)
    return of_two(of_two(first, second), of_two(third, last))


def _step(b: Builder, gelu: bool, half: bool, largest: Any) -> Any:
    if gelu:
        # A magnitude that is of a negative value is too small to count.
        step = b.maximum(b.fdiv(largest, b.splat(223.0)), b.splat(float(np.float32(0.17 / 32))))
    else:
        step = b.fdiv(b.maximum(largest, b.splat(float(np.float32(1e-30)))), b.splat(127.0))
    if not half:
        return step
    # Rounded down, it would leave the largest value without a level.
    wide = b.fmul(step, b.splat(1 + torch.finfo(torch.bfloat16).eps / 2))
    return b.bf16_to_fp32(b.bitcast(b.fp32_to_bf16(wide), b.vector(INT16)))


Norm = tuple[Tensor, Tensor, float]
"""Weight and bias of a LayerNorm, in the type of what it normalises, and its eps."""


class _Bytes:
    """Writes the kernel that quantises rows, or their LayerNorm, to uint8."""

    name = "bytes"

    def __init__(self, how: Rounded, normed: bool, level: Level) -> None:
        self.how, self.normed, self.element = how, normed, BF16 if how.half else FP32
        pointers = ("x", "out", "steps", "weight", "bias", "scratch")
        self.b = Builder(
            self.name, pointers, ("x_row", "rows", "inputs", "chunk", "eps", "room"), level
        )
        self.b.tasks(self._some_rows)

    def _some_rows(self, task: Any, thread: Any) -> None:
        b, given = self.b, self.b.given
        first = b.mul(task, given["chunk"])

        def row(i: Any) -> None:
            how, x = self.how, b.at(given["x"], b.mul(i, given["x_row"]), self.element)
            out = b.at(given["out"], b.mul(i, given["inputs"]), BYTE)
            if self.normed:
                place = b.at(given["scratch"], b.mul(thread, given["room"]), BYTE)
                self._norm(x, place)
                how, x = how._replace(half=False), place
            step = _round_row(b, how, x, given["inputs"], out, half_step=self.how.half)
            b.store(step, b.at(given["steps"], i, FP32))

        b.loop(first, b.minimum_int(b.add(first, given["chunk"]), given["rows"]), 1, row)

    def _norm(self, x: Any, place: Any) -> None:
        """LayerNorm of a row, in fp32."""
        b, given, lanes = self.b, self.b.given, self.b.lanes
        count = b.uitofp(given["inputs"], FP32)

        def read(base: Any, i: Any) -> Any:
            return b.load_fp32(b.at(base, i, self.element), self.element)

        def summed(of_vector: Callable[[Any, Any], Any]) -> Any:
            return b.reduce_add(_by_fours(b, given["inputs"], of_vector, b.fadd, b.splat(0.0)))

        mean = b.broadcast(b.fdiv(summed(lambda i, sums: b.fadd(sums, read(x, i))), count))

        def squares(i: Any, sums: Any) -> Any:
            off = b.fsub(read(x, i), mean)
            return b.multiply_add(off, off, sums)

        eps = b.bitcast(b.trunc(given["eps"], INT32), FP32)
        deviation = b.intrinsic("llvm.sqrt.f32", FP32, b.fadd(b.fdiv(summed(squares), count), eps))
        inverse = b.broadcast(b.fdiv(ir.Constant(FP32, 1.0), deviation))

        def normalised(i: Any) -> None:
            scaled = b.fmul(b.fsub(read(x, i), mean), inverse)
            b.write(
                b.multiply_add(scaled, read(given["weight"], i), read(given["bias"], i)),
                b.at(place, i, FP32),
            )

        b.loop(0, given["inputs"], lanes, normalised)


def _height(kind: Kind, few: bool, level: Level) -> int:
    """Rows of the highest tile."""
    return _ONE_TILE[level.lanes][0] if few or kind == "int8" else level.rows


def _columns(kind: Kind, few: bool, level: Level) -> int:
    """Columns per task: their sums stay in registers until the epilogue."""
    return _FEW_COLUMNS if few and kind != "int8" else 2 * level.lanes


def takes(x: Tensor, weight: Tensor, *others: Tensor | None, turned: bool = False) -> bool:
    """Whether a kernel exists for x `[n, K]`, a weight `[M, K]` (`turned`: `[K, M]`) and the other operands."""
    rows = [t for t in (x, weight, *others) if t is not None]
    inputs, outputs = weight.shape if turned else weight.shape[::-1]
    wide = weight.dtype == torch.float32
    return (
        fits(outputs, inputs, x.dtype)
        and all(t.dtype == x.dtype or (t is weight and wide) for t in rows)
        and all(t.layout == torch.strided and t.stride(-1) == 1 for t in rows)
        and (
            x.dtype == torch.float32
            or (x.stride(0) % 2 == 0 and (wide or weight.stride(0) % 2 == 0))
        )
    )


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
    out: Tensor | None = None,
    few: bool | None = None,
    level: Level | None = None,
) -> Tensor:
    """`residual + gamma · (x W^T + b)` for x `[n, K]`, weight `[M, K]`, or its GELU, written to `out` `[n, M]`.

    A `turned` weight is `[K, M]`, its rows times `factors` `[K]` in fp32. All operands have one dtype, as in `takes`; a
    weight may be fp32 with bf16 operands. `few` and `level` select a kernel instead of the fastest.
    """
    out = torch.empty(x.shape[0], weight.shape[turned], dtype=x.dtype) if out is None else out
    kind: Kind = "bf16" if x.dtype == torch.bfloat16 else "fp32"
    few = False if turned else x.shape[0] < _FEW if few is None else few
    if few and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    scales = (0, 0 if factors is None else factors.data_ptr(), 0, 0)
    return _run(
        kind, x, weight, (bias, gamma, residual), out, few, level, scales, gelu=gelu, turned=turned
    )


class Panels(NamedTuple):
    """An int8 weight `[M, K]`: `levels` `[⌈M / 2 lanes⌉, K / 4, 2 lanes]`, four per int32, in the order of the GEMM.

    Per channel, `steps` `[M]` in fp32 and `sums` of its levels `[⌈M / 2 lanes⌉ · 2 lanes]` in int32.
    """

    levels: Tensor
    steps: Tensor
    sums: Tensor


def in_panels(rows: Tensor, steps: Tensor) -> Panels:
    """A weight of signed levels `[M, K]`, with the step between two of each row, `[M]`."""
    fours, wide = rows.view(torch.int32), 2 * levels()[0].lanes
    missing = -len(fours) % wide
    panels = F.pad(fours, (0, 0, 0, missing)).view(-1, wide, fours.shape[1])
    return Panels(
        panels.transpose(1, 2).contiguous(),
        steps,
        F.pad(rows.sum(1, dtype=torch.int32), (0, missing)),
    )


def int8_rows(x: Tensor, *, gelu: bool = False, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
    """Quantise rows `[n, K]` in fp32 or bf16, after `norm`: uint8 in scratch memory, and the step of each row."""
    (rows, inputs), threads, level = x.shape, torch.get_num_threads(), levels()[0]
    made, steps = scratch("compiled bytes", (rows, inputs), torch.uint8), torch.empty(rows)
    chunk = max(1, -(-rows // (_TASKS_PER_THREAD * threads)))
    run = kernel(_Bytes, Rounded(x.dtype == torch.bfloat16, gelu), norm is not None, level)
    around, room = (0, 0, 0, 0), 0
    if norm is not None:
        weight, bias, eps = (
            norm[0].contiguous(),
            norm[1].contiguous(),
            int(np.float32(norm[2]).view(np.int32)),
        )
        room = whole_pages(4 * inputs)
        around = (
            weight.data_ptr(),
            bias.data_ptr(),
            scratch_address("compiled norm", room * threads),
            eps,
        )
    pointers = (x.data_ptr(), made.data_ptr(), steps.data_ptr(), *around[:3])
    run((*pointers, x.stride(0), rows, inputs, chunk, around[3], room), -(-rows // chunk), threads)
    return made, steps


def int8_linear(
    x: Tensor,
    weight: Panels,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    gelu: bool = False,
    of_gelu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    """`residual + norm(x) W^T + b`, or its GELU, written to `out`; residual and out `[n, M]` both fp32 or both bf16.

    x is `[n, K]` in fp32 or bf16, K a multiple of the lanes times four, M one of the lanes; the bias `[M]` is fp32.
    """
    if not out.numel():
        return out
    rows, rounded, steps, zero = x, None, 0, GELU_ZERO_BYTE if of_gelu else ZERO_BYTE
    if norm is not None or len(x) >= _FEW:
        rows, of_rows = int8_rows(x, gelu=of_gelu, norm=norm)
        steps = of_rows.data_ptr()
    else:
        rounded = Rounded(x.dtype == torch.bfloat16, of_gelu)
    others, factors = (
        (bias, None, residual),
        (steps, weight.steps.data_ptr(), weight.sums.data_ptr(), zero),
    )
    return _run(
        "int8",
        rows,
        weight.levels,
        others,
        out,
        rounded is not None,
        None,
        factors,
        rounded,
        gelu=gelu,
    )


def _run(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    others: tuple[Tensor | None, Tensor | None, Tensor | None],
    out: Tensor,
    few: bool | None,
    level: Level | None,
    factors: tuple[int, int, int, int] = (0, 0, 0, 0),
    rounded: Rounded | None = None,
    *,
    gelu: bool,
    turned: bool = False,
) -> Tensor:
    """The product of factors of a kind with bias, gamma and residual."""
    level, half, threads = (
        level or levels()[0],
        out.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    (rows, inputs), outputs = x.shape, out.shape[1]
    if not out.numel():
        return out
    few = rows < _FEW if few is None else few
    wide = kind == "bf16" and weight.dtype == torch.float32
    run = kernel(_LinearOfFewRows if few else _Linear, kind, half, turned, rounded, wide, level)
    room, chunks, chunk = 4 * _height(kind, few, level) * _columns(kind, few, level), 1, rows
    columns = 2 * level.lanes if kind == "int8" else _FEW_COLUMNS
    if rounded is not None:
        room += rows * (inputs + 4)
    if not few:
        panel = 2 * level.lanes * inputs * x.element_size()
        panels = max(1, min(_PANELS_BYTES // panel, _MOST_PANELS))
        columns = panels * 2 * level.lanes
        room += 0 if kind == "int8" else panels * panel
        chunk, chunks = divided(
            rows, -(-_TASKS_PER_THREAD * threads // -(-outputs // columns)), _CHUNK
        )
    room = whole_pages(room)
    place = scratch_address("compiled linear", room * threads)
    addresses = (0 if t is None else t.data_ptr() for t in (x, weight, *others, out))
    residual = others[2]
    strides = (
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
    )
    numbers = (*strides, rows, inputs, outputs, columns, chunk, chunks, room, int(gelu), factors[3])
    run((*addresses, place, *factors[:3], *numbers), -(-outputs // columns) * chunks, threads)
    return out
