"""Small kernels for the tests of the audit: a matrix product, and code that the compiler rejects."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from xfm_fast.kernels.triton.launch import KernelSpec, LaunchConfig


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, stride_a, stride_b, steps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, columns, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, 64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        a = tl.load(a_ptr + rows[:, None] * stride_a + step * 64 + depth[None, :])
        b = tl.load(b_ptr + (step * 64 + depth)[:, None] * stride_b + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + rows[:, None] * BLOCK_N + columns[None, :], total.to(out_ptr.dtype.element_ty))


@triton.jit
def rejected_kernel(a_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    tl.store(a_ptr + tl.arange(0, BLOCK_M), tl.arange(0, 3 * BLOCK_N))


def _types(variant: Any, dtype: str) -> dict[str, str]:
    pointers: dict[str, str] = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), f"*{dtype}")
    return pointers | {"stride_a": "i32", "stride_b": "i32", "steps": "i32"}


def _spec(name: str, kernel: Any, types: Any) -> KernelSpec:
    return KernelSpec(
        name=name,
        kernel=kernel,
        variants=({"head_dim": 64},),
        types=types,
        constants=lambda variant, dtype, config: dict(config.tiles),
        config=lambda variant, dtype, arch: LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2),
    )


PRODUCT = _spec("toy_product", product_kernel, _types)
REJECTED = _spec("toy_rejected", rejected_kernel, lambda variant, dtype: {"a_ptr": f"*{dtype}"})
