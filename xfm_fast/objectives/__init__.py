"""The losses of X-FM (arXiv 2301.05065) as pure functions from tensors to a scalar, and a whole pretraining step.

Only `pretraining_losses` knows the model; it also detaches the text embeddings before the fusion encoder. Elsewhere
gradients stop only where a docstring mentions it.
"""

from xfm_fast.batches import IGNORED, Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.objectives.losses import (
    AllPairs,
    HardNegatives,
    box_giou_loss,
    box_l1_loss,
    contrastive_loss,
    contrastive_rows,
    generalized_iou,
    hard_negative_weights,
    masked_image_loss,
    masked_image_terms,
    masked_lm_loss,
    masked_token_loss,
    matching_loss,
    sample_hard_negatives,
)
from xfm_fast.objectives.step import pretraining_losses

__all__ = [
    "IGNORED",
    "AllPairs",
    "Batch",
    "HardNegatives",
    "ImageBatch",
    "PairBatch",
    "RegionBatch",
    "TextBatch",
    "box_giou_loss",
    "box_l1_loss",
    "contrastive_loss",
    "contrastive_rows",
    "generalized_iou",
    "hard_negative_weights",
    "masked_image_loss",
    "masked_image_terms",
    "masked_lm_loss",
    "masked_token_loss",
    "matching_loss",
    "pretraining_losses",
    "sample_hard_negatives",
]
