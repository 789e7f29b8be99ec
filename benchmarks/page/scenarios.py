"""The page of scenarios, sweeps and the COCO evaluation: findings first, then every row, then how it was measured."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from xfm_fast.benchmarks.page import plots
from xfm_fast.benchmarks.page.charts import number, si
from xfm_fast.benchmarks.page.document import (
    circumstances,
    circumstances_line,
    duration,
    line,
    notes,
    seconds,
    section,
    shell,
    skipped,
    table,
)
from xfm_fast.benchmarks.page.headline import Candidate, best_of, tile
from xfm_fast.benchmarks.page.plots import Palette, Row, marks, measured

_TITLES = {"scenario": "scenarios", "sweep": "cost as work grows", "coco": "a whole retrieval evaluation"}
_OFFICIAL = "official-algorithm"


def render(content: dict[str, Any]) -> str:
    """The page of a document of scenarios (`benchmarks.rows`)."""
    rows = content["rows"]
    palette = Palette(rows)
    body = [
        f"<h1>xfm-fast: {_TITLES[content['benchmark']]}</h1>",
        f"<p class=soft>{escape(circumstances_line(content))}</p>",
        notes(_remarks(content)),
        _tiles(content),
        plots.speedups(rows, palette),
        plots.latency(rows, palette),
        plots.arrivals(rows, palette),
        plots.rates(rows, palette),
        plots.scaling(content, palette),
        plots.roofline(content, palette),
        plots.splits(rows, palette),
        _coco(content["coco"]),
        _rows(rows),
        _missing(rows),
        _baselines(content["baselines"]),
        circumstances(content, _probes(content)),
        skipped(content),
    ]
    return shell(f"xfm-fast bench: {content['benchmark']}", body)


def _remarks(content: dict[str, Any]) -> Iterable[tuple[str, str]]:
    rows = content["rows"]
    if content["interrupted"]:
        yield "bad", "The run was interrupted: rows marked * hold the samples until then, later rows are missing."
    for row in rows:
        if row["status"] in ("failed", "parity failed"):
            yield "bad", f"{row['label']}, {row['dtype']}, {row['name']}: {row['status']}. {row['reason'] or ''}"
    if content["options"].get("quick"):
        yield "", "Short form: less work per row and fewer samples than the full measurement."
    if any("†" in marks(row) for row in measured(rows)):
        yield "", "Something else ran on this machine: rows marked † saw its probes move by more than 10%."
    for note in dict.fromkeys((row["conditions"] or {}).get("note") for row in rows):
        if note:
            yield "", note
    model = content["model"]
    if model and not model["trained"]:
        yield "", "The weights are random: speeds and parity are real, retrieval quality means nothing."


def _tiles(content: dict[str, Any]) -> str:
    found: dict[tuple[str, str], list[Candidate]] = {}
    for row in measured(content["rows"]):
        for other in row["against"]:
            if (other["contender"], other["dtype"]) == (_OFFICIAL, "fp32"):
                candidate = Candidate(other["ratio"], other["low"], other["high"], "†" in marks(row), row)
                found.setdefault((row["scenario"], row["mode"]), []).append(candidate)
    tiles = []
    for (scenario, mode), candidates in found.items():
        best = best_of(candidates)
        about = f"{_figure(best.row)} in {best.row['dtype']}, against the official algorithm in fp32"
        tiles.append(tile(best, f"{scenario}, {mode}", about))
    if content["coco"]:
        tiles.append(
            f"<div class=tile><b>{content['coco']['speed_up']['value']:.1f}×</b>whole evaluation"
            "<br><span>against the official algorithm</span></div>"
        )
    return f"<div class=tiles>{''.join(tiles)}</div>" if tiles else ""


def _figure(row: Row) -> str:
    """The one number of a row's mode."""
    if row["server"]:
        return f"{number(row['server']['max_qps'])} requests/s"
    if row["throughput"]:
        return f"{number(row['throughput']['value'])} {row['unit']}/s"
    return f"p50 {seconds(row['latency']['p50']['value'])}" if row["latency"] else ""


def _rows(rows: list[Row]) -> str:
    found = measured(rows)
    if not found:
        return ""
    heads = ["work", "mode", "contender", "dtype", "result", "p50 / p90 / p99", "official / this", "parity error"]
    heads += [
        "allowed",
        "MFU",
        "of the roof",
        "useful (padded) tokens/s",
        "peak memory",
        "build / load / first",
        "J/item",
    ]
    lines = []
    for row in found:
        ratio = next((other["ratio"] for other in row["against"] if other["contender"] == _OFFICIAL), None)
        parity, efficiency, tokens, cost = row["parity"], row["efficiency"], row["tokens"], row["cost"]
        latency = row["latency"]
        words = [row["name"], row["mode"], row["label"], row["dtype"]]
        numbers = [
            f"{_figure(row)} {marks(row)}".rstrip(),
            " / ".join(seconds(latency[key]["value"]) for key in ("p50", "p90", "p99")) if latency else "",
            "" if ratio is None else f"{ratio:.2f}×",
            "" if parity is None else "not finite" if parity["error"] is None else f"{parity['error']:.1e}",
            "" if parity is None else f"{parity['band']:.1e}",
            "" if efficiency is None else f"{efficiency['mfu']:.0%}",
            "" if efficiency is None else f"{efficiency['share_of_roof']:.0%}",
            f"{tokens['useful_per_s']:,.0f} ({tokens['padded_per_s']:,.0f})" if tokens else "",
            f"{row['memory']['peak_bytes'] / 1e9:.2f} GB" if row["memory"] else "",
            " / ".join(seconds(cost[key]) if cost[key] else "0" for key in ("build_s", "load_s", "first_call_s"))
            if cost
            else "",
            f"{row['energy']['joules_per_item']:.3g}" if row["energy"] else "",
        ]
        lines.append(line(words, numbers))
    text = "† contended, * interrupted. Parity: largest difference from the reference, relative to its largest value."
    energy = next((row["energy_note"] for row in found if row["energy_note"]), None)
    return section(
        "All rows", escape(f"{text} {'No energy: ' + energy + '.' if energy else ''}"), table(heads, lines, words=4)
    )


def _missing(rows: list[Row]) -> str:
    found = [row for row in rows if row["status"] not in ("measured", "partial")]
    if not found:
        return ""
    lines = [
        line((row["name"], row["mode"], f"{row['label']}, {row['dtype']}", row["status"], row["reason"] or ""))
        for row in found
    ]
    return section(
        "Not measured",
        "Rows without numbers, and why.",
        table(["work", "mode", "contender", "status", "reason"], lines, words=5),
    )


def _baselines(found: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    lines = [
        line(
            (
                entry["label"],
                "took part" if entry["present"] else "absent",
                entry["version"] or "",
                ", ".join(entry["scenarios"]),
                entry["reason"] or "",
            )
        )
        for entry in found
    ]
    heads = ["contender", "", "version", "scenarios", "reason"]
    return section("Contenders", "All that were considered.", table(heads, lines, words=5))


def _probes(content: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for dtype, probe in content["probes"].items():
        products = f"matrix products {si(probe['gemm_flops_per_s'], 'FLOP/s')} ({probe['library']})"
        found.append((f"probes, {dtype}", f"{products}, copies {si(probe['copy_bytes_per_s'], 'B/s')}"))
    return found


def _coco(coco: dict[str, Any] | None) -> str:
    if not coco:
        return ""
    lines = []
    for run in coco["evaluations"]:
        stages = "; ".join(f"{name} {duration(value)}" for name, value in run["seconds"].items())
        cells = [
            f"{run['pairs']:,}",
            si(run["flops"], "FLOP"),
            si(run["flops_per_s"], "FLOP/s"),
            duration(run["total_s"]["value"]),
        ]
        lines.append(line([f"{run['procedure']}, {run['dtype']} ({run['kind']}): {stages}"], cells))
    receipt = [
        line([step["saving"]], [si(step["flops"], "FLOP"), f"{step['factor']:.2f}×"]) for step in coco["receipt"]
    ]
    speed_up = coco["speed_up"]
    interval = "" if speed_up["low"] is None else f" (95%: {speed_up['low']:.1f} to {speed_up['high']:.1f})"
    text = escape(
        f"{coco['images']:,} images of {coco['image_size']} px, {coco['texts']:,} texts of {coco['mean_length']:.1f} "
        f"tokens on average, k = {coco['k']}: {coco['origin']}. {speed_up['value']:.1f} times as fast{interval}. "
        f"{coco['note']}"
    )
    runs = table(["procedure", "pairs", "arithmetic", "rate", "time"], lines)
    steps = table(["why it costs less", "left", "factor"], receipt)
    return section("Whole evaluation", text, runs + "<h3>Receipt</h3>" + steps)
