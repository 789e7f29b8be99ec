"""Audit of the kernels' machine code, compiled without a GPU: spills, registers, occupancy, waits and hazards.

`compiling` measures, `machine_code` reads what the disassembler prints, and `baseline` compares the figures with the
accepted ones; `xfm-fast audit` prints them.
"""
