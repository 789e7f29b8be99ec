"""Linear layers on CPU for inference, fp32 and bf16; GELU and residual are fused where oneDNN does it faster.

oneDNN's linear layers ignore the stride of a bias, so they are given contiguous ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derived import derived
from .selection import select
from .slices import multiply
from .workspace import scratch

# Shape of the products that decide: packed caption tokens through a layer of the base width, and a single caption.
_ROWS, _FEW_ROWS, _INPUTS, _OUTPUTS = 224, 13, 768, 768
# Below these rows products are chosen apart: MKL's fp32 ones of 13 rows take up to 1.7 times as long as of 16.
_FEW = 16
_HIDDEN_BYTES = 6 << 20


def _packed(weight: Tensor, rows: int) -> Tensor:
    """The weight in the blocked layout that oneDNN multiplies without reordering it at every call."""
    if weight.is_inference():
        # Without a version it would be packed again and again.
        return weight
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return derived("onednn-packed", (weight,), lambda: reorder(weight.detach(), rows))


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` by oneDNN: x `[n, K]`, weight `[M, K]`, any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, _dense(bias), "none", [], "")


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _packed(weight, x.shape[0]), _dense(bias), "none", [], "")


def _aten_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.aten.gelu_(F.linear(x, weight, bias))


def _onednn_then_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.aten.gelu_(onednn_linear(x, weight, bias))


def _onednn_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, _dense(bias), "gelu", [], "none")


def _packed_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _packed(weight, x.shape[0]), _dense(bias), "gelu", [], "none")


def _aten_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    # The product accumulates into the sum: one pass less than a linear layer followed by an addition.
    return (residual.clone() if bias is None else residual + bias).addmm_(x, weight.t())


def _onednn_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, _dense(bias), "add")


def _packed_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, _packed(weight, x.shape[0]), _dense(bias), "add")


_LINEAR: dict[str, Callable[..., Tensor]] = {
    "aten": F.linear,
    "onednn": onednn_linear,
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


def _example(dtype: torch.dtype, rows: int = _ROWS) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, _INPUTS, generator=generator)
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=generator) / _INPUTS**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(_OUTPUTS, generator=generator).to(dtype)


def _residual_example(dtype: torch.dtype, rows: int = _ROWS) -> tuple[Tensor, ...]:
    x, weight, bias = _example(dtype, rows)
    return x, weight, bias, torch.randn(rows, _OUTPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)


_CANDIDATES = {"linear": _LINEAR, "linear_gelu": _GELU, "linear_residual": _RESIDUAL}
_MANY = {"linear": _example, "linear_gelu": _example, "linear_residual": _residual_example}
EXAMPLES: dict[str, Callable[[torch.dtype], tuple[Tensor, ...]]] = {
    **_MANY,
    **{f"{operation} of few rows": partial(example, rows=_FEW_ROWS) for operation, example in _MANY.items()},
}
"""What is timed to choose each operation."""


def _choose(operation: str, rows: int, dtype: torch.dtype) -> str:
    candidates = _CANDIDATES[operation]
    name = select(operation, candidates, EXAMPLES[operation], dtype)
    if rows >= _FEW or "packed" in name:
        return name
    # A second copy of all weights is too much for the little that it saves here.
    light = {light: candidate for light, candidate in candidates.items() if "packed" not in light}
    few = f"{operation} of few rows"
    return select(few, light, EXAMPLES[few], dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` for x `[..., K]`, weight `[M, K]`."""
    rows = _rows(x)
    name = _choose("linear", rows.shape[0], x.dtype)
    return multiply(_LINEAR[name], rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`gelu(x W^T + b)`, erf form."""
    rows = _rows(x)
    name = _choose("linear_gelu", rows.shape[0], x.dtype)
    return multiply(_GELU[name], rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None) -> Tensor:
    """`residual + gamma · (x W^T + b)`. LayerScale is folded into the weight where the addition is fused."""
    rows, sums = _rows(x), _rows(residual)
    name = _choose("linear_residual", rows.shape[0], x.dtype)
    if gamma is None:
        out = multiply(_RESIDUAL[name], rows, weight, bias, sums)
    elif name == "aten":
        product = multiply(F.linear, rows, weight, bias)
        out = torch.addcmul(sums, product, gamma, out=product)
    else:
        scaled_weight = derived("layer-scaled weight", (weight, gamma), lambda: weight * gamma[:, None])
        scaled_bias = None if bias is None else derived("layer-scaled bias", (bias, gamma), lambda: bias * gamma)
        out = multiply(_RESIDUAL[name], rows, scaled_weight, scaled_bias, sums)
    return out.view(residual.shape)


def mlp_residual(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None,
) -> Tensor:
    """`residual + gamma · (gelu(x W1^T + b1) W2^T + b2)`, a slice of rows at a time.

    The hidden layer is four times as wide as the rest. Whole, it is a buffer that the allocator returns to the system
    and faults in again, page by page, in every layer; a slice of it stays in cache. (oneDNN products cannot be told
    where to put their result, so they run whole.)
    """
    rows, sums = _rows(x), _rows(residual)
    first, second = (_choose(operation, rows.shape[0], x.dtype) for operation in ("linear_gelu", "linear_residual"))
    if first != "aten" or second != "aten" or bias_in is None or bias_out is None:
        return linear_residual(linear_gelu(rows, weight_in, bias_in), weight_out, bias_out, residual, gamma)
    step = max(1, _HIDDEN_BYTES // (weight_in.shape[0] * x.element_size()))
    hidden = scratch("hidden", (min(step, rows.shape[0]), weight_in.shape[0]), x.dtype)
    out = torch.empty_like(sums)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        middle = hidden[: rows[part].shape[0]]
        torch.ops.aten.gelu_(torch.addmm(bias_in, rows[part], weight_in.t(), out=middle))
        if gamma is None:
            torch.add(sums[part], bias_out, out=out[part]).addmm_(middle, weight_out.t())
        else:
            product = torch.addmm(bias_out, middle, weight_out.t(), out=out[part])
            torch.addcmul(sums[part], product, gamma, out=product)
    return out.view(residual.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
