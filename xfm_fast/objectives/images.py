"""Masked image modelling."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.batches import IGNORED
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops


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
    """What masked image modelling predicts where nothing guides it: codes of the image itself.

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
