"""Families of transformers (Hugging Face) as rows of names: text encoders and vision transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from xfm_fast.replace.deberta_attention import disentangled
from xfm_fast.replace.encoder import Encoder, UnpaddedEncoder, is_encoder, register_encoder
from xfm_fast.replace.families import Family, Mlp, family_of, register
from xfm_fast.replace.swap import Rule, original_class
from xfm_fast.replace.window_block import WindowLayer

_FC = Mlp(("mlp.fc1",), "mlp.activation_fn", "mlp.fc2")
_GATED = Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.act_fn", "mlp.down_proj")
_UP_DOWN = Mlp(("mlp.up_proj",), "mlp.act_fn", "mlp.down_proj")
_BERT_MLP = Mlp(("intermediate.dense",), "intermediate.intermediate_act_fn", "output.dense")


def _projections(attention: str, names: str = "q_proj k_proj v_proj") -> tuple[str, ...]:
    return tuple(f"{attention}.{name}" for name in names.split())


TEXT = (
    Family(
        layer="mpnet.MPNetLayer",
        order="behind sums",
        attention="attention.attn",
        own="MPNetAttention MPNetSelfAttention MPNetIntermediate MPNetOutput",
        qkv=_projections("attention.attn", "q k v"),
        proj="attention.attn.o",
        norms=("attention.LayerNorm", "output.LayerNorm"),
        mlps=(_BERT_MLP,),
        head_size="attention.attn.attention_head_size",
        weights_p="attention.attn.dropout",
        branch_p=("attention.dropout", "output.dropout"),
        bias="position_bias",
    ),
    Family(
        layer="distilbert.TransformerBlock",
        order="behind sums",
        attention="attention",
        own="DistilBertSelfAttention MultiHeadSelfAttention DistilBertSdpaAttention FFN",
        qkv=_projections("attention", "q_lin k_lin v_lin"),
        proj="attention.out_lin",
        norms=("sa_layer_norm", "output_layer_norm"),
        mlps=(Mlp(("ffn.lin1",), "ffn.activation", "ffn.lin2"),),
        head_size="attention.attention_head_size",
        weights_p="attention.dropout",
        branch_p=("", "ffn.dropout"),
        chunks="ffn.chunk_size_feed_forward",
    ),
    Family(
        layer="albert.AlbertLayer",
        order="behind sums",
        attention="attention",
        own="AlbertAttention AlbertSdpaAttention",
        qkv=_projections("attention", "query key value"),
        proj="attention.dense",
        norms=("attention.LayerNorm", "full_layer_layer_norm"),
        mlps=(Mlp(("ffn",), "activation", "ffn_output"),),
        head_size="attention.attention_head_size",
        weights_p="attention.attention_dropout",
        branch_p=("attention.output_dropout", ""),
        chunks="chunk_size_feed_forward",
    ),
    Family(
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
    Family(
        layer="nomic_bert.NomicBertLayer",
        order="behind sums",
        attention="self_attn",
        own="NomicBertAttention NomicBertMLP",
        qkv=_projections("self_attn"),
        proj="self_attn.o_proj",
        norms=("post_attention_layernorm", "post_mlp_layernorm"),
        mlps=(_GATED,),
        head_size="self_attn.head_dim",
        weights_p="self_attn.attention_dropout",
        branch_p=("post_attention_dropout", "post_mlp_dropout"),
        rotary="position_embeddings",
    ),
    Family(
        layer="layoutlmv3.LayoutLMv3Layer",
        order="behind sums",
        attention="attention.self",
        own="LayoutLMv3Attention LayoutLMv3SelfAttention LayoutLMv3SelfOutput LayoutLMv3Intermediate LayoutLMv3Output",
        qkv=_projections("attention.self", "query key value"),
        proj="attention.output.dense",
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        mlps=(_BERT_MLP,),
        head_size="attention.self.attention_head_size",
        weights_p="attention.self.dropout",
        branch_p=("attention.output.dropout", "output.dropout"),
        bias="position_bias",
        chunks="chunk_size_feed_forward",
    ),
    Family(
        layer="deberta_v2.DebertaV2Layer",
        order="behind sums",
        attention="attention.self",
        own="DebertaV2Attention DisentangledSelfAttention DebertaV2SelfOutput DebertaV2Intermediate DebertaV2Output",
        qkv=_projections("attention.self", "query_proj key_proj value_proj"),
        proj="attention.output.dense",
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        mlps=(_BERT_MLP,),
        head_size="attention.self.attention_head_size",
        weights_p="attention.self.dropout",
        branch_p=("attention.output.dropout", "output.dropout"),
        pair=True,
        scores=disentangled,
        also_takes=("relative_pos", "rel_embeddings"),
    ),
)


def _encoder_layer(layer: str, own: str) -> Family:
    """A layer named as CLIP's code names it."""
    return Family(
        layer=layer,
        order="before",
        attention="self_attn",
        own=own,
        qkv=_projections("self_attn"),
        proj="self_attn.out_proj",
        norms=("layer_norm1", "layer_norm2"),
        mlps=(_FC,),
        head_size="self_attn.head_dim",
        weights_p="self_attn.dropout",
        joins=False,
    )


def _dino(layer: str, own: str, mlps: tuple[Mlp, ...], weights_p: str, rotary: str = "") -> Family:
    """A layer named as DINOv2's code names it."""
    return Family(
        layer=layer,
        order="before",
        attention="attention",
        own=own,
        qkv=_projections("attention"),
        proj="attention.o_proj",
        norms=("norm1", "norm2"),
        mlps=mlps,
        head_size="attention.head_dim",
        weights_p=weights_p,
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        drop_paths=("drop_path", "drop_path"),
        rotary=rotary,
        joins=False,
    )


VISION = (
    _encoder_layer("siglip.SiglipEncoderLayer", "SiglipAttention SiglipMLP"),
    _encoder_layer("siglip2.Siglip2EncoderLayer", "Siglip2Attention Siglip2MLP"),
    _dino(
        "dinov2.Dinov2Layer",
        "Dinov2Attention Dinov2LayerScale Dinov2MLP Dinov2SwiGLUFFN Dinov2DropPath",
        (_FC, _GATED),
        "attention.attention_dropout",
    ),
    _dino(
        "dinov2_with_registers.Dinov2WithRegistersLayer",
        "Dinov2WithRegistersAttention Dinov2WithRegistersLayerScale Dinov2WithRegistersMLP "
        "Dinov2WithRegistersSwiGLUFFN Dinov2WithRegistersDropPath",
        (_FC, _GATED),
        "attention.attention_dropout",
    ),
    _dino(
        "dinov3_vit.DINOv3ViTLayer",
        "DINOv3ViTAttention DINOv3ViTLayerScale DINOv3ViTMLP DINOv3ViTGatedMLP Dinov3ViTDropPath DINOv3ViTDropPath",
        (_GATED, _UP_DOWN),
        "attention.dropout",
        "position_embeddings",
    ),
    Family(
        layer="vit_mae.ViTMAELayer",
        order="before",
        attention="attention",
        own="ViTMAEAttention ViTMAEMLP",
        qkv=_projections("attention"),
        proj="attention.o_proj",
        norms=("layernorm_before", "layernorm_after"),
        mlps=(_FC,),
        head_size="attention.head_dim",
        weights_p="attention.attention_dropout",
        branch_p=("dropout", "dropout"),
        joins=False,
    ),
    Family(
        layer="swin.SwinLayer",
        order="before",
        attention="attention",
        own="SwinAttention SwinMLP SwinDropPath",
        qkv=_projections("attention"),
        proj="attention.o_proj",
        norms=("layernorm_before", "layernorm_after"),
        mlps=(_FC,),
        head_size="attention.head_dim",
        weights_p="attention.attention_dropout",
        branch_p=("dropout", "dropout"),
        drop_paths=("drop_path", ""),
        joins=False,
        windowed=True,
    ),
    Family(
        layer="swinv2.Swinv2Layer",
        order="behind branches",
        attention="attention.self",
        own="Swinv2Attention Swinv2SelfAttention Swinv2SelfOutput Swinv2Intermediate Swinv2Output Swinv2DropPath",
        qkv=_projections("attention.self", "query key value"),
        proj="attention.output.dense",
        norms=("layernorm_before", "layernorm_after"),
        mlps=(_BERT_MLP,),
        head_size="attention.self.attention_head_size",
        weights_p="attention.self.dropout",
        branch_p=("attention.output.dropout", "output.dropout"),
        drop_paths=("drop_path", "drop_path"),
        windowed=True,
    ),
)


def _shared_layers(model: Any, path: str) -> Iterator[nn.Module]:
    """ALBERT's layers in the order in which they run: groups, each for several layers of the model."""
    groups = model.get_submodule(path)
    count = model.config.num_hidden_layers
    for number in range(count):
        yield from groups[int(number / (count / len(groups)))].albert_layers


_IDS = ("input_ids", "inputs_embeds")
ENCODERS = (
    Encoder(
        model="mpnet.MPNetModel",
        layers="encoder.layer",
        takes=(*_IDS, "position_ids"),
        pooler="pooler",
        bias="encoder.compute_position_bias",
    ),
    Encoder(
        model="distilbert.DistilBertModel",
        layers="transformer.layer",
        takes=(*_IDS, "position_ids"),
        has_pooled=False,
    ),
    Encoder(
        model="electra.ElectraModel",
        layers="encoder.layer",
        takes=(*_IDS, "position_ids", "token_type_ids"),
        project="embeddings_project",
        has_pooled=False,
    ),
    Encoder(
        model="albert.AlbertModel",
        layers="encoder.albert_layer_groups",
        takes=(*_IDS, "position_ids", "token_type_ids"),
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
        has_pooled=False,
    ),
    Encoder(
        model="nomic_bert.NomicBertModel",
        layers="layers",
        takes=(*_IDS, "position_ids", "token_type_ids"),
        pooler="pooler",
        rotary="rotary_emb",
    ),
)

register(*TEXT, *VISION)
register_encoder(*ENCODERS)


def _has_windows(module: nn.Module) -> bool:
    family = family_of(original_class(module))
    return family is not None and family.windowed


RULES: tuple[Rule, ...] = (
    Rule("UnpaddedEncoder", is_encoder, UnpaddedEncoder, "padding left out of all layers"),
    Rule(
        "WindowLayer",
        _has_windows,
        WindowLayer,
        "windows in one gather, bias and mask kept; products fused",
    ),
)
