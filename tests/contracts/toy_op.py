"""Gated GELU: `gelu(gate) * value`. A toy operation from outside the package, in one file.

Annotations are values here and strings within the package: an operation may come with either.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.benchmarks.work.kernels import EAGER, OpCase
from xfm_fast.kernels.checks import refuse
from xfm_fast.kernels.ladder import Op
from xfm_fast.kernels.library import Gradients
from xfm_fast.kernels.ops import Backend
from xfm_fast.kernels.roofline import Work


@dataclass(slots=True)
class GegluArgs:
    """A gate and a value, side by side."""

    x: Tensor  # [..., 2M]: gate, then value

    def check(self) -> None:
        if not (self.x.ndim and self.x.is_floating_point()) or self.x.shape[-1] % 2:
            refuse("floating point, with an even last dimension", x=self.x)


def _reference(args: GegluArgs) -> Tensor:
    gate, value = args.x.chunk(2, dim=-1)
    return F.gelu(gate) * value


def _backward(dout: Tensor, args: GegluArgs) -> Gradients:
    gate, value = args.x.chunk(2, dim=-1)
    dgate = torch.ops.aten.gelu_backward(dout * value, gate)
    return {"x": torch.cat([dgate, F.gelu(gate) * dout], dim=-1)}


GEGLU = Op("toy_geglu", GegluArgs, reference=_reference, backward=_backward)


def geglu(x: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Return `gelu(x[..., :M]) * x[..., M:]`.

    Args:
        x: `[..., 2M]`, floating point.
        backend: Implementation; the fastest by default.

    Raises:
        InputError: the last dimension is odd, or x is of integers.
    """
    return GEGLU(GegluArgs(x), backend)


def case(*_: object) -> OpCase:
    """Return the operation as a case of the kernels' benchmark."""
    work = Work("toy_geglu", "64 × 64", flops=64 * 32, bytes=3 * 4 * 64 * 32)

    def eager(x: Tensor) -> Tensor:
        return _reference(GegluArgs(x))

    return OpCase(
        "toy_geglu",
        (torch.randn(64, 64),),
        ours=geglu,
        reference=eager,
        work={"forward": work, "backward": None},
        baselines={EAGER: eager},
    )
