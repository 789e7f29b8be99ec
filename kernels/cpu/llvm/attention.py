"""Attention of whole rows in registers and cache: GEMMs, position bias and softmax of a tile in one kernel.

A task is the queries of a head, or a chunk of them. It packs the keys once, so that a vector holds one channel of
consecutive keys; then tiles of rows go through scores, softmax and weighted sum without leaving the first levels of
cache. In bf16 the GEMMs take pairs of channels, or of keys, sum in fp32, and weights are rounded once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import llvmlite.ir as ir
import numpy as np
import torch
from torch import Tensor

from . import Level, fills_vectors, levels
from .builder import (
    BF16,
    BYTE,
    FP32,
    INT16,
    INT32,
    INT64,
    Builder,
    Values,
    coefficients,
    divided,
    kernel,
    scratch_address,
    whole_pages,
)

# Maximum keys of a kernel, the stride of its rows of scores.
_ROOMS = (1040, 4112)
# Queries of a chunk, if heads are too few to keep all threads busy: enough that packing the keys costs little.
_CHUNK = 48
_TASKS_PER_THREAD = 4
_LOG2E = math.log2(math.e)
# The smallest exponent of a normal fp32 number, and one safely below.
_LEAST_EXPONENT, _NO_EXPONENT = -126.0, -200.0
# Misses powers of two by 2 · 10⁻⁷ of themselves, as much as fp32 does.
_DEGREE = 5

_POINTERS = ("q", "k", "v", "out", "bias", "bounds_q", "bounds_k", "scratch")
_STRIDES = [
    f"{name}_{axis}" for name in ("q", "k", "v", "out", "bias") for axis in ("batch", "row", "head")
]
_NUMBERS = (*_STRIDES, "heads", "queries", "keys", "period", "chunk", "chunks", "threads", "scale")


class Sequence(NamedTuple):
    """One batch entry's rows of one head."""

    start: Any
    """Address of the first."""
    rows: Any
    stride: Any
    """Elements from row to row."""


class Heads:
    """Code shared by the attention kernels: in bf16 if `half`, of at most `room` keys, with an fp32 bias if `biased`.

    The width D is a multiple of the lanes, in bf16 of twice as many; `layout` has offsets of a thread's scratch memory,
    and its bytes; the scale is the last of the numbers.
    """

    name: str

    def __init__(
        self,
        half: bool,
        width: int,
        room: int,
        biased: bool,
        level: Level,
        layout: tuple[dict[str, int], int],
        pointers: tuple[str, ...],
        numbers: tuple[str, ...],
    ) -> None:
        self.half, self.width, self.biased, self.level = half, width, biased, level
        # Rows of keys are read as channels in fp32 or pairs of channels in bf16, 32 bits each.
        self.unit, self.units, self.element = (
            (INT32, width // 2, BF16) if half else (FP32, width, FP32)
        )
        self.row = room + level.lanes
        self.places, self.bytes = layout
        self.at: dict[str, Any] = {}
        self.b = Builder(self.name, pointers, numbers, level)
        self.given = self.b.given
        self.given["scale"] = self.b.bitcast(self.b.trunc(self.given["scale"], INT32), FP32)

    def of_thread(self, thread: Any) -> None:
        """Find the scratch memory of a thread."""
        b = self.b
        base = b.at(self.given["scratch"], b.mul(thread, self.bytes), BYTE)
        self.at = {name: b.at(base, place, BYTE) for name, place in self.places.items()}

    def bias_of(self, entry: Any, head: Any) -> Any:
        """The address of the bias of a head of a batch entry; None without a bias."""
        b, given = self.b, self.given
        if not self.biased:
            return None
        of_entry = b.mul(b.srem(entry, given["period"]), given["bias_batch"])
        return b.at(given["bias"], b.add(of_entry, b.mul(head, given["bias_head"])), FP32)

    def sequence(self, name: str, entry: Any, head: Any, *, queries: bool) -> Sequence:
        """Rows of a batch entry, from its bounds unless all sequences have one length."""
        b, given = self.b, self.given
        bounds, rows = ("bounds_q", "queries") if queries else ("bounds_k", "keys")
        packed = b.is_not_null(given[bounds])
        before = b.block
        even = b.mul(entry, given[f"{name}_batch"])
        with b.if_then(packed):
            start, end = (
                b.load(b.at(given[bounds], b.add(entry, i), INT64), typ=INT64) for i in (0, 1)
            )
            uneven, length = b.mul(start, given[f"{name}_row"]), b.sub(end, start)
            inside = b.block
        offset, count = b.phi(INT64), b.phi(INT64)
        for place, otherwise, found in ((offset, even, uneven), (count, given[rows], length)):
            place.add_incoming(otherwise, before)
            place.add_incoming(found, inside)
        start = b.at(given[name], b.add(offset, b.mul(head, given[f"{name}_head"])), self.element)
        return Sequence(start, count, given[f"{name}_row"])

    def lay_out_panels(self, name: str, rows: Sequence) -> None:
        """Pack rows into panels of two vectors, unit by unit; the last row pads the last panel."""
        b, lanes = self.b, self.level.lanes
        stride = b.ashr(rows.stride, 1) if self.half else rows.stride
        last = b.sub(rows.rows, 1)

        def some_rows(j: Any) -> None:
            place = b.at(self._panel(name, j), b.and_(j, lanes), self.unit)
            some = [
                b.at(rows.start, b.mul(b.minimum_int(b.add(j, i), last), stride), self.unit)
                for i in range(lanes)
            ]
            b.lay_out(some, self.units, self.unit, place)

        b.loop(0, rows.rows, lanes, some_rows)

    def _panel(self, name: str, row: Any) -> Any:
        """The address of the panel of a row."""
        number = self.b.sdiv(row, 2 * self.level.lanes)
        size = 2 * self.level.lanes * self.units
        return self.b.at(self.at[name], self.b.mul(number, size), self.unit)

    def lay_out_pairs(self, name: str, rows: Sequence) -> Sequence:
        """Pack rows in pairs that interleave their channels; an odd last row pairs with itself."""
        b, lanes = self.b, self.level.lanes
        last = b.sub(rows.rows, 1)

        def pair(j: Any) -> None:
            both = [b.minimum_int(b.add(j, i), last) for i in (0, 1)]
            places = [b.at(rows.start, b.mul(row, rows.stride), INT16) for row in both]
            into = b.at(self.at[name], b.mul(b.ashr(j, 1), self.width), INT32)
            for channel in range(0, self.width, lanes):
                one, other = (b.read(b.at(place, channel, INT16), INT16) for place in places)
                b.write(b.interleave(one, other), b.at(into, channel, INT32))

        b.loop(0, rows.rows, 2, pair)
        pairs = b.ashr(b.round_up(rows.rows, 2), 1)
        return Sequence(self.at[name], pairs, self.width)

    def copy_rows(self, name: str, rows: Sequence, places: Values) -> None:
        """Copy the rows of a tile to contiguous memory."""
        b = self.b
        for i, place in enumerate(places):
            given = b.at(rows.start, b.mul(place, rows.stride), self.element)
            for unit in range(0, self.units, self.level.lanes):
                into = b.at(self.at[name], i * self.units + unit, self.unit)
                b.write(b.read(b.at(given, unit, self.unit), self.unit), into)

    def products(self, height: int, name: str, panels: str, keys: Any, into: Any) -> None:
        """Products of the rows of a tile with all keys, or values, that are laid out in panels."""
        b, lanes = self.b, self.level.lanes
        whole = b.and_(keys, -2 * lanes)

        def panel(vectors: int, key: Any) -> None:
            factors = (self._panel(panels, key), 2 * lanes)
            sums = self.product(height, vectors, (self.at[name], self.units), factors, self.units)
            for i in range(height):
                for n in range(vectors):
                    place = b.add(key, i * self.row + n * lanes)
                    b.write(sums[i * vectors + n], b.at(into, place, FP32))

        b.loop(0, whole, 2 * lanes, lambda key: panel(2, key))
        rest = b.sub(keys, whole)
        short = b.icmp_signed("<=", rest, lanes)
        with b.if_then(b.icmp_signed(">", rest, 0)), b.if_else(short) as (one, two):
            with one:
                panel(1, whole)
            with two:
                panel(2, whole)

    def product(
        self, height: int, vectors: int, left: tuple[Any, int], right: tuple[Any, Any], terms: Any
    ) -> Values:
        """Sums over units of rows and columns, `[height · vectors]` fp32 vectors in registers.

        `left` and `right` are the address of the rows or of the first vectors, and the units to the next.
        """
        b = self.b
        rows = [b.at(left[0], i * left[1], self.unit) for i in range(height)]
        return b.tile(rows, vectors, *right, terms, self.unit, self.add, b.splat(0.0))

    @property
    def add(self) -> Callable[..., Any]:
        """A product of units, added to a sum."""
        return self.b.dot_bf16 if self.half else self.b.multiply_add

    def scaled(self, scores: Any, of_query: Any, keys: Any) -> Any:
        """Scale a row of scores to units where e has log2(e), with -inf past the last key, and return its maximum."""
        b, lanes = self.b, self.level.lanes
        factor = b.broadcast(b.fmul(self.given["scale"], ir.Constant(FP32, _LOG2E)))
        whole, hidden, mask = b.and_(keys, -lanes), b.splat(-math.inf), self.tail_mask(keys)

        def some(j: Any, partly: bool) -> Any:
            place = b.at(scores, j, FP32)
            score = b.fmul(b.read(place, FP32), factor)
            if of_query is not None:
                address = b.at(of_query, j, FP32)
                part = b.load_masked(address, mask) if partly else b.read(address, FP32)
                score = b.multiply_add(part, b.splat(_LOG2E), score)
            score = b.select(mask, score, hidden) if partly else score
            b.write(score, place)
            return score

        (largest,) = b.loop(
            0, whole, lanes, lambda j, most: [b.maximum(most, some(j, False))], hidden
        )
        rest = b.icmp_signed("<", whole, keys)
        return b.reduce_max(b.where(rest, lambda: b.maximum(largest, some(whole, True)), largest))

    def tail_mask(self, keys: Any) -> Any:
        """Mask of the elements of a row's last, partial vector of keys."""
        b, lanes = self.b, self.level.lanes
        rest = b.sub(keys, b.and_(keys, -lanes))
        return b.icmp_signed("<", ir.Constant(b.vector(INT64), [*range(lanes)]), b.broadcast(rest))

    def power(self, x: Any) -> Any:
        """`2^x` for x up to 0, by a polynomial in the distance to the nearest integer; NaN stays NaN."""
        b, kind = self.b, self.b.vector(INT32)
        bounded = b.maximum(x, b.splat(_NO_EXPONENT))
        whole = b.intrinsic(f"llvm.roundeven.v{self.level.lanes}f32", x.type, bounded)
        found = b.polynomial(b.fsub(bounded, whole), coefficients(np.exp2, _DEGREE, (-0.5, 0.5)))
        if self.level.lanes == 16:
            # AVX-512 has an instruction for it, and for what is too small.
            return b.scale_by_powers(found, whole)
        exponent = b.shl(b.fptosi(whole, kind), ir.Constant(kind, [23] * self.level.lanes))
        shifted = b.bitcast(b.add(b.bitcast(found, kind), exponent), x.type)
        known = b.select(b.fcmp_ordered("<", x, b.splat(_LEAST_EXPONENT)), b.splat(0.0), shifted)
        return b.select(b.fcmp_unordered("uno", x, x), x, known)


class _Attention(Heads):
    """Writes the kernel of a dtype, a width and a length."""

    name = "attention"

    def __init__(self, half: bool, width: int, room: int, biased: bool, level: Level) -> None:
        layout = _layout(half, width, room, level)
        super().__init__(half, width, room, biased, level, layout, _POINTERS, _NUMBERS)
        self.b.tasks(self._task)

    def _task(self, task: Any, thread: Any) -> None:
        b, given = self.b, self.given
        chunk, head, entry = self._place(task)
        self.of_thread(thread)
        queries, out = (self.sequence(name, entry, head, queries=True) for name in ("q", "out"))
        keys, values = (self.sequence(name, entry, head, queries=False) for name in ("k", "v"))
        # What this thread is likely to take next is fetched meanwhile, row by row.
        _, head_ahead, entry_ahead = self._place(
            b.minimum_int(b.add(task, given["threads"]), b.sub(given["tasks"], 1))
        )
        self.ahead = [
            self.sequence(name, entry_ahead, head_ahead, queries=name == "q")
            for name in ("q", "k", "v")
        ]
        bias = self.bias_of(entry, head)
        first = b.mul(chunk, given["chunk"])
        stop = b.minimum_int(b.add(first, given["chunk"]), queries.rows)
        non_empty = b.and_(b.icmp_signed("<", first, stop), b.icmp_signed(">", keys.rows, 0))
        with b.if_then(non_empty):
            self.lay_out_panels("keys", keys)
            if self.half:
                values = self.lay_out_pairs("values", values)
            self._rows(first, stop, queries, keys.rows, values, out, bias)

    def _place(self, task: Any) -> tuple[Any, Any, Any]:
        """Chunk, head and batch entry of a task."""
        b, given = self.b, self.given
        chunk, rest = b.srem(task, given["chunks"]), b.sdiv(task, given["chunks"])
        return chunk, b.srem(rest, given["heads"]), b.sdiv(rest, given["heads"])

    def _fetch(self, row: Any, out: Sequence) -> None:
        """Have a row of what is next brought to the caches, and that of the result."""
        b, line = self.b, 64 // (2 if self.half else 4)
        for rows in (*self.ahead, out):
            place = b.at(rows.start, b.mul(row, rows.stride), self.element)
            for channel in range(0, self.width, line):
                b.prefetch(b.at(place, channel, self.element), write=rows is out)

    def _rows(
        self,
        first: Any,
        stop: Any,
        queries: Sequence,
        keys: Any,
        values: Sequence,
        out: Sequence,
        bias: Any,
    ) -> None:
        """Tile after tile."""
        b = self.b

        def all_of(height: int) -> None:
            b.loop(
                first,
                stop,
                height,
                lambda row: self._tile(height, row, stop, queries, keys, values, out, bias),
            )

        b.heights(self.level.rows, b.sub(stop, first), all_of)

    def _tile(
        self,
        height: int,
        row: Any,
        stop: Any,
        queries: Sequence,
        keys: Any,
        values: Sequence,
        out: Sequence,
        bias: Any,
    ) -> None:
        b, lanes = self.b, self.level.lanes
        last = b.sub(stop, 1)
        # Rows past the end repeat the last one, and are not written.
        places = [b.minimum_int(b.add(row, i), last) for i in range(height)]
        self.copy_rows("queries", queries, places)
        self.products(height, "queries", "keys", keys, self.at["scores"])

        def softmax(i: Any) -> None:
            place = b.minimum_int(b.add(row, i), last)
            self._fetch(place, out)
            if bias is not None:
                # Behind the last row the next head's begin.
                below = b.at(bias, b.mul(b.add(place, height), self.given["bias_row"]), FP32)
                b.loop(0, keys, 64 // 4, lambda j: b.prefetch(b.at(below, j, FP32)))
            self._softmax(i, place, keys, bias)

        b.loop(0, height, 1, softmax)
        weights, step = (
            (self.at["weights"], self.row // 2) if self.half else (self.at["scores"], self.row)
        )
        for channel in range(0, self.width, 2 * lanes):
            vectors = min(2, (self.width - channel) // lanes)
            first = b.at(values.start, channel, self.unit)
            sums = self.product(
                height, vectors, (weights, step), (first, values.stride), values.rows
            )
            for i in range(height):
                with b.if_then(b.icmp_signed("<=", b.add(row, i), last)):
                    inverse = b.broadcast(b.load(b.at(self.at["sums"], i, FP32), typ=FP32))
                    into = b.at(out.start, b.mul(places[i], out.stride), self.element)
                    for n in range(vectors):
                        attended = b.fmul(sums[i * vectors + n], inverse)
                        place = b.at(into, channel + n * lanes, self.element)
                        b.write(b.fp32_to_bf16(attended) if self.half else attended, place)

    def _softmax(self, i: Any, query: Any, keys: Any, bias: Any) -> None:
        """Unnormalised powers of two of a row, with zeros past the last key, and the reciprocal of their sum."""
        b, lanes = self.b, self.level.lanes
        scores = b.at(self.at["scores"], b.mul(i, self.row), FP32)
        of_query = None if bias is None else b.at(bias, b.mul(query, self.given["bias_row"]), FP32)
        top = b.broadcast(self.scaled(scores, of_query, keys))
        weights = b.at(self.at["weights"], b.mul(i, self.row), BF16)

        def power(j: Any, total: Any) -> Values:
            found = self.power(b.fsub(b.read(b.at(scores, j, FP32), FP32), top))
            if self.half:
                b.write(b.fp32_to_bf16(found), b.at(weights, j, BF16))
            else:
                b.write(found, b.at(scores, j, FP32))
            return [b.fadd(total, found)]

        (total,) = b.loop(0, b.round_up(keys, lanes), lanes, power, b.splat(0.0))
        b.store(b.fdiv(ir.Constant(FP32, 1.0), b.reduce_add(total)), b.at(self.at["sums"], i, FP32))


@cache
def _layout(half: bool, width: int, room: int, level: Level) -> tuple[dict[str, int], int]:
    """Offsets of a thread's scratch memory, and its size."""
    rows, keys = level.rows, -(-room // (2 * level.lanes)) * 2 * level.lanes
    element = 2 if half else 4
    sizes = {
        "queries": rows * width * element,
        "sums": rows * 4,
        "scores": rows * (room + level.lanes) * 4,
        "weights": rows * (room + level.lanes) * 2 if half else 0,
        "keys": keys * width * element,
        "values": keys * width * 2 if half else 0,
    }
    return laid_out(sizes)


def laid_out(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of consecutive buffers of these sizes, and the total size."""
    ends = np.cumsum([-(-size // 64) * 64 for size in sizes.values()]).tolist()
    return dict(zip(sizes, [0, *ends], strict=False)), whole_pages(ends[-1])


def takes(q: Tensor, keys: int) -> bool:
    """Whether there is a kernel for queries `[..., D]`, and for so many keys."""
    return keys <= _ROOMS[-1] and fills_vectors(q.shape[-1], q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    bounds: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    level: Level | None = None,
) -> Tensor:
    """Attention of q `[B, Nq, H, D]` and k, v `[B, Nk, H, D]`, or packed in one entry with S + 1 `bounds` each.

    The bias `[G, 1 or H, 1 or Nq, Nk]`, without `bounds` only, applies to batch entry b by entry b mod G (G divides B);
    -inf hides a key. The result is contiguous, with zeros for a sequence without keys.
    """
    level = level or levels()[0]
    half, threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    q, k, v = (readable(t, half) for t in (q, k, v))
    (entries, queries, heads, width), keys = q.shape, k.shape[1]
    some_without_keys = not keys if bounds is None else any(a == b for a, b in pairwise(bounds[1]))
    out = (torch.zeros if some_without_keys else torch.empty)(q.shape, dtype=q.dtype)
    entries, queries, keys, offsets = lengths_of(bounds, entries, queries, keys)
    if not entries or not queries or not keys:
        return out
    chunk, chunks = divided(queries, -(-_TASKS_PER_THREAD * threads // (entries * heads)), _CHUNK)
    room = next(n for n in _ROOMS if n >= keys)
    place = scratch_address("compiled attention", _layout(half, width, room, level)[1] * threads)
    period = 1 if bias is None else bias.shape[0]
    run = kernel(_Attention, half, width, room, bias is not None, level)
    bias, bias_strides = bias_place(bias)
    addresses = (0 if t is None else t.data_ptr() for t in (q, k, v, out, bias))
    bounds_at = (0, 0) if offsets is None else (offsets[0].ctypes.data, offsets[1].ctypes.data)
    strides = (s for t in (q, k, v, out) for s in t.stride()[:3])
    numbers = (
        *strides,
        *bias_strides,
        heads,
        queries,
        keys,
        period,
        chunk,
        chunks,
        threads,
        scale_bits(scale),
    )
    run((*addresses, *bounds_at, place, *numbers), entries * heads * chunks, threads)
    return out


def readable(x: Tensor, half: bool) -> Tensor:
    """Rows with contiguous elements, in bf16 at even offsets, since kernels read pairs."""
    even = not half or all(stride % 2 == 0 for stride in x.stride()[:3])
    return x if x.stride(-1) == 1 and even else x.contiguous()


def lengths_of(
    bounds: tuple[tuple[int, ...], tuple[int, ...]] | None, entries: int, queries: int, keys: int
) -> tuple[int, int, int, np.ndarray | None]:
    """Batch entries, the most queries and keys of an entry, and the bounds as a kernel reads them."""
    if bounds is None:
        return entries, queries, keys, None
    offsets = np.array(bounds, np.int64)
    lengths = np.diff(offsets)
    return (lengths.shape[1], *lengths.max(1, initial=0).tolist(), offsets)


def bias_place(bias: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """A bias as a kernel reads it, and its elements from batch entry, row and head to the next one."""
    if bias is None:
        return None, (0, 0, 0)
    bias = bias.to(torch.float32)
    bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    spread = [
        0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)
    ]
    return bias, (spread[0], spread[2], spread[1])


def scale_bits(scale: float) -> int:
    """An fp32 number as the integer of its bits."""
    return struct.unpack("i", struct.pack("f", scale))[0]
