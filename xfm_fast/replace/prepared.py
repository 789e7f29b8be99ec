"""A layer's parts and weights as its products take them, found once: inference on a CPU in few steps of Python.

On a short text a layer's arithmetic takes no longer than looking its parts up by name, joining weights and checking
operands, as the general way does at every call. Here all of that is kept from call to call, and one look tells whether
it still holds: the same parameters in the same memory, of the same version, with the values that were joined or
converted, and nothing that draws.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xfm_fast.kernels.backend import resolve
from xfm_fast.kernels.cpu import products as cpu
from xfm_fast.kernels.derived import derived, samples
from xfm_fast.replace.structure import Attend, Parts
from xfm_fast.replace.swap import Settings, links

_TYPES = (torch.float32, torch.bfloat16)
_prepared: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Prepared]] = weakref.WeakKeyDictionary()


class Affine(NamedTuple):
    """Weight and bias of a product, or scale and shift of a norm with its eps."""

    weight: Tensor
    bias: Tensor | None
    eps: float = 0.0


class Prepared:
    """One layer, of either order.

    Attributes:
        dtype: what its products are computed in.
        wide: norms behind the sums, whose results are the next residual and stay as wide as it comes in.
    """

    def __init__(self, layer: nn.Module, parts: Parts, dtype: torch.dtype, *, wide: bool) -> None:
        self.dtype, self.wide = dtype, wide
        self.prepare(layer, parts)

    def prepare(self, layer: nn.Module, parts: Parts) -> None:
        """Take the layer as it is now."""
        self.layer, self._links = weakref.ref(layer), links(layer)
        self.parts, self._activation = parts, None if parts.activation is None else parts.activation(layer)
        linears = [*parts.projections, parts.proj, parts.fc2, *_inner(parts)]
        watched = [(part._parameters, name) for part in layer.modules() for name in part._parameters]
        needed = {id(value) for value in _weights(parts)}
        self._sources = [
            (owner, name, value, value._version, value.data_ptr())
            for owner, name in watched
            if (value := owner[name]) is not None and id(value) in needed
        ]
        self._others = [part.__dict__ for part in layer.modules() if part is not layer]
        # What is copied may be written past PyTorch's count of versions.
        joined = parts.projections if parts.joins and len(parts.projections) > 1 else ()
        copied = {id(value) for value in _of(joined)}
        kept = [value for _, _, value, _, _ in self._sources if value.dtype != self.dtype or id(value) in copied]
        self._views = [samples(value) for value in kept]
        self._values = torch.cat(self._views) if self._views else None
        self._of_layer = {id(part): self._affine(part) for part in linears}
        made = [self._of_layer[id(part)] for part in parts.projections]
        if joined:
            biases = [m.weight.new_zeros(m.weight.shape[0]) if m.bias is None else m.bias for m in made]
            without = all(m.bias is None for m in made)
            made = [Affine(torch.cat([m.weight for m in made]), None if without else torch.cat(biases))]
        self._qkv = made
        self._proj, self._fc2 = self._of_layer[id(parts.proj)], self._of_layer[id(parts.fc2)]
        self._fc1 = None if parts.hidden is not None or parts.fc1 is None else self._of_layer[id(parts.fc1)]
        self._first, self._second = (self._norm(norm) for norm in parts.norms)
        self._shape = (self._proj.weight.shape[0],)
        self._scales = tuple(None if gamma is None else gamma.detach().to(self.dtype) for gamma in parts.gammas)

    def holds(self, layer: nn.Module) -> bool:
        """True if nothing changed since."""
        if self.layer() is not layer or self._links is not links(layer):
            return False
        if self.parts.activation is not None and self.parts.activation(layer) is not self._activation:
            return False
        for owner, name, value, version, place in self._sources:
            if owner.get(name) is not value or value._version != version or value.data_ptr() != place:
                return False
        if _busy(self._others):
            return False
        return self._values is None or torch.equal(torch.cat(self._views), self._values)

    def run(self, x: Tensor, attend: Attend, settings: Settings, adapt: Any = None) -> Tensor:
        """The layer on `[B, N, width]` or packed `[T, width]`, as `attend` expects; adapt as in `Parts`."""
        return (self._post_norm if self.wide else self._pre_norm)(x, attend, settings, adapt)

    def _pre_norm(self, x: Tensor, attend: Attend, settings: Settings, adapt: Any) -> Tensor:
        x = x.to(self.dtype)
        context = self._attended(self._normed(x, self._first), attend, settings, adapt)
        x = cpu.linear_residual(context, self._proj.weight, self._proj.bias, x, self._scales[0])
        normed = self._normed(x, self._second)
        if self._fc1 is not None:
            return cpu.mlp_residual(normed, *self._fc1[:2], *self._fc2[:2], x, self._scales[1])
        return cpu.linear_residual(self._hidden(normed), self._fc2.weight, self._fc2.bias, x, self._scales[1])

    def _post_norm(self, x: Tensor, attend: Attend, settings: Settings, adapt: Any) -> Tensor:
        context = self._attended(x.to(self.dtype), attend, settings, adapt)
        x = self._normed(self._summed(context, self._proj, x), self._first)
        return self._normed(self._summed(self._hidden(x.to(self.dtype)), self._fc2, x), self._second)

    def _attended(self, x: Tensor, attend: Attend, settings: Settings, adapt: Any) -> Tensor:
        heads = self.parts.heads
        made = [cpu.linear(x, affine.weight, affine.bias) for affine in self._qkv]
        if len(made) == 1:
            together = made[0]
            q, k, v = together.view(*together.shape[:-1], 3, heads, -1).unbind(-3)
        else:
            q, k, v = (each.view(*each.shape[:-1], heads, -1) for each in made)
        if adapt is not None:
            q, k = (t.to(v.dtype) for t in adapt(q, k))
        return attend(q, k, v, 0.0, settings)

    def _summed(self, x: Tensor, affine: Affine, residual: Tensor) -> Tensor:
        if residual.dtype == x.dtype:
            return cpu.linear_residual(x, affine.weight, affine.bias, residual, None)
        return residual + cpu.linear(x, affine.weight, affine.bias)

    def _hidden(self, x: Tensor) -> Tensor:
        if self._fc1 is not None:
            return cpu.linear_gelu(x, self._fc1.weight, self._fc1.bias)
        assert self.parts.hidden is not None
        return self.parts.hidden(x, self._product)

    def _product(self, layer: nn.Module, x: Tensor) -> Tensor:
        affine = self._of_layer[id(layer)]
        return cpu.linear(x, affine.weight, affine.bias)

    def _normed(self, x: Tensor, norm: Affine | None) -> Tensor:
        return x if norm is None else torch.layer_norm(x, self._shape, norm.weight, norm.bias, norm.eps)

    def _affine(self, layer: Any) -> Affine:
        bias = layer.bias
        return Affine(layer.weight.detach().to(self.dtype), None if bias is None else bias.detach().to(self.dtype))

    def _norm(self, norm: Any) -> Affine | None:
        if isinstance(norm, nn.Identity):
            return None
        dtype, bias = norm.weight.dtype if self.wide else self.dtype, norm.bias
        return Affine(norm.weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype), norm.eps)


def prepared(
    layer: nn.Module,
    make_parts: Callable[[], Parts],
    x: Tensor,
    settings: Settings,
    *,
    wide: bool,
) -> Prepared | None:
    """The prepared form of a layer that was just found intact; None where the general way has to compute.

    Args:
        make_parts: the parts of the layer at this moment.
        x: what it is to be run on.
        wide: see `Prepared`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or layer.training or torch.is_autocast_enabled("cpu"):
        return None
    dtype = settings.dtype or x.dtype
    if x.device.type != "cpu" or dtype not in _TYPES or resolve(settings.backend, x) != "cpu":
        return None
    kept = _prepared.get(layer)
    found = None if kept is None else kept()
    if found is not None and found.dtype == dtype and found.holds(layer):
        return found
    if links(layer) is None or _busy(part.__dict__ for part in layer.modules() if part is not layer):
        return None
    parts = make_parts()
    if not _preparable(layer, parts, x.dtype if settings.dtype is None else None):
        return None
    # It dies with the first weight, or when all that is derived from weights is forgotten.
    name = f"prepared {dtype} {id(layer)}"
    found = derived(name, tuple(_weights(parts)), lambda: Prepared(layer, parts, dtype, wide=wide))
    if not found.holds(layer):
        with torch.inference_mode(False):
            found.prepare(layer, parts)
    _prepared[layer] = weakref.ref(found)
    return found


def _busy(modules: Iterable[dict[str, Any]]) -> bool:
    """True if a module, by its attributes, draws or is observed."""
    return any(own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] for own in modules)


def _preparable(layer: nn.Module, parts: Parts, dtype: torch.dtype | None) -> bool:
    """True if every product is that of a plain linear layer with weights of one type, and nothing draws."""
    if not parts.projections or parts.windows is not None or any(norm is not None for norm in parts.inner_norms):
        return False
    if parts.attention_p or parts.hidden_p or any(parts.branch_p) or parts.qkv_bias is not None:
        return False
    linears = [*parts.projections, parts.proj, parts.fc2, *_inner(parts)]
    if any(type(linear) is not nn.Linear for linear in linears):
        return False
    if any(not isinstance(norm, nn.Identity) and getattr(norm, "weight", None) is None for norm in parts.norms):
        return False
    every, own = _weights(parts), {id(parameter) for parameter in layer.parameters()}
    plain = all(p.is_floating_point() and not p.is_inference() and p.device.type == "cpu" for p in every)
    return plain and all(id(p) in own and dtype in (None, p.dtype) for p in every)


def _inner(parts: Parts) -> tuple[nn.Module, ...]:
    """The linear layers of the hidden layer."""
    return parts.inner or (() if parts.fc1 is None else (parts.fc1,))


def _of(parts: Iterable[nn.Module]) -> list[Tensor]:
    return [value for part in parts for value in part._parameters.values() if value is not None]


def _weights(parts: Parts) -> list[Tensor]:
    """Everything that a layer computes with, the first projection's weight in front."""
    linears = (*parts.projections, parts.proj, *_inner(parts), parts.fc2)
    return _of((*linears, *parts.norms)) + [gamma for gamma in parts.gammas if gamma is not None]
