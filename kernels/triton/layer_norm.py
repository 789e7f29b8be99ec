"""Residual, LayerScale, DropPath and dropout with the LayerNorm behind them: one pass forward, one pass backward.

Statistics are fp32 in every precision. The backward goes over the rows once: every program takes each n-th step of a
few rows, keeps the gradients of the parameters in registers and leaves them as partial sums, which `ordered_sum` adds
in a fixed order. What dropout zeroes follows from (seed, row, column), so it is computed twice and stored never.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xfm_fast.errors import InputError

from .. import checks
from ..checks import AddNorm
from ..cpu.norms import AddLayerNorm, AddLayerNormGradients
from ..limits import LARGEST_WIDTH
from .fp8 import ARCHES, round_rows, row_wise
from .launch import KernelSpec, LaunchConfig, row_config, tuned_config
from .rows import contiguous_rows, dense, first_stage_programs, launch_options, ordered_sum

_DROPOUT_STEPS = 1 << 24


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


@triton.jit(do_not_specialize=["count", "rows_per_scale", "drop_below"])
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
    rounded_ptr,
    scales_ptr,
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
    """One program for ROWS rows, which are rounded to fp8 too where there is room for that."""
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
    if rounded_ptr is not None:
        # As a product would read them: of the type that they are stored in.
        rounded, scales = round_rows(tl.where(inside, normed.to(normed_ptr.dtype.element_ty).to(tl.float32), 0.0))
        tl.store(rounded_ptr + out, rounded, mask=inside)
        tl.store(scales_ptr + rows, scales, mask=there)


@triton.jit(do_not_specialize=["count", "rows_per_scale", "drop_below"])
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


def forward_config(width: int) -> LaunchConfig:
    """One row a program, 16 elements a thread."""
    block = max(16, triton.next_power_of_2(width))
    return LaunchConfig({"BLOCK": block, "ROWS": 1}, num_warps=min(16, max(1, block // 512)), num_stages=1)


def backward_config(width: int) -> LaunchConfig:
    """Several rows a step while they are short: their loads are under way together."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, min(4, 2048 // block))
    # Wide rows need more threads, for their sums to stay in registers.
    warps = max(1, rows * block // (512 if block <= 2048 else 256))
    return LaunchConfig({"BLOCK": block, "ROWS": rows}, warps, num_stages=1)


def add_layer_norm_forward(a: AddNorm, *, rounded: tuple[Tensor, Tensor] | None = None) -> AddLayerNorm:
    """`summed = residual + row_scale · gamma · dropout(x)` and its LayerNorm.

    `normed` has the dtype of x, or with `wide` of the sum; `rounded` is memory from `fp8.room_for` for `normed` in fp8.
    `summed` is x itself without a residual, factor or dropout.
    """
    x, residual, gamma, row_scale = a.x, a.residual, a.gamma, a.row_scale
    width, rows = width_of(x), contiguous_rows(x)
    plain = residual is None and gamma is None and row_scale is None and not a.dropout_p
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed = torch.empty(x.shape, dtype=dtype if a.wide else x.dtype, device=x.device)
    summed = x if plain else torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(rows.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    added = None if residual is None else contiguous_rows(residual)
    config = row_config("add_layer_norm_forward", x, forward_config(width)) if rounded is None else row_wise(width)
    drop_below, keep_scale = _dropout(a.dropout_p, a.seed)
    if rows.shape[0]:
        add_layer_norm_forward_kernel[(triton.cdiv(rows.shape[0], config.tiles["ROWS"]),)](
            rows,
            added,
            dense(a.weight),
            dense(a.bias),
            dense(gamma),
            dense(row_scale),
            a.seed if a.dropout_p else None,
            normed,
            None if plain else summed,
            mean,
            rstd,
            *(rounded or (None, None)),
            rows.stride(0),
            0 if added is None else added.stride(0),
            rows.shape[0],
            _rows_per_scale(x, row_scale),
            a.eps,
            drop_below,
            keep_scale,
            **launch_options(config, WIDTH=width, HAS_DROPOUT=a.dropout_p > 0),
        )
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
    upstream, skipped = contiguous_rows(dnormed), None if dsummed is None else contiguous_rows(dsummed)
    scaled = gamma is not None or row_scale is not None or a.dropout_p > 0
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    apart = has_residual and (scaled or x.dtype != summed.dtype)
    dresidual = torch.empty(x.shape, dtype=summed.dtype, device=x.device) if apart else None
    config = row_config("add_layer_norm_backward", x, backward_config(width))
    programs = first_stage_programs(triton.cdiv(rows.shape[0], config.tiles["ROWS"]), x.device)
    outputs = 2 if gamma is None else 3
    partials = torch.empty(outputs, programs, width, dtype=torch.float32, device=x.device)
    drop_below, keep_scale = _dropout(a.dropout_p, a.seed)
    add_layer_norm_backward_kernel[(programs,)](
        upstream,
        skipped,
        sums,
        rows if gamma is not None else None,
        dense(weight),
        dense(gamma),
        dense(row_scale),
        a.seed if a.dropout_p else None,
        mean,
        rstd,
        dx,
        dresidual,
        partials,
        upstream.stride(0),
        0 if skipped is None else skipped.stride(0),
        rows.stride(0),
        rows.shape[0],
        _rows_per_scale(x, row_scale),
        drop_below,
        keep_scale,
        **launch_options(config, WIDTH=width, HAS_DROPOUT=a.dropout_p > 0),
    )
    likes = [weight, weight] if gamma is None else [weight, weight, gamma]
    dweight, dbias, *rest = ordered_sum(partials, *likes)
    dgamma = rest[0] if rest else None
    return AddLayerNormGradients(dx, dx if dresidual is None else dresidual, dweight, dbias, dgamma)


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension of `[..., M]`: normed, and mean and rstd `[rows]` fp32."""
    normed, _, mean, rstd = add_layer_norm_forward(AddNorm(x, None, weight, bias, eps))
    return normed, mean, rstd


def layer_norm_backward(
    dnormed: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias)."""
    given = AddNorm(x, None, weight, None, 0.0)
    dx, _, dweight, dbias, _ = add_layer_norm_backward(dnormed, None, x, mean, rstd, given, has_residual=False)
    return dx, dweight, dbias


def width_of(x: Tensor) -> int:
    """Length of the rows of x, if a tile can hold them."""
    if not 1 <= x.shape[-1] <= LARGEST_WIDTH:
        raise InputError(f"x is {[*x.shape]}; the Triton LayerNorm takes rows of 1 to {LARGEST_WIDTH} elements")
    return x.shape[-1]


def _rows_per_scale(x: Tensor, row_scale: Tensor | None) -> int:
    return 1 if row_scale is None else max(1, x.numel() // (x.shape[-1] * max(1, x.shape[0])))


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[int, float]:
    """(threshold, factor): of 2^24 equally likely values, values below the threshold are dropped, others scaled."""
    if dropout_p:
        checks.seed_of(dropout_p, seed)
    return round(dropout_p * _DROPOUT_STEPS), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _variant_constants(variant: Any, absent: tuple[str, ...], config: LaunchConfig) -> dict[str, Any]:
    return {
        **dict.fromkeys(absent),
        "WIDTH": variant["width"],
        "HAS_DROPOUT": variant["dropout"],
        **config.tiles,
    }


def _absent(variant: Any) -> tuple[str, ...]:
    names = [] if variant["gamma"] else ["gamma_ptr", "row_scale_ptr"]
    return (*names, *([] if variant["dropout"] else ["seed_ptr"]))


def _forward_absent(variant: Any) -> tuple[str, ...]:
    plain = () if variant["residual"] else ("residual_ptr", "summed_ptr")
    return (*_absent(variant), *plain, *(() if variant.get("fp8") else ("rounded_ptr", "scales_ptr")))


def _forward_types(variant: Any, dtype: str) -> dict[str, str]:
    absent = _forward_absent(variant)
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "normed_ptr", "summed_ptr"), f"*{dtype}")
    pointers |= dict.fromkeys(("weight_ptr", "bias_ptr", "gamma_ptr", "row_scale_ptr"), f"*{dtype}")
    pointers |= {"seed_ptr": "*i64", "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    pointers |= {"rounded_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
    scalars = dict.fromkeys(("stride_x", "stride_residual", "count", "rows_per_scale", "drop_below"), "i32")
    return {k: v for k, v in pointers.items() if k not in absent} | scalars | {"eps": "fp32", "keep_scale": "fp32"}


def _forward_constants(variant: Any, dtype: str, config: LaunchConfig) -> dict[str, Any]:
    return _variant_constants(variant, _forward_absent(variant), config)


def _backward_absent(variant: Any) -> tuple[str, ...]:
    names = [*_absent(variant), *([] if variant["gamma"] else ["x_ptr"])]
    if not (variant["gamma"] or variant["dropout"]):
        names.append("dresidual_ptr")
    return (*names, *([] if variant["residual"] else ["dsummed_ptr"]))


def _backward_types(variant: Any, dtype: str) -> dict[str, str]:
    names = "dnormed dsummed summed x weight gamma row_scale dx dresidual".split()
    pointers = dict.fromkeys((f"{n}_ptr" for n in names), f"*{dtype}")
    pointers |= {"seed_ptr": "*i64"} | dict.fromkeys(("mean_ptr", "rstd_ptr", "partials_ptr"), "*fp32")
    scalars = ("stride_dnormed", "stride_dsummed", "stride_x", "count", "rows_per_scale", "drop_below")
    absent = _backward_absent(variant)
    present = {k: v for k, v in pointers.items() if k not in absent}
    return present | dict.fromkeys(scalars, "i32") | {"keep_scale": "fp32"}


def _shipped(kernel: str, heuristic: Callable[[int], LaunchConfig]) -> Callable[[Any, str, int], LaunchConfig]:
    def config(variant: Any, dtype: str, arch: int) -> LaunchConfig:
        return tuned_config(kernel, variant["width"], dtype, arch) or heuristic(variant["width"])

    return config


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
KERNELS: list[KernelSpec] = [
    KernelSpec(
        name="add_layer_norm_forward",
        kernel=add_layer_norm_forward_kernel,
        variants=_VARIANTS,
        types=_forward_types,
        constants=_forward_constants,
        config=_shipped("add_layer_norm_forward", forward_config),
        tensor_core=False,
    ),
    KernelSpec(
        name="add_layer_norm_forward_fp8",
        kernel=add_layer_norm_forward_kernel,
        variants=({**_VARIANTS[0], "fp8": True}, {**_VARIANTS[3], "fp8": True}),
        types=_forward_types,
        constants=_forward_constants,
        config=lambda variant, dtype, arch: row_wise(variant["width"]),
        tensor_core=False,
        arches=ARCHES,
    ),
    KernelSpec(
        name="add_layer_norm_backward",
        kernel=add_layer_norm_backward_kernel,
        variants=_VARIANTS,
        types=_backward_types,
        constants=lambda variant, dtype, config: _variant_constants(variant, _backward_absent(variant), config),
        config=_shipped("add_layer_norm_backward", backward_config),
        tensor_core=False,
    ),
]
