"""Cached execution plans for layers on CPU inference.

For a short text, looking up parts and checking operands takes as long as the GEMMs. A plan does this once. It reads
parameters in place and is valid while each keeps its memory, and nothing draws; what it has to copy, in another dtype
or in int8, is watched by `caching.Sources`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from xfm_fast.kernels import fp8
from xfm_fast.kernels.backend import resolve
from xfm_fast.kernels.caching import Sources
from xfm_fast.kernels.cpu import gemm as cpu
from xfm_fast.kernels.cpu import int8
from xfm_fast.kernels.flags import kind_of
from xfm_fast.models.frozen import pack_of
from xfm_fast.replace.attention import Attend
from xfm_fast.replace.structure import Parts
from xfm_fast.replace.swap import Settings, links, side_by_side

_DTYPES = (torch.float32, torch.bfloat16)
# A plan must not refer to its layer, which would keep both alive.
_plans: weakref.WeakKeyDictionary[nn.Module, CachedPlan] = weakref.WeakKeyDictionary()


class _Linear(NamedTuple):
    """A linear layer with a dense, packed or int8 weight; int8 takes x in either dtype and has LayerScale folded in."""

    weight: Tensor
    bias: Tensor | None
    rounded: int8.Prepared | None
    dtype: torch.dtype

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """`x Wᵀ + b`, or its GELU."""
        if self.rounded is None:
            return (cpu.linear_gelu if gelu else cpu.linear)(x, self.weight, self.bias)
        if x.ndim == 2:
            return self.rounded(x, gelu=gelu, dtype=self.dtype)
        return self.rounded(x.flatten(0, -2), gelu=gelu, dtype=self.dtype).view(*x.shape[:-1], -1)

    def add_to(self, residual: Tensor, x: Tensor, gamma: Tensor | None = None) -> Tensor:
        """`residual + gamma · (x Wᵀ + b)`."""
        if self.rounded is None:
            return cpu.linear_residual(x, self.weight, self.bias, residual, gamma)
        if x.ndim == 2:
            return self.rounded(x, residual)
        return self.rounded(x.flatten(0, -2), residual.flatten(0, -2)).view(residual.shape)


class CachedPlan:
    """The operands of one layer; `wide` (post-norm) keeps the dtype of the residual."""

    def __init__(self, layer: nn.Module, parts: Parts, dtype: torch.dtype, *, wide: bool) -> None:
        self.dtype, self.wide, self.parts = dtype, wide, parts
        self._links = links(layer)
        self._activation = None if parts.activation is None else parts.activation(layer)
        self._approximate = getattr(self._activation, "approximate", None)
        needed = {id(value) for value in _weights(parts)}
        self._sources = [
            (part._parameters, name, value, kind_of(value))
            for part in layer.modules()
            for name, value in part._parameters.items()
            if value is not None and id(value) in needed
        ]
        # A bias may be added later.
        self._absent = [
            (part._parameters, name)
            for part in layer.modules()
            for name, value in part._parameters.items()
            if value is None
        ]
        self._others = [part.__dict__ for part in layer.modules() if part is not layer]
        groups = _groups(parts)
        self.rounded = tuple(value for _, _, value, kind in self._sources if kind == "int8")
        # Of weights that are copied anyway, one product takes less time than three.
        joins = len(groups[0]) > 1 and (pack_of(groups[0]) is not None or self._converts(groups[0]))
        joined = {id(value) for value in _parameters(groups[0])} if joins else set()
        self._copied = [
            v for _, _, v, _ in self._sources if self.rounded or v.dtype != dtype or id(v) in joined
        ]
        self._seen, copied = Sources(self._copied), set(map(id, self._copied))
        self._read = [
            (v, v.data_ptr(), v.stride()) for _, _, v, _ in self._sources if id(v) not in copied
        ]
        ends = {
            id(end): gamma for end, gamma in zip((parts.proj, parts.fc2), parts.gammas, strict=True)
        }
        self._linears = {
            id(part): self._linear([part], ends.get(id(part)))
            for part in (parts.proj, parts.fc2, *parts.inner)
        }
        self._qkv = [
            self._linear(group)
            for group in (groups if joins else ((part,) for part in parts.projections))
        ]
        self._proj, self._fc2 = self._linears[id(parts.proj)], self._linears[id(parts.fc2)]
        self._fc1 = None if parts.hidden is not None else self._linears[id(parts.inner[0])]
        mlp = [layer is not None and layer.rounded is not None for layer in (self._fc1, self._fc2)]
        self._int8_mlp, self._float_mlp = all(mlp), self._fc1 is not None and not any(mlp)
        self._first, self._second = (self._norm(norm) for norm in parts.norms)
        self._shape = (cast(Any, parts.proj).out_features,)
        self._scales = tuple(
            None if gamma is None else gamma.detach().to(dtype) for gamma in parts.gammas
        )

    def is_valid(self, layer: nn.Module) -> bool:
        if self._links is not links(layer):
            return False
        if self.parts.activation is not None:
            activation = self.parts.activation(layer)
            if (
                activation is not self._activation
                or getattr(activation, "approximate", None) != self._approximate
            ):
                return False
        if any(owner[name] is not None for owner, name in self._absent):
            return False
        for owner, name, value, kind in self._sources:
            if owner.get(name) is not value or kind_of(value) is not kind:
                return False
        for value, place, stride in self._read:
            if value.data_ptr() != place or value.stride() != stride:
                return False
        return not _busy(self._others) and self._seen.unchanged(self._copied)

    def run(self, x: Tensor, attend: Attend, settings: Settings, adapt: Any = None) -> Tensor:
        """The layer on `[B, N, width]` or packed `[T, width]`, matching `attend`.

        `adapt` maps q or k `[..., H, D]` with False, or both stacked `[..., 2, H, D]` with True.
        """
        fc1, fc2 = self._fc1, self._fc2
        if self.wide:
            own = x if self._qkv[0].rounded is not None else x.to(self.dtype)
            x = self._normed(
                self._sum(self._attended(own, attend, settings, adapt), self._proj, x), self._first
            )
            if self._int8_mlp:
                return self._normed(_int8_mlp(fc1, fc2, x, x), self._second)
            return self._normed(self._sum(self._hidden(x.to(self.dtype)), fc2, x), self._second)
        x = x.to(self.dtype)
        context = self._attended(self._normed(x, self._first), attend, settings, adapt)
        x = self._proj.add_to(x, context, self._scales[0])
        normed = self._normed(x, self._second)
        if self._int8_mlp:
            return _int8_mlp(fc1, fc2, normed, x)
        if fc1 is not None and self._float_mlp:
            return cpu.mlp_residual(
                normed, fc1.weight, fc1.bias, fc2.weight, fc2.bias, x, self._scales[1]
            )
        return fc2.add_to(x, self._hidden(normed), self._scales[1])

    def _attended(self, x: Tensor, attend: Attend, settings: Settings, adapt: Any) -> Tensor:
        heads = self.parts.heads
        made = [linear(x) for linear in self._qkv]
        if len(made) == 1:
            together = made[0].view(*made[0].shape[:-1], 3, heads, -1)
            q, k, v = together.unbind(-3)
            if adapt is not None:
                q, k = adapt(together.narrow(-3, 0, 2), True).unbind(-3)
        else:
            q, k, v = (each.view(*each.shape[:-1], heads, -1) for each in made)
            if adapt is not None:
                q, k = adapt(q, False), adapt(k, False)
        return attend(q, k, v, 0.0, settings)

    def _sum(self, x: Tensor, linear: _Linear, residual: Tensor) -> Tensor:
        same = residual.dtype == x.dtype or linear.rounded is not None
        return linear.add_to(residual, x) if same else residual + linear(x)

    def _hidden(self, x: Tensor) -> Tensor:
        if self._fc1 is not None:
            return self._fc1(x, gelu=True)
        hidden: Any = self.parts.hidden
        return hidden(x, lambda layer, value: self._linears[id(layer)](value))

    def _normed(self, x: Tensor, norm: tuple[Tensor, Tensor | None, Any] | None) -> Tensor:
        # A number may be set at any time, and leaves no trace.
        return x if norm is None else torch.layer_norm(x, self._shape, *norm[:2], norm[2].eps)

    def _converts(self, layers: Iterable[Any]) -> bool:
        """True if the weight of a layer is converted or rounded."""
        return any(
            layer.weight.dtype != self.dtype or kind_of(layer.weight) is not None
            for layer in layers
        )

    def _linear(self, layers: Sequence[Any], gamma: Tensor | None = None) -> _Linear:
        """The operands of one layer, or of several on the same input."""
        packed = pack_of(layers)
        rounded = packed is None and kind_of(layers[0].weight) == "int8"
        dtype = torch.float32 if rounded else self.dtype
        biases = [None if layer.bias is None else layer.bias.detach().to(dtype) for layer in layers]
        bias = side_by_side(biases, [layer.out_features for layer in layers])
        if packed is not None:
            return _Linear(packed, bias, None, self.dtype)
        weights = [layer.weight if rounded else layer.weight.detach().to(dtype) for layer in layers]
        weight = weights[0] if len(layers) == 1 else torch.cat(weights)
        return _Linear(
            weight, bias, int8.Prepared.of(weight, bias, gamma) if rounded else None, self.dtype
        )

    def _norm(self, norm: Any) -> tuple[Tensor, Tensor | None, Any] | None:
        if isinstance(norm, nn.Identity):
            return None
        dtype, bias = norm.weight.dtype if self.wide else self.dtype, norm.bias
        return (
            norm.weight.detach().to(dtype),
            None if bias is None else bias.detach().to(dtype),
            norm,
        )


def _int8_mlp(first: Any, second: Any, x: Tensor, residual: Tensor) -> Tensor:
    """As one op, which rounds the hidden layer finer."""
    rows, sums = (t if t.ndim == 2 else t.flatten(0, -2) for t in (x, residual))
    return int8.prepared_mlp(first.rounded, second.rounded, rows, sums).view(residual.shape)


def cached_plan(
    layer: nn.Module, make_parts: Callable[[], Parts], x: Tensor, settings: Settings, *, wide: bool
) -> CachedPlan | None:
    """The plan of a layer whose `intact()` was just checked, for input x; None if the general path must run."""
    dtype = settings.dtype or x.dtype
    if layer.training or dtype not in _DTYPES or not infers(x, settings):
        return None
    plan, rows = _plans.get(layer), x.shape[:-1].numel()
    if plan is not None and plan.dtype == dtype and plan.is_valid(layer):
        # Floating point may be faster for this number of rows.
        return plan if not plan.rounded or int8.compiled(rows, dtype, plan.rounded[:1]) else None
    if links(layer) is None or _busy(
        part.__dict__ for part in layer.modules() if part is not layer
    ):
        return None
    parts = make_parts()
    if not _can_plan(layer, parts, dtype, mixed=settings.dtype is not None):
        return None
    rounded = [weight for weight in _weights(parts) if kind_of(weight) == "int8"]
    if rounded and not int8.compiled(rows, dtype, rounded):
        return None
    # The first caller may be in inference mode; the plan must serve all.
    with torch.inference_mode(False), torch.no_grad():
        plan = _plans[layer] = CachedPlan(layer, parts, dtype, wide=wide)
    return plan


def forget(layer: nn.Module) -> None:
    """Drop the plan of a layer."""
    _plans.pop(layer, None)


def infers(x: Tensor, settings: Settings) -> bool:
    """True for plain CPU inference: no gradient, compiler, autocast, fp8 or other backend."""
    if (
        fp8.on()
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    return x.device.type == "cpu" and resolve(settings.backend, x) == "cpu"


def _busy(modules: Iterable[dict[str, Any]]) -> bool:
    """True if a module, given by its `__dict__`, is in training mode or has hooks."""
    return any(
        own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] for own in modules
    )


def _can_plan(layer: nn.Module, parts: Parts, dtype: torch.dtype, *, mixed: bool) -> bool:
    """True if all linear layers are plain, packed or int8, nothing draws, and unless mixed all have one dtype."""
    if not parts.projections or any(norm is not None for norm in parts.inner_norms):
        return False
    if parts.attention_p or parts.hidden_p or any(parts.branch_p) or parts.qkv_bias is not None:
        return False
    for group in (*_groups(parts), *((part,) for part in (parts.proj, parts.fc2, *parts.inner))):
        packed = pack_of(group)
        if packed is not None:
            if packed.dtype != dtype:
                return False
        elif {*map(type, group)} != {nn.Linear} or len(
            {kind_of(cast(Any, part).weight) for part in group}
        ) > 1:
            return False
    if any(
        not isinstance(norm, nn.Identity) and getattr(norm, "weight", None) is None
        for norm in parts.norms
    ):
        return False
    own = {id(parameter) for parameter in layer.parameters()}
    # Inference tensors carry no version, without which no copy can be watched.
    copies = any(p.dtype != dtype or kind_of(p) is not None for p in _weights(parts))
    copies = copies or any(
        len(group) > 1 and pack_of(group) is not None for group in _groups(parts)
    )
    return all(
        p.is_floating_point()
        and p.device.type == "cpu"
        and not (copies and p.is_inference())
        and kind_of(p) != "fp8"
        and id(p) in own
        and (mixed or p.dtype == dtype)
        for p in _weights(parts)
    )


def _groups(parts: Parts) -> list[tuple[nn.Module, ...]]:
    """The projections that share a GEMM."""
    return [parts.projections] if parts.joins else [(part,) for part in parts.projections]


def _parameters(parts: Iterable[nn.Module]) -> list[Tensor]:
    return [value for part in parts for value in part._parameters.values() if value is not None]


def _weights(parts: Parts) -> list[Tensor]:
    """Every tensor that a layer computes with."""
    linears = (*parts.projections, parts.proj, *parts.inner, parts.fc2)
    return _parameters((*linears, *parts.norms)) + [
        gamma for gamma in parts.gammas if gamma is not None
    ]
