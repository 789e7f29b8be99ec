"""`xfm-fast bench train-step`: a step of pretraining against the official procedure, on a CPU or a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from xfm_fast.cli.options import PRESETS, choice


def bench_train_step(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer pairs and samples, no rows with dropout.")] = False,
    preset: Annotated[str, typer.Option(help="Size of the model: base or tiny.")] = "base",
    device: Annotated[str, typer.Option(help="cpu or cuda. [a GPU where there is one]")] = "",
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16 (autocast), or both with a comma. [on a GPU bf16, on a CPU what it offers]")
    ] = "",
    pairs: Annotated[
        int | None, typer.Option(min=2, help="Image-text pairs in the batch. [8 on a CPU, 96 on a GPU]")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default those that PyTorch takes.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder that receives the results. [bench-results/train-step]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights and the masks.")] = 0,
) -> None:
    """Time forward and backward pass of ITC, ITM, IMLM and MIM: ours against the official procedure.

    Both leave the same gradients, which is checked first. The base model takes several minutes on two cores and 9 GB of
    memory. Results go to a JSON file and a self-contained HTML page; those of a GPU, in a checkout, also to
    benchmarks/results, to be committed.
    """
    from rich.console import Console

    from xfm_fast.benchmarks import results, terminal, training_step

    options = training_step.StepOptions(
        preset=choice("preset", preset, PRESETS),
        quick=quick,
        dtypes=tuple(part.strip() for part in dtype.split(",")) if dtype else None,
        threads=threads,
        device=device or None,
        pairs=pairs,
        seed=seed,
    )
    with terminal.progress(Console(stderr=True)) as progress:
        document = training_step.run(options, progress, command=["xfm-fast", *sys.argv[1:]])
    # A pipe or a log file has no width; the table needs some.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    terminal.print_report(document.content, console)
    saved = results.save(document.content, out or Path("bench-results") / "train-step")
    console.print(f"results: {saved.document}, {saved.page}", soft_wrap=True)
    folder = results.reference_folder()
    if folder is not None and document.content["device"] == "cuda" and document.ok and not document.interrupted:
        console.print(f"to be committed: {results.save_reference(document.content, folder)}", soft_wrap=True)
    if document.interrupted:
        raise typer.Exit(130)
    raise typer.Exit(0 if document.ok else 1)
