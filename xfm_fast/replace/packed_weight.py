"""Weights of linear layers that lie side by side in one place, in the layout of the CPU's fastest library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.kernels.cpu import products

_PLACE = "_xfm_fast_weight"


class PackedWeight:
    """Weights `[M₁, K]`, `[M₂, K]`, … as one of `[ΣM, K]`: blocked for oneDNN where that is faster here, else dense.

    Attributes:
        tensor: all of them.
        sizes: M of each.
    """

    def __init__(self, weights: Sequence[Tensor], *, blocked: bool | None = None) -> None:
        joined = torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()
        blocked = products.prefers_onednn(joined.dtype) if blocked is None else blocked
        # A single dense weight is a copy too: the storage that it came in is given up.
        self.tensor: Tensor = products.laid_out(joined) if blocked else joined.clone() if len(weights) == 1 else joined
        self.sizes = [weight.shape[0] for weight in weights]

    @property
    def blocked(self) -> bool:
        return self.tensor.is_mkldnn

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def dense(self) -> list[Tensor]:
        """Each of the weights, to the bit; views of one tensor."""
        tensor = self.tensor.to_dense() if self.blocked else self.tensor
        return list(tensor.split(self.sizes))

    def applies(self, x: Tensor, *others: Tensor | None) -> bool:
        """True if the blocked layout can be multiplied now: what needs gradients, autocast or a compiler cannot."""
        if not self.blocked or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        present = [t for t in (x, *others) if t is not None]
        if any(t.dtype != self.tensor.dtype or t.device.type != "cpu" for t in present):
            return False
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in present))

    def linear(self, x: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
        """`x Wᵀ + b`, or its GELU: `[..., K]` → `[..., ΣM]`."""
        if self.applies(x, bias):
            return (products.linear_gelu if gelu else products.linear)(x, self.tensor, bias)
        weight = self.tensor.to_dense() if self.blocked else self.tensor
        return (ops.linear_gelu if gelu else ops.linear)(x, weight, bias)

    def residual(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """`residual + x Wᵀ + b`."""
        if self.applies(x, bias, residual):
            return products.linear_residual(x, self.tensor, bias, residual, None)
        return residual + self.linear(x, bias)

    def __reduce__(self) -> Any:
        # A blocked tensor has no storage that could be copied or written.
        return _unpickled, (self.dense(), self.blocked)


def _unpickled(weights: list[Tensor], blocked: bool) -> PackedWeight:
    return PackedWeight(weights, blocked=blocked)


def place(layer: nn.Module, packed: PackedWeight, number: int) -> None:
    """Note on a layer that its weight is the one of this number in a pack."""
    layer.__dict__[_PLACE] = packed, number


def place_of(layer: nn.Module) -> tuple[PackedWeight, int]:
    """The pack of a layer, and the number of its weight there."""
    return layer.__dict__[_PLACE]


def displace(layer: nn.Module) -> None:
    """Take the note off again."""
    del layer.__dict__[_PLACE]


def pack_of(layers: Sequence[nn.Module]) -> PackedWeight | None:
    """The pack that holds the weights of exactly these layers, in order; None if there is none.

    Raises:
        InputError: one is to be trained.
    """
    if _PLACE not in layers[0].__dict__:
        return None
    if layers[0].training and torch.is_grad_enabled():
        raise InputError(
            "the model is frozen for inference and in training mode; call model.eval(), or report.revert() to train it"
        )
    packed = place_of(layers[0])[0]
    whole = len(layers) == len(packed.sizes)
    alike = all(layer.__dict__.get(_PLACE) == (packed, number) for number, layer in enumerate(layers))
    return packed if whole and alike else None
