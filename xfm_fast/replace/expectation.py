"""The gain to expect of a report: counted products, times how much faster this processor was measured to compute them.

A transformer's time goes by its products with weights. Their shares are counted (a weight is multiplied with every
token); the factor is that of the libraries' race for products (`kernels/cpu/selection`), which the first call runs; the
share of real tokens is that of the batch given to `verify`. Attention, norms and what stays unfused count as they were.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from xfm_fast.kernels.backend import Backend
from xfm_fast.kernels.cpu.selection import selections

_RACES = ("linear", "linear_gelu", "linear_residual")


@dataclass(frozen=True)
class Expectation:
    """The expected gain of a replaced model.

    Attributes:
        share: of the model's products that replaced modules compute.
        product: how many times faster these were measured to be on this processor; None before the first call, and on
            devices where they are not raced.
        useful: share of real tokens in a batch whose padding is left out; 1 where none is.
    """

    share: float
    product: float | None
    useful: float = 1.0

    @property
    def overall(self) -> float:
        """How many times faster the model is expected to be."""
        return 1 / (1 - self.share + self.share * self.useful / (self.product or 1.0))

    def __str__(self) -> str:
        parts = [f"{self.share:.0%} of the products are in replaced modules (counted)"]
        if self.product is None:
            parts.append("products not timed here yet: taken as they were")
        else:
            parts.append(f"these {self.product:.2f}× as fast (measured in this process)")
        if self.useful < 1:
            parts.append(f"{1 - self.useful:.0%} of the batch is padding, left out")
        return f"expected: {self.overall:.2f}×; " + ", ".join(parts)


def product_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The weights that a module multiplies with tokens."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)
    found = [p for part in module.modules() if isinstance(part, kinds) for p in part.parameters(recurse=False)]
    return [p for p in found if p.ndim > 1]


def product_weights(module: nn.Module) -> dict[int, int]:
    """Their sizes, by identity."""
    return {id(p): p.numel() for p in product_parameters(module)}


def shares(model: nn.Module, parts: Iterable[nn.Module]) -> tuple[list[float], float]:
    """Share of the model's products in each part, and in all of them together, where parts may hold each other."""
    whole, united, found = product_weights(model), {}, []
    total = sum(whole.values()) or 1
    for part in parts:
        own = product_weights(part)
        united |= own
        found.append(sum(own.values()) / total)
    return found, sum(united.values()) / total


def measured_product(model: nn.Module, backend: Backend | None, dtype: torch.dtype | None) -> float | None:
    """How many times faster the chosen library is at products than PyTorch's default; None where nothing was timed."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None or first.device.type != "cpu" or backend not in (None, "cpu"):
        return None
    wanted = dtype or first.dtype
    races = [race for race in selections() if race.operation in _RACES and race.dtype == wanted]
    factors = [next(iter(race.seconds.values())) / race.seconds[race.chosen] for race in races if race.seconds]
    factors = [factor for factor in factors if factor == factor]
    return sum(factors) / len(factors) if factors else None
