"""Modules built like those of the official X-FM and X²-VLM code: the same submodules, arguments and results.

Written for these tests from the structure alone: names of parts, what a forward takes and what it returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels.reference import relative_position_index


@dataclass
class TextConfig:
    """Sizes of a text encoder; layers from `fusion_layer` on have cross-attention."""

    vocabulary: int = 61
    width: int = 32
    heads: int = 4
    hidden: int = 64
    layers: int = 3
    fusion_layer: int = 1
    image_width: int = 24
    dropout: float = 0.0
    drop_path: float = 0.0


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig, memory_width: int) -> None:
        super().__init__()
        self.num_attention_heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(memory_width, config.width)
        self.value = nn.Linear(memory_width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.position_embedding_type = "absolute"
        self.save_attention = False
        self.attention_map: Tensor | None = None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        head_mask: Tensor | None,
        memory: Tensor | None,
        past: Any,
    ):
        source = x if memory is None else memory
        q, k, v = (
            self._heads(self.query(x)),
            self._heads(self.key(source)),
            self._heads(self.value(source)),
        )
        if past is not None and memory is None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = (scores if mask is None else scores + mask).softmax(-1)
        if memory is not None and self.save_attention:
            self.attention_map = weights
        used = self.dropout(weights)
        used = used if head_mask is None else used * head_mask
        return (used @ v).transpose(1, 2).flatten(2), weights, (k, v)


class BranchEnd(nn.Module):
    def __init__(self, inputs: int, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-5)
        self.dropout = nn.Dropout(config.dropout)
        if config.drop_path:
            self.drop_path = DropPath(config.drop_path, by_position=True)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        branch = self.dropout(self.dense(x))
        return self.LayerNorm(
            (self.drop_path(branch) if hasattr(self, "drop_path") else branch) + residual
        )


class DropPath(nn.Module):
    def __init__(self, drop_prob: float, by_position: bool = False) -> None:
        super().__init__()
        self.drop_prob, self.by_position = drop_prob, by_position

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept, shape = (
            1 - self.drop_prob,
            (1, x.shape[1], 1) if self.by_position else (x.shape[0], 1, 1),
        )
        return x * torch.bernoulli(x.new_full(shape, kept)) / kept


class Attention(nn.Module):
    def __init__(self, config: TextConfig, memory_width: int) -> None:
        super().__init__()
        self.self = SelfAttention(config, memory_width)
        self.output = BranchEnd(config.width, config)

    def forward(self, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        context, weights, present = self.self(x, *rest)
        return self.output(context, x), weights, present


class TextLayer(nn.Module):
    """As X-FM has it."""

    def __init__(self, config: TextConfig, number: int) -> None:
        super().__init__()
        self.attention = Attention(config, config.width)
        self.has_cross_attention = number >= config.fusion_layer
        if self.has_cross_attention:
            self.crossattention = Attention(config, config.image_width)
        self.intermediate: Any = nn.Module()
        self.intermediate.dense, self.intermediate.intermediate_act_fn = (
            nn.Linear(config.width, config.hidden),
            F.gelu,
        )
        self.output = BranchEnd(config.hidden, config)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
        mode="multi_modal",
    ):
        x, weights, present = self.attention(
            hidden_states, attention_mask, head_mask, None, past_key_value
        )
        attentions = [weights]
        if self.has_cross_attention and encoder_hidden_states is not None:
            x, weights, _ = self.crossattention(
                x, encoder_attention_mask, head_mask, encoder_hidden_states, None
            )
            attentions.append(weights)
        x = self.output(self.intermediate.intermediate_act_fn(self.intermediate.dense(x)), x)
        return (x, *(attentions if output_attentions else ()), present)


class TextLayerWithoutMode(TextLayer):
    """As X²-VLM has it."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
        split_lengths=None,
        history_states=None,
    ):
        memory = (encoder_hidden_states, encoder_attention_mask)
        return super().forward(
            hidden_states, attention_mask, head_mask, *memory, past_key_value, output_attentions
        )


class TextStack(nn.Module):
    def __init__(self, config: TextConfig, layer: type[TextLayer] = TextLayer) -> None:
        super().__init__()
        self.config = config
        self.takes_mode = layer is TextLayer
        self.layer: Any = nn.ModuleList(layer(config, number) for number in range(config.layers))

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=None,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
        mode="multi_modal",
    ):
        split = self.config.fusion_layer
        first, last = {"text": (0, split), "fusion": (split, None), "multi_modal": (0, None)}[mode]
        x, presents = hidden_states, ()
        for number, layer in list(enumerate(self.layer))[first:last]:
            named = (
                {"mode": mode}
                if self.takes_mode
                else {"split_lengths": None, "history_states": None}
            )
            past = None if past_key_values is None else past_key_values[number]
            mask = None if head_mask is None else head_mask[number]
            memory = (encoder_hidden_states, encoder_attention_mask)
            made = layer(x, attention_mask, mask, *memory, past, output_attentions, **named)
            x = made[0]
            presents += (made[-1],)
        return SimpleNamespace(last_hidden_state=x, past_key_values=presents if use_cache else None)


class Embeddings(nn.Module):
    """Embeddings with positions by RoBERTa's count of real tokens, or by place."""

    position_ids: Tensor

    def __init__(self, config: TextConfig, pad: int | None, scale: float = 1.0) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.width, padding_idx=pad)
        self.position_embeddings = nn.Embedding(40, config.width, padding_idx=pad)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(0.1)
        self.scale = scale
        self.register_buffer("position_ids", torch.arange(40).expand((1, -1)))
        if pad is not None:
            self.padding_idx = pad

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        shape = words.shape[:2]
        if position_ids is None:
            position_ids = self.position_ids[
                :, past_key_values_length : past_key_values_length + shape[1]
            ]
            if hasattr(self, "padding_idx") and input_ids is not None:
                real = input_ids.ne(self.padding_idx).int()
                position_ids = (
                    (torch.cumsum(real, 1) + past_key_values_length) * real
                ).long() + self.padding_idx
        if token_type_ids is None:
            token_type_ids = torch.zeros(shape, dtype=torch.long)
        x = self.scale * words + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(position_ids)))


class LanguageHead(nn.Module):
    """RoBERTa's head, with the bias under two names."""

    def __init__(self, config: TextConfig, approximate: str = "none") -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.layer_norm = nn.LayerNorm(config.width)
        self.decoder = nn.Linear(config.width, config.vocabulary, bias=False)
        self.bias = nn.Parameter(torch.randn(config.vocabulary))
        self.decoder.bias = self.bias
        self.approximate = approximate

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        return self.decoder(
            self.layer_norm(F.gelu(self.dense(features), approximate=self.approximate))
        )


class PredictionHead(nn.Module):
    """BERT's head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.transform: Any = nn.Module()
        self.transform.dense = nn.Linear(config.width, config.width)
        self.transform.transform_act_fn = F.gelu
        self.transform.LayerNorm = nn.LayerNorm(config.width)
        self.decoder = nn.Linear(config.width, config.vocabulary)

    def forward(self, hidden_states: Tensor) -> Tensor:
        transform = self.transform
        return self.decoder(
            transform.LayerNorm(transform.transform_act_fn(transform.dense(hidden_states)))
        )


class TextModel(nn.Module):
    """A text or fusion encoder: from ids, or from the embeddings of another encoder."""

    def __init__(self, config: TextConfig, layer: type[TextLayer] = TextLayer) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, None)
        self.encoder = TextStack(config, layer)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **asked: Any,
    ) -> Any:
        x = self.embeddings(input_ids) if encoder_embeds is None else encoder_embeds
        mask = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
        seen = encoder_attention_mask
        if encoder_hidden_states is not None and seen is None:
            seen = torch.ones(encoder_hidden_states.shape[:2])
        seen = None if seen is None else additive(seen, x.dtype)
        return self.encoder(
            x,
            attention_mask=additive(mask, x.dtype),
            head_mask=[None] * len(self.encoder.layer),
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=seen,
            **asked,
        )


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[P, L]` of ones and zeros → `[P, 1, 1, L]` to be added to scores."""
    return (1 - mask[:, None, None].to(dtype)) * -10000.0


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class WindowAttention(nn.Module):
    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, window: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.randn(width))
        self.v_bias = nn.Parameter(torch.randn(width))
        self.window_size = window
        self.relative_position_bias_table = None
        if window is not None:
            rows = (2 * window[0] - 1) * (2 * window[1] - 1) + 3
            self.relative_position_bias_table = nn.Parameter(torch.randn(rows, heads))
            self.register_buffer("relative_position_index", relative_position_index(window))
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(
        self, x, rel_pos_bias=None, return_attention=False, return_qkv=False, image_atts=None
    ):
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = (
            F.linear(x, self.qkv.weight, bias)
            .unflatten(-1, (3, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        scores = q * self.scale @ k.mT
        if self.relative_position_bias_table is not None:
            scores = scores + self.relative_position_bias_table[
                self.relative_position_index
            ].permute(2, 0, 1)
        for added in (rel_pos_bias, image_atts):
            scores = scores if added is None else scores + added
        weights = self.attn_drop(scores.softmax(-1))
        if return_attention:
            return weights
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class VisionBlock(nn.Module):
    """As X-FM and X²-VLM have it."""

    def __init__(
        self,
        width: int,
        heads: int,
        window: tuple[int, int] | None,
        drop_path: float = 0.0,
        scaled: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = WindowAttention(width, heads, window)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 2 * width)
        self.gamma_1 = nn.Parameter(torch.rand(width)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.rand(width)) if scaled else None

    def forward(
        self, x, rel_pos_bias=None, return_attention=False, return_qkv=False, image_atts=None
    ):
        branch = self.attn(self.norm1(x), rel_pos_bias, return_attention, return_qkv, image_atts)
        if return_attention:
            return branch
        x = x + self.drop_path(branch if self.gamma_1 is None else self.gamma_1 * branch)
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch)


class VisionTransformer(nn.Module):
    def __init__(
        self, width: int = 32, heads: int = 4, window: tuple[int, int] = (3, 4), depth: int = 2
    ) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(VisionBlock(width, heads, window) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, **asked: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, **asked)
        return self.fc_norm(x)
