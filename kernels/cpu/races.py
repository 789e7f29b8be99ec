"""Every operation that this processor chooses an implementation for, all compared at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attention, gemm, int8, losses
from .selection import Selection, compare_candidates, odd_size_fallback

PATHS = {
    "aten": "PyTorch's own operations, which multiply fp32 by MKL where PyTorch has it",
    "onednn": "GEMMs by oneDNN with plain weights; in attention one for all heads",
    "onednn+gelu": "the same, and GELU by PyTorch",
    "onednn-packed": "GEMMs by oneDNN with a second, packed copy of each weight",
    "transposed": "PyTorch's GEMM of a transposed factor",
    "tiled": "attention in tiles that stay in cache, by PyTorch's GEMMs",
    "exp2": "the same, with powers of two in place of the softmax",
    "llvm": "kernels of ours that LLVM compiles for this processor",
    "int8": "int8 GEMMs, of weights in 8 bits",
    "floats": "weights in 8 bits multiplied in the dtype of the activations",
}
"""What runs, by the names of candidates."""
SIZES = {
    "of few rows": "as a caption has: less than 16, in 8 bits less than 64",
    "of odd sizes": "sizes that llvm has no kernel for: not whole vectors",
    "in 8 bits": 'models in dtype="int8"',
    "layout": "whether freeze() lays weights out for oneDNN, so that few rows read them faster",
    "medium": "attention of up to 128 tokens; short: of up to 64",
    "vocabulary": "logits of the language losses and their gradients (dh, dw)",
}
"""When it runs, by words in the names of operations."""


class Race(NamedTuple):
    """The candidates of an operation, their operands and FLOPs; `alike` as in `select`."""

    candidates: dict[str, Callable[..., Tensor]]
    example: Callable[[torch.dtype], tuple[Any, ...]]
    flops: int
    alike: bool = True


def races() -> dict[str, Race]:
    """All operations by name."""
    found: dict[str, Race] = {}
    for operation, candidates in gemm.CANDIDATES.items():
        for name, some in ((operation, candidates), (f"{operation} of few rows", gemm.LIGHT[operation])):
            x, weight, *_ = gemm.EXAMPLES[name](torch.float32)
            found[name] = Race(some, gemm.EXAMPLES[name], 2 * x.shape[0] * weight.numel())
    for name, (candidates, example) in gemm.TRAINED.items():
        x, other, *_ = example(torch.float32)
        found[name] = Race(candidates, example, 2 * x.numel() * other.shape[1])
    for name, (candidates, example) in attention.RACES.items():
        q, k, *_ = example(torch.float32)
        flops = (10 if name.endswith("backward") else 4) * q.numel() * k.shape[1]
        found[name] = Race(candidates, example, flops)
    for operation, race in [*found.items()]:
        name, others = odd_size_fallback(operation, race.candidates)
        if operation not in gemm.ANY_SIZES and len(others) > 1:
            found.setdefault(name, race._replace(candidates=others))
    candidates, example = gemm.LAYOUT
    x, weight, _ = example(torch.float32)
    found["layout for few rows"] = Race(candidates, example, 2 * x.shape[0] * weight.numel())
    for role in losses.ROLES:
        x, y = losses.example(role, torch.float32)
        found[role] = Race(losses.PRODUCTS, partial(losses.example, role), 2 * x.numel() * y.shape[0])
    for name, (candidates, example, flops) in (int8.LIBRARIES | int8.RACES).items() if int8.why_not() is None else ():
        found[name] = Race(candidates, example, flops, alike=False)
    return found


def compare_all(dtypes: Iterable[torch.dtype]) -> Iterator[tuple[Selection, Race]]:
    """The choice of every operation in these dtypes, measured now or earlier."""
    every = races()
    for dtype in dtypes:
        for operation, race in every.items():
            yield compare_candidates(operation, race.candidates, race.example, dtype, alike=race.alike), race
