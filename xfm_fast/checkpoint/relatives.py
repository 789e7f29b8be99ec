"""Checkpoints of related models: compatible ones are renamed, others are refused with a reason.

X²-VLM (arXiv 2211.12402) has X-FM's vision encoder, with language and fusion in one stack of BERT layers of which the
last ones attend to the image; CCLM-X²-VLM (arXiv 2206.00621) has two stacks, with XLM-R for language. Both start fusion
from the output of the language layers, as X-FM does. X-VLM (arXiv 2111.08276), ALBEF (arXiv 2107.07651) and BLIP (arXiv
2201.12086) have other vision encoders or fusion inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xfm_fast.checkpoint.names import TABLE, LoadReport, fit_table, window_of
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, InputError

_LAYER = re.compile(r"(text|cross)_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.(.+)")
_EMBEDDINGS = re.compile(r"text_encoder\.(?:bert\.)?embeddings\.(.+)")
_VOCABULARY = re.compile(r"(?:text_encoder\.cls|mlm_head)\.predictions\.(.+)")
_VOCABULARY_PARTS = {
    "transform.dense.weight": "lm_head.dense.weight",
    "transform.dense.bias": "lm_head.dense.bias",
    "transform.LayerNorm.weight": "lm_head.layer_norm.weight",
    "transform.LayerNorm.bias": "lm_head.layer_norm.bias",
    "bias": "lm_head.bias",
    "decoder.weight": "roberta.embeddings.word_embeddings.weight",
}
_ALIKE = ("vision_encoder.", "vision_proj.", "text_proj.", "itm_head.", "bbox_head.")
_BUFFERS = (".position_ids", ".relative_position_index")
_POSITIONS = "text_encoder.roberta.embeddings.position_embeddings.weight"
_MASK_TOKEN = "vision_encoder.mask_token"
# Used for videos only.
_FRAMES = "absolute_frame_pos_embed"
# BERT's [PAD], [CLS], [SEP] and [MASK]; its LayerNorms, which the cross encoder of CCLM has too.
_BERT: dict[str, Any] = {
    "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102, "mask_token": 103, "text_layer_norm_eps": 1e-12,
}  # fmt: skip
_XLM_R: dict[str, Any] = {"fusion_layer_norm_eps": 1e-12}
_HEAD_WIDTH = 64
_SHOWN = 4
_KEEP = "run its own code with xfm_fast.accelerate(model) and xfm_fast.replace.Reranker"


class Relative(NamedTuple):
    """A related checkpoint, converted to X-FM."""

    config: XFMConfig
    state: dict[str, Tensor]
    report: LoadReport


def relative_of(names: Iterable[str]) -> str | None:
    """Name of the related model with these parameters; None for X-FM and unknown models."""
    names = set(names)
    if any(name.startswith("fusion_encoder.") for name in names):
        return None
    if any(name.startswith("cross_encoder.encoder.layer.") for name in names):
        return "CCLM-X²-VLM"
    looks = any(".crossattention." in name for name in names)
    if f"vision_encoder.blocks.0{TABLE}" in names:
        return "X²-VLM" if looks else None
    if any(
        name.startswith(("vision_encoder.layers.", "vision_encoder.encoder.layers."))
        for name in names
    ):
        return "X-VLM"
    if "vision_encoder.pos_embed" in names and looks:
        return "X-VLM"
    if "visual_encoder.pos_embed" in names and looks:
        # BLIP's first layer attends to the image, ALBEF's language layers do not.
        return "BLIP" if any(".layer.0.crossattention." in name for name in names) else "ALBEF"
    return None


def refuse_relative(names: Iterable[str], what: str) -> None:
    """Raise `CheckpointError` for a related model's checkpoint, with the way to use it."""
    names = set(names)
    if (name := relative_of(names)) is None:
        return
    if (reason := _difference(names, name)) is not None:
        raise CheckpointError(f"{what} is a checkpoint of {name}, another model: {reason}; {_KEEP}")
    raise CheckpointError(
        f"{what} is a checkpoint of {name}; load it with XFM.from_x2vlm, or run xfm-fast convert"
    )


def _difference(names: set[str], name: str) -> str | None:
    """Why X-FM computes something else; None if it computes the same."""
    if f"vision_encoder.blocks.0{TABLE}" in names:
        return None
    found = "its vision transformer has absolute positions"
    if any(each.startswith("vision_encoder.layers.") for each in names):
        found = "its vision encoder is a Swin transformer"
    if name == "BLIP":
        found += ", and its fusion encoder starts from word embeddings"
    return found


def read_x2vlm(
    state: Mapping[str, Tensor],
    *,
    what: str,
    image_size: int | None = None,
    text_heads: int | None = None,
) -> Relative:
    """Convert a pretraining, retrieval or grounding checkpoint of X²-VLM or CCLM-X²-VLM to X-FM.

    Sizes are inferred from the weights, except `text_heads` (default: one per 64 columns) and, if given, `image_size`,
    to which position tables are interpolated. BERT's positions move up by one row, since row `pad_token_id` is padding
    here. A vocabulary head belongs to fusion: X²-VLM's language layers have no such head. The mask token, which X²-VLM
    lacks, is zero; video frame positions are dropped. `what` names the checkpoint in errors. Raises `CheckpointError`.
    """
    name = relative_of(state)
    if name is None:
        raise CheckpointError(
            f"{what} is not X²-VLM with BEiT-v2 (first entries: {', '.join([*state][:_SHOWN]) or 'none'}); "
            "load X-FM with from_official"
        )
    if _difference(set(state), name) is not None:
        refuse_relative(state, what)
    # The first layer of a single stack that attends to the image; beyond the last one if fusion has its own stack.
    found = [each for each in map(_LAYER.fullmatch, state) if each and each[1] == "text"]
    looking = [int(each[2]) for each in found if each[3].startswith("crossattention.")]
    first_cross_layer = min(looking) if looking and name == "X²-VLM" else 1 << 30
    report = LoadReport()
    ours: dict[str, Tensor] = {}
    foreign = []
    for theirs, value in state.items():
        if theirs.endswith(_BUFFERS):
            report.buffers.append(theirs)
            continue
        if theirs == _FRAMES:
            report.unused[theirs] = value
            continue
        new = _our_name(theirs, first_cross_layer)
        if new is None:
            foreign.append(theirs)
            continue
        if new != theirs:
            report.renamed[theirs] = new
        ours[new] = value
    if foreign:
        shown = ", ".join(foreign[:_SHOWN]) + (
            f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        )
        raise CheckpointError(
            f"{what} is a checkpoint of {name} with unsupported parts ({shown}); "
            "give one of pretraining, retrieval or grounding"
        )
    config = _config(ours, name, what, image_size, text_heads)
    if _MASK_TOKEN not in ours:
        ours[_MASK_TOKEN] = torch.zeros(
            1, 1, config.vision_width, dtype=ours["vision_encoder.cls_token"].dtype
        )
    if config.pad_token_id == _BERT["pad_token_id"]:
        table = ours[_POSITIONS]
        ours[_POSITIONS] = torch.cat([table.new_zeros(1, table.shape[1]), table])
    for each, value in ours.items():
        if each.endswith(TABLE):
            ours[each] = fit_table(each, value, config.grid, report.interpolated)
    return Relative(config, ours, report)


def _our_name(name: str, first_cross_layer: int) -> str | None:
    if found := _LAYER.fullmatch(name):
        part, number, rest = found[1], int(found[2]), found[3]
        if part == "cross" or number >= first_cross_layer:
            number -= 0 if part == "cross" else first_cross_layer
            return f"fusion_encoder.roberta.encoder.layer.{number}.{rest}"
        return f"text_encoder.roberta.encoder.layer.{number}.{rest}"
    if found := _EMBEDDINGS.fullmatch(name):
        return f"text_encoder.roberta.embeddings.{found[1]}"
    if found := _VOCABULARY.fullmatch(name):
        return (
            f"fusion_encoder.{_VOCABULARY_PARTS[found[1]]}"
            if found[1] in _VOCABULARY_PARTS
            else None
        )
    return name if name == "temp" or name.startswith(_ALIKE) else None


def _config(
    state: Mapping[str, Tensor],
    name: str,
    what: str,
    image_size: int | None,
    text_heads: int | None,
) -> XFMConfig:
    def size(key: str, dimension: int) -> int:
        if key not in state or state[key].dim() <= dimension:
            raise CheckpointError(
                f"{what} is a checkpoint of {name}, but {key} is missing or misshapen; give the whole file"
            )
        return state[key].shape[dimension]

    def depth(prefix: str) -> int:
        numbers = {
            int(each[len(prefix) :].partition(".")[0]) for each in state if each.startswith(prefix)
        }
        return max(numbers, default=-1) + 1

    text = "text_encoder.roberta."
    width, vision = (
        size(f"{text}embeddings.word_embeddings.weight", 1),
        size("vision_encoder.cls_token", 2),
    )
    patch = size("vision_encoder.patch_embed.proj.weight", 3)
    first_table = f"vision_encoder.blocks.0{TABLE}"
    try:
        pixels = window_of(state[first_table]) * patch if image_size is None else image_size
    except InputError as error:
        raise CheckpointError(f"{what}: {first_table}: {error}") from None
    if text_heads is None and width % _HEAD_WIDTH:
        raise CheckpointError(
            f"{what}: the number of heads is unknown for layers of {width} columns; give text_heads="
        )
    # BERT has two token types, RoBERTa and XLM-R one.
    of_bert = size(f"{text}embeddings.token_type_embeddings.weight", 0) > 1
    positions = size(_POSITIONS, 0)
    fusion = depth("fusion_encoder.roberta.encoder.layer.")
    projected = state.get("vision_proj.weight")
    patches = (pixels // patch) ** 2
    return XFMConfig(
        image_size=pixels, patch_size=patch, vision_width=vision, vision_depth=depth("vision_encoder.blocks."),
        vision_heads=size(first_table, 1),
        vision_mlp_ratio=size("vision_encoder.blocks.0.mlp.fc1.weight", 0) / vision,
        text_width=width, text_layers=depth(f"{text}encoder.layer."), fusion_layers=fusion,
        text_heads=width // _HEAD_WIDTH if text_heads is None else text_heads,
        text_intermediate=size("fusion_encoder.roberta.encoder.layer.0.intermediate.dense.weight", 0),
        vocab_size=size(f"{text}embeddings.word_embeddings.weight", 0),
        max_positions=positions + 1 if of_bert else positions,
        type_vocab_size=size(f"{text}embeddings.token_type_embeddings.weight", 0),
        embed_dim=256 if projected is None else projected.shape[0],
        learnable_temperature="temp" in state or projected is None,
        num_masking_patches=max(1, min(75, patches)),
        **(_BERT if of_bert else _XLM_R),
    )  # fmt: skip
