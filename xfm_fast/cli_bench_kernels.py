"""`xfm-fast bench kernels`: the operations against their alternatives, on a GPU or, smaller, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from xfm_fast.errors import InputError

_DTYPES = ("fp32", "fp16", "bf16")


def bench_kernels(
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16. [bf16 on a GPU, fp32 on a CPU]")] = "",
    small: Annotated[
        bool, typer.Option("--small", help="Shapes of milliseconds, to see that everything runs.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="File that receives the rows.")] = None,
) -> None:
    """Time every operation against eager PyTorch, SDPA, FlexAttention, flash-attn and Liger, as far as installed.

    A contender that is less accurate than the same precision allows is not timed.
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from xfm_fast.benchmarks import machine
    from xfm_fast.benchmarks.kernel_cases import cases
    from xfm_fast.benchmarks.kernels import data_sheet, measure
    from xfm_fast.checkpoint import write_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = dtype or ("bf16" if device.type == "cuda" else "fp32")
    if name not in _DTYPES:
        raise InputError(f"--dtype {name!r} is unknown; choose one of {', '.join(_DTYPES)}")
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    console = Console()
    made = cases(device, types[name], small=small)
    rows: list[dict[str, Any]] = []
    for case in track(made, description="measuring", console=console, transient=True):
        rows += [row.as_dict() for row in measure(case, device, data_sheet(device))]
    _print(rows, name, console)
    if json_file is not None:
        document = {"schema": "xfm-fast kernels 1", "machine": machine.describe(), "dtype": name, "rows": rows}
        text = json.dumps(document | {"commit": machine.commit()}, indent=1, default=str) + "\n"
        write_bytes({json_file: text.encode()})
        console.print(f"saved: {json_file}")


def _print(rows: list[dict[str, Any]], dtype: str, console: Any) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=f"kernels, {dtype}", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("operation", "direction", "contender"):
        table.add_column(head, overflow="fold")
    for head in ("ms", "ours is", "TFLOP/s", "GB/s", "of the floor", "error"):
        table.add_column(head, justify="right")
    ours: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row["case"], row["direction"])
        if row["contender"] == "xfm-fast" and row["seconds"]:
            ours[key] = row["seconds"]
        if not row["seconds"]:
            table.add_row(*key, row["contender"], row["note"], style="dim")
            continue
        ratio = f"{row['seconds'] / ours[key]:.2f}x" if key in ours else ""
        share = "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}"
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        rates = (f"{row['flops_per_s'] / 1e12:.2f}", f"{row['bytes_per_s'] / 1e9:.0f}")
        table.add_row(*key, row["contender"], f"{row['seconds'] * 1e3:.3f}", ratio, *rates, share, error)
    console.print(table)
