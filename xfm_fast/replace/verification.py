"""Comparison of a model's outputs before and after `accelerate`, at real tokens, and their time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError
from xfm_fast.kernels.marked import EightBits
from xfm_fast.replace.swap import BANDS

LEAST_COSINE = 0.99
"""Least cosine between every output before and after, entry by entry of a batch, for 8 bits."""
_TIMED_RUNS, _TIMED_SECONDS = 5, 0.5


def outputs(model: nn.Module, batch: Any, *, hooks: bool = True) -> dict[str, Tensor]:
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


def seconds(model: nn.Module, batch: Any) -> float | None:
    """Best time of a few runs on a CPU; None on other devices."""
    if not all(p.is_cpu for p in model.parameters()):
        return None
    best, until = math.inf, time.perf_counter() + _TIMED_SECONDS
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        outputs(model, batch)
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


def compare(
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
