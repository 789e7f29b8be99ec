"""Linear layers in int8 on CPU, for inference: weights rounded once for each channel, activations for each token.

Which products run so is a mark on the weight (see `marked`). Attention, norms and everything else stay in the
activations' type.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from xfm_fast.errors import UnavailableError

from .. import host, reference
from ..derived import derived
from .workspace import scratch

_LEVELS = 127
# oneDNN has fast products of unsigned with signed bytes only; it takes what stands for 0 out of the sums.
_ZERO = 128
# GELU has its minimum at -0.17, so that most levels can be for positive values.
_GELU_ZERO, _LEAST_GELU = 32, 0.17
_NO_FRACTIONS = 1.5 * 2**23
# Rows of a slice for each thread: what a wide hidden layer makes of them stays in cache.
_SLICE_ROWS, _MOST_ROWS = 400, 4096
# Below any activation that is not zero.
_SMALLEST = 1e-30
# A product of the model's own width: of a small one, most of the time is that of making bytes.
_PROBE = (208, 768, 768)
_ROUNDS = 5


def require() -> None:
    """Raise if int8 is not to be had.

    Raises:
        UnavailableError: says why, and what to take instead.
    """
    reason = why_not()
    if reason is not None:
        raise UnavailableError(f"dtype='int8' is not offered here: {reason}; use float32 or bfloat16")


@cache
def why_not() -> str | None:
    """The reason why products of bytes are of no use here; None if they are exact and faster than fp32."""
    n, k, m = _PROBE
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, weight = torch.randn(n, k, generator=generator), torch.randn(m, k, generator=generator)
        # Sums of the largest bytes, which processors without the instructions for them cut off.
        x[0], weight[0] = 1, 1
        try:
            packed = _pack(weight)
            found = _multiplied(x, packed, None)
        except (RuntimeError, AttributeError, TypeError, NotImplementedError) as failure:
            return f"PyTorch {torch.__version__} has no such product on this processor ({str(failure).splitlines()[0]})"
        wanted = reference.linear(reference.as_int8(x), reference.as_int8(weight), None)
        if not host.number((found - wanted).abs().max()) <= 1e-4 * host.number(wanted.abs().max()):
            return "sums of bytes are cut off by this processor, which lacks VNNI instructions"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            bytes_s, fp32_s = (
                _seconds(product)
                for product in (lambda: _multiplied(x, packed, None), lambda: torch.nn.functional.linear(x, weight))
            )
        finally:
            torch.set_num_threads(threads)
    return None if bytes_s < fp32_s else "products of bytes are slower than those of float32 on this processor"


def _seconds(product: Callable[[], Tensor]) -> float:
    """The best processor time of several calls."""
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.thread_time()
        product()
        best = min(best, time.thread_time() - start)
    return best


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` for x `[..., K]`, weight `[M, K]`; sums in fp32, the result in the type of x."""
    rows, factors = x.reshape(-1, x.shape[-1]), _factors(weight, bias)
    out = _by_slices(lambda part: _multiplied(rows[part], *factors), rows.shape[0], weight.shape[0], x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`gelu(x W^T + b)`, erf form."""
    rows, factors = x.reshape(-1, x.shape[-1]), _factors(weight, bias)
    gelu = torch.ops.aten.gelu_
    out = _by_slices(lambda part: gelu(_multiplied(rows[part], *factors)), rows.shape[0], weight.shape[0], x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None) -> Tensor:
    """`residual + gamma · (x W^T + b)`. LayerScale is a factor of the weight's scales."""
    rows, sums = x.reshape(-1, x.shape[-1]), residual.reshape(-1, weight.shape[0])
    factors = _factors(weight, bias, gamma)
    branch = lambda part: _multiplied(rows[part], *factors).add_(sums[part])  # noqa: E731
    return _by_slices(branch, sums.shape[0], sums.shape[1], residual.dtype).view(residual.shape)


def mlp_residual(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None,
) -> Tensor:
    """`residual + gamma · (gelu(x W1^T + b1) W2^T + b2)`, a slice of rows at a time; the hidden layer is fp32."""
    rows, sums = x.reshape(-1, x.shape[-1]), residual.reshape(-1, weight_out.shape[0])
    first, second = _factors(weight_in, bias_in), _factors(weight_out, bias_out, gamma)

    def branch(part: slice) -> Tensor:
        hidden = torch.ops.aten.gelu_(_multiplied(rows[part], *first))
        return _multiplied(hidden, *second, gelu=True).add_(sums[part])

    return _by_slices(branch, sums.shape[0], sums.shape[1], residual.dtype).view(residual.shape)


class _Packed(NamedTuple):
    """A weight in bytes.

    Attributes:
        tensor: `[K, M]` in oneDNN's layout, with the sums that the shift of the activations adds.
        scales: `[M]`, fp32.
        zeros: `[M]`, the bytes that stand for 0.
    """

    tensor: Tensor
    scales: Tensor
    zeros: Tensor


def _pack(weight: Tensor) -> _Packed:
    dense = weight.detach().float()
    scales = dense.abs().amax(1).clamp_min_(_SMALLEST).div_(_LEVELS)
    levels = (dense * scales.reciprocal()[:, None]).round_().to(torch.int8)
    tensor = torch.ops.onednn.qlinear_prepack(levels, None)
    return _Packed(tensor, scales, torch.zeros(weight.shape[0], dtype=torch.int32))


def _factors(weight: Tensor, bias: Tensor | None, gamma: Tensor | None = None) -> tuple[_Packed, Tensor | None]:
    """A weight in bytes and its bias in fp32, both times gamma."""
    packed = derived("int8", (weight,), lambda: _pack(weight))
    wide = None if bias is None else bias.float()
    if gamma is None:
        return packed, wide
    scales = derived("int8 layer-scaled", (weight, gamma), lambda: packed.scales * gamma.float())
    return packed._replace(scales=scales), None if wide is None else wide * gamma.float()


def _by_slices(make: Callable[[slice], Tensor], rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """`make` of all rows, in fp32, as one tensor `[rows, width]` of a type; of many in slices of about one length."""
    most = min(_SLICE_ROWS * torch.get_num_threads(), _MOST_ROWS)
    if rows <= most:
        return make(slice(rows)).to(dtype)
    out = torch.empty(rows, width, dtype=dtype)
    step = -(-rows // -(-rows // most))
    for start in range(0, rows, step):
        out[start : start + step] = make(slice(start, start + step))
    return out


def _multiplied(rows: Tensor, packed: _Packed, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """`x W^T + b` in fp32, of rows `[n, K]`; gelu: those of a GELU, as in `reference.as_int8`."""
    zero = _GELU_ZERO if gelu else _ZERO
    scales = _gelu_scales(rows) if gelu else _scales(rows)
    levels = torch.ops.onednn.qlinear_pointwise(
        _quantised(rows, scales.reciprocal(), zero),
        *(1.0, zero),
        *packed,
        *(None, 1.0, 0, torch.float32, "none", [], ""),
    )
    return levels.mul_(scales) if bias is None else torch.addcmul(bias, levels, scales, out=levels)


def _scales(rows: Tensor) -> Tensor:
    """The step between levels of each row, `[n, 1]` in fp32."""
    if rows.dtype == torch.bfloat16:
        # Bits without the sign have the order of the values, and integers are compared faster.
        shape = (rows.shape[0], rows.shape[1])
        bits = torch.bitwise_and(rows.view(torch.int16), 0x7FFF, out=scratch("int8 bits", shape, torch.int16))
        largest = bits.amax(1, keepdim=True).view(torch.bfloat16).float()
    else:
        largest = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())
    return largest.clamp_min_(_SMALLEST).div_(_LEVELS)


def _gelu_scales(rows: Tensor) -> Tensor:
    """`_scales` of rows in fp32 that have no large negative value."""
    return rows.amax(1, keepdim=True).div_(255 - _GELU_ZERO).clamp_min_(_LEAST_GELU / _GELU_ZERO)


def _quantised(rows: Tensor, factors: Tensor, zero: int) -> Tensor:
    """Rows `[n, K]` times their factors as unsigned bytes, of which `zero` stands for 0."""
    shape = (rows.shape[0], rows.shape[1])
    levels = scratch("int8 levels", shape, torch.float32)
    if rows.dtype == torch.float32:
        torch.mul(rows, factors, out=levels)
    else:
        # Operands of two types are multiplied one by one.
        levels.copy_(rows).mul_(factors)
    # So large a number leaves no room for fractions: the sum is rounded, and its lowest byte is the level.
    levels.add_(_NO_FRACTIONS + zero)
    return scratch("int8", shape, torch.uint8).copy_(levels.view(torch.int32))
