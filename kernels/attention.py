"""Attention: with a relative position bias, of packed sequences, with any bias. Public functions and operators."""

# Parts of named tuples are passed on as positional arguments, whose number no checker can know.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError

from . import checks, flash, host, reference
from .backend import Backend, _why_not, emulated_architecture, named, resolve, transformed
from .caching import cached
from .checks import BIAS_HEAD_DIMS, HEAD_DIMS, Biased, RelPos, Varlen
from .cpu import attention, varlen
from .cpu.attention import Hiding, attention_backward, biased_attention, tiled_attention
from .cpu.workspace import Dropout
from .ladder import Call, Op
from .library import Gradients, autocast_dtype, differentiable, operator

# In half precision a bias is a quotient by the scale, of at most 60000: 1/256 leaves differences of 234, which are as
# good as infinite in a softmax.
_LEAST_SCALE = 2.0**-8


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
    given = RelPos(q, k, v, table, window, checks.scale_of(q, scale), key_mask, bias)
    return _relpos_attention(given, backend)


def _relpos_reference(a: RelPos, call: Call) -> Tensor:
    if call.chosen == "flash_attn":
        raise InputError("backend 'flash_attn' has no position bias; use 'auto', 'triton' or 'cpu'")
    _check_bias(a, call)
    if call.chosen == "reference" and (named(call.backend) or transformed()):
        return reference.relpos_attention(*a[:7])
    return _composed(a)


def _relpos_inference(a: RelPos, call: Call) -> Tensor:
    if a.key_mask is not None:
        return _relpos_kernel(a, call)
    # The operator would take a tenth of the attention's time.
    _check_bias(a, call)
    return _relpos_forward(a, "cpu")[0]


def _relpos_kernel(a: RelPos, call: Call) -> Tensor:
    _check_bias(a, call)
    if a.key_mask is not None:
        if call.chosen == "triton" and named(call.backend):
            raise InputError(
                "backend 'triton' has no key_mask for relpos_attention; use 'auto' or 'reference'"
            )
        return _composed(a)
    if call.chosen != "triton":
        return _relpos(a, call.chosen)[0]
    width, a = a.q.shape[-1], _with_heads_of(HEAD_DIMS, a)
    # Autocast converts q, k and v on their way into the operator. The table stays what the bias was made of.
    dtype = a.q.dtype if a.q.dtype == torch.float64 else autocast_dtype(a.q.device) or a.q.dtype
    if a.bias is None:
        # Outside the operator, so that a graph contains what fills it.
        a = a._replace(
            bias=_make_bias(a.table, a.window, a.scale, dtype, call.chosen, a.q.shape[-1])
        )
    scale = _scale_of_bias(a.scale, dtype)
    if scale != a.scale:
        # By a power of two, which rounds nothing that counts beside the bias.
        a = a._replace(q=a.q * (a.scale / scale), scale=scale)
    return _first_columns(_relpos(a, call.chosen)[0], width)


def _scale_of_bias(scale: float, dtype: torch.dtype) -> float:
    """The scale of a bias, a quotient of which half precision must be able to hold: that of the scores, or larger."""
    while dtype.itemsize == 2 and scale < _LEAST_SCALE:
        scale *= 2
    return scale


def _with_heads_of(head_dims: Sequence[int], a: Any) -> Any:
    """Arguments of attention with heads of the next of these dimensions: zeros change neither products nor sums."""
    width = a.q.shape[-1]
    if width in head_dims:
        return a
    if width > head_dims[-1]:
        raise InputError(
            f"heads of {width} are wider than {head_dims[-1]}, the widest of backend 'triton'; use 'auto'"
        )
    wider = next(d for d in head_dims if d > width)
    return a._replace(**{name: F.pad(getattr(a, name), (0, wider - width)) for name in "qkv"})


def _first_columns(out: Tensor, width: int) -> Tensor:
    return out if out.shape[-1] == width else out[..., :width].contiguous()


def _check_bias(a: RelPos, call: Call) -> None:
    if a.bias is not None:
        checks.position_bias(a.bias, a.q, padded=call.chosen == "triton")


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
    RelPos(q, q, q, table, window).check()
    chosen = "triton" if resolve(backend, table, has_flash=True) == "triton" else "cpu"
    return _make_bias(table, window, scale, dtype, chosen, head_dim)


def _make_bias(
    table: Tensor,
    window: tuple[int, int],
    scale: float,
    dtype: torch.dtype,
    backend: str,
    head_dim: int,
) -> Tensor:
    if backend != "triton":
        return _bias(table, window)
    scale = _scale_of_bias(scale, dtype)
    name = f"padded bias {window} {dtype} {scale} {head_dim}"
    return cached(
        name, (table,), lambda: _relpos_bias(table.detach(), *window, dtype, scale, False, head_dim)
    )


def _composed(a: RelPos) -> Tensor:
    """PyTorch's own attention with the bias as its mask: what `auto` runs where no kernel applies."""
    bias = reference.position_bias(a.table, a.window)[None]
    # Half precision has its digits near 0, and no softmax sees what a row has in common.
    bias = bias - bias.detach().amax(-1, keepdim=True)
    if a.key_mask is not None:
        bias = bias.masked_fill(~a.key_mask[:, None, None, :], -torch.inf)
    q, k, v = (t.transpose(1, 2) for t in a[:3])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=a.scale)
    return _laid_out(out.transpose(1, 2))


def _laid_out(out: Tensor) -> Tensor:
    """The result of PyTorch's attention; in an exported graph a copy, since its decomposition has other strides."""
    return (
        out.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else out
    )


def _bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    return cached(
        f"position bias {window}", (table,), lambda: attention.position_bias(table.detach(), window)
    )


def _make_relpos_bias(
    table: Tensor,
    height: int,
    width: int,
    dtype: torch.dtype,
    scale: float,
    turned: bool,
    head_dim: int = 0,
) -> Tensor:
    from .triton.relpos_table import materialise_bias

    fragments = _in_fragments(head_dim, dtype, table.device, turned=turned)
    return materialise_bias(
        table, (height, width), dtype, scale, turned=turned, fragments=fragments
    )


def _in_fragments(head_dim: int, dtype: torch.dtype, device: torch.device, *, turned: bool) -> bool:
    """Whether a bias is stored in fragments; fakes ask too, possibly without Triton or a GPU."""
    on_gpu = (
        device.type == "cuda" and torch.cuda.is_available()
    ) or emulated_architecture() is not None
    if not head_dim or turned or not on_gpu:
        return False
    from .triton.relpos_table import takes_fragments

    return takes_fragments(head_dim, dtype, device)


def _relpos_bias_fake(
    table: Tensor,
    height: int,
    width: int,
    dtype: torch.dtype,
    scale: float,
    turned: bool,
    head_dim: int = 0,
) -> Tensor:
    fragments = _in_fragments(head_dim, dtype, table.device, turned=turned)
    shape = checks.bias_shape(1 + height * width, table.shape[1], fragments=fragments)
    return table.new_empty(shape, dtype=torch.float32 if dtype == torch.float32 else torch.float16)


def _padded_bias(a: RelPos) -> Tensor:
    return (
        _make_relpos_bias(a.table, *a.window, a.q.dtype, a.scale, turned=False)
        if a.bias is None
        else a.bias
    )


def _relpos_forward(a: RelPos, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from .triton.relpos_attention import relpos_attention_forward

        return relpos_attention_forward(a.q, a.k, a.v, _padded_bias(a), a.scale)
    bias = _bias(a.table, _pair(a.window)) if a.bias is None else a.bias
    return biased_attention(a.q, a.k, a.v, a.scale, bias[None]), a.q.new_empty(
        0, dtype=torch.float32
    )


def _pair(window: Sequence[int]) -> tuple[int, int]:
    """A window, of which an operator makes a list."""
    return window[0], window[1]


def _relpos_fake(a: RelPos, backend: str) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = a.q.shape
    lse = (batch, heads, tokens) if backend == "triton" else (0,)
    return a.q.new_empty(a.q.shape), a.q.new_empty(lse, dtype=torch.float32)


def _relpos_backward(
    upstream: Gradients, a: RelPos, outputs: Sequence[Tensor], needs: Sequence[bool], backend: str
) -> Gradients:
    (dout,), table, window = upstream, a.table, _pair(a.window)
    assert dout is not None
    if backend == "triton":
        from .triton.relpos_attention import relpos_attention_backward

        dq, dk, dv, dtable = relpos_attention_backward(dout, a._replace(window=window), *outputs)
        return dq, dk, dv, dtable.to(table.dtype)
    bias = _bias(table, window) if a.bias is None else a.bias
    dq, dk, dv, dbias = attention_backward(dout, *a[:3], a.scale, bias[None], bias_gradient=True)
    assert dbias is not None
    return dq, dk, dv, attention.table_gradient(dbias[0], window, table.shape[0]).to(table.dtype)


def _relpos_gradient(
    call: Any,
    upstream: Gradients,
    a: RelPos,
    outputs: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
) -> Gradients:
    if backend == "triton":
        # Outside the operator too.
        a = a._replace(turned=_relpos_bias(a.table.detach(), *a.window, a.q.dtype, a.scale, True))
    return call(upstream, a, outputs, needs, backend)


_relpos_bias = operator(
    "relpos_bias(Tensor table, int height, int width, ScalarType dtype, float scale, bool turned, "
    "int head_dim=0) -> Tensor",
    _make_relpos_bias,
    _relpos_bias_fake,
)
_relpos = differentiable(
    "relpos_attention",
    RelPos,
    _relpos_forward,
    _relpos_fake,
    _relpos_backward,
    wrt=("q", "k", "v", "table"),
    outputs=2,
    around=_relpos_gradient,
    # Not the table: a converted copy would be rounded, and the bias recomputed at every call.
    autocast=(0, 1, 2),
)
_relpos_attention = Op(
    "relpos_attention",
    RelPos,
    {"inference": _relpos_inference, "kernel": _relpos_kernel, "reference": _relpos_reference},
    fits={"triton": lambda a: a.q.shape[-1] <= HEAD_DIMS[-1]},
    attention=True,
)


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
    given = Varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, dropout_p, seed, key_mask
    )
    return _varlen_attention(given, backend)


def _varlen_reference(a: Varlen, call: Call) -> Tensor:
    if torch.compiler.is_exporting():
        return _padded(a)
    if (
        a.q.device.type == "cpu"
        and not named(call.backend)
        and not transformed()
        and not torch.jit.is_tracing()
    ):
        # The definition reads offsets, whose values `make_fx` and fakes do not have; these can record the operator.
        return _varlen_kernel(a, call._replace(chosen="cpu"))
    if call.chosen == "flash_attn":
        if a.dropout_p and a.seed is not None:
            raise InputError(
                "backend 'flash_attn' draws its dropout itself and takes no seed; use 'auto' or 'triton'"
            )
        return _flash_attention(a)
    a.packed.bounds(a.q, a.k)
    return reference.varlen_attention(*a[:5], a.scale, a.dropout_p, a.key_mask, a.seed)


def _varlen_inference(a: Varlen, call: Call) -> Tensor:
    # Of one caption, the operator would take as long as the attention.
    return varlen.varlen_attention(*a[:3], *a.packed.bounds(a.q, a.k), a.scale, None, a.key_mask)


def _varlen_kernel(a: Varlen, call: Call) -> Tensor:
    if call.chosen == "triton" and not named(call.backend) and _flash_is_faster(a):
        return _flash_attention(a)
    a = a._replace(seed=checks.drawn_seed(a.dropout_p, a.seed, a.q.device))
    if call.chosen != "triton":
        return _varlen(a, call.chosen)[0]
    if a.q.shape[-1] > HEAD_DIMS[-1]:
        return _in_batches(a, call)
    return _first_columns(_varlen(_with_heads_of(HEAD_DIMS, a), call.chosen)[0], a.q.shape[-1])


def _in_batches(a: Varlen, call: Call) -> Tensor:
    """Attention of sequences that are padded to the longest: the kernels for packed ones have no heads so wide."""
    if checks.should_check_values(a.q):
        a.packed.bounds(a.q, a.k)
    queries, _ = _padded_places(a.cu_seqlens_q, a.max_q, a.q)
    keys, there = _padded_places(a.cu_seqlens_k, a.max_k, a.k)
    # Places without a token read a row of zeros: a weight of 0 would let a NaN of another sequence through.
    q, k, v = (
        F.pad(t, (0, 0, 0, 0, 0, 1))[places]
        for t, places in zip(a[:3], (queries, keys, keys), strict=True)
    )
    if a.key_mask is not None:
        there = there & F.pad(a.key_mask, (0, 1))[keys]
    bias = torch.zeros(1, 1, 1, 1, device=q.device)
    out = bias_attention(
        q, k, v, bias, there, a.dropout_p, scale=a.scale, seed=a.seed, backend=call.backend
    )
    bounds = a.cu_seqlens_q.contiguous()
    tokens = torch.arange(a.q.shape[0], dtype=bounds.dtype, device=q.device)
    sequences = torch.searchsorted(bounds[1:], tokens, right=True)
    return out[sequences, tokens - bounds[sequences]]


def _padded_places(bounds: Tensor, longest: int, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[S, longest]` of all places of sequences, one behind the last where there is no token; and where one is."""
    places = torch.arange(longest, device=packed.device)
    there = places < bounds.diff()[:, None]
    return torch.where(there, bounds[:-1, None] + places, packed.shape[0]), there


def _padded(a: Varlen) -> Tensor:
    """Attention of sequences that all have their greatest length: in an exported graph no value decides on a shape."""
    texts = a.cu_seqlens_q.shape[0] - 1
    q = a.q.view(texts, a.max_q, *a.q.shape[1:]).transpose(1, 2)
    k, v = (t.view(texts, a.max_k, *t.shape[1:]).transpose(1, 2) for t in (a.k, a.v))
    mask = None if a.key_mask is None else a.key_mask.view(texts, 1, 1, a.max_k)
    out = F.scaled_dot_product_attention(q, k, v, mask, a.dropout_p, scale=a.scale)
    return _laid_out(out.transpose(1, 2)).flatten(0, 1)


def _flash_attention(a: Varlen) -> Tensor:
    if checks.should_check_values(a.q):
        a.packed.bounds(a.q, a.k)
    q, k, v = a[:3]
    if (dtype := autocast_dtype(q.device)) is not None:
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    return flash.varlen_attention(q, k, v, a.packed)


def _flash_is_faster(a: Varlen) -> bool:
    """Whether `tune` measured flash-attn to be faster for these sequences on this GPU, and it is installed."""
    if torch.compiler.is_compiling() or a.key_mask is not None or a.dropout_p or not a.q.numel():
        return False
    from .triton.varlen_attention import tuned_backends

    gradient = torch.is_grad_enabled() and (a.q.requires_grad or a.k.requires_grad)
    backends = tuned_backends(
        a.q, a.k, a.packed, autocast_dtype(a.q.device) or a.q.dtype, gradient=gradient
    )
    return (
        backends == {"flash_attn"}
        and _why_not("flash_attn", a.q.device.type, a.q.device.index) is None
    )


def _varlen_forward(a: Varlen, backend: str) -> tuple[Tensor, Tensor]:
    packed = a.packed
    if backend == "triton":
        from .triton.varlen_attention import varlen_attention_forward

        if checks.should_check_values(a.q):
            packed.bounds(a.q, a.k)
        return varlen_attention_forward(a.q, a.k, a.v, packed)
    dropout = None if a.seed is None else Dropout(a.dropout_p, a.seed)
    out = varlen.varlen_attention(*a[:3], *packed.bounds(a.q, a.k), a.scale, dropout, a.key_mask)
    return out, a.q.new_empty(0, dtype=torch.float32)


def _varlen_fake(a: Varlen, backend: str) -> tuple[Tensor, Tensor]:
    lse = (a.q.shape[1], a.q.shape[0]) if backend == "triton" else (0,)
    return a.q.new_empty(a.q.shape), a.q.new_empty(lse, dtype=torch.float32)


def _varlen_backward(
    upstream: Gradients, a: Varlen, outputs: Sequence[Tensor], needs: Sequence[bool], backend: str
) -> Gradients:
    (dout,), packed = upstream, a.packed
    assert dout is not None
    if backend == "triton":
        from .triton.varlen_attention import varlen_attention_backward

        return varlen_attention_backward(dout, *a[:3], *outputs, packed)
    # The same seed draws the masks of the forward pass again.
    dropout = None if a.seed is None else Dropout(a.dropout_p, a.seed)
    bounds = packed.bounds(a.q, a.k)
    return varlen.varlen_attention_backward(dout, *a[:3], *bounds, a.scale, dropout, a.key_mask)


_varlen = differentiable(
    "varlen_attention",
    Varlen,
    _varlen_forward,
    _varlen_fake,
    _varlen_backward,
    wrt=("q", "k", "v"),
    outputs=2,
    autocast=True,
)
_varlen_attention = Op(
    "varlen_attention",
    Varlen,
    {"inference": _varlen_inference, "kernel": _varlen_kernel, "reference": _varlen_reference},
    fits={"triton": lambda a: a.q.shape[-1] <= BIAS_HEAD_DIMS[-1]},
    attention=True,
)


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
    given = Biased(q, k, v, bias, key_mask, dropout_p, seed, checks.scale_of(q, scale), return_lse)
    out, lse = _bias_attention(given, backend)
    return (out, lse) if return_lse else out


def _expanded(a: Biased) -> Biased:
    return a._replace(bias=a.bias.expand(-1, a.q.shape[2], a.q.shape[1], a.k.shape[1]))


def _bias_reference(a: Biased, call: Call) -> tuple[Tensor, Tensor]:
    if call.chosen == "flash_attn":
        raise InputError("backend 'flash_attn' has no bias; use 'auto', 'triton' or 'cpu'")
    return reference.bias_attention(*_expanded(a)[:4], a.scale, a.key_mask, a.dropout_p, a.seed)


def _bias_kernel(a: Biased, call: Call) -> tuple[Tensor, Tensor]:
    a, width = (
        _expanded(a._replace(seed=checks.drawn_seed(a.dropout_p, a.seed, a.q.device))),
        a.q.shape[-1],
    )
    out, lse = _biased(
        _with_heads_of(BIAS_HEAD_DIMS, a) if call.chosen == "triton" else a, call.chosen
    )
    return _first_columns(out, width), lse


def _lse_room(a: Biased) -> tuple[int, ...]:
    return (a.q.shape[0], a.q.shape[2], a.q.shape[1]) if a.return_lse else (0,)


def _lse_type(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _hiding(a: Biased) -> Hiding | None:
    """The hidden keys; None if every query sees every key, which saves passes over the scores."""
    if a.key_mask is None and a.bias.numel() and host.number(a.bias.amin()) > reference.HIDDEN:
        return None
    return Hiding(a.key_mask)


def _biased_forward(a: Biased, backend: str) -> tuple[Tensor, Tensor]:
    q, k, v, bias, _, dropout_p, seed, scale, return_lse = a
    if backend == "triton":
        from .triton.bias_attention import bias_attention_forward

        return bias_attention_forward(a)
    lse = torch.full(_lse_room(a), -torch.inf, dtype=_lse_type(q))
    if not q.numel() or not k.numel():
        return torch.zeros(q.shape, dtype=q.dtype), lse
    hiding = _hiding(a)
    if hiding is None and seed is None and not return_lse:
        bias = bias.to(q.dtype)
        return biased_attention(
            q, k, v, scale, bias if bias.shape[0] > 1 else bias.contiguous()
        ), lse
    dropout = None if seed is None else Dropout(dropout_p, seed)
    return tiled_attention(q, k, v, scale, bias, dropout, hiding, lse if return_lse else None), lse


def _biased_fake(a: Biased, backend: str) -> tuple[Tensor, Tensor]:
    shape = _lse_room(a._replace(return_lse=a.return_lse or backend == "triton"))
    return a.q.new_empty(a.q.shape), a.q.new_empty(shape, dtype=_lse_type(a.q))


def _biased_backward(
    upstream: Gradients, a: Biased, outputs: Sequence[Tensor], needs: Sequence[bool], backend: str
) -> Gradients:
    dout, dlse = upstream
    q, k, v, bias, _, dropout_p, seed, scale, _ = a
    dout = torch.zeros_like(outputs[0]) if dout is None else dout
    if backend == "triton":
        from .triton.bias_attention import bias_attention_backward

        return bias_attention_backward(dout, dlse, a, *outputs, bias_gradient=needs[3])
    if not q.numel() or not k.numel():
        return [torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v, bias)]
    # The same seed draws the masks of the forward pass again.
    dropout = None if seed is None else Dropout(dropout_p, seed)
    dq, dk, dv, dbias = attention_backward(
        dout, q, k, v, scale, bias, dropout, bias_gradient=needs[3], hiding=_hiding(a), dlse=dlse
    )
    return dq, dk, dv, None if dbias is None else dbias.to(bias.dtype)


_biased = differentiable(
    "bias_attention",
    Biased,
    _biased_forward,
    _biased_fake,
    _biased_backward,
    wrt=("q", "k", "v", "bias"),
    outputs=2,
    results=lambda a, _: 2 if a.return_lse else 1,
)
_bias_attention = Op(
    "bias_attention",
    Biased,
    {"kernel": _bias_kernel, "reference": _bias_reference},
    fits={"triton": lambda a: a.q.shape[-1] <= BIAS_HEAD_DIMS[-1]},
    attention=True,
)
