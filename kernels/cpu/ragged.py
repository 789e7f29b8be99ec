"""How sequences of unequal lengths run on a CPU: short ones together in padded groups, long ones each on their own."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many scores per head, many short sequences are one padded batch; beyond, each sequence is its own product.
_SHORT_SCORES = 64 * 64


class Group(NamedTuple):
    """Sequences that run together: where their tokens lie, and which padded slots hold one."""

    queries: Tensor  # [n * longest_q] positions in the packed tensor; padded slots repeat a real one
    query_slots: Tensor  # [tokens] padded slots that hold a query, in packed order
    query_tokens: Tensor  # [tokens] their positions in the packed tensor
    keys: Tensor  # [n * longest_k]
    key_slots: Tensor  # [tokens] padded slots that hold a key
    key_tokens: Tensor  # [tokens] their positions in the packed tensor
    key_padding: Tensor | None  # [n, longest_k], True where there is no key
    sequences: int


class Plan(NamedTuple):
    """Every sequence with queries is in exactly one of the three."""

    groups: list[Group]
    singles: list[tuple[slice, slice]]
    empty: list[slice]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a plan made by inference serves training too
def plan_of(bounds_q: tuple[int, ...], bounds_k: tuple[int, ...]) -> Plan:
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
    groups: list[Group] = []
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
    return Plan(groups, singles, empty)


def _group(
    members: list[int], bounds_q: tuple[int, ...], bounds_k: tuple[int, ...], longest_q: int, longest_k: int
) -> Group:
    def padded(bounds: tuple[int, ...], longest: int) -> tuple[Tensor, Tensor]:
        first = torch.tensor([bounds[i] for i in members])[:, None]
        length = torch.tensor([bounds[i + 1] - bounds[i] for i in members])[:, None]
        offset = torch.arange(longest)[None, :]
        real = offset < length
        return first + offset.where(real, torch.zeros_like(offset)), real

    queries, real_queries = padded(bounds_q, longest_q)
    keys, real_keys = padded(bounds_k, longest_k)
    query_slots, key_slots = (real.flatten().nonzero().flatten() for real in (real_queries, real_keys))
    return Group(
        queries.flatten(),
        query_slots,
        queries.flatten()[query_slots],
        keys.flatten(),
        key_slots,
        keys.flatten()[key_slots],
        None if bool(real_keys.all()) else ~real_keys,
        len(members),
    )


def without_masked_keys(
    k: Tensor, v: Tensor, bounds_k: tuple[int, ...], key_mask: Tensor
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """A key that nobody attends to is a key that is not there."""
    kept = key_mask.nonzero().flatten()
    before = F.pad(key_mask.long().cumsum(0), (1, 0))
    bounds = tuple(before[torch.tensor(bounds_k)].tolist())
    return k.index_select(0, kept), v.index_select(0, kept), bounds
