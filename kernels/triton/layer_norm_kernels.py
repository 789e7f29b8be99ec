"""The kernels behind `layer_norm` and `embed_layer_norm`: rows normalised, gradients and partial sums of parameters.

A tile is ROWS rows of BLOCK columns, the power of two that holds the WIDTH of a row. All arithmetic is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dropout_factors(seed_ptr, rows, drop_below, keep_scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
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
def add_layer_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    row_scale_ptr,
    seed_ptr,
    normed_ptr,
    summed_ptr,
    mean_ptr,
    rstd_ptr,
    stride_x,
    stride_residual,
    count,
    rows_per_scale,
    eps,
    drop_below,
    keep_scale,
    WIDTH: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program for ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there = rows < count
    inside = there[:, None] & (columns < WIDTH)[None, :]
    far = rows.to(tl.int64)[:, None]
    values = tl.load(x_ptr + far * stride_x + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        values *= dropout_factors(seed_ptr, rows, drop_below, keep_scale, WIDTH, BLOCK)
    if gamma_ptr is not None:
        values *= tl.load(gamma_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    if row_scale_ptr is not None:
        values *= tl.load(row_scale_ptr + rows // rows_per_scale, mask=there, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        addresses = residual_ptr + far * stride_residual + columns[None, :]
        values += tl.load(addresses, mask=inside, other=0.0).to(tl.float32)
    out = far * WIDTH + columns[None, :]
    if summed_ptr is not None:
        summed = values.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + out, summed, mask=inside)
        # The backward sees the sum as it was stored, so the statistics are those of the stored sum.
        values = summed.to(tl.float32)
    centred, mean, rstd = normalise(values, inside, eps, WIDTH)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(normed_ptr + out, normed, mask=inside)
    tl.store(mean_ptr + rows, mean, mask=there)
    tl.store(rstd_ptr + rows, rstd, mask=there)


@triton.jit
def add_layer_norm_backward_kernel(
    dnormed_ptr,
    dsummed_ptr,
    summed_ptr,
    x_ptr,
    weight_ptr,
    gamma_ptr,
    row_scale_ptr,
    seed_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    partials_ptr,
    stride_dnormed,
    stride_dsummed,
    stride_x,
    count,
    rows_per_scale,
    drop_below,
    keep_scale,
    WIDTH: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
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
        dnormed = tl.load(dnormed_ptr + far * stride_dnormed + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        summed = tl.load(summed_ptr + dense, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=there, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=there, other=0.0)
        normalised = tl.where(inside, (summed - mean[:, None]) * rstd[:, None], 0.0)
        dweight += tl.sum(dnormed * normalised, 0)
        dbias += tl.sum(dnormed, 0)
        if BLOCK > 4096:
            # Wide rows leave no registers to hold the weight; it comes from the nearest cache.
            weight = tl.load(weight_ptr + columns, mask=across, other=0.0).to(tl.float32)[None, :]
        ds = normalise_backward(dnormed, normalised, weight, rstd, WIDTH)
        if dsummed_ptr is not None:
            addresses = dsummed_ptr + far * stride_dsummed + columns[None, :]
            ds += tl.load(addresses, mask=inside, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + dense, ds, mask=inside)
        if dx_ptr is not None:
            if row_scale_ptr is not None:
                ds *= tl.load(row_scale_ptr + rows // rows_per_scale, mask=there, other=0.0).to(tl.float32)[:, None]
            if HAS_DROPOUT:
                ds *= dropout_factors(seed_ptr, rows, drop_below, keep_scale, WIDTH, BLOCK)
            if gamma_ptr is not None:
                # γ stands behind dropout, but factors commute: what is dropped counts neither here nor there.
                x = tl.load(x_ptr + far * stride_x + columns[None, :], mask=inside, other=0.0).to(tl.float32)
                dgamma += tl.sum(ds * x, 0)
                ds *= tl.load(gamma_ptr + columns, mask=across, other=0.0).to(tl.float32)[None, :]
            tl.store(dx_ptr + dense, ds, mask=inside)
    place = partials_ptr + program * WIDTH + columns
    tl.store(place, dweight, mask=across)
    tl.store(place + programs * WIDTH, dbias, mask=across)
    if gamma_ptr is not None:
        tl.store(place + 2 * programs * WIDTH, dgamma, mask=across)
