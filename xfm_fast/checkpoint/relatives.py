"""Checkpoints of related models: compatible ones are renamed, others are refused with a reason.

X²-VLM (arXiv 2211.12402) has X-FM's vision encoder, with language and fusion in one stack of BERT
layers of which the last ones attend to the image; CCLM-X²-VLM (arXiv 2206.00621) has two stacks,
with XLM-R for language. Both start fusion from the output of the language layers, as X-FM does.
X-VLM (arXiv 2111.08276), ALBEF (arXiv 2107.07651) and BLIP (arXiv 2201.12086) have other vision
encoders or fusion inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xfm_fast.checkpoint.files import StateDict
from xfm_fast.checkpoint.names import TABLE, LoadReport, fit_table, window_of
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, InputError

_LAYER = re.compile(r"(text|cross)_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.(.+)")
_EMBEDDINGS = re.compile(r"text_encoder\.(?:bert\.)?embeddings\.(.+)")
_VOCABULARY = re.compile(r"(?:text_encoder\.cls|mlm_head)\.predictions\.(.+)")
_VOCABULARY_NAMES = {
    "transform.dense.weight": "lm_head.dense.weight",
    "transform.dense.bias": "lm_head.dense.bias",
    "transform.LayerNorm.weight": "lm_head.layer_norm.weight",
    "transform.LayerNorm.bias": "lm_head.layer_norm.bias",
    "bias": "lm_head.bias",
    "decoder.weight": "roberta.embeddings.word_embeddings.weight",
}
_SAME_NAMES = ("vision_encoder.", "vision_proj.", "text_proj.", "itm_head.", "bbox_head.")
_BUFFERS = (".position_ids", ".relative_position_index")
_POSITIONS = "text_encoder.roberta.embeddings.position_embeddings.weight"
_MASK_TOKEN = "vision_encoder.mask_token"
# For videos only.
_FRAMES = "absolute_frame_pos_embed"
# BERT's [PAD], [CLS], [SEP] and [MASK], and its LayerNorms, which CCLM's cross encoder shares.
_BERT: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 101,
    "eos_token_id": 102,
    "mask_token": 103,
    "text_layer_norm_eps": 1e-12,
}
_XLM_R: dict[str, Any] = {"fusion_layer_norm_eps": 1e-12}
_HEAD_WIDTH = 64
_EXAMPLES = 4
_ALTERNATIVE = "run its own code with xfm_fast.accelerate(model) and xfm_fast.replace.Reranker"


class Relative(NamedTuple):
    """A related checkpoint, converted to X-FM."""

    config: XFMConfig
    state: dict[str, Tensor]
    report: LoadReport


def relative_of(names: Iterable[str]) -> str | None:
    """Identify the related model with these parameters; None for X-FM and unknown models."""
    names = set(names)
    if any(name.startswith("fusion_encoder.") for name in names):
        return None
    if any(name.startswith("cross_encoder.encoder.layer.") for name in names):
        return "CCLM-X²-VLM"
    cross_attention = any(".crossattention." in name for name in names)
    if f"vision_encoder.blocks.0{TABLE}" in names:
        return "X²-VLM" if cross_attention else None
    swin = ("vision_encoder.layers.", "vision_encoder.encoder.layers.")
    if any(name.startswith(swin) for name in names):
        return "X-VLM"
    if "vision_encoder.pos_embed" in names and cross_attention:
        return "X-VLM"
    if "visual_encoder.pos_embed" in names and cross_attention:
        # BLIP's first layer attends to the image, ALBEF's language layers do not.
        return "BLIP" if any(".layer.0.crossattention." in name for name in names) else "ALBEF"
    return None


def refuse_relative(names: Iterable[str], what: str) -> None:
    """Raise `CheckpointError` for a related model's checkpoint, with the way to use it."""
    names = set(names)
    if (name := relative_of(names)) is None:
        return
    if (reason := _difference(names, name)) is not None:
        raise CheckpointError(
            f"{what} is a checkpoint of {name}, another model: {reason}; {_ALTERNATIVE}"
        )
    raise CheckpointError(
        f"{what} is a checkpoint of {name}; load it with XFM.from_x2vlm, or run xfm-fast convert"
    )


def _difference(names: set[str], name: str) -> str | None:
    """Say why X-FM computes something else; None if it computes the same."""
    if f"vision_encoder.blocks.0{TABLE}" in names:
        return None
    reason = "its vision transformer has absolute positions"
    if any(name.startswith("vision_encoder.layers.") for name in names):
        reason = "its vision encoder is a Swin transformer"
    if name == "BLIP":
        reason += ", and its fusion encoder starts from word embeddings"
    return reason


def read_x2vlm(
    state: StateDict,
    *,
    what: str,
    image_size: int | None = None,
    text_heads: int | None = None,
) -> Relative:
    """Convert a pretraining, retrieval or grounding checkpoint of X²-VLM or CCLM-X²-VLM to X-FM.

    Sizes are inferred from the weights, except `text_heads` (default: one per 64 columns) and, if
    given, `image_size`, to which position tables are interpolated. BERT's positions move up by one
    row, since row `pad_token_id` is padding here. A vocabulary head belongs to fusion: X²-VLM's
    language layers have no such head. The mask token, which X²-VLM lacks, is zero; video frame
    positions are dropped. `what` names the checkpoint in errors. Raises `CheckpointError`.
    """
    name = relative_of(state)
    if name is None:
        raise CheckpointError(
            f"{what} is not X²-VLM with BEiT-v2 (first entries: {', '.join([*state][:_EXAMPLES]) or 'none'}); "
            "load X-FM with from_official"
        )
    if _difference(set(state), name) is not None:
        refuse_relative(state, what)
    # Fusion begins with the first layer of a single stack that has cross-attention, or has a stack
    # of its own.
    first_cross_layer = 1 << 30
    if name == "X²-VLM":
        for match in map(_LAYER.fullmatch, state):
            if match and match[1] == "text" and match[3].startswith("crossattention."):
                first_cross_layer = min(first_cross_layer, int(match[2]))
    report = LoadReport()
    ours: dict[str, Tensor] = {}
    foreign = []
    for source, value in state.items():
        if source.endswith(_BUFFERS):
            report.buffers.append(source)
        elif source == _FRAMES:
            report.unused[source] = value
        elif (target := _our_name(source, first_cross_layer)) is None:
            foreign.append(source)
        else:
            if target != source:
                report.renamed[source] = target
            ours[target] = value
    if foreign:
        examples = ", ".join(foreign[:_EXAMPLES])
        if len(foreign) > _EXAMPLES:
            examples += f" and {len(foreign) - _EXAMPLES} more"
        raise CheckpointError(
            f"{what} is a checkpoint of {name} with unsupported modules ({examples}); "
            "give one of pretraining, retrieval or grounding"
        )
    config = _infer_config(ours, name, what, image_size, text_heads)
    if _MASK_TOKEN not in ours:
        ours[_MASK_TOKEN] = torch.zeros(
            1, 1, config.vision_width, dtype=ours["vision_encoder.cls_token"].dtype
        )
    if config.pad_token_id == _BERT["pad_token_id"]:
        table = ours[_POSITIONS]
        ours[_POSITIONS] = torch.cat([table.new_zeros(1, table.shape[1]), table])
    for key, value in ours.items():
        if key.endswith(TABLE):
            ours[key] = fit_table(key, value, config.grid, report.interpolated)
    return Relative(config, ours, report)


def _our_name(name: str, first_cross_layer: int) -> str | None:
    """Return X-FM's name of a parameter; None if X-FM lacks it."""
    if match := _LAYER.fullmatch(name):
        encoder, layer, parameter = match[1], int(match[2]), match[3]
        if encoder == "text" and layer >= first_cross_layer:
            encoder, layer = "cross", layer - first_cross_layer
        module = "text_encoder" if encoder == "text" else "fusion_encoder"
        return f"{module}.roberta.encoder.layer.{layer}.{parameter}"
    if match := _EMBEDDINGS.fullmatch(name):
        return f"text_encoder.roberta.embeddings.{match[1]}"
    if match := _VOCABULARY.fullmatch(name):
        parameter = _VOCABULARY_NAMES.get(match[1])
        return None if parameter is None else f"fusion_encoder.{parameter}"
    return name if name == "temp" or name.startswith(_SAME_NAMES) else None


def _infer_config(
    state: StateDict,
    name: str,
    what: str,
    image_size: int | None,
    text_heads: int | None,
) -> XFMConfig:
    """Infer the configuration from the shapes of a state dict with X-FM's names."""

    def size(key: str, dimension: int) -> int:
        if key not in state or state[key].dim() <= dimension:
            raise CheckpointError(
                f"{what} is a checkpoint of {name}, but {key} is missing or misshapen; give the whole file"
            )
        return state[key].shape[dimension]

    def depth(prefix: str) -> int:
        layers = {
            int(key.removeprefix(prefix).partition(".")[0])
            for key in state
            if key.startswith(prefix)
        }
        return max(layers, default=-1) + 1

    embeddings = "text_encoder.roberta.embeddings"
    text_width = size(f"{embeddings}.word_embeddings.weight", 1)
    vision_width = size("vision_encoder.cls_token", 2)
    patch = size("vision_encoder.patch_embed.proj.weight", 3)
    table = f"vision_encoder.blocks.0{TABLE}"
    if image_size is None:
        try:
            image_size = window_of(state[table]) * patch
        except InputError as error:
            raise CheckpointError(f"{what}: {table}: {error}") from None
    if text_heads is None:
        if text_width % _HEAD_WIDTH:
            raise CheckpointError(
                f"{what}: the number of heads is unknown for layers of {text_width} columns; give text_heads="
            )
        text_heads = text_width // _HEAD_WIDTH
    token_types = size(f"{embeddings}.token_type_embeddings.weight", 0)
    # BERT has two token types, RoBERTa and XLM-R one.
    is_bert = token_types > 1
    projection = state.get("vision_proj.weight")
    fusion_layer = "fusion_encoder.roberta.encoder.layer."
    return XFMConfig(
        image_size=image_size,
        patch_size=patch,
        vision_width=vision_width,
        vision_depth=depth("vision_encoder.blocks."),
        vision_heads=size(table, 1),
        vision_mlp_ratio=size("vision_encoder.blocks.0.mlp.fc1.weight", 0) / vision_width,
        text_width=text_width,
        text_layers=depth("text_encoder.roberta.encoder.layer."),
        fusion_layers=depth(fusion_layer),
        text_heads=text_heads,
        text_intermediate=size(f"{fusion_layer}0.intermediate.dense.weight", 0),
        vocab_size=size(f"{embeddings}.word_embeddings.weight", 0),
        max_positions=size(_POSITIONS, 0) + (1 if is_bert else 0),
        type_vocab_size=token_types,
        embed_dim=256 if projection is None else projection.shape[0],
        learnable_temperature="temp" in state or projection is None,
        num_masking_patches=max(1, min(75, (image_size // patch) ** 2)),
        **(_BERT if is_bert else _XLM_R),
    )
