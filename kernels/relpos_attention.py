"""Self-attention with a relative position bias (BEiT): implementations and public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError

from . import checks, reference
from .backend import (
    Backend,
    autocast_dtype,
    emulated_architecture,
    named,
    resolve,
    transformed,
)
from .bias_attention import pad_heads, unpad_heads
from .caching import cached
from .checks import HEAD_DIMS, RelPos
from .cpu import attention as cpu
from .ladder import Call, Op
from .library import Gradients, Needs, Outputs, Upstream, differentiable, operator

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
    """Return self-attention of a window of patches and a class token with a learned relative position bias (BEiT).

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
    args = RelPos(q, k, v, table, window, checks.scale_of(q, scale), key_mask, bias)
    return RELPOS_ATTENTION(args, backend)


def _run_reference(a: RelPos, call: Call) -> Tensor:
    if call.backend == "flash_attn":
        raise InputError("backend 'flash_attn' has no position bias; use 'auto', 'triton' or 'cpu'")
    _check_bias(a, call)
    if call.backend == "reference" and (named(call.requested) or transformed()):
        return reference.relpos_attention(a.q, a.k, a.v, a.table, a.window, a.scale, a.key_mask)
    return _compose(a)


def _infer(a: RelPos, call: Call) -> Tensor:
    if a.key_mask is not None:
        return _run_kernel(a, call)
    # The operator would take a tenth of the attention's time.
    _check_bias(a, call)
    return _forward(a, "cpu")[0]


def _run_kernel(a: RelPos, call: Call) -> Tensor:
    _check_bias(a, call)
    if a.key_mask is not None:
        if call.backend == "triton" and named(call.requested):
            raise InputError(
                "backend 'triton' has no key_mask for relpos_attention; use 'auto' or 'reference'"
            )
        return _compose(a)
    if call.backend != "triton":
        return _run_operator(a, call.backend)[0]
    width = a.q.shape[-1]
    pad_heads(a, HEAD_DIMS)
    # Autocast converts q, k and v on their way into the operator, but not the table.
    dtype = a.q.dtype if a.q.dtype == torch.float64 else autocast_dtype(a.q.device) or a.q.dtype
    if a.bias is None:
        # Outside the operator, so that a graph contains its computation.
        a.bias = _make_bias(a.table, a.window, a.scale, dtype, call.backend, a.q.shape[-1])
    scale = _bias_scale(a.scale, dtype)
    if scale != a.scale:
        # By a power of two, which rounds nothing that counts beside the bias.
        a.q, a.scale = a.q * (a.scale / scale), scale
    return unpad_heads(_run_operator(a, call.backend)[0], width)


def _bias_scale(scale: float, dtype: torch.dtype) -> float:
    """Return the scale that a stored bias is divided by: the scores' own, or a larger one in half precision."""
    while dtype.itemsize == 2 and scale < _LEAST_SCALE:
        scale *= 2
    return scale


def _check_bias(a: RelPos, call: Call) -> None:
    if a.bias is not None:
        checks.position_bias(a.bias, a.q, padded=call.backend == "triton")


def relpos_bias(
    table: Tensor,
    window: tuple[int, int],
    *,
    dtype: torch.dtype,
    scale: float,
    head_dim: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Compute the bias of `relpos_attention` in its implementation's layout, an opaque tensor to pass as `bias`.

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
    layout = "triton" if resolve(backend, table, has_flash=True) == "triton" else "cpu"
    heads = table.shape[-1] if table.ndim else 0
    q = torch.empty((1, 1 + window[0] * window[1], heads, 1), device="meta")
    RelPos(q, q, q, table, window).check()
    return _make_bias(table, window, scale, dtype, layout, head_dim)


def _make_bias(
    table: Tensor,
    window: tuple[int, int],
    scale: float,
    dtype: torch.dtype,
    backend: str,
    head_dim: int,
) -> Tensor:
    if backend != "triton":
        return _cpu_bias(table, window)
    scale = _bias_scale(scale, dtype)
    return cached(
        f"padded bias {window} {dtype} {scale} {head_dim}",
        (table,),
        lambda: _materialise(table.detach(), *window, dtype, scale, False, head_dim),
    )


def _compose(a: RelPos) -> Tensor:
    """Run PyTorch's own attention with the bias as its mask, where no kernel applies."""
    bias = reference.position_bias(a.table, a.window)[None]
    # Half precision has its digits near 0, and a softmax ignores what a row has in common.
    bias = bias - bias.detach().amax(-1, keepdim=True)
    if a.key_mask is not None:
        bias = bias.masked_fill(~a.key_mask[:, None, None, :], -torch.inf)
    q, k, v = (t.transpose(1, 2) for t in (a.q, a.k, a.v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=a.scale)
    out = out.transpose(1, 2)
    # The decomposition in an exported graph has other strides.
    return out.contiguous() if torch.compiler.is_exporting() else out


def _cpu_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    return cached(
        f"position bias {window}", (table,), lambda: cpu.position_bias(table.detach(), window)
    )


def _materialise_forward(
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
    window = (height, width)
    return materialise_bias(table, window, dtype, scale, turned=turned, fragments=fragments)


def _in_fragments(head_dim: int, dtype: torch.dtype, device: torch.device, *, turned: bool) -> bool:
    """Return whether a bias is stored in fragments; fakes ask too, possibly without Triton or a GPU."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if not head_dim or turned or not (on_gpu or emulated_architecture() is not None):
        return False
    from .triton.relpos_table import takes_fragments

    return takes_fragments(head_dim, dtype, device)


def _materialise_fake(
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


_materialise = operator(
    "relpos_bias(Tensor table, int height, int width, ScalarType dtype, float scale, bool turned, "
    "int head_dim=0) -> Tensor",
    _materialise_forward,
    _materialise_fake,
)


def _pair(window: Sequence[int]) -> tuple[int, int]:
    """Return a window as a tuple; an operator receives a list."""
    return window[0], window[1]


def _forward(a: RelPos, backend: str) -> tuple[Tensor, Tensor]:
    window, bias = _pair(a.window), a.bias
    if backend == "triton":
        from .triton.relpos_attention import relpos_attention_forward

        if bias is None:
            bias = _materialise_forward(a.table, *window, a.q.dtype, a.scale, turned=False)
        return relpos_attention_forward(a.q, a.k, a.v, bias, a.scale)
    if bias is None:
        bias = _cpu_bias(a.table, window)
    out = cpu.biased_attention(a.q, a.k, a.v, a.scale, bias[None])
    return out, a.q.new_empty(0, dtype=torch.float32)


def _fake(a: RelPos, backend: str) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = a.q.shape
    lse = (batch, heads, tokens) if backend == "triton" else (0,)
    return a.q.new_empty(a.q.shape), a.q.new_empty(lse, dtype=torch.float32)


def _backward(
    upstream: Upstream, a: RelPos, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    (dout,), (out, lse), a.window = upstream, outputs, _pair(a.window)
    assert dout is not None
    if backend == "triton":
        from .triton.relpos_attention import relpos_attention_backward

        dq, dk, dv, dtable = relpos_attention_backward(dout, a, out, lse)
    else:
        bias = _cpu_bias(a.table, a.window) if a.bias is None else a.bias
        dq, dk, dv, dbias = cpu.attention_backward(
            dout, a.q, a.k, a.v, a.scale, bias[None], bias_gradient=True
        )
        assert dbias is not None
        dtable = cpu.table_gradient(dbias[0], a.window, a.table.shape[0])
    return {"q": dq, "k": dk, "v": dv, "table": dtable.to(a.table.dtype)}


def _materialise_turned(
    call: Any, upstream: Upstream, a: RelPos, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    if backend == "triton":
        # Outside the operator too.
        a.turned = _materialise(a.table.detach(), *a.window, a.q.dtype, a.scale, True)
    return call(upstream, a, outputs, needs, backend)


_run_operator = differentiable(
    "relpos_attention",
    RelPos,
    _forward,
    _fake,
    _backward,
    outputs=2,
    around=_materialise_turned,
    # Not the table: a converted copy would be rounded, and the bias recomputed at every call.
    autocast=("q", "k", "v"),
)
RELPOS_ATTENTION = Op(
    "relpos_attention",
    RelPos,
    {"inference": _infer, "kernel": _run_kernel, "reference": _run_reference},
    fits={"triton": lambda a: a.q.shape[-1] <= HEAD_DIMS[-1]},
    attention=True,
)
