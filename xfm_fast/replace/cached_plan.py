"""Plans of layers for CPU inference: operands that are looked up, checked and converted once.

For a short text, these steps take as long as the GEMMs. A plan reads parameters in place and is
valid while each keeps its memory, no module is in training mode, and no hook or adapter was added.
Converted, joined and int8 weights are copies; `caching.Sources` watches the parameters they were
made from.
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
from xfm_fast.replace.structure import (
    ATTENTION,
    MLP,
    LayerModules,
    Rotary,
    apply_rotary,
    post_norm,
    pre_norm,
)
from xfm_fast.replace.swap import Settings, concatenate_biases, links

_DTYPES = (torch.float32, torch.bfloat16)
# A plan must not refer to its layer, which would keep both alive.
_plans: weakref.WeakKeyDictionary[nn.Module, CachedPlan] = weakref.WeakKeyDictionary()


class _Linear(NamedTuple):
    """A linear layer with a dense, packed or int8 weight; LayerScale is folded into int8."""

    weight: Tensor
    bias: Tensor | None
    prepared: int8.Prepared | None
    dtype: torch.dtype

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """Compute `x Wᵀ + b`, or its GELU."""
        if self.prepared is None:
            return (cpu.linear_gelu if gelu else cpu.linear)(x, self.weight, self.bias)
        if x.ndim == 2:
            return self.prepared(x, gelu=gelu, dtype=self.dtype)
        return self.prepared(x.flatten(0, -2), gelu=gelu, dtype=self.dtype).view(*x.shape[:-1], -1)

    def add_to(self, residual: Tensor, x: Tensor, gamma: Tensor | None) -> Tensor:
        """Compute `residual + gamma · (x Wᵀ + b)`."""
        if self.prepared is None:
            if residual.dtype != x.dtype:
                return residual + self(x)  # post-norm, without gamma
            return cpu.linear_residual(x, self.weight, self.bias, residual, gamma)
        if x.ndim == 2:
            return self.prepared(x, residual)
        return self.prepared(x.flatten(0, -2), residual.flatten(0, -2)).view(residual.shape)


class CachedPlan:
    """Operands of one layer in one compute dtype; `wide` (post-norm) keeps the residual's dtype."""

    def __init__(
        self, layer: nn.Module, modules: LayerModules, dtype: torch.dtype, *, wide: bool
    ) -> None:
        self.dtype, self.wide, self.modules = dtype, wide, modules
        self._links = links(layer)
        self._activation = None if modules.activation is None else modules.activation(layer)
        self._approximate = getattr(self._activation, "approximate", None)
        used = {id(value) for value in _tensors_of(modules)}
        self._sources = []
        self._absent = []  # a bias may be added later
        for module in layer.modules():
            for name, value in module._parameters.items():
                if value is None:
                    self._absent.append((module._parameters, name))
                elif id(value) in used:
                    self._sources.append((module._parameters, name, value, kind_of(value)))
        self._descendants = [module.__dict__ for module in layer.modules() if module is not layer]
        parameters = [value for _, _, value, _ in self._sources]
        self.rounded = tuple(value for _, _, value, flag in self._sources if flag == "int8")

        # If weights are copied anyway, one GEMM is faster than three.
        groups = _projection_groups(modules)
        joins = len(groups[0]) > 1 and (pack_of(groups[0]) is not None or self._converts(groups[0]))
        joined = {id(value) for value in _parameters_of(groups[0])} if joins else set()
        self._copied = [
            value
            for value in parameters
            if self.rounded or value.dtype != dtype or id(value) in joined
        ]
        self._copies = Sources(self._copied)
        copied = {id(value) for value in self._copied}
        self._read = [
            (value, value.data_ptr(), value.stride())
            for value in parameters
            if id(value) not in copied
        ]

        gammas = {id(modules.proj): modules.gammas[ATTENTION], id(modules.fc2): modules.gammas[MLP]}
        self._linears = {
            id(linear): self._linear([linear], gammas.get(id(linear)))
            for linear in (modules.proj, modules.fc2, *modules.inner)
        }
        if not joins:
            groups = [(projection,) for projection in modules.projections]
        self._qkv = [self._linear(group) for group in groups]
        self._proj = self._linears[id(modules.proj)]
        self._fc2: Any = self._linears[id(modules.fc2)]
        self._fc1: Any = None if modules.hidden is not None else self._linears[id(modules.inner[0])]
        self._int8_mlp = self._float_mlp = False
        if self._fc1 is not None:
            self._int8_mlp = self._fc1.prepared is not None and self._fc2.prepared is not None
            # In post-norm the residual may be in a wider dtype.
            self._float_mlp = not wide and self._fc1.prepared is None and self._fc2.prepared is None
        self._norms = [self._norm(norm) for norm in modules.norms]
        self._shape = (cast(Any, modules.proj).out_features,)
        self._gammas = [
            None if gamma is None else gamma.detach().to(dtype) for gamma in modules.gammas
        ]

    def is_valid(self, layer: nn.Module) -> bool:
        if self._links is not links(layer):
            return False
        if self.modules.activation is not None:
            activation = self.modules.activation(layer)
            if activation is not self._activation:
                return False
            if getattr(activation, "approximate", None) != self._approximate:
                return False
        if any(parameters[name] is not None for parameters, name in self._absent):
            return False
        for parameters, name, value, flag in self._sources:
            if parameters.get(name) is not value or kind_of(value) is not flag:
                return False
        for value, address, stride in self._read:
            if value.data_ptr() != address or value.stride() != stride:
                return False
        return not _trains_or_has_hooks(self._descendants) and self._copies.unchanged(self._copied)

    def run(
        self, x: Tensor, attend: Attend, settings: Settings, rotary: Rotary | None = None
    ) -> Tensor:
        """Compute the layer on `[B, N, width]` or packed `[T, width]`, as `attend` expects."""
        call = _PlannedCall(self, attend, settings, rotary)
        return post_norm(call, x) if self.wide else pre_norm(call, x)

    def norm(self, branch: int, x: Tensor) -> Tensor:
        norm = self._norms[branch]
        if norm is None:
            return x
        weight, bias, module = norm
        # eps may be set at any time, without a trace.
        return torch.layer_norm(x, self._shape, weight, bias, module.eps)

    def _converts(self, layers: Iterable[Any]) -> bool:
        """Return whether the weight of a layer is converted or rounded."""
        return any(
            layer.weight.dtype != self.dtype or kind_of(layer.weight) is not None
            for layer in layers
        )

    def _linear(self, layers: Sequence[Any], gamma: Tensor | None = None) -> _Linear:
        """Prepare one linear layer, or several on the same input as one."""
        packed = pack_of(layers)
        rounded = packed is None and kind_of(layers[0].weight) == "int8"
        dtype = torch.float32 if rounded else self.dtype
        biases = [None if layer.bias is None else layer.bias.detach().to(dtype) for layer in layers]
        bias = concatenate_biases(biases, [layer.out_features for layer in layers])
        if packed is not None:
            return _Linear(packed, bias, None, self.dtype)
        weights = [layer.weight if rounded else layer.weight.detach().to(dtype) for layer in layers]
        weight = weights[0] if len(layers) == 1 else torch.cat(weights)
        prepared = int8.Prepared.of(weight, bias, gamma) if rounded else None
        return _Linear(weight, bias, prepared, self.dtype)

    def _norm(self, norm: Any) -> tuple[Tensor, Tensor | None, Any] | None:
        if isinstance(norm, nn.Identity):
            return None
        dtype = norm.weight.dtype if self.wide else self.dtype
        bias = None if norm.bias is None else norm.bias.detach().to(dtype)
        return norm.weight.detach().to(dtype), bias, norm


class _PlannedCall(NamedTuple):
    """Executor of a plan (`structure.Executor`)."""

    plan: CachedPlan
    attend: Attend
    settings: Settings
    rotary: Rotary | None

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self.plan.dtype)

    def norm(self, branch: int, x: Tensor) -> Tensor:
        return self.plan.norm(branch, x)

    def attention(self, x: Tensor) -> Tensor:
        linears, heads, rotary = self.plan._qkv, self.plan.modules.heads, self.rotary
        if x.dtype != self.plan.dtype and linears[0].prepared is None:
            x = x.to(self.plan.dtype)
        outputs = [linear(x) for linear in linears]
        if len(outputs) == 1:
            qkv = outputs[0].view(*outputs[0].shape[:-1], 3, heads, -1)
            q, k, v = qkv.unbind(-3)
            if rotary is not None:
                q, k = apply_rotary(qkv.narrow(-3, 0, 2), rotary, stacked=True).unbind(-3)
        else:
            q, k, v = (output.view(*output.shape[:-1], heads, -1) for output in outputs)
            if rotary is not None:
                q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        return self.attend(q, k, v, 0.0, self.settings)

    def add_attention(self, context: Tensor, residual: Tensor, norm: int) -> tuple[Tensor, Tensor]:
        plan = self.plan
        summed = plan._proj.add_to(residual, context, plan._gammas[ATTENTION])
        return plan.norm(norm, summed), summed

    def add_mlp(self, x: Tensor, residual: Tensor) -> Tensor:
        plan = self.plan
        fc1, fc2 = plan._fc1, plan._fc2
        if plan._int8_mlp:
            # One op rounds the hidden layer more finely.
            rows, sums = (t if t.ndim == 2 else t.flatten(0, -2) for t in (x, residual))
            return int8.prepared_mlp(fc1.prepared, fc2.prepared, rows, sums).view(residual.shape)
        if x.dtype != plan.dtype:
            x = x.to(plan.dtype)
        gamma = plan._gammas[MLP]
        if plan._float_mlp:
            return cpu.mlp_residual(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, residual, gamma)
        if fc1 is not None:
            hidden = fc1(x, gelu=True)
        else:
            compute_hidden: Any = plan.modules.hidden
            hidden = compute_hidden(x, lambda layer, value: plan._linears[id(layer)](value))
        return fc2.add_to(residual, hidden, gamma)

    def add_mlp_norm(self, x: Tensor) -> Tensor:
        return self.plan.norm(MLP, self.add_mlp(x, x))


def cached_plan(
    layer: nn.Module,
    look_up: Callable[[], LayerModules],
    x: Tensor,
    settings: Settings,
    *,
    wide: bool,
) -> CachedPlan | None:
    """Return the plan of a layer, building it at the first call; None if the general path must run.

    Args:
        layer: A fused layer whose `intact()` was just checked.
        look_up: Returns the layer's modules; called only to build a plan.
        x: Input of this call, `[..., width]`.
        wide: Whether the residual keeps its dtype (post-norm).
    """
    dtype = settings.dtype or x.dtype
    if layer.training or dtype not in _DTYPES or not infers(x, settings):
        return None
    plan, rows = _plans.get(layer), x.shape[:-1].numel()
    if plan is not None and plan.dtype == dtype and plan.is_valid(layer):
        # Floating point may be faster for this number of rows.
        return plan if not plan.rounded or int8.compiled(rows, dtype, plan.rounded[:1]) else None
    descendants = [module.__dict__ for module in layer.modules() if module is not layer]
    if links(layer) is None or _trains_or_has_hooks(descendants):
        return None
    modules = look_up()
    if not _can_plan(layer, modules, dtype, mixed=settings.dtype is not None):
        return None
    rounded = [weight for weight in _tensors_of(modules) if kind_of(weight) == "int8"]
    if rounded and not int8.compiled(rows, dtype, rounded):
        return None
    # The first caller may be in inference mode; the plan must serve all.
    with torch.inference_mode(False), torch.no_grad():
        plan = _plans[layer] = CachedPlan(layer, modules, dtype, wide=wide)
    return plan


def forget(layer: nn.Module) -> None:
    """Drop the plan of a layer."""
    _plans.pop(layer, None)


def infers(x: Tensor, settings: Settings) -> bool:
    """Return whether a call is plain CPU inference: no gradient, compiler, autocast or fp8."""
    if (
        fp8.on()
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    return x.device.type == "cpu" and resolve(settings.backend, x) == "cpu"


def _trains_or_has_hooks(module_dicts: Iterable[dict[str, Any]]) -> bool:
    """Return whether a module, passed as its `__dict__`, is in training mode or has hooks."""
    return any(
        state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"]
        for state in module_dicts
    )


def _can_plan(layer: nn.Module, modules: LayerModules, dtype: torch.dtype, *, mixed: bool) -> bool:
    """Return whether a plan covers a layer.

    Its linear layers must be plain, packed or int8, nothing may draw, and unless `mixed` all have
    one dtype.
    """
    if not modules.projections or any(norm is not None for norm in modules.inner_norms):
        return False
    if modules.attention_p or modules.hidden_p or any(modules.branch_p):
        return False
    if modules.qkv_bias is not None:
        return False
    groups = _projection_groups(modules)
    groups += [(linear,) for linear in (modules.proj, modules.fc2, *modules.inner)]
    packs = [pack_of(group) for group in groups]
    for group, packed in zip(groups, packs, strict=True):
        if packed is not None:
            if packed.dtype != dtype:
                return False
            continue
        if {*map(type, group)} != {nn.Linear}:
            return False
        if len({kind_of(cast(Any, linear).weight) for linear in group}) > 1:
            return False
    for norm in modules.norms:
        if not isinstance(norm, nn.Identity) and getattr(norm, "weight", None) is None:
            return False
    tensors = _tensors_of(modules)
    owned = {id(parameter) for parameter in layer.parameters()}
    # Inference tensors carry no version, without which no copy can be watched.
    copies = any(
        len(group) > 1 and packed is not None for group, packed in zip(groups, packs, strict=True)
    ) or any(tensor.dtype != dtype or kind_of(tensor) is not None for tensor in tensors)
    return all(
        tensor.is_floating_point()
        and tensor.device.type == "cpu"
        and not (copies and tensor.is_inference())
        and kind_of(tensor) != "fp8"
        and id(tensor) in owned
        and (mixed or tensor.dtype == dtype)
        for tensor in tensors
    )


def _projection_groups(modules: LayerModules) -> list[tuple[nn.Module, ...]]:
    """Return the projections, those that share a GEMM as one group."""
    if modules.joins:
        return [modules.projections]
    return [(projection,) for projection in modules.projections]


def _parameters_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [
        value for module in modules for value in module._parameters.values() if value is not None
    ]


def _tensors_of(modules: LayerModules) -> list[Tensor]:
    """Return the parameters and LayerScales that a layer computes with."""
    linears = (*modules.projections, modules.proj, *modules.inner, modules.fc2)
    gammas = [gamma for gamma in modules.gammas if gamma is not None]
    return _parameters_of((*linears, *modules.norms)) + gammas
