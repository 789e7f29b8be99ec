"""A document as a terminal report, as one self-contained page without scripts, and as a picture to share.

Every speed-up against the reference names both dtypes; the ratio in one dtype is given with it.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jinja2
from rich.console import Console
from rich.markup import escape

from xfm_fast.errors import UnavailableError
from xfm_fast.io import write_bytes

from ..record import OURS, Comparison, Document, Result, groups
from .tables import STYLES, marked, number, plain, print_line, print_table, si, span, speed, tables, times, work

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__ or "", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
# The longest bar, in percent of the drawing, leaves room for the factor at its end.
_LONGEST_BAR = 76.0
_LONGEST_LABEL = 28
_PANELS = 4
INK, SOFT, DARK, GREY, GROUND = "#1a1e22", "#5c6570", "#0b5d52", "#8a929b", "#fbfbfa"


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
        row, against = max(candidates, key=lambda c: (not c[0].contended, c[1].low is not None, c[1].low or c[1].ratio))
        other, same = document.at_same_case(row, against.backend, against.dtype), document.like_for_like(row)
        value, unit, _ = speed(row)
        label = other.title if other else f"{against.backend}, {against.dtype}"
        interval = span(against)
        lines.append(
            Headline(
                marked(times(against.ratio), row),
                row.name.split(" (")[0] + ("" if row.mode == "offline" else f", {row.mode}"),
                f"{number(value)} {unit} in {row.dtype}, against {label}",
                f"95% interval {interval}" if interval else "without an interval",
                "" if same is None or against.like_for_like else f"{times(same.ratio)} like for like, both {row.dtype}",
            )
        )
    return lines


def remarks(document: Document) -> Iterator[tuple[str, str]]:
    """Sentences to read before the results, each with its kind: `bad`, `warning` or empty."""
    if document.interrupted:
        yield "bad", "The run was interrupted: rows marked * hold the samples until then, later ones are missing."
    for row in document.rows:
        if row.status in ("failed", "parity failed") and not row.extra.get("bounds"):
            yield "bad", f"{row.title}, {work(row)}: {row.status}: {row.reason or 'no reason is known'}"
    if document.options.get("quick") or document.options.get("small"):
        yield "", "Short form: less work and fewer samples than the full measurement."
    notes = [note for note in dict.fromkeys(row.text("note") for row in document.rows) if note]
    if any(row.contended for row in document.measured):
        why = "; ".join(notes) or "its probes moved by more than 10% meanwhile"
        yield "warning", f"† something else ran on this machine: {why}."
    else:
        yield from (("warning", note) for note in notes)
    recalls = any(row.parts("recall") for row in document.rows)
    if document.benchmark == "drop-in" or (document.model and not document.model.trained):
        quality = "; retrieval quality means nothing" if recalls else ""
        yield "", f"The weights are random: speeds and differences are real{quality}."
    elif document.model and not document.model.meaningful_recall and recalls:
        yield "", "Retrieval quality means nothing: no --tokenizer was given."


def place(document: Document) -> str:
    """Version, machine, threads, PyTorch and date in one line."""
    machine = document.machine
    gpus = ", ".join(gpu["name"] for gpu in machine.get("gpus", [])) if document.device == "cuda" else ""
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
        lines.append(("parity", f"equal in all {len(judged)} comparisons (closest to its limit: {closest})"))
    if counts := [len(row.seconds) for row in document.measured if row.seconds]:
        lines.append(("samples", f"medians of {min(counts)} to {max(counts)} samples of interleaved rounds"))
    if model := document.model:
        lines.append(("model", f"{model.preset}, {model.parameters / 1e6:.0f}M parameters, {model.origin}"))
    if recall := next(filter(None, (row.parts("recall") for row in document.rows)), None):
        ways = {"text": "txt", "image": "img"}
        depths = {way: "/".join(f"{recall.get(f'{key}_r{k}', 0):.0f}" for k in (1, 5, 10)) for way, key in ways.items()}
        lines.append(("retrieval", ", ".join(f"{way} R@1/5/10 {text}" for way, text in depths.items())))
    if data := document.data:
        unread = f"; {data.left_unread} more photographs were not read" if data.left_unread else ""
        lines.append(("data", f"{data.photos} photographs, {data.captions} captions; {data.origin}{unread}"))
        lines.append(("tokens", f"{data.tokenizer}, {data.vocabulary} entries"))
    if cold := document.cold_start:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in cold.items())
        lines.append(("cold start", f"{sum(cold.values()):.1f} s: {parts}"))
    for dtype, probe in document.probes.items():
        copies = f", copies {si(probe.copy_bytes_per_s, 'B/s')}" if probe.copy_bytes_per_s else ""
        lines.append((f"probes, {dtype}", f"GEMMs {si(probe.gemm_flops_per_s, 'FLOP/s')} ({probe.library}){copies}"))
    lines.append(("no energy", document.energy_note or ""))
    lines.append(("absent", "; ".join(f"{one.label} ({one.reason})" for one in document.baselines if one.reason)))
    return [(name, words) for name, words in lines if words]


def circumstances(document: Document) -> list[tuple[str, str]]:
    """The machine, versions and command with which another reader can measure the same."""
    lines = [(key.replace("_", " "), plain(value)) for key, value in document.machine.items() if key != "cpu_flags"]
    present = [f"{one.label} {one.version or ''}".rstrip() for one in document.baselines if not one.reason]
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
            base = document.at_same_case(rows[0], document.reference, dtype) or document.reference_row(rows[0])
            # Eager attention over texts of several lengths has a longer name.
            base = base or next((row for row in rows if row.backend.startswith(document.reference)), None)
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
        found = next((c for c in row.against if (c.backend, c.dtype) == (base.backend, base.dtype)), None)
        ratio = found.ratio if found else pace / _pace(base) if _pace(base) else 0.0
        factor = "1×" if row is base else times(ratio) if ratio else ""
        # The interval of a factor is of samples of the same rounds.
        if found is not None and found.low is not None and found.high is not None:
            low, high = pace * found.low / ratio, pace * found.high / ratio
    agrees = " ✓" if row.parity and row.parity.passed and row is not base else ""
    label = row.label.split(",")[0] if row is base else textwrap.shorten(row.label, _LONGEST_LABEL, placeholder=" …")
    label = f"{label}, {row.dtype}{' (a bound)' if row.extra.get('bounds') else ''}"
    ours = row.ours or row.backend.startswith(OURS)
    return Bar(label, pace, factor, marked(f"{number(value)} {unit}{agrees}", row), ours, low, high)


def memory(document: Document) -> list[Bars]:
    """Peak memory of training steps, where each procedure ran in a process of its own."""
    charts = []
    for group in groups(row for row in document.measured if row.number("gradient_bytes") is not None):
        peaks = sorted(((row.number("peak_bytes") or 0, row) for row in group), key=lambda one: -one[0])
        bars = [
            Bar(row.title, peak, f"{peak / (peaks[0][0] or 1):.0%}", f"{peak / 1e9:.2f} GB", row.ours)
            for peak, row in peaks
        ]
        charts.append(Bars(group[0].name, "shorter is better; shares of the largest", bars))
    return charts


def html(document: Document, *, image: str | None = None) -> str:
    """The page of a document; `image` is the address of its picture, for previews of a link."""
    bounded = any(row.extra.get("bounds") for row in document.rows)
    speed_about = (
        "Longer is faster. Backends ran in interleaved rounds of one process; the stroke is a bootstrap interval of "
        "95%. ✓ results equal the reference's, † something else ran on the machine meanwhile."
    )
    speed_about += " A bound computes less than the work: it is no alternative." if bounded else ""
    sections = [
        ("Speed", speed_about, speeds(document)),
        ("Peak memory", "Each procedure in a process of its own on a CPU.", memory(document)),
    ]
    found = headlines(document)
    return _TEMPLATES.get_template("page.html").render(
        title=document.title,
        description=". ".join([*(f"{one.factor} at {one.what} ({one.about})" for one in found[:2]), place(document)]),
        image=image,
        place=place(document),
        remarks=list(remarks(document)),
        headlines=found,
        sections=[section for section in sections if section[2]],
        tables=tables(document),
        replaced={row.name: row.extra["replaced"] for row in document.rows if row.extra.get("replaced")},
        facts=[*facts(document), *circumstances(document)],
    )


def new_figure(title: str) -> Figure:
    """A picture of 1200 by 630 pixels with its title; raises `UnavailableError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnavailableError("a PNG needs matplotlib; install it with pip install 'xfm-fast[bench]'") from None
    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor=GROUND)
    figure.text(0.053, 0.9, OURS, fontsize=15, weight="bold", color=DARK)
    figure.text(0.053, 0.82, title, fontsize=24, weight="bold", color=INK)
    return figure


def save_figure(figure: Figure, path: Path, source: str = "") -> None:
    """Write a picture with its source in the metadata; raises `StorageError`."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Source": source})
    write_bytes({path: content.getvalue()})


def png(document: Document, path: Path) -> None:
    """Draw the bars of up to four kinds of work, each in the dtype with the largest gain like for like.

    Raises:
        UnavailableError: matplotlib is not installed, or the document has nothing to draw.
        StorageError: the file cannot be written.
    """
    best: dict[str, tuple[float, Bars]] = {}
    rows = [row for row in document.rows if row.dtype != "int8"]
    for chart in speeds(document.model_copy(update={"rows": rows})):
        gain = max((bar.value for bar in chart.bars if bar.ours), default=0.0) / (
            min(bar.value for bar in chart.bars) or 1
        )
        if chart.title not in best or gain > best[chart.title][0]:
            best[chart.title] = gain, chart
    charts = [chart for _, chart in best.values()][:_PANELS]
    if not charts:
        raise UnavailableError("these results have no two backends at the same work, so there is nothing to draw")
    figure = new_figure(document.title)
    figure.text(0.053, 0.055, place(document), color=SOFT, fontsize=11.5)
    columns = min(len(charts), 2)
    rows_of_panels = -(-len(charts) // columns)
    grid = figure.subplots(rows_of_panels, columns, squeeze=False)
    figure.subplots_adjust(left=0.053, right=0.947, top=0.7, bottom=0.13, wspace=0.1, hspace=0.35)
    most = 6 if rows_of_panels == 1 else 3
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, chart in zip(grid.flat, charts, strict=False):
        title = textwrap.shorten(chart.title.split(" (")[0], 90 // columns, placeholder=" …")
        axes.set_title(title, loc="left", fontsize=14, weight="bold", color=INK)
        # xfm-fast's bars, the reference's, and the fastest of the others.
        kept = sorted(chart.bars, key=lambda bar: (not bar.ours, bar.factor != "1×", -bar.value))[:most]
        for line, bar in enumerate(bar for bar in chart.bars if bar in kept):
            color = DARK if bar.ours else INK
            axes.barh(line, bar.value, height=0.4, color=DARK if bar.ours else GREY)
            axes.text(0, line - 0.23, bar.label, fontsize=11, va="bottom", color=color)
            axes.text(
                1, line - 0.23, bar.text.replace(" ✓", ""), fontsize=10, va="bottom", ha="right", color=SOFT,
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
            axes.text(bar.value, line, f" {bar.factor}", va="center", fontsize=14, weight="bold", color=color)
        axes.set_xlim(0, max(bar.value for bar in kept) * 100 / _LONGEST_BAR)
        axes.set_ylim(max(len(kept), min(most, 3)) - 0.7, -0.7)
    save_figure(figure, path)
