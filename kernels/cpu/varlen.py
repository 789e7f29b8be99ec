"""Attention of packed sequences on CPU, forward and backward: groups of similar length as padded batches."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host
from .attention import (
    choice,
    compiled_backward,
    compiles_backward,
    plain_attention,
    tiled_attention,
    tiled_attention_backward,
)
from .workspace import Dropout

# What a group costs before its first score, in scores of one head: a group of its own has to save more.
_GROUP_SCORES = 8 * 64 * 64
# Padding may add this share of the scores that are there.
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
    """Attention `[Tq, H, D]` of packed sequences with S + 1 offsets each; zeros for a sequence without keys.

    k, v `[Tk, H, D]`; strides are arbitrary; `key_mask` `[Tk]` is False for hidden keys.
    """
    if key_mask is not None:
        k, v, bounds_k = without_masked_keys(k, v, bounds_k, key_mask)
    if dropout is None and choice(1, 1, q) == "llvm":
        # It reads every sequence where it lies. Imported where it runs, because its compiler takes long to load.
        from .llvm.attention import attention, takes

        if takes(q, max((b - a for a, b in pairwise(bounds_k)), default=0)):
            return attention(q[None], k[None], v[None], scale, bounds=(bounds_q, bounds_k))[0]
    if len(bounds_q) == 2 and bounds_q[1] and bounds_k[1] and dropout is None:
        # One caption: a plan would take as long as its attention.
        return plain_attention(q[None], k[None], v[None], scale)[0]
    plan = plan_of(bounds_q, bounds_k)
    if plan.whole and dropout is None:
        group = plan.groups[0]
        padded = (group.queries.padded(q), group.keys.padded(k), group.keys.padded(v))
        attended = plain_attention(*padded, scale, group.mask).flatten(0, 1)
        return (
            attended
            if group.queries.slots is None
            else attended.index_select(0, group.queries.slots)
        )
    out = torch.zeros(q.shape, dtype=q.dtype) if plan.empty else torch.empty(q.shape, dtype=q.dtype)
    for group in plan.groups:
        padded = (group.queries.padded(q), group.keys.padded(k), group.keys.padded(v))
        if dropout is None:
            attended = plain_attention(*padded, scale, group.mask)
        else:
            attended = tiled_attention(*padded, scale, group.mask, dropout)
        group.queries.unpad(attended, out)
    return out


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
    """Gradients dq, dk, dv of `varlen_attention`; `dropout` replays the masks of the forward pass."""
    if key_mask is not None:
        dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (k, v))
        visible = host.true_places(key_mask)
        k, v, bounds_k = without_masked_keys(k, v, bounds_k, key_mask)
        part = varlen_attention_backward(dout, q, k, v, bounds_q, bounds_k, scale, dropout)
        return part[0], dk.index_copy_(0, visible, part[1]), dv.index_copy_(0, visible, part[2])
    longest_q, longest_k = (
        max((b - a for a, b in pairwise(bounds)), default=0) for bounds in (bounds_q, bounds_k)
    )
    if dropout is None and compiles_backward(q, longest_k, longest_q):
        # It reads every sequence where it lies.
        given = (dout[None], q[None], k[None], v[None], scale)
        dq, dk, dv, _ = compiled_backward(*given, bounds=(bounds_q, bounds_k))
        return dq[0], dk[0], dv[0]
    plan = plan_of(bounds_q, bounds_k)
    made = (plan.empty, plan.unread, plan.unread)
    whole = [
        (torch.zeros if z else torch.empty)(t.shape, dtype=t.dtype)
        for t, z in zip((q, k, v), made, strict=True)
    ]
    for group in plan.groups:
        upstream = group.queries.padded(dout, repeated=False)
        padded = (upstream, group.queries.padded(q), group.keys.padded(k), group.keys.padded(v))
        into = (
            group.queries.place(whole[0]),
            group.keys.place(whole[1]),
            group.keys.place(whole[2]),
        )
        tiled_attention_backward(*padded, scale, group.mask, dropout, into=into)
        for side, gradient, part in zip(
            (group.queries, group.keys, group.keys), into, whole, strict=True
        ):
            side.unpad(gradient, part)
    return whole[0], whole[1], whole[2]


def without_masked_keys(
    k: Tensor, v: Tensor, bounds_k: tuple[int, ...], key_mask: Tensor
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Keys, values and offsets without the hidden keys: one that no query sees need not be there."""
    kept = host.true_places(key_mask)
    before = F.pad(key_mask.long().cumsum(0), (1, 0))
    bounds = tuple(host.integers(before[torch.tensor(bounds_k)]))
    return k.index_select(0, kept), v.index_select(0, kept), bounds


class Side(NamedTuple):
    """The places of a group's tokens on one side, queries or keys."""

    sequences: int
    longest: int
    rows: slice | Tensor
    """Packed rows of the padded slots, `[n · longest]`, a slot without a token repeating a real one; or a slice, where
    the sequences are of one length and lie one after the other."""
    slots: Tensor | None
    """Padded slots that hold a token; None where all do."""

    def padded(self, packed: Tensor, *, repeated: bool = True) -> Tensor:
        """`[T, H, D]` → `[n, longest, H, D]`, a view where possible. Empty slots repeat a token, or are 0."""
        if isinstance(self.rows, slice):
            return packed[self.rows].unflatten(0, (self.sequences, self.longest))
        found = packed.index_select(0, self.rows)
        if not repeated and self.slots is not None:
            found *= (
                torch.zeros(len(found), dtype=found.dtype)
                .index_fill_(0, self.slots, 1)
                .view(-1, 1, 1)
            )
        return found.view(self.sequences, self.longest, *packed.shape[1:])

    def place(self, packed: Tensor) -> Tensor:
        """`[n, longest, H, D]` to write results to: a view of `[T, H, D]` where possible, which `unpad` completes."""
        if isinstance(self.rows, slice):
            return packed[self.rows].unflatten(0, (self.sequences, self.longest))
        return packed.new_empty(self.sequences, self.longest, *packed.shape[1:])

    def unpad(self, padded: Tensor, packed: Tensor) -> None:
        """Write the tokens of `[n, longest, H, D]`, unless they are in their `place`, to their rows of `[T, H, D]`."""
        if isinstance(self.rows, slice):
            rows = packed[self.rows]
            if rows.data_ptr() != padded.data_ptr():
                rows.view(padded.shape).copy_(padded)
        elif self.slots is None:
            packed.index_copy_(0, self.rows, padded.flatten(0, 1))
        else:
            packed.index_copy_(
                0, self.rows[self.slots], padded.flatten(0, 1).index_select(0, self.slots)
            )


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

    @property
    def whole(self) -> bool:
        """True if there is one group, which has all queries, in their order."""
        return not self.empty and len(self.groups) == 1


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a plan made by inference serves training too
def plan_of(bounds_q: tuple[int, ...], bounds_k: tuple[int, ...]) -> Plan:
    """Groups of similar length from S + 1 offsets: padded until that costs more scores than another group."""
    lengths = [
        (bounds_q[i + 1] - bounds_q[i], bounds_k[i + 1] - bounds_k[i])
        for i in range(len(bounds_q) - 1)
    ]
    # Lengths of keys ascend, so that the last member of a group has the most keys.
    order = sorted(
        (i for i, sizes in enumerate(lengths) if all(sizes)), key=lambda i: lengths[i][::-1]
    )
    groups: list[Group] = []
    start = 0
    while start < len(order):
        stop, longest_q, work = start, 0, 0
        while stop < len(order):
            n, m = lengths[order[stop]]
            longest, real = max(longest_q, n), work + n * m
            excess = (stop + 1 - start) * longest * m - real
            if excess > max(_PADDING * real, _GROUP_SCORES):
                break
            longest_q, work, stop = longest, real, stop + 1
        # In packed order, so that neighbours of one length are one slice.
        members = sorted(order[start:stop])
        queries, keys = _side(members, bounds_q), _side(members, bounds_k)
        mask = None
        if keys.slots is not None:
            mask = torch.full((keys.sequences, 1, 1, keys.longest), -torch.inf)
            mask.view(-1)[keys.slots] = 0
        groups.append(Group(queries, keys, mask))
        start = stop
    return Plan(groups, any(n and not m for n, m in lengths), any(m and not n for n, m in lengths))


def _side(members: list[int], bounds: tuple[int, ...]) -> Side:
    starts, ends = [bounds[i] for i in members], [bounds[i + 1] for i in members]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    longest = max(sizes)
    uniform = min(sizes) == longest
    if uniform and starts[1:] == ends[:-1]:
        return Side(len(members), longest, slice(starts[0], ends[-1]), None)
    rows: list[int] = []
    slots: list[int] = []
    for start, end in zip(starts, ends, strict=True):
        slots += range(len(rows), len(rows) + end - start)
        rows += [*range(start, end), *[start] * (longest - end + start)]
    # One tensor at the end: a plan is made for every batch of new lengths, and a tensor for each sequence shows there.
    return Side(len(members), longest, torch.tensor(rows), None if uniform else torch.tensor(slots))
