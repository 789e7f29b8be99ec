"""Attention with a general bias, in the manner of FlashAttention-2 (arXiv 2307.08691).

The bias is read in its own type, as it lies in memory where that allows whole vectors, and prefetched with the keys. It
may be shared by the batch, of an entry each, or of one for every entry of a period, as windows of an image share masks.
Its gradient has one writer: where every batch entry has a bias of its own, the kernel of dq stores it on the way; else
a kernel sums it over the entries that share it, in order.

A score is hidden by a bias of `limits.HIDDEN` or less. Queries of which all scores are hidden have a logsumexp of -inf,
of which the statistics of the backward pass make +inf: that makes their weights zero there.
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

from xfm_fast.errors import InputError

from .. import checks
from ..checks import Biased
from ..limits import BIAS_HEAD_DIMS, HIDDEN
from .attention_tiles import (
    LOG2E,
    STATISTICS,
    argument_types,
    dot_precision,
    dropout_keep,
    dropout_stream,
    load_rows,
    product,
)
from .launch import KernelSpec, LaunchConfig, architecture, bias_config, dtype_name, tail_size
from .varlen_attention import dropout_threshold

__all__ = ["KERNELS", "bias_attention_backward", "bias_attention_forward"]

_HIDDEN = tl.constexpr(HIDDEN)
# Counts change from call to call; a kernel compiled for one serves all. Strides have few values and decide widths.
_COUNTS = ["batch", "heads", "period", "queries", "keys"]


@triton.jit
def load_heads(
    base, rows, stride, inside, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of DIM contiguous columns in two pieces, of which the second may hold zeros beyond DIM."""
    pointers = base + rows[:, None] * stride
    a = load_rows(pointers + tl.arange(0, D_A)[None, :], inside, MASKED)
    b = a
    if D_B > 0:
        columns = tl.arange(0, D_B)[None, :]
        if D_A + D_B == DIM:
            b = load_rows(pointers + (D_A + columns), inside, MASKED)
        elif MASKED:
            b = tl.load(pointers + (D_A + columns), mask=inside[:, None] & (columns < DIM - D_A), other=0.0)
        else:
            b = tl.load(pointers + (D_A + columns), mask=columns < DIM - D_A, other=0.0)
    return a, b


@triton.jit
def store_heads(base, rows, stride, inside, a, b, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr):
    """The counterpart of `load_heads`, converting to the type of the destination."""
    pointers = base + rows[:, None] * stride
    tl.store(pointers + tl.arange(0, D_A)[None, :], a.to(base.dtype.element_ty), mask=inside[:, None])
    if D_B > 0:
        columns = tl.arange(0, D_B)[None, :]
        kept = inside[:, None] & (columns < DIM - D_A)
        tl.store(pointers + (D_A + columns), b.to(base.dtype.element_ty), mask=kept)


@triton.jit
def load_bias(base, rows, stride, columns, left, MASKED: tl.constexpr):
    """A tile of the bias in fp32, -inf where there is no key: of a row, `left` entries are left.

    Rows are padded with -inf to a multiple of 16 entries, so that the mask leaves whole vectors.
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
    """(tile, batch entry, head) of a program. Neighbours share keys, values and gradients, then the bias."""
    entry = tl.program_id(0) // tiles % batch
    sharing = batch // period
    b = entry % sharing * period + entry // sharing
    return tl.program_id(0) % tiles, tl.cast(b, tl.int64), tl.cast(tl.program_id(0) // tiles // batch, tl.int64)


@triton.jit
def weights_of(scores, bias, row_lse, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """exp(SCALE · scores + bias - logsumexp), with what `statistics_kernel` made of the logsumexp.

    In fp32 the rounding of the logsumexp in base 2 would show, so the difference is taken first.
    """
    if PRECISION == "ieee":
        weights = tl.exp2((scores * SCALE - (row_lse - bias)) * LOG2E)
    else:
        weights = tl.exp2(scores * (SCALE * LOG2E) - (row_lse - bias * LOG2E))
    return weights


@triton.jit
def add_product(acc, x, y, PRECISION: tl.constexpr, APART: tl.constexpr):
    """A sum plus x y; APART, the product has an accumulator of its own, if the registers suffice for both.

    Were it the accumulator of the product, the product would still be in flight when the next tile begins, and Hopper's
    compiler would make every product wait for the one before.
    """
    if APART:
        out = tl.fma(acc, tl.full(acc.shape, 1.0, tl.float32), tl.dot(x, y, input_precision=PRECISION))
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
    """The online softmax over one tile of keys. Scores stay unscaled; the scale is applied within the exponent."""
    columns = tl.arange(0, BLOCK_N)
    k_a, k_b = load_heads(k_base, columns, stride_kn, inside, DIM, D_A, D_B, MASKED)
    bias = load_bias(bias_base, bias_rows, stride_bm, columns, left, MASKED) * (1.0 / SCALE)
    scores = tl.dot(q_a, tl.trans(k_a), bias, input_precision=PRECISION)
    if D_B > 0:
        scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision=PRECISION)
    if HAS_MASK:
        allowed = tl.load(mask_base + columns, mask=inside, other=0) if MASKED else tl.load(mask_base + columns)
        scores = tl.where((allowed != 0)[None, :], scores, float("-inf"))
    factor: tl.constexpr = SCALE * LOG2E
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # As long as a row has hidden scores only, its weights are exp(-inf) or as good as that.
    finite_max = tl.where(new_max <= _HIDDEN / SCALE, 0.0, new_max)
    shrink = tl.exp2((row_max - finite_max) * factor)
    weights = tl.exp2(scores * factor - (finite_max * factor)[:, None])
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    if THRESHOLD > 0:
        weights = tl.where(dropout_keep(seed, stream, queries[:, None], keys[None, :], THRESHOLD), weights, 0.0)
    v_a, v_b = load_heads(v_base, columns, stride_vn, inside, DIM, D_A, D_B, MASKED)
    weights = weights.to(v_a.dtype)
    # As in `add_product`, with the sum shrunk on the way.
    acc_a = tl.fma(
        acc_a, tl.broadcast_to(shrink[:, None], acc_a.shape), tl.dot(weights, v_a, input_precision=PRECISION)
    )
    if D_B > 0:
        part = tl.dot(weights, v_b, input_precision=PRECISION)
        acc_b = tl.fma(acc_b, tl.broadcast_to(shrink[:, None], acc_b.shape), part)
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
    """BLOCK_M queries of one head of one batch entry, against all keys."""
    tile, b, h = locate(tl.cdiv(queries, BLOCK_M), batch, period)
    start = tile * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = rows < queries - start
    # Rows beyond the last repeat it: they read valid memory and are not stored.
    clamped = tl.minimum(rows, queries - 1 - start)
    # Head dimensions are multiples of 8, and so are strides: that is what loads of 128 bits need to know.
    q_base = q_ptr + b * stride_qb + h * tl.multiple_of(stride_qh, 8) + tl.cast(start, tl.int64) * stride_qn
    q_a, q_b = load_heads(q_base, clamped, stride_qn, inside, DIM, D_A, D_B, False)
    k_base = k_ptr + b * stride_kb + h * tl.multiple_of(stride_kh, 8)
    v_base = v_ptr + b * stride_vb + h * tl.multiple_of(stride_vh, 8)
    bias_base = bias_ptr + b % period * stride_bg + h * stride_bh + tl.cast(start, tl.int64) * stride_bm
    mask_base = mask_ptr + b * keys
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    stream = dropout_stream(h, b)
    columns = tl.arange(0, BLOCK_N)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc_a = tl.zeros([BLOCK_M, D_A], tl.float32)
    acc_b = tl.zeros([BLOCK_M, D_B if D_B > 0 else 16], tl.float32)
    full = keys // BLOCK_N * BLOCK_N
    # The stages are named here because the compiler prefetches what is no operand of a product, such as the bias, only
    # when asked.
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
    rescale: tl.constexpr = 65536.0 / (65536.0 - THRESHOLD)
    attended = row_sum > 0
    row_sum = tl.where(attended, row_sum, 1.0)
    inverse = tl.where(attended, rescale / row_sum, 0.0)[:, None]
    out_base = out_ptr + b * stride_ob + h * tl.multiple_of(stride_oh, 8) + tl.cast(start, tl.int64) * stride_on
    store_heads(out_base, rows, stride_on, inside, acc_a * inverse, acc_b * inverse, DIM, D_A, D_B)
    lse = tl.where(attended, row_max * SCALE + tl.log2(row_sum) / LOG2E, float("-inf"))
    tl.store(lse_ptr + (b * heads + h) * queries + start + rows, lse, mask=inside)


@triton.jit(do_not_specialize=["heads", "queries"])
def statistics_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, row_lse_ptr,
    stride_ob, stride_on, stride_oh, stride_gb, stride_gn, stride_gh, heads, queries,
    DIM: tl.constexpr, WIDTH: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ_d out·dout - dlse (delta), and the logsumexp as `weights_of` wants it; `[B, H, Nq]` fp32 both."""
    tiles = tl.cdiv(queries, BLOCK)
    start = tl.program_id(0) % tiles * BLOCK
    h = tl.cast(tl.program_id(0) // tiles % heads, tl.int64)
    b = tl.cast(tl.program_id(0) // tiles // heads, tl.int64)
    rows = tl.arange(0, BLOCK)
    inside = rows < queries - start
    columns = tl.arange(0, WIDTH)[None, :]
    present = inside[:, None] & (columns < DIM)
    out_base = out_ptr + b * stride_ob + tl.cast(start, tl.int64) * stride_on + h * tl.multiple_of(stride_oh, 8)
    dout_base = dout_ptr + b * stride_gb + tl.cast(start, tl.int64) * stride_gn + h * tl.multiple_of(stride_gh, 8)
    out = tl.load(out_base + rows[:, None] * stride_on + columns, mask=present, other=0.0).to(tl.float32)
    dout = tl.load(dout_base + rows[:, None] * stride_gn + columns, mask=present, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    statistics = (b * heads + h) * queries + start + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + statistics, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + statistics, mask=inside, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if out_ptr.dtype.element_ty != tl.float32:
        lse = lse * LOG2E
    tl.store(delta_ptr + statistics, delta, mask=inside)
    tl.store(row_lse_ptr + statistics, lse, mask=inside)


@triton.jit
def dkdv_step(
    k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b,
    q_base, g_base, stride_qn, stride_gn, lse_base, delta_base, bias_base, bias_rows, stride_bn, inside, left,
    seed, stream, queries, keys,
    SCALE: tl.constexpr, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, THRESHOLD: tl.constexpr, APART: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values from one tile of queries; the key gradient still lacks SCALE.

    Scores are held transposed, [keys, queries], so that they are a left operand without a change of layout. Queries
    outside need no mask on scores: their lse is +inf, which makes their weights zero.
    """
    rows = tl.arange(0, BLOCK_M)
    q_a, q_b = load_heads(q_base, rows, stride_qn, inside, DIM, D_A, D_B, MASKED)
    if MASKED:
        row_lse = tl.load(lse_base + rows, mask=inside, other=float("inf"))
        delta = tl.load(delta_base + rows, mask=inside, other=0.0)
    else:
        row_lse = tl.load(lse_base + rows)
        delta = tl.load(delta_base + rows)
    bias = load_bias(bias_base, bias_rows, stride_bn, rows, left, MASKED)
    weights = weights_of(product(k_a, k_b, q_a, q_b, D_B, PRECISION), bias, row_lse[None, :], SCALE, PRECISION)
    g_a, g_b = load_heads(g_base, rows, stride_gn, inside, DIM, D_A, D_B, MASKED)
    rescale: tl.constexpr = 65536.0 / (65536.0 - THRESHOLD)
    if THRESHOLD > 0:
        keep = dropout_keep(seed, stream, queries[None, :], keys[:, None], THRESHOLD)
    if DV:
        kept = tl.where(keep, weights * rescale, 0.0) if THRESHOLD > 0 else weights  # pyright: ignore[reportPossiblyUnboundVariable]
        kept = kept.to(q_a.dtype)
        dv_a = add_product(dv_a, kept, g_a, PRECISION, APART)
        if D_B > 0:
            dv_b = add_product(dv_b, kept, g_b, PRECISION, APART)
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
    """The gradients dk and dv of BLOCK_N keys of one head of one batch entry, from all queries.

    The bias comes transposed, `[G, H, Nk, Nq]`: a tile that had to be turned would not be prefetched. Wide heads, of
    which a program cannot hold both sums, have a launch for DK and one for DV.
    """
    tile, b, h = locate(tl.cdiv(keys, BLOCK_N), batch, period)
    start = tile * BLOCK_N
    columns = tl.arange(0, BLOCK_N)
    inside = columns < keys - start
    # Keys beyond the last repeat it, and are not stored.
    clamped = tl.minimum(columns, keys - 1 - start)
    k_base = k_ptr + b * stride_kb + h * tl.multiple_of(stride_kh, 8) + tl.cast(start, tl.int64) * stride_kn
    v_base = v_ptr + b * stride_vb + h * tl.multiple_of(stride_vh, 8) + tl.cast(start, tl.int64) * stride_vn
    k_a, k_b = load_heads(k_base, clamped, stride_kn, inside, DIM, D_A, D_B, False)
    v_a, v_b = load_heads(v_base, clamped, stride_vn, inside, DIM, D_A, D_B, False)
    q_base = q_ptr + b * stride_qb + h * tl.multiple_of(stride_qh, 8)
    g_base = dout_ptr + b * stride_gb + h * tl.multiple_of(stride_gh, 8)
    lse_base = row_lse_ptr + (b * heads + h) * queries
    delta_base = delta_ptr + (b * heads + h) * queries
    bias_base = bias_ptr + b % period * stride_bg + h * stride_bh + tl.cast(start, tl.int64) * stride_bn
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
        # Rows of dk and dv are independent: hidden keys are struck out at the end, at no cost before.
        allowed = tl.load(mask_ptr + b * keys + start + columns, mask=inside, other=0) != 0
        dk_a = tl.where(allowed[:, None], dk_a, 0.0)
        dk_b = tl.where(allowed[:, None], dk_b, 0.0)
        dv_a = tl.where(allowed[:, None], dv_a, 0.0)
        dv_b = tl.where(allowed[:, None], dv_b, 0.0)
    if DV:
        store_heads(dv_ptr + gradient, columns, stride_dn, inside, dv_a, dv_b, DIM, D_A, D_B)
    if DK:
        store_heads(dk_ptr + gradient, columns, stride_dn, inside, dk_a * SCALE, dk_b * SCALE, DIM, D_A, D_B)


@triton.jit
def dq_step(
    q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta,
    k_base, v_base, stride_kn, stride_vn, bias_base, bias_rows, stride_bm, dbias_pointers, mask_base, inside, left,
    present, seed, stream, queries, keys,
    SCALE: tl.constexpr, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr,
    STORE_BIAS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries from one tile of keys; it still lacks SCALE. `present`: queries that exist."""
    columns = tl.arange(0, BLOCK_N)
    k_a, k_b = load_heads(k_base, columns, stride_kn, inside, DIM, D_A, D_B, MASKED)
    bias = load_bias(bias_base, bias_rows, stride_bm, columns, left, MASKED)
    if HAS_MASK:
        allowed = tl.load(mask_base + columns, mask=inside, other=0) if MASKED else tl.load(mask_base + columns)
        bias = tl.where((allowed != 0)[None, :], bias, float("-inf"))
    weights = weights_of(product(q_a, q_b, k_a, k_b, D_B, PRECISION), bias, row_lse[:, None], SCALE, PRECISION)
    v_a, v_b = load_heads(v_base, columns, stride_vn, inside, DIM, D_A, D_B, MASKED)
    dweights = product(g_a, g_b, v_a, v_b, D_B, PRECISION)
    if THRESHOLD > 0:
        rescale: tl.constexpr = 65536.0 / (65536.0 - THRESHOLD)
        keep = dropout_keep(seed, stream, queries[:, None], keys[None, :], THRESHOLD)
        dweights = tl.where(keep, dweights * rescale, 0.0)
    wide = weights * (dweights - delta[:, None])
    if STORE_BIAS:
        kept = present[:, None] & inside[None, :] if MASKED else present[:, None]
        tl.store(dbias_pointers, wide.to(dbias_pointers.dtype.element_ty), mask=kept)
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
    """The gradient dq of BLOCK_M queries of one head of one batch entry, from all keys.

    With STORE_BIAS, also the gradient of the entry's own bias: `[B, H, Nq, Nk]` contiguous.
    """
    tile, b, h = locate(tl.cdiv(queries, BLOCK_M), batch, period)
    start = tile * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = rows < queries - start
    clamped = tl.minimum(rows, queries - 1 - start)
    q_base = q_ptr + b * stride_qb + h * tl.multiple_of(stride_qh, 8) + tl.cast(start, tl.int64) * stride_qn
    g_base = dout_ptr + b * stride_gb + h * tl.multiple_of(stride_gh, 8) + tl.cast(start, tl.int64) * stride_gn
    q_a, q_b = load_heads(q_base, clamped, stride_qn, inside, DIM, D_A, D_B, False)
    g_a, g_b = load_heads(g_base, clamped, stride_gn, inside, DIM, D_A, D_B, False)
    statistics = (b * heads + h) * queries + start
    row_lse = tl.load(row_lse_ptr + statistics + clamped)
    delta = tl.load(delta_ptr + statistics + clamped)
    k_base = k_ptr + b * stride_kb + h * tl.multiple_of(stride_kh, 8)
    v_base = v_ptr + b * stride_vb + h * tl.multiple_of(stride_vh, 8)
    bias_base = bias_ptr + b % period * stride_bg + h * stride_bh + tl.cast(start, tl.int64) * stride_bm
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
    store_heads(dq_base, rows, stride_dn, inside, dq_a * SCALE, dq_b * SCALE, DIM, D_A, D_B)


@triton.jit(do_not_specialize=_COUNTS)
def dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias_ptr, mask_ptr, seed_ptr, row_lse_ptr, delta_ptr, dbias_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_bg, stride_bh, stride_bm, stride_dm, batch, heads, period, queries, keys,
    SCALE: tl.constexpr, DIM: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of one entry and head of the bias, summed in order over a part of the batch entries that
    share it: `[parts, G, H, Nq, Nk]` contiguous.
    """
    tiles_n = tl.cdiv(keys, BLOCK_N)
    tiles = tl.cdiv(queries, BLOCK_M) * tiles_n
    start_m = tl.program_id(0) % tiles // tiles_n * BLOCK_M
    start_n = tl.program_id(0) % tiles_n * BLOCK_N
    g = tl.cast(tl.program_id(0) // tiles % period, tl.int64)
    h = tl.cast(tl.program_id(0) // tiles // period, tl.int64)
    part = tl.program_id(1)
    sharing = batch // period
    share = tl.cdiv(sharing, tl.num_programs(1))
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    present = columns < keys - start_n
    # Rows that are read twice are not stored, and columns beyond the last have a bias of -inf.
    clamped_rows = tl.minimum(rows, queries - 1 - start_m)
    clamped_columns = tl.minimum(columns, keys - 1 - start_n)
    bias_base = bias_ptr + g * stride_bg + h * stride_bh + tl.cast(start_m, tl.int64) * stride_bm + start_n
    bias = load_bias(bias_base, clamped_rows, stride_bm, columns, keys - start_n, True)
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for entry in tl.range(part * share, tl.minimum(part * share + share, sharing), num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        b = g + tl.cast(entry, tl.int64) * period
        q_base = q_ptr + b * stride_qb + h * tl.multiple_of(stride_qh, 8) + tl.cast(start_m, tl.int64) * stride_qn
        g_base = dout_ptr + b * stride_gb + h * tl.multiple_of(stride_gh, 8) + tl.cast(start_m, tl.int64) * stride_gn
        k_base = k_ptr + b * stride_kb + h * tl.multiple_of(stride_kh, 8) + tl.cast(start_n, tl.int64) * stride_kn
        v_base = v_ptr + b * stride_vb + h * tl.multiple_of(stride_vh, 8) + tl.cast(start_n, tl.int64) * stride_vn
        q_a, q_b = load_heads(q_base, clamped_rows, stride_qn, rows, DIM, D_A, D_B, False)
        k_a, k_b = load_heads(k_base, clamped_columns, stride_kn, columns, DIM, D_A, D_B, False)
        statistics = (b * heads + h) * queries + start_m
        row_lse = tl.load(row_lse_ptr + statistics + clamped_rows)
        delta = tl.load(delta_ptr + statistics + clamped_rows)
        weights = weights_of(product(q_a, q_b, k_a, k_b, D_B, PRECISION), bias, row_lse[:, None], SCALE, PRECISION)
        if HAS_MASK:
            allowed = tl.load(mask_ptr + b * keys + start_n + columns, mask=present, other=0) != 0
            weights = tl.where(allowed[None, :], weights, 0.0)
        g_a, g_b = load_heads(g_base, clamped_rows, stride_gn, rows, DIM, D_A, D_B, False)
        v_a, v_b = load_heads(v_base, clamped_columns, stride_vn, columns, DIM, D_A, D_B, False)
        dweights = product(g_a, g_b, v_a, v_b, D_B, PRECISION)
        if THRESHOLD > 0:
            rescale: tl.constexpr = 65536.0 / (65536.0 - THRESHOLD)
            places = (start_m + rows)[:, None], (start_n + columns)[None, :]
            keep = dropout_keep(seed, dropout_stream(h, b), places[0], places[1], THRESHOLD)
            dweights = tl.where(keep, dweights * rescale, 0.0)
        acc += weights * (dweights - delta[:, None])
    place = ((part * tl.cast(period, tl.int64) + g) * heads + h) * queries + start_m
    dbias = dbias_ptr + place * stride_dm + start_n + (rows[:, None] * stride_dm + columns[None, :])
    kept = (rows < queries - start_m)[:, None] & present[None, :]
    tl.store(dbias, acc.to(dbias_ptr.dtype.element_ty), mask=kept)


# Four programs for each of some 130 multiprocessors.
_PROGRAMS = 512


def bias_partials(sharing: int, programs: int) -> int:
    """Into how many parts the batch entries that share a bias are cut so that its gradient keeps a GPU busy."""
    return max(1, min(sharing, 8, _PROGRAMS // programs))


def bias_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ + bias) v `[B, Nq, H, D]`, contiguous, and the natural logsumexp `[B, H, Nq]` in fp32.

    q `[B, Nq, H, D]`, k and v `[B, Nk, H, D]` with D in `BIAS_HEAD_DIMS`, bias `[G, H, Nq, Nk]` in fp16, bf16 or fp32,
    G a divisor of B; copied where rows are not contiguous and aligned. Queries without keys give zeros and -inf.
    Dropout depends on the seed, the head, the query's place in the batch and the key's in its sequence only. InputError
    for unsupported arguments.
    """
    Biased(q, k, v, bias, key_mask, dropout_p, seed).check()
    batch, queries, heads, _ = q.shape
    q, k, v = (_aligned(t) for t in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    constants, config = _constants("bias_attention_forward", q, scale, key_mask, dropout_p, seed)
    if q.numel():
        bias = _bias_rows(bias)
        grid = (triton.cdiv(queries, config.tiles["BLOCK_M"]) * batch * heads,)
        forward_kernel[grid](
            q, k, v, bias, _bytes(key_mask, q), q if seed is None else seed, out, lse,
            *_strides(q, k, v, out), *bias.stride()[:3], batch, heads, bias.shape[0], queries, k.shape[1],
            TAIL=tail_size(k.shape[1], config.tiles["BLOCK_N"]), **constants,
            **config.options,
        )  # fmt: skip
    return out, lse


def bias_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    bias_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deterministic gradients of `bias_attention_forward`: dq, dk, dv, and dbias `[G, H, Nq, Nk]`, contiguous.

    Each kernel recomputes the scores and owns its sums: dk and dv (four GEMMs of 2·B·H·Nq·Nk·D operations), dq (three),
    which also stores the gradient of an unshared bias, and else the gradient of the bias (two). `dlse` None means
    zeros; without `bias_gradient` dbias is empty.
    """
    Biased(q, k, v, bias, key_mask, dropout_p, seed).check()
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    q, k, v, dout, out = (_aligned(t) for t in (q, k, v, dout, out))
    make = torch.zeros if not q.numel() or not k.numel() else torch.empty
    dq, dk, dv = (make(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    dbias = make(bias.shape if bias_gradient else (0,), dtype=bias.dtype, device=q.device)
    if not q.numel() or not k.numel():
        return dq, dk, dv, dbias
    turned, bias = _bias_rows(bias.transpose(2, 3)), _bias_rows(bias)
    period = bias.shape[0]
    delta, row_lse = _statistics(out, dout, lse, dlse)
    rest = (_bytes(key_mask, q), q if seed is None else seed, row_lse, delta)
    inputs = (q, k, v, dout, bias, *rest)
    operands = _strides(q, k, v, dout)
    strides = (*operands, *bias.stride()[:3])
    counts = (batch, heads, period, queries, keys)
    chance = (scale, key_mask, dropout_p, seed)

    constants, config = _constants("bias_attention_dkdv", q, *chance)
    grid = (triton.cdiv(keys, config.tiles["BLOCK_N"]) * batch * heads,)
    for wanted in _sums(head_dim):
        dkdv_kernel[grid](
            q, k, v, dout, turned, *rest, dk, dv, *operands, *turned.stride()[:3], *counts,
            TAIL=tail_size(queries, config.tiles["BLOCK_M"]), APART=config.apart, FENCED=config.fenced,
            **wanted, **constants, **config.options,
        )  # fmt: skip

    alone = bias_gradient and period == batch
    constants, config = _constants("bias_attention_dq", q, *chance)
    grid = (triton.cdiv(queries, config.tiles["BLOCK_M"]) * batch * heads,)
    dq_kernel[grid](
        *inputs, dq, dbias if alone else q, *strides, keys, *counts, STORE_BIAS=alone,
        APART=config.apart, FENCED=config.fenced,
        TAIL=tail_size(keys, config.tiles["BLOCK_N"]), **constants,
        **config.options,
    )  # fmt: skip
    if alone or not bias_gradient:
        return dq, dk, dv, dbias

    constants, config = _constants("bias_attention_dbias", q, *chance)
    tiles = triton.cdiv(queries, config.tiles["BLOCK_M"]) * triton.cdiv(keys, config.tiles["BLOCK_N"])
    programs = tiles * period * heads
    parts = bias_partials(batch // period, programs)
    partial = dbias if parts == 1 else torch.empty((parts, *dbias.shape), dtype=torch.float32, device=q.device)
    dbias_kernel[(programs, parts)](*inputs, partial, *strides, keys, *counts, **constants, **config.options)
    return dq, dk, dv, dbias if parts == 1 else partial.sum(0).to(bias.dtype)


def _statistics(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, queries, heads, head_dim = out.shape
    delta, row_lse = torch.empty_like(lse), torch.empty_like(lse)
    statistics_kernel[(triton.cdiv(queries, STATISTICS.tiles["BLOCK"]) * heads * batch,)](
        out, dout, lse, lse if dlse is None else dlse.float().contiguous(), delta, row_lse,
        *_strides(out, dout), heads, queries, HAS_DLSE=dlse is not None, **_statistics_constants(head_dim),
        **STATISTICS.options,
    )  # fmt: skip
    return delta, row_lse


def _statistics_constants(head_dim: int) -> dict[str, int]:
    return {"DIM": head_dim, "WIDTH": triton.next_power_of_2(head_dim), **STATISTICS.tiles}


def _aligned(tensor: Tensor) -> Tensor:
    """`[B, N, H, D]` itself if its rows are contiguous, all strides multiples of 8, and 32 bits address a tile of N."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    fits = tensor.stride(1) * 256 < 2**31 and all(stride % 8 == 0 for stride in strides[:-1])
    return tensor if tensor.stride(-1) == 1 and fits else tensor.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of `[B, N, H]`; that of a dimension of one entry is arbitrary, and 0 is a multiple of everything."""
    return tuple(t.stride(i) if t.shape[i] > 1 else 0 for t in tensors for i in range(3))


def _bias_rows(bias: Tensor) -> Tensor:
    """The bias itself if its rows are contiguous, of whole vectors and begin where one may, else a padded copy."""
    sizes, strides = bias.shape, bias.stride()
    aligned = all(stride % 16 == 0 for size, stride in zip(sizes[:3], strides[:3], strict=True) if size > 1)
    if aligned and strides[2] * 256 < 2**31 and strides[3] == 1 and sizes[3] % 16 == 0:
        return bias
    # What is expanded, as the heads of a mask, is copied once.
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in strides[:3])
    small = bias[once]
    padded = triton.cdiv(sizes[3], 16) * 16
    room = torch.full((*small.shape[:3], padded), -torch.inf, dtype=bias.dtype, device=bias.device)
    room[..., : sizes[3]] = small
    return room.expand(*sizes[:3], padded)


def _bytes(mask: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if mask is None else mask.contiguous().view(torch.uint8)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """A head dimension as two powers of two, the second possibly 0: 80 → (64, 16), 96 → (64, 32), 160 → (128, 32).

    Triton's tiles are powers of two. 72 and 112 fill their second piece, of 16 and 64 columns, in part. InputError for
    other head dimensions than `BIAS_HEAD_DIMS`.
    """
    if head_dim not in BIAS_HEAD_DIMS:
        raise InputError(
            f"head dimension {head_dim} is not supported; the Triton kernels have {BIAS_HEAD_DIMS}: pad the heads with"
            " zeros (backend 'auto' does), or use backend 'reference'"
        )
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    return first, max(16, triton.next_power_of_2(rest)) if rest else 0


def _constants(
    kernel: str, q: Tensor, scale: float, key_mask: Tensor | None, dropout_p: float, seed: Tensor | None
) -> tuple[dict[str, Any], LaunchConfig]:
    dtype, threshold = dtype_name(q.dtype), dropout_threshold(dropout_p)
    if threshold:
        checks.seed_of(dropout_p, seed)
    config = bias_config(kernel, q.shape[-1], dtype, architecture(q.device), bool(threshold))
    constants = _kernel_constants(
        q.shape[-1], dtype, checks.positive_scale(scale), threshold, key_mask is not None, config
    )
    return constants, config


def _kernel_constants(
    head_dim: int, dtype: str, scale: float, threshold: int, masked: bool, config: LaunchConfig
) -> dict[str, Any]:
    d_a, d_b = split_head_dim(head_dim)
    constants = {"SCALE": scale, "DIM": head_dim, "D_A": d_a, "D_B": d_b, "PRECISION": dot_precision(dtype)}
    return constants | {"THRESHOLD": threshold, "HAS_MASK": masked, "STAGES": config.num_stages, **config.tiles}


def _sums(head_dim: int) -> tuple[dict[str, bool], ...]:
    """The launches of the dkdv kernel: one for both sums, or two."""
    return ({"DK": True, "DV": True},) if head_dim <= 128 else ({"DK": True, "DV": False}, {"DK": False, "DV": True})


def _spec(name: str, kernel: Any, variants: tuple[Mapping[str, Any], ...]) -> KernelSpec:
    def constants(variant: Mapping[str, Any], dtype: str, config: LaunchConfig) -> dict[str, Any]:
        head_dim, threshold = variant["head_dim"], dropout_threshold(variant.get("dropout", 0.0))
        looped = config.tiles["BLOCK_M" if name == "bias_attention_dkdv" else "BLOCK_N"]
        found = _kernel_constants(head_dim, dtype, head_dim**-0.5, threshold, variant.get("mask", False), config)
        given = {
            "TAIL": tail_size(577, looped),
            "STORE_BIAS": variant.get("own_bias", False),
            "APART": config.apart,
            "FENCED": config.fenced,
            **_sums(head_dim)[0],
        }
        return found | {key: value for key, value in given.items() if key in kernel.arg_names}

    def types(variant: Mapping[str, Any], dtype: str) -> dict[str, str]:
        special = {"mask_ptr": "*u8", "seed_ptr": "*i64"}
        special |= dict.fromkeys(("lse_ptr", "row_lse_ptr", "delta_ptr"), "*fp32")
        if name == "bias_attention_dbias":
            special["dbias_ptr"] = "*fp32"
        return argument_types(
            kernel, dtype, special, constants(variant, dtype, LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 64}))
        )

    return KernelSpec(
        name=name,
        kernel=kernel,
        variants=variants,
        types=types,
        constants=constants,
        config=lambda variant, dtype, arch: bias_config(
            name, variant["head_dim"], dtype, arch, bool(variant.get("dropout"))
        ),
    )


def _statistics_types(variant: Mapping[str, Any], dtype: str) -> dict[str, str]:
    special = dict.fromkeys(("lse_ptr", "dlse_ptr", "delta_ptr", "row_lse_ptr"), "*fp32")
    return argument_types(statistics_kernel, dtype, special, dict.fromkeys(("DIM", "WIDTH", "HAS_DLSE", "BLOCK")))


# The model's, one whose second piece is filled in part, and the widest of two columns of the table of configurations:
# the others compile to less than one of these.
_HEAD_DIMS = tuple({"head_dim": head_dim} for head_dim in (64, 72, 128, 256))
_CHANCE = {"head_dim": 64, "mask": True, "dropout": 0.1}
KERNELS: list[KernelSpec] = [
    _spec("bias_attention_forward", forward_kernel, (*_HEAD_DIMS, _CHANCE)),
    _spec("bias_attention_dkdv", dkdv_kernel, (*_HEAD_DIMS, _CHANCE)),
    _spec("bias_attention_dq", dq_kernel, (*_HEAD_DIMS, {"head_dim": 64, "own_bias": True}, _CHANCE)),
    _spec("bias_attention_dbias", dbias_kernel, (*_HEAD_DIMS, _CHANCE)),
    KernelSpec(
        name="bias_attention_statistics",
        kernel=statistics_kernel,
        variants=_HEAD_DIMS[:1],
        types=_statistics_types,
        constants=lambda variant, dtype, config: _statistics_constants(variant["head_dim"]) | {"HAS_DLSE": False},
        config=lambda variant, dtype, arch: STATISTICS,
        tensor_core=False,
    ),
]
