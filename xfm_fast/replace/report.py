"""The report of `accelerate`: replaced modules, reasons against the others, expected speedup, verified outputs.

The expected speedup is the share of linear weights, times the speedup of GEMMs measured on this processor. Attention
and norms are not counted, so it is an upper bound; a smaller speedup measured by `verify` replaces it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn

from xfm_fast.graphs import CallGraphs
from xfm_fast.kernels.backend import Backend
from xfm_fast.kernels.cpu.selection import selections
from xfm_fast.kernels.marked import EightBits, kind_of
from xfm_fast.models.frozen import slot_of
from xfm_fast.replace import adapters
from xfm_fast.replace.stored import FrozenLinear
from xfm_fast.replace.swap import Fused, is_fused, restore
from xfm_fast.replace.verification import Rounding

ROW = "register a LayerSpec to support it (xfm_fast.replace.register)"
_RACES = ("linear", "linear_gelu", "linear_residual")
# Least share of the linear weights that is reported.
_LEAST_SHARE = 0.05
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)


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


@dataclass(frozen=True)
class Entry:
    """A module that a rule recognised."""

    path: str  # qualified name; empty for the model itself
    class_name: str
    fused: str  # name of the fused form
    gain: str  # what the fused form saves
    reason: str | None = None  # why the module was not replaced; None if it was
    share: float = 0.0  # share of the model's linear weights in this module


class Unknown(NamedTuple):
    """Unrecognised layers of one class, with their paths and share of the model's linear weights."""

    class_name: str
    paths: list[str]
    share: float

    def __str__(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.class_name} ({self.paths[0]}{more}), {self.share:.0%} of the linear weights"


@dataclass
class Report:
    """Recognised modules: which were replaced, which were not, and why. Printing it gives a table.

    The table shows the current state: a replaced module whose parts were exchanged or hooked since (by adapters,
    quantisation, hooks) is listed with the reason why its original runs.
    """

    entries: list[Entry]
    # unrecognised layers with a relevant share of the model's linear weights
    unknown: list[Unknown] = field(default_factory=list)
    # largest difference of each verified output, relative to its largest value
    differences: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, Rounding] = field(default_factory=dict)  # error of each verified output in 8 bits
    _modules: list[nn.Module] = field(default_factory=list, repr=False)
    _frozen: list[FrozenLinear] = field(default_factory=list, repr=False)
    _eight_bits: EightBits | None = None
    _rounded: list[list[nn.Parameter]] = field(default_factory=list, repr=False)  # flagged weights of every module
    _exempt: int = 0  # modules that stay in floating point for accuracy
    _model: nn.Module | None = field(default=None, repr=False)  # the model, if its calls are replayed as graphs
    _counted: Expectation = field(default=Expectation(0.0, None), repr=False)  # without the speedup of GEMMs

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.reason is None]

    @property
    def left(self) -> list[Entry]:
        """Recognised modules that were not replaced."""
        return [entry for entry in self.entries if entry.reason is not None]

    @property
    def declining(self) -> dict[str, str]:
        """Replaced modules that currently run their original forward: path → reason."""
        found = {}
        for entry, module in zip(self.replaced, self._modules, strict=False):
            reason = module.declines() if isinstance(module, Fused) else "it was reverted"
            if reason is not None:
                found[entry.path] = reason
        return found

    @property
    def expected(self) -> Expectation:
        """Expected speedup, from counted weights and the timings of this process."""
        first = next((module for module in self._modules if isinstance(module, Fused)), None)
        if first is None:
            return Expectation(0.0, None)
        # fp8 GEMMs are not autotuned.
        tuned = self._eight_bits != "fp8"
        product = measured_product(first, first.settings.backend, first.settings.dtype) if tuned else None
        return replace(self._counted, product=product)

    @property
    def expected_gains(self) -> dict[str, float]:
        """Expected speedup of the linear layers of each replaced module, by path; empty if `verify` measured less."""
        whole, gains, packed = self.expected, {}, packed_paths(self.replaced)
        if whole.overall < whole.bound:
            return {}
        for entry in self.replaced:
            useful = whole.useful if any(is_within(entry.path, path) for path in packed) else 1.0
            if entry.share and (whole.product is not None or useful < 1):
                gains[entry.path] = (whole.product or 1.0) / useful
        return gains

    def revert(self) -> None:
        """Restore the original forward of every module. Idempotent; no other thread may use the model meanwhile."""
        if self._model is not None and in_graphs(self._model):
            del self._model.__dict__["forward"]
        for module in (*self._modules, *self._frozen):
            if is_fused(module):
                restore(module)

    @property
    def rounded_weights(self) -> int:
        """Number of weights that run in 8 bits."""
        return sum(kind_of(weight) is not None for group in self._rounded for weight in group)

    @property
    def frozen_bytes(self) -> int:
        """Size of the weights that are packed in place of their parameters."""
        packs = {id(packed): packed for packed, *_ in map(slot_of, filter(is_fused, self._frozen))}
        return sum(packed.numel() * packed.element_size() for packed in packs.values())

    def __str__(self) -> str:
        rows = [("module", "class", "replaced by", "products", "expected", "why, or what it saves")]
        groups: dict[tuple[str, str, str, str], list[Entry]] = {}
        declining, gains = self.declining, self.expected_gains
        for entry in self.entries:
            fate, why = entry.fused, entry.gain
            if entry.reason is not None:
                fate, why = "not replaced", entry.reason
            elif entry.path in declining:
                fate, why = "runs its original", declining[entry.path]
            gain = gains.get(entry.path) if fate == entry.fused else None
            groups.setdefault((entry.class_name, fate, f"{gain:.1f}×" if gain else "", why), []).append(entry)
        for (class_name, fate, gain, why), entries in groups.items():
            place, share = entries[0].path or "(the model)", sum(entry.share for entry in entries)
            if len(entries) > 1:
                place += f" and {len(entries) - 1} more"
            rows.append((place, class_name, fate, f"{share:.0%}" if share >= 0.005 else "", gain, why))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("─" * width for width in widths))
        lines.append(f"{len(self.replaced)} modules replaced, {len(self.left)} not replaced")
        if declining:
            lines[-1] += f"; {len(declining)} of them currently run their original"
        lines += [f"unknown: {layers}; {ROW}" for layers in self.unknown]
        if frozen := self.frozen_bytes:
            line = f"frozen for inference: {frozen / 2**20:,.1f} MB of weights packed in place"
            if left := sum(p.numel() * p.element_size() for p in linear_weights(*self._modules)):
                line += f"; {left / 2**20:,.1f} MB of other linear weights stay parameters"
            lines.append(line)
        if rounded := self.rounded_weights:
            exempt = f"; {self._exempt} modules stay in floating point for accuracy" if self._exempt else ""
            how = "without gradients" if self._eight_bits == "int8" else "and cannot be trained"
            lines.append(f"{rounded} weights run in {self._eight_bits} {how}{exempt}")
            if self._eight_bits == "fp8" and any(weight.is_cpu for group in self._rounded for weight in group):
                lines.append("this CPU emulates fp8, slowly: results match those of a GPU, times do not")
        lines.append(str(self.expected))
        lines += [line for line in [adapters.summary(self._modules)] if line is not None]
        costs = self.rounding or {name: f"differs by {value:.1e}" for name, value in self.differences.items()}
        lines += [f"verified: {name or 'output'} {cost}" for name, cost in costs.items()]
        return "\n".join(lines)


def in_graphs(model: nn.Module) -> bool:
    """True if the model's calls are replayed as CUDA graphs."""
    return isinstance(model.__dict__.get("forward"), CallGraphs)


def packed_paths(entries: Sequence[Entry]) -> list[str]:
    """Paths of the modules that run without padding: encoders, and masked-language heads over them."""
    encoders = [entry.path for entry in entries if "npadded" in entry.fused]
    heads = [entry.path for entry in entries if entry.fused == "FusedMaskedLM"]
    return encoders + [path for path in heads if any(is_within(encoder, path) for encoder in encoders)]


def is_within(path: str, other: str) -> bool:
    """True if path is other, or inside it."""
    return not other or path == other or path.startswith(f"{other}.")


def linear_weights(*modules: nn.Module) -> set[nn.Parameter]:
    """The weights of linear, convolution and attention layers in modules."""
    layers = (part for module in modules for part in module.modules() if isinstance(part, _LINEAR))
    return {p for part in layers for p in part.parameters(recurse=False) if p.ndim > 1}


def size_of(weights: Collection[nn.Parameter]) -> int:
    """Number of entries."""
    return sum(p.numel() for p in weights)


def unknown_layers(model: nn.Module, chosen: Mapping[str, nn.Module], known: Collection[nn.Module]) -> list[Unknown]:
    """Unrecognised repeated layers with a relevant share of the weights, largest first; no embeddings or heads."""
    # Ancestors of recognised modules are not unknown layers.
    around = {place for path, module in chosen.items() if module in known for place in _places(path)}
    siblings = Counter((path.rpartition(".")[0], type(module)) for path, module in chosen.items() if path)
    weights = {
        path: [p for p in part.parameters(recurse=False) if p.ndim > 1]
        for path, part in model.named_modules()
        if not isinstance(part, (nn.Embedding, nn.EmbeddingBag))
    }
    total = size_of({p for own in weights.values() for p in own}) or 1
    sizes: dict[str, dict[str, int]] = {}
    counted: set[nn.Parameter] = set()
    for path, module in chosen.items():
        own = [p for p in weights.get(path, ()) if p not in counted]
        if module in known or not own:
            continue
        # The innermost list element (stages contain lists of layers); a bare linear layer does not count.
        for place in reversed(_places(path)):
            holder, _, number = place.rpartition(".")
            if (
                number.isdigit()
                and place in chosen
                and siblings[holder, type(chosen[place])] > 1
                and not weights.get(place)
            ):
                if place not in around:
                    counted.update(own)
                    places = sizes.setdefault(type(chosen[place]).__name__, {})
                    places[place] = places.get(place, 0) + size_of(own)
                break
    layers = [Unknown(name, [*places], sum(places.values()) / total) for name, places in sizes.items()]
    return sorted((each for each in layers if each.share >= _LEAST_SHARE), key=lambda each: -each.share)


def _places(path: str) -> list[str]:
    """Qualified names of a module and its ancestors, outermost first."""
    steps = path.split(".")
    return [".".join(steps[:end]) for end in range(1, len(steps) + 1)]


def measured_product(model: nn.Module, backend: Backend | None, dtype: torch.dtype | None) -> float | None:
    """Lowest measured speedup of the chosen GEMM libraries over PyTorch's default, minus noise; None if untimed."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None or first.device.type != "cpu" or backend not in (None, "cpu"):
        return None
    races = [race for race in selections() if race.operation in _RACES and race.dtype == (dtype or first.dtype)]
    factors = [race.seconds[next(iter(race.seconds))] / race.seconds[race.chosen] for race in races if race.seconds]
    noise = max((race.noise for race in races), default=0.0)
    # Noise is irrelevant where the default was chosen.
    return min((max(factor / (1 + noise), min(factor, 1.0)) for factor in factors if factor == factor), default=None)
