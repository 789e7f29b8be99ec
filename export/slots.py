"""The shapes that a graph accepts, the padding of a request to them, and the division of captions into passes.

A graph with dynamic axes has one slot for every size, a graph with fixed axes one for a single size, and an engine one
for each profile.

A session batches captions with little padding, in few passes, each within a token budget.

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

from .manifest import AXES, LONGEST_ROW, GraphRecord, ProfileRecord, TensorRecord

# Lengths of packed rows to try: from about a caption to where the cost of attention begins to count.
_ROW_LENGTHS = (32, 48, 64, 96, 128)
# Tokens that the default profiles of an encoder are tuned for; they take as many as the model.
_ENCODER_LENGTH = 64
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
    """Shapes that a graph accepts together: ranges by axis, and name and index of the profile."""

    name: str
    index: int
    ranges: Mapping[str, SizeRange]

    def __str__(self) -> str:
        return f"{self.name}:" + ",".join(f"{axis}={sizes}" for axis, sizes in self.ranges.items())

    def padded(self, sizes: Mapping[str, int]) -> dict[str, int] | None:
        """Return the sizes that a request is padded to; None if it is too large."""
        out = {}
        for axis, size in sizes.items():
            allowed = self.ranges[axis]
            if allowed.most is not None and size > allowed.most:
                return None
            out[axis] = max(size, allowed.least)
        return out

    def example(self) -> dict[str, int]:
        """Return sizes to warm up with: the tuned ones, else the nearest to `AXES`."""
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
    """Parse profiles; without texts `PACKED_PROFILES` or `DEFAULT_PROFILES`."""
    profiles: dict[str, Slot] = {}
    for text in texts:
        name, colon, ranges = (word.strip() for word in text.partition(":"))
        if not colon or not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise InputError(f"profile {text!r} has no name; {_SYNTAX}")
        axes = _parse_ranges(name, ranges)
        if not axes or name in profiles:
            raise InputError(f"profile {name!r} is empty or defined twice; {_SYNTAX}")
        profiles[name] = Slot(name, len(profiles), axes)
    return tuple(profiles.values()) or (PACKED_PROFILES if packed else DEFAULT_PROFILES)


def _parse_ranges(profile: str, text: str) -> dict[str, SizeRange]:
    ranges: dict[str, SizeRange] = {}
    for assignment in filter(None, map(str.strip, text.split(","))):
        axis, _, bounds = (word.strip() for word in assignment.partition("="))
        if axis not in AXES or axis in ranges:
            raise InputError(
                f"profile {profile!r}: {axis!r} is twice there, or not one of {', '.join(AXES)}"
            )
        sizes = []
        for size in map(str.strip, bounds.split("..")):
            sizes.append(int(size) if size.isascii() and size.isdigit() else 0)
        if len(sizes) > 3 or sizes[0] < 1 or sizes != sorted(sizes):
            raise InputError(
                f"profile {profile!r}: {axis}={bounds} is not a rising range from 1 or more; {_SYNTAX}"
            )
        # `a..b` is tuned for b.
        ranges[axis] = SizeRange(sizes[0], sizes[-1], sizes[len(sizes) // 2])
    return ranges


def graph_profiles(graph: GraphRecord, profiles: Sequence[Slot]) -> list[ProfileRecord]:
    """Return the input shapes of a graph under each profile, without duplicates; none without dynamic axes."""
    records: list[ProfileRecord] = []
    if profiles is DEFAULT_PROFILES and graph.name == "encoder" and "length" in graph.axes:
        longest = graph.axes["length"].most or LONGEST_ROW
        profiles = _default_profiles(SizeRange(1, longest, min(longest, _ENCODER_LENGTH)))
    for profile in profiles if graph.axes else ():
        for axis, accepted in graph.axes.items():
            sizes, limit = profile.ranges.get(axis), accepted.most
            if (
                sizes is None
                or sizes.least < accepted.least
                or (limit is not None and (sizes.most or limit) > limit)
            ):
                raise InputError(
                    f"profile {profile.name!r} has {axis}={sizes} and graph {graph.name!r} accepts "
                    f"{SizeRange(accepted.least, limit)}; give {axis}=least..best..most within it"
                )
        shapes = {}
        for bound in ("least", "best", "most"):
            sizes = {axis: getattr(profile.ranges[axis], bound) for axis in graph.axes}
            shapes[bound] = {tensor.name: [*tensor.shape(sizes)] for tensor in graph.inputs}
        if all(
            (record.least, record.best, record.most) != (*shapes.values(),) for record in records
        ):
            records.append(ProfileRecord(name=profile.name, **shapes))
    return records


def graph_slots(record: GraphRecord) -> list[Slot]:
    """Return the slots of a graph, in the order of its profiles."""
    slots: list[Slot] = []
    for profile in record.profiles:
        ranges: dict[str, SizeRange] = {}
        for tensor in record.inputs:
            least, best, most = (
                shapes[tensor.name] for shapes in (profile.least, profile.best, profile.most)
            )
            for dim, axis in enumerate(tensor.axes):
                if axis is not None:
                    ranges[axis] = SizeRange(least[dim], most[dim], best[dim])
        slots.append(Slot(profile.name, len(slots), ranges))
    if slots:
        return slots
    ranges = {}
    for tensor in record.inputs:
        for axis, dim in zip(tensor.axes, tensor.dims, strict=True):
            if axis is not None and isinstance(dim, int):
                ranges[axis] = SizeRange(dim, dim)
            elif axis is not None:
                ranges[axis] = SizeRange(record.axes[axis].least, record.axes[axis].most)
    fixed = all(sizes.single for sizes in ranges.values())
    return [Slot("fixed" if fixed else "dynamic", 0, ranges)]


def choose_slot(
    graph: str, slots: Sequence[Slot], sizes: Mapping[str, int]
) -> tuple[Slot, dict[str, int]]:
    """Return the slot with the least padding for a request, and the padded sizes; `InputError` if no slot fits."""
    candidates = [(slot, padded) for slot in slots if (padded := slot.padded(sizes)) is not None]
    if not candidates:
        shape = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise InputError(
            f"graph {graph!r} does not take {shape} (it takes {'; or '.join(map(str, slots))}); split or shorten the "
            "request, or export with wider sizes"
        )

    def waste(choice: tuple[Slot, dict[str, int]]) -> tuple[int, float]:
        slot, padded = choice
        tops = [inf if sizes.most is None else sizes.most for sizes in slot.ranges.values()]
        return prod(padded.values()), prod(tops)

    return min(candidates, key=waste)


def largest(slots: Sequence[Slot], axis: str) -> int | None:
    """Return the largest size of an axis over all slots; None if it is unbounded."""
    tops = [slot.ranges[axis].most for slot in slots]
    return None if None in tops else max(top for top in tops if top is not None)


def request_sizes(record: GraphRecord, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sizes of the axes of a request; `InputError` for missing, unknown or mismatched inputs."""
    names = [tensor.name for tensor in record.inputs]
    if wrong := sorted({*inputs} ^ {*names}):
        raise InputError(
            f"graph {record.name!r}: inputs missing or unknown: {', '.join(wrong)}; give {', '.join(names)}"
        )
    sizes: dict[str, int] = {}
    for tensor in record.inputs:
        shape, axes = [*inputs[tensor.name].shape], tensor.axes
        expected = [axis or dim for axis, dim in zip(axes, tensor.dims, strict=True)]
        fits = len(shape) == len(expected) and all(
            isinstance(dim, str) or dim == size for dim, size in zip(expected, shape, strict=True)
        )
        if not fits:
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
    """Append `filling` until the dimensions of axes have their sizes; returns a full tensor itself."""
    # `F.pad` takes pairs of both ends, from the last dimension on.
    pads = [0] * (2 * (value.dim() - len(axes)))
    for axis, size in reversed([*zip(axes, value.shape, strict=False)]):
        pads += [0, 0 if axis is None else sizes[axis] - size]
    return F.pad(value, pads, value=filling) if any(pads) else value


def trim_tensor(value: Tensor, axes: Sequence[str | None], sizes: Mapping[str, int]) -> Tensor:
    """Undo `pad_tensor`, as a view."""
    for dim, axis in enumerate(axes):
        # The tokens of an image are no axis of its graph.
        if axis is not None and axis in sizes:
            value = value.narrow(dim, 0, sizes[axis])
    return value


def empty_tensors(
    tensors: Iterable[TensorRecord], sizes: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """Allocate inputs or outputs of a graph at some sizes, uninitialised."""
    return {
        tensor.name: torch.empty(
            tensor.shape(sizes), dtype=TORCH_DTYPES[tensor.dtype], device=device
        )
        for tensor in tensors
    }


Rows = tuple[tuple[int, ...], ...]
"""Captions by index, row by row."""


class TokenBatch(NamedTuple):
    """Captions of one pass by index, in the order of the pass, each padded to `length` tokens."""

    rows: tuple[int, ...]
    length: int


class Pass(NamedTuple):
    """One run of `text` or `fusion`: `[B]` memories, and `[B][R]` rows of captions on them; a padded row has one."""

    images: tuple[int, ...]
    rows: tuple[Rows, ...]
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
        """Return the padded length of captions: the next multiple of `step` within the closest slot."""
        stepped = -(-length // self.step) * self.step
        candidates = []
        for allowed in (slot.ranges["length"] for slot in slots):
            if allowed.most is None:
                candidates.append(max(stepped, allowed.least))
            elif length <= allowed.most:
                candidates.append(max(min(stepped, allowed.most), allowed.least))
        return min(candidates, default=length)


def token_batches(
    lengths: Sequence[int],
    budget: int,
    *,
    pass_tokens: int = 0,
    limit: int | None = None,
    padded: Callable[[int], int] = lambda length: length,
) -> list[TokenBatch]:
    """Divide captions into passes of at most `limit`, with the fewest padded tokens plus `pass_tokens` per pass."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    # order[:bounds[n]] are the captions of the n shortest distinct lengths.
    bounds = [0] if order else []
    bounds += [n for n in range(1, len(order)) if lengths[order[n]] > lengths[order[n - 1]]]
    bounds.append(len(order))
    sizes = [padded(lengths[order[stop - 1]]) for stop in bounds[1:]]
    batches: list[TokenBatch] = []
    for start, stop in _cheapest_runs(bounds, sizes, budget, limit, pass_tokens):
        run = order[start:stop]
        count = ceil(len(run) / _captions_per_pass(padded(lengths[run[-1]]), budget, limit))
        for index in range(count):
            batch = run[index * len(run) // count : (index + 1) * len(run) // count]
            batches.append(TokenBatch(tuple(batch), padded(lengths[batch[-1]])))
    return batches


def _captions_per_pass(length: int, budget: int, limit: int | None) -> int:
    count = max(budget // max(length, 1), 1)
    return count if limit is None else min(count, limit)


def _cheapest_runs(
    bounds: Sequence[int],
    sizes: Sequence[int],
    budget: int,
    limit: int | None,
    pass_tokens: int,
) -> list[tuple[int, int]]:
    """Divide the sorted lengths into runs at the least cost; `sizes[n]` is padded length n."""
    # By dynamic programming: the cost of the n shortest lengths, and where their last run starts.
    costs, starts = [0.0], [0]
    for stop, length in enumerate(sizes, start=1):
        count = _captions_per_pass(length, budget, limit)
        cheapest, best_start = inf, 0
        for start in range(stop):
            texts = bounds[stop] - bounds[start]
            cost = costs[start] + texts * length + pass_tokens * ceil(texts / count)
            if cost < cheapest:
                cheapest, best_start = cost, start
        costs.append(cheapest)
        starts.append(best_start)
    runs: list[tuple[int, int]] = []
    stop = len(sizes)
    while stop > 0:
        runs.append((bounds[starts[stop]], bounds[stop]))
        stop = starts[stop]
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
    """Plan the passes of `text`, or of `fusion` with the image of each caption; every caption is in one pass.

    Raises `InputError` if a caption exceeds all slots. `packed_width` is that of the text embeddings of a packed
    graph; None for a padded one.
    """
    if not lengths:
        return []
    choose_slot(graph, slots, {"length": max(lengths)})
    axis = "batch" if image_of is None else "texts"
    # If absent captions are computed too, the fewest passes are the cheapest.
    full = packed_width is None and min(slot.ranges[axis].least for slot in slots) > 1
    pass_tokens = limits.budget if full else limits.pass_tokens
    texts_of: dict[int, list[int]] = {}
    for text in range(len(lengths)):
        texts_of.setdefault(0 if image_of is None else image_of[text], []).append(text)
    passes: list[Pass] = []
    for image, texts in texts_of.items():
        limit = largest(slots, axis)
        if packed_width is not None:
            batches = _packed_batches(texts, lengths, slots, limits, packed_width, limit)
            passes += [Pass((image,), (rows,), length) for rows, length in batches]
            continue
        for batch in token_batches(
            [lengths[text] for text in texts],
            limits.budget,
            pass_tokens=pass_tokens,
            limit=limit,
            padded=lambda length: limits.padded(length, slots),
        ):
            rows = tuple((texts[index],) for index in batch.rows)
            passes.append(Pass((image,), (rows,), batch.length))
    if image_of is None:
        return passes
    return _combine_images(passes, slots, limits, "texts" if packed_width is None else "rows")


def _packed_batches(
    texts: Sequence[int],
    lengths: Sequence[int],
    slots: Sequence[Slot],
    limits: PassLimits,
    width: int,
    limit: int | None,
) -> list[tuple[Rows, int]]:
    """Divide captions into passes of a packed graph, at most `limit` captions each: rows and their length."""
    tokens = sum(lengths[text] for text in texts)
    fewest = max(ceil(tokens / limits.budget), ceil(len(texts) / (limit or len(texts))))
    order = sorted(texts, key=lengths.__getitem__)
    for count in range(fewest, len(texts) + 1):
        batches = []
        for index in range(count):
            packed = pack_rows(
                # Every count-th caption: each pass has short and long ones.
                order[index::count],
                lengths,
                width,
                most_rows=largest(slots, "rows"),
                most_length=largest(slots, "length"),
                padded=lambda length: limits.padded(length, slots),
            )
            if packed is None:
                break
            batches.append(packed)
        else:
            return batches
    raise AssertionError("a text alone fits into every slot that takes its length")


def _combine_images(
    passes: Sequence[Pass], slots: Sequence[Slot], limits: PassLimits, axis: str
) -> list[Pass]:
    """Combine passes of one image each into passes of equal numbers of rows."""
    by_count: dict[int, list[Pass]] = {}
    for work in passes:
        by_count.setdefault(len(work.rows[0]), []).append(work)
    combined = []
    for count, alike in by_count.items():
        # A profile may take many memories or many texts of each, but not both.
        fitting = [slot for slot in slots if slot.padded({axis: count}) is not None]
        # Padding counts for all rows of a pass.
        batches = token_batches(
            [work.tokens for work in alike],
            limits.budget,
            pass_tokens=limits.pass_tokens,
            limit=largest(fitting, "batch"),
        )
        for batch in batches:
            # In the order of the images, so that neighbouring memories need no copy.
            members = sorted((alike[row] for row in batch.rows), key=lambda work: work.images)
            images = tuple(work.images[0] for work in members)
            rows = tuple(work.rows[0] for work in members)
            combined.append(Pass(images, rows, max(work.length for work in members)))
    return combined


def pack_rows(
    texts: Sequence[int],
    lengths: Sequence[int],
    width: int,
    *,
    most_rows: int | None = None,
    most_length: int | None = None,
    padded: Callable[[int], int] = lambda length: length,
) -> tuple[Rows, int] | None:
    """Find the cheapest packing by padded tokens and attention cost: rows and their length, None if none fits."""
    order = sorted(texts, key=lengths.__getitem__, reverse=True)
    total, longest = sum(lengths[text] for text in texts), lengths[order[0]]
    top_rows = min(len(order), most_rows or len(order))
    counts = {ceil(total / max(length, longest)) for length in (longest, *_ROW_LENGTHS)}
    best, cheapest = None, inf
    for count in sorted(count for count in counts if count <= top_rows) or [top_rows]:
        rows, length = _fill_rows(order, lengths, count)
        while most_length is not None and length > most_length and count < top_rows:
            count += 1
            rows, length = _fill_rows(order, lengths, count)
        if most_length is not None and length > most_length:
            continue
        length = padded(length)
        # A layer spends 24 w² operations a token on GEMMs and 4 w L on attention, at a third of their speed.
        cost = count * length * (1 + length / (2 * width))
        if cost < cheapest:
            best, cheapest = (rows, length), cost
    return best


def _fill_rows(order: Sequence[int], lengths: Sequence[int], count: int) -> tuple[Rows, int]:
    """Pack greedily into `count` rows, longest caption first; returns the rows and the tokens of the fullest."""
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

    source: Tensor  # [N] index of each token among those of all captions, concatenated
    target: Tensor  # [N] its index among the B R L tokens of the pass
    segments: Tensor  # [B, R, L], as graphs take them
    firsts: Tensor  # [B, T, 2]
    texts: Tensor  # [P] caption indices
    results: Tensor  # [P] index of the results of each caption among all B T

    @classmethod
    def of(
        cls, images: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], length: int
    ) -> Layout:
        """Lay out captions: `images` holds the rows of every image, the same number of rows each."""
        counts = [sum(map(len, rows)) for rows in images]
        rows, texts_per_image = len(images[0]), max(counts)
        texts = np.array([text for image in images for row in image for text in row])
        row_counts = [len(row) for image in images for row in image]
        row = np.repeat(np.arange(len(row_counts)), row_counts)
        sizes = np.asarray(lengths)[texts]
        before = np.cumsum(sizes) - sizes
        # Tokens before the first caption of a row; empty rows are not read.
        begins = np.zeros(len(row_counts), dtype=np.int64)
        begins[row[::-1]] = before[::-1]
        offset = before - begins[row]
        # Caption of every token, and the token's position in it.
        caption = np.repeat(np.arange(len(texts)), sizes)
        position = np.arange(len(caption)) - before[caption]
        target = row[caption] * length + offset[caption] + position
        starts = np.cumsum(lengths) - np.asarray(lengths)
        image = np.repeat(np.arange(len(images)), counts)
        # Index of every caption among those of its image.
        index = np.concatenate([np.arange(count) for count in counts])
        segments = np.zeros(len(row_counts) * length, dtype=np.int64)
        segments[target] = index[caption] + 1
        firsts = np.zeros((len(images), texts_per_image, 2), dtype=np.int64)
        firsts[image, index] = np.stack([row % rows, offset], axis=1)
        return cls(
            source=torch.from_numpy(starts[texts][caption] + position),
            target=torch.from_numpy(target),
            segments=torch.from_numpy(segments.reshape(len(images), rows, length)),
            firsts=torch.from_numpy(firsts),
            texts=torch.from_numpy(texts),
            results=torch.from_numpy(image * texts_per_image + index),
        )

    def inputs(self, packed: bool) -> dict[str, Tensor]:
        """Return the inputs of a graph that mark captions."""
        if packed:
            return {"segments": self.segments, "firsts": self.firsts}
        return {"attention_mask": (self.segments > 0).long()}

    def spread(self, values: Tensor, padding: int | None = None) -> Tensor:
        """Spread values `[tokens of all captions, ...]` to `[B, R, L, ...]`; padding is arbitrary if None."""
        index = torch.zeros(self.segments.numel(), dtype=torch.long)
        index[self.target] = self.source
        spread = values.index_select(0, index.to(values.device))
        spread = spread.view(*self.segments.shape, *values.shape[1:])
        if padding is None:
            return spread
        return spread.masked_fill((self.segments == 0).to(spread.device), padding)
