"""The report in a terminal: progress while the suite runs, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from xfm_fast.benchmarks.suite import Progress
from xfm_fast.benchmarks.terminal_scenarios import print_comparison, print_scenarios

__all__ = ["print_comparison", "print_report", "print_scenarios", "progress"]

_LISTED = 8


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """Bars on a terminal, silence elsewhere."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[step]}"),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("starting", total=None, step="")
        begun = False

        def begin(stages: int) -> None:
            bars.update(task, total=stages, completed=0)

        def stage(name: str) -> None:
            nonlocal begun
            bars.update(task, description=escape(name), step="", advance=1 if begun else 0)
            begun = True

        yield Progress(begin, stage, lambda what: bars.update(task, step=escape(what)))


def print_report(content: dict[str, Any], console: Console) -> None:
    """Header, table, and what a reader has to know to judge it."""
    machine = content["machine"]
    console.print(
        f"[bold]xfm-fast {machine['xfm_fast']}[/] on {escape(machine['cpu'])}, {machine['threads']} threads, "
        f"PyTorch {escape(machine['torch'])}"
    )
    if content["rows"]:
        console.print(_table(content["rows"], on_gpu=content.get("device") == "cuda"))
    for note in _notes(content):
        console.print(note, soft_wrap=True)


def _table(rows: list[dict[str, Any]], *, on_gpu: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("work", overflow="fold", ratio=1, min_width=26)
    table.add_column("dtype")
    share = "MFU" if on_gpu else "of GEMM rate"
    heads = ["xfm-fast", "official", "speed-up", "error", share, "useful tokens/s", "peak memory"]
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        if row["status"] == "parity failed":
            table.add_row(escape(row["name"]), row["dtype"], f"[red]{row['status']}[/]", *[""] * (len(heads) - 1))
        if row["status"] != "measured":
            continue
        fast, twin, tokens = row["fast"], row["twin"], row.get("tokens")
        low, high = row["ratio_interval"]
        samples = len(fast["seconds"])
        spread = f"{low:.1f}-{high:.1f}" if samples > 2 else f"{samples} sample{'s' if samples > 1 else ''}"
        table.add_row(
            escape(row["name"]),
            row["dtype"],
            f"[bold]{fast['throughput']:,.4g}[/]\n{row['unit']}/s",
            f"{twin['throughput']:,.4g}",
            f"[bold]{row['ratio']:.1f}x[/]{' †' if row['probe']['contended'] else ''}\n[dim]{spread}[/]",
            f"{row['parity']['error']:.0e}",
            "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}",
            f"{tokens['useful_per_s']:,.0f}\n[dim]off. {tokens['twin_useful_per_s']:,.0f}[/]" if tokens else "",
            f"{fast['peak_bytes'] / 1e9:.2f} GB\n[dim]off. {twin['peak_bytes'] / 1e9:.2f}[/]",
        )
    for dtype in dict.fromkeys(row["dtype"] for row in rows if row["status"] == "not offered"):
        table.add_row("[dim]all of the above[/]", dtype, "[dim]not offered[/]", *[""] * (len(heads) - 1))
    return table


def _notes(content: dict[str, Any]) -> Iterator[str]:
    for check in content["parity"]:
        if not check["passed"]:
            yield (
                f"[red]fast and official differ: {escape(check['name'])} ({check['dtype']}), error "
                f"{check['error']:.1e}, allowed {check['band']:.1e}; no speed is reported[/]"
            )
    for row in content["rows"]:
        if row["status"] == "parity failed":
            yield f"[red]{escape(row['name'])} ({row['dtype']}): {row['reason']}[/]"
    if content["parity"] and all(check["passed"] for check in content["parity"]):
        worst = max((c for c in content["parity"]), key=lambda c: c["error"] / c["band"])
        yield (
            f"fast = official in all {len(content['parity'])} comparisons (closest to its limit: {worst['key']} "
            f"{worst['dtype']}, {worst['error']:.1e} of {worst['band']:.1e})"
        )
    yield from _circumstances(content)


def _circumstances(content: dict[str, Any]) -> Iterator[str]:
    rows = content["rows"]
    if any(row.get("probe", {}).get("contended") for row in rows):
        yield "[yellow]† the machine's matrix rate moved by more than 10% meanwhile: something else was running[/]"
    for reason in dict.fromkeys(row["reason"] for row in rows if row["status"] == "not offered"):
        yield f"bf16: {escape(reason)}"
    if content["options"]["quick"]:
        yield "--quick: less work per row and fewer samples than the full measurement"
    counts = sorted({len(row["fast"]["seconds"]) for row in rows if row["status"] == "measured"})
    if counts:
        span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        types = {row.get("twin_dtype", "fp32") for row in rows if row["status"] == "measured"}
        yield f"medians of {span} interleaved samples; official: {', '.join(sorted(types))}"
    yield from _memory(rows)
    model = content.get("model")
    if model:
        yield f"model: {model['preset']}, {model['parameters'] / 1e6:.0f}M parameters, {escape(model['origin'])}"
    recall = next((row["recall"] for row in rows if row.get("recall")), None)
    if recall and model:
        figures = ", ".join(
            f"{way} R@1/5/10 {_recall(recall, key)}" for way, key in (("text", "txt"), ("image", "img"))
        )
        judgement = "" if model["meaningful_recall"] else " (means nothing: " + _why(model) + ")"
        yield f"retrieval: {figures}{judgement}"
    if "cold_start" in content:
        cold = content["cold_start"]
        yield (
            f"cold start: {cold['total_s']:.1f} s (imports {cold['process_to_suite_s']:.1f}, weights "
            f"{cold['load_s']:.1f}, first image {cold['first_image_s']:.1f})"
        )
    data = content.get("data")
    if data:
        yield f"data: {data['photos']} photographs, {data['captions']} captions; {escape(data['origin'])}"
        yield f"tokens: {escape(data['tokenizer'])}, {data['vocabulary']} entries"
        yield from _skipped(data)
    yield from _official(content)
    if content["interrupted"]:
        yield "[yellow]interrupted: the rows above are complete, the rest was not measured[/]"


def _memory(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        memory = row.get("memory")
        if not memory:
            continue
        fast, twin = memory["fast"], memory["twin"]
        peaks = f"{fast['peak_bytes'] / 1e9:.2f} of {twin['peak_bytes'] / 1e9:.2f} GB"
        beyond = f"{fast['activation_bytes'] / 1e9:.2f} of {twin['activation_bytes'] / 1e9:.2f} GB"
        yield (
            f"peak memory, {row['key']} {row['dtype']}: {memory['peak_ratio']:.0%} ({peaks}); beyond parameters and "
            f"gradients {memory['activation_ratio']:.0%} ({beyond}); {row['memory_method']}"
        )


def _recall(recall: dict[str, float], key: str) -> str:
    return "/".join(f"{recall[f'{key}_r{depth}']:.0f}" for depth in (1, 5, 10))


def _why(model: dict[str, Any]) -> str:
    return "no --tokenizer was given" if model["trained"] else "the weights are random"


def _skipped(data: dict[str, Any]) -> Iterator[str]:
    if data["left_unread"]:
        yield f"{data['left_unread']} more photographs were not looked at"
    skipped = data["skipped"]
    if skipped:
        yield f"[yellow]skipped {len(skipped)}:[/]"
        for entry in skipped[:_LISTED]:
            yield f"  {escape(entry['what'])}: {escape(entry['reason'])}"
        if len(skipped) > _LISTED:
            yield f"  ... and {len(skipped) - _LISTED} more (all are in the JSON file)"


def _official(content: dict[str, Any]) -> Iterator[str]:
    official = content.get("official")
    if not official:
        return
    if official["status"] == "absent":
        yield f"official code: absent, {escape(official['reason'])}"
        return
    units = {row["key"]: row for row in content["rows"] if row["status"] == "measured"}
    for row in official["rows"]:
        seconds = sorted(row["seconds"])[len(row["seconds"]) // 2]
        ours = units.get(row["key"])
        ratio = f", xfm-fast {seconds / ours['fast']['median_s']:.1f}x" if ours else ""
        difference = f"differs from the twin by {row['error']:.0e}"
        yield f"official code, own process: {row['key']} {seconds:.3g} s{ratio} ({difference})"
