"""Scratch memory that outlives a call: fresh memory costs a page fault every 4 KB."""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Contiguous memory of this thread, as large as the largest that was asked for; what it holds is anybody's.

    Args:
        name: two tensors of one name and type share their memory, so whoever needs both at once gives two names.
    """
    buffers: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("buffers", {})
    numel, key = prod(shape), (name, dtype)
    if key not in buffers or buffers[key].numel() < numel:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            buffers[key] = torch.empty(numel, dtype=dtype)
    return buffers[key][:numel].view(shape)
