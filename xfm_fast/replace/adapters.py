"""LoRA adapters (arXiv 2106.09685) of peft on linear layers inside fused modules.

Without gradients, `W + Σ s·BA` is computed once and cached until a factor changes. With gradients, or with adapter
dropout, the GEMM with `W` stays fused and each adapter adds `s·B(A(dropout(x)))`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels.caching import cached


class Adaptable(nn.Module):
    """Marker in `Fused.bypassed`: a linear layer that may carry LoRA adapters."""


class Addition(NamedTuple):
    """An active adapter: adds `scaling · (dropout(x) Aᵀ Bᵀ + bias)` to the output of a linear layer."""

    down: Tensor  # A, `[r, K]`
    up: Tensor  # B, `[M, r]`
    bias: Tensor | None  # of B, `[M]`
    scaling: float
    dropout_p: float
    casts: bool  # convert x to the dtype of A first

    def __call__(self, x: Tensor, product: Tensor) -> Tensor:
        """Add this adapter's output for x `[..., K]` to `[..., M]`, in the dtype of the latter."""
        if self.casts:
            x = x.to(self.down.dtype)
        if self.dropout_p:
            x = F.dropout(x, self.dropout_p)
        # Scale in the middle: rank r is small.
        added = F.linear(F.linear(x, self.down) * self.scaling, self.up)
        if self.bias is not None:
            added = added + self.bias * self.scaling
        return product + added.to(product.dtype)


def is_adapted(layer: nn.Module) -> bool:
    """True for a linear layer of peft with LoRA adapters, fused or not."""
    return any(
        kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.lora.layer"
        for kind in type(layer).__mro__[:3]
    )


def base_layer(layer: nn.Module) -> Any:
    """The linear layer inside adapters, or the layer itself."""
    return layer.base_layer if "base_layer" in layer._modules else layer


def why_not(layer: Any) -> str | None:
    """Why the adapters of a layer must be called as modules; None if they can be computed here."""
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
        plain = getattr(layer, "lora_variant", {}).get(name) is None and not layer.use_dora.get(
            name
        )
        linear = type(layer.lora_A[name]) is nn.Linear and type(layer.lora_B[name]) is nn.Linear
        if (
            not plain
            or not linear
            or not isinstance(layer.lora_dropout[name], nn.Dropout | nn.Identity)
        ):
            return f"has the adapter {name!r} of another kind than plain LoRA"
    return None


def parts_called(layer: Any) -> Iterator[nn.Module]:
    """The modules that peft would call for this layer now; hooks may be on them."""
    yield layer.base_layer
    for name in () if layer.disable_adapters or layer.merged else _active(layer):
        yield from (layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name])


def additions(layer: Any) -> list[Addition]:
    """The active adapters of a layer; empty if disabled or merged."""
    if "base_layer" not in layer._modules or layer.disable_adapters or layer.merged:
        return []
    casts, found = getattr(layer, "cast_input_dtype_enabled", True), []
    for name in _active(layer):
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        chance = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        found.append(Addition(down.weight, up.weight, up.bias, layer.scaling[name], chance, casts))
    return found


def added(
    weight: Tensor, bias: Tensor | None, found: list[Addition]
) -> tuple[Tensor, Tensor | None] | None:
    """Weight `[M, K]` and bias `[M]` with merged adapters, cached; None with gradients, dropout or a compiler."""
    factors = [t for one in found for t in (one.down, one.up, one.bias) if t is not None]
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *factors))
    if trained or any(one.dropout_p for one in found) or torch.compiler.is_compiling():
        return None

    def summed() -> Tensor:
        total = (
            weight.detach().float() if weight.dtype != torch.float64 else weight.detach().clone()
        )
        for one in found:
            total = (
                total
                + (one.up.detach().to(total.dtype) @ one.down.detach().to(total.dtype))
                * one.scaling
            )
        return total.to(weight.dtype)

    shifts = [one.bias.detach() * one.scaling for one in found if one.bias is not None]
    if shifts:
        base = torch.zeros_like(shifts[0]) if bias is None else bias
        bias = torch.stack([base.detach().to(shifts[0].dtype), *shifts]).sum(0).to(weight.dtype)
    return cached("adapted", (weight, *factors), summed, *(one.scaling for one in found)), bias


def summary(modules: Iterable[nn.Module]) -> str | None:
    """Report line about the adapters in these modules; None without adapters."""
    inside = dict.fromkeys(part for module in modules for part in module.modules())
    adapted: list[Any] = [part for part in inside if is_adapted(part)]
    if not adapted:
        return None
    names = dict.fromkeys(name for layer in adapted for name in _active(layer))
    off = all(layer.disable_adapters for layer in adapted)
    state = "disabled" if off else f"{', '.join(map(repr, names)) or 'none'} active"
    return f"LoRA adapters on {len(adapted)} linear layers: {state}"


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]
