"""Shared code of the attention kernels: steps over one tile (FlashAttention-2, arXiv 2307.08691), statistics.

The families loop over these steps and differ in their addressing. Conventions:

- A head dimension comes as two pieces `_a` and `_b` (see `split_head_dim`); without a second piece, D_B is 0 and the
  `_b` operands are dummies that the compiler removes.
- GEMMs accumulate in fp32. The softmax is computed in base 2. Scores stay unscaled and the scale is applied within
  the exponent. A bias comes divided by the scale, so that it can initialise the accumulator of the scores: it then
  costs its load and its conversion to fp32, and no arithmetic.
- MASKED: the tile may extend beyond the last row; `inside` masks the rows that exist.
- THRESHOLD is the dropout probability times 2¹⁶ (0: none).
"""


# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from xfm_fast.errors import InputError

from .. import checks
from ..checks import HEAD_DIMS
from .launch import KernelSpec, LaunchConfig, Variant, config_for, launch_options
from .rows import load_fp32

LOG2E = tl.constexpr(1.4426950408889634)


# Offsets within a tile are 32-bit; a tile has at most this many rows.
_LARGEST_TILE = 256


@triton.jit
def load_rows(pointers, inside, MASKED: tl.constexpr):
    """Load a tile of rows; if MASKED, rows outside are zero."""
    if MASKED:
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_pieces(
    base,
    rows,
    stride,
    inside,
    D_A: tl.constexpr,
    D_B: tl.constexpr,
    MASKED: tl.constexpr,
    DIM: tl.constexpr = 0,
):
    """Load rows with contiguous columns, in two pieces; the second is zero beyond DIM columns."""
    pointers = base + rows[:, None] * stride
    a = load_rows(pointers + tl.arange(0, D_A)[None, :], inside, MASKED)
    b = a
    if D_B > 0:
        columns = tl.arange(0, D_B)[None, :]
        if (DIM == 0) | (DIM == D_A + D_B):
            b = load_rows(pointers + (D_A + columns), inside, MASKED)
        elif MASKED:
            b = tl.load(
                pointers + (D_A + columns), mask=inside[:, None] & (columns < DIM - D_A), other=0.0
            )
        else:
            b = tl.load(pointers + (D_A + columns), mask=columns < DIM - D_A, other=0.0)
    return a, b


@triton.jit
def store_pieces(
    base, rows, stride, inside, a, b, D_A: tl.constexpr, D_B: tl.constexpr, DIM: tl.constexpr = 0
):
    """Store what `load_pieces` loads, converted to the dtype of the destination."""
    pointers = base + rows[:, None] * stride
    tl.store(
        pointers + tl.arange(0, D_A)[None, :], a.to(base.dtype.element_ty), mask=inside[:, None]
    )
    if D_B > 0:
        columns = tl.arange(0, D_B)[None, :]
        mask = inside[:, None] if DIM == 0 else inside[:, None] & (columns < DIM - D_A)
        tl.store(pointers + (D_A + columns), b.to(base.dtype.element_ty), mask=mask)


@triton.jit
def head_rows(base, b, h, start, stride_b, stride_n, stride_h, MULTIPLE: tl.constexpr = 1):
    """Return the address of row `start` of a head of a batch entry; `stride_h` is a multiple of MULTIPLE."""
    head = base + b * stride_b + h * tl.multiple_of(stride_h, MULTIPLE)
    return head + tl.cast(start, tl.int64) * stride_n


@triton.jit
def product(x_a, x_b, y_a, y_b, D_B: tl.constexpr, PRECISION: tl.constexpr, bias=None):
    """Multiply rows of x with rows of y, over the head dimension, and add a bias."""
    if bias is None:
        out = tl.dot(x_a, tl.trans(y_a), input_precision=PRECISION)
    else:
        out = tl.dot(x_a, tl.trans(y_a), bias.to(tl.float32), input_precision=PRECISION)
    if D_B > 0:
        out = tl.dot(x_b, tl.trans(y_b), out, input_precision=PRECISION)
    return out


@triton.jit
def dropout_stream(head, sequence):
    """Return the part of Philox's counter that identifies a head and a sequence, a number below 2³²."""
    return tl.cast(head, tl.int64) | (tl.cast(sequence, tl.int64) << 32)


@triton.jit
def dropout_keep(seed, stream, queries, keys, THRESHOLD: tl.constexpr):
    """Return the mask of attention weights that dropout keeps: a function of seed, stream and element, not of tiles.

    A call of Philox with 7 rounds (Salmon et al. 2011) decides eight weights by 16 bits each, of two queries and four
    keys at distances of 8. That is the layout of the tensor cores' accumulators: a thread holds all eight (of
    transposed scores, four), so that their counters coincide and one call suffices. `queries` and `keys` count within
    their sequence and are broadcast against each other, so the first rounds cost only rows and columns. The counter is
    (key without its bits of 8 and 16, query without its bit of 8, stream); these bits select one of the eight.
    """
    queries = queries.to(tl.uint32)
    keys = keys.to(tl.uint32)
    seed_low = (seed & 0xFFFFFFFF).to(tl.uint32)
    seed_high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    stream_low = (stream & 0xFFFFFFFF).to(tl.uint32)
    stream_high = ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)
    r0, r1, r2, r3 = philox_impl(
        keys & 0xFFFFFFE7, queries & 0xFFFFFFF7, stream_low, stream_high, seed_low, seed_high, 7
    )
    bits = tl.where(
        (keys & 16) == 0, tl.where((keys & 8) == 0, r0, r1), tl.where((keys & 8) == 0, r2, r3)
    )
    bits = tl.where((queries & 8) == 0, bits & 0xFFFF, bits >> 16)
    return bits >= THRESHOLD


@triton.jit
def forward_tile(
    q_a, q_b, acc_a, acc_b, row_max, row_sum,
    k_base, v_base, stride_kn, stride_vn, bias_pointers, inside, allowed, seed, stream, queries, keys,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr,
    APART: tl.constexpr = False, loaded=None,
):  # fmt: skip
    """Update the online softmax (acc_a, acc_b, row_max, row_sum) by one tile of keys.

    `inside` [BLOCK_N]: keys that exist, used if MASKED; `allowed` [BLOCK_N]: keys that may be attended to, used if
    HAS_MASK. With a bias neither is needed for the scores, since the bias of a missing key is -inf. APART: `row_sum`
    is [rows, 8], sums of every eighth key, reduced after the loop: each stays within a thread. `loaded`: the tile of
    the bias and the pieces of keys and values, if already loaded.
    """
    columns = tl.arange(0, BLOCK_N)
    if loaded is None:
        k_a, k_b = load_pieces(k_base, columns, stride_kn, inside, D_A, D_B, MASKED)
        bias = None if bias_pointers is None else tl.load(bias_pointers)
    else:
        bias, k_a, k_b = loaded[0], loaded[1], loaded[2]
    scores = product(q_a, q_b, k_a, k_b, D_B, PRECISION, bias)
    if bias is None:
        if HAS_MASK:
            scores = tl.where(allowed[None, :], scores, float("-inf"))
        elif MASKED:
            scores = tl.where(inside[None, :], scores, float("-inf"))
    factor: tl.constexpr = SCALE * LOG2E
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    finite_max = new_max
    if HAS_MASK:
        # Rows without an allowed key so far: -inf minus -inf must not become NaN.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = tl.exp2((row_max - finite_max) * factor)
    weights = tl.exp2(scores * factor - (finite_max * factor)[:, None])
    if APART:
        eighths = weights.reshape(weights.shape[0], BLOCK_N // 8, 8)  # pyright: ignore[reportGeneralTypeIssues]
        row_sum = row_sum * shrink[:, None] + tl.sum(eighths, 1)
    else:
        row_sum = row_sum * shrink + tl.sum(weights, 1)
    if THRESHOLD > 0:
        weights = tl.where(
            dropout_keep(seed, stream, queries[:, None], keys[None, :], THRESHOLD), weights, 0.0
        )
    if loaded is None:
        v_a, v_b = load_pieces(v_base, columns, stride_vn, inside, D_A, D_B, MASKED)
    else:
        v_a, v_b = loaded[3], loaded[4]
    weights = weights.to(v_a.dtype)
    acc_a = tl.dot(weights, v_a, acc_a * shrink[:, None], input_precision=PRECISION)
    if D_B > 0:
        acc_b = tl.dot(weights, v_b, acc_b * shrink[:, None], input_precision=PRECISION)
    return acc_a, acc_b, new_max, row_sum


@triton.jit
def inverse_sums(row_sum, THRESHOLD: tl.constexpr = 0):
    """Return the factors that normalise rows of accumulators; 0 for queries without a key."""
    rescale: tl.constexpr = 65536.0 / (65536.0 - THRESHOLD)
    attended = row_sum > 0
    return tl.where(attended, rescale / tl.where(attended, row_sum, 1.0), 0.0)


@triton.jit
def logsumexp(row_max, row_sum, SCALE: tl.constexpr):
    """Return the natural logsumexp of rows; -inf for queries without a key."""
    attended = row_sum > 0
    row_sum = tl.where(attended, row_sum, 1.0)
    return tl.where(attended, row_max * SCALE + tl.log2(row_sum) / LOG2E, float("-inf"))


@triton.jit
def softmax_weights(scores, row_lse, SCALE: tl.constexpr, PRECISION: tl.constexpr, bias=None):
    """Return exp(SCALE · scores + bias - logsumexp); `row_lse`, from `statistics_kernel`, broadcasts.

    Half precision takes the logsumexp in base 2 and spends one instruction before the exponential. In fp32 that
    rounding would dominate the error, so the difference is taken first.
    """
    if PRECISION == "ieee":
        scores = scores * SCALE
        weights = tl.exp2((scores - (row_lse if bias is None else row_lse - bias)) * LOG2E)
    else:
        scores = scores * (SCALE * LOG2E)
        weights = tl.exp2(scores - (row_lse if bias is None else row_lse - bias * LOG2E))
    return weights


@triton.jit
def dkdv_tile(
    k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b,
    q_base, g_base, stride_qn, stride_gn, lse_pointer, delta_pointer, bias_pointers, inside,
    seed, stream, queries, keys,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, THRESHOLD: tl.constexpr, APART: tl.constexpr = False, ds_pointers=None, present=None,
):  # fmt: skip
    """Add one tile of queries to the gradients of a tile of keys and values; the key gradient lacks the factor SCALE.

    Scores are transposed, [keys, queries], so that they are a left operand without a change of layout. So is the bias:
    only then can the tile be copied to shared memory ahead of its use. Queries outside need no mask on scores: their
    lse is +inf, which makes their weights zero.

    With a bias, the score gradients of `present` keys are stored at `ds_pointers` [keys, queries]. APART: the last GEMM
    has an accumulator of its own: in that of the sum it would be in flight when the next tile begins, and Hopper's
    compiler may serialise all GEMMs.
    """
    rows = tl.arange(0, BLOCK_M)
    q_a, q_b = load_pieces(q_base, rows, stride_qn, inside, D_A, D_B, MASKED)
    if MASKED:
        row_lse = tl.load(lse_pointer + rows, mask=inside, other=float("inf"))
        delta = tl.load(delta_pointer + rows, mask=inside, other=0.0)
    else:
        row_lse = tl.load(lse_pointer + rows)
        delta = tl.load(delta_pointer + rows)
    bias = None if bias_pointers is None else tl.load(bias_pointers)
    scores = product(k_a, k_b, q_a, q_b, D_B, PRECISION, bias)
    weights = softmax_weights(scores, row_lse[None, :], SCALE, PRECISION)
    g_a, g_b = load_pieces(g_base, rows, stride_gn, inside, D_A, D_B, MASKED)
    dweights = product(v_a, v_b, g_a, g_b, D_B, PRECISION)
    dropped = weights
    if THRESHOLD > 0:
        rescale: tl.constexpr = 65536.0 / (65536.0 - THRESHOLD)
        keep = dropout_keep(seed, stream, queries[None, :], keys[:, None], THRESHOLD)
        dropped = tl.where(keep, weights * rescale, 0.0)
        dweights = tl.where(keep, dweights * rescale, 0.0)
    dscores = (weights * (dweights - delta[None, :])).to(q_a.dtype)
    if bias_pointers is not None:
        tl.store(ds_pointers, dscores, mask=present[:, None])  # pyright: ignore[reportOptionalSubscript]
    dropped = dropped.to(q_a.dtype)
    dv_a = tl.dot(dropped, g_a, dv_a, input_precision=PRECISION)
    if APART:
        dk_a = tl.fma(
            dk_a,
            tl.full(dk_a.shape, 1.0, tl.float32),
            tl.dot(dscores, q_a, input_precision=PRECISION),
        )
    else:
        dk_a = tl.dot(dscores, q_a, dk_a, input_precision=PRECISION)
    if D_B > 0:
        dv_b = tl.dot(dropped, g_b, dv_b, input_precision=PRECISION)
        dk_b = tl.dot(dscores, q_b, dk_b, input_precision=PRECISION)
    return dk_a, dk_b, dv_a, dv_b


@triton.jit
def dq_tile(
    q_a, q_b, g_a, g_b, dq_a, dq_b, row_lse, delta,
    k_base, v_base, stride_kn, stride_vn, inside, allowed, seed, stream, queries, keys,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, HAS_MASK: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradient of a tile of queries, which lacks the factor SCALE."""
    columns = tl.arange(0, BLOCK_N)
    k_a, k_b = load_pieces(k_base, columns, stride_kn, inside, D_A, D_B, MASKED)
    scores = product(q_a, q_b, k_a, k_b, D_B, PRECISION)
    shift = row_lse[:, None]
    if HAS_MASK:
        scores = tl.where(allowed[None, :], scores, float("-inf"))
    elif MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    weights = softmax_weights(scores, shift, SCALE, PRECISION)
    v_a, v_b = load_pieces(v_base, columns, stride_vn, inside, D_A, D_B, MASKED)
    dweights = product(g_a, g_b, v_a, v_b, D_B, PRECISION)
    if THRESHOLD > 0:
        rescale: tl.constexpr = 65536.0 / (65536.0 - THRESHOLD)
        keep = dropout_keep(seed, stream, queries[:, None], keys[None, :], THRESHOLD)
        dweights = tl.where(keep, dweights * rescale, 0.0)
    dscores = (weights * (dweights - delta[:, None])).to(k_a.dtype)
    dq_a = tl.dot(dscores, k_a, dq_a, input_precision=PRECISION)
    if D_B > 0:
        dq_b = tl.dot(dscores, k_b, dq_b, input_precision=PRECISION)
    return dq_a, dq_b


@triton.jit(do_not_specialize=["heads", "queries"])
def statistics_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, row_lse_ptr,
    stride_ob, stride_on, stride_oh, stride_gb, stride_gn, stride_gh, heads, queries,
    DIM: tl.constexpr, WIDTH: tl.constexpr, HAS_DLSE: tl.constexpr, MULTIPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute delta, Σ_d out·dout - dlse, and the logsumexp that `softmax_weights` takes; `[B, H, Nq]` in fp32.

    A row that attended to no key has lse = -inf; +inf makes exp(score - lse) zero in the backward kernels, without a
    test there. Strides of heads are multiples of MULTIPLE.
    """
    tiles = tl.cdiv(queries, BLOCK)
    start = tl.program_id(0) % tiles * BLOCK
    h = tl.cast(tl.program_id(0) // tiles % heads, tl.int64)
    b = tl.cast(tl.program_id(0) // tiles // heads, tl.int64)
    rows = tl.arange(0, BLOCK)
    inside = rows < queries - start
    columns = tl.arange(0, WIDTH)[None, :]
    present = inside[:, None] & (columns < DIM)
    out_base = (
        out_ptr
        + b * stride_ob
        + tl.cast(start, tl.int64) * stride_on
        + h * tl.multiple_of(stride_oh, MULTIPLE)
    )
    dout_base = (
        dout_ptr
        + b * stride_gb
        + tl.cast(start, tl.int64) * stride_gn
        + h * tl.multiple_of(stride_gh, MULTIPLE)
    )
    out = load_fp32(out_base + rows[:, None] * stride_on + columns, present)
    dout = load_fp32(dout_base + rows[:, None] * stride_gn + columns, present)
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


def _statistics_constants(variant: Variant, dtype: str, config: LaunchConfig) -> dict[str, Any]:
    width = triton.next_power_of_2(variant["head_dim"])
    flags = {"HAS_DLSE": variant.get("dlse", False), "MULTIPLE": variant.get("multiple", 1)}
    return {"DIM": variant["head_dim"], "WIDTH": width, **flags}


STATISTICS = KernelSpec(
    name="attention_backward_statistics",
    kernel=statistics_kernel,
    variants=tuple({"head_dim": head_dim} for head_dim in HEAD_DIMS),
    config=lambda variant, dtype, arch: LaunchConfig({"BLOCK": 64}, num_warps=4, num_stages=2),
    constants=_statistics_constants,
    tensor_core=False,
)
KERNELS = [STATISTICS]


def backward_statistics(
    out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None = None, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Return (delta, row_lse) `[B, H, N]` in fp32 of outputs and their gradients `[B, N, H, D]` and lse `[B, H, N]`."""
    batch, queries, heads, head_dim = out.shape
    delta, row_lse = torch.empty_like(lse), torch.empty_like(lse)
    if out.numel():
        options, config = launch_options(
            STATISTICS, out, head_dim=head_dim, dlse=dlse is not None, multiple=multiple
        )
        statistics_kernel[(triton.cdiv(queries, config.tiles["BLOCK"]) * heads * batch,)](
            out,
            dout,
            lse,
            lse if dlse is None else dlse.float().contiguous(),
            delta,
            row_lse,
            *strides_of(out, dout),
            heads,
            queries,
            **options,
        )
    return delta, row_lse


def attention_spec(
    name: str,
    kernel: Any,
    variants: Sequence[Variant],
    extras: Callable[[Variant, LaunchConfig], Mapping[str, Any]] = lambda variant, config: {},
    head_dims: tuple[int, ...] = HEAD_DIMS,
    **options: Any,
) -> KernelSpec:
    """Specify an attention kernel; of the common constants and `extras`, it takes those that it has parameters for.

    A variant has `head_dim`, and may have `scale`, `dropout` (a probability), `mask` (of keys) and the keys that
    `extras` reads.
    """
    parameters = {*kernel.arg_names}

    def constants(variant: Variant, dtype: str, config: LaunchConfig) -> dict[str, Any]:
        head_dim = variant["head_dim"]
        d_a, d_b = split_head_dim(head_dim, head_dims)
        common = {
            "SCALE": variant.get("scale", head_dim**-0.5),
            "DIM": head_dim,
            "D_A": d_a,
            "D_B": d_b,
            # Exact products in fp32; half precision has one mode, which AMD does not accept by name.
            "PRECISION": "ieee" if dtype == "fp32" else None,
            "THRESHOLD": dropout_threshold(variant.get("dropout", 0.0)),
            "HAS_MASK": variant.get("mask", False),
            "STAGES": config.num_stages,
            "APART": config.apart,
            "FENCED": config.fenced,
        }
        values = common | dict(extras(variant, config))
        return {key: value for key, value in values.items() if key in parameters}

    def config(variant: Variant, dtype: str, arch: int) -> LaunchConfig:
        # Packed attention has separate kernel names for dropout.
        dropout = name.startswith("bias_attention")
        dropout = dropout and dropout_threshold(variant.get("dropout", 0.0)) > 0
        return config_for(name, variant["head_dim"], dtype, arch, dropout=dropout)

    return KernelSpec(name, kernel, tuple(variants), config, constants, **options)


def split_head_dim(head_dim: int, head_dims: tuple[int, ...] = HEAD_DIMS) -> tuple[int, int]:
    """Split a head dimension into two powers of two, the second possibly 0: 80 → (64, 16), 160 → (128, 32).

    Triton's tiles are powers of two. Two GEMMs of exact size need no masks and, at 80, five eighths of the work of one
    that is padded to 128. 72 and 112 fill their second piece, of 16 and 64 columns, in part.
    """
    if head_dim not in head_dims:
        raise InputError(
            f"head dimension {head_dim} is not supported; the Triton kernels have {head_dims}: pad the heads with zeros"
            " or use backend 'auto'"
        )
    first = 1 << (head_dim.bit_length() - 1)
    remainder = head_dim - first
    return first, max(16, triton.next_power_of_2(remainder)) if remainder else 0


def dropout_threshold(dropout_p: float) -> int:
    """Return the probability in units of 2⁻¹⁶, as the kernels compare it with random bits."""
    return min(round(dropout_p * 2**16), 2**16 - 1)


def addressable(tensor: Tensor, multiple: int = 1) -> Tensor:
    """Copy `[..., N, H, D]` unless D is contiguous, strides are multiples and 32-bit offsets address a tile."""
    fits = tensor.stride(-1) == 1 and tensor.stride(-3) * _LARGEST_TILE < 2**31
    if fits and multiple > 1:
        fits = not any(stride % multiple for stride in strides_of(tensor))
    return tensor if fits else tensor.contiguous()


def strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """Return the strides of all dimensions but the last; 0 for dimensions of one entry, whose stride is arbitrary."""
    return tuple(
        stride if size > 1 else 0
        for tensor in tensors
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    )


def optional_arguments(
    q: Tensor, key_mask: Tensor | None, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the mask as bytes and the seed; q stands in for absent ones."""
    seed = checks.seed_of(dropout_p, seed) if dropout_threshold(dropout_p) else q
    return q if key_mask is None else key_mask.contiguous().view(torch.uint8), seed
