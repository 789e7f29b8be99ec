"""Attention of packed sequences on CPU, forward and backward: groups of similar length as padded batches."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host
from .attention import (
    SHORT_TERMS,
    choice,
    compiled_backward,
    compiles_backward,
    plain_attention,
    short_seconds,
    tiled_attention,
    tiled_attention_backward,
)
from .workspace import Dropout

# Overhead of a group, in scores of one head: another group has to save more.
_GROUP_SCORES = 8 * 64 * 64
# Padding may add this share to the scores.
_PADDING = 0.25


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
    """Return attention `[Tq, H, D]` of packed sequences with S + 1 offsets each; zeros for a sequence without keys.

    k, v `[Tk, H, D]`; strides are arbitrary; `key_mask` `[Tk]` is False for hidden keys.
    """
    if key_mask is not None:
        k, v, bounds_k = without_masked_keys(k, v, bounds_k, key_mask)
    if dropout is None and reads_in_place(q, _longest(bounds_k)):
        from .llvm.attention import attention

        return attention(q[None], k[None], v[None], scale, bounds=(bounds_q, bounds_k))[0]
    if len(bounds_q) == 2 and bounds_q[1] and bounds_k[1] and dropout is None:
        # One caption: a plan would take as long as its attention.
        return plain_attention(q[None], k[None], v[None], scale)[0]
    plan = plan_of(bounds_q, bounds_k)
    if len(plan.groups) == 1 and not plan.empty and dropout is None:
        # The group has all queries, in their order.
        group = plan.groups[0]
        padded = (group.queries.padded(q), group.keys.padded(k), group.keys.padded(v))
        attended = plain_attention(*padded, scale, group.mask).flatten(0, 1)
        slots = group.queries.slots
        return attended if slots is None else attended.index_select(0, slots)
    out = torch.zeros(q.shape, dtype=q.dtype) if plan.empty else torch.empty(q.shape, dtype=q.dtype)
    for group in plan.groups:
        padded = (group.queries.padded(q), group.keys.padded(k), group.keys.padded(v))
        if dropout is None:
            attended = plain_attention(*padded, scale, group.mask)
        else:
            attended = tiled_attention(*padded, scale, group.mask, dropout)
        group.queries.unpad(attended, out)
    return out


def reads_in_place(q: Tensor, keys: int) -> bool:
    """Return whether the compiled kernel, which reads sequences in place, runs q `[..., D]` on up to `keys` keys."""
    if choice(1, 1, q) != "llvm":
        return False
    # Imported where it runs, because its compiler takes long to load.
    from .llvm.attention import takes

    return takes(q, keys)


def compiled_delay(q: Tensor, sequences: int, keys: int) -> float:
    """Return the seconds that `reads_in_place` would lose on sequences of q `[..., H, D]`, by the race; or infinity."""
    if reads_in_place(q, keys):
        return 0.0
    seconds = short_seconds(q)
    if "llvm" not in seconds:
        return math.inf
    from .llvm.attention import takes

    if not takes(q, keys):
        return math.inf
    delay = seconds["llvm"] - min(seconds.values())
    return delay * sequences * keys**2 * math.prod(q.shape[-2:]) / SHORT_TERMS


def varlen_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: tuple[int, ...],
    bounds_k: tuple[int, ...],
    scale: float,
    dropout: Dropout | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients dq, dk, dv of `varlen_attention`; `dropout` replays the masks of the forward pass."""
    if key_mask is not None:
        dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (k, v))
        visible = host.true_places(key_mask)
        k, v, bounds_k = without_masked_keys(k, v, bounds_k, key_mask)
        dq, visible_dk, visible_dv = varlen_attention_backward(
            dout, q, k, v, bounds_q, bounds_k, scale, dropout
        )
        return dq, dk.index_copy_(0, visible, visible_dk), dv.index_copy_(0, visible, visible_dv)
    if dropout is None and compiles_backward(q, _longest(bounds_k), _longest(bounds_q)):
        # It reads sequences in place.
        dq, dk, dv, _ = compiled_backward(
            dout[None], q[None], k[None], v[None], scale, bounds=(bounds_q, bounds_k)
        )
        return dq[0], dk[0], dv[0]
    plan = plan_of(bounds_q, bounds_k)
    make_dq = torch.zeros if plan.empty else torch.empty
    make_dk = torch.zeros if plan.unread else torch.empty
    dq, dk, dv = make_dq(q.shape, dtype=q.dtype), *(make_dk(t.shape, dtype=t.dtype) for t in (k, v))
    for group in plan.groups:
        queries, keys = group.queries, group.keys
        into = (queries.memory(dq), keys.memory(dk), keys.memory(dv))
        tiled_attention_backward(
            queries.padded(dout, repeated=False),
            queries.padded(q),
            keys.padded(k),
            keys.padded(v),
            scale,
            group.mask,
            dropout,
            into=into,
        )
        queries.unpad(into[0], dq)
        keys.unpad(into[1], dk)
        keys.unpad(into[2], dv)
    return dq, dk, dv


def _longest(bounds: tuple[int, ...]) -> int:
    return max((end - start for start, end in pairwise(bounds)), default=0)


def without_masked_keys(
    k: Tensor, v: Tensor, bounds_k: tuple[int, ...], key_mask: Tensor
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return keys, values and offsets without the hidden keys."""
    visible = host.true_places(key_mask)
    counts = F.pad(key_mask.long().cumsum(0), (1, 0))
    bounds = tuple(host.integers(counts[torch.tensor(bounds_k)]))
    return k.index_select(0, visible), v.index_select(0, visible), bounds


class Side(NamedTuple):
    """Where the tokens of a group are on one side, queries or keys."""

    sequences: int
    longest: int
    rows: slice | Tensor
    """Packed rows of the padded slots, `[n · longest]`, a slot without a token repeating a real one; or a slice, where
    the sequences are of one length and lie one after the other."""
    slots: Tensor | None
    """Padded slots that hold a token; None where all do."""

    def padded(self, packed: Tensor, *, repeated: bool = True) -> Tensor:
        """Pad `[T, H, D]` to `[n, longest, H, D]`, a view where possible. Empty slots repeat a token, or are 0."""
        if isinstance(self.rows, slice):
            return packed[self.rows].unflatten(0, (self.sequences, self.longest))
        padded = packed.index_select(0, self.rows)
        if not repeated and self.slots is not None:
            is_token = torch.zeros(len(padded), 1, 1, dtype=padded.dtype)
            padded *= is_token.index_fill_(0, self.slots, 1)
        return padded.view(self.sequences, self.longest, *packed.shape[1:])

    def memory(self, packed: Tensor) -> Tensor:
        """Return memory for a padded result: a view of `[T, H, D]` where possible, which `unpad` completes."""
        if isinstance(self.rows, slice):
            return packed[self.rows].unflatten(0, (self.sequences, self.longest))
        return packed.new_empty(self.sequences, self.longest, *packed.shape[1:])

    def unpad(self, padded: Tensor, packed: Tensor) -> None:
        """Write the tokens of `[n, longest, H, D]` to their rows of `[T, H, D]`, unless they are there."""
        if isinstance(self.rows, slice):
            rows = packed[self.rows]
            if rows.data_ptr() != padded.data_ptr():
                rows.view(padded.shape).copy_(padded)
        elif self.slots is None:
            packed.index_copy_(0, self.rows, padded.flatten(0, 1))
        else:
            tokens = padded.flatten(0, 1).index_select(0, self.slots)
            packed.index_copy_(0, self.rows[self.slots], tokens)


class Group(NamedTuple):
    """Sequences that run together but never read each other: a weight of 0 would let a NaN through."""

    queries: Side
    keys: Side
    mask: Tensor | None
    """`[n, 1, 1, longest keys]` fp32: 0, or -inf for a slot without a key."""


class Plan(NamedTuple):
    """Every sequence with queries and keys is in exactly one group."""

    groups: list[Group]
    empty: bool
    """Some sequence has queries but no keys."""
    unread: bool
    """Some sequence has keys but no queries."""


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a plan made by inference serves training too
def plan_of(bounds_q: tuple[int, ...], bounds_k: tuple[int, ...]) -> Plan:
    """Group sequences of similar length, given S + 1 offsets: pad until that costs more scores than another group."""
    lengths_q, lengths_k = (
        [end - start for start, end in pairwise(bounds)] for bounds in (bounds_q, bounds_k)
    )
    lengths = [*zip(lengths_q, lengths_k, strict=True)]
    # Lengths of keys ascend, so that the last member of a group has the most keys.
    attending = [index for index, (n, m) in enumerate(lengths) if n and m]
    order = sorted(attending, key=lambda index: lengths[index][::-1])
    groups: list[Group] = []
    start = 0
    while start < len(order):
        stop, longest_q, work = start, 0, 0
        while stop < len(order):
            n, m = lengths[order[stop]]
            longest, scores = max(longest_q, n), work + n * m
            padding = (stop + 1 - start) * longest * m - scores
            if padding > max(_PADDING * scores, _GROUP_SCORES):
                break
            longest_q, work, stop = longest, scores, stop + 1
        # In packed order, so that neighbours of one length are one slice.
        members = sorted(order[start:stop])
        queries, keys = _side(members, bounds_q), _side(members, bounds_k)
        mask = None
        if keys.slots is not None:
            mask = torch.full((keys.sequences, 1, 1, keys.longest), -torch.inf)
            mask.view(-1)[keys.slots] = 0
        groups.append(Group(queries, keys, mask))
        start = stop
    empty = any(n and not m for n, m in lengths)
    unread = any(m and not n for n, m in lengths)
    return Plan(groups, empty, unread)


def _side(members: list[int], bounds: tuple[int, ...]) -> Side:
    starts, ends = [bounds[i] for i in members], [bounds[i + 1] for i in members]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    longest = max(sizes)
    uniform, count = min(sizes) == longest, len(members)
    if uniform and starts[1:] == ends[:-1]:
        return Side(count, longest, rows=slice(starts[0], ends[-1]), slots=None)
    rows: list[int] = []
    slots: list[int] = []
    for start, end in zip(starts, ends, strict=True):
        slots += range(len(rows), len(rows) + end - start)
        rows += [*range(start, end), *[start] * (longest - end + start)]
    # One tensor at the end: a plan is made for every batch of new lengths, and a tensor per sequence would be slow.
    slot_tensor = None if uniform else torch.tensor(slots)
    return Side(count, longest, rows=torch.tensor(rows), slots=slot_tensor)
