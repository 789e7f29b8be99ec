"""The table that ends a run: a line a row, in microseconds and shares of what the card can do."""

from __future__ import annotations

from typing import Any

_HEAD = ("work", "contender", "type", "time", "host", "rate", "of peak", "")


def table(document: dict[str, Any]) -> str:
    """Rows of a document as text, grouped by work; a row without numbers says why."""
    machine = document["machine"]
    gpus = ", ".join(gpu["name"] for gpu in machine.get("gpus") or []) or machine.get("cpu") or "an unknown machine"
    versions = machine.get("versions") or {}
    title = f"{gpus}, PyTorch {machine.get('torch')}, Triton {versions.get('triton')}, "
    title += f"ptxas {versions.get('ptxas')}"
    lines = [_HEAD, *(_cells(row) for row in document["rows"])]
    widths = [min(64, max(len(line[column]) for line in lines)) for column in range(len(_HEAD) - 1)]
    shown, above = [], ""
    for number, line in enumerate(lines):
        # The work is said once, over all its contenders.
        first = "" if line[0] == above and number > 1 else line[0]
        above = line[0]
        cells = [first[: widths[0]].ljust(widths[0]), line[1][: widths[1]].ljust(widths[1]), line[2].ljust(widths[2])]
        cells += [cell.rjust(width) for cell, width in zip(line[3:7], widths[3:], strict=True)]
        shown.append("  ".join([*cells, line[7]]).rstrip())
        if number == 0:
            shown.append("  ".join("─" * width for width in widths))
    return "\n".join([title, f"{document['duration_s']:.0f} s of {document['options']['budget']:g} s", "", *shown, ""])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    work = f"{row['name']}{', ' + row['direction'] if row.get('direction') else ''}"
    times, efficiency = sorted(row.get("seconds") or []), row.get("efficiency") or {}
    middle = times[len(times) // 2] if times else None
    share = efficiency.get("mfu_data_sheet") or efficiency.get("share_of_floor")
    remark = "" if row["status"] == "measured" else row["status"]
    if row.get("reason"):
        remark = f"{remark}: {row['reason']}".lstrip(": ")
    if row.get("timed_by") == "events":
        remark = f"by events {remark}".strip()
    return (
        work, row["contender"], row["dtype"], duration(middle), duration(row.get("host_s")),
        _rate(row, middle, efficiency), f"{share:.0%}" if share else "", remark,
    )  # fmt: skip


def duration(seconds: float | None) -> str:
    """Seconds with the prefix that they are read in."""
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _rate(row: dict[str, Any], seconds: float | None, efficiency: dict[str, Any]) -> str:
    if not seconds:
        return ""
    if row["unit"] not in ("calls", "stages", "tests"):
        return f"{row['items'] / seconds:,.4g} {row['unit']}/s"
    if efficiency.get("needed_flops"):
        return f"{efficiency['needed_flops'] / seconds / 1e12:.3g} TFLOP/s"
    if efficiency.get("bytes"):
        return f"{efficiency['bytes'] / seconds / 1e9:,.4g} GB/s"
    return ""
