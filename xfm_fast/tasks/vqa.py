"""Visual question answering: a decoder trained to generate answers, which ranks an answer list at inference.

Official recipe (VQA v2 with Visual Genome): 480 pixels, 12 decoder layers initialised from the fusion encoder, 24
questions per GPU, lr 2e-5, 10 epochs; 128 candidates out of 3,129 answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import DataError, InputError
from xfm_fast.models import inputs
from xfm_fast.models.decoder import DecoderMemory, TextDecoder, generate
from xfm_fast.packing import ImageGroups, offsets
from xfm_fast.tasks.answer_trie import AnswerTrie, PackedTree, check_answers, rank
from xfm_fast.tasks.task_model import TaskModel

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


class AnswerRanking(NamedTuple):
    """The best answers of Q questions, best first."""

    indices: Tensor
    """`[Q, best]` indices into the answer list."""
    scores: Tensor
    """`[Q, best]` log-likelihood of each answer given the question."""

    @property
    def probabilities(self) -> Tensor:
        """`[Q, best]`: softmax over the returned answers only."""
        return self.scores.softmax(-1)


class VQAModel(TaskModel):
    """X-FM with an answer decoder of `decoder_layers` (official `num_dec_layers`) on the fusion encoder."""

    own_parts = ("text_decoder.",)

    def __init__(self, config: XFMConfig, *, decoder_layers: int = 12) -> None:
        super().__init__(config, heads=())
        self.text_decoder = TextDecoder(config, decoder_layers, config.text_width)

    def initialise_decoder(self, state: Mapping[str, Tensor]) -> list[str]:
        """Initialise the decoder from the fusion encoder of a pretraining state dict."""
        return self.text_decoder.initialise_from(state, "fusion_encoder")

    def _start_own_parts(self, pretrained: Mapping[str, Tensor], fresh: list[str]) -> list[str]:
        return [f"text_decoder.{name}" for name in self.initialise_decoder(pretrained)]

    def encode_questions(
        self,
        pixels: Tensor,
        question_ids: Tensor,
        question_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        *,
        attend_to_padding: bool = False,
    ) -> DecoderMemory:
        """Decoder memory of Q questions `[Q, L]` fused with their images (`image_index` `[Q]`).

        `attend_to_padding` reproduces the official evaluation, whose decoder attends to padding, so that an answer
        depends on the rest of the batch.
        """
        mask = inputs.check_tokens(question_ids, question_mask, self.config)
        memory = self.image_memory(self.encode_image(pixels))
        text = self.encode_text(question_ids, mask, keep_padding=attend_to_padding)
        states = self.fuse(text, mask, memory, image_index, keep_padding=attend_to_padding)
        return self.text_decoder.memory(states, None if attend_to_padding else mask)

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
        if answers_per_question.shape != (questions,) or answer_weights.shape != (answers,):
            raise InputError(
                f"answers_per_question is {[*answers_per_question.shape]} and answer_weights "
                f"{[*answer_weights.shape]}; they must be [{questions}] and [{answers}]"
            )
        if answers_per_question.device.type == "cpu" and int(answers_per_question.sum()) != answers:
            raise InputError(
                f"answers_per_question sum to {int(answers_per_question.sum())}; there are {answers} answers"
            )
        memory = self.encode_questions(pixels, question_ids, question_mask, image_index)
        groups = ImageGroups(offsets(answers_per_question.to(answer_ids.device)))
        losses = self.text_decoder.token_losses(answer_ids, mask, memory, groups)
        return (answer_weights * losses.sum(1)).sum() / questions

    @torch.no_grad()
    def rank_answers(
        self,
        memory: DecoderMemory,
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
        trie = answers if isinstance(answers, AnswerTrie) else AnswerTrie.of(answers, answer_mask, self.config)

        def tree_of(part: DecoderMemory) -> PackedTree:
            return PackedTree(self.text_decoder, part, trie)

        return AnswerRanking(*rank(tree_of, memory, trie, k=k, best=best, first_token_twice=count_first_token_twice))

    @torch.no_grad()
    def log_likelihoods(self, memory: DecoderMemory, answer_ids: Tensor) -> Tensor:
        """Log-likelihood `[Q]` of one answer `[Q, La]` per question."""
        each = ImageGroups(torch.arange(len(answer_ids) + 1, device=answer_ids.device))
        mask = answer_ids != self.config.pad_token_id
        return -self.text_decoder.token_losses(answer_ids, mask, memory, each).double().sum(1)

    @torch.no_grad()
    def generate(
        self, memory: DecoderMemory, *, max_length: int = 20, num_beams: int = 1, length_penalty: float = 1.0
    ) -> Tensor:
        """Generate answers freely: `[Q, length]` ids with `<s>` and `</s>`, padded."""
        config = self.config
        prompt = torch.full((memory.states, 1), config.bos_token_id, device=memory.cu_seqlens.device)
        return generate(
            self.text_decoder, memory, prompt, max_length=max_length, num_beams=num_beams,
            length_penalty=length_penalty, pad_token_id=config.pad_token_id, eos_token_id=config.eos_token_id,
        )  # fmt: skip


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


@dataclass(frozen=True)
class VQAAccuracy:
    """Accuracies in percent, rounded to two digits as in the protocol."""

    overall: float
    per_question: dict[int, float]
    per_question_type: dict[str, float]
    per_answer_type: dict[str, float]


def vqa_accuracy(predictions: Mapping[int, str], annotations: Iterable[Mapping[str, Any]]) -> VQAAccuracy:
    """VQA v2 consensus accuracy of answers by question id: full credit for agreement with three of nine annotators."""
    scores: dict[int, float] = {}
    kinds: dict[str, dict[str, list[float]]] = {"question_type": {}, "answer_type": {}}
    for annotation in annotations:
        question = annotation["question_id"]
        if question not in predictions:
            raise DataError(f"question {question} has no prediction; predict an answer for every annotated question")
        given = normalise_answer(predictions[question].replace("\n", " ").replace("\t", " ").strip())
        answers = [answer["answer"] for answer in annotation["answers"]]
        if len(set(answers)) > 1:
            # People's answers get the first step of the normalisation only, and only when they disagree.
            answers = [strip_punctuation(answer) for answer in answers]
        hits = answers.count(given)
        # Leaving out one person at a time: those who gave this answer have one match fewer.
        score = sum(min(1.0, (hits - (answer == given)) / 3) for answer in answers) / len(answers)
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


def _percent(scores: Sequence[float]) -> float:
    return round(100 * sum(scores) / len(scores), 2)


def exact_match(predictions: Mapping[int, str], answers: Mapping[int, str]) -> float:
    """Share of predictions equal to the answer up to outer whitespace, as in the official script."""
    missing = [question for question in answers if question not in predictions]
    if missing or not answers:
        raise DataError(f"{len(missing)} of {len(answers)} questions have no prediction; predict an answer for each")
    return sum(predictions[question].strip() == answer.strip() for question, answer in answers.items()) / len(answers)
