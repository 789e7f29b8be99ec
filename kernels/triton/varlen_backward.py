"""The backward kernels of packed attention. Every program owns what it accumulates; there are no atomics."""

# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import dkdv_tile, dq_tile, load_pieces, store_pieces
from .varlen_tiles import locate_tile


@triton.jit
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, seed_ptr, row_lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh,
    sequences, tiles, queries, heads,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients dk and dv of BLOCK_N keys of one sequence and head, from the queries of the sequence."""
    s, start = locate_tile(cu_k_ptr, sequences, tl.program_id(0) % tiles, BLOCK_N)
    h = (tl.program_id(0) // tiles).to(tl.int64)
    first_k = tl.load(cu_k_ptr + s)
    length_k = (tl.load(cu_k_ptr + s + 1) - first_k).to(tl.int32)
    if start >= length_k:
        return
    first_q = tl.load(cu_q_ptr + s).to(tl.int64)
    length_q = (tl.load(cu_q_ptr + s + 1) - first_q).to(tl.int32)
    token = first_k.to(tl.int64) + start
    columns = tl.arange(0, BLOCK_N)
    inside = columns < length_k - start
    k_a, k_b = load_pieces(k_ptr + token * stride_kn + h * stride_kh, columns, stride_kn, inside, D_A, D_B, True)
    v_a, v_b = load_pieces(v_ptr + token * stride_vn + h * stride_vh, columns, stride_vn, inside, D_A, D_B, True)
    q_base = q_ptr + first_q * stride_qn + h * stride_qh
    g_base = dout_ptr + first_q * stride_gn + h * stride_gh
    row_lse = row_lse_ptr + h * queries + first_q
    delta = delta_ptr + h * queries + first_q
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    dk_a = tl.zeros([BLOCK_N, D_A], tl.float32)
    dv_a = tl.zeros([BLOCK_N, D_A], tl.float32)
    dk_b = tl.zeros([BLOCK_N, D_B if D_B > 0 else 16], tl.float32)
    dv_b = tl.zeros([BLOCK_N, D_B if D_B > 0 else 16], tl.float32)
    rows = tl.arange(0, BLOCK_M)
    # With small tiles, a mask on every tile costs fewer registers than a last tile of its own.
    MASKED: tl.constexpr = BLOCK_M <= 32
    full = (tl.cdiv(length_q, BLOCK_M) if MASKED else length_q // BLOCK_M) * BLOCK_M
    for first in range(0, full, BLOCK_M):
        dk_a, dk_b, dv_a, dv_b = dkdv_tile(
            k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q_base, g_base, stride_qn, stride_gn,
            row_lse + first, delta + first, 0, rows < length_q - first,
            seed, h, first_q + first + rows, start + columns,
            SCALE, D_A, D_B, BLOCK_M, PRECISION, False, MASKED, THRESHOLD,
        )  # fmt: skip
        q_base += BLOCK_M * stride_qn
        g_base += BLOCK_M * stride_gn
    if not MASKED:
        if full < length_q:
            dk_a, dk_b, dv_a, dv_b = dkdv_tile(
                k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q_base, g_base, stride_qn, stride_gn,
                row_lse + full, delta + full, 0, rows < length_q - full,
                seed, h, first_q + full + rows, start + columns,
                SCALE, D_A, D_B, BLOCK_M, PRECISION, False, True, THRESHOLD,
            )  # fmt: skip
    dk_a = dk_a * SCALE
    dk_b = dk_b * SCALE
    if HAS_MASK:
        # Rows of dk and dv are independent: keys that nobody attends to are struck out at the end, at no cost before.
        allowed = (tl.load(mask_ptr + token + columns, mask=inside, other=0) != 0)[:, None]
        dk_a = tl.where(allowed, dk_a, 0.0)
        dk_b = tl.where(allowed, dk_b, 0.0)
        dv_a = tl.where(allowed, dv_a, 0.0)
        dv_b = tl.where(allowed, dv_b, 0.0)
    stride_dn = heads * (D_A + D_B)
    gradient = token * stride_dn + h * (D_A + D_B)
    store_pieces(dv_ptr + gradient, columns, stride_dn, inside, dv_a, dv_b, D_A, D_B)
    store_pieces(dk_ptr + gradient, columns, stride_dn, inside, dk_a, dk_b, D_A, D_B)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, seed_ptr, row_lse_ptr, delta_ptr, dq_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh,
    sequences, tiles, queries, heads,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient dq of BLOCK_M queries of one sequence and head, from the keys of the sequence."""
    s, start = locate_tile(cu_q_ptr, sequences, tl.program_id(0) % tiles, BLOCK_M)
    h = (tl.program_id(0) // tiles).to(tl.int64)
    first_q = tl.load(cu_q_ptr + s)
    length_q = (tl.load(cu_q_ptr + s + 1) - first_q).to(tl.int32)
    if start >= length_q:
        return
    first_k = tl.load(cu_k_ptr + s).to(tl.int64)
    length_k = (tl.load(cu_k_ptr + s + 1) - first_k).to(tl.int32)
    token = first_q.to(tl.int64) + start
    rows = tl.arange(0, BLOCK_M)
    inside = rows < length_q - start
    q_a, q_b = load_pieces(q_ptr + token * stride_qn + h * stride_qh, rows, stride_qn, inside, D_A, D_B, True)
    g_a, g_b = load_pieces(dout_ptr + token * stride_gn + h * stride_gh, rows, stride_gn, inside, D_A, D_B, True)
    row_lse = tl.load(row_lse_ptr + h * queries + token + rows, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + h * queries + token + rows, mask=inside, other=0.0)
    k_base = k_ptr + first_k * stride_kn + h * stride_kh
    v_base = v_ptr + first_k * stride_vn + h * stride_vh
    mask = mask_ptr + first_k
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    dq_a = tl.zeros([BLOCK_M, D_A], tl.float32)
    dq_b = tl.zeros([BLOCK_M, D_B if D_B > 0 else 16], tl.float32)
    columns = tl.arange(0, BLOCK_N)
    MASKED: tl.constexpr = BLOCK_N <= 32
    full = (tl.cdiv(length_k, BLOCK_N) if MASKED else length_k // BLOCK_N) * BLOCK_N
    for first in range(0, full, BLOCK_N):
        present = columns < length_k - first
        allowed = tl.load(mask + first + columns, mask=present, other=0) != 0 if HAS_MASK else columns
        dq_a, dq_b = dq_tile(
            q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta, k_base, v_base, stride_kn, stride_vn,
            0, present, allowed, seed, h, token + rows, first + columns,
            SCALE, D_A, D_B, BLOCK_N, PRECISION, False, MASKED, HAS_MASK, THRESHOLD,
        )  # fmt: skip
        k_base += BLOCK_N * stride_kn
        v_base += BLOCK_N * stride_vn
    if not MASKED:
        if full < length_k:
            present = columns < length_k - full
            allowed = tl.load(mask + full + columns, mask=present, other=0) != 0 if HAS_MASK else columns
            dq_a, dq_b = dq_tile(
                q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta, k_base, v_base, stride_kn, stride_vn,
                0, present, allowed, seed, h, token + rows, full + columns,
                SCALE, D_A, D_B, BLOCK_N, PRECISION, False, True, HAS_MASK, THRESHOLD,
            )  # fmt: skip
    stride_dn = heads * (D_A + D_B)
    dq_base = dq_ptr + token * stride_dn + h * (D_A + D_B)
    store_pieces(dq_base, rows, stride_dn, inside, dq_a * SCALE, dq_b * SCALE, D_A, D_B)
