"""Expected speedup of a report: share of linear weights, times the speedup of GEMMs measured on this processor.

Attention and norms are not counted, so this is an upper bound; a smaller speedup measured by `verify` replaces it.
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
from xfm_fast.kernels.cpu import gemm
from xfm_fast.kernels.cpu.selection import selections

_RACES = ("linear", "linear_gelu", "linear_residual")
# Below this it is noise.
_SLOWER = 1.05
# Least share of the linear weights that is reported.
_LEAST_SHARE = 0.05


@dataclass(frozen=True)
class Expectation:
    """Expected speedup of an accelerated model."""

    share: float  # share of the model's linear weights in replaced modules
    product: float | None  # measured GEMM speedup; None before the first call and on devices without autotuning
    useful: float = 1.0  # share of real tokens in an unpadded batch; 1 with padding
    packed: float = 0.0  # share of the linear weights that skip padding
    measured: float | None = None  # measured speedup of the `verify` batch; None on GPUs

    @property
    def bound(self) -> float:
        """Speedup if the run time were that of the GEMMs."""
        computed = self.share - self.packed * (1 - self.useful)
        return 1 / (1 - self.share + computed / (self.product or 1.0))

    @property
    def overall(self) -> float:
        """Expected speedup, capped by the measured one."""
        return self.bound if self.measured is None else min(self.bound, self.measured)

    def __str__(self) -> str:
        parts = [f"{self.share:.0%} of the linear weights are in replaced modules (counted)"]
        if self.product is None:
            parts.append("GEMMs not timed here yet: counted as unchanged")
        else:
            parts.append(f"their GEMMs {self.product:.2f}× as fast (measured in this process)")
        if self.measured is not None:
            parts.append(f"the verify batch ran {self.measured:.2f}× as fast (measured)")
        if self.useful < 1:
            parts.append(f"{1 - self.useful:.0%} of the batch is padding, skipped")
        most = "at most " if self.measured is None and self.bound > 1 else ""
        return f"expected: {most}{self.overall:.2f}×; " + ", ".join(parts)


def product_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The weights of linear, convolution and attention layers in a module."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)
    found = [p for part in module.modules() if isinstance(part, kinds) for p in part.parameters(recurse=False)]
    return [p for p in found if p.ndim > 1]


def product_weights(module: nn.Module) -> dict[int, int]:
    """Their sizes, by identity."""
    return {id(p): p.numel() for p in product_parameters(module)}


def shares(model: nn.Module, parts: Iterable[nn.Module]) -> tuple[list[float], float]:
    """Share of the model's linear weights in each part, and in their union (parts may be nested)."""
    whole, united, found = product_weights(model), {}, []
    total = sum(whole.values()) or 1
    for part in parts:
        own = product_weights(part)
        united |= own
        found.append(sum(own.values()) / total)
    return found, sum(united.values()) / total


class Unknown(NamedTuple):
    """Unrecognised layers of one class, with their paths and share of the model's linear weights."""

    class_name: str
    paths: list[str]
    share: float

    def __str__(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.class_name} ({self.paths[0]}{more}), {self.share:.0%} of the linear weights"


def unknown_layers(model: nn.Module, chosen: Mapping[str, nn.Module], known: Collection[nn.Module]) -> list[Unknown]:
    """Unrecognised repeated layers with a relevant share of the weights, largest first; no embeddings or heads."""
    # Ancestors of recognised modules are not unknown layers.
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
        # The innermost list element (stages contain lists of layers); a bare linear layer does not count.
        elements = [place for place in _places(path)[::-1] if place in chosen and place.rpartition(".")[2].isdigit()]
        layer = next((e for e in elements if alike[_kind_of_element((e, chosen[e]))] > 1 and not holding[e]), None)
        if layer is not None and layer not in around:
            counted.update(own)
            places = found.setdefault(type(chosen[layer]).__name__, {})
            places[layer] = places.get(layer, 0) + sum(p.numel() for p in own)
    made = [Unknown(name, [*places], sum(places.values()) / total) for name, places in found.items()]
    return sorted((one for one in made if one.share >= _LEAST_SHARE), key=lambda one: -one.share)


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """The matrices directly on a module, except embedding tables."""
    looked_up = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    return [] if looked_up else [p for p in module.parameters(recurse=False) if p.ndim > 1]


def _kind_of_element(named: tuple[str, nn.Module]) -> tuple[str, type[nn.Module]]:
    return named[0].rpartition(".")[0], type(named[1])


def _places(path: str) -> list[str]:
    """Qualified names of a module and its ancestors, outermost first."""
    steps = path.split(".")
    return [".".join(steps[:end]) for end in range(1, len(steps) + 1)]


def measured_product(model: nn.Module, backend: Backend | None, dtype: torch.dtype | None) -> float | None:
    """Lowest measured speedup of the chosen GEMM libraries over PyTorch's default, minus noise; None if untimed."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None or first.device.type != "cpu" or backend not in (None, "cpu"):
        return None
    wanted = dtype or first.dtype
    races = [race for race in selections() if race.operation in _RACES and race.dtype == wanted]
    factors = [race.seconds[next(iter(race.seconds))] / race.seconds[race.chosen] for race in races if race.seconds]
    noise = max((race.noise for race in races), default=0.0)
    # Noise is irrelevant where the default was chosen.
    return min((max(factor / (1 + noise), min(factor, 1.0)) for factor in factors if factor == factor), default=None)


@cache
def warn_of_slow_bfloat16() -> None:
    """Warn once if bfloat16 GEMMs are slower than float32 on this processor."""
    share = gemm.seconds(torch.bfloat16) / gemm.seconds(torch.float32)
    if share > _SLOWER:
        warnings.warn(
            f"bfloat16 takes {share:.1f} times as long as float32 on this CPU; use dtype=None with model.float()",
            stacklevel=3,
        )
