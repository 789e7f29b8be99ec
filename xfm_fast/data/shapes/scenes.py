"""Scenes of the shapes dataset, each a pure function of (seed, split, index), and their images.

Of the 48 colour-shape pairs, 8 occur only in the test split and 8 others only in the validation split; every scene of
these splits contains at least one of its own. The split `known` has new scenes with the pairs of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from xfm_fast.errors import DataError

Split = Literal["train", "val", "test", "known"]
SPLITS: tuple[Split, ...] = get_args(Split)
Pair = tuple[str, str]
T = TypeVar("T")

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
COLOURS = tuple(RGB)
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")

CANVAS = 64
"""Side of the layout grid in units; boxes are integers."""
MARGIN = 8
"""Minimum centre distance along an axis for a relation."""
LIGHT = 44
"""Background gradient amplitude at the image edges, in levels of 255; half on objects."""

PAIRS: frozenset[Pair] = frozenset((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT: dict[Split, frozenset[Pair]] = {
    "train": frozenset(),
    "known": frozenset(),
    "val": frozenset((colour, SHAPES[(i + 3) % len(SHAPES)]) for i, colour in enumerate(COLOURS)),
    "test": frozenset((colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS)),
}
"""Colour-shape pairs exclusive to a split."""
_COMMON = tuple(sorted(PAIRS - HELD_OUT["val"] - HELD_OUT["test"]))
_OWN = {split: tuple(sorted(HELD_OUT[split])) for split in SPLITS}

_SIDES = {"small": (16, 18), "large": (23, 26)}
_GAP = 2
_GROUNDS = (165, 210)
_COUNTS = (0.2, 0.75)  # one object below the first number, two below the second, else three
_OWN_SHARE = 0.5
_TWIN_SHARE = 0.15
_WHOLE = 1 << 7  # times a level of 255, it still fits 16 bits
_SAMPLES = 4  # per pixel and axis
_GAP_SHARE = 0.75  # how much of the ground shows through the gaps of stripes and dots
_LEAST = 16


@dataclass(frozen=True)
class Thing:
    """One object with a tight box (x, y, side, side) in units of `CANVAS`."""

    shape: str
    colour: str
    size: str
    texture: str
    x: int
    y: int
    side: int

    @property
    def looks(self) -> tuple[str, str, str, str]:
        """All attributes except position."""
        return self.size, self.colour, self.texture, self.shape


@dataclass(frozen=True)
class Scene:
    """One to three objects on a grey background."""

    things: tuple[Thing, ...]
    ground: int


def allowed_pairs(split: Split) -> frozenset[Pair]:
    """Colour-shape pairs that may occur in a split."""
    return frozenset(_COMMON) | HELD_OUT[split]


def scene(seed: int, index: int, split: Split = "train") -> Scene:
    """Scene `index` of a split, identical on every machine."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise DataError(f"seed={seed} and index={index} must not be negative")
    key = np.random.SeedSequence([seed, SPLITS.index(split), index])
    draws = _Draws(np.random.Generator(np.random.Philox(key)))
    drawn = draws.uniform()
    number = 1 + sum(drawn >= bound for bound in _COUNTS)
    looks = _looks(number, split, draws)
    sides = [draws.between(*_SIDES[size]) for size, _, _, _ in looks]
    places = _places(sides, draws)
    things = tuple(
        Thing(shape, colour, size, texture, x, y, side)
        for (size, colour, texture, shape), side, (x, y) in zip(looks, sides, places, strict=True)
    )
    return Scene(things, ground=draws.between(*_GROUNDS))


class _Draws:
    """Uniform random numbers, drawn in blocks for speed."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._block: list[float] = []

    def uniform(self) -> float:
        if not self._block:
            self._block = self._generator.random(64).tolist()
        return self._block.pop()

    def between(self, low: int, high: int) -> int:
        """Random integer, both ends included."""
        return low + int(self.uniform() * (high - low + 1))

    def one_of(self, values: tuple[T, ...]) -> T:
        return values[int(self.uniform() * len(values))]


def _looks(number: int, split: Split, draws: _Draws) -> list[tuple[str, str, str, str]]:
    own = _OWN[split]
    looks: list[tuple[str, str, str, str]] = []
    for place in range(number):
        # The first object carries the split's own combination; twins give expressions something to disambiguate.
        if place and draws.uniform() < _TWIN_SHARE:
            looks.append(looks[-1])
            continue
        held = bool(own) and (place == 0 or draws.uniform() < _OWN_SHARE)
        colour, shape = draws.one_of(own if held else _COMMON)
        looks.append((draws.one_of(SIZES), colour, draws.one_of(TEXTURES), shape))
    # Its position in the list must be uninformative.
    for i in range(number - 1, 0, -1):
        j = draws.between(0, i)
        looks[i], looks[j] = looks[j], looks[i]
    return looks


def _places(sides: list[int], draws: _Draws) -> list[tuple[int, int]]:
    """Random non-overlapping positions with a clear relation between every two objects."""
    while True:
        places: list[tuple[int, int]] = []
        for side in sides:
            place = draws.between(1, CANVAS - 1 - side), draws.between(1, CANVAS - 1 - side)
            # Both axes of a pair overlap (with a gap): redraw the scene.
            if any(
                all(
                    place[i] + side + _GAP > other[i] and other[i] + its_side + _GAP > place[i]
                    for i in range(2)
                )
                for other, its_side in zip(places, sides, strict=False)
            ):
                break
            places.append(place)
        if len(places) == len(sides):
            return places


def pixel_box(thing: Thing, resolution: int = CANVAS) -> tuple[int, int, int, int]:
    """(x, y, w, h) of an object in pixels."""
    left, top, right, bottom = (
        round(edge * resolution / CANVAS)
        for edge in (thing.x, thing.y, thing.x + thing.side, thing.y + thing.side)
    )
    return left, top, right - left, bottom - top


def render(scene: Scene, resolution: int = CANVAS) -> NDArray[np.uint8]:
    """Image of a scene: uint8 RGB `[R, R, 3]`."""
    if resolution < _LEAST:
        raise DataError(f"resolution={resolution} shows no shapes; use at least {_LEAST} pixels")
    light = _light(resolution)
    image = np.clip(np.int16(scene.ground) + light, 0, 255).astype(np.uint8)
    for thing in scene.things:
        x, y, width, height = pixel_box(thing, resolution)
        ink, paper = _mask(thing.shape, thing.texture, thing.colour, width, height)
        window = np.s_[y : y + height, x : x + width]
        lit = ink + ((_WHOLE - paper) * light[window] >> 8) + (paper * image[window] >> 7)
        image[window] = np.clip(lit, 0, 255, out=lit)
    return image


@cache
def _light(resolution: int) -> NDArray[np.int16]:
    """Background gradient `[R, R, 3]`, which encodes position by colour (BEiT has no absolute positions)."""
    across = np.linspace(-LIGHT, LIGHT, resolution)
    red, blue = (
        np.broadcast_to(across, (resolution, resolution)),
        np.broadcast_to(across[:, None], (resolution,) * 2),
    )
    return np.rint(np.stack([red, -(red + blue) / 2, blue], axis=2)).astype(np.int16)


@lru_cache(maxsize=4096)
def _mask(
    shape: str, texture: str, colour: str, width: int, height: int
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Foreground `[h, w, 3]` and background weight `[h, w, 1]` in units of `_WHOLE`, antialiased."""
    rows, columns = (np.arange(n * _SAMPLES) + 0.5 for n in (height, width))
    v, u = 2 * rows / (height * _SAMPLES) - 1, 2 * columns / (width * _SAMPLES) - 1
    gap = _GAPS[texture](columns[None, :] / _SAMPLES, rows[:, None] / _SAMPLES)
    cover = _INSIDE[shape](u[None, :], v[:, None]) * (1 - _GAP_SHARE * gap)
    cover = cover.reshape(height, _SAMPLES, width, _SAMPLES).mean((1, 3))[:, :, None]
    weight = np.rint(_WHOLE * (1 - cover))
    ink = (_WHOLE - weight) * np.array(RGB[colour]) // _WHOLE
    return ink.astype(np.int16), weight.astype(np.int16)


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


# Points of [-1, 1]² (u right, v down) covered by a shape that touches all sides.
_INSIDE: dict[str, Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: (np.abs(u) <= 1) & (np.abs(v) <= 1),
    "triangle": lambda u, v: np.abs(u) <= (v + 1) / 2,
    "diamond": lambda u, v: np.abs(u) + np.abs(v) <= 1,
    "cross": lambda u, v: (np.abs(u) <= 0.32) | (np.abs(v) <= 0.32),
    "star": _in_star,
}
# Points between stripes or in dots, in pixels from the box corner.
_GAPS: dict[str, Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]] = {
    "plain": lambda x, y: np.zeros(np.broadcast_shapes(x.shape, y.shape), bool),
    "striped": lambda x, y: (x + y) % 5 < 2,
    "dotted": lambda x, y: ((x % 5 - 2.5) ** 2 + (y % 5 - 2.5) ** 2) < 1.5**2,
}
