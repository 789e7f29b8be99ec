"""8-bit linear layers: `accelerate(model, dtype="int8")` on a CPU, `dtype="fp8"` on a GPU.

Weights of fused blocks are flagged (see `kernels.marked`) and stay parameters. Vocabulary heads, embeddings and unfused
modules stay in floating point.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels import fp8, marked
from xfm_fast.kernels.linear import type_beside
from xfm_fast.kernels.marked import EightBits
from xfm_fast.replace.swap import Fused, find, observed

LEAST_COSINE = 0.99
"""Between every output before and after, entry by entry of a batch: what 8 bits may cost where they are verified."""
# Above this batch size the pairwise comparison would take longer than the model.
_MOST_RANKED = 4096


class Rounding(NamedTuple):
    """8-bit error of one output."""

    cosine: float  # smallest cosine over batch entries (or tokens)
    ranks: float | None  # share of entries with the same nearest neighbour; None for fewer than 3

    def __str__(self) -> str:
        ranks = "" if self.ranks is None else f", nearest-neighbour agreement {self.ranks:.0%}"
        return f"has a cosine of at least {self.cosine:.4f}{ranks}"


def check(model: nn.Module, kind: str, freeze: bool) -> torch.dtype | None:
    """Validate 8-bit computation of a model and return the dtype of everything else; None follows the inputs."""
    types = {type_beside(kind, device) for device in {p.device for p in model.parameters()} or {torch.device("cpu")}}
    if freeze:
        raise InputError(f"freeze=True cannot be combined with dtype={kind!r}; leave one of them out")
    return types.pop() if len(types) == 1 else None


def quantise(model: nn.Module, fused: Iterable[Fused], kind: EightBits) -> list[list[nn.Parameter]]:
    """Flag the linear weights of the fused blocks; returns the weights of each block.

    Skips adapted, hooked, quantised and parametrised layers, shared weights, and for fp8 sizes that are no multiple
    of 16.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    types = (torch.float32, torch.bfloat16) if kind == "int8" else (torch.float32, torch.bfloat16, torch.float16)
    done: list[list[nn.Parameter]] = []
    for form in fused:
        if not form.multiplies_in_eight_bits:
            continue
        layers = [find(form, name) for name in type(form).bypassed]
        weights = [
            weight
            for layer in layers
            if type(layer) is nn.Linear and not observed(layer)
            if type(weight := layer._parameters.get("weight")) is nn.Parameter and owners[id(weight)] == 1
            if weight.dtype in types and (kind == "int8" or fp8.fits(weight))
        ]
        if not weights:
            continue
        done.append(weights)
        marked.mark(weights, kind)
        if kind == "fp8":
            norms = (layer._parameters.get("weight") for layer in layers if type(layer) is nn.LayerNorm)
            marked.mark((scale for scale in norms if type(scale) is nn.Parameter), kind)
    return done


def rounding(wanted: Tensor, found: Tensor, mask: Any) -> Rounding:
    """8-bit error of an output `[B, ...]`, at the real tokens of mask `[B, L]`."""
    return Rounding(_cosine(*without_padding(wanted, found, mask)), _ranks(wanted, found, mask))


def least_cosine(before: dict[str, Tensor], after: dict[str, Tensor], mask: Any) -> float:
    """Smallest cosine over all outputs; missing or misshapen outputs are skipped."""
    pairs = [(b, after[name]) for name, b in before.items() if name in after and after[name].shape == b.shape]
    return min((_cosine(*without_padding(b, a, mask)) for b, a in pairs), default=1.0)


def without_padding(wanted: Tensor, found: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """Both outputs, at real tokens only if they have an entry per token."""
    if _has_tokens(wanted, mask):
        return wanted[mask.bool()], found[mask.bool()]
    return wanted, found


def _has_tokens(output: Tensor, mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and output.shape[:2] == mask.shape


def _cosine(wanted: Tensor, found: Tensor) -> float:
    """Smallest cosine over batch entries (or tokens); 1 if empty."""
    if not wanted.numel():
        return 1.0
    # One vector of scalar scores.
    each, now = (t.double().flatten(1) if t.ndim > 1 else t.double().view(1, -1) for t in (wanted, found))
    return float(F.cosine_similarity(each, now, dim=1).min())


def _ranks(wanted: Tensor, found: Tensor, mask: Any) -> float | None:
    if wanted.ndim < 2 or not 3 <= len(wanted) <= _MOST_RANKED or not wanted.numel():
        return None
    nearest = []
    for output in (wanted.double(), found.double()):
        if output.ndim > 2 and _has_tokens(output, mask):
            # A text is represented by the sum of its tokens.
            output = (output * mask.bool().view(*mask.shape, *[1] * (output.ndim - 2))).sum(1)
        each = F.normalize(output.flatten(1), dim=1)
        nearest.append((each @ each.t()).fill_diagonal_(-2).argmax(1))
    return float((nearest[0] == nearest[1]).double().mean())
