"""What a scenario asks for: its requests, how a contender answers some of them together, and what that needs.

A request of `embed-image` is one photograph, of `embed-text` one caption, of `rerank` one image with all its candidate
captions (both embedded already), of `retrieve` one caption to which the index's best images are found and re-ranked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.benchmarks.contenders.engine import Clock, Engine, Found, Pairs, SearchIndex
from xfm_fast.benchmarks.contenders.registry import Schedule
from xfm_fast.benchmarks.material.photographs import Collection
from xfm_fast.benchmarks.material.subjects import Subjects
from xfm_fast.benchmarks.rows import Point
from xfm_fast.benchmarks.scenarios import MAX_TOKENS, Comparison, Texts, relative_error
from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.tokenizer import CaptionTokenizer

Answer = Callable[[Sequence[int], Clock], Any]
"""Runs the requests of these numbers as one batch."""

# Distributions of synthetic lengths: shares of the mean that texts have in turn.
_SHAPES = {"fixed": (1.0,), "uniform": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "bimodal": (0.25, 1.75)}


@dataclass(frozen=True)
class Workload:
    """The requests of a scenario at one size.

    Attributes:
        point: size of one request.
        unit: what a request counts, `items` of them.
        requests: distinct ones; numbers beyond wrap around.
        name: of so many requests together.
        prepare: an engine and its type to a function that answers requests.
        compare: two answers to the same requests.
        flops: that a schedule spends on requests, given their answer; None where the schedule is the contender's own.
        lengths: tokens of the texts of requests, none for images.
        traffic: bytes that have to move at least, given the size of an element.
    """

    scenario: str
    point: Point
    unit: str
    items: int
    requests: int
    name: Callable[[int], str]
    prepare: Callable[[Engine, torch.dtype], Answer]
    compare: Callable[[Sequence[int], Any, Any], Comparison]
    flops: Callable[[Sequence[int], Schedule, Any], int | None]
    lengths: Callable[[Sequence[int]], list[int]]
    traffic: Callable[[Sequence[int], int], int]

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
        return sum(lengths), sum(padded(lengths, schedule, self.point.padded_length or max(lengths)))


def padded(lengths: Sequence[int], schedule: Schedule, official: int) -> list[int]:
    """What texts of these lengths become: as they are, as long as the longest of them, or as the official code pads."""
    if schedule in ("ours", "kept memories"):
        return list(lengths)
    return [official if schedule == "official" else max(lengths)] * len(lengths)


@dataclass
class Material:
    """What requests are made of: models, photographs and captions; embeddings are computed once, in fp32.

    Attributes:
        seed: of synthetic texts.
    """

    subjects: Subjects
    collection: Collection
    tokenizer: CaptionTokenizer
    seed: int = 0
    _images: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.subjects.device

    def config(self, image_size: int) -> XFMConfig:
        return self.subjects.config.replace(image_size=image_size)

    def pixels(self, count: int, image_size: int) -> Tensor:
        """`[count, 3, R, R]`; photographs come again where there are too few."""
        photos = len(self.collection.names)
        return self.collection.pixels((i % photos for i in range(count)), image_size).to(self.device)

    def images(self, count: int, image_size: int) -> tuple[Tensor, Tensor]:
        """Embeddings and features of photographs."""
        if (count, image_size) not in self._images:
            model = self.subjects.model(image_size, torch.float32)
            with torch.inference_mode():
                parts = [model.encode_image(part) for part in self.pixels(count, image_size).split(8)]
                embeds = torch.cat(parts)
                self._images[count, image_size] = embeds, model.project_image(embeds)
        return self._images[count, image_size]

    def texts(self, count: int, lengths: str = "captions") -> Texts:
        """Captions, or synthetic texts: `fixed-16` are 16 tokens, `uniform-16` 4 to 28, `bimodal-16` 4 or 28.

        Raises:
            InputError: the distribution is unknown, or longer than the model takes.
        """
        if lengths == "captions":
            ids, mask = self.tokenizer.encode(self.collection.texts(count), MAX_TOKENS)
            return Texts(ids.to(self.device), mask.to(self.device))
        shape, _, mean = lengths.partition("-")
        if shape not in _SHAPES or not mean.isdigit():
            raise InputError(
                f"length distribution {lengths!r} is unknown; choose captions, or {', '.join(_SHAPES)} with a mean, "
                "such as fixed-16"
            )
        config = self.subjects.config
        sizes = [max(3, round(int(mean) * _SHAPES[shape][i % len(_SHAPES[shape])])) for i in range(count)]
        room = config.max_positions - config.pad_token_id - 1
        if max(sizes) > room:
            raise InputError(
                f"lengths {lengths!r} reach {max(sizes)} tokens, and this model takes {room}; ask for less"
            )
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.full((count, max(MAX_TOKENS, *sizes)), config.pad_token_id)
        first = max(config.pad_token_id, config.bos_token_id, config.eos_token_id) + 1
        for row, size in zip(ids, sizes, strict=True):
            row[:size] = torch.randint(first, config.vocab_size, (size,), generator=generator)
            row[0], row[size - 1] = config.bos_token_id, config.eos_token_id
        ids = ids.to(self.device)
        return Texts(ids, ids.ne(config.pad_token_id).long())

    @cached_property
    def weights(self) -> dict[str, int]:
        """Numbers that take part, by part of the model; tables of embeddings are read by the row."""
        state = self.subjects.model(self.subjects.config.image_size, torch.float32).state_dict()
        parts = {
            "vision": "vision_encoder.",
            "text": "text_encoder.roberta.encoder.",
            "fusion": "fusion_encoder.roberta.encoder.",
        }
        return {
            part: sum(t.numel() for n, t in state.items() if n.startswith(prefix)) for part, prefix in parts.items()
        }


def embed_image(material: Material, image_size: int, requests: int) -> Workload:
    """Photographs to embeddings."""
    config = material.config(image_size)
    pixels = material.pixels(requests, image_size)

    def prepare(engine: Engine, dtype: torch.dtype) -> Answer:
        given = pixels.to(dtype)
        return lambda numbers, clock: engine.embed_images(given[torch.tensor(list(numbers))], clock)

    def needed(numbers: Sequence[int], schedule: Schedule, answer: Any) -> int | None:
        return None if schedule == "own" else flops.image_encoder(config, len(numbers)).total

    def traffic(numbers: Sequence[int], element: int) -> int:
        per_image = pixels[0].numel() + config.num_image_tokens * config.vision_width
        return element * (material.weights["vision"] + len(numbers) * per_image)

    return Workload(
        "embed-image", Point(image_size=image_size), "images", 1, requests,
        lambda count: f"embed {counted(count, 'image')} of {image_size} px", prepare,
        lambda numbers, ours, theirs: Comparison(relative_error(ours, theirs)), needed, lambda numbers: [], traffic,
    )  # fmt: skip


def embed_text(material: Material, requests: int, lengths: str = "captions") -> Workload:
    """Captions to embeddings."""
    config = material.subjects.config
    given = material.texts(requests, lengths)
    sizes = given.lengths

    def prepare(engine: Engine, dtype: torch.dtype) -> Answer:
        def answer(numbers: Sequence[int], clock: Clock) -> Tensor:
            chosen = torch.tensor(list(numbers))
            return engine.embed_texts(given.ids[chosen], given.mask[chosen], clock)

        return answer

    def compare(numbers: Sequence[int], ours: Tensor, theirs: Tensor) -> Comparison:
        real = given.mask[torch.tensor(list(numbers))].bool()
        return Comparison(relative_error(ours[real], theirs[real]))

    def lengths_of(numbers: Sequence[int]) -> list[int]:
        return [sizes[number] for number in numbers]

    def needed(numbers: Sequence[int], schedule: Schedule, answer: Any) -> int | None:
        if schedule == "own":
            return None
        return flops.text_encoder(config, padded(lengths_of(numbers), schedule, given.ids.shape[1])).total

    def traffic(numbers: Sequence[int], element: int) -> int:
        # Rows of two tables of embeddings in, one row out.
        return element * (material.weights["text"] + 3 * sum(lengths_of(numbers)) * config.text_width)

    return Workload(
        "embed-text", _texts_point(given, 1, lengths), "texts", 1, requests,
        lambda count: f"embed {counted(count, _noun(lengths))} ({_span(given)} tokens)", prepare, compare, needed,
        lengths_of, traffic,
    )  # fmt: skip


def rerank(material: Material, image_size: int, texts: int, requests: int, lengths: str = "captions") -> Workload:
    """Match scores of an image with candidate texts. Every image has the same texts, in another order."""
    config = material.config(image_size)
    images, _ = material.images(requests, image_size)
    given = material.texts(texts, lengths)
    sizes = given.lengths
    with torch.inference_mode():
        embeds = material.subjects.model(image_size, torch.float32).encode_text(*given)

    def order(number: int) -> list[int]:
        return [(number + i) % texts for i in range(texts)]

    def prepare(engine: Engine, dtype: torch.dtype) -> Answer:
        own_images, own_embeds = images.to(dtype), embeds.to(dtype)

        def answer(numbers: Sequence[int], clock: Clock) -> Tensor:
            rows = torch.tensor([row for number in numbers for row in order(number)])
            image_of = torch.arange(len(numbers), device=own_images.device).repeat_interleave(texts)
            chosen = torch.tensor(list(numbers))
            return engine.rerank(Pairs(own_images[chosen], own_embeds[rows], given.mask[rows], image_of), clock)

        return answer

    def lengths_of(numbers: Sequence[int]) -> list[int]:
        return [sizes[row] for number in numbers for row in order(number)]

    def needed(numbers: Sequence[int], schedule: Schedule, answer: Any) -> int | None:
        every = lengths_of(numbers)
        if schedule == "own":
            return None
        if schedule in ("official", "padded"):
            longest = padded(every, schedule, given.ids.shape[1])[0]
            return flops.official_fusion(config, len(every), longest).total
        fused = flops.fusion(config, every, first_token_only=True) + flops.matching_head(config, len(every))
        return (flops.image_memory(config, len(numbers)) + fused).total

    def traffic(numbers: Sequence[int], element: int) -> int:
        per_image = config.num_image_tokens * config.vision_width
        read = len(numbers) * per_image + sum(lengths_of(numbers)) * config.text_width
        return element * (material.weights["fusion"] + read)

    def name(count: int) -> str:
        noun = f"{counted(texts, _noun(lengths))} ({_span(given)} tokens)"
        return f"re-rank {counted(count, 'image')} of {image_size} px x {noun}"

    return Workload(
        "rerank", _texts_point(given, texts, lengths).model_copy(update={"image_size": image_size}), "pairs", texts,
        requests, name, prepare, lambda numbers, ours, theirs: Comparison(relative_error(ours, theirs)), needed,
        lengths_of, traffic,
    )  # fmt: skip


def retrieve(material: Material, image_size: int, index: int, k: int, requests: int) -> Workload:
    """Captions to the best images of an index: embedded, ranked by similarity, the first k re-ranked."""
    config = material.config(image_size)
    index = min(index, len(material.collection.names))
    k = min(k, index)
    embeds, features = material.images(index, image_size)
    given = material.texts(requests)
    sizes = given.lengths

    def prepare(engine: Engine, dtype: torch.dtype) -> Answer:
        searched = SearchIndex(embeds.to(dtype), features.to(dtype))

        def answer(numbers: Sequence[int], clock: Clock) -> Found:
            chosen = torch.tensor(list(numbers))
            return engine.search(given.ids[chosen], given.mask[chosen], searched, k, clock)

        return answer

    def lengths_of(numbers: Sequence[int]) -> list[int]:
        return [sizes[number] for number in numbers]

    def needed(numbers: Sequence[int], schedule: Schedule, answer: Any) -> int | None:
        if schedule == "own":
            return None
        every = padded(lengths_of(numbers), schedule, given.ids.shape[1])
        pairs = k * len(every)
        common = flops.text_encoder(config, every) + flops.contrastive_features(config, 0, len(every))
        common += flops.linear(len(every), config.embed_dim, index)
        if schedule in ("official", "padded"):
            return (common + flops.official_fusion(config, pairs, every[0])).total
        candidates = [size for size in every for _ in range(k)]
        common += flops.first_self_attention(config, every) + flops.matching_head(config, pairs)
        common += flops.fusion(config, candidates, first_token_only=True, self_attended=True)
        if schedule == "ours":
            common += flops.image_memory(config, len(torch.as_tensor(answer.indices).unique()))
        return common.total

    def traffic(numbers: Sequence[int], element: int) -> int:
        weights = material.weights["text"] + material.weights["fusion"]
        read = features.numel() + k * config.num_image_tokens * config.vision_width
        return element * (weights + len(numbers) * read)

    def name(count: int) -> str:
        found = f"{k} best of {counted(index, 'image')} of {image_size} px, re-ranked"
        return f"retrieve for {counted(count, 'caption')} ({_span(given)} tokens) the {found}"

    point = _texts_point(given, 1, "captions").model_copy(update={"image_size": image_size, "index": index, "k": k})
    return Workload(
        "retrieve", point, "queries", 1, requests, name, prepare,
        lambda numbers, ours, theirs: _compare_found(ours, theirs), needed, lengths_of, traffic,
    )  # fmt: skip


def _compare_found(ours: Found, theirs: Found) -> Comparison:
    """Compare the images that both re-ranked; near ties of the similarity may make candidates differ."""
    mine, yours, differing = [], [], 0
    rows = zip(
        ours.indices.tolist(), ours.scores.tolist(), theirs.indices.tolist(), theirs.scores.tolist(), strict=True
    )
    for indices, scores, other_indices, other_scores in rows:
        others = dict(zip(other_indices, other_scores, strict=True))
        common = [(score, others[index]) for index, score in zip(indices, scores, strict=True) if index in others]
        differing += len(indices) - len(common)
        mine += [pair[0] for pair in common]
        yours += [pair[1] for pair in common]
    if not mine:
        return Comparison(float("inf"), "no candidate in common")
    note = f"{differing} candidates differ by a near tie" if differing else ""
    return Comparison(relative_error(torch.tensor(mine), torch.tensor(yours)), note)


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _noun(lengths: str) -> str:
    return "caption" if lengths == "captions" else "text"


def _span(given: Texts) -> str:
    low, high = min(given.lengths), max(given.lengths)
    return str(low) if low == high else f"{low}-{high}"


def _texts_point(given: Texts, texts: int, lengths: str) -> Point:
    mean = sum(given.lengths) / len(given.lengths)
    return Point(texts=texts, lengths=lengths, mean_length=mean, padded_length=given.ids.shape[1])
