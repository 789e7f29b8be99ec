"""Attention of packed sequences by flash-attn 2, 3 (`flash_attn_interface`) or 4 (`flash_attn.cute`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xfm_fast.errors import InputError

from .checks import Packed

_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
# By the first number of the compute capability, the fastest first.
_ORDER = {8: (2, 4), 9: (3, 4, 2)}
_NEWER = (4, 2)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """Return softmax(scale · q kᵀ) v of packed sequences `[T, H, D]`; InputError for an unsupported dtype or mask."""
    if packed.key_mask is not None:
        raise InputError("backend 'flash_attn' has no key_mask; use 'auto' or 'triton'")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(
            f"q is {q.dtype}; backend 'flash_attn' has float16 and bfloat16: convert it or use 'auto'"
        )
    capability = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 8
    run = function(capability, dropout=packed.dropout_p > 0)
    dropout: dict[str, Any] = {"dropout_p": packed.dropout_p} if packed.dropout_p else {}
    out = run(
        _aligned(q),
        _aligned(k),
        _aligned(v),
        # By name: their positions differ from version to version.
        cu_seqlens_q=packed.cu_seqlens_q.int(),
        cu_seqlens_k=packed.cu_seqlens_k.int(),
        max_seqlen_q=packed.max_q,
        max_seqlen_k=packed.max_k,
        softmax_scale=packed.scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **dropout,
    )
    # Some versions return the logsumexp too.
    return out[0] if isinstance(out, tuple) else out


@cache
def function(capability: int, *, dropout: bool = False) -> Callable[..., Any]:
    """Return `flash_attn_varlen_func` of the fastest version on a GPU, with dropout that of version 2.

    InputError without one.
    """
    return fastest(capability, dropout=dropout)[1]


def fastest(capability: int, *, dropout: bool = False) -> tuple[int, Callable[..., Any]]:
    """Return the version of `function`, and the function."""
    reasons = []
    for version in (2,) if dropout else _ORDER.get(capability, _NEWER):
        try:
            return version, importlib.import_module(_MODULES[version]).flash_attn_varlen_func
        except Exception as error:  # a build for another PyTorch or GPU raises errors of its own
            reasons.append(f"{_MODULES[version]}: {type(error).__name__}: {error}")
    package = "flash-attn 2, the only version with dropout," if dropout else "flash-attn"
    raise InputError(
        f"{package} cannot be imported; install it or use backend 'auto' ({'; '.join(reasons)})"
    )


def _aligned(tensor: Tensor) -> Tensor:
    """Return `[T, H, D]` with contiguous rows that begin at multiples of 16 bytes, copied if needed."""
    aligned = tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
    for stride in tensor.stride()[:2]:
        aligned = aligned and stride * tensor.element_size() % 16 == 0
    return tensor if aligned else tensor.contiguous()
