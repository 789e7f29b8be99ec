"""Launch configurations: from a tuned table if there is one, else a heuristic chosen with the compiler's report.

A table is `kernels/tuning/sm_<arch>.json`:

    {"relpos_forward": {"bf16/64": {"tiles": {"BLOCK_M": 128, "BLOCK_N": 64}, "num_warps": 8, "num_stages": 3}}}

The number is the head dimension of an attention kernel, or the row width of any other. There is no run-time tuning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from xfm_fast.errors import InputError

_TUNING = Path(__file__).resolve().parent.parent / "tuning"
TRITON_TYPE = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_INTEGERS = {"i32", "i64", "u32", "u64"}


@dataclass(frozen=True)
class LaunchConfig:
    """The tiling and compile options of a kernel."""

    tiles: Mapping[str, int]  # `{"BLOCK_M": 128, "BLOCK_N": 64}`
    num_warps: int = 4
    num_stages: int = 2  # of the software pipeline over a loop's loads
    # GEMMs have separate accumulators, added to the sums later: Hopper's stay in flight, for registers.
    apart: bool = False
    registers: int = 0  # maximum per thread, where the compiler needs one
    # The last tile follows a branch that is always taken; see `relpos_attention.forward_kernel`.
    fenced: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Compile options of a launch. FMA fusion is explicit: Triton's default changes in 3.10."""
        given = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return given | ({"maxnreg": self.registers} if self.registers else {})


@dataclass(frozen=True)
class CompileRequest:
    """The arguments of `ASTSource(r.kernel, r.signature, r.constexprs, r.attrs)` and its `options=r.options`."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]


@dataclass(frozen=True)
class KernelSpec:
    """A kernel and its shipped forms. Pointers and `stride_*` are compiled as multiples of 16."""

    name: str  # unique; the kernel's key in `tuning/<arch>.json`
    kernel: Any  # the `triton.jit` function
    variants: tuple[Mapping[str, Any], ...]  # `{"head_dim": 64, "dropout": False}`
    # (variant, "bf16") → types of all arguments but constants: `"*bf16"`, `"*fp32"`, `"i32"`.
    types: Callable[[Mapping[str, Any], str], dict[str, str]]
    # (variant, "bf16", configuration) → values of the constants.
    constants: Callable[[Mapping[str, Any], str, LaunchConfig], dict[str, Any]]
    # (variant, "bf16", 90) → launch configuration.
    config: Callable[[Mapping[str, Any], str, int], LaunchConfig]
    tensor_core: bool = True  # it multiplies matrices
    dtypes: tuple[str, ...] = ("fp16", "bf16")
    arches: tuple[int, ...] = ()  # the only architectures to compile for; empty for all

    def request(
        self, variant: Mapping[str, Any], dtype: str, arch: int, config: LaunchConfig | None = None
    ) -> CompileRequest:
        """The compilation of one variant for one dtype and architecture, with its own or another configuration."""
        config = self.config(variant, dtype, arch) if config is None else config
        types, constants = self.types(variant, dtype), self.constants(variant, dtype, config)
        names: list[str] = self.kernel.arg_names
        if set(types) | set(constants) != set(names) or set(types) & set(constants):
            wrong = (set(types) | set(constants)) ^ set(names) | set(types) & set(constants)
            raise ValueError(f"kernel {self.name}: arguments missing, unknown or given twice: {sorted(wrong)}")
        signature = {name: types.get(name, "constexpr") for name in names}
        attrs: dict[tuple[int, ...], list[list[Any]]] = {
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or (kind in _INTEGERS and name.startswith("stride_"))
        }
        return CompileRequest(self.kernel, signature, constants, attrs, config.options)


def architecture(device: torch.device) -> int:
    """90 for NVIDIA's compute capability 9.0; 0 for AMD, where the same numbers mean other hardware.

    The interpreter, on a CPU, uses the configurations of the oldest architecture.
    """
    if device.type != "cuda":
        return 80
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def dtype_name(dtype: torch.dtype) -> str:
    """Triton's name of a compute dtype: `bf16`; InputError for an unsupported one."""
    name = str(dtype).removeprefix("torch.")
    if name not in TRITON_TYPE:
        raise InputError(f"the Triton kernels compute in {', '.join(TRITON_TYPE)}; got {name}")
    return TRITON_TYPE[name]


@cache
def _tuned(arch: int) -> dict[str, dict[str, dict[str, Any]]]:
    path = _TUNING / f"sm_{arch}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def tuned_config(kernel: str, size: int, dtype: str, arch: int) -> LaunchConfig | None:
    """The entry of the architecture's table for a kernel and its head dimension or width of rows, if there is one."""
    row = _tuned(arch).get(kernel, {}).get(f"{dtype}/{size}")
    if row is None:
        return None
    rest = {name: row[name] for name in ("apart", "registers", "fenced") if name in row}
    return LaunchConfig(dict(row["tiles"]), row["num_warps"], row["num_stages"], **rest)


def tuned_backend(kernel: str, size: int, dtype: str, arch: int) -> str:
    """The fastest backend in the table for a kernel: `triton`, or `flash_attn`."""
    return _tuned(arch).get(kernel, {}).get(f"{dtype}/{size}", {}).get("backend", "triton")


@cache
def config_for(kernel: str, head_dim: int, dtype: str, arch: int) -> LaunchConfig:
    """The configuration of the kernel `KernelSpec.name`: tuned for this architecture, or heuristic."""
    return tuned_config(kernel, head_dim, dtype, arch) or heuristic_config(kernel, head_dim, dtype, arch)


def row_config(kernel: str, x: Tensor, heuristic: LaunchConfig) -> LaunchConfig:
    """The configuration of a kernel for the rows of x `[..., M]`: the tuned one if there is one, else `heuristic`."""
    dtype = TRITON_TYPE.get(str(x.dtype).removeprefix("torch."), "")
    return tuned_config(kernel, x.shape[-1], dtype, architecture(x.device)) or heuristic


# (rows of the tile that a program owns, rows of the tiles that it loops over, warps, stages) for head dimensions up to
# 64, up to 96, and 128. Programs of the forward and dq kernels own queries, those of the dkdv kernels keys.
_Row = tuple[int, int, int, int]
_HALF: dict[str, dict[int, tuple[_Row, _Row, _Row]]] = {
    "relpos_forward": {
        80: ((64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2)),
        90: ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
        100: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        120: ((64, 64, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2)),
    },
    "relpos_dkdv": {
        80: ((64, 32, 4, 2), (64, 16, 8, 2), (64, 16, 4, 2)),
        90: ((64, 64, 4, 3), (64, 32, 4, 2), (64, 16, 4, 2)),
        100: ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
        120: ((64, 16, 4, 2), (64, 16, 8, 2), (64, 16, 4, 2)),
    },
    "relpos_dq": {
        80: ((128, 32, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
        90: ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        100: ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        120: ((128, 32, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
    },
    "varlen_forward": {
        80: ((64, 64, 4, 3), (64, 32, 4, 3), (128, 32, 8, 2)),
        90: ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2)),
        100: ((64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 2)),
        120: ((64, 64, 4, 3), (64, 32, 4, 3), (128, 32, 8, 2)),
    },
    "varlen_dkdv": {
        80: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
        90: ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        100: ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
        120: ((64, 32, 4, 2), (64, 16, 8, 2), (64, 32, 8, 2)),
    },
    "varlen_dq": {
        80: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
        90: ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        100: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        120: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
    },
}
# Sequences of at most 32 tokens; several heads a program, over few keys and over many; tiles that more programs share;
# and packed attention with dropout or a mask of keys, which take registers.
_SHORT: tuple[_Row, _Row, _Row] = ((32, 16, 2, 2), (32, 16, 4, 2), (32, 16, 4, 2))
_HEADS: tuple[_Row, _Row, _Row] = ((16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2))
_HEADS_MANY: tuple[_Row, _Row, _Row] = ((16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2))
_FRAGMENTS: tuple[_Row, _Row, _Row] = ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3))
_NARROW: tuple[_Row, _Row, _Row] = ((64, 32, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2))
_SELECTIVE: tuple[_Row, _Row, _Row] = ((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2))
_SELECTIVE_100: tuple[_Row, _Row, _Row] = ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2))


def heuristic_config(kernel: str, head_dim: int, dtype: str, arch: int) -> LaunchConfig:
    """A configuration without spills in half precision, for two programs per multiprocessor at head dimension 64.

    fp32 is for exactness, not speed: it does not use the tensor cores. Architectures between the table's entries (86,
    89, 103, 121) use the nearest one that fits in their shared memory.
    """
    if dtype == "fp32":
        own, other, warps, stages = (32, 32, 4, 1) if head_dim > 64 else (32, 64, 4, 1)
    else:
        column = 0 if head_dim <= 64 else 1 if head_dim <= 96 else 2
        if kernel.endswith("_short"):
            rows = _SHORT
        elif kernel.endswith("_heads"):
            rows = _HEADS
        elif kernel.endswith("_heads_many"):
            rows = _HEADS_MANY
        elif kernel.endswith("_narrow"):
            rows = _NARROW
        elif kernel.endswith("_fragments"):
            rows = _FRAGMENTS
        elif kernel.endswith(("_dropout", "_masked")):
            rows = _SELECTIVE_100 if _nearest(arch) == 100 else _SELECTIVE
        else:
            rows = _HALF[kernel][_nearest(arch)]
        own, other, warps, stages = rows[column]
    block_m, block_n = (other, own) if "_dkdv" in kernel else (own, other)
    # Triton 3.6 makes these products wait for each other else.
    apart = kernel == "relpos_dkdv" and _nearest(arch) == 90 and head_dim <= 64 and dtype != "fp32"
    # A warp for each head of a program that has several.
    heads = {"HEADS": warps} if "_heads" in kernel else {}
    # Two more than two programs a multiprocessor may have, else.
    registers = 126 if kernel.endswith("_fragments") else 0
    return LaunchConfig({**heads, "BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages, apart, registers)


# (rows of the tile that a program owns, rows of the tiles that it loops over, warps, stages) for head dimensions up to
# 64, 72 (the masks of whose second piece take registers), 96, 128, 192 and 256. Programs of the forward, dq and dbias
# kernels own queries, those of the dkdv kernel keys.
_Rows = tuple[_Row, _Row, _Row, _Row, _Row, _Row]
_BIASED: dict[str, dict[int, _Rows]] = {
    "bias_attention_forward": {
        80: ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        90: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        100: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
        120: ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    },
    "bias_attention_dkdv": {
        80: ((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1)),
        90: ((64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 4, 2)),
        100: ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 1), (128, 16, 8, 1)),
        120: ((64, 16, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1)),
    },
    "bias_attention_dq": {
        80: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1)),
        90: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        100: ((128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 1), (128, 32, 8, 1)),
        120: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1)),
    },
    "bias_attention_dbias": {
        80: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
        90: ((64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
        100: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
        120: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
    },
}
_WIDTHS = (64, 72, 96, 128, 192, 256)


def bias_config(kernel: str, head_dim: int, dtype: str, arch: int, dropout: bool) -> LaunchConfig:
    """The configuration of a `bias_attention_*` kernel: tuned for the GPU, or free of spills in half precision.

    The tuned table is for kernels without dropout, whose random bits take registers; fp32 is for exactness, not speed.
    """
    tuned = None if dropout else tuned_config(kernel, head_dim, dtype, arch)
    if tuned is not None:
        return tuned
    if dtype == "fp32":
        own, other, warps, stages = (32, 32, 4, 1) if head_dim > 64 else (32, 64, 4, 1)
    else:
        rows = _BIASED[kernel][_nearest(arch)]
        own, other, warps, stages = rows[next(i for i, width in enumerate(_WIDTHS) if head_dim <= width)]
    if dropout and dtype != "fp32":
        other = min(other, 32)
    block_m, block_n = (other, own) if kernel == "bias_attention_dkdv" else (own, other)
    widest = {"bias_attention_dkdv": 64, "bias_attention_dq": 192}.get(kernel, 0)
    hopper = dtype != "fp32" and _nearest(arch) == 90
    # Wider heads have no registers for products apart. Unfenced, those of 96 and 128 are serialised, and 256 spills.
    apart, fenced = hopper and head_dim <= widest, hopper and 0 < widest < head_dim
    return LaunchConfig({"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages, apart, fenced=fenced)


def _nearest(arch: int) -> int:
    if arch < 90:
        return 80 if arch == 80 else 120
    return 90 if arch < 100 else 100 if arch < 120 else 120


def tail_size(tokens: int, block: int, masked: int = 32) -> int:
    """Rows of the last, partial tile: 0, or the smallest power of two from 16 up that holds the rest.

    Tiles of up to `masked` rows have no tail of another size, which would save little.
    """
    rest = tokens % block
    if rest == 0 or block <= masked:
        return block if rest else 0
    return max(16, triton.next_power_of_2(rest))
