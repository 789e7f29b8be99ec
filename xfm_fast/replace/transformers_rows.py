"""Specs of layers and encoders of transformers (Hugging Face), and custom attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial, reduce
from operator import add
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels.caching import cached
from xfm_fast.replace.attention import (
    Attend,
    Dense,
    Padded,
    PositionTable,
    WindowAttention,
    add_mask,
    attention,
    cached_bias,
    continuous_bias,
    covers_mask,
    windows_of,
)
from xfm_fast.replace.layer import (
    KERNELS,
    PLAIN_ATTENTION,
    LayerSpec,
    Mlp,
    implementation_of,
    register,
)
from xfm_fast.replace.structure import apply_linear
from xfm_fast.replace.swap import Settings, find, observed, original_class
from xfm_fast.replace.unpadded import IGNORE_MEMORY_MASK, Encoder, padded_memory, register_encoder

Template = dict[str, Any]
# Any other implementation of a vision model's attention is a registered function that must be
# called.
_ATTENTION = (*PLAIN_ATTENTION, *KERNELS)


def build_spec(layer: str, *templates: Template, **more: Any) -> LayerSpec:
    """Build a LayerSpec; later templates override earlier ones.

    In a template, `own` has suffixes of the layer's class prefix, `own_names` whole class names,
    `qkv` names in the attention module.
    """
    fields: Template = {}
    for template in (*templates, more):
        fields |= template
    class_names = fields.pop("own_names", "")
    if isinstance(fields["own"], str):
        prefix = layer.rpartition(".")[2].removesuffix("Layer").removesuffix("Encoder")
        prefixed = (prefix + suffix for suffix in fields["own"].split())
        fields["own"] = " ".join((*prefixed, class_names))
    fields["qkv"] = tuple(f"{fields['attention']}.{name}" for name in fields["qkv"].split())
    return LayerSpec(layer=layer, **fields)


def _bert_refusal(layer: Any) -> str | None:
    attention = layer.attention.self
    positions = getattr(attention, "position_embedding_type", "absolute")
    if positions not in ("absolute", None):
        return f"its attention has {positions} positions"
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if implementation not in PLAIN_ATTENTION:
        return f"its attention implementation is {implementation}"
    names = inspect.signature(original_class(layer).forward).parameters
    if "past_key_value" in names and getattr(layer, "is_decoder", True):
        return "in this version of transformers a decoder's layer returns keys and values"
    return None


def _bert_attention(layer: Any, call: Mapping[str, Any]) -> Padded | None:
    """Return BERT's attention, causal or not, with cross-attention to a memory."""
    mask, states = call.get("attention_mask"), call.get("encoder_hidden_states")
    memory_mask: Any = call.get("encoder_attention_mask")
    implementation = implementation_of(layer)
    if implementation not in PLAIN_ATTENTION or not covers_mask(implementation, mask):
        return None
    causal = False
    if mask is None and call["hidden_states"].shape[1] > 1:
        module = layer.attention.self
        # Attention without a mask is causal, the default of SDPA in transformers.
        causal = implementation in ("sdpa", "xfm_fast") and bool(getattr(module, "is_causal", True))
        if "SdpaSelfAttention" in original_class(module).__name__:
            causal = bool(module.is_decoder)
    if states is None or not getattr(layer, "is_decoder", True):
        return Padded(mask, causal)
    ignores_mask = original_class(layer).__name__ in IGNORE_MEMORY_MASK
    if ignores_mask and _hides_nothing(memory_mask):
        memory_mask = None
    covered = hasattr(layer, "crossattention") and covers_mask(implementation, memory_mask)
    if not covered or (ignores_mask and memory_mask is not None):
        return None
    return Padded(mask, causal, padded_memory(states, memory_mask))


def _hides_nothing(mask: Any) -> bool:
    """Return whether an additive mask is all zeros, as transformers 4 passes to BLIP by default."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return False
    if torch.compiler.is_compiling():
        return False
    # All layers get the same mask, and reading it syncs an accelerator.
    return cached("hides nothing", (mask,), lambda: not mask.any())


def _interleaved(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    """Return RoFormer's attention, which rotates pairs of adjacent dimensions."""
    table: Any = call.get("sinusoidal_pos")
    dense = Dense.of(call.get("attention_mask"), None, None)
    if dense is None or not isinstance(table, Tensor) or table.shape[:2] != (1, 1):
        return None
    sin, cos = (half[0, 0, :, None].repeat_interleave(2, -1) for half in table.chunk(2, -1))

    def rotate_pairs(x: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return (x * cos + turned * sin).to(x.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        if layer.attention.self.rotary_value:
            v = rotate_pairs(v)
        return dense(rotate_pairs(q), rotate_pairs(k), v, dropout_p, settings)

    return attend


def _disentangled(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    """Return the attention of a DeBERTa-v2/v3 layer; None without relative positions.

    Scores are `(q kᵀ + q k_posᵀ[i - j] + (k q_posᵀ)[j - i]) / √(D · terms)`.
    """
    module = layer.attention.self
    mask: Any = call.get("attention_mask")
    relative: Any = call.get("relative_pos")
    table: Any = call.get("rel_embeddings")
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    if not set(module.pos_att_type) <= {"c2p", "p2c"}:
        return None
    has_positions = isinstance(relative, Tensor) and relative.ndim <= 4
    if module.relative_attention and not (has_positions and isinstance(table, Tensor)):
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        scale = (q.shape[-1] * (1 + len(set(module.pos_att_type)))) ** -0.5
        bias = q.new_zeros((1, 1, 1, 1))
        if module.relative_attention:
            span, shared = module.pos_ebd_size, module.share_att_key
            positions = module.pos_dropout(table)[: 2 * span]
            distance = relative.reshape(-1, 1, *relative.shape[-2:])
            if "c2p" in module.pos_att_type:
                projection = module.key_proj if shared else module.pos_key_proj
                index = (span + distance).clamp(0, 2 * span - 1)
                bias = bias + scale * _position_scores(q, projection, positions, index, settings)
            if "p2c" in module.pos_att_type:
                projection = module.query_proj if shared else module.pos_query_proj
                index = (span - distance).clamp(0, 2 * span - 1)
                scores = _position_scores(k, projection, positions, index, settings)
                bias = bias + scale * scores.transpose(-1, -2)
        if torch.is_grad_enabled():
            # A query without visible keys (padding) has uniform weights and must not pass gradients
            # to keys.
            scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale + bias
            weights = scores.masked_fill(~mask.bool(), torch.finfo(q.dtype).min).softmax(-1)
            weights = F.dropout(weights, dropout_p)
            return torch.einsum("bhnm,bmhd->bnhd", weights, v.to(weights.dtype)).flatten(2)
        if bias.shape[-1] == 1:
            bias = bias.expand(*bias.shape[:2], *mask.shape[-2:])
        bias = add_mask(bias, mask.bool(), q.dtype)
        return attention(q, k, v, scale, bias, settings, dropout_p=dropout_p)

    return attend


def _position_scores(
    content: Tensor, layer: Any, positions: Tensor, index: Tensor, settings: Settings
) -> Tensor:
    """Compute scores `[B, H, N, M]` of content `[B, N, H, D]` and positions at index `[…, 1, N, M]`."""
    projected = apply_linear(layer, positions, settings).unflatten(-1, (content.shape[2], -1))
    scores = torch.einsum("bnhd,phd->bhnp", content, projected.to(content.dtype))
    return scores.gather(-1, index.expand(*scores.shape[:3], index.shape[-1]))


def _mask_of(*masks: Any) -> tuple[bool, Tensor | None]:
    """Return whether all masks are dense, and their sum."""
    present = [mask for mask in masks if mask is not None]
    dense = all(isinstance(mask, Tensor) and mask.ndim == 4 for mask in present)
    if not dense or (len(present) > 1 and any(mask.dtype == torch.bool for mask in present)):
        return False, None
    return True, reduce(add, present) if present else None


def _causal_or_masked(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    """Return CLIP's attention: causal by a separate mask (transformers 4) or by `is_causal` (5)."""
    implementation = implementation_of(layer)
    dense, mask = _mask_of(call.get("attention_mask"), call.get("causal_attention_mask"))
    if not dense or implementation not in _ATTENTION:
        return None
    # A mask includes causality, and eager attention ignores is_causal.
    causal = mask is None and implementation != "eager" and bool(call.get("is_causal"))
    return Dense(bias=mask, causal=causal)


def _unmasked(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    """Return BLIP's attention, whose mask argument is a head mask."""
    supported = implementation_of(layer) in _ATTENTION
    return Dense() if supported and call.get("attention_mask") is None else None


def _positioned(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    """Return BEiT's attention with the layer's position bias, a shared one, or both."""
    module: Any = find(layer, layer.layer_spec.attention)
    positions: Any = find(layer, "relative_position_bias") or find(module, "relative_position_bias")
    dense, shared = _mask_of(call.get("attention_mask"), call.get("relative_position_bias"))
    if not dense or implementation_of(layer) not in _ATTENTION:
        return None
    if positions is None:
        return Dense(bias=shared)
    if call.get("resolution") is None or (shared is not None and shared.dtype == torch.bool):
        return None
    height, width = (side // module.config.patch_size for side in call["resolution"])
    tokens = cast(Tensor, call["hidden_states"]).shape[1]
    table = PositionTable(positions.relative_position_bias_table, (height, width))
    same_window = (height, width) == tuple(positions.window_size) and height == width
    if shared is None and same_window and table.fits(tokens) and not observed(positions):
        return Dense(bias=table)
    bias = positions((height, width), call.get("interpolate_pos_encoding", False), dim_size=tokens)
    return Dense(bias=bias if shared is None else bias + shared)


def _swin_attention(layer: Any, call: Mapping[str, Any]) -> WindowAttention | None:
    """Return the attention of `SwinLayer` and `Swinv2Layer` of transformers."""
    if implementation_of(layer) not in PLAIN_ATTENTION:
        return None
    x, size = call["hidden_states"], tuple(map(int, call["input_dimensions"]))
    if hasattr(layer, "set_shift_and_window_size") and not call.get("always_partition"):
        layer.set_shift_and_window_size(size)
    window, shift = (int(layer.window_size),) * 2, (int(layer.shift_size),) * 2
    windows = windows_of(size, window, shift, x, fill_first=True)
    padded = tuple(side + -side % window[0] for side in size)
    name = f"{padded} {window} {shift}"
    mask = partial(layer.get_attn_mask, *padded, dtype=x.dtype, device=x.device)
    positions = getattr(layer.attention, "relative_position_bias", None)
    if positions is not None:
        sources = (positions.relative_position_bias_table,)
        bias = partial(cached_bias, name, positions, sources, positions, mask)
        return WindowAttention(windows, bias)
    module = layer.attention.self

    def doubled_mask() -> Tensor | None:
        # transformers adds this mask twice.
        window_mask = mask()
        return None if window_mask is None else 2 * window_mask

    bias = continuous_bias(name, module, module.continuous_position_bias_mlp, doubled_mask)
    return WindowAttention(windows, bias, module.logit_scale)


def _swin_refusal(layer: Any) -> str | None:
    if not hasattr(layer, "get_attn_mask"):
        return "this version of the library makes the mask of shifted windows elsewhere"
    if getattr(layer, "chunk_size_feed_forward", 0):
        return "its feed-forward runs in chunks"
    return None


BERT: Template = {
    "order": "behind sums",
    "attention": "attention.self",
    "own": "Attention SelfAttention SdpaSelfAttention CrossAttention SelfOutput Intermediate Output",
    "qkv": "query key value",
    "proj": "attention.output.dense",
    "norms": ("attention.output.LayerNorm", "output.LayerNorm"),
    "mlps": (Mlp(("intermediate.dense",), "intermediate.intermediate_act_fn", "output.dense"),),
    "head_size": "attention.self.attention_head_size",
    "weights_p": "attention.self.dropout",
    "branch_p": ("attention.output.dropout", "output.dropout"),
    "chunks": "chunk_size_feed_forward",
}
# NomicBERT's names.
_ROTARY: Template = {
    "order": "behind sums",
    "attention": "self_attn",
    "own": "Attention MLP",
    "qkv": "q_proj k_proj v_proj",
    "proj": "self_attn.o_proj",
    "norms": ("post_attention_layernorm", "post_mlp_layernorm"),
    "head_size": "self_attn.head_dim",
    "weights_p": "self_attn.attention_dropout",
    "branch_p": ("post_attention_dropout", "post_mlp_dropout"),
    "rotary": "position_embeddings",
}
_FC = Mlp(("mlp.fc1",), "mlp.activation_fn", "mlp.fc2")
_GATED = Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.act_fn", "mlp.down_proj")
# ViT in transformers 5.
_VIT: Template = {
    "order": "before",
    "attention": "attention",
    "own": "MLP Attention DropPath",
    "qkv": "q_proj k_proj v_proj",
    "proj": "attention.o_proj",
    "norms": ("layernorm_before", "layernorm_after"),
    "mlps": (_FC,),
    "head_size": "attention.head_dim",
    "weights_p": "attention.attention_dropout",
    "branch_p": ("dropout", "dropout"),
    "joins": False,
}
# Every ViT in transformers 4, and some in 5: pre-norm with BERT's names.
_BERT_VIT: Template = _VIT | {
    "attention": "attention.attention",
    "own": "Intermediate Output Attention SelfAttention SdpaSelfAttention SelfOutput DropPath",
    "qkv": "query key value",
    "proj": "attention.output.dense",
    "mlps": BERT["mlps"],
    "head_size": "attention.attention.attention_head_size",
    "weights_p": "attention.attention.dropout_prob",
    "branch_p": ("attention.output.dropout", "output.dropout"),
}
_MODULE_P: Template = {"weights_p": "attention.attention.dropout"}
_CLIP: Template = _VIT | {
    "attention": "self_attn",
    "own": "MLP Attention SdpaAttention",
    "proj": "self_attn.out_proj",
    "norms": ("layer_norm1", "layer_norm2"),
    "head_size": "self_attn.head_dim",
    "weights_p": "self_attn.dropout",
    "branch_p": ("", ""),
}
_BLIP: Template = _CLIP | {
    "qkv": "qkv",
    "proj": "self_attn.projection",
    "joins": True,
    "scores": _unmasked,
}
_DROPS: Template = {"drop_paths": ("drop_path", "drop_path")}
_DINO: Template = {
    **_VIT,
    **_DROPS,
    "own": "MLP Attention LayerScale SwiGLUFFN GatedMLP DropPath",
    "norms": ("norm1", "norm2"),
    "mlps": (_FC, _GATED),
    "branch_p": ("", ""),
    "scales": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
}
_BEIT: Template = _DROPS | {
    "scales": ("lambda_1", "lambda_2"),
    "scores": _positioned,
    "also_takes": ("relative_position_bias", "resolution", "interpolate_pos_encoding"),
}
_CAUSAL: Template = {
    "scores": _causal_or_masked,
    "also_takes": ("causal_attention_mask", "is_causal"),
}
_SWIN: Template = {
    "scores": _swin_attention,
    "also_takes": ("input_dimensions", "always_partition"),
    "refuses": _swin_refusal,
    "result": lambda out, x: (out, None),
}
# Classes with BERT's layer forward.
_BERT_LAYERS = (
    "align.AlignTextLayer",
    "altclip.AltRobertaLayer",
    "bert.BertLayer",
    "bert_generation.BertGenerationLayer",
    "blip.BlipTextLayer",
    "camembert.CamembertLayer",
    "chinese_clip.ChineseCLIPTextLayer",
    "clap.ClapTextLayer",
    "data2vec.Data2VecTextLayer",
    "electra.ElectraLayer",
    "ernie.ErnieLayer",
    "layoutlm.LayoutLMLayer",
    "rembert.RemBertLayer",
    "roberta.RobertaLayer",
    "roc_bert.RoCBertLayer",
    "xlm_roberta.XLMRobertaLayer",
)
_VIT_LAYERS = (
    "vit.ViTLayer",
    "deit.DeiTLayer",
    "vit_msn.ViTMSNLayer",
    "ijepa.IJepaLayer",
    "vit_mae.ViTMAELayer",
    "audio_spectrogram_transformer.ASTLayer",
    "vivit.VivitLayer",
)
_BERT_FORWARD: Template = BERT | {
    "cross": "crossattention",
    "scores": _bert_attention,
    "refuses": _bert_refusal,
    "also_takes": ("encoder_hidden_states", "encoder_attention_mask"),
}
register(
    *(build_spec(layer, _BERT_FORWARD) for layer in _BERT_LAYERS),
    build_spec("layoutlmv3.LayoutLMv3Layer", BERT, bias="position_bias"),
    build_spec("roformer.RoFormerLayer", BERT, scores=_interleaved, also_takes=("sinusoidal_pos",)),
    build_spec(
        "deberta_v2.DebertaV2Layer",
        BERT,
        own="Attention SelfOutput Intermediate Output",
        own_names="DisentangledSelfAttention",
        qkv="query_proj key_proj value_proj",
        chunks="",
        scores=_disentangled,
        also_takes=("relative_pos", "rel_embeddings"),
        result=lambda out, x: (out, None),
    ),
    build_spec(
        "mpnet.MPNetLayer",
        BERT,
        attention="attention.attn",
        own="Attention SelfAttention Intermediate Output",
        qkv="q k v",
        proj="attention.attn.o",
        norms=("attention.LayerNorm", "output.LayerNorm"),
        head_size="attention.attn.attention_head_size",
        weights_p="attention.attn.dropout",
        branch_p=("attention.dropout", "output.dropout"),
        bias="position_bias",
        chunks="",
    ),
    build_spec(
        "albert.AlbertLayer",
        BERT,
        attention="attention",
        own="Attention SdpaAttention",
        proj="attention.dense",
        norms=("attention.LayerNorm", "full_layer_layer_norm"),
        mlps=(Mlp(("ffn",), "activation", "ffn_output"),),
        head_size="attention.attention_head_size",
        weights_p="attention.attention_dropout",
        branch_p=("attention.output_dropout", ""),
    ),
    build_spec(
        "distilbert.TransformerBlock",
        BERT,
        attention="attention",
        own="",
        own_names="DistilBertSelfAttention MultiHeadSelfAttention DistilBertSdpaAttention FFN",
        qkv="q_lin k_lin v_lin",
        proj="attention.out_lin",
        norms=("sa_layer_norm", "output_layer_norm"),
        mlps=(Mlp(("ffn.lin1",), "ffn.activation", "ffn.lin2"),),
        head_size="attention.attention_head_size",
        weights_p="attention.dropout",
        branch_p=("", "ffn.dropout"),
        chunks="ffn.chunk_size_feed_forward",
    ),
    build_spec("nomic_bert.NomicBertLayer", _ROTARY, mlps=(_GATED,)),
    build_spec("jina_embeddings_v3.JinaEmbeddingsV3Layer", _ROTARY, mlps=(_FC,)),
    build_spec(
        "modernbert.ModernBertEncoderLayer",
        order="before",
        attention="attn",
        own="Attention MLP",
        qkv="Wqkv",
        proj="attn.Wo",
        norms=("attn_norm", "mlp_norm"),
        mlps=(Mlp(("mlp.Wi",), "mlp.act", "mlp.Wo", halved=True, dropout="mlp.drop"),),
        head_size="attn.head_dim",
        weights_p="attn.attention_dropout",
        branch_p=("attn.out_drop", ""),
        rotary="position_embeddings",
    ),
    build_spec(
        "megatron_bert.MegatronBertLayer", BERT, order="before", norms=("attention.ln", "ln")
    ),
    build_spec(
        "roberta_prelayernorm.RobertaPreLayerNormLayer",
        BERT,
        order="before",
        norms=("attention.LayerNorm", "intermediate.LayerNorm"),
    ),
    build_spec(
        "xlm_roberta_xl.XLMRobertaXLLayer",
        BERT,
        order="before",
        norms=("attention.self_attn_layer_norm", "LayerNorm"),
        branch_p=("attention.output.dropout", ""),
    ),
    build_spec(
        "esm.EsmLayer",
        BERT,
        order="before",
        norms=("attention.LayerNorm", "LayerNorm"),
        mlps=(Mlp(("intermediate.dense",), "", "output.dense"),),
        rotary="position_embeddings",
        chunks="",
    ),
    *(build_spec(layer, _VIT) for layer in _VIT_LAYERS),
    *(
        build_spec(layer, _BERT_VIT)
        for layer in (*_VIT_LAYERS, "videomae.VideoMAELayer", "yolos.YolosLayer")
    ),
    build_spec("dpt.DPTViTLayer", _BERT_VIT, own_names="DPTSelfAttention"),
    build_spec("vilt.ViltLayer", _BERT_VIT, _MODULE_P),
    build_spec("pixio.PixioLayer", _VIT, _DROPS),
    build_spec("beit.BeitLayer", _VIT, _BEIT),
    build_spec("beit.BeitLayer", _BERT_VIT, _BEIT, _MODULE_P),
    build_spec("data2vec.Data2VecVisionLayer", _BERT_VIT, _BEIT, _MODULE_P),
    build_spec("clip.CLIPEncoderLayer", _CLIP, _CAUSAL),
    build_spec("owlvit.OwlViTEncoderLayer", _CLIP, _CAUSAL),
    build_spec("owlv2.Owlv2EncoderLayer", _CLIP, _CAUSAL),
    build_spec("siglip.SiglipEncoderLayer", _CLIP),
    build_spec("siglip2.Siglip2EncoderLayer", _CLIP),
    build_spec("blip.BlipEncoderLayer", _BLIP),
    build_spec("blip_2.Blip2EncoderLayer", _BLIP, weights_p="self_attn.attention_dropout"),
    build_spec(
        "instructblip.InstructBlipEncoderLayer", _BLIP, weights_p="self_attn.attention_dropout"
    ),
    build_spec("dinov2.Dinov2Layer", _DINO),
    build_spec("dinov2_with_registers.Dinov2WithRegistersLayer", _DINO),
    build_spec(
        "dinov3_vit.DINOv3ViTLayer",
        _DINO,
        mlps=(_GATED, Mlp(("mlp.up_proj",), "mlp.act_fn", "mlp.down_proj")),
        weights_p="attention.dropout",
        rotary="position_embeddings",
    ),
    build_spec("swin.SwinLayer", _VIT, _SWIN, drop_paths=("drop_path", "")),
    build_spec(
        "swinv2.Swinv2Layer",
        _BERT_VIT,
        _DROPS,
        _SWIN,
        order="behind branches",
        attention="attention.self",
        head_size="attention.self.attention_head_size",
        weights_p="attention.self.dropout",
        joins=True,
    ),
)


def _shared_layers(model: Any, path: str) -> Iterator[nn.Module]:
    """Yield ALBERT's layers in execution order: each group serves several layers."""
    groups = model.get_submodule(path)
    count = model.config.num_hidden_layers
    for index in range(count):
        yield from groups[int(index / (count / len(groups)))].albert_layers


# Models with the encoder forward of BERT or RoBERTa.
_BERT_MODELS = (
    "bert.BertModel",
    "blip.BlipTextModel",
    "camembert.CamembertModel",
    "data2vec.Data2VecTextModel",
    "roberta.RobertaModel",
    "xlm_roberta.XLMRobertaModel",
)
_IDS = ("input_ids", "inputs_embeds")
_PLACED = (*_IDS, "position_ids")
_TYPED = (*_PLACED, "token_type_ids")
_CROSSING = "BaseModelOutputWithPoolingAndCrossAttentions"
_PLAIN: Template = {"pooler": "", "output": "BaseModelOutput"}
register_encoder(
    *(Encoder(model=model, takes=_TYPED, output=_CROSSING, memory=True) for model in _BERT_MODELS),
    Encoder(model="mpnet.MPNetModel", takes=_PLACED, bias="encoder.compute_position_bias"),
    Encoder(
        model="distilbert.DistilBertModel", takes=_PLACED, layers="transformer.layer", **_PLAIN
    ),
    Encoder(model="electra.ElectraModel", takes=_TYPED, project="embeddings_project", **_PLAIN),
    Encoder(
        model="albert.AlbertModel",
        takes=_TYPED,
        layers="encoder.albert_layer_groups",
        project="encoder.embedding_hidden_mapping_in",
        pooled_by="pooler_activation",
        sequence=_shared_layers,
    ),
    Encoder(
        model="modernbert.ModernBertModel",
        takes=_IDS,
        layers="layers",
        norm="final_norm",
        rotary="rotary_emb",
        layer_type="attention_type",
        **_PLAIN,
    ),
    *(
        Encoder(model=model, takes=_TYPED, layers="layers", rotary="rotary_emb")
        for model in ("nomic_bert.NomicBertModel", "jina_embeddings_v3.JinaEmbeddingsV3Model")
    ),
)
