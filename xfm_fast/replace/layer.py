"""Transformer layers of any library: a `LayerSpec` names the modules of a layer, and `FusedLayer` runs it.

A new family is a spec in `transformers_rows` or `timm_vision`, or a call of `register`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from operator import attrgetter
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.plans.orders import Formula, LayerModules, post_norm, pre_norm
from xfm_fast.plans.plan import LINEARS, Layers, forget
from xfm_fast.replace.adapters import Adaptable
from xfm_fast.replace.attention import Attend, Dense, Memory
from xfm_fast.replace.planned import run_planned
from xfm_fast.replace.structure import CrossAttention, LayerCall, norm_behind, pre_norm_settings
from xfm_fast.replace.swap import (
    CalledByName,
    Settings,
    find,
    has_other_arguments,
    is_erf_gelu,
    kernel_of,
    observed,
    original_class,
    short_name,
    why_not_bypassed,
)

Order = Literal["before", "behind sums", "behind branches"]
# Arguments that change neither a layer's output nor its class.
WITHOUT_EFFECT = ("use_cache", "return_dict", "cache_position", "num_items_in_batch")
_UNREAD = (*WITHOUT_EFFECT, "position_ids", "output_hidden_states")
# Attention implementations of transformers that equal plain attention, and those that do so without
# a mask.
PLAIN_ATTENTION = ("eager", "sdpa", "xfm_fast", None)
KERNELS = ("flash_attention_2", "flash_attention_3", "flex_attention")


class Mlp(NamedTuple):
    """One form of a layer's MLP."""

    # linear layer into the hidden layer; two for a gate, `activation(first) · second`
    inner: tuple[str, ...]
    # module or function; empty for erf GELU in a layer without an activation module
    activation: str
    outer: str  # linear layer out of the hidden layer
    # one linear layer computes both factors of the gate, the activated one first
    halved: bool = False
    dropout: str = ""  # dropout of the hidden layer


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The modules of a family of layers, as dotted names relative to the layer.

    Of several specs for one layer (library versions), the one whose first own class exists in the
    library applies.
    """

    # the layer's class, its full name, or `package.Class` for one of `transformers.models.package`
    layer: str | type[nn.Module] = ""
    # norms before the branches, after the sums, or after the branches and before the sums
    order: Order | Callable[[Any], Order]
    attention: str  # the attention module, whose config selects the implementation
    # bypassed classes, or their names: short in the layer's file, full elsewhere
    own: str | tuple[type[nn.Module], ...]
    # projections to queries, keys and values, or one to all three; a layer has one or three of them
    qkv: tuple[str, ...] = ()
    proj: str  # projection after the attention
    norms: tuple[str, str]  # of the attention and of the MLP
    mlps: tuple[Mlp, ...]  # possible forms of the MLP; the first that a layer has is used
    head_size: str = ""  # width of an attention head
    heads: str = ""  # number of heads, in place of head_size
    # dropout of the attention weights: a module, or a number that applies in training
    weights_p: str = ""
    branch_p: tuple[str, str] = ("", "")  # dropout modules at the end of the branches
    scales: tuple[str, str] = ("", "")  # LayerScale of each branch
    drop_paths: tuple[str, str] = ("", "")  # stochastic depth of each branch
    inner_norms: tuple[str, str] = ("", "")  # norms before proj and before the layer out of the MLP
    bias: str = ""  # argument with a bias `[B, H, N, N]` that is added to the scaled scores
    rotary: str = ""  # argument with cos and sin of rotary positions
    chunks: str = ""  # attribute that runs the feed-forward in chunks
    joins: bool = True  # compute queries, keys and values in one GEMM
    cross: str = ""  # cross-attention, whose modules are named as those of `attention`
    # builds a custom attention from the layer and the call; None falls back to the original
    scores: Callable[[Any, Mapping[str, Any]], Attend | None] | None = None
    also_takes: tuple[str, ...] = ()  # arguments that only `scores` reads
    # corrects the modules of a layer after their look-up by name
    adjust: Callable[[Any, LayerModules], LayerModules] | None = None
    refuses: Callable[[Any], str | None] | None = None  # why a layer must not be replaced, or None
    # makes the layer's return value from its output and its input
    result: Callable[[Tensor, Tensor], Any] | None = None
    adaptable: bool = True  # its linear layers may carry adapters or packed weights
    ndim: int = 3  # dimensions of the input, `[B, N, width]` or `[B, height, width, channels]`

    @property
    def name(self) -> str:
        """Lookup key of the layer class."""
        return self.layer if isinstance(self.layer, str) else _full_name(self.layer)

    def own_classes(self, layer_class: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        """Return the bypassed classes that exist in the library of a layer class."""
        if not isinstance(self.own, str):
            return self.own
        classes = []
        for name in self.own.split():
            package, _, class_name = name.rpartition(".")
            try:
                library = import_module(package or layer_class.__module__)
            except ImportError:
                continue
            if hasattr(library, class_name):
                classes.append(getattr(library, class_name))
        return tuple(classes)

    def fits(self, layer_class: type[nn.Module]) -> bool:
        """Return whether the spec is for this version of the layer's library."""
        if not isinstance(self.own, str):
            return True
        return hasattr(sys.modules[layer_class.__module__], self.own.split()[0])

    def cross_name(self, name: str) -> str:
        """Map the name of a module in the self-attention to that in the cross-attention."""
        return self.cross + name.removeprefix(self.attention.partition(".")[0]) if name else ""

    def _with_cross(self, *names: str) -> tuple[str, ...]:
        """Return the names that are set, and those in the cross-attention."""
        names = tuple(name for name in names if name)
        return (*names, *map(self.cross_name, names)) if self.cross else names

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linear layers in all forms of the family."""
        of_mlps = (name for mlp in self.mlps for name in (*mlp.inner, mlp.outer))
        return *self._with_cross(*self.qkv, self.proj), *of_mlps

    @property
    def joint(self) -> tuple[tuple[str, ...], ...]:
        """Names of linear layers on one input, computed by one GEMM."""
        if not self.joins or len(self.qkv) < 2:
            return ()
        if not self.cross:
            return (self.qkv,)
        return self.qkv, tuple(map(self.cross_name, self.qkv[1:]))

    def bypassed(self, layer_class: type[nn.Module]) -> dict[str, Any]:
        """Return the modules that are read and not called, with their possible classes."""
        own = self.own_classes(layer_class)
        of_mlps = (mlp.dropout for mlp in self.mlps)
        dropouts = self._with_cross(self.weights_p, self.branch_p[0])
        dropouts += tuple(filter(None, (self.branch_p[1], *of_mlps)))
        norms = (*self._with_cross(self.norms[0]), self.norms[1])
        drop_paths = self._with_cross(self.drop_paths[0])
        drop_paths += tuple(filter(None, self.drop_paths[1:]))
        values = (*self.scales, *self.inner_norms, self.head_size, self.heads)
        names = (*self.linears, *norms, *dropouts, *drop_paths, *values)
        parents = {name[:end] for name in names for end in range(len(name)) if name[end] == "."}
        linear = (*LINEARS, Adaptable) if self.adaptable else LINEARS
        own_norms = (norm for norm in own if issubclass(norm, nn.LayerNorm))
        classes: dict[str, Any] = dict.fromkeys(sorted(parents), own or _Absent)
        classes |= dict.fromkeys(self.linears, linear)
        classes |= dict.fromkeys(norms, (nn.LayerNorm, nn.Identity, *own_norms))
        classes |= dict.fromkeys(dropouts, (nn.Dropout, nn.Identity))
        return classes | dict.fromkeys(drop_paths, (nn.Identity, *own))

    def missing(self, layer: nn.Module) -> str | None:
        """Return the name of the first module or value that a layer lacks, or None."""
        absent = [name for name in self.qkv if find(layer, name) is None]
        if len(self.qkv) > 3 and len(self.qkv) - len(absent) in (1, 3):
            absent = []
        for name in (*absent, self.proj, *self.norms, self.attention):
            if find(layer, name) is None:
                return name
        mlp = self.mlp(layer)
        if mlp is None:
            return " or ".join(mlp.inner[0] for mlp in self.mlps)
        dropouts = (self.weights_p, *self.branch_p, mlp.dropout)
        for name in (self.head_size, self.heads, *dropouts, self.chunks, mlp.activation):
            value: Any = layer
            for step in name.split(".") if name else ():
                value = getattr(value, step, None)
            if value is None:
                return name
        return None

    def unread(self, layer: nn.Module) -> str | None:
        """Return the first parameter or module that no name covers: the spec misses some computation."""
        if self.scores is not None or self.adjust is not None:
            return None
        activations = (mlp.activation for mlp in self.mlps)
        optional = (*self.scales, *self.inner_norms, *self.drop_paths, *activations)
        covered = (*self.linears, *self.norms, *filter(None, optional))
        prefixes = (*covered, *(f"{name}." for name in covered), "crossattention.")
        names = [name for name, _ in layer.named_parameters()]
        for name, module in layer.named_modules():
            # Layers hold dropouts that they do not call.
            if not module._modules and not isinstance(module, (nn.Identity, nn.Dropout)):
                names.append(name)
        for name in names:
            is_parent = any(inner.startswith(f"{name}.") for inner in covered)
            if not is_parent and not name.startswith(prefixes):
                return name
        return None

    def mlp(self, layer: nn.Module) -> Mlp | None:
        """Return the MLP form of a layer, or None."""
        for mlp in self.mlps:
            if all(find(layer, name) is not None for name in (*mlp.inner, mlp.outer)):
                return mlp
        return None

    def modules(self, layer: nn.Module) -> LayerModules:
        """Look up the modules of a layer, and their values in its current mode."""
        mlp, proj = self.mlp(layer), cast(Any, find(layer, self.proj))
        assert mlp is not None
        inner: Any = tuple(find(layer, name) for name in mlp.inner)
        activation = attrgetter(mlp.activation)(layer) if mlp.activation else F.gelu
        has_hooks = isinstance(activation, nn.Module) and observed(activation)
        hidden = formula = None
        if len(inner) > 1 or mlp.halved or has_hooks or not is_erf_gelu(activation):
            hidden = partial(_hidden, inner, activation, mlp.halved)
            name = None if has_hooks else kernel_of(activation)
            formula = None if name is None else Formula(name, mlp.halved)
        first, second = self.norms
        row_scales = ()
        if any(self.drop_paths):
            row_scales = tuple(partial(_row_scale, _find(layer, name)) for name in self.drop_paths)
        modules = LayerModules(
            norms=(cast(Any, find(layer, first)), cast(Any, find(layer, second))),
            projections=tuple(
                module for name in self.qkv if (module := find(layer, name)) is not None
            ),
            joins=self.joins,
            heads=self._heads(layer, proj),
            proj=proj,
            inner=inner,
            activation=attrgetter(mlp.activation) if mlp.activation else None,
            fc2=cast(nn.Module, find(layer, mlp.outer)),
            hidden=hidden,
            formula=formula,
            gammas=(_scale(layer, self.scales[0]), _scale(layer, self.scales[1])),
            row_scales=row_scales,
            attention_p=_dropout_p(layer, self.weights_p),
            hidden_p=_dropout_p(layer, mlp.dropout),
            branch_p=(_dropout_p(layer, self.branch_p[0]), _dropout_p(layer, self.branch_p[1])),
            inner_norms=(
                _inner_norm(layer, self.inner_norms[0]),
                _inner_norm(layer, self.inner_norms[1]),
            ),
        )
        return modules if self.adjust is None else self.adjust(layer, modules)

    def cross_attention(self, layer: nn.Module) -> CrossAttention:
        """Look up the modules of a layer's cross-attention."""
        proj: Any = find(layer, self.cross_name(self.proj))
        return CrossAttention(
            projections=cast(Any, tuple(find(layer, self.cross_name(name)) for name in self.qkv)),
            heads=self._heads(layer, proj),
            proj=proj,
            norm=cast(nn.Module, find(layer, self.cross_name(self.norms[0]))),
            attention_p=_dropout_p(layer, self.cross_name(self.weights_p)),
            branch_p=_dropout_p(layer, self.cross_name(self.branch_p[0])),
        )

    def _heads(self, layer: nn.Module, proj: Any) -> int:
        if self.heads:
            return attrgetter(self.heads)(layer)
        return proj.in_features // attrgetter(self.head_size)(layer)


_specs: dict[str, tuple[LayerSpec, ...]] = {}


def register(*specs: LayerSpec) -> None:
    """Register families of layers with `accelerate`.

    Args:
        specs: The families; a spec replaces an earlier one of the same layer and own classes.

    Raises:
        InputError: A family has no layer name, no MLP, or an unknown order.
    """
    for spec in specs:
        if "." not in spec.name or not spec.mlps:
            raise InputError(
                f"a LayerSpec needs a layer's class or 'package.Class' and at least one Mlp, not {spec.layer!r} with "
                f"{spec.mlps!r}"
            )
        if not callable(spec.order) and spec.order not in get_args(Order):
            raise InputError(
                f"the order of {spec.name} is {spec.order!r}; choose one of {', '.join(get_args(Order))}"
            )
        versions = (version for version in _specs.get(spec.name, ()) if version.own != spec.own)
        _specs[spec.name] = (spec, *versions)
    spec_of.cache_clear()


def registered() -> tuple[LayerSpec, ...]:
    """Return all families, in order of registration."""
    return tuple(spec for versions in _specs.values() for spec in versions)


@cache
def spec_of(layer_class: type[nn.Module]) -> LayerSpec | None:
    """Return the spec of a layer class, or None."""
    specs = _specs.get(_full_name(layer_class)) or _specs.get(short_name(layer_class), ())
    for spec in specs:
        if spec.fits(layer_class):
            return spec
    return specs[-1] if specs else None


def _full_name(layer_class: type[nn.Module]) -> str:
    return f"{layer_class.__module__}.{layer_class.__qualname__}"


class FusedLayer(CalledByName):
    """Fused form of every layer with a spec: linear layers, activation, residual and norm fused."""

    benefit: ClassVar[str] = "linear layers fused with activation, residual and norm"
    layer_spec: ClassVar[LayerSpec]
    layer_arguments: ClassVar[frozenset[str]] = frozenset()
    required: ClassVar[frozenset[str]] = frozenset()  # arguments without a default
    returns_tuple: ClassVar[bool] = False  # the output is a tuple, with room for attention weights

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        attributes = super().adapted(original)
        names = attributes["names"]
        spec = getattr(cls, "layer_spec", None) or spec_of(original)
        assert spec is not None
        parameters = [*inspect.signature(original.forward).parameters.values()][1:]
        required = {
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        read = {*names[:1], "attention_mask", spec.bias, spec.rotary, *spec.also_takes}
        attributes |= {
            "layer_spec": spec,
            "bypassed": spec.bypassed(original),
            "joint": spec.joint,
            "layer_arguments": frozenset(read.union(_UNREAD)),
            "required": frozenset(required),
            "returns_tuple": "output_attentions" in names,
        }
        if isinstance(spec.order, str):
            attributes["layer_order"] = spec.order
        return attributes

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return spec_of(original_class(module)) is not None

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        adapted = cls.adapted(original_class(module))
        spec: LayerSpec = adapted["layer_spec"]
        missing = spec.missing(module)
        if missing is not None:
            return (
                f"it has no {missing}, which its LayerSpec names (another version of the library?); register a "
                "LayerSpec with its names"
            )
        for name in (spec.rotary, spec.bias):
            if name and name not in adapted["names"]:
                return f"its forward takes no {name}: this version of the library makes it in the layer"
        if needed := adapted["required"] - adapted["layer_arguments"]:
            return f"its forward requires {', '.join(sorted(needed))}, which its LayerSpec does not take"
        if (unread := spec.unread(module)) is not None:
            return f"its LayerSpec does not cover {unread}"
        if spec.chunks and (size := attrgetter(spec.chunks)(module)):
            return f"its feed-forward runs in chunks of {size}; chunk_size 0 is fused"
        for name in spec.norms:
            norm = find(module, name)
            if isinstance(norm, nn.LayerNorm) and norm.weight is None:
                return f"{name} has no weight"
        reason = why_not_bypassed(module, adapted["bypassed"])
        return reason if reason or spec.refuses is None else spec.refuses(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        spec, x, attend = self.layer_spec, cast(Any, call.get(self.names[0])), None
        covered = isinstance(x, Tensor) and x.ndim == spec.ndim and x.numel() > 0
        rotary: Any = call.get(spec.rotary) if spec.rotary else None
        if covered and spec.rotary:
            covered = isinstance(rotary, tuple) and len(rotary) == 2
            covered = covered and all(isinstance(t, Tensor) for t in rotary)
        if covered and not has_other_arguments(call, self.layer_arguments) and self.intact():
            attend = self._attention(call)
        if attend is None:
            return super().forward(*args, **kwargs)
        with self.context(x.device) as settings:
            tokens = x if spec.ndim == 3 else x.flatten(1, -2)
            out = self.run(tokens, attend, settings, rotary, getattr(attend, "memory", None))
        if spec.result is not None:
            return spec.result(out, x)
        return (out,) if self.returns_tuple else out

    def release(self) -> None:
        forget(self)
        super().release()

    @property
    def layer_order(self) -> Order:
        """Order of this layer, where the spec decides by layer; other classes store it."""
        return cast(Callable[[Any], Order], self.layer_spec.order)(self)

    def context(self, device: torch.device) -> Any:
        """Return a context manager for `run`, which yields the settings."""
        if self.layer_order == "behind sums":
            return self.settings.without_autocast(device)
        return pre_norm_settings(self.settings, device)

    def run(
        self,
        x: Tensor,
        attend: Attend,
        settings: Settings,
        rotary: Any = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Compute the layer on `[B, N, width]` or packed `[T, width]`, as `attend` expects."""
        self.count()
        spec, order = self.layer_spec, self.layer_order
        if memory is None and order != "behind branches" and not hasattr(attend, "windows"):
            layers = Layers([self], spec.modules, [order == "behind sums"])
            out = run_planned(self, layers, x, attend, settings, rotary)
            if out is not None:
                return out
        call = self.executor(attend, settings, rotary)
        if order == "before":
            return pre_norm(call, x)
        if order == "behind branches":
            return norm_behind(call, x)
        if memory is None:
            return post_norm(call, x)
        return post_norm(call, x, partial(call.cross_attention, spec.cross_attention(self), memory))

    def executor(self, attend: Attend, settings: Settings, rotary: Any) -> LayerCall:
        """Return the executor of the general path."""
        wide = self.layer_order == "behind sums"
        return LayerCall(self.layer_spec.modules(self), attend, settings, wide, rotary)

    def _attention(self, call: Mapping[str, Any]) -> Attend | None:
        """Return the attention of a call; None to run the original."""
        spec, mask = self.layer_spec, call.get("attention_mask")
        if spec.scores is not None:
            return spec.scores(self, call)
        implementation = implementation_of(self)
        unmasked_kernel = implementation in KERNELS and mask is None
        if implementation not in PLAIN_ATTENTION and not unmasked_kernel:
            return None
        attention = find(self, spec.attention)
        causal = getattr(attention, "is_causal", getattr(attention, "is_decoder", False))
        if mask is None and causal:
            return None
        return Dense.of(mask, call.get(spec.bias) if spec.bias else None, implementation)


def implementation_of(layer: Any) -> str | None:
    """Return the name of the attention implementation in a layer of transformers."""
    config = getattr(find(layer, layer.layer_spec.attention), "config", None)
    return getattr(config, "_attn_implementation", None)


def can_run_packed(layers: list[Any]) -> bool:
    """Return whether there are layers, all can run on packed tokens now, and none has hooks."""
    return bool(layers) and all(
        isinstance(layer, FusedLayer) and layer.intact() and not observed(layer) for layer in layers
    )


def run_packed(layers: Sequence[Any], x: Tensor, attend: Attend) -> Tensor:
    """Run layers on packed tokens `[T, width]`."""
    with layers[0].context(x.device) as settings:
        for layer in layers:
            x = layer.run(x, attend, settings)
    return x


def _find(layer: nn.Module, name: str) -> nn.Module | None:
    return find(layer, name) if name else None


def _dropout_p(layer: nn.Module, name: str) -> float:
    """Return the probability of a dropout module, or of a number attribute, in the current mode."""
    if not name:
        return 0.0
    path, _, attribute = name.rpartition(".")
    owner: Any = find(layer, path) if path else layer
    dropout = getattr(owner, attribute)
    if isinstance(dropout, nn.Module):
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return dropout if owner.training else 0.0


def _scale(layer: Any, name: str) -> Tensor | None:
    """Return a LayerScale; None if the library stores 1, None or an Identity in its place."""
    path, _, attribute = name.rpartition(".")
    gamma = getattr(find(layer, path) if path else layer, attribute, None) if name else None
    return gamma if isinstance(gamma, Tensor) else None


def _inner_norm(layer: nn.Module, name: str) -> nn.Module | None:
    norm = _find(layer, name)
    return None if isinstance(norm, nn.Identity) else norm


class _Absent(nn.Module):
    """Placeholder for a class that this version of the library lacks."""


def _hidden(
    inner: tuple[Any, ...],
    activation: Any,
    halved: bool,
    x: Tensor,
    linear: Callable[[Any, Tensor], Tensor],
) -> Tensor:
    """Compute the hidden layer: `activation(a(x))`, or `activation(a(x)) · b(x)`."""
    first = linear(inner[0], x)
    if halved:
        first, second = first.chunk(2, -1)
        return activation(first) * second
    return activation(first) if len(inner) == 1 else activation(first) * linear(inner[1], x)


def _row_scale(drop_path: nn.Module | None, x: Tensor) -> Tensor | None:
    """Draw stochastic depth as the library does: a factor per batch entry, or None if inactive."""
    drop_p: Any = getattr(drop_path, "drop_prob", None)
    if drop_path is None or not drop_path.training or not drop_p:
        return None
    if type(drop_path).__module__.startswith("transformers."):
        draws = torch.rand(x.shape[0], dtype=x.dtype, device=x.device)
        return torch.floor(draws + (1 - drop_p)) / (1 - drop_p)
    factors = x.new_empty(x.shape[0]).bernoulli_(1 - drop_p)
    if drop_p < 1 and getattr(drop_path, "scale_by_keep", True):
        factors.div_(1 - drop_p)
    return factors
