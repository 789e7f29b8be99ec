"""Attention in tiles of scores that stay in cache: explicit products, which reach the processor's matrix units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import host
from .workspace import scratch

# Scores of one tile; half of a typical per-core share of the last-level cache leaves room for keys and values.
_TILE_BYTES = 4 << 20


class Tile(NamedTuple):
    """Which part of `[B, Nq, H, ...]` is computed at once."""

    batch: slice
    heads: slice
    rows: slice
    first: bool
    """Whether these are the first rows of their batch entries and heads."""
    last: bool


def tile_shape(batch: int, heads: int, queries: int, keys: int, itemsize: int) -> tuple[int, int, int]:
    """Batch entries, heads and rows of a tile.

    All heads where they fit: what is copied is then contiguous. Or else whole heads, one of several batch entries,
    which share its bias. Or else rows of two heads, one per core.
    """
    most, queries = max(1, _TILE_BYTES // (itemsize * max(1, keys))), max(1, queries)
    if heads * queries <= most:
        return max(1, min(batch, most // (heads * queries))), heads, queries
    if 2 * queries <= most:
        entries = min(batch, most // queries)
        return entries, min(heads, most // (queries * entries)), queries
    pair = min(2, heads)
    return 1, pair, max(1, min(queries, most // pair))


def tiles(q: Tensor, keys: int) -> Iterator[Tile]:
    """The tiles of a score tensor for queries `[B, Nq, H, D]`. Forward and backward go through the same ones."""
    batch, queries, heads, _ = q.shape
    entries, group, rows = tile_shape(batch, heads, queries, keys, q.element_size())
    for h in range(0, heads, group):
        for b in range(0, batch, entries):
            for r in range(0, queries, rows):
                parts = (slice(b, min(b + entries, batch)), slice(h, min(h + group, heads)))
                yield Tile(*parts, slice(r, min(r + rows, queries)), r == 0, r + rows >= queries)


class Dropout:
    """Dropout masks that follow from a seed and the order in which they are asked for.

    Args:
        probability: of zeroing an attention weight.
        seed: one integer.
    """

    def __init__(self, probability: float, seed: Tensor) -> None:
        self.kept = 1 - probability
        self.generator = torch.Generator().manual_seed(host.integer(seed))

    def factors(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros where a weight is dropped, and the inverse of the kept share elsewhere."""
        found = scratch("dropout", shape, dtype)
        return found.bernoulli_(self.kept, generator=self.generator).mul_(1 / self.kept)


def head_major(name: str, x: Tensor, scale: float = 1.0) -> Tensor:
    """`[b, n, h, D]` of any strides → `scale` times it as a contiguous `[b·h, n, D]`, in the scratch memory `name`."""
    batch, rows, heads, width = x.shape
    place = scratch(name, (batch, heads, rows, width), x.dtype)
    if scale == 1:
        place.copy_(x.transpose(1, 2))
    else:
        torch.mul(x.transpose(1, 2), scale, out=place)
    return place.view(batch * heads, rows, width)


def token_major(x: Tensor, like: Tensor) -> Tensor:
    """A `[b·h, n, D]` as a view `[b, n, h, D]`, the shape of `like`."""
    batch, rows, heads, width = like.shape
    return x.view(batch, heads, rows, width).transpose(1, 2)


def tile_weights(q: Tensor, k: Tensor, tile: Tile, bias: Tensor | None) -> Tensor:
    """Softmax of the scores of a tile, `[b·h, r, Nk]` in scratch memory.

    Args:
        q, k: `[b·h, r, D]`, already scaled, and `[b·h, Nk, D]`.
        bias: as in `tiled_attention`.
    """
    shape = (tile.batch.stop - tile.batch.start, tile.heads.stop - tile.heads.start, q.shape[1], k.shape[1])
    scores = scratch("scores", shape, q.dtype)
    flat = scores.view(q.shape[0], *shape[2:])
    if bias is None:
        torch.bmm(q, k.transpose(1, 2), out=flat)
    else:
        # Inside the product the bias is added before the rounding to half precision.
        parts = zip((tile.batch, tile.heads, tile.rows), bias.shape, strict=False)
        scores.copy_(bias[tuple(slice(None) if size == 1 else part for part, size in parts)])
        flat.baddbmm_(q, k.transpose(1, 2))
    return torch.softmax(flat, -1, out=flat)


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Attention `[B, Nq, H, D]`, contiguous.

    Args:
        q: `[B, Nq, H, D]`; k, v: `[B, Nk, H, D]`; any strides.
        bias: `[B or 1, H or 1, Nq or 1, Nk]`, added to the scaled products; -inf hides a key, of which every query has
            to see at least one.
        dropout: of the weights.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    keys = values = q
    for tile in tiles(q, k.shape[1]):
        where = (tile.batch, tile.rows, tile.heads)
        if tile.first:
            keys = head_major("keys", k[tile.batch, :, tile.heads])
            values = head_major("values", v[tile.batch, :, tile.heads])
        queries = head_major("queries", q[where], scale)
        weights = tile_weights(queries, keys, tile, bias)
        if dropout is not None:
            weights *= dropout.factors(tuple(weights.shape), weights.dtype)
        product = torch.bmm(weights, values, out=scratch("product", tuple(queries.shape), q.dtype))
        out[where] = token_major(product, out[where])
    return out


def tiled_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    *,
    bias_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `tiled_attention`; the weights are computed again, so that none outlives the forward pass.

    Args:
        dout: `[B, Nq, H, D]`; the rest as in the forward pass. `dropout` replays its masks.
        bias_gradient: whether the gradient of a bias `[1, H, Nq, Nk]` is wanted.

    Returns:
        dq, dk, dv, and the gradient of the bias `[H, Nq, Nk]` in fp32 (fp64 for fp64), summed over the batch in order.
    """
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    scores = (q.shape[2], q.shape[1], k.shape[1])
    dbias = torch.empty(scores, dtype=torch.promote_types(q.dtype, torch.float32)) if bias_gradient else None
    keys = values = q
    for tile in tiles(q, k.shape[1]):
        where, whole = (tile.batch, tile.rows, tile.heads), (tile.batch, slice(None), tile.heads)
        if tile.first:
            keys, values = head_major("keys", k[whole]), head_major("values", v[whole])
        queries, upstream = head_major("queries", q[where], scale), head_major("upstream", dout[where])
        weights = tile_weights(queries, keys, tile, bias)
        shape = tuple(weights.shape)
        dscores = torch.bmm(upstream, values.transpose(1, 2), out=scratch("dscores", shape, q.dtype))
        if dropout is None:
            _accumulate(dv[whole], weights, upstream, tile, "dv")
        else:
            factors = dropout.factors(shape, q.dtype)
            dscores *= factors
            _accumulate(dv[whole], factors.mul_(weights), upstream, tile, "dv")
        torch.ops.aten._softmax_backward_data.out(dscores, weights, -1, q.dtype, grad_input=dscores)
        product = scratch("product", tuple(queries.shape), q.dtype)
        torch.baddbmm(product, dscores, keys, beta=0, alpha=scale, out=product)
        dq[where] = token_major(product, dq[where])
        _accumulate(dk[whole], dscores, queries, tile, "dk")
        if dbias is not None:
            # Summed in fp32 also where the result is rounded to half precision, which is faster than to ask for fp32.
            part = dscores.view(-1, tile.heads.stop - tile.heads.start, *shape[1:]).sum(0)
            if tile.batch.start == 0:
                dbias[tile.heads, tile.rows] = part
            else:
                dbias[tile.heads, tile.rows] += part
    return dq, dk, dv, dbias


def _accumulate(gradient: Tensor, scores: Tensor, rows: Tensor, tile: Tile, name: str) -> None:
    """Add `scores^T rows` of a tile to the gradient of its keys or values, which all of the tile's rows share."""
    shape = (scores.shape[0], scores.shape[2], rows.shape[2])
    part = torch.bmm(scores.transpose(1, 2), rows, out=scratch("part", shape, rows.dtype))
    if not (tile.first and tile.last):
        total = scratch(name, shape, torch.promote_types(rows.dtype, torch.float32))
        part = total.copy_(part) if tile.first else total.add_(part)
    if tile.last:
        gradient.copy_(token_major(part, gradient))
