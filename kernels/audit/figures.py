"""The figures of a binary: counts of its machine code, and the faults that it shows."""

from __future__ import annotations

from . import hazards, sass
from .architectures import occupancy
from .compiling import Binary, Figures

# From Hopper on the disassembler counts the driver's reserve as the kernel's.
_RESERVED_SHARED = 1024


def measure(binary: Binary, arch: int) -> Figures:
    """Reads the machine code of a binary.

    Args:
        arch: that it was compiled for, such as 90.
    """
    code = sass.parse(binary.listing, binary.resources)
    loop = code.main_loop
    inner = [i for inner_loop in code.inner_loops for i in inner_loop.instructions]
    rows = set(binary.row_lines)
    opcodes = sorted({i.opcode for i in code.instructions if i.tensor_core})
    static = max(0, code.static_shared_bytes - (_RESERVED_SHARED if arch >= 90 else 0))
    shared = static + binary.shared_bytes
    blocks = occupancy(
        arch,
        registers=code.registers,
        shared_bytes=shared,
        warps=binary.warps,
        tensor_memory=binary.tensor_memory,
    )
    return Figures(
        registers=code.registers,
        stack_bytes=code.stack_bytes,
        shared_bytes=shared,
        tensor_memory=binary.tensor_memory,
        warps=binary.warps,
        occupancy=blocks,
        instructions=len(code.instructions),
        tensor_core={opcode: code.count(opcode) for opcode in opcodes},
        loads=dict(sass.count_loads(code.instructions)),
        local_loads=code.count("LDL"),
        local_stores=code.count("STL"),
        loop_instructions=len(loop.instructions) if loop else 0,
        loop_tensor_core=loop.tensor_core if loop else 0,
        loop_waits=hazards.tensor_waits(loop),
        inner_loads=dict(sass.count_loads(inner)),
        tile_loads=dict(sass.count_loads(i for i in inner if i.line not in rows)),
        staged_tiles=hazards.staged_tiles(loop, rows),
        unfenced_writes=hazards.unfenced_writes(loop, binary.warps),
        unfenced_copies=binary.unfenced_copies,
        unsafe_operands=binary.unsafe_operands,
        warnings=binary.warnings,
    )
