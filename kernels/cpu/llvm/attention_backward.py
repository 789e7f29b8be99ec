"""Gradients of attention, a head at a time: recomputed scores, softmax, and five GEMMs over blocks of rows in cache.

A task is a head of the batch entries with one bias gradient, or of some of them: it accumulates their score gradients
in order in a buffer of its own, so that no sum depends on the threads' schedule. It packs keys and values once per
entry; then blocks of rows go through scores, softmax and their gradients, and add to the gradients of keys and values.
The forward pass saves its inputs only. In bf16 the GEMMs multiply pairs of channels, keys or queries and accumulate
in fp32; weights and score gradients are rounded once.
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
from .attention import (
    AttentionEmitter,
    Bounds,
    Sequence,
    batch_sizes,
    consecutive,
    readable,
    readable_bias,
    row_addresses,
)
from .builder import (
    BF16,
    FP32,
    INT16,
    INT32,
    Values,
    fp32_bits,
    kernel,
    scratch_address,
    split_rows,
)

# Capacities, in keys, that kernels are compiled for. With more keys, a head's data exceed the second level of cache.
_CAPACITIES = (208, 592, 1040)
# Tiles of rows: their weights and score gradients stay in cache until the GEMMs for keys and values.
_BLOCK_TILES = 4
_TASKS_PER_THREAD = 3
# The largest score of a query with hidden keys only, in base 2; rounding may raise it a little.
_BLIND = 1.4 * HIDDEN

_INPUTS, _GRADIENTS = ("dout", "q", "k", "v"), ("dq", "dk", "dv")
_POINTERS = (*_INPUTS, *_GRADIENTS, "dbias", "bias", "bounds_q", "bounds_k", "scratch")
_STRIDES = [
    f"{name}_{axis}"
    for name in (*_INPUTS, *_GRADIENTS, "bias", "dbias")
    for axis in ("batch", "row", "head")
]
_SIZES = ("heads", "queries", "keys", "period", "entries", "biases", "group_entries")
_NUMBERS = (*_STRIDES, *_SIZES, "dbias_group", "scale")


class _Entry(NamedTuple):
    """Rows of one head of a batch entry, and the addresses of its bias and bias gradient."""

    dout: Sequence
    q: Sequence
    k: Sequence
    dq: Sequence
    right_keys: Sequence
    """Keys as the right operand of the GEMM with score gradients."""
    bias: Any
    dbias: Any


class _SoftmaxRow(NamedTuple):
    """A row of scores on its way to score gradients: addresses, and broadcast scalars."""

    weights: Any
    dweights: Any
    inverse: Any
    mean: Any
    dbias: Any


class _AttentionBackward(AttentionEmitter):
    """Emits the backward kernel, with the gradient of the bias if `summed`."""

    name = "attention_backward"

    def __init__(
        self, half: bool, width: int, capacity: int, biased: bool, summed: bool, level: Level
    ) -> None:
        layout = _layout(half, width, capacity, level)
        super().__init__(half, width, capacity, biased, level, layout, _POINTERS, _NUMBERS)
        self.summed = summed
        self.b.task_loop(self._task)

    def _task(self, task: Any, thread: Any) -> None:
        b, args = self.b, self.args
        head, index = task % args["heads"], task // args["heads"]
        first, group = index % args["biases"], index // args["biases"]
        self.locate_scratch(thread)
        dbias = None
        if self.summed:
            offset = group * args["dbias_group"] + first * args["dbias_batch"]
            dbias = b.at(args["dbias"], offset + head * args["dbias_head"], FP32)
        start = group * args["group_entries"]
        end = start + args["group_entries"]
        stop = b.minimum_int(end, args["entries"] // args["biases"])

        def entry(i: Any) -> None:
            self._entry(first + i * args["biases"], head, dbias)

        b.loop(start, stop, 1, entry)

    def _entry(self, index: Any, head: Any, dbias: Any) -> None:
        b = self.b
        rows = {
            name: self.sequence(name, index, head, queries=name in ("dout", "q", "dq"))
            for name in (*_INPUTS, *_GRADIENTS)
        }
        queries, keys = rows["q"].rows, rows["k"].rows
        with b.if_then(b.and_(queries > 0, keys > 0)):
            self.pack_panels("keys", rows["k"])
            self.pack_panels("values", rows["v"])
            right = self.interleave_rows("right_keys", rows["k"]) if self.half else rows["k"]
            bias = self.bias_address(index, head)
            entry = _Entry(rows["dout"], rows["q"], rows["k"], rows["dq"], right, bias, dbias)
            zero, size = b.splat(0.0), keys * self.width
            for name in ("dk", "dv"):
                sums = self.buffers[name]
                b.loop(0, size, self.level.lanes, lambda i, sums=sums: b.write(zero, sums, i))
            block_rows = _BLOCK_TILES * self.level.rows

            def block(first: Any) -> None:
                self._block(first, b.minimum_int(first + block_rows, queries), entry)

            b.loop(0, queries, block_rows, block)
            scale = b.broadcast(self.args["scale"])
            self._store_sums("dk", rows["dk"], keys, scale)
            self._store_sums("dv", rows["dv"], keys, None)

    def _store_sums(self, name: str, out: Sequence, keys: Any, factor: Any) -> None:
        """Store the accumulated gradient of keys or values in its dtype."""
        b = self.b

        def row(j: Any) -> None:
            sums = b.at(self.buffers[name], j * self.width, FP32)
            out_row = self.row_address(out, j)
            for channel in range(0, self.width, self.level.lanes):
                value = b.read(sums, FP32, channel)
                if factor is not None:
                    value = b.fmul(value, factor)
                b.write_fp32(value, out_row, self.element, channel)

        b.loop(0, keys, 1, row)

    def _block(self, first: Any, stop: Any, entry: _Entry) -> None:
        b = self.b
        rows = stop - first

        def emit_tiles(height: int) -> None:
            b.loop(first, stop, height, lambda row: self._tile(height, first, row, stop, entry))

        b.choose_height(self.level.rows, rows, emit_tiles)
        terms, right = rows, []
        for name, operand in (("right_queries", entry.q), ("right_dout", entry.dout)):
            block = Sequence(self.row_address(operand, first), rows, operand.stride)
            right.append(self.interleave_rows(name, block) if self.half else block)
        if self.half:
            terms = right[0].rows
        self._add_to_sums("dk", "dscores", right[0], terms, entry.k.rows)
        self._add_to_sums("dv", "weights", right[1], terms, entry.k.rows)

    def _add_to_sums(self, name: str, left: str, right: Sequence, terms: Any, keys: Any) -> None:
        """Add `left^T right` of a block, weights or score gradients times rows, to a gradient of all keys."""
        b, lanes, zero = self.b, self.level.lanes, self.b.splat
        most_vectors = _vectors(self.level)
        for channel in range(0, self.width, most_vectors * lanes):
            vectors = min(most_vectors, (self.width - channel) // lanes)
            height = min(self.level.rows, 2 * self.level.rows // vectors)

            def tile(
                key: Any, channel: int = channel, vectors: int = vectors, height: int = height
            ) -> None:
                sums = b.microkernel(
                    [b.at(self.buffers[left], key + i, self.unit) for i in range(height)],
                    b.at(right.start, channel, self.unit),
                    terms,
                    self.unit,
                    self.multiply_add,
                    zero(0.0),
                    vectors=vectors,
                    stride=right.stride,
                    row_step=self.score_stride,
                )
                for i in range(height):
                    offset = (key + i) * self.width + channel
                    for n in range(vectors):
                        address = b.at(self.buffers[name], offset + n * lanes, FP32)
                        b.write(b.fadd(b.read(address, FP32), sums[i * vectors + n]), address)

            b.loop(0, keys, height, tile)

    def _tile(self, height: int, first: Any, row: Any, stop: Any, entry: _Entry) -> None:
        b, lanes, keys = self.b, self.level.lanes, entry.k.rows
        last = stop - 1
        indices = [b.minimum_int(row + i, last) for i in range(height)]
        self.copy_rows("queries", entry.q, indices)
        self.copy_rows("dout", entry.dout, indices)
        # In fp32 scores become weights, and the gradients of weights those of scores, in place.
        offset = 0 if self.half else (row - first) * self.score_stride
        scores, dweights = (
            b.at(self.buffers[name], offset, FP32) for name in ("scores", "dweights")
        )
        self.multiply_panels(height, "queries", "keys", keys, scores)
        self.multiply_panels(height, "dout", "values", keys, dweights)

        def softmax(i: Any) -> None:
            self._softmax(i, first, row, last, keys, entry, scores, dweights)

        b.loop(0, b.minimum_int(stop - row, height), 2 if self.half else 1, softmax)
        left = dweights, self.score_stride
        if self.half:
            left = self.buffers["rounded"], self.score_stride // 2
        scale = b.broadcast(self.args["scale"])
        for channel in range(0, self.width, 2 * lanes):
            vectors = min(2, (self.width - channel) // lanes)
            right = b.at(entry.right_keys.start, channel, self.unit), entry.right_keys.stride
            sums = self.gemm(height, vectors, left, right, entry.right_keys.rows)
            for i in range(height):
                with b.if_then(row + i <= last):
                    dq_row = self.row_address(entry.dq, indices[i])
                    for n in range(vectors):
                        value = b.fmul(sums[i * vectors + n], scale)
                        b.write_fp32(value, dq_row, self.element, channel + n * lanes)

    def _softmax(
        self,
        i: Any,
        first: Any,
        row: Any,
        last: Any,
        keys: Any,
        entry: _Entry,
        scores: Any,
        dweights: Any,
    ) -> None:
        """Compute weights and score gradients of a tile's row; in bf16 of two rows, the second if it exists."""
        b, lanes = self.b, self.level.lanes
        padded_keys = b.round_up(keys, lanes)
        rows = [
            self._softmax_row(
                i + n, row, last, keys, padded_keys, entry, scores, dweights, optional=n > 0
            )
            for n in range(2 if self.half else 1)
        ]
        # The unit of a block's row, or pair of rows, of weights and of score gradients.
        stride = self.score_stride // 2 if self.half else self.score_stride
        unit = (row - first + i) * stride
        mask = self.tail_mask(keys)

        def vector(j: Any, *, masked: bool) -> None:
            weights, gradients = [], []
            for r in rows:
                weight = b.fmul(b.read(r.weights, FP32, j), r.inverse)
                gradient = b.fmul(weight, b.fsub(b.read(r.dweights, FP32, j), r.mean))
                if r.dbias is not None:
                    dbias = b.at(r.dbias, j, FP32)
                    if masked:
                        b.store_masked(b.fadd(b.load_masked(dbias, mask), gradient), dbias, mask)
                    else:
                        b.write(b.fadd(b.read(dbias, FP32), gradient), dbias)
                weights.append(weight)
                gradients.append(gradient)
            self._write_block("weights", weights, unit, j)
            rounded = self._write_block("dscores", gradients, unit, j)
            for n, value in enumerate(rounded):
                offset = (i + n) * self.score_stride + j
                b.write(value, b.at(self.buffers["rounded"], offset, BF16))

        if self.summed:
            full = keys & -lanes
            b.loop(0, full, lanes, lambda j: vector(j, masked=False))
            with b.if_then(full < keys):
                vector(full, masked=True)
        else:
            b.loop(0, padded_keys, lanes, lambda j: vector(j, masked=False))

    def _softmax_row(
        self,
        index: Any,
        row: Any,
        last: Any,
        keys: Any,
        padded_keys: Any,
        entry: _Entry,
        scores: Any,
        dweights: Any,
        *,
        optional: bool,
    ) -> _SoftmaxRow:
        """Exponentiate a row's scores and reduce it; an `optional` row past the last one gets weight 0."""
        b, lanes = self.b, self.level.lanes
        query = b.minimum_int(row + index, last)
        p, dp = (b.at(x, index * self.score_stride, FP32) for x in (scores, dweights))
        bias = dbias = None
        if entry.bias is not None:
            bias = b.at(entry.bias, query * self.args["bias_row"], FP32)
        maximum = self.scale_scores(p, bias, keys)
        blind = b.fcmp_ordered("<=", maximum, ir.Constant(FP32, _BLIND))
        # Minus infinity, all scores have weight 0.
        shift = b.broadcast(b.select(blind, ir.Constant(FP32, math.inf), maximum))

        def exponentiate(j: Any, total: Any, delta: Any) -> Values:
            address = b.at(p, j, FP32)
            weight = b.exp2(b.fsub(b.read(address, FP32), shift))
            b.write(weight, address)
            return [b.fadd(total, weight), b.multiply_add(weight, b.read(dp, FP32, j), delta)]

        zeros = b.splat(0.0), b.splat(0.0)
        total, delta = b.loop(0, padded_keys, lanes, exponentiate, *zeros)
        zero, one = ir.Constant(FP32, 0.0), ir.Constant(FP32, 1.0)
        inverse = b.select(blind, zero, b.fdiv(one, b.reduce_add(total)))
        mean = b.broadcast(b.fmul(b.reduce_add(delta), inverse))
        if optional:
            inverse = b.select(row + index <= last, inverse, zero)
        if entry.dbias is not None:
            dbias = b.at(entry.dbias, query * self.args["dbias_row"], FP32)
        return _SoftmaxRow(p, dp, b.broadcast(inverse), mean, dbias)

    def _write_block(self, name: str, values: Values, unit: Any, j: Any) -> Values:
        """Store a row of the block, or an interleaved pair of rows in bf16; return the rounded rows."""
        b = self.b
        if not self.half:
            b.write(values[0], self.buffers[name], unit + j)
            return []
        rounded = [b.bitcast(b.fp32_to_bf16(value), b.vector(INT16)) for value in values]
        b.write(b.interleave(*rounded), b.at(self.buffers[name], unit + j, INT32))
        return rounded


def _vectors(level: Level) -> int:
    """Return the vectors of columns of a tile; wide tiles have fewer rows, and thus fewer broadcasts."""
    return 4 if level.lanes == 16 else 2


@cache
def _layout(half: bool, width: int, capacity: int, level: Level) -> tuple[dict[str, int], int]:
    """Return the offsets of a thread's scratch buffers, and their total size."""
    row, block = capacity + level.lanes, _BLOCK_TILES * level.rows
    keys = -(-capacity // (2 * level.lanes)) * 2 * level.lanes
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
        # Of a block: in bf16 interleaved pairs of rows, beside the fp32 buffers of a tile below.
        "weights": block * row * element,
        "dscores": block * row * element,
    }
    if half:
        sizes |= {
            "scores": level.rows * row * 4,
            "dweights": level.rows * row * 4,
            "rounded": level.rows * row * 2,
            "right_keys": keys * width * 2,
            "right_queries": block * width * 2,
            "right_dout": block * width * 2,
        }
    offsets, size = consecutive(sizes)
    if not half:
        offsets |= {"scores": offsets["weights"], "dweights": offsets["dscores"]}
    return offsets, size


def takes(q: Tensor, keys: int) -> bool:
    """Return whether there is a kernel for queries `[..., D]` and this number of keys."""
    return keys <= _CAPACITIES[-1] and fills_vectors(q.shape[-1], q.dtype)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    bias_gradient: bool = False,
    bounds: Bounds | None = None,
    level: Level | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute dq, dk, dv of `attention`, contiguous, and with `bias_gradient` dbias `[G, H, Nq, Nk]` in fp32.

    Gradients are zero for queries that see no key and for keys without queries. The bias gradient is summed over the
    batch in an order that depends on the number of threads.
    """
    level = level or levels()[0]
    half, threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    dout, q, k, v = (readable(t, half) for t in (dout, q, k, v))
    (entries, queries, heads, width), keys = q.shape, k.shape[1]
    entries, queries, keys, offsets = batch_sizes(bounds, entries, queries, keys)
    # The kernel skips sequences without queries or without keys.
    no_queries, no_keys = (any(a == b for a, b in pairwise(x)) for x in bounds or ((), ()))
    dq = (torch.zeros if no_keys else torch.empty)(q.shape, dtype=q.dtype)
    dk, dv = ((torch.zeros if no_queries else torch.empty)(t.shape, dtype=t.dtype) for t in (k, v))
    period = 1 if bias is None else bias.shape[0]
    if not entries or not queries or not keys:
        empty = torch.zeros((period, heads, queries, keys)) if bias_gradient else None
        return dq.zero_(), dk.zero_(), dv.zero_(), empty
    biases = period if bias_gradient else entries
    # If heads are too few to keep all threads busy, several groups share the entries, and their sums are added.
    groups = -(-_TASKS_PER_THREAD * threads // (heads * biases))
    group_entries, groups = split_rows(entries // biases, groups, 1)
    dbias = torch.zeros((groups, period, heads, queries, keys)) if bias_gradient else None
    capacity = next(n for n in _CAPACITIES if n >= keys)
    scratch_bytes = _layout(half, width, capacity, level)[1] * threads
    scratch = scratch_address("compiled attention backward", scratch_bytes)
    run = kernel(_AttentionBackward, half, width, capacity, bias is not None, bias_gradient, level)
    bias, bias_strides = readable_bias(bias)
    group_stride, *dbias_strides = (
        (0,) * 4 if dbias is None else (dbias.stride(n) for n in (0, 1, 3, 2))
    )
    gradients = dq, dk, dv
    tensors = dout, q, k, v, *gradients
    addresses = (0 if t is None else t.data_ptr() for t in (*tensors, dbias, bias))
    strides = (s for t in tensors for s in t.stride()[:3])
    sizes = (heads, queries, keys, period, entries, biases, group_entries)
    run(
        (
            *addresses,
            *row_addresses(offsets),
            scratch,
            *strides,
            *bias_strides,
            *dbias_strides,
            *sizes,
            group_stride,
            fp32_bits(scale),
        ),
        heads * biases * groups,
        threads,
    )
    if dbias is not None:
        dbias = dbias[0] if groups == 1 else dbias.sum(0)
    return dq, dk, dv, dbias
