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

from .engine import Engine, Pairs
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


class TransformersEngine(Engine):
    """RoBERTa, BEiT and BLIP's text encoder of transformers: those of `vision`, `text`, `fusion` that are `parts`."""

    def __init__(self, model: XFM, parts: frozenset[str]) -> None:
        self.model = model
        transformers: Any = importlib.import_module("transformers")
        settings = roberta_settings(model.config)
        if "vision" in parts:
            self._vision = _load(model, *_beit(transformers, model))
        if "text" in parts:
            text = transformers.RobertaModel(
                transformers.RobertaConfig(**settings), add_pooling_layer=False
            )
            self._text = _load(model, text, _part(model, _TEXT))
        if "fusion" in parts:
            blip: Any = importlib.import_module("transformers.models.blip.modeling_blip_text")
            settings |= {"num_hidden_layers": model.config.fusion_layers, "is_decoder": True}
            config = transformers.BlipTextConfig(
                **settings, encoder_hidden_size=model.config.vision_width
            )
            self._fusion = _load(model, blip.BlipTextEncoder(config), _part(model, _FUSION))

    def embed_images(self, pixels: Tensor) -> Tensor:
        return finish_image(self.model, self._vision(pixels).last_hidden_state)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        longest = int(attention_mask.sum(1).max())
        out = self._text(
            input_ids=input_ids[:, :longest], attention_mask=attention_mask[:, :longest]
        )
        return F.pad(out.last_hidden_state, (0, 0, 0, input_ids.shape[1] - longest))

    def rerank(self, pairs: Pairs) -> Tensor:
        longest = int(pairs.mask.sum(1).max())
        mask = pairs.mask[:, None, None, :longest].to(pairs.embeds.dtype)
        hidden = (1.0 - mask) * torch.finfo(mask.dtype).min
        fused = self._fusion(
            pairs.embeds[:, :longest],
            attention_mask=hidden,
            encoder_hidden_states=pairs.images[pairs.image_of],
        ).last_hidden_state
        return mlp_head(self.model.itm_head, fused[:, 0])[:, 1]


class TimmEngine(Engine):
    """BEiT of timm."""

    def __init__(self, model: XFM) -> None:
        config = model.config
        beit: Any = importlib.import_module("timm.models.beit")
        module = beit.Beit(
            num_classes=0, init_values=config.layer_scale_init, use_abs_pos_emb=False, use_rel_pos_bias=True,
            **beit_settings(config),
        )  # fmt: skip
        state = {
            name: tensor for name, tensor in _part(model, _VISION).items() if name != "mask_token"
        }
        self.model = model
        self._module = _load(model, module, state)

    def embed_images(self, pixels: Tensor) -> Tensor:
        return finish_image(self.model, self._module.forward_features(pixels))


def finish_image(model: XFM, tokens: Tensor) -> Tensor:
    """The end of X-FM's vision encoder on the output of the last block: norm of the patches, their mean in front."""
    patches = layer_norm(model.vision_encoder.fc_norm, tokens[:, 1:])
    return torch.cat((patches.mean(1, keepdim=True), patches), dim=1)


def _part(model: XFM, prefix: str) -> dict[str, Tensor]:
    """The weights of an encoder, under names without its prefix."""
    return {
        n.removeprefix(prefix): t for n, t in model.state_dict().items() if n.startswith(prefix)
    }


def _load(model: XFM, module: Any, state: Mapping[str, Tensor]) -> Any:
    """A module with weights, on the device of the model; RuntimeError if it has other parameters than the weights."""
    outcome = module.load_state_dict(dict(state), strict=False)
    buffers = ("position_ids", "token_type_ids", "relative_position_index")
    wrong = [
        name
        for name in (*outcome.missing_keys, *outcome.unexpected_keys)
        if not name.endswith(buffers)
    ]
    if wrong:
        raise RuntimeError(
            f"{type(module).__name__} of this version has other parameters, such as {wrong[0]}"
        )
    return module.to(model.device, model.dtype).eval().requires_grad_(False)


def roberta_settings(config: XFMConfig) -> dict[str, Any]:
    """The sizes of the text encoder, by the names of transformers."""
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
    """The sizes of the vision encoder, by the names of timm and of the official code."""
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
    """BEiT of transformers, and the weights of the vision encoder under its names."""
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
    spelling = 0 if newer else 1
    named: dict[str, Tensor] = {}
    for name, tensor in _part(model, _VISION).items():
        parts = name.split(".", 2)
        if parts[0] != "blocks":
            if not name.startswith("fc_norm"):
                renamed = name.replace("patch_embed.proj", "patch_embeddings.projection")
                named[f"embeddings.{renamed}"] = tensor
            continue
        block, inner = f"layers.{parts[1]}." if newer else f"encoder.layer.{parts[1]}.", parts[2]
        q, k, v = (f"{block}attention.{part}" for part in _BEIT_QKV[spelling])
        if inner == "attn.qkv.weight":
            named |= {
                f"{target}.weight": part
                for target, part in zip((q, k, v), tensor.chunk(3), strict=True)
            }
        elif inner in ("attn.q_bias", "attn.v_bias"):
            named[f"{q if inner == 'attn.q_bias' else v}.bias"] = tensor
        else:
            stem = next(
                stem for stem in _BEIT_BLOCK if inner == stem or inner.startswith(f"{stem}.")
            )
            named[block + _BEIT_BLOCK[stem][spelling] + inner.removeprefix(stem)] = tensor
    return module, named
