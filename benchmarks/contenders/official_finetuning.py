"""Fine-tuning as the official code computes it, losses and what is evaluated, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.batches import PairBatch
from xfm_fast.errors import InputError
from xfm_fast.models.decoder import beam_search
from xfm_fast.models.heads import DeepMLPHead, MLPHead
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.captioning import CaptioningModel
from xfm_fast.tasks.classification import ClassificationModel
from xfm_fast.tasks.grounding import GroundingModel
from xfm_fast.tasks.nlvr2 import NLVR2Model
from xfm_fast.tasks.task_model import TaskModel
from xfm_fast.tasks.vqa import AnswerRanking, VQAModel

from .engine import AnswerList, Clock, Engine, Part, TaskEngine, parts_under
from .official_algorithm import OfficialAnswerTwin, OfficialEngine, OfficialTrainingTwin, box_losses, mlp_head

_Kind = TypeVar("_Kind", bound=XFM)


class OfficialFineTuningTwin(OfficialTrainingTwin):
    """The loss of each task on the parameters of its model.

    In addition to `OfficialTwin`: texts are padded to the longest of the batch, and all their positions pass through
    all layers although heads read token 0; the fusion encoder projects the image for every text in every layer, for
    retrieval three times for each pair, in two passes; the two images of a statement are fused in two passes; the
    states of a question are copied for each of its answers, every layer of the decoder projects every copy, and logits
    over the vocabulary exist for every position of every answer, also for padded ones and the last.

    Arguments are those of the losses of the models. A method needs the model of its task.
    """

    def retrieval(self, batch: PairBatch, hard_negatives: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """ITC and ITM, whose gradient reaches the text encoder as it does not in pretraining."""
        image = self.encode_image(batch.image)
        text = self.encode_text(batch.input_ids, batch.attention_mask)
        return self.contrast_and_match(
            batch.attention_mask, image, text, text, image_ids=batch.image_ids, hard_negatives=hard_negatives
        )

    def answers(
        self, pixels: Tensor, question_ids: Tensor, question_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor,
        answers_per_question: Tensor, answer_weights: Tensor,
    ) -> Tensor:  # fmt: skip
        """VQA: weighted likelihoods of the answers, over the number of questions; arguments as for `VQAModel`."""
        decoder = _model(self.model, VQAModel).text_decoder
        text = self.encode_text(question_ids, question_mask)
        questions = self.fuse_pairs(text, question_mask, self.encode_image(pixels))
        states: list[Tensor] = []
        masks: list[Tensor] = []
        for state, mask, copies in zip(questions, question_mask, answers_per_question.tolist(), strict=True):
            states += [state] * copies
            masks += [mask] * copies
        logits = self.decode(decoder, answer_ids, answer_mask, torch.stack(states), torch.stack(masks))
        targets = answer_ids.masked_fill(answer_mask == 0, -100)[:, 1:].contiguous()
        shifted = logits[:, :-1].contiguous()
        losses = F.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.view(-1), reduction="none")
        return (answer_weights * losses.view(len(answer_ids), -1).sum(1)).sum() / len(pixels)

    def statements(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> Tensor:
        """NLVR2: cross-entropy; arguments as for `NLVR2Model`."""
        return F.cross_entropy(self.statement_logits(pixels, input_ids, attention_mask), targets)

    def statement_logits(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, 2]` of sentences `[B, L]`; `[2B, 3, R, R]` are the first images of all, then the second ones."""
        head = _model(self.model, NLVR2Model).cls_head
        first, second = self.encode_image(pixels).split(len(input_ids))
        text = self.encode_text(input_ids, attention_mask)
        halves = [self.fuse_pairs(text, attention_mask, image)[:, 0, :] for image in (first, second)]
        return mlp_head(head, torch.cat(halves, dim=-1))

    def grounding(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, target: Tensor
    ) -> dict[str, Tensor]:  # fmt: skip
        """L1 and GIoU of one box for each expression; arguments as for `GroundingModel`."""
        boxes = self.boxes(pixels, input_ids, attention_mask)
        return box_losses(boxes, target, torch.ones_like(target[:, 0]))

    def boxes(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, 4]` boxes of expressions `[B, L]`, each with its image."""
        head = _model(self.model, GroundingModel).bbox_head
        text = self.encode_text(input_ids, attention_mask)
        fused = self.fuse_pairs(text, attention_mask, self.encode_image(pixels))
        return mlp_head(head, fused[:, 0, :]).float().sigmoid()

    def captions(
        self, pixels: Tensor, caption_ids: Tensor, caption_mask: Tensor, prompt_length: int, label_smoothing: float
    ) -> Tensor:
        """Captioning: mean over the tokens behind the prompt; arguments as for `CaptioningModel`."""
        decoder = _model(self.model, CaptioningModel).text_decoder
        image = self.encode_image(pixels)
        everywhere = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        logits = self.decode(decoder, caption_ids, caption_mask, image, everywhere)[:, :-1].contiguous()
        targets = caption_ids.masked_fill(caption_mask == 0, -100)
        targets[:, :prompt_length] = -100
        return F.cross_entropy(
            logits.view(-1, logits.shape[-1]), targets[:, 1:].flatten(), label_smoothing=label_smoothing
        )

    def write_captions(
        self, pixels: Tensor, prompt_ids: Tensor, *, max_length: int, min_length: int, num_beams: int
    ) -> Tensor:
        """Captions `[B, L]` by beam search; arguments as for `CaptioningModel.generate`.

        As transformers 4.12.5 searches, on which the official code builds: every beam has a copy of the image, and of
        its keys and values in every layer, which follow the beams from step to step.
        """
        decoder = _model(self.model, CaptioningModel).text_decoder
        image = self.encode_image(pixels).repeat_interleave(num_beams, 0)
        prompts = prompt_ids.expand(len(pixels), -1)
        logits, past = self.decode_next(decoder, prompts.repeat_interleave(num_beams, 0), image, [])

        def advance(rows: Tensor, tokens: Tensor) -> Tensor:
            nonlocal past
            past = [tuple(part.index_select(0, rows) for part in layer) for layer in past]
            logits, past = self.decode_next(decoder, tokens[:, None], image, past)
            return logits

        return beam_search(
            logits, advance, prompts, max_length=max_length, min_length=min_length, num_beams=num_beams,
            pad_token_id=self.config.pad_token_id, eos_token_id=self.config.eos_token_id,
        )  # fmt: skip

    def texts(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> Tensor:
        """Classes of texts from token 0: cross-entropy."""
        head = _model(self.model, ClassificationModel).cls_head
        logits = mlp_head(_head(head), self.encode_text(input_ids, attention_mask)[:, 0, :])
        return F.cross_entropy(logits, targets)

    def images(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Classes of images from the image token beside the mean of the patches: cross-entropy."""
        head = _model(self.model, ClassificationModel).cls_head
        embeds = self.encode_image(pixels)
        logits = mlp_head(_head(head), torch.cat((embeds[:, 0, :], embeds[:, 1:].mean(1)), dim=-1))
        return F.cross_entropy(logits, targets)


def _model(model: XFM, kind: type[_Kind]) -> _Kind:
    if not isinstance(model, kind):
        raise InputError(f"the model is a {type(model).__name__}; this loss needs a {kind.__name__}")
    return model


def _head(head: object) -> MLPHead | DeepMLPHead:
    if not isinstance(head, (MLPHead, DeepMLPHead)):
        raise InputError(f"the head is a {type(head).__name__}; the official code has MLPHead or DeepMLPHead")
    return head


def official_engine(model: XFM) -> Engine | TaskEngine:
    """The engine of a model, with or without a task."""
    return OfficialTaskEngine(model) if isinstance(model, TaskModel) else OfficialEngine(model)


class OfficialTaskEngine:
    """A fine-tuned model as the official evaluation runs it: every text has an image of its own, which is encoded."""

    def __init__(self, model: TaskModel) -> None:
        self._twin = OfficialFineTuningTwin(model)
        self._answers = OfficialAnswerTwin(model) if isinstance(model, VQAModel) else None

    @contextmanager
    def _staged(self, clock: Clock, rest: str) -> Iterator[None]:
        twin = self._answers or self._twin
        parts = [Part(twin, f"encode_{what}", f"{what} encoder") for what in ("image", "text")]
        with parts_under(clock, [*parts, Part(twin, "fuse_pairs", "fusion")], rest):
            yield

    def statements(self, pixels: Tensor, ids: Tensor, mask: Tensor, clock: Clock) -> Tensor:
        with self._staged(clock, "head"):
            return self._twin.statement_logits(pixels, ids, mask)

    def boxes(self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor, clock: Clock) -> Tensor:
        with self._staged(clock, "head"):
            return self._twin.boxes(pixels[image_of], ids, mask)

    def captions(
        self, pixels: Tensor, prompt: Tensor, longest: int, shortest: int, beams: int, clock: Clock
    ) -> Tensor:  # fmt: skip
        with self._staged(clock, "decoder"):
            return self._twin.write_captions(
                pixels, prompt, max_length=longest, min_length=shortest, num_beams=beams
            )  # fmt: skip

    def answers(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor, answers: AnswerList, clock: Clock
    ) -> AnswerRanking:
        """The questions one after another, each without padding."""
        if self._answers is None:
            raise InputError("the model ranks no answers; this needs a VQAModel")
        found = []
        with self._staged(clock, "decoder"):
            for image, question, length in zip(image_of.tolist(), ids, mask.sum(1).tolist(), strict=True):
                alone = question[None, :length]
                asked = pixels[image : image + 1], alone, torch.ones_like(alone)
                found.append(self._answers.rank_answers(*asked, answers.ids, answers.mask, k=answers.k))
        return AnswerRanking(*(torch.cat(parts) for parts in zip(*found, strict=True)))
