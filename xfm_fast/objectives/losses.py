"""The losses of X-FM, each a pure function of tensors: contrastive, matching, masked language, masked images, boxes.

The in-batch negatives of matching are drawn here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.batches import IGNORED
from xfm_fast.errors import InputError
from xfm_fast.kernels import host, ops, reference
from xfm_fast.kernels.losses import race


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


def contrastive_rows(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    gathered: AllPairs,
    image_ids: Tensor | None = None,
) -> Tensor:
    """This process's rows of `contrastive_loss` over the pairs of all processes: two `[B, G]` products, never `[G, G]`.

    Args:
        image_features, text_features: `[B, E]` of this process.
        temperature: divides the similarities.
        gathered: the pairs of all processes.
        image_ids: `[B]`; see `contrastive_loss`.

    Returns:
        A scalar, whose mean over processes is the loss of the global batch.

    Raises:
        InputError: shapes that do not describe pairs.
    """
    check_features(image_features, text_features, image_ids)
    check_features(gathered.image_features, gathered.text_features, gathered.image_ids)
    rows = image_features.shape[0]
    if image_ids is None:
        targets = torch.arange(gathered.first, gathered.first + rows, device=image_features.device)
    else:
        same = gathered.same_image(image_ids, rows).to(image_features.dtype)
        targets = same / same.sum(1, keepdim=True)
    to_texts = image_features @ gathered.text_features.t() / temperature
    to_images = text_features @ gathered.image_features.t() / temperature
    return (F.cross_entropy(to_texts, targets) + F.cross_entropy(to_images, targets)) / 2


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


class HardNegatives(NamedTuple):
    """One negative for every pair of a batch."""

    images: Tensor
    """`[B]` int64: the image that text b does not describe."""
    texts: Tensor
    """`[B]` int64: the text that does not describe image b."""


@torch.no_grad()
def hard_negative_weights(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    image_ids: Tensor | None = None,
    gathered: AllPairs | None = None,
) -> tuple[Tensor, Tensor]:
    """Unnormalised probabilities with which negatives are drawn; the more similar, the likelier.

    Args:
        image_features, text_features: `[B, E]`, L2-normalised.
        temperature: of the softmax.
        image_ids: `[B]`; pairs with equal ids are never each other's negative. Without ids only the pair itself is
            excluded.
        gathered: the G pairs of all processes, among which negatives are found; by default the given B.

    Returns:
        Two `[B, G]` tensors without gradient: row b of the first weighs the images for text b, row b of the second
        the texts for image b. Entries are `softmax + 1e-5`, and zero where excluded.

    Raises:
        InputError: shapes that do not describe B pairs.
    """
    check_features(image_features, text_features, image_ids)
    if gathered is None:
        gathered = AllPairs(image_features, text_features, 0, image_ids)
    excluded = gathered.same_image(image_ids, image_features.shape[0])
    of_images = text_features @ gathered.image_features.t() / temperature
    of_texts = image_features @ gathered.text_features.t() / temperature
    images, texts = (reference.hard_negative_weights(s, excluded) for s in (of_images, of_texts))
    return images, texts


@torch.no_grad()
def sample_hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    image_ids: Tensor | None = None,
    *,
    gathered: AllPairs | None = None,
    generator: torch.Generator | None = None,
) -> HardNegatives:
    """Draw one negative image per text and one negative text per image, in one batched step.

    The first arguments are those of `hard_negative_weights`. All rows are drawn at once by an exponential race
    (`argmax(weight / Exp(1))` has the distribution of `torch.multinomial`) and stay on the device: no row waits for
    the host.

    Args:
        gathered: the pairs of all processes, among which negatives are drawn and numbered; by default the given ones.
        generator: source of the randomness, on the device of the features.

    Raises:
        InputError: a pair has nothing to be drawn from: the batch holds one pair, or, with ids, texts of a single
            image. On an accelerator the second case is asserted on the device, since looking would synchronise.
    """
    weights = hard_negative_weights(image_features, text_features, temperature, image_ids, gathered)
    if weights[0].shape[1] < 2:
        raise InputError(
            f"{weights[0].shape[1]} pair(s) hold no negative; hard negatives need a batch of at least 2 pairs"
        )
    if image_ids is not None:
        # The exclusion is symmetric, so a text without images is an image without texts.
        filled = (weights[0] > 0).any(1)
        message = "every pair shares its image with all others; put texts of at least two images into a batch"
        if filled.device.type != "cpu":
            torch._assert_async(filled.all(), message)
        elif not host.all_true(filled):
            pair = host.integer(filled.long().argmin())
            raise InputError(f"pair {pair} (image id {host.integer(image_ids[pair])}) has no negative: {message}")
    return HardNegatives(*(race(w, generator) for w in weights))


def masked_lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy at the masked positions, averaged over them; of language or of the fusion encoder.

    Args:
        logits: `[..., vocabulary]`.
        targets: `[...]` original ids, -100 where there is nothing to predict.

    Returns:
        A scalar; zero (the official code: NaN) when there is no target at all.

    Raises:
        InputError: shapes that do not belong together.
    """
    if logits.shape[:-1] != targets.shape:
        raise InputError(f"logits are {[*logits.shape]} and targets {[*targets.shape]}; there must be a target per row")
    summed = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return summed / (targets != IGNORED).sum().clamp_min(1)


def masked_token_loss(hidden: Tensor, word_embeddings: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """`masked_lm_loss` of the logits `hidden word_embeddings^T + bias`, which never exist in full.

    Args:
        hidden: `[..., width]`, transformed by the head.
        word_embeddings: `[vocabulary, width]`; bias: `[vocabulary]`.
        targets: `[...]` original ids, -100 where there is nothing to predict.

    Raises:
        InputError: shapes that do not belong together, or, on CPU, a target outside of the vocabulary.
    """
    if hidden.shape[:-1] != targets.shape:
        raise InputError(f"hidden is {[*hidden.shape]} and targets {[*targets.shape]}; there must be a target per row")
    try:
        return ops.linear_cross_entropy(hidden, word_embeddings, bias, targets, ignore_index=IGNORED)
    except IndexError as error:
        raise InputError(f"labels lie outside of the vocabulary of {word_embeddings.shape[0]}: {error}") from None


def masked_image_loss(
    masked_embeds: Tensor, target_embeds: Tensor, patch_mask: Tensor, *, patches_only: bool = False
) -> Tensor:
    """Masked image modelling: mean squared error to what the same encoder makes of the whole image.

    The target is detached: this is how vision-language training guides the vision encoder.

    Args:
        masked_embeds: `[B, 1 + N, D]` of images in which the patches of `patch_mask` were hidden.
        target_embeds: `[B, 1 + N, D]` of the images themselves.
        patch_mask: `[B, N]`, non-zero where the patch was hidden.
        patches_only: leave out the second term, the error of the image token. (The official option for this is called
            `mim_cls_only`, the opposite of what it does.)

    Returns:
        Mean over hidden patches and channels, plus mean over image tokens and channels. Without any hidden patch the
        first term is zero (the official code: NaN).

    Raises:
        InputError: shapes that do not belong together.
    """
    patches, token = masked_image_terms(masked_embeds, target_embeds, patch_mask)
    return patches if patches_only else patches + token


def masked_image_terms(masked_embeds: Tensor, target_embeds: Tensor, patch_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of `masked_image_loss`, arguments as there: of the hidden patches, and of the image tokens."""
    _check_patches(masked_embeds, patch_mask)
    if masked_embeds.shape != target_embeds.shape:
        raise InputError(f"embeddings are {[*masked_embeds.shape]} and {[*target_embeds.shape]}; both must be the same")
    target = target_embeds.detach()
    # A weighted mean instead of boolean indexing, whose result has a size that the host would have to wait for.
    hidden = patch_mask.bool()[:, :, None]
    squared = (masked_embeds[:, 1:] - target[:, 1:]).square()
    count = hidden.sum().clamp_min(1) * masked_embeds.shape[-1]
    return squared.masked_fill(~hidden, 0).sum() / count, F.mse_loss(masked_embeds[:, 0], target[:, 0])


def masked_code_loss(
    masked_embeds: Tensor, codes: Tensor, patch_mask: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Masked image modelling against a codebook (BEiT, arXiv 2106.08254): which code belongs to a hidden patch?

    Args:
        masked_embeds: `[B, 1 + N, D]` of images in which the patches of `patch_mask` were hidden.
        codes: `[B, N]` integers below V, that a tokenizer of the caller's made of the images themselves.
        patch_mask: `[B, N]`, non-zero where the patch was hidden.
        weight: `[V, D]` and bias `[V]` of a linear head of the caller's.

    Returns:
        Cross-entropy averaged over hidden patches; zero without any. The `[M, V]` logits never exist in full.

    Raises:
        InputError: shapes that do not belong together, or, on CPU, a code that the head does not have.
    """
    _check_patches(masked_embeds, patch_mask)
    if codes.shape != patch_mask.shape or codes.is_floating_point():
        raise InputError(f"codes are {codes.dtype} {[*codes.shape]}; they must be integers {[*patch_mask.shape]}")
    targets = codes.long().masked_fill(~patch_mask.bool(), IGNORED)
    try:
        return ops.linear_cross_entropy(masked_embeds[:, 1:], weight, bias, targets, ignore_index=IGNORED)
    except IndexError as error:
        raise InputError(f"codes lie outside of the {weight.shape[0]} codes of the head: {error}") from None


class ImageCodes(nn.Module):
    """The target of masked image modelling where nothing guides it: codes of the image itself.

    Args:
        tokenizer: the caller's; makes `[B, 3, R, R]` normalised pixels to `[B, N]` integers below `codes`. It is called
            without gradient, and is no part of the parameters and the state of this module.
        width: of the vision encoder.
        codes: V, the size of the codebook.
    """

    def __init__(self, tokenizer: Callable[[Tensor], Tensor], *, width: int, codes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, codes)
        # As an attribute a tokenizer that is a module would be trained and saved.
        self._tokenizer = (tokenizer,)

    def forward(self, masked_embeds: Tensor, image: Tensor, patch_mask: Tensor) -> Tensor:
        """`masked_code_loss` of the codes of `image` `[B, 3, R, R]`; the others are as there."""
        with torch.no_grad():
            codes = self._tokenizer[0](image)
        return masked_code_loss(masked_embeds, codes, patch_mask, self.head.weight, self.head.bias)


def _check_patches(masked_embeds: Tensor, patch_mask: Tensor) -> None:
    if masked_embeds.ndim != 3 or patch_mask.shape != (masked_embeds.shape[0], masked_embeds.shape[1] - 1):
        raise InputError(
            f"embeddings are {[*masked_embeds.shape]} and patch_mask {[*patch_mask.shape]}; they must be "
            "[B, 1 + N, D] and [B, N]"
        )


def _check_boxes(predicted: Tensor, target: Tensor, is_image: Tensor | None) -> None:
    if predicted.ndim != 2 or predicted.shape[1] != 4 or predicted.shape != target.shape:
        raise InputError(f"boxes are {[*predicted.shape]} and {[*target.shape]}; both must be [R, 4]: (cx, cy, w, h)")
    if is_image is not None and is_image.shape != predicted.shape[:1]:
        raise InputError(
            f"is_image is {[*is_image.shape]}; there must be one for each of the {predicted.shape[0]} boxes"
        )


def _mean_over_boxes(loss: Tensor, is_image: Tensor | None) -> Tensor:
    """Sum over boxes divided by their number, without those that are whole images."""
    if is_image is None:
        return loss.sum() / max(loss.shape[0], 1)
    whole = is_image.bool()
    return loss.masked_fill(whole, 0).sum() / (~whole).sum().clamp_min(1)


def box_l1_loss(predicted: Tensor, target: Tensor, is_image: Tensor | None = None) -> Tensor:
    """L1 distance of boxes, summed over the four coordinates, averaged over boxes.

    Args:
        predicted, target: `[R, 4]` boxes (cx, cy, w, h) relative to the image.
        is_image: `[R]`, non-zero for captions of a whole image, which have no box to predict and do not count.

    Returns:
        A scalar; zero (the official code: NaN) when no box counts.

    Raises:
        InputError: shapes that do not belong together.
    """
    _check_boxes(predicted, target, is_image)
    return _mean_over_boxes((predicted - target).abs().sum(1), is_image)


def box_giou_loss(predicted: Tensor, target: Tensor, is_image: Tensor | None = None) -> Tensor:
    """`1 - GIoU` (arXiv 1902.09630), averaged over boxes; arguments and result as for `box_l1_loss`.

    Every box gets its own loss, the degenerate ones too (see `generalized_iou`). The official code sets the loss of
    the *whole batch* to zero as soon as one box has a negative side, and gives NaN for two coinciding boxes without
    area.
    """
    _check_boxes(predicted, target, is_image)
    return _mean_over_boxes(1 - generalized_iou(predicted, target), is_image)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of boxes, pair by pair.

    Args:
        a, b: `[R, 4]` boxes (cx, cy, w, h).

    Returns:
        `[R]` in [-1, 1]. A side that is negative counts as zero. Two boxes without area have intersection over union
        0, and where even their hull has no area, GIoU 0; gradients stay finite in all these cases.
    """
    low_a, high_a, area_a = _corners(a)
    low_b, high_b, area_b = _corners(b)
    intersection = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp_min(0).prod(1)
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(1)
    union = area_a + area_b - intersection
    return _quotient(intersection, union) - _quotient(hull - union, hull)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    centre, sides = boxes[:, :2], boxes[:, 2:].clamp_min(0)
    low, high = centre - sides / 2, centre + sides / 2
    # From the corners, not from the sides: intersection, union and hull then round alike, and identical boxes get 1.
    return low, high, (high - low).prod(1)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0, with a finite gradient: the division never sees the zero."""
    empty = denominator <= 0
    return (numerator / denominator.masked_fill(empty, 1)).masked_fill(empty, 0)
