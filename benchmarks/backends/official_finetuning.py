"""Fine-tuning and evaluation as the official code computes them, in plain PyTorch, and the official engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.batches import PairBatch
from xfm_fast.models.decoder import beam_search
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.vqa_model import AnswerRanking

from .engine import AnswerList, Engine, Everything, Pairs, SearchIndex
from .official_algorithm import OfficialTrainingTwin, box_losses, mlp_head


class OfficialFineTuningTwin(OfficialTrainingTwin):
    """The loss of each task, and what its evaluation computes, on the parameters of its model.

    In addition to `OfficialTwin`: texts are padded to the longest of the batch, and all their positions pass through
    all layers although heads read token 0; the fusion encoder projects the image for every text in every layer, for
    retrieval three times for each pair, in two passes; the two images of a statement are fused in two passes; the
    states of a question are copied for each of its answers, every layer of the decoder projects every copy, and logits
    over the vocabulary exist for every position of every answer, also for padded ones and the last.

    Arguments are as for the losses of the models. A method needs the model of its task.
    """

    def retrieval(
        self, batch: PairBatch, hard_negatives: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """ITC and ITM, whose gradient reaches the text encoder as it does not in pretraining."""
        image = self.encode_image(batch.image)
        text = self.encode_text(batch.input_ids, batch.attention_mask)
        return self.contrast_and_match(
            batch.attention_mask,
            image,
            text,
            text,
            image_ids=batch.image_ids,
            hard_negatives=hard_negatives,
        )

    def answers(
        self, pixels: Tensor, question_ids: Tensor, question_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor,
        answers_per_question: Tensor, answer_weights: Tensor,
    ) -> Tensor:  # fmt: skip
        """VQA: weighted likelihoods of the answers, over the number of questions; arguments as for `VQAModel`."""
        text = self.encode_text(question_ids, question_mask)
        questions = self.fuse_pairs(text, question_mask, self.encode_image(pixels))
        states: list[Tensor] = []
        masks: list[Tensor] = []
        for state, mask, copies in zip(
            questions, question_mask, answers_per_question.tolist(), strict=True
        ):
            states += [state] * copies
            masks += [mask] * copies
        losses = self._answer_losses(
            answer_ids, answer_mask, torch.stack(states), torch.stack(masks)
        )
        return (answer_weights * losses).sum() / len(pixels)

    def _answer_losses(
        self, ids: Tensor, mask: Tensor, states: Tensor, state_mask: Tensor
    ) -> Tensor:
        """`[A]` negative log-likelihoods of answers `[A, L]`, each with states `[A, M, width]`."""
        logits = self.decode(self.model.text_decoder, ids, mask, states, state_mask)[
            :, :-1
        ].contiguous()
        targets = ids.masked_fill(mask == 0, -100)[:, 1:].contiguous()
        losses = F.cross_entropy(
            logits.view(-1, logits.shape[-1]), targets.view(-1), reduction="none"
        )
        return losses.view(len(ids), -1).sum(1)

    def rank_answers(
        self, pixels: Tensor, question_ids: Tensor, question_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor,
        k: int,
    ) -> AnswerRanking:  # fmt: skip
        """The k best of N answers `[N, La]` for Q questions `[Q, L]` with an image `[Q, 3, R, R]` each.

        As the official evaluation of VQA v2: an image is encoded for each of its questions; after the first tokens of
        all answers are compared, the k candidates of a question are decoded from `<s>` on, padded to the longest answer
        of the list, each with a copy of the question's states, padded tokens included; the first token counts twice.
        """
        text = self.encode_text(question_ids, question_mask)
        states = self.fuse_pairs(text, question_mask, self.encode_image(pixels))
        begun, every = (
            answer_ids[:1, :1].repeat(len(states), 1),
            torch.ones(states.shape[:2], device=states.device),
        )
        first = self.decode(self.model.text_decoder, begun, torch.ones_like(begun), states, every)[
            :, 0
        ]
        likeliest, candidates = first.softmax(1).index_select(1, answer_ids[:, 1]).topk(k, dim=1)
        chosen = candidates.flatten()
        copies, visible = (each.repeat_interleave(k, 0) for each in (states, every))
        losses = self._answer_losses(answer_ids[chosen], answer_mask[chosen], copies, visible)
        best = (likeliest.log() - losses.view_as(likeliest)).topk(k, dim=1)
        return AnswerRanking(candidates.gather(1, best.indices), best.values)

    def statements(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, targets: Tensor
    ) -> Tensor:
        """Cross-entropy of statements about two images; arguments as for the model of `xfm_fast.tasks`."""
        return F.cross_entropy(self.statement_logits(pixels, input_ids, attention_mask), targets)

    def statement_logits(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, 2]` of sentences `[B, L]`; `[2B, 3, R, R]` are the first images of all, then the second ones."""
        head = self.model.cls_head
        first, second = self.encode_image(pixels).split(len(input_ids))
        text = self.encode_text(input_ids, attention_mask)
        halves = [
            self.fuse_pairs(text, attention_mask, image)[:, 0, :] for image in (first, second)
        ]
        return mlp_head(head, torch.cat(halves, dim=-1))

    def grounding(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, target: Tensor
    ) -> dict[str, Tensor]:  # fmt: skip
        """L1 and GIoU of one box for each expression; arguments as for `GroundingModel`."""
        boxes = self.boxes(pixels, input_ids, attention_mask)
        return box_losses(boxes, target, torch.ones_like(target[:, 0]))

    def boxes(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, 4]` boxes of expressions `[B, L]`, each with its image."""
        head = self.model.bbox_head
        text = self.encode_text(input_ids, attention_mask)
        fused = self.fuse_pairs(text, attention_mask, self.encode_image(pixels))
        return mlp_head(head, fused[:, 0, :]).float().sigmoid()

    def captions(
        self,
        pixels: Tensor,
        caption_ids: Tensor,
        caption_mask: Tensor,
        prompt_length: int,
        label_smoothing: float,
    ) -> Tensor:
        """Captioning: mean over the tokens after the prompt; arguments as for `CaptioningModel`."""
        decoder = self.model.text_decoder
        image = self.encode_image(pixels)
        everywhere = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        logits = self.decode(decoder, caption_ids, caption_mask, image, everywhere)[
            :, :-1
        ].contiguous()
        targets = caption_ids.masked_fill(caption_mask == 0, -100)
        targets[:, :prompt_length] = -100
        return F.cross_entropy(
            logits.view(-1, logits.shape[-1]),
            targets[:, 1:].flatten(),
            label_smoothing=label_smoothing,
        )

    def write_captions(
        self,
        pixels: Tensor,
        prompt_ids: Tensor,
        *,
        max_length: int,
        min_length: int,
        num_beams: int,
    ) -> Tensor:
        """Captions `[B, L]` by beam search; arguments as for `CaptioningModel.generate`.

        As transformers 4.12.5 searches, on which the official code builds: every beam has a copy of the image, and of
        its keys and values in every layer, which follow the beams from step to step.
        """
        decoder = self.model.text_decoder
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
        head = self.model.cls_head
        logits = mlp_head(head, self.encode_text(input_ids, attention_mask)[:, 0, :])
        return F.cross_entropy(logits, targets)

    def images(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Classes of images from the image token next to the mean of the patches: cross-entropy."""
        head = self.model.cls_head
        embeds = self.encode_image(pixels)
        logits = mlp_head(head, torch.cat((embeds[:, 0, :], embeds[:, 1:].mean(1)), dim=-1))
        return F.cross_entropy(logits, targets)


class OfficialEngine(Engine):
    """The official evaluation: one image or text at a time is re-ranked, every text has image tokens of its own.

    `compiled` compiles the three encoders.
    """

    def __init__(
        self,
        model: XFM,
        compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None,
    ) -> None:
        self.model, self._twin = model, OfficialFineTuningTwin(model)
        twin = self._twin
        encoders = twin.encode_image, twin.encode_text, twin.fuse_pairs
        self._images, self._texts, self._fuse = (
            encoders if compiled is None else map(compiled, encoders)
        )

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self._images(pixels)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._texts(input_ids, attention_mask)

    def rerank(self, pairs: Pairs) -> Tensor:
        scores = []
        for number, image in enumerate(pairs.images):
            chosen = pairs.image_of == number
            embeds = pairs.embeds[chosen]
            scores.append(
                self._scores(embeds, pairs.mask[chosen], image.expand(len(embeds), -1, -1))
            )
        return torch.cat(scores)

    def scores(self, embeds: Tensor, mask: Tensor, index: SearchIndex, best: Tensor) -> Tensor:
        rows = []
        for text, its_mask, candidates in zip(embeds, mask, best, strict=True):
            texts, masks = text.repeat(len(candidates), 1, 1), its_mask.repeat(len(candidates), 1)
            rows.append(self._scores(texts, masks, index.embeds[candidates]))
        return torch.stack(rows)

    def _scores(self, embeds: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        # The official code repeats an image's tokens in memory.
        return self._twin.match_scores(self._fuse(embeds, mask, images.contiguous()))

    def evaluate(
        self, batches: Sequence[Tensor], input_ids: Tensor, attention_mask: Tensor, k: int
    ) -> Everything:
        images = torch.cat([self._images(pixels) for pixels in batches])
        return Everything(
            *self._twin.retrieve(images, self._texts(input_ids, attention_mask), attention_mask, k)
        )

    def statements(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self._twin.statement_logits(pixels, ids, mask)

    def boxes(self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor) -> Tensor:
        return self._twin.boxes(pixels[image_of], ids, mask)

    def captions(
        self, pixels: Tensor, prompt: Tensor, longest: int, shortest: int, beams: int
    ) -> Tensor:
        return self._twin.write_captions(
            pixels, prompt, max_length=longest, min_length=shortest, num_beams=beams
        )

    def answers(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor, answers: AnswerList
    ) -> AnswerRanking:
        """The questions one after another, each without padding."""
        rankings = []
        for image, question, length in zip(
            image_of.tolist(), ids, mask.sum(1).tolist(), strict=True
        ):
            question = question[None, :length]
            inputs = pixels[image : image + 1], question, torch.ones_like(question)
            rankings.append(
                self._twin.rank_answers(*inputs, answers.ids, answers.mask, k=answers.k)
            )
        return AnswerRanking(*(torch.cat(parts) for parts in zip(*rankings, strict=True)))
