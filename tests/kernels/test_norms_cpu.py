"""LayerNorm with residual and embeddings on CPU: forward and every gradient against the definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_as_accurate
from xfm_fast.kernels import reference
from xfm_fast.kernels.cpu import norms

EPS = 1e-5
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
NAMES = ("x", "residual", "weight", "bias", "gamma", "row_scale")

Inputs = dict[str, Tensor | None]


def make(shape: tuple[int, ...], dtype: torch.dtype, absent: tuple[str, ...] = ()) -> Inputs:
    width = shape[-1]
    made = {
        "x": torch.randn(shape) + 0.5,
        "residual": torch.randn(shape),
        "weight": 1 + 0.3 * torch.randn(width),
        "bias": torch.randn(width),
        "gamma": torch.randn(width),
        "row_scale": (torch.rand(shape[0]) > 0.3) * 1.25,
    }
    return {name: None if name in absent else value.to(dtype) for name, value in made.items()}


def check(
    inputs: Inputs,
    dnormed: Tensor,
    dsummed: Tensor | None,
    kept: Tensor | None = None,
    *,
    wide: bool = False,
    **dropout: Any,
) -> None:
    x, residual, weight, bias, gamma, row_scale = (inputs[name] for name in NAMES)
    assert x is not None
    assert weight is not None
    forward = norms.add_layer_norm_forward(x, residual, weight, bias, EPS, gamma, row_scale, **dropout, wide=wide)
    gradients = norms.add_layer_norm_backward(
        dnormed, dsummed, forward.summed, weight, forward.mean, forward.rstd, x, gamma, row_scale, **dropout,
        has_residual=residual is not None, has_bias=bias is not None,
    )  # fmt: skip

    def definition(name: str) -> Any:
        def compute(*arguments: Tensor | None) -> Tensor:
            leaves = {
                n: None if t is None else t.detach().requires_grad_() for n, t in zip(NAMES, arguments, strict=True)
            }
            branch = leaves["x"]
            assert branch is not None
            branch = branch if kept is None else branch * kept.to(branch.dtype)
            outputs = reference.add_layer_norm(
                branch, leaves["residual"], leaves["weight"], leaves["bias"], EPS, leaves["gamma"],  # pyright: ignore[reportArgumentType]
                leaves["row_scale"], wide=wide,
            )  # fmt: skip
            if name in ("normed", "summed"):
                return outputs[name == "summed"].detach()
            upstream = [
                dnormed.to(outputs[0].dtype),
                (dnormed * 0 if dsummed is None else dsummed).to(outputs[1].dtype),
            ]
            leaf = leaves[name[1:]]
            assert leaf is not None
            return torch.autograd.grad(outputs, leaf, upstream)[0]

        return compute

    results = {"normed": forward.normed, "summed": forward.summed} | gradients._asdict()
    for name, value in results.items():
        assert (value is None) == (name[0] == "d" and inputs[name[1:]] is None), name
        if value is not None:
            assert_as_accurate(value, definition(name), *(inputs[n] for n in NAMES))


@each_dtype
@pytest.mark.parametrize("shape", [(1, 32), (5, 63), (3, 4, 111), (2, 3, 768)])
@pytest.mark.parametrize(
    "absent", [(), ("gamma", "row_scale"), ("residual",), ("residual", "gamma", "bias"), ("gamma",)]
)
def test_add_layer_norm(shape: tuple[int, ...], absent: tuple[str, ...], dtype: torch.dtype) -> None:
    inputs = make(shape, dtype, absent)
    dnormed, dsummed = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    check(inputs, dnormed, dsummed)
    check(inputs, dnormed, None)


@pytest.mark.parametrize("wide", [False, True])
def test_a_residual_stream_in_fp32(wide: bool) -> None:
    inputs = make((5, 63), torch.bfloat16)
    inputs["residual"] = torch.randn(5, 63)
    dnormed = torch.randn(5, 63).to(torch.float32 if wide else torch.bfloat16)
    check(inputs, dnormed, torch.randn(5, 63), wide=wide)


def test_strided_inputs() -> None:
    inputs = make((4, 5, 24), torch.float32, ("gamma", "row_scale"))
    inputs["x"] = torch.randn(5, 4, 48)[..., ::2].transpose(0, 1)
    check(inputs, torch.randn(4, 24, 5).transpose(1, 2), torch.ones(()).expand(4, 5, 24))


@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout(dropout_p: float) -> None:
    """Seen through a branch of ones; the backward drops what the forward dropped."""
    shape, seed = (40, 111), torch.tensor([3])
    ones, weight = torch.ones(shape), torch.ones(111)
    kept = norms.add_layer_norm_forward(ones, None, weight, None, EPS, dropout_p=dropout_p, seed=seed).summed
    assert abs(float((kept == 0).float().mean()) - dropout_p) < 0.03
    inputs = make(shape, torch.float32)
    check(inputs, torch.randn(shape), torch.randn(shape), kept, dropout_p=dropout_p, seed=seed)
    other = norms.add_layer_norm_forward(ones, None, weight, None, EPS, dropout_p=dropout_p, seed=seed + 1).summed
    assert dropout_p == 1 or not torch.equal(kept, other)


def test_dropout_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="seed"):
        norms.add_layer_norm_forward(torch.ones(2, 8), None, torch.ones(8), None, EPS, dropout_p=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("padding", [None, 1])
def test_embeddings(padding: int | None, dtype: torch.dtype) -> None:
    tokens, positions = torch.randint(0, 9, (4, 10)), torch.randint(0, 5, (4, 10))
    leaves = [torch.randn(s).to(dtype) for s in ((12, 48), (6, 48), (48,), (48,), (48,))]
    word, position, type_row, weight, bias = leaves
    dnormed = torch.randn(4, 10, 48).to(dtype)
    normed, mean, rstd = norms.embed_layer_norm_forward(tokens, positions, word, position, type_row, weight, bias, EPS)
    found = norms.embed_layer_norm_backward(
        dnormed, tokens, positions, word, position, type_row, weight, mean, rstd, padding
    )

    def definition(which: int | None) -> Any:
        def compute(*arguments: Tensor) -> Tensor:
            traced = [t.detach().requires_grad_() for t in arguments]
            out = reference.embed_layer_norm(tokens, positions, *traced, EPS, padding)  # pyright: ignore[reportCallIssue]
            return out.detach() if which is None else torch.autograd.grad(out, traced[which], dnormed.to(out.dtype))[0]

        return compute

    assert_as_accurate(normed, definition(None), *leaves)
    for which, value in enumerate(found):
        assert_as_accurate(value, definition(which), *leaves)


def test_an_id_outside_its_table() -> None:
    tables = torch.randn(12, 8), torch.randn(6, 8)
    for ids in ((12, 0), (0, 6), (-1, 0)):
        tokens, positions = (torch.tensor([i]) for i in ids)
        with pytest.raises(IndexError):
            norms.embed_layer_norm_forward(tokens, positions, *tables, *torch.ones(3, 8), EPS)  # pyright: ignore[reportCallIssue]
