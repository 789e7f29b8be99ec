"""The public operations: arguments checked, then sent to the implementation that fits the device and the moment.

Every operation has a definition in `reference.py`. The backend `auto` takes the fastest implementation for the device;
`reference` and `cpu` ask for one by name, for a call (`backend=`) or for a block (`with use_backend(...)`), and a
backend asked for by name never falls back silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .cpu import attention as cpu_attention
from .cpu import products as cpu_products
from .derived import derived

__all__ = [
    "Backend",
    "layer_norm",
    "linear",
    "linear_gelu",
    "linear_residual",
    "mlp_residual",
    "relpos_attention",
    "use_backend",
    "varlen_attention",
]

Backend = Literal["auto", "reference", "cpu"]
_BACKENDS = ("auto", "reference", "cpu")
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_backend: ContextVar[Backend] = ContextVar("xfm_fast_backend", default="auto")


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the operations of a block on the named backend."""
    token = _backend.set(_known(name))
    try:
        yield
    finally:
        _backend.reset(token)


def _known(name: Backend) -> Backend:
    if name not in _BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(_BACKENDS)}")
    return name


def _resolve(backend: Backend | None, *tensors: Tensor | None) -> Literal["reference", "cpu", "composed"]:
    """`cpu`: the inference kernels; `composed`: differentiable PyTorch operations in an efficient arrangement."""
    name = _backend.get() if backend is None else _known(backend)
    if name == "reference":
        return "reference"
    present = [t for t in tensors if t is not None]
    elsewhere = next((t.device for t in present if t.device.type != "cpu"), None)
    if name == "cpu" and elsewhere is not None:
        raise ValueError(f"backend 'cpu' was asked for, but a tensor lives on {elsewhere}; move it or use 'auto'")
    if elsewhere is not None or torch.compiler.is_compiling():
        return "composed"
    if torch.is_grad_enabled() and any(t.requires_grad for t in present):
        return "composed"
    if torch.is_autocast_enabled("cpu"):
        return "composed"
    dtype = present[0].dtype
    return "cpu" if dtype in _CPU_DTYPES and all(t.dtype == dtype for t in present) else "composed"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None) -> Tensor:
    """`x W^T + b`. x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    if _resolve(backend, x, weight, bias) == "cpu":
        return cpu_products.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None) -> Tensor:
    """`gelu(x W^T + b)` with the erf form of GELU. x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    if _resolve(backend, x, weight, bias) == "cpu":
        return cpu_products.linear_gelu(x, weight, bias)
    return reference.linear_gelu(x, weight, bias)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend | None = None,
) -> Tensor:
    """`residual + row_scale · gamma · dropout(x W^T + b)`: the end of a transformer branch.

    Args:
        x: `[..., K]`; weight: `[M, K]`; bias: `[M]`; residual: `[..., M]`.
        gamma: LayerScale `[M]` (arXiv 2103.17239).
        row_scale: `[B]`, one factor per entry of the first dimension: stochastic depth.
        dropout_p: probability of zeroing an element of the branch.
    """
    where = _resolve(backend, x, weight, bias, residual, gamma)
    if where == "cpu" and row_scale is None and not dropout_p:
        return cpu_products.linear_residual(x, weight, bias, residual, gamma)
    if dropout_p:
        branch = F.dropout(F.linear(x, weight, bias), dropout_p)
        return residual + (branch if gamma is None else gamma * branch)
    return reference.linear_residual(x, weight, bias, residual, gamma, row_scale)


def mlp_residual(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    residual: Tensor,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend | None = None,
) -> Tensor:
    """The MLP branch of a transformer: `residual + row_scale · gamma · dropout(gelu(x W1^T + b1) W2^T + b2)`.

    Args:
        x, residual: `[..., M]`; weight_in: `[F, M]`; bias_in: `[F]`; weight_out: `[M, F]`; bias_out: `[M]`.
        gamma, row_scale, dropout_p: as in `linear_residual`.
    """
    where = _resolve(backend, x, weight_in, bias_in, weight_out, bias_out, residual, gamma)
    if where == "cpu" and row_scale is None and not dropout_p:
        return cpu_products.mlp_residual(x, weight_in, bias_in, weight_out, bias_out, residual, gamma)
    hidden = reference.linear_gelu(x, weight_in, bias_in)
    return linear_residual(
        hidden,
        weight_out,
        bias_out,
        residual,
        gamma=gamma,
        row_scale=row_scale,
        dropout_p=dropout_p,
        backend=backend,
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension; statistics in fp32 for half precision."""
    return reference.layer_norm(x, weight, bias, eps)


def relpos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    window: tuple[int, int],
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Self-attention of a window of patches and a class token with a learned relative position bias (BEiT).

    Args:
        q, k, v: `[B, N, H, D]`, any strides, N = 1 + wh·ww.
        table: `[(2wh-1)(2ww-1)+3, H]`; see `reference.relative_position_index` for its rows.
        window: (wh, ww) in patches.
        scale: of the products; 1/sqrt(D) by default.
        key_mask: `[B, N]` boolean, False for keys that a batch entry does not attend to.

    Returns:
        `[B, N, H, D]`.
    """
    _check_relpos(q, k, v, table, window, key_mask)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    where = _resolve(backend, q, k, v, table)
    if where == "reference":
        return reference.relpos_attention(q, k, v, table, window, scale, key_mask)
    if where == "cpu" and key_mask is None:
        bias = derived(f"position bias {window}", (table,), lambda: reference.position_bias(table, window).contiguous())
        return cpu_attention.dense_attention(q, k, v, scale, bias)
    index = _position_index(window, table)
    bias = table[index].view(q.shape[1], q.shape[1], -1).permute(2, 0, 1)[None]
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale).transpose(1, 2)


_indices: dict[tuple[tuple[int, int], torch.device], Tensor] = {}


def _position_index(window: tuple[int, int], table: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return reference.relative_position_index(window, table.device).view(-1)
    key = (window, table.device)
    if key not in _indices:
        # Whoever asks first may be in inference mode; what is kept must serve training too.
        with torch.inference_mode(False):
            _indices[key] = reference.relative_position_index(window, table.device).view(-1)
    return _indices[key]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention of packed sequences, each over its own keys: self-attention without padding, or cross-attention.

    Args:
        q: `[Tq, H, D]`; k, v: `[Tk, H, D]`; any strides. The sequences lie one after the other.
        cu_seqlens_q, cu_seqlens_k: `[S + 1]` int32 or int64 offsets, starting with 0 and ending with Tq and Tk.
            Lengths may be zero on either side; queries without keys receive zeros.
        max_q, max_k: upper bounds of the lengths.
        dropout_p: probability of dropping an attention weight.
        scale: of the products; 1/sqrt(D) by default.
        key_mask: `[Tk]` boolean, False for keys that nobody attends to.

    Returns:
        `[Tq, H, D]`.
    """
    _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if _resolve(backend, q, k, v) == "reference" or q.device.type != "cpu":
        return reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, dropout_p, key_mask)
    bounds_q, bounds_k = _bounds(cu_seqlens_q, q, max_q, "q"), _bounds(cu_seqlens_k, k, max_k, "k")
    return cpu_attention.varlen_attention(q, k, v, bounds_q, bounds_k, scale, dropout_p, key_mask)


def _check_relpos(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, window: tuple[int, int], key_mask: Tensor | None
) -> None:
    if not q.ndim == k.ndim == v.ndim == 4 or not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k, v must all be [B, N, H, D]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    height, width = window
    if q.shape[1] != 1 + height * width:
        raise ValueError(
            f"q has {q.shape[1]} tokens; a {height}x{width} window with a class token has {1 + height * width}"
        )
    rows = (2 * height - 1) * (2 * width - 1) + 3
    if table.shape != (rows, q.shape[2]):
        raise ValueError(
            f"table is {[*table.shape]}; a {height}x{width} window with {q.shape[2]} heads needs "
            f"[{rows}, {q.shape[2]}]: interpolate it when the resolution changes"
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != q.shape[:2]):
        raise ValueError(f"key_mask is {key_mask.dtype} {[*key_mask.shape]}; it must be bool {[*q.shape[:2]]}")


def _check_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_mask: Tensor | None
) -> None:
    if not q.ndim == k.ndim == v.ndim == 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q must be [Tq, H, D] and k, v [Tk, H, D]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets.ndim != 1 or offsets.numel() < 1 or offsets.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {offsets.dtype} {[*offsets.shape]}; it must be int32 or int64 [S + 1]")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"cu_seqlens_q has {cu_seqlens_q.numel()} offsets and cu_seqlens_k {cu_seqlens_k.numel()}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != k.shape[:1]):
        raise ValueError(f"key_mask is {key_mask.dtype} {[*key_mask.shape]}; it must be bool [{k.shape[0]}]")


def _bounds(offsets: Tensor, packed: Tensor, longest: int, name: str) -> tuple[int, ...]:
    bounds = tuple(offsets.tolist())
    if bounds[0] != 0 or bounds[-1] != packed.shape[0]:
        raise ValueError(
            f"cu_seqlens_{name} runs from {bounds[0]} to {bounds[-1]}; it must run from 0 to {packed.shape[0]}"
        )
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens_{name} decreases; offsets must not")
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_{name}={longest} is smaller than the longest sequence, {max(lengths)}")
    return bounds
