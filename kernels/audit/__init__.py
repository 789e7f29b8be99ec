"""Audit of the kernels' machine code, compiled without a GPU: spills, registers, occupancy, waits and hazards.

`compiling` compiles and measures, `machine_code` parses the disassembly, and `baseline` compares the figures with the
accepted ones; `xfm-fast audit` prints them.
"""
