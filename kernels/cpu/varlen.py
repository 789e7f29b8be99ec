"""Attention of packed sequences on CPU, forward and backward: groups of similar length as padded batches."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import host
from .attention import choice, plain_attention
from .dropout import Dropout
from .ragged import plan_of, without_masked_keys
from .tiles import tiled_attention, tiled_attention_backward


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
    # Explicit products gain from several texts in one, the fused kernel does not.
    plan = plan_of(bounds_q, bounds_k, dropout is not None or choice(1, 1, q.dtype) == "tiled")
    if len(plan.groups) == 1 and plan.whole and dropout is None:
        group = plan.groups[0]
        padded = (group.queries.padded(q), group.keys.padded(k), group.keys.padded(v))
        return plain_attention(*padded, scale, group.mask).view(q.shape)
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
    plan = plan_of(bounds_q, bounds_k, True)
    made = (plan.empty, plan.unread, plan.unread)
    whole = [(torch.zeros if z else torch.empty)(t.shape, dtype=t.dtype) for t, z in zip((q, k, v), made, strict=True)]
    for group in plan.groups:
        upstream = group.queries.padded(dout, repeated=False)
        padded = (upstream, group.queries.padded(q), group.keys.padded(k), group.keys.padded(v))
        into = (group.queries.place(whole[0]), group.keys.place(whole[1]), group.keys.place(whole[2]))
        tiled_attention_backward(*padded, scale, group.mask, dropout, into=into)
        for side, gradient, part in zip((group.queries, group.keys, group.keys), into, whole, strict=True):
            side.unpad(gradient, part)
    return whole[0], whole[1], whole[2]
