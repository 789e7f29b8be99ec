"""Self-attention with BEiT's relative position bias (arXiv 2106.08254), in the manner of FlashAttention-2 (2307.08691).

The bias is materialised once per layer, `[H, N, N_pad]`, minus each query's maximum, divided by the scale and with -inf
in the columns beyond N, so that the loop over keys needs neither the table nor a mask, and no arithmetic for the bias.
All batch entries read it from the second-level cache. The saved logsumexp is of these scores.
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
from triton.tools.tensor_descriptor import TensorDescriptor

from xfm_fast.errors import InputError

from ..checks import FRAGMENT_TILE, HEAD_DIMS, RelPos
from .attention_tiles import (
    LOG2E,
    addressable,
    attention_spec,
    backward_statistics,
    dkdv_tile,
    forward_tile,
    head_rows,
    load_pieces,
    store_pieces,
    strides_of,
)
from .launch import KernelSpec, LaunchConfig, Variant, launch_options, tail_size
from .relpos_table import (
    FRAGMENT_HEAD_DIMS,
    bias_dtype,
    first_columns,
    materialise_bias,
    table_gradient,
    unfold_fragments,
)
from .rows import load_fp32

__all__ = ["KERNELS", "materialise_bias", "relpos_attention_backward", "relpos_attention_forward"]


@triton.jit
def locate(tokens, batch, BLOCK: tl.constexpr):
    """Return (first row, batch entry, head) of a program.

    Neighbours share keys and values, then the bias of a head, so that both stay in the second-level cache.
    """
    tiles = tl.cdiv(tokens, BLOCK)
    start = tl.program_id(0) % tiles * BLOCK
    b = (tl.program_id(0) // tiles % batch).to(tl.int64)
    h = (tl.program_id(0) // tiles // batch).to(tl.int64)
    return start, b, h


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_bias, batch, heads, tokens,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr = None,
):  # fmt: skip
    """Attend from BLOCK_M queries of one head of one batch entry to all keys.

    With STAGES, the loop prefetches the bias too, not only keys and values.
    """
    start, b, h = locate(tokens, batch, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    inside = rows < tokens - start
    # Rows beyond the last repeat it: they read valid memory and are not stored.
    clamped = tl.minimum(rows, tokens - 1 - start)
    q_base = head_rows(q_ptr, b, h, start, stride_qb, stride_qn, stride_qh)
    q_a, q_b = load_pieces(q_base, clamped, stride_qn, inside, D_A, D_B, False)
    k_base = k_ptr + b * stride_kb + h * stride_kh
    v_base = v_ptr + b * stride_vb + h * stride_vh
    columns = tl.arange(0, BLOCK_N)
    full = tokens // BLOCK_N * BLOCK_N
    bias_base = bias_ptr + (h * tokens + start) * stride_bias
    bias_rows = clamped[:, None] * stride_bias
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc_a = tl.zeros([BLOCK_M, D_A], tl.float32)
    acc_b = tl.zeros([BLOCK_M, D_B if D_B > 0 else 16], tl.float32)
    for _ in tl.range(0, full, BLOCK_N, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        acc_a, acc_b, row_max, row_sum = forward_tile(
            q_a, q_b, acc_a, acc_b, row_max, row_sum,
            k_base, v_base, stride_kn, stride_vn, bias_base + (bias_rows + columns[None, :]), columns, columns,
            0, 0, 0, 0, SCALE, D_A, D_B, BLOCK_N, PRECISION, False, False, 0,
        )  # fmt: skip
        k_base += BLOCK_N * stride_kn
        v_base += BLOCK_N * stride_vn
        bias_base += BLOCK_N
    if TAIL > 0:
        # With the class token, N is one more than a multiple of a tile at many sizes: the last tile has its own size.
        # The branch is always taken: it is a fence, without which ptxas finds the loop's GEMMs still in flight on
        # Hopper where those of the last tile begin, and serialises every GEMM of the kernel (C7515).
        if full < tokens:
            last = tl.arange(0, TAIL)
            acc_a, acc_b, row_max, row_sum = forward_tile(
                q_a, q_b, acc_a, acc_b, row_max, row_sum,
                k_base, v_base, stride_kn, stride_vn, bias_base + (bias_rows + last[None, :]), last < tokens - full,
                last, 0, 0, 0, 0, SCALE, D_A, D_B, TAIL, PRECISION, True, False, 0,
            )  # fmt: skip
    out_base = head_rows(out_ptr, b, h, start, stride_ob, stride_on, stride_oh)
    lse_base = lse_ptr + (b * heads + h) * tokens + start
    _store(
        out_base, lse_base, acc_a, acc_b, row_max, row_sum, rows, inside, stride_on, SCALE, D_A, D_B
    )


@triton.jit
def _store(
    out_base,
    lse_base,
    acc_a,
    acc_b,
    row_max,
    row_sum,
    rows,
    inside,
    stride_on,
    SCALE: tl.constexpr,
    D_A: tl.constexpr,
    D_B: tl.constexpr,
):
    """Store the normalised outputs of a tile of queries, and their logsumexp."""
    inverse = (1.0 / row_sum)[:, None]
    store_pieces(out_base, rows, stride_on, inside, acc_a * inverse, acc_b * inverse, D_A, D_B)
    tl.store(lse_base + rows, row_max * SCALE + tl.log2(row_sum) / LOG2E, mask=inside)


@triton.jit(do_not_specialize=["heads", "tokens"])
def fragments_kernel(
    q_ptr, k_ptr, v_ptr, k_tiles, v_tiles, bias_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_bias, heads, tokens,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Attend as `forward_kernel`, for heads of one piece on Hopper; no thread computes addresses of keys or values.

    TMA loads tiles of keys and values by descriptors, `[B, N, H·D]`: one thread issues each copy, and the GEMMs need no
    fence against writes of threads to shared memory. The bias of the next iteration is loaded straight into registers,
    in the layout of `fragment_rows`: that saves the bandwidth of shared memory for the GEMMs.
    """
    # A grid of three dimensions, because divisions would delay the first loads.
    start, batch_entry, head = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    b, h = batch_entry.to(tl.int64), head.to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    inside = rows < tokens - start
    # Rows beyond the last repeat it: they read valid memory and are not stored.
    clamped = tl.minimum(rows, tokens - 1 - start)
    q_base = head_rows(q_ptr, b, h, start, stride_qb, stride_qn, stride_qh)
    q, _ = load_pieces(q_base, clamped, stride_qn, inside, D_A, D_B, False)
    bias_base = (
        bias_ptr + (h * tl.num_programs(0) + tl.program_id(0)) * (BLOCK_M // 2) * stride_bias
    )
    fragments = tl.arange(0, 2 * BLOCK_M)[:, None] * 16 + tl.arange(0, 16)[None, :]
    bias_ahead = unfold_fragments(tl.load(bias_base + fragments))
    full = tokens // BLOCK_N * BLOCK_N
    if TAIL > 0:  # loaded before the loop, after which their latency would show
        last = tl.arange(0, TAIL)
        k_base = k_ptr + b * stride_kb + h * stride_kh + full * stride_kn
        v_base = v_ptr + b * stride_vb + h * stride_vh + full * stride_vn
        k_last, _ = load_pieces(k_base, last, stride_kn, last < tokens - full, D_A, D_B, True)
        v_last, _ = load_pieces(v_base, last, stride_vn, last < tokens - full, D_A, D_B, True)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_A], tl.float32)
    unused = tl.zeros([BLOCK_M, 16], tl.float32)  # accumulator of an absent second piece
    for first in range(0, full, BLOCK_N):
        bias = bias_ahead
        # The last iteration fetches the tile after the loop, if there is one.
        bias_base += tl.where(first + BLOCK_N < stride_bias, BLOCK_M * BLOCK_N // 2, 0)
        bias_ahead = unfold_fragments(tl.load(bias_base + fragments))
        k = k_tiles.load([batch_entry, first, head * D_A]).reshape(BLOCK_N, D_A)
        v = v_tiles.load([batch_entry, first, head * D_A]).reshape(BLOCK_N, D_A)
        acc, unused, row_max, row_sum = forward_tile(
            q, q, acc, unused, row_max, row_sum, 0, 0, 0, 0, None, 0, 0, 0, 0, 0, 0,
            SCALE, D_A, D_B, BLOCK_N, PRECISION, False, False, 0, False, (bias, k, k, v, v),
        )  # fmt: skip
    if TAIL > 0:
        if full < tokens:  # a fence, see `forward_kernel`
            bias = first_columns(bias_ahead, TAIL)
            acc, unused, row_max, row_sum = forward_tile(
                q, q, acc, unused, row_max, row_sum, 0, 0, 0, 0, None, 0, 0, 0, 0, 0, 0,
                SCALE, D_A, D_B, TAIL, PRECISION, True, False, 0, False, (bias, k_last, k_last, v_last, v_last),  # pyright: ignore[reportPossiblyUnboundVariable]
            )  # fmt: skip
    out_base = head_rows(out_ptr, b, h, start, stride_ob, stride_on, stride_oh)
    lse_base = lse_ptr + (b * heads + h) * tokens + start
    _store(
        out_base, lse_base, acc, unused, row_max, row_sum, rows, inside, stride_on, SCALE, D_A, D_B
    )


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias_ptr, row_lse_ptr, delta_ptr, dk_ptr, dv_ptr, ds_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh, stride_bias, stride_ds, batch, heads, tokens,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of BLOCK_N keys of one head of one batch entry, and store the score gradients.

    The bias is `[H, keys, queries]`, with -inf in the columns beyond the last query, the score gradients are
    `[B, H, keys, queries]`, with zeros there.
    """
    start, b, h = locate(tokens, batch, BLOCK_N)
    columns = tl.arange(0, BLOCK_N)
    inside = columns < tokens - start
    # Keys beyond the last repeat it: they read valid memory and are not stored.
    clamped = tl.minimum(columns, tokens - 1 - start)
    k_base = head_rows(k_ptr, b, h, start, stride_kb, stride_kn, stride_kh)
    v_base = head_rows(v_ptr, b, h, start, stride_vb, stride_vn, stride_vh)
    k_a, k_b = load_pieces(k_base, clamped, stride_kn, inside, D_A, D_B, False)
    v_a, v_b = load_pieces(v_base, clamped, stride_vn, inside, D_A, D_B, False)
    q_base = q_ptr + b * stride_qb + h * stride_qh
    g_base = dout_ptr + b * stride_gb + h * stride_gh
    row_lse = row_lse_ptr + (b * heads + h) * tokens
    delta = delta_ptr + (b * heads + h) * tokens
    bias_keys = bias_ptr + (h * tokens + start) * stride_bias + clamped[:, None] * stride_bias
    ds = ds_ptr + ((b * heads + h) * tokens + start) * stride_ds + columns[:, None] * stride_ds
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
            row_lse + first, delta + first, bias_keys + (first + rows)[None, :], rows < tokens - first, 0, 0, 0, 0,
            SCALE, D_A, D_B, BLOCK_M, PRECISION, MASKED, 0, APART,
            ds + (first + rows)[None, :], inside,
        )  # fmt: skip
        q_base += BLOCK_M * stride_qn
        g_base += BLOCK_M * stride_gn
    if TAIL > 0 and not MASKED:
        if full < tokens:  # a fence, see `forward_kernel`
            last = tl.arange(0, TAIL)
            dk_a, dk_b, dv_a, dv_b = dkdv_tile(
                k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q_base, g_base, stride_qn, stride_gn,
                row_lse + full, delta + full, bias_keys + (full + last)[None, :], last < tokens - full, 0, 0, 0, 0,
                SCALE, D_A, D_B, TAIL, PRECISION, True, 0, APART,
                ds + (full + last)[None, :], inside,
            )  # fmt: skip
    stride_dn = heads * (D_A + D_B)
    gradient = (b * tokens + start) * stride_dn + h * (D_A + D_B)
    store_pieces(dv_ptr + gradient, columns, stride_dn, inside, dv_a, dv_b, D_A, D_B)
    store_pieces(
        dk_ptr + gradient, columns, stride_dn, inside, dk_a * SCALE, dk_b * SCALE, D_A, D_B
    )


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
def dq_kernel(
    k_ptr,
    ds_ptr,
    dq_ptr,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_ds,
    batch,
    heads,
    tokens,
    SCALE: tl.constexpr,
    D_A: tl.constexpr,
    D_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute dq of BLOCK_M queries of one head of one batch entry from the score gradients."""
    start, b, h = locate(tokens, batch, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    k_base = k_ptr + b * stride_kb + h * stride_kh
    ds_base = ds_ptr + (b * heads + h) * tokens * stride_ds + start
    ds_tile = columns[:, None] * stride_ds + rows[None, :]
    # Rows are padded to a multiple of 16: the mask covers whole vectors.
    present = rows < stride_ds - start
    dq_a = tl.zeros([BLOCK_M, D_A], tl.float32)
    dq_b = tl.zeros([BLOCK_M, D_B if D_B > 0 else 16], tl.float32)
    for first in tl.range(0, tokens, BLOCK_N, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        inside = columns < tokens - first
        k_a, k_b = load_pieces(k_base, columns, stride_kn, inside, D_A, D_B, True)
        dscores = tl.trans(
            tl.load(ds_base + ds_tile, mask=inside[:, None] & present[None, :], other=0.0)
        )
        dq_a = tl.dot(dscores, k_a, dq_a, input_precision=PRECISION)
        if D_B > 0:
            dq_b = tl.dot(dscores, k_b, dq_b, input_precision=PRECISION)
        k_base += BLOCK_N * stride_kn
        ds_base += BLOCK_N * stride_ds
    stride_dn = heads * (D_A + D_B)
    dq_base = dq_ptr + (b * tokens + start) * stride_dn + h * (D_A + D_B)
    store_pieces(
        dq_base, rows, stride_dn, rows < tokens - start, dq_a * SCALE, dq_b * SCALE, D_A, D_B
    )


@triton.jit(do_not_specialize=["batch"])
def batch_sum_kernel(
    ds_ptr,
    dbias_ptr,
    stride_ds,
    batch,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Sum BLOCK score gradients over batch entries, in order, into fp32; add to the result unless FIRST.

    The loads of ENTRIES entries are in flight at a time.
    """
    offsets = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < stride_ds
    acc = tl.zeros([BLOCK], tl.float32)
    if not FIRST:
        acc += tl.load(dbias_ptr + offsets, mask=inside, other=0.0)
    for first in range(0, batch, ENTRIES):
        for entry in tl.static_range(ENTRIES):  # pyright: ignore[reportGeneralTypeIssues]
            mask = inside & (tl.full(offsets.shape, first + entry, tl.int32) < batch)
            acc += load_fp32(ds_ptr + offsets, mask)
            ds_ptr += stride_ds
    tl.store(dbias_ptr + offsets, acc, mask=inside)


def _spec(
    name: str, kernel: Any, variant: Variant, head_dims: tuple[int, ...] = HEAD_DIMS, **options: Any
) -> KernelSpec:
    """Specify a kernel with this variant for every head dimension."""
    looped, masked = ("BLOCK_M", MASKED_QUERIES) if name == "relpos_dkdv" else ("BLOCK_N", 32)

    def extras(variant: Variant, config: LaunchConfig) -> Mapping[str, Any]:
        return {"TAIL": tail_size(variant.get("tokens", 0), config.tiles[looped], masked)}

    def types(variant: Variant, dtype: str) -> Mapping[str, str]:
        tile = f"tensordesc<{dtype}[1, {FRAGMENT_TILE[1]}, {variant['head_dim']}]>"
        bias = "*fp32" if dtype == "fp32" else "*fp16"
        if kernel is fragments_kernel:
            bias = "*i32"
        return {"bias_ptr": bias, "k_tiles": tile, "v_tiles": tile}

    variants = [{"head_dim": head_dim, **variant} for head_dim in head_dims]
    return attention_spec(name, kernel, variants, extras, types=types, **options)


# Tiles of up to this many queries are masked in the loop of the dkdv kernel, instead of a separate last tile.
MASKED_QUERIES = 16
# 577 tokens represent windows of 14², 24² and 30² patches, whose last tiles have the same size.
FORWARD = _spec("relpos_forward", forward_kernel, {"tokens": 577})
FRAGMENTS = _spec(
    "relpos_forward_fragments", fragments_kernel, {"tokens": 577}, FRAGMENT_HEAD_DIMS, arches=(90,)
)
DKDV = _spec("relpos_dkdv", dkdv_kernel, {"tokens": 577})
DQ = _spec("relpos_dq", dq_kernel, {})
BATCH_SUM = KernelSpec(
    name="relpos_batch_sum",
    kernel=batch_sum_kernel,
    variants=({"first": True}, {"first": False}),
    config=lambda variant, dtype, arch: LaunchConfig(
        {"BLOCK": 1024, "ENTRIES": 4}, num_warps=4, num_stages=1
    ),
    constants=lambda variant, dtype, config: {"FIRST": variant["first"]},
    types=lambda variant, dtype: {"dbias_ptr": "*fp32"},
    tensor_core=False,
)
KERNELS = [FORWARD, FRAGMENTS, DKDV, DQ, BATCH_SUM]
# Maximum programs of a launch in the second and third dimension.
_LARGEST_GRID = 65535
# Maximum bytes of score gradients at a time: the second-level cache (50 MB on an H100) holds them until the sum.
_SCORES_BYTES = 36 << 20


def entries_at_once(batch: int, entry_bytes: int) -> int:
    """Return the batch entries whose score gradients exist at a time: chunks of nearly one size."""
    maximum = max(1, _SCORES_BYTES // entry_bytes)
    return triton.cdiv(batch, triton.cdiv(batch, maximum))


def relpos_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale · q kᵀ + bias) v `[B, N, H, D]`, contiguous, and the logsumexp `[B, H, N]` in fp32.

    q, k, v: `[B, N, H, D]`, D in `HEAD_DIMS`, of any strides; copied if the last dimension is not contiguous. The bias
    `[H, N, N_pad]`, contiguous, or in fragments, comes from `materialise_bias` with the same positive scale. InputError
    for unsupported arguments.
    """
    fragments = bias.ndim == 5
    _check(q, bias)
    batch, tokens, heads, head_dim = q.shape
    if fragments and batch > _LARGEST_GRID:
        chunks = zip(*(t.split(_LARGEST_GRID) for t in (q, k, v)), strict=True)
        results = (relpos_attention_forward(*chunk, bias, scale) for chunk in chunks)
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses)
    q, k, v = (addressable(t) for t in (q, k, v))
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    variant = {"head_dim": head_dim, "scale": scale, "tokens": tokens}
    options, config = launch_options(FRAGMENTS if fragments else FORWARD, q, **variant)
    columns = bias.shape[2] * (FRAGMENT_TILE[1] if fragments else 1)
    if q.numel():
        tiles = triton.cdiv(tokens, config.tiles["BLOCK_M"])
        if fragments:
            k, k_tiles = _describe(k, config.tiles["BLOCK_N"])
            v, v_tiles = _describe(v, config.tiles["BLOCK_N"])
            fragments_kernel[(tiles, batch, heads)](
                q,
                k,
                v,
                k_tiles,
                v_tiles,
                bias.view(torch.int32),  # words of two neighbours
                out,
                lse,
                *strides_of(q, k, v, out),
                columns,
                heads,
                tokens,
                **options,
            )
        else:
            forward_kernel[(tiles * batch * heads,)](
                q,
                k,
                v,
                bias,
                out,
                lse,
                *strides_of(q, k, v, out),
                columns,
                batch,
                heads,
                tokens,
                **options,
            )
    return out, lse


def _describe(tensor: Tensor, rows: int) -> tuple[Tensor, TensorDescriptor]:
    """Return `[B, N, H, D]`, copied if necessary, and its descriptor as `[B, N, H·D]`, in tiles of one head.

    A descriptor needs adjacent heads, rows that begin at multiples of 16 bytes, and nested strides.
    """
    batch, tokens, heads, head_dim = tensor.shape
    outer, row, head, _ = tensor.stride()
    adjacent = (head == head_dim or heads == 1) and row >= heads * head_dim
    aligned = tensor.data_ptr() % 16 == 0 and row * tensor.element_size() % 16 == 0
    nested = batch == 1 or (outer > 0 and outer % row == 0)
    if not (adjacent and aligned and nested):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        outer, row = tensor.stride()[:2]
    strides = [outer if batch > 1 else tokens * row, row, 1]
    return tensor, TensorDescriptor(
        tensor, [batch, tokens, heads * head_dim], strides, [1, rows, head_dim]
    )


def relpos_attention_backward(
    dout: Tensor, a: RelPos, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `relpos_attention_forward`: dq, dk, dv, and dtable `[entries, H]` in fp32.

    Five GEMMs of 2·B·H·N²·D operations, the minimum of a backward pass: one kernel runs four, for dk and dv, and stores
    the score gradients in the dtype of q; a second computes dq from them, and a third sums them over the batch. Each
    owns its sums and needs no atomics, so results are deterministic. Large batches are split, to bound that memory. Of
    the biases only `a.turned` is read: `[H, keys, queries]`, from `materialise_bias` with `turned`.
    """
    batch, tokens, heads, head_dim = a.q.shape
    q, k, v, dout, out = (addressable(t) for t in (a.q, a.k, a.v, dout, out))
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    if not q.numel():
        return dq, dk, dv, torch.zeros(a.table.shape, dtype=torch.float32, device=q.device)
    turned = a.turned
    assert turned is not None
    delta, row_lse = backward_statistics(out, dout, lse)
    variant = {"head_dim": head_dim, "scale": a.scale}
    dkdv_options, config = launch_options(DKDV, q, tokens=tokens, **variant)
    block, key_tiles = config.tiles["BLOCK_M"], triton.cdiv(tokens, config.tiles["BLOCK_N"])
    dq_options, config = launch_options(DQ, q, **variant)
    query_tiles = triton.cdiv(tokens, config.tiles["BLOCK_M"])
    # Up to the end of the last tile of queries.
    stride = tokens // block * block + dkdv_options["TAIL"]
    step = entries_at_once(batch, heads * tokens * stride * q.element_size())
    scores = torch.empty((step, heads, tokens, stride), dtype=q.dtype, device=q.device)
    dbias = torch.empty((1, heads, tokens, stride), dtype=torch.float32, device=q.device)
    for first in range(0, batch, step):
        count = min(step, batch - first)
        chunk = slice(first, first + count)
        operands = (q[chunk], k[chunk], v[chunk], dout[chunk])
        dkdv_kernel[(key_tiles * count * heads,)](
            *operands,
            turned,
            row_lse[chunk],
            delta[chunk],
            dk[chunk],
            dv[chunk],
            scores,
            *strides_of(*operands),
            turned.stride(1),
            stride,
            count,
            heads,
            tokens,
            **dkdv_options,
        )
        dq_kernel[(query_tiles * count * heads,)](
            k[chunk],
            scores,
            dq[chunk],
            *strides_of(k[chunk]),
            stride,
            count,
            heads,
            tokens,
            **dq_options,
        )
        options, config = launch_options(BATCH_SUM, q, first=first == 0)
        size = dbias.numel()
        batch_sum_kernel[(triton.cdiv(size, config.tiles["BLOCK"]),)](
            scores, dbias, size, count, **options
        )
    return dq, dk, dv, table_gradient(dbias, a.window, turned=True)


def _check(q: Tensor, bias: Tensor) -> None:
    """Check the dtype and layout of a caller's bias."""
    storage, contiguous = bias_dtype(q.dtype), bias.is_contiguous()
    if bias.dtype != storage or not contiguous or (bias.ndim == 5 and q.dtype == torch.float32):
        raise InputError(
            f"bias is {bias.dtype} {[*bias.shape]}; for {q.dtype} it must be contiguous {storage}, in fragments for "
            "half precision only, see relpos_bias"
        )
