"""Writing text with a decoder: greedy and beam search, step for step those of transformers 4.12.5 `generate()`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from xfm_fast.errors import InputError
from xfm_fast.models.decoder import DecoderCache, DecoderMemory, TextDecoder
from xfm_fast.packing import ImageGroups, Packing

# Score of a beam that does not exist yet: all beams start as copies of the prompt, and only one may be continued.
_ABSENT = -1e9


@dataclass
class _Hypotheses:
    """The best finished sequences of one state: `(score, tokens without the end token)`."""

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
            # Of equal scores the oldest goes.
            self.finished.remove(min(self.finished, key=lambda hypothesis: hypothesis[0]))

    def update_done(self, best_log_probability: float, length: int) -> None:
        """Done when no running beam can still get better than the worst finished sequence."""
        if len(self.finished) < self.beams:
            return
        attainable = best_log_probability / length**self.length_penalty
        self.done = self.done or self.early_stopping or self._worst() >= attainable

    def best(self) -> list[int]:
        # The last of the best, as a stable sort followed by pop() has it.
        return sorted(self.finished, key=lambda hypothesis: hypothesis[0])[-1][1]

    def _worst(self) -> float:
        return min(score for score, _ in self.finished)


@torch.no_grad()
def generate(
    decoder: TextDecoder,
    memory: DecoderMemory,
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
    """Continue a prompt for every state of the memory.

    The prompt runs once per state, and beams share the state's keys and values instead of copies of them.

    Args:
        decoder: in evaluation mode, unless dropout is wanted.
        memory: of B states of the same length.
        prompt_ids: `[B, S]`, without padding.
        max_length: of the result in tokens, prompt included.
        min_length: the end token cannot come before this many tokens, prompt included.
        num_beams: 1 takes the likeliest token at every step.
        length_penalty: sequences are compared by log-probability divided by length to this power.
        early_stopping: stop a state as soon as it has `num_beams` finished sequences, instead of when no running one
            can beat them.
        pad_token_id, eos_token_id: of the tokenizer.

    Returns:
        `[B, length]` ids, prompt first, end token included, padded; length is at most `max_length`.

    Raises:
        InputError: numbers that contradict each other, or a prompt with padding.
    """
    _check(decoder, memory, prompt_ids, max_length, num_beams, pad_token_id)
    states, length = prompt_ids.shape
    past = DecoderCache(max_length)
    packing = Packing.from_mask(torch.ones_like(prompt_ids))
    alone = ImageGroups(torch.arange(states + 1, device=prompt_ids.device))
    hidden = decoder(prompt_ids, packing, memory, alone, past=past).view(states, length, -1)[:, -1]
    if num_beams == 1:
        return _greedy(decoder, memory, prompt_ids, hidden, past, max_length, min_length, pad_token_id, eos_token_id)
    hypotheses = [_Hypotheses(num_beams, length_penalty, early_stopping) for _ in range(states)]
    copies = torch.arange(states, device=prompt_ids.device).repeat_interleave(num_beams)
    ids, past, hidden = prompt_ids[copies], past.select(copies), hidden[copies]
    scores = torch.full((states, num_beams), _ABSENT, dtype=hidden.dtype, device=hidden.device)
    scores[:, 0] = 0
    while True:
        log_probs = decoder.logits(hidden).log_softmax(-1)
        if ids.shape[1] < min_length:
            log_probs[:, eos_token_id] = -torch.inf
        totals = (log_probs.view(states, num_beams, -1) + scores[:, :, None]).flatten(1)
        # Twice as many as there are beams, so that enough remain when every beam proposes to end.
        best = totals.topk(2 * num_beams, dim=1)
        beams, tokens = best.indices // log_probs.shape[1], best.indices % log_probs.shape[1]
        chosen = _choose(
            hypotheses, ids, best.values.tolist(), beams.tolist(), tokens.tolist(), pad_token_id, eos_token_id
        )
        rows = torch.tensor([row for row, _, _ in chosen], device=ids.device)
        next_ids = torch.tensor([token for _, token, _ in chosen], device=ids.device)
        scores = scores.new_tensor([score for _, _, score in chosen]).view(states, num_beams)
        ids = torch.cat([ids[rows], next_ids[:, None]], 1)
        if ids.shape[1] >= max_length or all(state.done for state in hypotheses):
            break
        past = past.select(rows)
        hidden = decoder.step(next_ids, memory, past)
    for state, running in enumerate(ids.view(states, num_beams, -1).tolist()):
        if not hypotheses[state].done:
            for tokens, score in zip(running, scores[state].tolist(), strict=True):
                hypotheses[state].add(tokens, score)
    return _padded([state.best() for state in hypotheses], max_length, pad_token_id, eos_token_id, prompt_ids)


def _check(
    decoder: TextDecoder, memory: DecoderMemory, prompt_ids: Tensor, max_length: int, num_beams: int, pad: int
) -> None:
    room = decoder.roberta.embeddings.position_embeddings.num_embeddings - decoder.roberta.embeddings.pad_token_id - 1
    if prompt_ids.ndim != 2 or prompt_ids.shape[0] != memory.states or not prompt_ids.shape[1]:
        raise InputError(f"prompt_ids are {[*prompt_ids.shape]}; they must be [{memory.states}, S] with S at least 1")
    if num_beams < 1:
        raise InputError(f"num_beams={num_beams}; it must be at least 1")
    if not prompt_ids.shape[1] < max_length <= room:
        raise InputError(
            f"max_length={max_length} must exceed the {prompt_ids.shape[1]} tokens of the prompt and be at most "
            f"{room}, where the position table ends"
        )
    if prompt_ids.device.type == "cpu" and bool((prompt_ids == pad).any()):
        raise InputError("prompt_ids hold padding; give all images prompts of one length, or generate group by group")


def _greedy(
    decoder: TextDecoder,
    memory: DecoderMemory,
    ids: Tensor,
    hidden: Tensor,
    past: DecoderCache,
    max_length: int,
    min_length: int,
    pad: int,
    eos: int,
) -> Tensor:
    running = torch.ones_like(ids[:, 0], dtype=torch.bool)
    while True:
        logits = decoder.logits(hidden)
        if ids.shape[1] < min_length:
            logits[:, eos] = -torch.inf
        next_ids = logits.argmax(-1).masked_fill(~running, pad)
        ids = torch.cat([ids, next_ids[:, None]], 1)
        running &= next_ids != eos
        if ids.shape[1] >= max_length or not bool(running.any()):
            return ids
        hidden = decoder.step(next_ids, memory, past)


def _choose(
    hypotheses: list[_Hypotheses],
    ids: Tensor,
    scores: list[list[float]],
    beams: list[list[int]],
    tokens: list[list[int]],
    pad: int,
    eos: int,
) -> list[tuple[int, int, float]]:
    """Set finished sequences aside and pick what the beams go on with: (row of `ids`, next token, score) for each."""
    chosen: list[tuple[int, int, float]] = []
    for state, hypothesis in enumerate(hypotheses):
        first = state * hypothesis.beams
        if hypothesis.done:
            chosen += [(first, pad, 0.0)] * hypothesis.beams
            continue
        going_on: list[tuple[int, int, float]] = []
        for rank, (score, beam, token) in enumerate(zip(scores[state], beams[state], tokens[state], strict=True)):
            if token != eos:
                going_on.append((first + beam, token, score))
            elif rank < hypothesis.beams:
                hypothesis.add(ids[first + beam].tolist(), score)
            if len(going_on) == hypothesis.beams:
                break
        hypothesis.update_done(scores[state][0], ids.shape[1])
        chosen += going_on
    return chosen


def _padded(sequences: list[list[int]], max_length: int, pad: int, eos: int, like: Tensor) -> Tensor:
    ended = [[*tokens, eos] if len(tokens) < max_length else tokens for tokens in sequences]
    longest = max(map(len, ended), default=0)
    rows = [tokens + [pad] * (longest - len(tokens)) for tokens in ended]
    return torch.tensor(rows, dtype=like.dtype, device=like.device).view(len(rows), longest)
