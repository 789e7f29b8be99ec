"""The report of `accelerate`: replaced modules, reasons against the others, verified outputs and their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from torch import nn

from xfm_fast.graphs import CallGraphs
from xfm_fast.kernels.flags import EightBits, kind_of
from xfm_fast.models.frozen import slot_of
from xfm_fast.replace import adapters
from xfm_fast.replace.stored import FrozenLinear
from xfm_fast.replace.swap import Fused, is_fused, restore

ROW = "register a LayerSpec to support it (xfm_fast.replace.register)"
# Least share of the linear weights that is reported.
_LEAST_SHARE = 0.05
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)


@dataclass(frozen=True)
class Entry:
    """A recognised module."""

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
        return (
            f"{self.class_name} ({_and_more(self.paths)}), {self.share:.0%} of the linear weights"
        )


@dataclass
class Report:
    """Recognised modules: which were replaced, which were not, and why. Printing it gives a table.

    The table shows the current state: a replaced module whose parts were exchanged or hooked since (by adapters,
    quantisation, hooks) is listed with the reason why its original runs.
    """

    entries: list[Entry]
    # unrecognised layers with a relevant share of the model's linear weights
    unknown: list[Unknown] = field(default_factory=list)
    share: float = 0.0  # share of the model's linear weights in replaced modules
    # largest difference of each verified output, relative to its largest value
    differences: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(
        default_factory=dict
    )  # smallest cosine of each verified output in 8 bits
    runs: dict[str, int] = field(
        default_factory=dict
    )  # calls on the `verify` batch that each fused form computed
    speedups: list[float] = field(
        default_factory=list
    )  # of every timed round of the `verify` batch, in order of size
    untimed: str = ""  # why the `verify` batch was not timed
    _modules: list[nn.Module] = field(default_factory=list, repr=False)
    _frozen: list[FrozenLinear] = field(default_factory=list, repr=False)
    _eight_bits: EightBits | None = None
    _rounded: list[list[nn.Parameter]] = field(
        default_factory=list, repr=False
    )  # flagged weights of every module
    _exempt: int = 0  # modules that stay in floating point for accuracy
    _model: nn.Module | None = field(
        default=None, repr=False
    )  # the model, if its calls are replayed as graphs

    @property
    def speedup(self) -> float | None:
        """The median of `speedups`; None without any, as on GPUs."""
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
        found = {}
        for entry, module in zip(self.replaced, self._modules, strict=False):
            reason = module.declines() if isinstance(module, Fused) else "it was reverted"
            if reason is not None:
                found[entry.path] = reason
        return found

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

    def coverage(self) -> str:
        """Say how many fused forms computed on the `verify` batch, and name those that ran their original."""
        idle: dict[str, list[str]] = {}
        for entry in self.replaced:
            if not self.runs.get(entry.path):
                idle.setdefault(entry.class_name, []).append(entry.path)
        count = len(self.replaced) - sum(map(len, idle.values()))
        names = ", ".join(
            f"{_and_more(paths)} ({class_name})" for class_name, paths in idle.items()
        )
        rest = f"; the original ran in {names}" if names else ""
        return f"{count} of {len(self.replaced)} fused modules ran{rest}"

    def __str__(self) -> str:
        rows = [("module", "class", "replaced by", "products", "why, or what it saves")]
        groups: dict[tuple[str, str, str], list[Entry]] = {}
        declining = self.declining
        for entry in self.entries:
            fate, why = entry.fused, entry.gain
            if entry.reason is not None:
                fate, why = "not replaced", entry.reason
            elif entry.path in declining:
                fate, why = "runs its original", declining[entry.path]
            groups.setdefault((entry.class_name, fate, why), []).append(entry)
        for (class_name, fate, why), entries in groups.items():
            place, share = (
                _and_more([entry.path for entry in entries]),
                sum(entry.share for entry in entries),
            )
            rows.append((place, class_name, fate, f"{share:.0%}" if share >= 0.005 else "", why))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("─" * width for width in widths))
        lines.append(f"{len(self.replaced)} modules replaced, {len(self.left)} not replaced")
        if declining:
            lines[-1] += f"; {len(declining)} of them currently run their original"
        lines += [f"unknown: {layers}; {ROW}" for layers in self.unknown]
        if frozen := self.frozen_bytes:
            lines.append(
                f"frozen for inference: {frozen / 2**20:,.1f} MB of weights packed in place"
            )
            lines.append(
                "until revert() they are no parameters: a loop over parameters() passes them by"
            )
        lines += unwatched(self._modules, self._eight_bits)
        if rounded := self.rounded_weights:
            exempt = (
                f"; {self._exempt} modules stay in floating point for accuracy"
                if self._exempt
                else ""
            )
            lines.append(f"{rounded} weights run in {self._eight_bits}{exempt}")
        lines.append(f"{self.share:.0%} of the linear weights are in replaced modules")
        lines += [line for line in [adapters.summary(self._modules)] if line is not None]
        if self.runs:
            lines.append(f"verified: {self.coverage()}")
        costs = {
            name: f"has a cosine of at least {value:.4f}" for name, value in self.rounding.items()
        }
        costs = costs or {
            name: f"differs by {value:.1e}" for name, value in self.differences.items()
        }
        lines += [f"verified: {name or 'output'} {cost}" for name, cost in costs.items()]
        if self.speedups:
            # Without the extremes, which any other program on the machine makes.
            inner = self.speedups[1:-1] if len(self.speedups) > 4 else self.speedups
            low, high = f"{inner[0]:.1f}", f"{inner[-1]:.1f}"
            speed = low if low == high else f"{low}–{high}"
            rounds = f"{len(self.speedups)} rounds, before and after in turn"
            lines.append(f"the verify batch ran {speed}× as fast ({rounds})")
        lines += [self.untimed] if self.untimed else []
        return "\n".join(lines)


def _and_more(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return (paths[0] or "(the model)") + more


def in_graphs(model: nn.Module) -> bool:
    """True if the model's calls are replayed as CUDA graphs."""
    return isinstance(model.__dict__.get("forward"), CallGraphs)


def linear_weights(*modules: nn.Module) -> set[nn.Parameter]:
    """The weights of linear, convolution and attention layers in modules."""
    layers = (part for module in modules for part in module.modules() if isinstance(part, _LINEAR))
    return {p for part in layers for p in part.parameters(recurse=False) if p.ndim > 1}


def unwatched(modules: Collection[nn.Module], kind: EightBits | None) -> list[str]:
    """Report lines about changes of parameters that copies of them do not follow."""
    parameters = {p for module in modules for p in module.parameters()}
    lines = []
    if count := sum(p.is_inference() for p in parameters):
        lines.append(
            f"{count} parameters are inference tensors, which carry no version: nothing computed from them is kept; "
            "load or copy the model outside torch.inference_mode()"
        )
    if any(p.is_cuda for p in parameters):
        lines.append(
            "a GPU does not see writes through .data: call xfm_fast.kernels.caching.clear() after them"
        )
    elif kind is not None:
        lines.append(
            "not seen: single elements of a large weight that are written through .data or NumPy"
        )
    return lines


def size_of(weights: Collection[nn.Parameter]) -> int:
    """Number of entries."""
    return sum(p.numel() for p in weights)


def unknown_layers(
    model: nn.Module,
    chosen: dict[str, nn.Module],
    known: Collection[nn.Module],
    layers: Sequence[str],
) -> list[Unknown]:
    """Return unrecognised repeated layers with a relevant share of the weights, largest first; no embeddings or heads.

    `layers` are the paths of recognised layers and encoders: a module that holds one is no layer.
    """
    tables = (nn.Embedding, nn.EmbeddingBag)
    matrices = {
        module: {p for p in module.parameters(recurse=False) if p.ndim > 1}
        for module in model.modules()
        if not isinstance(module, tables)
    }
    total = size_of(set().union(*matrices.values())) or 1
    left = {
        p for module in chosen.values() if module not in known for p in matrices.get(module, ())
    }
    siblings = Counter(
        (path.rpartition(".")[0], type(module)) for path, module in chosen.items() if path
    )
    found: dict[str, Unknown] = {}
    # The innermost elements of lists come first: stages contain lists of layers. A bare linear layer does not count.
    for path, module in reversed(chosen.items()):
        holder = path.rpartition(".")[0]
        listed = (
            path
            and siblings[holder, type(module)] > 1
            and isinstance(model.get_submodule(holder), _LISTS)
        )
        if (
            not listed
            or matrices.get(module)
            or any(inner.startswith(f"{path}.") for inner in layers)
        ):
            continue
        own = left.intersection(module.parameters())
        left -= own
        if own:
            name = type(module).__name__
            _, paths, share = found.get(name, Unknown(name, [], 0.0))
            found[name] = Unknown(name, [path, *paths], share + size_of(own) / total)
    return sorted(
        (each for each in found.values() if each.share >= _LEAST_SHARE),
        key=lambda each: -each.share,
    )
