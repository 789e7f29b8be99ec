"""Scenarios, sweeps, evaluations and comparisons of documents in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xfm_fast.benchmarks.compare import SIGNIFICANCE, SMALLEST_EFFECT, Change, Comparison
from xfm_fast.benchmarks.page.charts import number, si
from xfm_fast.benchmarks.page.document import duration, seconds
from xfm_fast.benchmarks.page.plots import marks, measured

_OFFICIAL = "official-algorithm"
_COLOURS = {"faster": "green", "slower": "red", "lost": "red", "contended": "yellow"}


def print_scenarios(content: dict[str, Any], console: Console) -> None:
    """Every row of a document of scenarios, and what a reader has to know to judge them."""
    machine = content["machine"]
    console.print(
        f"[bold]xfm-fast {escape(str(machine.get('xfm_fast')))}[/] on {escape(str(machine.get('cpu')))}, "
        f"{machine.get('threads')} threads, PyTorch {escape(str(machine.get('torch')))}"
    )
    if content["rows"]:
        console.print(_rows(content["rows"]))
    if content["coco"]:
        console.print(_evaluations(content["coco"]))
    for note in _notes(content):
        console.print(note, soft_wrap=True)


def _rows(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("work", overflow="fold", ratio=1, min_width=22)
    table.add_column("contender", overflow="fold", min_width=12)
    for head in ("dtype", "mode"):
        table.add_column(head)
    for head in ("result", "p50 / p90 / p99", "official / this", "error", "MFU", "of roof", "peak memory"):
        table.add_column(head, justify="right")
    shown = None
    for row in rows:
        name = "" if row["name"] == shown else row["name"]
        shown = row["name"]
        start = (escape(name), escape(row["label"]), row["dtype"], row["mode"])
        if row not in measured([row]):
            table.add_row(
                *start, f"[{'dim' if row['status'] in ('absent', 'not offered') else 'red'}]{row['status']}[/]"
            )
            continue
        latency, efficiency, parity = row["latency"], row["efficiency"], row["parity"]
        table.add_row(
            *start,
            f"[bold]{result(row)}[/] {marks(row)}".rstrip(),
            " / ".join(seconds(latency[key]["value"]) for key in ("p50", "p90", "p99")) if latency else "",
            _ratio(row),
            "" if parity is None else "not finite" if parity["error"] is None else f"{parity['error']:.0e}",
            "" if efficiency is None else f"{efficiency['mfu']:.0%}",
            "" if efficiency is None else f"{efficiency['share_of_roof']:.0%}",
            f"{row['memory']['peak_bytes'] / 1e9:.2f} GB" if row["memory"] else "",
        )
    return table


def result(row: dict[str, Any]) -> str:
    """The number that a row is measured for: a rate, or the median latency."""
    if row["server"]:
        return f"{number(row['server']['max_qps'])} requests/s"
    if row["throughput"]:
        return f"{number(row['throughput']['value'])} {row['unit']}/s"
    return seconds(row["latency"]["p50"]["value"]) if row["latency"] else ""


def _ratio(row: dict[str, Any]) -> str:
    against = next((other for other in row["against"] if other["contender"] == _OFFICIAL), None)
    if against is None:
        return ""
    spread = "" if against["low"] is None else f"\n[dim]{against['low']:.2f}-{against['high']:.2f}[/]"
    return f"[bold]{against['ratio']:.2f}x[/]{spread}"


def _evaluations(coco: dict[str, Any]) -> Table:
    title = f"{coco['images']:,} images, {coco['texts']:,} texts, k = {coco['k']}: {coco['origin']}"
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("procedure", "dtype", ""):
        table.add_column(head)
    for head in ("pairs", "arithmetic", "rate", "time"):
        table.add_column(head, justify="right")
    for run in coco["evaluations"]:
        work = (f"{run['pairs']:,}", si(run["flops"], "FLOP"), si(run["flops_per_s"], "FLOP/s"))
        table.add_row(run["procedure"], run["dtype"], run["kind"], *work, duration(run["total_s"]["value"]))
    table.add_section()
    for step in coco["receipt"]:
        table.add_row(escape(step["saving"]), "", "", "", si(step["flops"], "FLOP"), "", f"{step['factor']:.2f}x")
    return table


def _notes(content: dict[str, Any]) -> Iterator[str]:
    rows = content["rows"]
    for row in rows:
        if row["status"] not in ("measured", "absent", "not offered"):
            colour = "yellow" if row["status"] == "partial" else "red"
            what = f"{row['label']} {row['dtype']}, {row['name']}, {row['mode']}"
            yield f"[{colour}]{row['status']}[/] {escape(what)}: {escape(row['reason'] or '')}"
    for fit in content["fits"]:
        interval = "" if fit["low"] is None else f" (95%: {fit['low']:.2f} to {fit['high']:.2f})"
        yield (
            f"{fit['scenario']}, {fit['contender']} {fit['dtype']}: time ~ {fit['x_label']} ^ "
            f"[bold]{fit['exponent']:.2f}[/]{interval}, R² {fit['r2']:.3f}"
        )
    for row in rows:
        for part in ("stages", "operations"):
            if row[part] and row["contender"] == "xfm-fast":
                split = ", ".join(f"{share['name']} {share['share']:.0%}" for share in row[part])
                yield f"[dim]{escape(row['name'])}, {row['mode']} {row['dtype']}: {escape(split)}[/]"
    if any("†" in marks(row) for row in measured(rows)):
        yield "[yellow]† a probe moved by more than 10% meanwhile: something else was running[/]"
    for note in dict.fromkeys((row["conditions"] or {}).get("note") for row in rows):
        if note:
            yield f"[yellow]{escape(note)}[/]"
    for dtype, probe in content["probes"].items():
        products = f"matrix products {si(probe['gemm_flops_per_s'], 'FLOP/s')} ({probe['library']})"
        yield f"probes, {dtype}: {products}, copies {si(probe['copy_bytes_per_s'], 'B/s')}"
    absent = [f"{entry['label']} ({entry['reason']})" for entry in content["baselines"] if not entry["present"]]
    if absent:
        yield f"[dim]absent: {escape('; '.join(absent))}[/]"
    energy = next((row["energy_note"] for row in rows if row["energy_note"]), None)
    if energy:
        yield f"[dim]no energy: {escape(energy)}[/]"
    if content["coco"]:
        coco = content["coco"]
        yield f"[bold]{coco['speed_up']['value']:.1f}x[/] as fast. {escape(coco['note'])}"
    if content["interrupted"]:
        yield "[yellow]interrupted: rows marked * hold the samples until then, the rest was not measured[/]"


def print_comparison(found: Comparison, console: Console) -> None:
    """Every row of a comparison, what else differs, and the rule."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("work", overflow="fold", ratio=1, min_width=22)
    table.add_column("contender", overflow="fold")
    table.add_column("dtype")
    for head in ("B is", "95% interval", "p", "samples", "official", "beyond it"):
        table.add_column(head, justify="right")
    table.add_column("")
    for change in found.changes:
        colour = _COLOURS.get(change.verdict, "dim")
        low_high = "" if change.low is None or change.high is None else f"{change.low:.2f}-{change.high:.2f}"
        table.add_row(
            escape(change.name),
            escape(change.contender),
            change.dtype,
            _times(change.ratio),
            low_high,
            "" if change.p is None else f"{change.p:.3f}" if change.p >= 0.001 else "<0.001",
            f"{change.samples[0]} + {change.samples[1]}" if any(change.samples) else "",
            _times(change.control),
            _times(change.relative),
            f"[{colour}]{change.verdict}[/]",
        )
    console.print(table)
    for change in found.changes:
        if change.reason:
            console.print(f"[red]{escape(change.name)}, {change.dtype}: {escape(change.reason)}[/]", soft_wrap=True)
    for flag in found.flags:
        console.print(f"[yellow]{escape(flag)}[/]", soft_wrap=True)
    console.print(
        f"times that B is as fast; faster, slower: Mann-Whitney U, p below {SIGNIFICANCE:g} after Benjamini-Hochberg, "
        f"and medians more than {SMALLEST_EFFECT:.0%} apart. official: the same ratio of the official algorithm",
        soft_wrap=True,
    )
    console.print(_summary(found.changes), soft_wrap=True)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _summary(changes: list[Change]) -> str:
    ours = [change.verdict for change in changes if change.contender == "xfm-fast"]
    counts = ", ".join(f"{ours.count(verdict)} {verdict}" for verdict in dict.fromkeys(ours))
    return f"[bold]xfm-fast: {counts or 'no row in both'}[/]"
