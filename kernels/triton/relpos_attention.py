"""Self-attention with BEiT's relative position bias (arXiv 2106.08254), in the manner of FlashAttention-2 (2307.08691).

The bias is materialised once per layer, `[H, N, N_pad]`, divided by the scale and with -inf in the columns beyond N, so
that the loop over keys needs neither the table nor a mask, and no arithmetic for the bias. All batch entries read it
from the second-level cache.
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
from ..limits import HEAD_DIMS
from .attention_tiles import (
    LOG2E,
    STATISTICS_SPEC,
    addressable,
    argument_types,
    backward_statistics,
    biased_product,
    dkdv_tile,
    dot_precision,
    dq_tile,
    forward_tile,
    load_pieces,
    positive_scale,
    product,
    softmax_weights,
    split_head_dim,
    store_pieces,
)
from .launch import KernelSpec, LaunchConfig, architecture, config_for, dtype_name, tail_size
from .relpos_table import BIAS_SPEC, TABLE_SPEC, bias_dtype, materialise_bias, table_gradient, turn

__all__ = ["KERNELS", "materialise_bias", "relpos_attention_backward", "relpos_attention_forward"]


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_bias, batch, heads, tokens,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr = None,
):  # fmt: skip
    """BLOCK_M queries of one head of one batch entry, against all keys.

    With STAGES, the loop's loads of the bias are copied ahead of their use too, not only those of keys and values.
    """
    tiles = tl.cdiv(tokens, BLOCK_M)
    # Neighbours share keys and values, then the bias of a head, so that both stay in the second-level cache.
    start = tl.program_id(0) % tiles * BLOCK_M
    b = (tl.program_id(0) // tiles % batch).to(tl.int64)
    h = (tl.program_id(0) // tiles // batch).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    inside = rows < tokens - start
    # Rows beyond the last repeat it: they read valid memory and are not stored.
    clamped = tl.minimum(rows, tokens - 1 - start)
    q_base = q_ptr + b * stride_qb + h * stride_qh + start.to(tl.int64) * stride_qn
    q_a, q_b = load_pieces(q_base, clamped, stride_qn, inside, D_A, D_B, False)
    k_base = k_ptr + b * stride_kb + h * stride_kh
    v_base = v_ptr + b * stride_vb + h * stride_vh
    bias_base = bias_ptr + (h * tokens + start) * stride_bias
    bias_rows = clamped[:, None] * stride_bias
    columns = tl.arange(0, BLOCK_N)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc_a = tl.zeros([BLOCK_M, D_A], tl.float32)
    acc_b = tl.zeros([BLOCK_M, D_B if D_B > 0 else 16], tl.float32)
    full = tokens // BLOCK_N * BLOCK_N
    for _ in tl.range(0, full, BLOCK_N, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        acc_a, acc_b, row_max, row_sum = forward_tile(
            q_a, q_b, acc_a, acc_b, row_max, row_sum,
            k_base, v_base, stride_kn, stride_vn, bias_base + (bias_rows + columns[None, :]), columns, columns,
            0, 0, 0, 0, SCALE, D_A, D_B, BLOCK_N, PRECISION, HAS_BIAS, False, False, 0,
        )  # fmt: skip
        k_base += BLOCK_N * stride_kn
        v_base += BLOCK_N * stride_vn
        bias_base += BLOCK_N
    if TAIL > 0:
        # The class token makes N one more than a multiple of a tile at many sizes: the last tile has a size of its own.
        # The branch is always taken: it is a fence, without which ptxas finds Hopper's products of the loop still under
        # way where those of the last tile begin, and serialises every product of the kernel (C7515).
        if full < tokens:
            last = tl.arange(0, TAIL)
            acc_a, acc_b, row_max, row_sum = forward_tile(
                q_a, q_b, acc_a, acc_b, row_max, row_sum,
                k_base, v_base, stride_kn, stride_vn, bias_base + (bias_rows + last[None, :]), last < tokens - full,
                last, 0, 0, 0, 0, SCALE, D_A, D_B, TAIL, PRECISION, HAS_BIAS, True, False, 0,
            )  # fmt: skip
    inverse = (1.0 / row_sum)[:, None]
    out_base = out_ptr + b * stride_ob + h * stride_oh + start.to(tl.int64) * stride_on
    store_pieces(out_base, rows, stride_on, inside, acc_a * inverse, acc_b * inverse, D_A, D_B)
    lse = row_max * SCALE + tl.log2(row_sum) / LOG2E
    tl.store(lse_ptr + (b * heads + h) * tokens + start + rows, lse, mask=inside)


# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias_ptr, row_lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_bias, batch, heads, tokens,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients dk and dv of BLOCK_N keys of one head of one batch entry, from all queries.

    The bias lies `[H, keys, queries]`, with -inf in the columns beyond the last query.
    """
    tiles = tl.cdiv(tokens, BLOCK_N)
    start = tl.program_id(0) % tiles * BLOCK_N
    b = (tl.program_id(0) // tiles % batch).to(tl.int64)
    h = (tl.program_id(0) // tiles // batch).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    inside = columns < tokens - start
    # Keys beyond the last repeat it: they read valid memory and are not stored.
    clamped = tl.minimum(columns, tokens - 1 - start)
    k_base = k_ptr + b * stride_kb + h * stride_kh + start.to(tl.int64) * stride_kn
    v_base = v_ptr + b * stride_vb + h * stride_vh + start.to(tl.int64) * stride_vn
    k_a, k_b = load_pieces(k_base, clamped, stride_kn, inside, D_A, D_B, False)
    v_a, v_b = load_pieces(v_base, clamped, stride_vn, inside, D_A, D_B, False)
    q_base = q_ptr + b * stride_qb + h * stride_qh
    g_base = dout_ptr + b * stride_gb + h * stride_gh
    row_lse = row_lse_ptr + (b * heads + h) * tokens
    delta = delta_ptr + (b * heads + h) * tokens
    bias_keys = bias_ptr + (h * tokens + start) * stride_bias + clamped[:, None] * stride_bias
    dk_a = tl.zeros([BLOCK_N, D_A], tl.float32)
    dv_a = tl.zeros([BLOCK_N, D_A], tl.float32)
    dk_b = tl.zeros([BLOCK_N, D_B if D_B > 0 else 16], tl.float32)
    dv_b = tl.zeros([BLOCK_N, D_B if D_B > 0 else 16], tl.float32)
    rows = tl.arange(0, BLOCK_M)
    # With small tiles, a mask on every tile costs fewer registers than a last tile of its own.
    MASKED: tl.constexpr = TAIL == BLOCK_M
    full = (tl.cdiv(tokens, BLOCK_M) if MASKED else tokens // BLOCK_M) * BLOCK_M
    for first in tl.range(0, full, BLOCK_M, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        dk_a, dk_b, dv_a, dv_b = dkdv_tile(
            k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q_base, g_base, stride_qn, stride_gn,
            row_lse + first, delta + first, bias_keys + (first + rows)[None, :], rows < tokens - first,
            0, 0, 0, 0, SCALE, D_A, D_B, BLOCK_M, PRECISION, True, MASKED, 0, True,
        )  # fmt: skip
        q_base += BLOCK_M * stride_qn
        g_base += BLOCK_M * stride_gn
    if TAIL > 0 and not MASKED:
        if full < tokens:  # a fence, see `forward_kernel`
            last = tl.arange(0, TAIL)
            dk_a, dk_b, dv_a, dv_b = dkdv_tile(
                k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q_base, g_base, stride_qn, stride_gn,
                row_lse + full, delta + full, bias_keys + (full + last)[None, :], last < tokens - full,
                0, 0, 0, 0, SCALE, D_A, D_B, TAIL, PRECISION, True, True, 0, True,
            )  # fmt: skip
    stride_dn = heads * (D_A + D_B)
    gradient = (b * tokens + start) * stride_dn + h * (D_A + D_B)
    store_pieces(dv_ptr + gradient, columns, stride_dn, inside, dv_a, dv_b, D_A, D_B)
    store_pieces(dk_ptr + gradient, columns, stride_dn, inside, dk_a * SCALE, dk_b * SCALE, D_A, D_B)


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
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
    # With small tiles, a mask on every tile costs fewer registers than a last tile of its own.
    MASKED: tl.constexpr = TAIL == BLOCK_N
    full = (tl.cdiv(tokens, BLOCK_N) if MASKED else tokens // BLOCK_N) * BLOCK_N
    for first in range(0, full, BLOCK_N):
        dq_a, dq_b = dq_tile(
            q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta, k_base, v_base, stride_kn, stride_vn,
            bias_base + (bias_rows + columns[None, :]), columns < tokens - first, columns, 0, 0, 0, 0,
            SCALE, D_A, D_B, BLOCK_N, PRECISION, True, MASKED, False, 0,
        )  # fmt: skip
        k_base += BLOCK_N * stride_kn
        v_base += BLOCK_N * stride_vn
        bias_base += BLOCK_N
    if TAIL > 0 and not MASKED:
        if full < tokens:  # a fence, as in the forward kernel
            last = tl.arange(0, TAIL)
            dq_a, dq_b = dq_tile(
                q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta, k_base, v_base, stride_kn, stride_vn,
                bias_base + (bias_rows + last[None, :]), last < tokens - full, last, 0, 0, 0, 0,
                SCALE, D_A, D_B, TAIL, PRECISION, True, True, False, 0,
            )  # fmt: skip
    stride_dn = heads * (D_A + D_B)
    dq_base = dq_ptr + (b * tokens + start) * stride_dn + h * (D_A + D_B)
    store_pieces(dq_base, rows, stride_dn, inside, dq_a * SCALE, dq_b * SCALE, D_A, D_B)


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
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


# Tiles of at most so many queries are masked in the loop of the dkdv kernel, instead of a last tile of their own.
MASKED_QUERIES = 16
# Four programs for each of some 130 multiprocessors.
_PROGRAMS = 512


def bias_partials(batch: int, programs: int) -> int:
    """Into how many parts the batch is cut so that the bias gradient keeps a GPU busy; a function of shapes alone."""
    return max(1, min(batch, 8, _PROGRAMS // programs))


def relpos_attention_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ + bias) v.

    Args:
        q, k, v: `[B, N, H, D]`, D in `HEAD_DIMS`, one floating-point type. Any strides; a tensor whose last dimension
            is not contiguous is copied.
        bias: `[H, N, N_pad]` contiguous, as `materialise_bias` makes it for the same scale.
        scale: of the products, positive.

    Returns:
        out `[B, N, H, D]` contiguous, and the logsumexp of the scores, natural, `[B, H, N]` fp32.

    Raises:
        InputError: a shape, stride, type, scale or head dimension that the kernels do not support.
    """
    _check(q, k, v, bias)
    batch, tokens, heads, head_dim = q.shape
    q, k, v = (addressable(t) for t in (q, k, v))
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    constants, config = _constants("relpos_forward", q, scale)
    tail = _tail(bias, tokens, config.tiles["BLOCK_N"])
    if q.numel():
        grid = (triton.cdiv(tokens, config.tiles["BLOCK_M"]) * batch * heads,)
        forward_kernel[grid](
            q, k, v, bias, out, lse, *_strides(q, k, v, out), bias.stride(1), batch, heads, tokens,
            HAS_BIAS=True, TAIL=tail, STAGES=config.num_stages, **constants,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


def relpos_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    table_rows: int,
    window: tuple[int, int],
    scale: float,
    out: Tensor,
    lse: Tensor,
    turned_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `relpos_attention_forward`, and of the table that the bias was made of. The same bits every time.

    Scores are recomputed by three kernels, so that each owns what it accumulates and needs no atomics: dk and dv (four
    products of 2·B·H·N²·D operations), dq (three), and the bias gradient summed over the batch (two). Of the nine, five
    are the least that any backward pass needs.

    Args:
        dout: `[B, N, H, D]`, any strides.
        q, k, v, bias, scale: as in the forward pass; out, lse: its results.
        table_rows: rows of the table, (2wh-1)(2ww-1)+3.
        window: (wh, ww), N = 1 + wh·ww.
        turned_bias: `[H, keys, queries]`, as `materialise_bias` makes it with `turned`; by default a copy of the bias.

    Returns:
        dq, dk, dv `[B, N, H, D]` in the type of q, and dtable `[table_rows, H]` in fp32.
    """
    _check(q, k, v, bias)
    batch, tokens, heads, _ = q.shape
    height, width = window
    if tokens != 1 + height * width or table_rows != (2 * height - 1) * (2 * width - 1) + 3:
        raise InputError(f"window {window} does not go with {tokens} tokens and a table of {table_rows} rows")
    q, k, v, dout, out = (addressable(t) for t in (q, k, v, dout, out))
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    if not q.numel():
        return dq, dk, dv, torch.zeros((table_rows, heads), dtype=torch.float32, device=q.device)
    delta, row_lse = backward_statistics(out, dout, lse)
    turned_bias = turn(bias) if turned_bias is None else turned_bias
    _check(q, k, v, turned_bias)
    inputs, statistics = (q, k, v, dout, bias), (row_lse, delta)
    sizes = (*_strides(q, k, v, dout), bias.stride(1), batch, heads, tokens)

    constants, config = _constants("relpos_dkdv", q, scale)
    grid = (triton.cdiv(tokens, config.tiles["BLOCK_N"]) * batch * heads,)
    dkdv_kernel[grid](
        q, k, v, dout, turned_bias, *statistics, dk, dv, *sizes,
        TAIL=_tail(turned_bias, tokens, config.tiles["BLOCK_M"], MASKED_QUERIES), STAGES=config.num_stages, **constants,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    constants, config = _constants("relpos_dq", q, scale)
    grid = (triton.cdiv(tokens, config.tiles["BLOCK_M"]) * batch * heads,)
    dq_kernel[grid](
        *inputs, *statistics, dq, *sizes, TAIL=_tail(bias, tokens, config.tiles["BLOCK_N"]), **constants,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    constants, config = _constants("relpos_dbias", q, scale)
    _tail(bias, tokens, config.tiles["BLOCK_N"])
    tiles = triton.cdiv(tokens, config.tiles["BLOCK_M"]) * triton.cdiv(tokens, config.tiles["BLOCK_N"])
    parts = bias_partials(batch, tiles * heads)
    dbias = torch.empty((parts, *bias.shape), dtype=torch.float32, device=q.device)
    dbias_kernel[(tiles * heads, parts)](
        *inputs, *statistics, dbias, *sizes, **constants, num_warps=config.num_warps, num_stages=config.num_stages
    )
    return dq, dk, dv, table_gradient(dbias, window)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> None:
    checks.self_attention(q, k, v)
    if bias.ndim != 3 or bias.shape[:2] != (q.shape[2], q.shape[1]) or not bias.is_contiguous():
        raise InputError(f"bias is {[*bias.shape]}; it must be contiguous [{q.shape[2]}, {q.shape[1]}, N_pad]")
    if bias.dtype != bias_dtype(q.dtype):
        raise InputError(f"bias is {bias.dtype}; for {q.dtype} it must be {bias_dtype(q.dtype)}, see materialise_bias")


def _constants(kernel: str, q: Tensor, scale: float) -> tuple[dict[str, Any], LaunchConfig]:
    dtype = dtype_name(q.dtype)
    config = config_for(kernel, q.shape[-1], dtype, architecture(q.device))
    return _kernel_constants(q.shape[-1], dtype, positive_scale(scale), config), config


def _kernel_constants(head_dim: int, dtype: str, scale: float, config: LaunchConfig) -> dict[str, Any]:
    d_a, d_b = split_head_dim(head_dim)
    return {"SCALE": scale, "D_A": d_a, "D_B": d_b, "PRECISION": dot_precision(dtype), **config.tiles}


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _tail(bias: Tensor, tokens: int, block: int, masked: int = 32) -> int:
    """Columns of the last tile, which the padding of the bias must hold."""
    tail = tail_size(tokens, block, masked)
    needed = triton.cdiv(tokens, block) * block
    if bias.shape[2] < needed:
        raise InputError(f"bias has {bias.shape[2]} columns for {tokens} tokens; tiles of {block} need {needed}")
    return tail


def _types(kernel: Any, variant: Mapping[str, Any], dtype: str) -> dict[str, str]:
    special = dict.fromkeys(("lse_ptr", "row_lse_ptr", "delta_ptr", "dbias_ptr"), "*fp32")
    special["bias_ptr"] = "*fp32" if dtype == "fp32" else "*fp16"
    constexprs = {"SCALE", "D_A", "D_B", "PRECISION", "HAS_BIAS", "BLOCK_M", "BLOCK_N", "TAIL", "STAGES"}
    return argument_types(kernel, dtype, special, dict.fromkeys(constexprs))


def _spec(name: str, kernel: Any, extras: tuple[Mapping[str, Any], ...]) -> KernelSpec:
    """`extras`: for every head dimension, the variants' further constants by the names that tests and tables show."""

    def constants(variant: Mapping[str, Any], dtype: str, config: LaunchConfig) -> dict[str, Any]:
        head_dim = variant["head_dim"]
        out = _kernel_constants(head_dim, dtype, head_dim**-0.5, config)
        looped = config.tiles["BLOCK_M" if name == "relpos_dkdv" else "BLOCK_N"]
        masked = MASKED_QUERIES if name == "relpos_dkdv" else 32
        tail = tail_size(variant.get("tokens", 0), looped, masked)
        given = {"TAIL": tail, "HAS_BIAS": variant.get("bias", True), "STAGES": config.num_stages}
        return out | {key: value for key, value in given.items() if key in kernel.arg_names}

    return KernelSpec(
        name=name,
        kernel=kernel,
        variants=tuple({"head_dim": d, **extra} for d in HEAD_DIMS for extra in extras),
        types=lambda variant, dtype: _types(kernel, variant, dtype),
        constants=constants,
        config=lambda variant, dtype, arch: config_for(name, variant["head_dim"], dtype, arch),
    )


# 577 tokens stand for windows of 14², 24² and 30² patches, which all have the same kind of last tile. The variant
# without a bias is never launched; it is what the one with a bias is compared with.
KERNELS: list[KernelSpec] = [
    _spec("relpos_forward", forward_kernel, ({"tokens": 577}, {"tokens": 577, "bias": False})),
    _spec("relpos_dkdv", dkdv_kernel, ({"tokens": 577},)),
    _spec("relpos_dq", dq_kernel, ({"tokens": 577},)),
    _spec("relpos_dbias", dbias_kernel, ({},)),
    BIAS_SPEC,
    TABLE_SPEC,
    STATISTICS_SPEC,
]
