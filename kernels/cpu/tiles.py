"""Attention in tiles of scores that stay in cache: explicit products, which reach the processor's matrix units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import Dropout
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


def head_major(name: str, x: Tensor) -> Tensor:
    """`[b, n, h, D]` of any strides → a contiguous `[b·h, n, D]` in the scratch memory `name`."""
    batch, rows, heads, width = x.shape
    place = scratch(name, (batch, heads, rows, width), x.dtype)
    return place.copy_(x.transpose(1, 2)).view(batch * heads, rows, width)


def token_major(x: Tensor, like: Tensor) -> Tensor:
    """A `[b·h, n, D]` as a view `[b, n, h, D]`, the shape of `like`."""
    batch, rows, heads, width = like.shape
    return x.view(batch, heads, rows, width).transpose(1, 2)


def product(name: str, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """`scale · x y` of batches of matrices, in the scratch memory `name`. (`bmm` would take a tenth longer.)"""
    place = scratch(name, (x.shape[0], x.shape[1], y.shape[2]), x.dtype)
    return torch.baddbmm(place, x, y, beta=0, alpha=scale, out=place)


def tile_weights(q: Tensor, k: Tensor, scale: float, tile: Tile, bias: Tensor | None) -> Tensor:
    """Softmax of the scores of a tile, `[b·h, r, Nk]` in scratch memory.

    Args:
        q, k: `[b·h, r, D]` and `[b·h, Nk, D]`.
        scale, bias: as in `tiled_attention`.
    """
    if bias is None:
        scores = product("scores", q, k.transpose(1, 2), scale)
        return torch.softmax(scores, -1, out=scores)
    shape = (tile.batch.stop - tile.batch.start, tile.heads.stop - tile.heads.start, q.shape[1], k.shape[1])
    scores = scratch("scores", shape, q.dtype)
    flat = scores.view(q.shape[0], *shape[2:])
    # Inside the product the bias is added before the rounding to half precision.
    parts = zip((tile.batch, tile.heads, tile.rows), bias.shape, strict=False)
    scores.copy_(bias[tuple(slice(None) if size == 1 else part for part, size in parts)])
    flat.baddbmm_(q, k.transpose(1, 2), alpha=scale)
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
    rescale = 1.0 if dropout is None else 1 / dropout.kept
    keys = values = q
    for tile in tiles(q, k.shape[1]):
        where = (tile.batch, tile.rows, tile.heads)
        if tile.first:
            keys = head_major("keys", k[tile.batch, :, tile.heads])
            values = head_major("values", v[tile.batch, :, tile.heads])
        weights = tile_weights(head_major("queries", q[where]), keys, scale, tile, bias)
        if dropout is not None:
            weights *= dropout.mask(tuple(weights.shape), weights.dtype)
        out[where] = token_major(product("attended", weights, values, rescale), out[where])
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
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `tiled_attention`; the weights are computed again, so that none outlives the forward pass.

    Args:
        dout: `[B, Nq, H, D]`; the rest as in the forward pass. `dropout` replays its masks.
        bias_gradient: whether the gradient of a bias `[1, H, Nq, Nk]` is wanted.
        into: where dq, dk, dv are written, of any strides; new tensors by default.

    Returns:
        dq, dk, dv, and the gradient of the bias `[H, Nq, Nk]` in fp32 (fp64 for fp64), summed over the batch in order.
    """
    dq, dk, dv = into or [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
    scores = (q.shape[2], q.shape[1], k.shape[1])
    dbias = torch.empty(scores, dtype=torch.promote_types(q.dtype, torch.float32)) if bias_gradient else None
    rescale = 1.0 if dropout is None else 1 / dropout.kept
    keys = values = q
    for tile in tiles(q, k.shape[1]):
        where, whole = (tile.batch, tile.rows, tile.heads), (tile.batch, slice(None), tile.heads)
        if tile.first:
            keys, values = head_major("keys", k[whole]), head_major("values", v[whole])
        queries, upstream = head_major("queries", q[where]), head_major("upstream", dout[where])
        weights = tile_weights(queries, keys, scale, tile, bias)
        dscores, kept = product("dscores", upstream, values.transpose(1, 2), rescale), weights
        if dropout is not None:
            mask = dropout.mask(tuple(weights.shape), q.dtype)
            dscores *= mask
            kept = mask.mul_(weights)
        _accumulate(dv[whole], kept, upstream, rescale, tile, "dv")
        torch.ops.aten._softmax_backward_data.out(dscores, weights, -1, q.dtype, grad_input=dscores)
        dq[where] = token_major(product("attended", dscores, keys, scale), dq[where])
        _accumulate(dk[whole], dscores, queries, scale, tile, "dk")
        if dbias is not None:
            _accumulate_bias(dbias[tile.heads, tile.rows], dscores, first=tile.batch.start == 0)
    return dq, dk, dv, dbias


def _accumulate(gradient: Tensor, scores: Tensor, rows: Tensor, scale: float, tile: Tile, name: str) -> None:
    """Add `scale · scores^T rows` of a tile to the gradient of its keys or values, which all of its rows share."""
    part = product("part", scores.transpose(1, 2), rows, scale)
    if not (tile.first and tile.last):
        total = scratch(name, tuple(part.shape), torch.promote_types(rows.dtype, torch.float32))
        part = total.copy_(part) if tile.first else total.add_(part)
    if tile.last:
        gradient.copy_(token_major(part, gradient))


def _accumulate_bias(gradient: Tensor, dscores: Tensor, *, first: bool) -> None:
    """Add the score gradients `[b·h, r, Nk]` of a tile's batch entries, one after the other, to `[h, r, Nk]`."""
    for entry in dscores.view(-1, *gradient.shape):
        if first:
            gradient.copy_(entry)
        elif entry.dtype == gradient.dtype:
            gradient += entry
        else:
            # Converted apart: a sum of two types takes three times as long.
            gradient += scratch("widened", tuple(entry.shape), gradient.dtype).copy_(entry)
        first = False
