"""8-bit flags on parameters, which otherwise stay ordinary parameters.

Values, gradients and state dicts do not change; quantised values and scales are cached (see `caching`). `cpu.int8`
multiplies in int8 where no gradient is required, `fp8` in fp8 without gradients. With a flag for fp8 on the weight of a
norm, its kernel rounds the output for the fp8 GEMMs that read it.
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


def _unpickled(data: Tensor, requires_grad: bool, kind: EightBits) -> nn.Parameter:
    from .cpu import int8

    lost = kind == "int8" and int8.why_not() is not None
    return (nn.Parameter if lost else _CLASSES[kind])(data, requires_grad)


def mark(weights: Iterable[Tensor], kind: EightBits) -> None:
    """Flag weights for 8-bit GEMMs: the same objects, with the same values."""
    for weight in weights:
        # Results, as several concatenated weights, have no flag.
        forget(weight)
        weight.__class__ = _CLASSES[kind]


def unmark(weights: Iterable[Tensor | None]) -> None:
    """Take the marks off; weights without one stay as they are."""
    for weight in weights:
        if weight is not None and kind_of(weight) is not None:
            forget(weight)
            weight.__class__ = nn.Parameter


def keep_within(
    agreement: Callable[[], float],
    groups: Sequence[Sequence[Tensor]],
    kind: EightBits,
    least: float,
) -> int:
    """Unflag the groups of weights that cost most agreement with the floating-point results, until it reaches `least`.

    The cost of each group is measured with the others unflagged, so the model runs at most twice per group. Returns the
    number of unflagged groups.
    """
    if not groups or agreement() >= least:
        return 0
    for weights in groups:
        unmark(weights)
    alone = []
    for weights in groups:
        mark(weights, kind)
        alone.append(agreement())
        unmark(weights)
    worst_first = sorted(range(len(groups)), key=alone.__getitem__)
    for weights in groups:
        mark(weights, kind)
    for exempt, number in enumerate(worst_first, start=1):
        unmark(groups[number])
        if agreement() >= least:
            return exempt
    return len(groups)


def kind_of(weight: Tensor | None) -> EightBits | None:
    """The 8-bit format of a weight's GEMMs; None without a flag."""
    kind = type(weight)
    return "int8" if kind is Int8Parameter else "fp8" if kind is Fp8Parameter else None


def copy_flag(weight: Tensor, *sources: Tensor) -> Tensor:
    """A weight computed from others, without gradient, with their common flag if they have one."""
    kinds: set[EightBits | None] = {kind_of(each) for each in sources}
    kind = kinds.pop() if len(kinds) == 1 else None
    return (
        weight
        if kind is None or weight.requires_grad
        else _CLASSES[kind](weight, requires_grad=False)
    )


def concatenate(weights: Iterable[Tensor]) -> Tensor:
    """Weights concatenated along the first dimension; flagged if all are and no gradient flows."""
    weights = tuple(weights)
    return copy_flag(torch.cat(weights), *weights)


@contextmanager
def keep_fp8_flags(module: nn.Module) -> Iterator[None]:
    """Within the block, parameters that move, as to a GPU, keep their fp8 flags; int8 flags are for the CPU."""
    places = [
        (part._parameters, name)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if kind_of(parameter) == "fp8"
    ]
    yield
    mark((found for owner, name in places if (found := owner[name]) is not None), "fp8")
