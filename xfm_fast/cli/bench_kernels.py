"""`xfm-fast bench kernels`: the operations against their alternatives, on a GPU or, smaller, on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def bench_kernels(
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16. [bf16 on a GPU, fp32 on a CPU]")] = "",
    small: Annotated[
        bool, typer.Option("--small", help="Shapes of milliseconds, to see that everything runs.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="File that receives the rows.")] = None,
) -> None:
    """Time every operation against eager PyTorch, SDPA, FlexAttention, flash-attn and Liger, as far as installed.

    A contender that is less accurate than the same precision allows is not timed. Ctrl-C keeps what was measured.
    """
    from rich.console import Console

    from xfm_fast.benchmarks import kernels, results, terminal
    from xfm_fast.benchmarks.terminal_kernels import print_kernels

    options = kernels.KernelOptions(dtype=dtype or None, small=small)
    with terminal.progress(Console(stderr=True)) as progress:
        document = kernels.run(options, progress, command=["xfm-fast", *sys.argv[1:]])
    # A pipe or a log file has no width; the table needs some.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    print_kernels(document.content, console)
    if json_file is not None:
        results.save_as(document.content, json_file)
        console.print(f"saved: {json_file}", soft_wrap=True)
    if document.interrupted:
        raise typer.Exit(130)
