"""What the caller of `accelerate` asked for, as every fused module reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from xfm_fast.kernels.backend import Backend
from xfm_fast.kernels.derived import derived


@dataclass(frozen=True)
class Settings:
    """How fused modules compute.

    Attributes:
        kernels: the backend of every op; "auto" chooses for the device.
        dtype: compute in this type whatever the parameters are stored in; None keeps the types of the inputs.
        unpad: leave padding out of whole encoders; their outputs are zero there.
        skip_logits: masked-language heads in training return no logits when they are given labels.
    """

    kernels: Backend = "auto"
    dtype: torch.dtype | None = None
    unpad: bool = False
    skip_logits: bool = False

    @property
    def backend(self) -> Backend | None:
        """What the ops take: None leaves the choice to the device and to `use_backend`."""
        return None if self.kernels == "auto" else self.kernels

    def operand(self, value: Tensor) -> Tensor:
        """An activation in the type that is computed in."""
        return value if self.dtype is None or not value.is_floating_point() else value.to(self.dtype)

    @overload
    def parameter(self, value: Tensor) -> Tensor: ...
    @overload
    def parameter(self, value: Tensor | None) -> Tensor | None: ...
    def parameter(self, value: Tensor | None) -> Tensor | None:
        """A parameter in the type that is computed in; without gradients the conversion is done once and kept."""
        if value is None or self.dtype is None or value.dtype == self.dtype:
            return value
        if torch.is_grad_enabled() and value.requires_grad:
            return value.to(self.dtype)
        dtype = self.dtype
        return derived(f"as {dtype}", (value,), lambda: value.detach().to(dtype))

    def affine(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
        """Weight and bias of a product or norm, each as `parameter` gives it; no bias stays None."""
        return self.parameter(weight), self.parameter(bias)

    @contextmanager
    def own_types(self, device: torch.device) -> Iterator[None]:
        """Fused modules choose their types themselves: without gradients that is quicker than autocast."""
        if self.dtype is None or torch.is_grad_enabled():
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield
