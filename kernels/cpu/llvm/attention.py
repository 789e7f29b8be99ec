"""Attention of whole rows in registers and cache: products, position bias and softmax of a tile in one kernel.

A task is the queries of a head, or a chunk of them. Keys are laid out once for it, so that a vector holds one channel
of consecutive keys; then tiles of rows go through scores, softmax and weighted sum without leaving the first levels of
cache. In bf16 products take pairs of channels, or of keys, sum in fp32, and weights are rounded once.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from typing import Any, NamedTuple

import llvmlite.ir as ir
import numpy as np
import torch
from torch import Tensor

from . import Level, levels, whole
from .builder import (
    BF16,
    BYTE,
    FP32,
    INT16,
    INT32,
    INT64,
    Builder,
    Kernel,
    Values,
    coefficients,
    divided,
    scratch_address,
    whole_pages,
)

# Keys of the longest sequence that a kernel has room for, whose rows of scores lie so far apart.
_ROOMS = (1040, 4112)
# Queries of a chunk, where heads are too few to keep all threads busy: laying out the keys is little beside so many.
_CHUNK = 48
_TASKS_PER_THREAD = 4
_LOG2E = math.log2(math.e)
# The least exponent of a normal number in fp32, and one that is safely none.
_LEAST_EXPONENT, _NO_EXPONENT = -126.0, -200.0
# Misses powers of two by 2 · 10⁻⁷ of themselves, as much as fp32 does.
_DEGREE = 5

_POINTERS = ("q", "k", "v", "out", "bias", "bounds_q", "bounds_k", "scratch")
_STRIDES = [f"{name}_{axis}" for name in ("q", "k", "v", "out", "bias") for axis in ("batch", "row", "head")]
_NUMBERS = (*_STRIDES, "heads", "queries", "keys", "period", "chunk", "chunks", "threads", "scale")


class _Sequence(NamedTuple):
    """One batch entry's rows of one head."""

    start: Any
    """Address of the first."""
    rows: Any
    stride: Any
    """Elements from row to row."""


class _Attention:
    """Writes the kernel of a type, a width and a length.

    Args:
        half: bf16 instead of fp32.
        width: D, a multiple of the lanes; in bf16 of twice as many.
        room: the most keys.
        biased: whether a bias in fp32 is added to the scores.
        level: of the processor.
    """

    def __init__(self, half: bool, width: int, room: int, biased: bool, level: Level) -> None:
        self.half, self.width, self.biased, self.level = half, width, biased, level
        # Rows of keys are read as channels in fp32 or pairs of channels in bf16, 32 bits each.
        self.unit, self.units, self.element = (INT32, width // 2, BF16) if half else (FP32, width, FP32)
        self.row = room + level.lanes
        self.places, self.bytes = _layout(half, width, room, level)
        self.b = Builder("attention", _POINTERS, _NUMBERS, level)
        self.given = self.b.given
        self.given["scale"] = self.b.bitcast(self.b.trunc(self.given["scale"], INT32), FP32)
        self.b.tasks(self._task)

    def _task(self, task: Any, thread: Any) -> None:
        b, given = self.b, self.given
        chunk, head, entry = self._place(task)
        # What this thread is likely to take next is fetched meanwhile, row by row.
        later = b.least(b.add(task, given["threads"]), b.sub(given["tasks"], b.number(1)))
        _, later_head, later_entry = self._place(later)
        self.later = [self._sequence(name, later_entry, later_head) for name in ("q", "k", "v")]
        base = b.at(given["scratch"], b.mul(thread, b.number(self.bytes)), BYTE)
        self.at = {name: b.at(base, place, BYTE) for name, place in self.places.items()}
        queries, keys, values, out = (self._sequence(name, entry, head) for name in ("q", "k", "v", "out"))
        bias = None
        if self.biased:
            of_entry = b.mul(b.srem(entry, given["period"]), given["bias_batch"])
            bias = b.at(given["bias"], b.add(of_entry, b.mul(head, given["bias_head"])), FP32)
        first = b.mul(chunk, given["chunk"])
        stop = b.least(b.add(first, given["chunk"]), queries.rows)
        there = b.and_(b.icmp_signed("<", first, stop), b.icmp_signed(">", keys.rows, b.number(0)))
        with b.if_then(there):
            self._lay_out_keys(keys)
            if self.half:
                values = self._lay_out_values(values)
            self._rows(first, stop, queries, keys.rows, values, out, bias)

    def _place(self, task: Any) -> tuple[Any, Any, Any]:
        """Chunk, head and batch entry of a task."""
        b, given = self.b, self.given
        chunk, rest = b.srem(task, given["chunks"]), b.sdiv(task, given["chunks"])
        return chunk, b.srem(rest, given["heads"]), b.sdiv(rest, given["heads"])

    def _fetch(self, row: Any, out: _Sequence) -> None:
        """Have a row of the next task brought to the caches, and that of this one's result."""
        b, line = self.b, 64 // (2 if self.half else 4)
        for rows in (*self.later, out):
            place = b.at(rows.start, b.mul(row, rows.stride), self.element)
            for channel in range(0, self.width, line):
                b.fetch(b.at(place, channel, self.element), write=rows is out)

    def _sequence(self, name: str, entry: Any, head: Any) -> _Sequence:
        """Rows of a batch entry, whose bounds are given unless all have one length."""
        b, given = self.b, self.given
        bounds, rows = ("bounds_q", "queries") if name in ("q", "out") else ("bounds_k", "keys")
        packed = b.there(given[bounds])
        before = b.block
        even = b.mul(entry, given[f"{name}_batch"])
        with b.if_then(packed):
            start, end = (b.load(b.at(given[bounds], b.add(entry, b.number(i)), INT64), typ=INT64) for i in (0, 1))
            uneven, length = b.mul(start, given[f"{name}_row"]), b.sub(end, start)
            inside = b.block
        offset, count = b.phi(INT64), b.phi(INT64)
        for place, otherwise, found in ((offset, even, uneven), (count, given[rows], length)):
            place.add_incoming(otherwise, before)
            place.add_incoming(found, inside)
        start = b.at(given[name], b.add(offset, b.mul(head, given[f"{name}_head"])), self.element)
        return _Sequence(start, count, given[f"{name}_row"])

    def _lay_out_keys(self, keys: _Sequence) -> None:
        """Panels of two vectors of keys, a unit of all of them behind the other. The last key fills the last panel."""
        b, lanes = self.b, self.level.lanes
        stride = b.ashr(keys.stride, b.number(1)) if self.half else keys.stride
        last = b.sub(keys.rows, b.number(1))

        def some_keys(j: Any) -> None:
            place = b.at(self._panel(j), b.and_(j, b.number(lanes)), self.unit)
            rows = [
                b.at(keys.start, b.mul(b.least(b.add(j, b.number(i)), last), stride), self.unit) for i in range(lanes)
            ]

            b.lay_out(rows, self.units, self.unit, place)

        b.loop(0, keys.rows, lanes, some_keys)

    def _panel(self, key: Any) -> Any:
        """The address of the panel of a key."""
        number = self.b.sdiv(key, self.b.number(2 * self.level.lanes))
        size = self.b.number(2 * self.level.lanes * self.units)
        return self.b.at(self.at["keys"], self.b.mul(number, size), self.unit)

    def _lay_out_values(self, values: _Sequence) -> _Sequence:
        """Rows of pairs: a channel of one key beside that of the next one. The last key's other one is itself."""
        b, lanes = self.b, self.level.lanes
        last = b.sub(values.rows, b.number(1))

        def pair(j: Any) -> None:
            rows = [b.least(b.add(j, b.number(i)), last) for i in (0, 1)]
            places = [b.at(values.start, b.mul(row, values.stride), INT16) for row in rows]
            into = b.at(self.at["values"], b.mul(b.ashr(j, b.number(1)), b.number(self.width)), INT32)
            for channel in range(0, self.width, lanes):
                one, other = (b.read(b.at(place, channel, INT16), INT16) for place in places)
                b.write(b.alternated(one, other), b.at(into, channel, INT32))

        b.loop(0, values.rows, 2, pair)
        pairs = b.ashr(b.rounded_up(values.rows, 2), b.number(1))
        return _Sequence(self.at["values"], pairs, b.number(self.width))

    def _rows(
        self, first: Any, stop: Any, queries: _Sequence, keys: Any, values: _Sequence, out: _Sequence, bias: Any
    ) -> None:
        """Tile after tile."""
        b = self.b

        def all_of(height: int) -> None:
            b.loop(first, stop, height, lambda row: self._tile(height, row, stop, queries, keys, values, out, bias))

        b.heights(self.level.rows, b.sub(stop, first), all_of)

    def _tile(
        self,
        height: int,
        row: Any,
        stop: Any,
        queries: _Sequence,
        keys: Any,
        values: _Sequence,
        out: _Sequence,
        bias: Any,
    ) -> None:
        b, lanes = self.b, self.level.lanes
        last = b.sub(stop, b.number(1))
        # Rows that are not there repeat the last one, and are not written.
        places = [b.least(b.add(row, b.number(i)), last) for i in range(height)]
        for i, place in enumerate(places):
            given = b.at(queries.start, b.mul(place, queries.stride), self.element)
            for unit in range(0, self.units, lanes):
                into = b.at(self.at["queries"], i * self.units + unit, self.unit)
                b.write(b.read(b.at(given, unit, self.unit), self.unit), into)
        self._scores(height, keys)

        def softmax(i: Any) -> None:
            place = b.least(b.add(row, i), last)
            self._fetch(place, out)
            if bias is not None:
                # Behind the last row the next head's begin.
                ahead = b.at(bias, b.mul(b.add(place, b.number(height)), self.given["bias_row"]), FP32)
                b.loop(0, keys, 64 // 4, lambda j: b.fetch(b.at(ahead, j, FP32)))
            self._softmax(i, place, keys, bias)

        b.loop(0, height, 1, softmax)
        weights, step = (self.at["weights"], self.row // 2) if self.half else (self.at["scores"], self.row)
        for channel in range(0, self.width, 2 * lanes):
            vectors = min(2, (self.width - channel) // lanes)
            first = b.at(values.start, channel, self.unit)
            sums = self._product(height, vectors, (weights, step), (first, values.stride), values.rows)
            for i in range(height):
                with b.if_then(b.icmp_signed("<=", b.add(row, b.number(i)), last)):
                    inverse = b.spread(b.load(b.at(self.at["sums"], i, FP32), typ=FP32))
                    into = b.at(out.start, b.mul(places[i], out.stride), self.element)
                    for n in range(vectors):
                        attended = b.fmul(sums[i * vectors + n], inverse)
                        place = b.at(into, channel + n * lanes, self.element)
                        b.write(b.narrowed(attended) if self.half else attended, place)

    def _scores(self, height: int, keys: Any) -> None:
        b, lanes = self.b, self.level.lanes
        whole = b.and_(keys, b.number(-2 * lanes))

        def panel(vectors: int, key: Any) -> None:
            factors = (self._panel(key), b.number(2 * lanes))
            sums = self._product(height, vectors, (self.at["queries"], self.units), factors, b.number(self.units))
            for i in range(height):
                for n in range(vectors):
                    place = b.add(key, b.number(i * self.row + n * lanes))
                    b.write(sums[i * vectors + n], b.at(self.at["scores"], place, FP32))

        b.loop(0, whole, 2 * lanes, lambda key: panel(2, key))
        rest = b.sub(keys, whole)
        short = b.icmp_signed("<=", rest, b.number(lanes))
        with b.if_then(b.icmp_signed(">", rest, b.number(0))), b.if_else(short) as (one, two):
            with one:
                panel(1, whole)
            with two:
                panel(2, whole)

    def _product(self, height: int, vectors: int, left: tuple[Any, int], right: tuple[Any, Any], terms: Any) -> Values:
        """Sums over units of rows and columns, `[height · vectors]` fp32 vectors, which stay in registers.

        Args:
            left: address of the rows, and the units from one to the next.
            right: address of the vectors of the first term, and the units to those of the next one.
        """
        b = self.b
        rows = [b.at(left[0], i * left[1], self.unit) for i in range(height)]
        add = b.dot_add if self.half else b.multiply_add
        return b.tile(rows, vectors, *right, terms, self.unit, add, b.filled(0.0))

    def _softmax(self, i: Any, query: Any, keys: Any, bias: Any) -> None:
        """Powers of two of a row of the tile, unnormalised, zeros behind the last key, and one over their sum."""
        b, lanes = self.b, self.level.lanes
        scores = b.at(self.at["scores"], b.mul(i, b.number(self.row)), FP32)
        of_query = None if bias is None else b.at(bias, b.mul(query, self.given["bias_row"]), FP32)
        factor = b.spread(b.fmul(self.given["scale"], ir.Constant(FP32, _LOG2E)))
        whole, all_keys = b.and_(keys, b.number(-lanes)), b.rounded_up(keys, lanes)
        hidden = b.filled(-math.inf)
        there = b.icmp_signed("<", ir.Constant(b.vector(INT64), [*range(lanes)]), b.spread(b.sub(keys, whole)))

        def scaled(j: Any, partly: bool) -> Any:
            place = b.at(scores, j, FP32)
            score = b.fmul(b.read(place, FP32), factor)
            if of_query is not None:
                address = b.at(of_query, j, FP32)
                part = b.read_some(address, there) if partly else b.read(address, FP32)
                score = b.multiply_add(part, b.filled(_LOG2E), score)
            score = b.select(there, score, hidden) if partly else score
            b.write(score, place)
            return score

        (largest,) = b.loop(0, whole, lanes, lambda j, most: [b.larger(most, scaled(j, False))], hidden)
        rest = b.icmp_signed("<", whole, keys)
        most = b.where(rest, lambda: b.larger(largest, scaled(whole, True)), largest)
        top = b.spread(b.largest(most))
        weights = b.at(self.at["weights"], b.mul(i, b.number(self.row)), BF16)

        def power(j: Any, total: Any) -> Values:
            found = self._power(b.fsub(b.read(b.at(scores, j, FP32), FP32), top))
            if self.half:
                b.write(b.narrowed(found), b.at(weights, j, BF16))
            else:
                b.write(found, b.at(scores, j, FP32))
            return [b.fadd(total, found)]

        (total,) = b.loop(0, all_keys, lanes, power, b.filled(0.0))
        b.store(b.fdiv(ir.Constant(FP32, 1.0), b.summed(total)), b.at(self.at["sums"], i, FP32))

    def _power(self, x: Any) -> Any:
        """`2^x` for x up to 0, by a polynomial of what is left of its nearest integer; NaN where x is none."""
        b, kind = self.b, self.b.vector(INT32)
        bounded = b.larger(x, b.filled(_NO_EXPONENT))
        whole = b.intrinsic(f"llvm.roundeven.v{self.level.lanes}f32", x.type, bounded)
        found = b.polynomial(b.fsub(bounded, whole), coefficients(np.exp2, _DEGREE, (-0.5, 0.5)))
        if self.level.lanes == 16:
            # AVX-512 has an instruction for it, and for what is too small.
            return b.scaled_by_powers(found, whole)
        exponent = b.shl(b.fptosi(whole, kind), ir.Constant(kind, [23] * self.level.lanes))
        shifted = b.bitcast(b.add(b.bitcast(found, kind), exponent), x.type)
        known = b.select(b.fcmp_ordered("<", x, b.filled(_LEAST_EXPONENT)), b.filled(0.0), shifted)
        return b.select(b.fcmp_unordered("uno", x, x), x, known)


def _layout(half: bool, width: int, room: int, level: Level) -> tuple[dict[str, int], int]:
    """Where a thread's scratch memory holds what, and its bytes."""
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
    ends = np.cumsum([-(-size // 64) * 64 for size in sizes.values()]).tolist()
    return dict(zip(sizes, [0, *ends], strict=False)), whole_pages(ends[-1])


@cache
def _kernel(half: bool, width: int, room: int, biased: bool, level: Level) -> tuple[Kernel, int]:
    """The kernel, and the bytes of scratch memory that a thread needs."""

    def write() -> Builder:
        return _Attention(half, width, room, biased, level).b

    kernel = Kernel("attention", level, (half, width, room, biased), __file__, write)
    return kernel, _layout(half, width, room, level)[1]


def takes(q: Tensor, keys: int) -> bool:
    """Whether there is a kernel for queries `[..., D]`, and for so many keys."""
    return keys <= _ROOMS[-1] and whole(q.shape[-1], q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    bounds: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    level: Level | None = None,
) -> Tensor:
    """Attention of sequences of one length, or of packed ones.

    Args:
        q: `[B, Nq, H, D]`; k, v: `[B, Nk, H, D]`; any strides. With `bounds` `[1, Tq, H, D]` and `[1, Tk, H, D]`.
        scale: multiplies the products.
        bias: `[G, 1 or H, 1 or Nq, Nk]`, added to the scaled products, entry b mod G to batch entry b: G divides B.
            -inf hides a key. Not with `bounds`.
        bounds: S + 1 offsets of S sequences in q and in k.
        level: whose kernel runs; the best of this processor by default.

    Returns:
        Like q, contiguous; zeros for a sequence without keys.
    """
    level = level or levels()[0]
    half, threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    q, k, v = (_readable(t, half) for t in (q, k, v))
    entries, queries, heads, width = q.shape
    keys, addresses, some_without_keys = k.shape[1], (0, 0), not k.shape[1]
    if bounds is not None:
        offsets = np.array(bounds, np.int64)
        lengths = np.diff(offsets)
        entries, (queries, keys) = lengths.shape[1], lengths.max(1, initial=0).tolist()
        addresses = offsets[0].ctypes.data, offsets[1].ctypes.data
        some_without_keys = not lengths[1].all()
    out = (torch.zeros if some_without_keys else torch.empty)(q.shape, dtype=q.dtype)
    if not entries or not queries or not keys:
        return out
    chunk, chunks = divided(queries, -(-_TASKS_PER_THREAD * threads // (entries * heads)), _CHUNK)
    kernel, size = _kernel(half, width, next(n for n in _ROOMS if n >= keys), bias is not None, level)
    place = scratch_address("compiled attention", size * threads)
    bias_place, bias_strides, period = 0, (0, 0, 0), 1
    if bias is not None:
        bias = bias.to(torch.float32)
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        spread = [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]
        bias_place, bias_strides, period = bias.data_ptr(), (spread[0], spread[2], spread[1]), bias.shape[0]
    (as_bits,) = struct.unpack("i", struct.pack("f", scale))
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), bias_place, *addresses, place)
    strides = (s for t in (q, k, v, out) for s in t.stride()[:3])
    numbers = (*strides, *bias_strides, heads, queries, keys, period, chunk, chunks, threads, as_bits)
    kernel((*pointers, *numbers), entries * heads * chunks, threads)
    return out


def _readable(x: Tensor, half: bool) -> Tensor:
    """Rows whose elements lie together, in bf16 at even places, as pairs are read."""
    even = not half or all(stride % 2 == 0 for stride in x.stride()[:3])
    return x if x.stride(-1) == 1 and even else x.contiguous()
