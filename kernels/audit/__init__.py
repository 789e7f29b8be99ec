"""The quality of the kernels' machine code, for architectures that need not be at hand.

Every shipped kernel is compiled for every architecture and type, and its code is read: registers, spills, shared
memory, occupancy, tensor-core instructions, widths of loads, instructions of the inner loop, hazards. `ratchet`
compares with what was accepted before, `targets` with what is aimed at. `xfm-fast audit` prints all of it.
"""

from .architectures import ARCHITECTURES, occupancy
from .compiling import compiler, default_cache
from .rows import Form, Row, audit, changed, compile_rows, describe, representative, shipped_forms, shipped_kernels

__all__ = [
    "ARCHITECTURES",
    "Form",
    "Row",
    "audit",
    "changed",
    "compile_rows",
    "compiler",
    "default_cache",
    "describe",
    "occupancy",
    "representative",
    "shipped_forms",
    "shipped_kernels",
]
