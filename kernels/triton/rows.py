"""The common part of row-wise kernels: addressable rows, sums in two ordered stages, rows rounded to fp8 (e4m3)."""

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
# The interpreter runs programs one after the other; several of them, with several rows each, are all there is to see.
_INTERPRETED_PROGRAMS = 3
ARCHES = (90, 100, 120)
"""Of the architectures that are compiled for, those whose instructions know fp8 (e4m3)."""

_LARGEST = tl.constexpr(LARGEST_FP8)
_LEAST_ENTRY = tl.constexpr(2.0**-100)


def row_spec(
    name: str,
    kernel: Any,
    variants: tuple[Variant, ...],
    heuristic: Callable[[int], LaunchConfig],
    constants: Callable[[Variant], dict[str, Any]] = lambda variant: {},
    **options: Any,
) -> KernelSpec:
    """A kernel over rows of WIDTH elements, whose tiles follow from the width."""
    fields = {*kernel.arg_names}
    return KernelSpec(
        name=name,
        kernel=kernel,
        variants=variants,
        config=lambda variant, dtype, arch: heuristic(variant["width"]),
        constants=lambda variant, dtype, config: {
            name: value
            for name, value in {"WIDTH": variant["width"], **constants(variant)}.items()
            if name in fields
        },
        tensor_core=False,
        **options,
    )


def contiguous_rows(x: Tensor) -> Tensor:
    """`[..., M]` → `[rows, M]` with contiguous rows, a view where possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def dense(vector: Tensor | None) -> Tensor | None:
    """`[M]` with its elements side by side, as the kernels address them: a column of a matrix is copied."""
    return None if vector is None else vector.contiguous()


def first_stage_programs(steps: int, device: torch.device) -> int:
    """How many programs share `steps` steps: a function of the device, so that one device sums in one order."""
    on_gpu = device.type == "cuda"
    most = _PROGRAMS_PER_PROCESSOR * multiprocessors(device) if on_gpu else _INTERPRETED_PROGRAMS
    return max(1, min(steps, most))


@triton.jit(do_not_specialize=["count"])
def ordered_sum_kernel(
    partials_ptr, first_ptr, second_ptr, third_ptr, count,
    WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`[OUTPUTS, count, WIDTH]` fp32 → the sums over `count`, each into its own array `[WIDTH]`."""
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    which = tl.program_id(1)
    inside = columns < WIDTH
    rows = tl.arange(0, BLOCK_PARTIALS)
    base = partials_ptr + which.to(tl.int64) * count * WIDTH
    sums = tl.zeros([BLOCK_PARTIALS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, count, BLOCK_PARTIALS):
        there = (start + rows < count)[:, None] & inside[None, :]
        sums += tl.load(
            base + (start + rows)[:, None] * WIDTH + columns[None, :], mask=there, other=0.0
        )
    total = tl.sum(sums, 0)
    if which == 0:
        tl.store(first_ptr + columns, total, mask=inside)
    if OUTPUTS > 1:
        if which == 1:
            tl.store(second_ptr + columns, total, mask=inside)
    if OUTPUTS > 2:
        if which == 2:
            tl.store(third_ptr + columns, total, mask=inside)


_POINTERS = ("first_ptr", "second_ptr", "third_ptr")
# A step waits for memory as long as a pass over 32 partials does as over 128: five of them instead of seventeen, and
# twice as many programs.
SUM = row_spec(
    "ordered_sum",
    ordered_sum_kernel,
    ({"width": 768, "outputs": 2}, {"width": 3072, "outputs": 1}),
    lambda width: LaunchConfig(
        {"BLOCK_PARTIALS": 128, "BLOCK_COLUMNS": 32}, num_warps=8, num_stages=1
    ),
    lambda variant: {
        "OUTPUTS": variant["outputs"],
        **dict.fromkeys(_POINTERS[variant["outputs"] :]),
    },
)


def ordered_sum(partials: Tensor, *likes: Tensor) -> list[Tensor]:
    """`[K, P, M]` fp32 → K tensors `[M]`, the sums over P, in the types of `likes`."""
    outputs, count, width = partials.shape
    sums = [torch.empty(width, dtype=like.dtype, device=partials.device) for like in likes]
    options, config = launch_options(SUM, partials, width=width, outputs=outputs)
    grid = (triton.cdiv(width, config.tiles["BLOCK_COLUMNS"]), outputs)
    ordered_sum_kernel[grid](partials, *sums, *[None] * (3 - outputs), count, **options)
    return sums


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
    x_ptr,
    rows_ptr,
    scales_ptr,
    stride_x,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program for ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there = rows < count
    inside = there[:, None] & (columns < WIDTH)[None, :]
    far = rows.to(tl.int64)[:, None]
    values = tl.load(x_ptr + far * stride_x + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    rounded, scales = round_rows(values)
    tl.store(rows_ptr + far * WIDTH + columns[None, :], rounded, mask=inside)
    tl.store(scales_ptr + rows, scales, mask=there)


def row_wise(width: int) -> LaunchConfig:
    """One row a program, 8 elements a thread: a row is kept until its largest entry is known."""
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
KERNELS = [SUM, QUANTISE]


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantise_rows` of `[..., K]`, as `[rows, K]` and `[rows, 1]`."""
    rows = contiguous_rows(x)
    out, scales = room_for(rows)
    if rows.numel():
        options, config = launch_options(QUANTISE, rows, width=rows.shape[1])
        grid = (triton.cdiv(rows.shape[0], config.tiles["ROWS"]),)
        quantise_rows_kernel[grid](rows, out, scales, rows.stride(0), rows.shape[0], **options)
    return out, scales


def room_for(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors for `[rows, K]` rounded to fp8, and for the scales of the rows."""
    out = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    return out, torch.empty(rows.shape[0], 1, dtype=torch.float32, device=rows.device)
