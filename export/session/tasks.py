"""Sessions as the models of tasks: ranking, re-ranking, and the tasks of fine-tuned models (`Task.Session`).

A decoder graph writes one token of every text per call; keys and values of earlier tokens live here between the calls,
and beams and answer prefixes are gathered from them at every step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xfm_fast.packing import ImageGroups, Packing, Sequences
from xfm_fast.tasks.task import TASKS
from xfm_fast.tasks.vqa_model import AnswerTrie, DecodedTree

from ..graphs import SessionMemory
from ..slots import largest
from . import Session

# Rows of vocabulary logits of a pass: 100 MB in fp32 at base size.
_LOGIT_ROWS = 512


class SessionRanks:
    """A `RankModel` over a session with `vision`, `text`, `image_memory` and `fusion`; the session batches inputs."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config
        self.dtype_name: str = session.manifest.dtype
        self.images = session.encode_image

    @property
    def token_budget(self) -> int:
        """Caption tokens of a pass of the session."""
        return self.session.limits.budget

    def captions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeds = self.session.encode_text(input_ids, attention_mask)
        return Packing.from_mask(attention_mask.to(embeds.device)).pack(embeds)

    def memories(self, embeds: Tensor) -> list[SessionMemory]:
        memory = self.session.image_memory(embeds)
        # Copies, so that a cached image does not hold the memory of others.
        return [memory.select(torch.tensor([row])) for row in range(memory.images)]

    def logits(
        self,
        tokens: Tensor,
        lengths: Tensor,
        memories: Sequence[SessionMemory],
        counts: Sequence[int],
    ) -> Tensor:
        memory = memories[0]
        if len(memories) > 1:
            layers = {name: torch.cat([m.layers[name] for m in memories]) for name in memory.layers}
            memory = SessionMemory(layers)
        image_of = [image for image, count in enumerate(counts) for _ in range(count)]
        return self.session.fuse_packed(tokens, lengths, memory, image_of)["match_logits"]

    def caption_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.session.project_text(self.session.encode_text(input_ids, attention_mask))

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.session.project_image(self.session.encode_image(pixels))


class SessionScorer:
    """A `PairScorer` over a session with the graphs `image_memory` and `fusion`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config
        self.memory = session.image_memory

    def prepare(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """Return the text embeddings: the fusion graph starts with them."""
        return tokens

    def scores(
        self, tokens: Tensor, sequences: Sequences, memory: SessionMemory, groups: ImageGroups
    ) -> Tensor:
        """Return the match score `[P]` of every caption with its image."""
        lengths, texts = sequences.cu_seqlens.diff(), groups.cu_texts.diff().long()
        images = torch.arange(len(texts), device=texts.device)
        image_of = images.repeat_interleave(texts).tolist()
        with torch.inference_mode():
            tokens = tokens.to(self.session.device, self.session.dtype)
            outputs = self.session.fuse_packed(tokens, lengths, memory, image_of)
        return outputs["match_logits"][:, 1]

    def fingerprint(self) -> str:
        """Hash the weights and the runtime, which decides the last digits."""
        manifest = self.session.manifest
        files = {
            name for graph in ("image_memory", "fusion") for name in manifest.graph(graph).files
        }
        sums = sorted(record.sha256 for record in manifest.files if record.name in files)
        facts = [self.session.description, manifest.weights_sha256, *sums]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:16]


@cache
def task_session(task: str) -> type[TaskSession] | None:
    """Return the session class of a task; None for an unknown task, or one that no export answers."""
    methods = TASKS[task].Session if task in TASKS else None
    if methods is None:
        return None
    return type(f"{TASKS[task].__name__}Session", (methods, TaskSession), {})


@dataclass
class SessionPast:
    """Keys and values `[A, P, layers, 2, H, D]` of the P tokens before A texts."""

    tokens: Tensor

    def select(self, rows: Tensor) -> SessionPast:
        """Return the cache of the texts `rows` `[A']`, with repeats, in any order."""
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
        past = largest(self.slots("decoder_step"), "past")
        longest = self.config.max_text_length
        return longest if past is None else min(longest, past + 1)

    def states(self, states: Tensor, mask: Tensor | None = None) -> SessionMemory:
        """Project decoder states `[B, M, width]` once for all steps and beams."""
        self.require("decoder_memory")
        with torch.inference_mode():
            return SessionMemory(self.in_batches("decoder_memory", {"states": states}), mask)

    def next_tokens(
        self, tokens: Tensor, past: Tensor, states: SessionMemory
    ) -> tuple[Tensor, Tensor]:
        """Return logits `[B, T, vocabulary]`, and keys and values `[B, T, layers, 2, H, D]`, of the next tokens.

        `past` `[B, T, P, layers, 2, H, D]` are those of the tokens before.
        """
        graph = self.require("decoder_step")
        batch, texts, length = past.shape[:3]
        with torch.inference_mode():
            # Before the first token the past is one masked token.
            mask = torch.full((batch, texts, max(length, 1)), int(length > 0), device=self.device)
            if not length:
                past = past.new_zeros(batch, texts, 1, *past.shape[3:])
            past = past.movedim(2, -2)
            columns = self.pieces(graph, "texts", texts, _LOGIT_ROWS)
            logits, present = [], []
            for rows in self.pieces(graph, "batch", batch, max(_LOGIT_ROWS // max(texts, 1), 1)):
                memory = states.select(rows).inputs
                outputs = []
                for column in columns:
                    block = rows, column
                    inputs = {
                        "token_ids": tokens[block],
                        "past": past[block],
                        "past_mask": mask[block],
                    }
                    outputs.append(self.call(graph, inputs | memory))
                logits.append(torch.cat([output["logits"] for output in outputs], 1))
                present.append(torch.cat([output["present"] for output in outputs], 1))
            return torch.cat(logits), torch.cat(present)

    def unwritten(self, *counts: int) -> Tensor:
        """Return zeros as keys and values of tokens, `[*counts, layers, 2, H, D]`."""
        dims = {tensor.name: tensor.dims for tensor in self.manifest.graph("decoder_step").outputs}
        shape = map(int, dims["present"][2:])
        return torch.zeros(*counts, *shape, dtype=self.dtype, device=self.device)

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
        """See `Writer`: a copy of the result of a step, in fp32."""
        return hidden.to(torch.float32, copy=True)

    def log_likelihoods(self, memory: SessionMemory, answer_ids: Tensor) -> Tensor:
        """Return the log-likelihood `[Q]` of one text `[Q, L]` per state."""
        past = SessionPast(self.unwritten(len(answer_ids), 0))
        total = torch.zeros(len(answer_ids), dtype=torch.float64, device=self.device)
        *tokens, _ = answer_ids.unbind(1)
        for ids, following in zip(tokens, answer_ids[:, 1:].unbind(1), strict=True):
            shares = self.step(ids, memory, past).double().log_softmax(-1)
            real = following != self.config.pad_token_id
            total += shares.gather(1, following[:, None])[:, 0] * real
        return total

    def answer_tree(self, memory: SessionMemory, trie: AnswerTrie) -> SteppedTree:
        """Return the tree that decodes the answers of some questions."""
        return SteppedTree(self, memory, trie)


class SteppedTree(DecodedTree):
    """The answer tree over a step graph: nodes of a depth of all questions run in one step."""

    def __init__(self, session: TaskSession, memory: SessionMemory, trie: AnswerTrie) -> None:
        super().__init__(trie, memory.states, torch.float32)
        self._session, self._memory = session, memory
        self._present = session.unwritten(0)

    def decode_nodes(self, questions: Tensor, nodes: Tensor, *, keep: bool) -> None:
        """See `DecodedTree`."""
        new = self._present.new_zeros(len(nodes), *self._present.shape[1:])
        stored = torch.cat([self._present, new])
        for depth, at_depth, prefixes in self.by_depth(questions, nodes):
            for rows in _grids(questions[at_depth]):
                # Row r of the grid are nodes of one question; padding is computed and not read.
                grid = pad_sequence(rows, True, int(rows[0][0])).to(nodes.device)
                masks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
                real = pad_sequence(masks, True).to(nodes.device)
                prefix = prefixes[grid]
                logits, present = self._session.next_tokens(
                    self.trie.tokens[nodes[at_depth[grid]]],
                    stored[prefix[..., :depth]],
                    self._memory.select(questions[at_depth[grid[:, 0]]]),
                )
                stored[prefix[real][:, -1]] = present[real]
                decoded = at_depth[grid[real]]
                shares = logits[real].float().log_softmax(-1)
                edges, counts = self.edges_of(nodes[decoded])
                row = torch.arange(len(decoded), device=nodes.device).repeat_interleave(counts)
                likelihoods = shares[row, self.trie.edge_tokens[edges]]
                self.log_likelihoods[questions[decoded][row], edges] = likelihoods
        if keep:
            self._present = stored


def _grids(questions: Tensor) -> Iterator[list[Tensor]]:
    """Yield grids of nodes of sorted `questions`: a question per row, similar rows, limited logits."""
    counts = questions.unique_consecutive(return_counts=True)[1].tolist()
    nodes = torch.arange(len(questions)).split(counts)
    rows = [row for question_nodes in nodes for row in question_nodes.split(_LOGIT_ROWS)]
    grid: list[Tensor] = []
    for row in sorted(rows, key=len):
        if grid and (len(grid) + 1) * len(row) > _LOGIT_ROWS:
            yield grid
            grid = []
        grid.append(row)
    yield grid
