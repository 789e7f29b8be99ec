"""Renders scenes with cached anti-aliased masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from xfm_fast.data.shapes.scenes import CANVAS, Scene, Thing
from xfm_fast.errors import DataError

RGB: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (44, 150, 62),
    "blue": (42, 82, 214),
    "yellow": (240, 208, 30),
    "purple": (142, 52, 186),
    "orange": (244, 128, 24),
    "cyan": (30, 186, 206),
    "black": (24, 24, 24),
}
LIGHT = 44
"""Background gradient amplitude at the image edges, in levels of 255; half on objects."""
_WHOLE = 1 << 7  # times a level of 255, it still fits 16 bits
_SAMPLES = 4  # per pixel and axis
_GAP_SHARE = 0.75  # how much of the ground shows through the gaps of stripes and dots
_LEAST = 16


def pixel_box(thing: Thing, resolution: int = CANVAS) -> tuple[int, int, int, int]:
    """(x, y, w, h) of an object in pixels."""
    if resolution == CANVAS:
        return thing.box
    left, top, right, bottom = (
        round(edge * resolution / CANVAS) for edge in (thing.x, thing.y, thing.x + thing.side, thing.y + thing.side)
    )
    return left, top, right - left, bottom - top


def render(scene: Scene, resolution: int = CANVAS) -> NDArray[np.uint8]:
    """Image of a scene: uint8 RGB `[R, R, 3]`."""
    return render_batch([scene], resolution)[0]


def render_batch(scenes: Sequence[Scene], resolution: int = CANVAS) -> NDArray[np.uint8]:
    """Images of B scenes: uint8 RGB `[B, R, R, 3]`."""
    if resolution < _LEAST:
        raise DataError(f"resolution={resolution} shows no shapes; use at least {_LEAST} pixels")
    light = _light(resolution)
    grounds = np.array([scene.ground for scene in scenes], np.int16)
    images = np.clip(grounds[:, None, None, None] + light, 0, 255).astype(np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        for thing in scene.things:
            x, y, width, height = pixel_box(thing, resolution)
            ink, paper = _mask(thing.shape, thing.texture, thing.colour, width, height)
            window = np.s_[y : y + height, x : x + width]
            lit = ink + ((_WHOLE - paper) * light[window] >> 8) + (paper * image[window] >> 7)
            image[window] = np.clip(lit, 0, 255, out=lit)
    return images


@cache
def _light(resolution: int) -> NDArray[np.int16]:
    """Background gradient `[R, R, 3]`, which encodes position by colour (BEiT has no absolute positions)."""
    across = np.linspace(-LIGHT, LIGHT, resolution)
    red, blue = np.broadcast_to(across, (resolution, resolution)), np.broadcast_to(across[:, None], (resolution,) * 2)
    return np.rint(np.stack([red, -(red + blue) / 2, blue], axis=2)).astype(np.int16)


@lru_cache(maxsize=4096)
def _mask(
    shape: str, texture: str, colour: str, width: int, height: int
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Foreground `[h, w, 3]` and background weight `[h, w, 1]` in units of `_WHOLE`."""
    rows, columns = (np.arange(n * _SAMPLES) + 0.5 for n in (height, width))
    v, u = 2 * rows / (height * _SAMPLES) - 1, 2 * columns / (width * _SAMPLES) - 1
    inside = _inside(shape, u[None, :], v[:, None])
    gap = _gaps(texture, columns[None, :] / _SAMPLES, rows[:, None] / _SAMPLES)
    cover = inside * (1 - _GAP_SHARE * gap)
    cover = cover.reshape(height, _SAMPLES, width, _SAMPLES).mean((1, 3))[:, :, None]
    weight = np.rint(_WHOLE * (1 - cover))
    ink = (_WHOLE - weight) * np.array(RGB[colour]) // _WHOLE
    return ink.astype(np.int16), weight.astype(np.int16)


def _inside(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Points of [-1, 1]² (u right, v down) covered by a shape that touches all sides."""
    match shape:
        case "circle":
            return u**2 + v**2 <= 1
        case "square":
            return (np.abs(u) <= 1) & (np.abs(v) <= 1)
        case "triangle":
            return np.abs(u) <= (v + 1) / 2
        case "diamond":
            return np.abs(u) + np.abs(v) <= 1
        case "cross":
            return (np.abs(u) <= 0.32) | (np.abs(v) <= 0.32)
        case "star":
            return _in_star(u, v)
    raise DataError(f"shape {shape!r} cannot be drawn")


def _in_star(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """A five-pointed star, stretched to touch all four sides."""
    angles = np.deg2rad(-90 + 36 * np.arange(10))
    radius = np.where(np.arange(10) % 2, 0.45, 1.0)
    x, y = radius * np.cos(angles), radius * np.sin(angles)
    x, y = 2 * (x - x.min()) / np.ptp(x) - 1, 2 * (y - y.min()) / np.ptp(y) - 1
    u, v = np.broadcast_arrays(u, v)
    inside = np.zeros(u.shape, bool)
    for i in range(10):  # even-odd rule over the ten edges
        x0, y0, x1, y1 = x[i - 1], y[i - 1], x[i], y[i]
        crosses = (y0 > v) != (y1 > v)
        inside ^= crosses & (u < x0 + (v - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _gaps(texture: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Points between stripes or in dots, in pixels from the box corner."""
    match texture:
        case "plain":
            return np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
        case "striped":
            return (x + y) % 5 < 2
        case "dotted":
            return ((x % 5 - 2.5) ** 2 + (y % 5 - 2.5) ** 2) < 1.5**2
    raise DataError(f"texture {texture!r} cannot be drawn")
