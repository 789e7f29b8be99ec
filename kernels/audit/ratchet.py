"""Accepted figures, in `kernels/audit_ratchet.json`: an audit fails where one gets worse, and may only tighten them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import Row

RATCHET = Path(__file__).resolve().parent.parent / "audit_ratchet.json"

_LOWER_IS_BETTER = ("registers", "stack_bytes", "shared_bytes", "instructions", "loop_instructions")
_HIGHER_IS_BETTER = ("occupancy", "wide_share")
# These say the same whatever compiler made them; counts of registers and instructions do not.
_ANY_COMPILER = ("stack_bytes", "wide_share")


@dataclass(frozen=True)
class Accepted:
    """The content of a ratchet file: the compiler that made the figures, and figures by `Row.key`."""

    compiler: str
    rows: Mapping[str, Mapping[str, Any]]


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
        return Accepted(content["compiler"], content["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no ratchet file ({error}); restore it, or write it anew with --accept") from error


def compare(rows: Iterable[Row], accepted: Accepted, *, compiler: str, shipped: Collection[str]) -> Comparison:
    """Rows of an audit against accepted figures.

    Args:
        rows: what was compiled, all or some of what is shipped.
        accepted: the ratchet file.
        compiler: what compiled the rows. If it is not what made the accepted figures, only spills, tensor cores and
            widths of loads are compared.
        shipped: keys of every form, compiled or not, in the part of the kernels that `accepted` is about. An accepted
            key that is not among them is reported.
    """
    worse: list[str] = []
    better: list[str] = []
    same = compiler == accepted.compiler
    note = ""
    if accepted.rows and not same:
        note = (
            f"accepted figures are of {accepted.compiler}, these of {compiler}: only spills, tensor cores and widths of"
            " loads are compared"
        )
    for row in rows:
        old = accepted.rows.get(row.key)
        if row.error:
            worse.append(f"{row.key}: does not compile: {row.error}")
        elif old is None:
            worse.append(f"{row.key}: is new")
        else:
            down, up = _differences(row, old, _LOWER_IS_BETTER + _HIGHER_IS_BETTER if same else _ANY_COMPILER)
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
    return Accepted(accepted.compiler, rows)


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
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted((kept | new).items())]
    text = f'{{\n "compiler": {json.dumps(compiler)},\n "rows": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def figures(row: Row) -> dict[str, Any]:
    """The part of a row that the ratchet file keeps."""
    kept = {name: getattr(row, name) for name in (*_LOWER_IS_BETTER, *_HIGHER_IS_BETTER)}
    share = row.wide_share
    return (
        {"config": row.config}
        | kept
        | {
            "wide_share": None if share is None else round(share, 4),
            "tensor_core": sorted(row.tensor_core),
        }
    )


def _differences(row: Row, old: Mapping[str, Any], names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(worse, better), a phrase for each figure."""
    now = figures(row)
    worse: list[str] = []
    better: list[str] = []
    for name in names:
        before, after = old[name], now[name]
        if before is None or after is None or before == after:
            continue
        lower = after < before
        (better if lower == (name in _LOWER_IS_BETTER) else worse).append(f"{name} {before} → {after}")
    if lost := set(old["tensor_core"]) - set(now["tensor_core"]):
        worse.append(f"no {', '.join(sorted(lost))} any more")
    return worse, better
