"""RoBERTa decoder for answers and captions: causal self-attention, cross-attention to a shared memory.

`generate` implements greedy and beam search, step for step as transformers 4.12.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.models.text import LMHead, TextTransformer, initialise_text
from xfm_fast.packing import ImageGroups, Packing

# Rows of vocabulary logits per chunk in inference: 200 MB in fp32 at base size.
_LOGIT_ROWS = 1024


@dataclass(frozen=True)
class DecoderMemory:
    """Keys and values of every decoder layer for B packed encoder outputs, of questions or images."""

    layers: tuple[Tensor, ...]  # one [T, 2, H, D] tensor per layer
    cu_seqlens: Tensor  # [B + 1] int32 offsets of the encoder outputs
    longest: int  # longest output in tokens, or an upper bound

    @property
    def states(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def part(self, start: int, stop: int) -> DecoderMemory:
        """Return the memory of outputs `start` to `stop`, without a copy."""
        if (start, stop) == (0, self.states):
            return self
        first, last = self.cu_seqlens[[start, stop]].tolist()
        cu_seqlens = self.cu_seqlens[start : stop + 1] - first
        return DecoderMemory(
            tuple(layer[first:last] for layer in self.layers), cu_seqlens, self.longest
        )


class Writer(Protocol):
    """Interface of a decoder to `generate`; memories and caches are its choice."""

    @property
    def positions(self) -> int:
        """Longest text in tokens that the position table covers."""
        ...

    def begin(self, prompt_ids: Tensor, memory: Any, capacity: int) -> tuple[Tensor, Any]:
        """Run prompts `[B, S]`: last hidden states `[B, ...]`, and a cache for `capacity` tokens."""
        ...

    def step(self, input_ids: Tensor, memory: Any, past: Any) -> Tensor:
        """Append a token to every text and to `past`: hidden states `[A, ...]`, A / B texts per state."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits `[A, vocabulary]`."""
        ...


class DecoderCache:
    """Keys and values of the previous tokens of A texts of equal length, for every layer.

    Memory for `capacity` tokens is allocated once per layer. After the last layer, the caller adds the
    new tokens to `length`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: list[Tensor] = []  # [A, capacity, 2, H, D]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append n keys and values `[A, n, H, D]` to a layer; returns all length + n of them."""
        texts, new = keys.shape[:2]
        if layer == len(self._layers):
            self._layers.append(keys.new_empty(texts, self.capacity, 2, *keys.shape[2:]))
        stop = self.length + new
        buffer = self._layers[layer]
        buffer[:, self.length : stop, 0] = keys
        buffer[:, self.length : stop, 1] = values
        keys, values = buffer[:, :stop].unbind(2)
        return keys, values

    def known(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values `[A', length, H, D]` of the texts `rows` `[A']`."""
        keys, values = self._layers[layer][:, : self.length].index_select(0, rows).unbind(2)
        return keys, values

    def select(self, rows: Tensor) -> DecoderCache:
        """Return a cache of the texts `rows` `[A']`, with repeats, in any order."""
        selected = DecoderCache(self.capacity)
        for layer in range(len(self._layers)):
            selected.extend(layer, *self.known(layer, rows))
        selected.length = self.length
        return selected


class TextDecoder(nn.Module):
    """Causal language model with cross-attention in every layer; its head shares the word embedding."""

    def __init__(self, config: XFMConfig, layers: int, memory_width: int) -> None:
        super().__init__()
        self.roberta = TextTransformer(config, layers, memory_width)
        self.lm_head = LMHead(config.text_width, config.vocab_size, config.text_layer_norm_eps)
        initialise_text(self)

    @property
    def word_embeddings(self) -> Tensor:
        return self.roberta.embeddings.word_embeddings.weight

    @property
    def positions(self) -> int:
        """Longest text in tokens that the position table covers."""
        embeddings = self.roberta.embeddings
        return embeddings.position_embeddings.num_embeddings - embeddings.pad_token_id - 1

    def begin(
        self, prompt_ids: Tensor, memory: DecoderMemory, capacity: int
    ) -> tuple[Tensor, DecoderCache]:
        """Run the prompts, as `Writer.begin`."""
        states, length = prompt_ids.shape
        past = DecoderCache(capacity)
        packing = Packing.from_mask(torch.ones_like(prompt_ids))
        groups = ImageGroups(torch.arange(states + 1, device=prompt_ids.device))
        hidden = self(prompt_ids, packing, memory, groups, past=past)
        return hidden.view(states, length, -1)[:, -1], past

    def memory(self, states: Tensor, token_mask: Tensor | None = None) -> DecoderMemory:
        """Project `[B, M, memory_width]` for every layer, once for all texts, beams and steps.

        Tokens where `token_mask` `[B, M]` is False are not projected.
        """
        if token_mask is None:
            count, length = states.shape[:2]
            cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=states.device) * length
            packed, longest = states.flatten(0, 1), length
        else:
            packing = Packing.from_mask(token_mask)
            packed, cu_seqlens, longest = packing.pack(states), packing.cu_seqlens, packing.longest
        layers = tuple(
            layer.crossattention.self.project_memory(packed) for layer in self.roberta.encoder
        )
        return DecoderMemory(layers, cu_seqlens, longest)

    def forward(
        self,
        input_ids: Tensor,
        packing: Packing,
        memory: DecoderMemory,
        groups: ImageGroups,
        *,
        past: DecoderCache | None = None,
    ) -> Tensor:
        """Compute the hidden states of texts `[A, L]`, packed: `[T, width]` for `packing.unpad` or `logits`.

        `packing` lies in the order of `groups`, which assigns texts to memory states. `past` holds the
        previous tokens, equally many per text, in the order of `input_ids`, and receives the new ones;
        the packing then has to keep the order of texts.
        """
        previous = 0 if past is None else past.length
        positions = self._positions(input_ids, previous)
        x = self.roberta.embeddings(packing.pack(input_ids).long(), packing.pack(positions))
        visible = _visible_keys(packing, previous)
        cu_queries = groups.token_offsets(packing.cu_seqlens)
        for index, layer in enumerate(self.roberta.encoder):
            q, k, v = (packing.unpad(packed) for packed in layer.attention.self.project_all(x))
            if past is not None:
                k, v = past.extend(index, k, v)
            context = _attention(q, k, v, layer.attention.self.dropout_p, visible)
            x = layer.attention.output(packing.pack(context), x)
            x = layer.cross_attention(
                x, memory.layers[index], cu_queries, memory.cu_seqlens, memory.longest
            )
            x = layer.feed_forward(x)
        if past is not None:
            past.length += input_ids.shape[1]
        return x

    def step(self, input_ids: Tensor, memory: DecoderMemory, past: DecoderCache) -> Tensor:
        """Append a token to every text (`[A]`) and to `past`: hidden states `[A, width]`.

        A is a multiple of B: the first A / B texts belong to memory state 0, and so on.
        """
        texts, states = input_ids.shape[0], memory.states
        positions = self._positions(input_ids[:, None], past.length)[:, 0]
        x = self.roberta.embeddings(input_ids, positions)
        states_of = torch.arange(states + 1, dtype=torch.int32, device=x.device)
        cu_queries = states_of * (texts // states)
        equally_long = memory.layers[0].shape[0] == states * memory.longest
        for index, layer in enumerate(self.roberta.encoder):
            attention = layer.attention
            q, k, v = attention.self.project_all(x)
            k, v = past.extend(index, k[:, None], v[:, None])
            context = _attention(q[:, None], k, v, attention.self.dropout_p)
            x = attention.output(context[:, 0], x)
            # The texts of a state are the queries of one attention over its keys, without copies.
            if equally_long:
                attention = layer.crossattention
                q = attention.self.project_query(x).unflatten(0, (states, -1))
                k, v = memory.layers[index].unflatten(0, (states, -1)).unbind(2)
                context = _attention(q, k, v, attention.self.dropout_p)
                x = attention.output(context.reshape(texts, -1), x)
            else:
                x = layer.cross_attention(
                    x, memory.layers[index], cu_queries, memory.cu_seqlens, memory.longest
                )
            x = layer.feed_forward(x)
        past.length += 1
        return x

    def _positions(self, input_ids: Tensor, previous: int) -> Tensor:
        """Number the positions after `previous` tokens; padding keeps the id `pad`."""
        embeddings = self.roberta.embeddings
        real = input_ids.ne(embeddings.pad_token_id)
        return embeddings.position_ids(input_ids) + previous * real

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits: `[..., width]` → `[..., vocabulary]`."""
        return self.lm_head(hidden, self.word_embeddings)

    def token_losses(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        memory: DecoderMemory,
        groups: ImageGroups,
        *,
        prompt_tokens: int = 1,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Compute the cross-entropy of every token given its predecessors: `[A, L - 1]`, entry j for token j + 1.

        Zero for padding (`token_mask` `[A, L]` boolean, real tokens first) and for the first
        `prompt_tokens`, which are `<s>` or a prompt.
        """
        targets = input_ids[:, 1:].long()
        packing = Packing.from_mask(token_mask[:, 1:], order=groups.order)
        positions = packing.positions
        hidden = self(input_ids[:, :-1], packing, memory, groups)
        if prompt_tokens > 1:
            # Only predicted tokens reach the vocabulary.
            predicted = positions % targets.shape[1] >= prompt_tokens - 1
            rows = predicted.nonzero().flatten()
            hidden, positions = hidden.index_select(0, rows), positions.index_select(0, rows)
        predicted_ids = targets.flatten().index_select(0, positions)
        losses = self.cross_entropy(hidden, predicted_ids, label_smoothing)
        padded = losses.new_zeros(targets.numel()).index_copy(0, positions, losses)
        return padded.view(targets.shape)

    def cross_entropy(
        self, hidden: Tensor, targets: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        """Compute the cross-entropy `[T]` of `targets` `[T]` after `hidden` `[T, width]`, in chunks of logits.

        With gradients all logits are stored for the backward pass.
        """
        losses = []
        chunks = zip(hidden.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True)
        for states, ids in chunks:
            losses.append(
                F.cross_entropy(
                    self.logits(states), ids, reduction="none", label_smoothing=label_smoothing
                )
            )
        return torch.cat(losses)

    def initialise_from(self, state: Mapping[str, Tensor]) -> list[str]:
        """Initialise from the pretrained fusion encoder; returns the names of the unchanged parameters.

        `state` is a pretraining state dict; official files include fusion embeddings that our
        pretraining models lack. Parameters that the encoder lacks, or has in another shape (as
        projections of a memory of another width), are unchanged; the official loader fails there.
        """
        fresh = []
        for name, parameter in self.state_dict().items():
            source = state.get(f"fusion_encoder.{name}")
            if source is None or source.shape != parameter.shape:
                fresh.append(name)
            else:
                parameter.copy_(source)
        return fresh


def _visible_keys(packing: Packing, previous: int) -> Tensor:
    """Build the mask of the keys that a query attends to: boolean `[A, 1, L, previous + L]`.

    A query without visible keys (padding before any real token) sees itself, because NaN would reach
    the gradients of the keys.
    """
    texts, length = packing.shape
    positions = packing.positions
    device, keys = positions.device, previous + length
    real = torch.zeros(texts * length, dtype=torch.bool, device=device)
    packed_real = real.new_ones(len(positions)) if packing.key_mask is None else packing.key_mask
    real = real.index_copy(0, positions, packed_real).view(texts, length)
    real = F.pad(real, (previous, 0), value=True)
    query = torch.arange(previous, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    visible = (key <= query) & real[:, None, :]
    blind = ~visible.any(-1, keepdim=True)
    return (visible | ((key == query) & blind))[:, None]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, visible: Tensor | None = None
) -> Tensor:
    """Attend from `[B, Nq, H, D]` to `[B, Nk, H, D]`: `[B, Nq, H·D]`.

    Padded: answers and captions are a few tokens long, and cached keys are then simply concatenated.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p)
    return context.transpose(1, 2).flatten(2)


# Initial score of all beams but the first: they are copies of the prompt, and only one may continue.
_ABSENT = -1e9


@dataclass
class _Hypotheses:
    """Best finished sequences of one state: `(score, tokens without the end token)`."""

    beams: int
    length_penalty: float
    early_stopping: bool
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def add(self, tokens: list[int], log_probability: float) -> None:
        score = log_probability / len(tokens) ** self.length_penalty
        if len(self.finished) == self.beams and score <= self._worst():
            return
        self.finished.append((score, tokens))
        if len(self.finished) > self.beams:
            # Among equal scores the oldest is dropped.
            self.finished.remove(min(self.finished, key=lambda hypothesis: hypothesis[0]))

    def update_done(self, best_log_probability: float, length: int) -> None:
        """Set `done` when no running beam can beat the worst finished sequence."""
        if len(self.finished) < self.beams:
            return
        attainable = best_log_probability / length**self.length_penalty
        self.done = self.done or self.early_stopping or self._worst() >= attainable

    def best(self) -> list[int]:
        # The last of equal scores, like a stable sort followed by pop().
        _, tokens = sorted(self.finished, key=lambda hypothesis: hypothesis[0])[-1]
        return tokens

    def _worst(self) -> float:
        return min(score for score, _ in self.finished)


@torch.no_grad()
def generate(
    decoder: Writer,
    memory: Any,
    prompt_ids: Tensor,
    *,
    max_length: int,
    min_length: int = 0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    pad_token_id: int = 1,
    eos_token_id: int = 2,
) -> Tensor:
    """Continue the unpadded prompts `[B, S]`, one per state of the memory: ids `[B, length]`, padded.

    The result has the prompt first and the end token included. The prompt runs once per state, and
    beams share its keys and values. `max_length` and `min_length` (no end token before it) include the
    prompt; one beam is greedy search; scores are log-probabilities divided by length to the power
    `length_penalty`; with `early_stopping` a state ends with its `num_beams` finished sequences,
    otherwise when no running beam can beat them. Raises `InputError` for contradictory numbers or a
    padded prompt.
    """
    if prompt_ids.ndim != 2 or prompt_ids.shape[0] != memory.states or not prompt_ids.shape[1]:
        raise InputError(
            f"prompt_ids are {[*prompt_ids.shape]}; they must be [{memory.states}, S] with S at least 1"
        )
    if num_beams < 1:
        raise InputError(f"num_beams={num_beams}; it must be at least 1")
    prompt_length = prompt_ids.shape[1]
    if not prompt_length < max_length <= decoder.positions:
        raise InputError(
            f"max_length={max_length}; with a prompt of {prompt_length} it must be above that and at most "
            f"{decoder.positions}"
        )
    if prompt_ids.device.type == "cpu" and bool((prompt_ids == pad_token_id).any()):
        raise InputError(
            "prompt_ids contain padding; generate prompts of different length separately"
        )
    hidden, past = decoder.begin(prompt_ids, memory, max_length)
    if num_beams == 1:
        ids, running = prompt_ids, torch.ones_like(prompt_ids[:, 0], dtype=torch.bool)
        while True:
            logits = decoder.logits(hidden)
            if ids.shape[1] < min_length:
                logits[:, eos_token_id] = -torch.inf
            next_ids = logits.argmax(-1).masked_fill(~running, pad_token_id)
            ids = torch.cat([ids, next_ids[:, None]], 1)
            running &= next_ids != eos_token_id
            if ids.shape[1] >= max_length or not bool(running.any()):
                return ids
            hidden = decoder.step(next_ids, memory, past)
    states = torch.arange(len(prompt_ids), device=prompt_ids.device)
    copies = states.repeat_interleave(num_beams)
    past = past.select(copies)

    def advance(rows: Tensor, tokens: Tensor) -> Tensor:
        nonlocal past
        past = past.select(rows)
        return decoder.logits(decoder.step(tokens, memory, past))

    return beam_search(
        decoder.logits(hidden)[copies],
        advance,
        prompt_ids,
        max_length=max_length,
        min_length=min_length,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )


@torch.no_grad()
def beam_search(
    logits: Tensor,
    advance: Callable[[Tensor, Tensor], Tensor],
    prompt_ids: Tensor,
    *,
    max_length: int,
    min_length: int,
    num_beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    pad_token_id: int = 1,
    eos_token_id: int = 2,
) -> Tensor:
    """Search the best sequences with any function that computes logits.

    `logits` `[B · num_beams, vocabulary]` follow the prompts; `advance` maps (row that each beam
    continues, its next token) to the next logits. Other arguments and result as `generate`.
    """
    states = prompt_ids.shape[0]
    hypotheses = [_Hypotheses(num_beams, length_penalty, early_stopping) for _ in range(states)]
    ids = prompt_ids.repeat_interleave(num_beams, 0)
    scores = torch.full((states, num_beams), _ABSENT, dtype=logits.dtype, device=logits.device)
    scores[:, 0] = 0
    while True:
        log_probs = logits.log_softmax(-1)
        if ids.shape[1] < min_length:
            log_probs[:, eos_token_id] = -torch.inf
        totals = (log_probs.view(states, num_beams, -1) + scores[:, :, None]).flatten(1)
        # Two candidates per beam, so that enough remain if every beam ends.
        best = totals.topk(2 * num_beams, dim=1)
        beams, tokens = best.indices // log_probs.shape[1], best.indices % log_probs.shape[1]
        candidates = [
            list(zip(*columns, strict=True))
            for columns in zip(best.values.tolist(), beams.tolist(), tokens.tolist(), strict=True)
        ]
        continued = _continue_beams(hypotheses, ids, candidates, pad_token_id, eos_token_id)
        rows = torch.tensor([row for row, _, _ in continued], device=ids.device)
        next_ids = torch.tensor([token for _, token, _ in continued], device=ids.device)
        scores = scores.new_tensor([score for _, _, score in continued]).view(states, num_beams)
        ids = torch.cat([ids[rows], next_ids[:, None]], 1)
        if ids.shape[1] >= max_length or all(state.done for state in hypotheses):
            break
        logits = advance(rows, next_ids)
    for state, running in enumerate(ids.view(states, num_beams, -1).tolist()):
        if not hypotheses[state].done:
            for tokens, score in zip(running, scores[state].tolist(), strict=True):
                hypotheses[state].add(tokens, score)
    sequences = [state.best() for state in hypotheses]
    ended = [
        [*tokens, eos_token_id] if len(tokens) < max_length else tokens for tokens in sequences
    ]
    longest = max(map(len, ended), default=0)
    padded = [tokens + [pad_token_id] * (longest - len(tokens)) for tokens in ended]
    return prompt_ids.new_tensor(padded).view(states, longest)


def _continue_beams(
    hypotheses: list[_Hypotheses],
    ids: Tensor,
    candidates: list[list[tuple[float, int, int]]],
    pad: int,
    eos: int,
) -> list[tuple[int, int, float]]:
    """Store finished sequences and pick how each beam continues: (row of `ids`, next token, score).

    `candidates` of every state are (score, beam, token), best first.
    """
    continued: list[tuple[int, int, float]] = []
    for state, hypothesis in enumerate(hypotheses):
        first = state * hypothesis.beams
        if hypothesis.done:
            continued += [(first, pad, 0.0)] * hypothesis.beams
            continue
        running: list[tuple[int, int, float]] = []
        for rank, (score, beam, token) in enumerate(candidates[state]):
            if token != eos:
                running.append((first + beam, token, score))
            elif rank < hypothesis.beams:
                hypothesis.add(ids[first + beam].tolist(), score)
            if len(running) == hypothesis.beams:
                break
        best_score, _, _ = candidates[state][0]
        hypothesis.update_done(best_score, ids.shape[1])
        continued += running
    return continued
