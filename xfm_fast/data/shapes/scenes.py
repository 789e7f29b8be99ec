"""Scenes of the shapes dataset, each a pure function of (seed, split, index), and their images.

Of the 48 colour-shape pairs, 8 occur only in the test split and 8 others only in the validation
split; every scene of these splits contains at least one of its own. The split `known` has new
scenes with the pairs of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.random import Generator, Philox, SeedSequence
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
_EXCLUSIVE = {split: tuple(sorted(HELD_OUT[split])) for split in SPLITS}

_SIDES = {"small": (16, 18), "large": (23, 26)}
_GAP = 2
_GROUNDS = (165, 210)
_COUNTS = (0.2, 0.75)  # one object below the first number, two below the second, else three
_EXCLUSIVE_SHARE = 0.5
_TWIN_SHARE = 0.15
_OPAQUE = 1 << 7  # weight of full coverage; times a level of 255, it still fits 16 bits
_SAMPLES = 4  # per pixel and axis
_GAP_SHARE = 0.75  # how much of the ground shows through the gaps of stripes and dots
_MIN_RESOLUTION = 16


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
    """Return the colour-shape pairs that may occur in a split."""
    return frozenset(_COMMON) | HELD_OUT[split]


def scene(seed: int, index: int, split: Split = "train") -> Scene:
    """Draw scene `index` of a split, identical on every machine."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise DataError(f"seed={seed} and index={index} must not be negative")
    key = SeedSequence([seed, SPLITS.index(split), index])
    draws = _Draws(Generator(Philox(key)))
    uniform = draws.uniform()
    count = 1 + sum(uniform >= bound for bound in _COUNTS)
    looks = _draw_looks(count, split, draws)
    sides = [draws.between(*_SIDES[size]) for size, _, _, _ in looks]
    positions = _draw_positions(sides, draws)
    things = tuple(
        Thing(shape, colour, size, texture, x, y, side)
        for (size, colour, texture, shape), side, (x, y) in zip(
            looks, sides, positions, strict=True
        )
    )
    return Scene(things, ground=draws.between(*_GROUNDS))


class _Draws:
    """Uniform random numbers, drawn in blocks for speed."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._block: list[float] = []

    def uniform(self) -> float:
        if not self._block:
            self._block = self._generator.random(64).tolist()
        return self._block.pop()

    def between(self, low: int, high: int) -> int:
        """Draw an integer, both ends included."""
        return low + int(self.uniform() * (high - low + 1))

    def one_of(self, values: tuple[T, ...]) -> T:
        return values[int(self.uniform() * len(values))]


def _draw_looks(count: int, split: Split, draws: _Draws) -> list[tuple[str, str, str, str]]:
    """Draw size, colour, texture and shape of every object."""
    exclusive = _EXCLUSIVE[split]
    looks: list[tuple[str, str, str, str]] = []
    for index in range(count):
        # Twins give expressions something to disambiguate.
        if index and draws.uniform() < _TWIN_SHARE:
            looks.append(looks[-1])
            continue
        # The first object has a pair that is exclusive to the split.
        is_exclusive = bool(exclusive) and (index == 0 or draws.uniform() < _EXCLUSIVE_SHARE)
        colour, shape = draws.one_of(exclusive if is_exclusive else _COMMON)
        looks.append((draws.one_of(SIZES), colour, draws.one_of(TEXTURES), shape))
    # Shuffle, so that the order does not reveal the exclusive pair.
    for i in range(count - 1, 0, -1):
        j = draws.between(0, i)
        looks[i], looks[j] = looks[j], looks[i]
    return looks


def _draw_positions(sides: list[int], draws: _Draws) -> list[tuple[int, int]]:
    """Draw non-overlapping positions with a clear relation between every two objects."""
    while True:
        boxes: list[tuple[int, int, int]] = []
        for side in sides:
            box = draws.between(1, CANVAS - 1 - side), draws.between(1, CANVAS - 1 - side), side
            if any(_overlap(box, neighbour) for neighbour in boxes):
                # Redraw the scene.
                break
            boxes.append(box)
        if len(boxes) == len(sides):
            return [(x, y) for x, y, _ in boxes]


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Return whether two squares overlap along both axes, with a gap."""
    return all(a[i] + a[2] + _GAP > b[i] and b[i] + b[2] + _GAP > a[i] for i in range(2))


def pixel_box(thing: Thing, resolution: int = CANVAS) -> tuple[int, int, int, int]:
    """Return (x, y, w, h) of an object in pixels."""
    left, top, right, bottom = (
        round(edge * resolution / CANVAS)
        for edge in (thing.x, thing.y, thing.x + thing.side, thing.y + thing.side)
    )
    return left, top, right - left, bottom - top


def render(scene: Scene, resolution: int = CANVAS) -> NDArray[np.uint8]:
    """Draw a scene as uint8 RGB `[R, R, 3]`."""
    if resolution < _MIN_RESOLUTION:
        raise DataError(
            f"resolution={resolution} shows no shapes; use at least {_MIN_RESOLUTION} pixels"
        )
    light = _light(resolution)
    image = np.clip(np.int16(scene.ground) + light, 0, 255).astype(np.uint8)
    for thing in scene.things:
        x, y, width, height = pixel_box(thing, resolution)
        ink, paper = _mask(thing.shape, thing.texture, thing.colour, width, height)
        window = np.s_[y : y + height, x : x + width]
        lit = ink + ((_OPAQUE - paper) * light[window] >> 8) + (paper * image[window] >> 7)
        image[window] = np.clip(lit, 0, 255, out=lit)
    return image


@cache
def _light(resolution: int) -> NDArray[np.int16]:
    """Compute the background gradient `[R, R, 3]`.

    It encodes positions by colour, since BEiT has no absolute ones.
    """
    ramp = np.linspace(-LIGHT, LIGHT, resolution)
    red = np.broadcast_to(ramp, (resolution, resolution))
    blue = np.broadcast_to(ramp[:, None], (resolution, resolution))
    return np.rint(np.stack([red, -(red + blue) / 2, blue], axis=2)).astype(np.int16)


@lru_cache(maxsize=4096)
def _mask(
    shape: str, texture: str, colour: str, width: int, height: int
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Compute the antialiased foreground `[h, w, 3]` and background weight `[h, w, 1]`, in units of `_OPAQUE`."""
    rows, columns = (np.arange(n * _SAMPLES) + 0.5 for n in (height, width))
    v, u = 2 * rows / (height * _SAMPLES) - 1, 2 * columns / (width * _SAMPLES) - 1
    gap = _GAPS[texture](columns[None, :] / _SAMPLES, rows[:, None] / _SAMPLES)
    cover = _INSIDE[shape](u[None, :], v[:, None]) * (1 - _GAP_SHARE * gap)
    cover = cover.reshape(height, _SAMPLES, width, _SAMPLES).mean((1, 3))[:, :, None]
    weight = np.rint(_OPAQUE * (1 - cover))
    ink = (_OPAQUE - weight) * np.array(RGB[colour]) // _OPAQUE
    return ink.astype(np.int16), weight.astype(np.int16)


def _in_star(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the points in a five-pointed star, stretched to touch all four sides."""
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
