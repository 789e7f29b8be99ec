"""Optimisation profiles: the sizes that an engine accepts, and the sizes that it is tuned for.

On the command line `name:axis=size` or `name:axis=least..best..most`, axes separated by commas:

    latency:batch=1,texts=1..8..64,length=1..16..40
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from xfm_fast.errors import InputError

from ..manifest import GraphRecord, ProfileRecord

_AXES = ("batch", "texts", "length", "past", "rows")
_SYNTAX = "write name:axis=least..best..most, such as latency:batch=1,texts=1..8..64,length=1..16..40"


@dataclass(frozen=True)
class AxisRange:
    """Sizes of one axis, 1 ≤ least ≤ best ≤ most; the engine is tuned for `best`."""

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        if self.least < 1:
            raise InputError(f"range {self} begins at {self.least}; sizes begin at 1")
        if self.least > self.most:
            raise InputError(f"range {self} is empty; write least..best..most in rising order")
        if not self.least <= self.best <= self.most:
            raise InputError(
                f"range {self} is tuned for {self.best}, which lies outside {self.least} to {self.most}; choose a best "
                "size between them"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """A range from `size` or `least..best..most`; `a..b` is tuned for b."""
        pieces = [piece.strip() for piece in text.split("..")]
        if not 1 <= len(pieces) <= 3 or not all(piece.isascii() and piece.isdigit() for piece in pieces):
            raise InputError(f"{text!r} is no range; write a size such as 1, or least..best..most such as 1..8..64")
        sizes = [int(piece) for piece in pieces]
        return cls(sizes[0], sizes[len(sizes) // 2], sizes[-1])

    def __str__(self) -> str:
        return f"{self.least}..{self.best}..{self.most}"


@dataclass(frozen=True)
class ShapeProfile:
    """A named set of ranges, one per axis."""

    name: str
    axes: Mapping[str, AxisRange]

    def __str__(self) -> str:
        return f"{self.name}:" + ",".join(f"{axis}={sizes}" for axis, sizes in self.axes.items())


_TOKENS = {"length": AxisRange(1, 16, 40), "past": AxisRange(1, 8, 40)}

DEFAULT_PROFILES = (
    ShapeProfile("latency", {"batch": AxisRange(1, 1, 1), "texts": AxisRange(1, 16, 64), **_TOKENS}),
    ShapeProfile("bulk", {"batch": AxisRange(1, 16, 32), "texts": AxisRange(1, 16, 64), **_TOKENS}),
)
"""One image at a time for latency, many for throughput; captions average 13 tokens and are cut at 40, and a decoder
writes as many. The second takes all that the first does, so that a server may put requests together."""

_ROWS = {"length": AxisRange(1, 64, 128), "past": AxisRange(1, 8, 40)}

PACKED_PROFILES = (
    ShapeProfile("latency", {**DEFAULT_PROFILES[0].axes, **_ROWS, "rows": AxisRange(1, 4, 16)}),
    ShapeProfile("bulk", {**DEFAULT_PROFILES[1].axes, **_ROWS, "rows": AxisRange(1, 4, 16)}),
)
"""The same for graphs that take texts in rows: as many texts, of 13 tokens each."""


def parse_profile(text: str) -> ShapeProfile:
    """A profile from its text; raises `InputError` for unknown axes and bad ranges."""
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not colon or not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise InputError(f"profile {text!r} has no name; {_SYNTAX}")
    axes: dict[str, AxisRange] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        axis, _, sizes = (piece.strip() for piece in part.partition("="))
        if axis not in _AXES:
            raise InputError(f"profile {name!r} names an axis {axis!r}; the axes are {', '.join(_AXES)}")
        if axis in axes:
            raise InputError(f"profile {name!r} names the axis {axis!r} twice; name it once")
        try:
            axes[axis] = AxisRange.parse(sizes)
        except InputError as error:
            raise InputError(f"profile {name!r}, axis {axis!r}: {error}") from None
    if not axes:
        raise InputError(f"profile {name!r} names no axis; {_SYNTAX}")
    return ShapeProfile(name, axes)


def parse_profiles(texts: Iterable[str], *, packed: bool = False) -> tuple[ShapeProfile, ...]:
    """Profiles from their texts; without texts `PACKED_PROFILES` or `DEFAULT_PROFILES`."""
    profiles = tuple(parse_profile(text) for text in texts) or (PACKED_PROFILES if packed else DEFAULT_PROFILES)
    names = [profile.name for profile in profiles]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two profiles are named {name!r}; give each a name of its own")
    return profiles


def graph_profiles(graph: GraphRecord, profiles: Sequence[ShapeProfile]) -> list[ProfileRecord]:
    """The input shapes of a graph under each profile, duplicates dropped; empty without dynamic axes."""
    if not graph.axes:
        return []
    records: list[ProfileRecord] = []
    for profile in profiles:
        for axis, accepted in graph.axes.items():
            if axis not in profile.axes:
                raise InputError(
                    f"profile {profile.name!r} says nothing about {axis!r}, an axis of graph {graph.name!r}; add "
                    f"{axis}=least..best..most to it"
                )
            wanted = profile.axes[axis]
            if wanted.least < accepted.least or (accepted.most is not None and wanted.most > accepted.most):
                most = "any size" if accepted.most is None else accepted.most
                raise InputError(
                    f"profile {profile.name!r} has {axis}={wanted} and graph {graph.name!r} accepts {accepted.least} "
                    f"to {most}; narrow the range"
                )
        record = ProfileRecord(
            name=profile.name,
            least=_shapes(graph, {axis: sizes.least for axis, sizes in profile.axes.items()}),
            best=_shapes(graph, {axis: sizes.best for axis, sizes in profile.axes.items()}),
            most=_shapes(graph, {axis: sizes.most for axis, sizes in profile.axes.items()}),
        )
        if all((record.least, record.best, record.most) != (other.least, other.best, other.most) for other in records):
            records.append(record)
    return records


def _shapes(graph: GraphRecord, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    return {
        tensor.name: [sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims] for tensor in graph.inputs
    }
