"""The report of `accelerate`: replaced modules, reasons against the others, verified outputs and their time."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError
from xfm_fast.graphs import CallGraphs
from xfm_fast.kernels.flags import EightBits, kind_of
from xfm_fast.models.frozen import slot_of
from xfm_fast.replace import adapters
from xfm_fast.replace.stored import FrozenLinear
from xfm_fast.replace.swap import BANDS, Fused, is_fused, restore

ROW = "register a LayerSpec to support it (xfm_fast.replace.register)"
# Least share of the linear weights that is reported.
_LEAST_SHARE = 0.05
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
    share: float = 0.0  # share of the model's linear weights in replaced modules
    # largest difference of each verified output, relative to its largest value
    differences: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)  # smallest cosine of each verified output in 8 bits
    speedup: float | None = None  # measured on the `verify` batch; None without one, and on GPUs
    _modules: list[nn.Module] = field(default_factory=list, repr=False)
    _frozen: list[FrozenLinear] = field(default_factory=list, repr=False)
    _eight_bits: EightBits | None = None
    _rounded: list[list[nn.Parameter]] = field(default_factory=list, repr=False)  # flagged weights of every module
    _exempt: int = 0  # modules that stay in floating point for accuracy
    _model: nn.Module | None = field(default=None, repr=False)  # the model, if its calls are replayed as graphs

    @property
    def expected(self) -> NoReturn:
        """Retired, like `expected_gains`."""
        raise AttributeError("expected and expected_gains of a report are retired; use share and speedup")

    expected_gains = expected

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
            place, share = entries[0].path or "(the model)", sum(entry.share for entry in entries)
            more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
            rows.append((place + more, class_name, fate, f"{share:.0%}" if share >= 0.005 else "", why))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("─" * width for width in widths))
        lines.append(f"{len(self.replaced)} modules replaced, {len(self.left)} not replaced")
        if declining:
            lines[-1] += f"; {len(declining)} of them currently run their original"
        lines += [f"unknown: {layers}; {ROW}" for layers in self.unknown]
        if frozen := self.frozen_bytes:
            lines.append(f"frozen for inference: {frozen / 2**20:,.1f} MB of weights packed in place")
            lines.append("until revert() they are no parameters: a loop over parameters() passes them by")
        lines += unwatched(self._modules, self._eight_bits)
        if rounded := self.rounded_weights:
            exempt = f"; {self._exempt} modules stay in floating point for accuracy" if self._exempt else ""
            lines.append(f"{rounded} weights run in {self._eight_bits}{exempt}")
        lines.append(f"{self.share:.0%} of the linear weights are in replaced modules")
        if self.speedup is not None:
            lines[-1] += f"; the verify batch ran {self.speedup:.2f}× as fast"
        lines += [line for line in [adapters.summary(self._modules)] if line is not None]
        costs = {name: f"has a cosine of at least {value:.4f}" for name, value in self.rounding.items()}
        costs = costs or {name: f"differs by {value:.1e}" for name, value in self.differences.items()}
        lines += [f"verified: {name or 'output'} {cost}" for name, cost in costs.items()]
        return "\n".join(lines)


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
        lines.append("a GPU does not see writes through .data: call xfm_fast.kernels.caching.clear() after them")
    elif kind is not None:
        lines.append("not seen: single elements of a large weight that are written through .data or NumPy")
    return lines


def size_of(weights: Collection[nn.Parameter]) -> int:
    """Number of entries."""
    return sum(p.numel() for p in weights)


def unknown_layers(model: nn.Module, chosen: dict[str, nn.Module], known: Collection[nn.Module]) -> list[Unknown]:
    """Unrecognised repeated layers with a relevant share of the weights, largest first; no embeddings or heads."""
    tables = (nn.Embedding, nn.EmbeddingBag)
    matrices = {
        module: {p for p in module.parameters(recurse=False) if p.ndim > 1}
        for module in model.modules()
        if not isinstance(module, tables)
    }
    total = size_of(set().union(*matrices.values())) or 1
    left = {p for module in chosen.values() if module not in known for p in matrices.get(module, ())}
    siblings = Counter((path.rpartition(".")[0], type(module)) for path, module in chosen.items() if path)
    around = [f"{path}." for path, module in chosen.items() if module in known]
    found: dict[str, Unknown] = {}
    # The innermost elements of lists come first: stages contain lists of layers. A bare linear layer does not count.
    for path, module in reversed(chosen.items()):
        holder, _, number = path.rpartition(".")
        repeated = number.isdigit() and siblings[holder, type(module)] > 1 and not matrices.get(module)
        if not repeated or any(inner.startswith(f"{path}.") for inner in around):
            continue
        own = left.intersection(module.parameters())
        left -= own
        if own:
            name = type(module).__name__
            _, paths, share = found.get(name, Unknown(name, [], 0.0))
            found[name] = Unknown(name, [path, *paths], share + size_of(own) / total)
    return sorted((each for each in found.values() if each.share >= _LEAST_SHARE), key=lambda each: -each.share)


LEAST_COSINE = 0.99
"""Least cosine between every output before and after, entry by entry of a batch, for 8 bits."""
_TIMED_RUNS, _TIMED_SECONDS = 5, 0.5


def model_outputs(model: nn.Module, batch: Any, *, hooks: bool = True) -> dict[str, Tensor]:
    """Floating-point outputs of a model by name, in evaluation mode, without gradients."""
    call = model if hooks else model.forward
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(batch, Mapping):
                result = call(**batch)
            elif isinstance(batch, (tuple, list)):
                result = call(*batch)
            else:
                result = call(batch)
    finally:
        for module, training in modes.items():
            module.training = training
    return {name: leaf for name, leaf in _leaves(result, "") if leaf.is_floating_point()}


def _leaves(result: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested mappings, sequences and pytrees, by dotted name."""
    if isinstance(result, Tensor):
        yield name, result
        return
    if isinstance(result, Mapping):
        parts = result.items()
    else:
        parts = enumerate(result if isinstance(result, (tuple, list)) else pytree.tree_leaves(result))
    for key, value in parts:
        if value is not result:
            yield from _leaves(value, f"{name}.{key}" if name else str(key))


def best_seconds(model: nn.Module, batch: Any) -> float | None:
    """Best time of a few runs on a CPU; None on other devices."""
    if not all(p.is_cpu for p in model.parameters()):
        return None
    best, until = math.inf, time.perf_counter() + _TIMED_SECONDS
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        model_outputs(model, batch)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > until:
            break
    return best


def mask_of(batch: Any) -> Any:
    """The attention mask of a batch, or None."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def relative_error(before: Tensor, after: Tensor) -> float:
    """Largest difference, relative to the largest value before."""
    if not before.numel():
        return 0.0
    scale, error = float(before.abs().max()), float((after.double() - before.double()).abs().max())
    return error / scale if scale else error


def compare_outputs(
    before: dict[str, Tensor], after: dict[str, Tensor], mask: Any, dtype: torch.dtype | None, kind: EightBits | None
) -> tuple[dict[str, float], dict[str, float]]:
    """The difference of every output, and its smallest cosine in 8 bits; InputError if one exceeds rounding."""
    differences, cosines = {}, {}
    for name, old in before.items():
        new, label = after.get(name), f"output {name!r}" if name else "the output"
        if new is None or new.shape != old.shape:
            raise InputError(
                f"{label} was {tuple(old.shape)} and is {None if new is None else tuple(new.shape)} after "
                "acceleration; the model was reverted"
            )
        old, new = without_padding(old, new, mask)
        differences[name] = relative_error(old, new)
        if kind is not None:
            cosines[name] = _cosine(old, new)
            if not cosines[name] >= LEAST_COSINE:
                raise InputError(
                    f"{label} has a cosine of {cosines[name]:.3f} to the original, below {LEAST_COSINE} for "
                    f"{kind}; the model was reverted. Use exclude=… or dtype=torch.bfloat16"
                )
            continue
        band = BANDS.get(dtype or old.dtype, BANDS[torch.float32])
        if not differences[name] <= band:
            raise InputError(
                f"{label} differs by {differences[name]:.1e} of its largest value, more than rounding in "
                f"{dtype or old.dtype} ({band:.0e}); the model was reverted. Use exclude=…"
            )
    return differences, cosines


def least_cosine(before: dict[str, Tensor], after: dict[str, Tensor], mask: Any) -> float:
    """Smallest cosine over all outputs; missing or misshapen outputs are skipped."""
    pairs = [(old, after[name]) for name, old in before.items() if name in after and after[name].shape == old.shape]
    return min((_cosine(*without_padding(old, new, mask)) for old, new in pairs), default=1.0)


def without_padding(before: Tensor, after: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """Both outputs, at the real tokens of mask `[B, L]` only if they have an entry per token."""
    by_token = isinstance(mask, Tensor) and mask.ndim == 2 and before.shape[:2] == mask.shape
    return (before[mask.bool()], after[mask.bool()]) if by_token else (before, after)


def _cosine(before: Tensor, after: Tensor) -> float:
    """Smallest cosine over batch entries (or tokens); 1 if empty."""
    if not before.numel():
        return 1.0
    # One vector of scalar scores.
    rows, others = (t.double().flatten(1) if t.ndim > 1 else t.double().view(1, -1) for t in (before, after))
    return float(F.cosine_similarity(rows, others, dim=1).min())
