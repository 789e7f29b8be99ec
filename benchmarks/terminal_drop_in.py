"""What `accelerate` is worth, as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_drop_in(content: dict[str, Any], console: Console) -> None:
    """Prints the rows of `bench drop-in`."""
    facts = content["machine"]
    title = f"accelerate(model) on {facts['cpu']}, {facts['threads']} threads, PyTorch {facts['torch']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model and work", overflow="fold")
    table.add_column("dtype")
    for head in ("untouched", "accelerated", "faster than fp32", "than the same type", "error"):
        table.add_column(head, justify="right")
    for row in content["rows"]:
        if row["status"] != "measured":
            table.add_row(row["name"], row["dtype"] or "", f"{row['status']}: {row['reason']}", style="dim")
            continue
        own = row["original_same_dtype"] or row["original"]
        low, high = row["ratio_interval"]
        same = "" if row["ratio_same_dtype"] is None else f"{row['ratio_same_dtype']:.1f}×"
        table.add_row(
            row["name"] + (", other work on the machine" if row["probe"]["contended"] else ""),
            row["dtype"],
            f"{own['median_s'] * 1e3:,.0f} ms",
            f"{row['fast']['median_s'] * 1e3:,.0f} ms",
            f"{row['ratio']:.1f}× ({low:.1f} to {high:.1f})",
            same,
            f"{row['parity']['error']:.0e}",
        )
    console.print(table)
