"""GEMMs in fp8 (e4m3), for inference: each row of the activations and of the weight has a scale of its own.

A GPU multiplies fp8 at twice the rate of 16 bits. Its kernels for norms and GELU round the rows of the next GEMM on the
way; other rows are rounded in a separate pass. On a CPU the same values are rounded and multiplied in fp32, which is
slow and shows the effect of fp8 on a model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from xfm_fast.errors import InputError, UnavailableError

from . import reference
from .backend import Backend, constant_when_compiled, named, resolve, transformed
from .caching import cached
from .flags import kind_of
from .library import autocast_dtype, on_device_of_arguments

_OLDEST_GPU = (8, 9)
# The library multiplies fp8 in groups of so many rows and columns.
_MULTIPLE = 16


class _Switch(threading.local):
    """Whether the current thread's block multiplies in fp8, and what kernels rounded in it: by identity of the rows."""

    on: bool = False

    def __init__(self) -> None:
        self.rounded: dict[int, tuple[weakref.ref[Tensor], int, Tensor, Tensor]] = {}


_switch = _Switch()


@contextmanager
def use_fp8() -> Iterator[None]:
    """Within the block, linear layers multiply rows rounded to fp8 (e4m3) with weights rounded to fp8.

    For inference: gradients raise an error. A layer with a dimension that is no multiple of 16 runs as usual, as does a
    layer with a frozen or int8 weight. Rounded weights are cached until the parameters change, in half the memory of 16
    bits. On a CPU the GEMMs are emulated, slowly, to show the effect of fp8 on a model's results: try it on some inputs
    of your own before you rely on it.

    Raises:
        UnavailableError: at the first linear layer, on a GPU older than Ada (compute capability 8.9).
        InputError: at the first linear layer that requires a gradient.
    """
    outside, _switch.on = _switch.on, True
    try:
        yield
    finally:
        _switch.on = outside
        if not outside and not torch.compiler.is_compiling():
            _switch.rounded.clear()


def on() -> bool:
    """True within a block of `use_fp8`."""
    return _switch.on


def is_active(weight: Tensor) -> bool:
    """True within a block of `use_fp8`, and for a weight that is marked for fp8."""
    return _switch.on or kind_of(weight) == "fp8"


def fits(weight: Tensor) -> bool:
    """True for the weight of a linear layer that can be multiplied in fp8: both dimensions are multiples of 16."""
    return weight.ndim == 2 and not weight.shape[0] % _MULTIPLE and not weight.shape[1] % _MULTIPLE


def require(device: torch.device) -> None:
    """Raise UnavailableError for a device without fp8."""
    why_not = _why_not(device.type, device.index)
    if why_not is not None:
        raise UnavailableError(f"fp8 is unavailable: {why_not}; use bfloat16")


def should_use(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """True if fp8 is enabled for the GEMM of these rows and this weight; raises as `use_fp8`."""
    kind = kind_of(weight)
    if kind == "int8" or not (_switch.on or kind == "fp8") or not fits(weight):
        return False
    if weight.layout != torch.strided or not weight.is_floating_point():
        return False  # laid out for a library of the CPU, or in 8 bits already
    if not _switch.on and torch.compiler.is_exporting():
        return False  # an exported graph has the weights as they are, and is quantised by its own means
    records = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, *others)
    )
    if records or transformed():
        raise InputError(
            "linear layers in fp8 have no gradient: run the model under torch.no_grad(), or without fp8 "
            "(ops.use_fp8, dtype='fp8')"
        )
    require(x.device)
    return True


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: Backend | None = None
) -> Tensor:
    """`x W^T + b` of rows and weight rounded to fp8, summed in fp32, in the dtype of x or of autocast."""
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or x.dtype
    if not x.is_cuda or (named(backend) and resolve(backend, x) == "reference"):
        wide = cached(
            "fp8 rows in fp32", (weight,), lambda: reference.rounded_rows(weight.detach())
        )
        if resolve(backend, x, weight, bias) != "triton":
            return reference.product_of_rounded(reference.rounded_rows(x), wide, bias).to(dtype)
        # Interpreted kernels round the rows; there is no library that multiplies them.
        rows, scales = rounded(x, backend)
        made = reference.product_of_rounded(rows.float() * scales, wide, bias)
        return made.view(*x.shape[:-1], weight.shape[0]).to(dtype)
    if not x.numel():  # which the library refuses
        return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    rows, scales = rounded(x, backend)
    columns, column_scales = cached(
        "fp8 rows", (weight,), lambda: reference.quantise_rows(weight.detach())
    )
    made = torch._scaled_mm(
        rows,
        columns.t(),
        scale_a=scales,
        scale_b=column_scales.t(),
        bias=None if bias is None else bias.to(torch.bfloat16),
        # The only type in which the library leaves products with scales for each row.
        out_dtype=torch.bfloat16,
    )
    return made.view(*x.shape[:-1], weight.shape[0]).to(dtype)


def rounded(x: Tensor, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Rows of x as `[rows, K]` fp8 and their scales `[rows, 1]` fp32: from the kernel that wrote x, or new."""
    if torch.compiler.is_compiling() or resolve(backend, x) != "triton":
        # A compiler joins these few operations to what made the rows.
        return reference.quantise_rows(x.reshape(-1, x.shape[-1]))
    found = _switch.rounded.get(id(x))
    if found is not None and found[0]() is x and found[1] == x._version:
        return found[2], found[3]
    from .triton.rows import quantise_rows

    return on_device_of_arguments(quantise_rows)(x) if x.is_cuda else quantise_rows(x)


def makes_fp8_rows(chosen: Backend, weight: Tensor, *tensors: Tensor | None) -> bool:
    """True if a Triton kernel should round its rows to fp8 for the next GEMM; `weight` is of the norm or GELU layer."""
    if not is_active(weight) or chosen != "triton" or torch.compiler.is_compiling():
        return False
    if torch.is_inference_mode_enabled():
        # Tensors made in it carry no version: a change between the kernel and the product could not be seen.
        return False
    return not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (weight, *tensors)
    )


def keep(x: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """Cache the fp8 rows of x until the block ends or x changes or is freed; returns x."""
    kept, key = _switch.rounded, id(x)

    def forget(dead: weakref.ref[Tensor]) -> None:
        # Another tensor may have taken the identity of the dead one meanwhile.
        if key in kept and kept[key][0] is dead:
            del kept[key]

    kept[key] = (weakref.ref(x, forget), x._version, rows, scales)
    return x


@constant_when_compiled
def _why_not(device: str, index: int | None) -> str | None:
    """The reason why a device cannot multiply fp8, or None."""
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
