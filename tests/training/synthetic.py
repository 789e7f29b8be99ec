"""Batches of noise with the shapes that loaders make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xfm_fast.batches import Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.config import XFMConfig


def synthetic_batch(
    kind: str, config: XFMConfig, *, size: int = 3, length: int = 12, masked: int = 2, seed: int = 0
) -> Batch:
    """A batch of noise of a kind of stream; of regions, two belong to each image and the first is the whole image."""
    draw = torch.Generator().manual_seed(seed)
    images = -(-size // 2) if kind == "regions" else size
    pixels = torch.randn(images, 3, config.image_size, config.image_size, generator=draw)
    if kind == "images":
        return ImageBatch(image=pixels, patch_mask=_patch_mask(images, config, draw))
    length = min(length, config.max_text_length)
    texts = _texts(size, length, masked, config, draw)
    if kind == "text":
        return TextBatch(**texts)
    if kind == "pairs":
        return PairBatch(**texts, image=pixels, patch_mask=_patch_mask(images, config, draw))
    assert kind == "regions"
    return RegionBatch(**texts, image=pixels, **_regions(size, config, draw))


def _texts(
    size: int, length: int, masked: int, config: XFMConfig, draw: torch.Generator
) -> dict[str, Any]:
    lengths = length - torch.arange(size) % 3
    columns = torch.arange(length)
    attention_mask = (columns < lengths[:, None]).long()
    special = max(config.bos_token_id, config.eos_token_id, config.pad_token_id) + 1
    input_ids = torch.randint(special, config.mask_token_id, (size, length), generator=draw)
    input_ids[:, 0] = config.bos_token_id
    input_ids[torch.arange(size), lengths - 1] = config.eos_token_id
    input_ids = torch.where(attention_mask.bool(), input_ids, config.pad_token_id)
    # All texts have their first length - 3 tokens, so these positions are real in each.
    order = torch.rand(size, length - 3, generator=draw).argsort(1)
    positions = 1 + order[:, :masked]
    labels = input_ids.gather(1, positions)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "masked_input_ids": input_ids.scatter(1, positions, config.mask_token_id),
        "masked_positions": positions,
        "masked_labels": labels,
    }


def _patch_mask(images: int, config: XFMConfig, draw: torch.Generator) -> Tensor:
    order = torch.rand(images, config.num_patches, generator=draw).argsort(1)
    return order < config.num_masking_patches


def _regions(size: int, config: XFMConfig, draw: torch.Generator) -> dict[str, Any]:
    corners = torch.rand(size, 2, 2, generator=draw).sort(dim=1).values
    low, high = corners[:, 0] * 0.8, corners[:, 1] * 0.8 + 0.2
    is_image = (
        (torch.arange(size) % 2 == 0).long() if size > 1 else torch.zeros(size, dtype=torch.long)
    )
    whole = is_image.bool()
    low[whole], high[whole] = 0.0, 1.0
    centres = (torch.arange(config.grid) + 0.5) / config.grid
    # A patch belongs to a box when the box reaches its middle, or is nearest to it.
    reach = 0.5 / config.grid
    x, y = (
        (centres > low[:, axis, None] - reach) & (centres < high[:, axis, None] + reach)
        for axis in (0, 1)
    )
    patches = (y[:, :, None] & x[:, None, :]).flatten(1)
    token = torch.ones(size, 1, dtype=torch.bool)
    return {
        "image_index": torch.arange(size) // 2,
        "region_mask": torch.cat([token, patches], dim=1).long(),
        "boxes": torch.cat([(low + high) / 2, high - low], dim=1),
        "is_image": is_image,
    }
