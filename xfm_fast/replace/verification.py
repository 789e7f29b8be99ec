"""Comparison of a model's outputs before and after `accelerate`, at real tokens, and their time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError
from xfm_fast.kernels.marked import EightBits
from xfm_fast.replace.swap import BANDS

LEAST_COSINE = 0.99
"""Least cosine between every output before and after, entry by entry of a batch, for 8 bits."""
# Above this batch size the pairwise comparison would take longer than the model.
_MOST_RANKED = 4096
_TIMED_RUNS, _TIMED_SECONDS = 5, 0.5


class Rounding(NamedTuple):
    """8-bit error of one output."""

    cosine: float  # smallest cosine over batch entries (or tokens)
    ranks: float | None  # share of entries with the same nearest neighbour; None for fewer than 3

    def __str__(self) -> str:
        ranks = "" if self.ranks is None else f", nearest-neighbour agreement {self.ranks:.0%}"
        return f"has a cosine of at least {self.cosine:.4f}{ranks}"


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


def real_share(batch: Any) -> float:
    """Share of real tokens in a batch; 1 without a padding mask."""
    mask = mask_of(batch)
    return float(mask.bool().float().mean()) if isinstance(mask, Tensor) and mask.ndim == 2 else 1.0


def relative_error(before: Tensor, after: Tensor) -> float:
    """Largest difference, relative to the largest value before."""
    if not before.numel():
        return 0.0
    scale, error = float(before.abs().max()), float((after.double() - before.double()).abs().max())
    return error / scale if scale else error


def compare(
    before: dict[str, Tensor], after: dict[str, Tensor], mask: Any, dtype: torch.dtype | None, kind: EightBits | None
) -> tuple[dict[str, float], dict[str, Rounding]]:
    """The difference of every output, and its 8-bit error; InputError if one exceeds rounding."""
    differences, errors = {}, {}
    for name, old in before.items():
        new, label = after.get(name), f"output {name!r}" if name else "the output"
        if new is None or new.shape != old.shape:
            raise InputError(
                f"{label} was {tuple(old.shape)} and is {None if new is None else tuple(new.shape)} after "
                "acceleration; the model was reverted"
            )
        differences[name] = relative_error(*without_padding(old, new, mask))
        if kind is not None:
            errors[name] = rounding(old, new, mask)
            if not errors[name].cosine >= LEAST_COSINE:
                raise InputError(
                    f"{label} has a cosine of {errors[name].cosine:.3f} to the original, below {LEAST_COSINE} for "
                    f"{kind}; the model was reverted. Use exclude=… or dtype=torch.bfloat16"
                )
            continue
        band = BANDS.get(dtype or old.dtype, BANDS[torch.float32])
        if not differences[name] <= band:
            raise InputError(
                f"{label} differs by {differences[name]:.1e} of its largest value, more than rounding in "
                f"{dtype or old.dtype} ({band:.0e}); the model was reverted. Use exclude=…"
            )
    return differences, errors


def least_cosine(before: dict[str, Tensor], after: dict[str, Tensor], mask: Any) -> float:
    """Smallest cosine over all outputs; missing or misshapen outputs are skipped."""
    pairs = [(old, after[name]) for name, old in before.items() if name in after and after[name].shape == old.shape]
    return min((_cosine(*without_padding(old, new, mask)) for old, new in pairs), default=1.0)


def rounding(before: Tensor, after: Tensor, mask: Any) -> Rounding:
    """8-bit error of an output `[B, ...]`, at the real tokens of mask `[B, L]`."""
    ranks = None
    if before.ndim > 1 and 3 <= len(before) <= _MOST_RANKED and before.numel():
        nearest = []
        for output in (before.double(), after.double()):
            if output.ndim > 2 and _has_tokens(output, mask):
                # A text is represented by the sum of its tokens.
                output = (output * mask.bool().view(*mask.shape, *[1] * (output.ndim - 2))).sum(1)
            rows = F.normalize(output.flatten(1), dim=1)
            nearest.append((rows @ rows.t()).fill_diagonal_(-2).argmax(1))
        ranks = float((nearest[0] == nearest[1]).double().mean())
    return Rounding(_cosine(*without_padding(before, after, mask)), ranks)


def without_padding(before: Tensor, after: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """Both outputs, at real tokens only if they have an entry per token."""
    return (before[mask.bool()], after[mask.bool()]) if _has_tokens(before, mask) else (before, after)


def _has_tokens(output: Tensor, mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and output.shape[:2] == mask.shape


def _cosine(before: Tensor, after: Tensor) -> float:
    """Smallest cosine over batch entries (or tokens); 1 if empty."""
    if not before.numel():
        return 1.0
    # One vector of scalar scores.
    rows, others = (t.double().flatten(1) if t.ndim > 1 else t.double().view(1, -1) for t in (before, after))
    return float(F.cosine_similarity(rows, others, dim=1).min())
