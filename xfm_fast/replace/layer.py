"""Transformer layers of any library: a `LayerSpec` names the parts of a layer, and one fused form runs them all.

A new family is a row (`transformers_rows`, `timm_vision`) or a call of `register`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from importlib import import_module
from operator import attrgetter
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from xfm_fast.errors import InputError
from xfm_fast.replace.adapters import Adaptable
from xfm_fast.replace.attention import Attend, Dense, Memory
from xfm_fast.replace.cached_plan import cached_plan, forget
from xfm_fast.replace.structure import (
    Cross,
    Parts,
    branch_types,
    norm_behind,
    post_norm,
    pre_norm,
    rotate,
)
from xfm_fast.replace.swap import (
    CalledByName,
    Settings,
    find,
    has_other_arguments,
    is_erf_gelu,
    observed,
    original_class,
    short_name,
    why_not_bypassed,
)

Order = Literal["before", "behind sums", "behind branches"]
# Arguments that do not affect a layer's numbers; requests for attention weights are handled elsewhere.
WITHOUT_EFFECT = (
    "position_ids",
    "use_cache",
    "return_dict",
    "cache_position",
    "num_items_in_batch",
    "output_hidden_states",
)
# Attention implementations of transformers that compute the plain function, and those that do without a mask.
PLAIN_ATTENTION = ("eager", "sdpa", "xfm_fast", None)
KERNELS = ("flash_attention_2", "flash_attention_3", "flex_attention")


class Mlp(NamedTuple):
    """One form of a layer's MLP."""

    inner: tuple[
        str, ...
    ]  # linear layer into the hidden layer; two for a gate, `activation(first) · second`
    activation: (
        str  # module or function; empty for erf GELU in a layer without an activation module
    )
    outer: str  # linear layer out of the hidden layer
    halved: bool = (
        False  # one linear layer computes both factors of the gate, the activated one first
    )
    dropout: str = ""  # dropout of the hidden layer


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Where the layers of a family keep their parts: dotted names relative to the layer.

    `layer` is the layer's class, its full name, or `package.Class` for one of `transformers.models.package`. With
    several rows for one layer (library versions), the row whose first own class exists in the library applies.
    """

    layer: str | type[nn.Module] = ""
    # norms before the branches, after the sums, or after the branches and before the sums
    order: Order | Callable[[Any], Order]
    attention: str  # the attention module, whose config selects the implementation
    own: (
        str | tuple[type[nn.Module], ...]
    )  # bypassed classes, or their names in the layer's file (full ones elsewhere)
    qkv: tuple[
        str, ...
    ] = ()  # projections to queries, keys and values, or one to all three; of forms, the existing
    proj: str  # projection after the attention
    norms: tuple[str, str]  # of the attention and of the MLP
    mlps: tuple[Mlp, ...]  # possible forms of the MLP; the first that a layer has is used
    head_size: str = ""  # width of an attention head
    heads: str = ""  # number of heads, in place of head_size
    weights_p: str = (
        ""  # dropout of the attention weights: a module, or a number that applies in training
    )
    branch_p: tuple[str, str] = (
        "",
        "",
    )  # dropout modules at the end of the branches; empty for none
    scales: tuple[str, str] = ("", "")  # LayerScale of each branch
    drop_paths: tuple[str, str] = ("", "")  # stochastic depth of each branch
    inner_norms: tuple[str, str] = ("", "")  # norms before proj and before the layer out of the MLP
    bias: str = ""  # argument with a bias `[B, H, N, N]` that is added to the scaled scores
    rotary: str = ""  # argument with cos and sin of rotary positions
    chunks: str = ""  # attribute that runs the feed-forward in chunks
    joins: bool = True  # compute queries, keys and values in one GEMM
    cross: str = (
        ""  # module of the cross-attention, whose parts have the names of those in `attention`
    )
    # builds a custom attention from the layer and the call; None falls back to the original
    scores: Callable[[Any, Mapping[str, Any]], Attend | None] | None = None
    also_takes: tuple[str, ...] = ()  # further arguments that scores handles
    adjust: Callable[[Any, Parts], Parts] | None = (
        None  # corrects the parts that were found by name, for a layer
    )
    refuses: Callable[[Any], str | None] | None = None  # why a layer must not be replaced, or None
    result: Callable[[Tensor, Tensor], Any] | None = (
        None  # what the layer returns, from its output and its input
    )
    adaptable: bool = True  # its linear layers may carry adapters or packed weights
    ndim: int = 3  # dimensions of the input, `[B, N, width]` or `[B, height, width, channels]`

    @property
    def name(self) -> str:
        """Lookup key of the layer class."""
        return self.layer if isinstance(self.layer, str) else _full_name(self.layer)

    def own_classes(self, kind: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        """The bypassed classes that exist in the library of a layer class."""
        if not isinstance(self.own, str):
            return self.own
        found = []
        for name in self.own.split():
            holder, _, last = name.rpartition(".")
            try:
                library = import_module(holder) if holder else sys.modules[kind.__module__]
            except ImportError:
                continue
            found.append(getattr(library, last, None))
        return tuple(each for each in found if each is not None)

    def fits(self, kind: type[nn.Module]) -> bool:
        """False if the row is for another version of the library."""
        return not isinstance(self.own, str) or hasattr(
            sys.modules[kind.__module__], self.own.split()[0]
        )

    def crossed(self, name: str) -> str:
        """The name of a part of the cross-attention, from that in the self-attention."""
        return self.cross + name.removeprefix(self.attention.partition(".")[0]) if name else ""

    def _with_crossed(self, *names: str) -> tuple[str, ...]:
        """The names that are set, and those in the cross-attention."""
        names = tuple(name for name in names if name)
        return (*names, *map(self.crossed, names)) if self.cross else names

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer in any form of the family."""
        around = self._with_crossed(*self.qkv, self.proj)
        return *around, *(name for mlp in self.mlps for name in (*mlp.inner, mlp.outer))

    @property
    def joint(self) -> tuple[tuple[str, ...], ...]:
        """Linear layers on one input, computed by one GEMM."""
        if not self.joins or len(self.qkv) < 2:
            return ()
        return (self.qkv, tuple(map(self.crossed, self.qkv[1:]))) if self.cross else (self.qkv,)

    def bypassed(self, kind: type[nn.Module]) -> dict[str, Any]:
        """The parts that are read and not called, with their possible classes."""
        own = self.own_classes(kind)
        dropouts = self._with_crossed(self.weights_p, self.branch_p[0])
        dropouts += tuple(
            name for name in (self.branch_p[1], *(mlp.dropout for mlp in self.mlps)) if name
        )
        norms, drops = self._with_crossed(self.norms[0]), self._with_crossed(self.drop_paths[0])
        norms, drops = (*norms, self.norms[1]), (*drops, *filter(None, self.drop_paths[1:]))
        read = (*self.scales, *self.inner_norms, self.head_size, self.heads)
        names = (*self.linears, *norms, *dropouts, *drops, *read)
        holders = sorted(
            {name[:end] for name in names for end, letter in enumerate(name) if letter == "."}
        )
        kinds: dict[str, Any] = dict.fromkeys(holders, own or _Absent)
        linear = (
            nn.Linear,
            NonDynamicallyQuantizableLinear,
            *((Adaptable,) if self.adaptable else ()),
        )
        kinds |= dict.fromkeys(self.linears, linear)
        own_norms = (each for each in own if issubclass(each, nn.LayerNorm))
        kinds |= dict.fromkeys(norms, (nn.LayerNorm, nn.Identity, *own_norms))
        kinds |= dict.fromkeys(dropouts, (nn.Dropout, nn.Identity))
        return kinds | dict.fromkeys(drops, (nn.Identity, *own))

    def missing(self, layer: nn.Module) -> str | None:
        """The first part that a layer lacks."""
        absent = [name for name in self.qkv if find(layer, name) is None]
        if len(self.qkv) > 3 and len(self.qkv) - len(absent) in (1, 3):
            absent = []
        needed = (*absent, self.proj, *self.norms, self.attention)
        found = next((name for name in needed if find(layer, name) is None), None)
        mlp = self.mlp(layer)
        if found is None and mlp is None:
            return " or ".join(mlp.inner[0] for mlp in self.mlps)
        if found is None and mlp is not None:
            read = (
                self.head_size,
                self.heads,
                self.weights_p,
                *self.branch_p,
                self.chunks,
                mlp.activation,
                mlp.dropout,
            )
            return next(
                (name for name in read if name and reduce(_part, name.split("."), layer) is None),
                None,
            )
        return found

    def unread(self, layer: nn.Module) -> str | None:
        """The first parameter or module that no part covers: the row would not be the layer's whole forward."""
        if self.scores is not None or self.adjust is not None:
            return None
        named = (
            *self.scales,
            *self.inner_norms,
            *self.drop_paths,
            *(mlp.activation for mlp in self.mlps),
        )
        parts = (*self.linears, *self.norms, *filter(None, named))
        read = (*parts, *(f"{part}." for part in parts), "crossattention.")
        # Layers hold dropouts that they do not call.
        leaves = [
            name
            for name, part in layer.named_modules()
            if not part._modules and not isinstance(part, (nn.Identity, nn.Dropout))
        ]
        names = (*(name for name, _ in layer.named_parameters()), *leaves)
        holders = (name for name in names if not name.startswith(read))
        return next(
            (name for name in holders if not any(part.startswith(f"{name}.") for part in parts)),
            None,
        )

    def mlp(self, layer: nn.Module) -> Mlp | None:
        """The MLP form of a layer."""
        forms = self.mlps
        return next(
            (
                mlp
                for mlp in forms
                if all(find(layer, n) is not None for n in (*mlp.inner, mlp.outer))
            ),
            None,
        )

    def parts(self, layer: nn.Module, rotary: Any = None) -> Parts:
        """The parts of a layer, for this call."""
        mlp, proj = self.mlp(layer), cast(Any, find(layer, self.proj))
        assert mlp is not None
        activation = attrgetter(mlp.activation)(layer) if mlp.activation else F.gelu
        inner: Any = [find(layer, name) for name in mlp.inner]
        gelu = is_erf_gelu(activation) and not (
            isinstance(activation, nn.Module) and observed(activation)
        )
        plain = len(inner) == 1 and not mlp.halved and gelu
        norms: Any = tuple(find(layer, name) for name in self.norms)
        drops = tuple(
            partial(_row_scale, find(layer, name) if name else None) for name in self.drop_paths
        )
        turn = partial(_rotate, *rotary or ())
        made = Parts(
            norms=norms,
            projections=tuple(part for name in self.qkv if (part := find(layer, name)) is not None),
            joins=self.joins,
            heads=self._heads(layer, proj),
            proj=proj,
            inner=tuple(inner),
            activation=attrgetter(mlp.activation) if mlp.activation else None,
            fc2=cast(nn.Module, find(layer, mlp.outer)),
            hidden=None if plain else partial(_hidden, inner, activation, mlp.halved),
            gammas=(_scale(layer, self.scales[0]), _scale(layer, self.scales[1])),
            row_scales=drops if any(self.drop_paths) else (),
            attention_p=_dropout_p(layer, self.weights_p),
            hidden_p=_dropout_p(layer, mlp.dropout),
            branch_p=(_dropout_p(layer, self.branch_p[0]), _dropout_p(layer, self.branch_p[1])),
            adapt=None if rotary is None else lambda q, k: (turn(q), turn(k)),
            inner_norms=(
                _inner_norm(layer, self.inner_norms[0]),
                _inner_norm(layer, self.inner_norms[1]),
            ),
        )
        return made if self.adjust is None else self.adjust(layer, made)

    def cross_parts(self, layer: nn.Module) -> Cross:
        """The parts of a layer's cross-attention."""
        qkv: Any = tuple(find(layer, self.crossed(name)) for name in self.qkv)
        proj, norm = (
            cast(Any, find(layer, self.crossed(name))) for name in (self.proj, self.norms[0])
        )
        weights_p, branch_p = (
            _dropout_p(layer, self.crossed(name)) for name in (self.weights_p, self.branch_p[0])
        )
        return Cross(qkv, self._heads(layer, proj), proj, norm, weights_p, branch_p)

    def _heads(self, layer: nn.Module, proj: Any) -> int:
        return (
            attrgetter(self.heads)(layer)
            if self.heads
            else proj.in_features // attrgetter(self.head_size)(layer)
        )


_specs: dict[str, tuple[LayerSpec, ...]] = {}


def register(*specs: LayerSpec) -> None:
    """Register families of layers with `accelerate`.

    Raises:
        InputError: a family without a layer name or without an MLP, or of an unknown order.
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
        others = (other for other in _specs.get(spec.name, ()) if other.own != spec.own)
        _specs[spec.name] = (spec, *others)
    spec_of.cache_clear()


def registered() -> tuple[LayerSpec, ...]:
    """All families, in order of registration."""
    return tuple(row for rows in _specs.values() for row in rows)


@cache
def spec_of(kind: type[nn.Module]) -> LayerSpec | None:
    """The row of a layer class, or None."""
    rows = _specs.get(_full_name(kind)) or _specs.get(short_name(kind), ())
    return next((row for row in rows if row.fits(kind)), rows[-1] if rows else None)


def _full_name(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class FusedLayer(CalledByName):
    """The fused form of every layer with a spec: linear layers, activation, residual and norm fused."""

    benefit: ClassVar[str] = "linear layers fused with activation, residual and norm"
    layer_spec: ClassVar[LayerSpec]
    layer_arguments: ClassVar[frozenset[str]] = frozenset()
    required: ClassVar[frozenset[str]] = frozenset()  # arguments without a default
    returns_tuple: ClassVar[bool] = False  # the output is a tuple, with room for attention weights

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        named = super().adapted(original)
        names = named["names"]
        spec = cls.__dict__.get("layer_spec") or spec_of(original)
        assert spec is not None
        parameters = [*inspect.signature(original.forward).parameters.values()][1:]
        required = {
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        understood = {
            *names[:1],
            "attention_mask",
            spec.bias,
            spec.rotary,
            *spec.also_takes,
            *WITHOUT_EFFECT,
        }
        return {
            **named,
            **({"layer_order": spec.order} if isinstance(spec.order, str) else {}),
            "layer_spec": spec,
            "bypassed": spec.bypassed(original),
            "joint": spec.joint,
            "layer_arguments": frozenset(understood),
            "required": frozenset(required),
            "returns_tuple": "output_attentions" in names,
        }

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
                f"it has no {missing}, which its row names (its library's version may name it otherwise); register a "
                "LayerSpec with its names"
            )
        absent = next(
            (name for name in (spec.rotary, spec.bias) if name and name not in adapted["names"]),
            None,
        )
        if absent is not None:
            return f"its forward takes no {absent}, as this version of the library makes it inside of the layer"
        if needed := adapted["required"] - adapted["layer_arguments"]:
            return f"its forward requires {', '.join(sorted(needed))}, which its row does not take"
        if (unread := spec.unread(module)) is not None:
            return f"the row does not cover its {unread}"
        if spec.chunks and attrgetter(spec.chunks)(module):
            return f"its feed-forward runs in chunks of {attrgetter(spec.chunks)(module)}; chunk_size 0 is fused"
        norms: list[Any] = [find(module, name) for name in spec.norms]
        if any(isinstance(norm, nn.LayerNorm) and norm.weight is None for norm in norms):
            return f"{spec.norms[0]} has no weight"
        reason = why_not_bypassed(module, adapted["bypassed"])
        return reason if reason or spec.refuses is None else spec.refuses(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        spec, x, attend = self.layer_spec, cast(Any, call.get(self.names[0])), None
        covered = isinstance(x, Tensor) and x.ndim == spec.ndim and x.numel() > 0
        if covered and not has_other_arguments(call, self.layer_arguments) and self.intact():
            attend = self._attention(call)
        rotary = call.get(spec.rotary) if spec.rotary else None
        if spec.rotary and not (
            isinstance(rotary, tuple) and [isinstance(t, Tensor) for t in rotary] == [True, True]
        ):
            attend = None
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
        """The order of a spec with a function; others store theirs on the class."""
        return cast(Callable[[Any], Order], self.layer_spec.order)(self)

    def context(self, device: torch.device) -> Any:
        """Context manager for `run`; yields the settings."""
        behind_sums = self.layer_order == "behind sums"
        return (
            self.settings.own_types(device) if behind_sums else branch_types(self.settings, device)
        )

    def run(
        self,
        x: Tensor,
        attend: Attend,
        settings: Settings,
        rotary: Any = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """The layer on `[B, N, width]` or packed `[T, width]`, matching `attend` and the rotary positions."""
        self.count()
        spec, order = self.layer_spec, self.layer_order
        if memory is None and order != "behind branches" and not hasattr(attend, "windows"):
            plan = cached_plan(
                self, partial(spec.parts, self), x, settings, wide=order == "behind sums"
            )
            if plan is not None:
                return plan.run(
                    x, attend, settings, None if rotary is None else partial(_rotate, *rotary)
                )
        parts = spec.parts(self, rotary)
        if order == "behind sums":
            return post_norm(
                parts,
                x,
                attend,
                settings,
                memory,
                None if memory is None else spec.cross_parts(self),
            )
        return (pre_norm if order == "before" else norm_behind)(parts, x, attend, settings)

    def _attention(self, call: Mapping[str, Any]) -> Attend | None:
        """The attention of a call; None to run the original."""
        spec, mask = self.layer_spec, call.get("attention_mask")
        if spec.scores is not None:
            return spec.scores(self, call)
        implementation = implementation_of(self)
        if implementation not in PLAIN_ATTENTION and not (
            implementation in KERNELS and mask is None
        ):
            return None
        attention = find(self, spec.attention)
        if mask is None and getattr(
            attention, "is_causal", getattr(attention, "is_decoder", False)
        ):
            return None
        return Dense.of(mask, call.get(spec.bias) if spec.bias else None, implementation)


def _part(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


def implementation_of(layer: Any) -> str | None:
    """Name of the attention implementation in a layer of transformers."""
    config = getattr(find(layer, layer.layer_spec.attention), "config", None)
    return getattr(config, "_attn_implementation", None)


def can_run_packed(layers: list[Any]) -> bool:
    """True if all layers can run on packed tokens now, and none has hooks."""
    ready = all(
        isinstance(layer, FusedLayer) and layer.intact() and not observed(layer) for layer in layers
    )
    return ready and bool(layers)


def run_packed(layers: Sequence[Any], x: Tensor, attend: Attend) -> Tensor:
    """Run layers on packed tokens `[T, width]`."""
    with layers[0].context(x.device) as settings:
        for layer in layers:
            x = layer.run(x, attend, settings)
    return x


def _dropout_p(layer: nn.Module, name: str) -> float:
    """Probability of a dropout module, or of a number attribute, in the current mode."""
    if not name:
        return 0.0
    holder, _, last = name.rpartition(".")
    owner: Any = find(layer, holder) if holder else layer
    found = getattr(owner, last)
    if isinstance(found, nn.Module):
        return found.p if isinstance(found, nn.Dropout) and found.training else 0.0
    return found if owner.training else 0.0


def _scale(layer: Any, name: str) -> Tensor | None:
    """A LayerScale; None where a library stores 1, None or an Identity."""
    holder, _, last = name.rpartition(".")
    owner = (find(layer, holder) if holder else layer) if name else None
    found = getattr(owner, last, None)
    return found if isinstance(found, Tensor) else None


def _inner_norm(layer: nn.Module, name: str) -> nn.Module | None:
    found = find(layer, name) if name else None
    return None if isinstance(found, nn.Identity) else found


class _Absent(nn.Module):
    """Placeholder for a class that this version of the library lacks."""


def _hidden(
    inner: list[Any],
    activation: Any,
    halved: bool,
    x: Tensor,
    linear: Callable[[Any, Tensor], Tensor],
) -> Tensor:
    """The hidden layer: `activation(a(x))`, or `activation(a(x)) · b(x)`."""
    first = linear(inner[0], x)
    if halved:
        first, second = first.chunk(2, -1)
        return activation(first) * second
    return activation(first) if len(inner) == 1 else activation(first) * linear(inner[1], x)


def _rotate(cos: Tensor, sin: Tensor, x: Tensor, both: bool = False) -> Tensor:
    """Apply rotary positions to q or k `[..., N, H, D]`, or to both stacked as `[..., N, 2, H, D]`.

    Prefix tokens without a position are unchanged.
    """
    place = x.ndim - (4 if both else 3)
    prefix = x.shape[place] - cos.shape[-2]
    if both:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if not prefix:
        return rotate(x, cos, sin)
    first, rest = x.split((prefix, x.shape[place] - prefix), place)
    return torch.cat((first, rotate(rest, cos, sin)), place)


def _row_scale(drop_path: nn.Module | None, x: Tensor) -> Tensor | None:
    """Stochastic depth as one factor per entry, `[B]`, with the library's random draws; None if inactive."""
    dropped: Any = getattr(drop_path, "drop_prob", None)
    if drop_path is None or not drop_path.training or not dropped:
        return None
    if type(drop_path).__module__.startswith("transformers."):
        draws = torch.rand(x.shape[0], dtype=x.dtype, device=x.device)
        return torch.floor(draws + (1 - dropped)) / (1 - dropped)
    factors = x.new_empty(x.shape[0]).bernoulli_(1 - dropped)
    return (
        factors.div_(1 - dropped)
        if dropped < 1 and getattr(drop_path, "scale_by_keep", True)
        else factors
    )
