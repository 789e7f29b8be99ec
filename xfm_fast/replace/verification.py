"""`verify` of `accelerate`: the outputs before and after, and the time of both in turn."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError
from xfm_fast.kernels.flags import EightBits
from xfm_fast.replace.swap import BANDS

LEAST_COSINE = 0.99
"""Least cosine between every output before and after, entry by entry of a batch, for 8 bits."""
_ROUNDS, _FEWEST_ROUNDS, _SECONDS = 9, 3, 2.0  # after a first round that warms up
# In a shorter call chance decides, as does what else the machine does.
_SHORTEST = 5e-3


def arguments_of(model: nn.Module, batch: Any) -> Any:
    """Return a batch as the model's arguments: texts, or pairs of texts, as its own tokenizer prepares them."""
    texts: Any = [batch] if isinstance(batch, str) else batch
    if not isinstance(texts, (tuple, list)) or not texts or not all(map(_is_text, texts)):
        return batch
    # The first name is of sentence-transformers 5.4 and newer; its cross-encoders had the last alone.
    tools = [
        getattr(model, name)
        for name in ("preprocess", "tokenize", "tokenizer")
        if hasattr(model, name)
    ]
    if not tools and isinstance(texts[0], str):
        raise InputError(
            f"{type(model).__name__} holds no tokenizer, so verify cannot be texts; give what its tokenizer returns: "
            'verify=tokenizer(texts, padding=True, return_tensors="pt")'
        )
    if not tools:
        return batch
    alone = tools[0] is getattr(model, "tokenizer", None)
    options = {"padding": True, "truncation": True, "return_tensors": "pt"} if alone else {}
    device = next((p.device for p in model.parameters()), None)
    inputs = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(device), dict(tools[0]([*texts], **options))
    )
    return inputs if alone else (inputs,)


def _is_text(value: Any) -> bool:
    """Return whether a value is a text or a pair of texts."""
    pair = (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(part, str) for part in value)
    )
    return pair or isinstance(value, str)


def model_outputs(model: nn.Module, batch: Any, *, hooks: bool = True) -> dict[str, Tensor]:
    """Return the floating-point outputs of a model by name, in evaluation mode, without gradients."""
    with inference(model):
        result = _call(model if hooks else model.forward, _fresh(batch))
    # The next run may write into the same memory.
    return {name: leaf.clone() for name, leaf in _leaves(result, "") if leaf.is_floating_point()}


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode without gradients, with a fixed seed; every module returns to its mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Some models draw in evaluation too.
        devices = {p.device for p in model.parameters() if p.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _fresh(batch: Any) -> Any:
    """Return a copy of a batch: models write into their arguments, as sentence-transformers does."""
    shared: dict[int, Any] = {
        id(leaf): leaf
        for leaf in pytree.tree_leaves(batch)
        if isinstance(leaf, Tensor) and not leaf.is_leaf
    }
    return copy.deepcopy(batch, shared)


def _call(model: Callable[..., Any], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _leaves(result: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested mappings, sequences and pytrees, by dotted name."""
    if isinstance(result, Tensor):
        yield name, result
        return
    if isinstance(result, Mapping):
        parts = result.items()
    else:
        parts = enumerate(
            result if isinstance(result, (tuple, list)) else pytree.tree_leaves(result)
        )
    for key, value in parts:
        if value is not result:
            yield from _leaves(value, f"{name}.{key}" if name else str(key))


def speedups(
    model: nn.Module, batch: Any, original: Callable[[], AbstractContextManager[None]]
) -> tuple[list[float], str]:
    """Return the sorted speedups of rounds, or why there are no numbers; a round runs the original, then fused forms.

    Inside `original()` the model runs its original forward.
    """
    before: list[float] = []
    after: list[float] = []
    until = time.perf_counter() + _SECONDS
    with inference(model):
        while len(after) <= _ROUNDS and (
            len(after) <= _FEWEST_ROUNDS or time.perf_counter() < until
        ):
            with original():
                before.append(_seconds(model, batch))
            after.append(_seconds(model, batch))
    before, after = before[1:], after[1:]
    shortest = min(median(before), median(after))
    if shortest < _SHORTEST:
        return [], (
            f"no speed is given: a call takes {shortest * 1e3:.1f} ms, and below {_SHORTEST * 1e3:.0f} ms chance "
            "decides; give verify a larger batch"
        )
    return sorted(old / new for old, new in zip(before, after, strict=True)), ""


def _seconds(model: nn.Module, batch: Any) -> float:
    batch = _fresh(batch)
    start = time.perf_counter()
    _call(model, batch)
    return time.perf_counter() - start


def mask_of(batch: Any) -> Any:
    """Return the attention mask of a batch, or None."""
    parts = batch if isinstance(batch, (tuple, list)) else [batch]
    masks = (
        part["attention_mask"]
        for part in parts
        if isinstance(part, Mapping) and "attention_mask" in part
    )
    return next(masks, None)


def relative_error(before: Tensor, after: Tensor) -> float:
    """Largest difference, relative to the largest value before."""
    if not before.numel():
        return 0.0
    scale, error = float(before.abs().max()), float((after.double() - before.double()).abs().max())
    return error / scale if scale else error


def compare_outputs(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    mask: Any,
    dtype: torch.dtype | None,
    kind: EightBits | None,
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
    pairs = [
        (old, after[name])
        for name, old in before.items()
        if name in after and after[name].shape == old.shape
    ]
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
    rows, others = (
        t.double().flatten(1) if t.ndim > 1 else t.double().view(1, -1) for t in (before, after)
    )
    return float(F.cosine_similarity(rows, others, dim=1).min())
