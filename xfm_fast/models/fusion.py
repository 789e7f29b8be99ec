"""The fusion encoder: texts attend to images whose keys and values were projected once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from xfm_fast.config import XFMConfig
from xfm_fast.models.heads import LMHead
from xfm_fast.models.layers import LayerStack, initialise_text
from xfm_fast.models.text import text_layer
from xfm_fast.packing import ImageGroups, Sequences


@dataclass(frozen=True)
class ImageMemory:
    """Keys and values of every fusion layer for B images.

    Attributes:
        layers: one `[B, M, 2, H, D]` tensor per fusion layer, M image tokens.
        token_mask: `[B, M]` boolean, False for image tokens that no text attends to; None when all are visible.
    """

    layers: tuple[Tensor, ...]
    token_mask: Tensor | None = None

    @property
    def images(self) -> int:
        return self.layers[0].shape[0]

    @property
    def tokens(self) -> int:
        return self.layers[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers)

    def select(self, index: Tensor | slice) -> ImageMemory:
        """The memory of some of the images; a slice shares storage."""
        mask = None if self.token_mask is None else self.token_mask[index]
        return replace(self, layers=tuple(layer[index] for layer in self.layers), token_mask=mask)


class FusionTransformer(nn.Module):
    """Layers under the official name `roberta`. Of the official embeddings only the word matrix has a use."""

    def __init__(self, config: XFMConfig, *, lm_head: bool) -> None:
        super().__init__()
        if lm_head:
            self.embeddings = WordEmbeddings(config)
        self.encoder = LayerStack([text_layer(config, config.vision_width) for _ in range(config.fusion_layers)])


class WordEmbeddings(nn.Module):
    """The vocabulary matrix of the fusion encoder's LM head, which no input ever passes through."""

    def __init__(self, config: XFMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.text_width, padding_idx=config.pad_token_id)


class FusionEncoder(nn.Module):
    """Text embeddings and image memory to fused embeddings, and the LM head of image-conditioned MLM."""

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
        layers = tuple(layer.crossattention.self.project_memory(image_embeds) for layer in self.roberta.encoder)
        return ImageMemory(layers, token_mask)

    def first_self_attention(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """Layer 0 before its cross-attention. It does not depend on the image, so re-ranking does it once per text."""
        return self.roberta.encoder[0].self_attention(
            tokens, sequences.cu_seqlens, sequences.longest, sequences.key_mask
        )

    def forward(
        self,
        tokens: Tensor,
        sequences: Sequences,
        memory: ImageMemory,
        groups: ImageGroups,
        *,
        first_token_only: bool = False,
        self_attended: bool = False,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """Fuse packed texts with their images.

        Args:
            tokens: `[T, width]` text embeddings, packed in the order of `groups`.
            sequences: where each text lies.
            memory: of the B images.
            groups: which texts belong to which image.
            first_token_only: compute token 0 of each text alone in the last layer.
            self_attended: `tokens` come from `first_self_attention`.
            hidden_states: receives the output of every layer.

        Returns:
            `[T, width]`, or `[P, width]` in packed order with `first_token_only`.
        """
        stack = self.roberta.encoder
        cu_keys = torch.arange(memory.images + 1, dtype=torch.int32, device=tokens.device) * memory.tokens
        key_mask = None if memory.token_mask is None else memory.token_mask.flatten()
        cu_images = groups.token_offsets(sequences.cu_seqlens)
        x = tokens
        for number, layer in enumerate(stack):
            first_only = first_token_only and number == len(stack) - 1
            if number or not self_attended:
                x = layer.self_attention(
                    x, sequences.cu_seqlens, sequences.longest, sequences.key_mask, first_only=first_only
                )
            elif first_only:
                x = x.index_select(0, sequences.cu_seqlens[:-1])
            cu_queries = groups.cu_texts if first_only else cu_images
            x = layer.cross_attention(
                x, memory.layers[number].flatten(0, 1), cu_queries, cu_keys, x.shape[0], memory.tokens, key_mask
            )
            x = layer.feed_forward(x)
            if hidden_states is not None:
                hidden_states.append(x)
        return x
