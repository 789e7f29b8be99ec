"""NLVR2: is a sentence true of a pair of images?

Official recipe: 384 pixels, 8 pairs per GPU, lr 1e-5 (twice for the head), 15 epochs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.models import inputs
from xfm_fast.models.heads import MLPHead
from xfm_fast.packing import ImageGroups, Packing
from xfm_fast.tasks.task_model import TaskModel


class NLVR2Model(TaskModel):
    """X-FM with a binary head on the sentence fused with each image."""

    own_parts = ("cls_head.",)

    def __init__(self, config: XFMConfig) -> None:
        super().__init__(config, heads=())
        self.cls_head = MLPHead(2 * config.text_width, 2, config.head_layer_norm_eps)

    def logits(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits `[B, 2]` (false, true); `pixels` `[2B, 3, R, R]` holds all first images, then all second ones.

        The sentence and the image-independent part of fusion run once; both images share one packed pass.
        """
        mask = inputs.check_tokens(input_ids, attention_mask, self.config)
        pairs = input_ids.shape[0]
        if pixels.shape[0] != 2 * pairs:
            raise InputError(f"there are {pixels.shape[0]} images for {pairs} sentences; NLVR2 has two for each")
        memory = self.image_memory(self.encode_image(pixels))
        once = Packing.from_mask(mask)
        tokens = self.fusion_encoder.first_self_attention(self.text_encoder(input_ids, once), once)
        twice = Packing.from_mask(torch.cat([mask, mask]))
        groups = ImageGroups(torch.arange(2 * pairs + 1, device=pixels.device))
        fused = self.fusion_encoder(
            torch.cat([tokens, tokens]), twice, memory, groups, first_token_only=True, self_attended=True
        )
        return self.cls_head(torch.cat(fused.split(pairs), dim=-1))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor | None, targets: Tensor) -> Tensor:
        """Cross-entropy with `targets` `[B]`, 1 if the sentence is true."""
        return F.cross_entropy(self.logits(pixels, input_ids, attention_mask), targets.long())


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Accuracy of logits `[B, 2]`."""
    return (logits.argmax(-1) == targets).float().mean().item()
