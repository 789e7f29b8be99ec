"""The charts of scenarios and sweeps: speed-ups, latency, arrivals, rates, roofline, growth, and where time goes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from xfm_fast.benchmarks.page.charts import (
    COLOURS,
    Bar,
    Chart,
    bars,
    legend,
    linear_axis,
    log_axis,
    number,
    si,
    span_x,
    span_y,
    stacked,
)
from xfm_fast.benchmarks.page.document import figure, figures, seconds, section

Row = dict[str, Any]
_LEADING = ("xfm-fast", "official-algorithm")


class Palette:
    """One colour a contender, the same in every chart; the type of the numbers is told by shape and dashes."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self.labels = {row["contender"]: row["label"] for row in rows}
        names = [name for name in _LEADING if name in self.labels]
        names += [name for name in self.labels if name not in _LEADING]
        self._place = {name: place for place, name in enumerate(names)}
        self._dtypes = sorted({row["dtype"] for row in rows}, key=lambda dtype: (dtype != "fp32", dtype))

    def kind(self, contender: str) -> str:
        """Class of the style sheet."""
        return f"s{self._place.get(contender, 0) % COLOURS}"

    def shape(self, dtype: str) -> int:
        """Number of the mark."""
        return self._dtypes.index(dtype)

    def name(self, row: Row) -> str:
        """For legends and labels."""
        return f"{self.labels[row['contender']]}, {row['dtype']}"

    def series(self, rows: Iterable[Row]) -> list[tuple[str, str, int]]:
        """Entries of a legend, each series once."""
        found = {
            (row["contender"], row["dtype"]): (self.name(row), self.kind(row["contender"]), self.shape(row["dtype"]))
            for row in sorted(rows, key=lambda row: (self._place[row["contender"]], row["dtype"]))
        }
        return list(found.values())


def measured(rows: Iterable[Row]) -> list[Row]:
    """Rows with numbers, complete or interrupted."""
    return [row for row in rows if row["status"] in ("measured", "partial")]


def marks(row: Row) -> str:
    """† for a contended row, * for one that was interrupted."""
    contended = (row.get("conditions") or {}).get("contended", False)
    return ("†" if contended else "") + ("*" if row["status"] == "partial" else "")


def run_seconds(row: Row) -> float | None:
    """Median time of a run; of a request where that is what was measured."""
    if row["seconds"]:
        return statistics.median(row["seconds"])
    return row["latency"]["p50"]["value"] if row["latency"] else None


def _groups(rows: Iterable[Row], key: Callable[[Row], tuple[Any, ...]]) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def speedups(rows: list[Row], palette: Palette) -> str:
    """Bars of how many times as fast xfm-fast is as each other contender, with the bootstrap interval."""
    made = []
    ours = [row for row in measured(rows) if row["against"] and row["x"] is None]
    for (scenario, mode), group in _groups(ours, lambda row: (row["scenario"], row["mode"])).items():
        found = []
        for row in group:
            for other in row["against"]:
                label = palette.labels.get(other["contender"], other["contender"])
                beside = next((r for r in rows if _same_work(r, row) and _is(r, other)), row)
                mark = "†" if "†" in marks(row) + marks(beside) else ""
                parity = row["parity"]
                agrees = f"; parity {parity['error']:.1e} of {parity['band']:.1e}" if parity and parity["error"] else ""
                interval = "" if other["low"] is None else f", 95% interval {other['low']:.2f} to {other['high']:.2f}"
                found.append(
                    Bar(
                        f"{row['dtype']} against {label}, {other['dtype']}",
                        other["ratio"],
                        f"{other['ratio']:.2f}×{' ✓' if parity and parity['passed'] else ''} {mark}".rstrip(),
                        palette.kind(other["contender"]),
                        other["low"],
                        other["high"],
                        f"{row['name']}: {other['ratio']:.2f} times as fast as {label}{interval}{agrees}",
                    )
                )
        title = f"{scenario}, {mode}: {group[0]['name']}"
        made.append(figure(title, bars(f"speed-up, {title}", found, reference=1)))
    if not made:
        return ""
    text = (
        "How many times as fast xfm-fast is, with bootstrap intervals of 95%; contenders took turns in one session. "
        "The dashed line is equal speed; ✓: results agree within what rounding allows; †: something else ran meanwhile."
    )
    return section("Speed-up", text, figures(made))


def _same_work(a: Row, b: Row) -> bool:
    return all(a[key] == b[key] for key in ("scenario", "mode", "name", "x"))


def _is(row: Row, other: dict[str, Any]) -> bool:
    return (row["contender"], row["dtype"]) == (other["contender"], other["dtype"])


def latency(rows: list[Row], palette: Palette) -> str:
    """Cumulative distributions of single requests, with the 50th, 90th and 99th percentile marked."""
    made = []
    rows = [row for row in measured(rows) if row["mode"] == "single-stream" and row["latency"] and row["x"] is None]
    for (scenario, name), group in _groups(rows, lambda row: (row["scenario"], row["name"])).items():
        values = [sample for row in group for sample in row["latency"]["samples"]]
        chart = Chart(
            f"latency distribution, {scenario}: {name}",
            log_axis(values, *span_x(), most_ticks=5),
            linear_axis(1, *span_y()),
            "seconds a request",
            "share of requests",
            x_unit="s",
        )
        for row in group:
            ordered = sorted(row["latency"]["samples"])
            kind, shape = palette.kind(row["contender"]), palette.shape(row["dtype"])
            steps = [(ordered[0], 0.0)]
            for place, value in enumerate(ordered):
                steps += [(value, place / len(ordered)), (value, (place + 1) / len(ordered))]
            chart.line(steps, kind, dashed=bool(shape), tip=f"{palette.name(row)}: {len(ordered)} requests")
            for share, key in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
                value = row["latency"][key]["value"]
                chart.mark(value, share, kind, shape=shape, tip=f"{palette.name(row)}, {key}: {seconds(value)}")
        made.append(figure(f"{scenario}: {name}", chart.svg(), before=legend(palette.series(group), lines=True)))
    if not made:
        return ""
    text = "Share of single requests (SingleStream) answered within a time; the marks are p50, p90 and p99."
    return section("Latency", text, figures(made))


def arrivals(rows: list[Row], palette: Palette) -> str:
    """The 99th percentile at each rate of Poisson arrivals that was tried, and the bound."""
    made = []
    rows = [row for row in measured(rows) if row["server"] and row["server"]["trials"] and row["x"] is None]
    for (scenario, _), group in _groups(rows, lambda row: (row["scenario"], row["name"])).items():
        trials = [trial for row in group for trial in row["server"]["trials"]]
        bound = group[0]["server"]["bound_s"]
        chart = Chart(
            f"p99 latency by rate of arrivals, {scenario}",
            log_axis([trial["rate"] for trial in trials], *span_x(), most_ticks=5),
            log_axis([bound, *(trial["p99"] for trial in trials)], *span_y(), most_ticks=5),
            "requests a second (Poisson)",
            "p99 of latency",
            y_unit="s",
        )
        chart.line([(chart.x.low, bound), (chart.x.high, bound)], "roof", dashed=True, tip=f"bound {seconds(bound)}")
        chart.note(chart.x.low, bound, f" bound {seconds(bound)}")
        for row in group:
            kind, shape = palette.kind(row["contender"]), palette.shape(row["dtype"])
            ordered = sorted(row["server"]["trials"], key=lambda trial: trial["rate"])
            chart.line([(trial["rate"], trial["p99"]) for trial in ordered], kind, dashed=bool(shape))
            for trial in ordered:
                held = "held" if trial["held"] else "broken"
                tip = (
                    f"{palette.name(row)}: {number(trial['rate'])} a second, p99 {seconds(trial['p99'])}, bound {held}"
                )
                chart.mark(trial["rate"], trial["p99"], kind, shape=shape, tip=tip, hollow=not trial["held"])
        best = "; ".join(f"{palette.name(row)} {number(row['server']['max_qps'])}/s{marks(row)}" for row in group)
        made.append(figure(f"{scenario}: {best}", chart.svg(), before=legend(palette.series(group), lines=True)))
    if not made:
        return ""
    text = "Server: p99 of latency as requests arrive faster. Filled marks held the bound, hollow ones broke it."
    return section("Requests a second under a bound", text, figures(made))


def rates(rows: list[Row], palette: Palette) -> str:
    """Items a second of batches, every contender."""
    made = []
    rows = [row for row in measured(rows) if row["throughput"] and row["x"] is None]
    for (scenario, name), group in _groups(rows, lambda row: (row["scenario"], row["name"])).items():
        found = [
            Bar(
                f"{palette.name(row)} {marks(row)}".rstrip(),
                row["throughput"]["value"],
                f"{number(row['throughput']['value'])}/s",
                palette.kind(row["contender"]),
                row["throughput"]["low"],
                row["throughput"]["high"],
                f"{row['label']}: {number(row['throughput']['value'])} {row['unit']} a second",
            )
            for row in group
        ]
        made.append(figure(f"{name} ({group[0]['unit']} a second)", bars(f"throughput, {scenario}: {name}", found)))
    if not made:
        return ""
    return section("Throughput", "Offline: batches back to back, with bootstrap intervals of 95%.", figures(made))


def roofline(content: dict[str, Any], palette: Palette) -> str:
    """Rates of arithmetic over arithmetic intensity, under the roof that this machine was measured to have."""
    made = []
    for dtype, probe in content["probes"].items():
        rows = [row for row in measured(content["rows"]) if row["efficiency"] and row["dtype"] == dtype]
        if not rows:
            continue
        gemm, copy = probe["gemm_flops_per_s"], probe["copy_bytes_per_s"]
        ridge = gemm / copy
        spots = [
            (r["efficiency"]["intensity"], r["efficiency"]["share_of_roof"] * r["efficiency"]["roof"]) for r in rows
        ]
        across = [x for x, _ in spots] + [ridge / 4, ridge * 4]
        low, high = min(across) / 1.5, max(across) * 1.5
        chart = Chart(
            f"roofline, {dtype}",
            log_axis([low, high], *span_x(), most_ticks=5),
            log_axis([gemm * 1.3, copy * low, *(y for _, y in spots)], *span_y(), most_ticks=5),
            "FLOP for each byte that must move",
            "FLOP/s",
            y_unit="FLOP/s",
        )
        roof = [(x, min(gemm, copy * x)) for x in (chart.x.low, ridge, chart.x.high)]
        chart.line(roof, "roof", tip=f"measured: {si(gemm, 'FLOP/s')}, {si(copy, 'B/s')}")
        chart.note(chart.x.high, gemm, f"products {si(gemm, 'FLOP/s')}", anchor="end")
        for row, (x, y) in zip(rows, spots, strict=True):
            share = row["efficiency"]["share_of_roof"]
            tip = (
                f"{row['label']}, {row['mode']}, {row['name']}: {si(y, 'FLOP/s')}, {share:.0%} of the roof {marks(row)}"
            )
            chart.mark(x, y, palette.kind(row["contender"]), shape=palette.shape(dtype), tip=tip.rstrip())
        title = f"{dtype}: {probe['library']}, copies at {si(copy, 'B/s')}"
        made.append(figure(title, chart.svg(), before=legend(palette.series(rows))))
    if not made:
        return ""
    text = (
        "Arithmetic that the result needs, a second, under this machine's own roof: its rate at matrix products and at "
        "copies, as probed between the samples. On the slope memory is the bound, under the flat part arithmetic."
    )
    return section("Roofline", text, figures(made))


def scaling(content: dict[str, Any], palette: Palette) -> str:
    """Cost as work grows, with the line that was fitted through the logarithms."""
    made = []
    swept = [row for row in measured(content["rows"]) if row["x"] is not None and run_seconds(row)]
    for (scenario, over), fits in _groups(content["fits"], lambda fit: (fit["scenario"], fit["over"])).items():
        rows = [row for row in swept if row["scenario"] == scenario]
        if not rows:
            continue
        chart = Chart(
            f"time by {over}, {scenario}",
            log_axis([row["x"] for row in rows], *span_x(), most_ticks=5),
            log_axis([run_seconds(row) or 1.0 for row in rows], *span_y(), most_ticks=5),
            fits[0]["x_label"],
            "time of a run",
            y_unit="s",
        )
        entries = []
        for fit in fits:
            own = [r for r in rows if (r["contender"], r["dtype"]) == (fit["contender"], fit["dtype"])]
            if not own:
                continue
            kind, shape = palette.kind(fit["contender"]), palette.shape(fit["dtype"])
            points = sorted((row["x"], run_seconds(row) or 0.0, marks(row)) for row in own)
            chart.line(_fitted([(x, y) for x, y, _ in points], fit["exponent"]), kind, dashed=bool(shape))
            for x, y, mark in points:
                tip = f"{palette.name(own[0])}, {number(x)} {fit['x_label']}: {seconds(y)} {mark}"
                chart.mark(x, y, kind, shape=shape, tip=tip.rstrip())
            entries.append((f"{palette.name(own[0])}: {_exponent(fit)}", kind, shape))
        made.append(figure(f"{scenario} over {over}", chart.svg(), before=legend(entries, lines=True)))
    if not made:
        return ""
    text = (
        "Time of a run as the work grows, both on logarithmic scales; time ∝ size^e by least squares, e with its "
        "interval of 95%. Below 1 larger work is cheaper for each item."
    )
    return section("Cost as work grows", text, figures(made))


def _exponent(fit: dict[str, Any]) -> str:
    interval = "" if fit["low"] is None else f" ({fit['low']:.2f} to {fit['high']:.2f})"
    return f"e = {fit['exponent']:.2f}{interval}"


def _fitted(points: list[tuple[float, float]], exponent: float) -> list[tuple[float, float]]:
    """Ends of the line of that slope through the middle of the points, as least squares puts it."""
    offset = statistics.fmean(math.log(y) - exponent * math.log(x) for x, y in points)
    ends = (points[0][0], points[-1][0])
    return [(x, math.exp(offset + exponent * math.log(x))) for x in ends]


def splits(rows: list[Row], palette: Palette) -> str:
    """Where a run's time goes: by stage of the procedure, and by kind of operation."""
    made = []
    for part, title in (("stages", "by stage"), ("operations", "by kind of operation")):
        found = [row for row in measured(rows) if row[part] and row["x"] is None]
        kinds = {name: f"s{place % COLOURS}" for place, name in enumerate(_parts(found, part))}
        for (name, mode), group in _groups(found, lambda row: (row["name"], row["mode"])).items():
            lines = [(palette.name(row), [(share["name"], share["share"]) for share in row[part]]) for row in group]
            keys = legend([(key, kinds[key], 1) for key in _parts(group, part)])
            drawn = stacked(f"shares of time {title}: {name}, {mode}", lines, kinds)
            made.append(figure(f"{title}: {name}, {mode}", drawn, before=keys))
    return section("Where the time goes", "Shares of one run's time.", figures(made)) if made else ""


def _parts(rows: list[Row], part: str) -> list[str]:
    return list(dict.fromkeys(share["name"] for row in rows for share in row[part]))
