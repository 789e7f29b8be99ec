"""Linear layers in int8 on CPU, for inference: weights rounded once per channel, activations per token.

oneDNN runs them, or a kernel compiled by LLVM that applies scales, bias, residual and GELU before it writes, whichever
measured faster.

A flag on the weight (see `flags`) allows int8, and a measurement decides: quantising takes several passes over the
activations, which costs more than int8 gains where 16-bit GEMMs are fast, as with AMX. Attention and norms keep the
activations' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from xfm_fast.errors import UnavailableError

from .. import host, reference
from ..caching import cached
from . import gemm, llvm
from .llvm import NO_FRACTIONS, ZERO_BYTE
from .selection import Race, compare, operands, register, select, thread_seconds
from .workspace import even_slices, in_dtype, scratch

if TYPE_CHECKING:
    from .llvm.linear import Norm, Panels

# Rows of a slice for each thread, and of all: a wide hidden layer of them stays in cache.
_SLICE_ROWS, _MOST_ROWS = 400, 4096
# fp32 values that stay in a core's own cache while they are quantised.
_BLOCK = 1 << 18
# A GEMM of the model's width: in a small one, most of the time goes into quantising.
_PROBE = (208, 768, 768)
# Rows of the timed GEMMs, and the limit below which the timing of few rows decides.
_MANY_ROWS, _FEW_ROWS, _FEW = 400, 16, 64


def require() -> None:
    """Raise UnavailableError where int8 is unavailable."""
    reason = why_not()
    if reason is not None:
        raise UnavailableError(
            f"dtype='int8' is not offered here: {reason}; use float32 or bfloat16"
        )


@cache
def why_not() -> str | None:
    """Return the reason why int8 GEMMs are unavailable; None if they are exact and faster than fp32."""
    n, k, m = _PROBE
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, weight = torch.randn(n, k, generator=generator), torch.randn(m, k, generator=generator)
        # Sums of the largest bytes, which saturate on processors without VNNI.
        x[0] = weight[0] = reference.rotate(torch.ones(k))
        try:
            result = _onednn_linear(x, weight, None)
        except (RuntimeError, AttributeError, TypeError, NotImplementedError) as failure:
            reason = str(failure).splitlines()[0]
            return f"PyTorch {torch.__version__} has no int8 GEMM on this processor ({reason})"
        truth = reference.linear(reference.as_int8(x), reference.as_int8(weight), None)
        error, largest = (host.number(t.abs().max()) for t in (result - truth, truth))
        if not error <= 1e-4 * largest:
            return "int8 sums saturate on this processor, which lacks VNNI instructions"
        candidates = {"int8": _onednn_linear, "fp32": torch.nn.functional.linear}
        seconds, _ = thread_seconds(candidates, (x, weight, None))
    if seconds["int8"] < seconds["fp32"]:
        return None
    return "int8 GEMMs are slower than float32 on this processor"


def is_faster(operation: str, x: Tensor, weight: Tensor) -> bool:
    """Return whether int8 measured faster for linear, linear_residual or mlp_residual, with few rows or with many."""
    rows, dtype = x.shape[:-1].numel(), x.dtype
    if dtype != weight.dtype:
        # The floats would have to be converted at every call.
        return True
    suffix = " of few rows" if rows < _FEW else ""
    return select(f"{operation} in 8 bits{suffix}", dtype) == "int8"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: Norm | None = None) -> Tensor:
    """Return `x W^T + b` for x `[..., K]`, or its LayerNorm, weight `[M, K]`, in the dtype of x."""
    if _library(x.dtype, weight) == "llvm":
        return _compiled_linear(x, weight, bias, norm=norm)
    return _onednn_linear(x if norm is None else reference.layer_norm(x, *norm), weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `gelu(x W^T + b)`, erf form."""
    if _library(x.dtype, weight) == "llvm":
        return _compiled_linear(x, weight, bias, gelu=True)
    return torch.ops.aten.gelu_(_onednn_linear(x, weight, bias))


def linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None
) -> Tensor:
    """Return `residual + gamma · (x W^T + b)`. LayerScale is a factor of the weight's scales."""
    rows, sums = x.reshape(-1, x.shape[-1]), residual.reshape(-1, weight.shape[0])
    if _library(x.dtype, weight) == "llvm":
        return Prepared.of(weight, bias, gamma)(rows, sums).view(residual.shape)
    packed, wide = _pack(weight, bias, gamma)
    levels, steps = _quantise(rows, x.dtype)
    out = torch.empty_like(sums)
    _add_branch(_gemm(levels, packed, torch.float32), steps, wide, sums, out)
    return out.view(residual.shape)


def mlp_residual(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None,
    *,
    norm: Norm | None = None,
) -> Tensor:
    """Return `residual + gamma · (gelu(norm(x) W1^T + b1) W2^T + b2)`, by slices of rows; the hidden layer is fp32."""
    rows, sums = x.reshape(-1, x.shape[-1]), residual.reshape(-1, weight_out.shape[0])
    if _library(x.dtype, weight_in) == _library(x.dtype, weight_out) == "llvm":
        first, second = Prepared.of(weight_in, bias_in), Prepared.of(weight_out, bias_out, gamma)
        return prepared_mlp(first, second, rows, sums, norm=norm).view(residual.shape)
    out = torch.empty_like(sums)
    rows = rows if norm is None else reference.layer_norm(rows, *norm)
    packed_in, wide_in = _pack(weight_in, bias_in)
    packed_out, wide_out = _pack(weight_out, bias_out, gamma)
    limit = min(_SLICE_ROWS * torch.get_num_threads(), _MOST_ROWS)
    for chunk in even_slices(len(rows), limit):
        levels, steps = _quantise(rows[chunk], x.dtype)
        hidden = _gemm(levels, packed_in, torch.float32)

        def activated(block: slice, hidden: Tensor = hidden, steps: Tensor = steps) -> Tensor:
            return torch.ops.aten.gelu_(_rescale(hidden[block], steps[block], wide_in))

        levels, steps = _quantise(hidden, torch.float32, activated)
        branch = _gemm(levels, packed_out, torch.float32)
        _add_branch(branch, steps, wide_out, sums[chunk], out[chunk])
    return out.view(residual.shape)


class Prepared(NamedTuple):
    """A quantised layer for the compiled kernel; `bias` is `[M]`, fp32."""

    panels: Panels
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, gamma: Tensor | None = None) -> Prepared:
        """Quantise `gamma · (x W^T + b)`."""
        from .llvm.linear import int8_panels

        panels = cached("int8 panels", (weight,), lambda: int8_panels(*_quantise_weight(weight)))
        steps, wide = _times_gamma(panels.steps, weight, bias, gamma)
        return cls(panels._replace(steps=steps), wide)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        gelu: bool = False,
        dtype: torch.dtype | None = None,
        norm: Norm | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return `residual + norm(x) W^T + b`, or its GELU, for x `[n, K]`, in the dtype of residual or x."""
        from .llvm.linear import int8_linear

        if out is None:
            dtype = dtype if residual is None else residual.dtype
            out = x.new_empty(x.shape[0], self.panels.steps.shape[0], dtype=dtype)
        x = x if x.stride(-1) == 1 else x.contiguous()
        if residual is not None and residual.stride(-1) != 1:
            residual = residual.contiguous()
        return int8_linear(x, self.panels, self.bias, residual, out, gelu=gelu, norm=norm)


def prepared_mlp(
    first: Prepared, second: Prepared, x: Tensor, residual: Tensor, *, norm: Norm | None = None
) -> Tensor:
    """Return `residual + second(gelu(first(norm(x))))` for x `[n, K]`, residual `[n, M]`; the hidden layer is fp32."""
    out = torch.empty_like(residual)
    shape = (min(_MOST_ROWS, len(x)), first.panels.steps.shape[0])
    memory = scratch("int8 hidden", shape, torch.float32)
    for start in range(0, len(x), _MOST_ROWS):
        chunk = slice(start, start + _MOST_ROWS)
        hidden = memory[: len(x[chunk])]
        first(x[chunk], gelu=True, norm=norm, out=hidden)
        second(hidden, residual[chunk], out=out[chunk])
    return out


def compiled_delay(rows: int, dtype: torch.dtype, weights: Sequence[Tensor]) -> float:
    """Return the seconds that a layer of these weights loses in the compiled kernel, by the races; or infinity."""
    if any(_library(dtype, weight) != "llvm" for weight in weights):
        return math.inf
    if any(weight.dtype != dtype for weight in weights):
        return 0.0
    suffix, timed = (" of few rows", _FEW_ROWS) if rows < _FEW else ("", _MANY_ROWS)
    delay = 0.0
    for operation in _LAYERS:
        selection = compare(f"{operation} in 8 bits{suffix}", dtype)
        if len(selection.seconds) == 2:
            delay += selection.seconds["int8"] - selection.seconds["floats"]
        elif selection.chosen != "int8":
            return math.inf
    sizes = (outputs * inputs for layer in _LAYERS.values() for outputs, inputs in layer)
    share = sum(weight.numel() for weight in weights) / sum(sizes)
    return max(0.0, delay) * share * max(1.0, rows / timed)


def _library(dtype: torch.dtype, weight: Tensor) -> str:
    """Return the int8 implementation for activations of this dtype and weights of this shape."""
    outputs, inputs = weight.shape
    if dtype not in gemm.CPU_DTYPES or not llvm.fits(outputs, inputs, torch.int8):
        return "onednn"
    # One library for any number of rows: the result of a row does not depend on the batch, to the bit.
    return select("products of bytes", dtype)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    packed, wide = _pack(weight, bias)
    levels, steps = _quantise(rows, x.dtype)
    out = _rescale(_gemm(levels, packed, x.dtype), steps, wide)
    return out.view(*x.shape[:-1], weight.shape[0])


def _compiled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False, norm: Norm | None = None
) -> Tensor:
    out = Prepared.of(weight, bias)(x.reshape(-1, x.shape[-1]), gelu=gelu, norm=norm)
    return out.view(*x.shape[:-1], weight.shape[0])


class _Packed(NamedTuple):
    """An int8 weight `[K, M]` in oneDNN's layout, with fp32 scales `[M]`, and zero points `[M]`."""

    tensor: Tensor
    scales: Tensor
    zeros: Tensor


def _quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a rotated weight `[M, K]` in int8, and the step of each row for rotated activations."""
    rows, width = weight.shape
    levels, scales = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)
    # In blocks of rows: their doubles stay in cache.
    for start in range(0, rows, _block_length(width)):
        block = slice(start, start + _block_length(width))
        dense = reference.rotate(weight.detach()[block].float())
        scales[block] = reference.int8_steps(dense.abs().amax(1), torch.float32)
        levels[block] = (dense.double() * scales[block].reciprocal()[:, None]).round_()
    return levels, scales / 2 ** len(reference.int8_strides(width))


def _pack(
    weight: Tensor, bias: Tensor | None, gamma: Tensor | None = None
) -> tuple[_Packed, Tensor | None]:
    """Return an int8 weight and its fp32 bias, both times gamma."""

    def pack() -> _Packed:
        levels, scales = _quantise_weight(weight)
        tensor = torch.ops.onednn.qlinear_prepack(levels, None)
        return _Packed(tensor, scales, torch.zeros(weight.shape[0], dtype=torch.int32))

    packed = cached("int8", (weight,), pack)
    scales, wide = _times_gamma(packed.scales, weight, bias, gamma)
    return packed._replace(scales=scales), wide


def _times_gamma(
    scales: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the scales of a weight, and a bias in fp32, both times gamma."""
    wide = None if bias is None else bias.float()
    if gamma is None:
        return scales, wide
    scaled = cached("int8 layer-scaled", (weight, gamma), lambda: scales * gamma.float())
    return scaled, None if wide is None else wide * gamma.float()


def _gemm(levels: Tensor, packed: _Packed, dtype: torch.dtype) -> Tensor:
    """Multiply `[n, K]` in int8 with a weight and its scales."""
    after = (None, 1.0, 0, dtype, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise(levels, 1.0, ZERO_BYTE, *packed, *after)


def _rescale(result: Tensor, steps: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `result · steps + bias`, in place."""
    steps = steps.to(result.dtype)
    if bias is None:
        return result.mul_(steps)
    return torch.addcmul(bias.to(result.dtype), result, steps, out=result)


def _add_branch(
    branch: Tensor, steps: Tensor, bias: Tensor | None, sums: Tensor, out: Tensor
) -> None:
    """Compute `sums + branch · steps + bias`, rounded once; the branch is overwritten."""
    length = _block_length(branch.shape[1])
    for start in range(0, len(sums), length):
        block = slice(start, start + length)
        residual = in_dtype("int8 block", sums[block], branch.dtype)
        out[block] = _rescale(branch[block], steps[block], bias).add_(residual)


def _block_length(width: int) -> int:
    return max(1, _BLOCK * torch.get_num_threads() // width)


def _quantise(
    rows: Tensor, dtype: torch.dtype, compute: Callable[[slice], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return rotated rows `[n, K]` as uint8, and their steps `[n, 1]` in `dtype`; `compute` returns a block of rows.

    A block of rows at a time, which stays in a core's cache from the first pass over it to the last.
    """
    n, width = rows.shape
    shift = torch.full((width,), NO_FRACTIONS + ZERO_BYTE)
    levels, steps = scratch("int8", (n, width), torch.uint8), torch.empty(n, 1, dtype=dtype)
    length = _block_length(width)
    for start in range(0, n, length):
        block = slice(start, start + length)
        values = reference.rotate(rows[block].float() if compute is None else compute(block))
        lowest = values.amin(1, keepdim=True)
        largest = torch.maximum(values.amax(1, keepdim=True), lowest.neg_())
        step = reference.int8_steps(largest, dtype)
        values = torch.addcmul(shift, values, step.float().reciprocal())
        levels[block], steps[block] = values.view(torch.int32), step
    return levels, steps


def _example(
    dtype: torch.dtype, rows: int, shapes: tuple[tuple[int, int], ...], residual: bool
) -> tuple[Tensor | None, ...]:
    """Return operands of a linear layer, or of an MLP."""
    tensors: list[Tensor | None] = [*operands(dtype, (rows, shapes[0][1]))]
    for outputs, inputs in shapes:
        weight, bias = operands(dtype, (outputs, inputs), (outputs,))
        # A parameter is read from memory in a timing, which decides for few rows.
        tensors += [nn.Parameter(weight, requires_grad=False) if rows < _FEW else weight, bias]
    if residual:
        tensors += [*operands(dtype, (rows, shapes[-1][0])), None]  # without LayerScale
    return tuple(tensors)


_LIBRARIES: dict[str, Callable[..., Tensor]] = {"onednn": _onednn_linear}
if llvm.why_not(torch.int8) is None:
    _LIBRARIES["llvm"] = _compiled_linear
_WIDTH = _PROBE[1]
_LAYERS: dict[str, tuple[tuple[int, int], ...]] = {
    "linear": ((3 * _WIDTH, _WIDTH),),
    "linear_residual": ((_WIDTH, _WIDTH),),
    "mlp_residual": ((4 * _WIDTH, _WIDTH), (_WIDTH, 4 * _WIDTH)),
}


def _register(
    operation: str, candidates: dict[str, Callable[..., Tensor]], layer: str, rows: int
) -> None:
    shapes = _LAYERS[layer]
    flops = 2 * rows * sum(outputs * inputs for outputs, inputs in shapes)
    example = partial(_example, rows=rows, shapes=shapes, residual=layer != "linear")
    register(
        operation, Race(candidates, example, flops, alike=False, why_not=why_not), any_size=True
    )


_register("products of bytes", _LIBRARIES, "linear", _MANY_ROWS)
for _layer, _int8 in (
    ("linear", linear),
    ("linear_residual", linear_residual),
    ("mlp_residual", mlp_residual),
):
    for _suffix, _rows in (("", _MANY_ROWS), (" of few rows", _FEW_ROWS)):
        _register(
            f"{_layer} in 8 bits{_suffix}",
            {"int8": _int8, "floats": getattr(gemm, _layer)},
            _layer,
            _rows,
        )
