"""Visual question answering: files, training, ranking of an answer list, and the VQA v2 metric.

Official recipe (VQA v2 with Visual Genome): 480 pixels, 12 decoder layers initialised from the
fusion encoder, 24 questions per GPU, lr 2e-5, 10 epochs; 128 candidates out of 3,129 answers.
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

import torch
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

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
from xfm_fast.errors import ConfigError, DataError
from xfm_fast.models.decoder import DecoderMemory
from xfm_fast.tasks.evaluation import Evaluation, Metrics, Row
from xfm_fast.tasks.task import (
    AugmentedOptions,
    Item,
    Losses,
    PairInput,
    Rng,
    Task,
    json_file,
    register,
    require_inputs,
    unique_images,
)
from xfm_fast.tasks.vqa_model import AnswersByDecoder, AnswerTrie, VQAModel
from xfm_fast.tokenizer import pre_question

RESULT_FILE = "vqa_result.json"
_RUNNERS_UP = 4
_PEOPLE = 10
_SHOWN = 3

# The tables of the VQA v2 evaluation protocol (arXiv 1505.00468), with its oddities: "somebody'd"
# loses its apostrophe, and "Id've", "Im", "Ive" can never match, because words are lower-cased
# first.
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
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The protocol passes a flag where the number of replacements belongs: only the first 32 full stops
# go.
_FULL_STOPS = 32


def strip_punctuation(answer: str) -> str:
    """Remove punctuation next to a space (with a number like 1,000 all); else make it a space."""
    has_number = _DIGIT_COMMA_DIGIT.search(answer) is not None
    stripped = answer
    for mark in _PUNCTUATION:
        remove = has_number or f"{mark} " in answer or f" {mark}" in answer
        stripped = stripped.replace(mark, "" if remove else " ")
    return _FULL_STOP.sub("", stripped, count=_FULL_STOPS)


def normalise_answer(answer: str) -> str:
    """Normalise an answer as the VQA protocol does."""
    words = [_NUMBERS.get(word, word) for word in strip_punctuation(answer).lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(
    predictions: Sequence[str], people: Sequence[Sequence[str]], types: Sequence[str | None]
) -> dict[str, float]:
    """Compute the VQA v2 consensus accuracy in percent, `overall` and by answer type.

    It is rounded to two digits as in the protocol. Full credit is for agreement with three of nine
    annotators.
    """
    scores: dict[str, list[float]] = {"overall": []}
    for prediction, answers, answer_type in zip(predictions, people, types, strict=True):
        answer = normalise_answer(prediction.replace("\n", " ").replace("\t", " ").strip())
        if len(set(answers)) > 1:
            # The annotators' answers get the first step of the normalisation only, and only when
            # they disagree.
            answers = [strip_punctuation(text) for text in answers]
        hits = answers.count(answer)
        # Leaving out one annotator at a time: for those who gave this answer there is one match
        # fewer.
        credits = [min(1.0, (hits - (text == answer)) / 3) for text in answers]
        score = sum(credits) / len(answers)
        scores["overall"].append(score)
        if answer_type is not None:
            scores.setdefault(answer_type, []).append(score)
    return {name: round(100 * sum(values) / len(values), 2) for name, values in scores.items()}


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Return the share of predictions equal to the answer up to outer whitespace."""
    pairs = zip(predictions, answers, strict=True)
    return sum(prediction.strip() == answer.strip() for prediction, answer in pairs) / len(answers)


def _answer_texts(value: Any) -> Any:
    """Return the texts of a list of answers, each a string or an object; leave any other value."""
    if not isinstance(value, (list, tuple)):
        return value
    return [answer.get("answer") if isinstance(answer, dict) else answer for answer in value]


def _is_empty(text: Any) -> bool:
    return isinstance(text, str) and not text.strip()


def _drop_empty(value: Any) -> Any:
    """Return the texts of a list of answers without empty ones."""
    texts = _answer_texts(value)
    if not isinstance(texts, list):
        return texts
    answers = [text for text in texts if not _is_empty(text)]
    if texts and not answers:
        raise PydanticCustomError("blank", "all answers are empty")
    return answers


Answers = Annotated[Texts, BeforeValidator(_drop_empty)]
# Answers of ten annotators for scoring; an empty answer counts.
PeopleAnswers = Annotated[tuple[str, ...], BeforeValidator(_answer_texts)]


class VQARecord(Annotation):
    """A question about an image, optionally with answers."""

    image: Text
    question: Text
    question_id: Identity
    answer: Answers | None = Field(
        default=None, description="answers to train on; empty answers are left out"
    )
    dataset: str = "vqa"
    answers: PeopleAnswers | None = Field(
        default=None, description="the ten annotators' answers, to score by"
    )
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
    """Open questions: official JSON, or VQA v2's `*_questions.json` and `*_annotations.json`."""

    def answer_only(fields: dict[str, Any]) -> Any:
        """Reduce a VQA v2 answer to its text, to save gigabytes; an `object_hook`."""
        return fields["answer"] if "answer" in fields and "answer_id" in fields else fields

    arrays: list[AnnotationRows[Any]] = []
    documents: list[tuple[Path, Mapping[str, Any]]] = []
    for path in find_files(paths):
        content = read_json(path, "official JSON or VQA v2 questions and annotations", answer_only)
        if isinstance(content, dict) and ("questions" in content or "annotations" in content):
            documents.append((path, content))
        else:
            expected = "an array of objects, or VQA v2's {questions} or {annotations}"
            arrays.append(AnnotationRows(path, array_of(path, content, expected)))
    if documents:
        arrays += _join_documents(documents)
    files = as_rows(arrays, VQARecord)
    for rows in files:
        # Empty answers are dropped (the official code trains on them).
        questions: list[str] = []
        for element in rows.elements:
            texts = _answer_texts(element.get("answer")) if isinstance(element, dict) else None
            if isinstance(texts, list):
                questions += [str(element.get("question_id"))] * sum(map(_is_empty, texts))
        if questions:
            first = ", ".join(questions[:_SHOWN])
            rows.notes = (
                f"{rows.name}: {len(questions)} empty answers were left out (question {first})",
            )
    return files


def _join_documents(
    documents: Sequence[tuple[Path, Mapping[str, Any]]],
) -> list[AnnotationRows[Any]]:
    """Join VQA v2 questions with their annotations, one file of rows per question file."""
    annotations: dict[Any, Mapping[str, Any]] = {}
    # Subsets of the data with annotations, by file.
    annotated: dict[Path, Any] = {}
    for path, content in documents:
        if "annotations" not in content:
            continue
        annotated[path] = content.get("data_subtype")
        for annotation in array_of(path, content["annotations"]):
            identity = annotation.get("question_id") if isinstance(annotation, dict) else None
            if isinstance(identity, (int, str)):
                annotations[identity] = annotation
    files = []
    for path, content in documents:
        if "questions" not in content:
            continue
        subtype = content.get("data_subtype", "")
        # test-dev2015 is a subset of the questions about test2015 images.
        split = str(subtype).replace("-dev", "")
        required = subtype in annotated.values()
        values: list[Any] = []
        for question in array_of(path, content["questions"]):
            if isinstance(question, dict):
                question = _join_annotation(question, annotations, split, required=required)
            values.append(question)
        files.append(AnnotationRows(path, values, sources=tuple(annotated)))
    if not files:
        raise DataError(f"{documents[0][0]} holds only annotations; give their questions file too")
    return files


def _join_annotation(
    question: Mapping[str, Any], annotations: Mapping[Any, Any], split: str, *, required: bool
) -> dict[str, Any] | DataError:
    """Join a question with its annotation; a missing image or `required` annotation is an error."""
    identity, image = question.get("question_id"), question.get("image_id")
    if not isinstance(image, int):
        return DataError(
            f"question {identity} has no image (image_id is {image!r}); correct or remove it"
        )
    name = f"{split}/COCO_{split}_{image:012d}.jpg"
    element = {"image": name, "question": question.get("question"), "question_id": identity}
    annotation = annotations.get(identity) if isinstance(identity, (int, str)) else None
    if annotation is not None:
        for name in ("question_type", "answer_type"):
            if name in annotation:
                element[name] = annotation[name]
        # Training takes the annotators' answers, and so does scoring.
        element["answer"] = element["answers"] = annotation.get("answers")
    elif required:
        return DataError(f"question {identity} has no annotation; add it or remove the question")
    return element


def read_answer_list(path: str | os.PathLike[str]) -> list[str]:
    """Read the candidate answers of VQA: a JSON array of unique non-empty strings."""
    path = Path(path)
    answers = array_of(path, read_json(path, "one JSON array of strings"), "one array of strings")
    for index, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(
                f"{path}: answer {index} is {answer!r}; expected a text that is not empty"
            )
    if repeated := [answer for answer, times in Counter(answers).items() if times > 1]:
        raise DataError(
            f"{path}: {', '.join(map(repr, repeated[:_SHOWN]))} occur more than once; keep one of each"
        )
    return answers


class VQAOptions(AugmentedOptions):
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
    def _check_answers(self) -> Self:
        if self.answers is None and not self.generate:
            raise ValueError(
                "there are no answers to rank; give answers=<file>, or generate=true to write them freely"
            )
        if isinstance(self.k, int) and self.k < 1:
            raise ValueError(f"k={self.k} ranks nothing; give a positive number, or all")
        return self

    def completed(self, train: Sequence[Path], root: Path) -> Self:
        """Read the answers of the answer file."""
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
        Tensor  # `[A, La]` int64, padded: the answers of question 0, then of question 1, ...
    )
    answer_mask: Tensor  # `[A, La]`, non-zero for real tokens
    answers_per_question: Tensor  # `[B]` int64
    answer_weights: Tensor  # `[A]`


@register
class VQATask(Task[VQAOptions]):
    """VQA."""

    Options, Session = VQAOptions, AnswersByDecoder
    check_rows = staticmethod(vqa_rows)
    metrics = ("accuracy", "exact_match", "accuracy_yes_no", "accuracy_number", "accuracy_other")
    # The decoder starts from the fusion encoder, far from what it has to learn; the official list
    # is empty.
    large_lr = ("text_decoder",)

    def prepare(self) -> None:
        options = self.options
        answers = options.answers or ()
        k = options.k if isinstance(options.k, int) else 1
        if not options.generate and k > len(answers):
            raise ConfigError(
                f"task.k={options.k}, but there are {len(answers)} answers to rank; give at most that"
            )
        # In the official ranking the padding of a question depends on the rest of its batch.
        self.groups_by_image = not options.official_ranking
        self._runners_up = _RUNNERS_UP
        self._tries: dict[torch.device, AnswerTrie] = {}

    def build(self) -> VQAModel:
        return VQAModel(self.config, decoder_layers=self.options.decoder_layers)

    def rows(
        self, paths: Sequence[Path], split: str | None = None
    ) -> list[AnnotationRows[VQARecord]]:
        files, folders = vqa_rows(paths), self.options.image_folders
        if folders:
            for element in (element for rows in files for element in rows.elements):
                if isinstance(element, dict) and isinstance(element.get("image"), str):
                    folder = folders.get(element.get("dataset") or "vqa", "")
                    element["image"] = str(Path(folder, element["image"]))
        return files

    def item(self, record: VQARecord, rng: Rng) -> Item:
        from xfm_fast.data.transforms import mentions_side

        answers = record.weighted_answers
        if not answers:
            raise DataError(f"question {record.question_id} has no answer; add one or remove it")
        texts = [answer for answer, _ in answers]
        weights = [weight for _, weight in answers]
        question = pre_question(record.question, self.options.max_words)
        ids = self.tokenizer.encode_ids([question], self.options.max_tokens)[0]
        answer_ids = self.tokenizer.encode_ids(texts, self.config.max_text_length)
        may_flip = not mentions_side(record.question, texts)
        image = self.augmented(record.image, rng, may_flip=may_flip)
        return Item(image, ids, [*zip(answer_ids, weights, strict=True)])

    def collate(self, items: list[Item], rng: Rng) -> VQABatch:
        answers, weights = zip(*(pair for item in items for pair in item.target), strict=True)
        answer_ids, answer_mask = self.padded(answers)
        return VQABatch(
            **self.pair_inputs(items),
            answer_ids=answer_ids,
            answer_mask=answer_mask,
            answers_per_question=torch.tensor([len(item.target) for item in items]),
            answer_weights=torch.tensor(weights),
        )

    def losses_of(self, model: Any, batch: VQABatch) -> Losses:
        question = batch.image, batch.input_ids, batch.attention_mask
        answers = batch.answer_ids, batch.answer_mask
        return {
            "loss": model(*question, *answers, batch.answers_per_question, batch.answer_weights)
        }

    def predict(self, model: VQAModel, records: Sequence[VQARecord]) -> list[Row]:
        """Return answers with the probability of generating them, independent of the answer list."""
        images, image_index = unique_images(records)
        memory = model.encode_questions(
            self.pixels_of(images, model),
            *self.padded([self._question_ids(record.question) for record in records], model.device),
            torch.tensor(image_index, device=model.device),
            attend_to_padding=self.options.official_ranking,
        )
        if self.options.generate:
            ids = model.generate(memory)
            probabilities = model.log_likelihoods(memory, ids).exp().tolist()
            texts = [self.tokenizer.decode(answer).strip() for answer in ids.tolist()]
            return [
                {"answer": text, "probability": probability}
                for text, probability in zip(texts, probabilities, strict=True)
            ]
        return self._rank(model, memory)

    def _question_ids(self, question: str) -> list[int]:
        text = pre_question(question, self.options.test_max_words)
        if not text.strip():
            return [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return self.tokenizer.encode_ids([text], self.config.max_text_length)[0]

    def _rank(self, model: VQAModel, memory: DecoderMemory) -> list[Row]:
        """Return the best answer of each question, with its runners-up."""
        official, answers = self.options.official_ranking, self.options.answers or ()
        k = len(answers) if self.options.k == "all" else self.options.k
        count = min(1 + self._runners_up, k)
        ranking = model.rank_answers(
            memory,
            self._trie(model),
            k=k,
            best=k if official else count,
            count_first_token_twice=official,
        )
        scores = ranking.scores.double()
        probabilities = (scores.softmax(-1) if official else scores.exp())[:, :count].tolist()
        rows: list[Row] = []
        for indices, shares in zip(ranking.indices[:, :count].tolist(), probabilities, strict=True):
            row, *runners_up = [
                {"answer": answers[index], "probability": share}
                for index, share in zip(indices, shares, strict=True)
            ]
            if self._runners_up:
                row["runners_up"] = runners_up
            rows.append(row)
        return rows

    def _trie(self, model: VQAModel) -> AnswerTrie:
        """Return the answer trie for `VQAModel.rank_answers`, cached per device."""
        if model.device not in self._tries:
            answers, max_tokens = self.options.answers or (), self.config.max_text_length
            ids = self.tokenizer.encode_ids(answers, max_tokens)
            self._tries[model.device] = AnswerTrie.of(*self.padded(ids, model.device), self.config)
        return self._tries[model.device]

    def evaluate(
        self, model: VQAModel, records: Sequence[VQARecord], work: Evaluation
    ) -> tuple[Metrics, dict[str, bytes]]:
        # Without runners-up most answers need not be decoded to the end.
        task = copy.copy(self)
        task._runners_up = 0
        return super(VQATask, task).evaluate(model, records, work)

    def metrics_of(self, records: Sequence[VQARecord]) -> Collection[str]:
        has_people = any(record.people for record in records)
        has_answer = any(record.answer for record in records)
        return [
            name for name in self.metrics if (has_answer if name == "exact_match" else has_people)
        ]

    def score(self, rows: Sequence[Row], records: Sequence[VQARecord]) -> Metrics:
        """Compute the consensus accuracy, and `exact_match` with the most frequent answer."""
        # By position: question ids are unique per dataset, and a split may have several datasets.
        pairs = [(row["answer"], record) for row, record in zip(rows, records, strict=True)]
        metrics: Metrics = {}
        if judged := [(answer, record) for answer, record in pairs if record.people]:
            accuracies = vqa_accuracy(
                [answer for answer, _ in judged],
                [record.people or () for _, record in judged],
                [record.answer_type for _, record in judged],
            )
            metrics["accuracy"] = accuracies.pop("overall")
            for answer_type, accuracy in accuracies.items():
                metrics[f"accuracy_{answer_type.replace('/', '_')}"] = accuracy
        if answered := [(answer, record.answer) for answer, record in pairs if record.answer]:
            truths = [Counter(texts).most_common(1)[0][0] for _, texts in answered]
            metrics["exact_match"] = 100 * exact_match([answer for answer, _ in answered], truths)
        return metrics

    def files(self, rows: Sequence[Row], records: Sequence[VQARecord]) -> dict[str, bytes]:
        """Return the submission file for EvalAI."""
        answers = [
            {"question_id": record.question_id, "answer": row["answer"]}
            for row, record in zip(rows, records, strict=True)
        ]
        return json_file(RESULT_FILE, answers)

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[VQARecord]:
        valid = len(images) == 1 and bool(texts)
        require_inputs(images, texts, "an image and questions about it", ok=valid)
        image = str(images[0])
        return [
            VQARecord(image=image, question=text, question_id=index)
            for index, text in enumerate(texts)
        ]
