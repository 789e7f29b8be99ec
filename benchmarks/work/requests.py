"""The kinds of work: their requests, how a backend answers some of them together, and what that needs.

A request of `embed-image` is one photograph, of `embed-text` one caption, of `rerank` one image with all its candidate
captions (both embedded already), of `retrieve` one caption to which the index's best images are found and re-ranked.
`retrieval` is one evaluation of a small collection from end to end, in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.tasks.reranking import UNSCORED, recall

from ..backends.engine import Clock, Engine, Everything, Found, Pairs, Schedule, SearchIndex
from ..inputs import MAX_TOKENS, Material, Texts
from ..measure import Difference
from ..timing import relative_error

Answer = Callable[[Sequence[int], Clock], Any]
"""Runs the requests of these numbers as one batch."""


def padded(lengths: Sequence[int], schedule: Schedule, official: int) -> list[int]:
    """The lengths that texts are padded to: not at all, to the longest of them, or as the official code pads."""
    if schedule in ("ours", "kept memories"):
        return list(lengths)
    return [official if schedule == "official" else max(lengths)] * len(lengths)


class Workload:
    """The requests of one kind of work at one size.

    Attributes:
        work: its name; `unit` is what a request counts, `items` of them.
        requests: distinct ones; numbers beyond wrap around.
    """

    work: str
    unit: str

    def __init__(
        self, material: Material, requests: int, image_size: int | None = None, texts: Texts | None = None
    ) -> None:
        self.material, self.requests, self.items = material, requests, 1
        self.image_size = image_size or material.subjects.config.image_size
        self.config = material.config(self.image_size)
        self._texts = texts
        self._lengths = [] if texts is None else texts.lengths

    def name(self, count: int) -> str:
        """So many requests together, in words."""
        raise NotImplementedError

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        """How an engine answers requests in its type."""
        raise NotImplementedError

    def flops(self, numbers: Sequence[int], schedule: Schedule, answer: Any) -> int | None:
        """Operations that a schedule spends on requests, given their answer; None where it is the backend's own."""
        return None if schedule == "own" else self._flops(numbers, schedule, answer).total

    def _flops(self, numbers: Sequence[int], schedule: Schedule, answer: Any) -> flops.Count:
        raise NotImplementedError

    def traffic(self, numbers: Sequence[int], element: int) -> int:
        """Bytes that have to move at least, given the size of an element."""
        raise NotImplementedError

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        """Tokens of the texts of requests, none for images."""
        return [self._lengths[number] for number in numbers] if self._lengths else []

    def compare(self, numbers: Sequence[int], ours: Any, theirs: Any) -> Difference:
        """Two answers to the same requests."""
        return Difference(relative_error(ours, theirs))

    def recall(self, answer: Any) -> dict[str, float] | None:
        """Retrieval quality of an answer, where it has one."""
        return None

    def batch(self, size: int, start: int = 0) -> list[int]:
        """Numbers of `size` requests from `start` on."""
        return [(start + i) % self.requests for i in range(size)]

    def distinct(self) -> list[int]:
        """Numbers of requests of every shape, one of each."""
        found: dict[tuple[int, ...], int] = {}
        for number in range(self.requests):
            found.setdefault(tuple(sorted(self.lengths([number]))), number)
        return list(found.values())

    def tokens(self, numbers: Sequence[int], schedule: Schedule) -> tuple[int, int] | None:
        """Text tokens of requests: those of the texts, and those that a schedule computes for them."""
        lengths = self.lengths(numbers)
        if not lengths or schedule == "own":
            return None
        official = max(lengths) if self._texts is None else self._texts.ids.shape[1]
        return sum(lengths), sum(padded(lengths, schedule, official))


class EmbedImage(Workload):
    """Photographs to embeddings."""

    work, unit = "embed-image", "images"

    def __init__(self, material: Material, image_size: int, requests: int) -> None:
        super().__init__(material, requests, image_size)
        self._pixels = material.pixels(requests, image_size)

    def name(self, count: int) -> str:
        return f"embed {counted(count, 'image')} of {self.image_size} px"

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        given = self._pixels.to(dtype)
        return lambda numbers, clock: engine.embed_images(given[torch.tensor(list(numbers))], clock)

    def _flops(self, numbers: Sequence[int], schedule: Schedule, answer: Any) -> flops.Count:
        return flops.image_encoder(self.config, len(numbers))

    def traffic(self, numbers: Sequence[int], element: int) -> int:
        per_image = self._pixels[0].numel() + self.config.num_image_tokens * self.config.vision_width
        return element * (self.material.weights["vision"] + len(numbers) * per_image)


class EmbedText(Workload):
    """Captions to embeddings."""

    work, unit = "embed-text", "texts"

    def __init__(self, material: Material, requests: int, lengths: str = "captions") -> None:
        self._given = material.texts(requests, lengths)
        self._noun = _noun(lengths)
        super().__init__(material, requests, texts=self._given)

    def name(self, count: int) -> str:
        return f"embed {counted(count, self._noun)} ({self._given.span} tokens)"

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        def answer(numbers: Sequence[int], clock: Clock) -> Tensor:
            chosen = torch.tensor(list(numbers))
            return engine.embed_texts(self._given.ids[chosen], self._given.mask[chosen], clock)

        return answer

    def compare(self, numbers: Sequence[int], ours: Tensor, theirs: Tensor) -> Difference:
        real = self._given.mask[torch.tensor(list(numbers))].bool()
        return Difference(relative_error(ours[real], theirs[real]))

    def _flops(self, numbers: Sequence[int], schedule: Schedule, answer: Any) -> flops.Count:
        return flops.text_encoder(self.config, padded(self.lengths(numbers), schedule, self._given.ids.shape[1]))

    def traffic(self, numbers: Sequence[int], element: int) -> int:
        # Rows of two tables of embeddings in, one row out.
        return element * (self.material.weights["text"] + 3 * sum(self.lengths(numbers)) * self.config.text_width)


class Rerank(Workload):
    """Match scores of an image with candidate texts. Every image has the same texts, in another order."""

    work, unit = "rerank", "pairs"

    def __init__(
        self, material: Material, image_size: int, texts: int, requests: int, lengths: str = "captions"
    ) -> None:
        self._given = material.texts(texts, lengths)
        super().__init__(material, requests, image_size, self._given)
        self.items, self._noun = texts, _noun(lengths)
        self._images, _ = material.images(requests, image_size)
        with torch.inference_mode():
            self._embeds = material.subjects.model(image_size, torch.float32).encode_text(*self._given)

    def name(self, count: int) -> str:
        texts = f"{counted(self.items, self._noun)} ({self._given.span} tokens)"
        return f"re-rank {counted(count, 'image')} of {self.image_size} px x {texts}"

    def _rows(self, numbers: Sequence[int]) -> list[int]:
        return [(number + i) % self.items for number in numbers for i in range(self.items)]

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        images, embeds = self._images.to(dtype), self._embeds.to(dtype)

        def answer(numbers: Sequence[int], clock: Clock) -> Tensor:
            rows = torch.tensor(self._rows(numbers))
            image_of = torch.arange(len(numbers), device=images.device).repeat_interleave(self.items)
            chosen = torch.tensor(list(numbers))
            return engine.rerank(Pairs(images[chosen], embeds[rows], self._given.mask[rows], image_of), clock)

        return answer

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        return [self._lengths[row] for row in self._rows(numbers)]

    def _flops(self, numbers: Sequence[int], schedule: Schedule, answer: Any) -> flops.Count:
        every = self.lengths(numbers)
        if schedule in ("official", "padded"):
            return flops.official_fusion(
                self.config, len(every), padded(every, schedule, self._given.ids.shape[1])[0]
            )  # fmt: skip
        fused = flops.fusion(self.config, every, first_token_only=True) + flops.matching_head(self.config, len(every))
        return flops.image_memory(self.config, len(numbers)) + fused

    def traffic(self, numbers: Sequence[int], element: int) -> int:
        per_image = self.config.num_image_tokens * self.config.vision_width
        read = len(numbers) * per_image + sum(self.lengths(numbers)) * self.config.text_width
        return element * (self.material.weights["fusion"] + read)


class Retrieve(Workload):
    """Captions to the best images of an index: embedded, ranked by similarity, the first k re-ranked."""

    work, unit = "retrieve", "queries"

    def __init__(self, material: Material, image_size: int, index: int, k: int, requests: int) -> None:
        self._given = material.texts(requests)
        index = min(index, len(material.collection.names))
        super().__init__(material, requests, image_size, self._given)
        self._embeds, self._features = material.images(index, image_size)
        self._index, self._k = index, min(k, index)

    def name(self, count: int) -> str:
        found = f"{self._k} best of {counted(self._index, 'image')} of {self.image_size} px, re-ranked"
        return f"retrieve for {counted(count, 'caption')} ({self._given.span} tokens) the {found}"

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        searched = SearchIndex(self._embeds.to(dtype), self._features.to(dtype))

        def answer(numbers: Sequence[int], clock: Clock) -> Found:
            chosen = torch.tensor(list(numbers))
            return engine.search(self._given.ids[chosen], self._given.mask[chosen], searched, self._k, clock)

        return answer

    def compare(self, numbers: Sequence[int], ours: Found, theirs: Found) -> Difference:
        """The images that both re-ranked; near ties of the similarity may make candidates differ."""
        mine, yours, differing = [], [], 0
        for indices, scores, other_indices, other_scores in zip(*ours, *theirs, strict=True):
            others = dict(zip(other_indices.tolist(), other_scores.tolist(), strict=True))
            pairs = zip(indices.tolist(), scores.tolist(), strict=True)
            common = [(score, others[index]) for index, score in pairs if index in others]
            differing += len(indices) - len(common)
            mine += [pair[0] for pair in common]
            yours += [pair[1] for pair in common]
        if not mine:
            return Difference(float("inf"), "no candidate in common")
        return Difference(relative_error(torch.tensor(mine), torch.tensor(yours)), _near_ties(differing))

    def _flops(self, numbers: Sequence[int], schedule: Schedule, answer: Any) -> flops.Count:
        config, every = self.config, padded(self.lengths(numbers), schedule, self._given.ids.shape[1])
        common = flops.text_encoder(config, every) + flops.contrastive_features(config, 0, len(every))
        common += flops.linear(len(every), config.embed_dim, self._index)
        if schedule in ("official", "padded"):
            return common + flops.official_fusion(config, self._k * len(every), every[0])
        images = len(torch.as_tensor(answer.indices).unique()) if schedule == "ours" else 0
        return common + _fused(self, every, [size for size in every for _ in range(self._k)], images)

    def traffic(self, numbers: Sequence[int], element: int) -> int:
        weights = self.material.weights["text"] + self.material.weights["fusion"]
        read = self._features.numel() + self._k * self.config.num_image_tokens * self.config.vision_width
        return element * (weights + len(numbers) * read)


class Retrieval(Workload):
    """Retrieval from end to end, as it is evaluated: pixels and ids to the score matrices of both directions."""

    work, unit = "retrieval", "searches"

    def __init__(
        self, material: Material, image_size: int, photos: int, captions_per_photo: int, k: int, batch: int
    ) -> None:
        collection = material.collection
        photos = min(photos, len(collection.names))
        chosen = [collection.captions_of(photo)[:captions_per_photo] for photo in range(photos)]
        self._given = material.encoded([caption for captions in chosen for caption in captions])
        self._image_of_text = torch.tensor([photo for photo, captions in enumerate(chosen) for _ in captions])
        self._k, self._batch = min(k, photos), batch
        self._pixels = material.pixels(photos, image_size)
        super().__init__(material, 1, image_size, self._given)

    def name(self, count: int) -> str:
        images = f"{counted(len(self._pixels), 'image')} of {self.image_size} px"
        return f"retrieve {images} x {counted(len(self._given.ids), 'caption')}, k = {self._k}, end to end"

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        return list(self._lengths)

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        batches = self._pixels.to(dtype).split(self._batch)
        return lambda numbers, clock: engine.evaluate(batches, self._given.ids, self._given.mask, self._k, clock)

    def compare(self, numbers: Sequence[int], ours: Everything, theirs: Everything) -> Difference:
        """The pairs that both scored; near ties of the similarity may make candidates differ."""
        errors, differing = [], 0
        for mine, yours in zip(ours, theirs, strict=True):
            scored, expected = mine != UNSCORED, yours != UNSCORED
            both = scored & expected
            differing += int((scored ^ expected).sum())
            errors.append(relative_error(mine[both], yours[both]) if bool(both.any()) else float("inf"))
        return Difference(max(errors), _near_ties(differing))

    def recall(self, answer: Everything) -> dict[str, float]:
        return recall(answer.image_to_text.float().cpu(), answer.text_to_image.float().cpu(), self._image_of_text)

    def _flops(self, numbers: Sequence[int], schedule: Schedule, answer: Any) -> flops.Count:
        config, images = self.config, len(self._pixels)
        every = padded(self._lengths, schedule, MAX_TOKENS)
        common = flops.contrastive_features(config, images, len(every)) + flops.image_encoder(config, images)
        common += flops.text_encoder(config, every)
        if schedule == "official":
            pairs = flops.official_pairs(images, len(every), self._k)
            return common + flops.official_fusion(config, pairs, MAX_TOKENS)
        # A pair that is a candidate in both directions is scored once.
        scored = (answer[0] != UNSCORED) | (answer[1].t() != UNSCORED)
        return common + _fused(self, every, [every[text] for text in scored.nonzero()[:, 1].tolist()], images)

    def traffic(self, numbers: Sequence[int], element: int) -> int:
        return element * (sum(self.material.weights.values()) + self._pixels.numel())


def _fused(workload: Workload, texts: Sequence[int], pairs: Sequence[int], images: int) -> flops.Count:
    """Our re-ranking of pairs of these lengths: first self-attention once a text, memory once an image."""
    config = workload.config
    count = flops.first_self_attention(config, texts) + flops.matching_head(config, len(pairs))
    return count + flops.fusion(config, pairs, first_token_only=True, self_attended=True) + flops.image_memory(
        config, images
    )  # fmt: skip


def _near_ties(differing: int) -> str:
    return f"{differing} candidates differ by a near tie" if differing else ""


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _noun(lengths: str) -> str:
    return "caption" if lengths == "captions" else "text"
