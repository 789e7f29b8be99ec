"""Whether a model still computes the same: its outputs on a batch, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError

# Relative to the largest value of an output. Rounding differs wherever a sum is taken in another order.
BANDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}


def outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The floating-point outputs of a model by name, in evaluation mode and without gradients.

    Args:
        batch: keyword arguments as a mapping, positional arguments as a tuple or list, or the only argument.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(batch, Mapping):
                made = model(**batch)
            elif isinstance(batch, (tuple, list)):
                made = model(*batch)
            else:
                made = model(batch)
    finally:
        for module, training in modes.items():
            module.training = training
    return {name: leaf for name, leaf in _leaves(made, "") if leaf.is_floating_point()}


def _leaves(made: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested mappings (transformers' outputs among them), sequences and registered containers."""
    if isinstance(made, Tensor):
        yield name, made
    elif isinstance(made, Mapping):
        for key, value in made.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        parts = made if isinstance(made, (tuple, list)) else pytree.tree_leaves(made)
        for number, value in enumerate(parts):
            if value is not made:
                yield from _leaves(value, f"{name}.{number}" if name else str(number))


def compare(
    before: dict[str, Tensor], after: dict[str, Tensor], batch: Any, dtype: torch.dtype | None
) -> dict[str, float]:
    """Relative difference of each output.

    Padding is left out of outputs with one entry per token: what is there has no meaning.

    Raises:
        InputError: an output is missing, has another shape, or differs by more than rounding.
    """
    differences = {}
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    for name, wanted in before.items():
        found = after.get(name)
        label = f"output {name!r}" if name else "the output"
        if found is None or found.shape != wanted.shape:
            raise InputError(
                f"{label} was {tuple(wanted.shape)} and is {None if found is None else tuple(found.shape)} after "
                "acceleration; the model was put back as it was"
            )
        if isinstance(mask, Tensor) and mask.ndim == 2 and wanted.shape[: mask.ndim] == mask.shape:
            wanted, found = wanted[mask.bool()], found[mask.bool()]
        band = BANDS.get(dtype or wanted.dtype, BANDS[torch.float32])
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        error = float((found.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
        differences[name] = error / scale if scale else error
        if not differences[name] <= band:
            raise InputError(
                f"{label} differs by {differences[name]:.1e} of its largest value after acceleration, more than "
                f"rounding in {dtype or wanted.dtype} explains ({band:.0e}); the model was put back as it was. "
                "exclude=… leaves modules out"
            )
    return differences
