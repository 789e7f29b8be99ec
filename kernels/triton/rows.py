"""The common part of row-wise kernels: addressable rows, and sums over rows in two ordered stages, without atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import KernelSpec, LaunchConfig

# Programs of a first stage: enough to fill a device, few enough for their partial sums to be little of the traffic.
_PROGRAMS_PER_PROCESSOR = 4
# The interpreter runs programs one after the other; several of them, with several rows each, are all there is to see.
_INTERPRETED_PROGRAMS = 3

# A step waits for memory as long as a pass over 32 partials does as over 128: five of them instead of seventeen, and
# twice as many programs.
CONFIG = LaunchConfig({"BLOCK_PARTIALS": 128, "BLOCK_COLUMNS": 32}, num_warps=8, num_stages=1)


def contiguous_rows(x: Tensor) -> Tensor:
    """`[..., M]` → `[rows, M]` with contiguous rows, a view where possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def dense(vector: Tensor | None) -> Tensor | None:
    """`[M]` with its elements side by side, as the kernels address them: a column of a matrix is copied."""
    return None if vector is None else vector.contiguous()


def launch_options(config: LaunchConfig, **constants: Any) -> dict[str, Any]:
    """Constants, tiles and compile options, as a launch takes them."""
    return {**constants, **config.tiles, **config.options}


def first_stage_programs(steps: int, device: torch.device) -> int:
    """How many programs share `steps` steps: a function of the device, so that one device sums in one order."""
    if device.type == "cuda":
        most = _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    else:
        most = _INTERPRETED_PROGRAMS
    return max(1, min(steps, most))


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
    """`[OUTPUTS, count, WIDTH]` fp32 → the sums over `count`, each into its own array `[WIDTH]`."""
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    which = tl.program_id(1)
    inside = columns < WIDTH
    rows = tl.arange(0, BLOCK_PARTIALS)
    base = partials_ptr + which.to(tl.int64) * count * WIDTH
    sums = tl.zeros([BLOCK_PARTIALS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, count, BLOCK_PARTIALS):
        there = (start + rows < count)[:, None] & inside[None, :]
        sums += tl.load(base + (start + rows)[:, None] * WIDTH + columns[None, :], mask=there, other=0.0)
    total = tl.sum(sums, 0)
    if which == 0:
        tl.store(first_ptr + columns, total, mask=inside)
    if OUTPUTS > 1:
        if which == 1:
            tl.store(second_ptr + columns, total, mask=inside)
    if OUTPUTS > 2:
        if which == 2:
            tl.store(third_ptr + columns, total, mask=inside)


def ordered_sum(partials: Tensor, *likes: Tensor) -> list[Tensor]:
    """`[K, P, M]` fp32 → K tensors `[M]`, the sums over P, in the types of `likes`."""
    outputs, count, width = partials.shape
    sums = [torch.empty(width, dtype=like.dtype, device=partials.device) for like in likes]
    first, second, third = [*sums, *[None] * (3 - outputs)]
    ordered_sum_kernel[(triton.cdiv(width, CONFIG.tiles["BLOCK_COLUMNS"]), outputs)](
        partials, first, second, third, count, **launch_options(CONFIG, WIDTH=width, OUTPUTS=outputs)
    )
    return sums


KERNELS: list[KernelSpec] = [
    KernelSpec(
        name="ordered_sum",
        kernel=ordered_sum_kernel,
        variants=({"width": 768, "outputs": 2}, {"width": 3072, "outputs": 1}),
        types=lambda variant, dtype: {
            "partials_ptr": "*fp32",
            **{f"{name}_ptr": f"*{dtype}" for name in ("first", "second", "third")[: variant["outputs"]]},
            "count": "i32",
        },
        constants=lambda variant, dtype, config: {
            **{f"{name}_ptr": None for name in ("first", "second", "third")[variant["outputs"] :]},
            "WIDTH": variant["width"],
            "OUTPUTS": variant["outputs"],
            **config.tiles,
        },
        config=lambda variant, dtype, arch: CONFIG,
        tensor_core=False,
    )
]
