"""Audit of the kernels' machine code, compiled without a GPU: spills, registers, occupancy, waits and hazards.

`baseline` compares the figures with the accepted ones; `xfm-fast audit` prints them.
"""

from .architectures import ARCHITECTURES
from .rows import Form, Row, changed, compile_rows, describe, representative, shipped_forms, shipped_kernels
from .task import compiler

__all__ = [
    "ARCHITECTURES",
    "Form",
    "Row",
    "changed",
    "compile_rows",
    "compiler",
    "describe",
    "representative",
    "shipped_forms",
    "shipped_kernels",
]
