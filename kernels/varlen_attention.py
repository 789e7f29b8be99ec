"""Attention of packed sequences: implementations and public function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError

from . import checks, flash, reference
from .backend import Backend, _why_not, autocast_dtype, named, transformed
from .bias_attention import bias_attention, pad_heads, unpad_heads
from .checks import BIAS_HEAD_DIMS, HEAD_DIMS, Varlen
from .cpu import varlen as cpu
from .cpu.workspace import Dropout
from .ladder import Call, Op
from .library import Gradients, Needs, Outputs, Upstream, differentiable


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    seed: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Return attention of packed sequences, each over its own keys: self-attention without padding, or cross-attention.

    All texts of an image may form one query sequence: cross-attention has no mask between queries.

    Args:
        q: `[Tq, H, D]`; k, v: `[Tk, H, D]`; any strides. The sequences are concatenated.
        cu_seqlens_q, cu_seqlens_k: `[S + 1]` int32 or int64 offsets, starting with 0 and ending with Tq and Tk.
            Lengths may be zero on either side; queries without keys receive zeros.
        max_q, max_k: upper bounds of the lengths.
        dropout_p: probability of dropping an attention weight.
        scale: of the scores; 1/sqrt(D) by default.
        key_mask: `[Tk]` boolean, False for keys that are hidden from all queries.
        seed: one int64 on the device of q, the seed of the dropout; drawn from PyTorch's generator by default.

    Returns:
        `[Tq, H, D]`.

    Raises:
        ValueError: inconsistent shapes, dtypes or devices, a backend that cannot run here, or offsets that do not fit
            the tensors (checked on CPU and within `check_contents()`).
    """
    args = Varlen(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_q=max_q,
        max_k=max_k,
        scale=checks.scale_of(q, scale),
        dropout_p=dropout_p,
        seed=seed,
        key_mask=key_mask,
    )
    return VARLEN_ATTENTION(args, backend)


def _run_reference(a: Varlen, call: Call) -> Tensor:
    if torch.compiler.is_exporting():
        return _export(a)
    on_cpu = a.q.device.type == "cpu" and not named(call.requested)
    if on_cpu and not transformed() and not torch.jit.is_tracing():
        # The definition reads offsets, whose values `make_fx` and fakes do not have; these can record the operator.
        return _run_kernel(a, Call(call.requested, "cpu"))
    if call.backend == "flash_attn":
        if a.dropout_p and a.seed is not None:
            raise InputError(
                "backend 'flash_attn' draws its dropout itself and takes no seed; use 'auto' or 'triton'"
            )
        return _run_flash(a)
    a.bounds(a.q, a.k)
    offsets = (a.cu_seqlens_q, a.cu_seqlens_k)
    return reference.varlen_attention(
        a.q, a.k, a.v, *offsets, a.scale, a.dropout_p, a.key_mask, a.seed
    )


def _infer(a: Varlen, call: Call) -> Tensor:
    # For one caption, the operator would take as long as the attention.
    bounds = a.bounds(a.q, a.k)
    return cpu.varlen_attention(a.q, a.k, a.v, *bounds, a.scale, None, a.key_mask)


def _run_kernel(a: Varlen, call: Call) -> Tensor:
    if call.backend == "triton" and not named(call.requested) and _flash_is_faster(a):
        return _run_flash(a)
    a.seed = checks.drawn_seed(a.dropout_p, a.seed, a.q.device)
    if call.backend != "triton":
        return _run_operator(a, call.backend)[0]
    width = a.q.shape[-1]
    if width > HEAD_DIMS[-1]:
        return _run_padded(a, call)
    pad_heads(a, HEAD_DIMS)
    return unpad_heads(_run_operator(a, call.backend)[0], width)


def _run_padded(a: Varlen, call: Call) -> Tensor:
    """Run attention of sequences padded to the longest: the kernels for packed ones have no heads so wide."""
    if checks.should_check_values(a.q):
        a.bounds(a.q, a.k)
    queries, _ = _padded_rows(a.cu_seqlens_q, a.max_q, a.q)
    keys, is_token = _padded_rows(a.cu_seqlens_k, a.max_k, a.k)
    # Padding reads a row of zeros: a weight of 0 would let a NaN of another sequence through.
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (a.q, a.k, a.v))
    if a.key_mask is not None:
        is_token = is_token & F.pad(a.key_mask, (0, 1))[keys]
    out = bias_attention(
        q[queries],
        k[keys],
        v[keys],
        torch.zeros(1, 1, 1, 1, device=q.device),
        is_token,
        a.dropout_p,
        scale=a.scale,
        seed=a.seed,
        backend=call.requested,
    )
    bounds = a.cu_seqlens_q.contiguous()
    tokens = torch.arange(a.q.shape[0], dtype=bounds.dtype, device=q.device)
    sequences = torch.searchsorted(bounds[1:], tokens, right=True)
    return out[sequences, tokens - bounds[sequences]]


def _padded_rows(bounds: Tensor, longest: int, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the packed row of each padded token `[S, longest]`, one behind the last for padding, and where one is."""
    positions = torch.arange(longest, device=packed.device)
    is_token = positions < bounds.diff()[:, None]
    return torch.where(is_token, bounds[:-1, None] + positions, packed.shape[0]), is_token


def _export(a: Varlen) -> Tensor:
    """Run attention of sequences that all have their greatest length: in an exported graph no value sets a shape."""
    texts = a.cu_seqlens_q.shape[0] - 1
    q = a.q.view(texts, a.max_q, *a.q.shape[1:]).transpose(1, 2)
    k, v = (t.view(texts, a.max_k, *t.shape[1:]).transpose(1, 2) for t in (a.k, a.v))
    mask = None if a.key_mask is None else a.key_mask.view(texts, 1, 1, a.max_k)
    out = F.scaled_dot_product_attention(q, k, v, mask, a.dropout_p, scale=a.scale)
    # The decomposition has other strides.
    return out.transpose(1, 2).contiguous().flatten(0, 1)


def _run_flash(a: Varlen) -> Tensor:
    if checks.should_check_values(a.q):
        a.bounds(a.q, a.k)
    q, k, v = a.q, a.k, a.v
    if (dtype := autocast_dtype(q.device)) is not None:
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    return flash.varlen_attention(q, k, v, a)


def _flash_is_faster(a: Varlen) -> bool:
    """Return whether `tune` measured flash-attn to be faster for these sequences on this GPU, and it is installed."""
    if torch.compiler.is_compiling() or a.key_mask is not None or a.dropout_p or not a.q.numel():
        return False
    from .triton.varlen_attention import tuned_backends

    gradient = torch.is_grad_enabled() and (a.q.requires_grad or a.k.requires_grad)
    dtype = autocast_dtype(a.q.device) or a.q.dtype
    backends = tuned_backends(a.q, a.k, a, dtype, gradient=gradient)
    device = a.q.device
    return backends == {"flash_attn"} and _why_not("flash_attn", device.type, device.index) is None


def _forward(a: Varlen, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from .triton.varlen_attention import varlen_attention_forward

        if checks.should_check_values(a.q):
            a.bounds(a.q, a.k)
        return varlen_attention_forward(a.q, a.k, a.v, a)
    dropout = None if a.seed is None else Dropout(a.dropout_p, a.seed)
    bounds = a.bounds(a.q, a.k)
    out = cpu.varlen_attention(a.q, a.k, a.v, *bounds, a.scale, dropout, a.key_mask)
    return out, a.q.new_empty(0, dtype=torch.float32)


def _fake(a: Varlen, backend: str) -> tuple[Tensor, Tensor]:
    lse = (a.q.shape[1], a.q.shape[0]) if backend == "triton" else (0,)
    return a.q.new_empty(a.q.shape), a.q.new_empty(lse, dtype=torch.float32)


def _backward(
    upstream: Upstream, a: Varlen, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    (dout,), (out, lse) = upstream, outputs
    assert dout is not None
    if backend == "triton":
        from .triton.varlen_attention import varlen_attention_backward

        dq, dk, dv = varlen_attention_backward(dout, a.q, a.k, a.v, out, lse, a)
    else:
        # The same seed draws the masks of the forward pass again.
        dropout = None if a.seed is None else Dropout(a.dropout_p, a.seed)
        dq, dk, dv = cpu.varlen_attention_backward(
            dout, a.q, a.k, a.v, *a.bounds(a.q, a.k), a.scale, dropout, a.key_mask
        )
    return {"q": dq, "k": dk, "v": dv}


_run_operator = differentiable(
    "varlen_attention", Varlen, _forward, _fake, _backward, outputs=2, autocast=True
)
VARLEN_ATTENTION = Op(
    "varlen_attention",
    Varlen,
    {"inference": _infer, "kernel": _run_kernel, "reference": _run_reference},
    fits={"triton": lambda a: a.q.shape[-1] <= BIAS_HEAD_DIMS[-1]},
    attention=True,
)
