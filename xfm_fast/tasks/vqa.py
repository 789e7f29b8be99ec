"""Visual question answering: a decoder is trained to write answers, and ranks a list of known answers at inference.

Recipe of the official code (VQA v2 with Visual Genome): 480 pixels, 12 decoder layers that start from the fusion
encoder, 24 questions per GPU, lr 2e-5, 10 epochs; 128 candidates out of 3,129 answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.models import inputs
from xfm_fast.models.decoder import DecoderCache, DecoderMemory, SharedPrefix, TextDecoder
from xfm_fast.packing import ImageGroups, Packing, offsets
from xfm_fast.tasks.task_model import TaskModel


class AnswerRanking(NamedTuple):
    """The best answers of Q questions, best first."""

    indices: Tensor
    """`[Q, k]` rows of the answer list."""
    scores: Tensor
    """`[Q, k]` log-likelihood of each answer given the question."""

    @property
    def probabilities(self) -> Tensor:
        """`[Q, k]`: softmax over the k candidates, which is not the probability over all answers."""
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
        """What the decoder reads: keys and values of Q questions that have seen their image.

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
        mask = _check_answers(answer_ids, answer_mask, self.config)
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
        answer_ids: Tensor,
        answer_mask: Tensor | None = None,
        *,
        k: int = 128,
        count_first_token_twice: bool = False,
    ) -> AnswerRanking:
        """The k likeliest answers out of N: candidates by their first token, ranked by their exact log-likelihood.

        `<s>` is decoded once per question and shared by all its candidates, of which only the tokens that are followed
        by another one are decoded; the official code decodes every candidate whole and padded.

        Args:
            memory: from `encode_questions`.
            answer_ids: `[N, La]` the answer list, tokenised with `<s> ... </s>` and padded.
            answer_mask: `[N, La]`, real tokens first; by default everything but padding.
            k: number of candidates; N ranks all answers exactly.
            count_first_token_twice: the official score adds the log-probability of the first answer token once more,
                which favours answers whose first token is likely. True reproduces it.

        Raises:
            InputError: k outside 1..N, or answers that do not start alike or hold fewer than two tokens.
        """
        mask = _check_answers(answer_ids, answer_mask, self.config)
        questions, answers = memory.states, answer_ids.shape[0]
        if not 1 <= k <= answers:
            raise InputError(f"k={k}; with {answers} answers it must be 1 to {answers}")
        decoder = self.text_decoder
        start = DecoderCache(1)
        hidden = self._decode_start(memory, answer_ids, start)
        first = decoder.logits(hidden).log_softmax(-1).index_select(1, answer_ids[:, 1].long())
        candidates = first.topk(k, dim=1).indices
        scores = first.gather(1, candidates)
        if count_first_token_twice:
            scores = 2 * scores
        if answer_ids.shape[1] > 2:
            chosen = candidates.flatten()
            rows = torch.arange(questions, device=chosen.device)
            packing = Packing.from_mask(mask[chosen, 2:])
            groups = ImageGroups(torch.arange(questions + 1, device=chosen.device) * k)
            prefix = SharedPrefix(start, rows.repeat_interleave(k))
            hidden = decoder(answer_ids[chosen, 1:-1], packing, memory, groups, past=prefix)
            losses = decoder.cross_entropy(hidden, packing.pack(answer_ids[chosen, 2:]).long())
            scores = scores - packing.unpad(losses).sum(1).view(questions, k)
        ranked = scores.topk(k, dim=1)
        return AnswerRanking(candidates.gather(1, ranked.indices), ranked.values)

    def _decode_start(self, memory: DecoderMemory, answer_ids: Tensor, cache: DecoderCache) -> Tensor:
        """Hidden state after `<s>` of every question, `[Q, width]`; `cache` receives its keys and values."""
        start = answer_ids[:1, :1].expand(memory.states, 1)
        one_each = ImageGroups(torch.arange(memory.states + 1, device=start.device))
        return self.text_decoder(start, Packing.from_mask(torch.ones_like(start)), memory, one_each, past=cache)


def _check_answers(answer_ids: Tensor, answer_mask: Tensor | None, config: XFMConfig) -> Tensor:
    """Returns the boolean mask of answers that start with the same token and have another one to predict."""
    mask = inputs.check_tokens(answer_ids, answer_mask, config)
    if answer_ids.shape[1] < 2:
        raise InputError(f"answer_ids are {[*answer_ids.shape]}; an answer has at least <s> and </s>")
    if answer_ids.device.type == "cpu":
        if not bool(mask[:, :2].all()):
            row = int(mask[:, :2].all(1).long().argmin())
            raise InputError(f"answer {row} holds fewer than two tokens; answers are tokenised with <s> and </s>")
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise InputError("answer_mask has gaps; the real tokens of an answer come first")
        if bool((answer_ids[:, 0] != answer_ids[0, 0]).any()):
            row = int((answer_ids[:, 0] != answer_ids[0, 0]).long().argmax())
            raise InputError(f"answer {row} starts with token {int(answer_ids[row, 0])}, answer 0 with another one")
    return mask
