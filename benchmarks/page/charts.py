"""Charts as inline SVG: axes, marks and whiskers. Sizes are a phone's column; a wide page puts two side by side.

Colours come from classes of the style sheet (`s0` to `s7`, one a series), so that one drawing serves light and dark.
Text grows on narrow screens (see style.css); margins leave room for it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 20, 34, 62
COLOURS = 8
# Letters that fit above a bar where text is largest.
_LONGEST_LABEL = 54


@dataclass(frozen=True)
class Axis:
    """Values to places along one side of a chart, evenly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        low, high = (math.log(v) if self.log else v for v in (self.low, self.high))
        at = math.log(max(value, 1e-300)) if self.log else value
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def linear_axis(top: float, start: float, end: float) -> Axis:
    """From zero to a round number above `top`."""
    step = _step(top or 1.0)
    count = math.ceil(top / step - 1e-9) or 1
    return Axis(0, count * step, start, end, False, tuple(i * step for i in range(count + 1)))


def log_axis(values: Iterable[float], start: float, end: float, *, most_ticks: int = 6) -> Axis:
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
        ticks = tuple(place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1)) or (
            low,
            high,
        )
    thinned = ticks[:: math.ceil(len(ticks) / most_ticks)]
    return Axis(low, high, start, end, True, thinned)


def _step(top: float) -> float:
    rough = top / 5
    power = 10 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def si(value: float, unit: str = "") -> str:
    """A number with its SI prefix: `si(3e9, "FLOP/s")` is `3 GFLOP/s`."""
    if value == 0:
        return f"0 {unit}".strip()
    for size, prefix in (
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1, ""),
        (1e-3, "m"),
        (1e-6, "µ"),
    ):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {prefix}{unit}".strip()
    return f"{value:.2g} {unit}".strip()


def number(value: float) -> str:
    """Three digits, with separators instead of an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass
class Chart:
    """A chart of two axes, drawn in the order of the calls.

    Attributes:
        title: what it shows, for screen readers and tooltips.
        x, y: axes between the margins; made with `span_x` and `span_y`.
    """

    title: str
    x: Axis
    y: Axis
    x_label: str
    y_label: str
    x_unit: str = ""
    y_unit: str = ""
    parts: list[str] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], kind: str, *, dashed: bool = False, tip: str = "") -> None:
        """Straight lines through points of data."""
        if len(points) < 2:
            return
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        dash = " dashed" if dashed else ""
        self.parts.append(f'<polyline class="curve {kind}{dash}" points="{path}">{_tip(tip)}</polyline>')

    def mark(self, x: float, y: float, kind: str, *, shape: int = 0, tip: str = "", hollow: bool = False) -> None:
        """A point; its shape tells what colour alone must not."""
        self.parts.append(marker(self.x(x), self.y(y), kind, shape, tip=tip, hollow=hollow))

    def note(self, x: float, y: float, text: str, *, anchor: str = "start", dy: float = -6) -> None:
        """Words at a place of the data."""
        self.parts.append(
            f'<text x="{self.x(x):.1f}" y="{self.y(y) + dy:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def svg(self) -> str:
        """The drawing, with its title for those who do not see it."""
        frame = []
        for tick in self.x.ticks:
            at = self.x(tick)
            frame.append(f'<line class=grid x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
            text = escape(si(tick, self.x_unit) if self.x_unit else number(tick))
            frame.append(
                f'<text class=soft x="{at:.1f}" y="{HEIGHT - _BOTTOM + 21}" text-anchor="middle">{text}</text>'
            )
        for tick in self.y.ticks:
            at = self.y(tick)
            frame.append(f'<line class=grid x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            # A long unit stands in the label of the axis; numbers keep their prefix.
            text = escape(si(tick, "s" if self.y_unit == "s" else "") if self.y_unit else number(tick))
            frame.append(f'<text class=soft x="{_LEFT - 8}" y="{at + 5:.1f}" text-anchor="end">{text}</text>')
        frame.append(f'<text class=soft x="0" y="16">{escape(self.y_label)}</text>')
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        frame.append(
            f'<text class=soft x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.x_label)}</text>'
        )
        return drawing(self.title, HEIGHT, [*frame, *self.parts])


def span_x() -> tuple[float, float]:
    """Start and end of a chart's horizontal axis."""
    return _LEFT, WIDTH - _RIGHT


def span_y() -> tuple[float, float]:
    """Start (bottom) and end of a chart's vertical axis."""
    return HEIGHT - _BOTTOM, _TOP


def drawing(title: str, height: float, parts: Iterable[str]) -> str:
    """An SVG of the common width."""
    label = escape(title, quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )


def marker(x: float, y: float, kind: str, shape: int, *, tip: str = "", hollow: bool = False) -> str:
    """Circle, square, triangle or diamond."""
    name = f'class="mark {kind}{" hollow" if hollow else ""}"'
    r = 5.5
    if shape % 4 == 0:
        return f'<circle {name} cx="{x:.1f}" cy="{y:.1f}" r="{r}">{_tip(tip)}</circle>'
    corners = {
        1: ((-5, -5), (5, -5), (5, 5), (-5, 5)),
        2: ((0, -7), (6.5, 5), (-6.5, 5)),
        3: ((0, -7), (7, 0), (0, 7), (-7, 0)),
    }[shape % 4]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon {name} points="{points}">{_tip(tip)}</polygon>'


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


@dataclass(frozen=True)
class Bar:
    """One bar: its words, its value as text and number, an interval, a tooltip, and a series."""

    label: str
    value: float
    text: str
    kind: str
    low: float | None = None
    high: float | None = None
    tip: str = ""


def bars(title: str, rows: Sequence[Bar], *, reference: float | None = None) -> str:
    """Bars under their labels; `reference` draws a line through all of them, such as at 1×."""
    top = max([bar.high or bar.value for bar in rows] + ([reference] if reference else []))
    axis = linear_axis(top, 0, WIDTH - 96)
    parts = []
    each, offset = 56, 22
    for place, bar in enumerate(rows):
        y = each * place
        width = max(axis(bar.value), 1.5)
        parts.append(f'<text x="0" y="{y + 15}">{escape(_shortened(bar.label))}</text>')
        parts.append(_block(0, y + offset, width, bar.kind, bar.tip))
        end = width
        if bar.low is not None and bar.high is not None:
            parts.append(_whisker(axis(bar.low), axis(bar.high), y + offset + 10))
            end = max(end, axis(bar.high))
        parts.append(f'<text class=value x="{end + 8:.1f}" y="{y + offset + 15}">{escape(bar.text)}</text>')
    height = each * len(rows) - 8
    if reference is not None:
        at = axis(reference)
        parts.append(f'<line class=reference x1="{at:.1f}" x2="{at:.1f}" y1="20" y2="{height}"/>')
    return drawing(title, height, parts)


def _shortened(label: str) -> str:
    return textwrap.shorten(label, _LONGEST_LABEL, placeholder=" …")


def _block(x: float, y: float, width: float, kind: str, tip: str) -> str:
    place = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="20" rx="4"'
    return f'<rect class="bar {kind}" {place}>{_tip(tip)}</rect>'


def _whisker(low: float, high: float, y: float) -> str:
    caps = "".join(f'<line class=whisker x1="{x:.1f}" x2="{x:.1f}" y1="{y - 5}" y2="{y + 5}"/>' for x in (low, high))
    return f'<line class=whisker x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>{caps}'


def stacked(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], kinds: dict[str, str]) -> str:
    """Bars of equal length, divided by shares; a share that has room carries its percentage."""
    parts, each = [], 56
    for place, (label, shares) in enumerate(rows):
        y, x = each * place, 0.0
        parts.append(f'<text x="0" y="{y + 15}">{escape(_shortened(label))}</text>')
        whole = sum(share for _, share in shares) or 1.0
        for name, share in shares:
            width = WIDTH * share / whole
            parts.append(_block(x, y + 22, max(width - 2, 0.5), kinds[name], f"{name}: {share / whole:.1%}"))
            if width > 58:
                middle = f'x="{x + width / 2:.1f}" y="{y + 37}" text-anchor="middle"'
                parts.append(f"<text class=inside {middle}>{share / whole:.0%}</text>")
            x += width
    return drawing(title, each * len(rows) - 4, parts)


def legend(entries: Sequence[tuple[str, str, int]], *, lines: bool = False) -> str:
    """Names of series: (name, class, shape). HTML, so that it wraps where the column is narrow."""
    items = []
    for name, kind, shape in entries:
        line = f'<line class="curve {kind}" x1="0" x2="22" y1="8" y2="8"/>' if lines else ""
        key = f'<svg class=key viewBox="0 0 22 16" aria-hidden="true">{line}{marker(11, 8, kind, shape)}</svg>'
        items.append(f"<li>{key}{escape(name)}</li>")
    return f"<ul class=legend>{''.join(items)}</ul>"
