"""Tensor values that Python code branches on: offsets, seeds, checks.

On CPU they are read through NumPy from the tensor's memory. So a test that forbids the synchronising methods of a
tensor (`item`, `tolist`, `nonzero`, truth values) finds exactly the calls that would stop an accelerator. Within
`torch.func` a tensor has no memory for NumPy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import transformed


def integers(tensor: Tensor) -> list[int]:
    """Return the values of an integer vector."""
    return tensor.tolist() if transformed() else tensor.detach().cpu().numpy().tolist()


def integer(tensor: Tensor) -> int:
    """Return the value of an integer tensor with one element."""
    return int(tensor) if transformed() else int(tensor.detach().cpu().numpy().reshape(()))


def number(tensor: Tensor) -> float:
    """Return the value of a floating-point tensor with one element, of any dtype."""
    return float(tensor.detach().double().cpu().numpy().reshape(()))


def any_true(mask: Tensor) -> bool:
    """Return whether any element of a boolean tensor is true."""
    return bool(mask.detach().cpu().numpy().any())


def all_true(mask: Tensor) -> bool:
    """Return whether every element of a boolean or integer tensor is true."""
    return bool(mask.detach().cpu().numpy().all())


def true_places(mask: Tensor) -> Tensor:
    """Return the indices of True in a flattened boolean tensor, ascending: int64, on CPU."""
    return torch.from_numpy(mask.detach().cpu().numpy().reshape(-1).nonzero()[0])
