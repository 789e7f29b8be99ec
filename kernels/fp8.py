"""GEMMs in fp8 (e4m3), for inference: each row of the activations and of the weight has its own scale.

A GPU multiplies fp8 at twice the rate of 16 bits. The Triton kernels of norms and GELU also write the fp8 rows of the
next GEMM; other rows are rounded in a separate pass. On a CPU the same values are rounded and multiplied in fp32, which
is slow and shows the effect of fp8 on a model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from xfm_fast.errors import InputError, UnavailableError

from . import reference
from .backend import (
    Backend,
    autocast_dtype,
    constant_when_compiled,
    named,
    resolve,
    transformed,
)
from .caching import cached
from .flags import kind_of
from .library import on_device_of_arguments

_OLDEST_GPU = (8, 9)
# cuBLAS multiplies fp8 in groups of so many rows and columns.
_MULTIPLE = 16


class _Block(threading.local):
    """Whether this thread is in a block of `use_fp8`, and the fp8 rows that kernels made in it, by id of the rows."""

    on: bool = False

    def __init__(self) -> None:
        self.rounded: dict[int, tuple[weakref.ref[Tensor], int, Tensor, Tensor]] = {}


block = _Block()


@contextmanager
def use_fp8() -> Iterator[None]:
    """Multiply rows rounded to fp8 (e4m3) with weights rounded to fp8 in the linear layers of the block.

    For inference: gradients raise an error. A layer with a dimension that is no multiple of 16 runs as usual, as does a
    layer with a frozen or int8 weight. Rounded weights are cached until the parameters change, in half the memory of 16
    bits. On a CPU the GEMMs are emulated, slowly, to show the effect of fp8 on a model's results: try it on some inputs
    of your own before you rely on it.

    Raises:
        UnavailableError: at the first linear layer, on a GPU older than Ada (compute capability 8.9).
        InputError: at the first linear layer that requires a gradient.
    """
    outside, block.on = block.on, True
    try:
        yield
    finally:
        block.on = outside
        if not outside and not torch.compiler.is_compiling():
            block.rounded.clear()


def on() -> bool:
    """Return whether this is a block of `use_fp8`."""
    return block.on


def is_active(weight: Tensor) -> bool:
    """Return whether this is a block of `use_fp8`, or the weight is flagged for fp8."""
    return block.on or kind_of(weight) == "fp8"


def fits(weight: Tensor) -> bool:
    """Return whether fp8 GEMMs take the weight of a linear layer: both dimensions are multiples of 16."""
    return weight.ndim == 2 and not weight.shape[0] % _MULTIPLE and not weight.shape[1] % _MULTIPLE


def require(device: torch.device) -> None:
    """Raise UnavailableError for a device without fp8."""
    why_not = _why_not(device.type, device.index)
    if why_not is not None:
        raise UnavailableError(f"fp8 is unavailable: {why_not}; use bfloat16")


def takes(weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Return whether fp8 is enabled for the GEMMs with these weights, of a call with these tensors.

    Operations with several weights run layer by layer, each of which asks again. Raises as `use_fp8`.
    """
    if len(weights) > 1:
        return any(map(is_active, weights))
    weight = weights[0]
    if kind_of(weight) == "int8" or not is_active(weight) or not fits(weight):
        return False
    if weight.layout != torch.strided or not weight.is_floating_point():
        return False  # in oneDNN's layout, or in 8 bits already
    if not block.on and torch.compiler.is_exporting():
        return False  # an exported graph holds the weights in floating point, and is quantised by other means
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if records or transformed():
        raise InputError(
            "linear layers in fp8 have no gradient: run the model under torch.no_grad(), or without fp8 "
            "(ops.use_fp8, dtype='fp8')"
        )
    require(tensors[0].device)
    return True


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: Backend | None = None
) -> Tensor:
    """Return `x W^T + b` of rows and weight rounded to fp8, summed in fp32, in the dtype of x or of autocast."""
    shape = (*x.shape[:-1], weight.shape[0])
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or x.dtype
    if not x.is_cuda or (named(backend) and resolve(backend, x) == "reference"):
        wide = cached(
            "fp8 rows in fp32", (weight,), lambda: reference.rounded_rows(weight.detach())
        )
        if resolve(backend, x, weight, bias) != "triton":
            return reference.product_of_rounded(reference.rounded_rows(x), wide, bias).to(dtype)
        # Interpreted kernels round the rows; no library multiplies them.
        rows, scales = rounded(x, backend)
        out = reference.product_of_rounded(rows.float() * scales, wide, bias)
        return out.view(shape).to(dtype)
    if not x.numel():  # which cuBLAS refuses
        return x.new_empty(shape, dtype=dtype)
    rows, scales = rounded(x, backend)
    columns, column_scales = cached(
        "fp8 rows", (weight,), lambda: reference.quantise_rows(weight.detach())
    )
    out = torch._scaled_mm(
        rows,
        columns.t(),
        scale_a=scales,
        scale_b=column_scales.t(),
        bias=None if bias is None else bias.to(torch.bfloat16),
        # The only output dtype of cuBLAS with a scale per row.
        out_dtype=torch.bfloat16,
    )
    return out.view(shape).to(dtype)


def rounded(x: Tensor, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Return rows of x as `[rows, K]` fp8 and scales `[rows, 1]` fp32: from the kernel that wrote x, or new."""
    if torch.compiler.is_compiling() or resolve(backend, x) != "triton":
        # A compiler fuses these few operations with the producer of the rows.
        return reference.quantise_rows(x.reshape(-1, x.shape[-1]))
    entry = block.rounded.get(id(x))
    if entry is not None:
        source, version, rows, scales = entry
        if source() is x and version == x._version:
            return rows, scales
    from .triton.rows import quantise_rows

    return on_device_of_arguments(quantise_rows)(x) if x.is_cuda else quantise_rows(x)


def makes_fp8_rows(backend: Backend, weight: Tensor, *tensors: Tensor | None) -> bool:
    """Return whether a Triton kernel should round its rows to fp8 for the next GEMM.

    `weight` is that of the norm, or of the layer with a GELU.
    """
    if not is_active(weight) or backend != "triton" or torch.compiler.is_compiling():
        return False
    if torch.is_inference_mode_enabled():
        # Its tensors carry no version: a change between the kernel and the GEMM could not be seen.
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(t is not None and t.requires_grad for t in (weight, *tensors))


def keep(x: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """Cache the fp8 rows of x until the block ends or x changes or is freed; return x."""
    entries, key = block.rounded, id(x)

    def forget(dead: weakref.ref[Tensor]) -> None:
        # Another tensor may have taken the id of the dead one meanwhile.
        if key in entries and entries[key][0] is dead:
            del entries[key]

    entries[key] = (weakref.ref(x, forget), x._version, rows, scales)
    return x


@constant_when_compiled
def _why_not(device: str, index: int | None) -> str | None:
    """Return the reason why a device cannot multiply fp8, or None."""
    if device == "cpu":
        return None
    if device != "cuda":
        return f"a tensor lives on {device} and only NVIDIA GPUs have them here"
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_GPU:
        return (
            f"GPU {index} has compute capability {capability[0]}.{capability[1]} and fp8 needs 8.9"
        )
    return None
