"""Image-text retrieval: embed, rank by feature similarity, re-rank with the fusion encoder.

The official evaluation re-projects image keys and values for every caption, pads captions, and scores both directions
separately. Here the union of both directions' pairs is scored once in image-major order: one memory per image, packed
captions. Scores are identical.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.memory import create_mapped
from xfm_fast.models import inputs
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import Packing
from xfm_fast.tasks.reranking import (
    UNSCORED,
    ImageIndex,
    ModelScorer,
    PairScorer,
    Progress,
    Receipt,
    RerankResult,
    TextIndex,
    recall,
    score_candidates,
    top_candidates,
)

__all__ = [
    "UNSCORED",
    "ImageIndex",
    "PairScorer",
    "Receipt",
    "RerankResult",
    "Retriever",
    "TextIndex",
    "recall",
    "rerank",
]


class RetrievalModel(Protocol):
    """Model interface of retrieval for models other than `XFM`, e.g. export sessions."""

    @property
    def config(self) -> XFMConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def encode_image(self, pixels: Tensor) -> Tensor: ...

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...

    def project_image(self, image_embeds: Tensor) -> Tensor: ...

    def project_text(self, text_embeds: Tensor) -> Tensor: ...

    def pair_scorer(self) -> PairScorer:
        """Scorer of pairs."""
        ...


class Retriever:
    """Embeds collections and searches them.

    Args:
        model: an `XFM` with the contrastive and matching heads, switched to evaluation mode, or an exported one
            (`xfm_fast.export.session.Session`).
        token_budget: caption tokens per pass of the fusion encoder; chosen for the device by default.
    """

    def __init__(self, model: XFM | RetrievalModel, *, token_budget: int | None = None) -> None:
        if token_budget is not None and token_budget < 1:
            raise InputError(f"token_budget={token_budget}; a pass takes at least 1 token: raise it, or leave it out")
        self.model = model
        if isinstance(model, XFM):
            model.eval()
        self.scorer: PairScorer = ModelScorer(model) if isinstance(model, XFM) else model.pair_scorer()
        self.token_budget = token_budget

    @torch.inference_mode()
    def embed_images(
        self, batches: Iterable[Tensor], *, path: str | Path | None = None, count: int | None = None
    ) -> ImageIndex:
        """Embed batches of pixels `[B, 3, R, R]`.

        Args:
            batches: in the order of the collection.
            path: output file for embeddings that exceed memory.
            count: number of images, required with `path`.
        """
        config, stored = self.model.config, None
        if path is not None:
            if count is None:
                raise InputError("count=None: the number of images is needed to lay out the file at path; pass count")
            stored = create_mapped(path, (count, config.num_image_tokens, config.vision_width), self.model.dtype)
        embeds: list[Tensor] = []
        features: list[Tensor] = []
        done = 0
        for pixels in batches:
            embedded = self.model.encode_image(pixels.to(self.model.device))
            features.append(self.model.project_image(embedded))
            if stored is None:
                embeds.append(embedded)
            else:
                if done + len(embedded) > len(stored):
                    raise InputError(f"more than count={count} images were given; pass their true number")
                stored[done : done + len(embedded)] = embedded.cpu()
            done += len(embedded)
        if not features:
            raise InputError("no images were given")
        if stored is not None and done != len(stored):
            raise InputError(f"{done} images were given but count={count}; pass their true number")
        return ImageIndex(torch.cat(embeds) if stored is None else stored, torch.cat(features))

    @torch.inference_mode()
    def embed_texts(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> TextIndex:
        """Embed batches of (input_ids, attention_mask), both `[B, L]`."""
        tokens: list[Tensor] = []
        lengths: list[Tensor] = []
        features: list[Tensor] = []
        for input_ids, attention_mask in batches:
            if attention_mask is None:
                attention_mask = input_ids.ne(self.model.config.pad_token_id)
            input_ids, attention_mask = input_ids.to(self.model.device), attention_mask.to(self.model.device)
            embedded = self.model.encode_text(input_ids, attention_mask)
            packing = Packing.from_mask(attention_mask)
            tokens.append(packing.pack(embedded))
            lengths.append(packing.cu_seqlens.diff().long())
            features.append(self.model.project_text(embedded))
        if not features:
            raise InputError("no texts were given")
        return TextIndex(torch.cat(tokens), torch.cat(lengths), torch.cat(features))

    def rerank(
        self,
        images: ImageIndex,
        texts: TextIndex,
        k: int = 256,
        *,
        resume: str | Path | None = None,
        progress: Progress | None = None,
    ) -> RerankResult:
        """Score the k best candidates of every image and of every text; see the function `rerank`."""
        candidates = top_candidates(images.features, texts.features, _positive(k), k)
        return score_candidates(self.scorer, images, texts, candidates, self.token_budget, resume, progress)

    def search_images(self, texts: TextIndex, images: ImageIndex, k: int = 16) -> tuple[Tensor, Tensor]:
        """The k best images of every text, best first: indices and match scores, `[T, k]` each."""
        candidates = top_candidates(images.features, texts.features, 0, _positive(k))
        result = score_candidates(self.scorer, images, texts, candidates, self.token_budget, None, None)
        return _best(result.score_t2i, k)

    def search_texts(self, images: ImageIndex, texts: TextIndex, k: int = 16) -> tuple[Tensor, Tensor]:
        """The k best texts of every image, best first: indices and match scores, `[I, k]` each."""
        candidates = top_candidates(images.features, texts.features, _positive(k), 0)
        result = score_candidates(self.scorer, images, texts, candidates, self.token_budget, None, None)
        return _best(result.score_i2t, k)


def rerank(
    image_embeds: Tensor,
    text_embeds: Tensor,
    attention_mask: Tensor,
    *,
    model: XFM,
    k: int = 256,
    image_features: Tensor | None = None,
    text_features: Tensor | None = None,
    token_budget: int | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> RerankResult:
    """Re-rank the union of both directions' top-k pairs, each pair once, image by image.

    `image_embeds` `[I, 1 + N, vision_width]` may be memory-mapped; `text_embeds` is `[T, L, text_width]`; `k` is the
    official `k_test`. `resume` is a folder with the scores of finished images, from which an identical call continues.
    `progress` receives (pairs done, total).
    """
    model.eval()
    with torch.inference_mode():
        if image_features is None:
            # Token 0 is all that features need of embeddings that may lie in a file.
            tokens = (part[:, :1].to(model.device) for part in image_embeds.split(64))
            image_features = torch.cat([model.project_image(part) for part in tokens])
        if text_features is None:
            text_features = model.project_text(text_embeds)
        mask = inputs.check_attention_mask(attention_mask, [*text_embeds.shape[:2]])
        packing = Packing.from_mask(mask)
        texts = TextIndex(packing.pack(text_embeds), packing.cu_seqlens.diff().long(), text_features)
    retriever = Retriever(model, token_budget=token_budget)
    return retriever.rerank(ImageIndex(image_embeds, image_features), texts, k, resume=resume, progress=progress)


def _positive(k: int) -> int:
    if k < 1:
        raise InputError(f"k={k}; at least one candidate per query is needed")
    return k


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = scores.topk(min(k, scores.shape[1]), dim=1)
    return indices, values
