"""The RoBERTa decoder that writes answers and captions: causal self-attention, cross-attention to a shared memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.config import XFMConfig
from xfm_fast.models.heads import LMHead
from xfm_fast.models.layers import Embeddings, LayerStack, initialise_text
from xfm_fast.models.text import text_layer
from xfm_fast.packing import ImageGroups, Packing

# Rows of vocabulary logits that exist at a time when only likelihoods are wanted: 200 MB in fp32 at base size.
_LOGIT_ROWS = 1024


@dataclass(frozen=True)
class DecoderMemory:
    """Keys and values of every decoder layer for what B sequences are decoded from (questions, or images).

    Attributes:
        layers: one `[T, 2, H, D]` tensor per layer, the B states packed one after the other.
        cu_seqlens: `[B + 1]` int32 offsets of the states.
        longest: tokens of the longest one.
    """

    layers: tuple[Tensor, ...]
    cu_seqlens: Tensor
    longest: int

    @property
    def states(self) -> int:
        return self.cu_seqlens.shape[0] - 1


class DecoderCache:
    """Keys and values of the tokens that A texts have behind them, for every layer.

    Room for `capacity` tokens is allocated once per layer; the texts of a cache have the same length.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: list[Tensor] = []  # [A, capacity, 2, H, D]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put n new `[A, n, H, D]` behind those of layer number `layer`; returns all length + n of them."""
        rows, new = keys.shape[:2]
        if layer == len(self._layers):
            self._layers.append(keys.new_empty(rows, self.capacity, 2, *keys.shape[2:]))
        stop = self.length + new
        room = self._layers[layer]
        room[:, self.length : stop, 0] = keys
        room[:, self.length : stop, 1] = values
        known_keys, known_values = room[:, :stop].unbind(2)
        return known_keys, known_values

    def advance(self, tokens: int) -> None:
        """Count the new tokens, after the last layer."""
        self.length += tokens

    def known(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[A', length, H, D]` of the texts `rows` `[A']`."""
        keys, values = self._layers[layer][:, : self.length].index_select(0, rows).unbind(2)
        return keys, values

    def select(self, rows: Tensor) -> DecoderCache:
        """The cache of the texts `rows` `[A']`, which may repeat and be in any order."""
        chosen = DecoderCache(self.capacity)
        for layer in range(len(self._layers)):
            chosen.extend(layer, *self.known(layer, rows))
        chosen.advance(self.length)
        return chosen


class SharedPrefix:
    """The cache of a prefix that many texts have in common: text a continues text `rows[a]` of the cache.

    What the texts add is not kept, so that thousands of short continuations cost no memory beyond their own layer.
    """

    def __init__(self, cache: DecoderCache, rows: Tensor) -> None:
        self.length = cache.length
        self._cache = cache
        self._rows = rows

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put `[A, n, H, D]` behind the prefix; returns all length + n keys and values."""
        known_keys, known_values = self._cache.known(layer, self._rows)
        return torch.cat([known_keys, keys], 1), torch.cat([known_values, values], 1)

    def advance(self, tokens: int) -> None:
        """The prefix stays as it is."""


class DecoderTransformer(nn.Module):
    """Embeddings and layers, under the official name `roberta`."""

    def __init__(self, config: XFMConfig, layers: int, memory_width: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(
            config.vocab_size,
            config.max_positions,
            config.type_vocab_size,
            config.text_width,
            config.pad_token_id,
            config.text_layer_norm_eps,
            config.hidden_dropout,
        )
        self.encoder = LayerStack([text_layer(config, memory_width) for _ in range(layers)])


class TextDecoder(nn.Module):
    """Causal language model over a memory; the vocabulary matrix of its head is its word embedding.

    Args:
        config: sizes of a layer, of the vocabulary and of the position table.
        layers: number of layers, all with cross-attention.
        memory_width: width of the states that the memory is projected from.
    """

    def __init__(self, config: XFMConfig, layers: int, memory_width: int) -> None:
        super().__init__()
        self.roberta = DecoderTransformer(config, layers, memory_width)
        self.lm_head = LMHead(config.text_width, config.vocab_size, config.text_layer_norm_eps)
        initialise_text(self)

    @property
    def word_embeddings(self) -> Tensor:
        return self.roberta.embeddings.word_embeddings.weight

    def memory(self, states: Tensor, token_mask: Tensor | None = None) -> DecoderMemory:
        """Project `[B, M, memory_width]` for every layer, once for all answers, beams and steps.

        Args:
            token_mask: `[B, M]`, False for states that do not exist for the decoder; they are not even projected.
        """
        if token_mask is None:
            count, length = states.shape[:2]
            cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=states.device) * length
            packed, longest = states.flatten(0, 1), length
        else:
            packing = Packing.from_mask(token_mask)
            packed, cu_seqlens, longest = packing.pack(states), packing.cu_seqlens, packing.longest
        layers = tuple(layer.crossattention.self.project_memory(packed) for layer in self.roberta.encoder)
        return DecoderMemory(layers, cu_seqlens, longest)

    def forward(
        self,
        input_ids: Tensor,
        packing: Packing,
        memory: DecoderMemory,
        groups: ImageGroups,
        *,
        past: DecoderCache | SharedPrefix | None = None,
    ) -> Tensor:
        """Hidden states of A texts.

        Args:
            input_ids: `[A, L]`.
            packing: of these texts, in the order of `groups`.
            memory: of the B states.
            groups: which texts are decoded from which state.
            past: tokens before `input_ids`, the same number for every text, in the order of `input_ids`; receives the
                new ones. Needs a packing that keeps the order of the texts.

        Returns:
            Packed `[T, width]`, to be unpacked by `packing`, or to be put through `logits` as it is.
        """
        behind = 0 if past is None else past.length
        positions = self._positions(input_ids, behind)
        x = self.roberta.embeddings(packing.pack(input_ids).long(), packing.pack(positions))
        visible = _visible_keys(packing, behind)
        cu_queries = groups.token_offsets(packing.cu_seqlens)
        for number, layer in enumerate(self.roberta.encoder):
            q, k, v = (packing.unpad(part) for part in layer.attention.self.project_all(x))
            if past is not None:
                k, v = past.extend(number, k, v)
            context = _attention(q, k, v, layer.attention.self.dropout_p, visible)
            x = layer.attention.output(packing.pack(context), x)
            x = layer.cross_attention(
                x, memory.layers[number], cu_queries, memory.cu_seqlens, x.shape[0], memory.longest
            )
            x = layer.feed_forward(x)
        if past is not None:
            past.advance(input_ids.shape[1])
        return x

    def step(self, input_ids: Tensor, memory: DecoderMemory, past: DecoderCache) -> Tensor:
        """Hidden state of one more token of every text, in generation.

        Args:
            input_ids: `[A]`, A a multiple of B: the first A / B texts belong to state 0, and so on.
            memory: of the B states, all of the same length.
            past: of the A texts; receives the new token.

        Returns:
            `[A, width]`.
        """
        texts, states = input_ids.shape[0], memory.states
        x = self.roberta.embeddings(input_ids, self._positions(input_ids[:, None], past.length)[:, 0])
        for number, layer in enumerate(self.roberta.encoder):
            q, k, v = layer.attention.self.project_all(x)
            k, v = past.extend(number, k[:, None], v[:, None])
            x = layer.attention.output(_attention(q[:, None], k, v, layer.attention.self.dropout_p)[:, 0], x)
            # The texts of a state are the queries of one attention over its keys, which are read where they lie.
            projections = layer.crossattention.self
            q = projections.project_query(x).unflatten(0, (states, -1))
            k, v = memory.layers[number].unflatten(0, (states, -1)).unbind(2)
            x = layer.crossattention.output(_attention(q, k, v, projections.dropout_p).reshape(texts, -1), x)
            x = layer.feed_forward(x)
        past.advance(1)
        return x

    def _positions(self, input_ids: Tensor, behind: int) -> Tensor:
        """Position ids behind `behind` tokens; padding, numbered `pad`, keeps its number."""
        embeddings = self.roberta.embeddings
        return embeddings.position_ids(input_ids) + behind * input_ids.ne(embeddings.pad_token_id)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., width]` → `[..., vocabulary]`."""
        return self.lm_head(hidden, self.word_embeddings)

    def token_losses(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        memory: DecoderMemory,
        groups: ImageGroups,
        *,
        given: int = 1,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of every token given those before it.

        Args:
            input_ids: `[A, L]`.
            token_mask: `[A, L]` boolean, real tokens first.
            memory: of the B states.
            groups: which texts are decoded from which state.
            given: tokens at the start of every text that are not to be predicted: `<s>`, or a prompt.
            label_smoothing: share of the target probability that is spread over the vocabulary.

        Returns:
            `[A, L - 1]`, entry j for token j + 1; zero where that is padding or given.
        """
        targets = input_ids[:, 1:].long()
        packing = Packing.from_mask(token_mask[:, 1:], order=groups.order)
        hidden, positions = self(input_ids[:, :-1], packing, memory, groups), packing.positions
        if given > 1:
            # Only what is predicted reaches the vocabulary.
            predicted = (positions % targets.shape[1] >= given - 1).nonzero().flatten()
            hidden, positions = hidden.index_select(0, predicted), positions.index_select(0, predicted)
        losses = self.cross_entropy(hidden, targets.flatten().index_select(0, positions), label_smoothing)
        return losses.new_zeros(targets.numel()).index_copy(0, positions, losses).view(targets.shape)

    def cross_entropy(self, hidden: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of `targets` `[T]` after `hidden` `[T, width]`: `[T]`, without all logits existing at once.

        (When a gradient is wanted, they are kept for it.)
        """
        pieces = [
            F.cross_entropy(self.logits(h), t, reduction="none", label_smoothing=label_smoothing)
            for h, t in zip(hidden.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True)
        ]
        return torch.cat(pieces)

    def initialise_from(self, state: Mapping[str, Tensor], encoder: str) -> list[str]:
        """Start from a pretrained encoder, as fine-tuning does.

        Args:
            state: a pretraining state dict; official files hold fusion embeddings that our pretraining models lack.
            encoder: `fusion_encoder` (answers) or `text_encoder` (captions).

        Returns:
            Names of the parameters that the encoder does not have or has in another shape, such as projections of a
            memory of another width (there the official loader fails). They keep their values.
        """
        fresh = []
        for name, parameter in self.state_dict().items():
            source = state.get(f"{encoder}.{name}")
            if source is None or source.shape != parameter.shape:
                fresh.append(name)
            else:
                parameter.copy_(source)
        return fresh


def _visible_keys(packing: Packing, behind: int) -> Tensor:
    """Boolean `[A, 1, L, behind + L]`: keys that a query attends to, on the padded grid of the texts.

    A query that would see nothing (padding before any real token) sees itself: its result is not read, but NaN in it
    would reach the keys' gradients.
    """
    texts, length = packing.shape
    positions = packing.positions
    kept = torch.ones_like(positions, dtype=torch.bool) if packing.key_mask is None else packing.key_mask
    real = torch.zeros(texts * length, dtype=torch.bool, device=positions.device).index_copy(0, positions, kept)
    real = F.pad(real.view(texts, length), (behind, 0), value=True)
    query = torch.arange(behind, behind + length, device=positions.device)[:, None]
    key = torch.arange(behind + length, device=positions.device)[None, :]
    visible = (key <= query) & real[:, None, :]
    return (visible | ((key == query) & ~visible.any(-1, keepdim=True)))[:, None]


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, visible: Tensor | None = None) -> Tensor:
    """`[B, Nq, H, D]` over `[B, Nk, H, D]` → `[B, Nq, H·D]`.

    Answers and captions are a few tokens long: on the padded grid, a cache of past keys is simply put in front.
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p)
    return context.transpose(1, 2).flatten(2)
