"""A layer's parts and weights as its products take them, found once: inference on a CPU in few steps of Python.

On a short text a layer's arithmetic takes no longer than looking its parts up by name, joining weights and checking
operands, as the general way does at every call. Here all of that is kept from call to call, and one look tells whether
it still holds: the same parameters in the same memory, of the same version, with the values that were joined or
converted, and nothing that draws.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import fp8
from xfm_fast.kernels.backend import resolve
from xfm_fast.kernels.cpu import int8
from xfm_fast.kernels.cpu import products as cpu
from xfm_fast.kernels.derived import samples
from xfm_fast.kernels.marked import kind_of
from xfm_fast.replace.packed_weight import PackedWeight, pack_of
from xfm_fast.replace.structure import Attend, Parts
from xfm_fast.replace.swap import Settings, links, side_by_side

_TYPES = (torch.float32, torch.bfloat16)
FEW = 64
"""Rows of tokens up to which attention takes the time of its call, and a product that of reading its weight."""
# Nothing that is kept refers to the layer itself, or it would not die with it.
_prepared: weakref.WeakKeyDictionary[nn.Module, Prepared] = weakref.WeakKeyDictionary()


class _Norm(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    eps: float


class _Plain(NamedTuple):
    """A product with a weight as PyTorch keeps it: `x Wᵀ + b`.

    Few rows in 16 bits go the way of the untouched code. Their time is that of reading the weight from memory, which
    the race of libraries, on a weight in cache, does not see.
    """

    weight: Tensor
    bias: Tensor | None

    def linear(self, x: Tensor) -> Tensor:
        few = _few(x)
        return F.linear(x, self.weight, self.bias) if few else cpu.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        if _few(x):
            return torch.ops.aten.gelu_(F.linear(x, self.weight, self.bias))
        return cpu.linear_gelu(x, self.weight, self.bias)

    def residual(self, x: Tensor, residual: Tensor, gamma: Tensor | None) -> Tensor:
        if _few(x):
            out = F.linear(x, self.weight, self.bias)
            return torch.add(residual, out, out=out) if gamma is None else torch.addcmul(residual, out, gamma, out=out)
        return cpu.linear_residual(x, self.weight, self.bias, residual, gamma)


def _few(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.numel() <= FEW * x.shape[-1]


class _Frozen(NamedTuple):
    """The same with a weight that is packed in place of its parameter."""

    weight: PackedWeight
    bias: Tensor | None

    def linear(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, self.bias, gelu=True)

    def residual(self, x: Tensor, residual: Tensor, gamma: Tensor | None) -> Tensor:
        if gamma is None:
            return self.weight.residual(x, self.bias, residual)
        return torch.addcmul(residual, self.linear(x), gamma)


class _Rounded(NamedTuple):
    """The same with a weight in bytes, for rows of either type. LayerScale is a factor of the weight."""

    product: int8.Prepared
    dtype: torch.dtype

    def linear(self, x: Tensor) -> Tensor:
        return self._of(x, None)

    def gelu(self, x: Tensor) -> Tensor:
        return self._of(x, None, gelu=True)

    def residual(self, x: Tensor, residual: Tensor, gamma: Tensor | None) -> Tensor:
        return self._of(x, residual)

    def _of(self, x: Tensor, residual: Tensor | None, *, gelu: bool = False) -> Tensor:
        if x.ndim == 2:
            return self.product(x, residual, gelu=gelu, dtype=self.dtype)
        sums = None if residual is None else residual.flatten(0, -2)
        return self.product(x.flatten(0, -2), sums, gelu=gelu, dtype=self.dtype).view(*x.shape[:-1], -1)


_Product = _Plain | _Frozen | _Rounded


class Prepared:
    """One layer, of either order.

    Attributes:
        dtype: what its products are computed in.
        wide: norms behind the sums, whose results are the next residual and stay as wide as it comes in.
    """

    def __init__(self, layer: nn.Module, parts: Parts, dtype: torch.dtype, *, wide: bool) -> None:
        self.dtype, self.wide = dtype, wide
        self._links = links(layer)
        self.parts, self._activation = parts, None if parts.activation is None else parts.activation(layer)
        watched = [(part._parameters, name) for part in layer.modules() for name in part._parameters]
        needed = {id(value) for value in _weights(parts)}
        self._sources = [
            (owner, name, value, value._version, value.data_ptr(), kind_of(value))
            for owner, name in watched
            if (value := owner[name]) is not None and id(value) in needed
        ]
        self._others = [part.__dict__ for part in layer.modules() if part is not layer]
        # What is copied may be written past PyTorch's count of versions.
        joined = parts.projections if parts.joins and len(parts.projections) > 1 else ()
        copied = {id(value) for value in _of(joined)}
        self.rounded = tuple(value for _, _, value, _, _, kind in self._sources if kind == "int8")
        if self.rounded:
            copied = needed
        kept = [value for _, _, value, *_ in self._sources if value.dtype != self.dtype or id(value) in copied]
        self._views = [samples(value) for value in kept]
        self._values = torch.cat(self._views) if self._views else None
        ends = {id(end): gamma for end, gamma in zip((parts.proj, parts.fc2), parts.gammas, strict=True)}
        self._of_layer = {
            id(part): self._product_of([part], ends.get(id(part)))
            for part in (parts.proj, parts.fc2, *_inner(parts))
        }  # fmt: skip
        groups = [joined] if joined else [(part,) for part in parts.projections]
        self._qkv = [self._product_of(group) for group in groups]
        self._proj, self._fc2 = self._of_layer[id(parts.proj)], self._of_layer[id(parts.fc2)]
        self._fc1 = None if parts.hidden is not None or parts.fc1 is None else self._of_layer[id(parts.fc1)]
        self._first, self._second = (self._norm(norm) for norm in parts.norms)
        self._shape = (cast(Any, parts.proj).out_features,)
        self._scales = tuple(None if gamma is None else gamma.detach().to(self.dtype) for gamma in parts.gammas)

    def holds(self, layer: nn.Module) -> bool:
        """True if nothing changed since."""
        if self._links is not links(layer):
            return False
        if self.parts.activation is not None and self.parts.activation(layer) is not self._activation:
            return False
        for owner, name, value, version, place, kind in self._sources:
            if owner.get(name) is not value or value._version != version or value.data_ptr() != place:
                return False
            if kind_of(value) is not kind:
                return False
        if _busy(self._others):
            return False
        return self._values is None or torch.equal(torch.cat(self._views), self._values)

    def run(self, x: Tensor, attend: Attend, settings: Settings, adapt: Any = None) -> Tensor:
        """The layer on `[B, N, width]` or packed `[T, width]`, as `attend` expects.

        Args:
            adapt: what happens to queries and keys, of either `[..., H, D]` and False, or of both side by side,
                `[..., 2, H, D]`, and True.
        """
        return (self._post_norm if self.wide else self._pre_norm)(x, attend, settings, adapt)

    def _pre_norm(self, x: Tensor, attend: Attend, settings: Settings, adapt: Any) -> Tensor:
        x = x.to(self.dtype)
        context = self._attended(self._normed(x, self._first), attend, settings, adapt)
        x = self._proj.residual(context, x, self._scales[0])
        normed = self._normed(x, self._second)
        if isinstance(self._fc1, _Plain) and isinstance(self._fc2, _Plain) and not _few(normed):
            return cpu.mlp_residual(normed, *self._fc1, *self._fc2, x, self._scales[1])
        if isinstance(self._fc1, _Rounded) and isinstance(self._fc2, _Rounded):
            return self._rounded_mlp(self._fc1, self._fc2, normed, x)
        return self._fc2.residual(self._hidden(normed), x, self._scales[1])

    def _post_norm(self, x: Tensor, attend: Attend, settings: Settings, adapt: Any) -> Tensor:
        # Bytes are made of either type, soonest of what is there.
        own = x if isinstance(self._qkv[0], _Rounded) else x.to(self.dtype)
        x = self._normed(self._summed(self._attended(own, attend, settings, adapt), self._proj, x), self._first)
        if isinstance(self._fc1, _Rounded) and isinstance(self._fc2, _Rounded):
            return self._normed(self._rounded_mlp(self._fc1, self._fc2, x, x), self._second)
        return self._normed(self._summed(self._hidden(x.to(self.dtype)), self._fc2, x), self._second)

    def _attended(self, x: Tensor, attend: Attend, settings: Settings, adapt: Any) -> Tensor:
        heads = self.parts.heads
        made = [product.linear(x) for product in self._qkv]
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

    @staticmethod
    def _rounded_mlp(first: _Rounded, second: _Rounded, x: Tensor, residual: Tensor) -> Tensor:
        """In one piece, since a hidden layer that is known to be one is rounded to finer levels."""
        rows, sums = (t if t.ndim == 2 else t.flatten(0, -2) for t in (x, residual))
        return int8.prepared_mlp(first.product, second.product, rows, sums).view(residual.shape)

    def _summed(self, x: Tensor, product: _Product, residual: Tensor) -> Tensor:
        if residual.dtype == x.dtype or isinstance(product, _Rounded):
            return product.residual(x, residual, None)
        return residual + product.linear(x)

    def _hidden(self, x: Tensor) -> Tensor:
        if self._fc1 is not None:
            return self._fc1.gelu(x)
        assert self.parts.hidden is not None
        return self.parts.hidden(x, lambda layer, value: self._of_layer[id(layer)].linear(value))

    def _normed(self, x: Tensor, norm: _Norm | None) -> Tensor:
        return x if norm is None else torch.layer_norm(x, self._shape, norm.weight, norm.bias, norm.eps)

    def _product_of(self, layers: Sequence[Any], gamma: Tensor | None = None) -> _Product:
        """The product with one layer, or with several side by side."""
        packed = pack_of(layers)
        rounded = packed is None and kind_of(layers[0].weight) == "int8"
        dtype = torch.float32 if rounded else self.dtype
        biases = [None if layer.bias is None else layer.bias.detach().to(dtype) for layer in layers]
        bias = biases[0] if len(layers) == 1 else side_by_side(biases, [layer.out_features for layer in layers])
        if packed is not None:
            return _Frozen(packed, bias)
        weights = [layer.weight if rounded else layer.weight.detach().to(dtype) for layer in layers]
        weight = weights[0] if len(layers) == 1 else torch.cat(weights)
        return _Rounded(int8.Prepared.of(weight, bias, gamma), self.dtype) if rounded else _Plain(weight, bias)

    def _norm(self, norm: Any) -> _Norm | None:
        if isinstance(norm, nn.Identity):
            return None
        dtype, bias = norm.weight.dtype if self.wide else self.dtype, norm.bias
        return _Norm(norm.weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype), norm.eps)


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
    dtype = settings.dtype or x.dtype
    if layer.training or dtype not in _TYPES or not infers(x, settings):
        return None
    found, rows = _prepared.get(layer), x.shape[:-1].numel()
    if found is not None and found.dtype == dtype and found.holds(layer):
        # Of so many rows, floats may be the quicker factors.
        return found if not found.rounded or int8.compiled(rows, dtype, found.rounded[:1]) else None
    if links(layer) is None or _busy(part.__dict__ for part in layer.modules() if part is not layer):
        return None
    parts = make_parts()
    if not _preparable(layer, parts, dtype, mixed=settings.dtype is not None):
        return None
    rounded = [weight for weight in _weights(parts) if kind_of(weight) == "int8"]
    if rounded and not int8.compiled(rows, dtype, rounded):
        return None
    # The first caller may be in inference mode; what is kept must serve all.
    with torch.inference_mode(False), torch.no_grad():
        found = _prepared[layer] = Prepared(layer, parts, dtype, wide=wide)
    return found


def forget(layer: nn.Module) -> None:
    """Give up what is kept of a layer."""
    _prepared.pop(layer, None)


def infers(x: Tensor, settings: Settings) -> bool:
    """True for plain inference on a CPU: no gradient, no compiler, no autocast, no fp8, no other backend."""
    if fp8.on() or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return x.device.type == "cpu" and resolve(settings.backend, x) == "cpu"


def _busy(modules: Iterable[dict[str, Any]]) -> bool:
    """True if a module, by its attributes, draws or is observed."""
    return any(own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] for own in modules)


def _preparable(layer: nn.Module, parts: Parts, dtype: torch.dtype, *, mixed: bool) -> bool:
    """True if each product is that of a plain or frozen linear layer, in floats or in int8, and nothing draws.

    All are of one type unless mixed.
    """
    if not parts.projections or parts.windows is not None or any(norm is not None for norm in parts.inner_norms):
        return False
    if parts.attention_p or parts.hidden_p or any(parts.branch_p) or parts.qkv_bias is not None:
        return False
    joined = parts.joins and len(parts.projections) > 1
    groups = [parts.projections] if joined else [(part,) for part in parts.projections]
    for group in (*groups, (parts.proj,), (parts.fc2,), *((part,) for part in _inner(parts))):
        packed = pack_of(group)
        if packed is None and any(type(linear) is not nn.Linear for linear in group):
            return False
        if packed is None and len({kind_of(cast(Any, linear).weight) for linear in group}) > 1:
            return False
        if packed is not None and packed.tensor.dtype != dtype:
            return False
    if any(not isinstance(norm, nn.Identity) and getattr(norm, "weight", None) is None for norm in parts.norms):
        return False
    every, own = _weights(parts), {id(parameter) for parameter in layer.parameters()}
    if any(kind_of(weight) == "fp8" for weight in every):
        return False
    plain = all(p.is_floating_point() and not p.is_inference() and p.device.type == "cpu" for p in every)
    return plain and all(id(p) in own and (mixed or p.dtype == dtype) for p in every)


def _inner(parts: Parts) -> tuple[nn.Module, ...]:
    """The linear layers of the hidden layer."""
    return parts.inner or (() if parts.fc1 is None else (parts.fc1,))


def _of(parts: Iterable[nn.Module]) -> list[Tensor]:
    return [value for part in parts for value in part._parameters.values() if value is not None]


def _weights(parts: Parts) -> list[Tensor]:
    """Everything that a layer computes with."""
    linears = (*parts.projections, parts.proj, *_inner(parts), parts.fc2)
    return _of((*linears, *parts.norms)) + [gamma for gamma in parts.gammas if gamma is not None]
