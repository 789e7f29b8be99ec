"""xfm-fast itself, on its own kernels or on others, and with an index that keeps the memories of its images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.kernels.backend import Backend, use_backend
from xfm_fast.models.fusion import ImageMemory
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import ImageGroups, Sequences
from xfm_fast.tasks.retrieval import ImageIndex, PairScorer, Retriever
from xfm_fast.tasks.task_model import TaskModel
from xfm_fast.tasks.vqa import AnswerRanking

from .engine import (
    AnswerList,
    Clock,
    Engine,
    Everything,
    Found,
    NoStages,
    Pairs,
    Part,
    SearchIndex,
    TaskEngine,
    ordered,
    parts_under,
)


def served(model: XFM) -> XFM:
    """The model as one serves it: frozen where there is a CPU, in a copy, for others read its weights as they were."""
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16) or model.quantised:
        return model
    return copy.deepcopy(model).freeze()


def our_engine(model: XFM, backend: Backend = "auto") -> Engine | TaskEngine:
    """The engine of a model, with or without a task."""
    return OurTaskEngine(model, backend) if isinstance(model, TaskModel) else OurEngine(model, backend)


class OurEngine:
    """An `XFM`; `backend` is that of all its operations."""

    def __init__(self, model: XFM, backend: Backend = "auto") -> None:
        self.model = model
        self.backend: Backend = backend
        self._retriever = Retriever(model)

    def embed_images(self, pixels: Tensor, clock: Clock) -> Tensor:
        encoder = self.model.vision_encoder
        parts = [Part(encoder.patch_embed, "forward", "patch embedding")]
        for block in encoder.blocks:
            parts.append(Part(block.attn, "attend", "attention with its q, k and v"))
            parts.append(Part(block, "forward", "output projection, MLP and norms"))
        with use_backend(self.backend), parts_under(clock, parts, "final norm and pooling"):
            return self.model.encode_image(pixels)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor, clock: Clock) -> Tensor:
        roberta = self.model.text_encoder.roberta
        parts = [Part(roberta.embeddings, "forward", "embeddings")]
        for layer in roberta.encoder.layer:
            parts.append(Part(layer, "self_attention", "self-attention with its projections"))
            parts.append(Part(layer, "feed_forward", "MLP"))
        with use_backend(self.backend), parts_under(clock, parts, "packing"):
            return self.model.encode_text(input_ids, attention_mask)

    def rerank(self, pairs: Pairs, clock: Clock) -> Tensor:
        with use_backend(self.backend):
            with clock("image memory"):
                memory = self.model.image_memory(pairs.images)
            with clock("fusion"):
                fused = self.model.fuse(pairs.embeds, pairs.mask, memory, pairs.image_of, first_token_only=True)
            with clock("matching head"):
                return self.model.match_logits(fused)[:, 1]

    def search(self, input_ids: Tensor, attention_mask: Tensor, index: SearchIndex, k: int, clock: Clock) -> Found:
        with use_backend(self.backend):
            return retrieve(self._retriever, input_ids, attention_mask, index, k, clock)

    def evaluate(
        self, batches: Sequence[Tensor], input_ids: Tensor, attention_mask: Tensor, k: int, clock: Clock
    ) -> Everything:
        with use_backend(self.backend):
            with clock("image encoder"):
                images = self._retriever.embed_images(batches)
            with clock("text encoder"):
                texts = self._retriever.embed_texts([(input_ids, attention_mask)])
            with clock("candidates and re-ranking"):
                result = self._retriever.rerank(images, texts, k)
        return Everything(result.score_i2t, result.score_t2i)


class OurTaskEngine:
    """A fine-tuned model; `backend` is that of all its operations."""

    def __init__(self, model: TaskModel, backend: Backend = "auto") -> None:
        # Any: a task's model has the methods of its task.
        self._model: Any = model
        self._backend: Backend = backend

    @contextmanager
    def _staged(self, clock: Clock, rest: str) -> Iterator[None]:
        parts = [Part(self._model, "encode_image", "image encoder")]
        if hasattr(self._model, "text_encoder"):
            parts += [
                Part(self._model, "image_memory", "image memory"),
                Part(self._model.text_encoder, "forward", "text encoder"),
            ]
        with use_backend(self._backend), parts_under(clock, parts, rest):
            yield

    def statements(self, pixels: Tensor, ids: Tensor, mask: Tensor, clock: Clock) -> Tensor:
        with self._staged(clock, "fusion and head"):
            return self._model.logits(pixels, ids, mask)

    def boxes(self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor, clock: Clock) -> Tensor:
        with self._staged(clock, "fusion and head"):
            return self._model.boxes(pixels, ids, mask, image_of)

    def captions(
        self, pixels: Tensor, prompt: Tensor, longest: int, shortest: int, beams: int, clock: Clock
    ) -> Tensor:  # fmt: skip
        with self._staged(clock, "decoder"):
            return self._model.generate(
                pixels, prompt, max_length=longest, min_length=shortest, num_beams=beams
            )  # fmt: skip

    def answers(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor, answers: AnswerList, clock: Clock
    ) -> AnswerRanking:
        with self._staged(clock, "fusion"):
            memory = self._model.encode_questions(pixels, ids, mask, image_of)
        with use_backend(self._backend), clock("decoder"):
            k = answers.trie.answers if answers.whole else answers.k
            # As the official score does it.
            return self._model.rank_answers(memory, answers.trie, k=k, best=answers.best, count_first_token_twice=True)


class MemoryEngine(OurEngine):
    """The same, with keys and values of every image of the index kept: 42 MB an image of 384 pixels, base, fp32."""

    def __init__(self, model: XFM) -> None:
        super().__init__(model)
        self._kept: tuple[Tensor, ImageMemory] | None = None

    def search(self, input_ids: Tensor, attention_mask: Tensor, index: SearchIndex, k: int, clock: Clock) -> Found:
        if self._kept is None or self._kept[0] is not index.embeds:
            self._kept = index.embeds, self.model.image_memory(index.embeds)
        memory = self._kept[1]
        with clock("text encoder"):
            embeds = self.model.encode_text(input_ids, attention_mask)
        with clock("similarity and top-k"):
            features = self.model.project_text(embeds)
            best = (features @ index.features.t()).topk(min(k, len(index.features)), dim=1).indices
        with clock("fusion and matching head"):
            rows = torch.arange(len(best), device=best.device).repeat_interleave(best.shape[1])
            fused = self.model.fuse(embeds[rows], attention_mask[rows], memory, best.flatten(), first_token_only=True)
            scores = self.model.match_logits(fused)[:, 1].view_as(best)
        return ordered(best, scores)


def retrieve(
    retriever: Retriever, input_ids: Tensor, attention_mask: Tensor, index: SearchIndex, k: int, clock: Clock
) -> Found:
    """`Retriever.search_images` for texts that come as ids, its parts under the clock."""
    with clock("text encoder"):
        texts = retriever.embed_texts([(input_ids, attention_mask)])
    staged = retriever
    if not isinstance(clock, NoStages):
        staged = Retriever(retriever.model, token_budget=retriever.token_budget)
        staged.scorer = _ClockedScorer(retriever.scorer, clock)
    with clock("candidates"):
        found = staged.search_images(texts, ImageIndex(index.embeds, index.features), k)
    return Found(*found)


class _ClockedScorer:
    def __init__(self, scorer: PairScorer, clock: Clock) -> None:
        self._scorer, self._clock = scorer, clock
        self.config = scorer.config

    def prepare(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        with self._clock("first self-attention"):
            return self._scorer.prepare(tokens, sequences)

    def preparation_flops(self, lengths: Tensor) -> flops.Count:
        return self._scorer.preparation_flops(lengths)

    def memory(self, image_embeds: Tensor) -> Any:
        with self._clock("image memory"):
            return self._scorer.memory(image_embeds)

    def scores(self, tokens: Tensor, sequences: Sequences, memory: Any, groups: ImageGroups) -> Tensor:
        with self._clock("fusion and matching head"):
            return self._scorer.scores(tokens, sequences, memory, groups)

    def fusion_flops(self, lengths: Tensor, groups: ImageGroups, image_tokens: int) -> flops.Count:
        return self._scorer.fusion_flops(lengths, groups, image_tokens)

    def fingerprint(self) -> str:
        return self._scorer.fingerprint()
