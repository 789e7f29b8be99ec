"""An operation from another package has checks, ladder, gradient, fake, compilation and benchmark as ours have."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from tests.contracts.toy_op import case, ran, toy_scale
from xfm_fast.benchmarks.options import KernelOptions
from xfm_fast.benchmarks.work import kernels
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.kernels.ladder import OPS


def test_the_ladder_picks_its_implementation() -> None:
    assert "toy_scale" in OPS
    x, scale = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    for rung, run in (
        ("operator", lambda: toy_scale(x, scale)),
        ("inference", lambda: toy_scale(x.detach(), scale.detach())),
        ("reference", lambda: toy_scale(x, scale, backend="reference")),
    ):
        ran.clear()
        torch.testing.assert_close(run(), x * scale)
        assert ran == [rung]
    with ops.use_backend("reference"):
        toy_scale(x, scale)
    assert ran == ["reference"] * 2
    with pytest.raises(InputError, match=r"scale.*\[3\].*\[4\]"):
        toy_scale(x, torch.randn(3))
    with pytest.raises(InputError, match="flash_attn"):
        toy_scale(x, scale, backend="flash_attn")


def test_its_gradient_fake_and_compilation() -> None:
    x, scale = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    found = torch.autograd.grad(toy_scale(x, scale).square().sum(), (x, scale), create_graph=True)
    for ours, right in zip(found, torch.autograd.grad((x * scale).square().sum(), (x, scale)), strict=True):
        torch.testing.assert_close(ours, right)
    with pytest.raises(InputError, match="toy_scale"):
        torch.autograd.grad(found[0].sum(), x)
    opcheck(torch.ops.xfm_fast.toy_scale.default, (x, scale, "cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(toy_scale, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, scale), x * scale)


def test_its_benchmark_compares_before_it_times() -> None:
    document = kernels.run(KernelOptions(device="cpu"), cases={"toy_scale": case})
    assert {(row.backend, row.mode) for row in document.rows} == {
        (backend, direction) for backend in ("xfm-fast", "eager") for direction in ("forward", "backward")
    }
    for row in document.rows:
        assert row.measured
        assert row.parity is not None
        assert row.parity.passed
