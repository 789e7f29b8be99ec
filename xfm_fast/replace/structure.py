"""Layers by their modules, through `kernels.ops`: with gradients, on every device.

Tokens are padded `[B, N, width]` or packed `[T, width]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import ops
from xfm_fast.kernels.caching import cached
from xfm_fast.models.vision import qkv_bias
from xfm_fast.plans.orders import ATTENTION, MLP, LayerModules, Rotary
from xfm_fast.plans.slots import pack_of
from xfm_fast.replace.attention import Attend, Memory
from xfm_fast.replace.swap import Settings


class CrossAttention(NamedTuple):
    """The modules of a layer's cross-attention."""

    projections: tuple[nn.Module, nn.Module, nn.Module]
    heads: int
    proj: nn.Module
    norm: nn.Module
    attention_p: float = 0.0
    branch_p: float = 0.0


def norm_behind(layer: LayerCall, x: Tensor) -> Tensor:
    """Compute `x += N₁(Attn(x)); x += N₂(MLP(x))`: a norm precedes every sum (Swin V2)."""
    x = layer.operand(x)
    x = layer.add_normed(ATTENTION, layer.attention(x), x)
    return layer.add_normed(MLP, layer.hidden(x), x)


@dataclass(slots=True)
class LayerCall:
    """Executor of the general path: any device, gradients, dropout, adapters and autocast."""

    modules: LayerModules
    attend: Attend
    settings: Settings
    wide: bool = False  # keep the dtype of a wider residual (post-norm)
    rotary: Rotary | None = None
    rows: Tensor | None = None  # packed rows `[Q]` that are queries; None for all

    def operand(self, x: Tensor) -> Tensor:
        return self.settings.operand(x)

    def norm(self, branch: int, x: Tensor) -> Tensor:
        return apply_norm(self.modules.norms[branch], x, self.settings)

    def attention(self, x: Tensor) -> Tensor:
        modules = self.modules
        windows = getattr(self.attend, "windows", None)
        if windows is not None:
            x = windows.split(x)
        q, k, v = self._queries_keys_values(x)
        if self.rotary is not None:
            q, k = (apply_rotary(t, self.rotary).to(v.dtype) for t in (q, k))
        context = self.attend(q, k, v, modules.attention_p, self.settings)
        if windows is not None:
            # Merge windows before proj, which skips the padding and fuses the residual.
            context = windows.merge(context)
        norm = modules.inner_norms[ATTENTION]
        return context if norm is None else run_module(norm, context)

    def _queries_keys_values(self, x: Tensor) -> Sequence[Tensor]:
        """Project x to q, k and v `[..., H, D]`; with `rows`, only these have queries."""
        modules, settings, heads = self.modules, self.settings, self.modules.heads
        if self.rows is not None and pack_of(modules.projections) is None:
            query, *key_value = modules.projections
            k, v = project("kv", key_value, x, heads, settings)
            (q,) = project("query", [query], x.index_select(0, self.rows), heads, settings)
            return q, k, v
        if modules.qkv is not None:
            outputs = [settings.linear(x, *modules.qkv)]
        elif modules.joins or len(modules.projections) == 1:
            bias = None if modules.qkv_biases is None else qkv_bias(*modules.qkv_biases)
            outputs = settings.linears("qkv", x, *modules.projections, bias=bias)
        else:
            outputs = [apply_linear(layer, x, settings) for layer in modules.projections]
        if len(outputs) == 1:
            return outputs[0].unflatten(-1, (3, heads, -1)).unbind(-3)
        outputs = [output.unflatten(-1, (heads, -1)) for output in outputs]
        if self.rows is not None:
            outputs[0] = outputs[0].index_select(0, self.rows)
        return outputs

    def add_attention(self, context: Tensor, residual: Tensor, norm: int) -> tuple[Tensor, Tensor]:
        return linear_add_norm(
            context,
            self.modules.proj,
            residual,
            self.modules.norms[norm],
            self.settings,
            wide=self.wide,
            **self._branch(ATTENTION, residual),
        )

    def add_mlp(self, x: Tensor, residual: Tensor) -> Tensor:
        modules, settings = self.modules, self.settings
        branch = self._branch(MLP, residual)
        branch["backend"] = settings.backend
        if self._has_plain_mlp():
            fc1 = settings.affine_of(modules.inner[0], x, residual)
            fc2 = settings.affine_of(modules.fc2, x, residual)
            if fc1 is not None and fc2 is not None:
                return ops.mlp_residual(x, *fc1, *fc2, residual, **branch)
        return linear_residual(self.hidden(x), modules.fc2, residual, settings, **branch)

    def add_mlp_norm(self, x: Tensor) -> Tensor:
        modules, settings, norm = self.modules, self.settings, self.modules.norms[MLP]
        if self._has_plain_mlp() and not modules.branch_p[MLP] and _is_layer_norm(norm):
            normed = settings.int8_mlp_norm(x, modules.inner[0], modules.fc2, norm)
            if normed is not None:
                return normed
        branch = self._branch(MLP, x)
        normed, _ = linear_add_norm(
            self.hidden(x), modules.fc2, x, norm, settings, wide=self.wide, **branch
        )
        return normed

    def add_normed(self, branch: int, x: Tensor, residual: Tensor) -> Tensor:
        """Compute `residual + norm(linear(x))` with the last linear layer of a branch."""
        modules = self.modules
        linear = modules.fc2 if branch == MLP else modules.proj
        out = _dropout(apply_linear(linear, x, self.settings), modules.branch_p[branch])
        row_scale = modules.row_scales[branch](residual) if modules.row_scales else None
        return _add_branch(residual, self.norm(branch, out), modules.gammas[branch], row_scale)

    def hidden(self, x: Tensor) -> Tensor:
        """Compute the hidden layer of the MLP, the input of `fc2`."""
        modules, settings = self.modules, self.settings
        if modules.hidden is not None:
            hidden = modules.hidden(x, lambda layer, value: apply_linear(layer, value, settings))
        else:
            hidden = settings.activated(x, modules.inner[0], F.gelu)
        hidden = _dropout(hidden, modules.hidden_p)
        norm = modules.inner_norms[MLP]
        return hidden if norm is None else run_module(norm, hidden)

    def cross_attention(self, cross: CrossAttention, memory: Memory, x: Tensor) -> Tensor:
        """Compute `norm(x + cross-attention of x to a memory)`."""
        settings, (query, *key_value) = self.settings, cross.projections
        if memory.projected:
            k, v = memory.states.unbind(-3)
        else:
            k, v = project("kv", key_value, memory.states, cross.heads, settings)
        (q,) = project("query", [query], x, cross.heads, settings)
        # One memory for the whole padded batch: all queries form one sequence.
        queries = q.flatten(0, 1)[None] if memory.shared else q
        context = memory.attend(queries, k, v, cross.attention_p, settings).view(*q.shape[:-2], -1)
        normed, _ = linear_add_norm(
            context, cross.proj, x, cross.norm, settings, wide=True, dropout_p=cross.branch_p
        )
        return normed

    def _has_plain_mlp(self) -> bool:
        modules = self.modules
        return modules.hidden is None and not modules.hidden_p and modules.inner_norms[MLP] is None

    def _branch(self, branch: int, x: Tensor) -> dict[str, Any]:
        """Return the LayerScale, stochastic depth and dropout at the end of a branch."""
        modules = self.modules
        return {
            "gamma": self.settings.parameter(modules.gammas[branch]),
            "row_scale": modules.row_scales[branch](x) if modules.row_scales else None,
            "dropout_p": modules.branch_p[branch],
        }


def project(
    name: str, layers: Sequence[nn.Module], x: Tensor, heads: int, settings: Settings
) -> list[Tensor]:
    """Apply linear layers to one input: `[..., H, D]` each; `name` is the weights' cache key."""
    return [output.unflatten(-1, (heads, -1)) for output in settings.linears(name, x, *layers)]


def apply_rotary(x: Tensor, rotary: Rotary, *, stacked: bool = False) -> Tensor:
    """Apply rotary positions to q or k `[..., N, H, D]`, or to both stacked as `[..., N, 2, H, D]`.

    Prefix tokens without a position are unchanged.
    """
    cos, sin = rotary
    axis = x.ndim - (4 if stacked else 3)
    prefix = x.shape[axis] - cos.shape[-2]
    if stacked:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if not prefix:
        return rotate(x, cos, sin)
    first, positioned = x.split((prefix, x.shape[axis] - prefix), axis)
    return torch.cat((first, rotate(positioned, cos, sin)), axis)


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
    """Apply a norm by our kernel if it is a LayerNorm; call it otherwise."""
    if isinstance(norm, nn.Identity):
        return x
    if not _is_layer_norm(norm):
        return run_module(norm, x)
    return ops.layer_norm(x, *_scale_and_shift(norm, settings), backend=settings.backend)


def apply_linear(layer: Any, x: Tensor, settings: Settings) -> Tensor:
    """Apply a linear layer with its adapters, in the compute dtype."""
    return settings.linears("", x, layer)[0]


def run_module(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a module in the dtype of its parameters."""
    dtype = next((p.dtype for p in layer.parameters()), x.dtype)
    return layer(x.to(dtype)).to(x.dtype)


@contextmanager
def pre_norm_settings(settings: Settings, device: torch.device) -> Iterator[Settings]:
    """Yield the settings of a pre-norm block: in training, autocast keeps the residual wide."""
    if settings.dtype not in (torch.bfloat16, torch.float16) or not torch.is_grad_enabled():
        with settings.without_autocast(device):
            yield settings
    else:
        with torch.autocast(device.type, settings.dtype):
            yield replace(settings, dtype=None)


def linear_add_norm(
    x: Tensor,
    layer: nn.Module,
    residual: Tensor,
    norm: nn.Module,
    settings: Settings,
    *,
    wide: bool,
    **branch: Any,
) -> tuple[Tensor, Tensor]:
    """Compute `summed = residual + layer(x)`; returns (norm of the sum, sum).

    Args:
        wide: Keep the dtype of a wider residual (post-norm).
        branch: `gamma`, `row_scale` and `dropout_p` of the branch.
    """
    x = settings.operand(x)
    affine = settings.affine_of(layer, x, residual)
    branch["backend"] = settings.backend
    if not _is_layer_norm(norm):
        summed = linear_residual(x, layer, residual, settings, **branch)
        return run_module(norm, summed), summed
    scale: Any = _scale_and_shift(norm, settings)
    if wide and residual.dtype != x.dtype:
        scale = (norm.weight, _shift(norm), norm.eps)
    if affine is None:
        out = apply_linear(layer, x, settings)
        return ops.add_layer_norm(out, residual, *scale, wide=wide, **branch)
    return ops.linear_add_layer_norm(x, *affine, residual, *scale, wide=wide, **branch)


def linear_residual(
    x: Tensor, layer: Any, residual: Tensor, settings: Settings, **branch: Any
) -> Tensor:
    """Compute `residual + row_scale · gamma · dropout(layer(x))`."""
    affine = settings.affine_of(layer, x, residual)
    if affine is not None:
        return ops.linear_residual(x, *affine, residual, **branch)
    out = _dropout(apply_linear(layer, x, settings), branch.get("dropout_p", 0.0))
    return _add_branch(residual, out, branch.get("gamma"), branch.get("row_scale"))


def _add_branch(
    x: Tensor, branch: Tensor, gamma: Tensor | None, row_scale: Tensor | None
) -> Tensor:
    if gamma is not None:
        branch = branch * gamma
    if row_scale is not None:
        branch = branch * row_scale.view(-1, *[1] * (x.ndim - 1))
    return x + branch


def _dropout(x: Tensor, probability: float) -> Tensor:
    return F.dropout(x, probability) if probability else x


def _is_layer_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None


def _scale_and_shift(norm: Any, settings: Settings) -> tuple[Any, Any, float]:
    return settings.parameter(norm.weight), settings.parameter(_shift(norm)), norm.eps


def _shift(norm: Any) -> Tensor:
    """Return the bias of a LayerNorm, or zeros."""
    weight, bias = norm.weight, norm.bias
    return cached("zeros", (weight,), lambda: torch.zeros_like(weight)) if bias is None else bias
