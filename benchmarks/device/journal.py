"""Rows as JSON lines, each on the disk before the next is measured, in the fields of the common schema."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
"""A line: `stage`, and one of `row`, `machine` and `note`."""


class Journal:
    """A file of lines that only grows; several processes may add to it, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, stage: str, **content: Any) -> None:
        """Write a line, whole and at once: a process that is killed between two lines loses neither."""
        line = json.dumps({"stage": stage, **plain(content)}, ensure_ascii=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def end_line(self) -> None:
        """Close a line that a process was killed in, so that it spoils no other."""
        if self.path.is_file() and self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def entries(self) -> list[Entry]:
        """Every whole line."""
        found: list[Entry] = []
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        for line in lines:
            try:
                content = json.loads(line)
            except ValueError:
                continue
            if isinstance(content, dict) and "stage" in content:
                found.append(content)
        return found


def plain(value: Any) -> Any:
    """A value that JSON holds: null stands for infinities and NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value


def row(
    work: str, name: str, contender: str, *, dtype: str = "-", status: str = "measured", reason: str | None = None,
    unit: str = "calls", items: int = 1, seconds: Iterable[float] = (), **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """A `record.Row` as plain values."""
    times = list(seconds)
    made: dict[str, Any] = {
        "work": work, "name": name, "contender": contender, "label": contender, "dtype": dtype, "status": status,
        "reason": reason, "unit": unit, "items": items, "seconds": times,
    }  # fmt: skip
    if times:
        middle = sorted(times)[len(times) // 2]
        made["throughput"] = {"value": items / middle}
    return made | fields


def efficiency(
    flops: float, moved: float | None = None, seconds: float | None = None, peak: float | None = None,
    floor: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`record.Efficiency` as plain values.

    Args:
        flops: that the result needs; `moved`: bytes that have to move at least.
        seconds: of a run, with the data sheet's FLOP/s as `peak` or the shortest time that it allows as `floor`.
    """
    return {
        "needed_flops": round(flops),
        "bytes": None if moved is None else round(moved),
        "intensity": flops / moved if moved else None,
        "mfu_data_sheet": flops / seconds / peak if seconds and peak else None,
        "share_of_floor": floor / seconds if seconds and floor else None,
    }
