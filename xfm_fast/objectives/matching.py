"""Image-text matching, and the in-batch negatives that it tells from the true pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError
from xfm_fast.kernels import host, reference
from xfm_fast.kernels.losses import race
from xfm_fast.objectives.contrastive import AllPairs, check_features


class HardNegatives(NamedTuple):
    """One negative for every pair of a batch."""

    images: Tensor
    """`[B]` int64: the image that text b does not describe."""
    texts: Tensor
    """`[B]` int64: the text that does not describe image b."""


@torch.no_grad()
def hard_negative_weights(
    image_features: Tensor, text_features: Tensor, temperature: Tensor | float, image_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Unnormalised probabilities with which negatives are drawn; the more similar, the likelier.

    Args:
        image_features, text_features: `[B, E]`, L2-normalised.
        temperature: of the softmax.
        image_ids: `[B]`; pairs with equal ids are never each other's negative. Without ids only the pair itself is
            excluded.

    Returns:
        Two `[B, B]` tensors without gradient: row b of the first weighs the images for text b, row b of the second
        the texts for image b. Entries are `softmax + 1e-5`, and zero where excluded.

    Raises:
        InputError: shapes that do not describe B pairs.
    """
    check_features(image_features, text_features, image_ids)
    return _weights(image_features, text_features, temperature, image_ids, None)


def _weights(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    image_ids: Tensor | None,
    everyone: AllPairs | None,
) -> tuple[Tensor, Tensor]:
    """`[B, G]` weights of images for texts, and of texts for images."""
    if everyone is None:
        everyone = AllPairs(image_features, text_features, 0, image_ids)
    excluded = everyone.same_image(image_ids, image_features.shape[0])
    of_images = text_features @ everyone.image_features.t() / temperature
    of_texts = image_features @ everyone.text_features.t() / temperature
    images, texts = (reference.hard_negative_weights(s, excluded) for s in (of_images, of_texts))
    return images, texts


@torch.no_grad()
def sample_hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    image_ids: Tensor | None = None,
    *,
    everyone: AllPairs | None = None,
    generator: torch.Generator | None = None,
) -> HardNegatives:
    """Draw one negative image per text and one negative text per image, in one batched step.

    The first arguments are those of `hard_negative_weights`. All rows are drawn at once by an exponential race
    (`argmax(weight / Exp(1))` has the distribution of `torch.multinomial`) and stay on the device: no row waits for
    the host.

    Args:
        everyone: the pairs of all processes, among which negatives are drawn and numbered; by default the given ones.
        generator: source of the randomness, on the device of the features.

    Raises:
        InputError: a pair has nothing to be drawn from: the batch holds one pair, or, with ids, texts of a single
            image. On an accelerator the second case is asserted on the device, since looking would synchronise.
    """
    check_features(image_features, text_features, image_ids)
    weights = _weights(image_features, text_features, temperature, image_ids, everyone)
    if weights[0].shape[1] < 2:
        raise InputError(
            f"{weights[0].shape[1]} pair(s) hold no negative; hard negatives need a batch of at least 2 pairs"
        )
    if image_ids is not None:
        _assert_negatives(weights[0], image_ids)
    return HardNegatives(*(race(w, generator) for w in weights))


def _assert_negatives(weights: Tensor, image_ids: Tensor) -> None:
    # The exclusion is symmetric, so a text without images is an image without texts.
    filled = (weights > 0).any(1)
    message = "every pair shares its image with all others; put texts of at least two images into a batch"
    if weights.device.type != "cpu":
        torch._assert_async(filled.all(), message)
    elif not host.all_true(filled):
        pair = host.integer(filled.long().argmin())
        raise InputError(f"pair {pair} (image id {host.integer(image_ids[pair])}) has no negative: {message}")


def matching_loss(logits: Tensor, matches: Tensor) -> Tensor:
    """Image-text matching: two-way cross-entropy, averaged over P pairs.

    Args:
        logits: `[P, 2]`; column 1 scores "text describes image".
        matches: `[P]` boolean or integer, 1 where it does.

    Raises:
        InputError: shapes that do not belong together.
    """
    if logits.ndim != 2 or logits.shape[1] != 2 or matches.shape != logits.shape[:1]:
        raise InputError(f"logits are {[*logits.shape]} and matches {[*matches.shape]}; they must be [P, 2] and [P]")
    return F.cross_entropy(logits, matches.long())
