"""Sessions of fine-tuned models: a session with the methods that its task adds (`Task.Session`).

A decoder graph writes one token of every text per call; keys and values of earlier tokens live here between the calls,
and beams and answer prefixes are gathered from them at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xfm_fast.tasks.task import TASKS
from xfm_fast.tasks.vqa_model import AnswerTrie, DecodedTree

from ..slots import largest
from . import Session, SessionMemory

# Rows of vocabulary logits of a pass: 100 MB in fp32 at base size.
_LOGIT_ROWS = 512


@cache
def task_session(kind: str) -> type[TaskSession] | None:
    """Session class of a task; None for an unknown task, or one that no export answers."""
    methods = TASKS[kind].Session if kind in TASKS else None
    return (
        None
        if methods is None
        else type(f"{TASKS[kind].__name__}Session", (methods, TaskSession), {})
    )


@dataclass
class SessionPast:
    """Keys and values `[A, P, layers, 2, H, D]` of the P tokens before A texts."""

    tokens: Tensor

    def select(self, rows: Tensor) -> SessionPast:
        """The cache of the texts `rows` `[A']`, with repeats, in any order."""
        return SessionPast(self.tokens.index_select(0, rows))


class TaskSession(Session):
    """A session of a fine-tuned model.

    With the graphs of a decoder it is a `xfm_fast.models.decoder.Writer`, and its hidden states are logits.
    """

    @property
    def writer(self) -> TaskSession:
        return self

    @property
    def positions(self) -> int:
        """Tokens of the longest text that model and graphs take."""
        most = largest(self.slots("decoder_step"), "past")
        return (
            self.config.max_text_length
            if most is None
            else min(self.config.max_text_length, most + 1)
        )

    def states(self, states: Tensor, mask: Tensor | None = None) -> SessionMemory:
        """Project decoder states `[B, M, width]` once for all steps and beams."""
        self.require("decoder_memory")
        with torch.inference_mode():
            return SessionMemory(self.in_batches("decoder_memory", {"states": states}), mask)

    def next_tokens(
        self, tokens: Tensor, past: Tensor, states: SessionMemory
    ) -> tuple[Tensor, Tensor]:
        """Logits `[B, T, vocabulary]` and keys and values `[B, T, layers, 2, H, D]` of the next token of T texts."""
        name = self.require("decoder_step")
        batch, texts, behind = past.shape[:3]
        with torch.inference_mode():
            real = torch.full((batch, texts, max(behind, 1)), int(behind > 0), device=self.device)
            cached = (past if behind else past.new_zeros(batch, texts, 1, *past.shape[3:])).movedim(
                2, -2
            )
            columns = self.pieces(name, "texts", texts, _LOGIT_ROWS)
            made = []
            for rows in self.pieces(name, "batch", batch, max(_LOGIT_ROWS // max(texts, 1), 1)):
                given = states.select(rows).inputs
                row = [
                    self.call(
                        name,
                        {
                            "token_ids": tokens[rows, part],
                            "past": cached[rows, part],
                            "past_mask": real[rows, part],
                            **given,
                        },
                    )
                    for part in columns
                ]
                made.append(
                    {
                        key: torch.cat([each[key] for each in row], 1)
                        for key in ("logits", "present")
                    }
                )
            return torch.cat([each["logits"] for each in made]), torch.cat(
                [each["present"] for each in made]
            )

    def unwritten(self, *counts: int) -> Tensor:
        """Zeros as keys and values of tokens, `[*counts, layers, 2, H, D]`."""
        present = next(
            each for each in self.manifest.graph("decoder_step").outputs if each.name == "present"
        )
        dims = (int(dim) for dim in present.dims[2:])
        return torch.zeros(*counts, *dims, dtype=self.dtype, device=self.device)

    def begin(
        self, prompt_ids: Tensor, memory: SessionMemory, capacity: int
    ) -> tuple[Tensor, SessionPast]:
        """See `Writer`: the prompt goes through the graph token by token."""
        prompt_ids = prompt_ids.to(self.device)
        past = SessionPast(self.unwritten(len(prompt_ids), 0))
        logits = [self.step(tokens, memory, past) for tokens in prompt_ids.unbind(1)]
        return logits[-1], past

    def step(self, input_ids: Tensor, memory: SessionMemory, past: SessionPast) -> Tensor:
        """See `Writer`."""
        grid = (memory.states, -1)
        logits, present = self.next_tokens(
            input_ids.unflatten(0, grid), past.tokens.unflatten(0, grid), memory
        )
        past.tokens = torch.cat([past.tokens, present.flatten(0, 1)[:, None]], 1)
        return logits.flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Writer`: a copy of what a step returned, in fp32."""
        return hidden.to(torch.float32, copy=True)

    def log_likelihoods(self, memory: SessionMemory, answer_ids: Tensor) -> Tensor:
        """Log-likelihood `[Q]` of one text `[Q, L]` per state."""
        past = SessionPast(self.unwritten(len(answer_ids), 0))
        total = torch.zeros(len(answer_ids), dtype=torch.float64, device=self.device)
        for tokens, following in zip(
            answer_ids.unbind(1), answer_ids[:, 1:].unbind(1), strict=False
        ):
            shares = self.step(tokens, memory, past).double().log_softmax(-1)
            total += shares.gather(1, following[:, None])[:, 0] * (
                following != self.config.pad_token_id
            )
        return total

    def answer_tree(self, memory: SessionMemory, trie: AnswerTrie) -> SteppedTree:
        """Tree that decodes the answers of some questions."""
        return SteppedTree(self, memory, trie)


class SteppedTree(DecodedTree):
    """The answer tree over a step graph: nodes of a depth of all questions run in one step."""

    def __init__(self, session: TaskSession, memory: SessionMemory, trie: AnswerTrie) -> None:
        super().__init__(trie, memory.states, torch.float32)
        self._session, self._memory = session, memory
        self._known = session.unwritten(0)

    def decode_nodes(self, questions: Tensor, nodes: Tensor, *, keep: bool) -> None:
        """See `DecodedTree`."""
        known = torch.cat([self._known, self._known.new_zeros(len(nodes), *self._known.shape[1:])])
        for depth, chosen, places in self.by_depth(questions, nodes):
            for rows in _grids(questions[chosen]):
                # Row r of the grid are nodes of one question; padding is computed and not read.
                grid = pad_sequence(rows, batch_first=True, padding_value=int(rows[0][0])).to(
                    nodes.device
                )
                real = pad_sequence(
                    [torch.ones_like(row, dtype=torch.bool) for row in rows], True
                ).to(nodes.device)
                behind, memory = places[grid], self._memory.select(questions[chosen[grid[:, 0]]])
                tokens = self.trie.tokens[nodes[chosen[grid]]]
                logits, present = self._session.next_tokens(
                    tokens, known[behind[..., :depth]], memory
                )
                of = chosen[grid[real]]
                known[behind[real][:, -1]] = present[real]
                shares, (edges, counts) = (
                    logits[real].float().log_softmax(-1),
                    self.edges_of(nodes[of]),
                )
                row = torch.arange(len(of), device=nodes.device).repeat_interleave(counts)
                self.log_likelihoods[questions[of][row], edges] = shares[
                    row, self.trie.edge_tokens[edges]
                ]
        if keep:
            self._known = known


def _grids(questions: Tensor) -> Iterator[list[Tensor]]:
    """Nodes of sorted `questions` by number, one question a row, in grids of similar rows and limited logits."""
    counts = questions.unique_consecutive(return_counts=True)[1].tolist()
    rows = [
        row for of in torch.arange(len(questions)).split(counts) for row in of.split(_LOGIT_ROWS)
    ]
    grid: list[Tensor] = []
    for row in sorted(rows, key=len):
        if grid and (len(grid) + 1) * len(row) > _LOGIT_ROWS:
            yield grid
            grid = []
        grid.append(row)
    yield grid
