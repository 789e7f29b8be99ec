"""Text layers and encoders of transformers (Hugging Face) as rows, and the attention of BERT, RoFormer and DeBERTa."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels.derived import derived
from xfm_fast.replace.attention import Attend, Dense, Padded, add_mask, attention
from xfm_fast.replace.layer import PLAIN_ATTENTION, LayerSpec, Mlp, implementation_of, register
from xfm_fast.replace.structure import apply_linear
from xfm_fast.replace.swap import Settings, original_class
from xfm_fast.replace.transformers_vision import BERT_MLP, FC, GATED, own_parts, projections
from xfm_fast.replace.unpadded import IGNORE_MEMORY_MASK, Encoder, padded_memory, register_encoder


def _rotary(layer: str, mlp: Mlp) -> LayerSpec:
    """A post-norm layer with rotary positions and NomicBERT's names."""
    return LayerSpec(
        layer=layer,
        order="behind sums",
        attention="self_attn",
        own=own_parts(layer, "Attention MLP"),
        qkv=projections("self_attn"),
        proj="self_attn.o_proj",
        norms=("post_attention_layernorm", "post_mlp_layernorm"),
        mlps=(mlp,),
        head_size="self_attn.head_dim",
        weights_p="self_attn.attention_dropout",
        branch_p=("post_attention_dropout", "post_mlp_dropout"),
        rotary="position_embeddings",
    )


def bert_row(layer: str, **more: Any) -> LayerSpec:
    """A layer with BERT's names and a few differences."""
    parts = "Attention SelfAttention SdpaSelfAttention CrossAttention SelfOutput Intermediate Output"
    row: dict[str, Any] = {
        "order": "behind sums",
        "attention": "attention.self",
        "own": own_parts(layer, parts),
        "qkv": projections("attention.self", "query key value"),
        "proj": "attention.output.dense",
        "norms": ("attention.output.LayerNorm", "output.LayerNorm"),
        "mlps": (BERT_MLP,),
        "head_size": "attention.self.attention_head_size",
        "weights_p": "attention.self.dropout",
        "branch_p": ("attention.output.dropout", "output.dropout"),
        "chunks": "chunk_size_feed_forward",
    }
    return LayerSpec(layer=layer, **row | more)


def _bert_refusal(layer: Any) -> str | None:
    attention = layer.attention.self
    positions = getattr(attention, "position_embedding_type", "absolute")
    if positions not in ("absolute", None):
        return f"its attention has {positions} positions"
    if _implementation(attention) not in PLAIN_ATTENTION:
        return f"its attention implementation is {_implementation(attention)}"
    names = inspect.signature(original_class(layer).forward).parameters
    if "past_key_value" in names and getattr(layer, "is_decoder", True):
        return "in this version of transformers a decoder's layer returns keys and values"
    return None


def _bert_attention(layer: Any, call: Mapping[str, Any]) -> Padded | None:
    """BERT's attention, causal or not, with cross-attention to a memory."""
    mask, states, seen = (
        call.get("attention_mask"),
        call.get("encoder_hidden_states"),
        call.get("encoder_attention_mask"),
    )
    implementation = implementation_of(layer)
    if implementation not in PLAIN_ATTENTION or not _covers_mask(implementation, mask):
        return None
    causal = mask is None and call["hidden_states"].shape[1] > 1 and _hides_later_keys(layer.attention.self)
    if states is None or not getattr(layer, "is_decoder", True):
        return Padded(mask, causal)
    unmasked = original_class(layer).__name__ in IGNORE_MEMORY_MASK
    if unmasked and _hides_nothing(seen):
        seen = None
    covered = hasattr(layer, "crossattention") and _covers_mask(implementation, seen)
    if not covered or (unmasked and seen is not None):
        return None
    return Padded(mask, causal, padded_memory(states, seen))


def _covers_mask(implementation: str | None, mask: Any) -> bool:
    """True if the fused form interprets a mask as the attention implementation does."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return implementation == "xfm_fast"
    # Eager attention adds a boolean mask as ones and zeros; leave that to the original.
    boolean = implementation not in ("eager", None)
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 4 and (mask.is_floating_point() or boolean))


def _hides_nothing(mask: Any) -> bool:
    """True if an additive mask is all zeros; transformers 4 passes one to BLIP by default."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point() or torch.compiler.is_compiling():
        return False
    # All layers get the same mask, and reading it syncs an accelerator.
    return derived("hides nothing", (mask,), lambda: not mask.any())


def _hides_later_keys(attention: Any) -> bool:
    """True if attention without a mask is causal, the default of SDPA in transformers."""
    if "SdpaSelfAttention" in original_class(attention).__name__:
        return bool(attention.is_decoder)
    return _implementation(attention) in ("sdpa", "xfm_fast") and bool(getattr(attention, "is_causal", True))


def _implementation(attention: Any) -> str | None:
    return getattr(getattr(attention, "config", None), "_attn_implementation", None)


def _interleaved(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    """RoFormer's attention: adjacent dimensions are rotated in pairs, optionally in values too."""
    table: Any = call.get("sinusoidal_pos")
    dense = Dense.of(call.get("attention_mask"), None, None)
    if dense is None or not isinstance(table, Tensor) or table.shape[:2] != (1, 1):
        return None
    sin, cos = (half[0, 0, :, None].repeat_interleave(2, -1) for half in table.chunk(2, -1))

    def turned(x: Tensor) -> Tensor:
        return (x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin).to(x.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        v = turned(v) if layer.attention.self.rotary_value else v
        return dense(turned(q), turned(k), v, dropout_p, settings)

    return attend


def _disentangled(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    """Attention of a DeBERTa-v2/v3 layer call; None without relative positions.

    Scores are `(q kᵀ + q k_posᵀ[i - j] + (k q_posᵀ)[j - i]) / √(D · terms)`.
    """
    module = layer.attention.self
    mask, places, table = (cast(Any, call.get(name)) for name in ("attention_mask", "relative_pos", "rel_embeddings"))
    if not isinstance(mask, Tensor) or mask.ndim != 4 or not set(module.pos_att_type) <= {"c2p", "p2c"}:
        return None
    if module.relative_attention and not (
        isinstance(places, Tensor) and places.ndim <= 4 and isinstance(table, Tensor)
    ):
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        kinds = [kind for kind in ("c2p", "p2c") if kind in module.pos_att_type]
        scale = (q.shape[-1] * (1 + len(kinds))) ** -0.5
        bias = q.new_zeros((1, 1, 1, 1))
        if module.relative_attention:
            positions = module.pos_dropout(table)[: 2 * module.pos_ebd_size]
            for kind in kinds:
                bias = bias + scale * _toward(kind, module, positions, places, q, k, settings)
        if torch.is_grad_enabled():
            # A query without visible keys (padding) has uniform weights and must not pass gradients to keys.
            scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale + bias
            weights = scores.masked_fill(~mask.bool(), torch.finfo(q.dtype).min).softmax(-1)
            return torch.einsum("bhnm,bmhd->bnhd", F.dropout(weights, dropout_p), v.to(weights.dtype)).flatten(2)
        shape = (*bias.shape[:2], *mask.shape[-2:]) if bias.shape[-1] == 1 else bias.shape
        added = add_mask(bias.expand(shape), mask.bool(), q.dtype)
        return attention(q, k, v, scale, added, settings, dropout_p=dropout_p)

    return attend


def _toward(kind: str, module: Any, positions: Tensor, places: Any, q: Tensor, k: Tensor, settings: Settings) -> Tensor:
    """Scores `[B, H, N, N]` of content and position: "c2p" queries to positions, "p2c" positions to keys."""
    span = module.pos_ebd_size
    if module.share_att_key:
        layer = module.key_proj if kind == "c2p" else module.query_proj
    else:
        layer = module.pos_key_proj if kind == "c2p" else module.pos_query_proj
    made = apply_linear(layer, positions, settings).unflatten(-1, (q.shape[2], -1))
    content = q if kind == "c2p" else k
    scores = torch.einsum("bnhd,phd->bhnp", content, made.to(content.dtype))
    places = places.reshape(-1, 1, *places.shape[-2:])
    index = (places if kind == "c2p" else -places) + span
    index = index.clamp(0, 2 * span - 1).expand(*scores.shape[:3], places.shape[-1])
    found = scores.gather(-1, index)
    return found if kind == "c2p" else found.transpose(-1, -2)


# Classes with BERT's layer forward.
_BERT_LAYERS = (
    *("align.AlignTextLayer", "altclip.AltRobertaLayer", "bert.BertLayer", "bert_generation.BertGenerationLayer"),
    *("blip.BlipTextLayer", "camembert.CamembertLayer", "chinese_clip.ChineseCLIPTextLayer", "clap.ClapTextLayer"),
    *("data2vec.Data2VecTextLayer", "electra.ElectraLayer", "ernie.ErnieLayer", "layoutlm.LayoutLMLayer"),
    *("rembert.RemBertLayer", "roberta.RobertaLayer", "roc_bert.RoCBertLayer", "xlm_roberta.XLMRobertaLayer"),
)
# Models with the encoder forward of BERT or RoBERTa.
_BERT_MODELS = (
    *("bert.BertModel", "blip.BlipTextModel", "camembert.CamembertModel", "data2vec.Data2VecTextModel"),
    *("roberta.RobertaModel", "xlm_roberta.XLMRobertaModel"),
)
register(
    *(
        bert_row(
            layer,
            cross="crossattention",
            scores=_bert_attention,
            refuses=_bert_refusal,
            also_takes=("encoder_hidden_states", "encoder_attention_mask"),
        )
        for layer in _BERT_LAYERS
    ),
    LayerSpec(
        layer="mpnet.MPNetLayer",
        order="behind sums",
        attention="attention.attn",
        own="MPNetAttention MPNetSelfAttention MPNetIntermediate MPNetOutput",
        qkv=projections("attention.attn", "q k v"),
        proj="attention.attn.o",
        norms=("attention.LayerNorm", "output.LayerNorm"),
        mlps=(BERT_MLP,),
        head_size="attention.attn.attention_head_size",
        weights_p="attention.attn.dropout",
        branch_p=("attention.dropout", "output.dropout"),
        bias="position_bias",
    ),
    LayerSpec(
        layer="distilbert.TransformerBlock",
        order="behind sums",
        attention="attention",
        own="DistilBertSelfAttention MultiHeadSelfAttention DistilBertSdpaAttention FFN",
        qkv=projections("attention", "q_lin k_lin v_lin"),
        proj="attention.out_lin",
        norms=("sa_layer_norm", "output_layer_norm"),
        mlps=(Mlp(("ffn.lin1",), "ffn.activation", "ffn.lin2"),),
        head_size="attention.attention_head_size",
        weights_p="attention.dropout",
        branch_p=("", "ffn.dropout"),
        chunks="ffn.chunk_size_feed_forward",
    ),
    LayerSpec(
        layer="albert.AlbertLayer",
        order="behind sums",
        attention="attention",
        own="AlbertAttention AlbertSdpaAttention",
        qkv=projections("attention", "query key value"),
        proj="attention.dense",
        norms=("attention.LayerNorm", "full_layer_layer_norm"),
        mlps=(Mlp(("ffn",), "activation", "ffn_output"),),
        head_size="attention.attention_head_size",
        weights_p="attention.attention_dropout",
        branch_p=("attention.output_dropout", ""),
        chunks="chunk_size_feed_forward",
    ),
    LayerSpec(
        layer="modernbert.ModernBertEncoderLayer",
        order="before",
        attention="attn",
        own="ModernBertAttention ModernBertMLP",
        qkv=("attn.Wqkv",),
        proj="attn.Wo",
        norms=("attn_norm", "mlp_norm"),
        mlps=(Mlp(("mlp.Wi",), "mlp.act", "mlp.Wo", halved=True, dropout="mlp.drop"),),
        head_size="attn.head_dim",
        weights_p="attn.attention_dropout",
        branch_p=("attn.out_drop", ""),
        rotary="position_embeddings",
    ),
    _rotary("nomic_bert.NomicBertLayer", GATED),
    _rotary("jina_embeddings_v3.JinaEmbeddingsV3Layer", FC),
    bert_row("layoutlmv3.LayoutLMv3Layer", bias="position_bias"),
    bert_row(
        "deberta_v2.DebertaV2Layer",
        own="DebertaV2Attention DisentangledSelfAttention DebertaV2SelfOutput DebertaV2Intermediate DebertaV2Output",
        qkv=projections("attention.self", "query_proj key_proj value_proj"),
        chunks="",
        scores=_disentangled,
        also_takes=("relative_pos", "rel_embeddings"),
        result=lambda out, x: (out, None),
    ),
    bert_row("megatron_bert.MegatronBertLayer", order="before", norms=("attention.ln", "ln")),
    bert_row(
        "roberta_prelayernorm.RobertaPreLayerNormLayer",
        order="before",
        norms=("attention.LayerNorm", "intermediate.LayerNorm"),
    ),
    bert_row(
        "xlm_roberta_xl.XLMRobertaXLLayer",
        order="before",
        norms=("attention.self_attn_layer_norm", "LayerNorm"),
        branch_p=("attention.output.dropout", ""),
    ),
    bert_row(
        "esm.EsmLayer",
        order="before",
        norms=("attention.LayerNorm", "LayerNorm"),
        mlps=(Mlp(("intermediate.dense",), "", "output.dense"),),
        rotary="position_embeddings",
        chunks="",
    ),
    bert_row("roformer.RoFormerLayer", scores=_interleaved, also_takes=("sinusoidal_pos",)),
)


def _shared_layers(model: Any, path: str) -> Iterator[nn.Module]:
    """ALBERT's layers in execution order: each group serves several layers."""
    groups = model.get_submodule(path)
    count = model.config.num_hidden_layers
    for number in range(count):
        yield from groups[int(number / (count / len(groups)))].albert_layers


_IDS = ("input_ids", "inputs_embeds")
_PLACED = (*_IDS, "position_ids")
_TYPED = (*_PLACED, "token_type_ids")
register_encoder(
    *(
        Encoder(
            model=model,
            layers="encoder.layer",
            takes=_TYPED,
            pooler="pooler",
            output="BaseModelOutputWithPoolingAndCrossAttentions",
            memory=True,
        )
        for model in _BERT_MODELS
    ),
    Encoder(
        model="mpnet.MPNetModel",
        layers="encoder.layer",
        takes=_PLACED,
        pooler="pooler",
        bias="encoder.compute_position_bias",
    ),
    Encoder(
        model="distilbert.DistilBertModel",
        layers="transformer.layer",
        takes=_PLACED,
        output="BaseModelOutput",
    ),
    Encoder(
        model="electra.ElectraModel",
        layers="encoder.layer",
        takes=_TYPED,
        project="embeddings_project",
        output="BaseModelOutput",
    ),
    Encoder(
        model="albert.AlbertModel",
        layers="encoder.albert_layer_groups",
        takes=_TYPED,
        project="encoder.embedding_hidden_mapping_in",
        pooler="pooler",
        pooled_by="pooler_activation",
        sequence=_shared_layers,
    ),
    Encoder(
        model="modernbert.ModernBertModel",
        layers="layers",
        takes=_IDS,
        norm="final_norm",
        rotary="rotary_emb",
        kind="attention_type",
        output="BaseModelOutput",
    ),
    Encoder(
        model="nomic_bert.NomicBertModel",
        layers="layers",
        takes=_TYPED,
        pooler="pooler",
        rotary="rotary_emb",
    ),
    Encoder(
        model="jina_embeddings_v3.JinaEmbeddingsV3Model",
        layers="layers",
        takes=_TYPED,
        pooler="pooler",
        rotary="rotary_emb",
    ),
)
