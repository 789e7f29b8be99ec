"""An operation from another package has checks, ladder, gradient, fake, compilation and benchmark as ours have."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from tests.contracts.toy_op import case, ran, toy_scale, toy_square
from xfm_fast.benchmarks.options import KernelOptions
from xfm_fast.benchmarks.work import kernels
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.kernels.ladder import OPS
from xfm_fast.kernels.library import differentiable


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


@pytest.mark.parametrize(
    ("toy", "definition", "count"),
    [(toy_scale, torch.mul, 2), (toy_square, torch.square, 1)],
    ids=["scale", "square"],
)
def test_its_gradient_fake_and_compilation(toy: Any, definition: Any, count: int) -> None:
    """With one result; with several gradients and with one."""
    arguments = (torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, requires_grad=True))[
        :count
    ]

    def gradients(run: Any, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*arguments).square().sum(), arguments, **options)

    found = gradients(toy, create_graph=True)
    for ours, right in zip(found, gradients(definition), strict=True):
        torch.testing.assert_close(ours, right)
    with pytest.raises(InputError, match=toy.__name__):
        torch.autograd.grad(found[0].sum(), arguments[0])
    opcheck(getattr(torch.ops.xfm_fast, toy.__name__).default, (*arguments, "cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(toy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), definition(*arguments))
    for ours, right in zip(gradients(compiled), gradients(definition), strict=True):
        torch.testing.assert_close(ours, right)


def test_a_field_without_a_schema_is_named() -> None:
    class Worded(NamedTuple):
        x: Tensor
        word: dict[str, int]

    def never(*_: Any) -> Any:
        raise AssertionError("nothing is run")

    with pytest.raises(
        InputError, match=r"toy_word: the field word of Worded is dict\[str, int\].*torch\.Tensor"
    ):
        differentiable("toy_word", Worded, never, never, never, wrt=("x",), outputs=1)


def test_its_benchmark_compares_before_it_times() -> None:
    document = kernels.run(KernelOptions(device="cpu"), cases={"toy_scale": case})
    assert {(row.backend, row.mode) for row in document.rows} == {
        (backend, direction)
        for backend in ("xfm-fast", "eager")
        for direction in ("forward", "backward")
    }
    for row in document.rows:
        assert row.measured
        assert row.parity is not None
        assert row.parity.passed
