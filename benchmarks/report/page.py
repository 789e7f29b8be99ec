"""A document as a terminal report, and as one self-contained page without scripts.

Every speed-up against the reference names both dtypes; the ratio in one dtype is given with it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jinja2
from rich.console import Console
from rich.markup import escape

from ..record import OURS, Comparison, Document, Result, groups
from .tables import (
    STYLES,
    marked,
    number,
    plain,
    print_line,
    print_table,
    si,
    span,
    speed,
    tables,
    times,
    work,
)

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__ or "", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
# The longest bar, in percent of the drawing, leaves room for the factor at its end.
_LONGEST_BAR = 76.0
_LONGEST_LABEL = 28


class Headline(NamedTuple):
    """A speed-up at the head of a report: the work, what was compared, the interval, and the ratio in one dtype."""

    factor: str
    what: str
    about: str
    interval: str
    like_for_like: str


def headlines(document: Document) -> list[Headline]:
    """The best speed-up of each kind of work by the lower end of its interval; contended rows come last."""
    found: dict[tuple[str, ...], list[tuple[Result, Comparison]]] = {}
    for row in document.measured:
        compared = document.headline(row)
        # The operations are many and small: their charts say more than a number each.
        if compared is not None and document.benchmark not in ("kernels", "device"):
            key = row.place if document.benchmark == "suite" else row.place[:2]
            found.setdefault(key, []).append((row, compared))
    lines = []
    for candidates in found.values():
        row, against = max(
            candidates,
            key=lambda c: (not c[0].contended, c[1].low is not None, c[1].low or c[1].ratio),
        )
        other, same = (
            document.at_same_case(row, against.backend, against.dtype),
            document.like_for_like(row),
        )
        value, unit, _ = speed(row)
        label = other.title if other else f"{against.backend}, {against.dtype}"
        interval = span(against)
        lines.append(
            Headline(
                marked(times(against.ratio), row),
                row.name.split(" (")[0] + ("" if row.mode == "offline" else f", {row.mode}"),
                f"{number(value)} {unit} in {row.dtype}, against {label}",
                f"95% interval {interval}" if interval else "without an interval",
                ""
                if same is None or against.like_for_like
                else f"{times(same.ratio)} like for like, both {row.dtype}",
            )
        )
    return lines


def remarks(document: Document) -> Iterator[tuple[str, str]]:
    """Sentences to read before the results, each with its kind: `bad`, `warning` or empty."""
    if document.interrupted:
        yield (
            "bad",
            "The run was interrupted: rows marked * hold the samples until then, later ones are missing.",
        )
    for row in document.rows:
        if row.status in ("failed", "parity failed") and not row.extra.get("bounds"):
            yield (
                "bad",
                f"{row.title}, {work(row)}: {row.status}: {row.reason or 'no reason is known'}",
            )
    if document.options.get("quick") or document.options.get("small"):
        yield "", "Short form: less work and fewer samples than the full measurement."
    notes = [note for note in dict.fromkeys(row.text("note") for row in document.rows) if note]
    if any(row.contended for row in document.measured):
        why = "; ".join(notes) or "its probes moved by more than 10% meanwhile"
        yield "warning", f"† something else ran on this machine: {why}."
    else:
        yield from (("warning", note) for note in notes)
    recalls = any(row.numbers("recall") for row in document.rows)
    if document.benchmark == "drop-in" or (document.model and not document.model.trained):
        quality = "; retrieval quality means nothing" if recalls else ""
        yield "", f"The weights are random: speeds and differences are real{quality}."
    elif document.model and not document.model.meaningful_recall and recalls:
        yield "", "Retrieval quality means nothing: no --tokenizer was given."


def place(document: Document) -> str:
    """Version, machine, threads, PyTorch and date in one line."""
    machine = document.machine
    gpus = (
        ", ".join(gpu["name"] for gpu in machine.get("gpus", []))
        if document.device == "cuda"
        else ""
    )
    threads = machine.get("threads", 1)
    return (
        f"{OURS} {machine.get('xfm_fast')} on {gpus or machine.get('cpu', 'an unknown processor')}, {threads} "
        f"{'thread' if threads == 1 else 'threads'}, PyTorch {machine.get('torch', '?')}, "
        f"{document.date.replace('T', ' ').replace('+00:00', ' UTC')}"
    )


def facts(document: Document) -> list[tuple[str, str]]:
    """What was measured and how well it agrees, as names and words."""
    lines = []
    judged = [(row, row.parity) for row in document.rows if row.ours and row.parity]
    known = [(row, one) for row, one in judged if one.error is not None and one.band]
    if known and all(one.passed for _, one in judged):
        row, worst = max(known, key=lambda pair: (pair[1].error or 0) / (pair[1].band or 1))
        closest = f"{row.name} {row.dtype}, {worst.error:.1e} of {worst.band:.1e}"
        lines.append(
            ("parity", f"equal in all {len(judged)} comparisons (closest to its limit: {closest})")
        )
    if counts := [len(row.seconds) for row in document.measured if row.seconds]:
        lines.append(
            ("samples", f"medians of {min(counts)} to {max(counts)} samples of interleaved rounds")
        )
    if model := document.model:
        lines.append(
            ("model", f"{model.preset}, {model.parameters / 1e6:.0f}M parameters, {model.origin}")
        )
    if recall := next(filter(None, (row.numbers("recall") for row in document.rows)), None):
        ways = {"text": "txt", "image": "img"}
        depths = {
            way: "/".join(f"{recall.get(f'{key}_r{k}', 0):.0f}" for k in (1, 5, 10))
            for way, key in ways.items()
        }
        lines.append(
            ("retrieval", ", ".join(f"{way} R@1/5/10 {text}" for way, text in depths.items()))
        )
    if data := document.data:
        unread = f"; {data.left_unread} more photographs were not read" if data.left_unread else ""
        lines.append(
            ("data", f"{data.photos} photographs, {data.captions} captions; {data.origin}{unread}")
        )
        lines.append(("tokens", f"{data.tokenizer}, {data.vocabulary} entries"))
    if cold := document.cold_start:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in cold.items())
        lines.append(("cold start", f"{sum(cold.values()):.1f} s: {parts}"))
    for dtype, probe in document.probes.items():
        copies = f", copies {si(probe.copy_bytes_per_s, 'B/s')}" if probe.copy_bytes_per_s else ""
        lines.append(
            (
                f"probes, {dtype}",
                f"GEMMs {si(probe.gemm_flops_per_s, 'FLOP/s')} ({probe.library}){copies}",
            )
        )
    lines.append(
        (
            "absent",
            "; ".join(f"{one.label} ({one.reason})" for one in document.baselines if one.reason),
        )
    )
    return [(name, words) for name, words in lines if words]


def circumstances(document: Document) -> list[tuple[str, str]]:
    """The machine, versions and command with which another reader can measure the same."""
    lines = [
        (key.replace("_", " "), plain(value))
        for key, value in document.machine.items()
        if key != "cpu_flags"
    ]
    present = [
        f"{one.label} {one.version or ''}".rstrip() for one in document.baselines if not one.reason
    ]
    lines += [
        ("backends", ", ".join(present)),
        ("paths", plain(document.paths)),
        ("command", " ".join(document.command)),
        ("duration", f"{document.duration_s:.0f} s" if document.duration_s else ""),
    ]
    return [(name, words) for name, words in lines if words]


def terminal(document: Document, console: Console) -> None:
    """Print a document: the machine, remarks, every table, and facts about the measurement."""
    console.print(f"[bold]{escape(place(document))}[/]", soft_wrap=True)
    for kind, text in remarks(document):
        print_line(text, STYLES.get(kind, ""), console)
    for table in tables(document):
        print_table(table, console)
    for name, words in facts(document):
        print_line(f"{name}: {words}", "dim", console)


class Bar(NamedTuple):
    """One bar: its label, its length, the factor at its end, the text of its value, and its interval of 95%."""

    label: str
    value: float
    factor: str
    text: str
    ours: bool
    low: float | None = None
    high: float | None = None


class Bars(NamedTuple):
    """A sorted bar chart; `about` explains lengths and factors."""

    title: str
    about: str
    bars: Sequence[Bar]

    def width(self, value: float) -> float:
        """The length of a bar in percent of the drawing."""
        return _LONGEST_BAR * value / (max(max(bar.value, bar.high or 0) for bar in self.bars) or 1)


def _pace(row: Result) -> float:
    """Speed as a number of which more is better."""
    value, _, more = speed(row)
    return value if more else 1 / value if value else 0.0


def speeds(document: Document) -> list[Bars]:
    """For each case and dtype all backends, the fastest first; factors are over the reference in the same dtype."""
    charts = []
    for group in groups(document.measured):
        for dtype in dict.fromkeys(row.dtype for row in group if row.ours):
            rows = [row for row in group if row.dtype == dtype]
            # A dtype in which the reference was not run is compared with its fp32, by name.
            base = document.at_same_case(
                rows[0], document.reference, dtype
            ) or document.reference_row(rows[0])
            # Eager attention over texts of several lengths has a longer name.
            base = base or next(
                (row for row in rows if row.backend.startswith(document.reference)), None
            )
            if base is not None and base not in rows:
                rows.append(base)
            if len(rows) > 1:
                about = "" if base is None else f"{dtype}; factors over {base.title}"
                bars = [_bar(row, base) for row in sorted(rows, key=_pace, reverse=True)]
                charts.append(Bars(work(rows[0], unit=False), about, bars))
    return charts


def _bar(row: Result, base: Result | None) -> Bar:
    value, unit, _ = speed(row)
    pace, factor, low, high = _pace(row), "", None, None
    if unit == f"{row.unit}/s":
        low, high = row.number("rate_low"), row.number("rate_high")
    if base is not None:
        found = next(
            (c for c in row.against if (c.backend, c.dtype) == (base.backend, base.dtype)), None
        )
        ratio = found.ratio if found else pace / _pace(base) if _pace(base) else 0.0
        factor = "1×" if row is base else times(ratio) if ratio else ""
        # The interval of a factor is of samples of the same rounds.
        if found is not None and found.low is not None and found.high is not None:
            low, high = pace * found.low / ratio, pace * found.high / ratio
    agrees = " ✓" if row.parity and row.parity.passed and row is not base else ""
    label = (
        row.label.split(",")[0]
        if row is base
        else textwrap.shorten(row.label, _LONGEST_LABEL, placeholder=" …")
    )
    label = f"{label}, {row.dtype}{' (a bound)' if row.extra.get('bounds') else ''}"
    ours = row.ours or row.backend.startswith(OURS)
    return Bar(label, pace, factor, marked(f"{number(value)} {unit}{agrees}", row), ours, low, high)


def html(document: Document) -> str:
    """The page of a document."""
    bounded = any(row.extra.get("bounds") for row in document.rows)
    speed_about = (
        "Longer is faster. Backends ran in interleaved rounds of one process; the stroke is a bootstrap interval of "
        "95%. ✓ results equal the reference's, † something else ran on the machine meanwhile."
    )
    speed_about += " A bound computes less than the work: it is no alternative." if bounded else ""
    found = headlines(document)
    return _TEMPLATES.get_template("page.html").render(
        title=document.title,
        description=". ".join(
            [*(f"{one.factor} at {one.what} ({one.about})" for one in found[:2]), place(document)]
        ),
        place=place(document),
        remarks=list(remarks(document)),
        headlines=found,
        speed_about=speed_about,
        charts=speeds(document),
        tables=tables(document),
        replaced={
            row.name: row.extra["replaced"] for row in document.rows if row.extra.get("replaced")
        },
        facts=[*facts(document), *circumstances(document)],
    )
