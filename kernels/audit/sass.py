"""Reads a kernel's machine code: its loops, tensor-core instructions and the widths of its global loads.

Loops are natural loops: a branch whose target every path to it passes through, and what lies between. Backward branches
alone would not do, because the compiler places the waits for Blackwell's barriers behind the end and jumps back.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

# /*0120*/  @!P0 BRA `(.L_x_3) ;  /* 0x00000000008c8947 */
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_LINE = re.compile(r'^\s*//## File "([^"]*)", line (\d+)')
_RESOURCES = re.compile(r"\bREG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_TARGET = re.compile(r"`\(([^)]+)\)")
# HMMA up to sm_89 and on sm_120, HGMMA on sm_90, UTCHMMA on sm_100; other letters stand for other operand types.
_TENSOR_CORE = re.compile(r"[A-Z]?[A-Z]G?MMA|UTC[A-Z]+MMA")
_GLOBAL_LOADS = {"LDG", "LD", "LDGSTS"}
_BULK_LOADS = {"UTMALDG", "UBLKCP"}
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        target: the address that a branch goes to.
        line: the place in the source.
        operands: as the disassembler writes them, `R4, [R2.64+0x10]`.
    """

    address: int
    predicate: str
    opcode: str
    modifiers: tuple[str, ...]
    target: int | None
    line: Line | None = None
    operands: str = ""

    @property
    def tensor_core(self) -> bool:
        """True for an instruction that multiplies matrices."""
        return bool(_TENSOR_CORE.fullmatch(self.opcode))

    @property
    def load(self) -> str:
        """`"LDG.128"`: how it reads global memory and how many bits a thread gets, or `""`."""
        if self.opcode in _BULK_LOADS:
            return self.opcode
        if self.opcode not in _GLOBAL_LOADS:
            return ""
        width = next((_WIDTHS[m] for m in self.modifiers if m in _WIDTHS), 32)
        return f"{self.opcode}.{width}"


@dataclass(frozen=True)
class Loop:
    """A natural loop and everything in it, loops inside it included."""

    start: int
    instructions: tuple[Instruction, ...] = field(repr=False)

    @cached_property
    def tensor_core(self) -> int:
        """Tensor-core instructions."""
        return sum(i.tensor_core for i in self.instructions)

    @cached_property
    def loads(self) -> Counter[str]:
        """Global loads by kind and width."""
        return count_loads(self.instructions)

    @property
    def works(self) -> bool:
        """True for a loop that reads or multiplies; loops that wait for a barrier do neither."""
        return bool(self.tensor_core or self.loads)


@dataclass(frozen=True)
class MachineCode:
    """The machine code of one kernel, as the disassembler shows it."""

    registers: int
    stack_bytes: int
    static_shared_bytes: int
    instructions: tuple[Instruction, ...] = field(repr=False)

    @cached_property
    def inner_loops(self) -> list[Loop]:
        """The loops that do work and contain no other that does."""
        working = [loop for loop in natural_loops(self.instructions) if loop.works]
        return [
            loop
            for loop in working
            if not any(other is not loop and set(other.instructions) < set(loop.instructions) for other in working)
        ]

    @property
    def main_loop(self) -> Loop | None:
        """The inner loop with most tensor-core instructions, or the longest where none has any."""
        return max(self.inner_loops, key=lambda loop: (loop.tensor_core, len(loop.instructions)), default=None)

    def count(self, opcode: str) -> int:
        """Instructions of one name, modifiers aside."""
        return sum(i.opcode == opcode for i in self.instructions)


def parse(disassembly: str, resources: str) -> MachineCode:
    """Reads what `nvdisasm -g -c` and `cuobjdump -res-usage` print for a binary of one kernel.

    Raises:
        ValueError: the texts hold no kernel, or more than one.
    """
    usage = _RESOURCES.findall(resources)
    instructions = _instructions(disassembly)
    if len(usage) != 1 or not instructions:
        raise ValueError(f"expected the disassembly of one kernel; found {len(usage)}")
    registers, stack, shared, local = map(int, usage[0])
    # Padding for alignment follows a branch to itself; neither is ever reached.
    kept = tuple(i for i in instructions if i.opcode != "NOP" and i.target != i.address)
    return MachineCode(registers, stack + local, shared, kept)


def _instructions(disassembly: str) -> list[Instruction]:
    found: list[tuple[re.Match[str], Line | None]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    line: Line | None = None
    for text in disassembly.splitlines():
        if instruction := _INSTRUCTION.match(text):
            found.append((instruction, line))
            labels |= dict.fromkeys(waiting, int(instruction[1], 16))
            waiting = []
        elif place := _LINE.match(text):
            line = place[1], int(place[2])
        elif label := _LABEL.match(text):
            waiting.append(label[1])
    return [_instruction(match, labels, line) for match, line in found]


def _instruction(match: re.Match[str], labels: dict[str, int], line: Line | None) -> Instruction:
    address, predicate, name, operands = match.groups()
    opcode, *modifiers = name.split(".")
    target = _TARGET.search(operands) if opcode in ("BRA", "CALL") else None
    if opcode == "BRA" and not predicate and "," in operands:
        predicate = operands.split(",")[0]  # BRA.U UP0, `(.L_x_3): the condition is an operand
    place = labels.get(target[1]) if target else None
    return Instruction(int(address, 16), predicate or "", opcode, tuple(modifiers), place, line, operands.strip())


def count_loads(instructions: Iterable[Instruction]) -> Counter[str]:
    """Global loads by kind and width, such as `{"LDGSTS.128": 6}`."""
    return Counter(i.load for i in instructions if i.load)


def load_bits(load: str) -> int:
    """Bits that one thread moves: 128 for `"LDG.128"`; bulk copies count as 128, the least that they can move."""
    return int(load.rsplit(".")[-1]) if "." in load else 128


def natural_loops(instructions: tuple[Instruction, ...]) -> list[Loop]:
    """Every loop, by address. Back edges to one place make one loop."""
    blocks, successors = _flow_graph(instructions)
    dominators = _dominators(successors)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block, following in enumerate(successors):
        for target in following:
            predecessors[target].append(block)
    bodies: dict[int, set[int]] = {}
    for tail, following in enumerate(successors):
        for head in following:
            if tail in dominators and head in dominators[tail]:
                body = bodies.setdefault(head, {head})
                waiting = [tail]
                while waiting:
                    block = waiting.pop()
                    if block not in body and block in dominators:
                        body.add(block)
                        waiting += predecessors[block]
    return [
        Loop(blocks[head][0].address, tuple(i for block in sorted(body) for i in blocks[block]))
        for head, body in sorted(bodies.items())
    ]


def _flow_graph(instructions: tuple[Instruction, ...]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks, and for each the blocks that may follow."""
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
        # A call returns. What needs no condition, and is no call, goes nowhere else.
        leaves = last.opcode in ("BRA", "EXIT", "RET", "BRX", "JMX") and not last.predicate
        if not leaves and number + 1 < len(blocks):
            following.append(number + 1)
        successors.append(following)
    return blocks, successors


def _dominators(successors: list[list[int]]) -> dict[int, set[int]]:
    """Block → the blocks on every path to it from the first, itself included; unreachable blocks are absent."""
    order: list[int] = []
    seen: set[int] = set()
    stack: list[tuple[int, int]] = [(0, 0)]
    while stack:  # depth first, a block after all that follow it
        block, position = stack.pop()
        seen.add(block)
        for next_position in range(position, len(successors[block])):
            if successors[block][next_position] not in seen:
                stack += [(block, next_position + 1), (successors[block][next_position], 0)]
                break
        else:
            order.append(block)
    order.reverse()
    everything = set(order)
    dominators = dict.fromkeys(order, everything) | {0: {0}}
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for target in successors[block]:
            predecessors[target].append(block)
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            found = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            if found != dominators[block]:
                dominators[block], changed = found, True
    return dominators


_LOAD = re.compile(r"(?:\btt\.load|\bttg\.async_copy_global_to_local) .*?\bloc\((#loc\d*)\)\s*$", re.MULTILINE)
_POINTERS = re.compile(r"tensor<((?:\d+x)+)!tt\.ptr")
_DEFINITION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
_PLACE = re.compile(r'"([^"]+)":(\d+):\d+')
_REFERENCE = re.compile(r"#loc\d*")

_PTX_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', re.MULTILINE)
_PTX_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_PTX_LOAD = re.compile(r"\bld\.global\b|\bcp\.async\.c[ag]\b")

_SMALLEST_TILE = 512
Line = tuple[str, int]


def row_lines(ttgir: str, ptx: str) -> set[Line]:
    """(file, line), as the machine code has it, of every load of scalars or a value per row, where no tile is loaded.

    A tile has two dimensions, the last longer than 1, and as many elements as a program has threads.
    """
    definitions = dict(_DEFINITION.findall(ttgir))
    rows: set[Line] = set()
    tiles: set[Line] = set()
    for match in _LOAD.finditer(ttgir):
        line = _resolve(match[1], definitions)
        if line is not None:
            (tiles if _is_tile(match[0]) else rows).add(line)
    moved = list(_moved_lines(ptx))
    return {shown for true, shown in moved if true in rows - tiles} - {
        shown for true, shown in moved if true not in rows - tiles
    }


def _is_tile(load: str) -> bool:
    pointers = _POINTERS.search(load)
    if pointers is None:
        return False
    shape = [int(size) for size in pointers[1].split("x")[:-1]]
    return len(shape) > 1 and shape[-1] > 1 and math.prod(shape) >= _SMALLEST_TILE


def _resolve(name: str, definitions: dict[str, str]) -> Line | None:
    """The innermost source line: of a call site, that of the called function."""
    seen: set[str] = set()
    while name in definitions and name not in seen:
        seen.add(name)
        if place := _PLACE.search(definitions[name]):
            return place[1], int(place[2])
        reference = _REFERENCE.search(definitions[name])
        name = reference[0] if reference else ""
    return None


def _moved_lines(ptx: str) -> Iterator[tuple[Line, Line]]:
    """(source line, line in the machine code) of every load; the first line of inline assembly is the true one."""
    files = dict(_PTX_FILE.findall(ptx))
    line = true = ("", 0)
    inside = started = False
    for text in ptx.splitlines():
        if place := _PTX_LINE.match(text):
            line = files.get(place[1], ""), int(place[2])
            if not (inside and started):
                true = line
        elif "// begin inline asm" in text:
            inside, started, true = True, False, line
        elif "// end inline asm" in text:
            inside, true = False, line
        else:
            started = started or bool(text.strip())
            if _PTX_LOAD.search(text):
                yield (true if inside else line), line
