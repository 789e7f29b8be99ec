"""The GELU kernels, interpreted: forward and backward against fp64, odd widths, and bugs that must be noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, draws
from tests.kernels.triton_testing import interpreted_kernels, poison

interpreted_kernels()

from xfm_fast.kernels import reference  # noqa: E402
from xfm_fast.kernels.triton import gelu  # noqa: E402

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


def by_definition(y: Tensor, bias: Tensor | None, dout: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (y, bias) if t is not None]
    out = F.gelu(sum(leaves[1:], leaves[0]))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def by_kernel(y: Tensor, bias: Tensor | None, dout: Tensor, module: Any = gelu) -> list[Tensor]:
    with poison():
        out = module.bias_gelu_forward(y, bias)
        return [t for t in (out, *module.bias_gelu_backward(dout, y, bias)) if t is not None]


def check(y: Tensor, bias: Tensor | None, dout: Tensor, module: Any = gelu) -> None:
    found, plain = by_kernel(y, bias, dout, module), by_definition(y, bias, dout)
    truth = by_definition(y.double(), None if bias is None else bias.double(), dout)
    for name, value, reference_value, true_value in zip(("out", "dy", "dbias"), found, plain, truth, strict=False):
        assert value.dtype == y.dtype
        assert_accurate(value, [reference_value], true_value, name)
    assert len(found) == len(truth)


@each_dtype
@pytest.mark.parametrize("width", [32, 63, 1100])
@pytest.mark.parametrize("rows", [1, 37])
def test_bias_gelu(rows: int, width: int, dtype: torch.dtype) -> None:
    y, bias, dout = (2 * torch.randn(s).to(dtype) for s in ((rows, width), (width,), (rows, width)))
    check(y, bias, dout)


@each_dtype
def test_without_bias(dtype: torch.dtype) -> None:
    y, dout = (torch.randn(3, 4, 45).to(dtype) for _ in range(2))
    check(y, None, dout)


def test_extreme_pre_activations() -> None:
    """Far out the activation is 0 or the identity, and no exponential overflows on the way there."""
    y = torch.tensor([[-1e4, -200.0, -14.0, -5.0, 0.0, 5.0, 14.0, 1e4]])
    check(y, torch.zeros(8), torch.ones_like(y))
    assert torch.equal(gelu.bias_gelu_forward(y, None)[0, [0, 7]], torch.tensor([-0.0, 1e4]))


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_linear_gelu(bias: bool, dtype: torch.dtype) -> None:
    x, w, dout = (torch.randn(s).to(dtype) for s in ((2, 5, 24), (70, 24), (2, 5, 70)))
    b = torch.randn(70).to(dtype) if bias else None

    def definition(*leaves: Tensor) -> list[Tensor]:
        leaves = tuple(t.detach().clone().requires_grad_() for t in leaves)
        out = reference.linear_gelu(leaves[0], leaves[1], leaves[2] if bias else None)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    leaves = [t for t in (x, w, b) if t is not None]
    with poison():
        out, y = gelu.linear_gelu_forward(x, w, b)
        assert y is not None
        found = [out, *gelu.linear_gelu_backward(dout, x, w, b, y)]
    found = [t for t in found if t is not None]
    plain, truth = draws(lambda: definition(*leaves)), definition(*(t.double() for t in leaves))
    for name, value, true_value, *same in zip(("out", "dx", "dw", "db"), found, truth, *plain, strict=False):
        assert_accurate(value, same, true_value, name)
    assert len(found) == len(truth)
    unkept, nothing = gelu.linear_gelu_forward(x, w, b, keep=False)
    assert nothing is None
    assert torch.equal(unkept, out)
    assert gelu.linear_gelu_backward(dout, x, w, b, y, (False, False, False)) == (None, None, None)
