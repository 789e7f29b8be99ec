"""`xfm-fast bench`: this machine measured, fast against official."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xfm_fast.cli import (
    bench_drop_in,
    bench_kernels,
    bench_reports,
    bench_scenario,
    bench_training,
    console,
)
from xfm_fast.cli.bridge import bridge
from xfm_fast.cli.options import PRESETS, choice
from xfm_fast.errors import XFMError

if TYPE_CHECKING:
    from rich.console import Console

bench_app = typer.Typer(invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False)
bench_app.command("kernels")(bench_kernels.bench_kernels)
bench_app.command("drop-in")(bench_drop_in.bench_drop_in)
bench_app.command("train-step")(bench_training.bench_train_step)
bench_reports.register(bench_app)
bench_scenario.register(bench_app)
app = bridge(bench_app, "bench")


@bench_app.callback()
def bench(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Less work and fewer samples: under a minute.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Official .th/.pth, .safetensors, or a folder that save_pretrained wrote.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images with captions, instead of the photographs.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="RoBERTa's vocab.json and merges.txt (their folder), or a tokenizer.json.")
    ] = None,
    official: Annotated[
        Path | None, typer.Option(help="Clone of the official repository, measured as one more baseline.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16, or both with a comma; auto leaves out what the CPU lacks.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default those that PyTorch takes.")] = None,
    out: Annotated[Path, typer.Option(help="Folder that receives the results.")] = Path("bench-results"),
    preset: Annotated[str, typer.Option(help="Size of the model: base or tiny.")] = "base",
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
) -> None:
    """Measure this machine: fast against official, in one process, on real photographs.

    Without a sub-command the whole suite runs. Results go to a JSON file and a self-contained HTML page.
    """
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    # A pipe or a log file has no width; the table needs some.
    shown = Console() if sys.stdout.isatty() else Console(width=140)
    raise typer.Exit(
        _bench(
            shown,
            out,
            preset=choice("preset", preset, PRESETS),
            quick=quick,
            checkpoint=checkpoint,
            data=data,
            tokenizer=tokenizer,
            official=official,
            dtypes=None if dtype == "auto" else tuple(part.strip() for part in dtype.split(",")),
            threads=threads,
            seed=seed,
        )
    )


def _bench(shown: Console, out: Path, **settings: Any) -> int:
    from rich.console import Console

    from xfm_fast.benchmarks import results, suite, terminal

    with terminal.progress(Console(stderr=True)) as progress:
        document = suite.run(suite.Options(**settings), progress, command=["xfm-fast", *sys.argv[1:]])
    terminal.print_report(document.content, shown)
    try:
        saved = results.save(document.content, out)
    except XFMError as error:
        console.note(str(error))
        return 2
    shown.print(f"saved: {saved.document} and {saved.page}", soft_wrap=True, highlight=False)
    if document.interrupted:
        return 130
    return 0 if document.ok else 1
