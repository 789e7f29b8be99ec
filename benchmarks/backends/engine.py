"""The interface of all backends of the model: its results by their own means, from the same weights and tensors."""

from __future__ import annotations

from collections.abc import Sequence
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


class Found(NamedTuple):
    """The best images of every query after re-ranking: `indices` `[Q, k]`, `scores` `[Q, k]`, best first."""

    indices: Tensor
    scores: Tensor


class Everything(NamedTuple):
    """Scores of a whole collection, `[I, T]` and `[T, I]`, -100 where a pair was no candidate."""

    image_to_text: Tensor
    text_to_image: Tensor


class AnswerList(NamedTuple):
    """The candidate answers of every question: `ids` and `mask` `[N, La]`, and `trie` for xfm-fast.

    The official procedure ranks `k` candidates of a question. xfm-fast ranks them, or all answers if `whole`, and finds
    the `best` of them (None: all).
    """

    ids: Tensor
    mask: Tensor
    trie: AnswerTrie
    k: int
    whole: bool
    best: int | None


class Engine:
    """A model by one implementation, in one dtype, on one device. Results are those of `XFM` up to rounding.

    An engine has the methods of the kinds of work of its backend. `model` is the `XFM`; `cost` is what an engine knows
    of its own cold start.
    """

    model: Any
    cost: Extra | None = None

    def embed_images(self, pixels: Tensor) -> Tensor:
        """`[B, 3, R, R]` → `[B, 1 + N, vision_width]`."""
        raise NotImplementedError

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, L]` → `[B, L, text_width]`; padded positions hold anything."""
        raise NotImplementedError

    def rerank(self, pairs: Pairs) -> Tensor:
        """Match score of every pair: `[P]`."""
        raise NotImplementedError

    def search(
        self, input_ids: Tensor, attention_mask: Tensor, index: SearchIndex, k: int
    ) -> Found:
        """For every text `[Q, L]` the k most similar images, re-ranked."""
        embeds, projection = self.embed_texts(input_ids, attention_mask), self.model.text_proj
        features = F.normalize(F.linear(embeds[:, 0], projection.weight, projection.bias), dim=-1)
        best = (features @ index.features.t()).topk(min(k, len(index.features)), dim=1).indices
        scores, order = self.scores(embeds, attention_mask, index, best).sort(
            dim=1, descending=True
        )
        return Found(best.gather(1, order), scores)

    def scores(self, embeds: Tensor, mask: Tensor, index: SearchIndex, best: Tensor) -> Tensor:
        """Match scores `[Q, k]` of embedded texts with their best images; by default all pairs, padded."""
        rows = torch.arange(len(best), device=best.device).repeat_interleave(best.shape[1])
        images, every = index.embeds[best.flatten()], torch.arange(best.numel(), device=best.device)
        return self.rerank(Pairs(images, embeds[rows], mask[rows], every)).view(best.shape)

    def evaluate(
        self, batches: Sequence[Tensor], input_ids: Tensor, attention_mask: Tensor, k: int
    ) -> Everything:
        """Batches of pixels and texts `[T, L]`, each against its k best candidates in both directions."""
        raise NotImplementedError

    def statements(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """`[2B, 3, R, R]`, the first images and then the second ones, and sentences `[B, L]` → logits `[B, 2]`."""
        raise NotImplementedError

    def boxes(self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor) -> Tensor:
        """`[B, 3, R, R]` and expressions `[P, L]` with their image `[P]` → boxes `[P, 4]`."""
        raise NotImplementedError

    def captions(
        self, pixels: Tensor, prompt: Tensor, longest: int, shortest: int, beams: int
    ) -> Tensor:
        """`[B, 3, R, R]` and a prompt `[S]` → captions `[B, L]` of at most `longest` tokens, padded."""
        raise NotImplementedError

    def answers(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor, answers: AnswerList
    ) -> AnswerRanking:
        """`[B, 3, R, R]` and questions `[Q, L]` with their image `[Q]`, ascending."""
        raise NotImplementedError


def wait_for(device: torch.device) -> None:
    """Until everything that was enqueued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
