"""Attention with an arbitrary additive bias: checks, registration, gradients.

The bias is an ordinary input, read in place and never cached, so that it may be a parameter, differ in every call, and
be part of a captured graph.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError

from . import checks, host, reference
from .backend import Backend, named, resolve
from .cpu.attention import Hiding, attention_backward, biased_attention, tiled_attention
from .cpu.workspace import Dropout
from .library import autocast_dtype, operator
from .limits import BIAS_HEAD_DIMS, HIDDEN

_OPTIONS = "Tensor? key_mask, float dropout_p, Tensor? seed, float scale, bool return_lse, str backend"


@overload
def bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    seed: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor: ...


@overload
def bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    seed: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...


def bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ + bias) v, with deterministic gradients of all four inputs.

    A bias that the batch shares is read once from memory and its gradient summed over it in order. Under autocast
    q, k and v are converted; the bias keeps its dtype, and so does its gradient.

    Args:
        q: `[B, Nq, H, D]`; k, v: `[B, Nk, H, D]`; any strides.
        bias: `[G, H, Nq, Nk]`: 1 for the whole batch, B for an entry each, or a divisor G of B: entry b mod G is for
            batch entry b, as windows of an image share masks. H, Nq and Nk may be 1 for a broadcast. A bias of -1e30
            or less (`limits.HIDDEN`) hides a key from a query. float64 where q is, else any floating-point dtype.
        key_mask: `[B, Nk]` boolean, False for keys that a batch entry does not attend to.
        dropout_p: probability of dropping an attention weight.
        scale: of the scores; 1/sqrt(D) by default.
        return_lse: return the logsumexp of the scores too; gradients flow through it.
        seed: one int64 on the device of q, the seed of the dropout; drawn from PyTorch's generator by default.

    Returns:
        `[B, Nq, H, D]`; zeros for queries whose keys are all hidden, with zero gradients. With `return_lse`, also
        `[B, H, Nq]`, at least fp32, -inf for these queries.

    Raises:
        ValueError: inconsistent shapes, dtypes or devices, or a backend that cannot run here.
    """
    if (dtype := autocast_dtype(q.device)) is not None:
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    checks.bias_arguments(q, k, v, bias, key_mask, dropout_p, seed)
    scale = checks.scale_of(q, scale)
    chosen = resolve(backend, q, k, v, bias, key_mask, seed, has_flash=True)
    if chosen == "flash_attn":
        raise InputError("backend 'flash_attn' has no bias; use 'auto', 'triton' or 'cpu'")
    bias = bias.expand(-1, q.shape[2], q.shape[1], k.shape[1])
    width = q.shape[-1]
    if chosen == "triton" and width not in BIAS_HEAD_DIMS and not named(backend):
        larger = [d for d in BIAS_HEAD_DIMS if d > width]
        # Zeros beyond the head dimension change neither products nor sums.
        q, k, v = (F.pad(t, (0, larger[0] - width)) for t in (q, k, v)) if larger else (q, k, v)
        chosen = chosen if larger else "reference"
    if chosen == "reference":
        out, lse = reference.bias_attention(q, k, v, bias, scale, key_mask, dropout_p, seed)
    else:
        if not dropout_p:
            seed = None
        elif seed is None:
            seed = torch.randint(1 << 62, (1,), device=q.device)
        out, lse = _bias(q, k, v, bias, key_mask, dropout_p, seed, scale, return_lse, chosen)
    out = out[..., :width] if out.shape[-1] != width else out
    return (out, lse) if return_lse else out


def _lse_type(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _hiding(bias: Tensor, key_mask: Tensor | None) -> Hiding | None:
    """The hidden keys; None if every query sees every key, which saves passes over the scores."""
    if key_mask is None and bias.numel() and host.number(bias.amin()) > HIDDEN:
        return None
    return Hiding(key_mask)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    key_mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from .triton.bias_attention import bias_attention_forward

        return bias_attention_forward(q, k, v, bias, scale, key_mask, dropout_p, seed)
    shape = (q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,)
    lse = torch.full(shape, -torch.inf, dtype=_lse_type(q))
    if not q.numel() or not k.numel():
        return torch.zeros(q.shape, dtype=q.dtype), lse
    hiding = _hiding(bias, key_mask)
    if hiding is None and seed is None and not return_lse:
        bias = bias.to(q.dtype)
        return biased_attention(q, k, v, scale, bias if bias.shape[0] > 1 else bias.contiguous()), lse
    dropout = None if seed is None else Dropout(dropout_p, seed)
    return tiled_attention(q, k, v, scale, bias, dropout, hiding, lse if return_lse else None), lse


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    *_, return_lse, backend = given
    shape = (q.shape[0], q.shape[2], q.shape[1]) if return_lse or backend == "triton" else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=_lse_type(q))


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    bias_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        from .triton.bias_attention import bias_attention_backward

        given = (q, k, v, bias, out, lse, scale, key_mask, dropout_p, seed)
        return bias_attention_backward(dout, dlse, *given, bias_gradient=bias_gradient)
    if not q.numel() or not k.numel():
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
        return dq, dk, dv, torch.zeros(bias.shape if bias_gradient else (0,), dtype=bias.dtype)
    # The same seed draws the masks of the forward pass again.
    dropout = None if seed is None else Dropout(dropout_p, seed)
    hiding = _hiding(bias, key_mask)
    dq, dk, dv, dbias = attention_backward(
        dout, q, k, v, scale, bias, dropout, bias_gradient=bias_gradient, hiding=hiding, dlse=dlse
    )
    return dq, dk, dv, q.new_empty(0, dtype=bias.dtype) if dbias is None else dbias.to(bias.dtype)


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    return dq, dk, dv, bias.new_empty(bias.shape if given[-2] else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, key_mask, ctx.dropout_p, seed, ctx.scale, return_lse, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, bias, *output, key_mask, seed)
    if not return_lse:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 6
    if dout is None and dlse is None:
        return (None, None, None, None, *rest)
    *tensors, key_mask, seed = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[4])
    wanted = ctx.needs_input_grad[3]
    given = (key_mask, seed, ctx.dropout_p, ctx.scale, wanted, ctx.backend)
    dq, dk, dv, dbias = _bias_grad(dout, dlse, *tensors, *given)
    return (dq, dk, dv, dbias if wanted else None, *rest)


_bias_grad = operator(
    "bias_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor out, "
    "Tensor lse, Tensor? key_mask, Tensor? seed, float dropout_p, float scale, bool bias_gradient, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_bias = operator(
    f"bias_attention(Tensor q, Tensor k, Tensor v, Tensor bias, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_gradient,
)
