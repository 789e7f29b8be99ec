"""A report as one self-contained page: findings first, then charts, every row, and how it was measured.

Without scripts, readable in light and dark, on a phone and on a desk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jinja2

from ..record import Document
from . import charts, findings
from .table import tables

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__ or "", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Section(NamedTuple):
    """A heading, a sentence that says how to read it, and charts."""

    title: str
    about: str
    charts: Sequence[charts.Bars | charts.Plot]


def html(document: Document, *, image: str | None = None) -> str:
    """The page of a document; `image` is the address of its picture, for those who are shown a link."""
    bounded = any(row.extra.get("bounds") for row in document.rows)
    bounds = " A bound computes less than the work: it is no alternative." if bounded else ""
    sections = [
        Section(
            "Speed",
            "Longer is faster. Contenders took turns in one process; the stroke is a bootstrap interval of 95%. "
            f"✓ results equal the reference's, † something else ran on the machine meanwhile.{bounds}",
            charts.speeds(document),
        ),
        Section("Peak memory", "Each procedure alone, in a process of its own on a CPU.", charts.memory(document)),
        Section(
            "Latency",
            "Share of single requests that were answered within a time; the marks are p50, p90 and p99. "
            "Dashed: other types than fp32.",
            charts.latencies(document),
        ),
        Section(
            "Requests a second under a bound",
            "p99 of latency as requests arrive faster. Filled marks held the bound, hollow ones broke it.",
            charts.arrivals(document),
        ),
        Section(
            "Roofline",
            "Arithmetic that the result needs, a second, under this machine's own rates of matrix products and of "
            "copies. On the slope memory is the bound, under the flat part arithmetic.",
            charts.roofs(document),
        ),
    ]
    return _TEMPLATES.get_template("page.html").render(
        title=document.title,
        description=findings.description(document),
        image=image,
        links=findings.links(),
        place=findings.place(document),
        remarks=list(findings.remarks(document)),
        headlines=findings.headlines(document),
        sections=[section for section in sections if section.charts],
        tables=tables(document),
        replaced={row.name: row.extra["replaced"] for row in document.rows if row.extra.get("replaced")},
        facts=[*findings.facts(document), *findings.circumstances(document)],
    )
