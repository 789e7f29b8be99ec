"""The output of commands: tables, progress, and messages beside the results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def stdout(width: int = 140) -> Console:
    """Standard output, for the results. A pipe or a log file has no width, and tables need some."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=width)


def table(title: str, *heads: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table of the house's looks, its title plain text, these of its columns aligned to the right."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        made.add_column(head, overflow="fold", justify="right" if head in right else "left")
    return made


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where it is a terminal; advanced by calling with what is done and of how much."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task(description)
        yield lambda done, of: bars.update(bar, completed=done, total=of)


def note(message: str) -> None:
    """A message on standard error. Reports of checkpoints list what does not fit; everything else is one line.

    A name with a line feed or a colour in it is shown with its escapes, and makes no line or colour of its own.
    """
    if "\n-> " not in message:
        message = "".join(each if each.isprintable() else repr(each)[1:-1] for each in message.strip())
    print(f"xfm-fast: {message}", file=sys.stderr)


def say(message: str) -> None:
    """Progress in words, for a person at a terminal."""
    if sys.stderr.isatty():
        note(message)
