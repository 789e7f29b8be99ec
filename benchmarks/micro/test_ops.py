"""Every operation of `xfm_fast.kernels.ops`, and its definition in plain PyTorch beside it.

`pytest benchmarks/micro/test_ops.py -k "base and add_layer_norm"` picks some of them.
"""

# Operations take the tensors of their case as one tuple, whose length no checker can know.
# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from xfm_fast.kernels import ops
from xfm_fast.kernels.backend import Backend

HEADS, HEAD_DIM = 12, 64
WIDTH, HIDDEN = 768, 3072
TEXT_LENGTH = 13
IGNORED_SHARE = 7


class Size(NamedTuple):
    """How much work: images of `window` × `window` patches, packed texts of 13 tokens, rows of the linear layers."""

    images: int
    window: int
    texts: int
    rows: int
    labels: int
    vocabulary: int


SIZES = {"tiny": Size(1, 4, 4, 32, 16, 512), "base": Size(2, 14, 32, 394, 64, 50_265)}


class Operation(NamedTuple):
    """An operation and the tensors that it is differentiated by."""

    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


Measure = Callable[[Callable[[], Any]], Any]


def _made(name: str, scale: str, device: torch.device, dtype: torch.dtype) -> Operation:
    size = SIZES[scale]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    def product(inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
        return draw(size.rows, inputs), draw(outputs, inputs) / inputs**0.5, draw(outputs)

    def norm(rows: int) -> tuple[Tensor, ...]:
        return *(draw(size.rows, WIDTH) for _ in range(rows)), draw(WIDTH), draw(WIDTH)

    tokens = size.texts * TEXT_LENGTH
    match name:
        case "relpos_attention":
            window, shape = (size.window, size.window), (size.images, size.window**2 + 1, HEADS, HEAD_DIM)
            table = draw((2 * size.window - 1) ** 2 + 3, HEADS)
            given = (draw(*shape), draw(*shape), draw(*shape), table)
            return Operation(lambda *given: ops.relpos_attention(*given, window), given)
        case "bias_attention":
            shape = (size.images, size.window**2 + 1, HEADS, HEAD_DIM)
            given = (*(draw(*shape) for _ in range(3)), draw(1, HEADS, shape[1], shape[1]))
            return Operation(ops.bias_attention, given)
        case "varlen_attention":
            ends = torch.arange(size.texts + 1, dtype=torch.int32, device=device) * TEXT_LENGTH
            given = tuple(draw(tokens, HEADS, HEAD_DIM) for _ in range(3))
            return Operation(lambda *given: ops.varlen_attention(*given, ends, ends, TEXT_LENGTH, TEXT_LENGTH), given)
        case "layer_norm":
            return Operation(lambda *given: ops.layer_norm(*given, 1e-5), norm(1))
        case "add_layer_norm":
            return Operation(lambda *given: ops.add_layer_norm(*given, 1e-5)[0], norm(2))
        case "linear_add_layer_norm":
            given = (*product(HIDDEN, WIDTH), *norm(1))
            return Operation(lambda *given: ops.linear_add_layer_norm(*given, 1e-5)[0], given)
        case "embed_layer_norm":
            ids = torch.randint(size.vocabulary, (tokens,), device=device)
            places = torch.arange(tokens, device=device) % TEXT_LENGTH + 2
            given = (draw(size.vocabulary, WIDTH), draw(514, WIDTH), draw(WIDTH), draw(WIDTH), draw(WIDTH))
            return Operation(lambda *given: ops.embed_layer_norm(ids, places, *given, 1e-5), given)
        case "linear":
            return Operation(ops.linear, product(WIDTH, 3 * WIDTH))
        case "joined_linear":
            given = (*product(WIDTH, WIDTH), *product(WIDTH, HIDDEN)[1:])
            return Operation(lambda x, w, b, v, c: ops.joined_linear(x, (w, v), (b, c)), given)
        case "layer_norm_linear":
            x, *layer = product(WIDTH, 3 * WIDTH)
            return Operation(lambda x, w, b, *rest: ops.layer_norm_linear(x, w, b, 1e-5, *rest), (x, *norm(0), *layer))
        case "layer_norm_mlp":
            x, *layer = product(WIDTH, HIDDEN)
            given = (x, *norm(0), *layer, *product(HIDDEN, WIDTH)[1:])
            return Operation(lambda x, w, b, *rest: ops.layer_norm_mlp(x, w, b, 1e-5, *rest), given)
        case "linear_gelu":
            return Operation(ops.linear_gelu, product(WIDTH, HIDDEN))
        case "linear_residual":
            return Operation(ops.linear_residual, (*product(HIDDEN, WIDTH), draw(size.rows, WIDTH)))
        case "mlp_residual":
            given = (*product(WIDTH, HIDDEN), *product(HIDDEN, WIDTH)[1:], draw(size.rows, WIDTH))
            return Operation(ops.mlp_residual, given)
        case "linear_cross_entropy" | "token_log_likelihood":
            given = (draw(size.labels, WIDTH), draw(size.vocabulary, WIDTH) / WIDTH**0.5, draw(size.vocabulary))
            target = torch.randint(size.vocabulary, (size.labels,), device=device)
            target[::IGNORED_SHARE] = -100
            return Operation(lambda *given: getattr(ops, name)(*given, target), given)
        case _:
            raise ValueError(f"{name} has no case")


OPERATIONS = (
    "add_layer_norm", "bias_attention", "embed_layer_norm", "joined_linear", "layer_norm", "layer_norm_linear",
    "layer_norm_mlp", "linear", "linear_add_layer_norm", "linear_cross_entropy", "linear_gelu", "linear_residual",
    "mlp_residual", "relpos_attention", "token_log_likelihood", "varlen_attention",
)  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_forward(
    name: str, size: str, backend: Backend, benchmark: BenchmarkFixture, measure: Measure, device: torch.device,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """The operation without a graph."""
    benchmark.group = f"{name}, forward, {size}"
    operation = _made(name, size, device, dtype)
    with torch.no_grad(), ops.use_backend(backend):
        result = measure(lambda: operation.run(*operation.inputs))
    assert result.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_and_backward(
    name: str, size: str, backend: Backend, benchmark: BenchmarkFixture, measure: Measure, device: torch.device,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """The operation with the gradients of all its tensors."""
    benchmark.group = f"{name}, forward and backward, {size}"
    operation = _made(name, size, device, dtype)
    leaves = tuple(tensor.requires_grad_() for tensor in operation.inputs)

    def step() -> tuple[Tensor, ...]:
        result = operation.run(*leaves)
        return torch.autograd.grad(result, leaves, torch.ones_like(result))

    with ops.use_backend(backend):
        gradients = measure(step)
    assert all(gradient.isfinite().all() for gradient in gradients)
