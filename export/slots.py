"""The shapes that a graph accepts, the padding of a request to them, and the passes that a session makes of captions.

A graph with dynamic axes has one slot for every size, a graph with fixed axes one for a single size, and an engine one
for each profile.

Passes of a session: captions batched with little padding, in few passes, each within a token budget.

Padded graphs take captions sorted by length; a pass has a fixed price (reading the weights, launching kernels), so not
every length gets its own pass. Packed graphs take captions side by side in rows of one length: padding to the longest
caption costs every layer, and packed rows waste only their ends; a longer row costs more attention, which is a small
share of a layer. In the fusion graph, T captions run on each of B memories: captions of an image share a pass, and
images with similar captions share one too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import ceil, inf, prod
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError

from .graphs import AXES, dims_of
from .manifest import GraphRecord, ProfileRecord, TensorRecord

# Tokens of a row that are tried: about as many as a caption has, to where attention begins to count.
_TARGETS = (32, 48, 64, 96, 128)
_SYNTAX = "write name:axis=least..best..most, such as latency:batch=1,texts=1..8..64,length=1..16..40"
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}


class AxisRange(NamedTuple):
    """Sizes of one axis, 1 ≤ least ≤ best ≤ most; the engine is tuned for `best`."""

    least: int
    best: int
    most: int

    @classmethod
    def parse(cls, text: str) -> AxisRange:
        """A range from `size` or `least..best..most`; `a..b` is tuned for b."""
        pieces = [piece.strip() for piece in text.split("..")]
        if not 1 <= len(pieces) <= 3 or not all(piece.isascii() and piece.isdigit() for piece in pieces):
            raise InputError(f"{text!r} is no range; write a size such as 1, or least..best..most such as 1..8..64")
        sizes = [int(piece) for piece in pieces]
        made = cls(sizes[0], sizes[len(sizes) // 2], sizes[-1])
        if not 1 <= made.least <= made.best <= made.most:
            raise InputError(f"range {made} does not rise from 1 or more: least..best..most; write it so")
        return made

    def __str__(self) -> str:
        return f"{self.least}..{self.best}..{self.most}"


class ShapeProfile(NamedTuple):
    """A named set of ranges, one per axis."""

    name: str
    axes: Mapping[str, AxisRange]

    def __str__(self) -> str:
        return f"{self.name}:" + ",".join(f"{axis}={sizes}" for axis, sizes in self.axes.items())


def _default_profiles(length: AxisRange, **more: AxisRange) -> tuple[ShapeProfile, ...]:
    axes = {"texts": AxisRange(1, 16, 64), "length": length, "past": AxisRange(1, 8, 40), **more}
    return (
        ShapeProfile("latency", {"batch": AxisRange(1, 1, 1), **axes}),
        ShapeProfile("bulk", {"batch": AxisRange(1, 16, 32), **axes}),
    )


DEFAULT_PROFILES = _default_profiles(AxisRange(1, 16, 40))
"""One image at a time for latency, many for throughput; captions average 13 tokens and are cut at 40, and a decoder
writes as many. The second takes all that the first does, so that a server may put requests together."""

PACKED_PROFILES = _default_profiles(AxisRange(1, 64, 128), rows=AxisRange(1, 4, 16))
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
        if axis not in AXES:
            raise InputError(f"profile {name!r} names an axis {axis!r}; the axes are {', '.join(AXES)}")
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
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two profiles are named {twice[0]!r}; give each a name of its own")
    return profiles


def graph_profiles(graph: GraphRecord, profiles: Sequence[ShapeProfile]) -> list[ProfileRecord]:
    """The input shapes of a graph under each profile, duplicates dropped; empty without dynamic axes."""
    records: list[ProfileRecord] = []
    for profile in profiles if graph.axes else ():
        for axis, accepted in graph.axes.items():
            if axis not in profile.axes:
                raise InputError(
                    f"profile {profile.name!r} lacks {axis!r}, an axis of graph {graph.name!r}; add "
                    f"{axis}=least..best..most to it"
                )
            sizes, top = profile.axes[axis], accepted.most
            if sizes.least < accepted.least or (top is not None and sizes.most > top):
                raise InputError(
                    f"profile {profile.name!r} has {axis}={sizes} and graph {graph.name!r} accepts {accepted.least} "
                    f"to {'any size' if top is None else top}; narrow the range"
                )
        shapes = {
            bound: {
                tensor.name: [getattr(profile.axes[dim], bound) if isinstance(dim, str) else dim for dim in tensor.dims]
                for tensor in graph.inputs
            }
            for bound in ("least", "best", "most")
        }
        record = ProfileRecord(name=profile.name, **shapes)
        if all(record.model_copy(update={"name": other.name}) != other for other in records):
            records.append(record)
    return records


@dataclass(frozen=True)
class SizeRange:
    """Sizes of an axis; `most` None is unbounded, `best` is the size that an engine was tuned for."""

    least: int
    most: int | None
    best: int | None = None

    @property
    def single(self) -> bool:
        return self.least == self.most

    def __str__(self) -> str:
        if self.single:
            return f"exactly {self.least}"
        return f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"


@dataclass(frozen=True)
class Slot:
    """Shapes that a graph accepts together: ranges by axis, and name and number of the profile."""

    name: str
    number: int
    ranges: Mapping[str, SizeRange]

    @property
    def fixed(self) -> bool:
        return all(sizes.single for sizes in self.ranges.values())

    def padded(self, sizes: Mapping[str, int]) -> dict[str, int] | None:
        """The sizes that a request is padded to; None where it is too large."""
        out = {}
        for axis, size in sizes.items():
            allowed = self.ranges[axis]
            if allowed.most is not None and size > allowed.most:
                return None
            out[axis] = max(size, allowed.least)
        return out

    def example(self, kind: Literal["small", "large"] = "small") -> dict[str, int]:
        """Sizes to warm up with: the tuned ones, else the nearest to those of `AXES`."""
        out = {}
        for axis, allowed in self.ranges.items():
            size = max(getattr(AXES[axis], kind), allowed.least) if allowed.best is None else allowed.best
            out[axis] = size if allowed.most is None else min(size, allowed.most)
        return out


def axes_of(tensor: TensorRecord) -> list[str | None]:
    """The axis of every dimension of a tensor; None for a dimension that never varies."""
    return [dim if dim in AXES else None for dim in dims_of(tensor.name, len(tensor.dims))]


def graph_slots(record: GraphRecord) -> list[Slot]:
    """The slots of a graph, in the order of its profiles."""
    if record.profiles:
        return [
            Slot(
                profile.name,
                number,
                {
                    axis: SizeRange(
                        profile.least[tensor.name][place],
                        profile.most[tensor.name][place],
                        profile.best[tensor.name][place],
                    )
                    for tensor in record.inputs
                    for place, axis in enumerate(axes_of(tensor))
                    if axis is not None
                },
            )
            for number, profile in enumerate(record.profiles)
        ]
    ranges: dict[str, SizeRange] = {}
    for tensor in record.inputs:
        for axis, dim in zip(axes_of(tensor), tensor.dims, strict=True):
            if axis is not None and isinstance(dim, int):
                ranges[axis] = SizeRange(dim, dim)
            elif axis is not None:
                ranges[axis] = SizeRange(record.axes[axis].least, record.axes[axis].most)
    slot = Slot("dynamic", 0, ranges)
    return [Slot("fixed", 0, ranges) if slot.fixed else slot]


def choose_slot(graph: str, slots: Sequence[Slot], sizes: Mapping[str, int]) -> tuple[Slot, dict[str, int]]:
    """The slot with the least padding for a request, and the padded sizes; raises `InputError` where no slot fits."""
    fitting = [(slot, padded) for slot in slots if (padded := slot.padded(sizes)) is not None]
    if not fitting:
        raise InputError(_refusal(graph, slots, sizes))

    def waste(choice: tuple[Slot, dict[str, int]]) -> tuple[int, float]:
        slot, padded = choice
        return prod(padded.values()), prod(inf if r.most is None else r.most for r in slot.ranges.values())

    return min(fitting, key=waste)


def largest(slots: Sequence[Slot], axis: str) -> int | None:
    """The largest size of an axis over all slots; None where it is unbounded."""
    tops = [slot.ranges[axis].most for slot in slots]
    return None if None in tops else max(top for top in tops if top is not None)


def request_sizes(record: GraphRecord, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes of the axes of a request; raises `InputError` for missing, unknown or mismatched inputs."""
    names = [tensor.name for tensor in record.inputs]
    if wrong := sorted({*inputs} ^ {*names}):
        raise InputError(
            f"graph {record.name!r}: inputs missing or unknown: {', '.join(wrong)}; give {', '.join(names)}"
        )
    sizes: dict[str, int] = {}
    for tensor in record.inputs:
        shape, axes = [*inputs[tensor.name].shape], axes_of(tensor)
        expected = [axis or dim for axis, dim in zip(axes, tensor.dims, strict=True)]
        if len(shape) != len(expected) or any(
            isinstance(dim, int) and dim != size for dim, size in zip(expected, shape, strict=True)
        ):
            raise InputError(
                f"graph {record.name!r}: {tensor.name} is {shape}; it must be [{', '.join(map(str, expected))}]"
            )
        for axis, size in zip(axes, shape, strict=True):
            if axis is not None and sizes.setdefault(axis, size) != size:
                raise InputError(
                    f"graph {record.name!r}: {tensor.name} is {shape}, so {axis} is {size}, but another input has "
                    f"{sizes[axis]}"
                )
    return sizes


def pad_tensor(value: Tensor, axes: Sequence[str | None], sizes: Mapping[str, int], filling: int = 0) -> Tensor:
    """Append `filling` until the dimensions of axes have their sizes; the tensor itself where they do."""
    lacking = [0 if axis is None else sizes[axis] - size for axis, size in zip(axes, value.shape, strict=False)]
    if not any(lacking):
        return value
    pads = [0] * (2 * (value.dim() - len(axes)))
    for missing in reversed(lacking):
        pads += [0, missing]
    return F.pad(value, pads, value=filling)


def trim_tensor(value: Tensor, axes: Sequence[str | None], sizes: Mapping[str, int]) -> Tensor:
    """The inverse of `pad_tensor`, as a view."""
    for place, axis in enumerate(axes):
        value = value if axis is None else value.narrow(place, 0, sizes[axis])
    return value


def tensor_shape(tensor: TensorRecord, sizes: Mapping[str, int]) -> torch.Size:
    """Shape of an input or output at the given sizes of its axes."""
    pairs = zip(axes_of(tensor), tensor.dims, strict=True)
    return torch.Size([int(dim) if axis is None else sizes[axis] for axis, dim in pairs])


def empty_tensors(tensors: Iterable[TensorRecord], sizes: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
    """Uninitialised memory for inputs or outputs of a graph at the given sizes."""
    return {
        each.name: torch.empty(tensor_shape(each, sizes), dtype=TORCH_DTYPES[each.dtype], device=device)
        for each in tensors
    }


def _refusal(graph: str, slots: Sequence[Slot], sizes: Mapping[str, int]) -> str:
    kind = "profile" if len(slots) > 1 or slots[0].name not in ("dynamic", "fixed") else "graph"
    for axis, size in sizes.items():
        top = largest(slots, axis)
        if top is not None and size > top:
            taken = "; ".join(
                f"{f'profile {slot.name!r}' if kind == 'profile' else f'graph {graph!r}'} takes {slot.ranges[axis]}"
                for slot in slots
            )
            return (
                f"graph {graph!r}: {axis} is {size} and {taken}; split or shorten the request, or export with a wider "
                f"{'--profile' if kind == 'profile' else 'range'}"
            )
    asked = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    offered = "; ".join(
        f"profile {slot.name!r}: " + ", ".join(f"{axis} {slot.ranges[axis]}" for axis in sizes) for slot in slots
    )
    return f"graph {graph!r}: no profile takes {asked} together ({offered}); split the request or add a --profile"


class TokenBatch(NamedTuple):
    """Captions of one pass by number, in the order of the pass, each padded to `length` tokens."""

    rows: tuple[int, ...]
    length: int


class Rows(NamedTuple):
    """Captions by number, packed into rows of `length` tokens."""

    texts: tuple[tuple[int, ...], ...]
    length: int


class FusionPass(NamedTuple):
    """One run of the fusion graph: `[B]` memories, and `[B][T]` captions or `[B][R]` rows of captions on them."""

    images: tuple[int, ...]
    parts: tuple[tuple[Any, ...], ...]
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return len(self.images) * len(self.parts[0]) * self.length


@dataclass(frozen=True)
class PassLimits:
    """Token budget of a pass, price of a pass in tokens, and the multiple that lengths are padded to."""

    budget: int
    pass_tokens: int
    step: int = 1

    def padded(self, length: int, slots: Sequence[Slot]) -> int:
        """The padded length of captions: the next multiple of `step` within the closest slot."""
        stepped = -(-length // self.step) * self.step
        taken = []
        for allowed in (slot.ranges["length"] for slot in slots):
            if allowed.most is None or length <= allowed.most:
                taken.append(max(stepped if allowed.most is None else min(stepped, allowed.most), allowed.least))
        return min(taken, default=length)


def token_batches(
    lengths: Sequence[int],
    budget: int,
    *,
    pass_tokens: int = 0,
    most: int | None = None,
    padded: Callable[[int], int] = lambda length: length,
) -> list[TokenBatch]:
    """Divide captions into passes with the fewest padded tokens plus `pass_tokens` per pass."""
    if budget < 1 or (most is not None and most < 1):
        raise InputError(f"a pass of {budget} tokens and {most} texts holds nothing; give positive numbers")
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    # rows[:bounds[n]] are the captions of the n shortest distinct lengths.
    bounds = [place for place in range(len(rows)) if not place or lengths[rows[place]] > lengths[rows[place - 1]]]
    bounds.append(len(rows))
    batches: list[TokenBatch] = []
    for start, stop in _cuts(
        bounds, [padded(lengths[rows[stop - 1]]) for stop in bounds[1:]], budget, most, pass_tokens
    ):
        group = rows[start:stop]
        fit = _fitting(padded(lengths[group[-1]]), budget, most)
        pieces = ceil(len(group) / fit)
        for piece in range(pieces):
            chosen = group[piece * len(group) // pieces : (piece + 1) * len(group) // pieces]
            batches.append(TokenBatch(tuple(chosen), padded(lengths[chosen[-1]])))
    return batches


def _fitting(length: int, budget: int, most: int | None) -> int:
    """Captions of a length that fit into a pass."""
    fit = max(budget // max(length, 1), 1)
    return fit if most is None else min(fit, most)


def _cuts(
    bounds: Sequence[int], sizes: Sequence[int], budget: int, most: int | None, pass_tokens: int
) -> list[tuple[int, int]]:
    """The cheapest division of the sorted lengths into runs; `sizes[n]` is padded length n."""
    best, previous = [0.0], [0]
    for stop in range(1, len(bounds)):
        length = sizes[stop - 1]
        fit = _fitting(length, budget, most)
        cheapest, place = inf, 0
        for start in range(stop):
            texts = bounds[stop] - bounds[start]
            cost = best[start] + texts * length + pass_tokens * ceil(texts / fit)
            if cost < cheapest:
                cheapest, place = cost, start
        best.append(cheapest)
        previous.append(place)
    runs: list[tuple[int, int]] = []
    stop = len(bounds) - 1
    while stop > 0:
        runs.append((bounds[previous[stop]], bounds[stop]))
        stop = previous[stop]
    return runs[::-1]


def plan_passes(
    image_of: Sequence[int],
    lengths: Sequence[int],
    slots: Sequence[Slot],
    limits: PassLimits,
    *,
    packed_width: int | None = None,
) -> list[FusionPass]:
    """Passes of the fusion graph, every pair once; raises `InputError` where a caption exceeds all slots.

    `packed_width` is that of the text embeddings of a packed graph; None for a padded one.
    """
    for length in sorted(set(lengths))[-1:]:
        choose_slot("fusion", slots, {"length": length})
    # Where rows of texts that are not there are computed too, the fewest passes are the cheapest.
    full = packed_width is None and min(slot.ranges["texts"].least for slot in slots) > 1
    price = limits.budget if full else limits.pass_tokens
    groups: dict[int, list[int]] = {}
    for text, image in enumerate(image_of):
        groups.setdefault(image, []).append(text)
    units: list[FusionPass] = []
    for image, texts in groups.items():
        if packed_width is not None:
            rows = row_batches(texts, lengths, slots, limits, packed_width, "fusion")
            units += [FusionPass((image,), (each.texts,), each.length) for each in rows]
            continue
        batches = token_batches(
            [lengths[text] for text in texts], limits.budget, pass_tokens=price, most=largest(slots, "texts"),
            padded=lambda length: limits.padded(length, slots),
        )  # fmt: skip
        units += [FusionPass((image,), (tuple(texts[row] for row in batch.rows),), batch.length) for batch in batches]
    return _combine(units, slots, limits, "texts" if packed_width is None else "rows")


def row_batches(
    texts: Sequence[int], lengths: Sequence[int], slots: Sequence[Slot], limits: PassLimits, width: int, graph: str
) -> list[Rows]:
    """Divide captions into passes of a packed graph; raises `InputError` where a caption exceeds all slots."""
    if not texts:
        return []
    longest = max(lengths[text] for text in texts)
    choose_slot(graph, slots, {"length": longest})
    tokens = sum(lengths[text] for text in texts)
    most = largest(slots, "batch" if graph == "text" else "texts") or len(texts)
    order = sorted(texts, key=lengths.__getitem__)
    for count in range(max(ceil(tokens / limits.budget), ceil(len(texts) / most)), len(texts) + 1):
        # By turns, so that each has its share of short and long ones.
        found = [
            pack_rows(
                order[part::count], lengths, width, most_rows=largest(slots, "rows"),
                most_length=largest(slots, "length"), padded=lambda length: limits.padded(length, slots),
            )
            for part in range(count)
        ]  # fmt: skip
        made = [rows for rows in found if rows is not None]
        if len(made) == len(found):
            return made
    raise AssertionError("a text alone fits into every slot that takes its length")


def _combine(units: Sequence[FusionPass], slots: Sequence[Slot], limits: PassLimits, axis: str) -> list[FusionPass]:
    """Combine passes of one image each into passes of equal numbers of captions or rows."""
    by_count: dict[int, list[FusionPass]] = {}
    for unit in units:
        by_count.setdefault(len(unit.parts[0]), []).append(unit)
    passes = []
    for count, alike in by_count.items():
        # Every unit is a row of `count` parts; padding counts for all of them.
        batches = token_batches(
            [unit.tokens for unit in alike],
            limits.budget,
            pass_tokens=limits.pass_tokens,
            # A profile may take many memories or many texts of each, but not both.
            most=largest([slot for slot in slots if slot.padded({axis: count}) is not None], "batch"),
        )
        for batch in batches:
            # In the order of the images, so that neighbouring memories need no copy.
            chosen = sorted((alike[row] for row in batch.rows), key=lambda unit: unit.images)
            passes.append(
                FusionPass(
                    tuple(unit.images[0] for unit in chosen),
                    tuple(unit.parts[0] for unit in chosen),
                    max(unit.length for unit in chosen),
                )
            )
    return passes


def pack_rows(
    texts: Sequence[int],
    lengths: Sequence[int],
    width: int,
    *,
    most_rows: int | None = None,
    most_length: int | None = None,
    padded: Callable[[int], int] = lambda length: length,
) -> Rows | None:
    """The cheapest packing by padded tokens and attention cost; None where no packing fits the limits."""
    order = sorted(texts, key=lengths.__getitem__, reverse=True)
    total, longest = sum(lengths[text] for text in texts), lengths[order[0]]
    top_rows = min(len(order), most_rows or len(order))
    counts = {ceil(total / max(target, longest)) for target in (longest, *_TARGETS)}
    best, cheapest = None, inf
    for count in sorted(count for count in counts if count <= top_rows) or [top_rows]:
        rows, length = _fill_rows(order, lengths, count)
        while most_length is not None and length > most_length and count < top_rows:
            count += 1
            rows, length = _fill_rows(order, lengths, count)
        if most_length is not None and length > most_length:
            continue
        length = padded(length)
        # Of a layer 24 w² operations a token are products and 4 w L attention, at a third of their speed.
        cost = count * length * (1 + length / (2 * width))
        if cost < cheapest:
            best, cheapest = Rows(rows, length), cost
    return best


def _fill_rows(order: Sequence[int], lengths: Sequence[int], count: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Greedy packing into `count` rows, longest caption first; returns the rows and the tokens of the fullest."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]
    heapify(loads)
    for text in order:
        load, row = loads[0]
        rows[row].append(text)
        heapreplace(loads, (load + lengths[text], row))
    return tuple(map(tuple, rows)), max(load for load, _ in loads)


@dataclass(frozen=True)
class Layout:
    """Token positions of one pass: B images (1 without images) with R rows of L tokens each."""

    source: Tensor  # [N] token numbers over all captions, concatenated
    place: Tensor  # [N] position of each among all B R L
    segments: Tensor  # [B, R, L], as graphs take them
    firsts: Tensor  # [B, T, 2]
    texts: Tensor  # [P] caption numbers
    found: Tensor  # [P] position of the results of each among all B T

    @classmethod
    def of(cls, images: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], length: int) -> Layout:
        """The layout of captions: `images` holds the rows of every image, the same number of rows each."""
        counts = [sum(map(len, rows)) for rows in images]
        rows = len(images[0])
        texts = np.array([text for image in images for row in image for text in row])
        row = np.repeat(np.arange(len(images) * rows), [len(row) for image in images for row in image])
        sizes = np.asarray(lengths)[texts]
        behind = np.cumsum(sizes) - sizes
        # Tokens before the first text of a row; rows without one have no say.
        begins = np.zeros(len(images) * rows, dtype=np.int64)
        begins[row[::-1]] = behind[::-1]
        offset = behind - begins[row]
        # Of every token: which of the texts here it belongs to, and its place in it.
        of = np.repeat(np.arange(len(texts)), sizes)
        inner = np.arange(len(of)) - behind[of]
        place = row[of] * length + offset[of] + inner
        starts = np.cumsum(lengths) - np.asarray(lengths)
        image = np.repeat(np.arange(len(images)), counts)
        # The texts of an image are numbered as they come, wherever they lie.
        number = np.empty(len(texts), dtype=np.int64)
        number[np.lexsort((texts, image))] = np.concatenate([np.arange(count) for count in counts])
        segments = np.zeros(len(images) * rows * length, dtype=np.int64)
        segments[place] = number[of] + 1
        firsts = np.zeros((len(images), max(counts), 2), dtype=np.int64)
        firsts[image, number] = np.stack([row % rows, offset], axis=1)
        return cls(
            source=torch.from_numpy(starts[texts][of] + inner),
            place=torch.from_numpy(place),
            segments=torch.from_numpy(segments).view(len(images), rows, length),
            firsts=torch.from_numpy(firsts),
            texts=torch.from_numpy(texts),
            found=torch.from_numpy(image * max(counts) + number),
        )

    def spread(self, values: Tensor, padding: int = 0) -> Tensor:
        """Scatter token values, `[tokens of all captions, ...]` → `[B, R, L, ...]`, with `padding` elsewhere."""
        out = values.new_full((self.segments.numel(), *values.shape[1:]), padding)
        out[self.place.to(values.device)] = values.index_select(0, self.source.to(values.device))
        return out.view(*self.segments.shape, *values.shape[1:])
