"""8-bit flags on parameters, which otherwise stay ordinary parameters.

Values, gradients and state dicts do not change; quantised values and scales are cached (see `caching`). `cpu.int8`
multiplies in int8 where no gradient is required, `fp8` in fp8 without gradients. With a flag for fp8 on the weight of a
norm, its kernel also writes the fp8 rows of the GEMMs that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .backend import PLAIN
from .caching import forget

EightBits = Literal["int8", "fp8"]


class Int8Parameter(nn.Parameter):
    """A weight of int8 GEMMs on a CPU."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        # Copied in inference mode it would have no version, so that its int8 copy could not be watched.
        with torch.inference_mode(False):
            return memo.setdefault(id(self), type(self)(self.data.clone(), self.requires_grad))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.data, self.requires_grad, "int8")


class Fp8Parameter(nn.Parameter):
    """A weight of fp8 GEMMs, or of a norm before them."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.data, self.requires_grad, "fp8")


_CLASSES: dict[EightBits, type[nn.Parameter]] = {"int8": Int8Parameter, "fp8": Fp8Parameter}
PLAIN.update(_CLASSES.values())


_FORMATS: dict[type[Tensor], EightBits] = {cls: name for name, cls in _CLASSES.items()}


def _unpickled(data: Tensor, requires_grad: bool, dtype: EightBits) -> nn.Parameter:
    from .cpu import int8

    if dtype == "int8" and int8.why_not() is not None:
        return nn.Parameter(data, requires_grad)
    return _CLASSES[dtype](data, requires_grad)


def mark(weights: Iterable[Tensor], dtype: EightBits) -> None:
    """Flag weights for 8-bit GEMMs: the same objects, with the same values."""
    for weight in weights:
        # Cached values, such as several concatenated weights, have no flag.
        forget(weight)
        weight.__class__ = _CLASSES[dtype]


def unmark(weights: Iterable[Tensor | None]) -> None:
    """Remove the flags of weights; others are left alone."""
    for weight in weights:
        if weight is not None and kind_of(weight) is not None:
            forget(weight)
            weight.__class__ = nn.Parameter


def keep_within(
    agreement: Callable[[], float],
    groups: Sequence[Sequence[Tensor]],
    dtype: EightBits,
    target: float,
) -> int:
    """Unflag the groups of weights that cost most agreement with the floating-point results, until it reaches `target`.

    The cost of each group is measured with the others unflagged, so the model runs at most twice per group. Returns the
    number of unflagged groups.
    """
    if not groups or agreement() >= target:
        return 0
    for weights in groups:
        unmark(weights)
    agreements = []
    for weights in groups:
        mark(weights, dtype)
        agreements.append(agreement())
        unmark(weights)
    worst_first = sorted(range(len(groups)), key=agreements.__getitem__)
    for weights in groups:
        mark(weights, dtype)
    for exempt, index in enumerate(worst_first, start=1):
        unmark(groups[index])
        if agreement() >= target:
            return exempt
    return len(groups)


def kind_of(weight: Tensor | None) -> EightBits | None:
    """Return the 8-bit format of a weight's GEMMs; None without a flag."""
    return _FORMATS.get(type(weight))  # pyright: ignore[reportArgumentType]


def copy_flag(weight: Tensor, *sources: Tensor) -> Tensor:
    """Flag a weight that was computed from others as all of these are, unless it requires a gradient."""
    formats: set[EightBits | None] = {kind_of(source) for source in sources}
    dtype = formats.pop() if len(formats) == 1 else None
    if dtype is None or weight.requires_grad:
        return weight
    return _CLASSES[dtype](weight, requires_grad=False)


def concatenate(weights: Iterable[Tensor]) -> Tensor:
    """Concatenate weights along the first dimension; the result is flagged if all are and no gradient flows."""
    weights = tuple(weights)
    return copy_flag(torch.cat(weights), *weights)


@contextmanager
def keep_fp8_flags(module: nn.Module) -> Iterator[None]:
    """Keep the fp8 flags of parameters that move within the block, as to a GPU; int8 flags are for the CPU."""
    flagged: list[tuple[dict[str, nn.Parameter | None], str]] = []
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if kind_of(parameter) == "fp8":
                flagged.append((child._parameters, name))
    yield
    moved = [parameters[name] for parameters, name in flagged]
    mark([parameter for parameter in moved if parameter is not None], "fp8")


def concatenate_biases(biases: list[Tensor | None], widths: list[int]) -> Tensor | None:
    """Concatenate biases, with zeros for a layer without one; None if no layer has one."""
    first = next((bias for bias in biases if bias is not None), None)
    if len(biases) == 1 or first is None:
        return biases[0]
    return torch.cat(
        [
            first.new_zeros(width) if bias is None else bias
            for bias, width in zip(biases, widths, strict=True)
        ]
    )
