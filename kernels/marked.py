"""Weights whose products run in 8 bits: a mark on the parameter, which in all else stays what it was.

Its values, gradients and state dicts are those of any parameter; what is made of it, bytes and scales, is kept beside
it (see `derived`). `cpu.int8` multiplies in int8 wherever no gradient is wanted, `fp8` in fp8 and refuses gradients. A
mark for fp8 on the weight of a norm says that products in fp8 read what it makes, so that its kernel rounds that on the
way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .derived import forget

EightBits = Literal["int8", "fp8"]


class Int8Parameter(nn.Parameter):
    """A weight whose products run in int8 on a CPU."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.data, self.requires_grad, "int8")


class Fp8Parameter(nn.Parameter):
    """A weight whose products run in fp8, or of a norm before such products."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.data, self.requires_grad, "fp8")


_CLASSES: dict[EightBits, type[nn.Parameter]] = {"int8": Int8Parameter, "fp8": Fp8Parameter}


def _unpickled(data: Tensor, requires_grad: bool, kind: EightBits) -> nn.Parameter:
    from .cpu import int8

    lost = kind == "int8" and int8.why_not() is not None
    return (nn.Parameter if lost else _CLASSES[kind])(data, requires_grad)


def mark(weights: Iterable[Tensor], kind: EightBits) -> None:
    """Let the products of these weights run in 8 bits: the same objects, with the same values."""
    for weight in weights:
        # What was computed from it, such as several weights side by side, is not marked.
        forget(weight)
        weight.__class__ = _CLASSES[kind]


def unmark(weights: Iterable[Tensor | None]) -> None:
    """Take the marks off; weights without one stay as they are."""
    for weight in weights:
        if weight is not None and kind_of(weight) is not None:
            forget(weight)
            weight.__class__ = nn.Parameter


def kind_of(weight: Tensor | None) -> EightBits | None:
    """In which 8 bits the products of a weight run; None without a mark."""
    kind = type(weight)
    return "int8" if kind is Int8Parameter else "fp8" if kind is Fp8Parameter else None


def alike(weight: Tensor, *marked: Tensor) -> Tensor:
    """A weight made of others, without gradient: marked as they are, if they all are in one way."""
    kinds: set[EightBits | None] = {kind_of(each) for each in marked}
    kind = kinds.pop() if len(kinds) == 1 else None
    return weight if kind is None or weight.requires_grad else _CLASSES[kind](weight, requires_grad=False)


def side_by_side(weights: Iterable[Tensor]) -> Tensor:
    """Weights joined along the first dimension; marked if all are and no gradient goes through."""
    weights = tuple(weights)
    return alike(torch.cat(weights), *weights)


@contextmanager
def following(module: nn.Module) -> Iterator[None]:
    """Within the block parameters may be put in others' places, as when a model moves to a GPU; marks for fp8 follow.

    Those for int8 do not: they are for the CPU.
    """
    places = [
        (part._parameters, name)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if kind_of(parameter) == "fp8"
    ]
    yield
    mark((found for owner, name in places if (found := owner[name]) is not None), "fp8")
