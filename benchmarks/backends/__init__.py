"""The backends of the model, each with its own means, from the same weights and tensors.

`registry` lists them: `ours`, the official code (`official_code`), its algorithm in plain PyTorch
(`official_algorithm`, `official_finetuning`), Hugging Face and timm (`public_modules`). `graph` runs modules of any
library in ONNX Runtime and OpenVINO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.tasks.vqa_model import AnswerRanking, AnswerTrie

from ..record import Extra

Schedule = Literal["ours", "official"]
"""The procedure of a backend, for counting its operations."""


class Pairs(NamedTuple):
    """Embedded texts to be matched with embedded images."""

    images: Tensor  # `[B, 1 + N, vision_width]`
    embeds: Tensor  # `[P, L, text_width]`
    mask: Tensor  # `[P, L]`
    image_of: Tensor  # `[P]` image of each text, ascending


class SearchIndex(NamedTuple):
    """Images to be searched."""

    embeds: Tensor  # `[I, 1 + N, vision_width]`
    features: Tensor  # `[I, embed_dim]`


class SearchResult(NamedTuple):
    """The best images of every query after re-ranking, best first."""

    indices: Tensor  # `[Q, k]`
    scores: Tensor  # `[Q, k]`


class ScoreMatrices(NamedTuple):
    """Scores of a whole collection, -100 where a pair was no candidate."""

    image_to_text: Tensor  # `[I, T]`
    text_to_image: Tensor  # `[T, I]`


class AnswerList(NamedTuple):
    """The candidate answers of every question.

    The official procedure ranks `k` candidates of a question. xfm-fast ranks them, or with `rank_all` every answer,
    and finds the `best` of them (None: all).
    """

    ids: Tensor  # `[N, La]`
    mask: Tensor  # `[N, La]`
    trie: AnswerTrie  # for xfm-fast
    k: int
    rank_all: bool
    best: int | None


def _unsupported(*inputs: Any) -> Any:
    raise NotImplementedError("the backend has no such work")


@dataclass(kw_only=True)
class Engine:
    """A model by one implementation, in one dtype, on one device. Results are those of `XFM` up to rounding.

    An engine has the functions of the kinds of work of its backend.

    Attributes:
        embed_images: `[B, 3, R, R]` → `[B, 1 + N, vision_width]`.
        embed_texts: ids and mask `[B, L]` → `[B, L, text_width]`; padded positions hold anything.
        rerank: match score of every pair, `[P]`.
        search: ids and mask `[Q, L]`, an index and k → the k most similar images of every text, re-ranked.
        evaluate: batches of pixels, ids and mask `[T, L]`, and k: each against its k best candidates, both directions.
        statements: `[2B, 3, R, R]`, the first images and then the second ones, ids and mask `[B, L]` → `[B, 2]`.
        boxes: `[B, 3, R, R]`, ids and mask `[P, L]`, the image of each `[P]` → `[P, 4]`.
        captions: `[B, 3, R, R]`, a prompt `[S]`, longest and shortest length, beams → ids `[B, L]`, padded.
        answers: `[B, 3, R, R]`, ids and mask `[Q, L]`, the image of each `[Q]`, ascending, and the answers.
        cost: its cold start, where the engine measures it itself.
    """

    embed_images: Callable[[Tensor], Tensor] = _unsupported
    embed_texts: Callable[[Tensor, Tensor], Tensor] = _unsupported
    rerank: Callable[[Pairs], Tensor] = _unsupported
    search: Callable[[Tensor, Tensor, SearchIndex, int], SearchResult] = _unsupported
    evaluate: Callable[[Sequence[Tensor], Tensor, Tensor, int], ScoreMatrices] = _unsupported
    statements: Callable[[Tensor, Tensor, Tensor], Tensor] = _unsupported
    boxes: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _unsupported
    captions: Callable[[Tensor, Tensor, int, int, int], Tensor] = _unsupported
    answers: Callable[[Tensor, Tensor, Tensor, Tensor, AnswerList], AnswerRanking] = _unsupported
    cost: Extra | None = None


def search_images(
    model: Any,
    embed_texts: Callable[[Tensor, Tensor], Tensor],
    score: Callable[[Tensor, Tensor, SearchIndex, Tensor], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    index: SearchIndex,
    k: int,
) -> SearchResult:
    """Rank the images of an index by similarity to every text, then the k best by `score`.

    `score` takes embedded texts, their mask, the index and the best images `[Q, k]`, and returns `[Q, k]`.
    """
    embeds, projection = embed_texts(input_ids, attention_mask), model.text_proj
    features = F.normalize(F.linear(embeds[:, 0], projection.weight, projection.bias), dim=-1)
    best = (features @ index.features.t()).topk(min(k, len(index.features)), dim=1).indices
    scores, order = score(embeds, attention_mask, index, best).sort(dim=1, descending=True)
    return SearchResult(best.gather(1, order), scores)


def score_together(
    rerank: Callable[[Pairs], Tensor],
    embeds: Tensor,
    mask: Tensor,
    index: SearchIndex,
    best: Tensor,
) -> Tensor:
    """Score every text with its best images in one call of `rerank`."""
    device = best.device
    text_of = torch.arange(len(best), device=device).repeat_interleave(best.shape[1])
    image_of = torch.arange(best.numel(), device=device)
    pairs = Pairs(index.embeds[best.flatten()], embeds[text_of], mask[text_of], image_of)
    return rerank(pairs).view(best.shape)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done everything that was enqueued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
