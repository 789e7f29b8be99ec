"""Kernels that LLVM (llvmlite) compiles at run time for this processor; no C compiler is needed.

They fuse what library calls cannot: a tile stays in registers and cache from its first GEMM to its last. Whether one
runs is measured like every other choice, and each has a plain-PyTorch twin.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import platform
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

ZERO_BYTE = 128
"""The byte that stands for 0 in GEMMs of unsigned with signed bytes."""
NO_FRACTIONS = 1.5 * 2**23
"""Added to a small fp32 number, it leaves no mantissa bits for fractions, so the lowest byte is the rounded level."""
TOGETHER = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
"""Elements of a 32-bit unit, which one lane of a multiply-add takes at once."""


class Level(NamedTuple):
    """An instruction-set level that kernels are compiled for."""

    name: str
    lanes: int
    """32-bit elements of a vector."""
    rows: int
    """Rows of a register tile of two vectors, which with its operands fills the registers."""
    processor: str
    """LLVM's name of a processor with this level; kernels of the best level are compiled for the host instead."""
    bf16: bool
    """Dot products of bf16 pairs, accumulated in fp32, and of groups of four bytes: processors have both or neither."""
    tiles: Literal["", "registers", "memory"] = ""
    """Where the tiles of AMX are: in its registers, or in memory, where loops simulate it; empty without AMX."""


_AVX2 = Level("avx2", 8, 6, "x86-64-v3", False)
_AVX512 = Level("avx512", 16, 12, "x86-64-v4", False)
_AVX512_BF16 = Level("avx512_bf16", 16, 12, "cooperlake", True)
AMX = Level("amx", 16, 12, "sapphirerapids", True, "registers")
"""The level whose kernels without tiles are those of AVX-512 BF16."""
# Of arch_prctl: its number as a system call, two of its functions, and the state of the processor that tiles are.
_ARCH_PRCTL, _GET_PERMISSION, _REQUEST_PERMISSION, _TILES = 158, 0x1022, 0x1023, 18


@cache
def levels() -> tuple[Level, ...]:
    """Return the instruction-set levels that compile and run here, best first; none if `why_not` has a reason."""
    if why_not() is not None:
        return ()
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return (_AVX2,)
    if not torch.cpu._is_avx512_bf16_supported():
        return _AVX512, _AVX2
    amx = (AMX,) if why_no_tiles() is None else ()
    return (*amx, _AVX512_BF16, _AVX512, _AVX2)


@cache
def why_not(dtype: torch.dtype = torch.float32) -> str | None:
    """Return the reason why no kernel of this dtype can be compiled here, or None."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"compiled kernels are written for Linux on x86-64, not {sys.platform} on {platform.machine()}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "this processor, or ATEN_CPU_CAPABILITY, has no AVX2"
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite is not installed"
    if not _may_execute():
        return "this process may not run code that it writes (as with MemoryDenyWriteExecute of systemd)"
    if dtype not in TOGETHER:
        return f"there is no kernel in {dtype}"
    if TOGETHER[dtype] > 1 and not levels()[0].bf16:
        return "this processor has no AVX-512 BF16"
    return None


@cache
def why_no_tiles() -> str | None:
    """Return the reason why kernels use no AMX here, or None; asks Linux for permission, once and for all threads."""
    if not {"amx_tile", "amx_bf16", "amx_int8"} <= _processor_flags():
        return "this processor has no AMX, or Linux does not offer it"
    libc, granted = ctypes.CDLL(None, use_errno=True), ctypes.c_uint64()
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILES):
        return f"Linux refuses AMX to this process: {os.strerror(ctypes.get_errno())}"
    # Some sandboxes ignore requests that they do not know.
    libc.syscall(_ARCH_PRCTL, _GET_PERMISSION, ctypes.byref(granted))
    return None if granted.value >> _TILES & 1 else "this sandbox does not pass AMX on"


def _processor_flags() -> set[str]:
    """Return the features of the processor as Linux names them."""
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("flags"):
                return set(line.split())
    return set()


@cache
def _may_execute() -> bool:
    # LLVM ignores a refusal by the system, and the first call of a kernel would end the process.
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    size, protection = ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC
    return ctypes.CDLL(None).mprotect(address, size, protection) == 0


@cache
def fills_vectors(width: int, dtype: torch.dtype) -> bool:
    """Return whether kernels take rows of `width` elements, which must fill whole vectors."""
    return why_not(dtype) is None and width % (levels()[0].lanes * TOGETHER[dtype]) == 0


@cache
def fits(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Return whether there is a kernel for a linear layer of these sizes."""
    return fills_vectors(inputs, dtype) and outputs % levels()[0].lanes == 0
