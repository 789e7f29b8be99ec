"""Exact counts of the floating-point operations of matrix products, for receipts and shares of a machine's peak.

A product of `[M, K]` with `[K, N]` counts 2·M·N·K; the two products of attention count like any other; elementwise work
(norms, softmax, GELU, biases) does not count. These are the operations that the result needs: tiles that an
implementation pads are its own loss. Everywhere `lengths` are the tokens of each text, padded or not, as the caller
means them: `[40] * 64` is what 64 captions cost where they are padded to 40.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from xfm_fast.config import XFMConfig

Lengths = Tensor | Iterable[int]


@dataclass(frozen=True)
class Count:
    """Operations of linear layers, and of the products with keys and values inside attention."""

    linear: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.attention

    def __add__(self, other: Count) -> Count:
        return Count(self.linear + other.linear, self.attention + other.attention)

    def __sub__(self, other: Count) -> Count:
        return Count(self.linear - other.linear, self.attention - other.attention)

    def __mul__(self, times: int) -> Count:
        return Count(self.linear * times, self.attention * times)

    __rmul__ = __mul__


def linear(rows: int, inputs: int, outputs: int) -> Count:
    """One linear layer on `rows` tokens."""
    return Count(linear=2 * rows * inputs * outputs)


def image_encoder(config: XFMConfig, images: int) -> Count:
    """Pixels to embeddings."""
    tokens, width = config.num_image_tokens, config.vision_width
    hidden = int(width * config.vision_mlp_ratio)
    block = linear(tokens, width, 4 * width + 2 * hidden) + Count(attention=4 * tokens**2 * width)
    patches = linear(config.num_patches, 3 * config.patch_size**2, width)
    return images * (patches + config.vision_depth * block)


def text_encoder(config: XFMConfig, lengths: Lengths, *, first_token_only: bool = False) -> Count:
    """Token ids to embeddings; with `first_token_only` the last layer computes token 0 of each text alone."""
    sizes = _sizes(lengths)
    layer = _self_attention(config, sizes) + _feed_forward(config, sum(sizes))
    if not first_token_only or not config.text_layers:
        return config.text_layers * layer
    last = _self_attention(config, sizes, [1] * len(sizes)) + _feed_forward(config, len(sizes))
    return (config.text_layers - 1) * layer + last


def contrastive_features(config: XFMConfig, images: int, texts: int) -> Count:
    """The projections into the contrastive space."""
    embed = config.embed_dim
    return linear(images, config.vision_width, embed) + linear(texts, config.text_width, embed)


def matching_head(config: XFMConfig, texts: int) -> Count:
    """Fused token 0 to the two match logits."""
    width = config.text_width
    return linear(texts, width, 2 * width) + linear(texts, 2 * width, 2)


def image_memory(config: XFMConfig, images: int, image_tokens: int | None = None) -> Count:
    """Keys and values of every fusion layer."""
    tokens = config.num_image_tokens if image_tokens is None else image_tokens
    return config.fusion_layers * linear(images * tokens, config.vision_width, 2 * config.text_width)


def image_memory_values(config: XFMConfig, image_tokens: int | None = None) -> int:
    """Numbers that the memory of one image holds."""
    tokens = config.num_image_tokens if image_tokens is None else image_tokens
    return config.fusion_layers * tokens * 2 * config.text_width


def first_self_attention(config: XFMConfig, lengths: Lengths) -> Count:
    """Self-attention of the first fusion layer, which all images of a text share."""
    return _self_attention(config, _sizes(lengths))


def fusion(
    config: XFMConfig,
    lengths: Lengths,
    image_tokens: int | None = None,
    *,
    first_token_only: bool = False,
    reads: Lengths | None = None,
    self_attended: bool = False,
) -> Count:
    """Texts with the memory of their image.

    Args:
        lengths: tokens of each text.
        image_tokens: of every image.
        first_token_only: the last layer computes token 0 of each text alone.
        reads: how many tokens of each text the last layer computes; by default all.
        self_attended: the texts come from `first_self_attention`.
    """
    memory = config.num_image_tokens if image_tokens is None else image_tokens
    sizes = _sizes(lengths)
    last = [1] * len(sizes) if first_token_only else sizes if reads is None else _sizes(reads)
    count = Count()
    for number in range(config.fusion_layers):
        read = last if number == config.fusion_layers - 1 else sizes
        queries = sum(read)
        if number or not self_attended:
            count += _self_attention(config, sizes, read)
        count += linear(queries, config.text_width, 2 * config.text_width)
        count += Count(attention=4 * queries * memory * config.text_width)
        count += _feed_forward(config, queries)
    return count


def official_fusion(config: XFMConfig, pairs: int, padded_length: int, image_tokens: int | None = None) -> Count:
    """Pairs as the official code scores them: padded, and with keys and values of the image for every one."""
    alone = image_memory(config, 1, image_tokens) + fusion(config, [padded_length], image_tokens)
    return pairs * (alone + matching_head(config, 1))


def official_pairs(images: int, texts: int, k: int) -> int:
    """Pairs that the official evaluation scores: k texts for every image, then k images for every text."""
    return images * min(k, texts) + texts * min(k, images)


def lm_head(config: XFMConfig, positions: int) -> Count:
    """Hidden states to the vocabulary logits of masked language modelling."""
    width = config.text_width
    return linear(positions, width, width) + linear(positions, width, config.vocab_size)


def pretraining_step(config: XFMConfig, lengths: Lengths, masked: Lengths) -> Count:
    """Operations that ITC, ITM, IMLM and MIM of B pairs need, forward and backward.

    A product costs two more in the backward pass, one for the gradient of each operand. Less is needed where a gradient
    stops: masked captions pass through the text encoder forward only, and neither pixels nor the text embeddings that
    enter the fusion encoder receive one. Keys and values are projected once per image, the first self-attention of the
    fusion encoder is done once per text, and its last layer only where a head reads: at token 0 of matching pairs, at
    the masked positions of masked captions. What an implementation computes twice to save memory is its own affair.

    Args:
        lengths: tokens of each of the B captions. Negatives are counted as if every caption were drawn once.
        masked: tokens to predict in each of them.
    """
    sizes, reads = _sizes(lengths), _sizes(masked)
    pairs = len(sizes)
    trained = _encoders_and_features(config, sizes)
    trained += image_memory(config, pairs) + matching_head(config, 3 * pairs) + lm_head(config, sum(reads))
    trained += 2 * first_self_attention(config, sizes) + fusion(config, sizes, reads=reads, self_attended=True)
    trained += fusion(config, 3 * sizes, first_token_only=True, self_attended=True)
    return 3 * trained + text_encoder(config, sizes) - _stopped(config, pairs, 2 * sum(sizes))


def official_pretraining_step(config: XFMConfig, pairs: int, padded_length: int, slots: int) -> Count:
    """The same losses of B pairs as the official code computes them: padded, with an image memory for every pair.

    Args:
        padded_length: tokens of every caption.
        slots: positions of every caption that reach the vocabulary, used or not.
    """
    sizes = [padded_length] * pairs
    trained = _encoders_and_features(config, sizes) + lm_head(config, slots * pairs)
    # Three of the four passes end in the matching head, one in the vocabulary.
    trained += official_fusion(config, 4 * pairs, padded_length) - matching_head(config, pairs)
    similarity_again = linear(pairs, config.embed_dim, pairs)
    forward_only = text_encoder(config, sizes) + similarity_again
    return 3 * trained + forward_only - _stopped(config, pairs, 4 * sum(sizes))


def _encoders_and_features(config: XFMConfig, sizes: list[int]) -> Count:
    """B images whole and masked, B texts, their features and similarities."""
    pairs = len(sizes)
    encoders = image_encoder(config, 2 * pairs) + text_encoder(config, sizes)
    return encoders + contrastive_features(config, pairs, pairs) + linear(pairs, config.embed_dim, pairs)


def _stopped(config: XFMConfig, images: int, tokens: int) -> Count:
    """Input gradients that are never needed: of pixels, whole and masked, and of text tokens in the fusion encoder."""
    patches = linear(2 * images * config.num_patches, 3 * config.patch_size**2, config.vision_width)
    return patches + linear(tokens, config.text_width, 3 * config.text_width)


def _sizes(lengths: Lengths) -> list[int]:
    return lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)


def _self_attention(config: XFMConfig, sizes: list[int], reads: list[int] | None = None) -> Count:
    reads = sizes if reads is None else reads
    width, tokens, queries = config.text_width, sum(sizes), sum(reads)
    scores = sum(read * size for read, size in zip(reads, sizes, strict=True))
    projections = linear(queries, width, 2 * width) + linear(tokens, width, 2 * width)
    return projections + Count(attention=4 * scores * width)


def _feed_forward(config: XFMConfig, tokens: int) -> Count:
    return linear(tokens, config.text_width, 2 * config.text_intermediate)
