"""Attention with a bias: arguments, implementations and public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError

from . import checks, host, reference
from .backend import Backend, autocast_dtype
from .checks import BIAS_HEAD_DIMS, Biased
from .cpu import attention as cpu
from .cpu.attention import Hiding
from .cpu.workspace import Dropout
from .ladder import Call, Op
from .library import Gradients, Needs, Outputs, Upstream, differentiable


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
    """Return softmax(scale · q kᵀ + bias) v, with deterministic gradients of all four inputs.

    A bias that the batch shares is read once from memory and its gradient summed over it in order. Under autocast
    q, k and v are converted; the bias keeps its dtype, and so does its gradient.

    Args:
        q: `[B, Nq, H, D]`; k, v: `[B, Nk, H, D]`; any strides.
        bias: `[G, H, Nq, Nk]`: 1 for the whole batch, B for an entry each, or a divisor G of B: entry b mod G is for
            batch entry b, as windows of an image share masks. H, Nq and Nk may be 1 for a broadcast. A bias of -1e30
            or less hides a key from a query. float64 where q is, else any floating-point dtype.
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
    args = Biased(q, k, v, bias, key_mask, dropout_p, seed, checks.scale_of(q, scale), return_lse)
    out, lse = BIAS_ATTENTION(args, backend)
    return (out, lse) if return_lse else out


def pad_heads(a: Any, head_dims: Sequence[int]) -> None:
    """Pad the heads of q, k and v to the next of these dimensions: zeros change neither products nor sums."""
    width = a.q.shape[-1]
    if width in head_dims:
        return
    if width > head_dims[-1]:
        raise InputError(
            f"heads of {width} are wider than {head_dims[-1]}, the widest of backend 'triton'; use 'auto'"
        )
    missing = next(dim for dim in head_dims if dim > width) - width
    a.q, a.k, a.v = (F.pad(t, (0, missing)) for t in (a.q, a.k, a.v))


def unpad_heads(out: Tensor, width: int) -> Tensor:
    """Return the first `width` columns of each head, contiguous."""
    return out if out.shape[-1] == width else out[..., :width].contiguous()


def _expand_bias(a: Biased) -> None:
    a.bias = a.bias.expand(-1, a.q.shape[2], a.q.shape[1], a.k.shape[1])


def _bias_reference(a: Biased, call: Call) -> tuple[Tensor, Tensor]:
    if call.backend == "flash_attn":
        raise InputError("backend 'flash_attn' has no bias; use 'auto', 'triton' or 'cpu'")
    _expand_bias(a)
    return reference.bias_attention(a.q, a.k, a.v, a.bias, a.scale, a.key_mask, a.dropout_p, a.seed)


def _bias_kernel(a: Biased, call: Call) -> tuple[Tensor, Tensor]:
    width = a.q.shape[-1]
    a.seed = checks.drawn_seed(a.dropout_p, a.seed, a.q.device)
    _expand_bias(a)
    if call.backend == "triton":
        pad_heads(a, BIAS_HEAD_DIMS)
    out, lse = _run_operator(a, call.backend)
    return unpad_heads(out, width), lse


def _empty_lse(a: Biased, *, needed: bool) -> Tensor:
    shape = (a.q.shape[0], a.q.shape[2], a.q.shape[1]) if needed else (0,)
    return a.q.new_empty(shape, dtype=torch.promote_types(a.q.dtype, torch.float32))


def _hiding(a: Biased) -> Hiding | None:
    """Return the hidden keys; None if every query sees every key, which saves passes over the scores."""
    if a.key_mask is None and a.bias.numel() and host.number(a.bias.amin()) > reference.HIDDEN:
        return None
    return Hiding(a.key_mask)


def _forward(a: Biased, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from .triton.bias_attention import bias_attention_forward

        return bias_attention_forward(a)
    lse = _empty_lse(a, needed=a.return_lse).fill_(-torch.inf)
    if not a.q.numel() or not a.k.numel():
        return torch.zeros(a.q.shape, dtype=a.q.dtype), lse
    hiding, bias = _hiding(a), a.bias
    if hiding is None and a.seed is None and not a.return_lse:
        bias = bias.to(a.q.dtype)
        shared = bias if bias.shape[0] > 1 else bias.contiguous()
        return cpu.biased_attention(a.q, a.k, a.v, a.scale, shared), lse
    dropout = None if a.seed is None else Dropout(a.dropout_p, a.seed)
    logsumexp = lse if a.return_lse else None
    out = cpu.tiled_attention(a.q, a.k, a.v, a.scale, bias, dropout, hiding, logsumexp)
    return out, lse


def _fake(a: Biased, backend: str) -> tuple[Tensor, Tensor]:
    return a.q.new_empty(a.q.shape), _empty_lse(a, needed=a.return_lse or backend == "triton")


def _backward(
    upstream: Upstream, a: Biased, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    (dout, dlse), (out, lse) = upstream, outputs
    dout = torch.zeros_like(out) if dout is None else dout
    if backend == "triton":
        from .triton.bias_attention import bias_attention_backward

        gradients = bias_attention_backward(dout, dlse, a, out, lse, bias_gradient=needs["bias"])
        return dict(zip(("q", "k", "v", "bias"), gradients, strict=True))
    if not a.q.numel() or not a.k.numel():
        return {name: torch.zeros_like(getattr(a, name)) for name in ("q", "k", "v", "bias")}
    dq, dk, dv, dbias = cpu.attention_backward(
        dout,
        a.q,
        a.k,
        a.v,
        a.scale,
        a.bias,
        # The same seed draws the masks of the forward pass again.
        None if a.seed is None else Dropout(a.dropout_p, a.seed),
        bias_gradient=needs["bias"],
        hiding=_hiding(a),
        dlse=dlse,
    )
    return {"q": dq, "k": dk, "v": dv, "bias": None if dbias is None else dbias.to(a.bias.dtype)}


_run_operator = differentiable(
    "bias_attention",
    Biased,
    _forward,
    _fake,
    _backward,
    outputs=2,
    results=lambda a, _: 2 if a.return_lse else 1,
)
BIAS_ATTENTION = Op(
    "bias_attention",
    Biased,
    {"kernel": _bias_kernel, "reference": _bias_reference},
    fits={"triton": lambda a: a.q.shape[-1] <= BIAS_HEAD_DIMS[-1]},
    attention=True,
)
