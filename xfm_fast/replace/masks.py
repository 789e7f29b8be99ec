"""Attention of padded batches with masks and biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.kernels import ops
from xfm_fast.kernels.derived import derived
from xfm_fast.packing import Packing
from xfm_fast.replace.bert_layer import Padded, is_small
from xfm_fast.replace.swap import Settings
from xfm_fast.replace.vit_block import Bias, attention


@dataclass
class Dense:
    """Attention of `[B, N, H, D]`."""

    mask: Tensor | None = None  # additive, boolean (False hides) `[B, 1 or H, 1 or N, N]`, or key padding `[B, N]`
    bias: Bias = None  # added to the scaled scores, `[1 or B, H, N, N]`; or a position table, without a mask
    causal: bool = False  # only without mask and bias

    @classmethod
    def of(cls, mask: Any, bias: Any, implementation: str | None) -> Dense | None:
        """The attention of a call in transformers; None for masks that the original must interpret."""
        if bias is not None and not (isinstance(bias, Tensor) and bias.ndim == 4):
            return None
        if mask is None:
            return cls(None, bias)
        if not isinstance(mask, Tensor):
            return None
        if mask.ndim == 2:
            if implementation != "xfm_fast":
                return None
            return cls(mask[:, None, None].bool(), bias) if bias is not None else cls(mask)
        # Eager attention adds a boolean mask as ones and zeros.
        boolean = not mask.is_floating_point()
        return None if mask.ndim != 4 or (boolean and implementation in ("eager", None)) else cls(mask, bias)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        if self.mask is not None and self.bias is None:
            return Padded(self.mask)(q, k, v, dropout_p, settings)
        bias = self._masked_bias(q.dtype)
        return attention(q, k, v, q.shape[-1] ** -0.5, bias, settings, dropout_p=dropout_p, causal=self.causal)

    def _masked_bias(self, dtype: torch.dtype) -> Bias:
        """Bias and mask in one tensor."""
        mask, bias = self.mask, self.bias
        if mask is None or not isinstance(bias, Tensor):
            return bias
        if bias.requires_grad and torch.is_grad_enabled():
            return add_mask(bias, mask, dtype)
        # All layers of a model get the same two.
        return derived(f"with mask {dtype}", (bias, mask), lambda: add_mask(bias, mask, dtype))


@dataclass
class Spread:
    """Attention of packed tokens `[T, H, D]` on the padded batch, for biases and windows that depend on positions."""

    packing: Packing
    mask: Tensor  # `[P, L]`, True for real tokens
    bias: Tensor | None = None  # `[1 or P, H, L, L]`, added to the scaled scores
    window: int | None = None  # maximum distance

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        if self.packing.whole:
            q, k, v = map(self.packing.unpad, (q, k, v))
        else:
            q, k, v = self.packing.unpad(torch.stack((q, k, v), 1)).unbind(2)
        if self.window is not None and q.shape[1] > 3 * self.window:
            out = window_attention(q, k, v, self.window, self.mask, dropout_p)
        elif self.window is None and self.bias is not None and not is_small(self.packing, settings):
            # Without a mask the op can choose a kernel that hides no keys.
            keys, backend = None if self.packing.whole else self.mask, settings.backend
            out = ops.bias_attention(q, k, v, self.bias.to(q.dtype), keys, dropout_p, backend=backend)
        else:
            seen = None if self.packing.whole and self.window is None else self._hidden(q.device)
            out = Dense(seen, self.bias)(q, k, v, dropout_p, settings).unflatten(-1, q.shape[-2:])
        return self.packing.pack(out).flatten(-2)

    def _hidden(self, device: torch.device) -> Tensor:
        """Visible keys `[P, 1, 1 or L, L]`; every query sees itself, so that no row is empty."""
        keys = self.mask[:, None, None]
        if self.window is None:
            return keys
        places = torch.arange(self.mask.shape[1], device=device)
        distance = (places[:, None] - places).abs()
        return (keys & (distance <= self.window)) | (distance == 0)


def add_mask(bias: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias with the mask added."""
    bias, lowest = bias.to(dtype), torch.finfo(dtype).min
    if mask.is_floating_point():
        return bias + mask.clamp(min=lowest).to(dtype)
    return bias.masked_fill(~mask, lowest)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Attention `[B, N, H, D]` within a window, linear in N: blocks of `window` queries see three blocks of keys."""
    batch, tokens, heads, width = q.shape
    blocks = -(-tokens // window)
    rest = blocks * window - tokens
    q = F.pad(q, (0, 0, 0, 0, 0, rest)).view(batch * blocks, window, heads, width)
    k, v = (F.pad(t, (0, 0, 0, 0, window, rest + window)).unfold(1, 3 * window, window) for t in (k, v))
    k, v = (t.permute(0, 1, 4, 2, 3).reshape(batch * blocks, 3 * window, heads, width) for t in (k, v))
    keys = F.pad(mask, (window, rest + window)).unfold(1, 3 * window, window).reshape(batch * blocks, 1, 3 * window)
    places = torch.arange(3 * window, device=q.device) - window
    distance = (places[:window, None] + window - places).abs()
    seen = (keys & (distance <= window)) | (distance == 0)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, seen[:, None], dropout_p)
    return out.transpose(1, 2).reshape(batch, blocks * window, heads, width)[:, :tokens]
