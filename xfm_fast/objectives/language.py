"""Masked language modelling, of the language encoder and, conditioned on an image, of the fusion encoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from xfm_fast.batches import IGNORED
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops


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
