"""Parser of a kernel's disassembly: instructions, natural loops and the main loop.

Loops come from dominators. Backward branches are not enough: the compiler places the waits for Blackwell's barriers
after the end of a loop and jumps back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

# /*0120*/  @!P0 BRA `(.L_x_3) ;  /* 0x00000000008c8947 */
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_RESOURCES = re.compile(r"\bREG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_TARGET = re.compile(r"`\(([^)]+)\)")
# HMMA up to sm_89 and on sm_120, HGMMA on sm_90, UTCHMMA on sm_100; other letters stand for other operand types.
_TENSOR_CORE = re.compile(r"[A-Z]?[A-Z]G?MMA|UTC[A-Z]+MMA")
_GLOBAL_LOADS = {"LDG", "LD", "LDGSTS", "UTMALDG", "UBLKCP"}


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
        """True for a matrix multiplication."""
        return bool(_TENSOR_CORE.fullmatch(self.opcode))


@dataclass(frozen=True)
class Loop:
    """The instructions of a natural loop, with its inner loops."""

    instructions: tuple[Instruction, ...] = field(repr=False)

    @cached_property
    def tensor_core(self) -> int:
        """The number of tensor-core instructions."""
        return sum(i.tensor_core for i in self.instructions)

    @property
    def works(self) -> bool:
        """True for a loop that loads or multiplies, False for one that waits for a barrier."""
        return bool(self.tensor_core or any(i.opcode in _GLOBAL_LOADS for i in self.instructions))


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
        return [
            loop
            for loop in working
            if not any(other is not loop and set(other.instructions) < set(loop.instructions) for other in working)
        ]

    @property
    def main_loop(self) -> Loop | None:
        """The inner loop with the most tensor-core instructions; without tensor cores, the longest."""
        return max(self.inner_loops, key=lambda loop: (loop.tensor_core, len(loop.instructions)), default=None)


def parse(disassembly: str, resources: str) -> MachineCode:
    """Parse the output of `nvdisasm -c` and `cuobjdump -res-usage` for a binary of one kernel."""
    usage = _RESOURCES.findall(resources)
    instructions = _instructions(disassembly)
    if len(usage) != 1 or not instructions:
        raise ValueError(f"expected the disassembly of one kernel; found {len(usage)}")
    registers, stack, shared, local = map(int, usage[0])
    # Padding for alignment follows a branch to itself; neither is reachable.
    reachable = tuple(i for i in instructions if i.opcode != "NOP" and i.target != i.address)
    return MachineCode(registers, stack + local, shared, reachable)


def _instructions(disassembly: str) -> list[Instruction]:
    matches: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for text in disassembly.splitlines():
        if instruction := _INSTRUCTION.match(text):
            matches.append(instruction)
            labels |= dict.fromkeys(pending, int(instruction[1], 16))
            pending = []
        elif label := _LABEL.match(text):
            pending.append(label[1])
    return [_instruction(match, labels) for match in matches]


def _instruction(match: re.Match[str], labels: dict[str, int]) -> Instruction:
    address, predicate, name, operands = match.groups()
    opcode, *modifiers = name.split(".")
    target = _TARGET.search(operands) if opcode in ("BRA", "CALL") else None
    if opcode == "BRA" and not predicate and "," in operands:
        predicate = operands.split(",")[0]  # BRA.U UP0, `(.L_x_3): the condition is an operand
    place = labels.get(target[1]) if target else None
    return Instruction(int(address, 16), predicate or "", opcode, tuple(modifiers), place, operands.strip())


def natural_loops(instructions: tuple[Instruction, ...]) -> list[Loop]:
    """All loops by address; back edges to the same block belong to one loop."""
    blocks, successors = _flow_graph(instructions)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block, following in enumerate(successors):
        for target in following:
            predecessors[target].append(block)
    dominators = _dominators(successors, predecessors)
    bodies: dict[int, set[int]] = {}
    for tail in dominators:
        for head in successors[tail]:
            if head in dominators[tail]:
                body = bodies.setdefault(head, {head})
                pending = [tail]
                while pending:
                    block = pending.pop()
                    if block not in body and block in dominators:
                        body.add(block)
                        pending += predecessors[block]
    return [Loop(tuple(i for block in sorted(bodies[head]) for i in blocks[block])) for head in sorted(bodies)]


def _flow_graph(instructions: tuple[Instruction, ...]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks, and the successors of each."""
    leaders = {i.target for i in instructions if i.opcode in ("BRA", "CALL")}
    blocks: list[list[Instruction]] = []
    ended = True
    for instruction in instructions:
        if ended or instruction.address in leaders:
            blocks.append([])
        blocks[-1].append(instruction)
        ended = instruction.opcode in ("BRA", "CALL", "EXIT", "RET", "BRX", "JMX")
    starts = {block[0].address: number for number, block in enumerate(blocks)}
    successors: list[list[int]] = []
    for number, block in enumerate(blocks):
        last = block[-1]
        following = []
        if last.opcode in ("BRA", "CALL") and last.target in starts:
            following.append(starts[last.target])
        # A call returns; an unconditional branch does not fall through.
        leaves = last.opcode in ("BRA", "EXIT", "RET", "BRX", "JMX") and not last.predicate
        if not leaves and number + 1 < len(blocks):
            following.append(number + 1)
        successors.append(following)
    return blocks, successors


def _dominators(successors: list[list[int]], predecessors: list[list[int]]) -> dict[int, set[int]]:
    """Reachable block → the blocks on every path from the first block to it, itself included."""
    reachable, pending = {0}, [0]
    while pending:
        fresh = set(successors[pending.pop()]) - reachable
        reachable |= fresh
        pending += fresh
    dominators = dict.fromkeys(sorted(reachable), reachable) | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in list(dominators)[1:]:
            common = set.intersection(*(dominators[p] for p in predecessors[block] if p in reachable)) | {block}
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators
