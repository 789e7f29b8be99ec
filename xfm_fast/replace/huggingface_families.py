"""Text encoders of transformers (Hugging Face) as table rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from xfm_fast.replace.deberta_attention import disentangled
from xfm_fast.replace.encoder import Encoder, UnpaddedEncoder, is_encoder, register_encoder
from xfm_fast.replace.families import Family, FamilyLayer, Mlp, family_of, register
from xfm_fast.replace.huggingface_vision import BERT_MLP, FC, GATED, VISION, own_parts, projections
from xfm_fast.replace.masks import Dense
from xfm_fast.replace.structure import Attend
from xfm_fast.replace.swap import Rule, Settings, original_class
from xfm_fast.replace.window_block import WindowLayer


def _rotary(layer: str, mlp: Mlp) -> Family:
    """A post-norm layer with rotary positions and NomicBERT's names."""
    return Family(
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


def _bert(layer: str, **more: Any) -> Family:
    """A layer with BERT's names and a few differences."""
    parts = "Attention SelfAttention SdpaSelfAttention SelfOutput Intermediate Output"
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
    return Family(layer=layer, **row | more)


def _interleaved(layer: FamilyLayer, call: Mapping[str, Any]) -> Attend | None:
    """RoFormer's attention: adjacent dimensions are rotated in pairs, optionally in values too."""
    table: Any = call.get("sinusoidal_pos")
    dense = Dense.of(call.get("attention_mask"), None, None)
    if dense is None or not isinstance(table, Tensor) or table.shape[:2] != (1, 1):
        return None
    sin, cos = (half[0, 0, :, None].repeat_interleave(2, -1) for half in table.chunk(2, -1))

    def turned(x: Tensor) -> Tensor:
        return (x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin).to(x.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        v = turned(v) if cast(Any, layer).attention.self.rotary_value else v
        return dense(turned(q), turned(k), v, dropout_p, settings)

    return attend


TEXT = (
    Family(
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
    Family(
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
    Family(
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
    _rotary("nomic_bert.NomicBertLayer", GATED),
    _rotary("jina_embeddings_v3.JinaEmbeddingsV3Layer", FC),
    _bert("layoutlmv3.LayoutLMv3Layer", bias="position_bias"),
    _bert(
        "deberta_v2.DebertaV2Layer",
        own="DebertaV2Attention DisentangledSelfAttention DebertaV2SelfOutput DebertaV2Intermediate DebertaV2Output",
        qkv=projections("attention.self", "query_proj key_proj value_proj"),
        chunks="",
        pair=True,
        scores=disentangled,
        also_takes=("relative_pos", "rel_embeddings"),
    ),
    _bert("megatron_bert.MegatronBertLayer", order="before", norms=("attention.ln", "ln")),
    _bert(
        "roberta_prelayernorm.RobertaPreLayerNormLayer",
        order="before",
        norms=("attention.LayerNorm", "intermediate.LayerNorm"),
    ),
    _bert(
        "xlm_roberta_xl.XLMRobertaXLLayer",
        order="before",
        norms=("attention.self_attn_layer_norm", "LayerNorm"),
        branch_p=("attention.output.dropout", ""),
    ),
    _bert(
        "esm.EsmLayer",
        order="before",
        norms=("attention.LayerNorm", "LayerNorm"),
        mlps=(Mlp(("intermediate.dense",), "", "output.dense"),),
        rotary="position_embeddings",
        chunks="",
    ),
    _bert("roformer.RoFormerLayer", scores=_interleaved, also_takes=("sinusoidal_pos",)),
)


def _shared_layers(model: Any, path: str) -> Iterator[nn.Module]:
    """ALBERT's layers in execution order: each group serves several layers."""
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
        output="BaseModelOutput",
    ),
    Encoder(
        model="electra.ElectraModel",
        layers="encoder.layer",
        takes=(*_IDS, "position_ids", "token_type_ids"),
        project="embeddings_project",
        output="BaseModelOutput",
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
        output="BaseModelOutput",
    ),
    Encoder(
        model="nomic_bert.NomicBertModel",
        layers="layers",
        takes=(*_IDS, "position_ids", "token_type_ids"),
        pooler="pooler",
        rotary="rotary_emb",
    ),
    Encoder(
        model="jina_embeddings_v3.JinaEmbeddingsV3Model",
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
