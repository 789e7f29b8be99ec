"""The page of the suite and of the training step: fast against official, row by row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from xfm_fast.benchmarks.page.document import (
    circumstances,
    circumstances_line,
    notes,
    seconds,
    section,
    shell,
    skipped,
)
from xfm_fast.benchmarks.page.headline import Candidate, best_of, tile

_WIDTH, _LABEL, _RIGHT = 1000, 170, 90
_PLOT = _WIDTH - _LABEL - _RIGHT


def render(content: dict[str, Any]) -> str:
    """The page of a results document."""
    measured = [row for row in content["rows"] if row["status"] == "measured"]
    body = [
        _title(content),
        _notes(content),
        _tiles(measured),
        _speedups(measured),
        _memory(measured),
        _samples(measured),
        _shares(measured, content),
        _table(content),
        _official(content),
        circumstances(content, _paths(content)),
        skipped(content),
    ]
    return shell("xfm-fast bench", body, kind="suite")


def _paths(content: dict[str, Any]) -> list[tuple[str, str]]:
    chosen = content.get("selections", [])
    return [("paths", "; ".join(f"{s['operation']} {s['dtype']}: {s['chosen']}" for s in chosen))]


def _title(content: dict[str, Any]) -> str:
    return f"<h1>xfm-fast against the official algorithm</h1><p class=soft>{escape(circumstances_line(content))}</p>"


def _notes(content: dict[str, Any]) -> str:
    found = []
    if content["interrupted"]:
        found.append(("bad", "The run was interrupted; the rows measured before are complete."))
    found += [
        ("bad", f"{check['name']} ({check['dtype']}): error {check['error']:.1e} exceeds {check['band']:.1e}.")
        for check in content["parity"]
        if not check["passed"]
    ]
    if content["options"]["quick"]:
        found.append(("", "Short form: less work per row and fewer samples than the full measurement."))
    if any(row.get("probe", {}).get("contended") for row in content["rows"]):
        found.append(
            ("", "Something else ran on this machine: rows marked † saw its matrix rate move by more than 10%.")
        )
    model = content.get("model")
    if model and not model["trained"]:
        nothing = ", retrieval quality means nothing" if any(row.get("recall") for row in content["rows"]) else ""
        found.append(("", f"The weights are random: speeds and parity are real{nothing}."))
    return notes(found)


def _tiles(rows: list[dict[str, Any]]) -> str:
    made = []
    for key in dict.fromkeys(row["key"] for row in rows):
        best = best_of(_candidate(row) for row in rows if row["key"] == key)
        rate = f"{best.row['fast']['throughput']:,.4g} {best.row['unit']}/s in {best.row['dtype']}"
        made.append(tile(best, _short(best.row["name"]), rate))
    return f"<div class=tiles>{''.join(made)}</div>" if made else ""


def _candidate(row: dict[str, Any]) -> Candidate:
    enough = min(len(row["fast"]["seconds"]), len(row["twin"]["seconds"])) > 2
    low, high = row["ratio_interval"] if enough else (None, None)
    return Candidate(row["ratio"], low, high, row["probe"]["contended"], row)


def _short(name: str) -> str:
    return name.split(" (")[0]


def _label(row: dict[str, Any]) -> str:
    mark = " †" if row["probe"]["contended"] else ""
    return f"{row['key']}, {row['dtype']}{mark}"


def _legend(rows: list[dict[str, Any]], *, twin: bool) -> str:
    names = [(dtype, f"xfm-fast {dtype}") for dtype in ("fp32", "bf16") if any(row["dtype"] == dtype for row in rows)]
    types = dict.fromkeys(row.get("twin_dtype", "fp32") for row in rows)
    names += [("twin", f"official algorithm, {', '.join(types)}")] if twin else []
    keys = "".join(f'<span class="key k-{kind}"></span>{name}' for kind, name in names)
    return f"<p class=soft>{keys}</p>"


def _chart(rows: Sequence[str], height: int, label: str) -> str:
    drawn = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(rows)}</svg>'
    return f'<div class=wide tabindex="0" role="region" aria-label="{escape(label)}">{drawn}</div>'


def _axis(ticks: Iterable[tuple[float, str]], height: int) -> str:
    return "".join(
        f'<line class=grid x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"/>'
        f'<text class=soft x="{x:.1f}" y="{height - 4}" text-anchor="middle">{escape(text)}</text>'
        for x, text in ticks
    )


def _name(row: dict[str, Any], y: float) -> str:
    return f'<text x="0" y="{y:.1f}">{escape(_label(row))}</text>'


def _speedups(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    top = max(max(row["ratio_interval"][1], row["ratio"]) for row in rows)
    step = _step(top)
    end = math.ceil(top / step) * step
    height = 30 * len(rows) + 24
    ticks = [(_LABEL + _PLOT * i * step / end, f"{i * step:g}×") for i in range(round(end / step) + 1)]
    parts = [_axis(ticks, height)]
    for number, row in enumerate(rows):
        y = 30 * number + 4
        low, high = (_LABEL + _PLOT * value / end for value in row["ratio_interval"])
        width = _PLOT * row["ratio"] / end
        parts.append(
            _name(row, y + 15)
            + f'<rect class="{row["dtype"]}" x="{_LABEL}" y="{y}" width="{width:.1f}" height="20" rx="4"/>'
            + f'<line class=whisker x1="{low:.1f}" x2="{high:.1f}" y1="{y + 10}" y2="{y + 10}"/>'
            + f'<text class=value x="{max(high, _LABEL + width) + 8:.1f}" y="{y + 15}">{row["ratio"]:.1f}×</text>'
        )
    text = "Median time of the official algorithm in fp32 over median time of xfm-fast; the line is a 95% interval."
    return section("Speed-up", text, _legend(rows, twin=False) + _chart(parts, height, "speed-up of every row"))


def _step(top: float) -> float:
    rough = top / 6
    power = 10 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def _samples(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    values = [s for row in rows for s in row["fast"]["seconds"] + row["twin"]["seconds"]]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def place(seconds: float) -> float:
        return _LABEL + (_PLOT + _RIGHT - 20) * (math.log10(seconds) - low) / (high - low)

    height = 34 * len(rows) + 24
    parts = [_axis([(place(10.0**power), seconds(10.0**power)) for power in range(low, high + 1)], height)]
    for number, row in enumerate(rows):
        y = 34 * number + 16
        parts.append(_name(row, y + 4))
        for kind, samples in (("twin", row["twin"]), (row["dtype"], row["fast"])):
            middle = place(samples["median_s"])
            parts += [
                f'<circle class="{kind}" cx="{place(s):.1f}" cy="{y}" r="5" fill-opacity="0.6"/>'
                for s in samples["seconds"]
            ]
            parts.append(f'<line class=median x1="{middle:.1f}" x2="{middle:.1f}" y1="{y - 9}" y2="{y + 9}"/>')
    text = "Every timed run, on a logarithmic scale; the strokes are medians. Variants took turns in one process."
    return section("Samples", text, _legend(rows, twin=True) + _chart(parts, height, "all samples of every row"))


def _memory(rows: list[dict[str, Any]]) -> str:
    """Bars of both procedures' peak memory, the part that parameters, gradients and the rest take set apart."""
    rows = [row for row in rows if row.get("memory")]
    if not rows:
        return ""
    top = max(row["memory"][who]["peak_bytes"] for row in rows for who in ("fast", "twin"))
    height = 50 * len(rows) + 24
    step = _step(top / 1e9)
    ticks = [(_LABEL + _PLOT * i * step * 1e9 / top, f"{i * step:g} GB") for i in range(int(top / 1e9 / step) + 1)]
    parts = [_axis(ticks, height)]
    for number, row in enumerate(rows):
        parts.append(_name(row, 50 * number + 26))
        for place, (who, kind) in enumerate((("fast", row["dtype"]), ("twin", "twin"))):
            y, use = 50 * number + 4 + 20 * place, row["memory"][who]
            whole = _PLOT * use["peak_bytes"] / top
            held = _PLOT * (use["peak_bytes"] - use["activation_bytes"]) / top
            bar = f'<rect class="{kind}" x="{_LABEL}" y="{y}" height="16" rx="4"'
            parts.append(
                f'{bar} width="{whole:.1f}" fill-opacity="0.55"/>{bar} width="{held:.1f}"/>'
                f'<text class=value x="{_LABEL + whole + 8:.1f}" y="{y + 13}">{use["peak_bytes"] / 1e9:.2f} GB</text>'
            )
    text = (
        "Highest memory of each procedure, in a process of its own on a CPU. The darker part is there before the step "
        "or belongs to the gradients; the lighter part is what the step itself takes."
    )
    return section("Peak memory", text, _legend(rows, twin=True) + _chart(parts, height, "peak memory of every row"))


def _shares(rows: list[dict[str, Any]], content: dict[str, Any]) -> str:
    rows = [row for row in rows if row["share_of_peak"] is not None]
    if not rows:
        return ""
    height = 30 * len(rows) + 24
    parts = [_axis([(_LABEL + _PLOT * p / 100, f"{p}%") for p in range(0, 101, 20)], height)]
    for number, row in enumerate(rows):
        y, share = 30 * number + 4, row["share_of_peak"]
        width = _PLOT * min(share, 1)
        parts.append(
            _name(row, y + 15)
            + f'<rect class=track x="{_LABEL}" y="{y + 4}" width="{_PLOT}" height="12" rx="4"/>'
            + f'<rect class="{row["dtype"]}" x="{_LABEL}" y="{y}" width="{width:.1f}" height="20" rx="4"/>'
            + f'<text class=value x="{_LABEL + _PLOT + 10}" y="{y + 15}">{share:.0%}</text>'
        )
    rates = "; ".join(
        f"{dtype} {probe['flops_per_s'] / 1e9:,.0f} GFLOP/s with {probe['library']}"
        for dtype, probe in content.get("probe", {}).items()
    )
    whose = "this machine's own rate at matrix products as probed between the rounds"
    if content.get("device") == "cuda":
        whose = "the rate that the data sheet gives"
    text = escape(f"Operations that the result needs, per second, over {whose} ({rates}).")
    return section("Share of the machine's matrix rate", text, _chart(parts, height, "share of peak of every row"))


def _table(content: dict[str, Any]) -> str:
    heads = ["work", "dtype", "xfm-fast", "official", "speed-up", "95% interval", "error", "allowed", "samples"]
    heads += ["useful tokens/s", "official (padded)", "peak memory", "official"]
    lines = []
    for row in content["rows"]:
        start = f"<td>{escape(row['name'])}</td><td>{row['dtype']}</td>"
        if row["status"] == "parity failed":
            lines.append(f"<tr>{start}<td class=bad colspan={len(heads) - 2}>{escape(row['reason'])}</td></tr>")
        if row["status"] != "measured":
            continue
        fast, twin, tokens, low_high = row["fast"], row["twin"], row.get("tokens"), row["ratio_interval"]
        cells = [
            f"{fast['throughput']:,.4g} {row['unit']}/s",
            f"{twin['throughput']:,.4g} {row['unit']}/s",
            f"{row['ratio']:.2f}×" + (" †" if row["probe"]["contended"] else ""),
            f"{low_high[0]:.2f}–{low_high[1]:.2f}" if len(fast["seconds"]) > 2 else "",
            f"{row['parity']['error']:.1e}",
            f"{row['parity']['band']:.1e}",
            f"{len(fast['seconds'])} + {len(twin['seconds'])}",
            f"{tokens['useful_per_s']:,.0f}" if tokens else "",
            f"{tokens['twin_useful_per_s']:,.0f} ({tokens['twin_padded_per_s']:,.0f})" if tokens else "",
            f"{fast['peak_bytes'] / 1e9:.2f} GB (+{fast['grown_bytes'] / 1e6:,.0f} MB)",
            f"{twin['peak_bytes'] / 1e9:.2f} GB (+{twin['grown_bytes'] / 1e6:,.0f} MB)",
        ]
        lines.append("<tr>" + start + "".join(f"<td class=n>{escape(cell)}</td>" for cell in cells) + "</tr>")
    absent = {row["dtype"]: row["reason"] for row in content["rows"] if row["status"] == "not offered"}
    for dtype, reason in absent.items():
        cells = f"<td class=soft>all of the above</td><td>{dtype}</td>"
        lines.append(f"<tr>{cells}<td class=soft colspan={len(heads) - 2}>{escape(reason)}</td></tr>")
    if not lines:
        return ""
    head = "".join(f"<th{'' if i < 2 else ' class=n'}>{escape(text)}</th>" for i, text in enumerate(heads))
    table = f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    text = "Errors are the largest difference from the official algorithm relative to the largest value."
    return section("All rows", text, table)


def _official(content: dict[str, Any]) -> str:
    official = content.get("official")
    if not official:
        return ""
    if official["status"] == "absent":
        return section("Official code", escape(f"Absent: {official['reason']}"), "")
    lines = "".join(
        f"<tr><td>{escape(row['key'])}</td><td class=n>{seconds(statistics.median(row['seconds']))}</td>"
        f"<td class=n>{row['error']:.1e}</td></tr>"
        for row in official["rows"]
    )
    replaced = f", stand-ins for {', '.join(official['replaced'])}" if official["replaced"] else ""
    text = escape(
        f"The code of {official['clone']} in a process of its own, not interleaved (transformers "
        f"{official['transformers']}{replaced}). Errors are against the official algorithm as timed above."
    )
    head = "<thead><tr><th>work</th><th class=n>median</th><th class=n>error</th></tr></thead>"
    return section("Official code", text, f"<table>{head}<tbody>{lines}</tbody></table>")
