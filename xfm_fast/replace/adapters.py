"""LoRA adapters (arXiv 2106.09685) of peft on linear layers inside fused modules.

Without gradients, `W + Σ s·BA` is computed once and cached until a factor changes. With gradients,
or with adapter dropout, the GEMM with `W` stays fused and each adapter adds `s·B(A(dropout(x)))`.
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
    """An active adapter, which adds `scaling · (dropout(x) Aᵀ Bᵀ + bias)` to a linear layer's output."""

    down: Tensor  # A, `[r, K]`
    up: Tensor  # B, `[M, r]`
    bias: Tensor | None  # of B, `[M]`
    scaling: float
    dropout_p: float
    casts: bool  # convert x to the dtype of A first

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """Add this adapter's output for x `[..., K]` to the layer's output `[..., M]`, in its dtype."""
        if self.casts:
            x = x.to(self.down.dtype)
        if self.dropout_p:
            x = F.dropout(x, self.dropout_p)
        # Scale in the middle: rank r is small.
        update = F.linear(F.linear(x, self.down) * self.scaling, self.up)
        if self.bias is not None:
            update = update + self.bias * self.scaling
        return out + update.to(out.dtype)


def is_adapted(layer: nn.Module) -> bool:
    """Return whether a module is a linear layer of peft with LoRA adapters, fused or not."""
    for base in type(layer).__mro__[:3]:
        if base.__name__ == "Linear" and base.__module__ == "peft.tuners.lora.layer":
            return True
    return False


def base_layer(layer: nn.Module) -> Any:
    """Return the linear layer inside adapters, or the layer itself."""
    return layer.base_layer if "base_layer" in layer._modules else layer


def why_not(layer: Any) -> str | None:
    """Return why a layer's adapters must be called as modules; None if `Addition` computes them."""
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
        plain = variant is None and not layer.use_dora.get(name)
        linear = type(layer.lora_A[name]) is nn.Linear and type(layer.lora_B[name]) is nn.Linear
        dropout = layer.lora_dropout[name]
        if not plain or not linear or not isinstance(dropout, nn.Dropout | nn.Identity):
            return f"has the adapter {name!r}, which is not plain LoRA"
    return None


def called_modules(layer: Any) -> Iterator[nn.Module]:
    """Yield the modules that peft would call for this layer now, which may have hooks."""
    yield layer.base_layer
    for name in () if layer.disable_adapters or layer.merged else _active(layer):
        yield from (layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name])


def additions(layer: Any) -> list[Addition]:
    """Return the active adapters of a layer; none if disabled or merged."""
    if "base_layer" not in layer._modules or layer.disable_adapters or layer.merged:
        return []
    casts, active = getattr(layer, "cast_input_dtype_enabled", True), []
    for name in _active(layer):
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        dropout_p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        scaling = layer.scaling[name]
        active.append(Addition(down.weight, up.weight, up.bias, scaling, dropout_p, casts))
    return active


def merge(
    weight: Tensor, bias: Tensor | None, adapters: list[Addition]
) -> tuple[Tensor, Tensor | None] | None:
    """Merge adapters into weight and bias, cached; None with gradients, dropout or a compiler."""
    factors = [
        t for adapter in adapters for t in (adapter.down, adapter.up, adapter.bias) if t is not None
    ]
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *factors))
    if trained or any(adapter.dropout_p for adapter in adapters) or torch.compiler.is_compiling():
        return None

    def merged() -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.detach().to(wide)
        for adapter in adapters:
            update = adapter.up.detach().to(wide) @ adapter.down.detach().to(wide)
            total = total + update * adapter.scaling
        return total.to(weight.dtype)

    shifts = [
        adapter.bias.detach() * adapter.scaling for adapter in adapters if adapter.bias is not None
    ]
    if shifts:
        base = torch.zeros_like(shifts[0]) if bias is None else bias
        bias = torch.stack([base.detach().to(shifts[0].dtype), *shifts]).sum(0).to(weight.dtype)
    scalings = (adapter.scaling for adapter in adapters)
    return cached("adapted", (weight, *factors), merged, *scalings), bias


def summary(models: Iterable[nn.Module]) -> str | None:
    """Return the report's line about adapters in modules; None without adapters."""
    modules = dict.fromkeys(module for model in models for module in model.modules())
    adapted: list[Any] = [module for module in modules if is_adapted(module)]
    if not adapted:
        return None
    names = dict.fromkeys(name for layer in adapted for name in _active(layer))
    off = all(layer.disable_adapters for layer in adapted)
    state = "disabled" if off else f"{', '.join(map(repr, names)) or 'none'} active"
    return f"LoRA adapters on {len(adapted)} linear layers: {state}"


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]
