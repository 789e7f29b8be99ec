"""`xfm-fast export report` and `int8`: how an export runs on this machine, and a smaller and faster copy of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from xfm_fast.export.session_report import SessionReport, ShapeRow

RUNTIME = typer.Option(help="auto, onnxruntime, openvino, tensorrt-rtx, tensorrt or aoti.")
DEVICE = typer.Option(help="cpu, cuda or cuda:1. [a GPU where runtime and machine have one]")
SECONDS = typer.Option(min=0.0, help="Spent on timing each shape of each graph.")


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of an export.")],
    runtime: Annotated[str, RUNTIME] = "auto",
    device: Annotated[str | None, DEVICE] = None,
    seconds: Annotated[float, SECONDS] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Load an export and measure every graph: rates, latencies, transfers, loading, artifacts, memory."""
    from xfm_fast.export.session import Session
    from xfm_fast.export.session_report import measure_session

    session = Session.load(folder, runtime, device)
    found = measure_session(session, seconds=seconds, progress=_say)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        _print(found, folder)


def int8(
    folder: Annotated[Path, typer.Argument(help="Folder of an fp32 export to ONNX.")],
    out: Annotated[Path, typer.Option(help="Folder that receives the int8 export.")],
) -> None:
    """Quantise an fp32 export to int8 for the CPU, and measure what that costs in accuracy."""
    from xfm_fast.cli import export
    from xfm_fast.export.dynamic_int8 import quantize_int8

    export.finish(quantize_int8(folder, out), out)


def _say(message: str) -> None:
    if sys.stderr.isatty():
        typer.echo(f"xfm-fast: measuring {message}", err=True)


def _print(found: SessionReport, folder: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A pipe or a log file has no width; the tables need some.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    title = f"{found.runtime}, {found.dtype}, {found.threads} threads ({folder})"

    def table(title: str, *heads: str) -> Table:
        made = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for head in heads:
            made.add_column(head, justify="left" if head in ("graph", "shape") else "right")
        return made

    loading = table(title, "graph", "build s", "load s", "warm-up s", "file MB", "loaded MB")
    for graph in found.graphs:
        loading.add_row(
            graph.graph, f"{graph.build_seconds:.1f}", f"{graph.load_seconds:.2f}", f"{graph.warm_seconds:.2f}",
            f"{graph.artifact_bytes / 1e6:.1f}", f"{graph.memory_bytes / 1e6:.1f}",
        )  # fmt: skip
    console.print(loading)
    # On a CPU nothing is enqueued and nothing transferred.
    enqueues = any(row.enqueue is not None for graph in found.graphs for row in graph.rows)
    extra = ("enqueue", "to device", "to host") if enqueues else ()
    running = table("times in ms", "graph", "shape", "items/s", "p50", "p90", "p99", *extra, "peak MB", "runs")
    for graph in found.graphs:
        for row in graph.rows:
            running.add_row(graph.graph, *_cells(row, enqueues))
    console.print(running)


def _cells(row: ShapeRow, enqueues: bool) -> list[str]:
    def milliseconds(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds * 1e3:.2f}"

    shape = " ".join(f"{axis}={size}" for axis, size in row.sizes.items())
    times = [milliseconds(value) for value in (row.p50, row.p90, row.p99)]
    extra = [milliseconds(value) for value in (row.enqueue, row.host_to_device, row.device_to_host)] if enqueues else []
    return [shape, f"{row.throughput:.1f} {row.item}", *times, *extra, f"{row.peak_bytes / 1e6:.1f}", str(row.runs)]


def register(export_app: typer.Typer) -> None:
    """Add the commands to `export`."""
    export_app.command()(report)
    export_app.command()(int8)
