"""Every operation that this processor chooses an implementation for, all compared at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from . import attention, gemm, int8, losses  # noqa: F401, which register their operations
from .selection import RACES, Race, Selection, compare

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


def races() -> dict[str, Race]:
    """All operations of this machine by name."""
    return {name: race for name, race in RACES.items() if len(race.candidates) > 1 and race.why_not() is None}


def compare_all(dtypes: Iterable[torch.dtype]) -> Iterator[tuple[Selection, Race]]:
    """The choice of every operation in these dtypes, measured now or earlier."""
    for dtype in dtypes:
        for operation, race in races().items():
            yield compare(operation, dtype), race
