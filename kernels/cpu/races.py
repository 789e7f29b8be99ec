"""Every operation that this processor chooses an implementation for, all compared at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attention, int8, losses, products
from .selection import Selection, compared, of_odd_sizes


class Race(NamedTuple):
    """The candidates of an operation, the operands that are timed, and the FLOPs that these take.

    Attributes:
        alike: as in `select`.
    """

    candidates: dict[str, Callable[..., Tensor]]
    example: Callable[[torch.dtype], tuple[Any, ...]]
    flops: int
    alike: bool = True


def races() -> dict[str, Race]:
    """All operations by name."""
    found: dict[str, Race] = {}
    for operation, candidates in products.CANDIDATES.items():
        for name, some in ((operation, candidates), (f"{operation} of few rows", products.LIGHT[operation])):
            x, weight, *_ = products.EXAMPLES[name](torch.float32)
            found[name] = Race(some, products.EXAMPLES[name], 2 * x.shape[0] * weight.numel())
    for name, (candidates, example) in {"layout for few rows": products.LAYOUT, **products.TRAINED}.items():
        x, other, *_ = example(torch.float32)
        found[name] = Race(candidates, example, 2 * x.numel() * other.shape[1])
    for name, (candidates, example) in attention.RACES.items():
        q, k, *_ = example(torch.float32)
        flops = (10 if name.endswith("backward") else 4) * q.numel() * k.shape[1]
        found[name] = Race(candidates, example, flops)
    for role in losses.ROLES:
        x, y = losses.example(role, torch.float32)
        found[role] = Race(losses.PRODUCTS, partial(losses.example, role), 2 * x.numel() * y.shape[0])
    for name, (candidates, example, flops) in (int8.LIBRARIES | int8.RACES).items() if int8.why_not() is None else ():
        found[name] = Race(candidates, example, flops, alike=False)
    for operation, race in [*found.items()]:
        name, others = of_odd_sizes(operation, race.candidates)
        found.setdefault(name, race._replace(candidates=others))
    return found


def compare_all(dtypes: Iterable[torch.dtype]) -> Iterator[tuple[Selection, Race]]:
    """The choice of every operation in these types, made now or known already."""
    every = races()
    for dtype in dtypes:
        for operation, race in every.items():
            yield compared(operation, race.candidates, race.example, dtype, alike=race.alike), race
