"""The kinds of work: their requests, and how a backend answers some of them together.

A request of `embed-image` is one photograph, of `embed-text` one caption, of `rerank` one image with all its candidate
captions (both embedded already), of `retrieve` one caption to which the index's best images are found and re-ranked.
`retrieval` is one evaluation of a small collection from end to end, in both directions.

A fine-tuned model answers from pixels and tokens: a sentence about two photographs, a photograph with several
expressions, one to be captioned by three beams of 20 tokens after a prompt, or one with several questions over a list
of 3,129 answers:

- `vqa`: 128 candidates of every question ranked, which is what the official evaluation does;
- `vqa-best`: the best of these 128; `vqa-all`: the best of the whole list, exactly; `vqa-list`: the whole list ranked.

In each of these the official procedure ranks its 128 candidates. It encodes an image for each of its questions and
expressions, and is spared the padding of questions, which it gets one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.tasks.reranking import UNSCORED, recall
from xfm_fast.tasks.vqa_model import AnswerRanking, AnswerTrie
from xfm_fast.testing import Collection, Inputs, SharedWeights, Texts
from xfm_fast.tokenizer import CaptionTokenizer

from ..backends import AnswerList, Engine, Pairs, Schedule, ScoreMatrices, SearchIndex, SearchResult
from ..backends.official_finetuning import OfficialFineTuningTwin
from ..measure import Difference, tensors_differ
from ..tasks import PROMPT
from ..timing import relative_error

Answer = Callable[[Sequence[int]], Any]
"""Runs the requests of these indices as one batch."""
# Of the official configuration.
_BEAMS, _SHORTEST, _LONGEST = 3, 5, 20


class Material(Inputs):
    """The inputs of a model under test, and its image embeddings, computed once in fp32."""

    def __init__(
        self,
        weights: SharedWeights,
        collection: Collection,
        tokenizer: CaptionTokenizer,
        seed: int = 0,
    ) -> None:
        super().__init__(collection, tokenizer, weights.config, seed, weights.device)
        self.weights = weights
        self._images: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def config(self, image_size: int) -> XFMConfig:
        """Return the sizes of the model at a resolution."""
        return self.sizes.replace(image_size=image_size)

    def images(self, count: int, image_size: int) -> tuple[Tensor, Tensor]:
        """Return embeddings and features of photographs."""
        if (count, image_size) not in self._images:
            model = self.weights.model(image_size, torch.float32)
            with torch.inference_mode():
                batches = self.pixels(count, image_size).split(8)
                embeds = torch.cat([model.encode_image(pixels) for pixels in batches])
                self._images[count, image_size] = embeds, model.project_image(embeds)
        return self._images[count, image_size]


class Batch(NamedTuple):
    """Requests that are answered together: their indices, and their texts with the image of each."""

    indices: Tensor
    texts: Texts
    image_of: Tensor


def _compare_tensors(indices: Sequence[int], ours: Any, official: Any) -> Difference:
    return tensors_differ(ours, official)


def _no_recall(answer: Any) -> dict[str, float] | None:
    return None


@dataclass(kw_only=True)
class Workload:
    """The requests of one kind of work at one size.

    Attributes:
        work: its name.
        unit: what the `items` of a request count.
        title: names a count of requests, for readers.
        image_size: pixels along a side, where there are images.
        requests: distinct ones; later indices wrap around.
        run: answers a `Batch`: `run(engine, batch, *inputs)`, with the `inputs` in the engine's dtype.
        texts: of all requests.
        rows: indices of the texts of a request; by default `items` texts each.
        padding: how the official code pads texts: to the longest of all, to the longest of the batch, or not at all.
        compare: difference of two answers to the same requests.
        recall: retrieval quality of an answer, where it has one.
    """

    work: str
    unit: str
    title: Callable[[int], str]
    material: Material
    image_size: int
    requests: int
    run: Callable[..., Any]
    inputs: Sequence[Tensor] = ()
    texts: Texts | None = None
    items: int = 1
    rows: Callable[[int], Sequence[int]] | None = None
    padding: Literal["all", "batch", "none"] = "batch"
    compare: Callable[[Sequence[int], Any, Any], Difference] = _compare_tensors
    recall: Callable[[Any], dict[str, float] | None] = _no_recall

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        """Return how an engine answers requests in its dtype."""
        inputs = [tensor.to(dtype) for tensor in self.inputs]
        return lambda indices: self.run(engine, self.batch(indices), *inputs)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Collect the requests of these indices."""
        empty = torch.empty(0, dtype=torch.long, device=self.material.device)
        texts, image_of = Texts(empty, empty), empty
        if self.texts is not None:
            rows = self._rows(indices)
            ids, mask = self.texts.ids[rows], self.texts.mask[rows]
            longest = ids.shape[1] if self.padding == "all" else int(mask.sum(1).max())
            texts = Texts(ids[:, :longest], mask[:, :longest])
            images = torch.arange(len(indices), device=self.material.device)
            image_of = images.repeat_interleave(self.items)
        return Batch(torch.tensor(list(indices)), texts, image_of)

    def _rows(self, indices: Sequence[int]) -> list[int]:
        if self.rows is None:
            return [index * self.items + item for index in indices for item in range(self.items)]
        return [row for index in indices for row in self.rows(index)]

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Return the tokens of every text of some requests; none for images."""
        if self.texts is None:
            return []
        lengths = self.texts.lengths
        return [lengths[row] for row in self._rows(indices)]

    def first(self, count: int) -> list[int]:
        """Return the indices of the first `count` requests, wrapping around."""
        return list(islice(cycle(range(self.requests)), count))

    def distinct(self) -> list[int]:
        """Return the indices of one request of every shape."""
        shapes: dict[tuple[int, ...], int] = {}
        for index in range(self.requests):
            shapes.setdefault(tuple(sorted(self.lengths([index]))), index)
        return list(shapes.values())

    def tokens(self, indices: Sequence[int], schedule: Schedule | None) -> tuple[int, int] | None:
        """Count the text tokens of requests, real ones and those that a schedule computes."""
        lengths = self.lengths(indices)
        if self.texts is None or schedule is None:
            return None
        real = computed = sum(lengths)
        if schedule == "official" and self.padding != "none":
            width = self.texts.ids.shape[1] if self.padding == "all" else max(lengths)
            computed = len(lengths) * width
        return real, computed


def embed_image(material: Material, image_size: int, requests: int) -> Workload:
    """Embed photographs."""
    return Workload(
        work="embed-image",
        unit="images",
        title=lambda count: f"embed {counted(count, 'image')} of {image_size} px",
        material=material,
        image_size=image_size,
        requests=requests,
        inputs=[material.pixels(requests, image_size)],
        run=lambda engine, batch, pixels: engine.embed_images(pixels[batch.indices]),
    )


def embed_text(material: Material, requests: int) -> Workload:
    """Embed captions."""
    texts = material.texts(requests)

    def compare(indices: Sequence[int], ours: Tensor, official: Tensor) -> Difference:
        real = texts.mask[list(indices)].bool()
        return tensors_differ(ours[real], official[real])

    return Workload(
        work="embed-text",
        unit="texts",
        title=lambda count: f"embed {counted(count, 'caption')} ({texts.span} tokens)",
        material=material,
        image_size=material.sizes.image_size,
        requests=requests,
        texts=texts,
        padding="all",
        run=lambda engine, batch: engine.embed_texts(*batch.texts),
        compare=compare,
    )


def rerank(material: Material, image_size: int, candidates: int, requests: int) -> Workload:
    """Score an image with candidate texts. Every image has the same texts, in another order."""
    texts = material.texts(candidates)
    images, _ = material.images(requests, image_size)
    with torch.inference_mode():
        embeds = material.weights.model(image_size, torch.float32).encode_text(*texts)
    captions = f"{counted(candidates, 'caption')} ({texts.span} tokens)"

    def rows(index: int) -> list[int]:
        return [(index + item) % candidates for item in range(candidates)]

    def run(engine: Engine, batch: Batch, images: Tensor, embeds: Tensor) -> Tensor:
        texts = [row for index in batch.indices.tolist() for row in rows(index)]
        pairs = Pairs(images[batch.indices], embeds[texts], batch.texts.mask, batch.image_of)
        return engine.rerank(pairs)

    return Workload(
        work="rerank",
        unit="pairs",
        title=lambda count: f"re-rank {counted(count, 'image')} of {image_size} px x {captions}",
        material=material,
        image_size=image_size,
        requests=requests,
        inputs=[images, embeds],
        texts=texts,
        items=candidates,
        rows=rows,
        padding="all",
        run=run,
    )


def retrieve(material: Material, image_size: int, index: int, k: int, requests: int) -> Workload:
    """Find the best images of an index for captions: embedded, ranked by similarity, the first k re-ranked."""
    texts, index = material.texts(requests), min(index, len(material.collection.names))
    k = min(k, index)
    best = f"{k} best of {counted(index, 'image')} of {image_size} px, re-ranked"

    def title(count: int) -> str:
        return f"retrieve for {counted(count, 'caption')} ({texts.span} tokens) the {best}"

    def compare(indices: Sequence[int], ours: SearchResult, official: SearchResult) -> Difference:
        """Compare the images that both re-ranked; near ties of the similarity may make candidates differ."""
        ours_scores, official_scores, differing = [], [], 0
        for query in range(len(ours.indices)):
            scores = _by_index(official.indices[query], official.scores[query])
            for image, score in _by_index(ours.indices[query], ours.scores[query]).items():
                if image in scores:
                    ours_scores.append(score)
                    official_scores.append(scores[image])
                else:
                    differing += 1
        if not ours_scores:
            return Difference(float("inf"), "no candidate in common")
        error = relative_error(torch.tensor(ours_scores), torch.tensor(official_scores))
        return Difference(error, _near_ties(differing))

    return Workload(
        work="retrieve",
        unit="queries",
        title=title,
        material=material,
        image_size=image_size,
        requests=requests,
        inputs=material.images(index, image_size),
        texts=texts,
        padding="all",
        run=lambda engine, batch, *images: engine.search(*batch.texts, SearchIndex(*images), k),
        compare=compare,
    )


def retrieval(
    material: Material, image_size: int, photos: int, captions_per_photo: int, k: int, batch: int
) -> Workload:
    """Evaluate retrieval from end to end: pixels and ids to the score matrices of both directions."""
    photos = min(photos, len(material.collection.names))
    captions, photo_of = list[str](), list[int]()
    for photo in range(photos):
        captions_of_photo = material.collection.captions_of(photo)[:captions_per_photo]
        captions += captions_of_photo
        photo_of += [photo] * len(captions_of_photo)
    texts, k = material.encoded(captions), min(k, photos)
    images = f"{counted(photos, 'image')} of {image_size} px"
    title = f"retrieve {images} x {counted(len(captions), 'caption')}, k = {k}, end to end"

    def run(engine: Engine, requests: Batch, pixels: Tensor) -> ScoreMatrices:
        return engine.evaluate(pixels.split(batch), *texts, k)

    def compare(indices: Sequence[int], ours: ScoreMatrices, official: ScoreMatrices) -> Difference:
        """Compare the pairs that both scored; near ties of the similarity may make candidates differ."""
        errors, differing = [], 0
        for scores, expected in zip(ours, official, strict=True):
            scored, expected_scored = scores != UNSCORED, expected != UNSCORED
            common = scored & expected_scored
            differing += int((scored ^ expected_scored).sum())
            if bool(common.any()):
                errors.append(relative_error(scores[common], expected[common]))
            else:
                errors.append(float("inf"))
        return Difference(max(errors), _near_ties(differing))

    def recall_of(answer: ScoreMatrices) -> dict[str, float]:
        image_to_text, text_to_image = (scores.float().cpu() for scores in answer)
        return recall(image_to_text, text_to_image, torch.tensor(photo_of))

    return Workload(
        work="retrieval",
        unit="searches",
        title=lambda count: title,
        material=material,
        image_size=image_size,
        requests=1,
        inputs=[material.pixels(photos, image_size)],
        texts=texts,
        rows=lambda index: range(len(captions)),
        padding="all",
        run=run,
        compare=compare,
        recall=recall_of,
    )


def statements(material: Material, image_size: int, requests: int) -> Workload:
    """Judge whether sentences describe two photographs."""

    def title(count: int) -> str:
        return f"judge {counted(count, 'statement')} on two images each of {image_size} px"

    def run(engine: Engine, batch: Batch, pixels: Tensor) -> Tensor:
        images = torch.cat((pixels[batch.indices], pixels[batch.indices + 1]))
        return engine.statements(images, *batch.texts)

    return Workload(
        work="nlvr2",
        unit="statements",
        title=title,
        material=material,
        image_size=image_size,
        requests=requests,
        inputs=[material.pixels(requests + 1, image_size)],
        texts=material.texts(requests),
        run=run,
    )


def expressions(
    material: Material, image_size: int, texts_per_image: int, requests: int
) -> Workload:
    """Find the boxes of expressions in their photograph."""
    per_image = counted(texts_per_image, "expression")

    def run(engine: Engine, batch: Batch, pixels: Tensor) -> Tensor:
        return engine.boxes(pixels[batch.indices], *batch.texts, batch.image_of)

    return Workload(
        work="grounding",
        unit="expressions",
        title=lambda count: (
            f"ground {per_image} each in {counted(count, 'image')} of {image_size} px"
        ),
        material=material,
        image_size=image_size,
        requests=requests,
        inputs=[material.pixels(requests, image_size)],
        texts=material.texts(requests * texts_per_image),
        items=texts_per_image,
        run=run,
    )


def captions(material: Material, image_size: int, requests: int) -> Workload:
    """Caption photographs by beam search."""
    prompt = material.tokenizer.encode_prompt(PROMPT).to(material.device)
    pixels = material.pixels(requests, image_size)
    beams = f"{_BEAMS} beams of {_LONGEST} tokens"
    losses: dict[tuple[int, ...], float] = {}

    def loss(index: int, ids: Tensor) -> float:
        key = index % requests, *ids.tolist()
        if key not in losses:
            model = material.weights.model(image_size, torch.float32, "captioning")
            mask = ids.ne(model.config.pad_token_id).long()[None]
            image = pixels[key[0] : key[0] + 1]
            with torch.inference_mode():
                losses[key] = float(
                    OfficialFineTuningTwin(model).captions(
                        image, ids[None], mask, len(prompt), label_smoothing=0.0
                    )
                )
        return losses[key]

    def compare(indices: Sequence[int], ours: Tensor, official: Tensor) -> Difference:
        """Compare log-likelihoods per token in fp32: near ties may lead a search to other captions, as likely."""
        ours_losses, official_losses, differing = [], [], 0
        for index, ids, official_ids in zip(indices, ours, official, strict=True):
            ours_losses.append(loss(index, ids))
            official_losses.append(loss(index, official_ids))
            differing += ids.tolist() != official_ids.tolist()
        error = relative_error(torch.tensor(ours_losses), torch.tensor(official_losses))
        note = f"near ties led to {counted(differing, 'other caption')}" if differing else ""
        return Difference(error, note)

    def run(engine: Engine, batch: Batch, pixels: Tensor) -> Tensor:
        return engine.captions(pixels[batch.indices], prompt, _LONGEST, _SHORTEST, _BEAMS)

    return Workload(
        work="captioning",
        unit="captions",
        title=lambda count: f"caption {counted(count, 'image')} of {image_size} px, {beams}",
        material=material,
        image_size=image_size,
        requests=requests,
        inputs=[pixels],
        run=run,
        compare=compare,
    )


class _Ranking(NamedTuple):
    """How answers are ranked: `title` names the k candidates and n answers in a row's name."""

    title: str
    rank_all: bool = False
    best: int | None = None


ANSWERING = {
    "vqa": _Ranking("{k} of {n} answers ranked"),
    "vqa-best": _Ranking("the best of {k} of {n} answers", best=1),
    "vqa-all": _Ranking("the best of all {n} answers (official: of {k})", rank_all=True, best=1),
    "vqa-list": _Ranking("all {n} answers ranked (official: {k})", rank_all=True),
}


def questions(
    material: Material, work: str, image_size: int, texts_per_image: int, k: int, requests: int
) -> Workload:
    """Answer questions out of a list; raises `InputError` for more candidates than there are answers."""
    ranking, (ids, mask) = ANSWERING[work], material.answers()
    if k > len(ids):
        raise InputError(f"k={k}; with {len(ids)} answers it must be 1 to {len(ids)}")
    trie = AnswerTrie.of(ids, mask, material.config(image_size))
    answers = AnswerList(ids, mask, trie, k, ranking.rank_all, ranking.best)
    ranked = ranking.title.format(k=k, n=f"{trie.answers:,}")

    def title(count: int) -> str:
        images = "an image" if count == 1 else f"each of {count} images"
        return f"{counted(texts_per_image, 'question')} to {images} of {image_size} px, {ranked}"

    def run(engine: Engine, batch: Batch, pixels: Tensor) -> AnswerRanking:
        return engine.answers(pixels[batch.indices], *batch.texts, batch.image_of, answers)

    def compare(indices: Sequence[int], ours: AnswerRanking, official: AnswerRanking) -> Difference:
        # The official algorithm in another dtype has ranked only the candidates too.
        whole_list = ranking.rank_all and ours.indices.shape != official.indices.shape
        return compare_rankings(ours, official, whole_list=whole_list)

    return Workload(
        work=work,
        unit="questions",
        title=title,
        material=material,
        image_size=image_size,
        requests=requests,
        inputs=[material.pixels(requests, image_size)],
        texts=material.questions(requests * texts_per_image),
        items=texts_per_image,
        padding="none",
        run=run,
        compare=compare,
    )


def compare_rankings(
    ours: AnswerRanking, official: AnswerRanking, *, whole_list: bool = False
) -> Difference:
    """Compare the scores of the answers in both rankings of the same questions, and of the best ones.

    If ours ranks the `whole_list`, our best may be better, but no official answer that is better than our last may be
    missing.
    """
    ours_scores: list[float] = []
    official_scores: list[float] = []
    alone = 0
    for question in range(len(ours.indices)):
        scores = _by_index(ours.indices[question], ours.scores[question])
        expected = _by_index(official.indices[question], official.scores[question])
        shared = scores.keys() & expected.keys()
        ours_scores += [scores[index] for index in shared]
        official_scores += [expected[index] for index in shared]
        best, last = float(ours.scores[question, 0]), float(ours.scores[question, -1])
        official_best = float(official.scores[question, 0])
        ours_scores.append(best)
        if not whole_list:
            official_scores.append(official_best)
            # First tokens that are equally likely but for rounding decide which answers are candidates.
            alone += len(scores) - len(shared)
            continue
        official_scores.append(max(best, official_best))
        missing = [expected[index] for index in expected.keys() - scores.keys()]
        ours_scores.append(last)
        official_scores.append(max([last, *missing]))
    note = f"near ties put {alone} answers into one of the rankings alone" if alone else ""
    error = relative_error(torch.tensor(ours_scores), torch.tensor(official_scores))
    return Difference(error, note)


def _by_index(indices: Tensor, scores: Tensor) -> dict[int, float]:
    return dict(zip(indices.tolist(), scores.tolist(), strict=True))


def _near_ties(differing: int) -> str:
    return f"{differing} candidates differ by a near tie" if differing else ""


def counted(count: int, noun: str) -> str:
    """Return `1 image`, `2 images`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


TASK_WORK = (*ANSWERING, "nlvr2", "grounding", "captioning")
SCENARIOS = {
    "embed-image": "photographs to embeddings",
    "embed-text": "captions to embeddings",
    "rerank": "match scores of an image with candidate captions",
    "retrieve": "a caption to the best images of an index: embedded, ranked, the first k re-ranked",
    "vqa": "questions to an image, 128 of 3,129 answers ranked",
    "vqa-best": "the best of these 128",
    "vqa-all": "the best of all answers",
    "vqa-list": "all answers ranked",
    "nlvr2": "whether a sentence describes two images",
    "grounding": "boxes of expressions in an image",
    "captioning": "images to captions by three beams",
}
"""What each kind of work measures."""


def task_workload(
    work: str, material: Material, image_size: int, texts_per_image: int, k: int, requests: int
) -> Workload:
    """Return the requests of a fine-tuned task's work."""
    if work == "nlvr2":
        return statements(material, image_size, requests)
    if work == "captioning":
        return captions(material, image_size, requests)
    if work == "grounding":
        return expressions(material, image_size, texts_per_image, requests)
    return questions(material, work, image_size, texts_per_image, k, requests)
