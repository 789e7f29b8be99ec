"""The report of `accelerate`: replaced modules, reasons against others, outputs and speedups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from torch import nn

from xfm_fast.graphs import CallGraphs
from xfm_fast.kernels.flags import EightBits, kind_of
from xfm_fast.models.precision import PrecisionMixin
from xfm_fast.plans.slots import slot_of
from xfm_fast.replace import adapters
from xfm_fast.replace.stored import FrozenLinear
from xfm_fast.replace.swap import Fused, find, is_fused, original_class, restore

REGISTER = "register a LayerSpec to support it (xfm_fast.replace.register)"
_MIN_SHARE = 0.05  # of the linear weights in unknown layers, to be reported
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)


@dataclass(frozen=True)
class Entry:
    """A recognised module."""

    path: str  # qualified name; empty for the model itself
    class_name: str
    fused: str  # name of the fused form
    gain: str  # benefit of the fused form
    reason: str | None = None  # why the module was not replaced; None if it was
    share: float = 0.0  # share of the model's linear weights that this module multiplies by itself


class Trial(NamedTuple):
    """A dtype that `dtype="auto"` compared: median speedup and smallest cosine, or the reason against it."""

    dtype: str
    speedup: float = 0.0
    cosine: float = 1.0
    reason: str = ""

    def __str__(self) -> str:
        outcome = f"{self.speedup:.2f}× as fast, cosine of at least {self.cosine:.6g}"
        remarks = [outcome] * bool(self.speedup) + [self.reason] * bool(self.reason)
        return f"{self.dtype}: {'; '.join(remarks)}"


class Unknown(NamedTuple):
    """Unrecognised layers of one class, and their share of the model's linear weights."""

    class_name: str
    paths: list[str]
    share: float

    def __str__(self) -> str:
        return (
            f"{self.class_name} ({_and_more(self.paths)}), {self.share:.0%} of the linear weights"
        )


@dataclass
class Report:
    """Recognised modules: which were replaced, which were not, and why. Printing it gives a table.

    The table shows the current state: a replaced module whose parts were exchanged or hooked since
    (by adapters, quantisation, hooks) is listed with the reason why its original runs.
    """

    entries: list[Entry]
    # unrecognised layers with a relevant share of the model's linear weights
    unknown: list[Unknown] = field(default_factory=list)
    share: float = 0.0  # share of the model's linear weights that replaced modules multiply by
    # largest difference of each verified output, relative to its largest value
    differences: dict[str, float] = field(default_factory=dict)
    # smallest cosine of each verified output
    rounding: dict[str, float] = field(default_factory=dict)
    # calls on the `verify` batch that each fused form computed
    runs: dict[str, int] = field(default_factory=dict)
    # of every timed round of the `verify` batch, sorted
    speedups: list[float] = field(default_factory=list)
    # what `dtype="auto"` compared, the chosen dtype first
    trials: list[Trial] = field(default_factory=list)
    _modules: list[nn.Module] = field(default_factory=list, repr=False)
    _frozen: list[FrozenLinear] = field(default_factory=list, repr=False)
    _eight_bits: EightBits | None = None
    # flagged weights of every module
    _rounded: list[list[nn.Parameter]] = field(default_factory=list, repr=False)
    _exempt: int = 0  # modules that stay in floating point for accuracy
    _native: list[PrecisionMixin] = field(default_factory=list, repr=False)
    # the model, if its calls are replayed as graphs
    _model: nn.Module | None = field(default=None, repr=False)

    @property
    def speedup(self) -> float | None:
        """Median of `speedups`; None if nothing was timed, as on GPUs."""
        return median(self.speedups) if self.speedups else None

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
        reasons = {}
        for entry, module in zip(self.replaced, self._modules, strict=False):
            reason = module.declines() if isinstance(module, Fused) else "it was reverted"
            if reason is not None:
                reasons[entry.path] = reason
        return reasons

    def revert(self) -> None:
        """Restore all original forwards. Idempotent; no other thread may use the model meanwhile."""
        if self._model is not None and in_graphs(self._model):
            del self._model.__dict__["forward"]
        for module in (*self._modules, *self._frozen):
            if is_fused(module):
                restore(module)
        for module in self._native:
            module.unfreeze().dequantise()

    @property
    def rounded_weights(self) -> int:
        """Number of weights that run in 8 bits."""
        return sum(kind_of(weight) is not None for group in self._rounded for weight in group)

    @property
    def frozen_bytes(self) -> int:
        """Size of the weights that are packed in place of their parameters."""
        packs = {id(packed): packed for packed, *_ in map(slot_of, filter(is_fused, self._frozen))}
        return sum(packed.numel() * packed.element_size() for packed in packs.values())

    def coverage(self) -> str:
        """Count the fused forms that computed on the `verify` batch, and name the others."""
        idle: dict[str, list[str]] = {}
        for entry in self.replaced:
            if not self.runs.get(entry.path):
                idle.setdefault(entry.class_name, []).append(entry.path)
        count = len(self.replaced) - sum(map(len, idle.values()))
        line = f"{count} of {len(self.replaced)} fused modules ran"
        if idle:
            names = (f"{_and_more(paths)} ({class_name})" for class_name, paths in idle.items())
            line += f"; the original ran in {', '.join(names)}"
        return line

    def __str__(self) -> str:
        lines = [f"{self.share:.0%} of the linear weights run in fused modules", *self._table()]
        lines.append(f"{len(self.replaced)} modules replaced, {len(self.left)} not replaced")
        if declining := self.declining:
            lines[-1] += f"; {len(declining)} of them currently run their original"
        lines += [f"unknown: {layers}; {REGISTER}" for layers in self.unknown]
        if frozen := self.frozen_bytes:
            lines.append(
                f"frozen for inference: {frozen / 2**20:,.1f} MB of weights packed in place"
            )
            lines.append("until revert() they are not parameters: parameters() does not list them")
        lines += unwatched(self._modules, self._eight_bits)
        if rounded := self.rounded_weights:
            lines.append(f"{rounded} weights run in {self._eight_bits}")
            if self._exempt:
                lines[-1] += f"; {self._exempt} modules stay in floating point for accuracy"
        if (adapted := adapters.summary(self._modules)) is not None:
            lines.append(adapted)
        return "\n".join(lines + self._verification())

    def _table(self) -> list[str]:
        """Format one row for modules of the same class, form and reason."""
        rows: list[tuple[str, ...]]
        rows = [("module", "class", "replaced by", "GEMM share", "benefit, or reason")]
        groups: dict[tuple[str, str, str], list[Entry]] = {}
        declining = self.declining
        for entry in self.entries:
            form, remark = entry.fused, entry.gain
            if entry.reason is not None:
                form, remark = "not replaced", entry.reason
            elif entry.path in declining:
                form, remark = "runs its original", declining[entry.path]
            groups.setdefault((entry.class_name, form, remark), []).append(entry)
        for (class_name, form, remark), entries in groups.items():
            paths = _and_more([entry.path for entry in entries])
            share = sum(entry.share for entry in entries)
            rows.append((paths, class_name, form, f"{share:.0%}" if share >= 0.005 else "", remark))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("─" * width for width in widths))
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]

    def _verification(self) -> list[str]:
        lines = [f"verified: {self.coverage()}"] if self.runs else []
        if self._eight_bits is not None:
            for name, cosine in self.rounding.items():
                lines.append(f"verified: {name or 'output'} has a cosine of at least {cosine:.4f}")
        else:
            for name, difference in self.differences.items():
                lines.append(f"verified: {name or 'output'} differs by {difference:.1e}")
        if self.speedups:
            # Without the extremes, which other programs on the machine cause.
            inner = self.speedups[1:-1] if len(self.speedups) > 4 else self.speedups
            low, high = f"{inner[0]:.1f}", f"{inner[-1]:.1f}"
            speed = low if low == high else f"{low}–{high}"
            rounds = f"{len(self.speedups)} rounds, before and after in turn"
            lines.append(f"the verify batch ran {speed}× as fast ({rounds})")
        if self.trials:
            fastest, *slower = self.trials
            lines.append(f'dtype="auto" chose {fastest}')
            lines += [f"  compared with {trial}" for trial in slower]
        return lines


def _and_more(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return (paths[0] or "(the model)") + more


def in_graphs(model: nn.Module) -> bool:
    """Return whether the model's calls are replayed as CUDA graphs."""
    return isinstance(model.__dict__.get("forward"), CallGraphs)


def linear_weights(*modules: nn.Module) -> set[nn.Parameter]:
    """Return the weights of the linear, convolution and attention layers in modules."""
    layers = (
        layer for module in modules for layer in module.modules() if isinstance(layer, _LINEAR)
    )
    return {p for layer in layers for p in _matrices(layer)}


def _matrices(module: nn.Module) -> set[nn.Parameter]:
    return {p for p in module.parameters(recurse=False) if p.ndim > 1}


def unwatched(modules: Collection[nn.Module], eight_bits: EightBits | None) -> list[str]:
    """Return report lines about changes of parameters that their copies do not follow."""
    parameters = {p for module in modules for p in module.parameters()}
    lines = []
    if count := sum(p.is_inference() for p in parameters):
        lines.append(
            f"{count} parameters are inference tensors, which carry no version: nothing computed from them is cached; "
            "load or copy the model outside torch.inference_mode()"
        )
    if any(p.is_cuda for p in parameters):
        lines.append(
            "a GPU does not see writes through .data: call xfm_fast.kernels.caching.clear() after them"
        )
    elif eight_bits is not None:
        lines.append(
            "not seen: single elements of a large weight that are written through .data or NumPy"
        )
    return lines


def bypassed(module: nn.Module, fused: type[Fused]) -> dict[str, nn.Module]:
    """Return the submodules that a fused form reads without calling, by name."""
    names = fused.adapted(original_class(module)).get("bypassed", fused.bypassed)
    return {name: submodule for name in names if (submodule := find(module, name)) is not None}


def computed(module: nn.Module, fused: type[Fused]) -> set[nn.Parameter]:
    """Return the linear weights whose products a fused form computes itself, and no form inside it."""
    layers = (module, *bypassed(module, fused).values()) if fused.computes else ()
    return {p for layer in layers if isinstance(layer, _LINEAR) for p in _matrices(layer)}


def size_of(weights: Collection[nn.Parameter]) -> int:
    """Return the number of elements."""
    return sum(p.numel() for p in weights)


def unknown_layers(
    model: nn.Module,
    selected: dict[str, nn.Module],
    reported: Collection[nn.Module],
    layers: Sequence[str],
) -> list[Unknown]:
    """Return unrecognised repeated layers with a relevant share of the weights, largest first.

    Args:
        model: The model.
        selected: Modules to look at, by path.
        reported: Modules that the report lists already.
        layers: Paths of recognised layers and encoders; a module that holds one is not a layer.
    """
    tables = (nn.Embedding, nn.EmbeddingBag)
    matrices = {
        module: _matrices(module) for module in model.modules() if not isinstance(module, tables)
    }
    total = size_of(set().union(*matrices.values())) or 1
    remaining: set[nn.Parameter] = set()
    for module in selected.values():
        if module not in reported:
            remaining |= matrices.get(module, set())
    siblings = Counter(
        (path.rpartition(".")[0], type(module)) for path, module in selected.items() if path
    )
    unknown: dict[str, Unknown] = {}
    # The innermost elements of lists come first: stages contain lists of layers. A bare linear
    # layer does not count.
    for path, module in reversed(selected.items()):
        parent = path.rpartition(".")[0]
        if not path or siblings[parent, type(module)] == 1 or matrices.get(module):
            continue
        if not isinstance(model.get_submodule(parent), _LISTS):
            continue
        if any(layer.startswith(f"{path}.") for layer in layers):
            continue
        weights = remaining.intersection(module.parameters())
        remaining -= weights
        if weights:
            name = type(module).__name__
            _, paths, share = unknown.get(name, Unknown(name, [], 0.0))
            unknown[name] = Unknown(name, [path, *paths], share + size_of(weights) / total)
    relevant = [entry for entry in unknown.values() if entry.share >= _MIN_SHARE]
    return sorted(relevant, key=lambda entry: -entry.share)
