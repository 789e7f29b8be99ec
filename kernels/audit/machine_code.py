"""Machine code of one kernel: its instructions and loops, hazards of Hopper's tensor cores, and the occupancy.

Natural loops are found by dominators. Backward branches do not suffice: the compiler places the waits for Blackwell's
barriers after the end of a loop and jumps back. Limits of multiprocessors: CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

ARCHITECTURES = (80, 90, 100, 120)
RESERVED_SHARED = 1024  # of every block, for the driver

_REGISTERS = 65536
_PARTITIONS = 4  # of a multiprocessor, each with a quarter of the registers
_REGISTER_UNIT = 256  # a warp's registers are a multiple of this
_MAX_REGISTERS = 255  # of a thread
_SHARED_UNIT = 128
_TENSOR_MEMORY = 512  # columns


@dataclass(frozen=True)
class Limits:
    """The resources of one multiprocessor; `block_shared` is the maximum of one block."""

    warps: int
    blocks: int
    shared: int
    block_shared: int


LIMITS = {
    80: Limits(64, 32, 164 * 1024, 163 * 1024),
    86: Limits(48, 16, 100 * 1024, 99 * 1024),
    89: Limits(48, 24, 100 * 1024, 99 * 1024),
    90: Limits(64, 32, 228 * 1024, 227 * 1024),
    100: Limits(64, 32, 228 * 1024, 227 * 1024),
    103: Limits(64, 32, 228 * 1024, 227 * 1024),
    120: Limits(48, 24, 100 * 1024, 99 * 1024),
}

# /*0120*/  @!P0 BRA `(.L_x_3) ;  /* 0x00000000008c8947 */
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);"
)
_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_RESOURCES = re.compile(r"\bREG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_TARGET = re.compile(r"`\(([^)]+)\)")
# HMMA up to sm_89 and on sm_120, HGMMA on sm_90, UTCHMMA on sm_100; other letters stand for other operand types.
_TENSOR_CORE = re.compile(r"[A-Z]?[A-Z]G?MMA|UTC[A-Z]+MMA")
_GLOBAL_LOADS = {"LDG", "LD", "LDGSTS", "UTMALDG", "UBLKCP"}
_WARPS_OF_A_GROUP = 4
_WRITES_SHARED = ("STS", "STSM", "LDGSTS")
_PTX_LABEL = re.compile(r"^\s*(\$\w+):")
_PTX_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
_PTX_REGISTER_OPERAND = re.compile(r"\bwgmma\.mma_async\.[^{]*\{[^}]*\},\s*\{")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; `target` is the address of a branch, `operands` the text: `R4, [R2.64+0x10]`."""

    address: int
    predicate: str
    opcode: str
    modifiers: tuple[str, ...]
    target: int | None
    operands: str = ""

    @property
    def tensor_core(self) -> bool:
        """Whether it is a matrix multiplication."""
        return bool(_TENSOR_CORE.fullmatch(self.opcode))


@dataclass(frozen=True)
class Loop:
    """The instructions of a natural loop, with its inner loops."""

    instructions: tuple[Instruction, ...] = field(repr=False)

    @cached_property
    def tensor_core(self) -> int:
        """Number of tensor-core instructions."""
        return sum(i.tensor_core for i in self.instructions)

    @property
    def works(self) -> bool:
        """Whether the loop loads or multiplies, rather than wait for a barrier."""
        return bool(self.tensor_core or any(i.opcode in _GLOBAL_LOADS for i in self.instructions))


def _loop_size(loop: Loop) -> tuple[int, int]:
    return loop.tensor_core, len(loop.instructions)


@dataclass(frozen=True)
class MachineCode:
    """The machine code and resources of one kernel."""

    registers: int
    stack_bytes: int
    static_shared_bytes: int
    instructions: tuple[Instruction, ...] = field(repr=False)

    @cached_property
    def inner_loops(self) -> list[Loop]:
        """The working loops without another working loop inside."""
        working = [loop for loop in natural_loops(self.instructions) if loop.works]
        bodies = [set(loop.instructions) for loop in working]
        return [
            loop
            for loop, body in zip(working, bodies, strict=True)
            if not any(other < body for other in bodies)
        ]

    @property
    def main_loop(self) -> Loop | None:
        """The inner loop with the most tensor-core instructions; without tensor cores, the longest."""
        return max(self.inner_loops, key=_loop_size, default=None)


def parse(disassembly: str, resources: str) -> MachineCode:
    """Parse the output of `nvdisasm -c` and `cuobjdump -res-usage` for a binary of one kernel."""
    usage = _RESOURCES.findall(resources)
    matches: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for text in disassembly.splitlines():
        if match := _INSTRUCTION.match(text):
            matches.append(match)
            labels |= dict.fromkeys(pending, int(match[1], 16))
            pending = []
        elif label := _LABEL.match(text):
            pending.append(label[1])
    if len(usage) != 1 or not matches:
        raise ValueError(f"expected the disassembly of one kernel; found {len(usage)}")
    registers, stack, shared, local = map(int, usage[0])
    instructions = []
    for match in matches:
        digits, predicate, name, operands = match.groups()
        address, (opcode, *modifiers) = int(digits, 16), name.split(".")
        label = _TARGET.search(operands) if opcode in ("BRA", "CALL") else None
        if opcode == "BRA" and not predicate and "," in operands:
            predicate = operands.split(",")[0]  # BRA.U UP0, `(.L_x_3): the condition is an operand
        target = labels.get(label[1]) if label else None
        # Padding for alignment follows a branch to itself; neither is reachable.
        if opcode != "NOP" and target != address:
            instructions.append(
                Instruction(
                    address, predicate or "", opcode, tuple(modifiers), target, operands.strip()
                )
            )
    return MachineCode(registers, stack + local, shared, tuple(instructions))


def natural_loops(instructions: tuple[Instruction, ...]) -> list[Loop]:
    """Return the loops by address; back edges to the same block belong to one loop."""
    blocks, successors = _flow_graph(instructions)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block, following in enumerate(successors):
        for target in following:
            predecessors[target].append(block)
    # A block's dominators are the blocks on all paths to it, itself included.
    reachable = _reach({0}, successors, set())
    dominators = dict.fromkeys(sorted(reachable), reachable) | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in list(dominators)[1:]:
            incoming = [dominators[p] for p in predecessors[block] if p in reachable]
            common = set.intersection(*incoming) | {block}
            if common != dominators[block]:
                dominators[block], changed = common, True
    bodies: dict[int, set[int]] = {}
    for tail in dominators:
        for head in successors[tail]:
            if head in dominators[tail]:
                body = bodies.setdefault(head, {head})
                body |= _reach({tail}, predecessors, body) & reachable
    return [
        Loop(tuple(i for block in sorted(bodies[head]) for i in blocks[block]))
        for head in sorted(bodies)
    ]


def _reach(start: set[int], edges: list[list[int]], visited: set[int]) -> set[int]:
    """Return `visited` and the blocks reachable from `start` without passing through it."""
    reached, pending = set(visited), list(start)
    while pending:
        block = pending.pop()
        if block not in reached:
            reached.add(block)
            pending += edges[block]
    return reached


def _flow_graph(
    instructions: tuple[Instruction, ...],
) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Return basic blocks, and the successors of each block."""
    leaders = {i.target for i in instructions if i.opcode in ("BRA", "CALL")}
    blocks: list[list[Instruction]] = []
    ended = True
    for instruction in instructions:
        if ended or instruction.address in leaders:
            blocks.append([])
        blocks[-1].append(instruction)
        ended = instruction.opcode in ("BRA", "CALL", "EXIT", "RET", "BRX", "JMX")
    starts = {block[0].address: index for index, block in enumerate(blocks)}
    successors: list[list[int]] = []
    for index, block in enumerate(blocks):
        last = block[-1]
        following = []
        if last.opcode in ("BRA", "CALL") and last.target in starts:
            following.append(starts[last.target])
        # A call returns; an unconditional branch does not fall through.
        leaves = last.opcode in ("BRA", "EXIT", "RET", "BRX", "JMX") and not last.predicate
        if not leaves and index + 1 < len(blocks):
            following.append(index + 1)
        successors.append(following)
    return blocks, successors


def unfenced_copies(ptx: str) -> int:
    """Count the wgmma instructions after the wait for an asynchronous copy, without a proxy fence between.

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
            elif again and (branch := _PTX_BRANCH.search(text)):
                start = labels.get(branch[1], n)
                if start < n:
                    follow(start, n, pending, again=False)
        return pending

    follow(0, len(lines), False, again=True)
    return len(unfenced)


def register_operands(ptx: str) -> int:
    """Count the wgmma instructions with the left operand in registers, which ptxas before 13.3 may overwrite."""
    return len(_PTX_REGISTER_OPERAND.findall(ptx))


def tensor_waits(loop: Loop | None) -> int:
    """Count the waits for wgmma in a loop.

    One or two per iteration overlap GEMMs. One per HGMMA serialises them: the compiler's fallback if it cannot prove
    an accumulator untouched (warnings C7510 to C7519).
    """
    instructions = loop.instructions if loop else ()
    return sum(i.opcode == "WARPGROUP" and "DEPBAR" in i.modifiers for i in instructions)


def unfenced_writes(loop: Loop | None, warps: int) -> int:
    """Count the writes to shared memory in a loop after a full wait for wgmma, without a barrier between.

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


def occupancy(
    arch: int, *, registers: int, shared_bytes: int, warps: int, tensor_memory: int = 0
) -> int:
    """Return the resident blocks of a multiprocessor; 0 if no block fits.

    Registers are per thread; shared memory (static and dynamic, without the driver's reserve), warps and columns of
    tensor memory per block.
    """
    limit = LIMITS[arch]
    if shared_bytes > limit.block_shared:
        return 0
    resident_warps = limit.warps
    if registers:
        per_warp = _round_up(registers * 32, _REGISTER_UNIT)
        fitting = _REGISTERS // _PARTITIONS // per_warp * _PARTITIONS
        resident_warps = min(resident_warps, fitting)
    shared = _round_up(shared_bytes + RESERVED_SHARED, _SHARED_UNIT)
    blocks = min(limit.blocks, resident_warps // warps, limit.shared // shared)
    return min(blocks, _TENSOR_MEMORY // tensor_memory) if tensor_memory else blocks


def register_limit(arch: int, *, registers: int, **usage: int) -> int:
    """Return the maximum registers per thread at the same occupancy: 128 with eight warps, with four also 168."""
    blocks = occupancy(arch, registers=registers, **usage)
    return max(
        n
        for n in range(registers, _MAX_REGISTERS + 1)
        if occupancy(arch, registers=n, **usage) == blocks
    )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
