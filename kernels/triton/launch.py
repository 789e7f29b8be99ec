"""Launch configurations: from a tuned table if there is one, else by a heuristic based on the audit's figures.

A table is `kernels/tuning/sm_<arch>.json`:

    {"relpos_forward": {"bf16/64": {"tiles": {"BLOCK_M": 128, "BLOCK_N": 64}, "num_warps": 8, "num_stages": 3}}}

Keys are dtype and head dimension. There is no run-time tuning.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xfm_fast.errors import InputError

from ..backend import emulated_architecture

_TUNING = Path(__file__).resolve().parent.parent / "tuning"
TRITON_TYPE = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class LaunchConfig:
    """Tiling and compile options of a kernel."""

    tiles: Mapping[str, int]  # `{"BLOCK_M": 128, "BLOCK_N": 64}`
    num_warps: int = 4
    num_stages: int = 2  # of the software pipeline over a loop's loads
    # GEMMs have accumulators of their own, added to the sums later: on Hopper they stay in flight, at the cost of
    # registers.
    apart: bool = False
    registers: int = 0  # maximum per thread, where the compiler needs one
    # The last tile follows a branch that is always taken; see `relpos_attention.forward_kernel`.
    fenced: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Compile options of a launch. FMA fusion is explicit: Triton's default changes in 3.10."""
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.registers:
            options["maxnreg"] = self.registers
        return options


@dataclass(frozen=True)
class CompileRequest:
    """Arguments of `triton.compile(ASTSource(kernel, signature, constexprs, attrs), options=options)`."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]


# Default types of arguments by name. Other pointers are to the dtype that a kernel computes in, other numbers are
# 32-bit integers.
_STATISTICS = (
    "mean rstd partials lse dlse row_lse delta scales maximum sum picked total loss log_sum "
    "coefficient entries largest"
)
_TYPES = {
    **dict.fromkeys((f"{name}_ptr" for name in _STATISTICS.split()), "*fp32"),
    **dict.fromkeys(
        ("seed_ptr", "tokens_ptr", "positions_ptr", "target_ptr", "ids_ptr", "order_ptr"), "*i64"
    ),
    **dict.fromkeys(("cu_q_ptr", "cu_k_ptr"), "*i32"),
    **dict.fromkeys(("eps", "keep_scale", "smoothing", "inverse"), "fp32"),
    "mask_ptr": "*u8",
    "rounded_ptr": "*fp8e4nv",
}
Variant = Mapping[str, Any]
"""`{"head_dim": 64, "dropout": 0.1}`: the constants of a launch follow from it, the dtype and the architecture."""


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """A kernel and its shipped variants. Pointers and `stride_*` are compiled as multiples of 16."""

    name: str  # unique; the kernel's key in `tuning/<arch>.json`
    kernel: Any  # the `triton.jit` function
    variants: tuple[Variant, ...]
    # (variant, "bf16", 90) → launch configuration.
    config: Callable[[Variant, str, int], LaunchConfig]
    # (variant, "bf16", configuration) → values of the constants besides the tiles; None for an absent pointer.
    constants: Callable[[Variant, str, LaunchConfig], dict[str, Any]]
    # (variant, "bf16") → types of arguments that differ from `_TYPES`.
    types: Callable[[Variant, str], Mapping[str, str]] = lambda variant, dtype: {}
    tensor_core: bool = True  # it multiplies matrices
    dtypes: tuple[str, ...] = ("fp16", "bf16")
    arches: tuple[int, ...] = ()  # the only architectures to compile for; empty for all

    def request(
        self, variant: Variant, dtype: str, arch: int, config: LaunchConfig | None = None
    ) -> CompileRequest:
        """Return the compilation of a variant for a dtype and architecture, by default with its own configuration."""
        config = self.config(variant, dtype, arch) if config is None else config
        constants = {**self.constants(variant, dtype, config), **config.tiles}
        names: list[str] = self.kernel.arg_names
        annotations = self.kernel.fn.__annotations__.items()
        needed = {name for name, hint in annotations if hint in ("tl.constexpr", tl.constexpr)}
        if wrong := (needed - constants.keys()) | (constants.keys() - set(names)):
            raise ValueError(f"kernel {self.name}: constants missing or unknown: {sorted(wrong)}")
        types = _TYPES | dict(self.types(variant, dtype))
        signature: dict[str, str] = {}
        attrs: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, name in enumerate(names):
            argument = types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
            if name in constants:
                argument = "constexpr"
            signature[name] = argument
            if argument[0] == "*" or (argument == "i32" and name.startswith("stride_")):
                attrs[(i,)] = [["tt.divisibility", 16]]
        ordered = {name: constants[name] for name in names if name in constants}
        return CompileRequest(self.kernel, signature, ordered, attrs, config.options)


def launch_options(
    spec: KernelSpec, like: Tensor, **variant: Any
) -> tuple[dict[str, Any], LaunchConfig]:
    """Return constants, tiles and compile options of a launch on tensors like this one, and its configuration."""
    return cached_options(spec, dtype_name(like.dtype), architecture(like.device), **variant)


@lru_cache(4096)
def cached_options(
    spec: KernelSpec, dtype: str, arch: int, **variant: Any
) -> tuple[dict[str, Any], LaunchConfig]:
    """Return `launch_options` for a dtype and an architecture; clear the cache when the tuned tables change."""
    config = spec.config(variant, dtype, arch)
    constants = spec.constants(variant, dtype, config).items()
    options = {name: value for name, value in constants if not name.endswith("_ptr")}
    return {**options, **config.tiles, **config.options}, config


def architecture(device: torch.device) -> int:
    """Return 90 for NVIDIA's compute capability 9.0, and 0 for AMD, whose capabilities have other meanings.

    On a CPU it is the emulated architecture; the interpreter uses the configurations of the oldest one.
    """
    if device.type != "cuda":
        return emulated_architecture() or 80
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def dtype_name(dtype: torch.dtype) -> str:
    """Return Triton's name of a compute dtype: `bf16`; InputError for an unsupported one."""
    name = str(dtype).removeprefix("torch.")
    if name not in TRITON_TYPE:
        raise InputError(f"the Triton kernels compute in {', '.join(TRITON_TYPE)}; got {name}")
    return TRITON_TYPE[name]


@cache
def _tuned(arch: int) -> dict[str, dict[str, dict[str, Any]]]:
    path = _TUNING / f"sm_{arch}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def tuned_config(kernel: str, size: int, dtype: str, arch: int) -> LaunchConfig | None:
    """Return the tuned configuration of a kernel for a head dimension, if the architecture's table has one."""
    row = _tuned(arch).get(kernel, {}).get(f"{dtype}/{size}")
    if row is None:
        return None
    flags = {name: row[name] for name in ("apart", "registers", "fenced") if name in row}
    return LaunchConfig(dict(row["tiles"]), row["num_warps"], row["num_stages"], **flags)


def tuned_backend(kernel: str, size: int, dtype: str, arch: int) -> str:
    """Return the fastest backend for a kernel by the architecture's table: `triton`, or `flash_attn`."""
    return _tuned(arch).get(kernel, {}).get(f"{dtype}/{size}", {}).get("backend", "triton")


def config_for(
    kernel: str, head_dim: int, dtype: str, arch: int, *, dropout: bool = False
) -> LaunchConfig:
    """Return the configuration of an attention kernel: tuned for this architecture, or heuristic.

    With `dropout` it is heuristic: random bits take registers, and tables have no entries for them.
    """
    tuned = None if dropout else tuned_config(kernel, head_dim, dtype, arch)
    return tuned or heuristic_config(kernel, head_dim, dtype, arch, dropout=dropout)


# (rows of the output tile, rows of the tiles that the program loops over, warps, stages) for head dimensions up to
# `_COLUMNS`. Output tiles of the forward, dq and dbias kernels are queries, those of the dkdv kernels keys.
_Rows = tuple[tuple[int, int, int, int], ...]
# The masks of the second piece of a head of 72 take registers.
_COLUMNS = {3: (64, 96, 128), 6: (64, 72, 96, 128, 192, 256)}
_TILES: dict[str, dict[int, _Rows]] = {
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
}  # fmt: skip
# By the suffix of a kernel's name: packed attention with dropout or a mask of keys, which take registers; sequences of
# at most 32 tokens; several heads a program, over few keys and over many; bias in fragments; smaller tiles.
_SELECTIVE: _Rows = ((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2))
_FORMS: dict[str, _Rows] = {
    "_dropout": _SELECTIVE,
    "_masked": _SELECTIVE,
    "_short": ((32, 16, 2, 2), (32, 16, 4, 2), (32, 16, 4, 2)),
    "_heads": ((16, 16, 4, 2),) * 3,
    "_heads_many": ((16, 32, 4, 2),) * 3,
    "_fragments": ((128, 64, 8, 3),) * 3,
    "_narrow": ((64, 32, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2)),
}
# The widest head whose GEMMs have accumulators of their own: else Triton 3.6 serialises them on Hopper. Wider heads
# have no registers for it; without a fence, 96 and 128 are serialised, and 256 spills.
_APART = {"relpos_dkdv": 64, "bias_attention_dkdv": 64, "bias_attention_dq": 192}


def heuristic_config(
    kernel: str, head_dim: int, dtype: str, arch: int, *, dropout: bool = False
) -> LaunchConfig:
    """Return a configuration without spills in half precision, for two programs per multiprocessor at head dim 64.

    fp32 is for exactness, not speed: it does not use the tensor cores. Architectures between the table's entries (86,
    89, 103, 121) use the nearest one that fits in their shared memory.
    """
    if arch < 90:
        nearest = 80 if arch == 80 else 120
    else:
        nearest = max(entry for entry in (90, 100, 120) if entry <= arch)
    if dtype == "fp32":
        output, looped, warps, stages = (32, 32, 4, 1) if head_dim > 64 else (32, 64, 4, 1)
    else:
        form = next((end for end in _FORMS if kernel.endswith(end)), None)
        rows = _TILES[kernel][nearest] if form is None else _FORMS[form]
        output, looped, warps, stages = rows[bisect_left(_COLUMNS[len(rows)], head_dim)]
        if rows is _SELECTIVE and nearest == 100:
            warps = 8
        if dropout:
            looped = min(looped, 32)
    block_m, block_n = (looped, output) if "_dkdv" in kernel else (output, looped)
    # One warp per head.
    heads = {"HEADS": warps} if "_heads" in kernel else {}
    widest = _APART.get(kernel, 0) if dtype != "fp32" and nearest == 90 else 0
    # The compiler's own count is two above the limit for two programs per multiprocessor.
    registers = 126 if kernel.endswith("_fragments") else 0
    tiles = {**heads, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return LaunchConfig(
        tiles, warps, stages, head_dim <= widest, registers, fenced=0 < widest < head_dim
    )


def tail_size(tokens: int, block: int, masked: int = 32) -> int:
    """Return the rows of the last, partial tile: 0, or the smallest power of two from 16 up that holds the remainder.

    Tiles of up to `masked` rows have tails of the same size, since smaller ones would save little.
    """
    remainder = tokens % block
    if not remainder or block <= masked:
        return block if remainder else 0
    return max(16, triton.next_power_of_2(remainder))
