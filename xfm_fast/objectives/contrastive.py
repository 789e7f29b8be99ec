"""Image-text contrastive learning."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError


def check_features(image_features: Tensor, text_features: Tensor, image_ids: Tensor | None) -> None:
    """Raise InputError unless these are features `[B, E]` of B pairs, and their ids."""
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise InputError(
            f"image features are {[*image_features.shape]} and text features {[*text_features.shape]}; "
            "B pairs have two [B, E] tensors"
        )
    if image_ids is not None and image_ids.shape != image_features.shape[:1]:
        raise InputError(
            f"image_ids are {[*image_ids.shape]}; there must be one for each of the {image_features.shape[0]} pairs"
        )


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, temperature: Tensor | float, image_ids: Tensor | None = None
) -> Tensor:
    """Image-text contrastive loss: cross-entropy over the batch in both directions, averaged.

    Args:
        image_features, text_features: `[B, E]`, L2-normalised; pair b is (image b, text b). For several processes see
            `contrastive_rows`.
        temperature: divides the similarities.
        image_ids: `[B]`, equal for texts of the same image. All texts of an image then share the target probability.

    Raises:
        InputError: shapes that do not describe B pairs.
    """
    check_features(image_features, text_features, image_ids)
    logits = image_features @ text_features.t() / temperature
    if image_ids is None:
        targets = torch.arange(logits.shape[0], device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2
    same = (image_ids[:, None] == image_ids[None, :]).to(logits.dtype)
    shares = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, shares) + F.cross_entropy(logits.t(), shares)) / 2


class AllPairs(NamedTuple):
    """The pairs of all processes, as each of them sees them."""

    image_features: Tensor
    """`[G, E]`, rank by rank, gathered by an operation whose gradient is summed over processes."""
    text_features: Tensor
    """`[G, E]`."""
    first: int
    """Place of this process's first pair."""
    image_ids: Tensor | None = None
    """`[G]`; None when all images differ."""

    def same_image(self, image_ids: Tensor | None, rows: int) -> Tensor:
        """`[B, G]` boolean: which pairs share their image with each of this process's."""
        if image_ids is not None and self.image_ids is not None:
            return image_ids[:, None] == self.image_ids[None, :]
        columns = torch.arange(self.image_features.shape[0], device=self.image_features.device)
        return columns[None, :] == columns[self.first : self.first + rows, None]


def contrastive_rows(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    everyone: AllPairs,
    image_ids: Tensor | None = None,
) -> Tensor:
    """This process's rows of `contrastive_loss` over the pairs of all processes: two `[B, G]` products, never `[G, G]`.

    Args:
        image_features, text_features: `[B, E]` of this process.
        temperature: divides the similarities.
        everyone: the pairs of all processes.
        image_ids: `[B]`; see `contrastive_loss`.

    Returns:
        A scalar, whose mean over processes is the loss of the global batch.

    Raises:
        InputError: shapes that do not describe pairs.
    """
    check_features(image_features, text_features, image_ids)
    check_features(everyone.image_features, everyone.text_features, everyone.image_ids)
    rows = image_features.shape[0]
    if image_ids is None:
        targets = torch.arange(everyone.first, everyone.first + rows, device=image_features.device)
    else:
        same = everyone.same_image(image_ids, rows).to(image_features.dtype)
        targets = same / same.sum(1, keepdim=True)
    to_texts = image_features @ everyone.text_features.t() / temperature
    to_images = text_features @ everyone.image_features.t() / temperature
    return (F.cross_entropy(to_texts, targets) + F.cross_entropy(to_images, targets)) / 2
