"""VQA answer ranking over a prefix trie: shared prefixes of the answers are decoded once per question.

The 3,129 answers of VQA v2 have 6,334 tokens between `<s>` and `</s>`, but 4,075 distinct prefixes. A prefix of the
base model costs 0.28 GFLOP (0.20 decoder layers, 0.08 softmax normaliser), so ranking all answers of a question costs
1.1 TFLOP, against 1.8 without sharing and 7.8 with padding and separate keys and values.

Nodes are decoded prefixes: every answer without its last token, and all shorter prefixes. Edges are next tokens; the
log-likelihood of an answer is the sum along its path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.models import inputs
from xfm_fast.models.decoder import DecoderMemory, TextDecoder
from xfm_fast.packing import offsets, ragged_rows

# Nodes of one pass. More make products no faster, and keys and values of a layer take 6 KB each (base, fp32).
_NODES = 8192
# Answers of a question that are decoded whole before any is ruled out: about as many as the time to read the weights
# allows, since the better the best of them is, the fewer others have to be looked at.
_SEEDS = 16


@dataclass(frozen=True)
class AnswerTrie:
    """N answers as a trie of `nodes` prefixes and `edges` next tokens; node 0 is `<s>`."""

    tokens: Tensor  # `[nodes]` last token of each prefix
    paths: Tensor  # `[nodes, D]` ancestors of a node, from `<s>` to the node itself, padded with 0
    depths: Tensor  # `[nodes]` tokens before the last one; ascending
    edge_starts: (
        Tensor  # `[nodes + 1]`: edges of node i are `edge_starts[i]` to `edge_starts[i + 1]`
    )
    edge_tokens: Tensor  # `[edges]`
    answer_nodes: Tensor  # `[N, D]` nodes of an answer in order, padded with 0
    answer_edges: Tensor  # `[N, D]` edges of an answer in order, padded with `edges`

    @classmethod
    def of(cls, answer_ids: Tensor, answer_mask: Tensor | None, config: XFMConfig) -> AnswerTrie:
        """Build the trie from tokenised answers `[N, La]` (`<s> ... </s>`, padded) and an optional mask."""
        mask = check_answers(answer_ids, answer_mask, config)
        lengths = mask.sum(1).tolist()
        answers = [ids[:length] for ids, length in zip(answer_ids.tolist(), lengths, strict=True)]
        # Shorter prefixes come first, so that a node's index is larger than its ancestors'.
        prefixes = sorted({tuple(ids[:n]) for ids in answers for n in range(1, len(ids))}, key=len)
        nodes = {prefix: number for number, prefix in enumerate(prefixes)}
        following: list[list[int]] = [[] for _ in prefixes]
        whole = sorted({tuple(ids[:n]) for ids in answers for n in range(2, len(ids) + 1)})
        for prefix in whole:
            following[nodes[prefix[:-1]]].append(prefix[-1])
        counts = torch.tensor([len(tokens) for tokens in following])
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        edges = {
            (*prefix, token): start + place
            for prefix, tokens, start in zip(prefixes, following, starts.tolist(), strict=False)
            for place, token in enumerate(tokens)
        }
        deepest = max(lengths) - 1

        def padded(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor(
                [row + [value] * (deepest - len(row)) for row in rows], device=answer_ids.device
            )

        steps = [[tuple(ids[:n]) for n in range(1, len(ids) + 1)] for ids in answers]
        return cls(
            tokens=torch.tensor([prefix[-1] for prefix in prefixes], device=answer_ids.device),
            paths=padded(
                [[nodes[prefix[:n]] for n in range(1, len(prefix) + 1)] for prefix in prefixes], 0
            ),
            depths=torch.tensor([len(prefix) - 1 for prefix in prefixes], device=answer_ids.device),
            edge_starts=starts.to(answer_ids.device),
            edge_tokens=torch.tensor(
                [token for tokens in following for token in tokens], device=answer_ids.device
            ),
            answer_nodes=padded([[nodes[step] for step in path[:-1]] for path in steps], 0),
            answer_edges=padded([[edges[step] for step in path[1:]] for path in steps], len(edges)),
        )

    @property
    def answers(self) -> int:
        return self.answer_edges.shape[0]

    @property
    def nodes(self) -> int:
        return self.tokens.shape[0]

    @property
    def edges(self) -> int:
        return self.edge_tokens.shape[0]


def check_answers(answer_ids: Tensor, answer_mask: Tensor | None, config: XFMConfig) -> Tensor:
    """Boolean mask of valid answers: same first token and at least one more."""
    mask = inputs.check_tokens(answer_ids, answer_mask, config)
    if not answer_ids.shape[0]:
        raise InputError("the answer list is empty; give at least one answer")
    if answer_ids.shape[1] < 2:
        raise InputError(
            f"answer_ids are {[*answer_ids.shape]}; an answer has at least <s> and </s>"
        )
    if answer_ids.device.type == "cpu":
        if not bool(mask[:, :2].all()):
            row = int(mask[:, :2].all(1).long().argmin())
            raise InputError(
                f"answer {row} holds fewer than two tokens; answers are tokenised with <s> and </s>"
            )
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise InputError("answer_mask has gaps; the real tokens of an answer come first")
        if bool((answer_ids[:, 0] != answer_ids[0, 0]).any()):
            row = int((answer_ids[:, 0] != answer_ids[0, 0]).long().argmax())
            raise InputError(
                f"answer {row} starts with token {int(answer_ids[row, 0])}, answer 0 with another one"
            )
    return mask


class AnswerRanking(NamedTuple):
    """The best answers of Q questions, best first."""

    indices: Tensor
    """`[Q, best]` indices into the answer list."""
    scores: Tensor
    """`[Q, best]` log-likelihood of each answer given the question."""

    @property
    def probabilities(self) -> Tensor:
        """`[Q, best]`: softmax over the returned answers only."""
        return self.scores.softmax(-1)


def rank(
    tree_of: Callable[[Any], DecodedTree],
    memory: Any,
    trie: AnswerTrie,
    *,
    k: int,
    best: int | None,
    first_token_twice: bool,
) -> AnswerRanking:
    """Rank the k answers with the likeliest first tokens and return the `best`, for the Q `states` of a memory.

    With best = k (or None) all are decoded in one pass. With fewer, a prefix less likely than `best` complete answers
    is pruned; the result is the same.
    """
    if not 1 <= k <= trie.answers:
        raise InputError(f"k={k}; with {trie.answers} answers it must be 1 to {trie.answers}")
    if best is not None and not 1 <= best <= k:
        raise InputError(f"best={best}; with {k} candidates it must be 1 to {k}")
    best = k if best is None else best
    # At most this many nodes are decoded for a question.
    most = min(trie.nodes, k * trie.answer_nodes.shape[1])
    step = max(1, _NODES // most)
    parts = [
        _rank_part(
            tree_of(memory.part(start, min(start + step, memory.states))),
            trie,
            k,
            best,
            first_token_twice,
        )
        for start in range(0, memory.states, step)
    ]
    return AnswerRanking(
        torch.cat([part.indices for part in parts]), torch.cat([part.scores for part in parts])
    )


def _rank_part(
    tree: DecodedTree, trie: AnswerTrie, k: int, best: int, first_token_twice: bool
) -> AnswerRanking:
    tree.decode(tree.none.index_fill(1, tree.none.new_zeros(1, dtype=torch.long), True), keep=True)
    if first_token_twice:
        tree.log_likelihoods *= 2
    candidates = tree.log_likelihoods[:, trie.answer_edges[:, 0]].topk(k, dim=1).indices
    nodes, edges = trie.answer_nodes[candidates], trie.answer_edges[candidates]
    # The candidates come in the order of their first tokens' likelihood.
    wanted = nodes if best == k else nodes[:, : max(best, _SEEDS)]
    chosen = tree.none.scatter(1, wanted.flatten(1), True)
    while True:
        tree.decode(chosen & (tree.places < 0), keep=best < k)
        # An edge that is not known yet counts 0, the most that it can be: a sum is the score, or a bound on it.
        scores = tree.log_likelihoods.gather(1, edges.flatten(1)).view(edges.shape).sum(-1)
        if best == k:
            break
        missing = (tree.places < 0).gather(1, nodes.flatten(1)).view(nodes.shape)
        unfinished = missing.any(-1)
        worst = scores.masked_fill(unfinished, -torch.inf).topk(best, dim=1).values[:, -1:]
        open_ = unfinished & (scores >= worst)
        if not bool(open_.any()):
            scores = scores.masked_fill(unfinished, -torch.inf)
            break
        following = nodes.gather(2, missing.long().argmax(-1, keepdim=True))[..., 0]
        # Node 0 has been decoded: it stands for answers without a next node.
        chosen = tree.none.scatter(1, following * open_, True)
    ranked = scores.topk(best, dim=1)
    return AnswerRanking(candidates.gather(1, ranked.indices), ranked.values)


class DecodedTree(ABC):
    """Decoded trie nodes of Q questions with the log-likelihoods of their edges."""

    def __init__(self, trie: AnswerTrie, questions: int, dtype: torch.dtype) -> None:
        self.trie, self.rows = trie, 0
        device, shape = trie.tokens.device, (questions, trie.nodes)
        self.none = torch.zeros(shape, dtype=torch.bool, device=device)
        # Row of a node in the keys and values; -1 before it is decoded.
        self.places = torch.full(shape, -1, device=device)
        # Of an edge given its node; 0 until the node is decoded.
        self.log_likelihoods = torch.zeros(questions, trie.edges + 1, dtype=dtype, device=device)

    def decode(self, chosen: Tensor, *, keep: bool) -> None:
        """Decode nodes chosen in `[Q, nodes]` with decoded or chosen ancestors; `keep` stores keys and values."""
        questions, nodes = chosen.nonzero(as_tuple=True)
        if not len(nodes):
            return
        self.places[questions, nodes] = torch.arange(
            self.rows, self.rows + len(nodes), device=nodes.device
        )
        self.decode_nodes(questions, nodes, keep=keep)
        self.rows += len(nodes) * keep

    @abstractmethod
    def decode_nodes(self, questions: Tensor, nodes: Tensor, *, keep: bool) -> None:
        """Decode new `nodes` `[n]` of `questions` `[n]` (sorted) and store the log-likelihoods of their edges."""

    def by_depth(self, questions: Tensor, nodes: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Per depth, shallowest first: which nodes `[m]`, and rows of their prefixes `[m, depth + 1]`, own row last."""
        depths = self.trie.depths[nodes]
        for depth in depths.unique().tolist():
            rows = (depths == depth).nonzero().flatten()
            yield (
                depth,
                rows,
                self.places[questions[rows, None], self.trie.paths[nodes[rows], : depth + 1]],
            )

    def edges_of(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenated edges of nodes `[n]`, and edge counts `[n]`."""
        first = self.trie.edge_starts[nodes]
        counts = self.trie.edge_starts[nodes + 1] - first
        return ragged_rows(first, counts), counts


class PackedTree(DecodedTree):
    """Tree of the packed decoder: all nodes of a call in one pass, at any depth."""

    def __init__(self, decoder: TextDecoder, memory: DecoderMemory, trie: AnswerTrie) -> None:
        super().__init__(
            trie, memory.states, torch.promote_types(decoder.word_embeddings.dtype, torch.float32)
        )
        self._decoder, self._memory = decoder, memory
        self._layers: list[Tensor] = []  # [rows, 2, H, D]

    def decode_nodes(self, questions: Tensor, nodes: Tensor, *, keep: bool) -> None:
        trie, memory, decoder = self.trie, self._memory, self._decoder
        depths = trie.depths[nodes]
        visible = [(rows, places) for _, rows, places in self.by_depth(questions, nodes)]
        groups = offsets(torch.bincount(questions, minlength=memory.states))
        embeddings = decoder.roberta.embeddings
        x = embeddings(trie.tokens[nodes], depths + embeddings.pad_token_id + 1)
        for number, layer in enumerate(decoder.roberta.encoder):
            q, k, v = layer.attention.self.project_all(x)
            known = k.new_empty(self.rows + len(nodes), 2, *k.shape[1:])
            if self.rows:
                known[: self.rows] = self._layers[number]
            known[self.rows :, 0], known[self.rows :, 1] = k, v
            if keep:
                self._layers[number : number + 1] = [known]
            x = layer.attention.output(_attend(q, known, visible).flatten(1), x)
            x = layer.cross_attention(
                x, memory.layers[number], groups, memory.cu_seqlens, memory.longest
            )
            x = layer.feed_forward(x)
        self._read_edges(decoder.lm_head.transform(x), questions, nodes)

    def _read_edges(self, hidden: Tensor, questions: Tensor, nodes: Tensor) -> None:
        """Store log-likelihoods of all edges of nodes with final hidden states `[n, width]`."""
        trie, words, bias = self.trie, self._decoder.word_embeddings, self._decoder.lm_head.bias
        edges, counts = self.edges_of(nodes)
        # One edge of a node gives the softmax normaliser; the others differ from it by their logits.
        one = ops.token_log_likelihood(
            hidden, words, bias, trie.edge_tokens[trie.edge_starts[nodes]]
        )
        rows = torch.arange(len(nodes), device=nodes.device).repeat_interleave(counts)
        wide = self.log_likelihoods.dtype

        def logits(rows: Tensor, tokens: Tensor) -> Tensor:
            return (hidden[rows].to(wide) * words[tokens].to(wide)).sum(1) + bias[tokens].to(wide)

        others = logits(rows, trie.edge_tokens[edges])
        begins = counts.cumsum(0) - counts
        differences = others - others[begins].index_select(0, rows)
        self.log_likelihoods[questions[rows], edges] = one.to(wide)[rows] + differences


def _attend(q: Tensor, known: Tensor, visible: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of queries `[n, H, D]` over the rows `[m, length]` of `known` `[rows, 2, H, D]` visible to each."""
    context = torch.empty_like(q, memory_format=torch.contiguous_format)
    for queries, rows in visible:
        # One to eight keys per query: a GEMM of this shape is slower than a pass per key.
        query = q[queries] * q.shape[-1] ** -0.5
        keys = [known.index_select(0, place) for place in rows.unbind(1)]
        weights = torch.stack([(query * key[:, 0]).sum(-1) for key in keys], -1).softmax(-1)
        summed = weights[..., :1] * keys[0][:, 1]
        for number, key in enumerate(keys[1:], start=1):
            summed.addcmul_(weights[..., number, None], key[:, 1])
        context[queries] = summed
    return context
