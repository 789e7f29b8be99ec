"""Attention on CPU: PyTorch's fused kernel, tiled GEMMs, or our kernel compiled by LLVM.

The candidates are timed once per process: long sequences, sequences of a passage and many short ones separately. With
tiled GEMMs the softmax takes longest. Inference therefore computes powers of two without subtracting the maximum and
divides the result by their sum; where a power leaves the range of fp32, the ordinary softmax runs again.

The backward pass runs the tiles or our kernel: the fused kernel's gradients use a fast approximation of the exponential
and miss the accuracy of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host, reference
from ..reference import HIDDEN
from . import llvm
from .selection import Race, operands, register, select
from .workspace import Dropout, scratch

# Up to this many scores, a sequence is a short one: its products are too small for a library to be quick at them.
_SHORT_SCORES = 64 * 64
# Tokens of a sequence up to which several are multiplied together with more gain than one after the other.
_MEDIUM_TOKENS = 128
# So few short sequences are less work than the calls of explicit products.
_FEW = 4
# Scores of one tile; half of a typical per-core share of the last-level cache leaves room for keys and values.
_TILE_BYTES = 4 << 20
# PyTorch's exp2 is four times as quick as its exp where MKL is slow, and as accurate.
_LOG2E = math.log2(math.e)
# Row sums between these are safe: neither they nor their terms that matter leave the range of fp32.
_LEAST_SUM, _MOST_SUM = 2.0**-64, 2.0**64
# Types with that range.
_WIDE_RANGE = (torch.float32, torch.bfloat16, torch.float64)


class Hiding(NamedTuple):
    """Keys may be hidden, by the bias or by a mask."""

    key_mask: Tensor | None = None
    """`[B, Nk]` boolean, False for keys that a batch entry does not attend to."""


class Tile(NamedTuple):
    """Which part of `[B, Nq, H, ...]` is computed at once."""

    batch: slice
    heads: slice
    rows: slice
    first: bool
    """These are the first rows of their batch entries and heads."""
    last: bool


def tile_shape(
    batch: int, heads: int, queries: int, keys: int, itemsize: int
) -> tuple[int, int, int]:
    """Batch entries, heads and rows of a tile: all heads if they fit, else whole heads, else rows of two heads."""
    most, queries = max(1, _TILE_BYTES // (itemsize * max(1, keys))), max(1, queries)
    if heads * queries <= most:
        return max(1, min(batch, most // (heads * queries))), heads, queries
    if 2 * queries <= most:
        entries = min(batch, most // queries)
        return entries, min(heads, most // (queries * entries)), queries
    pair = min(2, heads)
    return 1, pair, max(1, min(queries, most // pair))


def tiles(q: Tensor, keys: int, period: int = 1) -> Iterator[Tile]:
    """The tiles of the scores of queries `[B, Nq, H, D]`, in forward and backward: whole periods, or parts of one."""
    batch, queries, heads, _ = q.shape
    entries, group, rows = tile_shape(batch, heads, queries, keys, q.element_size())
    entries = entries // period * period or entries
    within = batch if entries >= period else period
    for h in range(0, heads, group):
        for base in range(0, batch, within):
            for b in range(base, base + within, entries):
                for r in range(0, queries, rows):
                    parts = (
                        slice(b, min(b + entries, base + within)),
                        slice(h, min(h + group, heads)),
                    )
                    yield Tile(
                        *parts, slice(r, min(r + rows, queries)), r == 0, r + rows >= queries
                    )


def biased_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Attention `[B, N, H, D]` with a bias `[G, H, N, N]`: entry b mod G for batch entry b, G a divisor of B."""
    short = q.shape[1] * k.shape[1] <= _SHORT_SCORES
    if (short and q.shape[0] <= _FEW) or (
        not short and max(q.shape[1], k.shape[1]) <= _MEDIUM_TOKENS
    ):
        # Whichever is the best without a bias is so with one.
        return plain_attention(q, k, v, scale, bias)
    name = _select("short biased attention" if short else "biased attention", q)
    # Converted once, not for every tile; the compiled kernel adds it in fp32.
    return _ALL[name](q, k, v, scale, bias if name == "llvm" else bias.to(q.dtype))


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Attention `[B, Nq, H, D]` of dense sequences, with an additive mask `[G, 1 or H, 1 or Nq, Nk]`, G dividing B."""
    name = choice(q.shape[1], k.shape[1], q)
    if name != "llvm" and q.shape[0] <= _FEW and q.shape[1] * k.shape[1] <= _SHORT_SCORES:
        name = "aten"
    return _ALL[name](q, k, v, scale, mask)


def choice(queries: int, keys: int, q: Tensor) -> str:
    """The candidate that runs attention of q `[..., D]` without a position bias."""
    if queries * keys <= _SHORT_SCORES:
        return _select("short attention", q)
    return _select("medium attention" if max(queries, keys) <= _MEDIUM_TOKENS else "attention", q)


def _select(operation: str, q: Tensor) -> str:
    return select(operation, q.dtype, whole=llvm.fills_vectors(q.shape[-1], q.dtype))


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    hiding: Hiding | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Contiguous attention `[B, Nq, H, D]` with an additive bias `[G, H or 1, Nq or 1, Nk]`, G a divisor of B.

    Without `hiding`, every query has to see at least one key. `lse`: `[B, H, Nq]`, at least fp32, for the logsumexp.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    # Fused into the following GEMM at no cost.
    rescale = 1.0 if dropout is None else 1 / dropout.kept
    for tile, where, keys, values in _tiles_with_keys(q, k, v, bias):
        into = None if lse is None else lse[tile.batch, tile.heads, tile.rows]
        weights = tile_weights(
            head_major("queries", q[where]), keys, scale, tile, bias, hiding, into
        )
        if dropout is not None:
            weights *= dropout.mask(tuple(weights.shape), weights.dtype)
        out[where] = token_major(product("attended", weights, values, rescale), out[where])
    return out


def exp2_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """`tiled_attention` with powers of two in place of the softmax."""
    if q.dtype not in _WIDE_RANGE or not q.numel() or not k.shape[1]:
        return tiled_attention(q, k, v, scale, bias)
    out, sums = torch.empty(q.shape, dtype=q.dtype), torch.empty((*q.shape[:-1], 1), dtype=q.dtype)
    for tile, where, keys, values in _tiles_with_keys(q, k, v, bias):
        weights = tile_scores(
            head_major("queries", q[where]), keys, scale * _LOG2E, tile, bias, factor=_LOG2E
        )
        torch.exp2(weights, out=weights)
        of_rows = token_major(weights.sum(-1, keepdim=True), sums[where])
        sums[where] = of_rows
        torch.div(
            token_major(product("attended", weights, values), out[where]), of_rows, out=out[where]
        )
    least, most = map(host.number, torch.aminmax(sums))
    # A comparison with NaN is false.
    return out if least > _LEAST_SUM and most < _MOST_SUM else tiled_attention(q, k, v, scale, bias)


def _tiles_with_keys(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> Iterator[tuple[Tile, tuple[slice, slice, slice], Tensor, Tensor]]:
    """Each tile, the part of q that it is, and keys and values of its heads, `[b·h, Nk, D]`."""
    # Placeholders: the first tile of a group of heads copies their keys and values, the others of the group reuse them.
    keys = values = q
    for tile in tiles(q, k.shape[1], 1 if bias is None else bias.shape[0]):
        if tile.first:
            keys = head_major("keys", k[tile.batch, :, tile.heads])
            values = head_major("values", v[tile.batch, :, tile.heads])
        yield tile, (tile.batch, tile.rows, tile.heads), keys, values


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    *,
    bias_gradient: bool = False,
    hiding: Hiding | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients by our kernel where it is faster and applies, else by `tiled_attention_backward`."""
    masked = hiding is not None and hiding.key_mask is not None
    if (
        dropout is None
        and dlse is None
        and not masked
        and compiles_backward(q, k.shape[1], biased=bias_gradient)
    ):
        return compiled_backward(dout, q, k, v, scale, bias, bias_gradient=bias_gradient)
    # Converted once, not for every tile; our kernel adds it in fp32.
    given = (dout, q, k, v, scale, bias if bias is None else bias.to(q.dtype), dropout)
    return tiled_attention_backward(*given, bias_gradient=bias_gradient, hiding=hiding, dlse=dlse)


def compiles_backward(
    q: Tensor, keys: int, queries: int | None = None, *, biased: bool = False
) -> bool:
    """Whether our kernel computes gradients of attention without dropout; q is `[B, Nq, H, D]`, or `[..., D]`."""
    queries = q.shape[1] if queries is None else queries
    operation = (
        ("short " if queries * keys <= _SHORT_SCORES else "")
        + "biased " * biased
        + "attention backward"
    )
    if _select(operation, q) != "llvm":
        return False
    from .llvm.attention_backward import takes

    return takes(q, keys)


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
    hiding: Hiding | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `tiled_attention` with recomputed weights: dq, dk, dv, and dbias `[G, H, Nq, Nk]`, at least fp32.

    `into`: where dq, dk, dv are written, with any strides. `dlse`: the gradient of the logsumexp, `[B, H, Nq]`. The
    gradient of the bias is summed over the batch in order.
    """
    dq, dk, dv = into or [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
    period = 1 if bias is None else bias.shape[0]
    scores = (period, q.shape[2], q.shape[1], k.shape[1])
    dbias = (
        torch.empty(scores, dtype=torch.promote_types(q.dtype, torch.float32))
        if bias_gradient
        else None
    )
    rescale = 1.0 if dropout is None else 1 / dropout.kept
    keys = values = q
    for tile in tiles(q, k.shape[1], period):
        where, whole = (tile.batch, tile.rows, tile.heads), (tile.batch, slice(None), tile.heads)
        if tile.first:
            keys, values = head_major("keys", k[whole]), head_major("values", v[whole])
        queries, upstream = head_major("queries", q[where]), head_major("upstream", dout[where])
        weights = tile_weights(queries, keys, scale, tile, bias, hiding)
        # Before the mask, as in the forward pass: both draw the same bits only if they ask in the same order.
        dscores, kept = product("dscores", upstream, values.transpose(1, 2), rescale), weights
        if dropout is not None:
            mask = dropout.mask(tuple(weights.shape), q.dtype)
            dscores *= mask
            kept = mask.mul_(weights)
        _accumulate(dv[whole], kept, upstream, rescale, tile, "dv")
        # In place: two tensors of a tile's scores would not stay in cache.
        torch.ops.aten._softmax_backward_data.out(dscores, weights, -1, q.dtype, grad_input=dscores)
        if dlse is not None:
            of_rows = dlse[tile.batch, tile.heads, tile.rows].reshape(*weights.shape[:2], 1)
            dscores.addcmul_(weights, of_rows.to(q.dtype))
        dq[where] = token_major(product("attended", dscores, keys, scale), dq[where])
        _accumulate(dk[whole], dscores, queries, scale, tile, "dk")
        if dbias is not None:
            place = dbias[_of_period(tile, period), tile.heads, tile.rows]
            _accumulate_bias(place, dscores, first=tile.batch.start < period)
    return dq, dk, dv, dbias


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


def tile_weights(
    q: Tensor,
    k: Tensor,
    scale: float,
    tile: Tile,
    bias: Tensor | None,
    hiding: Hiding | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Softmax `[b·h, r, Nk]` of the scores of a tile, in scratch memory; the logsumexp goes to `lse` `[b, h, r]`."""
    flat = tile_scores(q, k, scale, tile, bias, hiding)
    blind = None if hiding is None else flat.amax(-1, keepdim=True) <= HIDDEN
    if lse is not None:
        found = torch.logsumexp(flat.to(lse.dtype), -1)
        lse.copy_(
            (found if blind is None else found.masked_fill_(blind[..., 0], -torch.inf)).view(
                lse.shape
            )
        )
    torch.softmax(flat, -1, out=flat)
    return flat if blind is None else flat.masked_fill_(blind, 0)


def tile_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    tile: Tile,
    bias: Tensor | None,
    hiding: Hiding | None = None,
    factor: float = 1.0,
) -> Tensor:
    """`scale · q k^T + factor · bias` of a tile, `[b·h, r, Nk]` in scratch memory; arguments as in `tile_weights`."""
    if bias is None:
        return product("scores", q, k.transpose(1, 2), scale)
    shape = (
        tile.batch.stop - tile.batch.start,
        tile.heads.stop - tile.heads.start,
        q.shape[1],
        k.shape[1],
    )
    scores = scratch("scores", shape, q.dtype)
    # Inside the product the bias is added before the rounding to half precision.
    parts = zip((_of_period(tile, bias.shape[0]), tile.heads, tile.rows), bias.shape, strict=False)
    part = bias[tuple(slice(None) if size == 1 else part for part, size in parts)]
    place = scores.view(-1, part.shape[0], *shape[1:])
    if factor == 1:
        place.copy_(part)
    else:
        torch.mul(part.expand(place.shape), factor, out=place)
    if hiding is not None and hiding.key_mask is not None:
        scores.masked_fill_(~hiding.key_mask[tile.batch, None, None, :], -torch.inf)
    return scores.view(q.shape[0], *shape[2:]).baddbmm_(q, k.transpose(1, 2), alpha=scale)


def _of_period(tile: Tile, period: int) -> slice:
    """The entries of a bias of `period` entries for a tile: a whole period, or a part of one."""
    entries = tile.batch.stop - tile.batch.start
    first = tile.batch.start % period
    return slice(0, period) if entries >= period else slice(first, first + entries)


def _accumulate(
    gradient: Tensor, scores: Tensor, rows: Tensor, scale: float, tile: Tile, name: str
) -> None:
    """Add `scale · scores^T rows` of a tile to the gradient of its keys or values, which all of its rows share."""
    part = product("part", scores.transpose(1, 2), rows, scale)
    # Tiles of rows add up in fp32; a single tile needs neither the sum nor the copy.
    if not (tile.first and tile.last):
        total = scratch(name, tuple(part.shape), torch.promote_types(rows.dtype, torch.float32))
        part = total.copy_(part) if tile.first else total.add_(part)
    if tile.last:
        gradient.copy_(token_major(part, gradient))


def _accumulate_bias(gradient: Tensor, dscores: Tensor, *, first: bool) -> None:
    """Add the score gradients `[b·h, r, Nk]` of a tile, one period after the other, to `[g, h, r, Nk]`."""
    for entry in dscores.view(-1, *gradient.shape):
        if first:
            gradient.copy_(entry)
        elif entry.dtype == gradient.dtype:
            gradient += entry
        else:
            # Converted first: a sum of two dtypes takes three times as long.
            gradient += scratch("widened", tuple(entry.shape), gradient.dtype).copy_(entry)
        first = False


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # an index made by inference serves training too
def _index(window: tuple[int, int]) -> Tensor:
    return reference.relative_position_index(window).view(-1)


def position_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """`[(2wh-1)(2ww-1)+3, H]` → `[H, N, N]`, contiguous, minus each row's maximum, for the precision of sums."""
    tokens = 1 + window[0] * window[1]
    bias = table.t().contiguous().index_select(1, _index(window)).view(-1, tokens, tokens)
    return bias.sub_(bias.amax(-1, keepdim=True))


def table_gradient(dbias: Tensor, window: tuple[int, int], rows: int) -> Tensor:
    """`[H, N, N]` → `[rows, H]` of the same dtype; the order of summation does not depend on the threads."""
    found = torch.zeros((dbias.shape[0], rows), dtype=dbias.dtype)
    index = _index(window).expand(dbias.shape[0], -1)
    return found.scatter_add_(1, index, dbias.flatten(1)).t().contiguous()


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if bias is not None:
        bias = bias.to(q.dtype)
        if len(bias) not in (1, len(q)):
            bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).contiguous()


def _compiled(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    if (reason := llvm.why_not(q.dtype)) is not None:
        raise NotImplementedError(reason)
    # Imported where it runs, because its compiler takes long to load.
    from .llvm.attention import attention, takes

    return (
        attention(q, k, v, scale, bias)
        if takes(q, k.shape[1])
        else exp2_attention(q, k, v, scale, bias)
    )


def compiled_backward(dout: Tensor, q: Tensor, *given: Any, **options: Any) -> _Gradients:
    """Gradients by our kernel, which `llvm.attention_backward` describes."""
    if (reason := llvm.why_not(q.dtype)) is not None:
        raise NotImplementedError(reason)
    # Imported where it runs, because its compiler takes long to load.
    from .llvm.attention_backward import attention_backward

    return attention_backward(dout, q, *given, **options)


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _gradients(backward: Callable[..., _Gradients], q: Tensor, *given: Any) -> Tensor:
    """All gradients in one tensor, as candidates are compared; results stand for what comes from above."""
    found = backward(q, q, *given, bias_gradient=given[-1] is not None)
    return torch.cat([t.flatten().to(q.dtype) for t in found if t is not None])


_Candidates = dict[str, Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]]
_LLVM: _Candidates = {"llvm": _compiled} if llvm.why_not() is None else {}
_ALL: _Candidates = {"aten": _fused, "tiled": tiled_attention, "exp2": exp2_attention, **_LLVM}
_BACKWARD: _Candidates = {"tiled": partial(_gradients, tiled_attention_backward)}
if _LLVM:
    _BACKWARD["llvm"] = partial(_gradients, compiled_backward)


def _example(
    dtype: torch.dtype, q: tuple[int, ...], keys: int, bias: tuple[int, ...] | None = None
) -> tuple[Any, ...]:
    """Q of this shape, k, v and scale, and a bias of this shape; views of one projection for an image."""
    if bias is not None and q[0] == 1:
        parts, scores = operands(dtype, (q[0], keys, 3, *q[2:]), bias)
        return *parts.unbind(2), q[-1] ** -0.5, scores
    k = (q[0], keys, *q[2:])
    return (
        *operands(dtype, q, k, k),
        q[-1] ** -0.5,
        None if bias is None else operands(dtype, bias)[0],
    )


# The operands that are timed: a passage over an image, texts, captions; an image, and windows of one.
_EXAMPLES: dict[str, tuple[tuple[int, int, int, int], int, tuple[int, ...] | None]] = {
    "attention": ((1, 416, 4, 64), 577, None),
    "medium attention": ((6, 96, 12, 64), 96, None),
    "short attention": ((24, 13, 12, 64), 13, None),
    "biased attention": ((1, 197, 12, 64), 197, (1, 12, 197, 197)),
    "short biased attention": ((32, 49, 6, 32), 49, (16, 6, 49, 49)),
}
for _name, (_q, _keys, _bias) in _EXAMPLES.items():
    _flops, _make = 4 * math.prod(_q) * _keys, partial(_example, q=_q, keys=_keys, bias=_bias)
    register(_name, Race(_ALL, _make, _flops))
    if "medium" not in _name:
        register(f"{_name} backward", Race(_BACKWARD, _make, 10 * _flops // 4))
