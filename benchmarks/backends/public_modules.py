"""Modules of Hugging Face transformers and timm with the weights of an X-FM: the best plain alternatives to install.

RoBERTa is the text encoder, BEiT the vision encoder up to its last norm, and BLIP's text encoder the fusion encoder,
all exactly; what they lack (the mean image token, the matching head) is added in plain PyTorch. Texts are padded to the
longest of a batch, as these libraries do it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.config import XFMConfig
from xfm_fast.models.xfm import XFM

from . import Engine, Pairs, score_together, search_images
from .official_algorithm import layer_norm, mlp_head

_VISION, _TEXT, _FUSION = (
    "vision_encoder.",
    "text_encoder.roberta.",
    "fusion_encoder.roberta.encoder.",
)
# Names of a BEiT block in transformers 5 and, behind them, in 4.
_BEIT_BLOCK = {
    "gamma_1": ("lambda_1", "lambda_1"),
    "gamma_2": ("lambda_2", "lambda_2"),
    "norm1": ("layernorm_before", "layernorm_before"),
    "norm2": ("layernorm_after", "layernorm_after"),
    "mlp.fc1": ("mlp.fc1", "intermediate.dense"),
    "mlp.fc2": ("mlp.fc2", "output.dense"),
    "attn.proj": ("attention.o_proj", "attention.output.dense"),
    "attn.relative_position_bias_table": (
        "relative_position_bias.relative_position_bias_table",
        "attention.attention.relative_position_bias.relative_position_bias_table",
    ),
}
_BEIT_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("attention.query", "attention.key", "attention.value"),
)


def transformers_engine(model: XFM, encoders: frozenset[str]) -> Engine:
    """Return RoBERTa, BEiT and BLIP's text encoder of transformers, as far as `encoders` names text, vision, fusion."""
    transformers: Any = importlib.import_module("transformers")
    settings = roberta_settings(model.config)
    engine = Engine()
    if "vision" in encoders:
        vision = _load(model, *_beit(transformers, model))
        engine.embed_images = lambda pixels: finish_image(model, vision(pixels).last_hidden_state)
    if "text" in encoders:
        config = transformers.RobertaConfig(**settings)
        roberta = transformers.RobertaModel(config, add_pooling_layer=False)
        engine.embed_texts = partial(_embed_texts, _load(model, roberta, _weights(model, _TEXT)))
    if "fusion" in encoders:
        blip: Any = importlib.import_module("transformers.models.blip.modeling_blip_text")
        settings |= {"num_hidden_layers": model.config.fusion_layers, "is_decoder": True}
        width = model.config.vision_width
        config = transformers.BlipTextConfig(**settings, encoder_hidden_size=width)
        fusion = _load(model, blip.BlipTextEncoder(config), _weights(model, _FUSION))
        engine.rerank = partial(_rerank, model, fusion)
    score = partial(score_together, engine.rerank)
    engine.search = partial(search_images, model, engine.embed_texts, score)
    return engine


def _embed_texts(roberta: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    longest = int(attention_mask.sum(1).max())
    out = roberta(input_ids=input_ids[:, :longest], attention_mask=attention_mask[:, :longest])
    return F.pad(out.last_hidden_state, (0, 0, 0, input_ids.shape[1] - longest))


def _rerank(model: Any, fusion: Any, pairs: Pairs) -> Tensor:
    longest = int(pairs.mask.sum(1).max())
    mask = pairs.mask[:, None, None, :longest].to(pairs.embeds.dtype)
    fused = fusion(
        pairs.embeds[:, :longest],
        attention_mask=(1.0 - mask) * torch.finfo(mask.dtype).min,
        encoder_hidden_states=pairs.images[pairs.image_of],
    ).last_hidden_state
    return mlp_head(model.itm_head, fused[:, 0])[:, 1]


def timm_engine(model: XFM) -> Engine:
    """Return BEiT of timm."""
    beit: Any = importlib.import_module("timm.models.beit")
    module = beit.Beit(
        num_classes=0,
        init_values=model.config.layer_scale_init,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        **beit_settings(model.config),
    )
    state = _weights(model, _VISION)
    state.pop("mask_token", None)
    module = _load(model, module, state)
    return Engine(embed_images=lambda pixels: finish_image(model, module.forward_features(pixels)))


def finish_image(model: XFM, tokens: Tensor) -> Tensor:
    """Normalise the patches of the last block and put their mean in front, as X-FM's vision encoder does."""
    patches = layer_norm(model.vision_encoder.fc_norm, tokens[:, 1:])
    return torch.cat((patches.mean(1, keepdim=True), patches), dim=1)


def _weights(model: XFM, prefix: str) -> dict[str, Tensor]:
    """Return the weights of an encoder, under names without its prefix."""
    state = model.state_dict().items()
    return {name.removeprefix(prefix): t for name, t in state if name.startswith(prefix)}


def _load(model: XFM, module: Any, state: Mapping[str, Tensor]) -> Any:
    """Load weights into a module, on the device of the model; raises `RuntimeError` if names differ."""
    outcome = module.load_state_dict(dict(state), strict=False)
    buffers = ("position_ids", "token_type_ids", "relative_position_index")
    names = (*outcome.missing_keys, *outcome.unexpected_keys)
    wrong = [name for name in names if not name.endswith(buffers)]
    if wrong:
        raise RuntimeError(
            f"{type(module).__name__} of this version has other parameters, such as {wrong[0]}"
        )
    return module.to(model.device, model.dtype).eval().requires_grad_(False)


def roberta_settings(config: XFMConfig) -> dict[str, Any]:
    """Return the sizes of the text encoder under the names of transformers."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "intermediate_size": config.text_intermediate,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.text_layer_norm_eps,
        "hidden_act": "gelu",
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def beit_settings(config: XFMConfig) -> dict[str, Any]:
    """Return the sizes of the vision encoder under the names of timm and of the official code."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.vision_width,
        "depth": config.vision_depth,
        "num_heads": config.vision_heads,
        "mlp_ratio": config.vision_mlp_ratio,
        "norm_layer": partial(nn.LayerNorm, eps=config.vision_layer_norm_eps),
    }


def _beit(transformers: Any, model: XFM) -> tuple[Any, dict[str, Tensor]]:
    """Return BEiT of transformers, and the weights of the vision encoder under its names."""
    config = model.config
    settings = transformers.BeitConfig(
        hidden_size=config.vision_width,
        num_hidden_layers=config.vision_depth,
        num_attention_heads=config.vision_heads,
        intermediate_size=int(config.vision_width * config.vision_mlp_ratio),
        layer_norm_eps=config.vision_layer_norm_eps,
        image_size=config.image_size,
        patch_size=config.patch_size,
        use_mask_token=True,
        use_relative_position_bias=True,
        use_mean_pooling=True,  # leaves the norm to the pooler, which is not built
        layer_scale_init_value=config.layer_scale_init,
        drop_path_rate=0.0,
        hidden_act="gelu",
    )
    module = transformers.BeitModel(settings, add_pooling_layer=False)
    newer = any(name.startswith("layers.") for name in module.state_dict())
    version = 0 if newer else 1
    state: dict[str, Tensor] = {}
    for name, tensor in _weights(model, _VISION).items():
        if name.startswith("fc_norm"):
            continue
        if not name.startswith("blocks."):
            name = name.replace("patch_embed.proj", "patch_embeddings.projection")
            state[f"embeddings.{name}"] = tensor
            continue
        _, layer, inner = name.split(".", 2)
        block = f"layers.{layer}." if newer else f"encoder.layer.{layer}."
        q, k, v = (f"{block}attention.{projection}" for projection in _BEIT_QKV[version])
        if inner == "attn.qkv.weight":
            weights = tensor.chunk(3)
            state |= {
                f"{q}.weight": weights[0],
                f"{k}.weight": weights[1],
                f"{v}.weight": weights[2],
            }
        elif inner == "attn.q_bias":
            state[f"{q}.bias"] = tensor
        elif inner == "attn.v_bias":
            state[f"{v}.bias"] = tensor
        else:
            stem = next(s for s in _BEIT_BLOCK if inner == s or inner.startswith(f"{s}."))
            state[block + _BEIT_BLOCK[stem][version] + inner.removeprefix(stem)] = tensor
    return module, state
