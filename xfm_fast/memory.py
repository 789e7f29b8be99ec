"""Resident memory of this process, and memory-mapped tensors for data larger than it."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch
from torch import Tensor

from xfm_fast.errors import DataError, StorageError


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return psutil.Process().memory_info().rss


def release_freed_memory() -> None:
    """Return freed memory to the system; glibc otherwise keeps it below the highest block in use."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


class PeakMemory:
    """Context manager that measures peak resident memory: `start` and `peak` in bytes.

    On Linux the high-water mark of the kernel is reset and read; elsewhere a thread samples every few
    milliseconds and can miss a short peak. `method` names the one used.
    """

    def __enter__(self) -> Self:
        self.start = self.peak = resident_bytes()
        self.method = "high-water mark"
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.method = "sampled"
            self._stop = threading.Event()

            def sample() -> None:
                while not self._stop.wait(0.004):
                    self.peak = max(self.peak, resident_bytes())

            self._thread = threading.Thread(target=sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.method == "sampled":
            self._stop.set()
            self._thread.join()
            self.peak = max(self.peak, resident_bytes())
        else:
            status = Path("/proc/self/status").read_text()
            marks = re.findall(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
            self.peak = max([self.start, *(int(mark) * 1024 for mark in marks)])


def create_mapped(path: str | Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Create a file-backed tensor of zeros; writes reach the file.

    Disk space is reserved first, so a full disk raises `StorageError` here instead of a bus error at
    a later write.
    """
    path = Path(path)
    size = math.prod(shape) * dtype.itemsize
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"{path} needs {size / 1e9:.2f} GB and cannot be created ({error.strerror}); free space"
        ) from None
    return open_mapped(path, shape, dtype)


def open_mapped(path: str | Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Map a file written by `create_mapped`."""
    path = Path(path)
    expected = math.prod(shape) * dtype.itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        fault = "is missing" if size is None else f"has {size} bytes"
        raise DataError(f"{path} {fault}; {[*shape]} {dtype} takes {expected}: write it again")
    if not expected:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
