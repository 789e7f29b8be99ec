"""Rows rounded to fp8 (e4m3), each with a scale of its own: the left operand of the library's products."""

# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import LARGEST_FP8
from .launch import KernelSpec, LaunchConfig
from .rows import contiguous_rows, launch_options

ARCHES = (90, 100, 120)
"""Of the architectures that are compiled for, those whose instructions know e4m3."""

_LARGEST = tl.constexpr(LARGEST_FP8)
_LEAST_ENTRY = tl.constexpr(2.0**-100)


@triton.jit
def scales_of(largest):
    """Of rows whose largest entry is this: factors to fp8, and scales back."""
    largest = tl.maximum(largest, _LEAST_ENTRY)
    factors = tl.div_rn(tl.full(largest.shape, _LARGEST, tl.float32), largest)
    return factors, tl.div_rn(largest, tl.full(largest.shape, _LARGEST, tl.float32))


@triton.jit
def round_rows(values):
    """`[ROWS, BLOCK]` fp32, zeros where there is nothing → the same in fp8, and scales `[ROWS]`."""
    factors, scales = scales_of(tl.max(tl.abs(values), 1))
    return (values * factors[:, None]).to(tl.float8e4nv), scales


@triton.jit(do_not_specialize=["count"])
def quantise_rows_kernel(
    x_ptr, rows_ptr, scales_ptr, stride_x, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """One program for ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there = rows < count
    inside = there[:, None] & (columns < WIDTH)[None, :]
    far = rows.to(tl.int64)[:, None]
    values = tl.load(x_ptr + far * stride_x + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    rounded, scales = round_rows(values)
    tl.store(rows_ptr + far * WIDTH + columns[None, :], rounded, mask=inside)
    tl.store(scales_ptr + rows, scales, mask=there)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantise_rows` of `[..., K]`, as `[rows, K]` and `[rows, 1]`."""
    rows = contiguous_rows(x)
    out, scales = room_for(rows)
    if rows.numel():
        config = row_wise(rows.shape[1])
        quantise_rows_kernel[(triton.cdiv(rows.shape[0], config.tiles["ROWS"]),)](
            rows, out, scales, rows.stride(0), rows.shape[0], **launch_options(config, WIDTH=rows.shape[1])
        )
    return out, scales


def room_for(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors for `[rows, K]` rounded, and for its scales."""
    out = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    return out, torch.empty(rows.shape[0], 1, dtype=torch.float32, device=rows.device)


def row_wise(width: int) -> LaunchConfig:
    """One row a program, 8 elements a thread: a row is kept until its largest entry is known."""
    block = max(16, triton.next_power_of_2(width))
    return LaunchConfig({"BLOCK": block, "ROWS": 1}, num_warps=min(16, max(1, block // 256)), num_stages=1)


def _types(variant: Any, dtype: str) -> dict[str, str]:
    pointers = {"x_ptr": f"*{dtype}", "rows_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
    return pointers | {"stride_x": "i32", "count": "i32"}


KERNELS: list[KernelSpec] = [
    KernelSpec(
        name="quantise_rows",
        kernel=quantise_rows_kernel,
        variants=({"width": 768}, {"width": 3072}),
        types=_types,
        constants=lambda variant, dtype, config: {"WIDTH": variant["width"], **config.tiles},
        config=lambda variant, dtype, arch: row_wise(variant["width"]),
        tensor_core=False,
        arches=ARCHES,
    )
]
