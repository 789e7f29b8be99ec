"""`xfm-fast bench report` and `xfm-fast bench compare`: results that were saved, shown again and set side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from xfm_fast.errors import InputError

_WIDTH = 160


def register(bench_app: typer.Typer) -> None:
    """Add the commands to `xfm-fast bench`."""
    bench_app.command("report")(bench_report)
    bench_app.command("compare")(bench_compare)


def bench_report(
    results: Annotated[Path, typer.Argument(help="JSON file that xfm-fast bench wrote.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a README or an issue.")] = False,
    html: Annotated[Path | None, typer.Option(help="File that receives a self-contained page with charts.")] = None,
    png: Annotated[Path | None, typer.Option(help="File that receives a picture of 1200 by 630 to share.")] = None,
) -> None:
    """Show saved results: a table here, Markdown, a page, or a picture."""
    from rich.console import Console

    from xfm_fast.benchmarks import record, report
    from xfm_fast.checkpoint import write_bytes

    document = record.load(results)
    for name, path in (("--html", html), ("--png", png)):
        if path is not None and path.is_dir():
            raise InputError(f"{name} {path} is a folder; name a file")
    if png is not None:
        report.png(document, png)
        typer.echo(f"saved: {png}")
    if html is not None:
        beside = png.name if png is not None and png.parent.resolve() == html.parent.resolve() else None
        write_bytes({html: report.html(document, image=beside).encode()})
        typer.echo(f"saved: {html}")
    if markdown:
        typer.echo(report.markdown(document), nl=False)
    elif html is None and png is None:
        report.terminal(document, Console() if sys.stdout.isatty() else Console(width=_WIDTH))


def bench_compare(
    a: Annotated[Path, typer.Argument(help="Results of before.")],
    b: Annotated[Path, typer.Argument(help="Results of after, of the same benchmark.")],
) -> None:
    """Compare two results files row by row: how many times as fast B is, and whether that is more than chance.

    Faster and slower are said where a Mann-Whitney U test of the samples gives p < 0.05 after Benjamini-Hochberg over
    all rows, the medians differ by more than 2%, and neither row was contended. Other machines and versions are named.

    Exit codes: 0, no row of xfm-fast is slower; 1, at least one is, or lost its numbers; 2, the files cannot be read or
    compared.
    """
    from rich.console import Console

    from xfm_fast.benchmarks import record, report

    found = report.compare(record.load(a), record.load(b))
    report.print_changes(found, Console() if sys.stdout.isatty() else Console(width=_WIDTH))
    raise typer.Exit(1 if found.worse else 0)
