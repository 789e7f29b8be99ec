"""The official algorithm in plain PyTorch (`baselines.OfficialTwin`), eager or through torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xfm_fast.benchmarks.baselines import OfficialTwin
from xfm_fast.benchmarks.contenders.engine import Clock, Found, NoStages, Pairs, SearchIndex, ordered
from xfm_fast.benchmarks.contenders.parts import Part, parts_under
from xfm_fast.models.xfm import XFM

Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


class OfficialEngine:
    """One image or text at a time re-ranked, every pair with image tokens of its own, as the official evaluation does.

    Args:
        model: whose tensors are read.
        compiled: what is done to the functions first; an encoder then is one part.
    """

    def __init__(self, model: XFM, compiled: Compile | None = None) -> None:
        twin = OfficialTwin(model)
        self._twin, self._eager = twin, compiled is None
        change: Compile = compiled or (lambda function: function)
        self._images = change(twin.encode_image)
        self._texts = change(twin.encode_text)
        self._fuse = change(twin.fuse_pairs)

    def embed_images(self, pixels: Tensor, clock: Clock) -> Tensor:
        parts = (
            Part(self._twin, "_embed_patches", "patch embedding"),
            Part(self._twin, "_window_attention", "attention with its projections"),
            Part(self._twin, "_vision_block", "MLP and norms"),
        )
        with parts_under(clock if self._eager else NoStages(), parts, "final norm and pooling"):
            return self._images(pixels)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor, clock: Clock) -> Tensor:
        parts = (
            Part(self._twin, "_self_attention", "self-attention with its projections"),
            Part(self._twin, "_feed_forward", "MLP"),
        )
        with parts_under(clock if self._eager else NoStages(), parts, "embeddings"):
            return self._texts(input_ids, attention_mask)

    def rerank(self, pairs: Pairs, clock: Clock) -> Tensor:
        scores = []
        for number, image in enumerate(pairs.images):
            chosen = pairs.image_of == number
            embeds = pairs.embeds[chosen]
            scores.append(self._scores(embeds, pairs.mask[chosen], image.expand(len(embeds), -1, -1), clock))
        return torch.cat(scores)

    def search(self, input_ids: Tensor, attention_mask: Tensor, index: SearchIndex, k: int, clock: Clock) -> Found:
        with clock("text encoder"):
            embeds = self._texts(input_ids, attention_mask)
        with clock("similarity and top-k"):
            similarity = self._twin.project_text(embeds) @ index.features.t()
            best = similarity.topk(min(k, len(index.features)), dim=1).indices
        rows = []
        for text, mask, candidates in zip(embeds, attention_mask, best, strict=True):
            texts, masks = text.repeat(len(candidates), 1, 1), mask.repeat(len(candidates), 1)
            rows.append(self._scores(texts, masks, index.embeds[candidates], clock))
        return ordered(best, torch.stack(rows))

    def _scores(self, embeds: Tensor, mask: Tensor, images: Tensor, clock: Clock) -> Tensor:
        with clock("fusion, keys and values included"):
            # The official code repeats an image's tokens in memory.
            fused = self._fuse(embeds, mask, images.contiguous())
        with clock("matching head"):
            return self._twin.match_scores(fused)
