"""Console output of commands: tables, progress bars, and messages."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_REDRAW_S = 0.1


def first_process() -> bool:
    """Return whether this is a single process, or rank 0 of torchrun."""
    return os.environ.get("RANK", "0") == "0"


def stdout(width: int = 140) -> Console:
    """Return a console on standard output; pipes and log files get `width`."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=width)


def table(title: str, *heads: str, right: tuple[str, ...] = ()) -> Table:
    """Create an empty table in the common style.

    Args:
        title: Plain text.
        heads: Column headings.
        right: Headings of right-aligned columns.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    grid = Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for head in heads:
        grid.add_column(head, overflow="fold", justify="right" if head in right else "left")
    return grid


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal's standard error; yields a function of (done, total)."""
    with named_progress() as show:
        yield lambda done, of: show(description, done, of)


@contextmanager
def named_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress of changing work; yields a function of (description, done, total)."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    silent = not sys.stderr.isatty() or not first_process()
    with Progress(
        console=Console(stderr=True), transient=True, auto_refresh=False, disable=silent
    ) as bars:
        bar, drawn = bars.add_task(""), 0.0

        def advance(description: str, done: int, of: int) -> None:
            nonlocal drawn
            due = done >= of or time.monotonic() - drawn > _REDRAW_S
            bars.update(bar, description=escape(description), completed=done, total=of, refresh=due)
            drawn = time.monotonic() if due else drawn

        yield advance


def note(message: str) -> None:
    """Print a message on standard error. Checkpoint reports have several lines, everything else one.

    Line feeds and escape codes in names are escaped.
    """
    if "\n-> " not in message:
        characters = (c if c.isprintable() else repr(c)[1:-1] for c in message.strip())
        message = "".join(characters)
    print(f"xfm-fast: {message}", file=sys.stderr)


def say(message: str) -> None:
    """Print progress on a terminal only."""
    if sys.stderr.isatty():
        note(message)
