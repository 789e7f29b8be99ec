"""Image transforms and RandAugment with the official parameters of each task.

A training transform is a pure function `transform(image, rng)` of the image and a NumPy generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling, Transform
from torch import Tensor

from xfm_fast.data.images import MEAN, STD
from xfm_fast.errors import ConfigError, InputError, needs

with needs("vision"):
    from torchvision.transforms import InterpolationMode, v2
    from torchvision.transforms.v2 import functional


MOST = 10.0
"""Maximum level."""
GREY = (128, 128, 128)
"""Fill colour of the official operations."""
IMAGENET_FILL = (124, 116, 104)
"""Mean colour of ImageNet."""

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]
Point = tuple[float, float]


@dataclass(frozen=True)
class Warping:
    """Affine image warps: interpolation and fill colour; `centre` is added to the origin of rotation and shear.

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
        # Whole pixels need no interpolation, which takes 20 times as long.
        whole = float(right).is_integer() and float(down).is_integer()
        matrix = (1, 0, -right, 0, 1, -down)
        how = Resampling.NEAREST if whole else self.interpolation
        return image.transform(image.size, Transform.AFFINE, matrix, how, fillcolor=self.fill)


_WARPING = Warping(Resampling.BILINEAR, GREY, centre=0.5)


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _factor(level: float) -> float:
    return level / MOST * 1.8 + 0.1


_OFFICIAL: dict[str, Operation] = {
    "Identity": lambda image, level, rng: image,
    "AutoContrast": lambda image, level, rng: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, rng: ImageOps.equalize(image),
    "Brightness": lambda image, level, rng: ImageEnhance.Brightness(image).enhance(_factor(level)),
    "Sharpness": lambda image, level, rng: ImageEnhance.Sharpness(image).enhance(_factor(level)),
    "ShearX": lambda image, level, rng: _WARPING.shear(image, _signed(level / MOST * 0.3, rng), 0),
    "ShearY": lambda image, level, rng: _WARPING.shear(image, 0, _signed(level / MOST * 0.3, rng)),
    "TranslateX": lambda image, level, rng: _WARPING.translate(
        image, _signed(level / MOST * 10, rng), 0
    ),
    "TranslateY": lambda image, level, rng: _WARPING.translate(
        image, 0, _signed(level / MOST * 10, rng)
    ),
    "Rotate": lambda image, level, rng: _WARPING.rotate(image, _signed(level / MOST * 30, rng)),
}


def _increasing() -> dict[str, Operation]:
    """Operations and magnitudes of timm: a higher level changes the image more."""
    warping = Warping(Resampling.BICUBIC, IMAGENET_FILL)

    def factor(level: float, rng: np.random.Generator) -> float:
        return max(0.1, 1 + _signed(level / MOST * 0.9, rng))

    def solarize_add(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
        added = int(level / MOST * 110)
        return image.point(
            [min(255, value + added) if value < 128 else value for value in range(256)] * 3
        )

    def shear(level: float, rng: np.random.Generator) -> float:
        return _signed(level / MOST * 0.3, rng)

    def offset(level: float, side: int, rng: np.random.Generator) -> float:
        return _signed(level / MOST * 0.45 * side, rng)

    return {
        "AutoContrast": _OFFICIAL["AutoContrast"],
        "Equalize": _OFFICIAL["Equalize"],
        "Invert": lambda image, level, rng: ImageOps.invert(image),
        "Rotate": lambda image, level, rng: warping.rotate(image, _signed(level / MOST * 30, rng)),
        # At the highest level no bit would be left, which PIL refuses.
        "Posterize": lambda image, level, rng: ImageOps.posterize(
            image, max(4 - int(level / MOST * 4), 1)
        ),
        "Solarize": lambda image, level, rng: ImageOps.solarize(
            image, 256 - int(level / MOST * 256)
        ),
        "SolarizeAdd": solarize_add,
        "Color": lambda image, level, rng: ImageEnhance.Color(image).enhance(factor(level, rng)),
        "Contrast": lambda image, level, rng: ImageEnhance.Contrast(image).enhance(
            factor(level, rng)
        ),
        "Brightness": lambda image, level, rng: ImageEnhance.Brightness(image).enhance(
            factor(level, rng)
        ),
        "Sharpness": lambda image, level, rng: ImageEnhance.Sharpness(image).enhance(
            factor(level, rng)
        ),
        "ShearX": lambda image, level, rng: warping.shear(image, shear(level, rng), 0),
        "ShearY": lambda image, level, rng: warping.shear(image, 0, shear(level, rng)),
        "TranslateX": lambda image, level, rng: warping.translate(
            image, offset(level, image.width, rng), 0
        ),
        "TranslateY": lambda image, level, rng: warping.translate(
            image, 0, offset(level, image.height, rng)
        ),
    }


_COLOUR = ("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness")

OPERATIONS: dict[str, dict[str, Operation]] = {
    "all": _OFFICIAL,
    "colour": {name: _OFFICIAL[name] for name in _COLOUR},
    "imagenet": _increasing(),
}
"""Sets of operations: the official ones; those of them that leave every object where it is, for images with boxes; and
the 15 of timm's `rand-...-inc1`, with which ImageNet fine-tuning trains."""


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
        if not 0 <= self.level <= MOST:
            raise ConfigError(
                f"level={self.level} of RandAugment is out of range; use 0 to {MOST:g}"
            )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image or an augmented copy."""
        operations = list(OPERATIONS[self.operations].values())
        for choice in rng.integers(len(operations), size=self.draws):
            if rng.random() < self.probability:
                level = self.level
                if self.deviation:
                    level = min(max(rng.normal(level, self.deviation), 0.0), MOST)
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
    """Width and height."""
    if isinstance(picture, Image.Image):
        return picture.size
    height, width = picture.shape[1:] if isinstance(picture, Tensor) else picture.shape[:2]
    return int(width), int(height)


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> Box:
    """RandomResizedCrop box: area fraction in `scale`, log aspect ratio uniform between 3/4 and 4/3.

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

    torchvision's 8-bit kernel: matches PIL up to rounding (at most 2 of 255), three times faster.
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
    """8-bit pixels `[3, H, W]` to normalised float32."""
    shift, scale = _affine(mean, std)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)


def whole_image(picture: Picture, size: int) -> Tensor:
    """Normalised pixels `[3, size, size]` of the whole image, without augmentation."""
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

    def __call__(
        self, picture: Picture, rng: np.random.Generator, *, may_flip: bool = True
    ) -> Tensor:
        width, height = picture_size(picture)
        box = (
            (0, 0, width, height)
            if self.scale is None
            else random_crop_box(width, height, self.scale, rng)
        )
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
    """Transform of pretraining images; the flip ignores captions."""
    return TrainingTransform(size, (0.2, 1.0), augment=RandAugment())


def finetuning_transform(
    size: int, crop: tuple[float, float] | None = (0.5, 1.0)
) -> TrainingTransform:
    """Transform of retrieval, captioning and questions about images; of weak grounding with crop=None.

    For VQA set `may_flip=not mentions_side(question, *answers)`.
    """
    return TrainingTransform(size, crop, augment=RandAugment())


_COLOURS = RandAugment("colour")


@dataclass(frozen=True)
class RegionTransform:
    """Flip, resize (aspect ratio not preserved), colour augmentation and normalisation of a region crop.

    Boxes stay valid: the caller chooses `flip`, and no augmentation moves pixels.
    """

    size: int
    augment: RandAugment = _COLOURS

    def __call__(self, picture: Picture, box: Box, flip: bool, rng: np.random.Generator) -> Tensor:
        return normalise(
            augmented(resize_crop(picture, box, self.size, flip=flip), self.augment, rng)
        )


def mentions_side(*texts: str | Iterable[str]) -> bool:
    """True if a text contains 'left' or 'right', so that flipping the image would falsify it."""
    lower = (
        text.lower() for given in texts for text in ((given,) if isinstance(given, str) else given)
    )
    return any("left" in text or "right" in text for text in lower)


@dataclass(frozen=True)
class RandomErasing:
    """Replace a random rectangle with normal noise (arXiv 1708.04896, timm's mode `pixel`)."""

    probability: float = 0.25  # of erasing a rectangle
    area: tuple[float, float] = (
        0.02,
        1 / 3,
    )  # range of the rectangle's share of the image, uniform
    aspect: float = 0.3  # minimum aspect ratio, its inverse is the maximum; log-uniform

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """The image `[C, H, W]` or a modified copy."""
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
    """Transform of ImageNet fine-tuning: `view`, then `erase`."""

    view: TrainingTransform
    erase: RandomErasing = RandomErasing()

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Tensor:
        return self.erase(self.view(picture, rng), rng)


def imagenet_training_transform(size: int) -> ImageNetTransform:
    """Random crop, flip, `rand-m9-mstd0.5-inc1`, ImageNet normalisation and random erasing."""
    augment = RandAugment("imagenet", level=9, deviation=0.5)
    return ImageNetTransform(
        TrainingTransform(size, _SCALE, augment=augment, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    )


def imagenet_evaluation_transform(size: int) -> v2.Compose:
    """PIL image to `[3, size, size]`: shorter side to 256/224 of the size (over 224: the size), centre crop."""
    return _centre(
        int(size / (224 / 256)) if size <= 224 else size, size, IMAGENET_MEAN, IMAGENET_STD
    )


def probe_training_transform(size: int, dataset: str) -> TrainingTransform:
    """Random crop and flip of the linear probe, with the official per-dataset exceptions."""
    small = dataset in GREY_SETS
    return TrainingTransform(
        size, None if small else _SCALE, grey=small or dataset == "caltech101", mean=HALF, std=HALF
    )


def probe_evaluation_transform(size: int, dataset: str) -> v2.Compose:
    """PIL image to `[3, size, size]` of the linear probe: shorter side to 288 pixels, centre crop."""
    if dataset in GREY_SETS:
        return _centre(size, size, HALF, HALF, v2.Grayscale(3))
    if size > _PROBE_SIDE:
        raise ConfigError(
            f"size={size} cannot be cropped from {_PROBE_SIDE} pixels; use at most {_PROBE_SIDE}"
        )
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
