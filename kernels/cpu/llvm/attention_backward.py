"""Gradients of attention, a head at a time: recomputed scores, softmax, and five GEMMs over blocks of rows in cache.

A task is a head of the batch entries with one bias gradient, or of some of them: it sums their score gradients
in order in its own buffer, so that no sum depends on the schedule of the threads. It packs keys and values once per
entry; then blocks of rows go through scores, softmax and their gradients, and add to the gradients of keys and values.
The forward pass saves its inputs only. In bf16 the GEMMs take pairs of channels, keys or queries, sum in fp32,
and weights and score gradients are rounded once.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import llvmlite.ir as ir
import torch
from torch import Tensor

from ...reference import HIDDEN
from . import Level, fills_vectors, levels
from .attention import Heads, Sequence, bias_place, laid_out, lengths_of, readable, scale_bits
from .builder import BF16, FP32, INT16, INT32, divided, kernel, scratch_address

# Maximum keys of a kernel, the stride of its rows of scores. With more, a head's data exceed the second level of
# cache.
_ROOMS = (208, 592, 1040)
# Tiles of rows: their weights and score gradients stay in cache until the GEMMs for keys and values.
_BLOCK_TILES = 4
_TASKS_PER_THREAD = 3
# The largest score of a query with hidden keys only, in base 2; rounding may raise it a little.
_BLIND = 1.4 * HIDDEN

_GIVEN, _MADE = ("dout", "q", "k", "v"), ("dq", "dk", "dv")
_POINTERS = (*_GIVEN, *_MADE, "dbias", "bias", "bounds_q", "bounds_k", "scratch")
_STRIDES = [
    f"{name}_{axis}"
    for name in (*_GIVEN, *_MADE, "bias", "dbias")
    for axis in ("batch", "row", "head")
]
_NUMBERS = (
    *_STRIDES,
    "heads",
    "queries",
    "keys",
    "period",
    "entries",
    "apart",
    "together",
    "dbias_group",
    "scale",
)


class _Entry(NamedTuple):
    """What belongs to a head of a batch entry."""

    dout: Sequence
    q: Sequence
    k: Sequence
    dq: Sequence
    right_keys: Sequence
    """Keys as the right side of a product with score gradients."""
    bias: Any
    dbias: Any


class _Gradients(Heads):
    """Writes the kernel of a dtype, a width and a length; `summed`: with the gradient of the bias."""

    name = "attention_backward"

    def __init__(
        self, half: bool, width: int, room: int, biased: bool, summed: bool, level: Level
    ) -> None:
        layout = _layout(half, width, room, level)
        super().__init__(half, width, room, biased, level, layout, _POINTERS, _NUMBERS)
        self.summed = summed
        self.b.tasks(self._task)

    def _task(self, task: Any, thread: Any) -> None:
        b, given = self.b, self.given
        head, rest = b.srem(task, given["heads"]), b.sdiv(task, given["heads"])
        first, group = b.srem(rest, given["apart"]), b.sdiv(rest, given["apart"])
        self.of_thread(thread)
        dbias = None
        if self.summed:
            offset = b.add(b.mul(group, given["dbias_group"]), b.mul(first, given["dbias_batch"]))
            dbias = b.at(given["dbias"], b.add(offset, b.mul(head, given["dbias_head"])), FP32)
        start = b.mul(group, given["together"])
        stop = b.minimum_int(
            b.add(start, given["together"]), b.sdiv(given["entries"], given["apart"])
        )

        def entry(i: Any) -> None:
            self._entry(b.add(first, b.mul(i, given["apart"])), head, dbias)

        b.loop(start, stop, 1, entry)

    def _entry(self, number: Any, head: Any, dbias: Any) -> None:
        b = self.b
        names = (*_GIVEN, *_MADE)
        found = {n: self.sequence(n, number, head, queries=n in ("dout", "q", "dq")) for n in names}
        queries, keys = found["q"].rows, found["k"].rows
        with b.if_then(b.and_(b.icmp_signed(">", queries, 0), b.icmp_signed(">", keys, 0))):
            self.lay_out_panels("keys", found["k"])
            self.lay_out_panels("values", found["v"])
            right = self.lay_out_pairs("right_keys", found["k"]) if self.half else found["k"]
            given = found["dout"], found["q"], found["k"], found["dq"]
            entry = _Entry(*given, right, self.bias_of(number, head), dbias)
            zero, size = b.splat(0.0), b.mul(keys, self.width)
            for place in (self.at["dk"], self.at["dv"]):
                b.loop(
                    0,
                    size,
                    self.level.lanes,
                    lambda i, place=place: b.write(zero, b.at(place, i, FP32)),
                )
            block = _BLOCK_TILES * self.level.rows

            def rows(first: Any) -> None:
                self._block(first, b.minimum_int(b.add(first, block), queries), entry)

            b.loop(0, queries, block, rows)
            scale = b.broadcast(self.given["scale"])
            for name, factor in (("dk", scale), ("dv", None)):
                self._give(name, found[name], keys, factor)

    def _give(self, name: str, into: Sequence, keys: Any, factor: Any) -> None:
        """Write the gradient sums of keys or values in their final dtype and place."""
        b = self.b

        def row(j: Any) -> None:
            source = b.at(self.at[name], b.mul(j, self.width), FP32)
            place = b.at(into.start, b.mul(j, into.stride), self.element)
            for channel in range(0, self.width, self.level.lanes):
                found = b.read(b.at(source, channel, FP32), FP32)
                found = found if factor is None else b.fmul(found, factor)
                b.write(
                    b.fp32_to_bf16(found) if self.half else found,
                    b.at(place, channel, self.element),
                )

        b.loop(0, keys, 1, row)

    def _block(self, first: Any, stop: Any, entry: _Entry) -> None:
        b = self.b
        rows = b.sub(stop, first)

        def all_of(height: int) -> None:
            b.loop(first, stop, height, lambda row: self._tile(height, first, row, stop, entry))

        b.heights(self.level.rows, rows, all_of)
        terms, right = rows, []
        for name, given in (("right_queries", entry.q), ("right_dout", entry.dout)):
            some = Sequence(
                b.at(given.start, b.mul(first, given.stride), self.element), rows, given.stride
            )
            right.append(self.lay_out_pairs(name, some) if self.half else some)
        if self.half:
            terms = right[0].rows
        for name, left, factors in (("dk", "dscores", right[0]), ("dv", "weights", right[1])):
            self._add_columns(name, left, factors, terms, entry.k.rows)

    def _add_columns(self, name: str, left: str, right: Sequence, terms: Any, keys: Any) -> None:
        """Add the products of a block's columns (weights or score gradients) and rows to the sums of keys."""
        b, lanes = self.b, self.level.lanes
        for channel in range(0, self.width, _columns(self.level) * lanes):
            vectors = min(_columns(self.level), (self.width - channel) // lanes)
            height = min(self.level.rows, 2 * self.level.rows // vectors)

            def some(
                key: Any, channel: int = channel, vectors: int = vectors, height: int = height
            ) -> None:
                rows = [b.at(self.at[left], b.add(key, i), self.unit) for i in range(height)]
                columns = (b.at(right.start, channel, self.unit), right.stride)
                sums = b.tile(
                    rows,
                    vectors,
                    *columns,
                    terms,
                    self.unit,
                    self.add,
                    b.splat(0.0),
                    apart=self.row,
                )
                for i in range(height):
                    place = b.add(b.mul(b.add(key, i), self.width), channel)
                    for n in range(vectors):
                        at = b.at(self.at[name], b.add(place, n * lanes), FP32)
                        b.write(b.fadd(b.read(at, FP32), sums[i * vectors + n]), at)

            b.loop(0, keys, height, some)

    def _tile(self, height: int, first: Any, row: Any, stop: Any, entry: _Entry) -> None:
        b, lanes, keys = self.b, self.level.lanes, entry.k.rows
        last = b.sub(stop, 1)
        places = [b.minimum_int(b.add(row, i), last) for i in range(height)]
        self.copy_rows("queries", entry.q, places)
        self.copy_rows("dout", entry.dout, places)
        # In fp32 scores become weights, and the other products score gradients, where they are.
        number = 0 if self.half else b.mul(b.sub(row, first), self.row)
        scores, dscores = (b.at(self.at[name], number, FP32) for name in ("scores", "products"))
        self.products(height, "queries", "keys", keys, scores)
        self.products(height, "dout", "values", keys, dscores)
        count, together = b.minimum_int(b.sub(stop, row), height), 2 if self.half else 1
        b.loop(
            0,
            count,
            together,
            lambda i: self._softmax(i, first, row, last, keys, entry, scores, dscores),
        )
        left, step = (self.at["rounded"], self.row // 2) if self.half else (dscores, self.row)
        scale = b.broadcast(self.given["scale"])
        for channel in range(0, self.width, 2 * lanes):
            vectors = min(2, (self.width - channel) // lanes)
            right = b.at(entry.right_keys.start, channel, self.unit), entry.right_keys.stride
            sums = self.product(height, vectors, (left, step), right, entry.right_keys.rows)
            for i in range(height):
                with b.if_then(b.icmp_signed("<=", b.add(row, i), last)):
                    into = b.at(entry.dq.start, b.mul(places[i], entry.dq.stride), self.element)
                    for n in range(vectors):
                        found = b.fmul(sums[i * vectors + n], scale)
                        place = b.at(into, channel + n * lanes, self.element)
                        b.write(b.fp32_to_bf16(found) if self.half else found, place)

    def _softmax(
        self,
        i: Any,
        first: Any,
        row: Any,
        last: Any,
        keys: Any,
        entry: _Entry,
        scores: Any,
        dscores: Any,
    ) -> None:
        """Weights and score gradients of a row of a tile, in bf16 of two rows, of which the second may not be there."""
        b, lanes = self.b, self.level.lanes
        every = b.round_up(keys, lanes)
        rows = []
        for n in range(2 if self.half else 1):
            number = b.add(i, n)
            query = b.minimum_int(b.add(row, number), last)
            p, dp = (b.at(x, b.mul(number, self.row), FP32) for x in (scores, dscores))
            bias = (
                None
                if entry.bias is None
                else b.at(entry.bias, b.mul(query, self.given["bias_row"]), FP32)
            )
            top = self.scaled(p, bias, keys)
            blind = b.fcmp_ordered("<=", top, ir.Constant(FP32, _BLIND))
            # Less infinity, all scores have the weight 0.
            less = b.broadcast(b.select(blind, ir.Constant(FP32, math.inf), top))

            def power(
                j: Any, total: Any, delta: Any, p: Any = p, dp: Any = dp, less: Any = less
            ) -> list[Any]:
                place = b.at(p, j, FP32)
                found = self.power(b.fsub(b.read(place, FP32), less))
                b.write(found, place)
                return [
                    b.fadd(total, found),
                    b.multiply_add(found, b.read(b.at(dp, j, FP32), FP32), delta),
                ]

            total, delta = b.loop(0, every, lanes, power, b.splat(0.0), b.splat(0.0))
            nothing = ir.Constant(FP32, 0.0)
            inverse = b.select(blind, nothing, b.fdiv(ir.Constant(FP32, 1.0), b.reduce_add(total)))
            mean = b.broadcast(b.fmul(b.reduce_add(delta), inverse))
            if n:
                inverse = b.select(b.icmp_signed("<=", b.add(row, number), last), inverse, nothing)
            dbias = None
            if entry.dbias is not None:
                dbias = b.at(entry.dbias, b.mul(query, self.given["dbias_row"]), FP32)
            rows.append((p, dp, b.broadcast(inverse), mean, dbias))
        # The unit of a block's row, or pair of rows, of weights and of score gradients.
        unit = b.mul(b.add(b.sub(row, first), i), self.row // 2 if self.half else self.row)
        mask = self.tail_mask(keys)

        def some(j: Any, partly: bool) -> None:
            weights, gradients = [], []
            for p, dp, inverse, mean, dbias in rows:
                weight = b.fmul(b.read(b.at(p, j, FP32), FP32), inverse)
                gradient = b.fmul(weight, b.fsub(b.read(b.at(dp, j, FP32), FP32), mean))
                if dbias is not None:
                    place = b.at(dbias, j, FP32)
                    if partly:
                        b.store_masked(b.fadd(b.load_masked(place, mask), gradient), place, mask)
                    else:
                        b.write(b.fadd(b.read(place, FP32), gradient), place)
                weights.append(weight)
                gradients.append(gradient)
            for name, values in (("weights", weights), ("dscores", gradients)):
                if self.half:
                    rounded = [b.bitcast(b.fp32_to_bf16(x), b.vector(INT16)) for x in values]
                    b.write(b.interleave(*rounded), b.at(self.at[name], b.add(unit, j), INT32))
                    if name == "dscores":
                        for n, x in enumerate(rounded):
                            place = b.add(b.mul(b.add(i, n), self.row), j)
                            b.write(x, b.at(self.at["rounded"], place, BF16))
                else:
                    b.write(values[0], b.at(self.at[name], b.add(unit, j), FP32))

        if self.summed:
            full = b.and_(keys, -lanes)
            b.loop(0, full, lanes, lambda j: some(j, False))
            with b.if_then(b.icmp_signed("<", full, keys)):
                some(full, True)
        else:
            b.loop(0, every, lanes, lambda j: some(j, False))


def _columns(level: Level) -> int:
    """Vectors of a tile of columns; the fewer rows it then has, the fewer numbers are spread for it."""
    return 4 if level.lanes == 16 else 2


@cache
def _layout(half: bool, width: int, room: int, level: Level) -> tuple[dict[str, int], int]:
    """Offsets of a thread's scratch memory, and its size."""
    row, keys, block = (
        room + level.lanes,
        -(-room // (2 * level.lanes)) * 2 * level.lanes,
        _BLOCK_TILES * level.rows,
    )
    element = 2 if half else 4
    # A tile of columns may begin at the last key.
    sums = (keys + level.rows) * width * 4
    sizes = {
        "queries": level.rows * width * element,
        "dout": level.rows * width * element,
        "keys": keys * width * element,
        "values": keys * width * element,
        "dk": sums,
        "dv": sums,
        # Of a block, in bf16 in pairs of rows, and then of a tile in fp32 before.
        "weights": block * row * element,
        "dscores": block * row * element,
    }
    if half:
        more = {
            "scores": level.rows * row * 4,
            "products": level.rows * row * 4,
            "rounded": level.rows * row * 2,
        }
        more |= {
            "right_keys": keys * width * 2,
            "right_queries": block * width * 2,
            "right_dout": block * width * 2,
        }
        return laid_out(sizes | more)
    places, size = laid_out(sizes)
    return places | {"scores": places["weights"], "products": places["dscores"]}, size


def takes(q: Tensor, keys: int) -> bool:
    """Whether there is a kernel for queries `[..., D]`, and for so many keys."""
    return keys <= _ROOMS[-1] and fills_vectors(q.shape[-1], q.dtype)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    bias_gradient: bool = False,
    bounds: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    level: Level | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv of `attention`, contiguous, and dbias `[G, H, Nq, Nk]` in fp32 with `bias_gradient`.

    Zeros for queries that see no key and for keys without queries. The bias gradient is summed over the batch in an
    order that depends on the number of threads.
    """
    level = level or levels()[0]
    half, threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    dout, q, k, v = (readable(t, half) for t in (dout, q, k, v))
    (entries, queries, heads, width), keys = q.shape, k.shape[1]
    entries, queries, keys, offsets = lengths_of(bounds, entries, queries, keys)
    # Queries without keys and keys without queries.
    empty, unread = (
        any(a == b for a, b in pairwise(side)) for side in reversed(bounds or ((), ()))
    )
    kinds = ((empty, q), (unread, k), (unread, v))
    made = [(torch.zeros if some else torch.empty)(t.shape, dtype=t.dtype) for some, t in kinds]
    period = 1 if bias is None else bias.shape[0]
    if not entries or not queries or not keys:
        none = torch.zeros((period, heads, queries, keys)) if bias_gradient else None
        return made[0].zero_(), made[1].zero_(), made[2].zero_(), none
    apart = period if bias_gradient else entries
    # Where heads are too few to keep all threads busy, several share the entries, and their sums are added at the end.
    together, groups = divided(
        entries // apart, -(-_TASKS_PER_THREAD * threads // (heads * apart)), 1
    )
    dbias = torch.zeros((groups, period, heads, queries, keys)) if bias_gradient else None
    room = next(n for n in _ROOMS if n >= keys)
    place = scratch_address(
        "compiled attention backward", _layout(half, width, room, level)[1] * threads
    )
    run = kernel(_Gradients, half, width, room, bias is not None, bias_gradient, level)
    bias, bias_strides = bias_place(bias)
    addresses = (0 if t is None else t.data_ptr() for t in (dout, q, k, v, *made, dbias, bias))
    strides = (s for t in (dout, q, k, v, *made) for s in t.stride()[:3])
    of_dbias = (
        (0, 0, 0, 0) if dbias is None else (*(dbias.stride(n) for n in (1, 3, 2)), dbias.stride(0))
    )
    numbers = (
        *strides,
        *bias_strides,
        *of_dbias[:3],
        heads,
        queries,
        keys,
        period,
        entries,
        apart,
        together,
    )
    bounds_at = (0, 0) if offsets is None else (offsets[0].ctypes.data, offsets[1].ctypes.data)
    given = (*addresses, *bounds_at, place, *numbers, of_dbias[3], scale_bits(scale))
    run(given, heads * apart * groups, threads)
    if dbias is None:
        return made[0], made[1], made[2], None
    return made[0], made[1], made[2], dbias[0] if groups == 1 else dbias.sum(0)
