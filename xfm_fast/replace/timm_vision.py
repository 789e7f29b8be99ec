"""Specs of blocks of timm (ViT, DeiT, BEiT, EVA, Swin, relative positions) and open_clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from xfm_fast.models.vision import qkv_bias
from xfm_fast.plans.orders import Formula, LayerModules
from xfm_fast.replace.adapters import is_adapted
from xfm_fast.replace.attention import (
    Attend,
    Bias,
    Dense,
    PositionTable,
    WindowAttention,
    cached_bias,
    continuous_bias,
    windows_of,
)
from xfm_fast.replace.layer import LayerSpec, Mlp, register
from xfm_fast.replace.structure import run_module
from xfm_fast.replace.swap import Settings, find

_OWN = "Mlp GluMlp SwiGLU DropPath LayerScale LayerNorm"


def _block(layer: str, attention: str, **more: Any) -> LayerSpec:
    """Build a spec with the names of timm's ViT; `attention` names classes, `more` overrides fields."""
    own_classes = " ".join(f"timm.layers.{name}" for name in _OWN.split())
    fields: dict[str, Any] = {
        "order": "before",
        "attention": "attn",
        "own": f"{attention} {own_classes} torch.nn.Identity",
        "qkv": ("attn.qkv",),
        "proj": "attn.proj",
        "norms": ("norm1", "norm2"),
        "mlps": tuple(
            Mlp(inner, "mlp.act", "mlp.fc2", dropout="mlp.drop1")
            for inner in (("mlp.fc1_g", "mlp.fc1_x"), ("mlp.fc1",))
        ),
        "heads": "attn.num_heads",
        "weights_p": "attn.attn_drop",
        "branch_p": ("attn.proj_drop", "mlp.drop2"),
        "scales": ("ls1.gamma", "ls2.gamma"),
        "drop_paths": ("drop_path1", "drop_path2"),
        "inner_norms": ("attn.norm", "mlp.norm"),
        "scores": _normalised,
        "adjust": _adjust,
        "refuses": _refusal,
    }
    return LayerSpec(layer=f"timm.models.{layer}", **fields | more)


def _refusal(block: Any) -> str | None:
    if find(block, "attn.gate") is not None:
        return "attn has a gate on its output"
    if getattr(block.attn, "num_kv_groups", 1) > 1:
        return "attn shares keys and values among query heads"
    return None


def _adjust(block: Any, modules: LayerModules) -> LayerModules:
    """Add biases stored outside `attn.qkv`, and gates whose factors one linear layer computes."""
    attn, mlp = block.attn, block.mlp
    if hasattr(mlp, "gate_last"):

        def gated(x: Tensor, linear: Callable[[Any, Tensor], Tensor]) -> Tensor:
            first, second = linear(mlp.fc1, x).chunk(2, dim=mlp.chunk_dim)
            return first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second

        formula = modules.formula
        if formula is not None:
            last_axis = mlp.chunk_dim == -1
            formula = Formula(formula.activation, True, mlp.gate_last) if last_axis else None
        modules = modules._replace(hidden=gated, formula=formula)
    if len(modules.projections) == 3:
        return modules
    if getattr(attn, "q_bias", None) is None:
        return modules
    biases = attn.q_bias, attn.k_bias, attn.v_bias
    if is_adapted(attn.qkv) and not attn.qkv_bias_separate:
        # timm reads the weight here and does not call the layer, so adapters have no effect.
        return modules._replace(projections=(), qkv=(attn.qkv.weight, qkv_bias(*biases)))
    return modules._replace(qkv_biases=biases)


def _normalised(block: Any, call: Mapping[str, Any], bias: Bias = None) -> Attend:
    """Return attention with the norms and the rotation of queries and keys, if any."""
    attn, rope, dense = block.attn, call.get("rope"), Dense(bias=bias)
    q_norm, k_norm = (cast(Any, find(attn, name)) for name in ("q_norm", "k_norm"))
    has_norms = not isinstance(q_norm, nn.Identity | None)
    if not has_norms and rope is None:
        return dense

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        if has_norms:
            q, k = run_module(q_norm, q), run_module(k_norm, k)
        if rope is not None:
            q, k = _rotated(attn, q, rope), _rotated(attn, k, rope)
        return dense(q.to(v.dtype), k.to(v.dtype), v, dropout_p, settings)

    return attend


def _rotated(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    prefix, half = getattr(attn, "num_prefix_tokens", 0), getattr(attn, "rotate_half", False)
    tokens = apply_rot_embed_cat(x[:, prefix:].transpose(1, 2), rope, half=half).transpose(1, 2)
    return torch.cat([x[:, :prefix], tokens.to(x.dtype)], dim=1)


def _beit_attention(block: Any, call: Mapping[str, Any]) -> Attend | None:
    """Return BEiT's attention, whose position bias is the layer's own, shared, or both."""
    attn, shared = block.attn, call.get("shared_rel_pos_bias")
    if attn.relative_position_bias_table is None:
        return Dense(bias=shared)
    table = PositionTable(attn.relative_position_bias_table, tuple(attn.window_size))
    if not table.fits(call["x"].shape[1]):
        return None
    return Dense(bias=table if shared is None else attn._get_rel_pos_bias() + shared)


def _relative_attention(block: Any, call: Mapping[str, Any]) -> Attend:
    positions, bias = block.attn.rel_pos, call.get("shared_rel_pos")
    if positions is not None:
        sources, get_bias = positions.parameters(), positions.get_bias
        bias = cached_bias("relative", positions, sources, get_bias, lambda: None)
    return _normalised(block, call, bias)


def _swin_attention(block: Any, call: Mapping[str, Any]) -> WindowAttention:
    """Return the attention of `SwinTransformerBlock` and `SwinTransformerV2Block` of timm."""
    attn, x = block.attn, call["x"]
    size, window, shift = tuple(x.shape[1:3]), tuple(block.window_size), tuple(block.shift_size)
    padded = tuple(side + -side % step for side, step in zip(size, window, strict=True))
    name = f"{padded} {window} {shift}"
    windows = windows_of(size, window, shift, x, fill_first=False)

    def mask() -> Tensor | None:
        if getattr(block, "dynamic_mask", False):
            return block.get_attn_mask(x.new_empty(1, *padded, 1))
        return block.attn_mask

    if hasattr(attn, "cpb_mlp"):
        bias = continuous_bias(name, attn, attn.cpb_mlp, mask)
        return WindowAttention(windows, bias, attn.logit_scale)
    sources, get_bias = (attn.relative_position_bias_table,), attn._get_rel_pos_bias
    return WindowAttention(
        windows, partial(cached_bias, name, nn.Identity(), sources, get_bias, mask)
    )


def _clip_refusal(block: Any) -> str | None:
    attn = block.attn
    if find(block, "ln_1_kv") is not None:
        return "it attends to another sequence (ln_1_kv); only its attention is fused"
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
        return "attn has separate projections, or extra keys"
    return None if attn.batch_first else "attn is sequence-first; batch_first=True is required"


def _additive(block: Any, call: Mapping[str, Any]) -> Attend | None:
    """Return open_clip's attention, without a mask or with an additive one."""
    mask = call.get("attn_mask")
    if mask is None:
        return Dense()
    if not isinstance(mask, Tensor) or not mask.is_floating_point() or mask.ndim not in (2, 3):
        return None
    return Dense(bias=mask.unflatten(0, (-1, block.attn.num_heads)) if mask.ndim == 3 else mask)


_GAMMAS: dict[str, Any] = {"scales": ("gamma_1", "gamma_2")}
_RELATIVE: dict[str, Any] = {"scores": _relative_attention, "also_takes": ("shared_rel_pos",)}
_WINDOWS: dict[str, Any] = {
    "scores": _swin_attention,
    "ndim": 4,
    "result": lambda out, x: out.unflatten(1, x.shape[1:3]),
    "scales": ("", ""),
}
register(
    _block("vision_transformer.Block", "Attention"),
    _block(
        "beit.Block",
        "Attention",
        scores=_beit_attention,
        also_takes=("shared_rel_pos_bias",),
        **_GAMMAS,
    ),
    _block(
        "eva.EvaBlock",
        "EvaAttention AttentionRope",
        qkv=("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj"),
        joins=False,
        also_takes=("rope",),
        **_GAMMAS,
    ),
    _block("vision_transformer_relpos.RelPosBlock", "RelPosAttention", **_RELATIVE),
    _block(
        "vision_transformer_relpos.ResPostRelPosBlock",
        "RelPosAttention",
        order="behind branches",
        **_RELATIVE,
    ),
    _block("swin_transformer.SwinTransformerBlock", "WindowAttention", **_WINDOWS),
    _block(
        "swin_transformer_v2.SwinTransformerV2Block",
        "WindowAttention",
        order="behind branches",
        **_WINDOWS,
    ),
    LayerSpec(
        layer="open_clip.transformer.ResidualAttentionBlock",
        order="before",
        attention="attn",
        own="LayerScale LayerNorm torch.nn.Identity torch.nn.MultiheadAttention torch.nn.Sequential",
        proj="attn.out_proj",
        norms=("ln_1", "ln_2"),
        mlps=(Mlp(("mlp.c_fc",), "mlp.gelu", "mlp.c_proj"),),
        heads="attn.num_heads",
        weights_p="attn.dropout",
        scales=("ls_1.gamma", "ls_2.gamma"),
        scores=_additive,
        also_takes=("attn_mask",),
        adjust=lambda block, modules: modules._replace(
            qkv=(block.attn.in_proj_weight, block.attn.in_proj_bias)
        ),
        refuses=_clip_refusal,
        # After the last block the tower multiplies by a parameter in its storage dtype.
        result=lambda out, x: out.to(x.dtype),
    ),
)
