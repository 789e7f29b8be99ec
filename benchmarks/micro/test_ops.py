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


Draw = Callable[..., Tensor]
Measure = Callable[[Callable[[], Any]], Any]


def _relpos_attention(size: Size, draw: Draw) -> Operation:
    window = (size.window, size.window)
    shape = (size.images, size.window**2 + 1, HEADS, HEAD_DIM)
    table = draw((2 * size.window - 1) ** 2 + 3, HEADS)
    return Operation(
        lambda *given: ops.relpos_attention(*given, window), (draw(*shape), draw(*shape), draw(*shape), table)
    )


def _varlen_attention(size: Size, draw: Draw) -> Operation:
    shape = (size.texts * TEXT_LENGTH, HEADS, HEAD_DIM)
    inputs = (draw(*shape), draw(*shape), draw(*shape))
    ends = torch.arange(size.texts + 1, dtype=torch.int32, device=inputs[0].device) * TEXT_LENGTH
    return Operation(lambda *given: ops.varlen_attention(*given, ends, ends, TEXT_LENGTH, TEXT_LENGTH), inputs)


def _layer_norm(size: Size, draw: Draw) -> Operation:
    return Operation(lambda *given: ops.layer_norm(*given, 1e-5), (draw(size.rows, WIDTH), draw(WIDTH), draw(WIDTH)))


def _add_layer_norm(size: Size, draw: Draw) -> Operation:
    inputs = (draw(size.rows, WIDTH), draw(size.rows, WIDTH), draw(WIDTH), draw(WIDTH))
    return Operation(lambda *given: ops.add_layer_norm(*given, 1e-5)[0], inputs)


def _linear_add_layer_norm(size: Size, draw: Draw) -> Operation:
    inputs = (*_linear(size, draw, HIDDEN, WIDTH), draw(size.rows, WIDTH), draw(WIDTH), draw(WIDTH))
    return Operation(lambda *given: ops.linear_add_layer_norm(*given, 1e-5)[0], inputs)


def _embed_layer_norm(size: Size, draw: Draw) -> Operation:
    tables = (draw(size.vocabulary, WIDTH), draw(514, WIDTH), draw(WIDTH), draw(WIDTH), draw(WIDTH))
    count, device = size.texts * TEXT_LENGTH, tables[0].device
    tokens = torch.randint(size.vocabulary, (count,), device=device)
    positions = torch.arange(count, device=device) % TEXT_LENGTH + 2
    return Operation(lambda *given: ops.embed_layer_norm(tokens, positions, *given, 1e-5), tables)


def _linear(size: Size, draw: Draw, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(size.rows, inputs), draw(outputs, inputs) / inputs**0.5, draw(outputs)


def _mlp_residual(size: Size, draw: Draw) -> Operation:
    x, weight_in, bias_in = _linear(size, draw, WIDTH, HIDDEN)
    weight_out = draw(WIDTH, HIDDEN) / HIDDEN**0.5
    return Operation(ops.mlp_residual, (x, weight_in, bias_in, weight_out, draw(WIDTH), draw(size.rows, WIDTH)))


def _vocabulary(size: Size, draw: Draw) -> tuple[tuple[Tensor, ...], Tensor]:
    inputs = (draw(size.labels, WIDTH), draw(size.vocabulary, WIDTH) / WIDTH**0.5, draw(size.vocabulary))
    target = torch.randint(size.vocabulary, (size.labels,), device=inputs[0].device)
    target[::IGNORED_SHARE] = -100
    return inputs, target


def _linear_cross_entropy(size: Size, draw: Draw) -> Operation:
    inputs, target = _vocabulary(size, draw)
    return Operation(lambda *given: ops.linear_cross_entropy(*given, target), inputs)


def _token_log_likelihood(size: Size, draw: Draw) -> Operation:
    inputs, target = _vocabulary(size, draw)
    return Operation(lambda *given: ops.token_log_likelihood(*given, target), inputs)


def _sample_hard_negatives(size: Size, draw: Draw) -> Operation:
    similarity = draw(size.rows, size.rows)
    own = torch.eye(size.rows, dtype=torch.bool, device=similarity.device)
    return Operation(lambda given: ops.sample_hard_negatives(given, own), (similarity,))


OPERATIONS: dict[str, Callable[[Size, Draw], Operation]] = {
    "add_layer_norm": _add_layer_norm,
    "embed_layer_norm": _embed_layer_norm,
    "layer_norm": _layer_norm,
    "linear": lambda size, draw: Operation(ops.linear, _linear(size, draw, WIDTH, 3 * WIDTH)),
    "linear_add_layer_norm": _linear_add_layer_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_gelu": lambda size, draw: Operation(ops.linear_gelu, _linear(size, draw, WIDTH, HIDDEN)),
    "linear_residual": lambda size, draw: Operation(
        ops.linear_residual, (*_linear(size, draw, HIDDEN, WIDTH), draw(size.rows, WIDTH))
    ),
    "mlp_residual": _mlp_residual,
    "relpos_attention": _relpos_attention,
    "sample_hard_negatives": _sample_hard_negatives,
    "token_log_likelihood": _token_log_likelihood,
    "varlen_attention": _varlen_attention,
}
# What is drawn has no gradient.
DIFFERENTIABLE = [name for name in OPERATIONS if name != "sample_hard_negatives"]


def _made(name: str, size: str, device: torch.device, dtype: torch.dtype) -> Operation:
    return OPERATIONS[name](SIZES[size], lambda *shape: torch.randn(shape).to(device, dtype))


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
@pytest.mark.parametrize("name", DIFFERENTIABLE)
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
