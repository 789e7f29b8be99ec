"""Row-wise kernels: ordered sums of partial results, quantisation to fp8 (e4m3), bias and GELU.

GELU (erf form) comes with the bias of the linear layer before it. The GEMM leaves the pre-activation without its bias,
which the backward needs: bias and activation are applied again while the gradient passes through.
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

from ..reference import LARGEST_FP8
from .launch import KernelSpec, LaunchConfig, Variant, launch_options, multiprocessors

# Programs of a first stage: enough to fill a device, few enough for their partial sums to be little of the traffic.
_PROGRAMS_PER_PROCESSOR = 4
# The interpreter runs programs one after the other; several of them, with several rows each, cover all cases.
_INTERPRETED_PROGRAMS = 3
ARCHES = (90, 100, 120)
"""The compiled architectures with instructions for fp8 (e4m3)."""

_LARGEST = tl.constexpr(LARGEST_FP8)
_SMALLEST = tl.constexpr(2.0**-100)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_HALF_OVER_PI = tl.constexpr(0.3989422804014327)


def row_spec(
    name: str,
    kernel: Any,
    variants: tuple[Variant, ...],
    heuristic: Callable[[int], LaunchConfig],
    constants: Callable[[Variant], dict[str, Any]] = lambda variant: {},
    **options: Any,
) -> KernelSpec:
    """Specify a kernel over rows of WIDTH elements, whose launch configuration follows from the width."""
    parameters = {*kernel.arg_names}

    def select(variant: Variant, dtype: str, config: LaunchConfig) -> dict[str, Any]:
        values = {"WIDTH": variant["width"], **constants(variant)}
        return {name: value for name, value in values.items() if name in parameters}

    return KernelSpec(
        name=name,
        kernel=kernel,
        variants=variants,
        config=lambda variant, dtype, arch: heuristic(variant["width"]),
        constants=select,
        tensor_core=False,
        **options,
    )


def contiguous_rows(x: Tensor) -> Tensor:
    """Reshape `[..., M]` to `[rows, M]` with contiguous rows, as a view if possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def dense(vector: Tensor | None) -> Tensor | None:
    """Copy a vector `[M]` unless it is contiguous, as the kernels address it."""
    return None if vector is None else vector.contiguous()


def first_stage_programs(steps: int, device: torch.device) -> int:
    """Return the number of programs for `steps` steps; it depends on the device only, and so does the order of sums."""
    programs = _INTERPRETED_PROGRAMS
    if device.type == "cuda":
        programs = _PROGRAMS_PER_PROCESSOR * multiprocessors(device)
    return max(1, min(steps, programs))


@triton.jit
def load_fp32(pointers, mask):
    """Load masked elements, zeros elsewhere, and convert them to fp32."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def ordered_sum_kernel(
    partials_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    count,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum `[OUTPUTS, count, WIDTH]` fp32 over `count`; each output has an array `[WIDTH]`."""
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    output = tl.program_id(1)
    inside = columns < WIDTH
    rows = tl.arange(0, BLOCK_PARTIALS)
    base = partials_ptr + output.to(tl.int64) * count * WIDTH
    sums = tl.zeros([BLOCK_PARTIALS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, count, BLOCK_PARTIALS):
        mask = (start + rows < count)[:, None] & inside[None, :]
        pointers = base + (start + rows)[:, None] * WIDTH + columns[None, :]
        sums += tl.load(pointers, mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    if output == 0:
        tl.store(first_ptr + columns, total, mask=inside)
    if OUTPUTS > 1:
        if output == 1:
            tl.store(second_ptr + columns, total, mask=inside)
    if OUTPUTS > 2:
        if output == 2:
            tl.store(third_ptr + columns, total, mask=inside)


_POINTERS = ("first_ptr", "second_ptr", "third_ptr")
# The latency of a step is the same for 32 partials and for 128; with 128 there are five steps instead of seventeen.
SUM = row_spec(
    "ordered_sum",
    ordered_sum_kernel,
    ({"width": 768, "outputs": 2}, {"width": 3072, "outputs": 1}),
    lambda width: LaunchConfig(
        {"BLOCK_PARTIALS": 128, "BLOCK_COLUMNS": 32}, num_warps=8, num_stages=1
    ),
    lambda variant: (
        dict.fromkeys(_POINTERS[variant["outputs"] :]) | {"OUTPUTS": variant["outputs"]}
    ),
)


def ordered_sum(partials: Tensor, *likes: Tensor) -> list[Tensor]:
    """Sum `[K, P, M]` fp32 over P into K tensors `[M]` of the dtypes of `likes`."""
    outputs, count, width = partials.shape
    sums = [torch.empty(width, dtype=like.dtype, device=partials.device) for like in likes]
    options, config = launch_options(SUM, partials, width=width, outputs=outputs)
    grid = (triton.cdiv(width, config.tiles["BLOCK_COLUMNS"]), outputs)
    ordered_sum_kernel[grid](partials, *sums, *[None] * (3 - outputs), count, **options)
    return sums


@triton.jit
def scales_of(largest):
    """Return factors to fp8, and scales back, of rows with these largest magnitudes."""
    largest = tl.maximum(largest, _SMALLEST)
    factors = tl.div_rn(tl.full(largest.shape, _LARGEST, tl.float32), largest)
    return factors, tl.div_rn(largest, tl.full(largest.shape, _LARGEST, tl.float32))


@triton.jit
def round_rows(values):
    """Quantise `[ROWS, BLOCK]` fp32, zero outside, to fp8 with scales `[ROWS]`."""
    factors, scales = scales_of(tl.max(tl.abs(values), 1))
    return (values * factors[:, None]).to(tl.float8e4nv), scales


@triton.jit(do_not_specialize=["count"])
def quantise_rows_kernel(
    x_ptr,
    rows_ptr,
    scales_ptr,
    stride_x,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Quantise ROWS rows a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    row_mask = rows < count
    inside = row_mask[:, None] & (columns < WIDTH)[None, :]
    rows64 = rows.to(tl.int64)[:, None]
    values = load_fp32(x_ptr + rows64 * stride_x + columns[None, :], inside)
    rounded, scales = round_rows(values)
    tl.store(rows_ptr + rows64 * WIDTH + columns[None, :], rounded, mask=inside)
    tl.store(scales_ptr + rows, scales, mask=row_mask)


def row_wise(width: int) -> LaunchConfig:
    """Configure one row a program, 8 elements a thread: a row stays in registers until its maximum is known."""
    block = max(16, triton.next_power_of_2(width))
    return LaunchConfig(
        {"BLOCK": block, "ROWS": 1}, num_warps=min(16, max(1, block // 256)), num_stages=1
    )


QUANTISE = row_spec(
    "quantise_rows",
    quantise_rows_kernel,
    ({"width": 768}, {"width": 3072}),
    row_wise,
    types=lambda variant, dtype: {"rows_ptr": "*fp8e4nv"},
    arches=ARCHES,
)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise `[..., K]` as `reference.quantise_rows`, to `[rows, K]` and `[rows, 1]`."""
    rows = contiguous_rows(x)
    out, scales = room_for(rows)
    if rows.numel():
        options, config = launch_options(QUANTISE, rows, width=rows.shape[1])
        grid = (triton.cdiv(rows.shape[0], config.tiles["ROWS"]),)
        quantise_rows_kernel[grid](rows, out, scales, rows.stride(0), rows.shape[0], **options)
    return out, scales


def room_for(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate fp8 rows `[rows, K]` and their scales."""
    out = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    return out, torch.empty(rows.shape[0], 1, dtype=torch.float32, device=rows.device)


@triton.jit
def activate(y, bias_ptr, out, columns, inside, WIDTH: tl.constexpr):
    """Store GELU of a tile, and return the stored values in fp32, zero outside."""
    z = load_fp32(y + columns[None, :], inside)
    if bias_ptr is not None:
        z += load_fp32(bias_ptr + columns, columns < WIDTH)[None, :]
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
    """Activate ROWS rows and BLOCK columns a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    rows64 = rows.to(tl.int64)[:, None]
    activate(y_ptr + rows64 * stride_y, bias_ptr, out_ptr + rows64 * WIDTH, columns, inside, WIDTH)


@triton.jit(do_not_specialize=["count"])
def bias_gelu_quantise_kernel(
    y_ptr,
    bias_ptr,
    out_ptr,
    rounded_ptr,
    scales_ptr,
    stride_y,
    count,
    WIDTH: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Activate and quantise one row a program, in two pieces: 3072 = 2048 + 1024."""
    row = tl.program_id(0) + tl.arange(0, 1)
    row_mask = (row < count)[:, None]
    rows64 = row.to(tl.int64)[:, None]
    y, out = y_ptr + rows64 * stride_y, out_ptr + rows64 * WIDTH
    columns_a = tl.arange(0, BLOCK_A)
    mask_a = row_mask & (columns_a < WIDTH)[None, :]
    a = activate(y, bias_ptr, out, columns_a, mask_a, WIDTH)
    largest = tl.max(tl.abs(a), 1)
    if BLOCK_B > 0:
        columns_b = BLOCK_A + tl.arange(0, BLOCK_B)
        mask_b = row_mask & (columns_b < WIDTH)[None, :]
        b = activate(y, bias_ptr, out, columns_b, mask_b, WIDTH)
        largest = tl.maximum(largest, tl.max(tl.abs(b), 1))
    factors, scales = scales_of(largest)
    rounded = rounded_ptr + rows64 * WIDTH
    tl.store(rounded + columns_a[None, :], (a * factors[:, None]).to(tl.float8e4nv), mask=mask_a)
    if BLOCK_B > 0:
        b = (b * factors[:, None]).to(tl.float8e4nv)  # pyright: ignore[reportPossiblyUnboundVariable]
        tl.store(rounded + columns_b[None, :], b, mask=mask_b)  # pyright: ignore[reportPossiblyUnboundVariable]
    tl.store(scales_ptr + row, scales, mask=row < count)


@triton.jit(do_not_specialize=["count"])
def bias_gelu_backward_kernel(
    dout_ptr,
    y_ptr,
    bias_ptr,
    dy_ptr,
    partials_ptr,
    stride_dout,
    stride_y,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute dy, and partial sums of dbias `[programs, WIDTH]`.

    Program (p, c) takes the steps p, p + programs, ... of ROWS rows, in BLOCK columns.
    """
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < WIDTH
    dbias = tl.zeros([BLOCK], tl.float32)
    bias = tl.zeros([1, BLOCK], tl.float32)
    if bias_ptr is not None:
        bias = load_fp32(bias_ptr + columns, column_mask)[None, :]
    for step in range(program, tl.cdiv(count, ROWS), tl.num_programs(0)):
        rows = step * ROWS + tl.arange(0, ROWS)
        inside = (rows < count)[:, None] & column_mask[None, :]
        rows64 = rows.to(tl.int64)[:, None]
        z = load_fp32(y_ptr + rows64 * stride_y + columns[None, :], inside)
        dout = load_fp32(dout_ptr + rows64 * stride_dout + columns[None, :], inside)
        z += bias
        cdf = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
        dy = dout * (cdf + z * tl.exp(-0.5 * z * z) * _SQRT_HALF_OVER_PI)
        tl.store(dy_ptr + rows64 * WIDTH + columns[None, :], dy, mask=inside)
        if bias_ptr is not None:
            dbias += tl.sum(dy, 0)
    if bias_ptr is not None:
        tl.store(partials_ptr + program * WIDTH + columns, dbias, mask=column_mask)


def _tiles(block: int, rows: int) -> Callable[[int], LaunchConfig]:
    """Configure tiles of this size, narrower for narrow layers."""

    def config(width: int) -> LaunchConfig:
        narrowed = min(block, max(16, triton.next_power_of_2(width)))
        return LaunchConfig({"BLOCK": narrowed, "ROWS": rows}, num_warps=4, num_stages=1)

    return config


def _two_pieces(width: int) -> LaunchConfig:
    """Configure a row in two pieces that are powers of two, 8 elements a thread."""
    a = max(16, 1 << width.bit_length() - 1)
    b = max(16, triton.next_power_of_2(width - a)) if width > a else 0
    warps = min(16, max(1, a // 256))
    return LaunchConfig({"BLOCK_A": a, "BLOCK_B": b}, num_warps=warps, num_stages=1)


_WIDTHS = ({"width": 768}, {"width": 3072})
GELU_FORWARD = row_spec("bias_gelu_forward", bias_gelu_forward_kernel, _WIDTHS, _tiles(1024, 2))
GELU_BACKWARD = row_spec("bias_gelu_backward", bias_gelu_backward_kernel, _WIDTHS, _tiles(512, 4))
GELU_QUANTISE = row_spec(
    "bias_gelu_quantise", bias_gelu_quantise_kernel, _WIDTHS[1:], _two_pieces, arches=ARCHES
)


def bias_gelu_forward(y: Tensor, bias: Tensor | None, *, overwrite: bool = False) -> Tensor:
    """Return `gelu(y + bias)`, erf form, for y `[..., N]`; `overwrite` reuses a contiguous y."""
    rows = contiguous_rows(y)
    count, width = rows.shape
    in_place = overwrite and y.is_contiguous()
    out = y if in_place else torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if rows.numel():
        options, config = launch_options(GELU_FORWARD, y, width=width)
        grid = triton.cdiv(count, config.tiles["ROWS"]), triton.cdiv(width, config.tiles["BLOCK"])
        bias_gelu_forward_kernel[grid](rows, dense(bias), out, rows.stride(0), count, **options)
    return out


def bias_gelu_quantise(y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return `gelu(y + bias)`, in a contiguous y if possible, and its rows in fp8 with their scales."""
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
    """Return (dy, dbias) from the gradient `[..., N]` of the result and the y of the forward."""
    rows, upstream = contiguous_rows(y), contiguous_rows(dout)
    count, width = rows.shape
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    options, config = launch_options(GELU_BACKWARD, y, width=width)
    programs = first_stage_programs(triton.cdiv(count, config.tiles["ROWS"]), y.device)
    partials = None
    if bias is not None:
        partials = torch.empty(1, programs, width, dtype=torch.float32, device=y.device)
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
    """Return `gelu(x w^T + b)`, and `x w^T` to `keep` for the backward; x `[..., K]`, w `[N, K]`, b `[N]`."""
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
    """Return (dx, dw, db), as selected by `needs`; y is the saved tensor of the forward."""
    dy, db = bias_gelu_backward(dout, y, b)
    dx = torch.matmul(dy, w) if needs[0] else None
    dw = torch.mm(contiguous_rows(dy).t(), x.reshape(-1, x.shape[-1])) if needs[1] else None
    return dx, dw, db if needs[2] else None


KERNELS = [SUM, QUANTISE, GELU_FORWARD, GELU_BACKWARD, GELU_QUANTISE]
