"""The losses of fine-tuning as the official code computes them, in plain PyTorch."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.batches import PairBatch
from xfm_fast.errors import InputError
from xfm_fast.models.heads import DeepMLPHead, MLPHead
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.captioning import CaptioningModel
from xfm_fast.tasks.classification import ClassificationModel
from xfm_fast.tasks.grounding import GroundingModel
from xfm_fast.tasks.nlvr2 import NLVR2Model
from xfm_fast.tasks.vqa import VQAModel

from .official_algorithm import OfficialTrainingTwin, box_losses, mlp_head

_Kind = TypeVar("_Kind", bound=XFM)


class OfficialFineTuningTwin(OfficialTrainingTwin):
    """The loss of each task on the parameters of its model.

    Beside what `OfficialTwin` does: texts come padded to the longest of the batch, and all their positions pass through
    all layers although heads read token 0; the fusion encoder projects the image for every text in every layer, so for
    retrieval three times for each pair, in two passes; the two images of a statement meet the sentence in two passes;
    the states of a question are copied for each of its answers, every copy is projected by every layer of the decoder,
    and logits over the whole vocabulary exist for every position of every answer, padded ones and the last included.

    Arguments are those of the models' own losses. A method needs the model of its task.
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
        head = _model(self.model, NLVR2Model).cls_head
        first, second = self.encode_image(pixels).split(len(input_ids))
        text = self.encode_text(input_ids, attention_mask)
        halves = [self.fuse_pairs(text, attention_mask, image)[:, 0, :] for image in (first, second)]
        return F.cross_entropy(mlp_head(head, torch.cat(halves, dim=-1)), targets)

    def grounding(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, target: Tensor
    ) -> dict[str, Tensor]:  # fmt: skip
        """L1 and GIoU of one box for each expression; arguments as for `GroundingModel`."""
        head = _model(self.model, GroundingModel).bbox_head
        text = self.encode_text(input_ids, attention_mask)
        fused = self.fuse_pairs(text, attention_mask, self.encode_image(pixels))
        boxes = mlp_head(head, fused[:, 0, :]).float().sigmoid()
        return box_losses(boxes, target, torch.ones_like(target[:, 0]))

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
