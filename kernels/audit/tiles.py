"""Tells loads of tiles from loads of a value per row, which no width can make better.

A backward kernel reads a logsumexp per row beside its tiles, an embedding an index. The machine code does not say which
of its loads that is, but for a source line of each. Triton's own representation has the shape and the line, and the
PTX between the two shows where the lines moved: LLVM counts a line on for every line of inline assembly, which is what
Triton makes of a load.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

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
