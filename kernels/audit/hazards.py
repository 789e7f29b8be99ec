"""Hazards of Hopper's tensor cores in PTX and machine code: serialised products, missing barriers and fences."""

from __future__ import annotations

import re

from .sass import Loop

_WARPS_OF_A_GROUP = 4
_WRITES_SHARED = ("STS", "STSM", "LDGSTS")
_PTX_LABEL = re.compile(r"^\s*(\$\w+):")
_PTX_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
_PTX_REGISTER_OPERAND = re.compile(r"\bwgmma\.mma_async\.[^{]*\{[^}]*\},\s*\{")


def unfenced_copies(ptx: str) -> int:
    """The number of wgmma instructions after the wait for an asynchronous copy, without a proxy fence between.

    `cp.async` writes through another proxy than wgmma reads: without the fence wgmma may read stale data (triton#9610).
    Each loop is followed once more from its end.
    """
    lines = ptx.splitlines()
    labels = {label[1]: n for n, text in enumerate(lines) if (label := _PTX_LABEL.match(text))}
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
    """The number of wgmma instructions with the left operand in registers, which ptxas before 13.3 may overwrite."""
    return len(_PTX_REGISTER_OPERAND.findall(ptx))


def tensor_waits(loop: Loop | None) -> int:
    """Waits for wgmma in a loop.

    One or two per iteration overlap products. One per HGMMA serialises them: the compiler's fallback if it cannot prove
    an accumulator untouched (warnings C7510 to C7519).
    """
    instructions = loop.instructions if loop else ()
    return sum(i.opcode == "WARPGROUP" and "DEPBAR" in i.modifiers for i in instructions)


def unfenced_writes(loop: Loop | None, warps: int) -> int:
    """Writes to shared memory in a loop after a full wait for wgmma, without a barrier between.

    A wait covers its own group of four warps: another group may still read the buffer (triton#9433, #11047). A write to
    a buffer without readers is harmless, which machine code does not show: compare the count with the accepted one.
    """
    if loop is None or warps <= _WARPS_OF_A_GROUP:
        return 0
    pending, count = False, 0
    for iteration in range(2):
        for instruction in loop.instructions:
            if instruction.opcode == "WARPGROUP" and "DEPBAR" in instruction.modifiers:
                pending = pending or instruction.operands.endswith("0x0")
            elif instruction.opcode == "BAR":
                pending = False
            elif pending and iteration and instruction.opcode in _WRITES_SHARED:
                count += 1
    return count
