"""Linear layers with what follows them: checks of the moment, and PyTorch operations where a gradient is wanted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .backend import Backend, resolve
from .cpu import products as cpu_products

_CPU_DTYPES = (torch.float32, torch.bfloat16)


def _for_inference(backend: Backend | None, *tensors: Tensor | None) -> bool:
    """Whether the inference-only CPU path applies: one type it knows, no graph, no trace, no autocast."""
    if resolve(backend, *tensors) != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    present = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in present):
        return False
    return present[0].dtype in _CPU_DTYPES and all(t.dtype == present[0].dtype for t in present)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None) -> Tensor:
    """`x W^T + b`. x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    if _for_inference(backend, x, weight, bias):
        return cpu_products.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None) -> Tensor:
    """`gelu(x W^T + b)` with the erf form of GELU. x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    if _for_inference(backend, x, weight, bias):
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
    plain = row_scale is None and not dropout_p
    if plain and _for_inference(backend, x, weight, bias, residual, gamma):
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
    plain = row_scale is None and not dropout_p
    if plain and _for_inference(backend, x, weight_in, bias_in, weight_out, bias_out, residual, gamma):
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
