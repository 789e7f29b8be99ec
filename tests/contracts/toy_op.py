"""Toy operations from outside the package: `x · scale`, by a reference, a CPU path and an operator; and `x²`.

Annotations are values here and strings within the package: an operation may come with either.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xfm_fast.benchmarks.work.kernels import EAGER, OpCase
from xfm_fast.errors import InputError
from xfm_fast.kernels.ladder import Op
from xfm_fast.kernels.library import Gradients, differentiable
from xfm_fast.kernels.ops import Backend
from xfm_fast.kernels.roofline import Work

ran: list[str] = []


class ToyScale(NamedTuple):
    """`x · scale`: x `[..., M]`, scale `[M]`."""

    x: Tensor
    scale: Tensor

    def check(self) -> None:
        if self.x.shape[-1:] != self.scale.shape:
            raise InputError(f"scale is {[*self.scale.shape]}; it must be [{self.x.shape[-1]}]")


def _reference(a: ToyScale, _: Any = None) -> Tensor:
    ran.append("reference")
    return a.x * a.scale


def _on_cpu(a: ToyScale, _: Any) -> Tensor:
    ran.append("inference")
    return torch.mul(a.x, a.scale)


def _forward(a: ToyScale, _: str) -> tuple[Tensor, ...]:
    ran.append("operator")
    return (torch.mul(a.x, a.scale),)


def _backward(
    upstream: Gradients, a: ToyScale, outputs: Sequence[Tensor], needs: Sequence[bool], backend: str
) -> Gradients:
    dout: Any = upstream[0]
    return dout * a.scale, (dout * a.x).flatten(0, -2).sum(0)


_operator = differentiable(
    "toy_scale",
    ToyScale,
    _forward,
    lambda a, _: (torch.empty_like(a.x),),
    _backward,
    wrt=("x", "scale"),
    outputs=1,
)
TOY = Op(
    "toy_scale",
    ToyScale,
    {
        "inference": _on_cpu,
        "kernel": lambda a, call: _operator(a, call.chosen)[0],
        "reference": _reference,
    },
    kernels=("cpu",),
)


def toy_scale(x: Tensor, scale: Tensor, *, backend: Backend | None = None) -> Tensor:
    return TOY(ToyScale(x, scale), backend)


class ToySquare(NamedTuple):
    """`x²`: one argument, one result and one gradient."""

    x: Tensor

    def check(self) -> None:
        if not self.x.is_floating_point():
            raise InputError(f"x is {self.x.dtype}; it must be floating point")


_square = differentiable(
    "toy_square",
    ToySquare,
    lambda a, _: (a.x * a.x,),
    lambda a, _: (torch.empty_like(a.x),),
    lambda upstream, a, outputs, needs, backend: (2 * a.x * upstream[0],),
    wrt=("x",),
    outputs=1,
)
_SQUARE = Op(
    "toy_square",
    ToySquare,
    {"kernel": lambda a, call: _square(a, call.chosen)[0], "reference": lambda a, _: a.x.square()},
    kernels=("cpu",),
)


def toy_square(x: Tensor, *, backend: Backend | None = None) -> Tensor:
    return _SQUARE(ToySquare(x), backend)


def case(*_: object) -> OpCase:
    """The operation as a case of the kernels' benchmark."""
    work = Work("toy_scale", "64 × 32", flops=64 * 32, bytes=3 * 4 * 64 * 32)
    inputs = torch.randn(64, 32), torch.randn(32)
    return OpCase(
        "toy_scale",
        inputs,
        toy_scale,
        torch.mul,
        {"forward": work, "backward": None},
        {EAGER: torch.mul},
    )
