"""Scratch memory that outlives a call: fresh memory costs a page fault every 4 KB."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import threading
from contextlib import suppress
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import host

_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Contiguous thread-local memory with arbitrary contents; tensors of one name and dtype share it."""
    buffers: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("buffers", {})
    numel, key = prod(shape), (name, dtype)
    if key not in buffers or buffers[key].numel() < numel:
        _local.moves = moves() + 1
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            buffers[key] = torch.empty(numel, dtype=dtype)
    return buffers[key][:numel].view(shape)


def scratch_rows(name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Scratch memory `[rows, width]`, whose rows are a line further apart if they would `collide`."""
    padding = collide(width, dtype) * _LINE // dtype.itemsize
    return scratch(name, (rows, width + padding), dtype)[:, :width]


def collide(stride: int, dtype: torch.dtype) -> bool:
    """Return whether rows of a stride share one set of the first level of cache, which cannot hold a line of each."""
    return stride * dtype.itemsize % _SET_DISTANCE == 0


def moves() -> int:
    """Return how often a buffer of this thread moved or was added; its addresses are valid until the next move."""
    return getattr(_local, "moves", 0)


def in_dtype(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype; a converted one is in scratch memory."""
    return x if x.dtype == dtype else scratch(name, tuple(x.shape), dtype).copy_(x)


def even_slices(length: int, limit: int) -> list[slice]:
    """Return slices of nearly one size, none longer than `limit`, that cover a length."""
    count = -(-length // limit)
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]


_STEPS = 1 << 16
# Address space of a chunk of huge pages, bytes of a line of cache, and between the lines of one set.
_CHUNK, _LINE, _SET_DISTANCE = 32 << 20, 64, 4096
_HUGE_PAGE = 2 << 20


class Dropout:
    """Dropout masks from an integer seed and the order of the calls; the probability, below 1, is rounded to 2⁻¹⁶."""

    def __init__(self, probability: float, seed: Tensor) -> None:
        dropped = min(round(probability * _STEPS), _STEPS - 1)
        self.kept = 1 - dropped / _STEPS
        """Share of the elements that is kept; these are divided by it."""
        # Random bits are read as signed numbers.
        self._threshold = dropped - _STEPS // 2
        self._bits = np.random.SFC64(host.integer(seed) % 2**64)

    def mask(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Draw zeros where an element is dropped and ones elsewhere, in scratch memory."""
        mask = scratch("dropout", shape, dtype)
        bits = torch.from_numpy(self._bits.random_raw(-(-mask.numel() // 4)).view(np.int16))
        torch.ge(bits[: mask.numel()], self._threshold, out=mask.view(-1))
        return mask


class HugePages:
    """Memory for many tensors, in huge pages where Linux has them.

    A GEMM of few rows reads a weight once, and of every page of 4 KB an address has to be translated first. Each tensor
    has a storage of its own; memory is returned with the last one of its chunk.
    """

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor with zeros."""
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        if self._chunk is None or self._used + size > len(self._chunk):
            length, flags = max(size, _CHUNK) + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._chunk = mmap.mmap(-1, length, flags)
            # Some kernels have none.
            with suppress(OSError):
                self._chunk.madvise(mmap.MADV_HUGEPAGE)
            start = torch.frombuffer(self._chunk, dtype=torch.uint8).data_ptr()
            self._used = -start % _HUGE_PAGE
        with torch.inference_mode(False):
            tensor = torch.frombuffer(
                self._chunk, dtype=dtype, count=prod(shape), offset=self._used
            )
        self._used += -(-size // _LINE) * _LINE
        return tensor.view(shape)


# Parameter codes of malloc.h, and the largest threshold that glibc accepts.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_THRESHOLD = 32 << 20
_PAD = 64 << 20
# Address space of the heap with huge pages: together with earlier allocations below the 2 GB above which the C library
# would trim it.
_HEAP = 1900 << 20
_KEPT = list[bool]()


def keep_freed_memory() -> bool:
    """Make glibc cache freed memory, up to 32 MB per tensor, in huge pages, for the whole process; False without glibc.

    It cannot be undone, so a program decides it, not a library on import.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    options = (
        (_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, _HEAP),
    )
    # Set every option, even if one fails.
    accepted = min(mallopt(option, value) for option, value in options) == 1
    if accepted:
        _ask_for_huge_pages(library)
    _KEPT.append(mallopt(_M_TOP_PAD, _PAD) == 1 and accepted)
    return _KEPT[-1]


def keeps_freed_memory() -> bool:
    """Return whether this process caches freed memory, for records of benchmarks."""
    return any(_KEPT)


def _ask_for_huge_pages(library: ctypes.CDLL) -> None:
    """Extend the heap by the pad, which takes no memory until it is written to, and ask for huge pages there.

    PyTorch's `THP_MEM_ALLOC_ENABLE` aligns each tensor to a page of its own and loses the gaps: most weights of a
    base-size model take 2.25 MB, and their gradients would lie 4 MB apart from each other.
    """
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.free(library.malloc(_LARGEST_THRESHOLD - (1 << 20)))
    # The heap has several parts after earlier madvise calls.
    heap = re.findall(
        r"^(\w+)-(\w+) .*\[heap\]$", Path("/proc/self/maps").read_text(), re.MULTILINE
    )
    if heap:
        begin, end = -(-int(heap[0][0], 16) // _HUGE_PAGE) * _HUGE_PAGE, int(heap[-1][1], 16)
        # No effect where Linux has no huge pages.
        library.madvise(begin, max(0, end - begin), mmap.MADV_HUGEPAGE)
