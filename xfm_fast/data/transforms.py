"""Image transforms and RandAugment with the official parameters of each task.

A training transform is a pure function `transform(image, rng)` of the image and a NumPy generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling, Transform
from torch import Tensor

from xfm_fast.data.images import MEAN, STD
from xfm_fast.errors import ConfigError, InputError, needs

with needs("vision"):
    from torchvision.transforms import InterpolationMode, v2
    from torchvision.transforms.v2 import functional


MAX_LEVEL = 10.0
GREY = (128, 128, 128)
"""Fill colour of the official operations."""
IMAGENET_FILL = (124, 116, 104)
"""Mean colour of ImageNet."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Warping:
    """Affine image warps: interpolation and fill colour; `centre` is added to the origin of
    rotation and shear.

    OpenCV counts from the centre of a pixel, half a pixel further than PIL.
    """

    interpolation: Resampling
    fill: tuple[int, int, int]
    centre: float = 0.0

    def _apply(
        self, image: Image.Image, a: float, b: float, d: float, e: float, about: Point
    ) -> Image.Image:
        """Map the pixel at (x, y) to (a·x + b·y, d·x + e·y), both relative to `about`."""
        x, y = about[0] + self.centre, about[1] + self.centre
        matrix = (a, b, x - a * x - b * y, d, e, y - d * x - e * y)
        return image.transform(
            image.size, Transform.AFFINE, matrix, self.interpolation, fillcolor=self.fill
        )

    def shear(self, image: Image.Image, horizontal: float, vertical: float) -> Image.Image:
        """Shear about the top left corner."""
        return self._apply(image, 1, horizontal, vertical, 1, (0, 0))

    def rotate(self, image: Image.Image, degrees: float) -> Image.Image:
        """Rotate counter-clockwise about the centre."""
        sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
        return self._apply(image, cosine, -sine, sine, cosine, (image.width / 2, image.height / 2))

    def translate(self, image: Image.Image, right: float, down: float) -> Image.Image:
        """Translate by pixels."""
        interpolation = self.interpolation
        if float(right).is_integer() and float(down).is_integer():
            # 20 times as fast, and the same for whole pixels.
            interpolation = Resampling.NEAREST
        return image.transform(
            image.size,
            Transform.AFFINE,
            (1, 0, -right, 0, 1, -down),
            interpolation,
            fillcolor=self.fill,
        )


@dataclass(frozen=True)
class Operation:
    """An operation of RandAugment, whose magnitude grows linearly with the level.

    Attributes:
        apply: Changes an image by a magnitude.
        scale: Magnitude at the highest level, less `base`.
        base: Magnitude at level 0.
        signed: Draw the sign of the magnitude.
    """

    apply: Callable[[Image.Image, float], Image.Image]
    scale: float = 0.0
    base: float = 0.0
    signed: bool = False

    def __call__(self, image: Image.Image, level: float, rng: Generator) -> Image.Image:
        magnitude = level / MAX_LEVEL * self.scale + self.base
        if self.signed and rng.random() >= 0.5:
            magnitude = -magnitude
        return self.apply(image, magnitude)


_WARPING = Warping(Resampling.BILINEAR, GREY, centre=0.5)
_OFFICIAL = {
    "Identity": Operation(lambda image, _: image),
    "AutoContrast": Operation(lambda image, _: ImageOps.autocontrast(image)),
    "Equalize": Operation(lambda image, _: ImageOps.equalize(image)),
    "Brightness": Operation(lambda image, m: ImageEnhance.Brightness(image).enhance(m), 1.8, 0.1),
    "Sharpness": Operation(lambda image, m: ImageEnhance.Sharpness(image).enhance(m), 1.8, 0.1),
    "ShearX": Operation(lambda image, m: _WARPING.shear(image, m, 0), 0.3, signed=True),
    "ShearY": Operation(lambda image, m: _WARPING.shear(image, 0, m), 0.3, signed=True),
    "TranslateX": Operation(lambda image, m: _WARPING.translate(image, m, 0), 10, signed=True),
    "TranslateY": Operation(lambda image, m: _WARPING.translate(image, 0, m), 10, signed=True),
    "Rotate": Operation(_WARPING.rotate, 30, signed=True),
}


def _enhance(enhancer: Callable[[Image.Image], Any]) -> Operation:
    def apply(image: Image.Image, magnitude: float) -> Image.Image:
        return enhancer(image).enhance(max(0.1, 1 + magnitude))

    return Operation(apply, 0.9, signed=True)


def _posterize(image: Image.Image, magnitude: float) -> Image.Image:
    # PIL refuses 0 bits, which the highest level would leave.
    return ImageOps.posterize(image, max(4 - int(magnitude), 1))


def _solarize_add(image: Image.Image, magnitude: float) -> Image.Image:
    shift = int(magnitude)
    table = [min(255, value + shift) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


_TIMM = Warping(Resampling.BICUBIC, IMAGENET_FILL)
# Operations and magnitudes of timm: a higher level changes the image more.
_INCREASING = {
    "AutoContrast": _OFFICIAL["AutoContrast"],
    "Equalize": _OFFICIAL["Equalize"],
    "Invert": Operation(lambda image, _: ImageOps.invert(image)),
    "Rotate": Operation(_TIMM.rotate, 30, signed=True),
    "Posterize": Operation(_posterize, 4),
    "Solarize": Operation(lambda image, m: ImageOps.solarize(image, 256 - int(m)), 256),
    "SolarizeAdd": Operation(_solarize_add, 110),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": Operation(lambda image, m: _TIMM.shear(image, m, 0), 0.3, signed=True),
    "ShearY": Operation(lambda image, m: _TIMM.shear(image, 0, m), 0.3, signed=True),
    "TranslateX": Operation(
        lambda image, m: _TIMM.translate(image, m * image.width, 0), 0.45, signed=True
    ),
    "TranslateY": Operation(
        lambda image, m: _TIMM.translate(image, 0, m * image.height), 0.45, signed=True
    ),
}
_COLOUR = ("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness")

OPERATIONS: dict[str, dict[str, Operation]] = {
    "all": _OFFICIAL,
    "colour": {name: _OFFICIAL[name] for name in _COLOUR},
    "imagenet": _INCREASING,
}
"""Sets of operations: the official ones; those of them that move no pixels, for images with boxes;
and the 15 of timm's `rand-...-inc1`, for ImageNet fine-tuning."""


@dataclass(frozen=True)
class RandAugment:
    """Random operations on an 8-bit RGB image.

    Attributes:
        operations: name of the operation set in `OPERATIONS`, drawn with replacement.
        draws: operations per image.
        probability: of applying a drawn operation.
        level: strength, 0 to 10.
        deviation: standard deviation of the strength; 0 fixes it.
    """

    operations: str = "all"
    draws: int = 2
    probability: float = 0.5
    level: float = 7.0
    deviation: float = 0.0

    def __post_init__(self) -> None:
        if self.operations not in OPERATIONS:
            raise ConfigError(
                f"operations={self.operations!r} are unknown; use one of {', '.join(OPERATIONS)}"
            )
        if not 0 <= self.level <= MAX_LEVEL:
            raise ConfigError(
                f"level={self.level} of RandAugment is out of range; use 0 to {MAX_LEVEL:g}"
            )

    def __call__(self, image: Image.Image, rng: Generator) -> Image.Image:
        """Return the image or an augmented copy."""
        operations = list(OPERATIONS[self.operations].values())
        for choice in rng.integers(len(operations), size=self.draws):
            if rng.random() < self.probability:
                level = self.level
                if self.deviation:
                    level = min(max(rng.normal(level, self.deviation), 0.0), MAX_LEVEL)
                image = operations[choice](image, level, rng)
        return image


Picture = Image.Image | Tensor | NDArray[np.uint8]
"""A PIL image, or 8-bit pixels: a tensor `[3, H, W]` or an array `[H, W, 3]`."""

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, right and bottom exclusive."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of the linear probe."""
GREY_SETS = frozenset({"mnist", "fer2013"})
"""Datasets of small grey images, resized whole in the linear probe."""

_SCALE = (0.08, 1.0)
_PROBE_SIDE = 288
_ASPECTS = (math.log(3 / 4), math.log(4 / 3))
_ATTEMPTS = 10


def picture_size(picture: Picture) -> tuple[int, int]:
    """Return width and height."""
    if isinstance(picture, Image.Image):
        return picture.size
    height, width = picture.shape[1:] if isinstance(picture, Tensor) else picture.shape[:2]
    return int(width), int(height)


def random_crop_box(width: int, height: int, scale: tuple[float, float], rng: Generator) -> Box:
    """Draw a RandomResizedCrop box: area fraction in `scale`, log aspect ratio uniform between 3/4
    and 4/3.

    After ten failed draws it is the largest central crop within the aspect limits.
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
    """Crop and resize to 8-bit pixels `[3, size, size]`, bicubic and antialiased.

    torchvision's 8-bit kernel matches PIL up to rounding (at most 2 of 255) and is three times as
    fast.
    """
    left, top, right, bottom = box
    if isinstance(picture, Image.Image):
        if picture.mode != "RGB":
            raise InputError(
                f"a picture of mode {picture.mode} cannot be transformed; decode_image gives RGB"
            )
        pixels = torch.from_numpy(np.array(picture.crop(box))).permute(2, 0, 1)
    else:
        if not isinstance(picture, Tensor):
            picture = torch.from_numpy(picture).permute(2, 0, 1)
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise InputError(
                f"pixels are {picture.dtype} {[*picture.shape]}; 8-bit [3, H, W] is needed"
            )
        pixels = picture[:, top:bottom, left:right]
    out = functional.resize(pixels, [size, size], InterpolationMode.BICUBIC, antialias=True)
    return functional.horizontal_flip(out) if flip else out


def normalise(
    pixels: Tensor, mean: tuple[float, float, float] = MEAN, std: tuple[float, float, float] = STD
) -> Tensor:
    """Convert 8-bit pixels `[3, H, W]` to normalised float32."""
    shift, scale = _affine(mean, std)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)


def whole_image(picture: Picture, size: int) -> Tensor:
    """Resize the whole image to normalised pixels `[3, size, size]`, without augmentation."""
    return normalise(resize_crop(picture, (0, 0, *picture_size(picture)), size))


@lru_cache
def _affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return shift and scale of the normalisation of 8-bit pixels."""
    centre = torch.tensor(mean, dtype=torch.float64)[:, None, None]
    spread = torch.tensor(std, dtype=torch.float64)[:, None, None]
    return (-centre / spread).float(), (1 / (255 * spread)).float()


def augmented(pixels: Tensor, augment: RandAugment, rng: Generator) -> Tensor:
    """Apply RandAugment to 8-bit pixels `[3, H, W]`."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    out = augment(image, rng)
    return pixels if out is image else torch.from_numpy(np.array(out)).permute(2, 0, 1)


@dataclass(frozen=True)
class TrainingTransform:
    """Random crop, flip and RandAugment: image and generator to normalised pixels `[3, size, size]`."""

    size: int  # output side in pixels
    scale: (
        tuple[float, float] | None
    )  # range of the crop's area fraction; None resizes the whole image
    flip: float = 0.5  # probability of a horizontal flip
    augment: RandAugment | None = (
        None  # applied to the 8-bit pixels after the resize; None disables it
    )
    grey: bool = False  # convert to greyscale with three equal channels
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __call__(self, picture: Picture, rng: Generator, *, may_flip: bool = True) -> Tensor:
        width, height = picture_size(picture)
        box = (0, 0, width, height)
        if self.scale is not None:
            box = random_crop_box(width, height, self.scale, rng)
        # Always drawn, so that later draws do not depend on may_flip.
        flip = rng.random() < self.flip and may_flip
        pixels = resize_crop(picture, box, self.size, flip=flip)
        if self.grey:
            pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
        if self.augment is not None:
            pixels = augmented(pixels, self.augment, rng)
        return normalise(pixels, self.mean, self.std)


@lru_cache
def pretraining_transform(size: int) -> TrainingTransform:
    """Make the transform of pretraining images; the flip ignores captions."""
    return TrainingTransform(size, (0.2, 1.0), augment=RandAugment())


def finetuning_transform(
    size: int, crop: tuple[float, float] | None = (0.5, 1.0)
) -> TrainingTransform:
    """Make the transform of retrieval, captioning and VQA; with crop=None that of weak grounding.

    For VQA set `may_flip=not mentions_side(question, *answers)`.
    """
    return TrainingTransform(size, crop, augment=RandAugment())


_COLOURS = RandAugment("colour")


@dataclass(frozen=True)
class RegionTransform:
    """Flip, resize (aspect ratio not preserved), colour augmentation and normalisation of a region
    crop.

    Boxes stay valid: the caller chooses `flip`, and no augmentation moves pixels.
    """

    size: int
    augment: RandAugment = _COLOURS

    def __call__(self, picture: Picture, box: Box, flip: bool, rng: Generator) -> Tensor:
        return normalise(
            augmented(resize_crop(picture, box, self.size, flip=flip), self.augment, rng)
        )


def mentions_side(*texts: str | Iterable[str]) -> bool:
    """Return whether a text contains 'left' or 'right', so that flipping the image would falsify it."""
    for group in texts:
        for text in (group,) if isinstance(group, str) else group:
            if "left" in text.lower() or "right" in text.lower():
                return True
    return False


@dataclass(frozen=True)
class RandomErasing:
    """Replace a random rectangle with normal noise (arXiv 1708.04896, timm's mode `pixel`)."""

    probability: float = 0.25  # of erasing a rectangle
    area: tuple[float, float] = (
        0.02,
        1 / 3,
    )  # range of the rectangle's share of the image, uniform
    aspect: float = 0.3  # minimum aspect ratio, its inverse is the maximum; log-uniform

    def __call__(self, image: Tensor, rng: Generator) -> Tensor:
        """Return the image `[C, H, W]` or a modified copy."""
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
    """The transform of ImageNet fine-tuning: `view`, then `erase`."""

    view: TrainingTransform
    erase: RandomErasing = RandomErasing()

    def __call__(self, picture: Picture, rng: Generator) -> Tensor:
        return self.erase(self.view(picture, rng), rng)


def imagenet_training_transform(size: int) -> ImageNetTransform:
    """Make random crop, flip, `rand-m9-mstd0.5-inc1`, ImageNet normalisation and random erasing."""
    augment = RandAugment("imagenet", level=9, deviation=0.5)
    return ImageNetTransform(
        TrainingTransform(size, _SCALE, augment=augment, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    )


def imagenet_evaluation_transform(size: int) -> v2.Compose:
    """Make the transform of a PIL image to `[3, size, size]`: resize the shorter side, crop the
    centre.

    The shorter side has 256/224 of the size; the size itself if it is over 224.
    """
    side = int(size / (224 / 256)) if size <= 224 else size
    return _centre_crop(side, size, IMAGENET_MEAN, IMAGENET_STD)


def probe_training_transform(size: int, dataset: str) -> TrainingTransform:
    """Make random crop and flip of the linear probe, with the official per-dataset exceptions."""
    small = dataset in GREY_SETS
    scale, grey = None if small else _SCALE, small or dataset == "caltech101"
    return TrainingTransform(size, scale, grey=grey, mean=HALF, std=HALF)


def probe_evaluation_transform(size: int, dataset: str) -> v2.Compose:
    """Make the transform of the linear probe to `[3, size, size]`: shorter side to 288 pixels, centre crop."""
    if dataset in GREY_SETS:
        return _centre_crop(size, size, HALF, HALF, v2.Grayscale(3))
    if size > _PROBE_SIDE:
        raise ConfigError(
            f"size={size} cannot be cropped from {_PROBE_SIDE} pixels; use at most {_PROBE_SIDE}"
        )
    return _centre_crop(_PROBE_SIDE, size, HALF, HALF)


def _centre_crop(
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
