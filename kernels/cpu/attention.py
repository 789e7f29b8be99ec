"""Attention on CPU: PyTorch's fused kernel, tiled GEMMs, or our kernel compiled by LLVM.

The candidates are timed once per process, for long, medium and many short sequences separately. With tiled GEMMs the
softmax takes longest. Inference therefore computes powers of two without subtracting the maximum and divides the result
by their sum; where a power leaves the range of fp32, the ordinary softmax runs again.

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
from .selection import Race, compare, operands, register, select
from .workspace import Dropout, scratch

# Up to this many scores, a sequence is short: its GEMMs are too small for a library to be fast.
_SHORT_SCORES = 64 * 64
# Up to this many tokens, several sequences are faster together than one after the other.
_MEDIUM_TOKENS = 128
# So few short sequences are less work than the calls of explicit GEMMs.
_FEW = 4
# Scores of one tile; half of a typical per-core share of the last-level cache leaves room for keys and values.
_TILE_BYTES = 4 << 20
# PyTorch's exp2 is four times as fast as its exp where MKL is slow, and as accurate.
_LOG2E = math.log2(math.e)
# Row sums between these are safe: neither they nor their terms that matter leave the range of fp32.
_SAFE_SUMS = 2.0**-64, 2.0**64
# Dtypes with that range.
_WIDE_RANGE = (torch.float32, torch.bfloat16, torch.float64)


class Hiding(NamedTuple):
    """Keys may be hidden, by the bias or by a mask."""

    key_mask: Tensor | None = None
    """`[B, Nk]` boolean, False for keys that a batch entry does not attend to."""


class Tile(NamedTuple):
    """A slice of `[B, Nq, H, ...]` that is computed at once."""

    batch: slice
    heads: slice
    rows: slice
    first: bool
    """It has the first rows of its batch entries and heads."""
    last: bool


def tile_shape(
    batch: int, heads: int, queries: int, keys: int, itemsize: int
) -> tuple[int, int, int]:
    """Return batch entries, heads and rows of a tile: all heads if they fit, else some, else rows of two heads."""
    limit, queries = max(1, _TILE_BYTES // (itemsize * max(1, keys))), max(1, queries)
    if heads * queries <= limit:
        return max(1, min(batch, limit // (heads * queries))), heads, queries
    if 2 * queries <= limit:
        entries = min(batch, limit // queries)
        return entries, min(heads, limit // (queries * entries)), queries
    pair = min(2, heads)
    return 1, pair, max(1, min(queries, limit // pair))


def tiles(q: Tensor, keys: int, period: int = 1) -> Iterator[Tile]:
    """Yield the tiles of the scores of queries `[B, Nq, H, D]`: several periods of the bias, or a fraction of one."""
    batch, queries, heads, _ = q.shape
    entries, group, rows = tile_shape(batch, heads, queries, keys, q.element_size())
    entries = entries // period * period or entries
    span = batch if entries >= period else period
    starts = [
        (b, min(b + entries, base + span))
        for base in range(0, batch, span)
        for b in range(base, base + span, entries)
    ]
    for head in range(0, heads, group):
        for start, stop in starts:
            for row in range(0, queries, rows):
                yield Tile(
                    batch=slice(start, stop),
                    heads=slice(head, min(head + group, heads)),
                    rows=slice(row, min(row + rows, queries)),
                    first=row == 0,
                    last=row + rows >= queries,
                )


def biased_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Return attention `[B, N, H, D]` with a bias `[G, H, N, N]`: entry b mod G for batch entry b, G a divisor of B."""
    short = q.shape[1] * k.shape[1] <= _SHORT_SCORES
    medium = not short and max(q.shape[1], k.shape[1]) <= _MEDIUM_TOKENS
    if medium or (short and q.shape[0] <= _FEW):
        # The fastest without a bias is the fastest with one.
        return plain_attention(q, k, v, scale, bias)
    name = _select("short biased attention" if short else "biased attention", q)
    # Converted once, not for every tile; the compiled kernel adds it in fp32.
    return _ALL[name](q, k, v, scale, bias if name == "llvm" else bias.to(q.dtype))


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Return attention `[B, Nq, H, D]`, with an additive mask `[G, 1 or H, 1 or Nq, Nk]`, G a divisor of B."""
    name = choice(q.shape[1], k.shape[1], q)
    few = q.shape[0] <= _FEW and q.shape[1] * k.shape[1] <= _SHORT_SCORES
    return _ALL["aten" if few and name != "llvm" else name](q, k, v, scale, mask)


def choice(queries: int, keys: int, q: Tensor) -> str:
    """Return the candidate that runs attention of q `[..., D]` without a position bias."""
    if queries * keys <= _SHORT_SCORES:
        return _select("short attention", q)
    return _select("medium attention" if max(queries, keys) <= _MEDIUM_TOKENS else "attention", q)


def short_seconds(q: Tensor) -> dict[str, float]:
    """Return the seconds of the candidates on short sequences of `SHORT_TERMS` terms; none where nothing is timed."""
    fits = llvm.fills_vectors(q.shape[-1], q.dtype)
    if not fits or torch.are_deterministic_algorithms_enabled():
        return {}
    return compare("short attention", q.dtype).seconds


def _select(operation: str, q: Tensor) -> str:
    return select(operation, q.dtype, fits=llvm.fills_vectors(q.shape[-1], q.dtype))


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
    """Return contiguous attention `[B, Nq, H, D]` with an additive bias `[G, H or 1, Nq or 1, Nk]`, G a divisor of B.

    Without `hiding`, every query has to see at least one key. `lse`: `[B, H, Nq]`, at least fp32, for the logsumexp.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    # Fused into the following GEMM at no cost.
    rescale = 1.0 if dropout is None else 1 / dropout.kept
    for tile, index, keys, values in _tiles_with_keys(q, k, v, bias):
        tile_lse = None if lse is None else lse[tile.batch, tile.heads, tile.rows]
        queries = head_major("queries", q[index])
        weights = tile_weights(queries, keys, scale, tile, bias, hiding, tile_lse)
        if dropout is not None:
            weights *= dropout.mask(tuple(weights.shape), weights.dtype)
        out[index] = token_major(multiply("attended", weights, values, rescale), out[index])
    return out


def exp2_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Return `tiled_attention` by powers of two in place of the softmax."""
    if q.dtype not in _WIDE_RANGE or not q.numel() or not k.shape[1]:
        return tiled_attention(q, k, v, scale, bias)
    out, sums = torch.empty(q.shape, dtype=q.dtype), torch.empty((*q.shape[:-1], 1), dtype=q.dtype)
    for tile, index, keys, values in _tiles_with_keys(q, k, v, bias):
        queries = head_major("queries", q[index])
        weights = tile_scores(queries, keys, scale * _LOG2E, tile, bias, factor=_LOG2E)
        torch.exp2(weights, out=weights)
        row_sums = token_major(weights.sum(-1, keepdim=True), sums[index])
        sums[index] = row_sums
        attended = token_major(multiply("attended", weights, values), out[index])
        torch.div(attended, row_sums, out=out[index])
    smallest, largest = map(host.number, torch.aminmax(sums))
    # A comparison with NaN is false.
    if smallest > _SAFE_SUMS[0] and largest < _SAFE_SUMS[1]:
        return out
    return tiled_attention(q, k, v, scale, bias)


def _tiles_with_keys(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> Iterator[tuple[Tile, tuple[slice, slice, slice], Tensor, Tensor]]:
    """Yield each tile, its index into q, and the keys and values of its heads, `[b·h, Nk, D]`."""
    # Placeholders: the first tile of a group of heads copies their keys and values, the next tiles reuse them.
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
    """Compute gradients by our kernel where it is faster and applies, else by `tiled_attention_backward`."""
    masked = hiding is not None and hiding.key_mask is not None
    applies = dropout is None and dlse is None and not masked
    if applies and compiles_backward(q, k.shape[1], biased=bias_gradient):
        return compiled_backward(dout, q, k, v, scale, bias, bias_gradient=bias_gradient)
    return tiled_attention_backward(
        dout,
        q,
        k,
        v,
        scale,
        # Converted once, not for every tile; our kernel adds it in fp32.
        bias if bias is None else bias.to(q.dtype),
        dropout,
        bias_gradient=bias_gradient,
        hiding=hiding,
        dlse=dlse,
    )


def compiles_backward(
    q: Tensor, keys: int, queries: int | None = None, *, biased: bool = False
) -> bool:
    """Return whether our kernel is the fastest for gradients without dropout; q is `[B, Nq, H, D]`, or `[..., D]`."""
    queries = q.shape[1] if queries is None else queries
    length, kind = "short " * (queries * keys <= _SHORT_SCORES), "biased " * biased
    if _select(f"{length}{kind}attention backward", q) != "llvm":
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
    """Compute the gradients of `tiled_attention`: dq, dk, dv, and dbias `[G, H, Nq, Nk]`, at least fp32.

    `into`: memory for dq, dk, dv, with any strides. `dlse`: the gradient of the logsumexp, `[B, H, Nq]`. The weights
    are recomputed, and the gradient of the bias is summed over the batch in order.
    """
    dq, dk, dv = into or [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
    period, dbias = 1 if bias is None else bias.shape[0], None
    if bias_gradient:
        wide = torch.promote_types(q.dtype, torch.float32)
        dbias = torch.empty((period, q.shape[2], q.shape[1], k.shape[1]), dtype=wide)
    rescale = 1.0 if dropout is None else 1 / dropout.kept
    for tile, index, keys, values in _tiles_with_keys(q, k, v, bias):
        all_rows = (tile.batch, slice(None), tile.heads)
        queries, upstream = head_major("queries", q[index]), head_major("upstream", dout[index])
        weights = tile_weights(queries, keys, scale, tile, bias, hiding)
        dscores = multiply("dscores", upstream, values.transpose(1, 2), rescale)
        dropped = weights
        if dropout is not None:
            # Drawn in the order of the forward pass, whose bits are needed again.
            mask = dropout.mask(tuple(weights.shape), q.dtype)
            dscores *= mask
            dropped = mask.mul_(weights)
        _accumulate(dv[all_rows], dropped, upstream, rescale, tile, "dv")
        # In place: two tensors of a tile's scores would not stay in cache.
        torch.ops.aten._softmax_backward_data.out(dscores, weights, -1, q.dtype, grad_input=dscores)
        if dlse is not None:
            row_dlse = dlse[tile.batch, tile.heads, tile.rows].reshape(*weights.shape[:2], 1)
            dscores.addcmul_(weights, row_dlse.to(q.dtype))
        dq[index] = token_major(multiply("attended", dscores, keys, scale), dq[index])
        _accumulate(dk[all_rows], dscores, queries, scale, tile, "dk")
        if dbias is not None:
            entries = dbias[_bias_entries(tile, period), tile.heads, tile.rows]
            _accumulate_bias(entries, dscores, first=tile.batch.start < period)
    return dq, dk, dv, dbias


def head_major(name: str, x: Tensor) -> Tensor:
    """Copy `[b, n, h, D]` of any strides to a contiguous `[b·h, n, D]` in the scratch memory `name`."""
    batch, rows, heads, width = x.shape
    memory = scratch(name, (batch, heads, rows, width), x.dtype)
    return memory.copy_(x.transpose(1, 2)).view(batch * heads, rows, width)


def token_major(x: Tensor, like: Tensor) -> Tensor:
    """View `[b·h, n, D]` as `[b, n, h, D]`, the shape of `like`."""
    batch, rows, heads, width = like.shape
    return x.view(batch, heads, rows, width).transpose(1, 2)


def multiply(name: str, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """Compute `scale · x y` of batches of matrices, in the scratch memory `name`. (`bmm` would take a tenth longer.)"""
    memory = scratch(name, (x.shape[0], x.shape[1], y.shape[2]), x.dtype)
    return torch.baddbmm(memory, x, y, beta=0, alpha=scale, out=memory)


def tile_weights(
    q: Tensor,
    k: Tensor,
    scale: float,
    tile: Tile,
    bias: Tensor | None,
    hiding: Hiding | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Compute the softmax `[b·h, r, Nk]` of a tile, in scratch memory; the logsumexp goes to `lse` `[b, h, r]`."""
    scores = tile_scores(q, k, scale, tile, bias, hiding)
    blind = None if hiding is None else scores.amax(-1, keepdim=True) <= HIDDEN
    if lse is not None:
        logsumexp = torch.logsumexp(scores.to(lse.dtype), -1)
        if blind is not None:
            logsumexp.masked_fill_(blind[..., 0], -torch.inf)
        lse.copy_(logsumexp.view(lse.shape))
    torch.softmax(scores, -1, out=scores)
    return scores if blind is None else scores.masked_fill_(blind, 0)


def tile_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    tile: Tile,
    bias: Tensor | None,
    hiding: Hiding | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Compute `scale · q k^T + factor · bias` of a tile, `[b·h, r, Nk]` in scratch memory; else as `tile_weights`."""
    if bias is None:
        return multiply("scores", q, k.transpose(1, 2), scale)
    entries, heads = (s.stop - s.start for s in (tile.batch, tile.heads))
    shape = (entries, heads, q.shape[1], k.shape[1])
    scores = scratch("scores", shape, q.dtype)
    # Inside the GEMM the bias is added before the rounding to half precision.
    slices = (_bias_entries(tile, bias.shape[0]), tile.heads, tile.rows)
    for dim, rows in enumerate(slices):
        bias = (
            bias if bias.shape[dim] == 1 else bias.narrow(dim, rows.start, rows.stop - rows.start)
        )
    periods = scores.view(-1, bias.shape[0], *shape[1:])
    if factor == 1:
        periods.copy_(bias)
    else:
        torch.mul(bias.expand(periods.shape), factor, out=periods)
    if hiding is not None and hiding.key_mask is not None:
        scores.masked_fill_(~hiding.key_mask[tile.batch, None, None, :], -torch.inf)
    return scores.view(q.shape[0], *shape[2:]).baddbmm_(q, k.transpose(1, 2), alpha=scale)


def _bias_entries(tile: Tile, period: int) -> slice:
    """Return the entries of a bias with `period` entries for a tile: all, or some."""
    entries = tile.batch.stop - tile.batch.start
    first = tile.batch.start % period
    return slice(0, period) if entries >= period else slice(first, first + entries)


def _accumulate(
    gradient: Tensor, scores: Tensor, rows: Tensor, scale: float, tile: Tile, name: str
) -> None:
    """Add `scale · scores^T rows` of a tile to the gradient of its keys or values, which all of its rows share."""
    summand = multiply("part", scores.transpose(1, 2), rows, scale)
    # Tiles of rows add up in fp32; a single tile needs neither the sum nor the copy.
    if not (tile.first and tile.last):
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = scratch(name, tuple(summand.shape), wide)
        summand = total.copy_(summand) if tile.first else total.add_(summand)
    if tile.last:
        gradient.copy_(token_major(summand, gradient))


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
    """Return the bias of a table, minus each row's maximum, for the precision of sums: → `[H, N, N]`, contiguous."""
    tokens = 1 + window[0] * window[1]
    bias = table.t().contiguous().index_select(1, _index(window)).view(-1, tokens, tokens)
    return bias.sub_(bias.amax(-1, keepdim=True))


def table_gradient(dbias: Tensor, window: tuple[int, int], rows: int) -> Tensor:
    """Sum a bias gradient `[H, N, N]` by table row: → `[rows, H]`; the order does not depend on the threads."""
    dtable = torch.zeros((dbias.shape[0], rows), dtype=dbias.dtype)
    index = _index(window).expand(dbias.shape[0], -1)
    return dtable.scatter_add_(1, index, dbias.flatten(1)).t().contiguous()


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

    run = attention if takes(q, k.shape[1]) else exp2_attention
    return run(q, k, v, scale, bias)


def compiled_backward(dout: Tensor, q: Tensor, *inputs: Any, **options: Any) -> _Gradients:
    """Compute gradients by our kernel, with the arguments of `llvm.attention_backward`."""
    if (reason := llvm.why_not(q.dtype)) is not None:
        raise NotImplementedError(reason)
    # Imported where it runs, because its compiler takes long to load.
    from .llvm.attention_backward import attention_backward

    return attention_backward(dout, q, *inputs, **options)


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _gradients(backward: Callable[..., _Gradients], q: Tensor, *inputs: Any) -> Tensor:
    """Return all gradients in one tensor, to compare candidates; q serves as the upstream gradient."""
    gradients = backward(q, q, *inputs, bias_gradient=inputs[-1] is not None)
    return torch.cat([t.flatten().to(q.dtype) for t in gradients if t is not None])


_Candidates = dict[str, Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]]
_LLVM: _Candidates = {"llvm": _compiled} if llvm.why_not() is None else {}
_ALL: _Candidates = {"aten": _fused, "tiled": tiled_attention, "exp2": exp2_attention, **_LLVM}
_BACKWARD: _Candidates = {"tiled": partial(_gradients, tiled_attention_backward)}
if _LLVM:
    _BACKWARD["llvm"] = partial(_gradients, compiled_backward)


def _example(
    dtype: torch.dtype, q: tuple[int, ...], keys: int, bias: tuple[int, ...] | None = None
) -> tuple[Any, ...]:
    """Return q of this shape, k, v and scale, and a bias of this shape; for an image, views of one projection."""
    scale, k = q[-1] ** -0.5, (q[0], keys, *q[2:])
    if bias is not None and q[0] == 1:
        projection, scores = operands(dtype, (q[0], keys, 3, *q[2:]), bias)
        return *projection.unbind(2), scale, scores
    tensors = operands(dtype, q, k, k)
    return *tensors, scale, None if bias is None else operands(dtype, bias)[0]


# Shapes of the timed operands: a passage over an image, texts, captions; an image, and windows of one.
_EXAMPLES: dict[str, tuple[tuple[int, int, int, int], int, tuple[int, ...] | None]] = {
    "attention": ((1, 416, 4, 64), 577, None),
    "medium attention": ((6, 96, 12, 64), 96, None),
    "short attention": ((24, 13, 12, 64), 13, None),
    "biased attention": ((1, 197, 12, 64), 197, (1, 12, 197, 197)),
    "short biased attention": ((32, 49, 6, 32), 49, (16, 6, 49, 49)),
}
SHORT_TERMS = math.prod(_EXAMPLES["short attention"][0]) * _EXAMPLES["short attention"][1]
"""Terms of the scores of the short sequences that are timed."""
for _name, (_q, _keys, _bias) in _EXAMPLES.items():
    _flops, _make = 4 * math.prod(_q) * _keys, partial(_example, q=_q, keys=_keys, bias=_bias)
    register(_name, Race(_ALL, _make, _flops))
    if "medium" not in _name:
        register(f"{_name} backward", Race(_BACKWARD, _make, 10 * _flops // 4))
