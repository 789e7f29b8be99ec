"""Fused LayerNorm kernels: after residual, LayerScale, DropPath and dropout, or after a sum of embeddings.

One pass forward, one pass backward. Statistics are fp32 in every precision. In the backward each program takes every
n-th step of a few rows, accumulates the gradients of the parameters in registers and stores partial sums, which
`ordered_sum` adds in a fixed order. The dropout mask is a function of (seed, row, column): it is computed twice, and
never stored.

The sum of the embeddings is not stored either: the backward gathers it again. The gradients of the tables are summed in
the order of the sorted tokens by one program for each entry, so equal inputs give equal bits without atomics.
"""

# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xfm_fast.errors import InputError

from .. import checks
from ..checks import LARGEST_WIDTH, AddNorm, Embedding
from ..cpu.norms import AddLayerNorm, AddLayerNormGradients
from .launch import LaunchConfig, Variant, launch_options
from .rows import (
    ARCHES,
    contiguous_rows,
    dense,
    first_stage_programs,
    load_fp32,
    ordered_sum,
    round_rows,
    row_spec,
    row_wise,
)

_DROPOUT_STEPS = 1 << 24


@triton.jit
def dropout_factors(
    seed_ptr, rows, drop_below, keep_scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Return factors 0 or 1/(1-p) `[ROWS, BLOCK]`: Philox of (seed, row, column), four columns a call."""
    quads: tl.constexpr = (WIDTH + 3) // 4
    offsets = rows.to(tl.int64)[:, None] * quads + tl.arange(0, BLOCK // 4)[None, :]
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed_ptr), offsets)
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(rows.shape[0], BLOCK)
    return tl.where((bits.to(tl.uint32) >> 8).to(tl.int32) >= drop_below, keep_scale, 0.0)


@triton.jit
def normalise(values, inside, eps, WIDTH: tl.constexpr):
    """Return differences from the mean (zero outside), mean and 1/deviation of rows; values outside must be zero."""
    mean = tl.sum(values, 1) / WIDTH
    centred = tl.where(inside, values - mean[:, None], 0.0)
    return centred, mean, tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)


@triton.jit
def normalise_backward(dnormed, normalised, weight, rstd, WIDTH: tl.constexpr):
    """Return the gradient of the normalised rows' input; all operands are zero outside."""
    scaled = dnormed * weight
    projection = tl.sum(scaled * normalised, 1) / WIDTH
    mean = tl.sum(scaled, 1) / WIDTH
    return (scaled - normalised * projection[:, None] - mean[:, None]) * rstd[:, None]


@triton.jit
def tile_of_rows(step, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Return (rows, columns, mask of rows, mask of elements) of a step of ROWS rows."""
    rows = step * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    row_mask = rows < count
    return rows, columns, row_mask, row_mask[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def store_norm(
    values, tile, weight_ptr, bias_ptr, normed_ptr, mean_ptr, rstd_ptr, eps, WIDTH: tl.constexpr
):
    """Store the LayerNorm of rows, their mean and 1/deviation; return the norm in fp32."""
    rows, columns, row_mask, mask = tile
    centred, mean, rstd = normalise(values, mask, eps, WIDTH)
    weight = load_fp32(weight_ptr + columns, columns < WIDTH)
    normed = centred * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        normed += load_fp32(bias_ptr + columns, columns < WIDTH)[None, :]
    out = normed_ptr + (rows.to(tl.int64)[:, None] * WIDTH + columns[None, :])
    tl.store(out, normed, mask=mask)
    tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    return normed


@triton.jit
def backward_step(
    values,
    dnormed,
    weight,
    tile,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the gradients of the normalised rows' input, and of the norm's weight and bias."""
    rows, columns, row_mask, mask = tile
    mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
    normalised = tl.where(mask, (values - mean[:, None]) * rstd[:, None], 0.0)
    if BLOCK > 4096:
        # Wide rows leave no registers to hold the weight; it is loaded again from the first-level cache.
        weight = load_fp32(weight_ptr + columns, columns < WIDTH)[None, :]
    ds = normalise_backward(dnormed, normalised, weight, rstd, WIDTH)
    return ds, tl.sum(dnormed * normalised, 0), tl.sum(dnormed, 0)


@triton.jit
def embedding_sum(
    tokens_ptr,
    positions_ptr,
    word_ptr,
    position_ptr,
    type_ptr,
    tile,
    words,
    positions,
    WIDTH: tl.constexpr,
):
    """Return `[ROWS, BLOCK]` sums of embeddings, zero outside the tile; NaN for an id outside its table."""
    rows, columns, row_mask, _ = tile
    column_mask = columns < WIDTH
    token = tl.load(tokens_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    position = tl.load(positions_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    valid = (token >= 0) & (token < words) & (position >= 0) & (position < positions)
    inside = (row_mask & valid)[:, None] & column_mask[None, :]
    total = load_fp32(word_ptr + token[:, None] * WIDTH + columns[None, :], inside)
    total += load_fp32(position_ptr + position[:, None] * WIDTH + columns[None, :], inside)
    type_row = load_fp32(type_ptr + columns, column_mask)
    total = tl.where(row_mask[:, None], total + type_row[None, :], 0.0)
    return tl.where((row_mask & ~valid)[:, None] & column_mask[None, :], float("nan"), total)


@triton.jit(do_not_specialize=["count", "rows_per_scale", "drop_below"])
def add_layer_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, gamma_ptr, row_scale_ptr, seed_ptr,
    normed_ptr, summed_ptr, mean_ptr, rstd_ptr, rounded_ptr, scales_ptr,
    stride_x, stride_residual, count, rows_per_scale, eps, drop_below, keep_scale,
    WIDTH: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add and normalise ROWS rows a program; with `rounded_ptr`, also quantise them to fp8."""
    tile = tile_of_rows(tl.program_id(0), count, WIDTH, BLOCK, ROWS)
    rows, columns, row_mask, mask = tile
    rows64 = rows.to(tl.int64)[:, None]
    values = load_fp32(x_ptr + rows64 * stride_x + columns[None, :], mask)
    if HAS_DROPOUT:
        values *= dropout_factors(seed_ptr, rows, drop_below, keep_scale, WIDTH, BLOCK)
    if gamma_ptr is not None:
        values *= load_fp32(gamma_ptr + columns, columns < WIDTH)[None, :]
    if row_scale_ptr is not None:
        values *= load_fp32(row_scale_ptr + rows // rows_per_scale, row_mask)[:, None]
    if residual_ptr is not None:
        values += load_fp32(residual_ptr + rows64 * stride_residual + columns[None, :], mask)
    out = rows64 * WIDTH + columns[None, :]
    if summed_ptr is not None:
        summed = values.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + out, summed, mask=mask)
        # The backward reads the sum as it was stored, so the statistics are those of the stored sum.
        values = summed.to(tl.float32)
    normed = store_norm(
        values, tile, weight_ptr, bias_ptr, normed_ptr, mean_ptr, rstd_ptr, eps, WIDTH
    )
    if rounded_ptr is not None:
        # As a GEMM would read them: in the dtype in which they are stored.
        stored = normed.to(normed_ptr.dtype.element_ty).to(tl.float32)
        rounded, scales = round_rows(tl.where(mask, stored, 0.0))
        tl.store(rounded_ptr + out, rounded, mask=mask)
        tl.store(scales_ptr + rows, scales, mask=row_mask)


@triton.jit(do_not_specialize=["count", "words", "positions"])
def embedding_norm_forward_kernel(
    tokens_ptr,
    positions_ptr,
    word_ptr,
    position_ptr,
    type_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    count,
    words,
    positions,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Embed and normalise ROWS tokens a program."""
    tile = tile_of_rows(tl.program_id(0), count, WIDTH, BLOCK, ROWS)
    values = embedding_sum(
        tokens_ptr, positions_ptr, word_ptr, position_ptr, type_ptr, tile, words, positions, WIDTH
    )
    store_norm(values, tile, weight_ptr, bias_ptr, normed_ptr, mean_ptr, rstd_ptr, eps, WIDTH)


@triton.jit(do_not_specialize=["count", "rows_per_scale", "drop_below"])
def add_layer_norm_backward_kernel(
    dnormed_ptr, dsummed_ptr, sums_ptr, branch_ptr, weight_ptr, gamma_ptr, row_scale_ptr, seed_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, partials_ptr,
    stride_dnormed, stride_dsummed, stride_branch, count, rows_per_scale, drop_below, keep_scale,
    WIDTH: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute dx and dresidual, and partial sums `[2 or 3, programs, WIDTH]` of the parameters' gradients.

    Program p takes the steps p, p + programs, ... of ROWS rows.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    column_mask = columns < WIDTH
    weight = load_fp32(weight_ptr + columns, column_mask)[None, :]
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    dgamma = tl.zeros([BLOCK], tl.float32)
    for step in range(program, tl.cdiv(count, ROWS), programs):
        tile = tile_of_rows(step, count, WIDTH, BLOCK, ROWS)
        rows, _, row_mask, mask = tile
        rows64 = rows.to(tl.int64)[:, None]
        contiguous = rows64 * WIDTH + columns[None, :]
        dnormed = load_fp32(dnormed_ptr + rows64 * stride_dnormed + columns[None, :], mask)
        summed = load_fp32(sums_ptr + contiguous, mask)
        ds, weight_sum, bias_sum = backward_step(
            summed, dnormed, weight, tile, weight_ptr, mean_ptr, rstd_ptr, WIDTH, BLOCK
        )
        dweight += weight_sum
        dbias += bias_sum
        if dsummed_ptr is not None:
            ds += load_fp32(dsummed_ptr + rows64 * stride_dsummed + columns[None, :], mask)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + contiguous, ds, mask=mask)
        if dx_ptr is not None:
            if row_scale_ptr is not None:
                ds *= load_fp32(row_scale_ptr + rows // rows_per_scale, row_mask)[:, None]
            if HAS_DROPOUT:
                ds *= dropout_factors(seed_ptr, rows, drop_below, keep_scale, WIDTH, BLOCK)
            if gamma_ptr is not None:
                # γ is applied after dropout, but factors commute: dropped elements count neither way.
                x = load_fp32(branch_ptr + rows64 * stride_branch + columns[None, :], mask)
                dgamma += tl.sum(ds * x, 0)
                ds *= load_fp32(gamma_ptr + columns, column_mask)[None, :]
            tl.store(dx_ptr + contiguous, ds, mask=mask)
    partials = partials_ptr + program * WIDTH + columns
    tl.store(partials, dweight, mask=column_mask)
    tl.store(partials + programs * WIDTH, dbias, mask=column_mask)
    if gamma_ptr is not None:
        tl.store(partials + 2 * programs * WIDTH, dgamma, mask=column_mask)


@triton.jit(do_not_specialize=["count", "words", "positions"])
def embedding_norm_backward_kernel(
    dnormed_ptr,
    tokens_ptr,
    positions_ptr,
    word_ptr,
    position_ptr,
    type_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    ds_ptr,
    partials_ptr,
    stride_dnormed,
    count,
    words,
    positions,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the gradient of the sum of embeddings in fp32, and partial sums `[3, programs, WIDTH]`.

    The partial sums are of the gradients of weight, bias and type row.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    column_mask = columns < WIDTH
    weight = load_fp32(weight_ptr + columns, column_mask)[None, :]
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    dtype_row = tl.zeros([BLOCK], tl.float32)
    for step in range(program, tl.cdiv(count, ROWS), programs):
        tile = tile_of_rows(step, count, WIDTH, BLOCK, ROWS)
        rows, _, _, mask = tile
        rows64 = rows.to(tl.int64)[:, None]
        dnormed = load_fp32(dnormed_ptr + rows64 * stride_dnormed + columns[None, :], mask)
        values = embedding_sum(
            tokens_ptr,
            positions_ptr,
            word_ptr,
            position_ptr,
            type_ptr,
            tile,
            words,
            positions,
            WIDTH,
        )
        ds, weight_sum, bias_sum = backward_step(
            values, dnormed, weight, tile, weight_ptr, mean_ptr, rstd_ptr, WIDTH, BLOCK
        )
        tl.store(ds_ptr + rows64 * WIDTH + columns[None, :], ds, mask=mask)
        dweight += weight_sum
        dbias += bias_sum
        dtype_row += tl.sum(ds, 0)
    partials = partials_ptr + program * WIDTH + columns
    tl.store(partials, dweight, mask=column_mask)
    tl.store(partials + programs * WIDTH, dbias, mask=column_mask)
    tl.store(partials + 2 * programs * WIDTH, dtype_row, mask=column_mask)


@triton.jit(do_not_specialize=["count", "entries", "skipped"])
def segment_sum_kernel(
    ids_ptr,
    order_ptr,
    rows_ptr,
    table_ptr,
    count,
    entries,
    skipped,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum the rows of a run of equal sorted ids, in the program of its first id; the other programs return."""
    first = tl.program_id(0)
    entry = tl.load(ids_ptr + first)
    before = tl.load(ids_ptr + tl.maximum(first - 1, 0))
    if ((first == 0) | (before != entry)) & (entry != skipped) & (entry >= 0) & (entry < entries):
        columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_mask = columns < WIDTH
        steps = tl.arange(0, BLOCK_ROWS)
        sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        start = first
        members = BLOCK_ROWS
        while members == BLOCK_ROWS:
            row_mask = start + steps < count
            row_mask = row_mask & (
                tl.load(ids_ptr + start + steps, mask=row_mask, other=-1) == entry
            )
            source = tl.load(order_ptr + start + steps, mask=row_mask, other=0)
            addresses = rows_ptr + source[:, None] * WIDTH + columns[None, :]
            sums += tl.load(addresses, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
            members = tl.sum(row_mask.to(tl.int32), 0)
            start += BLOCK_ROWS
        tl.store(table_ptr + entry * WIDTH + columns, tl.sum(sums, 0), mask=column_mask)


def forward_config(width: int) -> LaunchConfig:
    """Configure one row a program, 16 elements a thread."""
    block = max(16, triton.next_power_of_2(width))
    return LaunchConfig(
        {"BLOCK": block, "ROWS": 1}, num_warps=min(16, max(1, block // 512)), num_stages=1
    )


def backward_config(width: int) -> LaunchConfig:
    """Configure several rows a step while they are short, for more loads in flight."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, min(4, 2048 // block))
    # Wide rows need more threads to keep their sums in registers.
    warps = max(1, rows * block // (512 if block <= 2048 else 256))
    return LaunchConfig({"BLOCK": block, "ROWS": rows}, warps, num_stages=1)


# Pointers that are null in variants without a feature.
_OPTIONAL = {
    "residual": ("residual_ptr", "summed_ptr", "dsummed_ptr"),
    "gamma": ("gamma_ptr", "row_scale_ptr", "branch_ptr"),
    "dropout": ("seed_ptr",),
    "fp8": ("rounded_ptr", "scales_ptr"),
}


def _constants(variant: Variant) -> dict[str, Any]:
    absent = [
        name for feature, names in _OPTIONAL.items() if not variant.get(feature) for name in names
    ]
    if not (variant.get("gamma") or variant["dropout"]):
        absent.append("dresidual_ptr")
    return {**dict.fromkeys(absent), "HAS_DROPOUT": variant["dropout"]}


_VARIANTS = tuple(
    {"width": width, "residual": residual, "gamma": gamma, "dropout": dropout}
    for width, residual, gamma, dropout in (
        (768, False, False, False),
        (768, True, False, False),
        (768, True, False, True),
        (768, True, True, False),
        (1024, True, True, True),
        (1536, False, False, False),
        (4096, True, True, False),
        (8192, True, False, True),
    )
)
FORWARD = row_spec(
    "add_layer_norm_forward", add_layer_norm_forward_kernel, _VARIANTS, forward_config, _constants
)
FORWARD_FP8 = row_spec(
    "add_layer_norm_forward_fp8",
    add_layer_norm_forward_kernel,
    ({**_VARIANTS[0], "fp8": True}, {**_VARIANTS[3], "fp8": True}),
    row_wise,
    _constants,
    arches=ARCHES,
)
BACKWARD = row_spec(
    "add_layer_norm_backward",
    add_layer_norm_backward_kernel,
    _VARIANTS,
    backward_config,
    _constants,
)
EMBED_FORWARD = row_spec(
    "embedding_norm_forward", embedding_norm_forward_kernel, ({"width": 768},), forward_config
)
EMBED_BACKWARD = row_spec(
    "embedding_norm_backward",
    embedding_norm_backward_kernel,
    ({"width": 768},),
    backward_config,
    types=lambda variant, dtype: {"ds_ptr": "*fp32"},
)
SEGMENT_SUM = row_spec(
    "embedding_segment_sum",
    segment_sum_kernel,
    ({"width": 768},),
    lambda width: LaunchConfig({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128}, num_warps=4, num_stages=1),
    types=lambda variant, dtype: {"rows_ptr": "*fp32"},
)


def add_layer_norm_forward(
    a: AddNorm, *, rounded: tuple[Tensor, Tensor] | None = None
) -> AddLayerNorm:
    """Compute `summed = residual + row_scale · gamma · dropout(x)` and its LayerNorm.

    `normed` has the dtype of x, or with `wide` of the sum; `rounded`, from `rows.room_for`, receives `normed` in fp8.
    `summed` is x itself without a residual, factor or dropout.
    """
    x, residual, gamma, row_scale = a.x, a.residual, a.gamma, a.row_scale
    width, rows = width_of(x), contiguous_rows(x)
    plain = residual is None and gamma is None and row_scale is None and not a.dropout_p
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed = torch.empty(x.shape, dtype=dtype if a.wide else x.dtype, device=x.device)
    summed = x if plain else torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = _statistics(rows.shape[0], x)
    added = None if residual is None else contiguous_rows(residual)
    options, config = launch_options(
        FORWARD_FP8 if rounded else FORWARD, x, width=width, dropout=a.dropout_p > 0
    )
    rows_per_scale, seed, drop_below, keep_scale = _dropout_arguments(a)
    if rows.shape[0]:
        add_layer_norm_forward_kernel[(triton.cdiv(rows.shape[0], config.tiles["ROWS"]),)](
            rows, added, dense(a.weight), dense(a.bias), dense(gamma), dense(row_scale), seed,
            normed, None if plain else summed, mean, rstd, *(rounded or (None, None)),
            rows.stride(0), 0 if added is None else added.stride(0), rows.shape[0], rows_per_scale,
            a.eps, drop_below, keep_scale, **options,
        )  # fmt: skip
    return AddLayerNorm(normed, summed, mean, rstd)


def add_layer_norm_backward(
    dnormed: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    a: AddNorm,
    *,
    has_residual: bool = True,
) -> AddLayerNormGradients:
    """Compute the gradients of all floating-point inputs; `dsummed` None means zero."""
    x, weight, gamma, row_scale = a.x, a.weight, a.gamma, a.row_scale
    width, rows, sums = width_of(x), contiguous_rows(x), contiguous_rows(summed).contiguous()
    upstream = contiguous_rows(dnormed)
    skipped = None if dsummed is None else contiguous_rows(dsummed)
    scaled = gamma is not None or row_scale is not None or a.dropout_p > 0
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    apart = has_residual and (scaled or x.dtype != summed.dtype)
    dresidual = torch.empty(x.shape, dtype=summed.dtype, device=x.device) if apart else None
    options, config = launch_options(BACKWARD, x, width=width, dropout=a.dropout_p > 0)
    programs = first_stage_programs(triton.cdiv(rows.shape[0], config.tiles["ROWS"]), x.device)
    likes = [weight, weight] if gamma is None else [weight, weight, gamma]
    partials = torch.empty(len(likes), programs, width, dtype=torch.float32, device=x.device)
    rows_per_scale, seed, drop_below, keep_scale = _dropout_arguments(a)
    add_layer_norm_backward_kernel[(programs,)](
        upstream, skipped, sums, rows if gamma is not None else None, dense(weight), dense(gamma), dense(row_scale),
        seed, mean, rstd, dx, dresidual, partials,
        upstream.stride(0), 0 if skipped is None else skipped.stride(0), rows.stride(0), rows.shape[0],
        rows_per_scale, drop_below, keep_scale, **options,
    )  # fmt: skip
    dweight, dbias, *dgamma = ordered_sum(partials, *likes)
    if dresidual is None:
        dresidual = dx
    return AddLayerNormGradients(dx, dresidual, dweight, dbias, dgamma[0] if dgamma else None)


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the LayerNorm over the last dimension of `[..., M]`, and mean and rstd `[rows]` in fp32."""
    normed, _, mean, rstd = add_layer_norm_forward(AddNorm(x, None, weight, bias, eps))
    return normed, mean, rstd


def layer_norm_backward(
    dnormed: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias)."""
    args = AddNorm(x, None, weight, None, 0.0)
    dx, _, dweight, dbias, _ = add_layer_norm_backward(
        dnormed, None, x, mean, rstd, args, has_residual=False
    )
    return dx, dweight, dbias


def width_of(x: Tensor) -> int:
    """Return the length of the rows of x; InputError if a tile cannot hold them."""
    if not 1 <= x.shape[-1] <= LARGEST_WIDTH:
        raise InputError(
            f"x is {[*x.shape]}; the Triton LayerNorm takes rows of 1 to {LARGEST_WIDTH} elements"
        )
    return x.shape[-1]


def _statistics(rows: int, like: Tensor) -> list[Tensor]:
    return [torch.empty(rows, dtype=torch.float32, device=like.device) for _ in range(2)]


def _dropout_arguments(a: AddNorm) -> tuple[int, Tensor | None, int, float]:
    """Return (rows per factor of `row_scale`, seed, threshold, factor) of stochastic depth and dropout.

    Of 2^24 equally likely values, those below the threshold are dropped, the others scaled.
    """
    rows_per_scale = 1
    if a.row_scale is not None:
        rows_per_scale = max(1, a.x.numel() // (a.x.shape[-1] * max(1, a.x.shape[0])))
    seed = checks.seed_of(a.dropout_p, a.seed) if a.dropout_p else None
    keep_scale = 1 / (1 - a.dropout_p) if a.dropout_p < 1 else 0.0
    return rows_per_scale, seed, round(a.dropout_p * _DROPOUT_STEPS), keep_scale


def embedding_norm_forward(a: Embedding) -> tuple[Tensor, Tensor, Tensor]:
    """Return the LayerNorm of `word[tokens] + position[positions] + type_row`, and mean and rstd `[rows]` in fp32.

    An id outside its table makes its row NaN.
    """
    word, position, count = a.word, a.position, a.tokens.numel()
    width = width_of(word)
    normed = word.new_empty(*a.tokens.shape, width)
    mean, rstd = _statistics(count, word)
    options, config = launch_options(EMBED_FORWARD, word, width=width)
    if count:
        embedding_norm_forward_kernel[(triton.cdiv(count, config.tiles["ROWS"]),)](
            *_ids(a),
            word.contiguous(),
            position.contiguous(),
            dense(a.type_row),
            dense(a.weight),
            dense(a.bias),
            normed,
            mean,
            rstd,
            count,
            word.shape[0],
            position.shape[0],
            a.eps,
            **options,
        )
    return normed, mean, rstd


def embedding_norm_backward(
    dnormed: Tensor, mean: Tensor, rstd: Tensor, a: Embedding
) -> tuple[Tensor, ...]:
    """Compute the gradients of tables, type row and norm; zero in row `padding_idx` of both tables, as in RoBERTa."""
    word, position, weight = a.word, a.position, a.weight
    width, count = width_of(word), a.tokens.numel()
    upstream, ids = contiguous_rows(dnormed), _ids(a)
    ds = torch.empty(count, width, dtype=torch.float32, device=word.device)
    options, config = launch_options(EMBED_BACKWARD, word, width=width)
    programs = first_stage_programs(triton.cdiv(count, config.tiles["ROWS"]), word.device)
    partials = torch.empty(3, programs, width, dtype=torch.float32, device=word.device)
    embedding_norm_backward_kernel[(programs,)](
        upstream,
        *ids,
        word.contiguous(),
        position.contiguous(),
        dense(a.type_row),
        dense(weight),
        mean,
        rstd,
        ds,
        partials,
        upstream.stride(0),
        count,
        word.shape[0],
        position.shape[0],
        **options,
    )
    dweight, dbias, dtype_row = ordered_sum(partials, weight, weight, a.type_row)
    dword, dposition = (
        _table_gradient(entries, ds, table, a.padding_idx)
        for entries, table in zip(ids, (word, position), strict=True)
    )
    return dword, dposition, dtype_row, dweight, dbias


def _table_gradient(ids: Tensor, rows: Tensor, table: Tensor, padding_idx: int | None) -> Tensor:
    """Return the gradient of `table` `[V, M]`: rows `[T, M]` in fp32, summed in order into their ids' entries."""
    gradient = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
    count, width = rows.shape
    if count:
        ordered, order = torch.sort(ids.long(), stable=True)
        options, config = launch_options(SEGMENT_SUM, rows, width=width)
        segment_sum_kernel[(count, triton.cdiv(width, config.tiles["BLOCK_COLUMNS"]))](
            ordered,
            order,
            rows,
            gradient,
            count,
            table.shape[0],
            -1 if padding_idx is None else padding_idx,
            **options,
        )
    return gradient


def _ids(a: Embedding) -> tuple[Tensor, Tensor]:
    return a.tokens.reshape(-1).contiguous(), a.positions.reshape(-1).contiguous()


KERNELS = [FORWARD, FORWARD_FP8, BACKWARD, EMBED_FORWARD, EMBED_BACKWARD, SEGMENT_SUM]
