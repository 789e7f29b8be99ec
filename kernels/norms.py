"""LayerNorm, and LayerNorm with the residual or the text embeddings before it: public functions and operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, fp8, reference
from .backend import Backend
from .checks import LARGEST_WIDTH, AddNorm, Embedding, Norm
from .cpu import norms as cpu
from .ladder import Call, Op
from .library import Gradients, differentiable, on_device_of_arguments


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: Backend | None = None
) -> Tensor:
    """LayerNorm over the last dimension, statistics in fp32 for half precision. x `[..., M]` → `[..., M]`."""
    return _layer_norm(Norm(x, weight, bias, eps), backend)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    wide: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual sum and LayerNorm in one pass.

    `summed = residual + row_scale · gamma · dropout(x)` and `normed = LayerNorm(summed)`: the end of a post-norm branch
    (no gamma), or of a pre-norm branch with LayerScale and stochastic depth, fused with the next norm.

    Args:
        x, residual: `[..., M]`, possibly of two precisions.
        weight, bias, gamma: `[M]`.
        row_scale: `[B]`, one factor per entry of the first dimension.
        dropout_p: probability of zeroing an element of x.
        seed: one int64 on the device of x, the seed of the dropout; drawn from PyTorch's generator by default.
        wide: give normed the dtype of the sum instead of that of x. In a post-norm layer normed is the next residual,
            which under autocast is fp32 and must not be rounded at every branch.

    Returns:
        (normed, summed), both `[..., M]`; summed as wide as its terms, normed in the dtype of x unless `wide`.

    Raises:
        ValueError: inconsistent shapes, dtypes or devices, or a backend that cannot run here.
    """
    given = AddNorm(x, residual, weight, bias, eps, gamma, row_scale, dropout_p, seed, wide)
    return _add_layer_norm(given, backend)


def embed_layer_norm(
    tokens: Tensor,
    positions: Tensor,
    word: Tensor,
    position: Tensor,
    type_row: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    padding_idx: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """LayerNorm of `word[tokens] + position[positions] + type_row`: the input of a text encoder.

    Args:
        tokens, positions: `[...]` integers.
        word: `[V, M]`; position: `[P, M]`; type_row, weight, bias: `[M]`.
        padding_idx: row of both tables that receives no gradient.

    Returns:
        `[..., M]`. The gradients of the tables are deterministic.

    Raises:
        ValueError: inconsistent shapes, dtypes or devices, or a backend that cannot run here.
        IndexError: an id outside its table, on CPU and within `check_contents()`; otherwise its row is NaN.
    """
    tables = (word, position, type_row, weight, bias)
    return _embed_layer_norm(Embedding(tokens, positions, *tables, eps, padding_idx), backend)


def _rounded_norm(a: AddNorm) -> tuple[Tensor, Tensor]:
    """(normed, summed) by the Triton kernel, with normed in fp8 for the next GEMM."""
    from .triton.layers import add_layer_norm_forward
    from .triton.rows import room_for

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        room = room_for(x.reshape(-1, x.shape[-1]))
        made = add_layer_norm_forward(a, rounded=room)
        return fp8.keep(made.normed, *room), made.summed

    return on_device_of_arguments(run)(a.x) if a.x.is_cuda else run(a.x)


def _one_tile(rows: Tensor) -> bool:
    """Whether a Triton kernel holds a row in registers."""
    return 1 <= rows.shape[-1] <= LARGEST_WIDTH


def _module(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from .triton import layers

    return layers


def _statistics(x: Tensor) -> Tensor:
    """Room for one statistic per row."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # Not `Size.numel`, which specialises symbols: every number of tokens would recompile.
    return x.new_empty(math.prod(x.shape[:-1]), dtype=wide)


def _norm_kernel(a: Norm, call: Call) -> Tensor:
    if fp8.makes_fp8_rows(call.chosen, a.weight, a.x, a.bias):
        return _rounded_norm(AddNorm(a.x, None, *a[1:]))[0]
    return _norm(a, call.chosen)[0]


def _sums_half_precision(a: Norm) -> bool:
    """Whether PyTorch would add the gradients of weight and bias in half precision; its compiler adds in fp32."""
    if a.x.dtype.itemsize > 2 or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and any(t.requires_grad for t in a[:3])


def _norm_backward(
    upstream: Gradients, a: Norm, outputs: Sequence[Tensor], needs: Sequence[bool], backend: str
) -> Gradients:
    return _module(backend).layer_norm_backward(upstream[0], a.x, a.weight, *outputs[1:])


_norm = differentiable(
    "layer_norm",
    Norm,
    lambda a, backend: _module(backend).layer_norm_forward(*a),
    lambda a, _: (a.x.new_empty(a.x.shape), _statistics(a.x), _statistics(a.x)),
    _norm_backward,
    wrt=("x", "weight", "bias"),
    outputs=3,
    keep=lambda a, outputs, _: (a, (None, *outputs[1:])),
)
_layer_norm = Op(
    "layer_norm",
    Norm,
    {"kernel": _norm_kernel, "reference": lambda a, _: reference.layer_norm(*a)},
    fits={"triton": lambda a: _one_tile(a.x), "cpu": _sums_half_precision},
)


def _add_norm_kernel(a: AddNorm, call: Call) -> tuple[Tensor, Tensor]:
    tensors = (a.x, a.residual, a.bias, a.gamma, a.row_scale)
    if not a.dropout_p and fp8.makes_fp8_rows(call.chosen, a.weight, *tensors):
        return _rounded_norm(a)
    if torch.is_grad_enabled() and a.row_scale is not None and a.row_scale.requires_grad:
        # Factors commute, and the kernels have no gradient of this one.
        a = a._replace(x=(a.x * cpu.of_rows(a.row_scale, a.x)).to(a.x.dtype), row_scale=None)
    seed = checks.drawn_seed(a.dropout_p, a.seed, a.x.device)
    normed, summed, *_ = _add_norm(a._replace(seed=seed), call.chosen)
    return normed, summed


def _add_norm_fake(a: AddNorm, _: str) -> tuple[Tensor, ...]:
    assert a.residual is not None
    summed = a.x.new_empty(a.x.shape, dtype=torch.promote_types(a.x.dtype, a.residual.dtype))
    normed = a.x.new_empty(a.x.shape, dtype=summed.dtype if a.wide else a.x.dtype)
    return normed, summed, _statistics(summed), _statistics(summed)


def _add_norm_backward(
    upstream: Gradients, a: AddNorm, outputs: Sequence[Tensor], needs: Sequence[bool], backend: str
) -> Gradients:
    dnormed, dsummed = upstream
    _, summed, mean, rstd = outputs
    if dnormed is None:
        dnormed = torch.zeros_like(summed, dtype=a.x.dtype)
    found = _module(backend).add_layer_norm_backward(dnormed, dsummed, summed, mean, rstd, a)
    # An operator's results must not share memory: `_add_norm_gradient` gives the residual dx.
    dresidual = None if _one_gradient(a, summed) else found.dresidual
    return found.dx, dresidual, found.dweight, found.dbias, found.dgamma


def _add_norm_backward_fake(
    a: AddNorm, outputs: Sequence[Tensor], needs: Sequence[bool]
) -> Gradients:
    summed = outputs[1]
    dx = summed.new_empty(summed.shape, dtype=a.x.dtype)
    dresidual = None if _one_gradient(a, summed) else summed.new_empty(summed.shape)
    return (
        dx,
        dresidual,
        *(None if t is None else t.new_empty(t.shape) for t in (a.weight, a.weight, a.gamma)),
    )


def _one_gradient(a: AddNorm, summed: Tensor) -> bool:
    """Whether the branch and the residual have one gradient."""
    return a.gamma is None and a.row_scale is None and not a.dropout_p and a.x.dtype == summed.dtype


def _add_norm_gradient(
    call: Any,
    upstream: Gradients,
    a: AddNorm,
    outputs: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
) -> Gradients:
    if not _one_gradient(a, outputs[1]):
        return call(upstream, a, outputs, needs, backend)
    dx, _, *rest = call(upstream, a, outputs, [needs[0] or needs[1], False, *needs[2:]], backend)
    return dx if needs[0] else None, dx if needs[1] else None, *rest


def _saved_for_add_norm(
    a: AddNorm, outputs: Sequence[Tensor], backend: str
) -> tuple[AddNorm, Sequence[Any]]:
    # Only the gradient of gamma needs the branch itself; on a CPU its dtype is else enough.
    x = a.x.new_empty(0) if backend == "cpu" and a.gamma is None else a.x
    return a._replace(x=x, residual=None, bias=None), (None, *outputs[1:])


_add_norm = differentiable(
    "add_layer_norm",
    AddNorm,
    lambda a, backend: _module(backend).add_layer_norm_forward(a),
    _add_norm_fake,
    _add_norm_backward,
    wrt=("x", "residual", "weight", "bias", "gamma"),
    outputs=4,
    results=2,
    keep=_saved_for_add_norm,
    around=_add_norm_gradient,
    backward_fake=_add_norm_backward_fake,
)
_add_layer_norm = Op(
    "add_layer_norm",
    AddNorm,
    {"kernel": _add_norm_kernel, "reference": lambda a, _: reference.add_layer_norm(*a)},
    fits={"triton": lambda a: _one_tile(a.x)},
)


def _embed_forward(a: Embedding, backend: str) -> tuple[Tensor, ...]:
    if checks.should_check_values(a.tokens):
        checks.check_ids(a.tokens, a.word.shape[0], "tokens")
        checks.check_ids(a.positions, a.position.shape[0], "positions")
    return _module(backend).embedding_norm_forward(a)


def _embed_fake(a: Embedding, _: str) -> tuple[Tensor, ...]:
    normed = a.word.new_empty(*a.tokens.shape, a.word.shape[1])
    return normed, _statistics(normed), _statistics(normed)


def _embed_backward(
    upstream: Gradients,
    a: Embedding,
    outputs: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
) -> Gradients:
    return _module(backend).embedding_norm_backward(upstream[0], *outputs[1:], a)


_embed = differentiable(
    "embed_layer_norm",
    Embedding,
    _embed_forward,
    _embed_fake,
    _embed_backward,
    wrt=("word", "position", "type_row", "weight", "bias"),
    outputs=3,
    keep=lambda a, outputs, _: (a, (None, *outputs[1:])),
)
_embed_layer_norm = Op(
    "embed_layer_norm",
    Embedding,
    {
        "kernel": lambda a, call: _embed(a, call.chosen)[0],
        "reference": lambda a, _: reference.embed_layer_norm(*a),
    },
    fits={"triton": lambda a: _one_tile(a.word)},
)
