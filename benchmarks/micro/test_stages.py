"""Every stage of the model: the calls of an inference, and the losses with their gradients.

`pytest benchmarks/micro/test_stages.py -k "base and fuse"` picks some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from xfm_fast import XFM, XFMConfig
from xfm_fast.benchmarks.material.inputs import random_state
from xfm_fast.config import PresetName
from xfm_fast.models.fusion import ImageMemory
from xfm_fast.models.xfm import ALL_HEADS
from xfm_fast.objectives import (
    Batch,
    ImageBatch,
    PairBatch,
    RegionBatch,
    TextBatch,
    box_giou_loss,
    box_l1_loss,
    contrastive_loss,
    masked_image_loss,
    masked_token_loss,
    matching_loss,
    pretraining_losses,
)

Measure = Callable[[Callable[[], Any]], Any]
IMAGES, TEXTS, WIDTH = 2, 8, 16
LENGTHS = (13, 10, 16, 11, 12, 13, 10, 14)
MASKED = 3


class Subject(NamedTuple):
    """The model, and what each stage takes, computed by the stages before it."""

    model: XFM
    pixels: Tensor
    ids: Tensor
    mask: Tensor
    image_index: Tensor
    region_mask: Tensor
    images: Tensor
    texts: Tensor
    memory: ImageMemory
    fused: Tensor


@cache
def _subject(size: PresetName, device: torch.device, dtype: torch.dtype) -> Subject:
    config = XFMConfig.preset(size)
    with torch.device("meta"):
        model = XFM(config, heads=ALL_HEADS)
    state = random_state(config, ALL_HEADS, 0)
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    model.eval().requires_grad_(False)
    pixels = torch.randn(IMAGES, 3, config.image_size, config.image_size).to(device, dtype)
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(4, config.vocab_size - 1, (TEXTS, WIDTH)).masked_fill(~mask, config.pad_token_id)
    index = torch.arange(TEXTS) % IMAGES
    regions = torch.ones(TEXTS, 1 + config.num_patches, dtype=torch.bool)
    regions[:, 2::2] = False
    ids, mask, index, regions = (tensor.to(device) for tensor in (ids, mask, index, regions))
    with torch.no_grad():
        images, texts = model.encode_image(pixels), model.encode_text(ids, mask)
        memory = model.image_memory(images)
        fused = model.fuse(texts, mask, memory, index)
    return Subject(model, pixels, ids, mask, index, regions, images, texts, memory, fused)


STAGES: dict[str, Callable[[Subject], Any]] = {
    "encode_image": lambda s: s.model.encode_image(s.pixels),
    "encode_regions": lambda s: s.model.encode_regions(s.pixels, s.image_index, s.region_mask)[0],
    "encode_region_tokens": lambda s: s.model.encode_region_tokens(s.pixels, s.image_index, s.region_mask)[0],
    "encode_text": lambda s: s.model.encode_text(s.ids, s.mask),
    "project_image": lambda s: s.model.project_image(s.images),
    "project_text": lambda s: s.model.project_text(s.texts),
    "image_memory": lambda s: s.model.image_memory(s.images),
    "fuse": lambda s: s.model.fuse(s.texts, s.mask, s.memory, s.image_index),
    "fuse_first_token": lambda s: s.model.fuse(s.texts, s.mask, s.memory, s.image_index, first_token_only=True),
    "match_logits": lambda s: s.model.match_logits(s.fused),
    "predict_boxes": lambda s: s.model.predict_boxes(s.fused),
    "mlm_logits": lambda s: s.model.mlm_logits(s.texts),
    "imlm_logits": lambda s: s.model.imlm_logits(s.fused),
}


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("name", STAGES)
def test_stage(
    name: str, size: PresetName, benchmark: BenchmarkFixture, measure: Measure, device: torch.device, dtype: torch.dtype
) -> None:
    """A call of an inference on 2 images and 8 texts of 10 to 16 tokens."""
    benchmark.group = f"stages, {size}"
    subject = _subject(size, device, dtype)
    with torch.no_grad():
        result = measure(lambda: STAGES[name](subject))
    assert not isinstance(result, Tensor) or result.isfinite().all()


def _texts(subject: Subject) -> dict[str, Any]:
    masked, labels = subject.ids.clone(), subject.ids[:, 1 : 1 + MASKED].clone()
    masked[:, 1 : 1 + MASKED] = subject.model.config.mask_token_id
    positions = torch.arange(1, 1 + MASKED, device=masked.device).expand(TEXTS, MASKED)
    return {
        "input_ids": subject.ids,
        "attention_mask": subject.mask,
        "masked_input_ids": masked,
        "masked_positions": positions,
        "masked_labels": labels,
    }


def _patch_mask(subject: Subject) -> Tensor:
    mask = torch.zeros(IMAGES, subject.model.config.num_patches, dtype=torch.bool, device=subject.pixels.device)
    mask[:, ::3] = True
    return mask


# Batch -> the losses that a step on it has.
BATCHES: dict[str, Callable[[Subject], Batch]] = {
    "pairs: itc itm imlm mim": lambda s: PairBatch(
        **{name: tensor[:IMAGES] for name, tensor in _texts(s).items()}, image=s.pixels, patch_mask=_patch_mask(s)
    ),
    "regions: itc itm imlm bbox": lambda s: RegionBatch(
        **_texts(s),
        image=s.pixels,
        image_index=s.image_index,
        region_mask=s.region_mask,
        boxes=s.pixels.new_tensor([0.4, 0.5, 0.3, 0.2]).expand(TEXTS, 4),
        is_image=torch.zeros(TEXTS, dtype=torch.bool, device=s.pixels.device),
    ),
    "texts: mlm": lambda s: TextBatch(**_texts(s)),
    "images: mim": lambda s: ImageBatch(image=s.pixels, patch_mask=_patch_mask(s)),
}


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("name", BATCHES)
def test_training_step(
    name: str, size: PresetName, benchmark: BenchmarkFixture, measure: Measure, device: torch.device, dtype: torch.dtype
) -> None:
    """All losses of a batch, and the gradients of the whole model."""
    benchmark.group = f"training steps, {size}"
    subject = _subject(size, device, dtype)
    batch = BATCHES[name](subject).prepare()

    def step() -> dict[str, Tensor]:
        subject.model.zero_grad(set_to_none=True)
        losses = pretraining_losses(subject.model, batch)
        torch.stack(list(losses.values())).sum().backward()
        return losses

    subject.model.requires_grad_(True)
    try:
        losses = measure(step)
    finally:
        subject.model.zero_grad(set_to_none=True)
        subject.model.requires_grad_(False)
    assert all(loss.isfinite() for loss in losses.values())


def _loss_inputs(subject: Subject) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Loss -> the function and the tensors that it is differentiated by."""
    model, device = subject.model, subject.pixels.device
    features = (model.project_image(subject.images[subject.image_index]), model.project_text(subject.texts))
    boxes = (model.predict_boxes(subject.fused), torch.full((TEXTS, 4), 0.4, device=device, dtype=model.dtype))
    pairs = torch.arange(TEXTS, device=device) % 2
    labels = subject.ids[:, 1 : 1 + MASKED]
    words = model.text_encoder.word_embeddings
    return {
        "contrastive": (lambda a, b: contrastive_loss(a, b, 0.07, subject.image_index), features),
        "matching": (lambda logits: matching_loss(logits, pairs), (model.match_logits(subject.fused),)),
        "masked_token": (lambda h: masked_token_loss(h, words, None, labels), (subject.texts[:, 1 : 1 + MASKED],)),
        "masked_image": (lambda x: masked_image_loss(x, subject.images, _patch_mask(subject)), (subject.images + 0.1,)),
        "box_l1": (lambda found: box_l1_loss(found, boxes[1]), (boxes[0],)),
        "box_giou": (lambda found: box_giou_loss(found, boxes[1]), (boxes[0],)),
    }


LOSSES = ("contrastive", "matching", "masked_token", "masked_image", "box_l1", "box_giou")


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss(
    name: str, size: PresetName, benchmark: BenchmarkFixture, measure: Measure, device: torch.device, dtype: torch.dtype
) -> None:
    """A loss by itself, from what the model puts out, and its gradients."""
    benchmark.group = f"losses, {size}"
    with torch.no_grad():
        loss, inputs = _loss_inputs(_subject(size, device, dtype))[name]
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    gradients = measure(lambda: torch.autograd.grad(loss(*leaves), leaves))
    assert all(gradient.isfinite().all() for gradient in gradients)
