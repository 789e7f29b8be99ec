"""Attention of vision transformers that others wrote: with BEiT's position table, with any other bias, or with none."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.cpu.attention import biased_attention
from xfm_fast.replace.settings import Settings


class PositionTable(NamedTuple):
    """A learned relative position bias (BEiT, arXiv 2106.08254): `[(2wh-1)(2ww-1)+3, H]` and the window (wh, ww)."""

    table: Tensor
    window: tuple[int, int]

    def fits(self, tokens: int) -> bool:
        """Whether a sequence is this window of patches behind one class token."""
        height, width = self.window
        return tokens == 1 + height * width and self.table.shape[0] == (2 * height - 1) * (2 * width - 1) + 3


Bias = PositionTable | Tensor | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Bias,
    settings: Settings,
    *,
    dropout_p: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Attention of sequences of one length.

    Args:
        q, k, v: `[B, N, H, D]`, any strides.
        scale: multiplies the products.
        bias: a position table; or a tensor that broadcasts to `[B, H, N, N]`, added to the scaled products or, if
            boolean, False for what is hidden; or None.
        dropout_p: probability of dropping an attention weight.
        causal: hide later tokens; only without a bias.

    Returns:
        `[B, N, H·D]`.
    """
    backend = settings.backend
    if isinstance(bias, PositionTable):
        if not dropout_p:
            table = settings.parameter(bias.table)
            return ops.relpos_attention(q, k, v, table, bias.window, scale=scale, backend=backend).flatten(2)
        bias = reference.position_bias(bias.table, bias.window)
    if bias is None and not causal and (q.device.type == "cpu" or backend is not None):
        return _as_one_sequence_each(q, k, v, scale, settings, dropout_p)
    if isinstance(bias, Tensor) and not dropout_p and _shared_on_cpu(q, k, v, bias):
        _, tokens, heads, _ = q.shape
        shared = bias.to(q.dtype).expand(1, heads, tokens, tokens)[0]
        return biased_attention(q, k, v, scale, shared).flatten(2)
    if isinstance(bias, Tensor) and bias.is_floating_point():
        bias = bias.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _as_one_sequence_each(
    q: Tensor, k: Tensor, v: Tensor, scale: float, settings: Settings, dropout_p: float
) -> Tensor:
    """The operator for packed sequences takes the quickest of several implementations, also for sequences alike."""
    batch, tokens = q.shape[:2]
    offsets = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    out = ops.varlen_attention(
        q, k, v, offsets, offsets, tokens, tokens, dropout_p=dropout_p, scale=scale, backend=settings.backend
    )
    return out.view(batch, tokens, -1)


def _shared_on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> bool:
    """Whether the kernel for a bias that all batch entries share applies: on CPU, for what needs no gradient."""
    if q.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, bias)):
        return False
    return bias.is_floating_point() and (bias.ndim == 3 or (bias.ndim == 4 and bias.shape[0] == 1))
