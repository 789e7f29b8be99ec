"""Fine-tuning and evaluation as the official code computes them, in plain PyTorch, and the official engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.batches import PairBatch
from xfm_fast.models.decoder import beam_search
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.vqa_model import AnswerRanking

from . import AnswerList, Engine, Pairs, ScoreMatrices, SearchIndex, search_images
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
        """Compute ITC and ITM; unlike in pretraining, the gradient of ITM reaches the text encoder."""
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
        self,
        pixels: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answers_per_question: Tensor,
        answer_weights: Tensor,
    ) -> Tensor:
        """Compute the loss of VQA: weighted likelihoods of the answers over the number of questions."""
        text = self.encode_text(question_ids, question_mask)
        questions = self.fuse_pairs(text, question_mask, self.encode_image(pixels))
        states: list[Tensor] = []
        masks: list[Tensor] = []
        copies = answers_per_question.tolist()
        for state, mask, count in zip(questions, question_mask, copies, strict=True):
            states += [state] * count
            masks += [mask] * count
        losses = self._answer_losses(
            answer_ids, answer_mask, torch.stack(states), torch.stack(masks)
        )
        return (answer_weights * losses).sum() / len(pixels)

    def _answer_losses(
        self, ids: Tensor, mask: Tensor, states: Tensor, state_mask: Tensor
    ) -> Tensor:
        """Compute negative log-likelihoods `[A]` of answers `[A, L]`, each with states `[A, M, width]`."""
        logits = self.decode(self.model.text_decoder, ids, mask, states, state_mask)
        targets = ids.masked_fill(mask == 0, -100)[:, 1:]
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(len(ids), -1).sum(1)

    def rank_answers(
        self,
        pixels: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        k: int,
    ) -> AnswerRanking:
        """Rank the k best of N answers `[N, La]` for Q questions `[Q, L]` with an image `[Q, 3, R, R]` each.

        As the official evaluation of VQA v2: an image is encoded for each of its questions; after the first tokens of
        all answers are compared, the k candidates of a question are decoded from `<s>` on, padded to the longest answer
        of the list, each with a copy of the question's states, padded tokens included; the first token counts twice.
        """
        text = self.encode_text(question_ids, question_mask)
        states = self.fuse_pairs(text, question_mask, self.encode_image(pixels))
        start = answer_ids[:1, :1].repeat(len(states), 1)
        visible = torch.ones(states.shape[:2], device=states.device)
        logits = self.decode(
            self.model.text_decoder, start, torch.ones_like(start), states, visible
        )
        first_tokens = logits[:, 0].softmax(1).index_select(1, answer_ids[:, 1])
        likeliest, candidates = first_tokens.topk(k, dim=1)
        rows = candidates.flatten()
        losses = self._answer_losses(
            answer_ids[rows],
            answer_mask[rows],
            states.repeat_interleave(k, 0),
            visible.repeat_interleave(k, 0),
        )
        best = (likeliest.log() - losses.view_as(likeliest)).topk(k, dim=1)
        return AnswerRanking(candidates.gather(1, best.indices), best.values)

    def statements(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, targets: Tensor
    ) -> Tensor:
        """Compute the cross-entropy of statements about two images."""
        return F.cross_entropy(self.statement_logits(pixels, input_ids, attention_mask), targets)

    def statement_logits(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits `[B, 2]` of sentences `[B, L]`; pixels are all first images, then all second ones."""
        images = self.encode_image(pixels).split(len(input_ids))
        text = self.encode_text(input_ids, attention_mask)
        halves = [self.fuse_pairs(text, attention_mask, image)[:, 0, :] for image in images]
        return mlp_head(self.model.cls_head, torch.cat(halves, dim=-1))

    def grounding(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """Compute L1 and GIoU of one box per expression."""
        boxes = self.boxes(pixels, input_ids, attention_mask)
        return box_losses(boxes, target, torch.ones_like(target[:, 0]))

    def boxes(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return boxes `[B, 4]` of expressions `[B, L]`, each with its image."""
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
        """Compute the captioning loss: the mean over the tokens after the prompt."""
        decoder = self.model.text_decoder
        image = self.encode_image(pixels)
        everywhere = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        logits = self.decode(decoder, caption_ids, caption_mask, image, everywhere)
        targets = caption_ids.masked_fill(caption_mask == 0, -100)
        targets[:, :prompt_length] = -100
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1),
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
        """Write captions `[B, L]` by beam search; arguments as for `CaptioningModel.generate`.

        As transformers 4.12.5 searches, on which the official code builds: every beam has a copy of the image, and of
        its keys and values in every layer, which follow the beams from step to step.
        """
        decoder = self.model.text_decoder
        image = self.encode_image(pixels).repeat_interleave(num_beams, 0)
        prompts = prompt_ids.expand(len(pixels), -1)
        logits, past = self.decode_next(decoder, prompts.repeat_interleave(num_beams, 0), image, [])

        def advance(rows: Tensor, tokens: Tensor) -> Tensor:
            nonlocal past
            past = [tuple(state.index_select(0, rows) for state in layer) for layer in past]
            logits, past = self.decode_next(decoder, tokens[:, None], image, past)
            return logits

        return beam_search(
            logits,
            advance,
            prompts,
            max_length=max_length,
            min_length=min_length,
            num_beams=num_beams,
            pad_token_id=self.config.pad_token_id,
            eos_token_id=self.config.eos_token_id,
        )

    def texts(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross-entropy of text classes, read from token 0."""
        head = self.model.cls_head
        logits = mlp_head(head, self.encode_text(input_ids, attention_mask)[:, 0, :])
        return F.cross_entropy(logits, targets)

    def images(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross-entropy of image classes, read from the image token beside the mean of the patches."""
        head = self.model.cls_head
        embeds = self.encode_image(pixels)
        logits = mlp_head(head, torch.cat((embeds[:, 0, :], embeds[:, 1:].mean(1)), dim=-1))
        return F.cross_entropy(logits, targets)


def official_engine(
    model: XFM, compiled: Callable[[Callable[..., Tensor]], Callable[..., Any]] | None = None
) -> Engine:
    """Return the engine of the official evaluation.

    It re-ranks one image or text at a time, with a copy of the image tokens for every text. `compiled` compiles the
    three encoders.
    """
    twin = OfficialFineTuningTwin(model)
    encode_image, encode_text, fuse_pairs = twin.encode_image, twin.encode_text, twin.fuse_pairs
    if compiled is not None:
        encode_image, encode_text, fuse_pairs = map(
            compiled, (encode_image, encode_text, fuse_pairs)
        )

    def match(embeds: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        # The official code repeats an image's tokens in memory.
        return twin.match_scores(fuse_pairs(embeds, mask, images.contiguous()))

    def rerank(pairs: Pairs) -> Tensor:
        scores = []
        for index, image in enumerate(pairs.images):
            texts = pairs.image_of == index
            embeds = pairs.embeds[texts]
            scores.append(match(embeds, pairs.mask[texts], image.expand(len(embeds), -1, -1)))
        return torch.cat(scores)

    def score(embeds: Tensor, masks: Tensor, index: SearchIndex, best: Tensor) -> Tensor:
        rows = []
        for text, mask, candidates in zip(embeds, masks, best, strict=True):
            count = len(candidates)
            images = index.embeds[candidates]
            rows.append(match(text.repeat(count, 1, 1), mask.repeat(count, 1), images))
        return torch.stack(rows)

    def evaluate(
        batches: Sequence[Tensor], input_ids: Tensor, attention_mask: Tensor, k: int
    ) -> ScoreMatrices:
        images = torch.cat([encode_image(pixels) for pixels in batches])
        texts = encode_text(input_ids, attention_mask)
        return ScoreMatrices(*twin.retrieve(images, texts, attention_mask, k))

    def boxes(pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor) -> Tensor:
        return twin.boxes(pixels[image_of], ids, mask)

    def captions(pixels: Tensor, prompt: Tensor, longest: int, shortest: int, beams: int) -> Tensor:
        return twin.write_captions(
            pixels, prompt, max_length=longest, min_length=shortest, num_beams=beams
        )

    def answer_questions(
        pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor, answers: AnswerList
    ) -> AnswerRanking:
        """Answer the questions one after another, each without padding."""
        rankings = []
        lengths = mask.sum(1).tolist()
        for image, row, length in zip(image_of.tolist(), ids, lengths, strict=True):
            question = row[None, :length]
            inputs = pixels[image : image + 1], question, torch.ones_like(question)
            rankings.append(twin.rank_answers(*inputs, answers.ids, answers.mask, k=answers.k))
        return AnswerRanking(*map(torch.cat, zip(*rankings, strict=True)))

    return Engine(
        embed_images=encode_image,
        embed_texts=encode_text,
        rerank=rerank,
        search=partial(search_images, model, encode_text, score),
        evaluate=evaluate,
        statements=twin.statement_logits,
        boxes=boxes,
        captions=captions,
        answers=answer_questions,
    )
