"""Questions and answers with the statistics of VQA v2, in random tokens.

The answers have the trie of the 3,129 usual answers in RoBERTa's tokens: as many answers, prefixes and inner prefixes
of each length. Which prefix an answer extends is drawn from a skewed distribution: of the 1,276 first tokens, one has
some 55 continuations. Questions have 6 words and a question mark on average; an image has five (5.4 in the dataset).
"""

from __future__ import annotations

import torch

from xfm_fast.config import XFMConfig

from .inputs import Texts

ANSWERS = 3129
# By tokens between `<s>` and `</s>`: distinct prefixes, inner ones, and answers that end there.
_PREFIXES = (1276, 1917, 770, 91, 20, 1)
_INNER = (731, 497, 87, 20, 1, 0)
_ENDING = (823, 1519, 695, 72, 19, 1)
# The r-th inner prefix gets 1 / r to this power of the children of the first.
_SKEW = 0.7
_QUESTION_LENGTHS = (9, 8, 12, 9, 10)


def answer_list(config: XFMConfig, seed: int) -> Texts:
    """The 3,129 answers, `<s> ... </s>`, padded to the longest: 8 tokens."""
    generator = torch.Generator().manual_seed(seed)
    level: list[list[int]] = [[config.bos_token_id]]
    answers: list[list[int]] = []
    for count, ending in zip(_PREFIXES, _ENDING, strict=True):
        weights = torch.arange(1, len(level) + 1).double() ** -_SKEW
        # Each has one child; the others are drawn.
        drawn = torch.multinomial(weights, count, replacement=True, generator=generator)[len(level) :]
        children = 1 + torch.bincount(drawn, minlength=len(level))
        below = [
            [*prefix, token]
            for prefix, number in zip(level, children.tolist(), strict=True)
            for token in _distinct(config, number, generator)
        ]
        order = torch.randperm(len(below), generator=generator).tolist()
        depth = len(below[0]) - 2
        level = [below[place] for place in order[: _INNER[depth]]]
        # Answers end at leaves, and some at inner prefixes.
        answers += [below[place] for place in order[::-1][:ending]]
    rows = [[*answer, config.eos_token_id] for answer in answers]
    shuffled = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
    return _padded(shuffled, config)


def questions(config: XFMConfig, count: int, seed: int) -> Texts:
    """`count` questions, padded to the longest."""
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = [_QUESTION_LENGTHS[number % len(_QUESTION_LENGTHS)] for number in range(count)]
    rows = [[config.bos_token_id, *_distinct(config, length - 2, generator), config.eos_token_id] for length in lengths]
    return _padded(rows, config)


def _distinct(config: XFMConfig, count: int, generator: torch.Generator) -> list[int]:
    first = max(config.pad_token_id, config.bos_token_id, config.eos_token_id) + 1
    return (torch.randperm(config.vocab_size - first, generator=generator)[:count] + first).tolist()


def _padded(rows: list[list[int]], config: XFMConfig) -> Texts:
    ids = torch.full((len(rows), max(map(len, rows))), config.pad_token_id)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return Texts(ids, ids.ne(config.pad_token_id).long())
