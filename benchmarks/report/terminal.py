"""A report in a terminal: the tables as far as they fit, whole words only, and what a reader must know."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box, table
from rich.console import Console
from rich.markup import escape

from ..record import Document
from . import findings
from .compare import Changes
from .table import Column, Table, cells, tables

_STYLES = {
    **dict.fromkeys(("bad", "failed", "parity failed", "slower", "lost"), "red"),
    **dict.fromkeys(("warning", "partial", "contended"), "yellow"),
    "faster": "green",
}
_GAP = 2
_NARROWEST_WORK, _COMFORT = 24, 18
_LISTED = 12


def terminal(document: Document, console: Console) -> None:
    """Print a document: where it was measured, what to know first, every table, and what was measured."""
    console.print(f"[bold]{escape(findings.place(document))}[/]", soft_wrap=True)
    for kind, text in findings.remarks(document):
        _say(text, _STYLES.get(kind, ""), console)
    for one in tables(document):
        _print(one, console)
    for name, words in findings.facts(document):
        _say(f"{name}: {words}", "dim", console)


def print_changes(changes: Changes, console: Console) -> None:
    """Print two documents set side by side: every row, what else differs, and the rule."""
    _print(changes.table(), console)
    for change in changes.changes:
        if change.reason:
            _say(f"{change.name}, {change.dtype}: {change.reason}", "red", console)
    for flag in changes.flags:
        _say(flag, "yellow", console)
    _say(changes.rule, "dim", console)
    _say(changes.summary, "bold", console)


def _say(text: str, style: str, console: Console) -> None:
    console.print(escape(text), style=style, soft_wrap=True)


def _print(shown: Table, console: Console) -> None:
    places = _fitting(shown, console.width)
    lines = cells(shown, places)
    drawn = table.Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for place, width in zip(places, _widths(shown, places, console.width), strict=True):
        column = shown.columns[place]
        drawn.add_column(column.head, justify="right" if column.number else "left", width=width, vertical="top")
    above = ""
    for place, line in enumerate(lines[:_LISTED] if shown.title.startswith("Skipped") else lines):
        # The work is said once, over all its contenders.
        first = "" if line[0] == above else line[0]
        above = line[0]
        row = []
        for cell in (first, *line[1:]):
            style = _STYLES.get(cell, "bold" if re.fullmatch(r"[\d.]+×.*", cell) else "")
            row.append(f"[{style}]{escape(cell)}[/]" if style else escape(cell))
        drawn.add_row(*row, style="dim" if place in shown.weak else "")
    console.print()
    if shown.title:
        console.print(f"[bold]{escape(shown.title)}[/]")
    if shown.about:
        _say(shown.about, "dim", console)
    console.print(drawn)
    if len(lines) > drawn.row_count:
        _say(f"... and {len(lines) - drawn.row_count} more (all are in the JSON file)", "dim", console)


def _least(column: Column, texts: Sequence[str], *, comfort: int = 0) -> int:
    """The width in which no number and no word is broken; words get up to `comfort`, and the work always some."""
    if column.number:
        return max(map(len, [*column.head.split(), *texts]))
    least = max(len(word) for text in (column.head, *texts) for word in text.split())
    return max(least, min(max(map(len, texts)), _NARROWEST_WORK if column.head.startswith("work") else comfort))


def _fitting(shown: Table, width: int) -> list[int]:
    """Places of the columns that fit side by side: details give way to words, and then the last numbers."""
    columns = [(column, [line[place] for line in shown.lines]) for place, column in enumerate(shown.columns)]
    for comfort, droppable in ((_COMFORT, "detail"), (0, "number")):
        needed = [_least(column, texts, comfort=comfort) for column, texts in columns]
        places = [place for place, column in enumerate(shown.columns) if comfort or not column.detail]
        while sum(needed[place] + _GAP for place in places) - _GAP > width:
            found = [place for place in places if getattr(shown.columns[place], droppable)]
            if not found:
                break
            places.remove(found[-1])
        else:
            return places
    return places


def _widths(shown: Table, places: Sequence[int], width: int) -> list[int]:
    """Widths of the columns that are shown; words share the room that numbers leave."""
    columns = [(shown.columns[place], [line[place] for line in shown.lines]) for place in places]
    found = [_least(column, texts) for column, texts in columns]
    room = width - sum(found) - _GAP * (len(found) - 1)
    # Lines of words first; heads of numbers get what is left.
    for words in (True, False):
        texts = [one if words and not column.number else [column.head] for column, one in columns]
        wanted = [max(map(len, some)) if words != columns[place][0].number else 0 for place, some in enumerate(texts)]
        while room > 0 and any(have < want for have, want in zip(found, wanted, strict=True)):
            short = max(range(len(found)), key=lambda place: wanted[place] / found[place])
            found[short], room = found[short] + 1, room - 1
    return found
