"""Attention on CPU: PyTorch's fused kernel, explicit products over cache-sized tiles, or one oneDNN product per head.

The fused kernel is the better choice for fp32 where MKL is fast; explicit products win in bf16 and with a position
bias, because they reach the machine's matrix units. The candidates are compared once per process, long sequences and
many short ones apart.

The backward pass always takes the tiles: the fused kernel's gradients follow from an exponential that is a quick
approximation, and miss the accuracy that the tests ask for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import select
from .tiles import tiled_attention

# Up to this many scores, a sequence is a short one: its products are too small for a library to be quick at them.
_SHORT_SCORES = 64 * 64
# So few short sequences are less work than the calls of explicit products.
_FEW = 4


def biased_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Attention with a position bias.

    Args:
        q, k, v: `[B, N, H, D]`; any strides.
        scale: multiplies the products.
        bias: `[H, N, N]`, added to the scaled products of every batch entry.

    Returns:
        `[B, N, H, D]`, contiguous.
    """
    return _BIASED[select("biased attention", _BIASED, _biased_example, q.dtype)](q, k, v, scale, bias[None])


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention of sequences of one length, or padded to it.

    Args:
        q: `[B, Nq, H, D]`; k, v: `[B, Nk, H, D]`; any strides.
        scale: multiplies the products.
        mask: `[B, 1, 1 or Nq, Nk]`, added to the scaled products: -inf hides a key.

    Returns:
        `[B, Nq, H, D]`, contiguous.
    """
    if q.shape[0] <= _FEW and q.shape[1] * k.shape[1] <= _SHORT_SCORES:
        return _fused(q, k, v, scale, mask)
    name = choice(q.shape[1], k.shape[1], q.dtype)
    # Of the candidates, the one that goes head by head adds one bias to all batch entries.
    return (tiled_attention if name == "onednn" and mask is not None else _PLAIN[name])(q, k, v, scale, mask)


def choice(queries: int, keys: int, dtype: torch.dtype) -> str:
    """The candidate that runs attention without a position bias."""
    if queries * keys <= _SHORT_SCORES:
        return select("short attention", _SHORT, _short_example, dtype)
    return select("attention", _PLAIN, _plain_example, dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype), scale=scale)
    return out.transpose(1, 2).contiguous()


def _onednn(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """One oneDNN product per head: a score matrix is a linear layer whose weight is the key matrix."""
    product = torch.ops.mkldnn._linear_pointwise
    batch, queries, heads, width = q.shape
    out = torch.empty((batch, queries, heads, width), dtype=q.dtype)
    scaled = (q * scale).transpose(1, 2).contiguous()
    keys, values = k.transpose(1, 2).contiguous(), v.permute(0, 2, 3, 1).contiguous()
    for b in range(batch):
        for h in range(heads):
            if bias is None:
                scores = product(scaled[b, h], keys[b, h], None, "none", [], "")
            else:
                scores = product.binary(scaled[b, h], bias[0, h], keys[b, h], None, "add")
            torch.softmax(scores, -1, out=scores)
            out[b, :, h] = product(scores, values[b, h], None, "none", [], "")
    return out


_Candidates = dict[str, Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]]
_PLAIN: _Candidates = {"aten": _fused, "tiled": tiled_attention, "onednn": _onednn}
_SHORT: _Candidates = {"aten": _fused, "tiled": tiled_attention}
_BIASED: _Candidates = {"aten": _fused, "tiled": tiled_attention, "onednn": _onednn}


def _random(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _plain_example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float, None]:
    q, k, v = _random(dtype, (1, 416, 4, 64), (1, 577, 4, 64), (1, 577, 4, 64))
    return q, k, v, 0.125, None


def _short_example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float, None]:
    q, k, v = _random(dtype, *[(24, 13, 12, 64)] * 3)
    return q, k, v, 0.125, None


def _biased_example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float, Tensor]:
    qkv, bias = _random(dtype, (1, 197, 3, 12, 64), (1, 12, 197, 197))
    q, k, v = qkv.unbind(2)
    return q, k, v, 0.125, bias
