"""Scenes of the shapes dataset, each a pure function of (seed, split, index).

Of the 48 colour-shape pairs, 8 occur only in the test split and 8 others only in the validation split; every scene of
these splits contains at least one of its own. The split `known` has new scenes with the pairs of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np

from xfm_fast.errors import DataError

Split = Literal["train", "val", "test", "known"]
SPLITS: tuple[Split, ...] = get_args(Split)
Pair = tuple[str, str]
T = TypeVar("T")

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "black")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")

CANVAS = 64
"""Side of the layout grid in units; boxes are integers."""
MARGIN = 8
"""Minimum centre distance along an axis for a relation."""

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
    def box(self) -> tuple[int, int, int, int]:
        """(x, y, w, h)."""
        return self.x, self.y, self.side, self.side

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
                all(place[i] + side + _GAP > other[i] and other[i] + its_side + _GAP > place[i] for i in range(2))
                for other, its_side in zip(places, sides, strict=False)
            ):
                break
            places.append(place)
        if len(places) == len(sides):
            return places
