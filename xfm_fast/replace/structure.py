"""The parts that every transformer layer has, and the two orders in which layers compute with them.

Whatever a library calls them, a layer has projections to queries, keys and values, an attention, a projection behind
it, an MLP with or without a gate, two norms and two sums. `Parts` names them once; `pre_norm` and `post_norm` are the
fused computations, on padded `[B, N, width]` and on packed `[T, width]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import ops
from xfm_fast.kernels.derived import derived
from xfm_fast.replace.packed_weight import pack_of
from xfm_fast.replace.swap import Settings

# Attention of q, k, v `[..., H, D]` with a dropout probability: `[..., H·D]`.
Attend = Callable[[Tensor, Tensor, Tensor, float, Settings], Tensor]


class Parts(NamedTuple):
    """The parts that a block computes with, as they are at the moment of a call.

    Attributes:
        norms: of the attention and of the MLP, before or behind them.
        qkv: weight and bias of one projection to queries, keys and values, or of three.
        heads, scale: of the attention.
        proj: the linear layer behind the attention.
        hidden: the hidden layer of the MLP from its input and a function that applies a linear layer, where it is not
            `gelu(fc1(x))`.
        fc1, fc2: the linear layers of the MLP; fc1 where hidden is None.
        inner: the linear layers that hidden applies, where it is told them.
        activation: looks the activation of the hidden layer up, in a layer.
        gammas: LayerScale of each branch.
        row_scales: draw the stochastic depth of each branch, for a tensor `[B, …]`: `[B]`, or None for none.
        attention_p, hidden_p: dropout of the attention weights and of the hidden layer.
        branch_p: dropout at the end of each branch.
        adapt: what happens to queries and keys `[..., H, D]` (norms, rotation), if anything.
        inner_norms: before proj and before fc2; called, whatever they are.
        windows: cuts an image up before the attention and puts it together behind it.
        projections: the layers of qkv, where they may carry adapters or packed weights; qkv is not read then.
        qkv_bias: of the only one of the projections, where it is kept beside the layer.
        joins: one product for all of them.
    """

    norms: tuple[nn.Module, nn.Module]
    heads: int
    scale: float
    proj: nn.Module
    fc2: nn.Module
    qkv: tuple[tuple[Tensor, Tensor | None], ...] = ()
    fc1: nn.Module | None = None
    inner: tuple[nn.Module, ...] = ()
    activation: Callable[[nn.Module], Any] | None = None
    hidden: Callable[[Tensor, Callable[[Any, Tensor], Tensor]], Tensor] | None = None
    gammas: tuple[Tensor | None, Tensor | None] = (None, None)
    row_scales: tuple[Callable[[Tensor], Tensor | None], ...] = ()
    attention_p: float = 0.0
    hidden_p: float = 0.0
    branch_p: tuple[float, float] = (0.0, 0.0)
    adapt: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    inner_norms: tuple[nn.Module | None, nn.Module | None] = (None, None)
    windows: Any = None
    projections: tuple[nn.Module, ...] = ()
    qkv_bias: Tensor | None = None
    joins: bool = True


Order = Callable[[Parts, Tensor, Attend, Settings], Tensor]


def pre_norm(parts: Parts, x: Tensor, attend: Attend, settings: Settings) -> Tensor:
    """`x += s₁·γ₁·Attn(N₁(x)); x += s₂·γ₂·MLP(N₂(x))`: residual, LayerScale, stochastic depth and norm in one pass."""
    first, second = parts.norms
    x = settings.operand(x)
    context = attended(parts, normalised(first, x, settings), attend, settings)
    normed, x = _ended(
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
        assert parts.fc1 is not None
        fc1, fc2 = _affine(parts.fc1, settings), _affine(parts.fc2, settings)
        if fc1 is not None and fc2 is not None:
            return ops.mlp_residual(normed, *fc1, *fc2, x, **branch)
    return _summed(hidden_layer(parts, normed, settings), parts.fc2, x, settings, **branch)


def post_norm(parts: Parts, x: Tensor, attend: Attend, settings: Settings) -> Tensor:
    """`x = N₁(x + Attn(x)); x = N₂(x + MLP(x))`. The residual stays as wide as it comes in."""
    first, second = parts.norms
    context = attended(parts, x, attend, settings)
    x = _ended(context, parts.proj, x, first, settings, dropout_p=parts.branch_p[0], wide=True)[0]
    plain = parts.hidden is None and not parts.hidden_p and parts.inner_norms[1] is None and not parts.branch_p[1]
    if plain and _is_layer_norm(second) and parts.fc1 is not None:
        rounded = settings.rounded_mlp(x, parts.fc1, F.gelu, parts.fc2, second)
        if rounded is not None:
            return rounded
    hidden = hidden_layer(parts, x, settings)
    return _ended(hidden, parts.fc2, x, second, settings, dropout_p=parts.branch_p[1], wide=True)[0]


def norm_behind(parts: Parts, x: Tensor, attend: Attend, settings: Settings) -> Tensor:
    """`x += s₁·N₁(Attn(x)); x += s₂·N₂(MLP(x))`: each branch is normalised before it is added (Swin V2)."""
    x = settings.operand(x)
    out = applied(parts.proj, attended(parts, x, attend, settings), settings)
    x = _added(x, normalised(parts.norms[0], _dropped(out, parts.branch_p[0]), settings), parts, 0)
    out = applied(parts.fc2, hidden_layer(parts, x, settings), settings)
    return _added(x, normalised(parts.norms[1], _dropped(out, parts.branch_p[1]), settings), parts, 1)


def attended(parts: Parts, x: Tensor, attend: Attend, settings: Settings) -> Tensor:
    """Projections and attention of `[..., width]`, before the projection behind it."""
    q, k, v = projected(parts, x if parts.windows is None else parts.windows.split(x), settings)
    context = attend(q, k, v, parts.attention_p, settings)
    # Put together before the projection behind it, which spares that the filling and lets it add the residual.
    context = context if parts.windows is None else parts.windows.merge(context)
    return context if parts.inner_norms[0] is None else called(parts.inner_norms[0], context)


def projected(parts: Parts, x: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[..., H, D]`."""
    if not parts.projections:
        made = [settings.linear(x, weight, bias) for weight, bias in parts.qkv]
    elif parts.joins:
        made = settings.products("qkv", x, *parts.projections, bias=parts.qkv_bias)
    else:
        made = [applied(layer, x, settings) for layer in parts.projections]
    if len(made) == 1:
        q, k, v = made[0].unflatten(-1, (3, parts.heads, -1)).unbind(-3)
    else:
        q, k, v = (each.unflatten(-1, (parts.heads, -1)) for each in made)
    if parts.adapt is not None:
        q, k = (t.to(v.dtype) for t in parts.adapt(q, k))
    return q, k, v


def hidden_layer(parts: Parts, x: Tensor, settings: Settings) -> Tensor:
    """The hidden layer of the MLP, as the last product takes it."""
    if parts.hidden is not None:
        hidden = parts.hidden(x, lambda layer, value: applied(layer, value, settings))
    else:
        hidden = settings.activated(x, parts.fc1, F.gelu)
    hidden = _dropped(hidden, parts.hidden_p)
    return hidden if parts.inner_norms[1] is None else called(parts.inner_norms[1], hidden)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) of `[..., N, H, D]` or `[T, H, D]`, halves of a head paired.

    Args:
        cos, sin: `[..., N, D]` or `[T, D]`; in the last dimension one half repeats the other.
    """
    dtype = x.dtype
    wide = torch.promote_types(torch.promote_types(dtype, cos.dtype), torch.float32)
    x, cos, sin = x.to(wide), cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((-second, first), -1), sin).to(dtype)


def normalised(norm: nn.Module, x: Tensor, settings: Settings) -> Tensor:
    """A norm, fused where it is LayerNorm; any other is called."""
    if isinstance(norm, nn.Identity):
        return x
    if not _is_layer_norm(norm):
        return called(norm, x)
    return ops.layer_norm(x, *_scale_and_shift(norm, settings), backend=settings.backend)


def applied(layer: Any, x: Tensor, settings: Settings) -> Tensor:
    """A linear layer in the type that is computed in, its adapters included."""
    return settings.products("", x, layer)[0]


def called(layer: nn.Module, x: Tensor) -> Tensor:
    """A part that runs as it is, in the type that it is stored in."""
    dtype = next((p.dtype for p in layer.parameters()), x.dtype)
    return layer(x.to(dtype)).to(x.dtype)


@contextmanager
def branch_types(settings: Settings, device: torch.device) -> Iterator[Settings]:
    """The settings of a pre-norm block's inside.

    In training, autocast converts: so the sum of all branches stays as wide as the model, and parameters get their
    gradients in their own types.
    """
    if settings.dtype not in (torch.bfloat16, torch.float16) or not torch.is_grad_enabled():
        with settings.own_types(device):
            yield settings
    else:
        with torch.autocast(device.type, settings.dtype):
            yield replace(settings, dtype=None)


def _ended(
    x: Tensor,
    layer: nn.Module,
    residual: Tensor,
    norm: nn.Module,
    settings: Settings,
    *,
    wide: bool = False,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """The end of a branch and the norm behind it: (normed, summed).

    Args:
        wide: post-norm; the norm keeps the type of its parameters, since its result is the next residual.
    """
    x, affine = settings.operand(x), _affine(layer, settings)
    rest["backend"] = settings.backend
    if not _is_layer_norm(norm):
        summed = _summed(x, layer, residual, settings, **rest)
        return called(norm, summed), summed
    scale: Any = (norm.weight, _shift(norm), norm.eps) if wide else _scale_and_shift(norm, settings)
    if affine is None:
        if pack_of((layer,)) is not None:
            summed = _summed(x, layer, residual, settings, **rest)
            return ops.layer_norm(summed, *scale, backend=settings.backend), summed
        return ops.add_layer_norm(applied(layer, x, settings), residual, *scale, wide=wide, **rest)
    return ops.linear_add_layer_norm(x, *affine, residual, *scale, wide=wide, **rest)


def _summed(x: Tensor, layer: Any, residual: Tensor, settings: Settings, **rest: Any) -> Tensor:
    """`residual + row_scale · gamma · dropout(layer(x))`."""
    affine = _affine(layer, settings)
    if affine is not None:
        return ops.linear_residual(x, *affine, residual, **rest)
    dropout_p, rows, gamma = rest.get("dropout_p", 0.0), rest.get("row_scale"), rest.get("gamma")
    packed = pack_of((layer,))
    if packed is not None and gamma is None and rows is None and not dropout_p:
        return packed.residual(settings.operand(x), layer.bias, residual)
    out = _dropped(applied(layer, x, settings), dropout_p)
    out = out if gamma is None else out * gamma
    return residual + (out if rows is None else out * rows.view(-1, *[1] * (out.ndim - 1)))


def _added(x: Tensor, branch: Tensor, parts: Parts, number: int) -> Tensor:
    rows = parts.row_scales[number](x) if parts.row_scales else None
    gamma = parts.gammas[number]
    branch = branch if gamma is None else branch * gamma
    return x + (branch if rows is None else branch * rows.view(-1, *[1] * (x.ndim - 1)))


def _dropped(x: Tensor, probability: float) -> Tensor:
    return F.dropout(x, probability) if probability else x


def _is_layer_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None


def _scale_and_shift(norm: Any, settings: Settings) -> tuple[Any, Any, float]:
    return settings.parameter(norm.weight), settings.parameter(_shift(norm)), norm.eps


def _shift(norm: Any) -> Tensor:
    """The bias of a LayerNorm; zeros where it has none."""
    return _zeros(norm.weight, norm.weight.shape[0]) if norm.bias is None else norm.bias


def _zeros(like: Tensor, count: int) -> Tensor:
    return derived(f"zeros {count}", (like,), lambda: like.new_zeros(count))


def _affine(layer: Any, settings: Settings) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer; None where the product has to come first, as of adapters in training."""
    return None if pack_of((layer,)) is not None else settings.affine_of(layer)
