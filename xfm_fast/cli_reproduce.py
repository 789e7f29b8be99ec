"""`xfm-fast reproduce`: the paper's experiments in miniature."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from xfm_fast.reproduce.ablations import Study

INTERRUPTED = 75
"""Exit code of a study with missing runs (EX_TEMPFAIL: the same command goes on there), as of `pretrain`."""


def ablations(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant; intervals need at least 2.")] = 3,
    variants: Annotated[
        str, typer.Option(help="full, no-stop-gradient, no-mim-guidance, neither, joined by commas; or all.")
    ] = "all",
    minutes: Annotated[float | None, typer.Option(min=0, help="Begin no run after so many minutes. [no limit]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the study; it goes on with what is there.")] = Path(
        "runs/ablations"
    ),
) -> None:
    """Train tiny models on the shapes world with and without stop-gradient and MIM guidance, and compare them.

    Reports linear probes, zero-shot retrieval and grounding on held-out combinations, with intervals over seeds, in a
    table and in ablations.md, .json and .svg. Finished runs are kept and not repeated, whatever stops the study.
    """
    from rich.console import Console

    from xfm_fast.reproduce import report
    from xfm_fast.reproduce.ablations import VARIANTS, run_ablations

    console = Console() if sys.stdout.isatty() else Console(width=140)
    names = [*VARIANTS] if variants == "all" else [name.strip() for name in variants.split(",")]

    def keep(study: Study) -> None:
        if study.runs:
            report.save(study, out)
            console.print(f"{len(study.runs)} runs finished, {len(study.missing)} to go", highlight=False)

    study = run_ablations(out, seeds=seeds, variants=names, minutes=minutes, on_change=keep)
    if study.runs:
        console.print(report.table(study))
        for line in report.findings(study):
            console.print(f"- {line}", highlight=False, soft_wrap=True)
        console.print(report.LIMITS, highlight=False)
        saved = ", ".join(str(path) for path in report.save(study, out))
        console.print(f"saved: {saved}", highlight=False, soft_wrap=True)
    if study.missing:
        typer.echo(f"xfm-fast: {len(study.missing)} runs are missing; the same command goes on there", err=True)
        raise typer.Exit(INTERRUPTED)


def register(parent: typer.Typer) -> None:
    """Adds the commands to the one command line."""
    app = typer.Typer(help="Reproduce the paper's experiments in miniature.", no_args_is_help=True)
    app.command()(ablations)
    # A lone command would otherwise become the group itself.
    app.callback()(lambda: None)
    parent.add_typer(app, name="reproduce")
