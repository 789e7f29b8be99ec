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
) -> None:
    """Show saved results: a table here, Markdown, or a page."""
    from rich.console import Console

    from xfm_fast.benchmarks import markdown as tables
    from xfm_fast.benchmarks import page, stored, terminal
    from xfm_fast.benchmarks.terminal_drop_in import print_drop_in
    from xfm_fast.benchmarks.terminal_kernels import print_kernels
    from xfm_fast.checkpoint import write_bytes

    content = stored.load(results)
    if html is not None:
        if html.is_dir():
            raise InputError(f"--html {html} is a folder; name a file")
        write_bytes({html: page.render(content).encode()})
        typer.echo(f"saved: {html}")
    if markdown:
        typer.echo(tables.tables(content), nl=False)
    elif html is None:
        console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
        kind = stored.benchmark(content)
        if kind == "drop-in":
            print_drop_in(content, console)
        elif kind == "kernels":
            print_kernels(content, console)
        elif content["schema_version"] == 1:
            terminal.print_report(content, console)
        else:
            terminal.print_scenarios(content, console)


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

    from xfm_fast.benchmarks import compare, stored, terminal

    found = compare.compare(stored.load(a), stored.load(b))
    terminal.print_comparison(found, Console() if sys.stdout.isatty() else Console(width=_WIDTH))
    raise typer.Exit(1 if found.worse else 0)
