"""The interface of all backends of the model: its results by their own means, from the same weights and tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.tasks.answer_trie import AnswerTrie
from xfm_fast.tasks.vqa import AnswerRanking

from ..record import Extra

Schedule = Literal["ours", "kept memories", "official", "padded", "own"]
"""The procedure of a backend, for counting its operations; `own`: only the backend knows it."""


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


class Stages:
    """A clock for the parts of a run: `with stages("fusion"): ...`. A part within a part is not counted twice."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._inner: list[float] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wait_for(self._device)
        self._inner.append(0.0)
        begun = time.perf_counter()
        try:
            yield
        finally:
            wait_for(self._device)
            whole = time.perf_counter() - begun
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner.pop()
            if self._inner:
                self._inner[-1] += whole


class NoStages:
    """The same without a clock, for runs that are timed as a whole."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        yield


Clock = Stages | NoStages


class Part(NamedTuple):
    """A method that is a stage of its own, without the stages that it calls."""

    owner: object
    method: str
    stage: str


@contextmanager
def parts_under(clock: Clock, parts: Iterable[Part], rest: str) -> Iterator[None]:
    """Time the calls of some methods as stages, and what else happens in the block as the stage `rest`.

    Without a clock nothing is wrapped, so timed runs are those of the untouched model.
    """
    if isinstance(clock, NoStages):
        yield
        return

    def timed(method: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            with clock(stage):
                return method(*args, **kwargs)

        return run

    with ExitStack() as wrapped, clock(rest):
        for part in parts:
            method = getattr(part.owner, part.method)
            # An instance without a method of its own finds that of its class again.
            if part.method in vars(part.owner):
                wrapped.callback(setattr, part.owner, part.method, method)
            else:
                wrapped.callback(delattr, part.owner, part.method)
            setattr(part.owner, part.method, timed(method, part.stage))
        yield


class Engine:
    """A model by one implementation, in one dtype, on one device. Results are those of `XFM` up to rounding.

    An engine has the methods of the kinds of work of its backend. `model` is the `XFM`; `cost` is what an engine knows
    of its own cold start.
    """

    model: Any
    cost: Extra | None = None

    def embed_images(self, pixels: Tensor, clock: Clock) -> Tensor:
        """`[B, 3, R, R]` → `[B, 1 + N, vision_width]`."""
        raise NotImplementedError

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor, clock: Clock) -> Tensor:
        """`[B, L]` → `[B, L, text_width]`; padded positions hold anything."""
        raise NotImplementedError

    def rerank(self, pairs: Pairs, clock: Clock) -> Tensor:
        """Match score of every pair: `[P]`."""
        raise NotImplementedError

    def search(self, input_ids: Tensor, attention_mask: Tensor, index: SearchIndex, k: int, clock: Clock) -> Found:
        """For every text `[Q, L]` the k most similar images, re-ranked."""
        with clock("text encoder"):
            embeds = self.embed_texts(input_ids, attention_mask, NoStages())
        with clock("similarity and top-k"):
            projection = self.model.text_proj
            features = F.normalize(F.linear(embeds[:, 0], projection.weight, projection.bias), dim=-1)
            best = (features @ index.features.t()).topk(min(k, len(index.features)), dim=1).indices
        scores, order = self.scores(embeds, attention_mask, index, best, clock).sort(dim=1, descending=True)
        return Found(best.gather(1, order), scores)

    def scores(self, embeds: Tensor, mask: Tensor, index: SearchIndex, best: Tensor, clock: Clock) -> Tensor:
        """Match scores `[Q, k]` of embedded texts with their best images; by default all pairs, padded."""
        rows = torch.arange(len(best), device=best.device).repeat_interleave(best.shape[1])
        images, every = index.embeds[best.flatten()], torch.arange(best.numel(), device=best.device)
        with clock("re-ranking"):
            return self.rerank(Pairs(images, embeds[rows], mask[rows], every), NoStages()).view(best.shape)

    def evaluate(
        self, batches: Sequence[Tensor], input_ids: Tensor, attention_mask: Tensor, k: int, clock: Clock
    ) -> Everything:
        """Batches of pixels and texts `[T, L]`, each against its k best candidates in both directions."""
        raise NotImplementedError

    def statements(self, pixels: Tensor, ids: Tensor, mask: Tensor, clock: Clock) -> Tensor:
        """`[2B, 3, R, R]`, the first images and then the second ones, and sentences `[B, L]` → logits `[B, 2]`."""
        raise NotImplementedError

    def boxes(self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor, clock: Clock) -> Tensor:
        """`[B, 3, R, R]` and expressions `[P, L]` with their image `[P]` → boxes `[P, 4]`."""
        raise NotImplementedError

    def captions(self, pixels: Tensor, prompt: Tensor, longest: int, shortest: int, beams: int, clock: Clock) -> Tensor:
        """`[B, 3, R, R]` and a prompt `[S]` → captions `[B, L]` of at most `longest` tokens, padded."""
        raise NotImplementedError

    def answers(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor, answers: AnswerList, clock: Clock
    ) -> AnswerRanking:
        """`[B, 3, R, R]` and questions `[Q, L]` with their image `[Q]`, ascending."""
        raise NotImplementedError


def wait_for(device: torch.device) -> None:
    """Until everything that was enqueued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
