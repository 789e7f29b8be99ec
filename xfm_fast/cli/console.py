"""The output of commands: tables, progress, and messages beside the results."""

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
    """True alone, and in the first of the processes that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


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
    """A bar on standard error, where it is a terminal; advanced by calling with what is done and of how much.

    It does not redraw itself: a run that evaluates has a bar of its own, and they take turns on the one line.
    """
    from rich.console import Console
    from rich.progress import Progress

    silent = not sys.stderr.isatty() or not first_process()
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False, disable=silent) as bars:
        bar, drawn = bars.add_task(description), 0.0

        def told(done: int, of: int) -> None:
            nonlocal drawn
            due = done >= of or time.monotonic() - drawn > _REDRAW_S
            bars.update(bar, completed=done, total=of, refresh=due)
            drawn = time.monotonic() if due else drawn

        yield told


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
