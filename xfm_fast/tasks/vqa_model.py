"""The VQA model: a decoder that writes answers, or ranks a list of them over their prefix trie.

The trie decodes a shared prefix once per question.

The 3,129 answers of VQA v2 have 6,334 tokens between `<s>` and `</s>`, but 4,075 distinct prefixes.
A prefix of the base model costs 0.28 GFLOP (0.20 decoder layers, 0.08 softmax normaliser), so
ranking all answers of a question costs 1.1 TFLOP, against 1.8 without sharing and 7.8 with padding
and separate keys and values.

Nodes are decoded prefixes: every answer without its last token, and all shorter prefixes. Edges are
next tokens; the log-likelihood of an answer is the sum along its path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels import ops
from xfm_fast.models import inputs
from xfm_fast.models.decoder import DecoderMemory, TextDecoder, generate
from xfm_fast.packing import ImageGroups, offsets, ragged_rows
from xfm_fast.tasks.models import DecoderModel

# Nodes of one pass. More make GEMMs no faster, and keys and values of a layer take 6 KB each (base,
# fp32).
_NODES = 8192
# Answers of a question that are decoded whole before any is pruned: about as many as fit in the
# time to read the weights. The better the best of them, the fewer of the remaining answers have to
# be decoded.
_SEEDS = 16


@dataclass(frozen=True)
class AnswerTrie:
    """N answers as a trie of `nodes` prefixes and `edges` next tokens; node 0 is `<s>`."""

    tokens: Tensor  # `[nodes]` last token of each prefix
    paths: Tensor  # `[nodes, D]` ancestors of a node, from `<s>` to the node itself, padded with 0
    depths: Tensor  # `[nodes]` tokens before the last one; ascending
    edge_starts: (
        Tensor  # `[nodes + 1]`: node i has the edges `edge_starts[i]` to `edge_starts[i + 1]`
    )
    edge_tokens: Tensor  # `[edges]`
    answer_nodes: Tensor  # `[N, D]` nodes of an answer in order, padded with 0
    answer_edges: Tensor  # `[N, D]` edges of an answer in order, padded with `edges`

    @classmethod
    def of(cls, answer_ids: Tensor, answer_mask: Tensor | None, config: XFMConfig) -> AnswerTrie:
        """Build the trie from padded answers `[N, La]` (`<s> ... </s>`) and an optional mask."""
        mask, device = check_answers(answer_ids, answer_mask, config), answer_ids.device
        lengths = mask.sum(1).tolist()
        answers = [ids[:length] for ids, length in zip(answer_ids.tolist(), lengths, strict=True)]
        # Every prefix of an answer, in order; the last one is the whole answer.
        paths = [[tuple(ids[: end + 1]) for end in range(len(ids))] for ids in answers]
        # Shorter prefixes come first, so that a node's index is larger than its ancestors'.
        prefixes = sorted({prefix for path in paths for prefix in path[:-1]}, key=len)
        nodes = {prefix: node for node, prefix in enumerate(prefixes)}
        following: list[list[int]] = [[] for _ in prefixes]
        for prefix in sorted({prefix for path in paths for prefix in path[1:]}):
            following[nodes[prefix[:-1]]].append(prefix[-1])
        edges: dict[tuple[int, ...], int] = {}
        starts = [0]
        for prefix, tokens in zip(prefixes, following, strict=True):
            for token in tokens:
                edges[*prefix, token] = len(edges)
            starts.append(len(edges))
        depth = max(lengths) - 1

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        def padded(rows: list[list[int]], padding: int) -> Tensor:
            full = [row + [padding] * (depth - len(row)) for row in rows]
            return torch.tensor(full, device=device)

        ancestors = [
            [nodes[prefix[:length]] for length in range(1, len(prefix) + 1)] for prefix in prefixes
        ]
        return cls(
            tokens=tensor([prefix[-1] for prefix in prefixes]),
            paths=padded(ancestors, 0),
            depths=tensor([len(prefix) - 1 for prefix in prefixes]),
            edge_starts=tensor(starts),
            edge_tokens=tensor([token for tokens in following for token in tokens]),
            answer_nodes=padded([[nodes[step] for step in path[:-1]] for path in paths], 0),
            answer_edges=padded([[edges[step] for step in path[1:]] for path in paths], len(edges)),
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
    """Check that answers share their first token and have another one; return their boolean mask."""
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
    tree_of: Callable[[Any, AnswerTrie], DecodedTree],
    memory: Any,
    trie: AnswerTrie,
    *,
    k: int,
    best: int | None,
    first_token_twice: bool,
) -> AnswerRanking:
    """Rank the k answers with the likeliest first tokens, for the Q `states` of a memory.

    With best = k (or None) all are decoded in one pass. With fewer, a prefix less likely than
    `best` complete answers is pruned; the result is the same.
    """
    if not 1 <= k <= trie.answers:
        raise InputError(f"k={k}; with {trie.answers} answers it must be 1 to {trie.answers}")
    if best is not None and not 1 <= best <= k:
        raise InputError(f"best={best}; with {k} candidates it must be 1 to {k}")
    # Upper bound of the nodes that a question decodes.
    nodes = min(trie.nodes, k * trie.answer_nodes.shape[1])
    step = max(1, _NODES // nodes)
    rankings = []
    for start in range(0, memory.states, step):
        tree = tree_of(memory.part(start, min(start + step, memory.states)), trie)
        rankings.append(_rank_tree(tree, k, k if best is None else best, first_token_twice))
    return AnswerRanking(
        torch.cat([ranking.indices for ranking in rankings]),
        torch.cat([ranking.scores for ranking in rankings]),
    )


def _rank_tree(tree: DecodedTree, k: int, best: int, first_token_twice: bool) -> AnswerRanking:
    trie, none = tree.trie, tree.none
    root = none.index_fill(1, none.new_zeros(1, dtype=torch.long), True)
    tree.decode(root, keep=True)
    if first_token_twice:
        tree.log_likelihoods *= 2
    candidates = tree.log_likelihoods[:, trie.answer_edges[:, 0]].topk(k, dim=1).indices
    nodes, edges = trie.answer_nodes[candidates], trie.answer_edges[candidates]
    # The candidates come in the order of their first tokens' likelihood.
    seeds = nodes if best == k else nodes[:, : max(best, _SEEDS)]
    pending = none.scatter(1, seeds.flatten(1), True)
    while True:
        tree.decode(pending & (tree.positions < 0), keep=best < k)
        # An edge that is not decoded counts 0, the largest possible value: a sum is the score, or a
        # bound on it.
        scores = tree.log_likelihoods.gather(1, edges.flatten(1)).view(edges.shape).sum(-1)
        if best == k:
            break
        missing = (tree.positions < 0).gather(1, nodes.flatten(1)).view(nodes.shape)
        unfinished = missing.any(-1)
        worst = scores.masked_fill(unfinished, -torch.inf).topk(best, dim=1).values[:, -1:]
        promising = unfinished & (scores >= worst)
        if not bool(promising.any()):
            scores = scores.masked_fill(unfinished, -torch.inf)
            break
        following = nodes.gather(2, missing.long().argmax(-1, keepdim=True))[..., 0]
        # Node 0 has been decoded: it stands for answers without a next node.
        pending = none.scatter(1, following * promising, True)
    ranked = scores.topk(best, dim=1)
    return AnswerRanking(candidates.gather(1, ranked.indices), ranked.values)


class DecodedTree(ABC):
    """Decoded trie nodes of Q questions with the log-likelihoods of their edges."""

    def __init__(self, trie: AnswerTrie, questions: int, dtype: torch.dtype) -> None:
        self.trie, self.rows = trie, 0
        device, shape = trie.tokens.device, (questions, trie.nodes)
        self.none = torch.zeros(shape, dtype=torch.bool, device=device)
        # Row of a node in the keys and values; -1 before it is decoded.
        self.positions = torch.full(shape, -1, device=device)
        # Of an edge given its node; 0 until the node is decoded.
        self.log_likelihoods = torch.zeros(questions, trie.edges + 1, dtype=dtype, device=device)

    def decode(self, selected: Tensor, *, keep: bool) -> None:
        """Decode the nodes in the mask `[Q, nodes]`; their ancestors are decoded or in it too.

        `keep` stores keys and values.
        """
        questions, nodes = selected.nonzero(as_tuple=True)
        if not len(nodes):
            return
        end = self.rows + len(nodes)
        self.positions[questions, nodes] = torch.arange(self.rows, end, device=nodes.device)
        self.decode_nodes(questions, nodes, keep=keep)
        if keep:
            self.rows = end

    @abstractmethod
    def decode_nodes(self, questions: Tensor, nodes: Tensor, *, keep: bool) -> None:
        """Decode `nodes` `[n]` of sorted `questions` `[n]`; store the log-likelihoods of their edges."""

    def by_depth(self, questions: Tensor, nodes: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Iterate over depths from the shallowest: depth, indices of its nodes `[m]`, positions of
        their prefixes.

        Positions are `[m, depth + 1]`, the node itself last.
        """
        depths = self.trie.depths[nodes]
        for depth in depths.unique().tolist():
            rows = (depths == depth).nonzero().flatten()
            path = self.trie.paths[nodes[rows], : depth + 1]
            yield depth, rows, self.positions[questions[rows, None], path]

    def edges_of(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the concatenated edges of nodes `[n]`, and edge counts `[n]`."""
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
        memory, decoder = self._memory, self._decoder
        tokens, depths = self.trie.tokens[nodes], self.trie.depths[nodes]
        visible = [(rows, path) for _, rows, path in self.by_depth(questions, nodes)]
        groups = offsets(torch.bincount(questions, minlength=memory.states))
        embeddings = decoder.roberta.embeddings
        x = embeddings(tokens, depths + embeddings.pad_token_id + 1)
        for index, layer in enumerate(decoder.roberta.encoder):
            q, k, v = layer.attention.self.project_all(x)
            keys_values = k.new_empty(self.rows + len(nodes), 2, *k.shape[1:])
            if self.rows:
                keys_values[: self.rows] = self._layers[index]
            keys_values[self.rows :, 0], keys_values[self.rows :, 1] = k, v
            if keep:
                self._layers[index : index + 1] = [keys_values]
            x = layer.attention.output(_attend(q, keys_values, visible).flatten(1), x)
            x = layer.cross_attention(
                x, memory.layers[index], groups, memory.cu_seqlens, memory.longest
            )
            x = layer.feed_forward(x)
        self._read_edges(decoder.lm_head.transform(x), questions, nodes)

    def _read_edges(self, hidden: Tensor, questions: Tensor, nodes: Tensor) -> None:
        """Store log-likelihoods of all edges of nodes with final hidden states `[n, width]`."""
        trie, words, bias = self.trie, self._decoder.word_embeddings, self._decoder.lm_head.bias
        edges, counts = self.edges_of(nodes)
        # One edge of a node gives the softmax normaliser; the rest differ from it by their logits.
        first_token = trie.edge_tokens[trie.edge_starts[nodes]]
        first = ops.token_log_likelihood(hidden, words, bias, first_token)
        rows = torch.arange(len(nodes), device=nodes.device).repeat_interleave(counts)
        dtype = self.log_likelihoods.dtype
        tokens = trie.edge_tokens[edges]
        logits = (hidden[rows].to(dtype) * words[tokens].to(dtype)).sum(1) + bias[tokens].to(dtype)
        begins = counts.cumsum(0) - counts
        differences = logits - logits[begins].index_select(0, rows)
        self.log_likelihoods[questions[rows], edges] = first.to(dtype)[rows] + differences


def _attend(q: Tensor, keys_values: Tensor, visible: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attend from queries `[n, H, D]` to rows of `keys_values` `[rows, 2, H, D]`.

    `visible` has indices of queries `[m]` and the rows `[m, length]` that they see.
    """
    context = torch.empty_like(q, memory_format=torch.contiguous_format)
    for queries, rows in visible:
        # One to eight keys per query: a GEMM of this shape is slower than a pass per key.
        query = q[queries] * q.shape[-1] ** -0.5
        seen = [keys_values.index_select(0, row) for row in rows.unbind(1)]
        weights = torch.stack([(query * kv[:, 0]).sum(-1) for kv in seen], -1).softmax(-1)
        total = weights[..., :1] * seen[0][:, 1]
        for index, kv in enumerate(seen[1:], start=1):
            total.addcmul_(weights[..., index, None], kv[:, 1])
        context[queries] = total
    return context


class AnswersByDecoder:
    """Ranking and generation of answers by a model or a session."""

    def encode_questions(
        self: Any,
        pixels: Tensor,
        question_ids: Tensor,
        question_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        *,
        attend_to_padding: bool = False,
    ) -> Any:
        """Fuse Q questions `[Q, L]` with their images (`image_index` `[Q]`) to a decoder memory.

        `attend_to_padding` reproduces the official evaluation: its decoder attends to padding, so
        that an answer depends on the rest of the batch. An export, whose graphs mask padding,
        raises `UnavailableError`.
        """
        mask = inputs.check_tokens(question_ids, question_mask, self.config)
        if attend_to_padding and not isinstance(self, DecoderModel):
            raise UnavailableError(
                "official_ranking reads padding, which no export computes; predict with the run"
            )
        padding = {"keep_padding": True} if attend_to_padding else {}
        memory = self.image_memory(self.encode_image(pixels))
        text = self.encode_text(question_ids, mask, **padding)
        states = self.fuse(text, mask, memory, image_index, **padding)
        return self.states(states, None if attend_to_padding else mask.long())

    @torch.no_grad()
    def rank_answers(
        self: Any,
        memory: Any,
        answers: AnswerTrie | Tensor,
        answer_mask: Tensor | None = None,
        *,
        k: int = 128,
        best: int | None = None,
        count_first_token_twice: bool = False,
    ) -> AnswerRanking:
        """Rank k candidates, preselected by their first token; return the best `[Q, best]`.

        `answers` is an `AnswerTrie`, built once for all batches, or ids `[N, La]`. k = N ranks all
        answers exactly; `best` < k prunes candidates that cannot be among the best, with the same
        result. `count_first_token_twice` reproduces the official score, which adds the
        log-probability of the first answer token twice.
        """
        trie = answers
        if not isinstance(trie, AnswerTrie):
            trie = AnswerTrie.of(trie, answer_mask, self.config)
        return rank(
            self.answer_tree,
            memory,
            trie,
            k=k,
            best=best,
            first_token_twice=count_first_token_twice,
        )

    @torch.no_grad()
    def generate(
        self: Any,
        memory: Any,
        *,
        max_length: int = 20,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> Tensor:
        """Generate answers freely: `[Q, length]` ids with `<s>` and `</s>`, padded."""
        config = self.config
        return generate(
            self.writer,
            memory,
            torch.full((memory.states, 1), config.bos_token_id, device=self.device),
            max_length=max_length,
            num_beams=num_beams,
            length_penalty=length_penalty,
            pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id,
        )


class VQAModel(AnswersByDecoder, DecoderModel):
    """X-FM with an answer decoder on the fusion encoder (official `num_dec_layers`)."""

    decoder_reads = "fusion"

    def __init__(self, config: XFMConfig, *, decoder_layers: int = 12) -> None:
        super().__init__(config, heads=())
        self.text_decoder = TextDecoder(config, decoder_layers, config.text_width)

    def answer_tree(self, memory: DecoderMemory, trie: AnswerTrie) -> PackedTree:
        """Return a tree that decodes the answers of some questions."""
        return PackedTree(self.text_decoder, memory, trie)

    def forward(
        self,
        pixels: Tensor,
        question_ids: Tensor,
        question_mask: Tensor | None,
        answer_ids: Tensor,
        answer_mask: Tensor | None,
        answers_per_question: Tensor,
        answer_weights: Tensor,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted negative log-likelihood of the answers per question.

        `answer_ids` `[A, La]` holds the answers of question 0, then of question 1, ...
        (`answers_per_question` `[Q]` sums to A).
        """
        mask = check_answers(answer_ids, answer_mask, self.config)
        questions, answers = question_ids.shape[0], answer_ids.shape[0]
        total = answers if answers_per_question.is_cuda else int(answers_per_question.sum())
        shapes = (answers_per_question.shape, answer_weights.shape)
        if shapes != ((questions,), (answers,)) or total != answers:
            raise InputError(
                f"answers_per_question is {[*answers_per_question.shape]} with the sum {total} and answer_weights "
                f"{[*answer_weights.shape]}; there are {questions} questions and {answers} answers"
            )
        memory = self.encode_questions(pixels, question_ids, question_mask, image_index)
        groups = ImageGroups(offsets(answers_per_question.to(answer_ids.device)))
        losses = self.text_decoder.token_losses(answer_ids, mask, memory, groups)
        return (answer_weights * losses.sum(1)).sum() / questions

    @torch.no_grad()
    def log_likelihoods(self, memory: DecoderMemory, answer_ids: Tensor) -> Tensor:
        """Compute the log-likelihood `[Q]` of one answer `[Q, La]` per question."""
        groups = ImageGroups(torch.arange(len(answer_ids) + 1, device=answer_ids.device))
        mask = answer_ids != self.config.pad_token_id
        return -self.text_decoder.token_losses(answer_ids, mask, memory, groups).double().sum(1)
