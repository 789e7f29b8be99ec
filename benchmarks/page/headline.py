"""The large numbers at the head of a page: of several results the one that is surely good, not a lucky one."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """A speed-up that could stand at the head of the page.

    Attributes:
        low, high: its interval of 95%; None where there were too few samples for one.
        contended: whether something else ran on the machine meanwhile.
        row: what it is of.
    """

    ratio: float
    low: float | None
    high: float | None
    contended: bool
    row: dict[str, Any]


def best_of(candidates: Iterable[Candidate]) -> Candidate:
    """The best by the lower end of its interval; one that was contended or has none only if there is no other.

    Raises:
        ValueError: there are no candidates.
    """
    return max(candidates, key=lambda c: (not c.contended, c.low is not None, c.ratio if c.low is None else c.low))


def tile(found: Candidate, what: str, about: str) -> str:
    """A speed-up with its interval, what it is of, and a line about it."""
    interval = "" if found.low is None else f"<br><span>95% interval {found.low:.1f} to {found.high:.1f}</span>"
    none = "" if found.low is not None else "<br><span>without an interval</span>"
    return (
        f"<div class=tile><b>{found.ratio:.1f}×{' †' if found.contended else ''}</b>{escape(what)}"
        f"<br><span>{escape(about)}</span>{interval}{none}</div>"
    )
