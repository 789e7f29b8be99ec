"""How a graph is traced: example inputs, and which dimensions may change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from xfm_fast.errors import InputError
from xfm_fast.export.graphs import Axis, Graph, TensorSpec

_EXAMPLE_SIZES = {"batch": 2, "texts": 3, "length": 7}
_LARGEST_SIZES = {"batch": 4096, "texts": 4096, "length": 512}


def tracing_call(
    graph: Graph, dtype: torch.dtype, fixed: Mapping[str, int]
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace a graph with, and for each its dimensions that stay dynamic.

    Args:
        dtype: of the inputs that are not ids.
        fixed: axes that get a constant size.
    """
    dims: dict[str, Any] = {}

    def dimension(axis: Axis) -> Any:
        if axis.name in fixed:
            return None
        return dims.setdefault(axis.name, torch.export.Dim(axis.name, min=axis.least, max=_LARGEST_SIZES[axis.name]))

    shapes = tuple(
        {place: dim for place, axis in spec.axes.items() if (dim := dimension(axis)) is not None}
        for spec in graph.inputs
    )
    return random_inputs(graph, _EXAMPLE_SIZES | dict(fixed), dtype), shapes


def random_inputs(graph: Graph, sizes: Mapping[str, int], dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of a graph at the given sizes of its axes: noise, ids of every vocabulary, texts of falling length."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(_random(spec, sizes, dtype, generator) for spec in graph.inputs)


def _random(spec: TensorSpec, sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    shape = spec.shape(dict(sizes))
    if spec.name == "input_ids":
        ids = torch.randint(4, 200, shape, generator=generator)
        return ids.masked_fill(~_real(shape), 1)
    if spec.name == "attention_mask":
        return _real(shape).long()
    return torch.randn(shape, generator=generator).to(dtype)


def _real(shape: tuple[int, ...]) -> Tensor:
    """Which tokens of texts `[..., L]` are real: text n has n % L tokens less than the longest."""
    length = shape[-1]
    texts = torch.arange(torch.Size(shape[:-1]).numel()).view(*shape[:-1], 1)
    return torch.arange(length).expand(shape) < (length - texts % length)


def check_fixed(graphs: Iterable[Graph], fixed: Mapping[str, int]) -> None:
    """Raise `InputError` for a fixed axis that none of the graphs has, or a size that is not positive."""
    known = {axis.name for graph in graphs for spec in graph.inputs for axis in spec.axes.values()}
    for name, size in fixed.items():
        if name not in known:
            raise InputError(f"axis {name!r} cannot be fixed; choose from {', '.join(sorted(known)) or 'none'}")
        if size < 1:
            raise InputError(f"{name}={size} is no size; give a positive number")


@contextlib.contextmanager
def frozen(graph: Graph) -> Iterator[None]:
    """With parameters that need no gradient: what is derived from trainable ones does not export."""
    trainable = [parameter for parameter in graph.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
