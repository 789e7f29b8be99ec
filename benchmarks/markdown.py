"""Results as Markdown tables, for a README or an issue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from xfm_fast.benchmarks.page.document import duration, seconds
from xfm_fast.benchmarks.page.plots import marks, measured
from xfm_fast.benchmarks.stored import benchmark, kernel_ratio
from xfm_fast.benchmarks.terminal_scenarios import result

_OFFICIAL = "official-algorithm"


def tables(content: dict[str, Any]) -> str:
    """The rows of a results document as one Markdown table, or two; ends with a line break."""
    kind = benchmark(content)
    if kind == "drop-in":
        return _drop_in(content["rows"])
    if kind == "kernels":
        return _kernels(content["rows"])
    if content["schema_version"] == 1:
        return _suite(content)
    parts = []
    if measured(content["rows"]):
        parts.append(_scenarios(content["rows"]))
    if content["fits"]:
        parts.append(_fits(content["fits"]))
    if content["coco"]:
        parts.append(_evaluation(content["coco"]))
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, *rows]
    drawn = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([drawn[0], "|" + "---|" * len(heads), *drawn[1:]]) + "\n"


def _suite(content: dict[str, Any]) -> str:
    rows = [row for row in content["rows"] if row["status"] == "measured"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    size = f"{content['model']['preset']} size" if "model" in content else ""
    several = len(dtypes) > 1
    about = ", ".join(part for part in ("" if several else "".join(dtypes), size) if part)
    heads = [f"work ({about})" if about else "work", *(["dtype"] if several else [])]
    heads += ["xfm-fast", "official algorithm", "ratio", "of the GEMM rate"]
    lines = []
    for row in rows:
        share = row["share_of_peak"]
        lines.append(
            [
                row["name"],
                *([row["dtype"]] if several else []),
                f"{row['fast']['throughput']:.3g} {row['unit']}/s",
                f"{row['twin']['throughput']:.3g}",
                f"{row['ratio']:.1f}x{' †' if row['probe']['contended'] else ''}",
                "" if share is None else f"{share:.0%}",
            ]
        )
    return _table(heads, lines)


def _drop_in(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["status"] != "measured":
            continue
        same = row["ratio_same_dtype"]
        lines.append(
            [
                row["name"],
                row["dtype"],
                f"{row['original']['median_s'] * 1e3:,.0f} ms",
                f"{row['fast']['median_s'] * 1e3:,.0f} ms",
                f"{row['ratio']:.1f}x{' †' if row['probe']['contended'] else ''}",
                "" if same is None else f"{same:.1f}x",
                f"{row['parity']['error']:.0e}",
            ]
        )
    return _table(
        ["model and work", "dtype", "untouched fp32", "ours", "faster", "than the same dtype", "error"], lines
    )


def _kernels(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if not row["seconds"]:
            continue
        ratio = kernel_ratio(row, rows)
        lines.append(
            [
                row["case"],
                row["direction"],
                row["contender"],
                row["dtype"],
                seconds(row["seconds"]),
                "" if ratio is None else f"{ratio:.2f}x",
                "" if row["error"] is None else f"{row['error']:.0e}",
            ]
        )
    return _table(["operation", "direction", "contender", "dtype", "time", "xfm-fast is", "error"], lines)


def _scenarios(rows: list[dict[str, Any]]) -> str:
    ours = [row for row in measured(rows) if row["contender"] == "xfm-fast"]
    lines = []
    for row in measured(rows):
        latency, parity = row["latency"], row["parity"]
        lines.append(
            {
                "work": row["name"],
                "mode": row["mode"],
                "contender": row["label"],
                "dtype": row["dtype"],
                "result": f"{result(row)} {marks(row)}".rstrip(),
                "p99": seconds(latency["p99"]["value"]) if latency else "",
                "xfm-fast is": "" if row["contender"] == "xfm-fast" else _ratios(row, ours),
                "error": "" if parity is None or parity["error"] is None else f"{parity['error']:.0e}",
            }
        )
    # Only single requests have a latency.
    timed = any(line["p99"] for line in lines)
    heads = ["work", "mode", "contender", "dtype", "result", *(["p99"] if timed else []), "xfm-fast is", "error"]
    return _table(heads, [[line[head] for head in heads] for line in lines])


def _ratios(row: dict[str, Any], ours: list[dict[str, Any]]) -> str:
    """How many times as fast xfm-fast is at this work, in each of its types."""
    found = [
        f"{other['ratio']:.1f}x ({mine['dtype']})"
        for mine in ours
        if (mine["scenario"], mine["mode"], mine["name"]) == (row["scenario"], row["mode"], row["name"])
        for other in mine["against"]
        if (other["contender"], other["dtype"]) == (row["contender"], row["dtype"])
    ]
    return ", ".join(found)


def _fits(fits: list[dict[str, Any]]) -> str:
    lines = []
    for fit in fits:
        interval = "" if fit["low"] is None else f" ({fit['low']:.2f} to {fit['high']:.2f})"
        what = [fit["scenario"], fit["contender"], fit["dtype"], fit["x_label"]]
        lines.append([*what, f"{fit['exponent']:.2f}{interval}"])
    return _table(["work", "contender", "dtype", "grows with", "exponent of time (95%)"], lines)


def _evaluation(coco: dict[str, Any]) -> str:
    lines = []
    for run in coco["evaluations"]:
        cost = [f"{run['pairs']:,}", f"{run['flops'] / 1e15:,.3g} PFLOP", duration(run["total_s"]["value"])]
        lines.append([run["procedure"], run["dtype"], run["kind"], *cost])
    what = f"{coco['images']:,} images, {coco['texts']:,} texts, k = {coco['k']}"
    return _table([what, "dtype", "", "pairs", "arithmetic", "time"], lines)
