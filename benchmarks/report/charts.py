"""Charts as data, which `templates/charts.html` draws as inline SVG: sorted bars, and points over two axes.

Places are percentages of the drawing's width and height, so that a chart fills a phone's column and a wide one alike
and words keep their size. Colours have one meaning: xfm-fast is dark, the reference and all others are grey; shapes
tell contenders apart, and dashes the types of numbers.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..record import OURS, Document, Result, groups
from .table import marks, number, pace, quantile, seconds, si, speed, times, work

# The longest bar leaves room for the factor at its end.
LONGEST_BAR = 76.0
_LONGEST_NAME = 28


@dataclass(frozen=True)
class Bar:
    """One bar: its words, its length, the factor at its end, the number behind it, and its interval of 95%."""

    label: str
    value: float
    factor: str
    text: str
    ours: bool
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bars:
    """A sorted bar chart.

    Attributes:
        about: what lengths and factors are, in a few words.
        kind: `bars`, by which the templates choose how to draw.
    """

    title: str
    about: str
    bars: Sequence[Bar]
    kind: str = "bars"

    def width(self, value: float) -> float:
        """The length of a bar in percent of the drawing."""
        return LONGEST_BAR * value / max(max(bar.value, bar.high or 0) for bar in self.bars)


@dataclass(frozen=True)
class Axis:
    """Values to percentages along one side of a chart, evenly or by their logarithm."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        low, high = (math.log(v) if self.log else v for v in (self.low, self.high))
        at = math.log(max(value, 1e-300)) if self.log else value
        return 100 * (at - low) / (high - low)


def linear_axis(top: float) -> Axis:
    """From zero to a round number above `top`."""
    step = _step(top or 1.0)
    count = math.ceil(top / step - 1e-9) or 1
    return Axis(0, count * step, False, tuple(place * step for place in range(count + 1)))


def log_axis(values: Iterable[float], *, most_ticks: int = 5) -> Axis:
    """Around the values; ticks at 1, 2 and 5 times powers of ten, fewer in wide ranges, even steps in narrow ones."""
    found = [value for value in values if value > 0]
    low, high = min(found) / 1.12, max(found) * 1.12
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = tuple(f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high)
        if len(ticks) <= most_ticks:
            break
    if len(ticks) < 3:
        step = _step((high - low) * 1.5)
        inside = range(math.ceil(low / step), math.floor(high / step) + 1)
        ticks = tuple(place * step for place in inside) or (low, high)
    return Axis(low, high, True, ticks[:: math.ceil(len(ticks) / most_ticks)])


def _step(top: float) -> float:
    rough = top / 5
    power = 10 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


@dataclass(frozen=True)
class Series:
    """Points of one contender.

    Attributes:
        tone: class of the style sheet: `ours`, `reference`, `other`, or `bound`.
        shape: of its marks, 0 to 3; `line`: the points of its curve, if not those of its marks.
        hollow: places of marks that are drawn empty.
    """

    name: str
    tone: str
    shape: int
    dashed: bool
    points: Sequence[tuple[float, float]]
    line: Sequence[tuple[float, float]] = ()
    hollow: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plot:
    """Points and curves over two axes; `notes` are words at a place: (x, y, text)."""

    title: str
    x: Axis
    y: Axis
    x_label: str
    y_label: str
    x_unit: str = ""
    y_unit: str = ""
    series: list[Series] = field(default_factory=list)
    notes: list[tuple[float, float, str]] = field(default_factory=list)
    kind: str = "plot"

    def path(self, line: Iterable[tuple[float, float]]) -> str:
        """The points of a polyline, in a square of 100."""
        return " ".join(f"{self.x(x):.2f},{100 - self.y(y):.2f}" for x, y in line)

    @staticmethod
    def tick(value: float, unit: str) -> str:
        """The words at a tick; of a long unit the prefix alone, since the axis names it."""
        return si(value, unit if unit == "s" else "") if unit else number(value)


class Palette:
    """The look of each backend, the same in every plot of a document."""

    def __init__(self, document: Document) -> None:
        self._reference = document.reference
        names = dict.fromkeys(row.backend for row in document.rows)
        self._shapes = {name: place for place, name in enumerate(sorted(names, key=lambda n: not n.startswith(OURS)))}

    def series(self, row: Result, points: Sequence[tuple[float, float]], name: str = "", **more: Any) -> Series:
        """The points of a row in its look."""
        kind = "ours" if _ours(row) else "other"
        tone = "reference" if row.backend == self._reference else kind
        shape, dashed = self._shapes.get(row.backend, 0) % 4, row.dtype != "fp32"
        return Series(name or row.title, tone, shape, dashed, points, **more)


def _ours(row: Result) -> bool:
    """True for xfm-fast in all of its forms."""
    return row.ours or row.backend.startswith(OURS)


def speeds(document: Document) -> list[Bars]:
    """For each case and dtype all backends, the fastest first; factors are over the reference in the same dtype."""
    found = []
    for group in groups(document.measured):
        for dtype in dict.fromkeys(row.dtype for row in group if row.ours):
            rows = [row for row in group if row.dtype == dtype]
            # A dtype in which the reference was not run is compared with its fp32, by name.
            base = document.beside(rows[0], document.reference, dtype) or document.reference_row(rows[0])
            # Eager attention over texts of several lengths goes by a longer name.
            base = base or next((row for row in rows if row.backend.startswith(document.reference)), None)
            if base is not None and base not in rows:
                rows.append(base)
            if len(rows) < 2:
                continue
            ordered = sorted(rows, key=pace, reverse=True)
            about = "" if base is None else f"{dtype}; factors over {base.title}"
            found.append(Bars(work(rows[0]).rpartition(", ")[0], about, [_bar(row, base) for row in ordered]))
    return found


def _bar(row: Result, base: Result | None) -> Bar:
    value, unit, _ = speed(row)
    here = pace(row)
    compared = (c for c in row.against if base is not None and (c.backend, c.dtype) == (base.backend, base.dtype))
    found = next(compared, None)
    factor = found.ratio if found else here / pace(base) if base is not None and pace(base) else None
    # Intervals are in the bar's own unit; that of a factor comes from samples of the same rounds.
    known = (found.low, found.high, found.ratio) if found else (None, None, 0.0)
    if None in known and row.rate:
        known = (row.number("rate_low"), row.number("rate_high"), row.rate)
    low, high = (None if end is None else here * end / known[2] for end in known[:2])
    agrees = " ✓" if row.parity and row.parity.passed and row is not base else ""
    text = f"{number(value)} {unit}{agrees} {marks(row)}".rstrip()
    end = "" if factor is None else "1×" if row is base else times(factor)
    name = row.label.split(",")[0] if row is base else textwrap.shorten(row.label, _LONGEST_NAME, placeholder=" …")
    name = f"{name}, {row.dtype}{' (a bound)' if row.extra.get('bounds') else ''}"
    return Bar(name, here, end, text, _ours(row), low, high)


def memory(document: Document) -> list[Bars]:
    """Peak memory of training steps, where each procedure ran alone."""
    found = []
    for group in groups(row for row in document.measured if row.number("gradient_bytes") is not None):
        peaks = sorted(((row.number("peak_bytes") or 0, row) for row in group), key=lambda one: -one[0])
        most = peaks[0][0] or 1
        bars = [Bar(row.title, peak, f"{peak / most:.0%}", f"{peak / 1e9:.2f} GB", row.ours) for peak, row in peaks]
        found.append(Bars(group[0].name, "shorter is better; shares of the largest", bars))
    return found


def latencies(document: Document) -> list[Plot]:
    """Share of single requests that were answered within a time."""
    plots, palette = [], Palette(document)
    for group in groups(row for row in document.measured if row.mode == "single-stream"):
        samples = [value for row in group for value in row.seconds]
        plot = Plot(group[0].name, log_axis(samples), linear_axis(1.0), "time of a request", "share of requests", "s")
        for row in group:
            ordered, steps = sorted(row.seconds), []
            for place, value in enumerate(ordered):
                steps += [(value, place / len(ordered)), (value, (place + 1) / len(ordered))]
            marked = [(quantile(row, share) or 0.0, share) for share in (0.5, 0.9, 0.99)]
            plot.series.append(palette.series(row, marked, line=steps))
        plots.append(plot)
    return plots


def arrivals(document: Document) -> list[Plot]:
    """The 99th percentile at each rate of Poisson arrivals that was tried, and the bound."""
    plots, palette = [], Palette(document)
    for group in groups(row for row in document.measured if row.parts("trials")):
        bound = group[0].number("bound_s") or 0.0
        trials = {row.key: sorted((float(rate), p99) for rate, p99 in row.parts("trials").items()) for row in group}
        rates, times_s = zip(*(point for points in trials.values() for point in points), strict=True)
        plot = Plot(
            group[0].name, log_axis(rates), log_axis([bound, *times_s]), "requests a second (Poisson)",
            "p99 of latency", y_unit="s",
        )  # fmt: skip
        ends = [(plot.x.low, bound), (plot.x.high, bound)]
        plot.series.append(Series("bound", "bound", 0, True, (), ends))
        plot.notes.append((plot.x.low, bound, f"bound {seconds(bound)}"))
        for row in group:
            broken = frozenset(place for place, (_, p99) in enumerate(trials[row.key]) if p99 > bound)
            name = f"{row.title}: {number(row.number('max_qps') or 0)}/s {marks(row)}".rstrip()
            plot.series.append(palette.series(row, trials[row.key], name, hollow=broken))
        plots.append(plot)
    return plots


def roofs(document: Document) -> list[Plot]:
    """Rates of arithmetic over arithmetic intensity, under the roof that this machine was measured to have."""
    plots, palette = [], Palette(document)
    for dtype, probe in document.probes.items():
        gemm, copy = probe.gemm_flops_per_s, probe.copy_bytes_per_s
        spots = [
            (row, ((row.number("needed_flops") or 0.0) / moved, rate))
            for row in document.measured
            if row.dtype == dtype and (rate := row.per_second("needed_flops")) and (moved := row.number("bytes"))
            if row.number("roof")
        ]
        if not spots or not copy:
            continue
        ridge = gemm / copy
        across = [x for _, (x, _) in spots] + [ridge / 4, ridge * 4]
        x = log_axis([min(across) / 1.5, max(across) * 1.5])
        y = log_axis([gemm * 1.3, copy * x.low, *(at for _, (_, at) in spots)])
        title = f"{dtype}: GEMMs {si(gemm, 'FLOP/s')} ({probe.library}), copies {si(copy, 'B/s')}"
        plot = Plot(title, x, y, "FLOP for each byte that must move", "FLOP/s", y_unit="FLOP/s")
        roof = [(at, min(gemm, copy * at)) for at in (x.low, ridge, x.high)]
        plot.series.append(Series("roof", "bound", 0, False, (), roof))
        rows = {row.backend: row for row, _ in spots}
        for backend, row in rows.items():
            own = [place for other, place in spots if other.backend == backend]
            plot.series.append(palette.series(row, own, line=own[:1]))
        plots.append(plot)
    return plots
