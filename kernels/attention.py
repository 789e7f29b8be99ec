"""Attention with a relative position bias, and attention of packed sequences: checks, registration, gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError

from . import checks, flash, reference
from .backend import Backend, _why_not, named, resolve, transformed
from .checks import Packed
from .cpu import attention, varlen
from .cpu.attention import attention_backward, biased_attention
from .cpu.workspace import Dropout
from .derived import derived
from .library import autocast_dtype, like, operator
from .limits import HEAD_DIMS
from .products import runs_cpu_inference

_PACKED = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k, float scale, float dropout_p, Tensor? seed, "
    "Tensor? key_mask"
)


def relpos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    window: tuple[int, int],
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Self-attention of a window of patches and a class token with a learned relative position bias (BEiT).

    The gradient of the table is deterministic: it is summed over the batch in order, without atomics.

    Args:
        q, k, v: `[B, N, H, D]`, any strides, N = 1 + wh·ww.
        table: `[(2wh-1)(2ww-1)+3, H]`; see `reference.relative_position_index` for its rows.
        window: (wh, ww) in patches.
        scale: of the scores; 1/sqrt(D) by default.
        key_mask: `[B, N]` boolean, False for keys that a batch entry does not attend to; runs on PyTorch's kernels.
        bias: `relpos_bias` of the same table, window and scale. By default it is computed and cached for the next call;
            within a CUDA graph or a compiled model every call recomputes it, unless it is passed.

    Returns:
        `[B, N, H, D]`.

    Raises:
        ValueError: inconsistent shapes, dtypes or devices, or a backend that cannot run here.
    """
    checks.relpos_arguments(q, k, v, table, window, key_mask)
    scale = checks.scale_of(q, scale)
    chosen = resolve(backend, q, k, v, table, key_mask, has_flash=True)
    if chosen == "flash_attn":
        raise InputError("backend 'flash_attn' has no position bias; use 'auto', 'triton' or 'cpu'")
    if bias is not None:
        checks.position_bias(bias, q, padded=chosen == "triton")
    if chosen == "reference" and (named(backend) or transformed()):
        return reference.relpos_attention(q, k, v, table, window, scale, key_mask)
    if chosen == "triton" and named(backend):
        if key_mask is not None:
            raise InputError("backend 'triton' has no key_mask for relpos_attention; use 'auto' or 'reference'")
    elif key_mask is not None or chosen == "reference" or (chosen == "triton" and q.shape[-1] not in HEAD_DIMS):
        return _composed(q, k, v, table, window, scale, key_mask)
    # Autocast converts q, k and v on their way into the operator. The table stays what the bias was made of.
    dtype = q.dtype if q.dtype == torch.float64 else autocast_dtype(q.device) or q.dtype
    if bias is None and chosen == "triton":
        # Outside the operator, so that a graph contains what fills it.
        bias = _made_bias(table, window, scale, dtype, chosen, q.shape[-1])
    if chosen == "cpu" and type(q) is Tensor and runs_cpu_inference(backend, q, k, v, table):
        # The operator would take a tenth of the attention's time.
        return _relpos_forward(q, k, v, table, *window, scale, chosen, bias)[0]
    return _relpos(q, k, v, table, window[0], window[1], scale, chosen, bias)[0]


def relpos_bias(
    table: Tensor,
    window: tuple[int, int],
    *,
    dtype: torch.dtype,
    scale: float,
    head_dim: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """The bias of `relpos_attention` in its implementation's layout, an opaque tensor to pass as `bias`.

    Compute it before a CUDA graph is captured, and again after each change of the table: the graph reads this tensor.

    Args:
        table, window, scale: as in `relpos_attention`.
        dtype: of the attention: that of q, or autocast's.
        head_dim: of q. Some GPUs have a faster layout for certain head dimensions.

    Returns:
        For Triton `[H, N, N_pad]` of quotients of bias and scale, fp16 unless `dtype` is fp32, or the same elements in
        tiles `[H, N_pad / 128, N_pad / 64, 256, 32]`; on a CPU `[H, N, N]`. Each query's maximum is subtracted.

    Raises:
        InputError: a table that does not fit the window.
    """
    heads = table.shape[-1] if table.ndim else 0
    q = torch.empty((1, 1 + window[0] * window[1], heads, 1), device="meta")
    checks.relpos_arguments(q, q, q, table, window, None)
    chosen = "triton" if resolve(backend, table, has_flash=True) == "triton" else "cpu"
    return _made_bias(table, window, scale, dtype, chosen, head_dim)


def _made_bias(
    table: Tensor, window: tuple[int, int], scale: float, dtype: torch.dtype, backend: str, head_dim: int
) -> Tensor:
    if backend != "triton":
        return _bias(table, window)
    name = f"padded bias {window} {dtype} {scale} {head_dim}"
    return derived(name, (table,), lambda: _relpos_bias(table.detach(), *window, dtype, scale, False, head_dim))


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
    scale = checks.scale_of(q, scale)
    packed = Packed(cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, dropout_p, seed, key_mask)
    checks.varlen_arguments(q, k, v, packed)
    chosen = resolve(backend, q, k, v, cu_seqlens_q, cu_seqlens_k, seed, key_mask, has_flash=True)
    if chosen == "triton" and not named(backend) and q.shape[-1] not in HEAD_DIMS:
        chosen = "reference"
    if torch.compiler.is_exporting():
        return _padded(q, k, v, packed)
    if chosen == "reference":
        packed.bounds(q, k)
        return reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, dropout_p, key_mask, seed)
    if chosen == "flash_attn":
        if dropout_p and seed is not None:
            raise InputError("backend 'flash_attn' draws its dropout itself and takes no seed; use 'auto' or 'triton'")
        return _flash_attention(q, k, v, packed)
    if chosen == "triton" and not named(backend) and _flash_is_faster(q, k, packed):
        return _flash_attention(q, k, v, packed)
    if chosen == "cpu" and not dropout_p and type(q) is Tensor and runs_cpu_inference(backend, q, k, v):
        # Of one caption, the operator would take as long as the attention.
        return varlen.varlen_attention(q, k, v, *packed.bounds(q, k), scale, None, key_mask)
    if dropout_p and seed is None:
        seed = torch.randint(1 << 62, (1,), device=q.device)
    return _varlen(q, k, v, *packed[:6], seed if dropout_p else None, key_mask, chosen)[0]


def _padded(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """Attention of sequences that all have their greatest length: in an exported graph no value decides on a shape."""
    texts = packed.cu_seqlens_q.shape[0] - 1
    q = q.view(texts, packed.max_q, *q.shape[1:]).transpose(1, 2)
    k, v = (t.view(texts, packed.max_k, *t.shape[1:]).transpose(1, 2) for t in (k, v))
    mask = None if packed.key_mask is None else packed.key_mask.view(texts, 1, 1, packed.max_k)
    out = F.scaled_dot_product_attention(q, k, v, mask, packed.dropout_p, scale=packed.scale)
    return _laid_out(out.transpose(1, 2)).flatten(0, 1)


def _laid_out(out: Tensor) -> Tensor:
    """The result of PyTorch's attention; in an exported graph a copy, since its decomposition has other strides."""
    return out.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else out


def _composed(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, window: tuple[int, int], scale: float, key_mask: Tensor | None
) -> Tensor:
    """PyTorch's own attention with the bias as its mask: what `auto` runs where no kernel applies."""
    bias = reference.position_bias(table, window)[None]
    # Half precision has its digits near 0, and no softmax sees what a row has in common.
    bias = bias - bias.detach().amax(-1, keepdim=True)
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)
    return _laid_out(out.transpose(1, 2))


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    if checks.should_check_values(q):
        packed.bounds(q, k)
    if (dtype := autocast_dtype(q.device)) is not None:
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    return flash.varlen_attention(q, k, v, packed)


def _flash_is_faster(q: Tensor, k: Tensor, packed: Packed) -> bool:
    """Whether `tune` measured flash-attn to be faster for these sequences on this GPU, and it is installed."""
    if torch.compiler.is_compiling() or packed.key_mask is not None or packed.dropout_p or not q.numel():
        return False
    from .triton.varlen_attention import tuned_backends

    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    backends = tuned_backends(q, k, packed, autocast_dtype(q.device) or q.dtype, gradient=gradient)
    return backends == {"flash_attn"} and _why_not("flash_attn", q.device.type, q.device.index) is None


def _bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    return derived(f"position bias {window}", (table,), lambda: attention.position_bias(table.detach(), window))


def _relpos_bias_made(
    table: Tensor, height: int, width: int, dtype: torch.dtype, scale: float, turned: bool, head_dim: int = 0
) -> Tensor:
    from .triton.relpos_table import materialise_bias

    fragments = _in_fragments(head_dim, dtype, table.device, turned=turned)
    return materialise_bias(table, (height, width), dtype, scale, turned=turned, fragments=fragments)


def _in_fragments(head_dim: int, dtype: torch.dtype, device: torch.device, *, turned: bool) -> bool:
    """Whether a bias is stored in fragments; fakes ask too, possibly without Triton or a GPU."""
    if not head_dim or turned or device.type != "cuda" or not torch.cuda.is_available():
        return False
    from .triton.relpos_table import takes_fragments

    return takes_fragments(head_dim, dtype, device)


def _relpos_bias_fake(
    table: Tensor, height: int, width: int, dtype: torch.dtype, scale: float, turned: bool, head_dim: int = 0
) -> Tensor:
    fragments = _in_fragments(head_dim, dtype, table.device, turned=turned)
    shape = checks.bias_shape(1 + height * width, table.shape[1], fragments=fragments)
    return table.new_empty(shape, dtype=torch.float32 if dtype == torch.float32 else torch.float16)


def _relpos_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    height: int,
    width: int,
    scale: float,
    backend: str,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from .triton.relpos_attention import relpos_attention_forward

        if bias is None:
            bias = _relpos_bias_made(table, height, width, q.dtype, scale, turned=False)
        return relpos_attention_forward(q, k, v, bias, scale)
    bias = _bias(table, (height, width)) if bias is None else bias
    return biased_attention(q, k, v, scale, bias[None]), q.new_empty(0, dtype=torch.float32)


def _relpos_forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    height: int,
    width: int,
    scale: float,
    backend: str,
    bias: Tensor | None = None,
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
    bias: Tensor | None = None,
    turned: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    window = (height, width)
    if backend == "triton":
        from .triton.relpos_attention import relpos_attention_backward

        if bias is None:
            bias = _relpos_bias_made(table, height, width, q.dtype, scale, turned=False)
        rest = (table.shape[0], window, scale, out, lse, turned)
        dq, dk, dv, dtable = relpos_attention_backward(dout, q, k, v, bias, *rest)
        return dq, dk, dv, dtable.to(table.dtype)
    bias = _bias(table, window) if bias is None else bias
    dq, dk, dv, dbias = attention_backward(dout, q, k, v, scale, bias[None], bias_gradient=True)
    assert dbias is not None
    return dq, dk, dv, attention.table_gradient(dbias[0], window, table.shape[0]).to(table.dtype)


def _relpos_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # Callers of before the bias was an argument leave it out.
    (q, k, v, table, *ctx.rest), (bias, *_) = inputs[:8], (*inputs[8:], None)
    ctx.inputs = len(inputs)
    ctx.save_for_backward(q, k, v, table, *output, bias)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _relpos_gradient(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * (ctx.inputs - 4)
    if dout is None:
        return (None, None, None, None, *rest)
    q, k, v, table, out, lse, bias = ctx.saved_tensors
    height, width, scale, backend = ctx.rest
    turned = None
    if backend == "triton":
        turned = _relpos_bias(table.detach(), height, width, q.dtype, scale, True)
    return (*_relpos_grad(dout, q, k, v, table, out, lse, *ctx.rest, bias, turned), *rest)


def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    packed, backend = Packed(*given[:-1]), given[-1]
    if backend == "triton":
        from .triton.varlen_attention import varlen_attention_forward

        if checks.should_check_values(q):
            packed.bounds(q, k)
        return varlen_attention_forward(q, k, v, packed)
    dropout = None if packed.seed is None else Dropout(packed.dropout_p, packed.seed)
    out = varlen.varlen_attention(q, k, v, *packed.bounds(q, k), packed.scale, dropout, packed.key_mask)
    return out, q.new_empty(0, dtype=torch.float32)


def _varlen_forward_fake(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    lse = (q.shape[1], q.shape[0]) if given[-1] == "triton" else (0,)
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


def _varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    packed, backend = Packed(*given[:-1]), given[-1]
    if backend == "triton":
        from .triton.varlen_attention import varlen_attention_backward

        return varlen_attention_backward(dout, q, k, v, out, lse, packed)
    # The same seed draws the masks of the forward pass again.
    dropout = None if packed.seed is None else Dropout(packed.dropout_p, packed.seed)
    bounds = packed.bounds(q, k)
    return varlen.varlen_attention_backward(dout, q, k, v, *bounds, packed.scale, dropout, packed.key_mask)


def _varlen_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.numbers, seed, key_mask, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, seed, key_mask)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _varlen_gradient(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 9
    if dout is None:
        return (None, None, None, *rest)
    *tensors, cu_seqlens_q, cu_seqlens_k, seed, key_mask = ctx.saved_tensors
    packed = (cu_seqlens_q, cu_seqlens_k, *ctx.numbers, seed, key_mask)
    return (*_varlen_grad(dout, *tensors, *packed, ctx.backend), *rest)


_relpos_bias = operator(
    "relpos_bias(Tensor table, int height, int width, ScalarType dtype, float scale, bool turned, "
    "int head_dim=0) -> Tensor",
    _relpos_bias_made,
    _relpos_bias_fake,
)
_relpos_grad = operator(
    "relpos_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor table, Tensor out, Tensor lse, "
    "int height, int width, float scale, str backend, Tensor? bias=None, Tensor? turned=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _relpos_backward,
    like(1, 2, 3, 4),
)
_relpos = operator(
    "relpos_attention(Tensor q, Tensor k, Tensor v, Tensor table, int height, int width, float scale, str backend, "
    "Tensor? bias=None) -> (Tensor, Tensor)",
    _relpos_forward,
    _relpos_forward_fake,
    setup_context=_relpos_setup,
    backward=_relpos_gradient,
    # Not the table: a converted copy would be rounded, and the bias recomputed at every call.
    autocast=(0, 1, 2),
)
_varlen_grad = operator(
    "varlen_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_PACKED}, str backend) -> (Tensor, Tensor, Tensor)",
    _varlen_backward,
    like(1, 2, 3),
)
_varlen = operator(
    f"varlen_attention(Tensor q, Tensor k, Tensor v, {_PACKED}, str backend) -> (Tensor, Tensor)",
    _varlen_forward,
    _varlen_forward_fake,
    setup_context=_varlen_setup,
    backward=_varlen_gradient,
    autocast=True,
)
