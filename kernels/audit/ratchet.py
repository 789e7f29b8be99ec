"""Accepted figures, in `kernels/audit_ratchet.json`: an audit fails where one gets worse, and may only tighten them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_whole
from .rows import Row

RATCHET = Path(__file__).resolve().parent.parent / "audit_ratchet.json"

_LOWER_IS_BETTER = (
    "registers", "stack_bytes", "shared_bytes", "instructions", "loop_instructions", "waits_per_tensor_core",
    "staged_tiles", "unfenced_writes", "unfenced_copies", "unsafe_operands", "warnings",
)  # fmt: skip
_HIGHER_IS_BETTER = ("occupancy", "wide_share")
# These say the same whatever compiler made them; counts of registers and instructions do not.
_ANY_COMPILER = ("stack_bytes", "wide_share", "staged_tiles", "unfenced_copies", "unsafe_operands", "warnings")


@dataclass(frozen=True)
class Accepted:
    """The content of a ratchet file.

    Attributes:
        compiler: what made the figures; `rows`: the figures by `Row.key`.
        others: of other compilers, by name, what is worse with them: key → figure → its value. A compiler without an
            entry was never examined.
    """

    compiler: str
    rows: Mapping[str, Mapping[str, Any]]
    others: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The changes that an audit found, a line each: `worse` fails it, `better` may be accepted, `note` explains."""

    worse: list[str]
    better: list[str]
    note: str = ""


def read(path: Path = RATCHET) -> Accepted:
    """The accepted figures; none if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return Accepted("", {})
    try:
        content = json.loads(path.read_text())
        return Accepted(content["compiler"], content["rows"], content.get("others", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no ratchet file ({error}); restore it, or write it anew with --accept") from error


def compare(rows: Iterable[Row], accepted: Accepted, *, compiler: str, shipped: Collection[str]) -> Comparison:
    """Rows of an audit against accepted figures.

    Args:
        rows: what was compiled, all or some of what is shipped.
        accepted: the ratchet file.
        compiler: what compiled the rows. If it is not what made the accepted figures, only spills, the assembler's
            warnings, tensor cores, and widths and ways of loads are compared, with what was accepted for this compiler
            or else for the other one.
        shipped: keys of every form, compiled or not, in the part of the kernels that `accepted` is about. An accepted
            key that is not among them is reported.
    """
    worse: list[str] = []
    better: list[str] = []
    same = compiler == accepted.compiler
    known = accepted.others.get(compiler, {})
    note = ""
    if accepted.rows and not same:
        examined = f"{len(known)} exceptions are accepted" if compiler in accepted.others else "it was never examined"
        note = (
            f"accepted figures are of {accepted.compiler}, these of {compiler}, of which {examined}: only spills,"
            " warnings, tensor cores, and widths and ways of loads are compared"
        )
    for row in rows:
        old = accepted.rows.get(row.key)
        if row.error:
            worse.append(f"{row.key}: does not compile: {row.error}")
        elif old is None:
            worse.append(f"{row.key}: is new")
        else:
            names = _LOWER_IS_BETTER + _HIGHER_IS_BETTER if same else _ANY_COMPILER
            down, up = _differences(row, {**old, **known.get(row.key, {})}, names)
            changed = "" if old["config"] == row.config else f" ({old['config']} → {row.config})"
            if down:
                worse.append(f"{row.key}: {', '.join(down)}{changed}")
            elif up:
                better.append(f"{row.key}: {', '.join(up)}{changed}")
    worse += [f"{key}: is accepted but no longer shipped" for key in accepted.rows if key not in shipped]
    return Comparison(worse, better, note)


def in_scope(accepted: Accepted, *, kernels: Collection[str], arches: Collection[int]) -> Accepted:
    """The part of the accepted figures that belongs to these kernels (none named: to all) and architectures."""
    tags = {f"sm_{arch}" for arch in arches}
    rows = {}
    for key, figures in accepted.rows.items():
        kernel, _, arch, _ = key.split(" | ")
        if arch in tags and (not kernels or kernel in kernels):
            rows[key] = figures
    return Accepted(accepted.compiler, rows, accepted.others)


def accept(rows: Iterable[Row], *, compiler: str, forget: Collection[str] = (), path: Path = RATCHET) -> None:
    """Makes the rows' figures the accepted ones; all others stay, but for the keys to forget.

    Raises:
        ValueError: a row did not compile, or a part is accepted from another compiler than the rest.
    """
    rows = list(rows)
    if failed := [row.key for row in rows if row.error]:
        raise ValueError(f"these do not compile and cannot be accepted: {', '.join(failed)}")
    old = read(path)
    kept = {key: dict(value) for key, value in old.rows.items() if key not in forget}
    new = {row.key: figures(row) for row in rows}
    if old.compiler not in ("", compiler) and (others := kept.keys() - new.keys()):
        raise ValueError(
            f"{len(others)} accepted figures are of {old.compiler}, and would be mixed with those of {compiler}; accept"
            " all of them at once with --all --accept"
        )
    _write(Accepted(compiler, kept | new, {k: v for k, v in old.others.items() if k != compiler}), path)


def accept_compiler(rows: Iterable[Row], *, compiler: str, path: Path = RATCHET) -> int:
    """Records for another compiler where its figures are worse than the accepted ones, which stay; how many rows are.

    Raises:
        ValueError: there are no accepted figures of another compiler, or a row did not compile.
    """
    rows, old = list(rows), read(path)
    if old.compiler in ("", compiler):
        raise ValueError(
            f"{path} holds no figures of another compiler than {compiler}; accept these with --accept alone"
        )
    if failed := [row.key for row in rows if row.error]:
        raise ValueError(f"these do not compile and cannot be accepted: {', '.join(failed)}")
    examined = {row.key for row in rows}
    found = {key: dict(value) for key, value in old.others.get(compiler, {}).items() if key not in examined}
    for row in rows:
        now, before = figures(row), old.rows.get(row.key)
        if before is not None:
            worse = {n: now[n] for n in _ANY_COMPILER if _worse(n, before.get(n), now[n])}
            found |= {row.key: worse} if worse else {}
    _write(Accepted(old.compiler, old.rows, {**old.others, compiler: found}), path)
    return len(found)


def _write(accepted: Accepted, path: Path) -> None:
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(accepted.rows.items())]
    others = [f"  {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in sorted(accepted.others.items())]
    text = f'{{\n "compiler": {json.dumps(accepted.compiler)},\n "rows": {{\n' + ",\n".join(lines) + "\n }"
    text += ',\n "others": {\n' + ",\n".join(others) + "\n }" if others else ""
    write_whole(path, f"{text}\n}}\n".encode())


def figures(row: Row) -> dict[str, Any]:
    """The part of a row that the ratchet file keeps; none for what a row does not have."""
    counts = ("registers", "stack_bytes", "shared_bytes", "instructions", "loop_instructions", "occupancy")
    share, waits = row.wide_share, row.waits_per_tensor_core
    return (
        {"config": row.config, "made_of": row.made_of}
        | {name: getattr(row, name) for name in counts}
        | {"wide_share": None if share is None else round(share, 4), "tensor_core": sorted(row.tensor_core)}
        | {"waits_per_tensor_core": None if waits is None else round(waits, 3)}
        | {"staged_tiles": row.staged_tiles, "unfenced_writes": row.unfenced_writes}
        | {"unfenced_copies": row.unfenced_copies, "unsafe_operands": row.unsafe_operands}
        | {"warnings": list(row.serialised)}
    )


def _worse(name: str, before: Any, after: Any) -> bool:
    """True if a figure is worse than it was; one that was not there, or is not there now, is not compared."""
    if before is None or after is None:
        return False
    if name == "warnings":
        return bool(set(after) - set(before))
    return after < before if name in _HIGHER_IS_BETTER else after > before


def _differences(row: Row, old: Mapping[str, Any], names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(worse, better), a phrase for each figure."""
    now = figures(row)
    worse: list[str] = []
    better: list[str] = []
    for name in names:
        before, after = old.get(name), now[name]
        phrase = f"{name} {_shown(before)} → {_shown(after)}"
        if _worse(name, before, after):
            worse.append(phrase)
        elif _worse(name, after, before):
            better.append(phrase)
    if lost := set(old["tensor_core"]) - set(now["tensor_core"]):
        worse.append(f"no {', '.join(sorted(lost))} any more")
    return worse, better


def _shown(figure: Any) -> str:
    return (", ".join(figure) or "none") if isinstance(figure, list) else str(figure)
