"""Parser: PTX text → a program of instructions with decoded operands, registers, labels and parameters."""

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
    r"\s*(?:\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*|(?P<label>[\w$]+)\s*:(?!:)"
    r"|(?P<scope>[{}])|(?P<statement>[^;]+);)"
)
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_RANGE = re.compile(r"(%?\w+)<(\d+)>")
_NUMBER = re.compile(r"-?\d+$|-?0[xX][0-9a-fA-F]+U?$|\d+U$")
_TERMINATORS = ("bra", "bra.uni", "ret", "bar.sync", "barrier.sync")


class Address(NamedTuple):
    """`[base + offset]`; the base is a register, a parameter, or the first byte of a shared symbol."""

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

    @property
    def type(self) -> str:
        """The last modifier, the type of most forms: `b32`."""
        return self.form.rpartition(".")[2]


class Program:
    """A kernel; EmulationError for an instruction that is not in `forms`."""

    def __init__(self, ptx: str, forms: dict[str, Callable[[Any, Instruction], None]]) -> None:
        text = re.sub(r"//[^\n]*", "", ptx)
        entry = _ENTRY.search(text)
        if entry is None:
            raise EmulationError("the PTX has no entry")
        self.name, parameters, attributes, body = entry.groups()
        matches = (_PARAMETER.search(parameter) for parameter in _split(parameters))
        self.parameters = [match.group(1) for match in matches if match is not None]
        threads = _THREADS.search(attributes)
        if threads is None:
            raise EmulationError(f"kernel {self.name} does not say its number of threads")
        self.threads = int(threads.group(1))
        self.registers: dict[str, str] = {}
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._files = dict(_FILE.findall(text))
        self._forms, self._scopes, self._branches = forms, [("", {})], []
        self._parse(body)
        for branch, name, scopes in self._branches:
            labels = (name + scope for scope in scopes)
            branch.target = next(self.labels[label] for label in labels if label in self.labels)
        ends = {index + 1 for index, op in enumerate(self.code) if op.form in _TERMINATORS}
        self.leaders = frozenset({*self.labels.values(), *ends})

    def _parse(self, body: str) -> None:
        place, scopes = "", 0
        for token in _TOKEN.finditer(body):
            group, scope = token.lastgroup, self._scopes[-1][0]
            if group == "line":
                path = self._files.get(token["file"], "")
                place = f"{path.rpartition('/')[2]}:{token['line']}"
            elif group == "label":
                self.labels[token["label"] + scope] = len(self.code)
            elif token["scope"] == "{":
                scopes += 1
                self._scopes.append((f"@{scopes}", {}))
            elif group == "scope":
                self._scopes.pop()
                if not self._scopes:
                    return
            elif group == "statement":
                self._parse_statement(" ".join(token["statement"].split()), place)

    def _parse_statement(self, text: str, place: str) -> None:
        if declaration := _REGISTERS.match(text):
            self._declare(*declaration.groups())
        if text.startswith("."):
            return
        match = _INSTRUCTION.match(text)
        assert match is not None, text
        negated, guard, form, operands = match.groups()
        if form not in self._forms:
            raise EmulationError(
                f"kernel {self.name}, {place}: {form} is not emulated, in `{text}`"
            )
        guard = None if guard is None else self._resolve(guard)
        is_branch = form.startswith("bra")
        decoded = () if is_branch else self._operands(_split(operands))
        op = Instruction(form, decoded, guard, negated == "!", place, text, self._forms[form])
        if is_branch:
            scopes = [scope for scope, _ in reversed(self._scopes)]
            self._branches.append((op, operands.strip(), scopes))
        self.code.append(op)

    def _declare(self, dtype: str, names: str) -> None:
        scope, local = self._scopes[-1]
        for name in _split(names):
            if several := _RANGE.fullmatch(name):
                for index in range(int(several[2])):
                    self.registers[f"{several[1]}{index}"] = dtype
            else:
                local[name] = name + scope
                self.registers[name + scope] = dtype

    def _resolve(self, name: str) -> str:
        return next((local[name] for _, local in reversed(self._scopes) if name in local), name)

    def _operands(self, texts: list[str]) -> tuple[Operand, ...]:
        return tuple(self._operand(text) for text in texts)

    def _operand(self, text: str) -> Operand:
        if text[0] == "{":
            return self._operands(_split(text[1:-1]))
        if "|" in text:
            return self._operands(text.split("|"))
        if text[0] == "[":
            first, *coordinates = _split(text[1:-1])
            base, _, offset = first.partition("+")
            address = Address(self._name(base.strip()), int(offset.strip() or "0", 0))
            return (address, *self._operands(coordinates)) if coordinates else address
        return self._name(text)

    def _name(self, text: str) -> str | int:
        if _NUMBER.match(text):
            return int(text.rstrip("U"), 0)
        if text[:2].lower() in ("0f", "0d"):
            return int(text[2:], 16)
        # The only shared symbol of a Triton kernel begins at 0.
        return {"global_smem": 0, "true": 1, "false": 0}.get(text, self._resolve(text))


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    items, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            items.append(text[start:index].strip())
            start = index + 1
    return [item for item in (*items, text[start:].strip()) if item]
