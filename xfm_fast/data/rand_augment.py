"""RandAugment (arXiv 1909.13719) of X-FM: two random operations, each applied with probability 1/2.

Augmentation is a pure function of the image and the generator. Operations are PIL's, which match the official
NumPy/OpenCV code except

- shear and rotation: OpenCV rounds source positions to 1/32 pixel and blends with the fill at the border; here they are
  exact, without blending, and interpolated values are rounded down;
- sharpness: the official code lets values overflow, so that white specks become black; here they are clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling, Transform

from xfm_fast.errors import ConfigError

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

    def _apply(self, image: Image.Image, a: float, b: float, d: float, e: float, about: Point) -> Image.Image:
        """Map the pixel at (x, y) to (a·x + b·y, d·x + e·y), both relative to `about`."""
        x, y = about[0] + self.centre, about[1] + self.centre
        matrix = (a, b, x - a * x - b * y, d, e, y - d * x - e * y)
        return image.transform(image.size, Transform.AFFINE, matrix, self.interpolation, fillcolor=self.fill)

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
    "TranslateX": lambda image, level, rng: _WARPING.translate(image, _signed(level / MOST * 10, rng), 0),
    "TranslateY": lambda image, level, rng: _WARPING.translate(image, 0, _signed(level / MOST * 10, rng)),
    "Rotate": lambda image, level, rng: _WARPING.rotate(image, _signed(level / MOST * 30, rng)),
}


def _increasing() -> dict[str, Operation]:
    """Operations and magnitudes of timm: a higher level changes the image more."""
    warping = Warping(Resampling.BICUBIC, IMAGENET_FILL)

    def factor(level: float, rng: np.random.Generator) -> float:
        return max(0.1, 1 + _signed(level / MOST * 0.9, rng))

    def solarize_add(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
        added = int(level / MOST * 110)
        return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)

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
        "Posterize": lambda image, level, rng: ImageOps.posterize(image, max(4 - int(level / MOST * 4), 1)),
        "Solarize": lambda image, level, rng: ImageOps.solarize(image, 256 - int(level / MOST * 256)),
        "SolarizeAdd": solarize_add,
        "Color": lambda image, level, rng: ImageEnhance.Color(image).enhance(factor(level, rng)),
        "Contrast": lambda image, level, rng: ImageEnhance.Contrast(image).enhance(factor(level, rng)),
        "Brightness": lambda image, level, rng: ImageEnhance.Brightness(image).enhance(factor(level, rng)),
        "Sharpness": lambda image, level, rng: ImageEnhance.Sharpness(image).enhance(factor(level, rng)),
        "ShearX": lambda image, level, rng: warping.shear(image, shear(level, rng), 0),
        "ShearY": lambda image, level, rng: warping.shear(image, 0, shear(level, rng)),
        "TranslateX": lambda image, level, rng: warping.translate(image, offset(level, image.width, rng), 0),
        "TranslateY": lambda image, level, rng: warping.translate(image, 0, offset(level, image.height, rng)),
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
            raise ConfigError(f"operations={self.operations!r} are unknown; use one of {', '.join(OPERATIONS)}")
        if not 0 <= self.level <= MOST:
            raise ConfigError(f"level={self.level} of RandAugment is out of range; use 0 to {MOST:g}")

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
