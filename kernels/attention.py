"""Attention with a relative position bias, and attention of packed sequences: checks, registration, gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import host, reference
from .backend import Backend, named, resolve
from .cpu import position, varlen
from .cpu.attention import biased_attention
from .cpu.tiles import Dropout, tiled_attention_backward
from .derived import derived
from .library import operator

# As `triton.attention_common.HEAD_DIMS`, which cannot be imported where Triton is absent.
_TRITON_HEAD_DIMS = (32, 64, 80, 96, 128)


def relpos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    window: tuple[int, int],
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Self-attention of a window of patches and a class token with a learned relative position bias (BEiT).

    The gradient of the table is deterministic: it is summed over the batch in order, without atomics.

    Args:
        q, k, v: `[B, N, H, D]`, any strides, N = 1 + wh·ww.
        table: `[(2wh-1)(2ww-1)+3, H]`; see `reference.relative_position_index` for its rows.
        window: (wh, ww) in patches.
        scale: of the products; 1/sqrt(D) by default.
        key_mask: `[B, N]` boolean, False for keys that a batch entry does not attend to; runs on PyTorch's kernels.

    Returns:
        `[B, N, H, D]`.

    Raises:
        ValueError: shapes, types or devices that do not fit together, or a backend that cannot run here.
    """
    _check_relpos(q, k, v, table, window, key_mask)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    chosen = resolve(backend, q, k, v, table, key_mask)
    if chosen == "flash_attn":
        raise ValueError("backend 'flash_attn' has no position bias; use 'auto', 'triton' or 'cpu'")
    if chosen == "reference" and named(backend):
        return reference.relpos_attention(q, k, v, table, window, scale, key_mask)
    if chosen == "triton" and named(backend):
        if key_mask is not None:
            raise ValueError("backend 'triton' has no key_mask for relpos_attention; use 'auto' or 'reference'")
    elif key_mask is not None or chosen == "reference" or (chosen == "triton" and q.shape[-1] not in _TRITON_HEAD_DIMS):
        return _composed(q, k, v, table, window, scale, key_mask)
    return _relpos(q, k, v, table, window[0], window[1], scale, chosen)[0]


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
    """Attention of packed sequences, each over its own keys: self-attention without padding, or cross-attention.

    All texts of an image may form one query sequence: cross-attention has no mask between queries.

    Args:
        q: `[Tq, H, D]`; k, v: `[Tk, H, D]`; any strides. The sequences lie one after the other.
        cu_seqlens_q, cu_seqlens_k: `[S + 1]` int32 or int64 offsets, starting with 0 and ending with Tq and Tk.
            Lengths may be zero on either side; queries without keys receive zeros.
        max_q, max_k: upper bounds of the lengths.
        dropout_p: probability of dropping an attention weight.
        scale: of the products; 1/sqrt(D) by default.
        key_mask: `[Tk]` boolean, False for keys that nobody attends to.
        seed: one int64 on the device of q that the dropout follows from; drawn from PyTorch's generator by default.

    Returns:
        `[Tq, H, D]`.

    Raises:
        ValueError: shapes, types or devices that do not fit together, offsets that do not describe the tensors (checked
            where that needs no synchronisation: on CPU), or a backend that cannot run here.
    """
    _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} is no probability below 1")
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    chosen = resolve(backend, q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask)
    if chosen == "triton" and not named(backend) and q.shape[-1] not in _TRITON_HEAD_DIMS:
        chosen = "reference"
    if chosen == "reference":
        return reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, dropout_p, key_mask)
    if chosen == "flash_attn":
        return _flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, dropout_p, key_mask)
    if dropout_p and seed is None:
        seed = torch.randint(1 << 62, (1,), device=q.device)
    arguments = (cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, dropout_p, seed if dropout_p else None, key_mask)
    return _varlen(q, k, v, *arguments, chosen)[0]


def _composed(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, window: tuple[int, int], scale: float, key_mask: Tensor | None
) -> Tensor:
    """PyTorch's own attention with the bias as its mask: what `auto` runs where no kernel applies."""
    bias = reference.position_bias(table, window)[None]
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale).transpose(1, 2)


def _flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    dropout_p: float,
    key_mask: Tensor | None,
) -> Tensor:
    if key_mask is not None:
        raise ValueError("backend 'flash_attn' has no key_mask; use 'auto' or 'triton'")
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    offsets = (cu_seqlens_q.int(), cu_seqlens_k.int())
    return flash_attn_varlen_func(q, k, v, *offsets, max_q, max_k, dropout_p=dropout_p, softmax_scale=scale)


def _bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    return derived(f"position bias {window}", (table,), lambda: position.position_bias(table, window))


def _padded_bias(table: Tensor, window: tuple[int, int], dtype: torch.dtype, scale: float) -> Tensor:
    from .triton.relpos_table import materialise_bias

    name = f"padded bias {window} {dtype} {scale}"
    return derived(name, (table,), lambda: materialise_bias(table, window, dtype, scale))


def _relpos_forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from .triton.relpos_attention import relpos_attention_forward

        return relpos_attention_forward(q, k, v, _padded_bias(table, (height, width), q.dtype, scale), scale)
    out = biased_attention(q, k, v, scale, _bias(table, (height, width)).to(q.dtype))
    return out, q.new_empty(0, dtype=torch.float32)


def _relpos_forward_fake(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    lse = (batch, heads, tokens) if backend == "triton" else (0,)
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


def _relpos_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    height: int,
    width: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    window = (height, width)
    if backend == "triton":
        from .triton.relpos_attention import relpos_attention_backward

        bias = _padded_bias(table, window, q.dtype, scale)
        dq, dk, dv, dtable = relpos_attention_backward(dout, q, k, v, bias, table.shape[0], window, scale, out, lse)
        return dq, dk, dv, dtable.to(table.dtype)
    bias = _bias(table, window).to(q.dtype)
    dq, dk, dv, dbias = tiled_attention_backward(dout, q, k, v, scale, bias[None], bias_gradient=True)
    assert dbias is not None
    return dq, dk, dv, position.table_gradient(dbias, window, table.shape[0]).to(table.dtype)


def _relpos_backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), table.new_empty(table.shape)


def _relpos_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, table, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, table, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _relpos_gradient(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * len(ctx.rest)
    if dout is None:
        return (None, None, None, None, *rest)
    return (*_relpos_grad(dout, *ctx.saved_tensors, *ctx.rest), *rest)


def _varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    key_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from .triton.varlen_attention import varlen_attention_forward

        offsets = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
        return varlen_attention_forward(q, k, v, *offsets, scale, dropout_p, seed, key_mask)
    bounds_q, bounds_k = _bounds(cu_seqlens_q, q, max_q, "q"), _bounds(cu_seqlens_k, k, max_k, "k")
    dropout = None if seed is None else Dropout(dropout_p, seed)
    out = varlen.varlen_attention(q, k, v, bounds_q, bounds_k, scale, dropout, key_mask)
    return out, q.new_empty(0, dtype=torch.float32)


def _varlen_forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    key_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse = (q.shape[1], q.shape[0]) if backend == "triton" else (0,)
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


def _varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from .triton.varlen_attention import varlen_attention_backward

        offsets = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
        return varlen_attention_backward(dout, q, k, v, *offsets, scale, dropout_p, seed, key_mask, out, lse)
    bounds_q, bounds_k = _bounds(cu_seqlens_q, q, max_q, "q"), _bounds(cu_seqlens_k, k, max_k, "k")
    dropout = None if seed is None else Dropout(dropout_p, seed)
    return varlen.varlen_attention_backward(dout, q, k, v, bounds_q, bounds_k, scale, dropout, key_mask)


def _varlen_backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _varlen_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, dropout_p, seed, key_mask, backend = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, key_mask, *output)
    ctx.rest = (max_q, max_k, scale, dropout_p, backend)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _varlen_gradient(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 9
    if dout is None:
        return (None, None, None, *rest)
    return (*_varlen_grad(dout, *ctx.saved_tensors, *ctx.rest), *rest)


_relpos_grad = operator(
    "relpos_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor table, Tensor out, Tensor lse, "
    "int height, int width, float scale, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _relpos_backward,
    _relpos_backward_fake,
)
_relpos = operator(
    "relpos_attention(Tensor q, Tensor k, Tensor v, Tensor table, int height, int width, float scale, str backend) "
    "-> (Tensor, Tensor)",
    _relpos_forward,
    _relpos_forward_fake,
    setup_context=_relpos_setup,
    backward=_relpos_gradient,
    autocast=True,
)
_varlen_grad = operator(
    "varlen_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor? seed, Tensor? key_mask, Tensor out, Tensor lse, SymInt max_q, SymInt max_k, float scale, float dropout_p, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _varlen_backward,
    _varlen_backward_fake,
)
_varlen = operator(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, "
    "SymInt max_k, float scale, float dropout_p, Tensor? seed, Tensor? key_mask, str backend) -> (Tensor, Tensor)",
    _varlen_forward,
    _varlen_forward_fake,
    setup_context=_varlen_setup,
    backward=_varlen_gradient,
    autocast=True,
)


def _check_relpos(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, window: tuple[int, int], key_mask: Tensor | None
) -> None:
    if not q.ndim == k.ndim == v.ndim == 4 or not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k, v must all be [B, N, H, D]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    _check_dtypes(q, k, v)
    height, width = window
    if q.shape[1] != 1 + height * width:
        raise ValueError(
            f"q has {q.shape[1]} tokens; a {height}x{width} window with a class token has {1 + height * width}"
        )
    rows = (2 * height - 1) * (2 * width - 1) + 3
    if table.shape != (rows, q.shape[2]):
        raise ValueError(
            f"table is {[*table.shape]}; a {height}x{width} window with {q.shape[2]} heads needs "
            f"[{rows}, {q.shape[2]}]: interpolate it when the resolution changes"
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != q.shape[:2]):
        raise ValueError(f"key_mask is {key_mask.dtype} {[*key_mask.shape]}; it must be bool {[*q.shape[:2]]}")


def _check_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_mask: Tensor | None
) -> None:
    if not q.ndim == k.ndim == v.ndim == 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q must be [Tq, H, D] and k, v [Tk, H, D]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    _check_dtypes(q, k, v)
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets.ndim != 1 or offsets.numel() < 1 or offsets.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {offsets.dtype} {[*offsets.shape]}; it must be int32 or int64 [S + 1]")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"cu_seqlens_q has {cu_seqlens_q.numel()} offsets and cu_seqlens_k {cu_seqlens_k.numel()}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != k.shape[:1]):
        raise ValueError(f"key_mask is {key_mask.dtype} {[*key_mask.shape]}; it must be bool [{k.shape[0]}]")


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one floating-point type")


def _bounds(offsets: Tensor, packed: Tensor, longest: int, name: str) -> tuple[int, ...]:
    bounds = tuple(host.integers(offsets))
    if bounds[0] != 0 or bounds[-1] != packed.shape[0]:
        raise ValueError(
            f"cu_seqlens_{name} runs from {bounds[0]} to {bounds[-1]}; it must run from 0 to {packed.shape[0]}"
        )
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens_{name} decreases; offsets must not")
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_{name}={longest} is smaller than the longest sequence, {max(lengths)}")
    return bounds
