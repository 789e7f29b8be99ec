"""TensorRT plugins that carry our Triton kernels in the engine, compiled ahead of time (`tensorrt.plugin`).

An engine that was built with them runs without Python and without Triton: it holds the kernels' PTX. `register` makes
the plugins known to TensorRT; `plugin_graphs.carry_attention` makes a graph use them.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from xfm_fast.errors import ExportError, UnavailableError

from .library import Library

NAMESPACE = "xfm"
RELPOS, VARLEN = "relpos_attention", "varlen_attention"

# Up to this version `tensorrt.plugin` compares a NumPy type in a way that NumPy 2.4 no longer allows.
_OLD_NUMPY, _NEWEST_NUMPY = (11, 1), (2, 4)
_registered: dict[str, int] = {}


@dataclass(frozen=True)
class _Interface:
    """Inputs, then attributes with their types: a plugin's description as TensorRT reads it from a signature."""

    tensors: tuple[str, ...]
    attributes: dict[str, type]


INTERFACES = {
    RELPOS: _Interface(
        ("q", "k", "v", "bias"), {"heads": int, "head_dim": int, "tokens": int, "columns": int, "scale": float}
    ),
    VARLEN: _Interface(
        ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "key_mask"),
        {"heads": int, "head_dim": int, "masked": int, "small_tiles": int, "scale": float},
    ),
}


def check_plugins(library: Library) -> None:
    """See that plugins can be used, before a graph is exported.

    Raises:
        UnavailableError: the library has no such plugins or does not fit NumPy, or Triton is not installed.
    """
    if library.consumer != "tensorrt":
        raise UnavailableError(
            f"{library.label} has no plugins that are compiled ahead of time; leave out --plugins, or use xfm-fast "
            "export tensorrt"
        )
    numpy = metadata.version("numpy")
    if _numbers(library.version) <= _OLD_NUMPY and _numbers(numpy) >= _NEWEST_NUMPY:
        raise UnavailableError(
            f"the plugins of TensorRT {library.version} do not work with NumPy {numpy}; pip install 'numpy<2.4', use "
            "a later TensorRT, or leave out --plugins"
        )
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError(
            "plugins are compiled by Triton, which is not installed; pip install 'xfm-fast[triton]' (Linux)"
        )


def register(library: Library, arch: int) -> None:
    """Make both plugins known to TensorRT, for one architecture a process, such as 90.

    Raises:
        UnavailableError: see `check_plugins`.
        ExportError: they were registered for another architecture.
    """
    check_plugins(library)
    known = _registered.get(library.version)
    if known == arch:
        return
    if known is not None:
        raise ExportError(f"the plugins of this process are for SM{known}; build for SM{arch} in another process")
    trtp = importlib.import_module(f"{library.module}.plugin")
    for name, plugin in ((RELPOS, _relpos), (VARLEN, _varlen)):
        describe, implement = plugin(library.trt, trtp, arch)
        interface = INTERFACES[name]
        tensors, attributes = dict.fromkeys(interface.tensors, trtp.TensorDesc), dict(interface.attributes)
        results = tuple[trtp.TensorDesc, trtp.TensorDesc]
        # TensorRT reads classes from the annotations; those of this file are text.
        describe.__annotations__ = tensors | attributes | {"return": results}
        implement.__annotations__ = (
            tensors
            | attributes
            | {
                "outputs": results,
                "tactic": int,
                "return": tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs],
            }
        )
        trtp.register(f"{NAMESPACE}::{name}")(describe)
        trtp.aot_impl(f"{NAMESPACE}::{name}")(implement)
    _registered[library.version] = arch


_Plugin = tuple[Callable[..., Any], Callable[..., Any]]
"""The shapes of a plugin's results, and its kernel."""


def _relpos(trt: Any, trtp: Any, arch: int) -> _Plugin:
    def describe(q, k, v, bias, heads, head_dim, tokens, columns, scale):
        """Like q `[B, H, N, D]`; and the logsumexp of the scores, `[B, H, N]`."""
        return q.like(), trtp.from_shape_expr((q.shape_expr[0], q.shape_expr[1], q.shape_expr[2]), dtype=trt.float32)

    def implement(q, k, v, bias, heads, head_dim, tokens, columns, scale, outputs, tactic):
        from . import plugin_kernels

        kernel = plugin_kernels.compile_relpos(
            _dtype(trt, q), arch, heads=heads, head_dim=head_dim, tokens=tokens, columns=columns, scale=scale
        )
        batch = q.shape_expr[0]
        programs = plugin_kernels.relpos_programs(kernel, batch, heads, tokens)
        return _launch(trtp, kernel, programs, {"batch": batch})

    return describe, implement


def _varlen(trt: Any, trtp: Any, arch: int) -> _Plugin:
    def describe(q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, heads, head_dim, masked, small_tiles, scale):
        """Like q `[P, L, H, D]`; and the logsumexp of the scores, `[H, P, L]`."""
        return q.like(), trtp.from_shape_expr((q.shape_expr[2], q.shape_expr[0], q.shape_expr[1]), dtype=trt.float32)

    def implement(
        q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, heads, head_dim, masked, small_tiles, scale, outputs, tactic
    ):  # fmt: skip
        from . import plugin_kernels

        kernel = plugin_kernels.compile_varlen(
            _dtype(trt, q), arch, heads=heads, head_dim=head_dim, scale=scale, masked=bool(masked),
            small_tiles=bool(small_tiles),
        )  # fmt: skip
        sequences, queries = q.shape_expr[0], q.shape_expr[0] * q.shape_expr[1]
        tiles = plugin_kernels.varlen_tiles(kernel, queries, sequences)
        return _launch(trtp, kernel, tiles * heads, {"sequences": sequences, "tiles": tiles, "queries": queries})

    return describe, implement


def _launch(trtp: Any, kernel: Any, programs: Any, integers: dict[str, Any]) -> tuple[Any, ...]:
    """An implementation as TensorRT wants it: name, PTX, launch, and the integers between inputs and outputs."""
    wanted = [name for name, kind in kernel.arguments.items() if kind == "int32"]
    assert wanted == list(integers), (wanted, list(integers))
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.block_x, launch.shared_mem = programs, kernel.threads, kernel.shared_bytes
    values = trtp.SymIntExprs.from_tuple([trtp.SymInt32(value) for value in integers.values()])
    return kernel.name.encode(), kernel.ptx.encode(), launch, values


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dtype(trt: Any, tensor: Any) -> str:
    names = {trt.float16: "fp16", trt.bfloat16: "bf16"}
    if tensor.dtype not in names:
        raise ExportError(f"plugins compute in bf16 and fp16, and a graph has {tensor.dtype}; use --dtype bf16")
    return names[tensor.dtype]
