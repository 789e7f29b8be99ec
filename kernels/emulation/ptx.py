"""PTX text → a program: instructions with decoded operands, registers, labels and parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .hazards import EmulationError

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{(.*)", re.S)
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
_PARAMETER = re.compile(r"\.param\s.*?([\w$]+)(?:\[\d+\])?$", re.S)
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_TOKEN = re.compile(
    r"\s*(?:\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*|(?P<label>[\w$]+)\s*:(?!:)|(?P<scope>[{}])|(?P<statement>[^;]+);)"
)
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_NUMBER = re.compile(r"-?\d+$|-?0[xX][0-9a-fA-F]+U?$|\d+U$")


class Address(NamedTuple):
    """`[base + offset]`: a register, a parameter, or a shared symbol, which is the number of its first byte."""

    base: str | int
    offset: int


Operand = Any
"""A name, the bits of an immediate, an Address, or a tuple of several: `{%r1, %r2}`, `%r1|%p1`, `[%rd1, {%r2}]`."""


@dataclass(slots=True)
class Instruction:
    """One instruction; `form` is its opcode with all modifiers: `ld.shared.v2.b32`."""

    form: str
    operands: tuple[Operand, ...]
    guard: str | None
    negated: bool
    place: str  # of the statement in the kernel's source, as `file.py:12`
    text: str
    execute: Callable[[Any, Instruction], None]
    target: int = -1  # of a branch


class Program:
    """A kernel; EmulationError for an instruction that is not in `forms`."""

    def __init__(self, ptx: str, forms: dict[str, Callable[[Any, Instruction], None]]) -> None:
        text = re.sub(r"//[^\n]*", "", ptx)
        entry = _ENTRY.search(text)
        if entry is None:
            raise EmulationError("the PTX has no entry")
        self.name, parameters, attributes, body = entry.groups()
        found = (_PARAMETER.search(part.strip()) for part in _split(parameters))
        self.parameters = [match.group(1) for match in found if match is not None]
        threads = _THREADS.search(attributes)
        if threads is None:
            raise EmulationError(f"kernel {self.name} does not say its number of threads")
        self.threads = int(threads.group(1))
        self.registers: dict[str, str] = {}
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._files = dict(_FILE.findall(text))
        self._forms, self._scopes, self._branches = forms, [("", {})], []
        self._read(body)
        for instruction, name, scopes in self._branches:
            instruction.target = next(
                self.labels[name + scope] for scope in scopes if name + scope in self.labels
            )
        ends = {number + 1 for number, each in enumerate(self.code) if each.form in _ENDS}
        self.leaders = frozenset({*self.labels.values(), *ends})

    def _read(self, body: str) -> None:
        place, scopes = "", 0
        for token in _TOKEN.finditer(body):
            kind, scope = token.lastgroup, self._scopes[-1][0]
            if kind == "line":
                path = self._files.get(token["file"], "")
                place = f"{path.rpartition('/')[2]}:{token['line']}"
            elif kind == "label":
                self.labels[token["label"] + scope] = len(self.code)
            elif token["scope"] == "{":
                scopes += 1
                self._scopes.append((f"@{scopes}", {}))
            elif kind == "scope":
                self._scopes.pop()
                if not self._scopes:
                    return
            elif kind == "statement":
                self._statement(" ".join(token["statement"].split()), place)

    def _statement(self, text: str, place: str) -> None:
        if declared := _REGISTERS.match(text):
            self._declare(*declared.groups())
        if text.startswith("."):
            return
        match = _INSTRUCTION.match(text)
        assert match is not None, text
        negated, guard, form, rest = match.groups()
        if form not in self._forms:
            raise EmulationError(
                f"kernel {self.name}, {place}: {form} is not emulated, in `{text}`"
            )
        guard = None if guard is None else self._resolve(guard)
        branch = form.startswith("bra")
        operands = () if branch else tuple(self._operand(part) for part in _split(rest))
        made = Instruction(form, operands, guard, negated == "!", place, text, self._forms[form])
        if branch:
            self._branches.append(
                (made, rest.strip(), [scope for scope, _ in reversed(self._scopes)])
            )
        self.code.append(made)

    def _declare(self, kind: str, names: str) -> None:
        scope, local = self._scopes[-1]
        for name in _split(names):
            if several := re.fullmatch(r"(%?\w+)<(\d+)>", name):
                self.registers |= {
                    f"{several[1]}{number}": kind for number in range(int(several[2]))
                }
            else:
                local[name] = name + scope
                self.registers[name + scope] = kind

    def _resolve(self, name: str) -> str:
        return next((local[name] for _, local in reversed(self._scopes) if name in local), name)

    def _operand(self, text: str) -> Operand:
        if text[0] == "{":
            return tuple(self._operand(part) for part in _split(text[1:-1]))
        if "|" in text:
            return tuple(self._operand(part) for part in text.split("|"))
        if text[0] == "[":
            first, *others = _split(text[1:-1])
            base, _, offset = (part.strip() for part in first.partition("+"))
            address = Address(self._name(base), int(offset or "0", 0))
            return (address, *(self._operand(part) for part in others)) if others else address
        return self._name(text)

    def _name(self, text: str) -> str | int:
        if _NUMBER.match(text):
            return int(text.rstrip("U"), 0)
        if text[:2].lower() in ("0f", "0d"):
            return int(text[2:], 16)
        # The only shared symbol of a Triton kernel begins at 0.
        return {"global_smem": 0, "true": 1, "false": 0}.get(text, self._resolve(text))


_ENDS = ("bra", "bra.uni", "ret", "bar.sync", "barrier.sync")


def _split(text: str) -> list[str]:
    """Parts between the commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            parts.append(text[start:place].strip())
            start = place + 1
    return [part for part in (*parts, text[start:].strip()) if part]
