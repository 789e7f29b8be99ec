"""Which image-text pairs a re-ranking has to score: the union of both directions' candidates, image by image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xfm_fast.packing import offsets

# Similarities are ranked in slices of this many values, so that a large collection needs no full matrix.
_SLICE_VALUES = 1 << 26


@dataclass(frozen=True)
class Candidates:
    """The pairs to score, ordered by image and then by text, each once.

    Attributes:
        cu_pairs: `[I + 1]` offsets of the images in the list of pairs.
        texts: `[Q]` text of each pair.
        for_image, for_text: `[Q]` boolean: the text is a candidate of the image; the image is a candidate of the text.
    """

    cu_pairs: Tensor
    texts: Tensor
    for_image: Tensor
    for_text: Tensor

    @property
    def pairs(self) -> int:
        return self.texts.shape[0]

    @property
    def images(self) -> Tensor:
        """`[Q]` image of each pair."""
        return torch.arange(self.cu_pairs.shape[0] - 1).repeat_interleave(self.cu_pairs.diff())


def top_candidates(image_features: Tensor, text_features: Tensor, per_image: int, per_text: int) -> Candidates:
    """The most similar texts of every image and the most similar images of every text.

    Args:
        image_features: `[I, E]`, text_features: `[T, E]`; L2-normalised.
        per_image, per_text: texts per image and images per text, cut to as many as there are; 0 for none.
    """
    images, texts = image_features.shape[0], text_features.shape[0]
    texts_of_image = _top(image_features, text_features, min(per_image, texts))
    images_of_text = _top(text_features, image_features, min(per_text, images))
    by_image = torch.arange(images)[:, None] * texts + texts_of_image
    by_text = images_of_text * texts + torch.arange(texts)[:, None]
    by_image, by_text = by_image.flatten().sort().values, by_text.flatten().sort().values
    pairs = torch.cat([by_image, by_text]).unique()
    cu_pairs = offsets(torch.bincount(pairs // max(1, texts), minlength=images)).long()
    return Candidates(cu_pairs, pairs % max(1, texts), _contained(pairs, by_image), _contained(pairs, by_text))


def _top(queries: Tensor, collection: Tensor, k: int) -> Tensor:
    """`[Q, k]` indices of the collection's most similar rows."""
    rows = max(1, _SLICE_VALUES // max(1, collection.shape[0]))
    slices = [(part @ collection.t()).topk(k, dim=1).indices for part in queries.split(rows)]
    return torch.cat(slices).cpu() if slices else torch.empty(0, k, dtype=torch.long)


def _contained(values: Tensor, ordered: Tensor) -> Tensor:
    if not ordered.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    place = torch.searchsorted(ordered, values).clamp_(max=ordered.numel() - 1)
    return ordered[place] == values
