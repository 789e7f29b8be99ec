"""Backward kernels of attention with a position bias. Every program owns what it accumulates; there are no atomics."""

# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import biased_product, dkdv_tile, dq_tile, load_pieces, product, softmax_weights, store_pieces


@triton.jit
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias_ptr, row_lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_bias, batch, heads, tokens,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The gradients dk and dv of BLOCK_N keys of one head of one batch entry, from all queries."""
    tiles = tl.cdiv(tokens, BLOCK_N)
    start = tl.program_id(0) % tiles * BLOCK_N
    b = (tl.program_id(0) // tiles % batch).to(tl.int64)
    h = (tl.program_id(0) // tiles // batch).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    inside = columns < tokens - start
    # Keys beyond the last have a bias of -inf, so their weights are zero whatever is read for them.
    clamped = tl.minimum(columns, tokens - 1 - start)
    k_base = k_ptr + b * stride_kb + h * stride_kh + start.to(tl.int64) * stride_kn
    v_base = v_ptr + b * stride_vb + h * stride_vh + start.to(tl.int64) * stride_vn
    k_a, k_b = load_pieces(k_base, clamped, stride_kn, inside, D_A, D_B, False)
    v_a, v_b = load_pieces(v_base, clamped, stride_vn, inside, D_A, D_B, False)
    q_base = q_ptr + b * stride_qb + h * stride_qh
    g_base = dout_ptr + b * stride_gb + h * stride_gh
    row_lse = row_lse_ptr + (b * heads + h) * tokens
    delta = delta_ptr + (b * heads + h) * tokens
    bias_columns = bias_ptr + h * tokens * stride_bias + (start + columns)[None, :]
    dk_a = tl.zeros([BLOCK_N, D_A], tl.float32)
    dv_a = tl.zeros([BLOCK_N, D_A], tl.float32)
    dk_b = tl.zeros([BLOCK_N, D_B if D_B > 0 else 16], tl.float32)
    dv_b = tl.zeros([BLOCK_N, D_B if D_B > 0 else 16], tl.float32)
    rows = tl.arange(0, BLOCK_M)
    # With small tiles, a mask on every tile costs fewer registers than a last tile of its own.
    MASKED: tl.constexpr = TAIL == BLOCK_M
    full = (tl.cdiv(tokens, BLOCK_M) if MASKED else tokens // BLOCK_M) * BLOCK_M
    for first in range(0, full, BLOCK_M):
        bias_rows = first + rows
        if MASKED:
            bias_rows = tl.minimum(bias_rows, tokens - 1)
        dk_a, dk_b, dv_a, dv_b = dkdv_tile(
            k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q_base, g_base, stride_qn, stride_gn,
            row_lse + first, delta + first, bias_columns + bias_rows[:, None] * stride_bias, rows < tokens - first,
            0, 0, 0, 0, SCALE, D_A, D_B, BLOCK_M, PRECISION, True, MASKED, 0,
        )  # fmt: skip
        q_base += BLOCK_M * stride_qn
        g_base += BLOCK_M * stride_gn
    if TAIL > 0 and not MASKED:
        last = tl.arange(0, TAIL)
        bias_last = bias_columns + tl.minimum(full + last, tokens - 1)[:, None] * stride_bias
        dk_a, dk_b, dv_a, dv_b = dkdv_tile(
            k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q_base, g_base, stride_qn, stride_gn,
            row_lse + full, delta + full, bias_last, last < tokens - full,
            0, 0, 0, 0, SCALE, D_A, D_B, TAIL, PRECISION, True, True, 0,
        )  # fmt: skip
    stride_dn = heads * (D_A + D_B)
    gradient = (b * tokens + start) * stride_dn + h * (D_A + D_B)
    store_pieces(dv_ptr + gradient, columns, stride_dn, inside, dv_a, dv_b, D_A, D_B)
    store_pieces(dk_ptr + gradient, columns, stride_dn, inside, dk_a * SCALE, dk_b * SCALE, D_A, D_B)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias_ptr, row_lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_bias, batch, heads, tokens,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The gradient dq of BLOCK_M queries of one head of one batch entry, from all keys."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    start = tl.program_id(0) % tiles * BLOCK_M
    b = (tl.program_id(0) // tiles % batch).to(tl.int64)
    h = (tl.program_id(0) // tiles // batch).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    inside = rows < tokens - start
    clamped = tl.minimum(rows, tokens - 1 - start)
    q_base = q_ptr + b * stride_qb + h * stride_qh + start.to(tl.int64) * stride_qn
    g_base = dout_ptr + b * stride_gb + h * stride_gh + start.to(tl.int64) * stride_gn
    q_a, q_b = load_pieces(q_base, clamped, stride_qn, inside, D_A, D_B, False)
    g_a, g_b = load_pieces(g_base, clamped, stride_gn, inside, D_A, D_B, False)
    statistics = (b * heads + h) * tokens + start + clamped
    row_lse = tl.load(row_lse_ptr + statistics)
    delta = tl.load(delta_ptr + statistics)
    k_base = k_ptr + b * stride_kb + h * stride_kh
    v_base = v_ptr + b * stride_vb + h * stride_vh
    bias_base = bias_ptr + (h * tokens + start) * stride_bias
    bias_rows = clamped[:, None] * stride_bias
    dq_a = tl.zeros([BLOCK_M, D_A], tl.float32)
    dq_b = tl.zeros([BLOCK_M, D_B if D_B > 0 else 16], tl.float32)
    columns = tl.arange(0, BLOCK_N)
    full = tokens // BLOCK_N * BLOCK_N
    for _ in range(0, full, BLOCK_N):
        dq_a, dq_b = dq_tile(
            q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta, k_base, v_base, stride_kn, stride_vn,
            bias_base + (bias_rows + columns[None, :]), columns, columns, 0, 0, 0, 0,
            SCALE, D_A, D_B, BLOCK_N, PRECISION, True, False, False, 0,
        )  # fmt: skip
        k_base += BLOCK_N * stride_kn
        v_base += BLOCK_N * stride_vn
        bias_base += BLOCK_N
    if TAIL > 0:
        last = tl.arange(0, TAIL)
        dq_a, dq_b = dq_tile(
            q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta, k_base, v_base, stride_kn, stride_vn,
            bias_base + (bias_rows + last[None, :]), last < tokens - full, last, 0, 0, 0, 0,
            SCALE, D_A, D_B, TAIL, PRECISION, True, True, False, 0,
        )  # fmt: skip
    stride_dn = heads * (D_A + D_B)
    dq_base = dq_ptr + (b * tokens + start) * stride_dn + h * (D_A + D_B)
    store_pieces(dq_base, rows, stride_dn, inside, dq_a * SCALE, dq_b * SCALE, D_A, D_B)


@triton.jit
def dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias_ptr, row_lse_ptr, delta_ptr, dbias_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_bias, batch, heads, tokens,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of the bias gradient of one head: the score gradients, summed over a part of the batch in fp32."""
    tiles_n = tl.cdiv(tokens, BLOCK_N)
    tiles = tl.cdiv(tokens, BLOCK_M) * tiles_n
    start_m = tl.program_id(0) % tiles // tiles_n * BLOCK_M
    start_n = tl.program_id(0) % tiles_n * BLOCK_N
    h = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(1)
    share = tl.cdiv(batch, tl.num_programs(1))
    first = part * share
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    # What is read twice for rows and columns beyond the last is not stored, or has a bias of -inf.
    clamped_rows = tl.minimum(rows, tokens - 1 - start_m)
    clamped_columns = tl.minimum(columns, tokens - 1 - start_n)
    bias_base = bias_ptr + (h * tokens + start_m) * stride_bias + start_n
    bias = tl.load(bias_base + clamped_rows[:, None] * stride_bias + columns[None, :])
    b = first.to(tl.int64)
    q_base = q_ptr + b * stride_qb + h * stride_qh + start_m.to(tl.int64) * stride_qn
    g_base = dout_ptr + b * stride_gb + h * stride_gh + start_m.to(tl.int64) * stride_gn
    k_base = k_ptr + b * stride_kb + h * stride_kh + start_n.to(tl.int64) * stride_kn
    v_base = v_ptr + b * stride_vb + h * stride_vh + start_n.to(tl.int64) * stride_vn
    statistics = (b * heads + h) * tokens + start_m
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(first, tl.minimum(first + share, batch)):
        q_a, q_b = load_pieces(q_base, clamped_rows, stride_qn, rows, D_A, D_B, False)
        k_a, k_b = load_pieces(k_base, clamped_columns, stride_kn, columns, D_A, D_B, False)
        row_lse = tl.load(row_lse_ptr + statistics + clamped_rows)
        delta = tl.load(delta_ptr + statistics + clamped_rows)
        scores = biased_product(bias, q_a, q_b, k_a, k_b, D_B, PRECISION)
        weights = softmax_weights(scores, row_lse[:, None], SCALE, PRECISION)
        g_a, g_b = load_pieces(g_base, clamped_rows, stride_gn, rows, D_A, D_B, False)
        v_a, v_b = load_pieces(v_base, clamped_columns, stride_vn, columns, D_A, D_B, False)
        acc += weights * (product(g_a, g_b, v_a, v_b, D_B, PRECISION) - delta[:, None])
        q_base += stride_qb
        k_base += stride_kb
        v_base += stride_vb
        g_base += stride_gb
        statistics += heads * tokens
    dbias = dbias_ptr + ((part * heads + h) * tokens + start_m) * stride_bias + start_n
    inside = (rows < tokens - start_m)[:, None]
    tl.store(dbias + rows[:, None] * stride_bias + columns[None, :], acc, mask=inside)


def bias_partials(batch: int, programs: int) -> int:
    """Into how many parts the batch is cut so that the bias gradient keeps a GPU busy; a function of shapes alone."""
    return max(1, min(batch, 8, _PROGRAMS // programs))


# Four programs for each of some 130 multiprocessors.
_PROGRAMS = 512
