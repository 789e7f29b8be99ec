"""Launch configurations: from a tuned table if there is one, else a heuristic chosen with the compiler's report.

A table is `kernels/tuning/sm_<arch>.json`:

    {"relpos_forward": {"bf16/64": {"tiles": {"BLOCK_M": 128, "BLOCK_N": 64}, "num_warps": 8, "num_stages": 3}}}

The number is the head dimension. There is no run-time tuning.
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
        given = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        return given | ({"maxnreg": self.registers} if self.registers else {})


@dataclass(frozen=True)
class CompileRequest:
    """The arguments of `ASTSource(r.kernel, r.signature, r.constexprs, r.attrs)` and its `options=r.options`."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]


# Types of arguments by name, where a kernel does not differ: other pointers are to the dtype that it computes in, other
# numbers are 32-bit integers.
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
        """The compilation of one variant for one dtype and architecture, with its own or another configuration."""
        config = self.config(variant, dtype, arch) if config is None else config
        constants = {**self.constants(variant, dtype, config), **config.tiles}
        names: list[str] = self.kernel.arg_names
        kinds = self.kernel.fn.__annotations__
        needed = {name for name, kind in kinds.items() if kind in ("tl.constexpr", tl.constexpr)}
        if wrong := (needed - constants.keys()) | (constants.keys() - set(names)):
            raise ValueError(f"kernel {self.name}: constants missing or unknown: {sorted(wrong)}")
        types = _TYPES | dict(self.types(variant, dtype))
        signature: dict[str, str] = {}
        attrs: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, name in enumerate(names):
            kind = types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
            signature[name] = kind = "constexpr" if name in constants else kind
            if kind.startswith("*") or (kind == "i32" and name.startswith("stride_")):
                attrs[(i,)] = [["tt.divisibility", 16]]
        ordered = {name: constants[name] for name in names if name in constants}
        return CompileRequest(self.kernel, signature, ordered, attrs, config.options)


def launch_options(
    spec: KernelSpec, like: Tensor, **variant: Any
) -> tuple[dict[str, Any], LaunchConfig]:
    """Constants, tiles and compile options of a launch on tensors like this one, and its configuration."""
    return cached_options(spec, dtype_name(like.dtype), architecture(like.device), **variant)


@lru_cache(4096)
def cached_options(
    spec: KernelSpec, dtype: str, arch: int, **variant: Any
) -> tuple[dict[str, Any], LaunchConfig]:
    """`launch_options` for a dtype and an architecture; to be forgotten when the table of configurations changes."""
    config = spec.config(variant, dtype, arch)
    constants = {
        k: v for k, v in spec.constants(variant, dtype, config).items() if not k.endswith("_ptr")
    }
    return {**constants, **config.tiles, **config.options}, config


def architecture(device: torch.device) -> int:
    """90 for NVIDIA's compute capability 9.0; 0 for AMD, where the same numbers mean other hardware.

    On a CPU it is that of the emulation; the interpreter uses the configurations of the oldest architecture.
    """
    if device.type != "cuda":
        return emulated_architecture() or 80
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU; 1 for the interpreter."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


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
    """The entry of the architecture's table for a kernel and its head dimension, if there is one."""
    row = _tuned(arch).get(kernel, {}).get(f"{dtype}/{size}")
    if row is None:
        return None
    rest = {name: row[name] for name in ("apart", "registers", "fenced") if name in row}
    return LaunchConfig(dict(row["tiles"]), row["num_warps"], row["num_stages"], **rest)


def tuned_backend(kernel: str, size: int, dtype: str, arch: int) -> str:
    """The fastest backend in the table for a kernel: `triton`, or `flash_attn`."""
    return _tuned(arch).get(kernel, {}).get(f"{dtype}/{size}", {}).get("backend", "triton")


def config_for(
    kernel: str, head_dim: int, dtype: str, arch: int, *, dropout: bool = False
) -> LaunchConfig:
    """The configuration of an attention kernel: tuned for this architecture, or heuristic.

    With `dropout` it is heuristic: random bits take registers, and the table has none for them under this name.
    """
    tuned = None if dropout else tuned_config(kernel, head_dim, dtype, arch)
    return tuned or heuristic_config(kernel, head_dim, dtype, arch, dropout=dropout)


# (rows of the tile that a program owns, rows of the tiles that it loops over, warps, stages) for head dimensions up to
# `_COLUMNS`. Programs of the forward, dq and dbias kernels own queries, those of the dkdv kernels keys.
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
        80: (
            (64, 64, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 8, 2),
            (64, 32, 8, 2),
        ),
        90: (
            (64, 64, 4, 2),
            (64, 64, 4, 2),
            (64, 64, 4, 2),
            (64, 64, 4, 2),
            (64, 64, 8, 2),
            (64, 32, 8, 2),
        ),
        100: (
            (128, 64, 8, 2),
            (128, 64, 8, 2),
            (128, 64, 8, 2),
            (128, 32, 8, 2),
            (128, 32, 8, 2),
            (128, 32, 8, 2),
        ),
        120: (
            (64, 64, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 8, 2),
            (64, 32, 8, 2),
        ),
    },
    "bias_attention_dkdv": {
        80: (
            (64, 32, 4, 2),
            (64, 32, 8, 2),
            (64, 32, 8, 2),
            (64, 32, 8, 2),
            (64, 16, 8, 1),
            (32, 16, 8, 1),
        ),
        90: (
            (64, 64, 4, 2),
            (64, 32, 8, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 8, 2),
            (64, 16, 4, 2),
        ),
        100: (
            (128, 32, 8, 2),
            (128, 32, 8, 2),
            (128, 32, 8, 2),
            (128, 32, 8, 2),
            (128, 32, 8, 1),
            (128, 16, 8, 1),
        ),
        120: (
            (64, 16, 4, 2),
            (64, 32, 8, 2),
            (64, 32, 8, 2),
            (64, 16, 8, 2),
            (64, 16, 8, 1),
            (32, 16, 8, 1),
        ),
    },
    "bias_attention_dq": {
        80: (
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 8, 2),
            (64, 32, 8, 1),
            (64, 16, 8, 1),
        ),
        90: (
            (64, 64, 4, 2),
            (64, 64, 4, 2),
            (64, 64, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 8, 2),
            (64, 32, 8, 2),
        ),
        100: (
            (128, 64, 8, 2),
            (128, 32, 8, 2),
            (128, 32, 8, 2),
            (128, 32, 8, 2),
            (128, 32, 8, 1),
            (128, 32, 8, 1),
        ),
        120: (
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 8, 2),
            (64, 32, 8, 1),
            (64, 16, 8, 1),
        ),
    },
    "bias_attention_dbias": {
        80: (
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 8, 1),
            (64, 32, 8, 1),
        ),
        90: (
            (64, 64, 4, 2),
            (64, 64, 8, 2),
            (64, 64, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 8, 1),
            (64, 32, 8, 1),
        ),
        100: (
            (64, 64, 4, 2),
            (64, 64, 4, 2),
            (64, 64, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 8, 1),
            (64, 32, 8, 1),
        ),
        120: (
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 8, 1),
            (64, 32, 8, 1),
        ),
    },
}
# By the end of a kernel's name: packed attention with dropout or a mask of keys, which take registers; sequences of at
# most 32 tokens; several heads a program, over few keys and over many; tiles that more programs share.
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
# The widest head whose products have accumulators of their own: Triton 3.6 makes them wait for each other on Hopper
# else. Wider heads have no registers for it; unfenced, 96 and 128 are serialised, and 256 spills.
_APART = {"relpos_dkdv": 64, "bias_attention_dkdv": 64, "bias_attention_dq": 192}


def heuristic_config(
    kernel: str, head_dim: int, dtype: str, arch: int, *, dropout: bool = False
) -> LaunchConfig:
    """A configuration without spills in half precision, for two programs per multiprocessor at head dimension 64.

    fp32 is for exactness, not speed: it does not use the tensor cores. Architectures between the table's entries (86,
    89, 103, 121) use the nearest one that fits in their shared memory.
    """
    nearest = (
        (80 if arch == 80 else 120)
        if arch < 90
        else 90
        if arch < 100
        else 100
        if arch < 120
        else 120
    )
    if dtype == "fp32":
        own, other, warps, stages = (32, 32, 4, 1) if head_dim > 64 else (32, 64, 4, 1)
    else:
        form = next((end for end in _FORMS if kernel.endswith(end)), None)
        rows = _TILES[kernel][nearest] if form is None else _FORMS[form]
        own, other, warps, stages = rows[bisect_left(_COLUMNS[len(rows)], head_dim)]
        if rows is _SELECTIVE and nearest == 100:
            warps = 8
        if dropout:
            other = min(other, 32)
    block_m, block_n = (other, own) if "_dkdv" in kernel else (own, other)
    # A warp for each head of a program that has several.
    heads = {"HEADS": warps} if "_heads" in kernel else {}
    widest = _APART.get(kernel, 0) if dtype != "fp32" and nearest == 90 else 0
    # Two more than two programs a multiprocessor may have, else.
    registers = 126 if kernel.endswith("_fragments") else 0
    tiles = {**heads, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return LaunchConfig(
        tiles, warps, stages, head_dim <= widest, registers, fenced=0 < widest < head_dim
    )


def tail_size(tokens: int, block: int, masked: int = 32) -> int:
    """Rows of the last, partial tile: 0, or the smallest power of two from 16 up that holds the rest.

    Tiles of up to `masked` rows have no tail of another size, which would save little.
    """
    rest = tokens % block
    if rest == 0 or block <= masked:
        return block if rest else 0
    return max(16, triton.next_power_of_2(rest))
