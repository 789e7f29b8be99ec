"""Transformer layers of any library, matched by a table of names, and their single fused form.

A `Family` names a layer's projections, norms and MLP and their order. A new family is a table row
(`huggingface_families` has those of transformers) or a call of `register`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.replace.adapters import Adaptable
from xfm_fast.replace.cached_plan import cached_plan, forget
from xfm_fast.replace.masks import Dense
from xfm_fast.replace.structure import (
    Attend,
    Parts,
    branch_types,
    norm_behind,
    post_norm,
    pre_norm,
    rotate,
)
from xfm_fast.replace.swap import (
    CalledByName,
    Rule,
    Settings,
    find,
    has_other_arguments,
    is_erf_gelu,
    observed,
    original_class,
    why_not_bypassed,
)

# Arguments that do not affect a layer's numbers; requests for attention weights are handled elsewhere.
_WITHOUT_EFFECT = (
    "position_ids",
    "use_cache",
    "return_dict",
    "cache_position",
    "num_items_in_batch",
    "output_hidden_states",
)
_PLAIN = ("eager", "sdpa", "xfm_fast", None)
_KERNELS = ("flash_attention_2", "flash_attention_3", "flex_attention")


class Mlp(NamedTuple):
    """One form of a layer's MLP.

    Attributes:
        inner: linear layer into the hidden layer; two for a gate, `activation(first) · second`.
        activation: module or function; empty for erf GELU in a layer without an activation module.
        outer: linear layer out of the hidden layer.
        halved: one linear layer computes both factors of the gate, the activated one first.
        dropout: dropout of the hidden layer.
    """

    inner: tuple[str, ...]
    activation: str
    outer: str
    halved: bool = False
    dropout: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family of layers keeps its parts: dotted names relative to the layer.

    Attributes:
        layer: class of the layer, or `package.Class` for one of `transformers.models.package`. With several rows for
            one layer (library versions), the row whose first own class exists in the library applies.
        order: norms before the branches, after the sums, or after the branches and before the sums.
        attention: the attention module, whose config selects the implementation.
        own: classes that are bypassed besides the layer's, or their names in the layer's file.
        qkv: projections to queries, keys and values, or one to all three.
        proj: projection after the attention.
        norms: of the attention and of the MLP.
        mlps: possible forms of the MLP; the first that a layer has is used.
        head_size: width of an attention head.
        weights_p: dropout of the attention weights: a module, or a number that applies in training.
        branch_p: dropout modules at the end of the branches; empty for none.
        scales: LayerScale of each branch.
        drop_paths: stochastic depth of each branch.
        bias: argument with a bias `[B, H, N, N]` that is added to the scaled scores.
        rotary: argument with cos and sin of rotary positions.
        chunks: attribute that runs the feed-forward in chunks.
        joins: compute queries, keys and values in one GEMM.
        pair: the layer returns its output and None.
        scores: builds a custom attention from the layer and the call; None falls back to the original.
        also_takes: further arguments that scores handles.
        windowed: attends within image windows; see `window_block`.
    """

    layer: str | type[nn.Module]
    order: Literal["before", "behind sums", "behind branches"]
    attention: str
    own: str | tuple[type[nn.Module], ...]
    qkv: tuple[str, ...]
    proj: str
    norms: tuple[str, str]
    mlps: tuple[Mlp, ...]
    head_size: str
    weights_p: str = ""
    branch_p: tuple[str, str] = ("", "")
    scales: tuple[str, str] = ("", "")
    drop_paths: tuple[str, str] = ("", "")
    bias: str = ""
    rotary: str = ""
    chunks: str = ""
    joins: bool = True
    pair: bool = False
    scores: Callable[[Any, Mapping[str, Any]], Attend | None] | None = None
    also_takes: tuple[str, ...] = ()
    windowed: bool = False

    @property
    def name(self) -> str:
        """Lookup key of the layer class."""
        return self.layer if isinstance(self.layer, str) else _full_name(self.layer)

    def own_classes(self, kind: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        """The bypassed classes that exist in the library of a layer class."""
        if not isinstance(self.own, str):
            return self.own
        library = sys.modules[kind.__module__]
        return tuple(found for name in self.own.split() if (found := getattr(library, name, None)) is not None)

    def fits(self, kind: type[nn.Module]) -> bool:
        """False if the row is for another version of the library."""
        return not isinstance(self.own, str) or hasattr(sys.modules[kind.__module__], self.own.split()[0])

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer in any form of the family."""
        return *self.qkv, self.proj, *(name for mlp in self.mlps for name in (*mlp.inner, mlp.outer))

    @property
    def dropouts(self) -> tuple[str, ...]:
        return tuple(n for n in (*self.branch_p, *(mlp.dropout for mlp in self.mlps), self.weights_p) if n)

    def missing(self, layer: nn.Module) -> str | None:
        """The first part that a layer lacks."""
        needed = (*self.qkv, self.proj, *self.norms)
        absent = next((name for name in needed if find(layer, name) is None), None)
        if absent is None and self.mlp(layer) is None:
            return " or ".join(mlp.inner[0] for mlp in self.mlps)
        return absent

    def unread(self, layer: nn.Module) -> str | None:
        """The first parameter that no part covers: the row would not be the layer's whole forward."""
        if self.scores is not None or self.windowed:
            return None
        parts = (*self.linears, *self.norms, *(name for name in self.scales if name))
        read = (*parts, *(f"{part}." for part in parts), "crossattention.")
        names = (name for name, _ in layer.named_parameters())
        return next((name for name in names if name not in parts and not name.startswith(read)), None)

    def mlp(self, layer: nn.Module) -> Mlp | None:
        """The MLP form of a layer."""
        return next(
            (mlp for mlp in self.mlps if all(find(layer, n) is not None for n in (*mlp.inner, mlp.outer))), None
        )

    def holders(self) -> Iterator[str]:
        """Modules between the layer and its parts, which are bypassed."""
        names = (*self.linears, *self.norms, *self.dropouts, *self.scales, self.head_size)
        paths = {name[:end] for name in names for end, letter in enumerate(name) if letter == "."}
        yield from sorted(paths)


_families: dict[str, tuple[Family, ...]] = {}


def register(*families: Family) -> None:
    """Register families of layers with `accelerate`.

    Raises:
        InputError: a family without a layer name or without an MLP.
    """
    for family in families:
        if "." not in family.name or not family.mlps:
            raise InputError(
                f"a family needs a layer's class or 'package.Class' and at least one Mlp, not {family.layer!r} with "
                f"{family.mlps!r}"
            )
        others = (other for other in _families.get(family.name, ()) if other.own != family.own)
        _families[family.name] = (family, *others)
    family_of.cache_clear()


def registered() -> tuple[Family, ...]:
    """All families, in order of registration."""
    return tuple(row for rows in _families.values() for row in rows)


@cache
def family_of(kind: type[nn.Module]) -> Family | None:
    """The family of a layer class, or None."""
    rows = _families.get(_full_name(kind)) or _families.get(short_name(kind), ())
    return next((row for row in rows if row.fits(kind)), rows[-1] if rows else None)


def _full_name(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def short_name(kind: type[nn.Module]) -> str:
    """`package.Class` of a class of transformers; empty for others."""
    package = kind.__module__.split(".")
    known = package[:2] == ["transformers", "models"] and len(package) > 2
    return f"{package[2]}.{kind.__name__}" if known else ""


class FamilyLayer(CalledByName):
    """A layer of a registered family: linear layers, activation, residual and norm fused."""

    layer_family: ClassVar[Family]
    returns_tuple: ClassVar[bool] = False  # the output is a tuple, with room for attention weights

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        family = family_of(original)
        assert family is not None
        own = family.own_classes(original)
        bypassed: dict[str, Any] = dict.fromkeys(family.holders(), own or _Absent)
        bypassed |= dict.fromkeys(family.linears, (nn.Linear, Adaptable))
        bypassed |= dict.fromkeys(family.norms, (nn.LayerNorm, nn.Identity))
        bypassed |= dict.fromkeys(family.dropouts, (nn.Dropout, nn.Identity))
        bypassed |= {name: (nn.Identity, *own) for name in family.drop_paths if name}
        named = super().adapted(original)
        returns_tuple = "output_attentions" in named["names"] or family.pair
        joint = (tuple(family.qkv),) if family.joins and len(family.qkv) > 1 else ()
        made = {"layer_family": family, "bypassed": bypassed, "joint": joint, "returns_tuple": returns_tuple}
        return {**named, **made}

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        adapted = cls.adapted(original_class(module))
        family: Family = adapted["layer_family"]
        missing = family.missing(module)
        if missing is not None:
            return f"this version of the library keeps {missing} elsewhere; register a Family with its names"
        if family.rotary and family.rotary not in adapted["names"]:
            return f"this version of the library makes {family.rotary} inside of the layer"
        if (unread := family.unread(module)) is not None:
            return f"the row does not cover its {unread}"
        if family.chunks and attrgetter(family.chunks)(module):
            return f"its feed-forward runs in chunks of {attrgetter(family.chunks)(module)}; chunk_size 0 is fused"
        norms: list[Any] = [find(module, name) for name in family.norms]
        if any(isinstance(norm, nn.LayerNorm) and norm.weight is None for norm in norms):
            return f"{family.norms[0]} has no weight"
        return why_not_bypassed(module, adapted["bypassed"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        family, x = self.layer_family, cast(Any, call.get(self.names[0]))
        understood = (self.names[0], "attention_mask", family.bias, family.rotary, *family.also_takes, *_WITHOUT_EFFECT)
        covered = isinstance(x, Tensor) and x.ndim == 3 and x.numel() > 0 and not has_other_arguments(call, understood)
        attend = self._attention(call) if covered and self.intact() else None
        rotary = call.get(family.rotary) if family.rotary else None
        if attend is None or (family.rotary and not _are_rotary(rotary)):
            return super().forward(*args, **kwargs)
        with self.context(x.device) as settings:
            out = self.run(x, attend, settings, rotary)
        if family.pair:
            return out, None
        return (out,) if self.returns_tuple else out

    def release(self) -> None:
        forget(self)
        super().release()

    def context(self, device: torch.device) -> Any:
        """Context manager for `run`; yields the settings."""
        if self.layer_family.order == "behind sums":
            return self.settings.own_types(device)
        return branch_types(self.settings, device)

    def run(self, x: Tensor, attend: Attend, settings: Settings, rotary: Any = None) -> Tensor:
        """The layer on `[B, N, width]` or packed `[T, width]`, matching `attend` and the rotary positions."""
        order = self.layer_family.order
        if order != "behind branches":
            plan = cached_plan(self, partial(self._parts, None), x, settings, wide=order == "behind sums")
            if plan is not None:
                return plan.run(x, attend, settings, None if rotary is None else partial(_rotate, *rotary))
        return self.compute(self._parts(rotary), attend, x, settings)

    def compute(self, parts: Parts, attend: Attend, x: Tensor, settings: Settings) -> Tensor:
        return _ORDERS[self.layer_family.order](parts, x, attend, settings)

    def _attention(self, call: Mapping[str, Any]) -> Attend | None:
        """The attention of a call; None to run the original."""
        family, mask = self.layer_family, call.get("attention_mask")
        if family.scores is not None:
            return family.scores(self, call)
        implementation = implementation_of(self)
        if implementation not in _PLAIN and not (implementation in _KERNELS and mask is None):
            return None
        attention = find(self, family.attention)
        if mask is None and getattr(attention, "is_causal", getattr(attention, "is_decoder", False)):
            return None
        bias = call.get(family.bias) if family.bias else None
        return Dense.of(mask, bias, implementation)

    def _parts(self, rotary: Any) -> Parts:
        family, mlp = self.layer_family, self.layer_family.mlp(self)
        assert mlp is not None
        layers: tuple[Any, ...] = tuple(find(self, name) for name in family.qkv)
        head_size = attrgetter(family.head_size)(self)
        proj: Any = find(self, family.proj)
        activation = attrgetter(mlp.activation)(self) if mlp.activation else F.gelu
        inner = [find(self, name) for name in mlp.inner]
        gelu = is_erf_gelu(activation) and not (isinstance(activation, nn.Module) and observed(activation))
        plain = len(inner) == 1 and not mlp.halved and gelu
        drops = tuple(partial(_row_scale, find(self, name) if name else None) for name in family.drop_paths)
        return Parts(
            norms=tuple(find(self, name) for name in family.norms),  # pyright: ignore[reportArgumentType]
            projections=layers,
            joins=family.joins,
            heads=proj.in_features // head_size,
            scale=head_size**-0.5,
            proj=proj,
            fc1=inner[0],
            inner=tuple(inner),  # pyright: ignore[reportArgumentType]
            activation=attrgetter(mlp.activation) if mlp.activation else None,
            fc2=find(self, mlp.outer),  # pyright: ignore[reportArgumentType]
            hidden=None if plain else partial(_hidden, inner, activation, mlp.halved),
            gammas=(_scale(self, family.scales[0]), _scale(self, family.scales[1])),
            row_scales=drops if any(family.drop_paths) else (),
            attention_p=self._dropout_p(family.weights_p),
            hidden_p=self._dropout_p(mlp.dropout),
            branch_p=(self._dropout_p(family.branch_p[0]), self._dropout_p(family.branch_p[1])),
            adapt=None if rotary is None else partial(_rotate_both, *rotary),
        )

    def _dropout_p(self, name: str) -> float:
        """Probability of a dropout module, or of a number attribute, in the current mode."""
        if not name:
            return 0.0
        holder, _, last = name.rpartition(".")
        owner: Any = find(self, holder) if holder else self
        found = getattr(owner, last)
        if isinstance(found, nn.Module):
            return found.p if isinstance(found, nn.Dropout) and found.training else 0.0
        return found if owner.training else 0.0


def implementation_of(layer: FamilyLayer) -> str | None:
    """Name of the attention implementation in a layer of transformers."""
    config = getattr(find(layer, layer.layer_family.attention), "config", None)
    return getattr(config, "_attn_implementation", None)


def run_packed(layer: FamilyLayer, attend: Attend, rotary: Any, x: Tensor) -> Tensor:
    """Run a layer on packed tokens `[T, width]`."""
    with layer.context(x.device) as settings:
        return layer.run(x, attend, settings, rotary)


def _scale(layer: nn.Module, name: str) -> Tensor | None:
    """A LayerScale; None where transformers stores 1 or None."""
    scale = attrgetter(name)(layer) if name else None
    return scale if isinstance(scale, Tensor) else None


class _Absent(nn.Module):
    """Placeholder for a class that this version of the library lacks."""


_ORDERS = {"before": pre_norm, "behind sums": post_norm, "behind branches": norm_behind}


def _hidden(
    inner: list[Any], activation: Any, halved: bool, x: Tensor, linear: Callable[[Any, Tensor], Tensor]
) -> Tensor:
    """The hidden layer: `activation(a(x))`, or `activation(a(x)) · b(x)`."""
    first = linear(inner[0], x)
    if halved:
        first, second = first.chunk(2, -1)
        return activation(first) * second
    return activation(first) if len(inner) == 1 else activation(first) * linear(inner[1], x)


def _rotate_both(cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Apply rotary positions to queries and keys `[..., N, H, D]`; prefix tokens without a position are unchanged."""
    return _rotate(cos, sin, q, False), _rotate(cos, sin, k, False)


def _rotate(cos: Tensor, sin: Tensor, x: Tensor, both: bool) -> Tensor:
    """The same for one tensor, or for q and k stacked as `[..., N, 2, H, D]`."""
    place = x.ndim - (4 if both else 3)
    prefix = x.shape[place] - cos.shape[-2]
    if both:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if not prefix:
        return rotate(x, cos, sin)
    first, rest = x.split((prefix, x.shape[place] - prefix), place)
    return torch.cat((first, rotate(rest, cos, sin)), place)


def _are_rotary(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(t, Tensor) for t in given)


def _row_scale(drop_path: nn.Module | None, x: Tensor) -> Tensor | None:
    """Stochastic depth as one factor per entry, `[B]`, with the random draws of transformers."""
    share = getattr(drop_path, "drop_prob", 0.0)
    if drop_path is None or not drop_path.training or not share:
        return None
    return torch.floor(torch.rand(x.shape[0], dtype=x.dtype, device=x.device) + (1 - share)) / (1 - share)


def _is_layer(module: nn.Module) -> bool:
    family = family_of(original_class(module))
    return family is not None and not family.windowed


RULES: tuple[Rule, ...] = (Rule("FamilyLayer", _is_layer, FamilyLayer, "products, activation, sums and norms fused"),)
