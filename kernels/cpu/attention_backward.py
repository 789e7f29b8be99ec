"""Gradients of attention on CPU: weights are recomputed tile by tile, so no score matrix outlives the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Dropout, attention_weights, padded_group, tile_shape
from .ragged import plan_of, without_masked_keys


def dense_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `dense_attention`.

    Args:
        dout: `[B, Nq, H, D]`; q, k, v, bias as in the forward pass.

    Returns:
        dq, dk, dv, and the gradient of the bias `[H, Nq, Nk]` in fp32 (fp64 for fp64), summed over the batch in order.
    """
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    dbias = None if bias is None else torch.zeros((heads, queries, keys), dtype=wide)
    # Five score-sized tiles are alive at a time; whole rows of a head keep dK and dV in one piece.
    group, _ = tile_shape(heads, queries, keys, 5 * q.element_size())
    for b in range(batch):
        for h in range(0, heads, group):
            hs = slice(h, min(h + group, heads))
            part = [t[b, :, hs].transpose(0, 1) for t in (dout, q, k, v)]
            grads, dscores = _gradients(
                part[0], part[1], part[2], part[3], scale, bias=None if bias is None else bias[hs]
            )
            for whole, piece in zip((dq, dk, dv), grads, strict=True):
                whole[b, :, hs] = piece.transpose(0, 1)
            if dbias is not None:
                dbias[hs] += dscores
    return dq, dk, dv, dbias


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
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
    if key_mask is not None:
        visible = key_mask.nonzero().flatten()
        k, v, bounds_k = without_masked_keys(k, v, bounds_k, key_mask)
        part = varlen_attention_backward(dout, q, k, v, bounds_q, bounds_k, scale, dropout)
        return part[0], dk.index_copy_(0, visible, part[1]), dv.index_copy_(0, visible, part[2])
    plan = plan_of(bounds_q, bounds_k)
    for queries, keys in plan.singles:
        one = [t.transpose(0, 1)[None] for t in (dout[queries], q[queries], k[keys], v[keys])]
        grads, _ = _gradients(one[0], one[1], one[2], one[3], scale, dropout=dropout)
        dq[queries], dk[keys], dv[keys] = (g[0].transpose(0, 1) for g in grads)
    for group in plan.groups:
        douts = dout.index_select(0, group.queries).view(group.sequences, -1, *dout.shape[1:])
        # A padded slot repeats a real query: its gradient must not count again.
        real = torch.zeros(group.queries.shape[0], dtype=dout.dtype).index_fill_(0, group.query_slots, 1)
        douts *= real.view(group.sequences, -1, 1, 1)
        padded = [t.transpose(1, 2) for t in (douts, *padded_group(q, k, v, group))]
        grads, _ = _gradients(
            padded[0], padded[1], padded[2], padded[3], scale, key_padding=group.key_padding, dropout=dropout
        )
        slots_tokens = ((group.query_slots, group.query_tokens), *[(group.key_slots, group.key_tokens)] * 2)
        for whole, grad, (slots, tokens) in zip((dq, dk, dv), grads, slots_tokens, strict=True):
            whole.index_copy_(0, tokens, grad.transpose(1, 2).flatten(0, 1).index_select(0, slots))
    return dq, dk, dv


def _gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    key_padding: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """dq, dk, dv and the gradient of the scores, for head-major `[..., H, N, D]` tensors."""
    weights = attention_weights(q, k, scale, bias, key_padding)
    dweights = dout @ v.transpose(-1, -2)
    if dropout is None:
        dv = weights.transpose(-1, -2) @ dout
    else:
        factors = dropout.factors(tuple(weights.shape), weights.dtype)
        dv = (weights * factors).transpose(-1, -2) @ dout
        dweights *= factors
    dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
    return ((dscores @ k).mul_(scale), (dscores.transpose(-1, -2) @ q).mul_(scale), dv), dscores
