"""Exact FLOP counts of X-FM's GEMMs, for reports and utilisation figures.

A GEMM of `[M, K]` with `[K, N]` counts 2·M·N·K, the two GEMMs of attention included; elementwise work
(norms, softmax, GELU, biases) does not count, nor does tile padding of an implementation. `lengths` are
tokens per sequence, with or without padding: `[40] * 64` is the cost of 64 captions padded to 40.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from xfm_fast.config import XFMConfig

Lengths = Tensor | Iterable[int]


@dataclass(frozen=True)
class Count:
    """FLOPs of linear layers, and of the score and value GEMMs in attention."""

    linear: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.attention

    def __add__(self, term: Count) -> Count:
        return Count(self.linear + term.linear, self.attention + term.attention)

    def __sub__(self, term: Count) -> Count:
        return Count(self.linear - term.linear, self.attention - term.attention)

    def __mul__(self, times: int) -> Count:
        return Count(self.linear * times, self.attention * times)

    __rmul__ = __mul__


def linear(rows: int, inputs: int, outputs: int) -> Count:
    """Count one linear layer on `rows` tokens."""
    return Count(linear=2 * rows * inputs * outputs)


def image_encoder(config: XFMConfig, images: int) -> Count:
    """Count the vision encoder."""
    tokens, width = config.num_image_tokens, config.vision_width
    hidden = int(width * config.vision_mlp_ratio)
    block = linear(tokens, width, 4 * width + 2 * hidden) + Count(attention=4 * tokens**2 * width)
    patches = linear(config.num_patches, 3 * config.patch_size**2, width)
    return images * (patches + config.vision_depth * block)


def text_encoder(config: XFMConfig, lengths: Lengths, *, first_token_only: bool = False) -> Count:
    """Count the language encoder; with `first_token_only` its last layer computes only token 0."""
    sizes = _sizes(lengths)
    layer = _self_attention(config, sizes) + _feed_forward(config, sum(sizes))
    if not first_token_only or not config.text_layers:
        return config.text_layers * layer
    last = _self_attention(config, sizes, [1] * len(sizes)) + _feed_forward(config, len(sizes))
    return (config.text_layers - 1) * layer + last


def contrastive_features(config: XFMConfig, images: int, texts: int) -> Count:
    """Count the projections into the contrastive space."""
    embed = config.embed_dim
    return linear(images, config.vision_width, embed) + linear(texts, config.text_width, embed)


def matching_head(config: XFMConfig, texts: int) -> Count:
    """Count the matching head: fused token 0 to two logits."""
    width = config.text_width
    return linear(texts, width, 2 * width) + linear(texts, 2 * width, 2)


def image_memory(config: XFMConfig, images: int, image_tokens: int | None = None) -> Count:
    """Count the keys and values of every fusion layer."""
    tokens = images * (image_tokens or config.num_image_tokens)
    return config.fusion_layers * linear(tokens, config.vision_width, 2 * config.text_width)


def image_memory_values(config: XFMConfig, image_tokens: int | None = None) -> int:
    """Count the elements in the memory of one image."""
    tokens = image_tokens or config.num_image_tokens
    return config.fusion_layers * tokens * 2 * config.text_width


def first_self_attention(config: XFMConfig, lengths: Lengths) -> Count:
    """Count the self-attention of the first fusion layer, shared by all images of a text."""
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
    """Count the fusion encoder on sequences with the memory of their image.

    `reads` are the tokens per sequence that the last layer computes (default: all; token 0 with
    `first_token_only`); `self_attended` leaves out `first_self_attention`.
    """
    memory = image_tokens or config.num_image_tokens
    sizes = _sizes(lengths)
    last_reads = sizes if reads is None else _sizes(reads)
    if first_token_only:
        last_reads = [1] * len(sizes)
    count = Count()
    for layer in range(config.fusion_layers):
        layer_reads = last_reads if layer == config.fusion_layers - 1 else sizes
        queries = sum(layer_reads)
        if layer or not self_attended:
            count += _self_attention(config, sizes, layer_reads)
        count += linear(queries, config.text_width, 2 * config.text_width)
        count += Count(attention=4 * queries * memory * config.text_width)
        count += _feed_forward(config, queries)
    return count


def official_fusion(
    config: XFMConfig, pairs: int, padded_length: int, image_tokens: int | None = None
) -> Count:
    """Count pairs as the official code scores them: padded, with the image's keys and values for every pair."""
    per_pair = image_memory(config, 1, image_tokens) + fusion(config, [padded_length], image_tokens)
    return pairs * (per_pair + matching_head(config, 1))


def official_pairs(images: int, texts: int, k: int) -> int:
    """Count the pairs of the official evaluation: k texts for every image, then k images for every text."""
    return images * min(k, texts) + texts * min(k, images)


def lm_head(config: XFMConfig, positions: int) -> Count:
    """Count the vocabulary head: hidden states to logits."""
    width = config.text_width
    return linear(positions, width, width) + linear(positions, width, config.vocab_size)


def pretraining_step(config: XFMConfig, lengths: Lengths, masked: Lengths) -> Count:
    """Count the least FLOPs of ITC, ITM, IMLM and MIM on B pairs, forward and backward.

    The backward pass of a GEMM costs two more, one per operand. It is smaller where a gradient stops:
    masked captions pass through the text encoder forward only, and neither pixels nor the text
    embeddings that enter the fusion encoder get one. Keys and values are projected once per image, the
    first self-attention of the fusion encoder runs once per text, and its last layer only on the tokens
    that a head reads. Recomputation does not count, and every caption counts as drawn once as a
    negative. `lengths` and `masked` are tokens and prediction targets per caption.
    """
    sizes, reads = _sizes(lengths), _sizes(masked)
    pairs, tokens = len(sizes), sum(sizes)
    trained = image_encoder(config, 2 * pairs) + text_encoder(config, sizes)
    trained += contrastive_features(config, pairs, pairs) + linear(pairs, config.embed_dim, pairs)
    trained += image_memory(config, pairs) + 2 * first_self_attention(config, sizes)
    trained += fusion(config, sizes, reads=reads, self_attended=True)
    trained += fusion(config, 3 * sizes, first_token_only=True, self_attended=True)
    trained += matching_head(config, 3 * pairs) + lm_head(config, sum(reads))
    patches = 2 * pairs * config.num_patches
    stopped = linear(patches, 3 * config.patch_size**2, config.vision_width)
    stopped += linear(2 * tokens, config.text_width, 3 * config.text_width)
    return 3 * trained + text_encoder(config, sizes) - stopped


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
