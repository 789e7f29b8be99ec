"""What both attention families need on the host: operands a kernel can address, statistics for a backward pass."""

# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import LOG2E, load_rows
from .spec import KernelSpec, LaunchConfig

HEAD_DIMS = (32, 64, 80, 96, 128)

# Offsets within a tile are 32-bit; a tile has at most this many rows.
_LARGEST_TILE = 256
_STATISTICS_BLOCK = 64


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """A head dimension as two powers of two, the second possibly 0: 80 → (64, 16), 96 → (64, 32).

    Triton's tiles are powers of two. Two products of exact size need no masks and, at 80, five eighths of the work of
    one that is padded to 128.

    Raises:
        ValueError: the head dimension is not one of `HEAD_DIMS`.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head dimension {head_dim} is not supported; the Triton kernels have {HEAD_DIMS}")
    first = 1 << (head_dim.bit_length() - 1)
    return first, head_dim - first


def addressable(tensor: Tensor) -> Tensor:
    """`[..., N, H, D]` itself if D is contiguous and 32 bits address a tile of N, else a contiguous copy."""
    if tensor.stride(-1) == 1 and tensor.stride(-3) * _LARGEST_TILE < 2**31:
        return tensor
    return tensor.contiguous()


def positive_scale(scale: float) -> float:
    """The scale, if the online softmax can work with it.

    Raises:
        ValueError: the scale is zero, negative or not finite.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}; it must be positive and finite")
    return float(scale)


def dot_precision(dtype: str) -> str:
    """How products of fp32 operands are computed; half precision has only one way."""
    return "ieee" if dtype == "fp32" else "tf32"


@triton.jit
def backward_statistics_kernel(
    out_ptr, dout_ptr, lse_ptr, delta_ptr, row_lse_ptr,
    stride_ob, stride_on, stride_oh, stride_gb, stride_gn, stride_gh, tokens, heads,
    D_A: tl.constexpr, D_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ_d out·dout (delta), and the logsumexp as `softmax_weights` wants it; `[B, H, N]` fp32 both.

    A row that attended to nothing has lse = -inf; +inf makes exp(score - lse) zero in the backward kernels instead of
    infinite, so that they need no test for it.
    """
    tiles = tl.cdiv(tokens, BLOCK)
    start = tl.program_id(0) % tiles * BLOCK
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    inside = rows < tokens - start
    out_base = out_ptr + b * stride_ob + start.to(tl.int64) * stride_on + h * stride_oh
    dout_base = dout_ptr + b * stride_gb + start.to(tl.int64) * stride_gn + h * stride_gh
    d_a = tl.arange(0, D_A)[None, :]
    out = load_rows(out_base + rows[:, None] * stride_on + d_a, inside, True).to(tl.float32)
    dout = load_rows(dout_base + rows[:, None] * stride_gn + d_a, inside, True).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if D_B > 0:
        d_b = D_A + tl.arange(0, D_B)[None, :]
        out = load_rows(out_base + rows[:, None] * stride_on + d_b, inside, True).to(tl.float32)
        dout = load_rows(dout_base + rows[:, None] * stride_gn + d_b, inside, True).to(tl.float32)
        delta += tl.sum(out * dout, 1)
    statistics = (b * heads + h) * tokens + start
    lse = tl.load(lse_ptr + statistics + rows, mask=inside, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if out_ptr.dtype.element_ty != tl.float32:
        lse = lse * LOG2E
    tl.store(delta_ptr + statistics + rows, delta, mask=inside)
    tl.store(row_lse_ptr + statistics + rows, lse, mask=inside)


def backward_statistics(out: Tensor, dout: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(delta, row_lse) of outputs and their gradients `[B, N, H, D]` and lse `[B, H, N]`; `[B, H, N]` fp32 each."""
    batch, tokens, heads, head_dim = out.shape
    delta, row_lse = torch.empty_like(lse), torch.empty_like(lse)
    d_a, d_b = split_head_dim(head_dim)
    if out.numel():
        grid = (triton.cdiv(tokens, _STATISTICS_BLOCK) * heads * batch,)
        backward_statistics_kernel[grid](
            out, dout, lse, delta, row_lse, *out.stride()[:3], *dout.stride()[:3], tokens, heads,
            D_A=d_a, D_B=d_b, BLOCK=_STATISTICS_BLOCK, num_warps=4,
        )  # fmt: skip
    return delta, row_lse


def argument_types(kernel: Any, dtype: str, special: Mapping[str, str], constants: Mapping[str, Any]) -> dict[str, str]:
    """Triton type of every argument that is not constant: pointers to the compute type and i32, but for the special."""
    return {
        name: special.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }


def _statistics_constants(variant: Mapping[str, Any], dtype: str, config: LaunchConfig) -> dict[str, Any]:
    d_a, d_b = split_head_dim(variant["head_dim"])
    return {"D_A": d_a, "D_B": d_b, **config.tiles}


def _statistics_types(variant: Mapping[str, Any], dtype: str) -> dict[str, str]:
    special = dict.fromkeys(("lse_ptr", "delta_ptr", "row_lse_ptr"), "*fp32")
    return argument_types(backward_statistics_kernel, dtype, special, {"D_A": 0, "D_B": 0, "BLOCK": 0})


STATISTICS_SPEC = KernelSpec(
    name="attention_backward_statistics",
    kernel=backward_statistics_kernel,
    variants=tuple({"head_dim": head_dim} for head_dim in HEAD_DIMS),
    types=_statistics_types,
    constants=_statistics_constants,
    config=lambda variant, dtype, arch: LaunchConfig({"BLOCK": _STATISTICS_BLOCK}, num_warps=4, num_stages=2),
    tensor_core=False,
)
