"""The page of `bench drop-in`: models of others as they come, against the same models accelerated."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from xfm_fast.benchmarks.page.charts import Bar, bars
from xfm_fast.benchmarks.page.document import (
    circumstances,
    circumstances_line,
    figure,
    figures,
    line,
    notes,
    seconds,
    section,
    shell,
    table,
)
from xfm_fast.benchmarks.page.headline import Candidate, best_of, tile

Row = dict[str, Any]
_KINDS = {"fp32": "s0", "bf16": "s2"}


def render(content: dict[str, Any]) -> str:
    """The page of the rows of `bench drop-in`."""
    rows = content["rows"]
    measured = [row for row in rows if row["status"] == "measured"]
    body = [
        "<h1>accelerate(model), against the model untouched</h1>",
        f"<p class=soft>{escape(circumstances_line(content))}</p>",
        notes(_remarks(content)),
        _tiles(measured),
        _speedups(measured),
        _table(measured),
        _missing([row for row in rows if row["status"] != "measured"]),
        _replaced(measured),
        circumstances(content),
    ]
    return shell("xfm-fast bench drop-in", body)


def _remarks(content: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if content["interrupted"]:
        yield "bad", "The run was interrupted; the rows measured before are complete."
    for row in content["rows"]:
        if row["status"] in ("failed", "parity failed"):
            yield "bad", f"{row['name']}: {row['status']}. {row['reason']}"
    if content["options"].get("quick"):
        yield "", "Short form: models of two layers and two samples each, to see that everything runs."
    if any(_contended(row) for row in content["rows"]):
        yield "", "Something else ran on this machine: rows marked † saw its matrix rate move by more than 10%."
    yield "", "The weights are random: speeds and differences of the outputs are real."


def _tiles(rows: list[Row]) -> str:
    made = []
    for key in dict.fromkeys(row["key"] for row in rows):
        found = best_of(
            Candidate(row["ratio"], *_interval(row), _contended(row), row) for row in rows if row["key"] == key
        )
        row = found.row
        rate = f"{row['items'] / row['fast']['median_s']:,.4g} {row['unit']}/s in {row['dtype']}, before in fp32"
        made.append(tile(found, row["name"].split(",")[0], rate))
    return f"<div class=tiles>{''.join(made)}</div>" if made else ""


def _speedups(rows: list[Row]) -> str:
    made = []
    for name in dict.fromkeys(row["name"] for row in rows):
        found = []
        for row in (row for row in rows if row["name"] == name):
            low, high = _interval(row)
            mark, kind = " †" if _contended(row) else "", _KINDS.get(row["dtype"], "s0")
            label = f"{row['dtype']} against untouched fp32"
            found.append(Bar(label, row["ratio"], f"{row['ratio']:.2f}×{mark}", kind, low, high, name))
            if row["ratio_same_dtype"] is not None:
                ratio, label = row["ratio_same_dtype"], f"{row['dtype']} against untouched {row['dtype']}"
                found.append(Bar(label, ratio, f"{ratio:.2f}×{mark}", kind, tip=name))
        made.append(figure(name, bars(f"speed-up, {name}", found, reference=1)))
    if not made:
        return ""
    text = (
        "Median time of the untouched model over median time of the accelerated one, which took turns in one process; "
        "the line is a bootstrap interval of 95%. The dashed line is equal speed; †: something else ran meanwhile."
    )
    return section("Speed-up", text, figures(made))


def _table(rows: list[Row]) -> str:
    if not rows:
        return ""
    heads = ["model and work", "dtype", "untouched fp32", "untouched", "accelerated", "faster", "95% interval"]
    heads += ["than the same dtype", "error", "allowed", "peak memory", "untouched", "samples"]
    lines = []
    for row in rows:
        own, same, (low, high) = row["original_same_dtype"], row["ratio_same_dtype"], _interval(row)
        numbers = [
            seconds(row["original"]["median_s"]),
            "" if own is None else seconds(own["median_s"]),
            seconds(row["fast"]["median_s"]),
            f"{row['ratio']:.2f}×{' †' if _contended(row) else ''}",
            "" if low is None else f"{low:.2f} to {high:.2f}",
            "" if same is None else f"{same:.2f}×",
            f"{row['parity']['error']:.1e}",
            f"{row['parity']['band']:.1e}",
            *(f"{row[side]['peak_bytes'] / 1e9:.2f} GB" for side in ("fast", "original")),
            f"{len(row['fast']['seconds'])} + {len(row['original']['seconds'])}",
        ]
        lines.append(line([row["name"], row["dtype"]], numbers))
    text = "Errors are the largest difference of the outputs from the untouched model in fp32, relative to the largest."
    return section("All rows", text, table(heads, lines, words=2))


def _missing(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [line([row["name"], row["dtype"] or "", row["status"], row["reason"]]) for row in rows]
    text = "Rows without numbers, and why."
    return section("Not measured", text, table(["model and work", "dtype", "status", "reason"], lines, words=4))


def _replaced(rows: list[Row]) -> str:
    """The report of `accelerate` for every model, once."""
    reports = {row["name"]: row["report"] for row in rows if row["report"]}
    if not reports:
        return ""
    parts = [
        f'<h3>{escape(name)}</h3><div class=wide tabindex="0" role="region" aria-label="report">'
        f"<pre>{escape(chr(10).join(lines))}</pre></div>"
        for name, lines in reports.items()
    ]
    return section("What was replaced", "The report that <code>accelerate</code> returns.", "".join(parts))


def _interval(row: Row) -> tuple[float, float] | tuple[None, None]:
    """Of the speed-up; two samples have none."""
    if min(len(row["fast"]["seconds"]), len(row["original"]["seconds"])) < 3:
        return None, None
    low, high = row["ratio_interval"]
    return low, high


def _contended(row: Row) -> bool:
    return row["status"] == "measured" and row["probe"]["contended"]
