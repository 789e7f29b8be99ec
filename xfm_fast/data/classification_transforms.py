"""Transforms of image classification: ImageNet as timm prepares it, and the sets of the linear probe."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from xfm_fast.data.rand_augment import RandAugment
from xfm_fast.data.transforms import Picture, TrainingTransform
from xfm_fast.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of the linear probe."""
GREY_SETS = frozenset({"mnist", "fer2013"})
"""Sets of small square grey images, which are resized whole."""

_SCALE = (0.08, 1.0)
_PROBE_SIDE = 288


@dataclass(frozen=True)
class RandomErasing:
    """Replace a random rectangle of a normalised image by normal noise (arXiv 1708.04896, timm's mode `pixel`).

    Attributes:
        probability: with which a rectangle is erased.
        area: smallest and largest share of the image; uniform between them.
        aspect: lowest ratio of the sides, the highest is its inverse; the logarithm is uniform.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: float = 0.3

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """The image `[C, H, W]` itself or a changed copy."""
        if rng.random() >= self.probability:
            return image
        channels, height, width = image.shape
        for area, aspect, top, left in rng.random((10, 4)).tolist():
            target = (self.area[0] + area * (self.area[1] - self.area[0])) * height * width
            ratio = math.exp(math.log(self.aspect) * (1 - 2 * aspect))
            h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if h < height and w < width:
                y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
                image = image.clone()
                noise = rng.standard_normal((channels, h, w), dtype=np.float32)
                image[:, y : y + h, x : x + w] = torch.from_numpy(noise)
                break
        return image


@dataclass(frozen=True)
class ImageNetTransform:
    """What ImageNet fine-tuning trains on: `view`, then `erase`."""

    view: TrainingTransform
    erase: RandomErasing = RandomErasing()

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Tensor:
        return self.erase(self.view(picture, rng), rng)


def imagenet_training_transform(size: int) -> ImageNetTransform:
    """Random crop, flip, `rand-m9-mstd0.5-inc1`, ImageNet's normalisation and erasing."""
    augment = RandAugment("imagenet", level=9, deviation=0.5)
    return ImageNetTransform(TrainingTransform(size, _SCALE, augment=augment, mean=IMAGENET_MEAN, std=IMAGENET_STD))


def imagenet_evaluation_transform(size: int) -> v2.Compose:
    """PIL image to `[3, size, size]`: shorter side to 256/224 of the size (over 224: to the size), centre crop."""
    return _centre(int(size / (224 / 256)) if size <= 224 else size, size, IMAGENET_MEAN, IMAGENET_STD)


def probe_training_transform(size: int, dataset: str) -> TrainingTransform:
    """Random crop and flip for the linear probe.

    Args:
        dataset: official name of the set: images of `mnist` and `fer2013` are resized whole and made grey, those of
            `caltech101` made grey.
    """
    small = dataset in GREY_SETS
    return TrainingTransform(
        size, None if small else _SCALE, grey=small or dataset == "caltech101", mean=HALF, std=HALF
    )


def probe_evaluation_transform(size: int, dataset: str) -> v2.Compose:
    """PIL image to `[3, size, size]` for the linear probe: shorter side to 288 pixels, centre crop.

    (For sun397, caltech101 and caltech256 the official code evaluates on randomly cropped training views.)

    Raises:
        ConfigError: the size exceeds 288, so that the crop would have a black border.
    """
    if dataset in GREY_SETS:
        return _centre(size, size, HALF, HALF, v2.Grayscale(3))
    if size > _PROBE_SIDE:
        raise ConfigError(f"size={size} cannot be cropped from {_PROBE_SIDE} pixels; use at most {_PROBE_SIDE}")
    return _centre(_PROBE_SIDE, size, HALF, HALF)


def _centre(
    side: int, size: int, mean: tuple[float, ...], std: tuple[float, ...], *between: v2.Transform
) -> v2.Compose:
    return v2.Compose(
        [
            v2.Resize(side, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            *between,
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )
