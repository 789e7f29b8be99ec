"""Attention of packed sequences (FlashAttention-2, arXiv 2307.08691): self-attention without padding, cross-attention.

A tensor holds the concatenated tokens of all sequences; `cu_seqlens` has their offsets, of queries and of keys. The
host knows an upper bound of the lengths, but not the lengths. If the bound is tight, every sequence owns as many tiles
as the longest one may need, and a program finds its tile by a division. Else sequence s owns the tiles from
`cu_seqlens[s] // tile + s` on, which leaves at most one tile per sequence unused, whatever the lengths; then a program
searches for its sequence.
"""


# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import HEAD_DIMS, Packed
from .attention_tiles import (
    LOG2E,
    addressable,
    attention_spec,
    backward_statistics,
    dkdv_tile,
    dq_tile,
    dropout_stream,
    forward_tile,
    inverse_sums,
    load_pieces,
    logsumexp,
    optional_arguments,
    store_pieces,
    strides_of,
)
from .launch import (
    TRITON_TYPE,
    KernelSpec,
    LaunchConfig,
    Variant,
    architecture,
    dtype_name,
    launch_options,
    multiprocessors,
    tuned_backend,
    tuned_config,
)

# Sequences of up to this many tokens have kernels with small tiles: captions average 13 tokens.
SHORT = 32
# So have sequences of up to this many tokens on average, whatever the bound: for captions of an image, as queries of
# cross-attention, the bound is the number of all tokens.
SHORT_ON_AVERAGE = 24
# Up to this factor, more tiles are cheaper than a search, see `_tiles`.
_MORE_TILES = 1.5
_SMALLEST = 16  # rows of a tile of the tensor cores


_CHUNK = tl.constexpr(256)


@triton.jit
def locate_tile(cu_ptr, sequences, tiles, tile, BLOCK: tl.constexpr, SEARCHED: tl.constexpr):
    """Return the sequence of a tile, and the tile's first row in it, possibly beyond the sequence's end.

    SEARCHED: sequence s owns the tiles from cu[s] // BLOCK + s up to those of s + 1. One vector load per 256 sequences
    counts those that begin at or before the tile. Else each sequence owns an equal share.
    """
    if SEARCHED:
        count = 0
        for first in range(0, sequences, _CHUNK):
            s = first + tl.arange(0, _CHUNK)
            begin = tl.load(cu_ptr + s, mask=s < sequences, other=0)
            count += tl.sum(((begin // BLOCK + s <= tile) & (s < sequences)).to(tl.int32), 0)
        s = count - 1
        start = ((tile - (tl.load(cu_ptr + s) // BLOCK + s)) * BLOCK).to(tl.int32)
    else:
        share = tiles // sequences
        s = tile // share
        start = tile % share * BLOCK
    return s, start


@triton.jit(do_not_specialize=["sequences", "tiles", "queries"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, seed_ptr, out_ptr, lse_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    sequences, tiles, queries,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEARCHED: tl.constexpr = True, TAIL: tl.constexpr = 0,
):  # fmt: skip
    """Attend from BLOCK_M queries of one sequence and head to the keys of the sequence.

    TAIL: maximum number of keys after the last whole tile; 0 if it may be any.
    """
    # Neighbours share keys and values.
    s, start = locate_tile(cu_q_ptr, sequences, tiles, tl.program_id(0) % tiles, BLOCK_M, SEARCHED)
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
    q_base = q_ptr + token * stride_qn + h * stride_qh
    q_a, q_b = load_pieces(q_base, rows, stride_qn, inside, D_A, D_B, True)
    k_base = k_ptr + first_k * stride_kn + h * stride_kh
    v_base = v_ptr + first_k * stride_vn + h * stride_vh
    mask = mask_ptr + first_k
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    stream = dropout_stream(h, first_q)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # With small tiles, a mask on every tile costs fewer registers than a last tile of its own.
    MASKED: tl.constexpr = (TAIL == 0) & (BLOCK_N <= 32)
    LAST: tl.constexpr = TAIL if TAIL > 0 else BLOCK_N
    # In a short iteration the exchange between threads for a sum would dominate.
    APART: tl.constexpr = (TAIL > 0) & (BLOCK_N == 32)
    row_sum = tl.zeros([BLOCK_M, 8] if APART else [BLOCK_M], tl.float32)
    acc_a = tl.zeros([BLOCK_M, D_A], tl.float32)
    acc_b = tl.zeros([BLOCK_M, D_B if D_B > 0 else 16], tl.float32)
    columns = tl.arange(0, BLOCK_N)
    full = (tl.cdiv(length_k, BLOCK_N) if MASKED else length_k // BLOCK_N) * BLOCK_N
    for first in range(0, full, BLOCK_N):
        present = columns < length_k - first
        allowed = (
            tl.load(mask + first + columns, mask=present, other=0) != 0 if HAS_MASK else columns
        )
        acc_a, acc_b, row_max, row_sum = forward_tile(
            q_a, q_b, acc_a, acc_b, row_max, row_sum,
            k_base, v_base, stride_kn, stride_vn, None, present, allowed, seed, stream, start + rows, first + columns,
            SCALE, D_A, D_B, BLOCK_N, PRECISION, MASKED, HAS_MASK, THRESHOLD, APART,
        )  # fmt: skip
        k_base += BLOCK_N * stride_kn
        v_base += BLOCK_N * stride_vn
    if not MASKED:
        if full < length_k:
            last = tl.arange(0, LAST)
            present = last < length_k - full
            allowed = tl.load(mask + full + last, mask=present, other=0) != 0 if HAS_MASK else last
            acc_a, acc_b, row_max, row_sum = forward_tile(
                q_a, q_b, acc_a, acc_b, row_max, row_sum,
                k_base, v_base, stride_kn, stride_vn, None, present, allowed, seed, stream, start + rows, full + last,
                SCALE, D_A, D_B, LAST, PRECISION, True, HAS_MASK, THRESHOLD, APART,
            )  # fmt: skip
    if APART:
        row_sum = tl.sum(row_sum, 1)
    inverse = inverse_sums(row_sum, THRESHOLD)[:, None]
    out_base = out_ptr + token * stride_on + h * stride_oh
    store_pieces(out_base, rows, stride_on, inside, acc_a * inverse, acc_b * inverse, D_A, D_B)
    lse = logsumexp(row_max, row_sum, SCALE)
    tl.store(lse_ptr + h * queries + token + rows, lse, mask=inside)


@triton.jit
def rows_of_heads(heads, rows, stride):
    """Return pointers `[HEADS, rows, 1]` to rows of heads with these base addresses."""
    return heads[:, None, None] + rows[None, :, None] * stride


@triton.jit(do_not_specialize=["sequences", "tiles", "queries", "heads"])
def heads_forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, out_ptr, lse_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    sequences, tiles, queries, heads,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr, HAS_MASK: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_M queries of one sequence in HEADS heads to the keys of the sequence; a warp runs whole heads.

    For few queries: a tile of one head needs 64 rows, or 16 for each of four warps, to fill a program.
    """
    groups = tl.cdiv(heads, HEADS)
    # Neighbours read the same rows.
    s, start = locate_tile(
        cu_q_ptr, sequences, tiles, tl.program_id(0) // groups, BLOCK_M, SEARCHED
    )
    first_q = tl.load(cu_q_ptr + s)
    length_q = (tl.load(cu_q_ptr + s + 1) - first_q).to(tl.int32)
    first_k = tl.load(cu_k_ptr + s).to(tl.int64)
    length_k = (tl.load(cu_k_ptr + s + 1) - first_k).to(tl.int32)
    if start >= length_q:
        return
    token = first_q.to(tl.int64) + start
    h = tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)
    # Heads beyond the last repeat it: they read valid memory and are not stored.
    valid = h < heads
    h = tl.minimum(h, heads - 1).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    d_a = tl.arange(0, D_A)[None, None, :]
    d_b = D_A + tl.arange(0, D_B if D_B > 0 else 16)[None, None, :]
    inside = (rows < length_q - start)[None, :, None]
    q_rows = rows_of_heads(q_ptr + token * stride_qn + h * stride_qh, rows, stride_qn)
    k_rows = rows_of_heads(k_ptr + first_k * stride_kn + h * stride_kh, columns, stride_kn)
    v_rows = rows_of_heads(v_ptr + first_k * stride_vn + h * stride_vh, columns, stride_vn)
    q_a = tl.load(q_rows + d_a, mask=inside, other=0.0)
    q_b = tl.load(q_rows + d_b, mask=inside, other=0.0) if D_B > 0 else q_a
    row_max = tl.full([HEADS, BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([HEADS, BLOCK_M], tl.float32)
    acc_a = tl.zeros([HEADS, BLOCK_M, D_A], tl.float32)
    acc_b = tl.zeros([HEADS, BLOCK_M, D_B if D_B > 0 else 16], tl.float32)
    factor: tl.constexpr = SCALE * LOG2E
    for first in range(0, length_k, BLOCK_N):
        allowed = columns < length_k - first
        present = allowed[None, :, None]
        k_a = tl.load(k_rows + d_a, mask=present, other=0.0)
        v_a = tl.load(v_rows + d_a, mask=present, other=0.0)
        scores = tl.dot(q_a, tl.permute(k_a, (0, 2, 1)), input_precision=PRECISION)
        if D_B > 0:
            k_b = tl.load(k_rows + d_b, mask=present, other=0.0)
            scores = tl.dot(q_b, tl.permute(k_b, (0, 2, 1)), scores, input_precision=PRECISION)
        if HAS_MASK:
            allowed = tl.load(mask_ptr + first_k + first + columns, mask=allowed, other=0) != 0
        scores = tl.where(allowed[None, None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 2))
        finite_max = new_max
        if HAS_MASK:
            # Rows without an allowed key so far: -inf minus -inf must not become NaN.
            finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        shrink = tl.exp2((row_max - finite_max) * factor)
        weights = tl.exp2(scores * factor - (finite_max * factor)[:, :, None])
        row_sum = row_sum * shrink + tl.sum(weights, 2)
        row_max = new_max
        weights = weights.to(v_a.dtype)
        acc_a = tl.dot(weights, v_a, acc_a * shrink[:, :, None], input_precision=PRECISION)
        if D_B > 0:
            v_b = tl.load(v_rows + d_b, mask=present, other=0.0)
            acc_b = tl.dot(weights, v_b, acc_b * shrink[:, :, None], input_precision=PRECISION)
        k_rows += BLOCK_N * stride_kn
        v_rows += BLOCK_N * stride_vn
    inverse = inverse_sums(row_sum)[:, :, None]
    out_rows = rows_of_heads(out_ptr + token * stride_on + h * stride_oh, rows, stride_on)
    dtype = out_ptr.dtype.element_ty
    stored = valid[:, None, None] & inside
    tl.store(out_rows + d_a, (acc_a * inverse).to(dtype), mask=stored)
    if D_B > 0:
        tl.store(out_rows + d_b, (acc_b * inverse).to(dtype), mask=stored)
    lse = logsumexp(row_max, row_sum, SCALE)
    lse_rows = (lse_ptr + token + h * queries)[:, None] + rows[None, :]
    tl.store(lse_rows, lse, mask=valid[:, None] & (rows < length_q - start)[None, :])


@triton.jit(do_not_specialize=["sequences", "tiles", "queries", "heads"])
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, seed_ptr, row_lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh,
    sequences, tiles, queries, heads,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEARCHED: tl.constexpr = True,
):  # fmt: skip
    """Compute dk and dv of BLOCK_N keys of one sequence and head."""
    s, start = locate_tile(cu_k_ptr, sequences, tiles, tl.program_id(0) % tiles, BLOCK_N, SEARCHED)
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
    k_a, k_b = load_pieces(
        k_ptr + token * stride_kn + h * stride_kh, columns, stride_kn, inside, D_A, D_B, True
    )
    v_a, v_b = load_pieces(
        v_ptr + token * stride_vn + h * stride_vh, columns, stride_vn, inside, D_A, D_B, True
    )
    q_base = q_ptr + first_q * stride_qn + h * stride_qh
    g_base = dout_ptr + first_q * stride_gn + h * stride_gh
    row_lse = row_lse_ptr + h * queries + first_q
    delta = delta_ptr + h * queries + first_q
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    stream = dropout_stream(h, first_q)
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
            row_lse + first, delta + first, None, rows < length_q - first,
            seed, stream, first + rows, start + columns,
            SCALE, D_A, D_B, BLOCK_M, PRECISION, MASKED, THRESHOLD,
        )  # fmt: skip
        q_base += BLOCK_M * stride_qn
        g_base += BLOCK_M * stride_gn
    if not MASKED:
        if full < length_q:
            dk_a, dk_b, dv_a, dv_b = dkdv_tile(
                k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q_base, g_base, stride_qn, stride_gn,
                row_lse + full, delta + full, None, rows < length_q - full,
                seed, stream, full + rows, start + columns,
                SCALE, D_A, D_B, BLOCK_M, PRECISION, True, THRESHOLD,
            )  # fmt: skip
    dk_a = dk_a * SCALE
    dk_b = dk_b * SCALE
    if HAS_MASK:
        # Rows of dk and dv are independent: those of hidden keys are zeroed at the end, not in the loop.
        allowed = (tl.load(mask_ptr + token + columns, mask=inside, other=0) != 0)[:, None]
        dk_a = tl.where(allowed, dk_a, 0.0)
        dk_b = tl.where(allowed, dk_b, 0.0)
        dv_a = tl.where(allowed, dv_a, 0.0)
        dv_b = tl.where(allowed, dv_b, 0.0)
    stride_dn = heads * (D_A + D_B)
    gradient = token * stride_dn + h * (D_A + D_B)
    store_pieces(dv_ptr + gradient, columns, stride_dn, inside, dv_a, dv_b, D_A, D_B)
    store_pieces(dk_ptr + gradient, columns, stride_dn, inside, dk_a, dk_b, D_A, D_B)


@triton.jit(do_not_specialize=["sequences", "tiles", "queries", "heads"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, seed_ptr, row_lse_ptr, delta_ptr, dq_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh,
    sequences, tiles, queries, heads,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEARCHED: tl.constexpr = True,
):  # fmt: skip
    """Compute dq of BLOCK_M queries of one sequence and head."""
    s, start = locate_tile(cu_q_ptr, sequences, tiles, tl.program_id(0) % tiles, BLOCK_M, SEARCHED)
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
    q_a, q_b = load_pieces(
        q_ptr + token * stride_qn + h * stride_qh, rows, stride_qn, inside, D_A, D_B, True
    )
    g_a, g_b = load_pieces(
        dout_ptr + token * stride_gn + h * stride_gh, rows, stride_gn, inside, D_A, D_B, True
    )
    row_lse = tl.load(row_lse_ptr + h * queries + token + rows, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + h * queries + token + rows, mask=inside, other=0.0)
    k_base = k_ptr + first_k * stride_kn + h * stride_kh
    v_base = v_ptr + first_k * stride_vn + h * stride_vh
    mask = mask_ptr + first_k
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    stream = dropout_stream(h, first_q)
    dq_a = tl.zeros([BLOCK_M, D_A], tl.float32)
    dq_b = tl.zeros([BLOCK_M, D_B if D_B > 0 else 16], tl.float32)
    columns = tl.arange(0, BLOCK_N)
    MASKED: tl.constexpr = BLOCK_N <= 32
    full = (tl.cdiv(length_k, BLOCK_N) if MASKED else length_k // BLOCK_N) * BLOCK_N
    for first in range(0, full, BLOCK_N):
        present = columns < length_k - first
        allowed = (
            tl.load(mask + first + columns, mask=present, other=0) != 0 if HAS_MASK else columns
        )
        dq_a, dq_b = dq_tile(
            q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta, k_base, v_base, stride_kn, stride_vn,
            present, allowed, seed, stream, start + rows, first + columns,
            SCALE, D_A, D_B, BLOCK_N, PRECISION, MASKED, HAS_MASK, THRESHOLD,
        )  # fmt: skip
        k_base += BLOCK_N * stride_kn
        v_base += BLOCK_N * stride_vn
    if not MASKED:
        if full < length_k:
            present = columns < length_k - full
            allowed = (
                tl.load(mask + full + columns, mask=present, other=0) != 0 if HAS_MASK else columns
            )
            dq_a, dq_b = dq_tile(
                q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta, k_base, v_base, stride_kn, stride_vn,
                present, allowed, seed, stream, start + rows, full + columns,
                SCALE, D_A, D_B, BLOCK_N, PRECISION, True, HAS_MASK, THRESHOLD,
            )  # fmt: skip
    stride_dn = heads * (D_A + D_B)
    dq_base = dq_ptr + token * stride_dn + h * (D_A + D_B)
    store_pieces(dq_base, rows, stride_dn, inside, dq_a * SCALE, dq_b * SCALE, D_A, D_B)


def _spec(name: str, kernel: Any, variants: Sequence[Variant]) -> KernelSpec:
    def extras(variant: Variant, config: LaunchConfig) -> Mapping[str, Any]:
        # Images have one size, and a class token or few tokens after whole tiles.
        tail = variant.get("keys", 0) % config.tiles["BLOCK_N"]
        return {
            "SEARCHED": variant.get("searched", False),
            "TAIL": _SMALLEST if 0 < tail <= _SMALLEST else 0,
        }

    return attention_spec(name, kernel, variants, extras)


_ALL = [{"head_dim": head_dim} for head_dim in HEAD_DIMS]
# 577 keys represent all images of whole tiles of patches and a class token.
_IMAGES = [{"head_dim": head_dim, "keys": 577} for head_dim in HEAD_DIMS]
_DROPOUT, _MASK, _SEARCHED = (
    {"head_dim": 64, **form} for form in ({"dropout": 0.1}, {"mask": True}, {"searched": True})
)
KERNELS: list[KernelSpec] = [
    *(
        _spec(f"varlen_{name}{suffix}", kernel, variants)
        for suffix, variants in (
            ("", _ALL),
            ("_short", [*_ALL, _MASK, _DROPOUT]),
            ("_masked", [_MASK]),
            ("_dropout", [_DROPOUT]),
        )
        for name, kernel in (("dkdv", dkdv_kernel), ("dq", dq_kernel))
    ),
    _spec("varlen_forward", forward_kernel, [*_IMAGES, *_ALL, _SEARCHED]),
    _spec(
        "varlen_forward_narrow", forward_kernel, [{"head_dim": 64, "keys": 577}, {"head_dim": 64}]
    ),
    _spec("varlen_forward_masked", forward_kernel, [_MASK]),
    _spec("varlen_forward_dropout", forward_kernel, [_DROPOUT]),
    _spec("varlen_forward_short", forward_kernel, [*_ALL, _MASK, _DROPOUT]),
    _spec("varlen_forward_heads", heads_forward_kernel, [*_ALL, _MASK, _SEARCHED]),
    _spec("varlen_forward_heads_many", heads_forward_kernel, [*_ALL, _MASK, _SEARCHED]),
]
_SPECS = {spec.name: spec for spec in KERNELS}


def varlen_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale · q kᵀ) v `[Tq, H, D]` of every sequence, contiguous, and the logsumexp `[H, Tq]` in fp32.

    D in `HEAD_DIMS`, any strides; copied if the last dimension is not contiguous. Queries without keys give zeros and
    -inf. The upper bounds of the lengths select small or large tiles. Dropout depends on the seed, the head, the start
    of the sequence in `q` and the positions of query and key in it only. InputError for an unsupported dtype or
    head dimension.
    """
    q, k, v = (addressable(t) for t in (q, k, v))
    total, heads, _ = q.shape
    sequences = packed.cu_seqlens_q.numel() - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=q.device)
    if q.numel():
        form = _forward_form(q, k, packed)
        # If all sequences have one length, the last tile of keys is compiled for its size.
        plain = packed.key_mask is None and not packed.dropout_p
        keys = packed.max_k if plain and k.shape[0] == sequences * packed.max_k else 0
        rows = total, packed.max_q, "BLOCK_M"
        options, config, tiles = _options(form, q, packed, *rows, keys=keys)
        if form == "varlen_forward" and _prefers_narrow_tiles(tiles * heads, q):
            options, config, tiles = _options(f"{form}_narrow", q, packed, *rows, keys=keys)
        mask, seed = optional_arguments(q, packed.key_mask, packed.dropout_p, packed.seed)
        inputs = (q, k, v, packed.cu_seqlens_q.contiguous(), packed.cu_seqlens_k.contiguous(), mask)
        sizes = (*strides_of(q, k, v, out), sequences, tiles, total)
        if "HEADS" in config.tiles:
            programs = tiles * triton.cdiv(heads, config.tiles["HEADS"])
            heads_forward_kernel[(programs,)](*inputs, out, lse, *sizes, heads, **options)
        else:
            forward_kernel[(tiles * heads,)](*inputs, seed, out, lse, *sizes, **options)
    return out, lse


def varlen_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packed: Packed
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `varlen_attention_forward`: dq, dk, dv in the dtype of q.

    Deterministic, without atomics: two kernels recompute the scores and own their sums: dk and dv (four GEMMs of
    2·H·D·Σ len_q·len_k operations), and dq (three).
    """
    q, k, v, dout, out = (addressable(t) for t in (q, k, v, dout, out))
    heads, sequences = q.shape[1], packed.cu_seqlens_q.numel() - 1
    dq, dk, dv = (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    delta, row_lse = (t[0] for t in backward_statistics(out[None], dout[None], lse[None]))
    offsets = (packed.cu_seqlens_q.contiguous(), packed.cu_seqlens_k.contiguous())
    optional = optional_arguments(q, packed.key_mask, packed.dropout_p, packed.seed)
    inputs = (q, k, v, dout, *offsets, *optional, row_lse, delta)
    strides = strides_of(q, k, v, dout)
    if k.numel():
        form = _form("varlen_dkdv", k, packed.max_k, packed)
        options, _, tiles = _options(form, q, packed, k.shape[0], packed.max_k, "BLOCK_N")
        dkdv_kernel[(tiles * heads,)](
            *inputs, dk, dv, *strides, sequences, tiles, q.shape[0], heads, **options
        )
    if q.numel():
        form = _form("varlen_dq", q, packed.max_q, packed)
        options, _, tiles = _options(form, q, packed, q.shape[0], packed.max_q, "BLOCK_M")
        dq_kernel[(tiles * heads,)](
            *inputs, dq, *strides, sequences, tiles, q.shape[0], heads, **options
        )
    return dq, dk, dv


def tuned_backends(
    q: Tensor, k: Tensor, packed: Packed, dtype: torch.dtype, *, gradient: bool
) -> set[str]:
    """Return the fastest backends, by the architecture's table, for the kernel forms of these sequences."""
    forms = {_forward_form(q, k, packed)}
    if gradient:
        forms.add(_form("varlen_dkdv", k, packed.max_k, packed))
    name, arch = TRITON_TYPE.get(str(dtype).removeprefix("torch."), ""), architecture(q.device)
    return {tuned_backend(form, q.shape[-1], name, arch) for form in forms}


def _options(
    form: str, q: Tensor, packed: Packed, total: int, longest: int, block: str, **variant: Any
) -> tuple[dict[str, Any], LaunchConfig, int]:
    """Return options and configuration of a form's launch, and its tiles for `total` rows of up to `longest` each."""
    variant |= {"head_dim": q.shape[-1], "scale": packed.scale}
    variant |= {"mask": packed.key_mask is not None, "dropout": packed.dropout_p}
    options, config = launch_options(_SPECS[form], q, **variant)
    tiles, searched = _tiles(total, longest, packed.cu_seqlens_q.numel() - 1, config.tiles[block])
    return {**options, "SEARCHED": searched}, config, tiles


def _tiles(total: int, longest: int, sequences: int, block: int) -> tuple[int, bool]:
    """Return (tiles for `total` rows, whether programs search for their sequence).

    An equal share for every sequence wastes programs if lengths differ or the bound is loose. But a wasted program
    ends at once, while a search delays every program, so that somewhat more programs are cheaper.
    """
    searched, shared = total // block + sequences, sequences * triton.cdiv(longest, block)
    return (shared, False) if 0 < shared <= _MORE_TILES * searched else (searched, True)


def _prefers_narrow_tiles(programs: int, q: Tensor) -> bool:
    """Return whether tiles of half as many keys are faster: they fit one more program on a multiprocessor.

    On Hopper at head dimension 64, five instead of four. Such a wave takes two fifths longer, so that they have to
    save one of few waves; else the larger tile is better. A tuned configuration takes precedence.
    """
    dtype, arch = dtype_name(q.dtype), architecture(q.device)
    if (
        dtype == "fp32"
        or q.shape[-1] != 64
        or not 90 <= arch < 100
        or tuned_config("varlen_forward", 64, dtype, arch)
    ):
        return False
    processors = multiprocessors(q.device)
    return 1.4 * triton.cdiv(programs, 5 * processors) < triton.cdiv(programs, 4 * processors)


def _forward_form(q: Tensor, k: Tensor, packed: Packed) -> str:
    """Return the name of the forward kernel's form for these lengths."""
    form = _form("varlen_forward", q, packed.max_q, packed)
    # fp32 is for exactness: the backward pass must recompute the scores of the forward pass to the last bit.
    if not form.endswith("_short") or packed.dropout_p or q.dtype == torch.float32:
        return form
    sequences = packed.cu_seqlens_q.numel() - 1
    if k.shape[0] <= SHORT * sequences:
        return "varlen_forward_heads"
    # With many keys the GEMMs dominate. Where the tensor cores take 64 rows at once, most of a tile may lie idle.
    if 90 <= architecture(q.device) < 120 and min(packed.max_q, q.shape[0] / sequences) > _SMALLEST:
        return "varlen_forward" if packed.key_mask is None else "varlen_forward_masked"
    return "varlen_forward_heads_many"


def _form(kernel: str, output: Tensor, longest: int, packed: Packed) -> str:
    """Return the kernel form for programs whose output tiles are rows of `output`, of sequences up to `longest`."""
    # Short sequences would leave an output tile empty.
    sequences = packed.cu_seqlens_q.numel() - 1
    if longest <= SHORT or output.shape[0] <= SHORT_ON_AVERAGE * sequences:
        return f"{kernel}_short"
    if packed.dropout_p:
        return f"{kernel}_dropout"
    return kernel if packed.key_mask is None else f"{kernel}_masked"
