"""`xfm-fast bench drop-in`: models of transformers and timm, as they come and accelerated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def bench_drop_in(
    quick: Annotated[bool, typer.Option("--quick", help="Two layers and two samples, to see that all runs.")] = False,
    only: Annotated[
        str, typer.Option(help="roberta, bert-rerank, blip-rerank, memory-rerank, beit, or several with commas. [all]")
    ] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or both with a comma. [what this CPU offers]")] = "",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default those that PyTorch takes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File that receives the rows.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights and inputs.")] = 0,
) -> None:
    """Time what `accelerate(model)` gains on models with random weights, against the same models untouched.

    About three minutes on two cores. A model whose outputs are not equal is not timed.
    """
    from rich.console import Console

    from xfm_fast.benchmarks import drop_in, results, terminal
    from xfm_fast.benchmarks.terminal_drop_in import print_drop_in

    options = drop_in.DropInOptions(
        only=tuple(part.strip() for part in only.split(",")) if only else None,
        quick=quick,
        dtypes=tuple(part.strip() for part in dtype.split(",")) if dtype else None,
        threads=threads,
        seed=seed,
    )
    with terminal.progress(Console(stderr=True)) as progress:
        document = drop_in.run(options, progress, command=["xfm-fast", *sys.argv[1:]])
    # A pipe or a log file has no width; the table needs some.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    print_drop_in(document.content, console)
    if json_file is not None:
        results.save_as(document.content, json_file)
        console.print(f"saved: {json_file}", soft_wrap=True)
    if document.interrupted:
        raise typer.Exit(130)
    failed = any(row["status"] == "failed" for row in document.rows)
    raise typer.Exit(1 if failed or not document.ok else 0)
