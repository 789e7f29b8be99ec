"""Views of decoded images as normalised pixels, with the official parameters of every use.

A training transform is a function of the image and a NumPy generator: `transform(image, rng)`. Global random states are
neither read nor changed, so any item of an epoch can be made again alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from xfm_fast.data.images import MEAN, STD
from xfm_fast.data.rand_augment import RandAugment
from xfm_fast.errors import ConfigError, InputError

Picture = Image.Image | Tensor | NDArray[np.uint8]
"""A PIL image, or 8-bit pixels: a tensor `[3, H, W]` or an array `[H, W, 3]`."""

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels; right and bottom are outside."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of the linear probe."""
GREY_SETS = frozenset({"mnist", "fer2013"})
"""Sets of small square grey images, which the linear probe resizes whole."""

_SCALE = (0.08, 1.0)
_PROBE_SIDE = 288
_ASPECTS = (math.log(3 / 4), math.log(4 / 3))
_ATTEMPTS = 10


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height."""
    if isinstance(picture, Image.Image):
        return picture.size
    height, width = picture.shape[1:] if isinstance(picture, Tensor) else picture.shape[:2]
    return int(width), int(height)


def random_crop_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """The crop of RandomResizedCrop: a share `scale` of the area, log aspect ratio uniform between 3/4 and 4/3.

    If ten draws do not fit, the central crop that is as large as those aspect ratios allow.
    """
    area = width * height
    for share, aspect, left, top in rng.random((_ATTEMPTS, 4)).tolist():
        target = area * (scale[0] + share * (scale[1] - scale[0]))
        ratio = math.exp(_ASPECTS[0] + aspect * (_ASPECTS[1] - _ASPECTS[0]))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w = min(width, round(height * math.exp(_ASPECTS[1])))
    h = min(height, round(width / math.exp(_ASPECTS[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def resize_crop(picture: Picture, box: Box, size: int, *, flip: bool = False) -> Tensor:
    """Cut out a box and resize both sides, bicubic and antialiased: 8-bit pixels `[3, size, size]`.

    torchvision's 8-bit kernel; its values are PIL's up to rounding (at most 2 of 255, in a few of 1,000 pixels) at a
    third of the time.
    """
    left, top, right, bottom = box
    if isinstance(picture, Image.Image):
        if picture.mode != "RGB":
            raise InputError(f"a picture of mode {picture.mode} cannot be transformed; decode_image gives RGB")
        pixels = torch.from_numpy(np.array(picture.crop(box))).permute(2, 0, 1)
    else:
        if not isinstance(picture, Tensor):
            picture = torch.from_numpy(picture).permute(2, 0, 1)
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise InputError(f"pixels are {picture.dtype} {[*picture.shape]}; 8-bit [3, H, W] is needed")
        pixels = picture[:, top:bottom, left:right]
    out = functional.resize(pixels, [size, size], InterpolationMode.BICUBIC, antialias=True)
    return functional.horizontal_flip(out) if flip else out


def normalise(pixels: Tensor, mean: tuple[float, float, float] = MEAN, std: tuple[float, float, float] = STD) -> Tensor:
    """8-bit pixels `[3, H, W]` to float32, scaled to [0, 1] and normalised per channel."""
    shift, scale = _affine(mean, std)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)


def whole_image(picture: Picture, size: int) -> Tensor:
    """Normalised pixels `[3, size, size]` of all of a picture: without augmentation."""
    return normalise(resize_crop(picture, (0, 0, *picture_size(picture)), size))


@lru_cache
def _affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    double = [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std)]
    return (-double[0] / double[1]).float(), (1 / (255 * double[1])).float()


def augmented(pixels: Tensor, augment: RandAugment, rng: np.random.Generator) -> Tensor:
    """RandAugment of 8-bit pixels `[3, H, W]`."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    changed = augment(image, rng)
    return pixels if changed is image else torch.from_numpy(np.array(changed)).permute(2, 0, 1)


@dataclass(frozen=True)
class TrainingTransform:
    """Random crop, flip and RandAugment: an image and a generator to normalised pixels `[3, size, size]`.

    Attributes:
        size: side of the result.
        scale: smallest and largest share of the area that a crop keeps; None resizes the whole image.
        flip: probability of a horizontal flip.
        augment: applied to the 8-bit pixels after the resize; None for nothing.
        grey: make the three channels equal.
    """

    size: int
    scale: tuple[float, float] | None
    flip: float = 0.5
    augment: RandAugment | None = None
    grey: bool = False
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __call__(self, picture: Picture, rng: np.random.Generator, *, may_flip: bool = True) -> Tensor:
        width, height = picture_size(picture)
        box = (0, 0, width, height) if self.scale is None else random_crop_box(width, height, self.scale, rng)
        # Drawn in any case, so that what follows does not depend on may_flip.
        flip = rng.random() < self.flip and may_flip
        pixels = resize_crop(picture, box, self.size, flip=flip)
        if self.grey:
            pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
        if self.augment is not None:
            pixels = augmented(pixels, self.augment, rng)
        return normalise(pixels, self.mean, self.std)


@lru_cache
def pretraining_transform(size: int) -> TrainingTransform:
    """The view of image-text pairs and of images alone. Captions play no part in the flip."""
    return TrainingTransform(size, (0.2, 1.0), augment=RandAugment())


def finetuning_transform(size: int, crop: tuple[float, float] | None = (0.5, 1.0)) -> TrainingTransform:
    """The view of retrieval, NLVR2 (each of the two images), captioning and VQA; of weak grounding with crop=None.

    For VQA call it with `may_flip=not mentions_side(question, *answers)`. (The official code flips before the crop
    there, which gives the same distribution.)
    """
    return TrainingTransform(size, crop, augment=RandAugment())


_COLOURS = RandAugment("colour")


@dataclass(frozen=True)
class RegionTransform:
    """The steps after the crop around a region: flip, resize (aspect not kept), colour operations, normalisation.

    Boxes stay valid: `flip` is the caller's, and no operation moves a pixel.
    """

    size: int
    augment: RandAugment = _COLOURS

    def __call__(self, picture: Picture, box: Box, flip: bool, rng: np.random.Generator) -> Tensor:
        return normalise(augmented(resize_crop(picture, box, self.size, flip=flip), self.augment, rng))


def mentions_side(*texts: str | Iterable[str]) -> bool:
    """True if 'left' or 'right' is anywhere in the texts, in either case: a flipped image would make them false."""
    lower = (text.lower() for given in texts for text in ((given,) if isinstance(given, str) else given))
    return any("left" in text or "right" in text for text in lower)


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
    """The view of ImageNet fine-tuning: `view`, then `erase`."""

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
