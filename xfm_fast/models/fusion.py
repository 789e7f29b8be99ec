"""The fusion encoder: texts attend to images, whose keys and values are projected once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.config import XFMConfig
from xfm_fast.models.shares import Texts, run_chunked
from xfm_fast.models.text import LayerStack, LMHead, TransformerLayer, initialise_text
from xfm_fast.packing import ImageGroups, Reads, Sequences


@dataclass(frozen=True)
class ImageMemory:
    """Keys and values of every fusion layer for B images."""

    layers: tuple[Tensor, ...]  # one [B, M, 2, H, D] tensor per fusion layer, M image tokens
    token_mask: Tensor | None = None  # [B, M] boolean, False for hidden image tokens

    @property
    def images(self) -> int:
        return self.layers[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers)

    @property
    def longest(self) -> int:
        return self.layers[0].shape[1]

    @property
    def cu_keys(self) -> Tensor:
        """`[B + 1]` offsets of the images in the keys."""
        images = torch.arange(self.images + 1, dtype=torch.int32, device=self.layers[0].device)
        return images * self.longest

    @property
    def key_mask(self) -> Tensor | None:
        return None if self.token_mask is None else self.token_mask.flatten()

    def keys_values(self, layer: int) -> Tensor:
        """Return keys and values of one fusion layer, image after image: `[B * M, 2, H, D]`."""
        return self.layers[layer].flatten(0, 1)

    def select(self, index: Tensor | slice) -> ImageMemory:
        """Return the memory of some of the images; a slice shares storage."""
        mask = None if self.token_mask is None else self.token_mask[index]
        return replace(self, layers=tuple(layer[index] for layer in self.layers), token_mask=mask)


@dataclass(frozen=True)
class PackedMemory:
    """Keys and values for groups of texts with different and overlapping sets of image tokens.

    A region attends to its own token and patches; projected patches are shared by all regions of the image.
    """

    layers: tuple[Tensor, ...]  # one [K, 2, H, D] tensor per fusion layer
    cu_keys: Tensor  # [G + 1] int32 offsets of the groups in `rows`
    longest: int  # size of the largest group
    rows: Tensor | None = None  # rows of `layers` that each group attends to; None: group by group
    key_mask: None = None

    def keys_values(self, layer: int) -> Tensor:
        """Return keys and values of one fusion layer, group after group."""
        projected = self.layers[layer]
        return projected if self.rows is None else projected.index_select(0, self.rows)


class FusionTransformer(nn.Module):
    """Layers under the official name `roberta`, and the vocabulary matrix of the LM head."""

    def __init__(self, config: XFMConfig, *, lm_head: bool) -> None:
        super().__init__()
        if lm_head:
            self.embeddings: Any = nn.Module()
            vocabulary = nn.Embedding(
                config.vocab_size, config.text_width, padding_idx=config.pad_token_id
            )
            self.embeddings.word_embeddings = vocabulary
        if config.fusion_layer_norm_eps is not None:
            config = config.replace(text_layer_norm_eps=config.fusion_layer_norm_eps)
        self.encoder = LayerStack(
            [TransformerLayer(config, config.vision_width) for _ in range(config.fusion_layers)]
        )


class FusionEncoder(nn.Module):
    """Encoder of texts with images, and its head of image-conditioned masked language modelling."""

    def __init__(self, config: XFMConfig, *, lm_head: bool = True) -> None:
        super().__init__()
        self.roberta = FusionTransformer(config, lm_head=lm_head)
        if lm_head:
            self.lm_head = LMHead(config.text_width, config.vocab_size, config.text_layer_norm_eps)
        initialise_text(self)

    @property
    def word_embeddings(self) -> Tensor:
        return self.roberta.embeddings.word_embeddings.weight

    def memory(self, image_embeds: Tensor, token_mask: Tensor | None = None) -> ImageMemory:
        """Project image tokens `[B, M, vision width]` for every layer."""
        return ImageMemory(self.project(image_embeds), token_mask)

    def project(self, image_tokens: Tensor) -> tuple[Tensor, ...]:
        """Compute keys and values of every layer: `[..., vision width]` → `[..., 2, H, D]` each."""
        return tuple(
            layer.crossattention.self.project_memory(image_tokens) for layer in self.roberta.encoder
        )

    def first_self_attention(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """Run layer 0 up to its cross-attention, which is independent of the image."""
        return self.roberta.encoder[0].self_attention(
            tokens, sequences.cu_seqlens, sequences.longest, sequences.key_mask
        )

    def forward(
        self,
        tokens: Tensor,
        sequences: Sequences,
        memory: ImageMemory | PackedMemory,
        groups: ImageGroups,
        *,
        first_token_only: bool = False,
        reads: Reads | None = None,
        self_attended: bool = False,
    ) -> Tensor:
        """Fuse packed texts `[T, width]`, in the order of `groups`, with their images: `[T, width]`.

        With `reads` the last layer computes only these, `[Q, width]`; with `first_token_only` token 0
        of each text, `[P, width]` in packed order. `self_attended` tokens are the result of
        `first_self_attention`.
        """
        texts = Texts(tokens, sequences, groups)
        options = {"first_token_only": first_token_only, "self_attended": self_attended}
        run = partial(self._fuse, memory=memory, reads=reads, **options)
        # Key masks span all texts or images and cannot be chunked.
        masked = memory.key_mask is not None or sequences.key_mask is not None
        stack = self.roberta.encoder
        chunkable = reads is None and not masked and isinstance(memory, ImageMemory)
        if chunkable and stack.can_chunk(len(tokens)):
            kind = (memory.longest, *options.values(), *stack.kind(texts))
            return run_chunked(run, texts, kind)
        return run(texts)

    def _fuse(
        self,
        texts: Texts,
        memory: ImageMemory | PackedMemory,
        reads: Reads | None = None,
        first_token_only: bool = False,
        self_attended: bool = False,
    ) -> Tensor:
        layers, sequences, groups = [*self.roberta.encoder], texts.sequences, texts.groups
        assert groups is not None
        cu_keys, key_mask = memory.cu_keys, memory.key_mask
        if first_token_only:
            reads = Reads.first_tokens(sequences)
        cu_queries = groups.token_offsets(sequences.cu_seqlens)
        x = texts.tokens
        for index, layer in enumerate(layers):
            layer_reads = reads if index == len(layers) - 1 else None
            if index or not self_attended:
                x = layer.self_attention(
                    x,
                    sequences.cu_seqlens,
                    sequences.longest,
                    sequences.key_mask,
                    reads=layer_reads,
                )
            elif layer_reads is not None:
                x = x.index_select(0, layer_reads.rows)
            if layer_reads is not None:
                cu_queries = groups.token_offsets(layer_reads.cu_seqlens)
            keys_values = memory.keys_values(index)
            x = layer.cross_attention(x, keys_values, cu_queries, cu_keys, memory.longest, key_mask)
            x = layer.feed_forward(x)
        return x
