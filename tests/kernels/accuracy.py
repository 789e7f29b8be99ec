"""When a fast operation is accurate enough: judged by fp64 and by what plain PyTorch reaches in the same precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# In rounding errors of the largest entry of the result.
_BAND = 2
# fp64 has no better judge than the definition itself, from which the order of summation may differ.
_BAND_FP64 = 64


def largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def widened(arguments: Any) -> Any:
    """The same arguments in fp64."""
    if isinstance(arguments, Tensor):
        return arguments.double() if arguments.is_floating_point() else arguments
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(widened(a) for a in arguments)
    return arguments


def assert_as_accurate(found: Tensor, definition: Callable[..., Tensor], *arguments: Any) -> None:
    """The error of `found` is at most twice that of the definition in the same precision, plus a rounding band.

    Both are measured against the definition in fp64 on the same values.
    """
    assert_accurate(found, definition(*arguments), definition(*widened(arguments)), "result")


def assert_accurate(found: Tensor, plain: Tensor, truth: Tensor, name: str) -> None:
    """The same comparison of results that are at hand: found, plain PyTorch in the same precision, and fp64."""
    assert found.shape == truth.shape, name
    assert found.dtype == plain.dtype, name
    error, reference = largest(found.double() - truth), largest(plain.double() - truth)
    band = _BAND_FP64 if found.dtype == torch.float64 else _BAND
    allowed = 2 * reference + band * torch.finfo(found.dtype).eps * largest(truth)
    # A comparison with NaN is false: NaN fails.
    assert error <= allowed, f"{name}: error {error:.2e} exceeds {allowed:.2e} (reference {reference:.2e})"
