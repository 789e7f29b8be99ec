"""Tensors that live in files: embeddings of a collection that does not fit into memory."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from xfm_fast.errors import DataError, StorageError


def create_mapped(path: str | Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new file-backed tensor of zeros; what is written to it reaches the file.

    The space is reserved first: a disk that is too small raises `StorageError` here, instead of killing the process
    with a bus error at some later write.
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
            f"{path} needs {size / 1e9:.2f} GB and cannot be created ({error.strerror}); free space or choose another "
            "folder"
        ) from None
    return open_mapped(path, shape, dtype)


def open_mapped(path: str | Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Map a file that `create_mapped` made."""
    path = Path(path)
    expected = math.prod(shape) * dtype.itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes"
        raise DataError(f"{path} {found}; {[*shape]} {dtype} takes {expected}: write it again")
    if not expected:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
