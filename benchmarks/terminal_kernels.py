"""Operations against their alternatives, as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from xfm_fast.benchmarks.page.document import circumstances_line
from xfm_fast.benchmarks.stored import kernel_ratio


def print_kernels(content: dict[str, Any], console: Console) -> None:
    """Prints the rows of `bench kernels`."""
    table = Table(title=f"kernels on {circumstances_line(content)}", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("operation", "direction", "contender", "dtype"):
        table.add_column(head, overflow="fold")
    for head in ("ms", "ours is", "TFLOP/s", "GB/s", "of the floor", "error"):
        table.add_column(head, justify="right")
    for row in content["rows"]:
        words = (row["case"], row["direction"], row["contender"], row["dtype"])
        if not row["seconds"]:
            table.add_row(*words, row["note"], style="dim")
            continue
        ratio = kernel_ratio(row, content["rows"])
        table.add_row(
            *words,
            f"{row['seconds'] * 1e3:.3f}",
            "" if ratio is None else f"{ratio:.2f}x",
            f"{row['flops_per_s'] / 1e12:.2f}",
            f"{row['bytes_per_s'] / 1e9:.0f}",
            "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}",
            "" if row["error"] is None else f"{row['error']:.0e}",
        )
    console.print(table)
    if content["interrupted"]:
        console.print("interrupted; the operations measured before are complete")
