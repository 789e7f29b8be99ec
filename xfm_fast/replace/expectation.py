"""The gain to expect of a report: counted products, times how much faster this processor was measured to compute them.

Shares of the products with weights are counted (a weight is multiplied with every token); the factor is that of the
libraries' race for products (`kernels/cpu/selection`), which the first call runs; the share of real tokens is that of
the batch given to `verify`. Attention and norms are in none of these, so that this is a bound: where `verify` measured
less, that is what is expected.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from xfm_fast.kernels.backend import Backend
from xfm_fast.kernels.cpu import products
from xfm_fast.kernels.cpu.selection import selections

_RACES = ("linear", "linear_gelu", "linear_residual")
# Less than this is noise.
_SLOWER = 1.05
# Less of a model's products than this is not worth a line.
_LEAST_SHARE = 0.05


@dataclass(frozen=True)
class Expectation:
    """The expected gain of a replaced model.

    Attributes:
        share: of the model's products that replaced modules compute.
        product: how many times faster these were measured to be on this processor; None before the first call, and on
            devices where they are not raced.
        useful: share of real tokens in a batch whose padding is left out; 1 where none is.
        packed: of the model's products that are spared padding.
        measured: how many times faster the batch given to `verify` ran; None without one, and on GPUs.
    """

    share: float
    product: float | None
    useful: float = 1.0
    packed: float = 0.0
    measured: float | None = None

    @property
    def bound(self) -> float:
        """How many times faster the model would be if its time were that of its products."""
        computed = self.share - self.packed * (1 - self.useful)
        return 1 / (1 - self.share + computed / (self.product or 1.0))

    @property
    def overall(self) -> float:
        """How many times faster the model is expected to be, never more than was measured."""
        return self.bound if self.measured is None else min(self.bound, self.measured)

    def __str__(self) -> str:
        parts = [f"{self.share:.0%} of the products are in replaced modules (counted)"]
        if self.product is None:
            parts.append("products not timed here yet: taken as they were")
        else:
            parts.append(f"these {self.product:.2f}× as fast (measured in this process)")
        if self.measured is not None:
            parts.append(f"the batch given to verify ran {self.measured:.2f}× as fast (measured)")
        if self.useful < 1:
            parts.append(f"{1 - self.useful:.0%} of the batch is padding, left out")
        most = "at most " if self.measured is None and self.bound > 1 else ""
        return f"expected: {most}{self.overall:.2f}×; " + ", ".join(parts)


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


class Unknown(NamedTuple):
    """Layers of one class that no rule recognises.

    Attributes:
        class_name: their class.
        paths: their qualified names.
        share: of the model's products that are in them.
    """

    class_name: str
    paths: list[str]
    share: float

    def __str__(self) -> str:
        alike = f" and {len(self.paths) - 1} alike" if len(self.paths) > 1 else ""
        return f"{self.class_name} ({self.paths[0]}{alike}), {self.share:.0%} of the products"


def unknown_layers(model: nn.Module, chosen: Mapping[str, nn.Module], known: Collection[nn.Module]) -> list[Unknown]:
    """The layers of a model that no rule recognises and that are worth naming, the largest share first.

    A layer is an element of a list of modules of one class. Embeddings and heads are left out, as they are anyway.

    Args:
        chosen: the modules that were looked at, by qualified name.
        known: what a rule recognises, replaced or not, and the parts of it.
    """
    # Modules around recognised ones are no unknown layers.
    around = {place for path, module in chosen.items() if module in known for place in _places(path)}
    alike = Counter(_kind_of_element(each) for each in chosen.items() if each[0])
    holding = {path: _weights(part) for path, part in model.named_modules()}
    total = sum(p.numel() for p in {p for weights in holding.values() for p in weights}) or 1
    found: dict[str, dict[str, int]] = {}
    counted: set[nn.Parameter] = set()
    for path, module in chosen.items():
        own = [p for p in holding[path] if p not in counted]
        if module in known or not own:
            continue
        # The innermost, since stages of layers are lists too; a linear layer by itself is none.
        elements = [place for place in _places(path)[::-1] if place in chosen and place.rpartition(".")[2].isdigit()]
        layer = next((e for e in elements if alike[_kind_of_element((e, chosen[e]))] > 1 and not holding[e]), None)
        if layer is not None and layer not in around:
            counted.update(own)
            places = found.setdefault(type(chosen[layer]).__name__, {})
            places[layer] = places.get(layer, 0) + sum(p.numel() for p in own)
    made = [Unknown(name, [*places], sum(places.values()) / total) for name, places in found.items()]
    return sorted((one for one in made if one.share >= _LEAST_SHARE), key=lambda one: -one.share)


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """The matrices of a module's own, whatever class it is of; those of embeddings are looked up."""
    looked_up = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    return [] if looked_up else [p for p in module.parameters(recurse=False) if p.ndim > 1]


def _kind_of_element(named: tuple[str, nn.Module]) -> tuple[str, type[nn.Module]]:
    return named[0].rpartition(".")[0], type(named[1])


def _places(path: str) -> list[str]:
    """The qualified names of a module and of all around it, the outermost first."""
    steps = path.split(".")
    return [".".join(steps[:end]) for end in range(1, len(steps) + 1)]


def measured_product(model: nn.Module, backend: Backend | None, dtype: torch.dtype | None) -> float | None:
    """How many times faster chosen libraries are than PyTorch's default at the product that gains least, less the noise
    of the comparison; None where nothing was timed.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None or first.device.type != "cpu" or backend not in (None, "cpu"):
        return None
    wanted = dtype or first.dtype
    races = [race for race in selections() if race.operation in _RACES and race.dtype == wanted]
    factors = [race.seconds[next(iter(race.seconds))] / race.seconds[race.chosen] for race in races if race.seconds]
    noise = max((race.noise for race in races), default=0.0)
    # Where the default was chosen, noise changes nothing.
    return min((max(factor / (1 + noise), min(factor, 1.0)) for factor in factors if factor == factor), default=None)


@cache
def warn_of_slow_bfloat16() -> None:
    """Warn, once, where products in bfloat16 take longer than in float32 on this processor."""
    share = products.seconds(torch.bfloat16) / products.seconds(torch.float32)
    if share > _SLOWER:
        warnings.warn(
            f"bfloat16 takes {share:.1f} times as long as float32 on this CPU; use dtype=None with model.float()",
            stacklevel=3,
        )
