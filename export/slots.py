"""Slots: the shapes that a graph accepts, and the padding of a request to them.

A graph with dynamic axes has one slot for every size, a graph with fixed axes one for a single size, and an engine one
for each profile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError

from .graphs import AXES, dims_of
from .manifest import GraphRecord, TensorRecord

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}


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
