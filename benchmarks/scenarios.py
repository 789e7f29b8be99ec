"""What is measured: the work of every row, done by the fast path and by the official algorithm on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.benchmarks.material.photographs import Collection
from xfm_fast.benchmarks.material.subjects import Subjects
from xfm_fast.config import PresetName
from xfm_fast.tasks.retrieval import Retriever
from xfm_fast.tokenizer import CaptionTokenizer

MAX_TOKENS = 40
_UNSCORED = -100.0


@dataclass(frozen=True)
class Sizes:
    """How much work the rows do, and how long.

    Attributes:
        rounds: samples of each variant, at least.
        budget_s: short rows get more samples within this time.
        deadline_s: once the suite has run this long, rows that are left get one sample.
    """

    small_image: int
    large_image: int
    small_batch: int
    large_batch: int
    texts: int
    captions: int
    photos: int
    captions_per_photo: int
    candidates: int
    rounds: int
    budget_s: float
    deadline_s: float

    @classmethod
    def of(cls, preset: PresetName, *, quick: bool) -> Sizes:
        small, large = (32, 48) if preset == "tiny" else (224, 384)
        if quick:
            budget = 0.2 if preset == "tiny" else 2.0
            return cls(small, large, 2, 1, 8, 16, 2, 2, 2, rounds=2, budget_s=budget, deadline_s=42)
        return cls(small, large, 8, 4, 32, 64, 6, 2, 3, rounds=3, budget_s=10.0, deadline_s=185)


class Texts(NamedTuple):
    """Encoded captions."""

    ids: Tensor
    mask: Tensor

    @property
    def lengths(self) -> list[int]:
        return self.mask.sum(1).tolist()

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())

    @property
    def padded(self) -> int:
        return self.mask.numel()


class Comparison(NamedTuple):
    """Largest difference between two results, relative to the largest value; and what else there is to say."""

    error: float
    note: str = ""


Work = Callable[[torch.dtype], Callable[[], object]]


@dataclass(frozen=True)
class Scenario:
    """One kind of work.

    Attributes:
        key: stable identifier, for programs that read results.
        name: says the amount of work.
        unit: what `items` counts.
        items: done by one run.
        fast, twin: the work at a dtype, ready to run.
        compare: results of two runs.
        flops: that one run of the fast path needed, told from its result.
        official_flops: that the official algorithm spends on the same.
        tokens, padded_tokens: of the texts of one run, when it has texts.
    """

    key: str
    name: str
    unit: str
    items: int
    fast: Work
    twin: Work
    compare: Callable[[object, object], Comparison]
    flops: Callable[[object], int]
    official_flops: int
    tokens: int | None = None
    padded_tokens: int | None = None


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest |a - b| / largest |b|, NaN counting as infinite."""
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    return float(error) if torch.isfinite(error) else float("inf")


def encode(collection: Collection, tokenizer: CaptionTokenizer, count: int) -> Texts:
    """`count` captions of the collection, padded to 40 tokens as the official evaluation does."""
    return Texts(*tokenizer.encode(collection.texts(count), MAX_TOKENS))


def all_scenarios(
    subjects: Subjects, collection: Collection, tokenizer: CaptionTokenizer, sizes: Sizes
) -> list[Scenario]:
    """The suite, in the order of the report."""
    return [
        images(subjects, collection, sizes.small_image, sizes.small_batch),
        images(subjects, collection, sizes.large_image, sizes.large_batch),
        texts(subjects, encode(collection, tokenizer, sizes.texts), sizes.large_image),
        reranking(subjects, collection, encode(collection, tokenizer, sizes.captions), sizes.large_image),
        retrieval(subjects, collection, tokenizer, sizes),
    ]


def images(subjects: Subjects, collection: Collection, image_size: int, batch: int) -> Scenario:
    """Image embedding: pixels to embeddings."""
    config = subjects.config.replace(image_size=image_size)
    pixels = collection.pixels((i % len(collection.names) for i in range(batch)), image_size)

    def fast(dtype: torch.dtype) -> Callable[[], object]:
        model, given = subjects.model(image_size, dtype), pixels.to(dtype)
        return lambda: model.encode_image(given)

    def twin(dtype: torch.dtype) -> Callable[[], object]:
        official, given = subjects.twin(image_size, dtype), pixels.to(dtype)
        return lambda: official.encode_image(given)

    count = flops.image_encoder(config, batch).total
    name = f"embed {_count(batch, 'image')} of {image_size} px"
    return Scenario(f"image-{image_size}", name, "images", batch, fast, twin, _tensors(), lambda _: count, count)


def texts(subjects: Subjects, given: Texts, image_size: int) -> Scenario:
    """Text embedding: ids to embeddings."""
    config = subjects.config
    real = given.mask.bool()
    count = len(given.ids)
    needed = flops.text_encoder(config, given.lengths)

    def fast(dtype: torch.dtype) -> Callable[[], object]:
        model = subjects.model(image_size, dtype)
        return lambda: model.encode_text(*given)

    def twin(dtype: torch.dtype) -> Callable[[], object]:
        official = subjects.twin(image_size, dtype)
        return lambda: official.encode_text(*given)

    return Scenario(
        "text",
        f"embed {_count(count, 'caption')} ({_span(given)} of {MAX_TOKENS} tokens)",
        "texts",
        count,
        fast,
        twin,
        _tensors(real),
        lambda _: needed.total,
        flops.text_encoder(config, [MAX_TOKENS] * count).total,
        given.tokens,
        given.padded,
    )


def reranking(subjects: Subjects, collection: Collection, given: Texts, image_size: int) -> Scenario:
    """Match scores of one image with many captions, from their embeddings: image memory, fusion and matching head."""
    config = subjects.config.replace(image_size=image_size)
    count = len(given.ids)
    with torch.no_grad():
        model = subjects.model(image_size, torch.float32)
        image = model.encode_image(collection.pixels([0], image_size))
        embeds = model.encode_text(*given)
    which = torch.zeros(count, dtype=torch.long)

    def fast(dtype: torch.dtype) -> Callable[[], object]:
        model, image_embeds, text_embeds = subjects.model(image_size, dtype), image.to(dtype), embeds.to(dtype)

        def run() -> Tensor:
            memory = model.image_memory(image_embeds)
            fused = model.fuse(text_embeds, given.mask, memory, which, first_token_only=True)
            return model.match_logits(fused)[:, 1]

        return run

    def twin(dtype: torch.dtype) -> Callable[[], object]:
        official, image_embeds, text_embeds = subjects.twin(image_size, dtype), image[0].to(dtype), embeds.to(dtype)
        return lambda: official.rerank_image(image_embeds, text_embeds, given.mask)

    needed = flops.image_memory(config, 1) + flops.fusion(config, given.lengths, first_token_only=True)
    needed += flops.matching_head(config, count)
    return Scenario(
        "rerank",
        f"re-rank 1 image of {image_size} px x {_count(count, 'caption')} ({_span(given)} of {MAX_TOKENS} tokens)",
        "pairs",
        count,
        fast,
        twin,
        _tensors(),
        lambda _: needed.total,
        flops.official_fusion(config, count, MAX_TOKENS).total,
        given.tokens,
        given.padded,
    )


class Retrieval(NamedTuple):
    """Score matrices of both directions, -100 where a pair was not scored; what the fast path says besides."""

    image_to_text: Tensor
    text_to_image: Tensor
    recall: dict[str, float]
    rerank_flops: int = 0


def retrieval(subjects: Subjects, collection: Collection, tokenizer: CaptionTokenizer, sizes: Sizes) -> Scenario:
    """Retrieval from end to end: pixels and ids to the score matrices of both directions."""
    photos = range(min(sizes.photos, len(collection.names)))
    captions: list[str] = []
    owners: list[int] = []
    for photo in photos:
        chosen = collection.captions_of(photo)[: sizes.captions_per_photo]
        captions += chosen
        owners += [photo] * len(chosen)
    given = Texts(*tokenizer.encode(captions, MAX_TOKENS))
    image_size, batch = sizes.large_image, sizes.large_batch
    k = min(sizes.candidates, len(photos))
    pixels = collection.pixels(photos, image_size)
    config = subjects.config.replace(image_size=image_size)
    image_of_text = torch.tensor(owners)

    def fast(dtype: torch.dtype) -> Callable[[], object]:
        retriever, batches = Retriever(subjects.model(image_size, dtype)), pixels.to(dtype).split(batch)

        def run() -> Retrieval:
            index = retriever.embed_images(batches)
            result = retriever.rerank(index, retriever.embed_texts([given]), k)
            recall = result.recall(image_of_text)
            return Retrieval(result.score_i2t, result.score_t2i, recall, int(result.receipt.flops))

        return run

    def twin(dtype: torch.dtype) -> Callable[[], object]:
        official, batches = subjects.twin(image_size, dtype), pixels.to(dtype).split(batch)

        def run() -> Retrieval:
            image_embeds = torch.cat([official.encode_image(part) for part in batches])
            text_embeds = official.encode_text(*given)
            return Retrieval(*official.retrieve(image_embeds, text_embeds, given.mask, k), {})

        return run

    count = len(captions)
    pairs = flops.official_pairs(len(photos), count, k)
    features = flops.contrastive_features(config, len(photos), count) + flops.image_encoder(config, len(photos))
    embedding = (features + flops.text_encoder(config, given.lengths)).total
    official = features + flops.text_encoder(config, [MAX_TOKENS] * count)

    def needed(result: object) -> int:
        assert isinstance(result, Retrieval)
        return embedding + result.rerank_flops

    return Scenario(
        "retrieval",
        f"retrieve {_count(len(photos), 'image')} of {image_size} px x {_count(count, 'caption')}, k = {k}, end to end",
        "searches",
        1,
        fast,
        twin,
        _matrices,
        needed,
        (official + flops.official_fusion(config, pairs, MAX_TOKENS)).total,
        given.tokens,
        given.padded,
    )


def _tensors(chosen: Tensor | None = None) -> Callable[[object, object], Comparison]:
    """Compare tensors, or what a boolean mask of their first dimensions chooses."""

    def compare(ours: object, theirs: object) -> Comparison:
        assert isinstance(ours, Tensor)
        assert isinstance(theirs, Tensor)
        if chosen is not None:
            ours, theirs = ours[chosen], theirs[chosen]
        return Comparison(relative_error(ours, theirs))

    return compare


def _matrices(ours: object, theirs: object) -> Comparison:
    """Compare the pairs that both scored; near ties of the similarity may make candidates differ."""
    assert isinstance(ours, Retrieval)
    assert isinstance(theirs, Retrieval)
    errors, differing = [], 0
    for mine, yours in zip(ours[:2], theirs[:2], strict=True):
        scored, expected = mine != _UNSCORED, yours != _UNSCORED
        both = scored & expected
        differing += int((scored ^ expected).sum())
        errors.append(relative_error(mine[both], yours[both]) if bool(both.any()) else float("inf"))
    return Comparison(max(errors), f"{differing} candidates differ by a near tie" if differing else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _span(given: Texts) -> str:
    return f"{min(given.lengths)}-{max(given.lengths)}"
