"""Visual question answering: a decoder trained to generate answers, which ranks an answer list at inference.

Official recipe (VQA v2 with Visual Genome): 480 pixels, 12 decoder layers initialised from the fusion encoder, 24
questions per GPU, lr 2e-5, 10 epochs; 128 candidates out of 3,129 answers.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import (
    Annotation,
    AnnotationRows,
    Identity,
    Text,
    Texts,
    array_of,
    as_rows,
)
from xfm_fast.data.files import Paths, find_files, read_json
from xfm_fast.errors import ConfigError, DataError, InputError, UnavailableError
from xfm_fast.models import inputs
from xfm_fast.models.decoder import DecoderMemory, TextDecoder, generate
from xfm_fast.packing import ImageGroups, offsets
from xfm_fast.tasks.answer_trie import AnswerRanking, AnswerTrie, PackedTree, check_answers, rank
from xfm_fast.tasks.evaluation import Evaluation, Metrics, Row
from xfm_fast.tasks.task import (
    DecoderModel,
    Item,
    PairInput,
    Task,
    TaskOptions,
    group_by_image,
    json_file,
    register,
    require_inputs,
    unique_images,
)
from xfm_fast.tokenizer import pre_question

RESULT_FILE = "vqa_result.json"
_RUNNERS_UP = 4
_PEOPLE = 10
_SHOWN = 3

# The tables of the VQA v2 evaluation protocol (arXiv 1505.00468), with its oddities: "somebody'd" loses its apostrophe,
# and "Id've", "Im", "Ive" can never match, because words are lower-cased first.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
    "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all "
    "you'd you'll you're you've"
)
_DOUBLE_CONTRACTIONS = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've"
)
_SPELLINGS = (
    {word.replace("'", ""): word for word in _CONTRACTIONS.split()}
    | {word.replace("'", "", 1): word for word in _DOUBLE_CONTRACTIONS.split()}
    | {word.replace("'ve", "ve"): word for word in _DOUBLE_CONTRACTIONS.split()}
    | {
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at",
        "somebody'd": "somebodyd",
        "yall'll": "y'all'll",
        "y'allll": "y'all'll",
        "yall'd've": "y'all'd've",
        "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've",
    }
)
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The protocol passes a flag where the number of replacements belongs: only the first 32 full stops go.
_FULL_STOPS = 32


class AnswersByDecoder:
    """Ranking and generation of answers by a model or a session."""

    def encode_questions(
        self: Any,
        pixels: Tensor,
        question_ids: Tensor,
        question_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        *,
        attend_to_padding: bool = False,
    ) -> Any:
        """Decoder memory of Q questions `[Q, L]` fused with their images (`image_index` `[Q]`).

        `attend_to_padding` reproduces the official evaluation: its decoder attends to padding, so that an answer
        depends on the rest of the batch. An export, whose graphs mask padding, raises `UnavailableError`.
        """
        mask = inputs.check_tokens(question_ids, question_mask, self.config)
        if attend_to_padding and not isinstance(self, VQAModel):
            raise UnavailableError(
                "official_ranking reads padding, which no export computes; predict with the run"
            )
        padding = {"keep_padding": True} if attend_to_padding else {}
        memory = self.image_memory(self.encode_image(pixels))
        text = self.encode_text(question_ids, mask, **padding)
        states = self.fuse(text, mask, memory, image_index, **padding)
        return self.states(states, None if attend_to_padding else mask.long())

    @torch.no_grad()
    def rank_answers(
        self: Any,
        memory: Any,
        answers: AnswerTrie | Tensor,
        answer_mask: Tensor | None = None,
        *,
        k: int = 128,
        best: int | None = None,
        count_first_token_twice: bool = False,
    ) -> AnswerRanking:
        """Rank k candidates, chosen by their first token, by exact log-likelihood; returns `[Q, best]`.

        `answers` is an `AnswerTrie`, built once for all batches, or ids `[N, La]`. k = N ranks all answers exactly;
        `best` < k prunes candidates that cannot be among the best, with the same result. `count_first_token_twice`
        reproduces the official score, which adds the log-probability of the first answer token twice.
        """
        trie = (
            answers
            if isinstance(answers, AnswerTrie)
            else AnswerTrie.of(answers, answer_mask, self.config)
        )
        return rank(
            lambda part: self.answer_tree(part, trie), memory, trie, k=k, best=best,
            first_token_twice=count_first_token_twice,
        )  # fmt: skip

    @torch.no_grad()
    def generate(
        self: Any,
        memory: Any,
        *,
        max_length: int = 20,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> Tensor:
        """Generate answers freely: `[Q, length]` ids with `<s>` and `</s>`, padded."""
        config = self.config
        prompt = torch.full((memory.states, 1), config.bos_token_id, device=self.device)
        return generate(
            self.writer, memory, prompt, max_length=max_length, num_beams=num_beams, length_penalty=length_penalty,
            pad_token_id=config.pad_token_id, eos_token_id=config.eos_token_id,
        )  # fmt: skip


class VQAModel(AnswersByDecoder, DecoderModel):
    """X-FM with an answer decoder of `decoder_layers` (official `num_dec_layers`) on the fusion encoder."""

    decoder_reads = "fusion"

    def __init__(self, config: XFMConfig, *, decoder_layers: int = 12) -> None:
        super().__init__(config, heads=())
        self.text_decoder = TextDecoder(config, decoder_layers, config.text_width)

    def answer_tree(self, memory: DecoderMemory, trie: AnswerTrie) -> PackedTree:
        """Tree that decodes the answers of some questions."""
        return PackedTree(self.text_decoder, memory, trie)

    def forward(
        self,
        pixels: Tensor,
        question_ids: Tensor,
        question_mask: Tensor | None,
        answer_ids: Tensor,
        answer_mask: Tensor | None,
        answers_per_question: Tensor,
        answer_weights: Tensor,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Weighted negative log-likelihood of the answers, summed and divided by the number of questions.

        `answer_ids` `[A, La]` holds the answers of question 0, then of question 1, ... (`answers_per_question` `[Q]`
        sums to A).
        """
        mask = check_answers(answer_ids, answer_mask, self.config)
        questions, answers = question_ids.shape[0], answer_ids.shape[0]
        summed = answers if answers_per_question.is_cuda else int(answers_per_question.sum())
        if (
            answers_per_question.shape != (questions,)
            or answer_weights.shape != (answers,)
            or summed != answers
        ):
            raise InputError(
                f"answers_per_question is {[*answers_per_question.shape]} with the sum {summed} and answer_weights "
                f"{[*answer_weights.shape]}; there are {questions} questions and {answers} answers"
            )
        memory = self.encode_questions(pixels, question_ids, question_mask, image_index)
        groups = ImageGroups(offsets(answers_per_question.to(answer_ids.device)))
        losses = self.text_decoder.token_losses(answer_ids, mask, memory, groups)
        return (answer_weights * losses.sum(1)).sum() / questions

    @torch.no_grad()
    def log_likelihoods(self, memory: DecoderMemory, answer_ids: Tensor) -> Tensor:
        """Log-likelihood `[Q]` of one answer `[Q, La]` per question."""
        each = ImageGroups(torch.arange(len(answer_ids) + 1, device=answer_ids.device))
        mask = answer_ids != self.config.pad_token_id
        return -self.text_decoder.token_losses(answer_ids, mask, memory, each).double().sum(1)


def strip_punctuation(answer: str) -> str:
    """Remove punctuation next to a space (or anywhere after a number like 1,000), else replace it by a space."""
    number = _DIGIT_COMMA_DIGIT.search(answer) is not None
    out = answer
    for mark in _PUNCTUATION:
        loose = number or f"{mark} " in answer or f" {mark}" in answer
        out = out.replace(mark, "" if loose else " ")
    return _FULL_STOP.sub("", out, count=_FULL_STOPS)


def normalise_answer(answer: str) -> str:
    """Normalise an answer as the VQA protocol does: punctuation, case, number words, articles, contractions."""
    words = [_NUMBERS.get(word, word) for word in strip_punctuation(answer).lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(
    predictions: Sequence[str], people: Sequence[Sequence[str]], kinds: Sequence[str | None]
) -> dict[str, float]:
    """VQA v2 consensus accuracy in percent, rounded to two digits as in the protocol: `overall`, and by kind.

    Full credit is for agreement with three of nine annotators.
    """
    found: dict[str, list[float]] = {"overall": []}
    for prediction, answers, kind in zip(predictions, people, kinds, strict=True):
        given = normalise_answer(prediction.replace("\n", " ").replace("\t", " ").strip())
        if len(set(answers)) > 1:
            # The annotators' answers get the first step of the normalisation only, and only when they disagree.
            answers = [strip_punctuation(answer) for answer in answers]
        hits = answers.count(given)
        # Leaving out one annotator at a time: for those who gave this answer there is one match fewer.
        score = sum(min(1.0, (hits - (answer == given)) / 3) for answer in answers) / len(answers)
        for name in ("overall", kind):
            if name is not None:
                found.setdefault(name, []).append(score)
    return {name: round(100 * sum(scores) / len(scores), 2) for name, scores in found.items()}


def exact_match(predictions: Mapping[int, str], answers: Mapping[int, str]) -> float:
    """Share of predictions equal to the answer up to outer whitespace, as in the official script."""
    return sum(
        predictions[question].strip() == answer.strip() for question, answer in answers.items()
    ) / len(answers)


def _drop_empty(value: Any) -> Any:
    """Drop empty answers."""
    if not isinstance(value, (list, tuple)):
        return value
    answers = [
        each for each in map(answer_text, value) if not isinstance(each, str) or each.strip()
    ]
    if value and not answers:
        raise PydanticCustomError("blank", "all answers are empty")
    return answers


def answer_text(value: Any) -> Any:
    """Text of an answer, given as a string or an object."""
    return value.get("answer") if isinstance(value, dict) else value


Answers = Annotated[Texts, BeforeValidator(_drop_empty)]
# Answers of ten annotators for scoring; an empty answer counts.
PeopleAnswers = Annotated[
    tuple[str, ...],
    BeforeValidator(
        lambda value: list(map(answer_text, value)) if isinstance(value, list) else value
    ),
]


class VQARecord(Annotation):
    """A question about an image, optionally with answers."""

    image: Text
    question: Text
    question_id: Identity
    answer: Answers | None = Field(
        default=None, description="what training takes; empty answers are left out"
    )
    dataset: str = "vqa"
    answers: PeopleAnswers | None = Field(default=None, description="the ten people's, to score by")
    question_type: str | None = None
    answer_type: str | None = None

    @property
    def weighted_answers(self) -> list[tuple[str, float]]:
        """Distinct answers with loss weights: the share of annotators, or 0.5 for Visual Genome."""
        answers = self.answer or ()
        if self.dataset == "vg":
            return [(answer, 0.5) for answer in answers[:1]]
        return [(answer, times / len(answers)) for answer, times in Counter(answers).items()]

    @property
    def people(self) -> tuple[str, ...] | None:
        """The annotators' answers to score by, if any; official files store them in `answer`."""
        if self.answers is None and self.dataset == "vqa" and len(self.answer or ()) == _PEOPLE:
            return self.answer
        return self.answers


def vqa_rows(paths: Paths) -> list[AnnotationRows[VQARecord]]:
    """Questions: official JSON, or VQA v2's `*_questions.json` and `*_annotations.json`."""

    def answer_only(fields: dict[str, Any]) -> Any:
        """`object_hook` that reduces a VQA v2 answer to its text, to save gigabytes."""
        return fields["answer"] if "answer" in fields and "answer_id" in fields else fields

    arrays, documents = [], []
    for path in find_files(paths):
        content = read_json(path, "official JSON or VQA v2 questions and annotations", answer_only)
        if isinstance(content, dict) and ("questions" in content or "annotations" in content):
            documents.append((path, content))
        else:
            known = "an array of objects, or VQA v2's {questions} or {annotations}"
            arrays.append(AnnotationRows(str(path), array_of(path, content, known)))
    rows = as_rows(arrays + (_vqa_elements(documents) if documents else []), VQARecord)
    for each in rows:
        # Empty answers are dropped (the official code trains on them).
        questions = [
            str(element.get("question_id"))
            for element in each.elements
            for _ in _empty_answers(element)
        ]
        if questions:
            shown = ", ".join(questions[:_SHOWN])
            each.notes = (
                f"{each.name}: {len(questions)} empty answers were left out (question {shown})",
            )
    return rows


def _empty_answers(element: Any) -> list[str]:
    answers = element.get("answer") if isinstance(element, dict) else None
    texts = map(answer_text, answers) if isinstance(answers, list) else ()
    return [text for text in texts if isinstance(text, str) and not text.strip()]


def _vqa_elements(documents: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[AnnotationRows[Any]]:
    """VQA v2 questions joined with their annotations, one for each question file."""
    annotations: dict[Any, Mapping[str, Any]] = {}
    annotated = {
        path: content.get("data_subtype") for path, content in documents if "annotations" in content
    }
    for path, content in documents:
        for each in array_of(path, content["annotations"]) if path in annotated else ():
            if isinstance(each, dict) and isinstance(each.get("question_id"), (int, str)):
                annotations[each["question_id"]] = each
    found = []
    for path, content in documents:
        if "questions" in content:
            subtype = content.get("data_subtype", "")
            # test-dev2015 is a subset of the questions about test2015 images.
            split = str(subtype).replace("-dev", "")
            values = [
                _question(each, annotations, split, required=subtype in annotated.values())
                if isinstance(each, dict)
                else each
                for each in array_of(path, content["questions"])
            ]
            found.append(AnnotationRows(path, values, sources=tuple(annotated)))
    if not found:
        raise DataError(f"{documents[0][0]} holds only annotations; give their questions file too")
    return found


def _question(
    question: Mapping[str, Any], annotations: Mapping[Any, Any], split: str, *, required: bool
) -> dict[str, Any] | DataError:
    """A question with its annotation; a missing image or `required` annotation is an error."""
    identity, image = question.get("question_id"), question.get("image_id")
    if not isinstance(image, int):
        return DataError(
            f"question {identity} has no image (image_id is {image!r}); correct or remove it"
        )
    name = f"{split}/COCO_{split}_{image:012d}.jpg"
    value = {"image": name, "question": question.get("question"), "question_id": identity}
    annotation = annotations.get(identity) if isinstance(identity, (int, str)) else None
    if annotation is not None:
        kinds = {
            name: annotation[name]
            for name in ("question_type", "answer_type")
            if name in annotation
        }
        # Training takes the annotators' answers, and so does scoring.
        return (
            value
            | kinds
            | {"answer": annotation.get("answers"), "answers": annotation.get("answers")}
        )
    if required:
        return DataError(f"question {identity} has no annotation; add it or remove the question")
    return value


def read_answer_list(path: str | os.PathLike[str]) -> list[str]:
    """Candidate answers of VQA: a JSON array of unique non-empty strings."""
    path = Path(path)
    answers = array_of(path, read_json(path, "one JSON array of strings"), "one array of strings")
    for number, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(
                f"{path}: answer {number} is {answer!r}; expected a text that is not empty"
            )
    if twice := [answer for answer, times in Counter(answers).items() if times > 1]:
        raise DataError(
            f"{path}: {', '.join(map(repr, twice[:_SHOWN]))} stand there more than once; leave one of each"
        )
    return answers


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
        default=128,
        description="number of answers to rank, preselected by their first token; `all` ranks every answer",
    )
    official_ranking: bool = Field(
        default=False,
        description="rank as the official code does: count the first token twice, attend to question padding, keep "
        "the file order, and normalise probabilities over the k answers",
    )
    generate: bool = Field(default=False, description="generate answers without a list")
    augment: bool = Field(
        default=True, description="random crop, flip and RandAugment; false only resizes"
    )
    max_words: int = Field(default=30, gt=0, description="of a question in training")
    max_tokens: int = Field(
        default=40, ge=3, description="of a question in training, including `<s>` and `</s>`"
    )
    test_max_words: int = Field(
        default=50, gt=0, description="of a question in evaluation, with unlimited tokens"
    )
    image_folders: dict[str, str] = Field(
        default={}, description="folders in data.images by `dataset`, e.g. {vg: vg}"
    )

    @model_validator(mode="after")
    def _answerable(self) -> Self:
        if self.answers is None and not self.generate:
            raise ValueError(
                "there are no answers to rank; give answers=<file>, or generate=true to write them freely"
            )
        if isinstance(self.k, int) and self.k < 1:
            raise ValueError(f"k={self.k} ranks nothing; give a positive number, or all")
        return self

    def completed(self, train: Sequence[Path], root: Path) -> Self:
        """Options with the answers read from the answer file."""
        if not isinstance(self.answers, str):
            return self
        path = root / self.answers
        if not path.exists():
            raise DataError(
                f"task.answers: there is no {path}; give task.answers=<file>, or task.generate=true"
            )
        return self.model_copy(update={"answers": tuple(read_answer_list(path))})


@dataclass(frozen=True, kw_only=True)
class VQABatch(PairInput):
    """B questions with one image each, and their answers."""

    answer_ids: (
        Tensor  # `[A, La]` int64: the answers of question 0, then of question 1, ...; padded
    )
    answer_mask: Tensor  # `[A, La]`, non-zero for real tokens
    answers_per_question: Tensor  # `[B]` int64
    answer_weights: Tensor  # `[A]`


@register
class VQATask(Task[VQAOptions, VQARecord, Item, VQABatch]):
    """VQA."""

    Options, Session = VQAOptions, AnswersByDecoder
    check_rows = staticmethod(vqa_rows)
    metrics = ("accuracy", "exact_match", "accuracy_yes_no", "accuracy_number", "accuracy_other")
    # A start from the fusion encoder leaves the decoder far from what it is to say; the official list is empty.
    large_lr = ("text_decoder",)

    def prepare(self) -> None:
        options = self.options
        answers = options.answers or ()
        k = options.k if isinstance(options.k, int) else 1
        if not options.generate and k > len(answers):
            raise ConfigError(
                f"task.k={options.k}, but there are {len(answers)} answers to rank; give at most that"
            )
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
        return found

    def item(self, record: VQARecord, rng: np.random.Generator) -> Item:
        from xfm_fast.data.transforms import mentions_side

        answers = record.weighted_answers
        if not answers:
            raise DataError(f"question {record.question_id} has no answer; add one or remove it")
        texts = [answer for answer, _ in answers]
        question = pre_question(record.question, self.options.max_words)
        ids = self.tokenizer.encode_ids([question], self.options.max_tokens)[0]
        answer_ids = self.tokenizer.encode_ids(texts, self.config.max_text_length)
        image = self.augmented(
            record.image, rng, may_flip=not mentions_side(record.question, texts)
        )
        return Item(image, ids, [*zip(answer_ids, (weight for _, weight in answers), strict=True)])

    def collate(self, items: list[Item], rng: np.random.Generator) -> VQABatch:
        answers, weights = zip(*(pair for item in items for pair in item.target), strict=True)
        answer_ids, answer_mask = self.padded(answers)
        return VQABatch(
            **self.pair_inputs(items), answer_ids=answer_ids, answer_mask=answer_mask,
            answers_per_question=torch.tensor([len(item.target) for item in items]),
            answer_weights=torch.tensor(weights),
        )  # fmt: skip

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
        return group_by_image(records)

    def predict(self, model: VQAModel, records: Sequence[VQARecord]) -> list[Row]:
        """Answers with the probability of generating them, independent of the answer list."""
        images, places = unique_images(records)
        # An empty question is `<s> </s>`.
        texts = [pre_question(record.question, self.options.test_max_words) for record in records]
        empty = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        longest = self.config.max_text_length
        ids = [
            self.tokenizer.encode_ids([text], longest)[0] if text.strip() else empty
            for text in texts
        ]
        questions = self.padded(ids, model.device)
        official, index = self.options.official_ranking, torch.tensor(places, device=model.device)
        memory = model.encode_questions(
            self.pixels_of(images, model), *questions, index, attend_to_padding=official
        )
        if self.options.generate:
            ids = model.generate(memory)
            shares, texts = (
                model.log_likelihoods(memory, ids).exp().tolist(),
                map(self.tokenizer.decode, ids.tolist()),
            )
            return [
                {"answer": text.strip(), "probability": p}
                for text, p in zip(texts, shares, strict=True)
            ]
        answers = self.options.answers or ()
        k = len(answers) if self.options.k == "all" else self.options.k
        most = min(1 + self._runners_up, k)
        ranking = model.rank_answers(
            memory,
            self._trie(model),
            k=k,
            best=k if official else most,
            count_first_token_twice=official,
        )
        scores = ranking.scores.double()
        shares = scores.softmax(-1) if official else scores.exp()
        found = [
            [
                {"answer": answers[number], "probability": share}
                for number, share in zip(*best, strict=True)
            ]
            for best in zip(
                ranking.indices[:, :most].tolist(), shares[:, :most].tolist(), strict=True
            )
        ]
        return [best[0] | ({"runners_up": best[1:]} if self._runners_up else {}) for best in found]

    def _trie(self, model: VQAModel) -> AnswerTrie:
        """Answer trie for `VQAModel.rank_answers`, cached per device."""
        if model.device not in self._tries:
            rows = self.tokenizer.encode_ids(
                self.options.answers or (), self.config.max_text_length
            )
            self._tries[model.device] = AnswerTrie.of(*self.padded(rows, model.device), self.config)
        return self._tries[model.device]

    def evaluate(
        self, model: VQAModel, records: Sequence[VQARecord], work: Evaluation
    ) -> tuple[Metrics, dict[str, bytes]]:
        # Only the best answer: most others need not be decoded to the end.
        task = copy.copy(self)
        task._runners_up = 0
        return super(VQATask, task).evaluate(model, records, work)

    def metrics_of(self, records: Sequence[VQARecord]) -> Collection[str]:
        people, answered = (
            any(record.people for record in records),
            any(record.answer for record in records),
        )
        return [name for name in self.metrics if (answered if name == "exact_match" else people)]

    def score(self, rows: Sequence[Row], records: Sequence[VQARecord]) -> Metrics:
        """`accuracy`: VQA consensus, also by answer type; `exact_match` with the most frequent answer."""
        # By position: question ids are unique per dataset, and a split may have several datasets.
        given: dict[int, str] = {number: row["answer"] for number, row in enumerate(rows)}
        people = {number: each for number, record in enumerate(records) if (each := record.people)}
        truths = {
            number: Counter(r.answer).most_common(1)[0][0]
            for number, r in enumerate(records)
            if r.answer
        }
        metrics: Metrics = {}
        if people:
            kinds = [records[number].answer_type for number in people]
            found = vqa_accuracy([given[number] for number in people], [*people.values()], kinds)
            metrics["accuracy"] = found.pop("overall")
            metrics |= {f"accuracy_{kind.replace('/', '_')}": each for kind, each in found.items()}
        return metrics | ({"exact_match": 100 * exact_match(given, truths)} if truths else {})

    def files(self, rows: Sequence[Row], records: Sequence[VQARecord]) -> dict[str, bytes]:
        """Submission file for EvalAI."""
        pairs = zip(rows, records, strict=True)
        return json_file(
            RESULT_FILE,
            [{"question_id": each.question_id, "answer": row["answer"]} for row, each in pairs],
        )

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[VQARecord]:
        require_inputs(
            images, texts, "an image and questions about it", ok=len(images) == 1 and bool(texts)
        )
        return [
            VQARecord(image=str(images[0]), question=text, question_id=n)
            for n, text in enumerate(texts)
        ]
