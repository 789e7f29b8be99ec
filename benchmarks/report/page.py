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
    """Return the best speed-up of each kind of work by the lower end of its interval; contended rows come last."""
    # The operations are many and small: their charts say more than a number each.
    if document.benchmark in ("kernels", "device"):
        return []
    best: dict[tuple[str, ...], tuple[Result, Comparison]] = {}
    for row in document.measured:
        comparison = document.headline(row)
        if comparison is None:
            continue
        key = row.place if document.benchmark == "suite" else row.place[:2]
        if key not in best or _certainty(row, comparison) > _certainty(*best[key]):
            best[key] = row, comparison
    return [_headline(document, row, comparison) for row, comparison in best.values()]


def _certainty(row: Result, comparison: Comparison) -> tuple[bool, bool, float]:
    """Return the order of headlines."""
    return not row.contended, comparison.low is not None, comparison.low or comparison.ratio


def _headline(document: Document, row: Result, comparison: Comparison) -> Headline:
    baseline = document.at_same_case(row, comparison.backend, comparison.dtype)
    title = baseline.title if baseline else f"{comparison.backend}, {comparison.dtype}"
    same = document.like_for_like(row)
    value, unit, _ = speed(row)
    interval, like_for_like = span(comparison), ""
    if same is not None and not comparison.like_for_like:
        like_for_like = f"{times(same.ratio)} like for like, both {row.dtype}"
    return Headline(
        marked(times(comparison.ratio), row),
        row.name.split(" (")[0] + ("" if row.mode == "offline" else f", {row.mode}"),
        f"{number(value)} {unit} in {row.dtype}, against {title}",
        f"95% interval {interval}" if interval else "without an interval",
        like_for_like,
    )


def remarks(document: Document) -> Iterator[tuple[str, str]]:
    """Yield sentences to read before the results, each with its level: `bad`, `warning` or empty."""
    if document.interrupted:
        yield (
            "bad",
            "The run was interrupted: rows marked * hold the samples until then, later ones are missing.",
        )
    for row in document.rows:
        if row.status in ("failed", "parity failed") and not row.extra.get("bounds"):
            reason = row.reason or "no reason is known"
            yield "bad", f"{row.title}, {work(row)}: {row.status}: {reason}"
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
    """Format version, machine, threads, PyTorch and date in one line."""
    machine = document.machine
    device = machine.get("cpu", "an unknown processor")
    if document.device == "cuda":
        device = ", ".join(gpu["name"] for gpu in machine.get("gpus", [])) or device
    threads = machine.get("threads", 1)
    date = document.date.replace("T", " ").replace("+00:00", " UTC")
    return (
        f"{OURS} {machine.get('xfm_fast')} on {device}, {threads} "
        f"{'thread' if threads == 1 else 'threads'}, PyTorch {machine.get('torch', '?')}, {date}"
    )


def facts(document: Document) -> list[tuple[str, str]]:
    """Return names and words of what was measured and how well it agrees."""
    lines = [("parity", _parity(document))]
    if counts := [len(row.seconds) for row in document.measured if row.seconds]:
        samples = f"medians of {min(counts)} to {max(counts)} samples of interleaved rounds"
        lines.append(("samples", samples))
    if model := document.model:
        size = f"{model.parameters / 1e6:.0f}M parameters"
        lines.append(("model", f"{model.preset}, {size}, {model.origin}"))
    if recall := next(filter(None, (row.numbers("recall") for row in document.rows)), None):
        retrieval = []
        for direction, key in (("text", "txt"), ("image", "img")):
            values = "/".join(f"{recall.get(f'{key}_r{k}', 0):.0f}" for k in (1, 5, 10))
            retrieval.append(f"{direction} R@1/5/10 {values}")
        lines.append(("retrieval", ", ".join(retrieval)))
    if data := document.data:
        unread = f"; {data.left_unread} more photographs were not read" if data.left_unread else ""
        photos = f"{data.photos} photographs, {data.captions} captions; {data.origin}{unread}"
        lines.append(("data", photos))
        lines.append(("tokens", f"{data.tokenizer}, {data.vocabulary} entries"))
    if cold := document.cold_start:
        steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in cold.items())
        lines.append(("cold start", f"{sum(cold.values()):.1f} s: {steps}"))
    for dtype, probe in document.probes.items():
        rates = f"GEMMs {si(probe.gemm_flops_per_s, 'FLOP/s')} ({probe.library})"
        if probe.copy_bytes_per_s:
            rates += f", copies {si(probe.copy_bytes_per_s, 'B/s')}"
        lines.append((f"probes, {dtype}", rates))
    absent = [f"{base.label} ({base.reason})" for base in document.baselines if base.reason]
    lines.append(("absent", "; ".join(absent)))
    return [(name, words) for name, words in lines if words]


def _parity(document: Document) -> str:
    """Describe the comparison of ours that came closest to its limit; empty if one failed."""
    judged = [(row, row.parity) for row in document.rows if row.ours and row.parity]
    if not all(parity.passed for _, parity in judged):
        return ""
    closest, share = "", -1.0
    for row, parity in judged:
        if parity.error is not None and parity.band and parity.error / parity.band > share:
            share = parity.error / parity.band
            closest = f"{row.name} {row.dtype}, {parity.error:.1e} of {parity.band:.1e}"
    if not closest:
        return ""
    return f"equal in all {len(judged)} comparisons (closest to its limit: {closest})"


def circumstances(document: Document) -> list[tuple[str, str]]:
    """Return the machine, versions and command with which another reader can measure the same."""
    lines = [
        (key.replace("_", " "), plain(value))
        for key, value in document.machine.items()
        if key != "cpu_flags"
    ]
    present = [base for base in document.baselines if not base.reason]
    backends = [f"{base.label} {base.version or ''}".rstrip() for base in present]
    lines += [
        ("backends", ", ".join(backends)),
        ("paths", plain(document.paths)),
        ("command", " ".join(document.command)),
        ("duration", f"{document.duration_s:.0f} s" if document.duration_s else ""),
    ]
    return [(name, words) for name, words in lines if words]


def terminal(document: Document, console: Console) -> None:
    """Print a document: the machine, remarks, every table, and facts about the measurement."""
    console.print(f"[bold]{escape(place(document))}[/]", soft_wrap=True)
    for level, text in remarks(document):
        print_line(text, STYLES.get(level, ""), console)
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
        """Return the length of a bar in percent of the drawing."""
        longest = max(max(bar.value, bar.high or 0) for bar in self.bars)
        return _LONGEST_BAR * value / (longest or 1)


def _pace(row: Result) -> float:
    """Return the speed as a number of which more is better."""
    value, _, more = speed(row)
    if more or not value:
        return value
    return 1 / value


def speeds(document: Document) -> list[Bars]:
    """Return charts of all backends by case and dtype, with factors over the reference in the same dtype."""
    charts = []
    for group in groups(document.measured):
        for dtype in dict.fromkeys(row.dtype for row in group if row.ours):
            rows = [row for row in group if row.dtype == dtype]
            base = _chart_base(document, rows)
            if base is not None and base not in rows:
                rows.append(base)
            if len(rows) > 1:
                about = "" if base is None else f"{dtype}; factors over {base.title}"
                bars = [_bar(row, base) for row in sorted(rows, key=_pace, reverse=True)]
                charts.append(Bars(work(rows[0], unit=False), about, bars))
    return charts


def _chart_base(document: Document, rows: list[Result]) -> Result | None:
    """Return the reference of a chart, in fp32 if it was not run in the dtype of the rows."""
    base = document.at_same_case(rows[0], document.reference, rows[0].dtype)
    base = base or document.reference_row(rows[0])
    if base is not None:
        return base
    # Eager attention over texts of several lengths has a longer name.
    return next((row for row in rows if row.backend.startswith(document.reference)), None)


def _bar(row: Result, base: Result | None) -> Bar:
    value, unit, _ = speed(row)
    pace, factor, low, high = _pace(row), "", None, None
    if unit == f"{row.unit}/s":
        low, high = row.number("rate_low"), row.number("rate_high")
    if row is base:
        factor = "1×"
    elif base is not None:
        comparison = next(
            (c for c in row.against if (c.backend, c.dtype) == (base.backend, base.dtype)), None
        )
        ratio = pace / _pace(base) if _pace(base) else 0.0
        if comparison is not None:
            ratio = comparison.ratio
            # The interval of a factor is of samples of the same rounds.
            if comparison.low is not None and comparison.high is not None:
                low, high = pace * comparison.low / ratio, pace * comparison.high / ratio
        factor = times(ratio) if ratio else ""
    agrees = " ✓" if row.parity and row.parity.passed and row is not base else ""
    if row is base:
        label = row.label.split(",")[0]
    else:
        label = textwrap.shorten(row.label, _LONGEST_LABEL, placeholder=" …")
    label += f", {row.dtype}"
    if row.extra.get("bounds"):
        label += " (a bound)"
    ours = row.ours or row.backend.startswith(OURS)
    return Bar(label, pace, factor, marked(f"{number(value)} {unit}{agrees}", row), ours, low, high)


def html(document: Document) -> str:
    """Render the page of a document."""
    speed_about = (
        "Longer is faster. Backends ran in interleaved rounds of one process; the stroke is a bootstrap interval of "
        "95%. ✓ results equal the reference's, † something else ran on the machine meanwhile."
    )
    if any(row.extra.get("bounds") for row in document.rows):
        speed_about += " A bound computes less than the work: it is no alternative."
    gains = headlines(document)
    summary = [f"{gain.factor} at {gain.what} ({gain.about})" for gain in gains[:2]]
    return _TEMPLATES.get_template("page.html").render(
        title=document.title,
        description=". ".join([*summary, place(document)]),
        place=place(document),
        remarks=list(remarks(document)),
        headlines=gains,
        speed_about=speed_about,
        charts=speeds(document),
        tables=tables(document),
        replaced={
            row.name: row.extra["replaced"] for row in document.rows if row.extra.get("replaced")
        },
        facts=[*facts(document), *circumstances(document)],
    )
