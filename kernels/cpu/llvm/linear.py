"""Linear layers: products of which each tile stays in registers until GELU, LayerScale and residual are applied.

There are two kernels. Of many rows, a task is some columns of the result: their weights are laid out once, in panels of
two vectors, and every tile of rows goes through all of them. Of few rows laying out would take longer than the product,
so weights are read where they lie, once, and dot products of two columns are summed across at their end. Neither keeps
a copy of the weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..workspace import scratch
from . import Level, levels
from .builder import BF16, BYTE, FP32, INT32, Builder, Kernel, Values

# Below these rows weights are not laid out.
_FEW = 64
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
# Beyond this the normal distribution is 0 or 1; its polynomial misses by less than fp32 does.
_EDGE, _DEGREE = 5.5, 16
_PAGE = 4096

_POINTERS = ("x", "weight", "bias", "gamma", "residual", "out", "scratch")
_NUMBERS = ("x_row", "weight_row", "residual_row", "out_row", "rows", "inputs", "outputs", "columns", "chunk")
_NUMBERS += ("chunks", "room", "gelu")


class _Linear:
    """Writes a kernel.

    Args:
        half: bf16 instead of fp32.
        few: the one of few rows.
        level: of the processor.
    """

    def __init__(self, half: bool, few: bool, level: Level) -> None:
        self.half, self.level = half, level
        # Rows are read as channels in fp32 or pairs of channels in bf16, 32 bits each.
        self.unit, self.element = (INT32, BF16) if half else (FP32, FP32)
        self.b = b = Builder("linear_of_few_rows" if few else "linear", _POINTERS, _NUMBERS, level)
        self.given = given = b.given
        self.height, self.columns = _height(few, level), _columns(few, level)
        self.sums_bytes = 4 * self.height * self.columns
        if half:
            for name in ("x_row", "weight_row", "inputs"):
                given[name] = b.ashr(given[name], b.number(1))
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
            rows = [self._row("weight", b.add(at, b.number(i))) for i in range(lanes)]
            ahead = b.mul(given["weight_row"], b.number(lanes))

            def some_units(u: Any) -> None:
                for r in rows:
                    b.fetch(b.at(r, b.add(u, ahead), self.unit))
                for i, of_unit in enumerate(b.transposed([b.read(b.at(r, u, self.unit), self.unit) for r in rows])):
                    b.write(of_unit, b.at(place, b.mul(b.add(u, b.number(i)), b.number(2 * lanes)), self.unit))

            b.loop(0, given["inputs"], lanes, some_units)

        b.loop(column, stop, lanes, lay_out)

        def tile(first: Any) -> None:
            rows = self._rows("x", first, end)

            def some_columns(at: Any) -> None:
                weights = panel(at)

                def term(u: Any, *sums: Any) -> Values:
                    place, found = b.at(weights, b.mul(u, b.number(2 * lanes)), self.unit), []
                    columns = [b.read(b.at(place, n * lanes, self.unit), self.unit) for n in (0, 1)]
                    for i, given_row in enumerate(rows):
                        x = b.spread(b.load(b.at(given_row, u, self.unit), align=4, typ=self.unit))
                        found += [self._add(x, columns[n], sums[2 * i + n]) for n in (0, 1)]
                    return found

                sums = b.loop(0, given["inputs"], 1, term, *[b.filled(0.0)] * (2 * self.height))
                for i, value in enumerate(sums):
                    b.write(value, b.at(self.base, i * lanes, FP32))
                self._finish(first, end, at, b.least(b.sub(stop, at), 2 * lanes))

            b.loop(column, stop, 2 * lanes, some_columns)

        b.loop(row, end, self.height, tile)

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

        sums = b.loop(*terms, lanes, term, *[b.filled(0.0)] * (width * len(rows)))
        sums += [b.filled(0.0)] * (-len(sums) % lanes)
        later = b.icmp_signed(">", terms[0], b.number(0))
        for start in range(0, len(sums), lanes):
            whole = b.sums(sums[start : start + lanes])
            for i in range(start // width, min((start + lanes) // width, len(rows))):
                first = i * width - start
                some = b.picked(whole, whole, range(first, first + width))
                into = b.at(self.base, b.add(place, b.number(i * self.columns)), FP32)
                b.write(b.where(later, lambda x=some, at=into: b.fadd(x, b.read(at, FP32, width)), some), into)

    def _add(self, x: Any, y: Any, z: Any) -> Any:
        return self.b.dot_add(x, y, z) if self.half else self.b.multiply_add(x, y, z)

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
            sums = b.at(self.base, b.mul(i, b.number(self.columns)), FP32)
            out = b.at(given["out"], b.add(b.mul(number, given["out_row"]), column), self.element)
            residual = b.at(given["residual"], b.add(b.mul(number, given["residual_row"]), column), self.element)
            bias, gamma = (b.at(given[name], column, self.element) for name in ("bias", "gamma"))

            def vector(n: Any) -> None:
                def read(base: Any) -> Any:
                    return b.widened(b.at(base, n, self.element), self.element)

                found = b.read(b.at(sums, n, FP32), FP32)
                found = b.where(b.there(given["bias"]), lambda: b.fadd(found, read(bias)), found)
                active = b.icmp_signed("!=", given["gelu"], b.number(0))
                found = b.where(active, lambda x=found: self._gelu(x), found)
                found = b.where(b.there(given["gamma"]), lambda x=found: b.fmul(x, read(gamma)), found)
                found = b.where(b.there(given["residual"]), lambda x=found: b.fadd(x, read(residual)), found)
                b.write(b.narrowed(found) if self.half else found, b.at(out, n, self.element))

            b.loop(0, columns, lanes, vector)

        b.loop(0, rows, 1, row)

    def _gelu(self, x: Any) -> Any:
        """`x Φ(x)`, of which `Φ(x) - 1/2` is `x` times a polynomial of `x²`."""
        b = self.b
        edge = b.filled(_EDGE)
        inside = b.larger(b.smaller(x, edge), b.filled(-_EDGE))
        u = b.multiply_add(b.fmul(inside, inside), b.filled(2 / _EDGE**2), b.filled(-1.0))
        *others, found = [b.filled(value) for value in _coefficients()]
        for value in reversed(others):
            found = b.multiply_add(found, u, value)
        found = b.fmul(x, b.multiply_add(inside, found, b.filled(0.5)))
        found = b.select(b.fcmp_ordered("<", x, b.filled(-_EDGE)), b.filled(0.0), found)
        return b.select(b.fcmp_ordered(">", x, edge), x, found)


@cache
def _coefficients() -> list[float]:
    """Of a polynomial of `2 x² / edge² - 1` that is `(Φ(x) - 1/2) / x`, from the constant on."""

    def quotient(u: np.ndarray) -> np.ndarray:
        x = np.sqrt(np.maximum((u + 1) / 2, 1e-12)) * _EDGE
        return (torch.special.ndtr(torch.from_numpy(x)).numpy() - 0.5) / x

    found = np.polynomial.Chebyshev.interpolate(quotient, _DEGREE)
    return [float(np.float32(value)) for value in found.convert(kind=np.polynomial.Polynomial).coef]


@cache
def _kernel(half: bool, few: bool, level: Level) -> Kernel:
    def write() -> Builder:
        return _Linear(half, few, level).b

    return Kernel("linear_of_few_rows" if few else "linear", level, half, __file__, write)


def _height(few: bool, level: Level) -> int:
    """Rows of the highest tile."""
    return _ONE_TILE[level.lanes][0] if few else level.rows


def _columns(few: bool, level: Level) -> int:
    """Columns whose sums are kept before what follows the product."""
    return _FEW_COLUMNS if few else 2 * level.lanes


def takes(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether there is a kernel for x `[n, K]` and a weight `[M, K]`, with what else goes into the result."""
    lanes = levels()[0].lanes
    wide = lanes * (2 if x.dtype == torch.bfloat16 else 1)
    rows = [t for t in (x, weight, *others) if t is not None]
    return (
        weight.shape[0] % lanes == 0
        and weight.shape[1] % wide == 0
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
    out: Tensor | None = None,
    few: bool | None = None,
    level: Level | None = None,
) -> Tensor:
    """`residual + gamma · (x W^T + b)`, or of the product's GELU.

    Args:
        x: `[n, K]`; weight: `[M, K]`; bias, gamma: `[M]`; residual: `[n, M]`; all of one type, as in `takes`.
        out: `[n, M]`, where the result is written.
        few: which kernel runs; by default what is quicker for so many rows.
        level: whose kernel runs; the best of this processor by default.
    """
    level, half, threads = level or levels()[0], x.dtype == torch.bfloat16, torch.get_num_threads()
    (rows, inputs), outputs = x.shape, weight.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype) if out is None else out
    if not out.numel():
        return out
    few = rows < _FEW if few is None else few
    kernel, sums_bytes = _kernel(half, few, level), 4 * _height(few, level) * _columns(few, level)
    columns, room, chunks, chunk = _FEW_COLUMNS, sums_bytes, 1, rows
    if not few:
        panel = 2 * level.lanes * inputs * x.element_size()
        panels = max(1, min(_PANELS_BYTES // panel, _MOST_PANELS))
        columns, room = panels * 2 * level.lanes, room + panels * panel
        wanted = -(-_TASKS_PER_THREAD * threads // -(-outputs // columns))
        chunk = rows if wanted == 1 else max(_CHUNK, -(-rows // wanted))
        chunks = -(-rows // chunk)
    room = -(-room // _PAGE) * _PAGE
    memory = scratch("compiled linear", (room * threads + _PAGE,), torch.uint8)
    place = -(-memory.data_ptr() // _PAGE) * _PAGE
    addresses = (0 if t is None else t.data_ptr() for t in (x, weight, bias, gamma, residual, out))
    strides = (x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), out.stride(0))
    numbers = (*strides, rows, inputs, outputs, columns, chunk, chunks, room, int(gelu))
    kernel((*addresses, place, *numbers), -(-outputs // columns) * chunks, threads)
    return out
