"""Slots: the shapes that a graph accepts, and the padding of a request to them.

A graph with dynamic axes has one slot for every size, a graph with fixed axes one for a single size, and an engine one
for each profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import inf, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError

from .manifest import GraphRecord, TensorRecord

_BATCH, _TEXTS, _LENGTH, _PAST, _ROWS = "batch", "texts", "length", "past", "rows"
# Dynamic dimensions of tensors by name, without the number of a layer, and number of dimensions.
_AXES: Mapping[tuple[str, int], tuple[str | None, ...]] = {
    ("pixels", 4): (_BATCH,),
    ("image_embeds", 3): (_BATCH,),
    ("image_feature", 2): (_BATCH,),
    ("memory_keys_", 4): (_BATCH,),
    ("memory_values_", 4): (_BATCH,),
    ("input_ids", 2): (_BATCH, _LENGTH),
    ("input_ids", 3): (_BATCH, _TEXTS, _LENGTH),
    ("attention_mask", 2): (_BATCH, _LENGTH),
    ("attention_mask", 3): (_BATCH, _TEXTS, _LENGTH),
    ("text_embeds", 3): (_BATCH, _LENGTH),
    ("text_embeds", 4): (_BATCH, _TEXTS, _LENGTH),
    ("text_feature", 2): (_BATCH,),
    ("fused", 3): (_BATCH, _TEXTS),
    ("fused", 4): (_BATCH, _TEXTS, _LENGTH),
    ("match_logits", 3): (_BATCH, _TEXTS),
    ("boxes", 3): (_BATCH, _TEXTS),
    ("scores", 2): (_BATCH, _TEXTS),
    ("class_logits", 2): (_BATCH,),
    ("class_logits", 3): (_BATCH, _TEXTS),
    ("memory_keys_", 5): (_BATCH,),
    ("memory_values_", 5): (_BATCH,),
    ("states", 3): (_BATCH, _LENGTH),
    ("memory_mask", 2): (_BATCH, _LENGTH),
    ("decoder_keys_", 4): (_BATCH, None, _LENGTH),
    ("decoder_values_", 4): (_BATCH, None, _LENGTH),
    ("token_ids", 2): (_BATCH, _TEXTS),
    ("past", 7): (_BATCH, _TEXTS, None, None, None, _PAST),
    ("past_mask", 3): (_BATCH, _TEXTS, _PAST),
    ("logits", 3): (_BATCH, _TEXTS),
    ("present", 6): (_BATCH, _TEXTS),
    ("packed_ids", 2): (_ROWS, _LENGTH),
    ("positions", 2): (_ROWS, _LENGTH),
    ("segments", 2): (_ROWS, _LENGTH),
    ("segments", 3): (_BATCH, _ROWS, _LENGTH),
    ("firsts", 2): (_BATCH,),
    ("firsts", 3): (_BATCH, _TEXTS),
    ("packed_embeds", 3): (_ROWS, _LENGTH),
    ("packed_embeds", 4): (_BATCH, _ROWS, _LENGTH),
    ("fused_tokens", 4): (_BATCH, _ROWS, _LENGTH),
}


SMALL_SIZES = {"batch": 1, "texts": 4, "length": 16, "past": 4, "rows": 2}
LARGE_SIZES = {"batch": 4, "texts": 16, "length": 40, "past": 16, "rows": 4}
"""Sizes to warm up axes without a tuned size."""


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

    def example(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """Sizes to warm up with: the tuned ones, else the nearest to `wanted`."""
        out = {}
        for axis, allowed in self.ranges.items():
            size = max(wanted[axis], allowed.least) if allowed.best is None else allowed.best
            out[axis] = size if allowed.most is None else min(size, allowed.most)
        return out


def axes_of(tensor: TensorRecord | str, dims: int | None = None) -> tuple[str | None, ...]:
    """Axis names of the dimensions of a tensor, up to the last that varies; None for a dimension of constant size."""
    name, number = (tensor, dims) if isinstance(tensor, str) else (tensor.name, len(tensor.dims))
    assert number is not None
    return _AXES[name.rstrip("0123456789"), number]


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
        for axis, dim in zip(axes_of(tensor), tensor.dims, strict=False):
            if axis is None:
                continue
            if isinstance(dim, int):
                ranges[axis] = SizeRange(dim, dim)
            else:
                ranges[axis] = SizeRange(record.axes[dim].least, record.axes[dim].most)
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
    expected = {tensor.name: tensor for tensor in record.inputs}
    if set(inputs) != set(expected):
        wrong = ", ".join(sorted(set(inputs) ^ set(expected)))
        raise InputError(f"graph {record.name!r}: inputs missing or unknown: {wrong}; give {', '.join(expected)}")
    sizes: dict[str, int] = {}
    for name, tensor in expected.items():
        value, axes = inputs[name], axes_of(tensor)
        wanted = [axis or dim for axis, dim in zip_longest(axes, tensor.dims)]
        if value.dim() != len(wanted) or any(
            isinstance(dim, int) and dim != size for dim, size in zip(wanted, value.shape, strict=True)
        ):
            shape = ", ".join(map(str, wanted))
            raise InputError(f"graph {record.name!r}: {name} is {[*value.shape]}; it must be [{shape}]")
        for axis, size in zip(axes, value.shape, strict=False):
            if axis is not None and sizes.setdefault(axis, size) != size:
                raise InputError(
                    f"graph {record.name!r}: {name} is {[*value.shape]}, so {axis} is {size}, but another input has "
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


def output_shapes(record: GraphRecord, sizes: Mapping[str, int]) -> dict[str, torch.Size]:
    """Shapes of the outputs of a graph at the given sizes."""
    return {tensor.name: tensor_shape(tensor, sizes) for tensor in record.outputs}


def tensor_shape(tensor: TensorRecord, sizes: Mapping[str, int]) -> torch.Size:
    """Shape of an input or output at the given sizes of its axes."""
    axes = axes_of(tensor)
    return torch.Size([int(dim) if axis is None else sizes[axis] for axis, dim in zip_longest(axes, tensor.dims)])


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
