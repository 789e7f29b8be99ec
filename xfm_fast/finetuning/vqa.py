"""Visual question answering from an answer list or by generation."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from xfm_fast.data.annotations import AnnotationRows, VQARecord, read_answer_list, unlisted_answers
from xfm_fast.data.task_files import vqa_rows
from xfm_fast.data.transforms import mentions_side
from xfm_fast.errors import ConfigError, DataError
from xfm_fast.finetuning.task import PairInput, Task, TaskOptions, require_inputs
from xfm_fast.models.decoder import DecoderMemory
from xfm_fast.tasks.answer_trie import AnswerTrie
from xfm_fast.tasks.vqa import VQAModel, exact_match, vqa_accuracy
from xfm_fast.tokenizer import pre_question

if TYPE_CHECKING:
    from xfm_fast.finetuning.evaluation import Evaluation, Metrics, Row

RESULT_FILE = "vqa_result.json"
_RUNNERS_UP = 4
_PEOPLE = 10


class VQAOptions(TaskOptions):
    """VQA."""

    kind: Literal["vqa"] = "vqa"
    free = ("k", "generate", "test_max_words", "official_ranking")
    learns = False
    decoder_layers: int = Field(default=12, gt=0)
    answers: str | tuple[str, ...] | None = Field(
        default=None, description="JSON array of candidate answers in data.root, or the answers"
    )
    k: int | Literal["all"] = Field(
        default=128, description="number of answers to rank, preselected by their first token; `all` ranks every answer"
    )
    official_ranking: bool = Field(
        default=False,
        description="rank as the official code does: count the first token twice, attend to question padding, keep "
        "the file order, and normalise probabilities over the k answers",
    )
    generate: bool = Field(default=False, description="generate answers without a list")
    augment: bool = Field(default=True, description="random crop, flip and RandAugment; false only resizes")
    max_words: int = Field(default=30, gt=0, description="of a question in training")
    max_tokens: int = Field(default=40, ge=3, description="of a question in training, including `<s>` and `</s>`")
    test_max_words: int = Field(default=50, gt=0, description="of a question in evaluation, with unlimited tokens")
    image_folders: dict[str, str] = Field(default={}, description="folders in data.images by `dataset`, e.g. {vg: vg}")

    @model_validator(mode="after")
    def _answerable(self) -> Self:
        if self.answers is None and not self.generate:
            raise ValueError("there are no answers to rank; give answers=<file>, or generate=true to write them freely")
        if isinstance(self.k, int) and self.k < 1:
            raise ValueError(f"k={self.k} ranks nothing; give a positive number, or all")
        return self

    def completed(self, train: Sequence[Path], root: Path) -> Self:
        """Options with the answers read from the answer file."""
        if not isinstance(self.answers, str):
            return self
        path = root / self.answers
        if not path.exists():
            raise DataError(f"task.answers: there is no {path}; give task.answers=<file>, or task.generate=true")
        return self.model_copy(update={"answers": tuple(read_answer_list(path))})


class Question(NamedTuple):
    """An image, question ids and answer ids with loss weights."""

    image: Tensor
    ids: list[int]
    answers: list[list[int]]
    weights: list[float]


@dataclass(frozen=True, kw_only=True)
class VQABatch(PairInput):
    """B questions with one image each, and their answers."""

    answer_ids: Tensor  # `[A, La]` int64: the answers of question 0, then of question 1, ...; padded
    answer_mask: Tensor  # `[A, La]`, non-zero for real tokens
    answers_per_question: Tensor  # `[B]` int64
    answer_weights: Tensor  # `[A]`


class VQATask(Task[VQAOptions, VQARecord, Question, VQABatch]):
    """VQA; see `xfm_fast.tasks.vqa`."""

    metrics = ("accuracy", "exact_match", "accuracy_yes_no", "accuracy_number", "accuracy_other")
    # A start from the fusion encoder leaves the decoder far from what it is to say; the official list is empty.
    large_lr = ("text_decoder",)

    def prepare(self) -> None:
        options = self.options
        answers = options.answers or ()
        k = options.k if isinstance(options.k, int) else 1
        if not options.generate and k > len(answers):
            raise ConfigError(f"task.k={options.k}, but there are {len(answers)} answers to rank; give at most that")
        self._runners_up = _RUNNERS_UP
        self._tries: dict[torch.device, AnswerTrie] = {}

    def build(self) -> VQAModel:
        return VQAModel(self.config, decoder_layers=self.options.decoder_layers)

    def rows(self, paths: Sequence[Path]) -> list[AnnotationRows[VQARecord]]:
        found, folders = vqa_rows(paths), self.options.image_folders
        for element in (element for rows in found for element in rows.elements if folders):
            if isinstance(element, dict) and isinstance(element.get("image"), str):
                folder = folders.get(element.get("dataset") or "vqa", "")
                element["image"] = str(Path(folder, element["image"]))
        for rows in found if not self.options.generate else []:
            lacking = unlisted_answers(_readable(rows), self.options.answers or ())
            if lacking.number:
                shown = ", ".join(map(repr, lacking.first))
                note = f"the answers of {lacking.number} questions are not in task.answers, so that ranking cannot give"
                rows.notes += (f"{rows.name}: {note} them ({shown}, ...)",)
        return found

    def item(self, record: VQARecord, rng: np.random.Generator) -> Question:
        answers = record.weighted_answers
        if not answers:
            raise DataError(f"question {record.question_id} has no answer; add one or remove it")
        texts = [answer for answer, _ in answers]
        question = pre_question(record.question, self.options.max_words)
        ids = self.tokenizer.encode_ids([question], self.options.max_tokens)[0]
        answer_ids = self.tokenizer.encode_ids(texts, self.config.max_text_length)
        image = self.augmented(record.image, rng, may_flip=not mentions_side(record.question, texts))
        return Question(image, ids, answer_ids, [weight for _, weight in answers])

    def collate(self, items: list[Question], rng: np.random.Generator) -> VQABatch:
        ids, mask = self.padded([item.ids for item in items])
        answer_ids, answer_mask = self.padded([answer for item in items for answer in item.answers])
        return VQABatch(
            image=torch.stack([item.image for item in items]),
            input_ids=ids,
            attention_mask=mask,
            answer_ids=answer_ids,
            answer_mask=answer_mask,
            answers_per_question=torch.tensor([len(item.answers) for item in items]),
            answer_weights=torch.tensor([weight for item in items for weight in item.weights]),
        )

    def losses_of(self, model: Any, batch: VQABatch) -> dict[str, Tensor]:
        loss = model(
            batch.image, batch.input_ids, batch.attention_mask, batch.answer_ids, batch.answer_mask,
            batch.answers_per_question, batch.answer_weights,
        )  # fmt: skip
        return {"loss": loss}

    def groups(self, records: Sequence[VQARecord]) -> list[list[int]]:
        if self.options.official_ranking:
            # What pads a question depends on the others of its batch.
            return super().groups(records)
        of_image: dict[str, list[int]] = {}
        for number, record in enumerate(records):
            of_image.setdefault(record.image, []).append(number)
        return list(of_image.values())

    def predict(self, model: VQAModel, records: Sequence[VQARecord]) -> list[Row]:
        """Answers with the probability of generating them, independent of the answer list."""
        places = {image: place for place, image in enumerate(dict.fromkeys(record.image for record in records))}
        index = torch.tensor([places[record.image] for record in records], device=model.device)
        pixels = torch.stack([self.pixels(image) for image in places]).to(model.device, model.dtype)
        ids, mask = (each.to(model.device) for each in self.padded([self._question_ids(record) for record in records]))
        official = self.options.official_ranking
        memory = model.encode_questions(pixels, ids, mask, index, attend_to_padding=official)
        if self.options.generate:
            return self._written(model, memory)
        answers = self.options.answers or ()
        k = len(answers) if self.options.k == "all" else self.options.k
        most = min(1 + self._runners_up, k)
        ranking = model.rank_answers(
            memory, self._trie(model), k=k, best=k if official else most, count_first_token_twice=official
        )
        scores = ranking.scores.double()
        shares = scores.softmax(-1) if official else scores.exp()
        found = [
            [{"answer": answers[number], "probability": share} for number, share in zip(*best, strict=True)]
            for best in zip(ranking.indices[:, :most].tolist(), shares[:, :most].tolist(), strict=True)
        ]
        return [best[0] | ({"runners_up": best[1:]} if self._runners_up else {}) for best in found]

    def _question_ids(self, record: VQARecord) -> list[int]:
        """Question ids; an empty question is `<s> </s>`."""
        question = pre_question(record.question, self.options.test_max_words)
        if not question.strip():
            return [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return self.tokenizer.encode_ids([question], self.config.max_text_length)[0]

    def _written(self, model: VQAModel, memory: DecoderMemory) -> list[Row]:
        ids = model.generate(memory)
        shares = model.log_likelihoods(memory, ids).exp().tolist()
        texts = map(self.tokenizer.decode, ids.tolist())
        return [{"answer": text.strip(), "probability": share} for text, share in zip(texts, shares, strict=True)]

    def _trie(self, model: VQAModel) -> AnswerTrie:
        """Answer trie for `VQAModel.rank_answers`, cached per device."""
        if model.device not in self._tries:
            rows = self.tokenizer.encode_ids(self.options.answers or (), self.config.max_text_length)
            ids, mask = (each.to(model.device) for each in self.padded(rows))
            self._tries[model.device] = AnswerTrie.of(ids, mask, self.config)
        return self._tries[model.device]

    def evaluate(
        self, model: VQAModel, records: Sequence[VQARecord], work: Evaluation
    ) -> tuple[Metrics, dict[str, bytes]]:
        # Only the best answer: most others need not be decoded to the end.
        task = copy.copy(self)
        task._runners_up = 0
        return super(VQATask, task).evaluate(model, records, work)

    def metrics_of(self, records: Sequence[VQARecord]) -> Collection[str]:
        people, answered = any(map(_annotators, records)), any(record.answer for record in records)
        return [name for name in self.metrics if (answered if name == "exact_match" else people)]

    def score(self, rows: Sequence[Row], records: Sequence[VQARecord]) -> Metrics:
        """`accuracy`: VQA consensus, also by answer type; `exact_match` with the most frequent answer."""
        # By position: question ids are unique per dataset, and a split may have several datasets.
        given: dict[int, str] = {number: row["answer"] for number, row in enumerate(rows)}
        people = {number: annotation for number, record in enumerate(records) if (annotation := _annotators(record))}
        truths = {number: Counter(r.answer).most_common(1)[0][0] for number, r in enumerate(records) if r.answer}
        metrics: Metrics = {}
        if people:
            found = vqa_accuracy(given, [annotation | {"question_id": number} for number, annotation in people.items()])
            metrics["accuracy"] = found.overall
            metrics |= {f"accuracy_{kind.replace('/', '_')}": each for kind, each in found.per_answer_type.items()}
        return metrics | ({"exact_match": 100 * exact_match(given, truths)} if truths else {})

    def files(self, rows: Sequence[Row], records: Sequence[VQARecord]) -> dict[str, bytes]:
        """Submission file for EvalAI."""
        found = [
            {"question_id": record.question_id, "answer": row["answer"]}
            for row, record in zip(rows, records, strict=True)
        ]
        return {RESULT_FILE: (json.dumps(found, ensure_ascii=False) + "\n").encode()}

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[VQARecord]:
        require_inputs(images, texts, "an image and questions about it", ok=len(images) == 1 and bool(texts))
        return [VQARecord(image=str(images[0]), question=text, question_id=n) for n, text in enumerate(texts)]


def _readable(rows: AnnotationRows[VQARecord]) -> Iterator[VQARecord]:
    for row in range(len(rows)):
        try:
            yield rows.read(row)
        except DataError:
            # Quarantine counts it when its turn comes.
            continue


def _annotators(record: VQARecord) -> dict[str, Any] | None:
    """Annotators' answers as an annotation for `vqa_accuracy`; official files store them in `answer`."""
    if record.scored is None and record.dataset == "vqa" and len(record.answer or ()) == _PEOPLE:
        return record.model_copy(update={"answers": record.answer}).scored
    return record.scored
