"""LayerNorm, and LayerNorm with the residual or the text embeddings before it: checks, registration, gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import checks, fp8, reference
from .backend import Backend, named, resolve
from .cpu import int8
from .cpu import norms as cpu
from .cpu import products as cpu_products
from .library import like, on_device_of_arguments, operator
from .limits import LARGEST_WIDTH
from .marked import kind_of
from .products import (
    linear,
    linear_residual,
    mlp_residual,
    runs_cpu_inference,
    runs_in_int8,
    skips_checks,
    trained_linear,
    trained_mlp,
    trains_on_cpu,
    wants_gradient,
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: Backend | None = None) -> Tensor:
    """LayerNorm over the last dimension, statistics in fp32 for half precision. x `[..., M]` → `[..., M]`."""
    checks.norm_arguments(x, weight, bias, eps)
    chosen = _resolve(backend, x, weight, bias)
    if chosen != "triton":
        return reference.layer_norm(x, weight, bias, eps)
    if fp8.makes_fp8_rows(chosen, weight, x, bias):
        return _rounded_norm(x, None, weight, bias, eps)[0]
    return _layer_norm(x, weight, bias, eps)[0]


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
    checks.norm_arguments(x, weight, bias, eps)
    checks.branch_arguments(x.shape, residual, gamma, row_scale, dropout_p)
    checks.dropout(dropout_p, seed)
    chosen = _resolve(backend, x, residual, weight, bias, gamma, row_scale, seed)
    if chosen not in ("cpu", "triton"):
        return reference.add_layer_norm(x, residual, weight, bias, eps, gamma, row_scale, dropout_p, wide, seed)
    if not dropout_p and fp8.makes_fp8_rows(chosen, weight, x, residual, bias, gamma, row_scale):
        return _rounded_norm(x, residual, weight, bias, eps, gamma, row_scale, wide=wide)
    if dropout_p and seed is None:
        seed = torch.randint(1 << 62, (1,), device=x.device)
    drop = (dropout_p, seed if dropout_p else None)
    normed, summed, *_ = _add_layer_norm(x, residual, weight, bias, eps, gamma, row_scale, *drop, wide, chosen)
    return normed, summed


def _rounded_norm(x: Tensor, *rest: Any, wide: bool = False) -> tuple[Tensor, Tensor]:
    """(normed, summed) by the Triton kernel, with normed in fp8 for the next GEMM."""
    from .triton.fp8 import room_for
    from .triton.layer_norm import add_layer_norm_forward

    def run(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        room = room_for(x.reshape(-1, x.shape[-1]))
        made = add_layer_norm_forward(x, *rest, wide=wide, rounded=room)
        return fp8.keep(made.normed, *room), made.summed

    return on_device_of_arguments(run)(x, *rest) if x.is_cuda else run(x, *rest)


def linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    wide: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """The end of a branch and the next norm: `add_layer_norm` of `x W^T + b`.

    A CPU adds the residual inside the GEMM and normalises afterwards; a GPU adds it in the norm.

    Args:
        x: `[..., K]`; weight: `[M, K]`; bias: `[M]`; residual: `[..., M]`.
        norm_weight, norm_bias, eps, gamma, row_scale, dropout_p, wide: as in `add_layer_norm`.

    Returns:
        (normed, summed), both `[..., M]`.
    """
    plain = row_scale is None and not dropout_p
    of_one_type = (bias, residual, norm_weight, norm_bias, gamma)
    if plain and skips_checks(backend, x, weight) and residual.shape[:-1] == x.shape[:-1]:
        summed = cpu_products.linear_residual(x, weight, bias, residual, gamma)
        return reference.layer_norm(summed, norm_weight, norm_bias, eps), summed
    if plain and (
        runs_in_int8(backend, weight, x, *of_one_type)
        or (not fp8.concerns(weight) and runs_cpu_inference(backend, x, weight, *of_one_type))
    ):
        summed = linear_residual(x, weight, bias, residual, gamma=gamma, backend=backend)
        return layer_norm(summed, norm_weight, norm_bias, eps, backend=backend), summed
    return add_layer_norm(
        linear(x, weight, bias, backend=backend),
        residual,
        norm_weight,
        norm_bias,
        eps,
        gamma=gamma,
        row_scale=row_scale,
        dropout_p=dropout_p,
        wide=wide,
        backend=backend,
    )


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """`linear` of `layer_norm` of x. Training on a CPU recomputes the normalised rows instead of saving them.

    Args:
        x: `[..., K]`; norm_weight, norm_bias, eps: of the norm; weight: `[M, K]`; bias: `[M]`.
    """
    if _trains_after_norm(backend, x, norm_weight, norm_bias, weight, bias):
        checks.norm_arguments(x, norm_weight, norm_bias, eps)
        checks.linear_arguments(x, weight, bias)
        return trained_linear(x, [weight], [] if bias is None else [bias], (norm_weight, norm_bias, eps))
    if runs_in_int8(backend, weight, x, norm_weight, norm_bias, bias) and int8.pays("linear", x, weight):
        checks.norm_arguments(x, norm_weight, norm_bias, eps)
        checks.linear_arguments(x, weight, bias)
        return int8.linear(x, weight, bias, norm=(norm_weight, norm_bias, eps))
    return linear(layer_norm(x, norm_weight, norm_bias, eps, backend=backend), weight, bias, backend=backend)


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The MLP branch of a pre-norm layer: `mlp_residual` of `layer_norm` of x, added to x.

    Training on a CPU saves only x and the input of the GELU.

    Args:
        x: `[..., M]`; norm_weight, norm_bias, eps: of the norm; the others as in `mlp_residual`.
    """
    layers = (weight_in, bias_in, weight_out, bias_out)
    if _trains_after_norm(backend, x, norm_weight, norm_bias, *layers) and not wants_gradient(row_scale):
        checks.norm_arguments(x, norm_weight, norm_bias, eps)
        checks.mlp_arguments(x, *layers)
        checks.branch_arguments(x.shape, x, gamma, row_scale, 0.0)
        return trained_mlp(x, layers, (norm_weight, norm_bias, eps), x, gamma, row_scale)
    others = (x, norm_weight, norm_bias, bias_in, bias_out, gamma)
    in_int8 = row_scale is None and all(runs_in_int8(backend, weight, *others) for weight in (weight_in, weight_out))
    if in_int8 and int8.pays("mlp_residual", x, weight_in):
        checks.norm_arguments(x, norm_weight, norm_bias, eps)
        checks.mlp_arguments(x, *layers)
        checks.branch_arguments(x.shape, x, gamma, row_scale, 0.0)
        return int8.mlp_residual(x, *layers, x, gamma, norm=(norm_weight, norm_bias, eps))
    normed = layer_norm(x, norm_weight, norm_bias, eps, backend=backend)
    return mlp_residual(normed, *layers, x, gamma=gamma, row_scale=row_scale, backend=backend)


def _trains_after_norm(backend: Backend | None, x: Tensor, *parameters: Tensor | None) -> bool:
    """True where one operator runs the norm and the linear layers after it."""
    in_8_bits = any(p is not None and (kind_of(p) is not None or fp8.concerns(p)) for p in parameters)
    return not in_8_bits and trains_on_cpu(backend, x, *parameters)


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
    checks.embedding_arguments(tokens, positions, word, position, type_row, padding_idx)
    checks.norm_arguments(word, weight, bias, eps)
    chosen = _resolve(backend, word, tokens, positions, position, type_row, weight, bias)
    tables = (word, position, type_row, weight, bias)
    if chosen not in ("cpu", "triton"):
        return reference.embed_layer_norm(tokens, positions, *tables, eps, padding_idx)
    return _embed_layer_norm(tokens, positions, *tables, eps, padding_idx, chosen)[0]


def _resolve(backend: Backend | None, rows: Tensor, *others: Tensor | None) -> Backend:
    """As `resolve`, but `auto` does not run the kernels on rows wider than a tile."""
    chosen = resolve(backend, rows, *others)
    wide = not 1 <= rows.shape[-1] <= LARGEST_WIDTH
    return "reference" if chosen == "triton" and wide and not named(backend) else chosen


def _module(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from .triton import layer_norm as triton_norm

    return triton_norm


def _statistics(x: Tensor) -> Tensor:
    """Room for one statistic per row."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # Not `Size.numel`, which specialises symbols: every number of tokens would recompile.
    return x.new_empty(math.prod(x.shape[:-1]), dtype=wide)


def _plain_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _module("triton").layer_norm_forward(x, weight, bias, eps)


def _plain_forward_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _statistics(x), _statistics(x)


def _plain_backward(
    dnormed: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _module("triton").layer_norm_backward(dnormed, x, weight, mean, rstd)
    assert dbias is not None
    return dx, dweight, dbias


def _plain_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    # Or else zeros are written for results that have no gradient.
    ctx.set_materialize_grads(False)


def _plain_gradient(ctx: Any, dnormed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dnormed is None:
        return (None,) * 4
    return (*_layer_norm_grad(dnormed, *ctx.saved_tensors), None)


def _add_forward(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *arguments, wide, backend = given
    return tuple(_module(backend).add_layer_norm_forward(*arguments, wide=wide))


def _add_forward_fake(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, wide, _ = rest
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    normed = x.new_empty(x.shape, dtype=summed.dtype if wide else x.dtype)
    return normed, summed, _statistics(summed), _statistics(summed)


def _add_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *arguments, backend = given
    found = _module(backend).add_layer_norm_backward(*arguments)
    # An operator's results must not share memory: an empty tensor means that dresidual is dx.
    shared = found.dresidual.data_ptr() == found.dx.data_ptr()
    dresidual = found.dx.new_empty(0) if shared else found.dresidual
    dgamma = found.dweight.new_empty(0) if found.dgamma is None else found.dgamma
    return found.dx, dresidual, found.dweight, found.dbias, dgamma


def _add_backward_fake(dnormed: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, summed, weight, _, _, x, gamma, row_scale, dropout_p, _, _ = given
    plain = gamma is None and row_scale is None and not dropout_p and x.dtype == summed.dtype
    dresidual = x.new_empty(0) if plain else summed.new_empty(summed.shape)
    dgamma = weight.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape)
    dx = summed.new_empty(summed.shape, dtype=x.dtype)
    return dx, dresidual, weight.new_empty(weight.shape), weight.new_empty(weight.shape), dgamma


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, _, gamma, row_scale, ctx.dropout_p, seed, _, ctx.backend = inputs
    _, summed, mean, rstd = output
    if ctx.backend == "cpu" and gamma is None:
        # Only the gradient of gamma needs the branch itself; else its dtype is enough.
        x = x.new_empty(0)
    ctx.save_for_backward(summed, weight, mean, rstd, x, gamma, row_scale, seed)
    ctx.residual_dtype = residual.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _add_gradient(ctx: Any, dnormed: Tensor | None, dsummed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    summed, weight, mean, rstd, x, gamma, row_scale, seed = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(summed, dtype=x.dtype)
    saved = (summed, weight, mean, rstd, x, gamma, row_scale, ctx.dropout_p, seed, ctx.backend)
    dx, dresidual, dweight, dbias, dgamma = _add_layer_norm_grad(dnormed, dsummed, *saved)
    if not dresidual.numel():
        dresidual = dx
    dresidual = dresidual.to(ctx.residual_dtype)
    return dx, dresidual, dweight, dbias, None, None if gamma is None else dgamma, *[None] * 5


def _embed_module(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from .triton import embed_layer_norm as triton_embed

    return triton_embed


def _embed_forward(
    tokens: Tensor, positions: Tensor, word: Tensor, position: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if checks.should_check_values(tokens):
        checks.check_ids(tokens, word.shape[0], "tokens")
        checks.check_ids(positions, position.shape[0], "positions")
    *norm, _, backend = rest
    return _embed_module(backend).embed_layer_norm_forward(tokens, positions, word, position, *norm)


def _embed_forward_fake(tokens: Tensor, positions: Tensor, word: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    normed = word.new_empty(*tokens.shape, word.shape[1])
    return normed, _statistics(normed), _statistics(normed)


def _embed_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *arguments, backend = given
    return tuple(_embed_module(backend).embed_layer_norm_backward(*arguments))


def _embed_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *saved, _, _, ctx.padding_idx, ctx.backend = inputs
    ctx.save_for_backward(*saved, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _embed_gradient(ctx: Any, dnormed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dnormed is None:
        return (None,) * 10
    gradients = _embed_layer_norm_grad(dnormed, *ctx.saved_tensors, ctx.padding_idx, ctx.backend)
    return (None, None, *gradients, None, None, None)


_layer_norm_grad = operator(
    "layer_norm_backward(Tensor dnormed, Tensor x, Tensor weight, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
    _plain_backward,
    like(1, 2, 2),
)
_layer_norm = operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _plain_forward,
    _plain_forward_fake,
    setup_context=_plain_setup,
    backward=_plain_gradient,
)
_add_layer_norm_grad = operator(
    "add_layer_norm_backward(Tensor dnormed, Tensor? dsummed, Tensor summed, Tensor weight, Tensor mean, Tensor rstd, "
    "Tensor x, Tensor? gamma, Tensor? row_scale, float dropout_p, Tensor? seed, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _add_backward,
    _add_backward_fake,
)
_add_layer_norm = operator(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, Tensor? gamma, "
    "Tensor? row_scale, float dropout_p, Tensor? seed, bool wide, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _add_forward,
    _add_forward_fake,
    setup_context=_add_setup,
    backward=_add_gradient,
)
_embed_layer_norm_grad = operator(
    "embed_layer_norm_backward(Tensor dnormed, Tensor tokens, Tensor positions, Tensor word, Tensor position, "
    "Tensor type_row, Tensor weight, Tensor mean, Tensor rstd, int? padding_idx, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _embed_backward,
    like(3, 4, 5, 6, 6),
)
_embed_layer_norm = operator(
    "embed_layer_norm(Tensor tokens, Tensor positions, Tensor word, Tensor position, Tensor type_row, Tensor weight, "
    "Tensor bias, float eps, int? padding_idx, str backend) -> (Tensor, Tensor, Tensor)",
    _embed_forward,
    _embed_forward_fake,
    setup_context=_embed_setup,
    backward=_embed_gradient,
)
