"""Attention with a general bias, in the manner of FlashAttention-2 (arXiv 2307.08691).

The bias is read in its own dtype and layout if that allows vector loads, and prefetched with the keys. It may be one
for the whole batch, one per entry, or one per position in a period, as windows of an image share masks. Its gradient
has one writer: if every batch entry has a bias of its own, the dq kernel stores it on the way; else a kernel sums it
over the entries that share it, in order.

A bias of `reference.HIDDEN` or less hides a score. Queries with hidden scores only have a logsumexp of -inf, which the
statistics of the backward pass turn into +inf: that makes their weights zero there.
"""


# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import BIAS_HEAD_DIMS, Biased
from ..reference import HIDDEN
from .attention_tiles import (
    LOG2E,
    addressable,
    attention_spec,
    backward_statistics,
    dropout_keep,
    dropout_stream,
    head_rows,
    inverse_sums,
    load_pieces,
    logsumexp,
    optional_arguments,
    product,
    softmax_weights,
    store_pieces,
    strides_of,
)
from .launch import KernelSpec, LaunchConfig, Variant, launch_options, tail_size

_HIDDEN = tl.constexpr(HIDDEN)
# Counts change from call to call; a kernel compiled for one serves all. Strides have few values and decide widths.
_COUNTS = ["batch", "heads", "period", "queries", "keys"]


@triton.jit
def load_bias(base, rows, stride, columns, left, MASKED: tl.constexpr):
    """Load a tile of the bias in fp32, with -inf for missing keys; `left` entries remain of each row.

    Rows are padded with -inf to a multiple of 16 entries, so that the mask covers whole vectors.
    """
    pointers = base + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        padded = (left + 15) // 16 * 16
        tile = tl.load(pointers, mask=(columns < padded)[None, :], other=float("-inf"))
    else:
        tile = tl.load(pointers)
    return tile.to(tl.float32)


@triton.jit
def locate(tiles, batch, period):
    """Return (tile, batch entry, head) of a program. Neighbours share keys, values and gradients, then the bias."""
    entry = tl.program_id(0) // tiles % batch
    sharing = batch // period
    b = entry % sharing * period + entry // sharing
    return (
        tl.program_id(0) % tiles,
        tl.cast(b, tl.int64),
        tl.cast(tl.program_id(0) // tiles // batch, tl.int64),
    )


@triton.jit
def add_product(acc, x, y, PRECISION: tl.constexpr, APART: tl.constexpr):
    """Add x y to a sum; APART: the GEMM has an accumulator of its own, if the registers suffice for both.

    In the accumulator of the sum, the GEMM would still be in flight when the next tile begins, and Hopper's compiler
    would serialise all GEMMs.
    """
    if APART:
        out = tl.fma(
            acc, tl.full(acc.shape, 1.0, tl.float32), tl.dot(x, y, input_precision=PRECISION)
        )
    else:
        out = tl.dot(x, y, acc, input_precision=PRECISION)
    return out


@triton.jit
def forward_step(
    q_a, q_b, acc_a, acc_b, row_max, row_sum,
    k_base, v_base, stride_kn, stride_vn, bias_base, bias_rows, stride_bm, mask_base, inside, left,
    seed, stream, queries, keys,
    SCALE: tl.constexpr, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Update the online softmax by one tile of keys. The scale is applied within the exponent."""
    columns = tl.arange(0, BLOCK_N)
    k_a, k_b = load_pieces(k_base, columns, stride_kn, inside, D_A, D_B, MASKED, DIM)
    bias = load_bias(bias_base, bias_rows, stride_bm, columns, left, MASKED) * (1.0 / SCALE)
    scores = tl.dot(q_a, tl.trans(k_a), bias, input_precision=PRECISION)
    if D_B > 0:
        scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision=PRECISION)
    if HAS_MASK:
        allowed = (
            tl.load(mask_base + columns, mask=inside, other=0)
            if MASKED
            else tl.load(mask_base + columns)
        )
        scores = tl.where((allowed != 0)[None, :], scores, float("-inf"))
    factor: tl.constexpr = SCALE * LOG2E
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # While a row has hidden scores only, its weights are exp(-inf), or 0 in fp32.
    finite_max = tl.where(new_max <= _HIDDEN / SCALE, 0.0, new_max)
    shrink = tl.exp2((row_max - finite_max) * factor)
    weights = tl.exp2(scores * factor - (finite_max * factor)[:, None])
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    if THRESHOLD > 0:
        weights = tl.where(
            dropout_keep(seed, stream, queries[:, None], keys[None, :], THRESHOLD), weights, 0.0
        )
    v_a, v_b = load_pieces(v_base, columns, stride_vn, inside, D_A, D_B, MASKED, DIM)
    weights = weights.to(v_a.dtype)
    # As in `add_product`, with the sum rescaled on the way.
    acc_a = tl.fma(
        acc_a,
        tl.broadcast_to(shrink[:, None], acc_a.shape),
        tl.dot(weights, v_a, input_precision=PRECISION),
    )
    if D_B > 0:
        product_b = tl.dot(weights, v_b, input_precision=PRECISION)
        acc_b = tl.fma(acc_b, tl.broadcast_to(shrink[:, None], acc_b.shape), product_b)
    return acc_a, acc_b, new_max, row_sum


@triton.jit(do_not_specialize=_COUNTS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, seed_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_bg, stride_bh, stride_bm, batch, heads, period, queries, keys,
    SCALE: tl.constexpr, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_M queries of one head of one batch entry to all keys."""
    tile, b, h = locate(tl.cdiv(queries, BLOCK_M), batch, period)
    start = tile * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = rows < queries - start
    # Rows beyond the last repeat it: they read valid memory and are not stored.
    clamped = tl.minimum(rows, queries - 1 - start)
    # Head dimensions and strides are multiples of 8, which allows loads of 128 bits.
    q_base = head_rows(q_ptr, b, h, start, stride_qb, stride_qn, stride_qh, 8)
    q_a, q_b = load_pieces(q_base, clamped, stride_qn, inside, D_A, D_B, False, DIM)
    k_base = k_ptr + b * stride_kb + h * tl.multiple_of(stride_kh, 8)
    v_base = v_ptr + b * stride_vb + h * tl.multiple_of(stride_vh, 8)
    bias_base = (
        bias_ptr + b % period * stride_bg + h * stride_bh + tl.cast(start, tl.int64) * stride_bm
    )
    mask_base = mask_ptr + b * keys
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    stream = dropout_stream(h, b)
    columns = tl.arange(0, BLOCK_N)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc_a = tl.zeros([BLOCK_M, D_A], tl.float32)
    acc_b = tl.zeros([BLOCK_M, D_B if D_B > 0 else 16], tl.float32)
    full = keys // BLOCK_N * BLOCK_N
    # Explicit stages: the compiler prefetches the bias, which is no operand of a GEMM, only on request.
    for first in tl.range(0, full, BLOCK_N, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        acc_a, acc_b, row_max, row_sum = forward_step(
            q_a, q_b, acc_a, acc_b, row_max, row_sum,
            k_base, v_base, stride_kn, stride_vn, bias_base, clamped, stride_bm, mask_base + first, columns, BLOCK_N,
            seed, stream, start + rows, first + columns,
            SCALE, DIM, D_A, D_B, BLOCK_N, PRECISION, False, HAS_MASK, THRESHOLD,
        )  # fmt: skip
        k_base += BLOCK_N * stride_kn
        v_base += BLOCK_N * stride_vn
        bias_base += BLOCK_N
    if TAIL > 0:
        last = tl.arange(0, TAIL)
        acc_a, acc_b, row_max, row_sum = forward_step(
            q_a, q_b, acc_a, acc_b, row_max, row_sum,
            k_base, v_base, stride_kn, stride_vn, bias_base, clamped, stride_bm, mask_base + full, last < keys - full,
            keys - full, seed, stream, start + rows, full + last,
            SCALE, DIM, D_A, D_B, TAIL, PRECISION, True, HAS_MASK, THRESHOLD,
        )  # fmt: skip
    inverse = inverse_sums(row_sum, THRESHOLD)[:, None]
    out_base = head_rows(out_ptr, b, h, start, stride_ob, stride_on, stride_oh, 8)
    store_pieces(out_base, rows, stride_on, inside, acc_a * inverse, acc_b * inverse, D_A, D_B, DIM)
    lse = logsumexp(row_max, row_sum, SCALE)
    tl.store(lse_ptr + (b * heads + h) * queries + start + rows, lse, mask=inside)


@triton.jit
def dkdv_step(
    k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b,
    q_base, g_base, stride_qn, stride_gn, lse_base, delta_base, bias_base, bias_rows, stride_bn, inside, left,
    seed, stream, queries, keys,
    SCALE: tl.constexpr, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, THRESHOLD: tl.constexpr, APART: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the gradients of a tile of keys and values; the key gradient lacks the factor SCALE.

    Scores are transposed, [keys, queries], so that they are a left operand without a change of layout. Queries outside
    need no mask on scores: their lse is +inf, which makes their weights zero.
    """
    rows = tl.arange(0, BLOCK_M)
    q_a, q_b = load_pieces(q_base, rows, stride_qn, inside, D_A, D_B, MASKED, DIM)
    if MASKED:
        row_lse = tl.load(lse_base + rows, mask=inside, other=float("inf"))
        delta = tl.load(delta_base + rows, mask=inside, other=0.0)
    else:
        row_lse = tl.load(lse_base + rows)
        delta = tl.load(delta_base + rows)
    bias = load_bias(bias_base, bias_rows, stride_bn, rows, left, MASKED)
    scores = product(k_a, k_b, q_a, q_b, D_B, PRECISION)
    weights = softmax_weights(scores, row_lse[None, :], SCALE, PRECISION, bias)
    g_a, g_b = load_pieces(g_base, rows, stride_gn, inside, D_A, D_B, MASKED, DIM)
    rescale: tl.constexpr = 65536.0 / (65536.0 - THRESHOLD)
    if THRESHOLD > 0:
        keep = dropout_keep(seed, stream, queries[None, :], keys[:, None], THRESHOLD)
    if DV:
        dropped = tl.where(keep, weights * rescale, 0.0) if THRESHOLD > 0 else weights  # pyright: ignore[reportPossiblyUnboundVariable]
        dropped = dropped.to(q_a.dtype)
        dv_a = add_product(dv_a, dropped, g_a, PRECISION, APART)
        if D_B > 0:
            dv_b = add_product(dv_b, dropped, g_b, PRECISION, APART)
    if DK:
        dweights = product(v_a, v_b, g_a, g_b, D_B, PRECISION)
        if THRESHOLD > 0:
            dweights = tl.where(keep, dweights * rescale, 0.0)  # pyright: ignore[reportPossiblyUnboundVariable]
        dscores = (weights * (dweights - delta[None, :])).to(q_a.dtype)
        dk_a = add_product(dk_a, dscores, q_a, PRECISION, APART)
        if D_B > 0:
            dk_b = add_product(dk_b, dscores, q_b, PRECISION, APART)
    return dk_a, dk_b, dv_a, dv_b


@triton.jit(do_not_specialize=_COUNTS)
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias_ptr, mask_ptr, seed_ptr, row_lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_bg, stride_bh, stride_bn, batch, heads, period, queries, keys,
    SCALE: tl.constexpr, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, APART: tl.constexpr,
    FENCED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of BLOCK_N keys of one head of one batch entry.

    The bias is transposed, `[G, H, Nk, Nq]`: the compiler would not prefetch a tile that it had to transpose. Wide
    heads, whose sums exceed the registers of a program, have a launch for DK and one for DV.
    """
    tile, b, h = locate(tl.cdiv(keys, BLOCK_N), batch, period)
    start = tile * BLOCK_N
    columns = tl.arange(0, BLOCK_N)
    inside = columns < keys - start
    # Keys beyond the last repeat it, and are not stored.
    clamped = tl.minimum(columns, keys - 1 - start)
    k_base = head_rows(k_ptr, b, h, start, stride_kb, stride_kn, stride_kh, 8)
    v_base = head_rows(v_ptr, b, h, start, stride_vb, stride_vn, stride_vh, 8)
    k_a, k_b = load_pieces(k_base, clamped, stride_kn, inside, D_A, D_B, False, DIM)
    v_a, v_b = load_pieces(v_base, clamped, stride_vn, inside, D_A, D_B, False, DIM)
    q_base = q_ptr + b * stride_qb + h * tl.multiple_of(stride_qh, 8)
    g_base = dout_ptr + b * stride_gb + h * tl.multiple_of(stride_gh, 8)
    lse_base = row_lse_ptr + (b * heads + h) * queries
    delta_base = delta_ptr + (b * heads + h) * queries
    bias_base = (
        bias_ptr + b % period * stride_bg + h * stride_bh + tl.cast(start, tl.int64) * stride_bn
    )
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    stream = dropout_stream(h, b)
    dk_a = tl.zeros([BLOCK_N, D_A], tl.float32)
    dv_a = tl.zeros([BLOCK_N, D_A], tl.float32)
    dk_b = tl.zeros([BLOCK_N, D_B if D_B > 0 else 16], tl.float32)
    dv_b = tl.zeros([BLOCK_N, D_B if D_B > 0 else 16], tl.float32)
    rows = tl.arange(0, BLOCK_M)
    full = queries // BLOCK_M * BLOCK_M
    for first in tl.range(0, full, BLOCK_M, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        dk_a, dk_b, dv_a, dv_b = dkdv_step(
            k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q_base, g_base, stride_qn, stride_gn,
            lse_base + first, delta_base + first, bias_base, clamped, stride_bn, rows, BLOCK_M,
            seed, stream, first + rows, start + columns,
            SCALE, DIM, D_A, D_B, BLOCK_M, PRECISION, False, THRESHOLD, APART, DK, DV,
        )  # fmt: skip
        q_base += BLOCK_M * stride_qn
        g_base += BLOCK_M * stride_gn
        bias_base += BLOCK_M
    if TAIL > 0:
        if full < queries if FENCED else True:
            last = tl.arange(0, TAIL)
            dk_a, dk_b, dv_a, dv_b = dkdv_step(
                k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q_base, g_base, stride_qn, stride_gn,
                lse_base + full, delta_base + full, bias_base, clamped, stride_bn, last < queries - full,
                queries - full, seed, stream, full + last, start + columns,
                SCALE, DIM, D_A, D_B, TAIL, PRECISION, True, THRESHOLD, APART, DK, DV,
            )  # fmt: skip
    stride_dn = heads * DIM
    gradient = (b * keys + start) * stride_dn + h * DIM
    if HAS_MASK:
        # Rows of dk and dv are independent: those of hidden keys are zeroed at the end, not in the loop.
        allowed = tl.load(mask_ptr + b * keys + start + columns, mask=inside, other=0) != 0
        dk_a = tl.where(allowed[:, None], dk_a, 0.0)
        dk_b = tl.where(allowed[:, None], dk_b, 0.0)
        dv_a = tl.where(allowed[:, None], dv_a, 0.0)
        dv_b = tl.where(allowed[:, None], dv_b, 0.0)
    if DV:
        store_pieces(dv_ptr + gradient, columns, stride_dn, inside, dv_a, dv_b, D_A, D_B, DIM)
    if DK:
        store_pieces(
            dk_ptr + gradient, columns, stride_dn, inside, dk_a * SCALE, dk_b * SCALE, D_A, D_B, DIM
        )


@triton.jit
def dq_step(
    q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta,
    k_base, v_base, stride_kn, stride_vn, bias_base, bias_rows, stride_bm, dbias_pointers, mask_base, inside, left,
    present, seed, stream, queries, keys,
    SCALE: tl.constexpr, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr,
    STORE_BIAS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradient of a tile of queries, which lacks SCALE. `present`: queries that exist."""
    columns = tl.arange(0, BLOCK_N)
    k_a, k_b = load_pieces(k_base, columns, stride_kn, inside, D_A, D_B, MASKED, DIM)
    bias = load_bias(bias_base, bias_rows, stride_bm, columns, left, MASKED)
    if HAS_MASK:
        allowed = (
            tl.load(mask_base + columns, mask=inside, other=0)
            if MASKED
            else tl.load(mask_base + columns)
        )
        bias = tl.where((allowed != 0)[None, :], bias, float("-inf"))
    scores = product(q_a, q_b, k_a, k_b, D_B, PRECISION)
    weights = softmax_weights(scores, row_lse[:, None], SCALE, PRECISION, bias)
    v_a, v_b = load_pieces(v_base, columns, stride_vn, inside, D_A, D_B, MASKED, DIM)
    dweights = product(g_a, g_b, v_a, v_b, D_B, PRECISION)
    if THRESHOLD > 0:
        rescale: tl.constexpr = 65536.0 / (65536.0 - THRESHOLD)
        keep = dropout_keep(seed, stream, queries[:, None], keys[None, :], THRESHOLD)
        dweights = tl.where(keep, dweights * rescale, 0.0)
    wide = weights * (dweights - delta[:, None])
    if STORE_BIAS:
        mask = present[:, None] & inside[None, :] if MASKED else present[:, None]
        tl.store(dbias_pointers, wide.to(dbias_pointers.dtype.element_ty), mask=mask)
    dscores = wide.to(k_a.dtype)
    dq_a = add_product(dq_a, dscores, k_a, PRECISION, APART)
    if D_B > 0:
        dq_b = add_product(dq_b, dscores, k_b, PRECISION, APART)
    return dq_a, dq_b


@triton.jit(do_not_specialize=_COUNTS)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias_ptr, mask_ptr, seed_ptr, row_lse_ptr, delta_ptr, dq_ptr, dbias_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_bg, stride_bh, stride_bm, stride_dm, batch, heads, period, queries, keys,
    SCALE: tl.constexpr, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr, STORE_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, APART: tl.constexpr,
    FENCED: tl.constexpr,
):  # fmt: skip
    """Compute dq of BLOCK_M queries of one head of one batch entry.

    With STORE_BIAS, also the gradient of the entry's own bias, `[B, H, Nq, Nk]` contiguous.
    """
    tile, b, h = locate(tl.cdiv(queries, BLOCK_M), batch, period)
    start = tile * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = rows < queries - start
    clamped = tl.minimum(rows, queries - 1 - start)
    q_base = head_rows(q_ptr, b, h, start, stride_qb, stride_qn, stride_qh, 8)
    g_base = head_rows(dout_ptr, b, h, start, stride_gb, stride_gn, stride_gh, 8)
    q_a, q_b = load_pieces(q_base, clamped, stride_qn, inside, D_A, D_B, False, DIM)
    g_a, g_b = load_pieces(g_base, clamped, stride_gn, inside, D_A, D_B, False, DIM)
    statistics = (b * heads + h) * queries + start
    row_lse = tl.load(row_lse_ptr + statistics + clamped)
    delta = tl.load(delta_ptr + statistics + clamped)
    k_base = k_ptr + b * stride_kb + h * tl.multiple_of(stride_kh, 8)
    v_base = v_ptr + b * stride_vb + h * tl.multiple_of(stride_vh, 8)
    bias_base = (
        bias_ptr + b % period * stride_bg + h * stride_bh + tl.cast(start, tl.int64) * stride_bm
    )
    dbias_base = dbias_ptr + statistics * stride_dm
    dbias_rows = rows[:, None] * stride_dm
    mask_base = mask_ptr + b * keys
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    stream = dropout_stream(h, b)
    dq_a = tl.zeros([BLOCK_M, D_A], tl.float32)
    dq_b = tl.zeros([BLOCK_M, D_B if D_B > 0 else 16], tl.float32)
    columns = tl.arange(0, BLOCK_N)
    full = keys // BLOCK_N * BLOCK_N
    for first in tl.range(0, full, BLOCK_N, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        dq_a, dq_b = dq_step(
            q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta, k_base, v_base, stride_kn, stride_vn,
            bias_base, clamped, stride_bm, dbias_base + (dbias_rows + columns[None, :]),
            mask_base + first, columns, BLOCK_N, inside, seed, stream, start + rows, first + columns,
            SCALE, DIM, D_A, D_B, BLOCK_N, PRECISION, False, HAS_MASK, THRESHOLD, STORE_BIAS, APART,
        )  # fmt: skip
        k_base += BLOCK_N * stride_kn
        v_base += BLOCK_N * stride_vn
        bias_base += BLOCK_N
        dbias_base += BLOCK_N
    if TAIL > 0:
        if full < keys if FENCED else True:
            last = tl.arange(0, TAIL)
            dq_a, dq_b = dq_step(
                q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta, k_base, v_base, stride_kn, stride_vn,
                bias_base, clamped, stride_bm, dbias_base + (dbias_rows + last[None, :]),
                mask_base + full, last < keys - full, keys - full, inside, seed, stream, start + rows, full + last,
                SCALE, DIM, D_A, D_B, TAIL, PRECISION, True, HAS_MASK, THRESHOLD, STORE_BIAS, APART,
            )  # fmt: skip
    stride_dn = heads * DIM
    dq_base = dq_ptr + (b * queries + start) * stride_dn + h * DIM
    store_pieces(dq_base, rows, stride_dn, inside, dq_a * SCALE, dq_b * SCALE, D_A, D_B, DIM)


@triton.jit(do_not_specialize=_COUNTS)
def dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias_ptr, mask_ptr, seed_ptr, row_lse_ptr, delta_ptr, dbias_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_bg, stride_bh, stride_bm, stride_dm, batch, heads, period, queries, keys,
    SCALE: tl.constexpr, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the bias gradient of one entry and head, `[splits, G, H, Nq, Nk]` contiguous.

    It is summed in order over a split of the batch entries that share the bias.
    """
    tiles_n = tl.cdiv(keys, BLOCK_N)
    tiles = tl.cdiv(queries, BLOCK_M) * tiles_n
    start_m = tl.program_id(0) % tiles // tiles_n * BLOCK_M
    start_n = tl.program_id(0) % tiles_n * BLOCK_N
    g = tl.cast(tl.program_id(0) // tiles % period, tl.int64)
    h = tl.cast(tl.program_id(0) // tiles // period, tl.int64)
    split = tl.program_id(1)
    sharing = batch // period
    share = tl.cdiv(sharing, tl.num_programs(1))
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    present = columns < keys - start_n
    # Repeated rows are not stored, and columns beyond the last have a bias of -inf.
    clamped_rows = tl.minimum(rows, queries - 1 - start_m)
    clamped_columns = tl.minimum(columns, keys - 1 - start_n)
    bias_base = (
        bias_ptr + g * stride_bg + h * stride_bh + tl.cast(start_m, tl.int64) * stride_bm + start_n
    )
    bias = load_bias(bias_base, clamped_rows, stride_bm, columns, keys - start_n, True)
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for entry in tl.range(
        split * share, tl.minimum(split * share + share, sharing), num_stages=STAGES
    ):  # pyright: ignore[reportGeneralTypeIssues]
        b = g + tl.cast(entry, tl.int64) * period
        q_base = head_rows(q_ptr, b, h, start_m, stride_qb, stride_qn, stride_qh, 8)
        g_base = head_rows(dout_ptr, b, h, start_m, stride_gb, stride_gn, stride_gh, 8)
        k_base = head_rows(k_ptr, b, h, start_n, stride_kb, stride_kn, stride_kh, 8)
        v_base = head_rows(v_ptr, b, h, start_n, stride_vb, stride_vn, stride_vh, 8)
        q_a, q_b = load_pieces(q_base, clamped_rows, stride_qn, rows, D_A, D_B, False, DIM)
        k_a, k_b = load_pieces(k_base, clamped_columns, stride_kn, columns, D_A, D_B, False, DIM)
        statistics = (b * heads + h) * queries + start_m
        row_lse = tl.load(row_lse_ptr + statistics + clamped_rows)
        delta = tl.load(delta_ptr + statistics + clamped_rows)
        scores = product(q_a, q_b, k_a, k_b, D_B, PRECISION)
        weights = softmax_weights(scores, row_lse[:, None], SCALE, PRECISION, bias)
        if HAS_MASK:
            allowed = tl.load(mask_ptr + b * keys + start_n + columns, mask=present, other=0) != 0
            weights = tl.where(allowed[None, :], weights, 0.0)
        g_a, g_b = load_pieces(g_base, clamped_rows, stride_gn, rows, D_A, D_B, False, DIM)
        v_a, v_b = load_pieces(v_base, clamped_columns, stride_vn, columns, D_A, D_B, False, DIM)
        dweights = product(g_a, g_b, v_a, v_b, D_B, PRECISION)
        if THRESHOLD > 0:
            rescale: tl.constexpr = 65536.0 / (65536.0 - THRESHOLD)
            query, key = (start_m + rows)[:, None], (start_n + columns)[None, :]
            keep = dropout_keep(seed, dropout_stream(h, b), query, key, THRESHOLD)
            dweights = tl.where(keep, dweights * rescale, 0.0)
        acc += weights * (dweights - delta[:, None])
    row = ((split * tl.cast(period, tl.int64) + g) * heads + h) * queries + start_m
    dbias = dbias_ptr + row * stride_dm + start_n + (rows[:, None] * stride_dm + columns[None, :])
    mask = (rows < queries - start_m)[:, None] & present[None, :]
    tl.store(dbias, acc.to(dbias_ptr.dtype.element_ty), mask=mask)


def _spec(
    name: str, kernel: Any, *more: Variant, looped: str = "BLOCK_N", **options: Any
) -> KernelSpec:
    def extras(variant: Variant, config: LaunchConfig) -> Mapping[str, Any]:
        return {
            "TAIL": tail_size(variant.get("looped", 577), config.tiles[looped]),
            "STORE_BIAS": variant.get("own_bias", False),
            "DK": variant.get("dk", True),
            "DV": variant.get("dv", variant["head_dim"] <= _ONE_LAUNCH),
        }

    # The model's head dimension, one whose second piece is filled in part, and the widest of two columns of the table
    # of configurations: the others need fewer registers than one of these.
    plain = [{"head_dim": head_dim} for head_dim in (64, 72, 128, 256)]
    dropout = {"head_dim": 64, "mask": True, "dropout": 0.1}
    return attention_spec(name, kernel, [*plain, *more, dropout], extras, BIAS_HEAD_DIMS, **options)


FORWARD = _spec("bias_attention_forward", forward_kernel)
DKDV = _spec("bias_attention_dkdv", dkdv_kernel, looped="BLOCK_M")
DQ = _spec("bias_attention_dq", dq_kernel, {"head_dim": 64, "own_bias": True})
DBIAS = _spec(
    "bias_attention_dbias", dbias_kernel, types=lambda variant, dtype: {"dbias_ptr": "*fp32"}
)
KERNELS = [FORWARD, DKDV, DQ, DBIAS]
# The widest head for which one launch of the dkdv kernel sums both gradients.
_ONE_LAUNCH = 128
# Four programs for each of some 130 multiprocessors.
_PROGRAMS = 512


def bias_partials(sharing: int, programs: int) -> int:
    """Return the splits of the batch entries that share a bias, enough for its gradient to keep a GPU busy."""
    return max(1, min(sharing, 8, _PROGRAMS // programs))


def bias_attention_forward(a: Biased) -> tuple[Tensor, Tensor]:
    """Return softmax(scale · q kᵀ + bias) v `[B, Nq, H, D]`, contiguous, and the logsumexp `[B, H, Nq]` in fp32.

    q `[B, Nq, H, D]`, k and v `[B, Nk, H, D]` with D in `BIAS_HEAD_DIMS`, bias `[G, H, Nq, Nk]` in fp16, bf16 or fp32,
    G a divisor of B; copied where rows are not contiguous and aligned. Queries without keys give zeros and -inf.
    Dropout depends on the seed, the head, the query's place in the batch and the key's in its sequence only. InputError
    for an unsupported dtype or head dimension.
    """
    (batch, queries, heads, _), keys = a.q.shape, a.k.shape[1]
    q, k, v = (addressable(t, 8) for t in (a.q, a.k, a.v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    options, config = launch_options(FORWARD, q, looped=keys, **_variant(a))
    if q.numel():
        bias = _bias_rows(a.bias)
        forward_kernel[(triton.cdiv(queries, config.tiles["BLOCK_M"]) * batch * heads,)](
            q,
            k,
            v,
            bias,
            *optional_arguments(q, a.key_mask, a.dropout_p, a.seed),
            out,
            lse,
            *strides_of(q, k, v, out, bias),
            batch,
            heads,
            bias.shape[0],
            queries,
            keys,
            **options,
        )
    return out, lse


def bias_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    a: Biased,
    out: Tensor,
    lse: Tensor,
    *,
    bias_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `bias_attention_forward`: dq, dk, dv, and dbias `[G, H, Nq, Nk]`, contiguous.

    Deterministic: each kernel recomputes the scores and owns its sums: dk and dv (four GEMMs of 2·B·H·Nq·Nk·D
    operations), dq (three), which also stores the gradient of an unshared bias, and otherwise dbias (two). `dlse` None
    means zeros; without `bias_gradient` dbias is empty.
    """
    (batch, queries, heads, head_dim), keys, bias = a.q.shape, a.k.shape[1], a.bias
    q, k, v, dout, out = (addressable(t, 8) for t in (a.q, a.k, a.v, dout, out))
    make = torch.zeros if not q.numel() or not k.numel() else torch.empty
    dq, dk, dv = (make(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    dbias = make(bias.shape if bias_gradient else (0,), dtype=bias.dtype, device=q.device)
    if not q.numel() or not k.numel():
        return dq, dk, dv, dbias
    turned, bias = _bias_rows(bias.transpose(2, 3)), _bias_rows(bias)
    period = bias.shape[0]
    statistics = backward_statistics(out, dout, lse, dlse, 8)
    optional = (*optional_arguments(q, a.key_mask, a.dropout_p, a.seed), *statistics[::-1])
    counts = (batch, heads, period, queries, keys)
    variant = _variant(a)

    inputs, strides = (q, k, v, dout, turned, *optional), strides_of(q, k, v, dout, turned)
    launches = ((True, True),) if head_dim <= _ONE_LAUNCH else ((True, False), (False, True))
    for with_dk, with_dv in launches:
        options, config = launch_options(DKDV, q, looped=queries, dk=with_dk, dv=with_dv, **variant)
        dkdv_kernel[(triton.cdiv(keys, config.tiles["BLOCK_N"]) * batch * heads,)](
            *inputs, dk, dv, *strides, *counts, **options
        )

    inputs, strides = (q, k, v, dout, bias, *optional), strides_of(q, k, v, dout, bias)
    alone = bias_gradient and period == batch
    options, config = launch_options(DQ, q, looped=keys, own_bias=alone, **variant)
    dq_kernel[(triton.cdiv(queries, config.tiles["BLOCK_M"]) * batch * heads,)](
        *inputs, dq, dbias if alone else q, *strides, keys, *counts, **options
    )
    if alone or not bias_gradient:
        return dq, dk, dv, dbias

    options, config = launch_options(DBIAS, q, **variant)
    tiles_m = triton.cdiv(queries, config.tiles["BLOCK_M"])
    tiles_n = triton.cdiv(keys, config.tiles["BLOCK_N"])
    programs = tiles_m * tiles_n * period * heads
    splits, partial = bias_partials(batch // period, programs), dbias
    if splits > 1:
        partial = torch.empty((splits, *dbias.shape), dtype=torch.float32, device=q.device)
    dbias_kernel[(programs, splits)](*inputs, partial, *strides, keys, *counts, **options)
    return dq, dk, dv, dbias if splits == 1 else partial.sum(0).to(bias.dtype)


def _variant(a: Biased) -> dict[str, Any]:
    masked = a.key_mask is not None
    return {"head_dim": a.q.shape[-1], "scale": a.scale, "mask": masked, "dropout": a.dropout_p}


def _bias_rows(bias: Tensor) -> Tensor:
    """Return a padded copy of the bias unless its rows are contiguous, aligned, and whole vectors."""
    sizes, strides = bias.shape, bias.stride()
    aligned = all(
        stride % 16 == 0 for size, stride in zip(sizes[:3], strides[:3], strict=True) if size > 1
    )
    if aligned and strides[2] * 256 < 2**31 and strides[3] == 1 and sizes[3] % 16 == 0:
        return bias
    # Expanded dimensions, such as the heads of a mask, are copied once.
    small = bias[tuple(slice(1) if stride == 0 else slice(None) for stride in strides[:3])]
    width = triton.cdiv(sizes[3], 16) * 16
    padded = torch.full((*small.shape[:3], width), -torch.inf, dtype=bias.dtype, device=bias.device)
    padded[..., : sizes[3]] = small
    return padded.expand(*sizes[:3], width)
