"""Attention on CPU for inference, in the style of the processor: large matrix products over cache-sized score tiles.

PyTorch's fused CPU kernel is the better choice for fp32 on processors where MKL is fast; explicit products win in bf16
and with a position bias, because they reach the machine's matrix units. The candidates are compared once per process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .ragged import Group, plan_of, without_masked_keys
from .selection import select

# Scores of one tile; half of a typical per-core share of the last-level cache leaves room for keys and values.
_TILE_BYTES = 4 << 20


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention without a key mask.

    Args:
        q: `[B, Nq, H, D]`; k, v: `[B, Nk, H, D]`; any strides.
        scale: multiplies the products.
        bias: `[H, Nq, Nk]`, added to the scaled products of every batch entry.

    Returns:
        `[B, Nq, H, D]`, contiguous.
    """
    candidates = _PLAIN if bias is None else _BIASED
    name = select("attention" if bias is None else "biased attention", candidates, _EXAMPLES[bias is None], q.dtype)
    return candidates[name](q, k, v, scale, bias)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias[None], scale=scale)
    return out.transpose(1, 2).contiguous()


def _tiled(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    out = torch.empty((batch, queries, heads, width), dtype=q.dtype)
    group, rows = tile_shape(heads, queries, keys, q.element_size())
    scores = torch.empty((group, rows, keys), dtype=q.dtype)
    for b in range(batch):
        for h in range(0, heads, group):
            hs = slice(h, min(h + group, heads))
            keys_t, values = k[b, :, hs].permute(1, 2, 0), v[b, :, hs].transpose(0, 1)
            for r in range(0, queries, rows):
                rs = slice(r, min(r + rows, queries))
                tile = scores[: hs.stop - hs.start, : rs.stop - rs.start]
                if tile.shape[1] != rows:
                    tile = torch.empty(tile.shape, dtype=q.dtype)
                start = tile if bias is None else bias[hs, rs]
                beta = 0 if bias is None else 1
                torch.baddbmm(start, q[b, rs, hs].transpose(0, 1), keys_t, beta=beta, alpha=scale, out=tile)
                torch.softmax(tile, -1, out=tile)
                out[b, rs, hs] = torch.bmm(tile, values).transpose(0, 1)
    return out


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
                scores = product.binary(scaled[b, h], bias[h], keys[b, h], None, "add")
            torch.softmax(scores, -1, out=scores)
            out[b, :, h] = product(scores, values[b, h], None, "none", [], "")
    return out


def tile_shape(heads: int, queries: int, keys: int, itemsize: int) -> tuple[int, int]:
    """Heads and rows of a score tile: whole heads while they fit, at least two (one per core), then fewer rows."""
    per_row = max(1, keys * itemsize)
    group = max(min(2, heads), min(heads, _TILE_BYTES // max(1, per_row * queries)))
    rows = max(1, min(queries, _TILE_BYTES // (per_row * group)))
    return group, rows


_Candidates = dict[str, Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]]
_PLAIN: _Candidates = {"aten": _fused, "tiled": _tiled, "onednn": _onednn}
_BIASED: _Candidates = {"aten": _fused, "tiled": _tiled, "onednn": _onednn}


def _plain_example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float, None]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 416, 4, 64, generator=generator).to(dtype)
    k, v = torch.randn(2, 1, 577, 4, 64, generator=generator).to(dtype)
    return q, k, v, 0.125, None


def _biased_example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(1, 197, 3, 12, 64, generator=generator).to(dtype).unbind(2)
    return q, k, v, 0.125, torch.randn(12, 197, 197, generator=generator).to(dtype)


_EXAMPLES = {True: _plain_example, False: _biased_example}


class Dropout:
    """Dropout masks that follow from a seed and the order in which they are asked for.

    Args:
        probability: of zeroing an attention weight.
        seed: one integer.
    """

    def __init__(self, probability: float, seed: Tensor) -> None:
        self.kept = 1 - probability
        self.generator = torch.Generator().manual_seed(int(seed))

    def factors(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros where a weight is dropped, and the inverse of the kept share elsewhere."""
        return torch.empty(shape, dtype=dtype).bernoulli_(self.kept, generator=self.generator).div_(self.kept)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: tuple[int, ...],
    bounds_k: tuple[int, ...],
    scale: float,
    dropout: Dropout | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention of packed sequences.

    Args:
        q: `[Tq, H, D]`; k, v: `[Tk, H, D]`; any strides.
        bounds_q, bounds_k: S + 1 offsets of the S sequences in q and in k.
        dropout: of attention weights.
        key_mask: `[Tk]`, False for keys that nobody attends to.

    Returns:
        `[Tq, H, D]`; zeros for a sequence without keys.
    """
    if key_mask is not None:
        k, v, bounds_k = without_masked_keys(k, v, bounds_k, key_mask)
    plan = plan_of(bounds_q, bounds_k)
    if len(plan.singles) == 1 and not plan.groups and not plan.empty and dropout is None:
        return dense_attention(q[None], k[None], v[None], scale)[0]
    out = torch.zeros(q.shape, dtype=q.dtype)
    for queries, keys in plan.singles:
        one = (q[queries][None], k[keys][None], v[keys][None])
        out[queries] = (dense_attention(*one, scale) if dropout is None else _padded(*one, scale, None, dropout))[0]
    for group in plan.groups:
        attended = _padded(*padded_group(q, k, v, group), scale, group.key_padding, dropout)
        out.index_copy_(0, group.query_tokens, attended.flatten(0, 1).index_select(0, group.query_slots))
    return out


def padded_group(q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """The sequences of a group as padded batches `[n, longest, H, D]`."""
    shape = (group.sequences, -1, *q.shape[1:])
    queries, keys = group.queries, group.keys
    return (
        q.index_select(0, queries).view(shape),
        k.index_select(0, keys).view(shape),
        v.index_select(0, keys).view(shape),
    )


def _padded(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_padding: Tensor | None, dropout: Dropout | None
) -> Tensor:
    """Explicit attention of a padded batch `[n, L, H, D]`: quicker than the fused kernel when sequences are short."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = attention_weights(q, k, scale, None, key_padding)
    if dropout is not None:
        weights *= dropout.factors(tuple(weights.shape), weights.dtype)
    return (weights @ v).transpose(1, 2)


def attention_weights(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, key_padding: Tensor | None) -> Tensor:
    """Softmax of the scores: q `[..., Nq, D]`, k `[..., Nk, D]`, bias broadcastable, key_padding `[n, Nk]`."""
    scores = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        scores += bias
    if key_padding is not None:
        scores.masked_fill_(key_padding[:, None, None, :], -torch.inf)
    return torch.softmax(scores, -1, out=scores)
