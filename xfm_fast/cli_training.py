"""`xfm-fast pretrain` and `xfm-fast gradflow`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

INTERRUPTED = 75
"""Exit code of a run that a signal ended between two steps (EX_TEMPFAIL: the same command goes on from there)."""


def pretrain(
    recipe: Annotated[str, typer.Argument(help="Recipe of the package by name, or path of a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as steps=100 streams.pairs.batch_size=32.")
    ] = None,
) -> None:
    """Train a model as a recipe says; a run that was stopped goes on from its newest whole checkpoint.

    On several GPUs: torchrun --nproc-per-node=8 -m xfm_fast.cli pretrain RECIPE. SIGTERM or Ctrl-C ends the run after
    the step, with a checkpoint and exit code 75.
    """
    from xfm_fast.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from xfm_fast.kernels.cpu.workspace import keep_freed_memory
    from xfm_fast.training.loop import train

    keep_freed_memory()
    result = train(loaded)
    if result.interrupted:
        typer.echo(f"xfm-fast: stopped after step {result.step}; the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED)


def gradflow(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|CHECKPOINT",
            help="Recipe, a run, a folder that save_pretrained wrote, or an official .th/.pth file.",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for a recipe, such as model.preset=tiny.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 where the method is violated.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Report which loss trains which encoder: gradient norms, and zeros where the method of X-FM stops gradients."""
    from rich.console import Console

    from xfm_fast.training import gradient_flow

    report = gradient_flow.gradient_flow_of(what, overrides or ())
    violations = gradient_flow.check(report)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        console = Console() if sys.stdout.isatty() else Console(width=120)
        console.print(report.table())
        for violation in violations:
            console.print(violation, highlight=False, markup=False, soft_wrap=True)
    if check and violations:
        if as_json:
            typer.echo("; ".join(violations), err=True)
        raise typer.Exit(1)


def register(parent: typer.Typer) -> None:
    """Adds the commands to the one command line."""
    parent.command()(pretrain)
    parent.command()(gradflow)
