"""Linear layers on CPU in training: products whose weight changes at every step, and their gradients, fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import onednn_linear
from .selection import select
from .workspace import scratch

# Shapes of the products that decide: two images through a layer of a base-size encoder, and as many as a weight's
# gradient sums over in one step of it.
_ROWS, _SUMMED, _WIDTH = 394, 1576, 768
# Rows that are transposed at once. The columns of wider blocks collide in cache.
_BLOCK = 64


def trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` for x `[..., K]`, weight `[M, K]`; nothing is kept of the weight."""
    name = select("trained linear", _LINEAR, _linear_example, x.dtype)
    return _LINEAR[name](x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def input_gradient(dout: Tensor, weight: Tensor) -> Tensor:
    """`dout W`: `[..., M]`, `[M, K]` → `[..., K]`."""
    name = select("input gradient", _INPUT, _input_example, dout.dtype)
    return _INPUT[name](dout.reshape(-1, dout.shape[-1]), weight).view(*dout.shape[:-1], weight.shape[1])


def weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """`dout^T x`, summed over all rows: `[..., M]`, `[..., K]` → `[M, K]`."""
    name = select("weight gradient", _WEIGHT, _weight_example, dout.dtype)
    return _WEIGHT[name](dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1]))


def bias_gradient(dout: Tensor) -> Tensor:
    """`[..., M]` → `[M]`."""
    return dout.reshape(-1, dout.shape[-1]).sum(0)


def _transpose(x: Tensor, place: Tensor) -> Tensor:
    """`[n, m]` into a contiguous `[m, n]`."""
    for start in range(0, x.shape[0], _BLOCK):
        place[:, start : start + _BLOCK] = x[start : start + _BLOCK].t()
    return place


def _aten_input(dout: Tensor, weight: Tensor) -> Tensor:
    return dout @ weight


def _onednn_input(dout: Tensor, weight: Tensor) -> Tensor:
    return onednn_linear(dout, weight.t(), None)


def _aten_weight(dout: Tensor, x: Tensor) -> Tensor:
    return dout.t() @ x


def _transposed_weight(dout: Tensor, x: Tensor, product: Callable[[Tensor, Tensor], Tensor] = torch.mm) -> Tensor:
    """The narrower of the two is transposed first: libraries do that less well inside of a half-precision product."""
    narrow, wide = (dout, x) if dout.shape[1] <= x.shape[1] else (x, dout)
    found = product(_transpose(narrow, scratch("transposed", (narrow.shape[1], narrow.shape[0]), x.dtype)), wide)
    return found if narrow is dout else _transpose(found, found.new_empty(found.shape[1], found.shape[0]))


def _onednn_weight(dout: Tensor, x: Tensor) -> Tensor:
    return _transposed_weight(dout, x, _onednn_input)


_LINEAR: dict[str, Callable[..., Tensor]] = {"aten": F.linear, "onednn": onednn_linear}
_INPUT: dict[str, Callable[..., Tensor]] = {"aten": _aten_input, "onednn": _onednn_input}
_WEIGHT: dict[str, Callable[..., Tensor]] = {
    "aten": _aten_weight,
    "transposed": _transposed_weight,
    "onednn": _onednn_weight,
}


def _random(dtype: torch.dtype, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple((torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype) for shape in shapes)


def _linear_example(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _random(dtype, (_ROWS, _WIDTH), (_WIDTH, _WIDTH), (_WIDTH,))


def _input_example(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _random(dtype, (_ROWS, _WIDTH), (_WIDTH, _WIDTH))


def _weight_example(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _random(dtype, (_SUMMED, _WIDTH), (_SUMMED, _WIDTH))
