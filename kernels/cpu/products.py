"""Linear layers on CPU for inference: fp32 and bf16, with the GELU or the residual fused where oneDNN does it faster."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derived import derived
from .selection import select

# Shape of the products that decide: one layer's worth of packed caption tokens.
_ROWS, _INPUTS, _OUTPUTS = 416, 768, 1536


def _packed(weight: Tensor, rows: int) -> Tensor:
    """The weight in the blocked layout that oneDNN multiplies without reordering it at every call."""
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return derived("onednn-packed", (weight,), lambda: reorder(weight.detach(), rows))


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _packed(weight, x.shape[0]), bias, "none", [], "")


def _aten_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.aten.gelu_(F.linear(x, weight, bias))


def _onednn_then_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.aten.gelu_(_onednn_linear(x, weight, bias))


def _onednn_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")


def _packed_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _packed(weight, x.shape[0]), bias, "gelu", [], "none")


def _aten_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return F.linear(x, weight, bias).add_(residual)


def _onednn_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


def _packed_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, _packed(weight, x.shape[0]), bias, "add")


_LINEAR: dict[str, Callable[..., Tensor]] = {
    "aten": F.linear,
    "onednn": _onednn_linear,
    "onednn-packed": _packed_linear,
}
_GELU: dict[str, Callable[..., Tensor]] = {
    "aten": _aten_gelu,
    "onednn+gelu": _onednn_then_gelu,
    "onednn": _onednn_gelu,
    "onednn-packed": _packed_gelu,
}
_RESIDUAL: dict[str, Callable[..., Tensor]] = {
    "aten": _aten_residual,
    "onednn": _onednn_residual,
    "onednn-packed": _packed_residual,
}


def _example(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, _INPUTS, generator=generator)
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=generator) / _INPUTS**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(_OUTPUTS, generator=generator).to(dtype)


def _residual_example(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, weight, bias = _example(dtype)
    return x, weight, bias, torch.randn(_ROWS, _OUTPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` for x `[..., K]`, weight `[M, K]`."""
    name = select("linear", _LINEAR, _example, x.dtype)
    return _LINEAR[name](_rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`gelu(x W^T + b)`, erf form."""
    name = select("linear_gelu", _GELU, _example, x.dtype)
    return _GELU[name](_rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None) -> Tensor:
    """`residual + gamma · (x W^T + b)`. LayerScale is folded into the weight where the addition is fused."""
    name = select("linear_residual", _RESIDUAL, _residual_example, x.dtype)
    rows, sums = _rows(x), _rows(residual)
    if gamma is None:
        out = _RESIDUAL[name](rows, weight, bias, sums)
    elif name == "aten":
        product = F.linear(rows, weight, bias)
        out = torch.addcmul(sums, product, gamma, out=product)
    else:
        scaled_weight = derived("layer-scaled weight", (weight, gamma), lambda: weight * gamma[:, None])
        scaled_bias = None if bias is None else derived("layer-scaled bias", (bias, gamma), lambda: bias * gamma)
        out = _RESIDUAL[name](rows, scaled_weight, scaled_bias, sums)
    return out.view(residual.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
