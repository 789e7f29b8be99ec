"""Visual question answering: a decoder is trained to write answers, and ranks a list of known answers at inference.

Recipe of the official code (VQA v2 with Visual Genome): 480 pixels, 12 decoder layers that start from the fusion
encoder, 24 questions per GPU, lr 2e-5, 10 epochs; 128 candidates out of 3,129 answers. Accuracies are the consensus
accuracy of VQA v2, and exact match.
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
    """`[Q, best]` rows of the answer list."""
    scores: Tensor
    """`[Q, best]` log-likelihood of each answer given the question."""

    @property
    def probabilities(self) -> Tensor:
        """`[Q, best]`: softmax over the answers that are here, which is not the probability over all answers."""
        return self.scores.softmax(-1)


class VQAModel(TaskModel):
    """X-FM with an answer decoder on top of the fusion encoder.

    Args:
        config: sizes.
        decoder_layers: layers of the decoder, all with cross-attention (official `num_dec_layers`).
    """

    own_parts = ("text_decoder.",)

    def __init__(self, config: XFMConfig, *, decoder_layers: int = 12) -> None:
        super().__init__(config, heads=())
        self.text_decoder = TextDecoder(config, decoder_layers, config.text_width)

    def initialise_decoder(self, state: Mapping[str, Tensor]) -> list[str]:
        """Start the decoder from the fusion encoder of a pretraining state dict; see `TextDecoder.initialise_from`."""
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
        """The decoder's memory: keys and values of Q questions that have seen their image.

        Args:
            pixels: `[B, 3, R, R]`.
            question_ids: `[Q, L]`.
            question_mask: `[Q, L]`, non-zero for real tokens; by default everything but padding.
            image_index: `[Q]` image of each question, so that an image with several questions is encoded once; by
                default question b belongs to image b.
            attend_to_padding: the official evaluation (not its training) lets the decoder attend to padded question
                tokens, so that an answer depends on the other questions of the batch. True reproduces it.
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
        """Training loss: weighted negative log-likelihoods of the answers, summed and divided by the questions.

        Args:
            pixels, question_ids, question_mask, image_index: as in `encode_questions`.
            answer_ids: `[A, La]` the answers of question 0, then of question 1, ...: `<s> ... </s>`, padded.
            answer_mask: `[A, La]`, real tokens first; by default everything but padding.
            answers_per_question: `[Q]` integers that sum to A.
            answer_weights: `[A]`.

        Returns:
            A scalar.

        Raises:
            InputError: numbers that do not add up, or anything the encoders cannot accept.
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
        """The likeliest answers out of N: k candidates by their first token, ranked by their exact log-likelihood.

        What candidates begin with in common is decoded once per question (see `answer_trie`); the official code decodes
        every candidate whole and padded.

        Args:
            memory: from `encode_questions`.
            answers: the answer list as `AnswerTrie.of` makes it, once for all batches; or its ids `[N, La]`, tokenised
                with `<s> ... </s>` and padded.
            answer_mask: of ids, `[N, La]`, real tokens first; by default everything but padding.
            k: number of candidates; N ranks all answers exactly.
            best: how many of the candidates are wanted, by default all k. Candidates that cannot be among the best are
                not decoded to their end: the answer out of all N (k = N, best = 1) then costs less than 128 candidates
                do officially, and with a model that knows what it says, a few prefixes.
            count_first_token_twice: the official score adds the log-probability of the first answer token once more,
                which favours answers whose first token is likely. True reproduces it.

        Returns:
            Indices and scores `[Q, best]`.

        Raises:
            InputError: k outside 1..N, best outside 1..k, or answers that do not start alike or hold fewer than two
                tokens.
        """
        trie = answers if isinstance(answers, AnswerTrie) else AnswerTrie.of(answers, answer_mask, self.config)

        def tree_of(part: DecoderMemory) -> PackedTree:
            return PackedTree(self.text_decoder, part, trie)

        return AnswerRanking(*rank(tree_of, memory, trie, k=k, best=best, first_token_twice=count_first_token_twice))

    @torch.no_grad()
    def log_likelihoods(self, memory: DecoderMemory, answer_ids: Tensor) -> Tensor:
        """How likely the model is to write answers `[Q, La]`, one for each question: `[Q]` log-likelihoods."""
        each = ImageGroups(torch.arange(len(answer_ids) + 1, device=answer_ids.device))
        mask = answer_ids != self.config.pad_token_id
        return -self.text_decoder.token_losses(answer_ids, mask, memory, each).double().sum(1)

    @torch.no_grad()
    def generate(
        self, memory: DecoderMemory, *, max_length: int = 20, num_beams: int = 1, length_penalty: float = 1.0
    ) -> Tensor:
        """Answers written freely, without a list; questions of different lengths share a batch.

        Args:
            memory: from `encode_questions`, of Q questions.
            max_length: of an answer in tokens, `<s>` and `</s>` included.
            num_beams, length_penalty: see `models.decoder.generate`.

        Returns:
            `[Q, length]` ids: `<s>`, the answer, `</s>`, then padding; without `</s>` where `max_length` cut it off.

        Raises:
            InputError: a length that the decoder has no positions for, or no beams.
        """
        config = self.config
        prompt = torch.full((memory.states, 1), config.bos_token_id, device=memory.cu_seqlens.device)
        return generate(
            self.text_decoder, memory, prompt, max_length=max_length, num_beams=num_beams,
            length_penalty=length_penalty, pad_token_id=config.pad_token_id, eos_token_id=config.eos_token_id,
        )  # fmt: skip


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
    """Share of questions whose prediction is the answer, outer whitespace aside, as the official script prints it.

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
