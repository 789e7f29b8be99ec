"""The study as a picture: one panel a metric, a dot a run, a bar for the mean and its interval. SVG, by hand."""

from __future__ import annotations

from html import escape

from xfm_fast.reproduce.ablations import TITLES, VARIANTS, Study
from xfm_fast.reproduce.evaluation import METRICS
from xfm_fast.reproduce.intervals import mean_interval

_COLOURS = dict(zip(VARIANTS, ("#1f5fa8", "#c4561c", "#3b8a4e", "#7b4aa0"), strict=True))
_PANEL, _HEIGHT, _TOP, _LEFT, _GAP = 150, 240, 40, 44, 16
_STEP = _PANEL / len(VARIANTS)


def plot(study: Study) -> str:
    """A self-contained SVG; metrics run from 0 to 100%."""
    width = _LEFT + len(METRICS) * (_PANEL + _GAP)
    height = _TOP + _HEIGHT + 30 + 18 * len(study.variants)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for percent in range(0, 101, 20):
        parts.append(f'<text x="{_LEFT - 8}" y="{_y(percent) + 4:.1f}" text-anchor="end">{percent}%</text>')
    for number, (metric, title) in enumerate(METRICS.items()):
        parts += _panel(study, metric, title, _LEFT + number * (_PANEL + _GAP))
    for number, variant in enumerate(study.variants):
        y = _TOP + _HEIGHT + 26 + 18 * number
        parts.append(f'<circle cx="{_LEFT + 6}" cy="{y}" r="5" fill="{_COLOURS[variant]}"/>')
        parts.append(f'<text x="{_LEFT + 18}" y="{y + 4}">{escape(TITLES[variant])}</text>')
    note = "dots: runs (one a seed); bars: mean and 95% interval over seeds"
    parts.append(f'<text x="{width - _GAP}" y="{_TOP + _HEIGHT + 30}" text-anchor="end" fill="#666">{note}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(study: Study, metric: str, title: str, left: float) -> list[str]:
    parts = [f'<text x="{left + _PANEL / 2}" y="{_TOP - 14}" text-anchor="middle">{escape(title)}</text>']
    for percent in range(0, 101, 20):
        y = _y(percent)
        parts.append(f'<path d="M{left} {y:.1f}h{_PANEL}" stroke="#ddd"/>')
    for place, variant in enumerate(VARIANTS):
        values = study.values(variant, metric)
        if not values:
            continue
        x, colour = left + (place + 0.5) * _STEP, _COLOURS[variant]
        interval = mean_interval([*values.values()])
        parts.append(f'<path d="M{x - 11:.1f} {_y(interval.mean):.1f}h22" stroke="{colour}" stroke-width="3"/>')
        if interval.count > 1:
            low, high = (_y(min(100.0, max(0.0, edge))) for edge in (interval.low, interval.high))
            parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-width="1.5"/>')
        for number, (seed, value) in enumerate(sorted(values.items())):
            shift = 4 * (number - (len(values) - 1) / 2)
            parts.append(
                f'<circle cx="{x + shift:.1f}" cy="{_y(value):.1f}" r="3.5" fill="{colour}" fill-opacity="0.6">'
                f"<title>{escape(TITLES[variant])}, seed {seed}: {value:.1f}%</title></circle>"
            )
    return parts


def _y(percent: float) -> float:
    return _TOP + _HEIGHT * (1 - percent / 100)
