"""The parts of a transformer layer and the three orders in which layers compute with them.

`pre_norm`, `post_norm` and `norm_behind` run on padded `[B, N, width]` or packed `[T, width]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import ops
from xfm_fast.kernels.caching import cached
from xfm_fast.replace.attention import Attend, Memory
from xfm_fast.replace.swap import Settings


class Parts(NamedTuple):
    """The parts of a layer at the time of a call."""

    norms: tuple[nn.Module, nn.Module]  # of the attention and of the MLP
    heads: int
    proj: nn.Module  # linear layer after the attention
    inner: tuple[nn.Module, ...]  # linear layers into the hidden layer of the MLP
    fc2: nn.Module  # linear layer out of it
    projections: tuple[
        nn.Module, ...
    ] = ()  # linear layers to queries, keys and values, or one to all three
    qkv: tuple[tuple[Tensor, Tensor | None], ...] = ()  # weights and biases in place of projections
    qkv_bias: Tensor | None = None  # bias of a single projection, stored outside the layer
    joins: bool = True  # one GEMM for all projections
    activation: Callable[[nn.Module], Any] | None = None  # looks up the activation in a layer
    # the hidden layer of (x, apply_linear), unless it is `gelu(inner(x))`
    hidden: Callable[[Tensor, Callable[[Any, Tensor], Tensor]], Tensor] | None = None
    gammas: tuple[Tensor | None, Tensor | None] = (None, None)  # LayerScale of each branch
    row_scales: tuple[
        Callable[[Tensor], Tensor | None], ...
    ] = ()  # stochastic depth of each branch: `[B]`, or None
    attention_p: float = 0.0  # dropout of the attention weights
    hidden_p: float = 0.0  # dropout of the hidden layer
    branch_p: tuple[float, float] = (0.0, 0.0)  # dropout at the end of each branch
    adapt: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = (
        None  # rotation of q and k `[..., H, D]`
    )
    inner_norms: tuple[nn.Module | None, nn.Module | None] = (
        None,
        None,
    )  # before proj and before fc2


class Cross(NamedTuple):
    """The parts of a layer's cross-attention."""

    projections: tuple[nn.Module, nn.Module, nn.Module]
    heads: int
    proj: nn.Module
    norm: nn.Module
    attention_p: float = 0.0
    branch_p: float = 0.0


def pre_norm(parts: Parts, x: Tensor, attend: Attend, settings: Settings) -> Tensor:
    """`x += s₁·γ₁·Attn(N₁(x)); x += s₂·γ₂·MLP(N₂(x))`: residual, LayerScale, stochastic depth and norm in one pass."""
    first, second = parts.norms
    x = settings.operand(x)
    context = self_attention(parts, apply_norm(first, x, settings), attend, settings)
    normed, x = proj_residual_norm(
        context,
        parts.proj,
        x,
        second,
        settings,
        gamma=settings.parameter(parts.gammas[0]),
        row_scale=parts.row_scales[0](x) if parts.row_scales else None,
        dropout_p=parts.branch_p[0],
    )
    branch: dict[str, Any] = {
        "gamma": settings.parameter(parts.gammas[1]),
        "row_scale": parts.row_scales[1](x) if parts.row_scales else None,
        "dropout_p": parts.branch_p[1],
        "backend": settings.backend,
    }
    if parts.hidden is None and not parts.hidden_p and parts.inner_norms[1] is None:
        fc1, fc2 = (
            settings.affine_of(parts.inner[0], normed, x),
            settings.affine_of(parts.fc2, normed, x),
        )
        if fc1 is not None and fc2 is not None:
            return ops.mlp_residual(normed, *fc1, *fc2, x, **branch)
    return linear_residual(hidden_layer(parts, normed, settings), parts.fc2, x, settings, **branch)


def post_norm(
    parts: Parts,
    x: Tensor,
    attend: Attend,
    settings: Settings,
    memory: Memory | None = None,
    cross: Cross | None = None,
    reads: Tensor | None = None,
) -> Tensor:
    """`x = N₁(x + Attn(x)); x = N₂(x + MLP(x))`, and cross-attention to a memory between.

    The residual keeps its dtype. With `reads` `[Q]`, only these packed rows are queries: returns `[Q, width]`.
    """
    if reads is None:
        context = self_attention(parts, x, attend, settings)
    else:
        query, *rest = parts.projections
        k, v = project("kv", rest, x, parts.heads, settings)
        x = x.index_select(0, reads)
        (q,) = project("query", [query], x, parts.heads, settings)
        context = attend(q, k, v, parts.attention_p, settings)
    x = proj_residual_norm(
        context, parts.proj, x, parts.norms[0], settings, dropout_p=parts.branch_p[0], wide=True
    )[0]
    if memory is not None and cross is not None:
        x = _cross_attention(cross, x, memory, settings)
    second = parts.norms[1]
    plain = (
        parts.hidden is None
        and not parts.hidden_p
        and parts.inner_norms[1] is None
        and not parts.branch_p[1]
    )
    if plain and _is_layer_norm(second):
        rounded = settings.rounded_mlp(x, parts.inner[0], parts.fc2, second)
        if rounded is not None:
            return rounded
    hidden = hidden_layer(parts, x, settings)
    return proj_residual_norm(
        hidden, parts.fc2, x, second, settings, dropout_p=parts.branch_p[1], wide=True
    )[0]


def _cross_attention(cross: Cross, x: Tensor, memory: Memory, settings: Settings) -> Tensor:
    query, *rest = cross.projections
    states = memory.states
    k, v = (
        states.unbind(-3)
        if memory.projected
        else project("kv", rest, states, cross.heads, settings)
    )
    (q,) = project("query", [query], x, cross.heads, settings)
    # One memory for the whole padded batch: all queries form one sequence.
    queries = q.flatten(0, 1)[None] if memory.shared else q
    context = memory.attend(queries, k, v, cross.attention_p, settings).view(*q.shape[:-2], -1)
    return proj_residual_norm(
        context, cross.proj, x, cross.norm, settings, dropout_p=cross.branch_p, wide=True
    )[0]


def norm_behind(parts: Parts, x: Tensor, attend: Attend, settings: Settings) -> Tensor:
    """`x += s₁·N₁(Attn(x)); x += s₂·N₂(MLP(x))`: each branch is normalised before the sum (Swin V2)."""
    x = settings.operand(x)
    for number, end in enumerate((parts.proj, parts.fc2)):
        out = (
            hidden_layer(parts, x, settings)
            if number
            else self_attention(parts, x, attend, settings)
        )
        out = _dropout(apply_linear(end, out, settings), parts.branch_p[number])
        rows = parts.row_scales[number](x) if parts.row_scales else None
        x = _add_branch(
            x, apply_norm(parts.norms[number], out, settings), parts.gammas[number], rows
        )
    return x


def self_attention(parts: Parts, x: Tensor, attend: Attend, settings: Settings) -> Tensor:
    """Projections and attention of `[..., width]`, before proj."""
    windows = getattr(attend, "windows", None)
    x = x if windows is None else windows.split(x)
    if not parts.projections:
        made = [settings.linear(x, weight, bias) for weight, bias in parts.qkv]
    elif parts.joins or len(parts.projections) == 1:
        made = settings.products("qkv", x, *parts.projections, bias=parts.qkv_bias)
    else:
        made = [apply_linear(layer, x, settings) for layer in parts.projections]
    if len(made) == 1:
        q, k, v = made[0].unflatten(-1, (3, parts.heads, -1)).unbind(-3)
    else:
        q, k, v = (each.unflatten(-1, (parts.heads, -1)) for each in made)
    if parts.adapt is not None:
        q, k = (t.to(v.dtype) for t in parts.adapt(q, k))
    context = attend(q, k, v, parts.attention_p, settings)
    # Merge windows before proj, which skips the padding and fuses the residual.
    context = context if windows is None else windows.merge(context)
    return context if parts.inner_norms[0] is None else run_module(parts.inner_norms[0], context)


def project(
    name: str, layers: Sequence[nn.Module], x: Tensor, heads: int, settings: Settings
) -> tuple[Tensor, ...]:
    """Outputs `[..., H, D]` of linear layers on one input, with one GEMM; `name` is the cache key of their weights."""
    return tuple(made.unflatten(-1, (heads, -1)) for made in settings.products(name, x, *layers))


def hidden_layer(parts: Parts, x: Tensor, settings: Settings) -> Tensor:
    """The hidden layer of the MLP, as input of fc2."""
    if parts.hidden is not None:
        hidden = parts.hidden(x, lambda layer, value: apply_linear(layer, value, settings))
    else:
        hidden = settings.activated(x, parts.inner[0], F.gelu)
    hidden = _dropout(hidden, parts.hidden_p)
    return hidden if parts.inner_norms[1] is None else run_module(parts.inner_norms[1], hidden)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (arXiv 2104.09864) to `[..., N, H, D]` or `[T, H, D]`, pairing the halves of a head.

    `cos` and `sin` are `[..., N, D]` or `[T, D]`; the halves of the last dimension are equal.
    """
    dtype = x.dtype
    wide = torch.promote_types(torch.promote_types(dtype, cos.dtype), torch.float32)
    x, cos, sin = x.to(wide), cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((-second, first), -1), sin).to(dtype)


def apply_norm(norm: nn.Module, x: Tensor, settings: Settings) -> Tensor:
    """A norm, fused if it is a LayerNorm, otherwise called."""
    if isinstance(norm, nn.Identity):
        return x
    if not _is_layer_norm(norm):
        return run_module(norm, x)
    return ops.layer_norm(x, *_scale_and_shift(norm, settings), backend=settings.backend)


def apply_linear(layer: Any, x: Tensor, settings: Settings) -> Tensor:
    """A linear layer with its adapters, in the compute dtype."""
    return settings.products("", x, layer)[0]


def run_module(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a module in its own dtype."""
    dtype = next((p.dtype for p in layer.parameters()), x.dtype)
    return layer(x.to(dtype)).to(x.dtype)


@contextmanager
def branch_types(settings: Settings, device: torch.device) -> Iterator[Settings]:
    """Settings inside a pre-norm block: in training autocast converts, so that residual and gradients stay wide."""
    if settings.dtype not in (torch.bfloat16, torch.float16) or not torch.is_grad_enabled():
        with settings.own_types(device):
            yield settings
    else:
        with torch.autocast(device.type, settings.dtype):
            yield replace(settings, dtype=None)


def proj_residual_norm(
    x: Tensor,
    layer: nn.Module,
    residual: Tensor,
    norm: nn.Module,
    settings: Settings,
    *,
    wide: bool = False,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """End of a branch and the next norm: (normed, summed). `wide` (post-norm) keeps a wider residual's dtype."""
    x = settings.operand(x)
    affine = settings.affine_of(layer, x, residual)
    rest["backend"] = settings.backend
    if not _is_layer_norm(norm):
        summed = linear_residual(x, layer, residual, settings, **rest)
        return run_module(norm, summed), summed
    wide_norm = wide and residual.dtype != x.dtype
    scale: Any = (
        (norm.weight, _shift(norm), norm.eps) if wide_norm else _scale_and_shift(norm, settings)
    )
    if affine is None:
        return ops.add_layer_norm(
            apply_linear(layer, x, settings), residual, *scale, wide=wide, **rest
        )
    return ops.linear_add_layer_norm(x, *affine, residual, *scale, wide=wide, **rest)


def linear_residual(
    x: Tensor, layer: Any, residual: Tensor, settings: Settings, **rest: Any
) -> Tensor:
    """`residual + row_scale · gamma · dropout(layer(x))`."""
    affine = settings.affine_of(layer, x, residual)
    if affine is not None:
        return ops.linear_residual(x, *affine, residual, **rest)
    out = _dropout(apply_linear(layer, x, settings), rest.get("dropout_p", 0.0))
    return _add_branch(residual, out, rest.get("gamma"), rest.get("row_scale"))


def _add_branch(x: Tensor, branch: Tensor, gamma: Tensor | None, rows: Tensor | None) -> Tensor:
    branch = branch if gamma is None else branch * gamma
    return x + (branch if rows is None else branch * rows.view(-1, *[1] * (x.ndim - 1)))


def _dropout(x: Tensor, probability: float) -> Tensor:
    return F.dropout(x, probability) if probability else x


def _is_layer_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None


def _scale_and_shift(norm: Any, settings: Settings) -> tuple[Any, Any, float]:
    return settings.parameter(norm.weight), settings.parameter(_shift(norm)), norm.eps


def _shift(norm: Any) -> Tensor:
    """The bias of a LayerNorm, or zeros."""
    weight, bias = norm.weight, norm.bias
    return cached("zeros", (weight,), lambda: torch.zeros_like(weight)) if bias is None else bias
