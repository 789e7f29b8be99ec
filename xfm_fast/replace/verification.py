"""`verify` of `accelerate`: compares outputs before and after, and times both in turn."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError
from xfm_fast.kernels.flags import EightBits
from xfm_fast.replace.swap import BANDS

LEAST_COSINE = 0.99
"""Smallest accepted cosine between an output before and after, per batch entry, in 8 bits."""
_MAX_ROUNDS, _MIN_ROUNDS, _SECONDS = 9, 3, 2.0  # after a warm-up round
_MIN_ROUND_S = 5e-3  # noise of the machine dominates shorter times


def arguments_of(model: nn.Module, batch: Any) -> Any:
    """Return a batch as the model's arguments; its tokenizer encodes texts and pairs of texts."""
    texts: Any = [batch] if isinstance(batch, str) else batch
    if not isinstance(texts, (tuple, list)) or not texts or not all(map(_is_text, texts)):
        return batch
    # sentence-transformers has `preprocess` since 5.4; older cross-encoders have only `tokenizer`.
    for name in ("preprocess", "tokenize", "tokenizer"):
        if hasattr(model, name):
            break
    else:
        if not isinstance(texts[0], str):
            return batch
        raise InputError(
            f"{type(model).__name__} holds no tokenizer, so verify cannot be texts; give what its tokenizer returns: "
            'verify=tokenizer(texts, padding=True, return_tensors="pt")'
        )
    is_tokenizer, options = name == "tokenizer", {}
    if is_tokenizer:
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    device = next((p.device for p in model.parameters()), None)
    inputs = dict(getattr(model, name)([*texts], **options))
    inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    return inputs if is_tokenizer else (inputs,)


def _is_text(value: Any) -> bool:
    """Return whether a value is a text or a pair of texts."""
    if isinstance(value, (tuple, list)):
        return len(value) == 2 and all(isinstance(text, str) for text in value)
    return isinstance(value, str)


def model_outputs(model: nn.Module, batch: Any, *, hooks: bool = True) -> dict[str, Tensor]:
    """Return a model's floating-point outputs by name, in evaluation mode, without gradients."""
    with inference(model):
        result = _call(model if hooks else model.forward, _fresh(batch))
    # The next run may write into the same memory.
    return {name: leaf.clone() for name, leaf in _leaves(result, "") if leaf.is_floating_point()}


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, without gradients, with a fixed seed; then restore all modes."""
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
    """Copy a batch: models write into their arguments, as sentence-transformers does."""
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
    """Yield the tensors of nested mappings, sequences and pytrees, with dotted names."""
    if isinstance(result, Tensor):
        yield name, result
        return
    if isinstance(result, Mapping):
        items = result.items()
    elif isinstance(result, (tuple, list)):
        items = enumerate(result)
    else:
        items = enumerate(pytree.tree_leaves(result))
    for key, value in items:
        if value is not result:
            yield from _leaves(value, f"{name}.{key}" if name else str(key))


def speedups(
    model: nn.Module, batch: Any, original: Callable[[], AbstractContextManager[None]]
) -> list[float]:
    """Time the original and the fused forms in rounds of one call each, or of several short ones.

    Args:
        model: The accelerated model.
        batch: Its arguments.
        original: Context in which the model runs its original forward.

    Returns:
        The sorted speedups.
    """
    before: list[float] = []
    after: list[float] = []
    until, calls = time.perf_counter() + _SECONDS, 1
    with inference(model):
        while len(after) <= _MAX_ROUNDS:
            if len(after) > _MIN_ROUNDS and time.perf_counter() >= until:
                break
            with original():
                before.append(_time_calls(model, batch, calls))
            after.append(_time_calls(model, batch, calls))
            if calls == len(after) == 1:
                calls = ceil(_MIN_ROUND_S / min(*before, *after))
    return sorted(old / new for old, new in zip(before[1:], after[1:], strict=True))


def _time_calls(model: nn.Module, batch: Any, calls: int) -> float:
    batches = [_fresh(batch) for _ in range(calls)]
    start = time.perf_counter()
    for arguments in batches:
        _call(model, arguments)
    return time.perf_counter() - start


def mask_of(batch: Any) -> Any:
    """Return the attention mask of a batch, or None."""
    for arguments in batch if isinstance(batch, (tuple, list)) else [batch]:
        if isinstance(arguments, Mapping) and "attention_mask" in arguments:
            return arguments["attention_mask"]
    return None


def relative_error(before: Tensor, after: Tensor) -> float:
    """Return the largest difference, relative to the largest value before."""
    if not before.numel():
        return 0.0
    scale, error = float(before.abs().max()), float((after.double() - before.double()).abs().max())
    return error / scale if scale else error


def compare_outputs(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    mask: Any,
    dtype: torch.dtype | None,
    eight_bits: EightBits | None,
    min_cosine: float,
) -> tuple[dict[str, float], dict[str, float]]:
    """Compare every output before and after.

    Args:
        before: Outputs of the original, by name.
        after: Outputs of the fused forms.
        mask: Attention mask of the batch; outputs at padding are not compared.
        dtype: Compute dtype, which decides the tolerance; None for that of each output.
        eight_bits: int8 or fp8, whose cosines have to reach `min_cosine`.
        min_cosine: Smallest accepted cosine.

    Returns:
        The largest relative difference of every output, and its smallest cosine.

    Raises:
        InputError: An output has another shape, or differs by more than rounding.
    """
    differences, cosines = {}, {}
    for name, old in before.items():
        new, label = after.get(name), f"output {name!r}" if name else "the output"
        if new is None or new.shape != old.shape:
            shape = None if new is None else tuple(new.shape)
            raise InputError(
                f"{label} was {tuple(old.shape)} and is {shape} after acceleration; the model was reverted"
            )
        old, new = without_padding(old, new, mask)
        differences[name] = relative_error(old, new)
        cosines[name] = _cosine(old, new)
        if eight_bits is not None:
            if not cosines[name] >= min_cosine:
                raise InputError(
                    f"{label} has a cosine of {cosines[name]:.6g} to the original, below {min_cosine} for "
                    f"{eight_bits}; the model was reverted. Use exclude=… or dtype=torch.bfloat16"
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
    """Return the smallest cosine over all outputs; missing or misshapen ones are skipped."""
    pairs = [
        (old, after[name])
        for name, old in before.items()
        if name in after and after[name].shape == old.shape
    ]
    return min((_cosine(*without_padding(old, new, mask)) for old, new in pairs), default=1.0)


def without_padding(before: Tensor, after: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """Select the real tokens of mask `[B, L]` in outputs that have an entry per token."""
    by_token = isinstance(mask, Tensor) and mask.ndim == 2 and before.shape[:2] == mask.shape
    return (before[mask.bool()], after[mask.bool()]) if by_token else (before, after)


def _cosine(before: Tensor, after: Tensor) -> float:
    """Return the smallest cosine over batch entries (or tokens); 1 if empty."""
    if not before.numel():
        return 1.0
    before, after = before.double(), after.double()
    # Scalar scores of the entries form one vector.
    shape = (1, -1) if before.ndim < 2 else (len(before), -1)
    before, after = before.reshape(shape), after.reshape(shape)
    cosines = F.cosine_similarity(before, after, dim=1)
    # Zeros have no direction.
    return float(cosines.masked_fill((before == after).all(1), 1.0).min())
