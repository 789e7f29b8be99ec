"""Row-wise kernels of a layer: residual, LayerScale, DropPath and dropout, or embeddings, with their LayerNorm; GELU.

One pass forward, one pass backward. Statistics are fp32 in every precision. The backward goes over the rows once: every
program takes each n-th step of a few rows, keeps the gradients of the parameters in registers and leaves them as
partial sums, which `ordered_sum` adds in a fixed order. What dropout zeroes follows from (seed, row, column), so it is
computed twice and stored never.

The sum of the embeddings is not stored either: the backward gathers it again. The gradients of the tables are summed in
the order of the sorted tokens by one program for each entry, so equal inputs give equal bits without atomics.
"""

# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
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
    ordered_sum,
    room_for,
    round_rows,
    row_spec,
    row_wise,
    scales_of,
)

_DROPOUT_STEPS = 1 << 24


@triton.jit
def dropout_factors(
    seed_ptr, rows, drop_below, keep_scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """`[ROWS, BLOCK]` factors 0 or 1/(1-p) for whole rows: Philox of (seed, row, column), four columns a call."""
    quads: tl.constexpr = (WIDTH + 3) // 4
    offsets = rows.to(tl.int64)[:, None] * quads + tl.arange(0, BLOCK // 4)[None, :]
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed_ptr), offsets)
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(rows.shape[0], BLOCK)
    return tl.where((bits.to(tl.uint32) >> 8).to(tl.int32) >= drop_below, keep_scale, 0.0)


@triton.jit
def normalise(values, inside, eps, WIDTH: tl.constexpr):
    """Differences to the mean (zero outside), mean and 1/deviation of rows; values outside must be zero."""
    mean = tl.sum(values, 1) / WIDTH
    centred = tl.where(inside, values - mean[:, None], 0.0)
    return centred, mean, tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)


@triton.jit
def normalise_backward(dnormed, normalised, weight, rstd, WIDTH: tl.constexpr):
    """Gradient of the normalised rows' input; everything is zero outside."""
    scaled = dnormed * weight
    along = tl.sum(scaled * normalised, 1) / WIDTH
    mean = tl.sum(scaled, 1) / WIDTH
    return (scaled - normalised * along[:, None] - mean[:, None]) * rstd[:, None]


@triton.jit
def store_norm(
    values, rows, columns, there, inside, weight_ptr, bias_ptr, normed_ptr, mean_ptr, rstd_ptr, eps,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the LayerNorm of rows, their mean and 1/deviation; returns the norm in fp32."""
    centred, mean, rstd = normalise(values, inside, eps, WIDTH)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[
            None, :
        ]
    tl.store(
        normed_ptr + (rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]), normed, mask=inside
    )
    tl.store(mean_ptr + rows, mean, mask=there)
    tl.store(rstd_ptr + rows, rstd, mask=there)
    return normed


@triton.jit
def backward_step(
    values, dnormed, weight, weight_ptr, mean_ptr, rstd_ptr, rows, columns, there, inside,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows that were normalised, and of the norm's weight and bias."""
    mean = tl.load(mean_ptr + rows, mask=there, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=there, other=0.0)
    normalised = tl.where(inside, (values - mean[:, None]) * rstd[:, None], 0.0)
    if BLOCK > 4096:
        # Wide rows leave no registers to hold the weight; it comes from the nearest cache.
        weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[
            None, :
        ]
    ds = normalise_backward(dnormed, normalised, weight, rstd, WIDTH)
    return ds, tl.sum(dnormed * normalised, 0), tl.sum(dnormed, 0)


@triton.jit
def embedding_sum(
    tokens_ptr, positions_ptr, word_ptr, position_ptr, type_ptr, rows, columns, there, across,
    words, places, WIDTH: tl.constexpr,
):  # fmt: skip
    """`[ROWS, BLOCK]` sums of embeddings, zero outside the tile; NaN for an id outside its table."""
    token = tl.load(tokens_ptr + rows, mask=there, other=0).to(tl.int64)
    place = tl.load(positions_ptr + rows, mask=there, other=0).to(tl.int64)
    known = (token >= 0) & (token < words) & (place >= 0) & (place < places)
    inside = (there & known)[:, None] & across[None, :]
    total = tl.load(
        word_ptr + token[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    total += tl.load(
        position_ptr + place[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    row = tl.load(type_ptr + columns, mask=across, other=0.0).to(tl.float32)
    total = tl.where(there[:, None], total + row[None, :], 0.0)
    return tl.where((there & ~known)[:, None] & across[None, :], float("nan"), total)


@triton.jit(do_not_specialize=["count", "rows_per_scale", "drop_below"])
def add_layer_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, gamma_ptr, row_scale_ptr, seed_ptr,
    normed_ptr, summed_ptr, mean_ptr, rstd_ptr, rounded_ptr, scales_ptr,
    stride_x, stride_residual, count, rows_per_scale, eps, drop_below, keep_scale,
    WIDTH: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS rows, which are rounded to fp8 too where there is room for that."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there = rows < count
    inside = there[:, None] & (columns < WIDTH)[None, :]
    far = rows.to(tl.int64)[:, None]
    values = tl.load(x_ptr + far * stride_x + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    if HAS_DROPOUT:
        values *= dropout_factors(seed_ptr, rows, drop_below, keep_scale, WIDTH, BLOCK)
    if gamma_ptr is not None:
        values *= tl.load(gamma_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[
            None, :
        ]
    if row_scale_ptr is not None:
        values *= tl.load(row_scale_ptr + rows // rows_per_scale, mask=there, other=0.0).to(
            tl.float32
        )[:, None]
    if residual_ptr is not None:
        addresses = residual_ptr + far * stride_residual + columns[None, :]
        values += tl.load(addresses, mask=inside, other=0.0).to(tl.float32)
    out = far * WIDTH + columns[None, :]
    if summed_ptr is not None:
        summed = values.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + out, summed, mask=inside)
        # The backward sees the sum as it was stored, so the statistics are those of the stored sum.
        values = summed.to(tl.float32)
    normed = store_norm(
        values,
        rows,
        columns,
        there,
        inside,
        weight_ptr,
        bias_ptr,
        normed_ptr,
        mean_ptr,
        rstd_ptr,
        eps,
        WIDTH,
    )
    if rounded_ptr is not None:
        # As a product would read them: of the type that they are stored in.
        rounded, scales = round_rows(
            tl.where(inside, normed.to(normed_ptr.dtype.element_ty).to(tl.float32), 0.0)
        )
        tl.store(rounded_ptr + out, rounded, mask=inside)
        tl.store(scales_ptr + rows, scales, mask=there)


@triton.jit(do_not_specialize=["count", "words", "places"])
def embedding_norm_forward_kernel(
    tokens_ptr, positions_ptr, word_ptr, position_ptr, type_ptr, weight_ptr, bias_ptr, normed_ptr, mean_ptr, rstd_ptr,
    count, words, places, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS tokens."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there, across = rows < count, columns < WIDTH
    values = embedding_sum(
        tokens_ptr,
        positions_ptr,
        word_ptr,
        position_ptr,
        type_ptr,
        rows,
        columns,
        there,
        across,
        words,
        places,
        WIDTH,
    )
    inside = there[:, None] & across[None, :]
    store_norm(
        values,
        rows,
        columns,
        there,
        inside,
        weight_ptr,
        bias_ptr,
        normed_ptr,
        mean_ptr,
        rstd_ptr,
        eps,
        WIDTH,
    )


@triton.jit(do_not_specialize=["count", "rows_per_scale", "drop_below"])
def add_layer_norm_backward_kernel(
    dnormed_ptr, dsummed_ptr, sums_ptr, branch_ptr, weight_ptr, gamma_ptr, row_scale_ptr, seed_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, partials_ptr,
    stride_dnormed, stride_dsummed, stride_branch, count, rows_per_scale, drop_below, keep_scale,
    WIDTH: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program p takes the steps p, p + programs, ... of ROWS rows; partials are `[2 or 3, programs, WIDTH]`."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    across = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=across, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    dgamma = tl.zeros([BLOCK], tl.float32)
    for step in range(program, tl.cdiv(count, ROWS), programs):
        rows = step * ROWS + tl.arange(0, ROWS)
        there = rows < count
        inside = there[:, None] & across[None, :]
        far = rows.to(tl.int64)[:, None]
        dense = far * WIDTH + columns[None, :]
        dnormed = tl.load(
            dnormed_ptr + far * stride_dnormed + columns[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        summed = tl.load(sums_ptr + dense, mask=inside, other=0.0).to(tl.float32)
        ds, of_weight, of_bias = backward_step(
            summed,
            dnormed,
            weight,
            weight_ptr,
            mean_ptr,
            rstd_ptr,
            rows,
            columns,
            there,
            inside,
            WIDTH,
            BLOCK,
        )
        dweight += of_weight
        dbias += of_bias
        if dsummed_ptr is not None:
            addresses = dsummed_ptr + far * stride_dsummed + columns[None, :]
            ds += tl.load(addresses, mask=inside, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + dense, ds, mask=inside)
        if dx_ptr is not None:
            if row_scale_ptr is not None:
                ds *= tl.load(row_scale_ptr + rows // rows_per_scale, mask=there, other=0.0).to(
                    tl.float32
                )[:, None]
            if HAS_DROPOUT:
                ds *= dropout_factors(seed_ptr, rows, drop_below, keep_scale, WIDTH, BLOCK)
            if gamma_ptr is not None:
                # γ stands behind dropout, but factors commute: what is dropped counts neither here nor there.
                x = tl.load(
                    branch_ptr + far * stride_branch + columns[None, :], mask=inside, other=0.0
                ).to(tl.float32)
                dgamma += tl.sum(ds * x, 0)
                ds *= tl.load(gamma_ptr + columns, mask=across, other=0.0).to(tl.float32)[None, :]
            tl.store(dx_ptr + dense, ds, mask=inside)
    place = partials_ptr + program * WIDTH + columns
    tl.store(place, dweight, mask=across)
    tl.store(place + programs * WIDTH, dbias, mask=across)
    if gamma_ptr is not None:
        tl.store(place + 2 * programs * WIDTH, dgamma, mask=across)


@triton.jit(do_not_specialize=["count", "words", "places"])
def embedding_norm_backward_kernel(
    dnormed_ptr, tokens_ptr, positions_ptr, word_ptr, position_ptr, type_ptr, weight_ptr, mean_ptr, rstd_ptr,
    ds_ptr, partials_ptr, stride_dnormed, count, words, places,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of the sum of embeddings, fp32; partials of (weight, bias, type row) are `[3, programs, WIDTH]`."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    across = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=across, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    dtype_row = tl.zeros([BLOCK], tl.float32)
    for step in range(program, tl.cdiv(count, ROWS), programs):
        rows = step * ROWS + tl.arange(0, ROWS)
        there = rows < count
        inside = there[:, None] & across[None, :]
        far = rows.to(tl.int64)[:, None]
        dnormed = tl.load(
            dnormed_ptr + far * stride_dnormed + columns[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        values = embedding_sum(
            tokens_ptr, positions_ptr, word_ptr, position_ptr, type_ptr, rows, columns, there, across, words, places,
            WIDTH,
        )  # fmt: skip
        ds, of_weight, of_bias = backward_step(
            values,
            dnormed,
            weight,
            weight_ptr,
            mean_ptr,
            rstd_ptr,
            rows,
            columns,
            there,
            inside,
            WIDTH,
            BLOCK,
        )
        tl.store(ds_ptr + far * WIDTH + columns[None, :], ds, mask=inside)
        dweight += of_weight
        dbias += of_bias
        dtype_row += tl.sum(ds, 0)
    place = partials_ptr + program * WIDTH + columns
    tl.store(place, dweight, mask=across)
    tl.store(place + programs * WIDTH, dbias, mask=across)
    tl.store(place + 2 * programs * WIDTH, dtype_row, mask=across)


@triton.jit(do_not_specialize=["count", "entries", "skipped"])
def segment_sum_kernel(
    ids_ptr, order_ptr, rows_ptr, table_ptr, count, entries, skipped,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The program at the first of a run of equal sorted ids adds the rows of the run; all other programs are done."""
    first = tl.program_id(0)
    entry = tl.load(ids_ptr + first)
    before = tl.load(ids_ptr + tl.maximum(first - 1, 0))
    if ((first == 0) | (before != entry)) & (entry != skipped) & (entry >= 0) & (entry < entries):
        columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        across = columns < WIDTH
        steps = tl.arange(0, BLOCK_ROWS)
        sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        start = first
        members = BLOCK_ROWS
        while members == BLOCK_ROWS:
            there = start + steps < count
            there = there & (tl.load(ids_ptr + start + steps, mask=there, other=-1) == entry)
            source = tl.load(order_ptr + start + steps, mask=there, other=0)
            addresses = rows_ptr + source[:, None] * WIDTH + columns[None, :]
            sums += tl.load(addresses, mask=there[:, None] & across[None, :], other=0.0)
            members = tl.sum(there.to(tl.int32), 0)
            start += BLOCK_ROWS
        tl.store(table_ptr + entry * WIDTH + columns, tl.sum(sums, 0), mask=across)


def forward_config(width: int) -> LaunchConfig:
    """One row a program, 16 elements a thread."""
    block = max(16, triton.next_power_of_2(width))
    return LaunchConfig(
        {"BLOCK": block, "ROWS": 1}, num_warps=min(16, max(1, block // 512)), num_stages=1
    )


def backward_config(width: int) -> LaunchConfig:
    """Several rows a step while they are short: their loads are under way together."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, min(4, 2048 // block))
    # Wide rows need more threads, for their sums to stay in registers.
    warps = max(1, rows * block // (512 if block <= 2048 else 256))
    return LaunchConfig({"BLOCK": block, "ROWS": rows}, warps, num_stages=1)


# Pointers that are absent where a variant lacks a feature.
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
    """`summed = residual + row_scale · gamma · dropout(x)` and its LayerNorm.

    `normed` has the dtype of x, or with `wide` of the sum; `rounded` is memory from `rows.room_for`, for `normed` in
    fp8. `summed` is x itself without a residual, factor or dropout.
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
    scales_per_row, seed, drop_below, keep_scale = _chance(a)
    if rows.shape[0]:
        add_layer_norm_forward_kernel[(triton.cdiv(rows.shape[0], config.tiles["ROWS"]),)](
            rows, added, dense(a.weight), dense(a.bias), dense(gamma), dense(row_scale), seed,
            normed, None if plain else summed, mean, rstd, *(rounded or (None, None)),
            rows.stride(0), 0 if added is None else added.stride(0), rows.shape[0], scales_per_row,
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
    """Gradients of every floating-point input; `dsummed` None means zero."""
    x, weight, gamma, row_scale = a.x, a.weight, a.gamma, a.row_scale
    width, rows, sums = width_of(x), contiguous_rows(x), contiguous_rows(summed).contiguous()
    upstream, skipped = (
        contiguous_rows(dnormed),
        None if dsummed is None else contiguous_rows(dsummed),
    )
    scaled = gamma is not None or row_scale is not None or a.dropout_p > 0
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    apart = has_residual and (scaled or x.dtype != summed.dtype)
    dresidual = torch.empty(x.shape, dtype=summed.dtype, device=x.device) if apart else None
    options, config = launch_options(BACKWARD, x, width=width, dropout=a.dropout_p > 0)
    programs = first_stage_programs(triton.cdiv(rows.shape[0], config.tiles["ROWS"]), x.device)
    likes = [weight, weight] if gamma is None else [weight, weight, gamma]
    partials = torch.empty(len(likes), programs, width, dtype=torch.float32, device=x.device)
    scales_per_row, seed, drop_below, keep_scale = _chance(a)
    add_layer_norm_backward_kernel[(programs,)](
        upstream, skipped, sums, rows if gamma is not None else None, dense(weight), dense(gamma), dense(row_scale),
        seed, mean, rstd, dx, dresidual, partials,
        upstream.stride(0), 0 if skipped is None else skipped.stride(0), rows.stride(0), rows.shape[0],
        scales_per_row, drop_below, keep_scale, **options,
    )  # fmt: skip
    dweight, dbias, *rest = ordered_sum(partials, *likes)
    dgamma = rest[0] if rest else None
    return AddLayerNormGradients(dx, dx if dresidual is None else dresidual, dweight, dbias, dgamma)


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension of `[..., M]`: normed, and mean and rstd `[rows]` fp32."""
    normed, _, mean, rstd = add_layer_norm_forward(AddNorm(x, None, weight, bias, eps))
    return normed, mean, rstd


def layer_norm_backward(
    dnormed: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias)."""
    given = AddNorm(x, None, weight, None, 0.0)
    dx, _, dweight, dbias, _ = add_layer_norm_backward(
        dnormed, None, x, mean, rstd, given, has_residual=False
    )
    return dx, dweight, dbias


def width_of(x: Tensor) -> int:
    """Length of the rows of x, if a tile can hold them."""
    if not 1 <= x.shape[-1] <= LARGEST_WIDTH:
        raise InputError(
            f"x is {[*x.shape]}; the Triton LayerNorm takes rows of 1 to {LARGEST_WIDTH} elements"
        )
    return x.shape[-1]


def _statistics(rows: int, like: Tensor) -> list[Tensor]:
    return [torch.empty(rows, dtype=torch.float32, device=like.device) for _ in range(2)]


def _chance(a: AddNorm) -> tuple[int, Tensor | None, int, float]:
    """(rows per factor of `row_scale`, seed, threshold, factor) of stochastic depth and dropout.

    Of 2^24 equally likely values, values below the threshold are dropped, others scaled.
    """
    rows = (
        1 if a.row_scale is None else max(1, a.x.numel() // (a.x.shape[-1] * max(1, a.x.shape[0])))
    )
    seed = checks.seed_of(a.dropout_p, a.seed) if a.dropout_p else None
    return (
        rows,
        seed,
        round(a.dropout_p * _DROPOUT_STEPS),
        1 / (1 - a.dropout_p) if a.dropout_p < 1 else 0.0,
    )


def embedding_norm_forward(a: Embedding) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm `[..., M]` of `word[tokens] + position[positions] + type_row`, and mean and rstd `[rows]` in fp32.

    An id outside its table makes its row NaN.
    """
    word, position, count = a.word, a.position, a.tokens.numel()
    width = width_of(word)
    normed = word.new_empty(*a.tokens.shape, width)
    mean, rstd = _statistics(count, word)
    options, config = launch_options(EMBED_FORWARD, word, width=width)
    if count:
        embedding_norm_forward_kernel[(triton.cdiv(count, config.tiles["ROWS"]),)](
            *_ids(a), word.contiguous(), position.contiguous(), dense(a.type_row), dense(a.weight), dense(a.bias),
            normed, mean, rstd, count, word.shape[0], position.shape[0], a.eps, **options,
        )  # fmt: skip
    return normed, mean, rstd


def embedding_norm_backward(
    dnormed: Tensor, mean: Tensor, rstd: Tensor, a: Embedding
) -> tuple[Tensor, ...]:
    """Gradients of tables, type row and norm; zero in row `padding_idx` of both tables, as in RoBERTa."""
    word, position, weight = a.word, a.position, a.weight
    width, count = width_of(word), a.tokens.numel()
    upstream, ids = contiguous_rows(dnormed), _ids(a)
    ds = torch.empty(count, width, dtype=torch.float32, device=word.device)
    options, config = launch_options(EMBED_BACKWARD, word, width=width)
    programs = first_stage_programs(triton.cdiv(count, config.tiles["ROWS"]), word.device)
    partials = torch.empty(3, programs, width, dtype=torch.float32, device=word.device)
    embedding_norm_backward_kernel[(programs,)](
        upstream, *ids, word.contiguous(), position.contiguous(), dense(a.type_row), dense(weight), mean, rstd,
        ds, partials, upstream.stride(0), count, word.shape[0], position.shape[0], **options,
    )  # fmt: skip
    dweight, dbias, dtype_row = ordered_sum(partials, weight, weight, a.type_row)
    dword, dposition = (
        _table_gradient(entries, ds, table, a.padding_idx)
        for entries, table in zip(ids, (word, position), strict=True)
    )
    return dword, dposition, dtype_row, dweight, dbias


def _table_gradient(ids: Tensor, rows: Tensor, table: Tensor, padding_idx: int | None) -> Tensor:
    """The gradient of `table` `[V, M]`: every row `[T, M]` fp32 added to the entry of its id `[T]`, in their order."""
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


# GELU (erf form) with the bias of the layer before it. The GEMM leaves the pre-activation without its bias, which the
# backward needs: bias and activation are added again while the gradient passes through.

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_HALF_OVER_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def activated(y, bias_ptr, out, columns, inside, WIDTH: tl.constexpr):
    """A piece of rows, stored; as it was stored, in fp32, zeros outside."""
    z = tl.load(y + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    gelu = (0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF))).to(out.dtype.element_ty)
    tl.store(out + columns[None, :], gelu, mask=inside)
    return tl.where(inside, gelu.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["count"])
def bias_gelu_forward_kernel(
    y_ptr,
    bias_ptr,
    out_ptr,
    stride_y,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program for ROWS rows and BLOCK columns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    far = rows.to(tl.int64)[:, None]
    activated(y_ptr + far * stride_y, bias_ptr, out_ptr + far * WIDTH, columns, inside, WIDTH)


@triton.jit(do_not_specialize=["count"])
def bias_gelu_quantise_kernel(
    y_ptr, bias_ptr, out_ptr, rounded_ptr, scales_ptr, stride_y, count,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program for a whole row, which the next product reads in fp8, in two pieces: 3072 = 2048 + 1024."""
    row = tl.program_id(0) + tl.arange(0, 1)
    there = (row < count)[:, None]
    far = row.to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)
    inside = there & (columns < WIDTH)[None, :]
    a = activated(y_ptr + far * stride_y, bias_ptr, out_ptr + far * WIDTH, columns, inside, WIDTH)
    largest = tl.max(tl.abs(a), 1)
    if REST > 0:
        others = BLOCK + tl.arange(0, REST)
        left = there & (others < WIDTH)[None, :]
        b = activated(y_ptr + far * stride_y, bias_ptr, out_ptr + far * WIDTH, others, left, WIDTH)
        largest = tl.maximum(largest, tl.max(tl.abs(b), 1))
    factors, scales = scales_of(largest)
    place = rounded_ptr + far * WIDTH
    tl.store(place + columns[None, :], (a * factors[:, None]).to(tl.float8e4nv), mask=inside)
    if REST > 0:
        tl.store(place + others[None, :], (b * factors[:, None]).to(tl.float8e4nv), mask=left)  # pyright: ignore[reportPossiblyUnboundVariable]
    tl.store(scales_ptr + row, scales, mask=row < count)


@triton.jit(do_not_specialize=["count"])
def bias_gelu_backward_kernel(
    dout_ptr, y_ptr, bias_ptr, dy_ptr, partials_ptr, stride_dout, stride_y, count,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (p, c) takes the steps p, p + programs, ... of ROWS rows, in BLOCK columns.

    Partials are `[programs, WIDTH]`.
    """
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    across = columns < WIDTH
    dbias = tl.zeros([BLOCK], tl.float32)
    bias = tl.zeros([1, BLOCK], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=across, other=0.0).to(tl.float32)[None, :]
    for step in range(program, tl.cdiv(count, ROWS), tl.num_programs(0)):
        rows = step * ROWS + tl.arange(0, ROWS)
        inside = (rows < count)[:, None] & across[None, :]
        far = rows.to(tl.int64)[:, None]
        z = tl.load(y_ptr + far * stride_y + columns[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        dout = tl.load(dout_ptr + far * stride_dout + columns[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        z += bias
        below = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
        dy = dout * (below + z * tl.exp(-0.5 * z * z) * _SQRT_HALF_OVER_PI)
        tl.store(dy_ptr + far * WIDTH + columns[None, :], dy, mask=inside)
        if bias_ptr is not None:
            dbias += tl.sum(dy, 0)
    if bias_ptr is not None:
        tl.store(partials_ptr + program * WIDTH + columns, dbias, mask=across)


def _fitted(block: int, rows: int) -> Callable[[int], LaunchConfig]:
    """Tiles of these sizes; narrow layers take no wider a tile than they fill."""

    def config(width: int) -> LaunchConfig:
        narrowed = min(block, max(16, triton.next_power_of_2(width)))
        return LaunchConfig({"BLOCK": narrowed, "ROWS": rows}, num_warps=4, num_stages=1)

    return config


def _in_pieces(width: int) -> LaunchConfig:
    """A row in two pieces that are powers of two, 8 elements a thread."""
    block = max(16, 1 << width.bit_length() - 1)
    rest = max(16, triton.next_power_of_2(width - block)) if width > block else 0
    return LaunchConfig(
        {"BLOCK": block, "REST": rest}, num_warps=min(16, max(1, block // 256)), num_stages=1
    )


_WIDTHS = ({"width": 768}, {"width": 3072})
GELU_FORWARD = row_spec("bias_gelu_forward", bias_gelu_forward_kernel, _WIDTHS, _fitted(1024, 2))
GELU_BACKWARD = row_spec("bias_gelu_backward", bias_gelu_backward_kernel, _WIDTHS, _fitted(512, 4))
GELU_QUANTISE = row_spec(
    "bias_gelu_quantise", bias_gelu_quantise_kernel, _WIDTHS[1:], _in_pieces, arches=ARCHES
)


def bias_gelu_forward(y: Tensor, bias: Tensor | None, *, overwrite: bool = False) -> Tensor:
    """`gelu(y + bias)`, erf form, for y `[..., N]`; `overwrite` writes over a contiguous y, if no backward needs it."""
    rows = contiguous_rows(y)
    count, width = rows.shape
    out = (
        y
        if overwrite and y.is_contiguous()
        else torch.empty(y.shape, dtype=y.dtype, device=y.device)
    )
    if rows.numel():
        options, config = launch_options(GELU_FORWARD, y, width=width)
        grid = triton.cdiv(count, config.tiles["ROWS"]), triton.cdiv(width, config.tiles["BLOCK"])
        bias_gelu_forward_kernel[grid](rows, dense(bias), out, rows.stride(0), count, **options)
    return out


def bias_gelu_quantise(y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`gelu(y + bias)`, which takes the place of a contiguous y, and its rows in fp8 with their scales."""
    rows = contiguous_rows(y)
    count, width = rows.shape
    out = y if y.is_contiguous() else torch.empty(y.shape, dtype=y.dtype, device=y.device)
    rounded, scales = room_for(rows)
    if rows.numel():
        options, _ = launch_options(GELU_QUANTISE, y, width=width)
        bias_gelu_quantise_kernel[(count,)](
            rows, dense(bias), out, rounded, scales, rows.stride(0), count, **options
        )
    return out, rounded, scales


def bias_gelu_backward(
    dout: Tensor, y: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(dy, dbias) from the gradient `[..., N]` of the result and the y of the forward."""
    rows, upstream = contiguous_rows(y), contiguous_rows(dout)
    count, width = rows.shape
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    options, config = launch_options(GELU_BACKWARD, y, width=width)
    programs = first_stage_programs(triton.cdiv(count, config.tiles["ROWS"]), y.device)
    partials = (
        None
        if bias is None
        else torch.empty(1, programs, width, dtype=torch.float32, device=y.device)
    )
    bias_gelu_backward_kernel[(programs, triton.cdiv(width, config.tiles["BLOCK"]))](
        upstream,
        rows,
        dense(bias),
        dy,
        partials,
        upstream.stride(0),
        rows.stride(0),
        count,
        **options,
    )
    return dy, None if bias is None or partials is None else ordered_sum(partials, bias)[0]


def linear_gelu_forward(
    x: Tensor, w: Tensor, b: Tensor | None, *, keep: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`gelu(x w^T + b)` and, to `keep` for the backward, `x w^T`. x `[..., K]`, w `[N, K]`, b `[N]` → `[..., N]`."""
    y = torch.matmul(x, w.t())
    return bias_gelu_forward(y, b, overwrite=not keep), y if keep else None


def linear_gelu_backward(
    dout: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    y: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db), as selected by `needs`; y is the saved tensor of the forward."""
    dy, db = bias_gelu_backward(dout, y, b)
    dx = torch.matmul(dy, w) if needs[0] else None
    dw = torch.mm(contiguous_rows(dy).t(), x.reshape(-1, x.shape[-1])) if needs[1] else None
    return dx, dw, db if needs[2] else None


KERNELS = [
    FORWARD, FORWARD_FP8, BACKWARD, EMBED_FORWARD, EMBED_BACKWARD, SEGMENT_SUM,
    GELU_FORWARD, GELU_BACKWARD, GELU_QUANTISE,
]  # fmt: skip
