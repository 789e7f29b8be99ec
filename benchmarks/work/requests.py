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
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from xfm_fast.errors import InputError
from xfm_fast.tasks.reranking import UNSCORED, recall
from xfm_fast.tasks.vqa_model import AnswerRanking, AnswerTrie

from ..backends.engine import AnswerList, Engine, Everything, Found, Pairs, Schedule, SearchIndex
from ..backends.official_finetuning import OfficialFineTuningTwin
from ..inputs import Material, Texts
from ..measure import Difference
from ..tasks import PROMPT
from ..timing import relative_error

Answer = Callable[[Sequence[int]], Any]
"""Runs the requests of these numbers as one batch."""

# Of the official configuration.
_BEAMS, _SHORTEST, _LONGEST = 3, 5, 20


class Workload:
    """The requests of one kind of work at one size.

    Attributes:
        work: its name; `unit` is what a request counts, `items` of them.
        requests: distinct ones; numbers beyond wrap around.
        inputs: tensors that `run` gets in the dtype of the engine.
    """

    work: str
    unit: ClassVar[str]

    def __init__(
        self, material: Material, requests: int, image_size: int | None = None, texts: Texts | None = None,
        items: int = 1, inputs: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        self.material, self.requests, self.items = material, requests, items
        self.image_size = image_size or material.subjects.config.image_size
        self.config = material.config(self.image_size)
        self.inputs = inputs
        self._texts = texts
        self._lengths = [] if texts is None else texts.lengths

    def name(self, count: int) -> str:
        """So many requests together, in words."""
        raise NotImplementedError

    def run(self, engine: Engine, numbers: Tensor, *inputs: Tensor) -> Any:
        """Answer requests."""
        raise NotImplementedError

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        """How an engine answers requests in its dtype."""
        inputs = [tensor.to(dtype) for tensor in self.inputs]
        return lambda numbers: self.run(engine, torch.tensor(list(numbers)), *inputs)

    def rows(self, numbers: Sequence[int]) -> list[int]:
        """Rows of the texts of requests."""
        return [number * self.items + item for number in numbers for item in range(self.items)]

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        """Tokens of the texts of requests, none for images."""
        return [self._lengths[row] for row in self.rows(numbers)] if self._lengths else []

    def texts(self, numbers: Tensor) -> Texts:
        """The texts of requests."""
        assert self._texts is not None
        rows = self.rows(numbers.tolist())
        return Texts(self._texts.ids[rows], self._texts.mask[rows])

    def image_of(self, numbers: Tensor) -> Tensor:
        """The image of every text of some requests."""
        return torch.arange(len(numbers), device=self.material.device).repeat_interleave(self.items)

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

    def tokens(self, numbers: Sequence[int], schedule: Schedule | None) -> tuple[int, int] | None:
        """Text tokens of requests: those of the texts, and those that a schedule computes for them."""
        lengths = self.lengths(numbers)
        if not lengths or schedule is None:
            return None
        return sum(lengths), sum(lengths) if schedule == "ours" else self.padded(lengths)

    def padded(self, lengths: Sequence[int]) -> int:
        """Tokens of texts as the official code pads them."""
        return len(lengths) * (0 if self._texts is None else self._texts.ids.shape[1])


class EmbedImage(Workload):
    """Photographs to embeddings."""

    work, unit = "embed-image", "images"

    def __init__(self, material: Material, image_size: int, requests: int) -> None:
        super().__init__(
            material, requests, image_size, inputs=[material.pixels(requests, image_size)]
        )

    def name(self, count: int) -> str:
        return f"embed {counted(count, 'image')} of {self.image_size} px"

    def run(self, engine: Engine, numbers: Tensor, *inputs: Tensor) -> Tensor:
        return engine.embed_images(inputs[0][numbers])


class EmbedText(Workload):
    """Captions to embeddings."""

    work, unit = "embed-text", "texts"

    def __init__(self, material: Material, requests: int) -> None:
        self._given = material.texts(requests)
        super().__init__(material, requests, texts=self._given)

    def name(self, count: int) -> str:
        return f"embed {counted(count, 'caption')} ({self._given.span} tokens)"

    def run(self, engine: Engine, numbers: Tensor, *inputs: Tensor) -> Tensor:
        return engine.embed_texts(*self.texts(numbers))

    def compare(self, numbers: Sequence[int], ours: Tensor, theirs: Tensor) -> Difference:
        real = self._given.mask[list(numbers)].bool()
        return Difference(relative_error(ours[real], theirs[real]))


class Rerank(Workload):
    """Match scores of an image with candidate texts. Every image has the same texts, in another order."""

    work, unit = "rerank", "pairs"

    def __init__(self, material: Material, image_size: int, texts: int, requests: int) -> None:
        given = material.texts(texts)
        images, _ = material.images(requests, image_size)
        with torch.inference_mode():
            embeds = material.subjects.model(image_size, torch.float32).encode_text(*given)
        super().__init__(material, requests, image_size, given, texts, [images, embeds])
        self._span = given.span

    def name(self, count: int) -> str:
        texts = f"{counted(self.items, 'caption')} ({self._span} tokens)"
        return f"re-rank {counted(count, 'image')} of {self.image_size} px x {texts}"

    def rows(self, numbers: Sequence[int]) -> list[int]:
        return [(number + item) % self.items for number in numbers for item in range(self.items)]

    def run(self, engine: Engine, numbers: Tensor, *inputs: Tensor) -> Tensor:
        images, embeds = inputs
        rows = self.rows(numbers.tolist())
        return engine.rerank(
            Pairs(images[numbers], embeds[rows], self.texts(numbers).mask, self.image_of(numbers))
        )


class Retrieve(Workload):
    """Captions to the best images of an index: embedded, ranked by similarity, the first k re-ranked."""

    work, unit = "retrieve", "queries"

    def __init__(
        self, material: Material, image_size: int, index: int, k: int, requests: int
    ) -> None:
        given = material.texts(requests)
        self._index = min(index, len(material.collection.names))
        self._k, self._span = min(k, self._index), given.span
        super().__init__(
            material, requests, image_size, given, inputs=material.images(self._index, image_size)
        )

    def name(self, count: int) -> str:
        found = (
            f"{self._k} best of {counted(self._index, 'image')} of {self.image_size} px, re-ranked"
        )
        return f"retrieve for {counted(count, 'caption')} ({self._span} tokens) the {found}"

    def run(self, engine: Engine, numbers: Tensor, *inputs: Tensor) -> Found:
        return engine.search(*self.texts(numbers), SearchIndex(*inputs), self._k)

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
        return Difference(
            relative_error(torch.tensor(mine), torch.tensor(yours)), _near_ties(differing)
        )


class Retrieval(Workload):
    """Retrieval from end to end, as it is evaluated: pixels and ids to the score matrices of both directions."""

    work, unit = "retrieval", "searches"

    def __init__(
        self,
        material: Material,
        image_size: int,
        photos: int,
        captions_per_photo: int,
        k: int,
        batch: int,
    ) -> None:
        collection = material.collection
        photos = min(photos, len(collection.names))
        chosen = [collection.captions_of(photo)[:captions_per_photo] for photo in range(photos)]
        self._given = material.encoded([caption for captions in chosen for caption in captions])
        self._image_of_text = torch.tensor(
            [photo for photo, captions in enumerate(chosen) for _ in captions]
        )
        self._k, self._batch, self._photos = min(k, photos), batch, photos
        super().__init__(
            material, 1, image_size, self._given, inputs=[material.pixels(photos, image_size)]
        )

    def name(self, count: int) -> str:
        images = f"{counted(self._photos, 'image')} of {self.image_size} px"
        return f"retrieve {images} x {counted(len(self._given.ids), 'caption')}, k = {self._k}, end to end"

    def rows(self, numbers: Sequence[int]) -> list[int]:
        return list(range(len(self._given.ids)))

    def run(self, engine: Engine, numbers: Tensor, *inputs: Tensor) -> Everything:
        return engine.evaluate(inputs[0].split(self._batch), *self._given, self._k)

    def compare(self, numbers: Sequence[int], ours: Everything, theirs: Everything) -> Difference:
        """The pairs that both scored; near ties of the similarity may make candidates differ."""
        errors, differing = [], 0
        for mine, yours in zip(ours, theirs, strict=True):
            scored, expected = mine != UNSCORED, yours != UNSCORED
            both = scored & expected
            differing += int((scored ^ expected).sum())
            errors.append(
                relative_error(mine[both], yours[both]) if bool(both.any()) else float("inf")
            )
        return Difference(max(errors), _near_ties(differing))

    def recall(self, answer: Everything) -> dict[str, float]:
        return recall(
            answer.image_to_text.float().cpu(),
            answer.text_to_image.float().cpu(),
            self._image_of_text,
        )


class TaskWorkload(Workload):
    """Photographs, each with texts of its own, for a fine-tuned model; official texts are padded to the longest."""

    def __init__(
        self, material: Material, image_size: int, requests: int, texts: Texts | None = None, items: int = 1,
        photos: int = 0,
    ) -> None:  # fmt: skip
        pixels = material.pixels(photos or requests, image_size)
        super().__init__(material, requests, image_size, texts, items, [pixels])

    def texts(self, numbers: Tensor) -> Texts:
        """Texts without the padding of all of them."""
        ids, mask = super().texts(numbers)
        longest = int(mask.sum(1).max())
        return Texts(ids[:, :longest], mask[:, :longest])

    def padded(self, lengths: Sequence[int]) -> int:
        return len(lengths) * max(lengths)


class Statements(TaskWorkload):
    """Sentences to whether they describe two photographs."""

    work, unit = "nlvr2", "statements"

    def __init__(self, material: Material, image_size: int, requests: int) -> None:
        super().__init__(
            material, image_size, requests, material.texts(requests), photos=requests + 1
        )

    def name(self, count: int) -> str:
        return f"judge {counted(count, 'statement')} on two images each of {self.image_size} px"

    def run(self, engine: Engine, numbers: Tensor, *inputs: Tensor) -> Tensor:
        pixels = inputs[0]
        return engine.statements(
            torch.cat((pixels[numbers], pixels[numbers + 1])), *self.texts(numbers)
        )


class Expressions(TaskWorkload):
    """Expressions to boxes in their photograph."""

    work, unit = "grounding", "expressions"

    def __init__(self, material: Material, image_size: int, texts: int, requests: int) -> None:
        super().__init__(material, image_size, requests, material.texts(requests * texts), texts)

    def name(self, count: int) -> str:
        return f"ground {counted(self.items, 'expression')} each in {counted(count, 'image')} of {self.image_size} px"

    def run(self, engine: Engine, numbers: Tensor, *inputs: Tensor) -> Tensor:
        return engine.boxes(inputs[0][numbers], *self.texts(numbers), self.image_of(numbers))


class Captions(TaskWorkload):
    """Photographs to captions, by beam search."""

    work, unit = "captioning", "captions"

    def __init__(self, material: Material, image_size: int, requests: int) -> None:
        super().__init__(material, image_size, requests)
        self._prompt = material.tokenizer.encode_prompt(PROMPT).to(material.device)
        self._scores: dict[tuple[int, ...], float] = {}

    def name(self, count: int) -> str:
        return f"caption {counted(count, 'image')} of {self.image_size} px, {_BEAMS} beams of {_LONGEST} tokens"

    def run(self, engine: Engine, numbers: Tensor, *inputs: Tensor) -> Tensor:
        return engine.captions(inputs[0][numbers], self._prompt, _LONGEST, _SHORTEST, _BEAMS)

    def compare(self, numbers: Sequence[int], ours: Tensor, theirs: Tensor) -> Difference:
        """Log-likelihoods of the captions, a token, officially in fp32: near ties lead a search to others as likely."""
        pairs = [
            (self._score(n, a), self._score(n, b))
            for n, a, b in zip(numbers, ours, theirs, strict=True)
        ]
        others = sum(
            one.tolist() != other.tolist() for one, other in zip(ours, theirs, strict=True)
        )
        error = relative_error(*(torch.tensor(scores) for scores in zip(*pairs, strict=True)))
        return Difference(
            error, f"near ties led to {counted(others, 'other caption')}" if others else ""
        )

    def _score(self, number: int, ids: Tensor) -> float:
        key = number % self.requests, *ids.tolist()
        if key not in self._scores:
            twin = OfficialFineTuningTwin(
                self.material.subjects.model(self.image_size, torch.float32, self.work)
            )
            real, pixels = (
                ids.ne(self.config.pad_token_id).long()[None],
                self.inputs[0][key[0] : key[0] + 1],
            )
            with torch.inference_mode():
                loss = twin.captions(
                    pixels, ids[None], real, len(self._prompt), label_smoothing=0.0
                )
            self._scores[key] = float(loss)
        return self._scores[key]


class _Kind(NamedTuple):
    """Answers of a question: `words` in a row's name, of numbers k and n answers."""

    words: str
    whole_list: bool = False
    best: int | None = None


ANSWERING = {
    "vqa": _Kind("{k} of {n} answers ranked"),
    "vqa-best": _Kind("the best of {k} of {n} answers", best=1),
    "vqa-all": _Kind("the best of all {n} answers (official: of {k})", True, best=1),
    "vqa-list": _Kind("all {n} answers ranked (official: {k})", True),
}


class Questions(TaskWorkload):
    """Questions to answers out of a list; raises `InputError` for more candidates than there are answers."""

    unit = "questions"

    def __init__(
        self, material: Material, work: str, image_size: int, texts: int, k: int, requests: int
    ) -> None:
        self.work, self._kind = work, ANSWERING[work]
        ids, mask = material.answers()
        if k > len(ids):
            raise InputError(f"k={k}; with {len(ids)} answers it must be 1 to {len(ids)}")
        trie = AnswerTrie.of(ids, mask, material.config(image_size))
        self._list = AnswerList(ids, mask, trie, k, self._kind.whole_list, self._kind.best)
        super().__init__(
            material, image_size, requests, material.questions(requests * texts), texts
        )

    def name(self, count: int) -> str:
        words = self._kind.words.format(k=self._list.k, n=f"{self._list.trie.answers:,}")
        images = "an image" if count == 1 else f"each of {count} images"
        return f"{counted(self.items, 'question')} to {images} of {self.image_size} px, {words}"

    def run(self, engine: Engine, numbers: Tensor, *inputs: Tensor) -> AnswerRanking:
        texts = self.texts(numbers)
        return engine.answers(inputs[0][numbers], *texts, self.image_of(numbers), self._list)

    def padded(self, lengths: Sequence[int]) -> int:
        return sum(lengths)

    def compare(
        self, numbers: Sequence[int], ours: AnswerRanking, theirs: AnswerRanking
    ) -> Difference:
        # The official algorithm in another dtype has ranked only the candidates too.
        return compared(
            ours,
            theirs,
            whole_list=self._kind.whole_list and ours.indices.shape != theirs.indices.shape,
        )


def compared(ours: AnswerRanking, truth: AnswerRanking, *, whole_list: bool = False) -> Difference:
    """Scores of the answers that are in both rankings of the same questions, and those of the best.

    In a `whole_list` our best may be better, but none of the others' may be missing that is better than our last.
    """
    mine: list[float] = []
    theirs: list[float] = []
    alone = 0
    for indices, scores, other_indices, other_scores in zip(
        *map(torch.Tensor.tolist, (*ours, *truth)), strict=True
    ):
        found, known = (
            dict(zip(*pair, strict=True))
            for pair in ((indices, scores), (other_indices, other_scores))
        )
        shared = found.keys() & known.keys()
        mine += [found[index] for index in shared] + scores[:1]
        theirs += [known[index] for index in shared]
        theirs.append(max(scores[0], other_scores[0]) if whole_list else other_scores[0])
        if whole_list:
            missing = max(
                (known[index] for index in known.keys() - found.keys()), default=scores[-1]
            )
            mine.append(scores[-1])
            theirs.append(max(scores[-1], missing))
        else:
            # First tokens that are equally likely but for rounding decide which answers are candidates.
            alone += len(found) - len(shared)
    note = f"near ties put {alone} answers into one of the rankings alone" if alone else ""
    return Difference(relative_error(torch.tensor(mine), torch.tensor(theirs)), note)


def _near_ties(differing: int) -> str:
    return f"{differing} candidates differ by a near tie" if differing else ""


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


TASK_WORK = (*ANSWERING, Statements.work, Expressions.work, Captions.work)
SCENARIOS = {
    EmbedImage.work: "photographs to embeddings",
    EmbedText.work: "captions to embeddings",
    Rerank.work: "match scores of an image with candidate captions",
    Retrieve.work: "a caption to the best images of an index: embedded, ranked, the first k re-ranked",
    "vqa": "questions to an image, 128 of 3,129 answers ranked",
    "vqa-best": "the best of these 128",
    "vqa-all": "the best of all answers",
    "vqa-list": "all answers ranked",
    Statements.work: "whether a sentence describes two images",
    Expressions.work: "boxes of expressions in an image",
    Captions.work: "images to captions by three beams",
}
"""What each kind of work measures."""


def task_workload(
    work: str, material: Material, image_size: int, texts: int, k: int, requests: int
) -> TaskWorkload:  # fmt: skip
    """The requests of a kind of work that a task has."""
    if work in ANSWERING:
        return Questions(material, work, image_size, texts, k, requests)
    if work == Expressions.work:
        return Expressions(material, image_size, texts, requests)
    one_each = {kind.work: kind for kind in (Statements, Captions)}
    return one_each[work](material, image_size, requests)
