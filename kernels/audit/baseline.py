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
    "registers",
    "stack_bytes",
    "shared_bytes",
    "instructions",
    "loop_instructions",
    "waits_per_tensor_core",
    "unfenced_writes",
    "unfenced_copies",
    "unsafe_operands",
    "warnings",
    _HIGHER_IS_BETTER,
)
# Comparable between compilers, unlike counts of registers and instructions.
_ANY_COMPILER = ("stack_bytes", "unfenced_copies", "unsafe_operands", "warnings")


@dataclass(frozen=True)
class Accepted:
    """Content of the baseline: the compiler, and the figures by `Row.key`."""

    compiler: str
    rows: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """Differences from the baseline, a line each; an audit with `worse` lines fails."""

    worse: list[str]
    better: list[str]
    note: str = ""


def read(
    path: Path = BASELINE, *, kernels: Collection[str] = (), arches: Collection[int] | None = None
) -> Accepted:
    """Read the accepted figures of kernels (empty: all) and architectures; ValueError for a damaged file."""
    if not path.is_file():
        return Accepted("", {})
    try:
        content = json.loads(path.read_text())
        compiler, rows = content["compiler"], content["rows"]
        tags = None if arches is None else {f"sm_{arch}" for arch in arches}
        selected = {}
        for key, figures in rows.items():
            kernel, _, arch, _ = key.split(" | ")
            if (tags is None or arch in tags) and (not kernels or kernel in kernels):
                selected[key] = figures
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no accepted figures ({error}); restore it, or delete it and run xfm-fast audit --accept"
        ) from error
    return Accepted(compiler, selected)


def compare(
    rows: Iterable[Row], accepted: Accepted, *, compiler: str, shipped: Collection[str]
) -> Comparison:
    """Compare rows with the accepted figures; `shipped` has the keys of all forms in scope, compiled or not."""
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
            regressions, gains = _differences(row, old, _COMPARED if same else _ANY_COMPILER)
            config = "" if old["config"] == row.config else f" ({old['config']} → {row.config})"
            if regressions:
                worse.append(f"{row.key}: {', '.join(regressions)}{config}")
            elif gains:
                better.append(f"{row.key}: {', '.join(gains)}{config}")
    worse += [
        f"{key}: is accepted but no longer shipped" for key in accepted.rows if key not in shipped
    ]
    return Comparison(worse, better, note)


def accept(
    rows: Iterable[Row], *, compiler: str, forget: Collection[str] = (), path: Path = BASELINE
) -> None:
    """Write the figures of rows from one compiler to the baseline, and drop the keys to forget."""
    rows = list(rows)
    if failed := [row.key for row in rows if row.error]:
        raise ValueError(f"these do not compile and cannot be accepted: {', '.join(failed)}")
    old = read(path)
    remaining = {key: dict(value) for key, value in old.rows.items() if key not in forget}
    new = {row.key: figures(row) for row in rows}
    if old.compiler not in ("", compiler) and (stale := remaining.keys() - new.keys()):
        raise ValueError(
            f"{len(stale)} accepted figures are of {old.compiler}, these of {compiler}; accept all: --all --accept"
        )
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted((remaining | new).items())]
    text = (
        f'{{\n "compiler": {json.dumps(compiler)},\n "rows": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    )
    write_whole(path, text.encode())


def figures(row: Row) -> dict[str, Any]:
    """Return the figures that the baseline stores."""
    waits = row.waits_per_tensor_core
    return {
        "config": row.config,
        "made_of": row.made_of,
        **{name: getattr(row, name) for name in _COMPARED},
        "waits_per_tensor_core": None if waits is None else round(waits, 3),
        "tensor_core": sorted(row.tensor_core or ()),
        "warnings": row.warnings or [],
    }


def _differences(
    row: Row, old: Mapping[str, Any], names: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Return (worse, better), a phrase for each figure; absent figures are not compared."""
    new = figures(row)
    worse: list[str] = []
    better: list[str] = []
    for name in names:
        before, after = old.get(name), new[name]
        if before is None or after is None or before == after:
            continue
        if name == "warnings":
            is_worse = not set(after) <= set(before)
            before, after = ", ".join(before) or "none", ", ".join(after) or "none"
        else:
            is_worse = (after < before) == (name == _HIGHER_IS_BETTER)
        (worse if is_worse else better).append(f"{name} {before} → {after}")
    if lost := set(old["tensor_core"]) - set(new["tensor_core"]):
        worse.append(f"no {', '.join(sorted(lost))} any more")
    return worse, better
