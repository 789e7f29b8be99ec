"""Layers of Hugging Face's vision transformers: ViT and DeiT, BEiT and Data2Vec-Vision, and both towers of CLIP."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial, reduce
from operator import add
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from xfm_fast.replace.adapters import Adaptable
from xfm_fast.replace.structure import Attend, Parts
from xfm_fast.replace.swap import (
    CalledByName,
    Rule,
    Settings,
    asks_beyond,
    find,
    observed,
    original_class,
    probability,
    why_not_bypassed,
)
from xfm_fast.replace.vit_block import Bias, PositionTable, PreNormBlock, lacks_parameters

# Ways to the same numbers. Any other is a function that was registered by name, and has to be called.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Arguments that models hand on to their layers and that change no number there. (Hooks take attention weights.)
_WITHOUT_EFFECT = ("output_attentions", "output_hidden_states", "return_dict", "use_cache")
# Arguments that a relative position bias depends on.
_POSITIONS = ("interpolate_pos_encoding", "resolution")


class Names(NamedTuple):
    """The places of a layer's parts."""

    norms: tuple[str, str]
    qkv: tuple[str, str, str]
    proj: str
    fc1: str
    activation: str
    fc2: str
    classes: dict[str, str]
    """Parts that are the library's own, and their classes after the layer's prefix."""
    dropouts: tuple[str, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        return *self.qkv, self.proj, self.fc1, self.fc2


class _Layer(PreNormBlock, CalledByName):
    """The base of the layers.

    Attributes:
        layout: where the parts are, in which they differ.
        returns_tuple: whether the layer returns its output in a tuple, and behind it attention weights if asked.
    """

    layout: ClassVar[Names]
    returns_tuple: ClassVar[bool] = False

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        """The library's own classes, of the family that this layer belongs to."""
        library, prefix = sys.modules[original.__module__], original.__name__.removesuffix("Layer")
        prefix = prefix.removesuffix("Encoder")
        bypassed: dict[str, Any] = dict.fromkeys(cls.layout.norms, nn.LayerNorm)
        bypassed |= dict.fromkeys(cls.layout.linears, (nn.Linear, Adaptable))
        for name, suffixes in cls.layout.classes.items():
            bypassed[name] = tuple(getattr(library, prefix + suffix, _Absent) for suffix in suffixes.split())
        bypassed |= dict.fromkeys(cls.layout.dropouts, nn.Dropout)
        bypassed["drop_path"] = (nn.Identity, getattr(library, f"{prefix}DropPath", _Absent))
        named = super().adapted(original)
        tuples = "output_attentions" in named["names"]
        wrapper = getattr(sys.modules.get("transformers.activations"), "GELUActivation", nn.GELU)
        return {**named, "bypassed": bypassed, "erf_gelus": (nn.GELU, wrapper), "returns_tuple": tuples}

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        missing = [name for name in (*cls.layout.norms, *cls.layout.linears) if find(module, name) is None]
        if missing:
            return f"this version of transformers keeps {missing[0]} elsewhere"
        expected = cls.adapted(original_class(module))["bypassed"]
        return why_not_bypassed(module, expected) or lacks_parameters(module, cls.layout.norms)

    def asks_only_for(self, call: Mapping[str, Any], known: tuple[str, ...]) -> bool:
        """True if a call has no argument beside the known ones that says something, such as masks of heads."""
        weights = self.returns_tuple and call.get("output_attentions")
        return not weights and not asks_beyond(call, (*known, *_WITHOUT_EFFECT))

    def parts(self, heads: int, attention_p: float, branch_p: tuple[float, float] = (0.0, 0.0)) -> Parts:
        """The parts where `layout` says.

        Args:
            heads: of the attention.
            attention_p, branch_p: dropout of the attention weights and at the end of each branch.
        """
        names, layer = self.layout, {name: self.get_submodule(name) for name in self.layout.linears}
        fc1, width = layer[names.fc1], cast(Any, layer[names.qkv[0]]).out_features
        drop = partial(row_scale, find(self, "drop_path"))
        holder, name = names.activation.rsplit(".", 1)
        activation = getattr(self.get_submodule(holder), name)
        return Parts(
            norms=(self.get_submodule(names.norms[0]), self.get_submodule(names.norms[1])),
            projections=tuple(layer[name] for name in names.qkv),
            joins=False,
            heads=heads,
            scale=(width // heads) ** -0.5,
            proj=layer[names.proj],
            fc1=fc1,
            fc2=layer[names.fc2],
            hidden=None if self.is_erf_gelu(names.activation) else lambda x, linear: activation(linear(fc1, x)),
            gammas=(_scale_of(self, "lambda_1"), _scale_of(self, "lambda_2")),
            row_scales=(drop, drop),
            attention_p=attention_p,
            branch_p=branch_p,
        )


class _Absent(nn.Module):
    """Stands for a class that this version of the library lacks, so that nothing is one."""


def _encoder_names(norms: tuple[str, str], attention: str, out: str) -> Names:
    qkv = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    classes = {attention: "Attention SdpaAttention", "mlp": "MLP"}
    return Names(norms, qkv, f"{attention}.{out}", "mlp.fc1", "mlp.activation_fn", "mlp.fc2", classes, ("dropout",))


class HuggingFaceViTLayer(_Layer):
    """`ViTLayer` and `DeiTLayer`; with a relative position bias of its own, or shared as a mask, `BeitLayer`."""

    layout = _encoder_names(("layernorm_before", "layernorm_after"), "attention", "o_proj")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        layer: Any = self
        attention, positions = layer.attention, find(self, "relative_position_bias")
        plain = not asks_beyond(kwargs, (*_POSITIONS, *_WITHOUT_EFFECT))
        if (
            not (plain and _knows(attention) and _dense(attention_mask) and self.takes(hidden_states))
            or (positions is not None and _boolean(attention_mask))
            or (positions is not None and kwargs.get("resolution") is None)
        ):
            return super().forward(hidden_states, attention_mask, **kwargs)
        bias: Bias = attention_mask
        if positions is not None:
            bias = _position_bias(positions, attention_mask, layer.patch_size, hidden_states.shape[1], kwargs)
        attention_p = attention.attention_dropout if attention.training else 0.0
        branch_p = probability(layer.dropout)
        parts = self.parts(attention.num_attention_heads, attention_p, (branch_p, branch_p))
        return self.compute(parts, hidden_states, bias)


class HuggingFaceCLIPLayer(_Layer):
    """`CLIPEncoderLayer` of images and of texts, which are causal: transformers 4 gives the causal mask separately."""

    layout = _encoder_names(("layer_norm1", "layer_norm2"), "self_attn", "out_proj")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        layer: Any = self
        attention, x = layer.self_attn, call["hidden_states"]
        masks = [mask for mask in map(call.get, ("attention_mask", "causal_attention_mask")) if mask is not None]
        known = ("hidden_states", "attention_mask", "causal_attention_mask", "is_causal")
        plain = self.asks_only_for(call, known) and all(_dense(mask) for mask in masks)
        if len(masks) > 1 and any(_boolean(mask) for mask in masks):
            plain = False
        if not (plain and _knows(attention) and self.takes(x)):
            return super().forward(*args, **kwargs)
        # A mask holds the causality too, and the eager function looks at nothing else.
        causal = not masks and attention.config._attn_implementation != "eager"
        out = self.compute(
            self._own_parts(),
            x,
            reduce(add, masks) if masks else None,
            causal=causal and bool(call.get("is_causal")),
        )
        return (out,) if self.returns_tuple else out

    def run(self, x: Tensor, attend: Attend) -> Tensor:
        """The layer on packed tokens `[T, width]`."""
        return self.compute(self._own_parts(), x, packed=attend)

    def _own_parts(self) -> Parts:
        attention: Any = self.get_submodule("self_attn")
        return self.parts(attention.num_heads, attention.dropout if attention.training else 0.0)


class HuggingFaceBertNamedLayer(_Layer):
    """Layers that keep their parts as BERT does: all of these models in transformers 4, Data2Vec-Vision in 5 too."""

    layout = Names(
        ("layernorm_before", "layernorm_after"),
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention.output.dense",
        "intermediate.dense",
        "intermediate.intermediate_act_fn",
        "output.dense",
        {
            "attention": "Attention SdpaAttention",
            "attention.attention": "SelfAttention SdpaSelfAttention",
            "attention.output": "SelfOutput",
            "intermediate": "Intermediate",
            "output": "Output",
        },
        ("attention.attention.dropout", "attention.output.dropout", "output.dropout"),
    )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        layer: Any = self
        attention, x, shared = layer.attention.attention, call["hidden_states"], call.get("relative_position_bias")
        positions = find(attention, "relative_position_bias")
        if (
            not self.asks_only_for(call, (*_POSITIONS, "hidden_states", "relative_position_bias"))
            or not (_knows(attention) and _dense(shared) and self.takes(x))
            or (positions is not None and call.get("resolution") is None)
        ):
            return super().forward(*args, **kwargs)
        bias: Bias = shared
        if positions is not None:
            bias = _position_bias(positions, shared, attention.config.patch_size, x.shape[1], call)
        branch_p = (probability(layer.attention.output.dropout), probability(layer.output.dropout))
        # ViT has the number where BEiT has a module.
        weights_p = attention.dropout_prob if find(attention, "dropout") is None else attention.dropout.p
        parts = self.parts(attention.num_attention_heads, weights_p if attention.training else 0.0, branch_p)
        out = self.compute(parts, x, bias)
        return (out,) if self.returns_tuple else out


def row_scale(drop_path: nn.Module | None, x: Tensor) -> Tensor | None:
    """Stochastic depth as one factor per entry, `[B]`: drawn as transformers draws it."""
    share = getattr(drop_path, "drop_prob", 0.0)
    if drop_path is None or not drop_path.training or not share:
        return None
    return torch.floor(torch.rand(x.shape[0], dtype=x.dtype, device=x.device) + (1 - share)) / (1 - share)


def _position_bias(
    positions: nn.Module, other: Tensor | None, patch: int, tokens: int, call: Mapping[str, Any]
) -> Bias:
    """The relative position bias of a call, with another one added.

    At the resolution of the table, resizing changes nothing. (It takes height for width, so a window has to be square.)
    """
    height, width = call["resolution"]
    window, module = (height // patch, width // patch), positions
    table: Any = module.relative_position_bias_table
    own = PositionTable(table, window)
    alike = window == tuple(module.window_size) and window[0] == window[1]  # pyright: ignore[reportArgumentType]
    if other is None and alike and own.fits(tokens) and not observed(module):
        return own
    bias = module(window, call.get("interpolate_pos_encoding", False), dim_size=tokens)
    return bias if other is None else bias + other


def _scale_of(layer: nn.Module, name: str) -> Tensor | None:
    # Where a configuration has no LayerScale, transformers puts the number 1 or None there.
    scale = getattr(layer, name, None)
    return scale if isinstance(scale, Tensor) else None


def _knows(attention: Any) -> bool:
    # Before transformers had a choice in the configuration, the class of the attention was the choice.
    config = getattr(attention, "config", None)
    return config is None or config._attn_implementation in _ATTENTION


def _dense(mask: Any) -> bool:
    """True if a mask is none, or a tensor with an entry per query and key."""
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)


def _boolean(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.bool


def _rule(form: type[_Layer], classes: str, gain: str) -> Rule:
    names = classes.split()

    def recognises(module: nn.Module) -> bool:
        kind = original_class(module)
        known = kind.__module__.startswith("transformers.models.") and kind.__name__ in names
        return known and find(module, form.layout.qkv[0]) is not None

    return Rule(form.__name__, recognises, form, gain)


_SUMS = "norms, GELU, LayerScale, DropPath and sums in the products"
_BIAS = f"position bias expanded once; {_SUMS}"
RULES: tuple[Rule, ...] = (
    _rule(HuggingFaceViTLayer, "ViTLayer DeiTLayer", _SUMS),
    _rule(HuggingFaceViTLayer, "BeitLayer", _BIAS),
    _rule(HuggingFaceBertNamedLayer, "ViTLayer DeiTLayer", _SUMS),
    _rule(HuggingFaceBertNamedLayer, "BeitLayer Data2VecVisionLayer", _BIAS),
    _rule(HuggingFaceCLIPLayer, "CLIPEncoderLayer", "norms and sums in the products"),
)
