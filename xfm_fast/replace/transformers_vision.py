"""Vision transformers of transformers (Hugging Face) as rows, and the attention of BEiT, CLIP and BLIP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import Any, cast

import torch
from torch import Tensor, nn

from xfm_fast.replace.attention import Attend, Bias, Dense, PositionTable
from xfm_fast.replace.layer import KERNELS, LayerSpec, Mlp, implementation_of, register
from xfm_fast.replace.swap import find, observed
from xfm_fast.replace.windows import swin_attention

# Any other implementation is a registered function that must be called.
_ATTENTION = ("eager", "sdpa", None, *KERNELS)
FC = Mlp(("mlp.fc1",), "mlp.activation_fn", "mlp.fc2")
GATED = Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.act_fn", "mlp.down_proj")
_UP_DOWN = Mlp(("mlp.up_proj",), "mlp.act_fn", "mlp.down_proj")
BERT_MLP = Mlp(("intermediate.dense",), "intermediate.intermediate_act_fn", "output.dense")


def projections(attention: str, names: str = "q_proj k_proj v_proj") -> tuple[str, ...]:
    """Names of the query, key and value layers in an attention module."""
    return tuple(f"{attention}.{name}" for name in names.split())


def own_parts(layer: str, suffixes: str) -> str:
    """Class names that share the prefix of a layer's class."""
    prefix = layer.rpartition(".")[2].removesuffix("Layer").removesuffix("Encoder")
    return " ".join(prefix + suffix for suffix in suffixes.split())


def _mask_of(*masks: Any) -> tuple[bool, Tensor | None]:
    """Whether all masks are dense, and their sum."""
    given = [mask for mask in masks if mask is not None]
    dense = all(isinstance(mask, Tensor) and mask.ndim == 4 for mask in given)
    if not dense or (len(given) > 1 and any(mask.dtype == torch.bool for mask in given)):
        return False, None
    return True, reduce(add, given) if given else None


def _causal_or_masked(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    """CLIP's attention: transformers 4 passes the causal mask separately, 5 may pass only `is_causal`."""
    implementation = implementation_of(layer)
    dense, mask = _mask_of(call.get("attention_mask"), call.get("causal_attention_mask"))
    if not dense or implementation not in _ATTENTION:
        return None
    # A mask includes causality, and eager attention ignores is_causal.
    causal = mask is None and implementation != "eager" and bool(call.get("is_causal"))
    return Dense(bias=mask, causal=causal)


def _unmasked(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    """BLIP's attention, whose mask argument is a head mask."""
    known = implementation_of(layer) in _ATTENTION
    return Dense() if known and call.get("attention_mask") is None else None


def _positioned(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    """BEiT's attention with its own position bias, a shared one passed as a mask, or both."""
    attention: Any = find(layer, layer.layer_spec.attention)
    positions = find(layer, "relative_position_bias") or find(attention, "relative_position_bias")
    dense, shared = _mask_of(call.get("attention_mask"), call.get("relative_position_bias"))
    if not dense or implementation_of(layer) not in _ATTENTION:
        return None
    if positions is None:
        return Dense(bias=shared)
    if call.get("resolution") is None or (shared is not None and shared.dtype == torch.bool):
        return None
    x = cast(Tensor, call["hidden_states"])
    return Dense(bias=_position_bias(positions, shared, attention.config.patch_size, x.shape[1], call))


def _position_bias(
    positions: nn.Module, other: Tensor | None, patch: int, tokens: int, call: Mapping[str, Any]
) -> Bias:
    """The position bias of a call plus another bias; the plain table where no resizing is required."""
    height, width = call["resolution"]
    window, module = (height // patch, width // patch), positions
    table: Any = module.relative_position_bias_table
    own = PositionTable(table, window)
    alike = window == tuple(module.window_size) and window[0] == window[1]  # pyright: ignore[reportArgumentType]
    if other is None and alike and own.fits(tokens) and not observed(module):
        return own
    bias = module(window, call.get("interpolate_pos_encoding", False), dim_size=tokens)
    return bias if other is None else bias + other


def _swin_refusal(layer: Any) -> str | None:
    if not hasattr(layer, "get_attn_mask"):
        return "this version of the library makes the mask of shifted windows elsewhere"
    return "its feed-forward runs in chunks" if getattr(layer, "chunk_size_feed_forward", 0) else None


def _vit(layer: str, **more: Any) -> LayerSpec:
    """A layer with the names of ViT in transformers 5."""
    row: dict[str, Any] = {
        "order": "before",
        "attention": "attention",
        "own": own_parts(layer, "MLP Attention DropPath"),
        "qkv": projections("attention"),
        "proj": "attention.o_proj",
        "norms": ("layernorm_before", "layernorm_after"),
        "mlps": (FC,),
        "head_size": "attention.head_dim",
        "weights_p": "attention.attention_dropout",
        "branch_p": ("dropout", "dropout"),
        "joins": False,
    }
    return LayerSpec(layer=layer, **row | more)


def _bert_named(
    layer: str, weights_p: str = "attention.attention.dropout_prob", own: str = "", **more: Any
) -> LayerSpec:
    """A pre-norm layer with BERT's names: every ViT in transformers 4, and some in 5."""
    parts = "Intermediate Output Attention SelfAttention SdpaSelfAttention SelfOutput DropPath"
    row: dict[str, Any] = {
        "attention": "attention.attention",
        "own": f"{own_parts(layer, parts)} {own}",
        "qkv": projections("attention.attention", "query key value"),
        "proj": "attention.output.dense",
        "mlps": (BERT_MLP,),
        "head_size": "attention.attention.attention_head_size",
        "weights_p": weights_p,
        "branch_p": ("attention.output.dropout", "output.dropout"),
    }
    return _vit(layer, **row | more)


def _clip(layer: str, **more: Any) -> LayerSpec:
    """A layer with CLIP's names."""
    row: dict[str, Any] = {
        "attention": "self_attn",
        "own": own_parts(layer, "MLP Attention SdpaAttention"),
        "qkv": projections("self_attn"),
        "proj": "self_attn.out_proj",
        "norms": ("layer_norm1", "layer_norm2"),
        "head_size": "self_attn.head_dim",
        "weights_p": "self_attn.dropout",
        "branch_p": ("", ""),
    }
    return _vit(layer, **row | more)


def _blip(layer: str, weights_p: str) -> LayerSpec:
    """A BLIP vision layer: CLIP's names with a joint qkv projection."""
    joint: dict[str, Any] = {"qkv": ("self_attn.qkv",), "proj": "self_attn.projection", "joins": True}
    return _clip(layer, weights_p=f"self_attn.{weights_p}", scores=_unmasked, **joint)


def _dino(layer: str, mlps: tuple[Mlp, ...] = (FC, GATED), **more: Any) -> LayerSpec:
    """A layer with DINOv2's names."""
    row: dict[str, Any] = {
        "own": own_parts(layer, "MLP Attention LayerScale SwiGLUFFN GatedMLP DropPath"),
        "norms": ("norm1", "norm2"),
        "branch_p": ("", ""),
        "scales": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
        "drop_paths": ("drop_path", "drop_path"),
    }
    return _vit(layer, mlps=mlps, **row | more)


_DROPS: dict[str, Any] = {"drop_paths": ("drop_path", "drop_path")}
_BEIT: dict[str, Any] = {
    "scales": ("lambda_1", "lambda_2"),
    "scores": _positioned,
    "also_takes": ("relative_position_bias", "resolution", "interpolate_pos_encoding"),
    **_DROPS,
}
_CAUSAL: dict[str, Any] = {"scores": _causal_or_masked, "also_takes": ("causal_attention_mask", "is_causal")}
_SWIN: dict[str, Any] = {
    "scores": swin_attention,
    "also_takes": ("input_dimensions", "always_partition"),
    "refuses": _swin_refusal,
    "result": lambda out, x: (out, None),
}
_MODULE = "attention.attention.dropout"
_PLAIN = (
    *("vit.ViTLayer", "deit.DeiTLayer", "vit_msn.ViTMSNLayer", "ijepa.IJepaLayer", "vit_mae.ViTMAELayer"),
    *("audio_spectrogram_transformer.ASTLayer", "vivit.VivitLayer"),
)
register(
    *(_vit(layer) for layer in _PLAIN),
    *(_bert_named(layer) for layer in (*_PLAIN, "videomae.VideoMAELayer", "yolos.YolosLayer")),
    _bert_named("dpt.DPTViTLayer", own="DPTSelfAttention"),
    _bert_named("vilt.ViltLayer", _MODULE),
    _vit("pixio.PixioLayer", **_DROPS),
    _vit("beit.BeitLayer", **_BEIT),
    _bert_named("beit.BeitLayer", _MODULE, **_BEIT),
    _bert_named("data2vec.Data2VecVisionLayer", _MODULE, **_BEIT),
    _clip("clip.CLIPEncoderLayer", **_CAUSAL),
    _clip("owlvit.OwlViTEncoderLayer", **_CAUSAL),
    _clip("owlv2.Owlv2EncoderLayer", **_CAUSAL),
    _clip("siglip.SiglipEncoderLayer"),
    _clip("siglip2.Siglip2EncoderLayer"),
    _blip("blip.BlipEncoderLayer", "dropout"),
    _blip("blip_2.Blip2EncoderLayer", "attention_dropout"),
    _blip("instructblip.InstructBlipEncoderLayer", "attention_dropout"),
    _dino("dinov2.Dinov2Layer"),
    _dino("dinov2_with_registers.Dinov2WithRegistersLayer"),
    _dino(
        "dinov3_vit.DINOv3ViTLayer",
        (GATED, _UP_DOWN),
        weights_p="attention.dropout",
        rotary="position_embeddings",
    ),
    _vit("swin.SwinLayer", drop_paths=("drop_path", ""), **_SWIN),
    _bert_named(
        "swinv2.Swinv2Layer",
        weights_p="attention.self.dropout",
        order="behind branches",
        attention="attention.self",
        qkv=projections("attention.self", "query key value"),
        head_size="attention.self.attention_head_size",
        joins=True,
        **_DROPS,
        **_SWIN,
    ),
)
