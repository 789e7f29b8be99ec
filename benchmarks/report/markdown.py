"""Results as Markdown tables, for a README or an issue."""

from __future__ import annotations

from ..record import Document
from .table import Table, cells, tables


def markdown(document: Document) -> str:
    """The main tables of a document; ends with a line break."""
    return "\n".join(_drawn(table) for table in tables(document) if not table.detail)


def _drawn(table: Table) -> str:
    places = [place for place, column in enumerate(table.columns) if not column.detail]
    lines = [[table.columns[place].head for place in places], *cells(table, places)]
    drawn = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    rule = "".join("---:|" if table.columns[place].number else "---|" for place in places)
    return "\n".join([drawn[0], f"|{rule}", *drawn[1:]]) + "\n"
