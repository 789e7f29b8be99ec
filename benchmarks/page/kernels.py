"""The page of `bench kernels`: every operation against its alternatives."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from xfm_fast.benchmarks.measuring import ratio_interval
from xfm_fast.benchmarks.page.charts import Bar, bars, si
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
from xfm_fast.benchmarks.stored import kernel_ratio, our_kernel

Row = dict[str, Any]


def render(content: dict[str, Any]) -> str:
    """The page of the rows of `bench kernels`."""
    rows = content["rows"]
    body = [
        "<h1>Operations, against their alternatives</h1>",
        f"<p class=soft>{escape(circumstances_line(content))}</p>",
        notes(_remarks(content)),
        _speedups(rows),
        _table(rows),
        _missing([row for row in rows if not row["seconds"]]),
        circumstances(content),
    ]
    return shell("xfm-fast bench kernels", body)


def _remarks(content: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if content["interrupted"]:
        yield "bad", "The run was interrupted; the operations measured before are complete."
    for row in content["rows"]:
        if row["note"].startswith("wrong"):
            yield "bad", f"{row['case']}, {row['direction']}, {row['contender']}: {row['note']}"
    if content["options"].get("small"):
        yield "", "Small shapes, to see that everything runs: the times say nothing."


def _speedups(rows: list[Row]) -> str:
    made = []
    for work in dict.fromkeys((row["case"], row["direction"], row["dtype"]) for row in rows):
        found = []
        for row in (row for row in rows if (row["case"], row["direction"], row["dtype"]) == work):
            ratio = kernel_ratio(row, rows)
            if ratio is not None:
                low, high = ratio_interval(row["samples"], our_kernel(row, rows)["samples"])
                text = f"{ratio:.2f}×"
                found.append(Bar(f"against {row['contender']}", ratio, text, "s0", low, high, seconds(row["seconds"])))
        if found:
            name = ", ".join(work)
            made.append(figure(name, bars(f"speed-up, {name}", found, reference=1)))
    if not made:
        return ""
    text = (
        "Median time of the alternative over median time of xfm-fast's operation, which took turns in one process; the "
        "line is a bootstrap interval of 95%. The dashed line is equal speed. A product alone and a copy are bounds of "
        "the time, not alternatives."
    )
    return section("Speed-up", text, figures(made))


def _table(rows: list[Row]) -> str:
    # Only of a GPU that is known.
    floors = any(row["share_of_floor"] is not None for row in rows)
    heads = ["operation", "direction", "contender", "dtype", "time", "xfm-fast is", "rate", "traffic"]
    heads += [*(["of the floor"] if floors else []), "error"]
    lines = []
    for row in rows:
        if not row["seconds"]:
            continue
        ratio = kernel_ratio(row, rows)
        numbers = [
            seconds(row["seconds"]),
            "" if ratio is None else f"{ratio:.2f}×",
            si(row["flops_per_s"], "FLOP/s"),
            si(row["bytes_per_s"], "B/s"),
            *(["" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}"] if floors else []),
            "" if row["error"] is None else f"{row['error']:.1e}",
        ]
        lines.append(line([row["case"], row["direction"], row["contender"], row["dtype"]], numbers))
    if not lines:
        return ""
    text = "Errors are against the definition in fp64, relative to the largest value."
    text += " The floor is that of the GPU's data sheet." if floors else ""
    return section("All rows", text, table(heads, lines, words=4))


def _missing(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [line([row["case"], row["direction"], row["contender"], row["note"]]) for row in rows]
    heads = ["operation", "direction", "contender", "reason"]
    return section("Not measured", "Rows without numbers, and why.", table(heads, lines, words=4))
