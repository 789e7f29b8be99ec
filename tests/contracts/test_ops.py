"""An operation from another package has checks, ladder, gradient, fake, compilation and benchmark as ours have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from tests.contracts.toy_op import GegluArgs, _reference, case, geglu
from xfm_fast.benchmarks.options import KernelOptions
from xfm_fast.benchmarks.work import kernels
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.kernels.checks import CHANCE, CONSTANT
from xfm_fast.kernels.ladder import OPS, Op, watching
from xfm_fast.kernels.library import Gradients, differentiable


def definition(x: Tensor) -> Tensor:
    return _reference(GegluArgs(x))


def test_the_ladder_picks_its_implementation() -> None:
    assert "toy_geglu" in OPS
    x = torch.randn(2, 3, 8, requires_grad=True)
    backends: dict[ops.Backend, str] = {"auto": "cpu", "reference": ""}
    for backend, ran in backends.items():
        with watching() as watched:
            torch.testing.assert_close(geglu(x, backend=backend), definition(x))
        assert watched.get("toy_geglu", "") == ran
    assert "toy_geglu" in str(geglu(x).grad_fn).lower()
    assert "toy_geglu" not in str(geglu(x, backend="reference").grad_fn).lower()
    with pytest.raises(InputError, match=r"x \[2, 3\].*even last dimension"):
        geglu(torch.randn(2, 3))
    with pytest.raises(InputError, match="flash_attn"):
        geglu(x, backend="flash_attn")


def test_its_gradient_fake_and_compilation() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)

    def gradient(run: Any, **options: Any) -> Tensor:
        return torch.autograd.grad(run(x).square().sum(), x, **options)[0]

    found = gradient(geglu, create_graph=True)
    torch.testing.assert_close(found, gradient(definition))
    with pytest.raises(InputError, match="toy_geglu"):
        torch.autograd.grad(found.sum(), x)
    opcheck(torch.ops.xfm_fast.toy_geglu.default, (x, "cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), definition(x))
    torch.testing.assert_close(gradient(compiled), gradient(definition))


@dataclass(slots=True)
class MixArgs:
    """Arguments of every role: `sum(parts) · scale`, and `x` where the mask is set."""

    x: Tensor
    parts: list[Tensor]
    scale: Tensor | None
    mask: Tensor = field(metadata=CONSTANT)
    row_scale: Tensor | None = field(default=None, metadata=CHANCE)

    def check(self) -> None:
        """Take anything."""


def mix(args: MixArgs) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.stack([part.sum() for part in args.parts]).sum()
    scaled = total * (1 if args.scale is None else args.scale)
    return args.x * args.mask, scaled, args.x.sum() * 2


def mix_backward(
    dmasked: Tensor | None, dscaled: Tensor | None, ddouble: Tensor | None, args: MixArgs
) -> Gradients:
    dx, dparts, dscale = torch.zeros_like(args.x), None, None
    if dmasked is not None:
        dx = dx + dmasked * args.mask
    if ddouble is not None:
        dx = dx + 2 * ddouble
    if dscaled is not None:
        factor = 1 if args.scale is None else args.scale
        dparts = torch.ones_like(torch.cat(args.parts)) * factor * dscaled
        dscale = torch.cat(args.parts).sum() * dscaled
    return {"x": dx, "parts": dparts, "scale": dscale}


MIX = Op("toy_mix", MixArgs, reference=mix, backward=mix_backward, outputs=3)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_any_number_of_results_and_gradients(used: tuple[int, ...], scaled: bool) -> None:
    x, mask = torch.randn(3, 4, requires_grad=True), torch.arange(12).view(3, 4) % 2
    parts = [torch.randn(size, requires_grad=size != 2) for size in (3, 2, 4)]
    scale = torch.tensor(1.5, requires_grad=True) if scaled else None
    leaves = [x, parts[0], parts[2], *([scale] if scale is not None else [])]
    gradients = []
    for run in (MIX, mix):
        results = run(MixArgs(x, parts, scale, mask.float()))
        loss = torch.stack([results[index].square().sum() for index in used]).sum()
        gradients.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for ours, right in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, right)


def test_a_field_without_a_schema_is_named() -> None:
    @dataclass
    class Worded:
        x: Tensor
        word: dict[str, int]

    def never(*_: Any) -> Any:
        raise AssertionError("nothing is run")

    with pytest.raises(
        InputError, match=r"toy_word: the field word of Worded is dict\[str, int\].*torch\.Tensor"
    ):
        differentiable("toy_word", Worded, never, never, never)


def test_its_benchmark_compares_before_it_times() -> None:
    document = kernels.run(KernelOptions(device="cpu"), cases={"toy_geglu": case})
    assert {(row.backend, row.mode) for row in document.rows} == {
        (backend, direction)
        for backend in ("xfm-fast", "eager")
        for direction in ("forward", "backward")
    }
    for row in document.rows:
        assert row.measured
        assert row.parity is not None
        assert row.parity.passed
