"""Low-rank adapters (LoRA, arXiv 2106.09685) of the package peft on linear layers that fused forms compute around.

A fused form that multiplies by layers (`Settings.products`), not by their weights, takes adapted layers too. Without
gradients `W + Σ s·BA` is made once and kept until one of its factors changes, so an adapter costs nothing. With
gradients, or while dropout of the adapter draws, the product by `W` stays one for several layers and each adapter adds
`s·B(A(dropout(x)))` to its part, as peft does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels.derived import derived


class Adaptable(nn.Module):
    """Stands among the classes that a fused form takes a part for: a linear layer that may carry adapters."""


class Addition(NamedTuple):
    """One adapter at work: `scaling · (dropout(x) Aᵀ Bᵀ + bias)` is added to a product.

    Attributes:
        down: A, `[r, K]`.
        up: B, `[M, r]`.
        bias: of B, `[M]`, or None.
        dropout_p: probability of dropping an element of x just now.
        casts: x is taken to the type of A first.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float
    casts: bool

    def __call__(self, x: Tensor, product: Tensor) -> Tensor:
        """The product `[..., M]` of x `[..., K]` with this added, in the type of the product."""
        if self.casts:
            x = x.to(self.down.dtype)
        if self.dropout_p:
            x = F.dropout(x, self.dropout_p)
        # Scaling the few numbers in the middle spares a pass over the many at the end.
        added = F.linear(F.linear(x, self.down) * self.scaling, self.up)
        if self.bias is not None:
            added = added + self.bias * self.scaling
        return product + added.to(product.dtype)


def is_adapted(layer: nn.Module) -> bool:
    """True for a linear layer of peft with LoRA adapters around it, fused or not."""
    return any(
        kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.lora.layer" for kind in type(layer).__mro__[:3]
    )


def base_layer(layer: nn.Module) -> Any:
    """The linear layer inside of adapters, or the layer itself."""
    return layer.base_layer if "base_layer" in layer._modules else layer


def why_not(layer: Any) -> str | None:
    """The reason why adapters of a layer have to be called; None if what they do is known."""
    base = layer.base_layer
    if "weight" not in base._parameters:
        return "adapts a frozen layer; accelerate again without freeze=True"
    if type(base) is not nn.Linear:
        return f"adapts a {type(base).__name__}"
    if getattr(layer, "fan_in_fan_out", False):
        return "keeps its weight transposed"
    if layer.disable_adapters:
        return "still has its disabled adapters merged into the weight" if layer.merged else None
    if layer.merged:
        return None
    for name in _active(layer):
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None or layer.use_dora.get(name):
            kind = "DoRA" if variant is None else type(variant).__name__.removesuffix("LinearVariant")
            return f"has the adapter {name!r} of another kind than plain LoRA ({kind})"
        if not isinstance(layer.lora_dropout[name], nn.Dropout | nn.Identity):
            return f"drops the input of {name!r} by a {type(layer.lora_dropout[name]).__name__}"
        if type(layer.lora_A[name]) is not nn.Linear or type(layer.lora_B[name]) is not nn.Linear:
            return f"has the adapter {name!r} made of other layers than linear ones"
    return None


def parts_called(layer: Any) -> Iterator[nn.Module]:
    """The modules that peft would call for a layer just now, on which hooks may lie."""
    yield layer.base_layer
    for name in () if layer.disable_adapters or layer.merged else _active(layer):
        yield from (layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name])


def additions(layer: Any) -> list[Addition]:
    """The adapters of a layer that add to its product just now; none where they are disabled or merged."""
    if "base_layer" not in layer._modules or layer.disable_adapters or layer.merged:
        return []
    casts, found = getattr(layer, "cast_input_dtype_enabled", True), []
    for name in _active(layer):
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        chance = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        found.append(Addition(down.weight, up.weight, up.bias, layer.scaling[name], chance, casts))
    return found


def added(weight: Tensor, bias: Tensor | None, found: list[Addition]) -> tuple[Tensor, Tensor | None] | None:
    """Weight `[M, K]` and bias `[M]` with adapters added, kept until one of them changes.

    None where they must stay apart: a gradient is wanted, dropout draws, or a compiler, which keeps nothing, looks.
    """
    factors = [t for one in found for t in (one.down, one.up, one.bias) if t is not None]
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *factors))
    if trained or any(one.dropout_p for one in found) or torch.compiler.is_compiling():
        return None
    # The numbers are no tensors, so a change of them has to show in the name.
    name = f"adapted by {[one.scaling for one in found]}"

    def summed() -> Tensor:
        total = weight.detach().float() if weight.dtype != torch.float64 else weight.detach().clone()
        for one in found:
            total = total + (one.up.detach().to(total.dtype) @ one.down.detach().to(total.dtype)) * one.scaling
        return total.to(weight.dtype)

    shifts = [one.bias.detach() * one.scaling for one in found if one.bias is not None]
    if shifts:
        base = torch.zeros_like(shifts[0]) if bias is None else bias
        bias = torch.stack([base.detach().to(shifts[0].dtype), *shifts]).sum(0).to(weight.dtype)
    return derived(name, (weight, *factors), summed), bias


def summary(modules: Iterable[nn.Module]) -> str | None:
    """A line about the adapters in some modules for a report; None without any."""
    inside = dict.fromkeys(part for module in modules for part in module.modules())
    adapted: list[Any] = [part for part in inside if is_adapted(part)]
    if not adapted:
        return None
    names = dict.fromkeys(name for layer in adapted for name in _active(layer))
    merged = sum(bool(layer.merged) for layer in adapted)
    off = all(layer.disable_adapters for layer in adapted)
    state = "disabled" if off else f"{', '.join(map(repr, names)) or 'none'} at work"
    return f"LoRA adapters on {len(adapted)} linear layers: {state}" + (f", merged in {merged}" if merged else "")


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]
