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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError

from .manifest import AXES, GraphRecord, ProfileRecord, TensorRecord

# Tokens of a row that are tried: about as many as a caption has, to where attention begins to count.
_TARGETS = (32, 48, 64, 96, 128)
_SYNTAX = (
    "write name:axis=least..best..most, such as latency:batch=1,texts=1..8..64,length=1..16..40"
)
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


class SizeRange(NamedTuple):
    """Sizes of an axis; `most` None is unbounded, `best` is the size that an engine is tuned for."""

    least: int
    most: int | None
    best: int | None = None

    @property
    def single(self) -> bool:
        return self.least == self.most

    def __str__(self) -> str:
        if self.best is not None:
            return f"{self.least}..{self.best}..{self.most}"
        if self.single:
            return f"exactly {self.least}"
        return f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"


@dataclass(frozen=True)
class Slot:
    """Shapes that a graph accepts together: ranges by axis, and name and number of the profile."""

    name: str
    number: int
    ranges: Mapping[str, SizeRange]

    def __str__(self) -> str:
        return f"{self.name}:" + ",".join(f"{axis}={sizes}" for axis, sizes in self.ranges.items())

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

    def example(self) -> dict[str, int]:
        """Sizes to warm up with: the tuned ones, else the nearest to `AXES`."""
        out = {}
        for axis, allowed in self.ranges.items():
            size = max(AXES[axis].small, allowed.least) if allowed.best is None else allowed.best
            out[axis] = size if allowed.most is None else min(size, allowed.most)
        return out


def _default_profiles(length: SizeRange, **more: SizeRange) -> tuple[Slot, ...]:
    axes = {"texts": SizeRange(1, 64, 16), "length": length, "past": SizeRange(1, 40, 8), **more}
    return (
        Slot("latency", 0, {"batch": SizeRange(1, 1, 1), **axes}),
        Slot("bulk", 1, {"batch": SizeRange(1, 32, 16), **axes}),
    )


DEFAULT_PROFILES = _default_profiles(SizeRange(1, 40, 16))
"""One image at a time for latency, many for throughput; captions average 13 tokens and are cut at 40, and a decoder
writes as many. The second takes all that the first does, so that a server may put requests together."""

PACKED_PROFILES = _default_profiles(SizeRange(1, 128, 64), rows=SizeRange(1, 16, 4))
"""The same for graphs that take texts in rows: as many texts, of 13 tokens each."""


def parse_profiles(texts: Iterable[str], *, packed: bool = False) -> tuple[Slot, ...]:
    """Profiles from their texts; without texts `PACKED_PROFILES` or `DEFAULT_PROFILES`."""
    profiles: list[Slot] = []
    for text in texts:
        name, colon, rest = (piece.strip() for piece in text.partition(":"))
        if not colon or not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise InputError(f"profile {text!r} has no name; {_SYNTAX}")
        axes: dict[str, SizeRange] = {}
        for part in filter(None, map(str.strip, rest.split(","))):
            axis, _, sizes = (piece.strip() for piece in part.partition("="))
            if axis not in AXES or axis in axes:
                raise InputError(
                    f"profile {name!r}: {axis!r} is twice there, or not one of {', '.join(AXES)}"
                )
            # `a..b` is tuned for b.
            numbers = [
                int(size) if size.isascii() and size.isdigit() else 0
                for size in map(str.strip, sizes.split(".."))
            ]
            if len(numbers) > 3 or numbers[0] < 1 or numbers != sorted(numbers):
                raise InputError(
                    f"profile {name!r}: {axis}={sizes} is no rising range from 1 or more; {_SYNTAX}"
                )
            axes[axis] = SizeRange(numbers[0], numbers[-1], numbers[len(numbers) // 2])
        if not axes or any(name == other.name for other in profiles):
            raise InputError(f"profile {name!r} is empty or defined twice; {_SYNTAX}")
        profiles.append(Slot(name, len(profiles), axes))
    return tuple(profiles) or (PACKED_PROFILES if packed else DEFAULT_PROFILES)


def graph_profiles(graph: GraphRecord, profiles: Sequence[Slot]) -> list[ProfileRecord]:
    """The input shapes of a graph under each profile, duplicates dropped; empty without dynamic axes."""
    records: list[ProfileRecord] = []
    for profile in profiles if graph.axes else ():
        for axis, accepted in graph.axes.items():
            sizes, top = profile.ranges.get(axis), accepted.most
            if (
                sizes is None
                or sizes.least < accepted.least
                or (top is not None and (sizes.most or top) > top)
            ):
                raise InputError(
                    f"profile {profile.name!r} has {axis}={sizes} and graph {graph.name!r} accepts "
                    f"{SizeRange(accepted.least, top)}; give {axis}=least..best..most within it"
                )
        shapes = {
            bound: {
                tensor.name: [
                    getattr(profile.ranges[dim], bound) if isinstance(dim, str) else dim
                    for dim in tensor.dims
                ]
                for tensor in graph.inputs
            }
            for bound in ("least", "best", "most")
        }
        record = ProfileRecord(name=profile.name, **shapes)
        if all(record.model_copy(update={"name": other.name}) != other for other in records):
            records.append(record)
    return records


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
                    for place, axis in enumerate(tensor.axes)
                    if axis is not None
                },
            )
            for number, profile in enumerate(record.profiles)
        ]
    ranges: dict[str, SizeRange] = {}
    for tensor in record.inputs:
        for axis, dim in zip(tensor.axes, tensor.dims, strict=True):
            if axis is not None and isinstance(dim, int):
                ranges[axis] = SizeRange(dim, dim)
            elif axis is not None:
                ranges[axis] = SizeRange(record.axes[axis].least, record.axes[axis].most)
    slot = Slot("dynamic", 0, ranges)
    return [Slot("fixed", 0, ranges) if slot.fixed else slot]


def choose_slot(
    graph: str, slots: Sequence[Slot], sizes: Mapping[str, int]
) -> tuple[Slot, dict[str, int]]:
    """The slot with the least padding for a request, and the padded sizes; raises `InputError` where no slot fits."""
    fitting = [(slot, padded) for slot in slots if (padded := slot.padded(sizes)) is not None]
    if not fitting:
        shape = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise InputError(
            f"graph {graph!r} takes no {shape} (it takes {'; or '.join(map(str, slots))}); split or shorten the "
            "request, or export with wider sizes"
        )

    def waste(choice: tuple[Slot, dict[str, int]]) -> tuple[int, float]:
        slot, padded = choice
        return prod(padded.values()), prod(
            inf if r.most is None else r.most for r in slot.ranges.values()
        )

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
        shape, axes = [*inputs[tensor.name].shape], tensor.axes
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


def pad_tensor(
    value: Tensor, axes: Sequence[str | None], sizes: Mapping[str, int], filling: int = 0
) -> Tensor:
    """Append `filling` until the dimensions of axes have their sizes; the tensor itself where they do."""
    lacking = [
        0 if axis is None else sizes[axis] - size
        for axis, size in zip(axes, value.shape, strict=False)
    ]
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


def empty_tensors(
    tensors: Iterable[TensorRecord], sizes: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """Uninitialised memory for inputs or outputs of a graph at the given sizes."""
    return {
        each.name: torch.empty(each.shape(sizes), dtype=TORCH_DTYPES[each.dtype], device=device)
        for each in tensors
    }


class TokenBatch(NamedTuple):
    """Captions of one pass by number, in the order of the pass, each padded to `length` tokens."""

    rows: tuple[int, ...]
    length: int


class Rows(NamedTuple):
    """Captions by number, packed into rows of `length` tokens."""

    texts: tuple[tuple[int, ...], ...]
    length: int


class Pass(NamedTuple):
    """One run of `text` or `fusion`: `[B]` memories, and `[B][R]` rows of captions on them; a padded row has one."""

    images: tuple[int, ...]
    rows: tuple[tuple[tuple[int, ...], ...], ...]
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return len(self.images) * len(self.rows[0]) * self.length


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
                taken.append(
                    max(
                        stepped if allowed.most is None else min(stepped, allowed.most),
                        allowed.least,
                    )
                )
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
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    # rows[:bounds[n]] are the captions of the n shortest distinct lengths.
    bounds = [
        place
        for place in range(len(rows))
        if not place or lengths[rows[place]] > lengths[rows[place - 1]]
    ]
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
    graph: str,
    image_of: Sequence[int] | None,
    lengths: Sequence[int],
    slots: Sequence[Slot],
    limits: PassLimits,
    *,
    packed_width: int | None = None,
) -> list[Pass]:
    """Passes of `text`, or of `fusion` given the image of each caption; every caption once.

    Raises `InputError` where a caption exceeds all slots. `packed_width` is that of the text embeddings of a packed
    graph; None for a padded one.
    """
    if not lengths:
        return []
    choose_slot(graph, slots, {"length": max(lengths)})
    axis = "batch" if image_of is None else "texts"
    # Where absent captions are computed too, the fewest passes are the cheapest.
    full = packed_width is None and min(slot.ranges[axis].least for slot in slots) > 1
    price = limits.budget if full else limits.pass_tokens
    groups: dict[int, list[int]] = {}
    for text, image in enumerate([0] * len(lengths) if image_of is None else image_of):
        groups.setdefault(image, []).append(text)
    passes: list[Pass] = []
    for image, texts in groups.items():
        if packed_width is not None:
            rows = _row_batches(texts, lengths, slots, limits, packed_width, largest(slots, axis))
        else:
            batches = token_batches(
                [lengths[text] for text in texts], limits.budget, pass_tokens=price, most=largest(slots, axis),
                padded=lambda length: limits.padded(length, slots),
            )  # fmt: skip
            rows = [
                Rows(tuple((texts[number],) for number in batch.rows), batch.length)
                for batch in batches
            ]
        passes += [Pass((image,), (each.texts,), each.length) for each in rows]
    return (
        passes
        if image_of is None
        else _combine(passes, slots, limits, "texts" if packed_width is None else "rows")
    )


def _row_batches(
    texts: Sequence[int],
    lengths: Sequence[int],
    slots: Sequence[Slot],
    limits: PassLimits,
    width: int,
    top: int | None,
) -> list[Rows]:
    """Divide captions into passes of a packed graph, which takes `top` captions at once."""
    tokens, most = sum(lengths[text] for text in texts), top or len(texts)
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


def _combine(
    units: Sequence[Pass], slots: Sequence[Slot], limits: PassLimits, axis: str
) -> list[Pass]:
    """Combine passes of one image each into passes of equal numbers of rows."""
    by_count: dict[int, list[Pass]] = {}
    for unit in units:
        by_count.setdefault(len(unit.rows[0]), []).append(unit)
    passes = []
    for count, alike in by_count.items():
        # Padding counts for all rows of a pass.
        batches = token_batches(
            [unit.tokens for unit in alike],
            limits.budget,
            pass_tokens=limits.pass_tokens,
            # A profile may take many memories or many texts of each, but not both.
            most=largest(
                [slot for slot in slots if slot.padded({axis: count}) is not None], "batch"
            ),
        )
        for batch in batches:
            # In the order of the images, so that neighbouring memories need no copy.
            chosen = sorted((alike[row] for row in batch.rows), key=lambda unit: unit.images)
            passes.append(
                Pass(
                    tuple(unit.images[0] for unit in chosen),
                    tuple(unit.rows[0] for unit in chosen),
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


def _fill_rows(
    order: Sequence[int], lengths: Sequence[int], count: int
) -> tuple[tuple[tuple[int, ...], ...], int]:
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
    """Token positions of one pass: B images (1 without images) with R rows of L tokens; padded: one caption a row."""

    source: Tensor  # [N] token numbers over all captions, concatenated
    place: Tensor  # [N] position of each among all B R L
    segments: Tensor  # [B, R, L], as graphs take them
    firsts: Tensor  # [B, T, 2]
    texts: Tensor  # [P] caption numbers
    found: Tensor  # [P] position of the results of each among all B T

    @classmethod
    def of(
        cls, images: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], length: int
    ) -> Layout:
        """The layout of captions: `images` holds the rows of every image, the same number of rows each."""
        counts = [sum(map(len, rows)) for rows in images]
        rows, most = len(images[0]), max(counts)
        texts = np.array([text for image in images for row in image for text in row])
        row = np.repeat(
            np.arange(len(images) * rows), [len(row) for image in images for row in image]
        )
        sizes = np.asarray(lengths)[texts]
        before = np.cumsum(sizes) - sizes
        # Tokens before the first caption of a row; empty rows are not read.
        begins = np.zeros(len(images) * rows, dtype=np.int64)
        begins[row[::-1]] = before[::-1]
        offset = before - begins[row]
        # Caption of every token, and the token's position in it.
        of = np.repeat(np.arange(len(texts)), sizes)
        inner = np.arange(len(of)) - before[of]
        place = row[of] * length + offset[of] + inner
        starts = np.cumsum(lengths) - np.asarray(lengths)
        image = np.repeat(np.arange(len(images)), counts)
        number = np.concatenate([np.arange(count) for count in counts])
        segments = np.zeros(len(images) * rows * length, dtype=np.int64)
        segments[place] = number[of] + 1
        firsts = np.zeros((len(images), most, 2), dtype=np.int64)
        firsts[image, number] = np.stack([row % rows, offset], axis=1)
        source, found = starts[texts][of] + inner, image * most + number
        return cls(
            *map(
                torch.from_numpy,
                (source, place, segments.reshape(len(images), rows, length), firsts, texts, found),
            )
        )

    def inputs(self, packed: bool) -> dict[str, Tensor]:
        """Inputs of a graph that mark captions."""
        if packed:
            return {"segments": self.segments, "firsts": self.firsts}
        return {"attention_mask": (self.segments > 0).long()}

    def spread(self, values: Tensor, padding: int | None = None) -> Tensor:
        """Token values `[tokens of all captions, ...]` → `[B, R, L, ...]`; padding is arbitrary where None."""
        index = torch.zeros(self.segments.numel(), dtype=torch.long)
        index[self.place] = self.source
        out = values.index_select(0, index.to(values.device)).view(
            *self.segments.shape, *values.shape[1:]
        )
        return (
            out
            if padding is None
            else out.masked_fill((self.segments == 0).to(out.device), padding)
        )
