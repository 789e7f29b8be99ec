"""RandAugment: each operation against its definition on NumPy arrays, and how operations are drawn."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from xfm_fast.data.transforms import GREY, IMAGENET_FILL, IMAGENET_MEAN, OPERATIONS, Operation

Pixels = NDArray[np.uint8]
FACTOR = 7 / 10 * 1.8 + 0.1


def _picture(seed: int = 0, size: tuple[int, int] = (37, 29)) -> Image.Image:
    """Smooth colours, so that interpolation has something to be right about, off the extremes and with a few specks."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(20, 230, (5, 6, 3), dtype=np.uint8))
    pixels = np.array(small.resize(size, Image.Resampling.BICUBIC))
    pixels[3, 4], pixels[10, 20] = (255, 255, 255), (0, 0, 0)
    return Image.fromarray(pixels)


class _Sign(np.random.Generator):
    """A generator whose only draw makes `_signed` keep or turn the sign."""

    def __init__(self, positive: bool) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = 0.25 if positive else 0.75

    def random(self, *args: object, **kwargs: object) -> float:
        return self.value


def _apply(
    operation: Operation, picture: Image.Image, level: float = 7, positive: bool = True
) -> Pixels:
    return np.asarray(operation(picture, level, _Sign(positive)))


def _auto_contrast(pixels: Pixels) -> Pixels:
    low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1)).astype(float)
    return np.clip((pixels - low) * (255 / (high - low)) + 1e-9, 0, 255).astype(np.uint8)


def _equalize(pixels: Pixels) -> Pixels:
    out = pixels.copy()
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        if step:
            before = np.concatenate([[0], counts.cumsum()[:-1]])
            out[..., channel] = np.clip((step // 2 + before) // step, 0, 255)[pixels[..., channel]]
    return out


def _brightness(pixels: Pixels) -> Pixels:
    return np.clip(pixels * FACTOR, 0, 255).astype(np.uint8)


def _sharpness(pixels: Pixels) -> Pixels:
    padded = pixels.astype(float)
    height, width = pixels.shape[:2]
    total = sum(padded[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    blurred = np.round((total + 4 * padded[1:-1, 1:-1]) / 13)
    out = padded.copy()
    out[1:-1, 1:-1] = np.clip(blurred + FACTOR * (padded[1:-1, 1:-1] - blurred), 0, 255)
    return out.astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("Identity", lambda pixels: pixels),
        ("AutoContrast", _auto_contrast),
        ("Equalize", _equalize),
        ("Brightness", _brightness),
        ("Sharpness", _sharpness),
    ],
)
def test_colour_operations_are_what_their_definition_says(
    name: str, definition: Callable[[Pixels], Pixels]
) -> None:
    for picture in (_picture(), _picture(1, (224, 224))):
        expected = definition(np.asarray(picture)).astype(int)
        # Truncation after arithmetic in single or double precision may differ by one level.
        difference = np.abs(_apply(OPERATIONS["all"][name], picture).astype(int) - expected)
        assert difference.max() <= 1
        assert difference.mean() < 0.01


def _warped(
    pixels: Pixels, matrix: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """cv2.warpAffine by definition: pixel p of the result shows the source at matrix⁻¹ p, interpolated bilinearly.

    Returns the values, and where all four source pixels are inside the image.
    """
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width]
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    u = inverse[0, 0] * x + inverse[0, 1] * y + inverse[0, 2]
    v = inverse[1, 0] * x + inverse[1, 1] * y + inverse[1, 2]
    out = np.tile(np.array(GREY, float), (height, width, 1))
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    inside = (left >= 0) & (left + 1 < width) & (top >= 0) & (top + 1 < height)
    a, b, du, dv = left[inside], top[inside], (u - left)[inside, None], (v - top)[inside, None]
    source = pixels.astype(float)
    upper = source[b, a] * (1 - du) + source[b, a + 1] * du
    lower = source[b + 1, a] * (1 - du) + source[b + 1, a + 1] * du
    out[inside] = upper * (1 - dv) + lower * dv
    return out, inside


def _rotation(degrees: float, width: int, height: int) -> NDArray[np.float64]:
    """cv2.getRotationMatrix2D about (W/2, H/2): counter-clockwise."""
    a, b = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    cx, cy = width / 2, height / 2
    return np.array([[a, b, (1 - a) * cx - b * cy], [-b, a, b * cx + (1 - a) * cy]])


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_warps_are_what_opencv_does(name: str, positive: bool) -> None:
    picture, level = _picture(2, (64, 48)), 7
    sign = 1 if positive else -1
    shear, offset = sign * level / 10 * 0.3, sign * level / 10 * 10
    # OpenCV's matrices say where a pixel goes; the sign of the shear is random anyway.
    matrices = {
        "ShearX": np.array([[1, -shear, 0], [0, 1, 0]]),
        "ShearY": np.array([[1, 0, 0], [-shear, 1, 0]]),
        "TranslateX": np.array([[1, 0, offset], [0, 1, 0]]),
        "TranslateY": np.array([[1, 0, 0], [0, 1, offset]]),
        "Rotate": _rotation(sign * level / 10 * 30, 64, 48),
    }
    ours = _apply(OPERATIONS["all"][name], picture, level, positive).astype(float)
    expected, inside = _warped(np.asarray(picture), matrices[name])
    assert inside.mean() > 0.6
    # PIL rounds down.
    assert (ours - expected)[inside].min() >= -1 - 1e-9
    assert (ours - expected)[inside].max() <= 1e-9


INCREASING: dict[str, Callable[[NDArray[np.int64]], NDArray[Any]]] = {
    "Invert": lambda pixels: 255 - pixels,
    "Posterize": lambda pixels: pixels & 0b10000000,
    "Solarize": lambda pixels: np.where(pixels < 26, pixels, 255 - pixels),
    "SolarizeAdd": lambda pixels: np.where(pixels < 128, np.minimum(pixels + 99, 255), pixels),
    "Brightness": lambda pixels: np.clip(pixels * 1.81, 0, 255),
    "Contrast": lambda pixels: np.clip(
        _mean_grey(pixels) + 1.81 * (pixels - _mean_grey(pixels)), 0, 255
    ),
    "Color": lambda pixels: np.clip(_grey(pixels) + 1.81 * (pixels - _grey(pixels)), 0, 255),
}


def _grey(pixels: NDArray[np.int64]) -> NDArray[Any]:
    return np.round(pixels @ np.array([0.299, 0.587, 0.114]))[..., None]


def _mean_grey(pixels: NDArray[np.int64]) -> float:
    return math.floor(_grey(pixels).mean() + 0.5)


@pytest.mark.parametrize("name", INCREASING)
def test_the_operations_of_imagenet_at_level_nine(name: str) -> None:
    picture = _picture(3)
    ours = _apply(OPERATIONS["imagenet"][name], picture, 9).astype(float)
    # The grey of PIL is in fixed point, and a strong contrast multiplies its last digit.
    assert np.abs(ours - INCREASING[name](np.asarray(picture).astype(int))).max() <= (
        2 if name in ("Color", "Contrast") else 1
    )


def test_the_list_of_imagenet_and_its_warps() -> None:
    operations = OPERATIONS["imagenet"]
    assert tuple(round(255 * mean) for mean in IMAGENET_MEAN) == IMAGENET_FILL
    assert len(operations) == 15
    picture = _picture(4, (40, 40))
    moved = _apply(operations["TranslateX"], picture, 10)  # 0.45 of the width, 18 pixels
    assert np.array_equal(moved[:, 18:], np.asarray(picture)[:, :22])
    assert (moved[:, :18] == IMAGENET_FILL).all()
    assert np.array_equal(
        _apply(operations["TranslateY"], picture, 10)[18:], np.asarray(picture)[:22]
    )
    turned = picture.rotate(27, Image.Resampling.BICUBIC, fillcolor=IMAGENET_FILL)
    assert (
        np.abs(_apply(operations["Rotate"], picture, 9).astype(int) - np.asarray(turned)).max() <= 1
    )
    sheared = picture.transform(
        (40, 40), Image.Transform.AFFINE, (1, 0.27, 0, 0, 1, 0), Image.Resampling.BICUBIC
    )
    assert (
        np.abs(_apply(operations["ShearX"], picture, 9).astype(int) - np.asarray(sheared))[
            :, :25
        ].max()
        <= 1
    )
