"""The losses of X-FM (arXiv 2301.05065), each a pure function: tensors in, scalar out; and a whole step of them.

Only `pretraining_losses` knows the model. Gradients stop where a docstring says so and nowhere else; before the fusion
encoder it is `pretraining_losses` that detaches text embeddings.
"""

from xfm_fast.batches import IGNORED, Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.objectives.losses import (
    AllPairs,
    HardNegatives,
    ImageCodes,
    box_giou_loss,
    box_l1_loss,
    contrastive_loss,
    contrastive_rows,
    generalized_iou,
    hard_negative_weights,
    masked_code_loss,
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
    "ImageCodes",
    "PairBatch",
    "RegionBatch",
    "TextBatch",
    "box_giou_loss",
    "box_l1_loss",
    "contrastive_loss",
    "contrastive_rows",
    "generalized_iou",
    "hard_negative_weights",
    "masked_code_loss",
    "masked_image_loss",
    "masked_image_terms",
    "masked_lm_loss",
    "masked_token_loss",
    "matching_loss",
    "pretraining_losses",
    "sample_hard_negatives",
]
