"""Faults that PTX and machine code show: products that run one by one, tiles staged in registers, writes without a
barrier, copies without a fence, operands in registers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .sass import Instruction, Loop

_REGISTER = re.compile(r"\bR(\d+)\b")
_WARPS_OF_A_GROUP = 4
_WRITES_SHARED = ("STS", "STSM", "LDGSTS")
_STORES = ("STS", "STSM", "STG", "ST", "STL", "RED", "REDG")
_WIDTHS = {"64": 2, "WIDE": 2, "128": 4, "256": 8}
# Results that are no longer the tile: sums over it, products with it, and what was computed from its values.
_COPIES = ("MOV", "PRMT", "F2FP", "IMAD", "HADD2", "SEL", "SHF", "LOP3", "MOVM", "SHFL")


_PTX_LABEL = re.compile(r"^\s*(\$\w+):")
_PTX_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
_PTX_REGISTER_OPERAND = re.compile(r"\bwgmma\.mma_async\.[^{]*\{[^}]*\},\s*\{")


def unfenced_copies(ptx: str) -> int:
    """Products of Hopper's tensor cores that follow an asynchronous copy's wait without a proxy fence between.

    `cp.async` writes by another proxy than the tensor cores read by: without the fence they may read what was there
    before (triton#9610). Each loop is followed once more from its end.
    """
    lines = ptx.splitlines()
    labels = {found[1]: n for n, text in enumerate(lines) if (found := _PTX_LABEL.match(text))}
    unfenced: set[int] = set()

    def follow(first: int, last: int, pending: bool, *, again: bool) -> bool:
        for n in range(first, last):
            text = lines[n]
            if "cp.async.wait_" in text and "bulk" not in text:
                pending = True
            elif "fence.proxy.async" in text:
                pending = False
            elif "wgmma.mma_async" in text and pending:
                unfenced.add(n)
            elif again and (branch := _PTX_BRANCH.search(text)) and (start := labels.get(branch[1], n)) < n:
                follow(start, n, pending, again=False)
        return pending

    follow(0, len(lines), False, again=True)
    return len(unfenced)


def register_operands(ptx: str) -> int:
    """Products of Hopper's tensor cores whose left operand is in registers, which ptxas before 13.3 may overwrite."""
    return len(_PTX_REGISTER_OPERAND.findall(ptx))


def tensor_waits(loop: Loop | None) -> int:
    """Waits for Hopper's tensor cores in a loop.

    One or two a turn let the next product begin while the last runs. One for every HGMMA is what the compiler falls
    back to when it cannot prove an accumulator untouched (its warnings C7510 to C7519): the products run one by one.
    """
    found = loop.instructions if loop else ()
    return sum(i.opcode == "WARPGROUP" and "DEPBAR" in i.modifiers for i in found)


def staged_tiles(loop: Loop | None, rows: Iterable[tuple[str, int]]) -> int:
    """Loads of tiles in a loop whose values are written to shared memory from registers.

    Such a load is not started a turn ahead, as an asynchronous copy (LDGSTS) is: every turn waits for memory.

    Args:
        rows: source lines that load one value a row, which are none of the tile's.
    """
    if loop is None:
        return 0
    single = frozenset(rows)
    origin: dict[int, set[int]] = {}  # register → addresses of the loads whose values it holds
    staged: set[int] = set()
    for instruction in loop.instructions * 2:  # twice, for what is loaded in one turn and written in the next
        name = instruction.opcode
        registers = [int(number) for number in _REGISTER.findall(instruction.operands)]
        if name in ("STS", "STSM"):
            _, _, value = instruction.operands.partition("],")
            for number in map(int, _REGISTER.findall(value)):
                for held in range(number, number + _width(instruction)):
                    staged |= origin.get(held, set())
        elif name in _STORES or not registers or not instruction.operands.startswith("R"):
            continue
        elif name in ("LDG", "LD"):
            mark = set() if instruction.line in single else {instruction.address}
            for held in range(registers[0], registers[0] + _width(instruction)):
                origin[held] = mark
        else:
            sources = set[int]().union(*(origin.get(r, set()) for r in registers[1:])) if name in _COPIES else set()
            for held in range(registers[0], registers[0] + _width(instruction)):
                origin[held] = sources
    return len(staged)


def unfenced_writes(loop: Loop | None, warps: int) -> int:
    """Writes to shared memory in a loop that follow a full wait for Hopper's tensor cores without a barrier between.

    A wait covers the four warps of its own group. With more of them another group may still be reading what the write
    replaces (triton#9433, #11047), unless the write goes to a buffer that nobody reads any more, which machine code
    does not show: the count is compared with the accepted one and is no proof of a fault.
    """
    if loop is None or warps <= _WARPS_OF_A_GROUP:
        return 0
    pending, found = False, 0
    for turn in range(2):
        for instruction in loop.instructions:
            if instruction.opcode == "WARPGROUP" and "DEPBAR" in instruction.modifiers:
                pending = pending or instruction.operands.endswith("0x0")
            elif instruction.opcode == "BAR":
                pending = False
            elif pending and turn and instruction.opcode in _WRITES_SHARED:
                found += 1
    return found


def _width(instruction: Instruction) -> int:
    """Registers of one operand."""
    return next((_WIDTHS[m] for m in instruction.modifiers if m in _WIDTHS), 1)
