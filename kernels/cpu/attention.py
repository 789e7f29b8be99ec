"""Attention on CPU for inference, in the style of the processor: large matrix products over cache-sized score tiles.

PyTorch's fused CPU kernel is the better choice for fp32 on processors where MKL is fast; explicit products win in bf16
and with a position bias, because they reach the machine's matrix units. The candidates are compared once per process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import select

# Scores of one tile; half of a typical per-core share of the last-level cache leaves room for keys and values.
_TILE_BYTES = 4 << 20
# Up to this many scores per head, many short sequences are one padded batch; beyond, each sequence is its own product.
_SHORT_SCORES = 64 * 64


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
    group, rows = _tile(heads, queries, keys, q.element_size())
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


def _tile(heads: int, queries: int, keys: int, itemsize: int) -> tuple[int, int]:
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


class _Group(NamedTuple):
    """Sequences that run together: where their tokens lie, and which padded slots hold one."""

    queries: Tensor  # [n * longest_q] positions in the packed tensor; padded slots repeat a real one
    query_slots: Tensor  # [tokens] padded slots that hold a query, in packed order
    query_tokens: Tensor  # [tokens] their positions in the packed tensor
    keys: Tensor  # [n * longest_k]
    key_padding: Tensor | None  # [n, longest_k], True where there is no key
    sequences: int


class _Plan(NamedTuple):
    groups: list[_Group]
    singles: list[tuple[slice, slice]]
    empty: list[slice]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a plan made by inference serves training too
def _plan(bounds_q: tuple[int, ...], bounds_k: tuple[int, ...]) -> _Plan:
    """Short sequences of similar length in padded groups, long ones alone, those without keys apart."""
    short: list[int] = []
    singles: list[tuple[slice, slice]] = []
    empty: list[slice] = []
    lengths_q = [b - a for a, b in zip(bounds_q, bounds_q[1:], strict=False)]
    lengths_k = [b - a for a, b in zip(bounds_k, bounds_k[1:], strict=False)]
    for i, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        queries, keys = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        if n and not m:
            empty.append(queries)
        elif n * m > _SHORT_SCORES:
            singles.append((queries, keys))
        elif n:
            short.append(i)
    groups: list[_Group] = []
    short.sort(key=lambda i: (lengths_k[i], lengths_q[i]))
    start = 0
    while start < len(short):
        stop, longest_q, work = start, 0, 0
        while stop < len(short):
            longest_q_next = max(longest_q, lengths_q[short[stop]])
            work_next = work + lengths_q[short[stop]] * lengths_k[short[stop]]
            padded = (stop + 1 - start) * longest_q_next * lengths_k[short[stop]]
            # Padded scores may cost at most as much again as real ones; small groups are not worth splitting.
            if padded > 2 * work_next and padded > 8 * _SHORT_SCORES:
                break
            longest_q, work, stop = longest_q_next, work_next, stop + 1
        members = short[start:stop]
        groups.append(_group(members, bounds_q, bounds_k, longest_q, lengths_k[members[-1]]))
        start = stop
    return _Plan(groups, singles, empty)


def _group(
    members: list[int], bounds_q: tuple[int, ...], bounds_k: tuple[int, ...], longest_q: int, longest_k: int
) -> _Group:
    def padded(bounds: tuple[int, ...], longest: int) -> tuple[Tensor, Tensor]:
        first = torch.tensor([bounds[i] for i in members])[:, None]
        length = torch.tensor([bounds[i + 1] - bounds[i] for i in members])[:, None]
        offset = torch.arange(longest)[None, :]
        real = offset < length
        return first + offset.where(real, torch.zeros_like(offset)), real

    queries, real_queries = padded(bounds_q, longest_q)
    keys, real_keys = padded(bounds_k, longest_k)
    slots = real_queries.flatten().nonzero().flatten()
    return _Group(
        queries.flatten(),
        slots,
        queries.flatten()[slots],
        keys.flatten(),
        None if bool(real_keys.all()) else ~real_keys,
        len(members),
    )


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: tuple[int, ...],
    bounds_k: tuple[int, ...],
    scale: float,
    dropout_p: float = 0.0,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention of packed sequences; differentiable.

    Args:
        q: `[Tq, H, D]`; k, v: `[Tk, H, D]`; any strides.
        bounds_q, bounds_k: S + 1 offsets of the S sequences in q and in k.
        key_mask: `[Tk]`, False for keys that nobody attends to.

    Returns:
        `[Tq, H, D]`; zeros for a sequence without keys.
    """
    if key_mask is not None:
        q, k, v, bounds_k = _without_masked_keys(q, k, v, bounds_k, key_mask)
    plan = _plan(bounds_q, bounds_k)
    fast = not dropout_p and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
    pieces: list[tuple[Tensor | slice, Tensor]] = [(s, torch.zeros_like(q[s])) for s in plan.empty]
    for queries, keys in plan.singles:
        one = (q[queries][None], k[keys][None], v[keys][None])
        pieces.append((queries, (dense_attention(*one, scale) if fast else _padded(*one, scale, None, dropout_p))[0]))
    for group in plan.groups:
        shape = (group.sequences, -1, *q.shape[1:])
        padded = [t.index_select(0, i).view(shape) for t, i in ((q, group.queries), (k, group.keys), (v, group.keys))]
        attended = _padded(padded[0], padded[1], padded[2], scale, group.key_padding, dropout_p)
        pieces.append((group.query_tokens, attended.flatten(0, 1).index_select(0, group.query_slots)))
    return _assemble(pieces, q)


def _padded(q: Tensor, k: Tensor, v: Tensor, scale: float, key_padding: Tensor | None, dropout_p: float) -> Tensor:
    """Explicit attention of a padded batch `[n, L, H, D]`: quicker than the fused kernel when sequences are short."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q * scale) @ k.transpose(-1, -2)
    if key_padding is not None:
        scores = scores.masked_fill(key_padding[:, None, None, :], -torch.inf)
    weights = scores.softmax(-1)
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return (weights @ v).transpose(1, 2)


def _assemble(pieces: list[tuple[Tensor | slice, Tensor]], q: Tensor) -> Tensor:
    if len(pieces) == 1 and isinstance(pieces[0][0], slice):
        return pieces[0][1]
    positions = [torch.arange(p.start, p.stop) if isinstance(p, slice) else p for p, _ in pieces]
    if not positions:
        return torch.zeros_like(q)
    # index_copy into a fresh tensor keeps the graph when there is one.
    return torch.zeros(q.shape, dtype=q.dtype).index_copy(0, torch.cat(positions), torch.cat([a for _, a in pieces]))


def _without_masked_keys(
    q: Tensor, k: Tensor, v: Tensor, bounds_k: tuple[int, ...], key_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """A key that nobody attends to is a key that is not there."""
    kept = key_mask.nonzero().flatten()
    before = F.pad(key_mask.long().cumsum(0), (1, 0))
    bounds = tuple(before[torch.tensor(bounds_k)].tolist())
    return q, k.index_select(0, kept), v.index_select(0, kept), bounds
