"""Our Triton attention kernels in the form that a TensorRT plugin launches: PTX, argument order, launch geometry.

A plugin compiled ahead of time gets its inputs, then 32-bit integers, then its outputs. The kernels of
`xfm_fast.kernels.triton` take their arguments in another order, so each is called by a kernel of one line, which the
compiler dissolves. What is fixed when an engine is built, such as the number of heads, is a constant.
"""

# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
import triton.language as tl

from xfm_fast.errors import ExportError
from xfm_fast.kernels.triton import relpos_attention as relpos
from xfm_fast.kernels.triton import varlen_attention as varlen
from xfm_fast.kernels.triton.attention_tiles import dot_precision, split_head_dim
from xfm_fast.kernels.triton.launch import LaunchConfig, config_for, tail_size

PLAIN_SHARED = 48 * 1024
"""Bytes of shared memory that any launch may have. More takes a call before it, which TensorRT does not promise."""

_PTX_VERSION = 87
"""Version of PTX: the first with SM120, which drivers from 570 on read. Triton itself would write its newest."""

_ALIGNED = [["tt.divisibility", 16]]
_relpos_forward, _varlen_forward = relpos.forward_kernel, varlen.forward_kernel


@triton.jit
def relpos_plugin_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, batch, out_ptr, lse_ptr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """q, k, v and out are `[B, H, N, D]`, the bias `[H, N, COLUMNS]`, the logsumexp `[B, H, N]`; all contiguous."""
    WIDTH: tl.constexpr = D_A + D_B
    HEAD: tl.constexpr = TOKENS * WIDTH
    ENTRY: tl.constexpr = HEADS * HEAD
    _relpos_forward(
        q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
        ENTRY, WIDTH, HEAD, ENTRY, WIDTH, HEAD, ENTRY, WIDTH, HEAD, ENTRY, WIDTH, HEAD,
        COLUMNS, batch, HEADS, TOKENS, SCALE, D_A, D_B, PRECISION, True, BLOCK_M, BLOCK_N, TAIL,
    )  # fmt: skip


@triton.jit
def varlen_plugin_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, sequences, tiles, queries, out_ptr, lse_ptr,
    HEADS: tl.constexpr, SCALE: tl.constexpr, D_A: tl.constexpr, D_B: tl.constexpr, PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q, k, v and out are `[T, H, D]`, the mask `[Tk]` int32, the logsumexp `[H, Tq]`; all contiguous."""
    WIDTH: tl.constexpr = D_A + D_B
    ROW: tl.constexpr = HEADS * WIDTH
    _varlen_forward(
        q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, mask_ptr, out_ptr, lse_ptr,
        ROW, WIDTH, ROW, WIDTH, ROW, WIDTH, ROW, WIDTH, sequences, tiles, queries,
        SCALE, D_A, D_B, PRECISION, HAS_MASK, 0, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@dataclass(frozen=True)
class PluginKernel:
    """A compiled kernel as TensorRT is given it.

    Attributes:
        name: entry in the PTX.
        ptx: its text, with the arguments of the launch and no others.
        arguments: name → `pointer` or `int32`, in order.
        threads: size of a block.
        shared_bytes: dynamic shared memory of a block.
        tiles: rows of queries and keys that a block works on.
    """

    name: str
    ptx: str
    arguments: dict[str, str]
    threads: int
    shared_bytes: int
    tiles: Mapping[str, int]


def relpos_programs(kernel: PluginKernel, batch: Any, heads: int, tokens: int) -> Any:
    """Blocks of a launch. `batch` may be a symbolic integer, which knows `*` and `//` with a number on its right."""
    return batch * (-(-tokens // kernel.tiles["BLOCK_M"]) * heads)


def varlen_tiles(kernel: PluginKernel, queries: Any, sequences: Any) -> Any:
    """Tiles of one head: the kernel's argument `tiles`. Both counts may be symbolic."""
    return queries // kernel.tiles["BLOCK_M"] + sequences


@cache
def compile_relpos(
    dtype: str, arch: int, *, heads: int, head_dim: int, tokens: int, columns: int, scale: float
) -> PluginKernel:
    """`relpos_attention` for one architecture.

    Args:
        dtype: bf16 or fp16.
        arch: compute capability, such as 90.
        columns: width of the padded bias.

    Raises:
        ExportError: no configuration fits the shared memory that TensorRT gives, or a compiled kernel has arguments
            that TensorRT would not pass.
    """
    d_a, d_b = split_head_dim(head_dim)

    def constants(config: LaunchConfig) -> dict[str, Any]:
        return {
            "TOKENS": tokens, "HEADS": heads, "COLUMNS": columns, "SCALE": scale, "D_A": d_a, "D_B": d_b,
            "PRECISION": dot_precision(dtype), "TAIL": tail_size(tokens, config.tiles["BLOCK_N"]), **config.tiles,
        }  # fmt: skip

    types = {"bias_ptr": "*fp16", "lse_ptr": "*fp32", "batch": "i32"}
    return _compile(
        relpos_plugin_kernel, config_for("relpos_forward", head_dim, dtype, arch), constants, types, dtype, arch
    )


@cache
def compile_varlen(
    dtype: str, arch: int, *, heads: int, head_dim: int, scale: float, masked: bool, small_tiles: bool
) -> PluginKernel:
    """`varlen_attention` for one architecture.

    Args:
        dtype, arch: as in `compile_relpos`.
        masked: keys are masked; otherwise the mask is not read.
        small_tiles: tiles for sequences of up to `varlen_attention.SHORT` queries.

    Raises:
        ExportError: as in `compile_relpos`.
    """
    d_a, d_b = split_head_dim(head_dim)
    form = "_short" if small_tiles else "_masked" if masked else ""

    def constants(config: LaunchConfig) -> dict[str, Any]:
        return {
            "HEADS": heads, "SCALE": scale, "D_A": d_a, "D_B": d_b, "PRECISION": dot_precision(dtype),
            "HAS_MASK": masked, **config.tiles,
        }  # fmt: skip

    types = dict.fromkeys(("cu_q_ptr", "cu_k_ptr", "mask_ptr"), "*i32") | {"lse_ptr": "*fp32"}
    types |= dict.fromkeys(("sequences", "tiles", "queries"), "i32")
    return _compile(
        varlen_plugin_kernel, config_for(f"varlen_forward{form}", head_dim, dtype, arch), constants, types, dtype, arch
    )


def _compile(
    kernel: Any,
    config: LaunchConfig,
    constants: Callable[[LaunchConfig], dict[str, Any]],
    types: Mapping[str, str],
    dtype: str,
    arch: int,
) -> PluginKernel:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(kernel, "cache_key"):
        raise ExportError("plugins need Triton's compiler, and this process interprets kernels; unset TRITON_INTERPRET")
    values = constants(config)
    signature = {name: "constexpr" if name in values else types.get(name, f"*{dtype}") for name in kernel.arg_names}
    attributes = {(place,): _ALIGNED for place, name in enumerate(signature) if signature[name].startswith("*")}
    compiled: Any = None
    # A shallower pipeline takes less shared memory.
    for stages in range(config.num_stages, 0, -1):
        source = ASTSource(kernel, signature, values, attributes)
        options = {"num_warps": config.num_warps, "num_stages": stages, "ptx_version": _PTX_VERSION}
        with knobs.compilation.scope():
            # An engine that is given away does not name the files of this machine.
            knobs.compilation.disable_line_info = True
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        if compiled.metadata.shared <= PLAIN_SHARED:
            break
    else:
        raise ExportError(
            f"{kernel.__name__} takes {compiled.metadata.shared} bytes of shared memory on SM{arch} and a plugin has "
            f"{PLAIN_SHARED}; build without --plugins"
        )
    arguments = {
        name: "pointer" if kind.startswith("*") else "int32" for name, kind in signature.items() if kind != "constexpr"
    }
    return PluginKernel(
        name=compiled.metadata.name,
        ptx=launch_arguments_only(compiled.asm["ptx"], arguments),
        arguments=arguments,
        threads=32 * compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        tiles=config.tiles,
    )


_PARAMETERS = re.compile(r"(\.entry\s+[\w$]+\(\n?)(.*?)(\n?\s*\))", re.DOTALL)


def launch_arguments_only(ptx: str, arguments: Mapping[str, str]) -> str:
    """PTX without the parameters that Triton's own launcher adds behind those of the kernel.

    Triton 3.9 adds two, pointers to scratch memory, and TensorRT does not pass them: the driver would read beyond the
    end of its list. Both are unused by kernels that need no scratch memory.

    Args:
        ptx: text of one kernel.
        arguments: the launch's, in order: name → `pointer` or `int32`.

    Raises:
        ExportError: the kernel reads such a parameter, or its other parameters are not the arguments.
    """
    found = _PARAMETERS.search(ptx)
    if found is None:
        raise ExportError("the compiled kernel has no entry; this version of Triton writes PTX in an unknown form")
    declared = [part.strip() for part in found[2].split(",\n")]
    kinds = ["pointer" if ".u64" in part else "int32" if ".u32" in part else part for part in declared]
    if kinds[: len(arguments)] != list(arguments.values()) or set(kinds[len(arguments) :]) - {"pointer"}:
        raise ExportError(
            f"the compiled kernel has parameters {kinds} where the launch has {list(arguments.values())}; this version "
            "of Triton passes them in another form, so build without --plugins"
        )
    body = ptx[found.end() :]
    for part in declared[len(arguments) :]:
        name = part.split()[-1]
        if re.search(rf"\b{re.escape(name)}\b", body):
            raise ExportError(f"the compiled kernel needs scratch memory ({name}), which a plugin has not")
    kept = ",\n".join(f"\t{part}" for part in declared[: len(arguments)])
    return ptx[: found.start(2)] + kept + ptx[found.end(2) :]
