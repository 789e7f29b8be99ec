"""Scratch memory that outlives a call: fresh memory costs a page fault every 4 KB."""

from __future__ import annotations

import ctypes
import sys
import threading
from math import prod

import numpy as np
import torch
from torch import Tensor

from .. import host

_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Contiguous memory of this thread, as large as the largest that was asked for; its contents are arbitrary.

    Args:
        name: two tensors of one name and type share their memory, so a caller that needs both at once gives two names.
    """
    buffers: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("buffers", {})
    numel, key = prod(shape), (name, dtype)
    if key not in buffers or buffers[key].numel() < numel:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            buffers[key] = torch.empty(numel, dtype=dtype)
    return buffers[key][:numel].view(shape)


_STEPS = 1 << 16


class Dropout:
    """Masks that follow from a seed and the order in which they are asked for.

    Args:
        probability: of zeroing an element, below 1; rounded to a multiple of 2⁻¹⁶, which `kept` takes into account.
        seed: one integer.
    """

    def __init__(self, probability: float, seed: Tensor) -> None:
        dropped = min(round(probability * _STEPS), _STEPS - 1)
        self.kept = 1 - dropped / _STEPS
        """Share of the elements that stays, and so what they are to be divided by."""
        # Random bits are read as signed numbers.
        self._least = dropped - _STEPS // 2
        self._bits = np.random.SFC64(host.integer(seed) % 2**64)

    def mask(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros where an element is dropped and ones elsewhere, in scratch memory."""
        found = scratch("dropout", shape, dtype)
        bits = torch.from_numpy(self._bits.random_raw(-(-found.numel() // 4)).view(np.int16))
        torch.ge(bits[: found.numel()], self._least, out=found.view(-1))
        return found


# The parameters' numbers in malloc.h, and the largest threshold that glibc accepts.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_THRESHOLD = 32 << 20
_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Let the C library keep what this process frees, up to 32 MB a tensor, for its next allocations.

    It holds for the process and cannot be undone, so a program decides it, not a library on import.

    Returns:
        Whether the C library understood: False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    options = ((_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _PAD))
    # Every option is set, whatever became of the others.
    return min(mallopt(option, value) for option, value in options) == 1
