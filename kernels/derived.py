"""Tensors computed from parameters, kept until a parameter changes.

Inference repeats the same small computations on weights for every batch (concatenating query, key and value
projections, expanding a position table, packing a weight for oneDNN). `derived` does each once. An entry belongs to
its first source and dies with it; it is recomputed when any source was written to, moved or converted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def derived(name: str, sources: tuple[Tensor, ...], compute: Callable[[], T]) -> T:
    """`compute()`, remembered under `name` as long as `sources` keep their storage and version."""
    if torch.compiler.is_compiling() or any(
        s.is_inference() or isinstance(s, torch._subclasses.FakeTensor) for s in sources
    ):
        # Inference tensors carry no version, so a change could not be seen; traced values must stay in the graph.
        return compute()
    stamp = tuple((s.data_ptr(), s._version, s.dtype, s.shape) for s in sources)
    kept: dict[str, tuple[Any, Any]] = _entries.setdefault(sources[0], {})  # pyright: ignore[reportAssignmentType]
    if name not in kept or kept[name][0] != stamp:
        # Whoever asks first may be in inference mode; what is kept must serve training too.
        with torch.inference_mode(False), torch.no_grad():
            kept[name] = (stamp, compute())
    return kept[name][1]


def clear() -> None:
    """Forget everything, for example to free memory before training."""
    _entries.clear()
