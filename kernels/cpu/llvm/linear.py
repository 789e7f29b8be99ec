"""Linear layers: products of which each tile stays in registers until GELU, LayerScale and residual are applied.

There are two kernels. Of many rows, a task is some columns of the result: their weights are laid out once, in panels of
two vectors, and every tile of rows goes through all of them. Of few rows laying out would take longer than the product,
so weights are read where they lie, once, and the dot products of a few columns are summed across at their end. Neither
keeps a copy of the weights. Both multiply fp32, pairs in bf16, or fours of bytes, which another kernel rounds rows to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import llvmlite.ir as ir
import numpy as np
import torch
from torch import Tensor

from ...limits import GELU_ZERO_BYTE, NO_FRACTIONS, ZERO_BYTE
from ..workspace import scratch
from . import Level, fits, levels
from .builder import (
    BF16,
    BYTE,
    FP32,
    INT16,
    INT32,
    Builder,
    Kernel,
    Values,
    coefficients,
    divided,
    scratch_address,
    whole_pages,
)

# Below these rows weights are not laid out; those in bytes are laid out as soon as one tile does not hold all rows.
_FEW = {"fp32": 64, "bf16": 64, "int8": 15}
# Rows and columns of tiles of few rows, by lanes: their sums and operands fill the registers. If the rows fit into one
# tile, what comes from memory is multiplied at once; of more rows, tiles leave room in the cache for each other.
_ONE_TILE = {16: (14, 2), 8: (6, 2)}
_FEW_TILES = {16: (7, 4), 8: (6, 2)}
_FEW_COLUMNS = 64
# 32-bit units of a row that are multiplied before the next columns are, so that all rows of a tile stay in the first
# level of cache.
_TERMS = 768
# Bytes of laid out weights, which share the second level of cache with rows on their way through.
_PANELS_BYTES = 400 << 10
_MOST_PANELS = 4
# Rows of a chunk, where columns are too few to keep all threads busy.
_CHUNK = 96
_TASKS_PER_THREAD = 3
# Beyond an edge the normal distribution is taken for 0 or 1; its polynomial up to there has a degree. GELU misses by 8
# units of 10⁻⁷ in fp32, and by less than rounding does where its result is bf16.
_EDGE, _DEGREE = {False: 5.5, True: 5.0}, {False: 14, True: 12}
Kind = Literal["fp32", "bf16", "int8"]
# By which power of two there are fewer units than channels.
_SHIFT: dict[Kind, int] = {"fp32": 0, "bf16": 1, "int8": 2}

_POINTERS = ("x", "weight", "bias", "gamma", "residual", "out", "scratch", "steps", "scales", "weight_sums")
_NUMBERS = ("x_row", "weight_row", "residual_row", "out_row", "rows", "inputs", "outputs", "columns", "chunk")
_NUMBERS += ("chunks", "room", "gelu", "zero")


class _Linear:
    """Writes a kernel.

    Args:
        kind: of the factors: fp32, bf16 or int8.
        half: whether the result, and what is added to it, is bf16 instead of fp32.
        few: the one of few rows.
        turned: the one whose weight is `[K, M]`; of many rows, and not of bytes.
        level: of the processor.
    """

    def __init__(self, kind: Kind, half: bool, few: bool, turned: bool, level: Level) -> None:
        self.kind, self.half, self.level, self.turned = kind, half, level, turned
        # Rows are read as channels in fp32, pairs of them in bf16 and fours of them in bytes, 32 bits each.
        self.unit, self.element = FP32 if kind == "fp32" else INT32, BF16 if half else FP32
        self.summed = INT32 if kind == "int8" else FP32
        self.b = b = Builder("linear_of_few_rows" if few else "linear", _POINTERS, _NUMBERS, level)
        self.given = given = b.given
        self.height, self.columns = _height(few, level), _columns(few, level)
        self.sums_bytes = 4 * self.height * self.columns
        for name in ("x_row", "inputs") if turned else ("x_row", "weight_row", "inputs"):
            given[name] = b.ashr(given[name], b.number(_SHIFT[kind]))
        b.tasks(self._few if few else self._many)

    def _bounds(self, task: Any, thread: Any) -> tuple[Any, Any, Any, Any]:
        """Columns and rows of a task, each from and to."""
        b, given = self.b, self.given
        self.base = b.at(given["scratch"], b.mul(thread, given["room"]), BYTE)
        chunk, block = b.srem(task, given["chunks"]), b.sdiv(task, given["chunks"])
        column, row = b.mul(block, given["columns"]), b.mul(chunk, given["chunk"])
        stop = b.least(b.add(column, given["columns"]), given["outputs"])
        return column, stop, row, b.least(b.add(row, given["chunk"]), given["rows"])

    def _many(self, task: Any, thread: Any) -> None:
        b, given, lanes = self.b, self.given, self.level.lanes
        column, stop, row, end = self._bounds(task, thread)
        panels = b.at(self.base, self.sums_bytes, BYTE)
        size = b.mul(given["inputs"], b.number(2 * lanes))

        def panel(at: Any) -> Any:
            return b.at(panels, b.mul(b.sdiv(b.sub(at, column), b.number(2 * lanes)), size), self.unit)

        def lay_out(at: Any) -> None:
            place = b.at(panel(at), b.and_(b.sub(at, column), b.number(lanes)), self.unit)
            if self.turned:
                b.loop(0, given["inputs"], 1, lambda u: self._lay_out_turned(at, u, place))
                return
            rows = [self._row("weight", b.add(at, b.number(i))) for i in range(lanes)]
            b.lay_out(rows, given["inputs"], self.unit, place, b.mul(given["weight_row"], b.number(lanes)))

        b.loop(column, stop, lanes, lay_out)

        def tile(first: Any) -> None:
            rows = self._rows("x", first, end)

            def some_columns(at: Any) -> None:
                with b.if_then(b.there(given["residual"])):
                    self._fetch_residual(first, end, at)
                sums = b.tile(rows, 2, panel(at), 2 * lanes, given["inputs"], self.unit, self._add, self._nothing())
                for i, value in enumerate(sums):
                    b.write(value, b.at(self.base, i * lanes, self.summed))
                self._finish(first, end, at, b.least(b.sub(stop, at), 2 * lanes))

            b.loop(column, stop, 2 * lanes, some_columns)

        b.loop(row, end, self.height, tile)

    def _fetch_residual(self, first: Any, end: Any, column: Any) -> None:
        """Have what is added to a tile on its way while its products are summed."""
        b, last = self.b, self.b.sub(end, self.b.number(1))
        for i in range(self.height):
            row = b.mul(b.least(b.add(first, b.number(i)), last), self.given["residual_row"])
            place = b.at(self.given["residual"], b.add(row, column), self.element)
            for channel in range(0, 2 * self.level.lanes, 64 // (2 if self.half else 4)):
                b.fetch(b.at(place, channel, self.element))

    def _lay_out_turned(self, column: Any, unit: Any, place: Any) -> None:
        """A vector of columns, of one row of the weight in fp32, of two in turn in bf16."""
        b, lanes, row = self.b, self.level.lanes, self.given["weight_row"]
        into = b.at(place, b.mul(unit, b.number(2 * lanes)), self.unit)
        if self.kind == "fp32":
            b.write(b.read(b.at(self.given["weight"], b.add(b.mul(unit, row), column), FP32), FP32), into)
            return
        first = b.at(self.given["weight"], b.add(b.mul(b.shl(unit, b.number(1)), row), column), INT16)
        b.write(b.alternated(b.read(first, INT16), b.read(b.at(first, row, INT16), INT16)), into)

    def _few(self, task: Any, thread: Any) -> None:
        b, lanes = self.b, self.level.lanes
        column, stop, row, end = self._bounds(task, thread)

        def all_of(height: int, width: int) -> None:
            def tile(first: Any) -> None:
                rows = self._rows("x", first, end, height)

                def some_terms(start: Any) -> None:
                    terms = start, b.least(b.add(start, b.number(_TERMS)), self.given["inputs"])
                    b.loop(column, stop, width, lambda at: self._dots(rows, at, b.sub(at, column), terms, width))

                b.loop(0, self.given["inputs"], _TERMS, some_terms)
                self._finish(first, end, column, b.sub(stop, column), height)

            b.loop(row, end, height, tile)

        most, width = _ONE_TILE[lanes]
        rows = b.sub(end, row)
        with b.if_else(b.icmp_signed("<=", rows, b.number(most))) as (one, several):
            with one:
                b.heights(most, rows, lambda height: all_of(height, width))
            with several:
                all_of(*_FEW_TILES[lanes])

    def _dots(self, rows: Values, column: Any, place: Any, terms: tuple[Any, Any], width: int) -> None:
        """Some terms of the dot products of rows with rows of the weight, while the next of these are on their way."""
        b, lanes, given = self.b, self.level.lanes, self.given
        weights = [self._row("weight", b.add(column, b.number(n))) for n in range(width)]
        ahead = b.mul(given["weight_row"], b.number(width))

        def term(u: Any, *sums: Any) -> Values:
            places = [b.at(weight, u, self.unit) for weight in weights]
            for at in places:
                b.fetch(b.at(at, ahead, self.unit))
            columns, found = [b.read(at, self.unit) for at in places], []
            for i, row in enumerate(rows):
                x = b.read(b.at(row, u, self.unit), self.unit)
                found += [self._add(x, columns[n], sums[width * i + n]) for n in range(width)]
            return found

        sums = b.loop(*terms, lanes, term, *[self._nothing()] * (width * len(rows)))
        sums += [self._nothing()] * (-len(sums) % lanes)
        add = b.add if self.kind == "int8" else b.fadd
        later = b.icmp_signed(">", terms[0], b.number(0))
        for start in range(0, len(sums), lanes):
            whole = b.sums(sums[start : start + lanes])
            for i in range(start // width, min((start + lanes) // width, len(rows))):
                first = i * width - start
                some = b.picked(whole, whole, range(first, first + width))
                into = b.at(self.base, b.add(place, b.number(i * self.columns)), self.summed)
                b.write(b.where(later, lambda x=some, at=into: add(x, b.read(at, self.summed, width)), some), into)

    def _add(self, x: Any, y: Any, z: Any) -> Any:
        b = self.b
        return {"fp32": b.multiply_add, "bf16": b.dot_add, "int8": b.bytes_add}[self.kind](x, y, z)

    def _nothing(self) -> Any:
        return self.b.filled(0, self.summed)

    def _row(self, name: str, number: Any) -> Any:
        """The address of a row."""
        b = self.b
        return b.at(self.given[name], b.mul(number, self.given[f"{name}_row"]), self.unit)

    def _rows(self, name: str, first: Any, end: Any, height: int = 0) -> Values:
        """Addresses of the rows of a tile, of which the last is repeated where there are no more."""
        b, last = self.b, self.b.sub(end, self.b.number(1))
        return [self._row(name, b.least(b.add(first, b.number(i)), last)) for i in range(height or self.height)]

    def _finish(self, first: Any, end: Any, column: Any, columns: Any, height: int = 0) -> None:
        """Bias, GELU, LayerScale and residual for the sums of a tile, and the result to its place."""
        b, given, lanes = self.b, self.given, self.level.lanes
        rows = b.least(b.sub(end, first), height or self.height)

        def row(i: Any) -> None:
            number = b.add(first, i)
            sums = b.at(self.base, b.mul(i, b.number(self.columns)), self.summed)
            out = b.at(given["out"], b.add(b.mul(number, given["out_row"]), column), self.element)
            residual = b.at(given["residual"], b.add(b.mul(number, given["residual_row"]), column), self.element)
            of_bias = FP32 if self.kind == "int8" else self.element
            bias, gamma = b.at(given["bias"], column, of_bias), b.at(given["gamma"], column, self.element)

            def vector(n: Any) -> None:
                def read(base: Any, element: Any = self.element) -> Any:
                    return b.widened(b.at(base, n, element), element)

                found = b.read(b.at(sums, n, self.summed), self.summed)
                if self.kind == "int8":
                    found = self._rescaled(found, number, b.add(column, n))
                found = b.where(b.there(given["bias"]), lambda x=found: b.fadd(x, read(bias, of_bias)), found)
                active = b.icmp_signed("!=", given["gelu"], b.number(0))
                found = b.where(active, lambda x=found: self._gelu(x), found)
                found = b.where(b.there(given["gamma"]), lambda x=found: b.fmul(x, read(gamma)), found)
                found = b.where(b.there(given["residual"]), lambda x=found: b.fadd(x, read(residual)), found)
                b.write(b.narrowed(found) if self.half else found, b.at(out, n, self.element))

            b.loop(0, columns, lanes, vector)

        b.loop(0, rows, 1, row)

    def _rescaled(self, sums: Any, row: Any, column: Any) -> Any:
        """Sums of products of bytes, less what the byte that stands for 0 adds to them, in fp32."""
        b, given = self.b, self.given
        zero = b.spread(b.trunc(given["zero"], INT32))
        shift = b.mul(b.read(b.at(given["weight_sums"], column, INT32), INT32), zero)
        step = b.spread(b.load(b.at(given["steps"], row, FP32), typ=FP32))
        scaled = b.fmul(b.sitofp(b.sub(sums, shift), b.vector(FP32)), b.read(b.at(given["scales"], column, FP32), FP32))
        return b.fmul(scaled, step)

    def _gelu(self, x: Any) -> Any:
        """`x Φ(x)`, of which `Φ(x) - 1/2` is `x` times a polynomial of `x²`."""
        b, edge = self.b, _EDGE[self.half]
        above = b.larger(x, b.filled(-edge))
        inside = b.smaller(above, b.filled(edge))
        u = b.multiply_add(b.fmul(inside, inside), b.filled(2 / edge**2), b.filled(-1.0))
        quotient = b.polynomial(u, coefficients(_quotients(edge), _DEGREE[self.half]))
        return b.fmul(above, b.multiply_add(inside, quotient, b.filled(0.5)))


@cache
def _quotients(edge: float) -> Callable[[np.ndarray], np.ndarray]:
    """`(Φ(x) - 1/2) / x`, of `2 x² / edge² - 1`."""

    def quotient(u: np.ndarray) -> np.ndarray:
        x = np.sqrt(np.maximum((u + 1) / 2, 1e-12)) * edge
        return (torch.special.ndtr(torch.from_numpy(x)).numpy() - 0.5) / x

    return quotient


class _Bytes:
    """Writes the kernel that rounds rows to bytes: `as_int8` of the reference, which has the levels.

    Args:
        half: bf16 instead of fp32, the steps too.
        gelu: the rows are of a GELU.
        level: of the processor.
    """

    def __init__(self, half: bool, gelu: bool, level: Level) -> None:
        self.element, self.half, self.gelu = BF16 if half else FP32, half, gelu
        self.b = Builder("bytes", ("x", "out", "steps"), ("x_row", "rows", "inputs", "chunk"), level)
        self.b.tasks(self._some_rows)

    def _some_rows(self, task: Any, thread: Any) -> None:
        b, given = self.b, self.b.given
        first = b.mul(task, given["chunk"])
        b.loop(first, b.least(b.add(first, given["chunk"]), given["rows"]), 1, self._row)

    def _row(self, row: Any) -> None:
        b, given, lanes = self.b, self.b.given, self.b.lanes
        x = b.at(given["x"], b.mul(row, given["x_row"]), self.element)

        def larger(i: Any, most: Any) -> Values:
            found = b.widened(b.at(x, i, self.element), self.element)
            found = found if self.gelu else b.intrinsic(f"llvm.fabs.v{lanes}f32", found.type, found)
            return [b.larger(most, found)]

        (most,) = b.loop(0, given["inputs"], lanes, larger, b.filled(0.0))
        step = self._step(b.spread(b.largest(most)))
        b.store(b.extract_element(step, ir.Constant(INT32, 0)), b.at(given["steps"], row, FP32))
        inverse = b.fdiv(b.filled(1.0), step)
        shift = b.filled(NO_FRACTIONS + (GELU_ZERO_BYTE if self.gelu else ZERO_BYTE))
        out = b.at(given["out"], b.mul(row, given["inputs"]), BYTE)

        def levels(i: Any) -> None:
            value = b.widened(b.at(x, i, self.element), self.element)
            rounded = b.bitcast(b.multiply_add(value, inverse, shift), b.vector(INT32))
            b.write(b.trunc(rounded, b.vector(BYTE)), b.at(out, i, BYTE))

        b.loop(0, given["inputs"], lanes, levels)

    def _step(self, largest: Any) -> Any:
        b = self.b
        if self.gelu:
            step = b.larger(b.fdiv(largest, b.filled(223.0)), b.filled(float(np.float32(0.17 / 32))))
        else:
            step = b.fdiv(b.larger(largest, b.filled(float(np.float32(1e-30)))), b.filled(127.0))
        if not self.half:
            return step
        # Rounded down, it would leave the largest value without a level.
        wide = b.fmul(step, b.filled(1 + torch.finfo(torch.bfloat16).eps / 2))
        return b.raised(b.bitcast(b.narrowed(wide), b.vector(INT16)))


@cache
def _kernel(kind: Kind, half: bool, few: bool, turned: bool, level: Level) -> Kernel:
    def write() -> Builder:
        return _Linear(kind, half, few, turned, level).b

    return Kernel("linear_of_few_rows" if few else "linear", level, (kind, half, turned), __file__, write)


@cache
def _bytes_kernel(half: bool, gelu: bool, level: Level) -> Kernel:
    return Kernel("bytes", level, (half, gelu), __file__, lambda: _Bytes(half, gelu, level).b)


def _height(few: bool, level: Level) -> int:
    """Rows of the highest tile."""
    return _ONE_TILE[level.lanes][0] if few else level.rows


def _columns(few: bool, level: Level) -> int:
    """Columns whose sums are kept before what follows the product."""
    return _FEW_COLUMNS if few else 2 * level.lanes


def takes(x: Tensor, weight: Tensor, *others: Tensor | None, turned: bool = False) -> bool:
    """Whether there is a kernel for x `[n, K]` and a weight `[M, K]`, with what else goes into the result.

    Args:
        turned: the weight is `[K, M]`.
    """
    rows = [t for t in (x, weight, *others) if t is not None]
    inputs, outputs = weight.shape if turned else weight.shape[::-1]
    return (
        fits(outputs, inputs, x.dtype)
        and all(t.dtype == x.dtype and t.layout == torch.strided and t.stride(-1) == 1 for t in rows)
        and (x.dtype == torch.float32 or (x.stride(0) % 2 == 0 and weight.stride(0) % 2 == 0))
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
    out: Tensor | None = None,
    few: bool | None = None,
    level: Level | None = None,
) -> Tensor:
    """`residual + gamma · (x W^T + b)`, or of the product's GELU.

    Args:
        x: `[n, K]`; weight: `[M, K]`; bias, gamma: `[M]`; residual: `[n, M]`; all of one type, as in `takes`.
        turned: the weight is `[K, M]` and the product `x W`; of many rows.
        out: `[n, M]`, where the result is written.
        few: which kernel runs; by default what is quicker for so many rows.
        level: whose kernel runs; the best of this processor by default.
    """
    out = torch.empty(x.shape[0], weight.shape[turned], dtype=x.dtype) if out is None else out
    kind: Kind = "bf16" if x.dtype == torch.bfloat16 else "fp32"
    few = False if turned else few
    return _run(kind, x, weight, (bias, gamma, residual), out, few, level, gelu=gelu, turned=turned)


class Bytes(NamedTuple):
    """Rows that are rounded to bytes.

    Attributes:
        levels: `[n, K]`; unsigned of activations, of which `zero` stands for 0, and signed of weights.
        steps: `[n]`, fp32: between two levels of a row.
        sums: `[n]`, int32, of the levels of a weight's rows.
    """

    levels: Tensor
    steps: Tensor
    zero: int = 0
    sums: Tensor | None = None


def as_bytes(x: Tensor, *, gelu: bool = False) -> Bytes:
    """Rows `[n, K]` in fp32 or bf16 as unsigned bytes, in scratch memory; `gelu` as in the reference's `as_int8`."""
    (rows, inputs), threads = x.shape, torch.get_num_threads()
    made, steps = scratch("compiled bytes", (rows, inputs), torch.uint8), torch.empty(rows)
    chunk = max(1, -(-rows // (_TASKS_PER_THREAD * threads)))
    kernel = _bytes_kernel(x.dtype == torch.bfloat16, gelu, levels()[0])
    numbers = (x.data_ptr(), made.data_ptr(), steps.data_ptr(), x.stride(0), rows, inputs, chunk)
    kernel(numbers, -(-rows // chunk), threads)
    return Bytes(made, steps, GELU_ZERO_BYTE if gelu else ZERO_BYTE)


def bytes_linear(
    x: Bytes,
    weight: Bytes,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    gelu: bool = False,
    few: bool | None = None,
) -> Tensor:
    """`residual + x W^T + b`, or of the product's GELU, written to `out`.

    Args:
        x: `[n, K]` of `as_bytes`; weight: `[M, K]`, K a multiple of the lanes times four, M one of the lanes.
        bias: `[M]`, fp32.
        residual, out: `[n, M]`, both fp32 or both bf16.
    """
    return _run("int8", x.levels, weight.levels, (bias, None, residual), out, few, None, x, weight, gelu=gelu)


def _run(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    others: tuple[Tensor | None, Tensor | None, Tensor | None],
    out: Tensor,
    few: bool | None,
    level: Level | None,
    *factors: Bytes,
    gelu: bool,
    turned: bool = False,
) -> Tensor:
    """The product of factors of a kind with bias, gamma and residual."""
    level, half, threads = level or levels()[0], out.dtype == torch.bfloat16, torch.get_num_threads()
    (rows, inputs), outputs = x.shape, out.shape[1]
    if not out.numel():
        return out
    few = rows < _FEW[kind] if few is None else few
    kernel, sums_bytes = _kernel(kind, half, few, turned, level), 4 * _height(few, level) * _columns(few, level)
    columns, room, chunks, chunk = _FEW_COLUMNS, sums_bytes, 1, rows
    if not few:
        panel = 2 * level.lanes * inputs * x.element_size()
        panels = max(1, min(_PANELS_BYTES // panel, _MOST_PANELS))
        columns, room = panels * 2 * level.lanes, room + panels * panel
        chunk, chunks = divided(rows, -(-_TASKS_PER_THREAD * threads // -(-outputs // columns)), _CHUNK)
    room = whole_pages(room)
    place = scratch_address("compiled linear", room * threads)
    addresses = (0 if t is None else t.data_ptr() for t in (x, weight, *others, out))
    given = (0, 0, 0, 0)
    if factors:
        of_x, of_weight = factors
        assert of_weight.sums is not None
        given = (of_x.steps.data_ptr(), of_weight.steps.data_ptr(), of_weight.sums.data_ptr(), of_x.zero)
    residual = others[2]
    strides = (x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), out.stride(0))
    numbers = (*strides, rows, inputs, outputs, columns, chunk, chunks, room, int(gelu), given[3])
    kernel((*addresses, place, *given[:3], *numbers), -(-outputs // columns) * chunks, threads)
    return out
