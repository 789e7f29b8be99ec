"""Floating-point operations of a fine-tuned model: those that its losses need, and those of the official procedure.

Counted as in `xfm_fast.flops`; a product costs two more in the backward pass, one for each operand, but that of the
patches one: pixels receive no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xfm_fast import flops
from xfm_fast.config import XFMConfig
from xfm_fast.flops import Count

from ..options import FineTuned


class Costs(NamedTuple):
    """Operations of one step."""

    needed: int
    official: int


class ForwardCosts(NamedTuple):
    """Operations of one forward pass, from pixels and tokens to what the loss is computed from."""

    needed: Count
    official: Count


@dataclass(frozen=True)
class Shape:
    """The sizes of a batch.

    Attributes:
        items: of the batch.
        lengths: tokens of each text; empty where there are none.
        padded: tokens of a padded text.
        answers: for each text, the tokens of its answers.
        padded_answer: tokens of a padded answer.
        given: tokens at the start of a caption that are not learnt.
        decoder_layers: of the decoder, where there is one.
        classes: where items are classified.
    """

    items: int
    lengths: Sequence[int] = ()
    padded: int = 0
    answers: Sequence[Sequence[int]] = ()
    padded_answer: int = 0
    given: int = 1
    decoder_layers: int = 0
    classes: int = 0


def step_costs(name: FineTuned, config: XFMConfig, shape: Shape) -> Costs:
    """Operations of the step of a task, forward and backward; negatives as if every text were drawn once."""
    pixels = flops.linear(_images(name, shape) * config.num_patches, 3 * config.patch_size**2, config.vision_width)
    return Costs(*((3 * forward - pixels).total for forward in forward_costs(name, config, shape)))


def _images(name: FineTuned, shape: Shape) -> int:
    return {"nlvr2": 2 * shape.items, "text": 0}.get(name, shape.items)


def forward_costs(name: FineTuned, config: XFMConfig, shape: Shape) -> ForwardCosts:
    """The same of the forward pass alone."""
    items, lengths, padded = shape.items, list(shape.lengths), [shape.padded] * len(shape.lengths)
    images = _images(name, shape)
    common = flops.image_encoder(config, images)
    needed, official = Count(), Count()
    if name not in ("image", "captioning"):
        needed = flops.text_encoder(config, lengths, first_token_only=name == "text")
        official = flops.text_encoder(config, padded)
    passes = {"retrieval": 3, "vqa": 1, "nlvr2": 2, "grounding": 1}.get(name, 0)
    if passes:
        needed += flops.image_memory(config, images)
        official += passes * items * flops.image_memory(config, 1) + passes * flops.fusion(config, padded)
    if name == "vqa":
        needed += flops.fusion(config, lengths)
        official += sum(map(len, shape.answers)) * (
            _memory(config, shape, shape.padded, config.text_width)
            + _decoding(config, shape, shape.padded_answer, shape.padded_answer, shape.padded)
        )
        for length, answers in zip(lengths, shape.answers, strict=True):
            needed += _memory(config, shape, length, config.text_width)
            for answer in answers:
                needed += _decoding(config, shape, answer - 1, answer - 1, length)
    elif passes:
        needed += flops.first_self_attention(config, lengths)
        needed += flops.fusion(config, passes * lengths, first_token_only=True, self_attended=True)
    if name == "captioning":
        tokens = config.num_image_tokens
        common += items * _memory(config, shape, tokens, config.vision_width)
        official += items * _decoding(config, shape, shape.padded, shape.padded, tokens)
        for length in lengths:
            needed += _decoding(config, shape, length - 1, length - shape.given, tokens)
    common += _heads(name, config, items, shape.classes)
    return ForwardCosts(common + needed, common + official)


def _heads(name: FineTuned, config: XFMConfig, items: int, classes: int) -> Count:
    width = config.text_width
    if name == "retrieval":
        similarity = flops.linear(items, config.embed_dim, items)
        return flops.contrastive_features(config, items, items) + similarity + flops.matching_head(config, 3 * items)
    if name == "image":
        wide = 2 * config.vision_width
        widths = (wide, 2 * wide, 4 * wide, 2 * wide, wide, classes)
        layers = [flops.linear(items, before, after) for before, after in zip(widths, widths[1:], strict=False)]
        return sum(layers, Count())
    inputs, outputs = {"nlvr2": (2 * width, 2), "grounding": (width, 4), "text": (width, classes)}.get(name, (0, 0))
    return flops.linear(items, inputs, 2 * inputs) + flops.linear(items, 2 * inputs, outputs)


def _decoding(config: XFMConfig, shape: Shape, tokens: int, predicted: int, states: int) -> Count:
    """A text through the decoder, whose layers are those of the fusion encoder, and to the vocabulary."""
    layers = flops.fusion(config.replace(fusion_layers=shape.decoder_layers), [tokens], states)
    return layers + flops.lm_head(config, predicted)


def _memory(config: XFMConfig, shape: Shape, states: int, width: int) -> Count:
    """Keys and values of states in every layer of the decoder."""
    return shape.decoder_layers * flops.linear(states, width, 2 * config.text_width)
