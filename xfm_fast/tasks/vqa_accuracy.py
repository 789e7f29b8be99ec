"""The accuracies of visual question answering: the consensus accuracy of VQA v2, and exact match."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xfm_fast.errors import DataError

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
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The protocol passes a flag where the number of replacements belongs: only the first 32 full stops go.
_FULL_STOPS = 32


def strip_punctuation(answer: str) -> str:
    """Remove punctuation that stands beside a space (or anywhere, if the answer has a number like 1,000), replace the
    rest by spaces, and remove full stops that are no decimal points.
    """
    number = _DIGIT_COMMA_DIGIT.search(answer) is not None
    out = answer
    for mark in _PUNCTUATION:
        loose = number or f"{mark} " in answer or f" {mark}" in answer
        out = out.replace(mark, "" if loose else " ")
    return _FULL_STOP.sub("", out, count=_FULL_STOPS)


def normalise_answer(answer: str) -> str:
    """An answer as the VQA protocol compares it: no punctuation, lower case, digits for numbers, no articles, and
    contractions with their apostrophe.
    """
    words = [_NUMBERS.get(word, word) for word in strip_punctuation(answer).lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


@dataclass(frozen=True)
class VQAAccuracy:
    """Accuracies in percent, rounded to two digits as the protocol rounds them."""

    overall: float
    per_question: dict[int, float]
    per_question_type: dict[str, float]
    per_answer_type: dict[str, float]


def vqa_accuracy(predictions: Mapping[int, str], annotations: Iterable[Mapping[str, Any]]) -> VQAAccuracy:
    """The VQA v2 accuracy: an answer is right to the extent that three people out of the other nine gave it.

    Args:
        predictions: question id → answer.
        annotations: of the annotated questions, in the official format: `question_id`, `answers` (a list of mappings
            with `answer`), and optionally `question_type` and `answer_type`.

    Raises:
        DataError: a question without a prediction, or no questions.
    """
    scores: dict[int, float] = {}
    kinds: dict[str, dict[str, list[float]]] = {"question_type": {}, "answer_type": {}}
    for annotation in annotations:
        question = annotation["question_id"]
        if question not in predictions:
            raise DataError(f"question {question} has no prediction; predict an answer for every annotated question")
        score = _consensus(predictions[question], [answer["answer"] for answer in annotation["answers"]])
        scores[question] = score
        for kind, found in kinds.items():
            if kind in annotation:
                found.setdefault(annotation[kind], []).append(score)
    if not scores:
        raise DataError("there are no annotations; an accuracy needs at least one question")
    by_type = {kind: {name: _percent(of) for name, of in found.items()} for kind, found in kinds.items()}
    return VQAAccuracy(
        _percent(list(scores.values())),
        {question: _percent([score]) for question, score in scores.items()},
        by_type["question_type"],
        by_type["answer_type"],
    )


def _consensus(prediction: str, answers: Sequence[str]) -> float:
    given = prediction.replace("\n", " ").replace("\t", " ").strip()
    if len(set(answers)) > 1:
        # People's answers get the first step of the normalisation only, and only when they disagree.
        answers = [strip_punctuation(answer) for answer in answers]
    given = normalise_answer(given)
    hits = answers.count(given)
    # Leaving out one person at a time: those who gave this answer have one match fewer.
    return sum(min(1.0, (hits - (answer == given)) / 3) for answer in answers) / len(answers)


def _percent(scores: Sequence[float]) -> float:
    return round(100 * sum(scores) / len(scores), 2)


def exact_match(predictions: Mapping[int, str], answers: Mapping[int, str]) -> float:
    """Share of questions whose prediction is the answer, outer whitespace aside: what the official script prints.

    Args:
        predictions: question id → answer.
        answers: question id → the right answer.

    Raises:
        DataError: a question without a prediction, or no questions.
    """
    missing = [question for question in answers if question not in predictions]
    if missing or not answers:
        raise DataError(f"{len(missing)} of {len(answers)} questions have no prediction; predict an answer for each")
    return sum(predictions[question].strip() == answer.strip() for question, answer in answers.items()) / len(answers)
