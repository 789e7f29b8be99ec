"""One compilation, and one export, serves every number of tokens: packed batches have another one each time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim, export

from xfm_fast.kernels import ops

WIDTH, HIDDEN, VOCABULARY = 16, 24, 40
NORM = (torch.rand(WIDTH), torch.rand(WIDTH))
INNER = (torch.randn(HIDDEN, WIDTH), torch.randn(HIDDEN))
OUTER = (torch.randn(WIDTH, HIDDEN), torch.randn(WIDTH))
WORDS = (torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY))
TABLES = (WORDS[0], torch.randn(50, WIDTH), torch.randn(WIDTH), *NORM)
POSITIONS = torch.randn(12, 2)


def _rows(n: int) -> Tensor:
    return torch.randn(n, 3, WIDTH)


def _ids(n: int) -> Tensor:
    return torch.arange(3 * n).view(n, 3) % VOCABULARY


def _packed(n: int) -> tuple[Any, ...]:
    return torch.randn(2 * n, 2, 32), torch.tensor([0, n, 2 * n], dtype=torch.int32), n


# An operation, and its arguments for a number.
CASES: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Any, ...]]]] = {
    "norm": (lambda x: ops.layer_norm(x, *NORM, 1e-5), lambda n: (_rows(n),)),
    "add norm": (lambda x, r: ops.add_layer_norm(x, r, *NORM, 1e-5)[0], lambda n: (_rows(n), _rows(n))),
    "add norm, scaled": (
        lambda x, r, s: ops.add_layer_norm(x, r, *NORM, 1e-5, row_scale=s)[0],
        lambda n: (_rows(n), _rows(n), torch.rand(n)),
    ),
    "embedding": (lambda t, p: ops.embed_layer_norm(t, p, *TABLES, 1e-5), lambda n: (_ids(n), _ids(n))),
    "gelu": (lambda x: ops.linear_gelu(x, *INNER), lambda n: (_rows(n),)),
    "branch": (lambda x: ops.mlp_residual(x, *INNER, *OUTER, x), lambda n: (_rows(n),)),
    "loss": (lambda x, t: ops.linear_cross_entropy(x, *WORDS, t), lambda n: (_rows(n), _ids(n))),
    "likelihood": (lambda x, t: ops.token_log_likelihood(x, *WORDS, t), lambda n: (_rows(n), _ids(n))),
    "varlen": (lambda q, o, m: ops.varlen_attention(q, q, q, o, o, m, m), _packed),
    "relpos": (lambda q: ops.relpos_attention(q, q, q, POSITIONS, (2, 2)), lambda n: (torch.randn(n, 5, 2, 32),)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_one_compilation_serves_every_number_of_tokens(name: str, training: bool) -> None:
    operation, make = CASES[name]
    made: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        made.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(operation, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=count))
    expected_graphs = None
    for n in (4, 6, 7, 9):
        arguments = make(n)
        floating = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point() and a.ndim > 1]
        for leaf in floating:
            leaf.requires_grad_(training)
        found, expected = compiled(*arguments), operation(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if training and floating:
            pairs = (torch.autograd.grad(out.square().sum(), floating) for out in (found, expected))
            for a, b in zip(*pairs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        expected_graphs = len(made) if expected_graphs is None else expected_graphs
        assert len(made) == expected_graphs


class _Layer(torch.nn.Module):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        out = ops.mlp_residual(x, *INNER, *OUTER, x)
        normed, _ = ops.add_layer_norm(out, x, *NORM, 1e-5)
        return ops.token_log_likelihood(normed, *WORDS, target)


def test_an_export_takes_batches_of_every_shape() -> None:
    axes = {0: Dim("entries", min=1, max=64), 1: Dim("tokens", min=1, max=64)}
    exported = export(
        _Layer(), (torch.randn(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.long)), dynamic_shapes=(axes, axes)
    )
    for shape in ((3, 7), (1, 1)):
        x, target = torch.randn(*shape, WIDTH), torch.arange(math.prod(shape)).view(shape)
        torch.testing.assert_close(exported.module()(x, target), _Layer()(x, target), rtol=1e-5, atol=1e-5)
