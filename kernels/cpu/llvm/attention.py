"""Fused attention on CPUs: GEMMs, position bias and softmax of a tile stay in registers and cache.

A task is the queries of a head, or a chunk of them. It packs the keys once, so that a vector holds one channel of
consecutive keys; then tiles of rows go through scores, softmax and weighted sum within the first levels of cache. In
bf16 the GEMMs multiply pairs of channels, or of keys, and accumulate in fp32, by tiles of AMX where it exists; weights
are rounded once.
"""

from __future__ import annotations

import math
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
    fp32_bits,
    kernel,
    scratch_address,
    split_rows,
    whole_pages,
)
from .tiles import ROWS, Tiles, state_bytes

Bounds = tuple[tuple[int, ...], tuple[int, ...]]
"""S + 1 offsets of packed sequences: of queries, and of keys."""

# Capacities, in keys, that kernels are compiled for: the stride of a row of scores.
_CAPACITIES = (1040, 4112)
# Queries of a chunk, if heads are too few to keep all threads busy: enough to amortise packing the keys.
_CHUNK = 48
_TASKS_PER_THREAD = 4
_LOG2E = math.log2(math.e)

_POINTERS = ("q", "k", "v", "out", "bias", "bounds_q", "bounds_k", "scratch")
_STRIDES = [
    f"{name}_{axis}" for name in ("q", "k", "v", "out", "bias") for axis in ("batch", "row", "head")
]
_NUMBERS = (*_STRIDES, "heads", "queries", "keys", "period", "chunk", "chunks", "threads", "scale")


class Sequence(NamedTuple):
    """Rows of one head of a batch entry; the stride is in elements."""

    start: Any
    rows: Any
    stride: Any


class AttentionEmitter:
    """Code shared by the attention kernels.

    Args:
        half: Whether inputs are bf16 instead of fp32.
        width: Head dimension, a multiple of the lanes, in bf16 of twice the lanes.
        capacity: Maximum number of keys.
        biased: Whether there is an fp32 bias.
        level: Instruction set.
        layout: Offsets of a thread's scratch buffers, and its total size.
        pointers, numbers: Arguments of the function; the scale is the last number.
    """

    name: str

    def __init__(
        self,
        half: bool,
        width: int,
        capacity: int,
        biased: bool,
        level: Level,
        layout: tuple[dict[str, int], int],
        pointers: tuple[str, ...],
        numbers: tuple[str, ...],
    ) -> None:
        self.half, self.width, self.biased, self.level = half, width, biased, level
        # A unit of 32 bits is a channel in fp32, a pair of channels in bf16.
        self.element, self.unit, self.units = FP32, FP32, width
        if half:
            self.element, self.unit, self.units = BF16, INT32, width // 2
        self.score_stride = capacity + level.lanes
        self.offsets, self.scratch_bytes = layout
        self.buffers: dict[str, Any] = {}
        self.b = b = Builder(self.name, pointers, numbers, level)
        self.args = b.args
        self.args["scale"] = b.bitcast(b.int32(self.args["scale"]), FP32)

    def locate_scratch(self, thread: Any) -> None:
        """Compute the addresses of a thread's scratch buffers."""
        b = self.b
        base = b.at(self.args["scratch"], thread * self.scratch_bytes, BYTE)
        self.buffers = {name: b.at(base, offset, BYTE) for name, offset in self.offsets.items()}

    def bias_address(self, entry: Any, head: Any) -> Any:
        """Return the address of the bias of a batch entry's head; None without a bias."""
        b, args = self.b, self.args
        if not self.biased:
            return None
        offset = entry % args["period"] * args["bias_batch"]
        return b.at(args["bias"], offset + head * args["bias_head"], FP32)

    def sequence(self, name: str, entry: Any, head: Any, *, queries: bool) -> Sequence:
        """Return a head's rows of a batch entry, or of a packed sequence if there are bounds."""
        b, args = self.b, self.args
        bounds, rows = ("bounds_q", "queries") if queries else ("bounds_k", "keys")
        packed = b.is_not_null(args[bounds])
        before = b.block
        dense_offset = entry * args[f"{name}_batch"]
        with b.if_then(packed):
            start, end = (b.load_scalar(args[bounds], entry + i, INT64) for i in (0, 1))
            packed_offset, length = start * args[f"{name}_row"], end - start
            inside = b.block
        offset, count = b.phi(INT64), b.phi(INT64)
        offset.add_incoming(dense_offset.value, before)
        offset.add_incoming(packed_offset.value, inside)
        count.add_incoming(args[rows].value, before)
        count.add_incoming(length.value, inside)
        start = b.at(args[name], b.index(offset) + head * args[f"{name}_head"], self.element)
        return Sequence(start, b.index(count), args[f"{name}_row"])

    def row_address(self, rows: Sequence, index: Any, element: Any = None) -> Any:
        """Return the address of a row."""
        offset = index * rows.stride
        return self.b.at(rows.start, offset, self.element if element is None else element)

    def pack_panels(self, name: str, rows: Sequence) -> None:
        """Pack rows into panels of two vectors per unit; the last row pads the last panel."""
        b, lanes = self.b, self.level.lanes
        stride = rows.stride >> 1 if self.half else rows.stride
        units = rows._replace(stride=stride)
        last = rows.rows - 1

        def pack_vector(j: Any) -> None:
            panel = b.at(self._panel(name, j), j & lanes, self.unit)
            addresses = [
                self.row_address(units, b.minimum_int(j + i, last), self.unit) for i in range(lanes)
            ]
            b.pack(addresses, self.units, self.unit, panel)

        b.loop(0, rows.rows, lanes, pack_vector)

    def _panel(self, name: str, row: Any) -> Any:
        """Return the address of the panel of a row."""
        index = row // (2 * self.level.lanes)
        size = 2 * self.level.lanes * self.units
        return self.b.at(self.buffers[name], index * size, self.unit)

    def interleave_rows(self, name: str, rows: Sequence, multiple: int = 2) -> Sequence:
        """Interleave the channels of pairs of rows; the last row is repeated up to a multiple of rows."""
        b, lanes = self.b, self.level.lanes
        last = rows.rows - 1

        def interleave_pair(j: Any) -> None:
            pair = [b.minimum_int(j + i, last) for i in (0, 1)]
            first, second = (self.row_address(rows, row, INT16) for row in pair)
            out = b.at(self.buffers[name], (j >> 1) * self.width, INT32)
            for channel in range(0, self.width, lanes):
                x, y = (b.read(address, INT16, channel) for address in (first, second))
                b.write(b.interleave(x, y), b.at(out, channel, INT32))

        padded = b.round_up(rows.rows, multiple)
        b.loop(0, padded, 2, interleave_pair)
        pairs = padded >> 1
        return Sequence(self.buffers[name], pairs, self.width)

    def copy_rows(self, name: str, rows: Sequence, indices: Values) -> None:
        """Copy the rows of a tile to a contiguous buffer."""
        b = self.b
        for i, index in enumerate(indices):
            source = self.row_address(rows, index)
            for unit in range(0, self.units, self.level.lanes):
                out = b.at(self.buffers[name], i * self.units + unit, self.unit)
                b.write(b.read(source, self.unit, unit), out)

    def multiply_panels(self, height: int, name: str, panels: str, keys: Any, out: Any) -> None:
        """Multiply the rows of a tile with all packed keys, or values, into rows of scores at `out`."""
        b, lanes = self.b, self.level.lanes
        full = keys & -2 * lanes

        def multiply(vectors: int, key: Any) -> None:
            right = self._panel(panels, key), 2 * lanes
            sums = self.gemm(height, vectors, (self.buffers[name], self.units), right, self.units)
            for i in range(height):
                for n in range(vectors):
                    index = key + (i * self.score_stride + n * lanes)
                    b.write(sums[i * vectors + n], out, index)

        b.loop(0, full, 2 * lanes, lambda key: multiply(2, key))
        remaining = keys - full
        one_vector = remaining <= lanes
        with b.if_then(remaining > 0), b.if_else(one_vector) as (then, other):
            with then:
                multiply(1, full)
            with other:
                multiply(2, full)

    def gemm(
        self, height: int, vectors: int, left: tuple[Any, int], right: tuple[Any, Any], terms: Any
    ) -> Values:
        """Return a tile of sums over units, `[height · vectors]` fp32 vectors in registers.

        `left` is the address of the first row and the units to the next one; `right` the address of the first vectors
        and the units to the next ones.
        """
        b = self.b
        rows = [b.at(left[0], i * left[1], self.unit) for i in range(height)]
        columns, stride = right
        zero = b.splat(0.0)
        return b.microkernel(
            rows, columns, terms, self.unit, self.multiply_add, zero, vectors=vectors, stride=stride
        )

    @property
    def multiply_add(self) -> Callable[..., Any]:
        """The operation that adds the product of two units to an accumulator."""
        return self.b.dot_bf16 if self.half else self.b.multiply_add

    def scale_scores(self, scores: Any, bias: Any, keys: Any) -> Any:
        """Scale a row of scores for powers of two, add its bias, mask past the last key; return the maximum."""
        b, lanes = self.b, self.level.lanes
        factor = b.broadcast(b.fmul(self.args["scale"], ir.Constant(FP32, _LOG2E)))
        full, hidden, mask = keys & -lanes, b.splat(-math.inf), self.tail_mask(keys)

        def scale(j: Any, *, masked: bool) -> Any:
            address = b.at(scores, j, FP32)
            score = b.fmul(b.read(address, FP32), factor)
            if bias is not None:
                bias_j = b.at(bias, j, FP32)
                added = b.load_masked(bias_j, mask) if masked else b.read(bias_j, FP32)
                score = b.multiply_add(added, b.splat(_LOG2E), score)
            if masked:
                score = b.select(mask, score, hidden)
            b.write(score, address)
            return score

        (maximum,) = b.loop(
            0, full, lanes, lambda j, top: [b.maximum(top, scale(j, masked=False))], hidden
        )
        has_tail = full < keys
        maximum = b.compute_if(
            has_tail, lambda: b.maximum(maximum, scale(full, masked=True)), maximum
        )
        return b.reduce_max(maximum)

    def tail_mask(self, keys: Any) -> Any:
        """Return the mask of the elements of a row's last, partial vector."""
        b, lanes = self.b, self.level.lanes
        tail = keys - (keys & -lanes)
        lane = ir.Constant(b.vector(INT64), [*range(lanes)])
        return b.icmp_signed("<", lane, b.broadcast(tail))


class _Attention(AttentionEmitter):
    """Emits the forward kernel."""

    name = "attention"

    def __init__(self, half: bool, width: int, capacity: int, biased: bool, level: Level) -> None:
        layout = _layout(half, width, capacity, level)
        super().__init__(half, width, capacity, biased, level, layout, _POINTERS, _NUMBERS)
        self.tiles = Tiles(self.b, "bf16") if half and level.tiles else None
        if self.tiles is None:
            self.b.task_loop(self._task)
            return
        self.b.task_loop(self._task, self._configure)
        self.tiles.release()

    def _configure(self, thread: Any) -> None:
        assert self.tiles is not None
        self.locate_scratch(thread)
        self.tiles.configure(self.buffers["tiles"])

    def _task(self, task: Any, thread: Any) -> None:
        b, args = self.b, self.args
        chunk, head, entry = self._decompose(task)
        self.locate_scratch(thread)
        queries, out = (self.sequence(name, entry, head, queries=True) for name in ("q", "out"))
        keys, values = (self.sequence(name, entry, head, queries=False) for name in ("k", "v"))
        # The rows of this thread's likely next task are prefetched meanwhile.
        next_task = b.minimum_int(task + args["threads"], args["tasks"] - 1)
        _, next_head, next_entry = self._decompose(next_task)
        self.ahead = [
            self.sequence(name, next_entry, next_head, queries=name == "q")
            for name in ("q", "k", "v")
        ]
        bias = self.bias_address(entry, head)
        first = chunk * args["chunk"]
        stop = b.minimum_int(first + args["chunk"], queries.rows)
        non_empty = b.and_(first < stop, keys.rows > 0)
        with b.if_then(non_empty):
            self.pack_panels("keys", keys)
            if self.half:
                multiple = 2 if self.tiles is None else 2 * ROWS
                values = self.interleave_rows("values", values, multiple)

            def emit_tile(height: int, row: Any) -> None:
                self._tile(height, row, stop, queries, keys.rows, values, out, bias)

            def emit_tiles(height: int) -> None:
                b.loop(first, stop, height, lambda row: emit_tile(height, row))

            def emit_either(row: Any) -> None:
                with b.if_else(stop - row <= ROWS) as (short, tall):
                    with short:
                        emit_tile(ROWS, row)
                    with tall:
                        emit_tile(2 * ROWS, row)

            if self.tiles is None:
                b.choose_height(self.level.rows, stop - first, emit_tiles)
            else:
                b.loop(first, stop, 2 * ROWS, emit_either)

    def _decompose(self, task: Any) -> tuple[Any, Any, Any]:
        """Return chunk, head and batch entry of a task."""
        args = self.args
        chunk, index = task % args["chunks"], task // args["chunks"]
        return chunk, index % args["heads"], index // args["heads"]

    def _prefetch_row(self, row: Any, out: Sequence) -> None:
        """Prefetch a row of the next task's inputs, and of this task's output."""
        b, line = self.b, 64 // (2 if self.half else 4)
        for rows in (*self.ahead, out):
            address = self.row_address(rows, row)
            for channel in range(0, self.width, line):
                b.prefetch(b.at(address, channel, self.element), write=rows is out)

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
        last = stop - 1
        # Rows past the end repeat the last one, and are not written.
        indices = [b.minimum_int(row + i, last) for i in range(height)]
        self.copy_rows("queries", queries, indices)
        if self.tiles is None:
            self.multiply_panels(height, "queries", "keys", keys, self.buffers["scores"])
        else:
            self._score_tiles(height // ROWS, keys)

        def softmax(i: Any) -> None:
            query = b.minimum_int(row + i, last)
            self._prefetch_row(query, out)
            if bias is not None:
                # Past the last row follows the bias of the next head.
                below = b.at(bias, (query + height) * self.args["bias_row"], FP32)
                b.loop(0, keys, 64 // 4, lambda j: b.prefetch(b.at(below, j, FP32)))
            self._softmax(i, query, keys, bias)

        # Of a tile, rows past the end take too long to be computed in vain.
        rows = height if self.tiles is None else b.minimum_int(stop - row, height)
        b.loop(0, rows, 1, softmax)
        if self.tiles is not None:
            self._attend_tiles(height // ROWS, row, stop, values, out)
            return
        left = self.buffers["scores"], self.score_stride
        if self.half:
            left = self.buffers["weights"], self.score_stride // 2
        for channel in range(0, self.width, 2 * lanes):
            vectors = min(2, (self.width - channel) // lanes)
            right = b.at(values.start, channel, self.unit), values.stride
            sums = self.gemm(height, vectors, left, right, values.rows)
            for i in range(height):
                with b.if_then(row + i <= last):
                    inverse = b.broadcast(b.load_scalar(self.buffers["inverses"], i, FP32))
                    out_row = self.row_address(out, indices[i])
                    for n in range(vectors):
                        attended = b.fmul(sums[i * vectors + n], inverse)
                        b.write_fp32(attended, out_row, self.element, channel + n * lanes)

    def _score_tiles(self, rows: int, keys: Any) -> None:
        """Multiply tiles of queries with all packed keys into rows of scores."""
        b, tiles, width = self.b, self.tiles, 2 * self.level.lanes
        assert tiles is not None

        def multiply(key: Any) -> None:
            left, right = (self.buffers["queries"], self.units), (self._panel("keys", key), width)
            out = b.at(self.buffers["scores"], key, FP32), self.score_stride
            tiles.multiply(rows, left, right, self.units, out)

        b.loop(0, keys, width, multiply)

    def _attend_tiles(
        self, rows: int, row: Any, stop: Any, values: Sequence, out: Sequence
    ) -> None:
        """Multiply tiles of weights with the values, and store the rows."""
        b, lanes, sums = self.b, self.level.lanes, self.buffers["attended"]
        assert self.tiles is not None
        left = self.buffers["weights"], self.score_stride // 2
        for channel in range(0, self.width, 2 * lanes):
            right = b.at(values.start, channel, self.unit), self.width
            product = b.at(sums, channel, FP32), self.width
            self.tiles.multiply(rows, left, right, values.rows, product)

        def store(i: Any) -> None:
            inverse = b.broadcast(b.load_scalar(self.buffers["inverses"], i, FP32))
            out_row = self.row_address(out, row + i)
            for channel in range(0, self.width, lanes):
                attended = b.fmul(b.read(sums, FP32, i * self.width + channel), inverse)
                b.write_fp32(attended, out_row, self.element, channel)

        b.loop(0, b.minimum_int(stop - row, ROWS * rows), 1, store)

    def _softmax(self, i: Any, query: Any, keys: Any, bias: Any) -> None:
        """Compute a row's unnormalised weights, zero past the last key, and the reciprocal of their sum."""
        b, lanes = self.b, self.level.lanes
        scores = b.at(self.buffers["scores"], i * self.score_stride, FP32)
        if bias is not None:
            bias = b.at(bias, query * self.args["bias_row"], FP32)
        maximum = b.broadcast(self.scale_scores(scores, bias, keys))
        weights = b.at(self.buffers["weights"], i * self.score_stride, BF16)

        def exponentiate(j: Any, total: Any) -> Values:
            weight = b.exp2(b.fsub(b.read(scores, FP32, j), maximum))
            if self.half:
                b.write(b.fp32_to_bf16(weight), weights, j)
            else:
                b.write(weight, scores, j)
            return [b.fadd(total, weight)]

        end = b.round_up(keys, lanes)
        (total,) = b.loop(0, end, lanes, exponentiate, b.splat(0.0))
        if self.tiles is not None:
            # A tile sums over two vectors of keys.
            b.write(b.splat(0, INT16), b.at(weights, end, INT16))
        inverse = b.fdiv(ir.Constant(FP32, 1.0), b.reduce_add(total))
        b.store(inverse, b.at(self.buffers["inverses"], i, FP32))


@cache
def _layout(half: bool, width: int, capacity: int, level: Level) -> tuple[dict[str, int], int]:
    """Return the offsets of a thread's scratch buffers, and their total size."""
    tiled = half and bool(level.tiles)
    rows = 2 * ROWS if tiled else level.rows
    keys = -(-capacity // (2 * level.lanes)) * 2 * level.lanes
    element = 2 if half else 4
    sizes = {
        "queries": rows * width * element,
        "inverses": rows * 4,
        "scores": rows * (capacity + level.lanes) * 4,
        "weights": rows * (capacity + level.lanes) * 2 if half else 0,
        "keys": keys * width * element,
        "values": keys * width * 2 if half else 0,
        "attended": rows * width * 4 if tiled else 0,
        "tiles": state_bytes(level) if tiled else 0,
    }
    return consecutive(sizes)


def consecutive(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Return the offsets of consecutive buffers, aligned to cache lines, and their total size in whole pages."""
    ends = np.cumsum([-(-size // 64) * 64 for size in sizes.values()]).tolist()
    return dict(zip(sizes, [0, *ends], strict=False)), whole_pages(ends[-1])


def takes(q: Tensor, keys: int) -> bool:
    """Return whether there is a kernel for queries `[..., D]` and this number of keys."""
    return keys <= _CAPACITIES[-1] and fills_vectors(q.shape[-1], q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    bounds: Bounds | None = None,
    level: Level | None = None,
) -> Tensor:
    """Compute attention of q `[B, Nq, H, D]` and k, v `[B, Nk, H, D]`, or packed in one entry with `bounds`.

    The bias `[G, 1 or H, 1 or Nq, Nk]`, without `bounds` only, applies to batch entry b by entry b mod G (G divides B);
    -inf hides a key. The result is contiguous, with zeros for a sequence without keys.
    """
    half = q.dtype == torch.bfloat16
    q, k, v = (readable(t, half) for t in (q, k, v))
    (entries, queries, *_), keys = q.shape, k.shape[1]
    has_empty = not keys if bounds is None else any(a == b for a, b in pairwise(bounds[1]))
    out = (torch.zeros if has_empty else torch.empty)(q.shape, dtype=q.dtype)
    entries, queries, keys, offsets = batch_sizes(bounds, entries, queries, keys)
    if entries and queries and keys:
        attend(
            q,
            k,
            v,
            out,
            scale,
            readable_bias(bias),
            (entries, queries, keys),
            row_addresses(offsets),
            level,
        )
    return out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scale: float,
    bias: tuple[Tensor | None, tuple[int, int, int]],
    sizes: tuple[int, int, int],
    offsets: tuple[int, int],
    level: Level | None = None,
) -> None:
    """Launch the kernel on readable q, k, v `[B, N, H, D]`.

    Args:
        bias: As from `readable_bias`.
        sizes: Batch entries or packed sequences, most queries and most keys of one.
        offsets: Addresses of the bounds of queries and keys, int64; null for batch entries.
    """
    level = level or levels()[0]
    half, threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    (entries, queries, keys), (heads, width) = sizes, q.shape[2:]
    chunks = -(-_TASKS_PER_THREAD * threads // (entries * heads))
    chunk, chunks = split_rows(queries, chunks, _CHUNK)
    capacity = next(n for n in _CAPACITIES if n >= keys)
    scratch_bytes = _layout(half, width, capacity, level)[1] * threads
    scratch = scratch_address("compiled attention", scratch_bytes)
    added, bias_strides = bias
    period = 1 if added is None else added.shape[0]
    run = kernel(_Attention, half, width, capacity, added is not None, level)
    addresses = (0 if t is None else t.data_ptr() for t in (q, k, v, out, added))
    strides = (s for t in (q, k, v, out) for s in t.stride()[:3])
    numbers = (heads, queries, keys, period, chunk, chunks, threads, fp32_bits(scale))
    args = (*addresses, *offsets, scratch, *strides, *bias_strides, *numbers)
    run(args, entries * heads * chunks, threads)


def readable(x: Tensor, half: bool) -> Tensor:
    """Copy x unless its rows are contiguous and, in bf16, begin at even offsets, since kernels read pairs."""
    even = not half or all(stride % 2 == 0 for stride in x.stride()[:3])
    return x if x.stride(-1) == 1 and even else x.contiguous()


def batch_sizes(
    bounds: Bounds | None, entries: int, queries: int, keys: int
) -> tuple[int, int, int, np.ndarray | None]:
    """Return the number of sequences, their maximum queries and keys, and the bounds as an array."""
    if bounds is None:
        return entries, queries, keys, None
    offsets = np.array(bounds, np.int64)
    lengths = np.diff(offsets)
    return (lengths.shape[1], *lengths.max(1, initial=0).tolist(), offsets)


def row_addresses(offsets: np.ndarray | None) -> tuple[int, int]:
    """Return the addresses of the bounds of queries and keys; null without bounds."""
    return (0, 0) if offsets is None else (offsets[0].ctypes.data, offsets[1].ctypes.data)


def readable_bias(bias: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """Return a bias in fp32 with contiguous rows, and its strides by batch entry, row and head; 0 broadcasts."""
    if bias is None:
        return None, (0, 0, 0)
    bias = bias.to(torch.float32)
    bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    batch, head, row = (0 if bias.shape[axis] == 1 else bias.stride(axis) for axis in range(3))
    return bias, (batch, row, head)
