"""One model under two procedures, ours and the official, and a batch of real pairs: what a training step runs on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from xfm_fast.batches import PairBatch
from xfm_fast.benchmarks.contenders.official_training import OfficialTrainingTwin
from xfm_fast.benchmarks.material.photographs import Collection
from xfm_fast.benchmarks.material.subjects import random_state
from xfm_fast.config import XFMConfig
from xfm_fast.data.block_masks import block_mask
from xfm_fast.data.collation import collate_pairs
from xfm_fast.data.texts import CAPTIONS, encode_pair_text
from xfm_fast.models.xfm import ALL_HEADS, XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.tokenizer import CaptionTokenizer

Procedure = Literal["fast", "twin"]
PROCEDURES: tuple[Procedure, ...] = get_args(Procedure)
# What a user trains with: parameters in fp32, products in bf16 where that is asked for.
AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
# A gradient whose norm is below this share of the largest one is compared on that scale instead of its own: those of
# key biases are zero but for rounding, and no two orders of summation round alike.
_NOISE = 1e-4


def pair_batch(
    collection: Collection, tokenizer: CaptionTokenizer, config: XFMConfig, pairs: int, seed: int
) -> PairBatch:
    """Photographs with a caption each, masked and padded as the official loader does; repeated where they are few."""
    rng = np.random.default_rng(seed)
    photos = [number % len(collection.names) for number in range(pairs)]
    texts = []
    for number, photo in enumerate(photos):
        captions = collection.captions_of(photo)
        turn = number // len(collection.names) % len(captions)
        texts.append(encode_pair_text(captions[turn], tokenizer, CAPTIONS, rng))
    hidden, least = config.num_masking_patches, config.min_num_patches
    return collate_pairs(
        list(collection.pixels(photos, config.image_size)),
        texts,
        pad_token_id=config.pad_token_id,
        patch_masks=[block_mask(config.grid, hidden, least, rng) for _ in photos],
        width=CAPTIONS.max_tokens,
        most=CAPTIONS.masking.most,
    )


class Outcome(NamedTuple):
    """What a step leaves behind."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


class Difference(NamedTuple):
    """How far two outcomes are apart.

    Attributes:
        losses: largest relative difference of a loss.
        gradients: relative L2 distance of all gradients, taken as one vector.
        worst: largest relative L2 distance of the gradients of one parameter, which `parameter` names.
    """

    losses: float
    gradients: float
    worst: float
    parameter: str

    @property
    def error(self) -> float:
        """The largest of them."""
        return max(self.losses, self.gradients, self.worst)


class TrainingSubject:
    """A model with all heads and random weights, its official twin on the same parameters, and a batch.

    Args:
        config: of the model.
        batch: of pairs.
        seed: of the weights.
        device: where to run.
        dtype: of the parameters and pixels.
    """

    def __init__(
        self,
        config: XFMConfig,
        batch: PairBatch,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        with torch.device("meta"):
            model = XFM(config, heads=ALL_HEADS)
        state = random_state(config, ALL_HEADS, seed)
        model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
        self.model = model.eval()
        self.twin = OfficialTrainingTwin(self.model)
        self.device = device
        self.batch = replace(batch, image=batch.image.to(dtype)).to(device)

    def step(
        self, procedure: Procedure, autocast: torch.dtype | None = None, *, given_negatives: bool = False
    ) -> dict[str, Tensor]:
        """Forward and backward pass of all four losses, from no gradients to gradients in the parameters.

        Args:
            procedure: `fast` for ours, `twin` for the official one.
            autocast: type of autocast; none by default.
            given_negatives: take the neighbours of each pair as its negatives instead of drawing, so that both
                procedures compute the same.

        Returns:
            The detached losses.
        """
        self.model.zero_grad(set_to_none=True)
        negatives = self._neighbours() if given_negatives else None
        with torch.enable_grad():
            with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                if procedure == "fast":
                    losses = pretraining_losses(self.model, self.batch, hard_negatives=negatives)
                else:
                    losses = self.twin.losses(self.batch, hard_negatives=negatives)
                total = torch.stack([loss.float() if autocast else loss for loss in losses.values()]).sum()
            total.backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def outcome(self, procedure: Procedure, autocast: torch.dtype | None = None) -> Outcome:
        """A step with given negatives, and its gradients, which the parameters give away."""
        losses = self.step(procedure, autocast, given_negatives=True)
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return Outcome(losses, gradients)

    def _neighbours(self) -> tuple[Tensor, Tensor]:
        own = torch.arange(len(self.batch.image), device=self.device)
        return own.roll(-1), own.roll(1)


def difference(ours: Outcome, truth: Outcome) -> Difference:
    """Compare two outcomes; NaN counts as infinite, and so does a gradient that only one of them has."""
    losses = max(_finite((ours.losses[name] / loss - 1).abs()) for name, loss in truth.losses.items())
    scale = max(float(gradient.double().norm()) for gradient in truth.gradients.values() if gradient is not None)
    squares, distances, worst = 0.0, 0.0, (0.0, "")
    for name, expected in truth.gradients.items():
        found = ours.gradients[name]
        if expected is None or found is None:
            # Where a method stops a gradient, none and zero are the same.
            present = found if expected is None else expected
            if present is not None and bool(present.any()):
                worst = max(worst, (math.inf, name))
            continue
        distance = _finite((found.double() - expected.double()).norm())
        own = float(expected.double().norm())
        distances, squares = distances + distance**2, squares + own**2
        worst = max(worst, (distance / max(own, _NOISE * scale), name))
    return Difference(losses, (distances / squares) ** 0.5 if squares else 0.0, *worst)


def _finite(value: Tensor) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.inf
