"""GELU (erf form) with the bias of the layer before it: the product's output is read once and saved once.

The product itself is the library's. It leaves the pre-activation without its bias, and this is all the backward needs:
bias and activation are added again while the gradient passes through.
"""

# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, launch_options
from .rows import ARCHES, contiguous_rows, dense, first_stage_programs, ordered_sum, room_for, row_spec, scales_of

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
    y_ptr, bias_ptr, out_ptr, stride_y, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
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
        z = tl.load(y_ptr + far * stride_y + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + far * stride_dout + columns[None, :], mask=inside, other=0.0).to(tl.float32)
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
    return LaunchConfig({"BLOCK": block, "REST": rest}, num_warps=min(16, max(1, block // 256)), num_stages=1)


_WIDTHS = ({"width": 768}, {"width": 3072})
FORWARD = row_spec("bias_gelu_forward", bias_gelu_forward_kernel, _WIDTHS, _fitted(1024, 2))
BACKWARD = row_spec("bias_gelu_backward", bias_gelu_backward_kernel, _WIDTHS, _fitted(512, 4))
QUANTISE = row_spec("bias_gelu_quantise", bias_gelu_quantise_kernel, _WIDTHS[1:], _in_pieces, arches=ARCHES)
KERNELS = [FORWARD, BACKWARD, QUANTISE]


def bias_gelu_forward(y: Tensor, bias: Tensor | None, *, overwrite: bool = False) -> Tensor:
    """`gelu(y + bias)`, erf form, for y `[..., N]`; `overwrite` writes over a contiguous y, if no backward needs it."""
    rows = contiguous_rows(y)
    count, width = rows.shape
    out = y if overwrite and y.is_contiguous() else torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if rows.numel():
        options, config = launch_options(FORWARD, y, width=width)
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
        options, _ = launch_options(QUANTISE, y, width=width)
        bias_gelu_quantise_kernel[(count,)](rows, dense(bias), out, rounded, scales, rows.stride(0), count, **options)
    return out, rounded, scales


def bias_gelu_backward(dout: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(dy, dbias) from the gradient `[..., N]` of the result and the y of the forward."""
    rows, upstream = contiguous_rows(y), contiguous_rows(dout)
    count, width = rows.shape
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    options, config = launch_options(BACKWARD, y, width=width)
    programs = first_stage_programs(triton.cdiv(count, config.tiles["ROWS"]), y.device)
    partials = None if bias is None else torch.empty(1, programs, width, dtype=torch.float32, device=y.device)
    bias_gelu_backward_kernel[(programs, triton.cdiv(width, config.tiles["BLOCK"]))](
        upstream, rows, dense(bias), dy, partials, upstream.stride(0), rows.stride(0), count, **options
    )
    return dy, None if bias is None or partials is None else ordered_sum(partials, bias)[0]


def linear_gelu_forward(x: Tensor, w: Tensor, b: Tensor | None, *, keep: bool = True) -> tuple[Tensor, Tensor | None]:
    """`gelu(x w^T + b)` and, to `keep` for the backward, `x w^T`. x `[..., K]`, w `[N, K]`, b `[N]` → `[..., N]`."""
    y = torch.matmul(x, w.t())
    return bias_gelu_forward(y, b, overwrite=not keep), y if keep else None


def linear_gelu_backward(
    dout: Tensor, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, needs: tuple[bool, bool, bool] = (True, True, True)
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db), as selected by `needs`; y is the saved tensor of the forward."""
    dy, db = bias_gelu_backward(dout, y, b)
    dx = torch.matmul(dy, w) if needs[0] else None
    dw = torch.mm(contiguous_rows(dy).t(), x.reshape(-1, x.shape[-1])) if needs[1] else None
    return dx, dw, db if needs[2] else None
