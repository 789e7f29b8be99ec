"""Every operation in a few lines of plain PyTorch: its definition, and the oracle of every faster path.

These functions are differentiable, run on any device and dtype, and are written for readers, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import host

HIDDEN = -1e30
"""A bias of this or less hides a key: -inf, and the lowest numbers of fp32 and bf16, which masks often hold."""


def _dropout(
    probability: float, seed: Tensor | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Make a dropout by PyTorch's generator, or by a new one with this seed."""
    if seed is None:
        return lambda x: F.dropout(x, probability)
    generator = torch.Generator(device).manual_seed(host.integer(seed))
    return lambda x: (
        x * torch.empty_like(x).bernoulli_(1 - probability, generator=generator) / (1 - probability)
    )


@cache
def int8_strides(width: int) -> tuple[int, ...]:
    """Return the distances of the channels that `rotate` combines, for rows of a width."""
    return tuple(stride for stride in (16, 32, 64, 128) if width % (2 * stride) == 0)


def rotate(rows: Tensor) -> Tensor:
    """Return rows `[..., K]` times a Hadamard matrix H with blocks of up to 16 channels: n of them if H H = n.

    Each channel becomes a sum and difference of n, so that an outlier no longer determines the step of its row alone.
    """
    for stride in int8_strides(rows.shape[-1]):
        first, second = rows.unflatten(-1, (-1, 2, stride)).unbind(-2)
        rows = torch.stack([first + second, first - second], -2).flatten(-3)
    return rows


def int8_steps(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the quantisation step per row, from its largest magnitude `largest` in fp32, in `dtype`."""
    step = largest.clamp_min(1e-30) / 127
    # Rounded down, it would leave the largest value without a level.
    return step if dtype == step.dtype else (step * (1 + torch.finfo(dtype).eps / 2)).to(dtype)


def as_int8(rows: Tensor) -> Tensor:
    """Round rows `[..., K]`, rotated, to one of 255 levels of each row, the operand of an int8 GEMM, and rotate back.

    The rows of a weight `[M, K]` are its output channels, the rows of activations its tokens.
    """
    wide = rotate(rows.to(torch.promote_types(rows.dtype, torch.float32)))
    step = int8_steps(wide.abs().amax(-1, keepdim=True), rows.dtype).to(wide.dtype)
    # Not divided, and exact: a value halfway between two levels has to round as in the GEMM.
    rounded = (wide.double() * (1 / step).double()).round().to(wide.dtype) * step
    return rotate(rounded) / 2 ** len(int8_strides(rows.shape[-1]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


LARGEST_FP8 = 448.0
"""The largest number of e4m3."""
# A row of less is rounded as if this were its largest entry, so that the inverse of its scale stays finite.
_LEAST_ENTRY = 2.0**-100


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows `[..., K]` to fp8 (e4m3); return them and the scales `[..., 1]` fp32 to multiply them by."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(_LEAST_ENTRY)
    return (wide * (LARGEST_FP8 / largest)).to(torch.float8_e4m3fn), largest / LARGEST_FP8


def rounded_rows(x: Tensor) -> Tensor:
    """Return the values of `quantise_rows` in fp32."""
    rows, scales = quantise_rows(x)
    return rows.float() * scales


def product_of_rounded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b` of rows from `rounded_rows`, in fp32."""
    return F.linear(x, weight, None if bias is None else bias.float())


def linear_fp8(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b` with x and W rounded to fp8 row by row."""
    return product_of_rounded(rounded_rows(x), rounded_rows(weight), bias).to(x.dtype)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    dropout_p: float = 0.0,
) -> Tensor:
    return branch_end(F.linear(x, weight, bias), residual, gamma, row_scale, dropout_p)


def branch_end(
    out: Tensor,
    residual: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return `residual + row_scale · gamma · dropout(out)`."""
    if dropout_p:
        out = F.dropout(out, dropout_p)
    if gamma is not None:
        out = gamma * out
    if row_scale is not None:
        out = row_scale.view(-1, *[1] * (out.ndim - 1)) * out
    return residual + out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def relative_position_index(window: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return the table row of every (query, key) of a window with a class token: `[N, N]`, N = 1 + wh·ww.

    Patches are row-major; the entry is `(dy + wh - 1)·(2·ww - 1) + (dx + ww - 1)` with (dy, dx) = query - key. The last
    three rows of the table are class→patch, patch→class and class→class (BEiT, arXiv 2106.08254).
    """
    height, width = window
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    dy = rows[:, None] - rows[None, :] + height - 1
    dx = columns[:, None] - columns[None, :] + width - 1
    distances = (2 * height - 1) * (2 * width - 1)
    index = torch.empty(height * width + 1, height * width + 1, dtype=torch.long, device=device)
    index[1:, 1:] = dy * (2 * width - 1) + dx
    index[0, :] = distances
    index[:, 0] = distances + 1
    index[0, 0] = distances + 2
    return index


def position_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Return the bias of a table: `[(2wh-1)(2ww-1)+3, H]` → `[H, N, N]`."""
    index = relative_position_index(window, table.device)
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1)


def relpos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    window: tuple[int, int],
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q * scale) @ k.transpose(-1, -2) + position_bias(table, window)
    weights = _weights(scores, None if key_mask is None else key_mask[:, None, None, :])
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse). Batch entry b takes entry b mod G of the bias `[G, H, Nq, Nk]`."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    repeated = bias.repeat(q.shape[0] // max(1, bias.shape[0]), 1, 1, 1)
    scores = (q * scale) @ k.transpose(-1, -2) + repeated
    # A NaN does not hide a key.
    seen = ~(repeated <= HIDDEN)
    seen = seen if key_mask is None else seen & key_mask[:, None, None, :]
    weights = _dropout(dropout_p, seed, q.device)(_weights(scores, seen))
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    lse = wide.masked_fill(~seen, -torch.inf).logsumexp(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2), lse


def _weights(scores: Tensor, key_mask: Tensor | None) -> Tensor:
    """Compute the softmax over the keys that the mask leaves; zeros, with zero gradients, for a query without any."""
    if key_mask is None:
        return scores.softmax(-1)
    # -inf here would make an all-hidden row and its gradient NaN.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~key_mask, lowest).softmax(-1).masked_fill(~key_mask, 0)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    key_mask: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    drop = _dropout(dropout_p, seed, q.device)
    bounds_q, bounds_k = host.integers(cu_seqlens_q), host.integers(cu_seqlens_k)
    outputs = []
    for i in range(len(bounds_q) - 1):
        queries = q[bounds_q[i] : bounds_q[i + 1]].transpose(0, 1)
        keys, values = (t[bounds_k[i] : bounds_k[i + 1]].transpose(0, 1) for t in (k, v))
        scores = queries @ keys.transpose(-1, -2) * scale
        weights = _weights(
            scores, None if key_mask is None else key_mask[bounds_k[i] : bounds_k[i + 1]]
        )
        outputs.append((drop(weights) @ values).transpose(0, 1))
    return torch.cat(outputs) if outputs else q.new_zeros(q.shape)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (normed, summed): `summed = residual + row_scale · gamma · dropout(x)`, and its LayerNorm.

    `normed` has the dtype of x, for the next GEMM, or with `wide` that of the sum, for the next residual.
    """
    branch = _dropout(dropout_p, seed, x.device)(x)
    if gamma is not None:
        branch = branch * gamma
    if row_scale is not None:
        branch = branch * row_scale.view(-1, *[1] * (x.ndim - 1))
    # Parameters may be wider than what they scale; the sum is as wide as its two terms.
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    summed = branch.to(dtype) if residual is None else residual + branch.to(dtype)
    weight, bias = weight.to(summed.dtype), None if bias is None else bias.to(summed.dtype)
    normed = F.layer_norm(summed, (x.shape[-1],), weight, bias, eps)
    return normed.to(dtype if wide else x.dtype), summed


def embed_layer_norm(
    tokens: Tensor,
    positions: Tensor,
    word: Tensor,
    position: Tensor,
    type_row: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    padding_idx: int | None = None,
) -> Tensor:
    """Return the LayerNorm of word + position + type embeddings; rows `padding_idx` receive no gradient."""
    embedded = (
        F.embedding(tokens, word, padding_idx)
        + type_row
        + F.embedding(positions, position, padding_idx)
    )
    return F.layer_norm(embedded, (word.shape[1],), weight, bias, eps)


def linear_cross_entropy(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the mean cross-entropy of the logits `h w^T + b` over the rows that are not ignored; 0 if all are.

    The logits have the dtype of the GEMM, the loss at least fp32.
    """
    logits = F.linear(h, w, b).reshape(-1, w.shape[0])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    summed = F.cross_entropy(
        logits,
        target.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return summed / (target != ignore_index).sum().clamp_min(1)


def token_log_likelihood(
    h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, ignore_index: int = -100
) -> Tensor:
    """Return `log softmax(h w^T + b)[target]`, row by row; 0 where the target is `ignore_index`."""
    logits = F.linear(h, w, b).reshape(-1, w.shape[0])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(
        logits, target.flatten(), ignore_index=ignore_index, reduction="none"
    ).view(target.shape)


def hard_negative_weights(similarity: Tensor, mask: Tensor) -> Tensor:
    """Return unnormalised probabilities `[B, C]`: softmax + 1e-5, so that any column can be drawn; 0 if masked."""
    wide = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    return (wide.softmax(1) + 1e-5).masked_fill(mask, 0)
