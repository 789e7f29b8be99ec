"""Matrix products of tiles, registers of 16 rows of 64 bytes, by Intel's AMX.

Two tiles of rows and two of columns give four tiles of sums, which hide the latency of a product. A level may keep its
tiles in memory: then loops stand for the instructions, which proves the addresses and the order of all operations on
processors without AMX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir

from . import Level
from .builder import BYTE, FP32, INT32, Builder, Values

ROWS = 16
"""Rows of a tile, 32-bit units of a row, and units that one product sums over."""
# Numbers of the first tiles of sums, rows and columns, of which there are four, two and two.
_SUMS, _LEFT, _RIGHT, _COUNT = 0, 4, 6, 8
_UNITS = ROWS * ROWS
# The palette, then from byte 16 the bytes of a row of each tile in 16 bits, and from byte 48 its rows.
_SHAPES = [1, *[0] * 15, *[4 * ROWS, 0] * _COUNT, *[0] * 16, *[ROWS] * _COUNT, *[0] * 8]


def state_bytes(level: Level) -> int:
    """Return the bytes of scratch memory that the tiles of a thread take: their contents, or their configuration."""
    return 4 * _UNITS * _COUNT if level.tiles == "memory" else len(_SHAPES)


class Tiles:
    """Emits products of tiles.

    Args:
        b: Builder of a kernel whose level has tiles.
        dtype: "bf16", or "int8": unsigned bytes in rows, signed ones in columns.
    """

    def __init__(self, b: Builder, dtype: str) -> None:
        self.b, self.simulated = b, b.level.tiles == "memory"
        self.accumulator, self.instruction, self.multiply_add = FP32, "tdpbf16ps", b.dot_bf16
        if dtype == "int8":
            self.accumulator, self.instruction, self.multiply_add = INT32, "tdpbusd", b.dot_int8
        self.state: Any = None

    def configure(self, state: Any) -> None:
        """Emit the configuration of a thread's tiles, at the start of its function; `state` is its scratch memory."""
        self.state = state
        if not self.simulated:
            self.b.write(ir.Constant(self.b.vector(BYTE, len(_SHAPES)), _SHAPES), state)
            self._call("ldtilecfg", state)

    def release(self) -> None:
        """Emit the release of the tiles, at the end of a finished function."""
        if not self.simulated:
            with self.b.goto_block(self.b.block):
                self._call("tilerelease")

    def multiply(
        self,
        rows: int,
        left: tuple[Any, Any],
        right: tuple[Any, Any],
        terms: Any,
        out: tuple[Any, Any],
        *,
        add: Any = None,
        between: Callable[[Any, int], None] | None = None,
        stream: bool = False,
    ) -> None:
        """Emit the product of `rows` tiles of rows with two tiles of columns over `terms` units.

        Args:
            left: Address of the first row, and units to the next one.
            right: Address of the first unit of all columns, and 32-bit elements to the next unit.
            terms: A multiple of `ROWS`.
            out: Address of the first row of sums, and elements to the next one.
            add: Whether the product is added to `out`, at run time; never by default.
            between: Emits what follows the products of a unit and a tile of rows.
            stream: Whether the columns leave the first level of cache to the rows.
        """
        b = self.b
        sums = [(2 * i + n, out[1] * (ROWS * i) + ROWS * n) for i in range(rows) for n in range(2)]

        def start(*, zero: bool) -> None:
            for tile, offset in sums:
                if zero:
                    self._zero(_SUMS + tile)
                else:
                    self._load(_SUMS + tile, b.at(out[0], offset, INT32), out[1])

        if add is None:
            start(zero=True)
        else:
            with b.if_else(add) as (then, otherwise):
                with then:
                    start(zero=False)
                with otherwise:
                    start(zero=True)

        def term(u: Any) -> None:
            for n in range(2):
                address = b.at(right[0], u * right[1] + ROWS * n, INT32)
                self._load(_RIGHT + n, address, right[1], stream=stream)
            for i in range(rows):
                self._load(_LEFT + i, b.at(left[0], u + left[1] * (ROWS * i), INT32), left[1])
                for n in range(2):
                    self._multiply(_SUMS + 2 * i + n, _LEFT + i, _RIGHT + n)
                if between is not None:
                    between(u, i)

        b.loop(0, terms, ROWS, term)
        for tile, offset in sums:
            self._store(_SUMS + tile, b.at(out[0], offset, INT32), out[1])

    def _zero(self, tile: int) -> None:
        if not self.simulated:
            self._call("tilezero", BYTE(tile))
            return
        zero = self.b.splat(0, INT32)
        self.b.loop(0, ROWS, 1, lambda i: self.b.write(zero, self._row(tile, i)))

    def _load(self, tile: int, address: Any, stride: Any, *, stream: bool = False) -> None:
        b = self.b
        if not self.simulated:
            name = "tileloaddt164" if stream else "tileloadd64"
            self._call(name, BYTE(tile), address, (b.index(stride) << 2).value)
            return

        def row(i: Any) -> None:
            b.write(b.read(address, INT32, i * stride), self._row(tile, i))

        b.loop(0, ROWS, 1, row)

    def _store(self, tile: int, address: Any, stride: Any) -> None:
        b = self.b
        if not self.simulated:
            self._call("tilestored64", BYTE(tile), address, (b.index(stride) << 2).value)
            return

        def row(i: Any) -> None:
            b.write(b.read(self._row(tile, i), INT32), b.at(address, i * stride, INT32))

        b.loop(0, ROWS, 1, row)

    def _multiply(self, sums: int, left: int, right: int) -> None:
        b = self.b
        if not self.simulated:
            self._call(self.instruction, BYTE(sums), BYTE(left), BYTE(right))
            return

        def row(i: Any) -> None:
            out = self._row(sums, i)

            def term(u: Any, total: Any) -> Values:
                x = b.broadcast(b.load_scalar(self._row(left, i), u, INT32))
                return [self.multiply_add(x, b.read(self._row(right, u), INT32), total)]

            (total,) = b.loop(0, ROWS, 1, term, b.read(out, self.accumulator))
            b.write(total, out)

        b.loop(0, ROWS, 1, row)

    def _row(self, tile: int, index: Any) -> Any:
        """Return the address of a row of a tile in memory."""
        return self.b.at(self.state, index * ROWS + tile * _UNITS, INT32)

    def _call(self, name: str, *args: Any) -> None:
        self.b.intrinsic(f"llvm.x86.{name}", ir.VoidType(), *args)
