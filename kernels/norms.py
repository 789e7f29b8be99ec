"""LayerNorm, and LayerNorm with the residual or the text embeddings before it: public functions and operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import checks, fp8, reference
from .backend import Backend
from .checks import LARGEST_WIDTH, AddNorm, Embedding, Norm
from .cpu import norms as cpu
from .ladder import Call, Op
from .library import Gradients, Needs, Outputs, Upstream, differentiable, on_device_of_arguments


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: Backend | None = None
) -> Tensor:
    """Return the LayerNorm over the last dimension of x `[..., M]`, statistics in fp32 for half precision."""
    return LAYER_NORM(Norm(x, weight, bias, eps), backend)


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
    """Compute a residual sum and its LayerNorm in one pass.

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
    args = AddNorm(x, residual, weight, bias, eps, gamma, row_scale, dropout_p, seed, wide)
    return ADD_LAYER_NORM(args, backend)


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
    """Return the LayerNorm of `word[tokens] + position[positions] + type_row`: the input of a text encoder.

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
    return EMBED_LAYER_NORM(Embedding(tokens, positions, *tables, eps, padding_idx), backend)


def _one_tile(rows: Tensor) -> bool:
    """Return whether a Triton kernel can hold a row in registers."""
    return 1 <= rows.shape[-1] <= LARGEST_WIDTH


def _module(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from .triton import layers

    return layers


def _statistics(x: Tensor) -> Tensor:
    """Return an empty tensor for one statistic per row."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # Not `Size.numel`, which specialises symbols: every number of tokens would recompile.
    return x.new_empty(math.prod(x.shape[:-1]), dtype=wide)


def _add_norm_in_fp8(a: AddNorm) -> tuple[Tensor, Tensor]:
    """Return (normed, summed) by the Triton kernel, which also rounds normed to fp8 for the next GEMM."""
    from .triton.layers import add_layer_norm_forward
    from .triton.rows import room_for

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        room = room_for(x.reshape(-1, x.shape[-1]))
        outputs = add_layer_norm_forward(a, rounded=room)
        return fp8.keep(outputs.normed, *room), outputs.summed

    return on_device_of_arguments(run)(a.x) if a.x.is_cuda else run(a.x)


# LayerNorm.


def _norm_kernel(a: Norm, call: Call) -> Tensor:
    if fp8.makes_fp8_rows(call.backend, a.weight, a.x, a.bias):
        return _add_norm_in_fp8(AddNorm(a.x, None, a.weight, a.bias, a.eps))[0]
    return _norm(a, call.backend)[0]


def _sums_half_precision(a: Norm) -> bool:
    """Return whether PyTorch would add gradients of weight and bias in half precision; its compiler adds in fp32."""
    if a.x.dtype.itemsize > 2 or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return a.x.requires_grad or a.weight.requires_grad or a.bias.requires_grad


def _norm_backward(
    upstream: Upstream, a: Norm, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    _, mean, rstd = outputs
    dx, dweight, dbias = _module(backend).layer_norm_backward(
        upstream[0], a.x, a.weight, mean, rstd
    )
    return {"x": dx, "weight": dweight, "bias": dbias}


_norm = differentiable(
    "layer_norm",
    Norm,
    lambda a, backend: _module(backend).layer_norm_forward(a.x, a.weight, a.bias, a.eps),
    lambda a, _: (a.x.new_empty(a.x.shape), _statistics(a.x), _statistics(a.x)),
    _norm_backward,
    outputs=3,
    keep=lambda a, outputs, _: (a, (None, *outputs[1:])),
)
LAYER_NORM = Op(
    "layer_norm",
    Norm,
    {"kernel": _norm_kernel},
    reference=lambda a: reference.layer_norm(a.x, a.weight, a.bias, a.eps),
    fits={"triton": lambda a: _one_tile(a.x), "cpu": _sums_half_precision},
)


# A residual sum and its LayerNorm.


def _add_norm_reference(a: AddNorm) -> tuple[Tensor, Tensor]:
    factors = (a.gamma, a.row_scale, a.dropout_p, a.seed, a.wide)
    return reference.add_layer_norm(a.x, a.residual, a.weight, a.bias, a.eps, *factors)


def _add_norm_kernel(a: AddNorm, call: Call) -> tuple[Tensor, Tensor]:
    tensors = (a.x, a.residual, a.bias, a.gamma, a.row_scale)
    if not a.dropout_p and fp8.makes_fp8_rows(call.backend, a.weight, *tensors):
        return _add_norm_in_fp8(a)
    if torch.is_grad_enabled() and a.row_scale is not None and a.row_scale.requires_grad:
        # Factors commute, and the kernels have no gradient of this one.
        a.x, a.row_scale = (a.x * cpu.of_rows(a.row_scale, a.x)).to(a.x.dtype), None
    a.seed = checks.drawn_seed(a.dropout_p, a.seed, a.x.device)
    normed, summed, *_ = _add_norm(a, call.backend)
    return normed, summed


def _add_norm_fake(a: AddNorm, _: str) -> tuple[Tensor, ...]:
    assert a.residual is not None
    summed = a.x.new_empty(a.x.shape, dtype=torch.promote_types(a.x.dtype, a.residual.dtype))
    normed = a.x.new_empty(a.x.shape, dtype=summed.dtype if a.wide else a.x.dtype)
    return normed, summed, _statistics(summed), _statistics(summed)


def _add_norm_backward(
    upstream: Upstream, a: AddNorm, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    dnormed, dsummed = upstream
    _, summed, mean, rstd = outputs
    if dnormed is None:
        dnormed = torch.zeros_like(summed, dtype=a.x.dtype)
    gradients = _module(backend).add_layer_norm_backward(dnormed, dsummed, summed, mean, rstd, a)
    return {
        "x": gradients.dx,
        # Results of an operator must not share memory: `_share_gradient` gives the residual dx.
        "residual": None if _one_gradient(a, summed) else gradients.dresidual,
        "weight": gradients.dweight,
        "bias": gradients.dbias,
        "gamma": gradients.dgamma,
    }


def _add_norm_backward_fake(a: AddNorm, outputs: Outputs, needs: Needs) -> Gradients:
    summed = outputs[1]
    return {
        "x": summed.new_empty(summed.shape, dtype=a.x.dtype),
        "residual": None if _one_gradient(a, summed) else summed.new_empty(summed.shape),
        "weight": a.weight.new_empty(a.weight.shape),
        "bias": a.weight.new_empty(a.weight.shape),
        "gamma": None if a.gamma is None else a.gamma.new_empty(a.gamma.shape),
    }


def _one_gradient(a: AddNorm, summed: Tensor) -> bool:
    """Return whether the gradients of x and of the residual are equal."""
    return a.gamma is None and a.row_scale is None and not a.dropout_p and a.x.dtype == summed.dtype


def _share_gradient(
    call: Any, upstream: Upstream, a: AddNorm, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    if not _one_gradient(a, outputs[1]):
        return call(upstream, a, outputs, needs, backend)
    either = {**needs, "x": needs["x"] or needs["residual"], "residual": False}
    gradients = dict(call(upstream, a, outputs, either, backend))
    dx = gradients.pop("x", None)
    return {**gradients, **{name: dx for name in ("x", "residual") if needs[name]}}


def _keep_for_add_norm(a: AddNorm, outputs: Outputs, backend: str) -> tuple[AddNorm, Outputs]:
    # Only the gradient of gamma needs the branch itself; on a CPU its dtype is else enough.
    if backend == "cpu" and a.gamma is None:
        a.x = a.x.new_empty(0)
    a.residual = a.bias = None
    return a, (None, *outputs[1:])


_add_norm = differentiable(
    "add_layer_norm",
    AddNorm,
    lambda a, backend: _module(backend).add_layer_norm_forward(a),
    _add_norm_fake,
    _add_norm_backward,
    outputs=4,
    results=2,
    keep=_keep_for_add_norm,
    around=_share_gradient,
    backward_fake=_add_norm_backward_fake,
)
ADD_LAYER_NORM = Op(
    "add_layer_norm",
    AddNorm,
    {"kernel": _add_norm_kernel},
    reference=_add_norm_reference,
    fits={"triton": lambda a: _one_tile(a.x)},
)


# Embeddings and their LayerNorm.


def _embed_reference(a: Embedding) -> Tensor:
    tables = (a.word, a.position, a.type_row)
    return reference.embed_layer_norm(
        a.tokens, a.positions, *tables, a.weight, a.bias, a.eps, a.padding_idx
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
    upstream: Upstream, a: Embedding, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    _, mean, rstd = outputs
    gradients = _module(backend).embedding_norm_backward(upstream[0], mean, rstd, a)
    return dict(zip(("word", "position", "type_row", "weight", "bias"), gradients, strict=True))


_embed = differentiable(
    "embed_layer_norm",
    Embedding,
    _embed_forward,
    _embed_fake,
    _embed_backward,
    outputs=3,
    keep=lambda a, outputs, _: (a, (None, *outputs[1:])),
)
EMBED_LAYER_NORM = Op(
    "embed_layer_norm",
    Embedding,
    {"kernel": lambda a, call: _embed(a, call.backend)[0]},
    reference=_embed_reference,
    fits={"triton": lambda a: _one_tile(a.word)},
)
