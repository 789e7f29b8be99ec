"""Accepted figures of the audit, in `kernels/audit_baseline.json`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_whole
from .compiling import Row

BASELINE = Path(__file__).resolve().parent.parent / "audit_baseline.json"

_HIGHER_IS_BETTER = "occupancy"
_COMPARED = (
    "registers", "stack_bytes", "shared_bytes", "instructions", "loop_instructions", "waits_per_tensor_core",
    "unfenced_writes", "unfenced_copies", "unsafe_operands", "warnings", _HIGHER_IS_BETTER,
)  # fmt: skip
# Comparable between compilers, as counts of registers and instructions are not.
_ANY_COMPILER = ("stack_bytes", "unfenced_copies", "unsafe_operands", "warnings")


@dataclass(frozen=True)
class Accepted:
    """The content of the file: the compiler, and the figures by `Row.key`."""

    compiler: str
    rows: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """The differences of an audit, a line each; an audit with `worse` lines fails."""

    worse: list[str]
    better: list[str]
    note: str = ""


def read(
    path: Path = BASELINE, *, kernels: Collection[str] = (), arches: Collection[int] | None = None
) -> Accepted:
    """The accepted figures of these kernels (empty: all) and architectures; ValueError for a damaged file."""
    if not path.is_file():
        return Accepted("", {})
    try:
        content = json.loads(path.read_text())
        compiler, rows = content["compiler"], content["rows"]
        scopes = {key: key.split(" | ") for key in rows}
        tags = None if arches is None else {f"sm_{arch}" for arch in arches}
        kept = {
            key: rows[key]
            for key, (kernel, _, arch, _) in scopes.items()
            if (tags is None or arch in tags) and (not kernels or kernel in kernels)
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no accepted figures ({error}); restore it, or delete it and run xfm-fast audit --accept"
        ) from error
    return Accepted(compiler, kept)


def compare(
    rows: Iterable[Row], accepted: Accepted, *, compiler: str, shipped: Collection[str]
) -> Comparison:
    """Compare rows with the accepted figures; `shipped` are the keys of all forms in their scope, compiled or not."""
    worse: list[str] = []
    better: list[str] = []
    same = compiler == accepted.compiler
    note = ""
    if accepted.rows and not same:
        note = (
            f"accepted figures are of {accepted.compiler}, these of {compiler}: compared are only spills, warnings,"
            " tensor cores and hazards in PTX"
        )
    for row in rows:
        old = accepted.rows.get(row.key)
        if row.error:
            worse.append(f"{row.key}: does not compile: {row.error}")
        elif old is None:
            worse.append(f"{row.key}: is new")
        else:
            down, up = _differences(row, old, _COMPARED if same else _ANY_COMPILER)
            moved = "" if old["config"] == row.config else f" ({old['config']} → {row.config})"
            if down:
                worse.append(f"{row.key}: {', '.join(down)}{moved}")
            elif up:
                better.append(f"{row.key}: {', '.join(up)}{moved}")
    worse += [
        f"{key}: is accepted but no longer shipped" for key in accepted.rows if key not in shipped
    ]
    return Comparison(worse, better, note)


def accept(
    rows: Iterable[Row], *, compiler: str, forget: Collection[str] = (), path: Path = BASELINE
) -> None:
    """Accept the figures of rows from one compiler; other rows of the file stay, except the keys to forget."""
    rows = list(rows)
    if failed := [row.key for row in rows if row.error]:
        raise ValueError(f"these do not compile and cannot be accepted: {', '.join(failed)}")
    old = read(path)
    remaining = {key: dict(value) for key, value in old.rows.items() if key not in forget}
    new = {row.key: figures(row) for row in rows}
    if old.compiler not in ("", compiler) and (others := remaining.keys() - new.keys()):
        raise ValueError(
            f"{len(others)} accepted figures are of {old.compiler}, these of {compiler}; accept all: --all --accept"
        )
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted((remaining | new).items())]
    text = (
        f'{{\n "compiler": {json.dumps(compiler)},\n "rows": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    )
    write_whole(path, text.encode())


def figures(row: Row) -> dict[str, Any]:
    """The part of a row that the file stores."""
    waits = row.waits_per_tensor_core
    stored = {"config": row.config, "made_of": row.made_of} | {
        name: getattr(row, name) for name in _COMPARED
    }
    return stored | {
        "waits_per_tensor_core": None if waits is None else round(waits, 3),
        "tensor_core": sorted(row.tensor_core or ()),
        "warnings": row.warnings or [],
    }


def _differences(
    row: Row, old: Mapping[str, Any], names: Iterable[str]
) -> tuple[list[str], list[str]]:
    """(worse, better), a phrase for each figure; absent figures are not compared."""
    new = figures(row)
    worse: list[str] = []
    better: list[str] = []
    for name in names:
        before, after = old.get(name), new[name]
        if before is None or after is None or before == after:
            continue
        if name == "warnings":
            grew, shown = (
                not set(after) <= set(before),
                [", ".join(codes) or "none" for codes in (before, after)],
            )
        else:
            grew, shown = (after < before) == (name == _HIGHER_IS_BETTER), [before, after]
        (worse if grew else better).append(f"{name} {shown[0]} → {shown[1]}")
    if lost := set(old["tensor_core"]) - set(new["tensor_core"]):
        worse.append(f"no {', '.join(sorted(lost))} any more")
    return worse, better
