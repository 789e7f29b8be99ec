"""Dropout masks on CPU that follow from a seed: 16 random bits decide about an element.

PyTorch's own draw takes longer than the rest of attention: five nanoseconds an element, on one thread.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import host
from .workspace import scratch

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
