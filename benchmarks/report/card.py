"""A report as one picture to share: the sorted bars of up to four kinds of work, 1200 by 630 pixels."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xfm_fast.errors import UnavailableError
from xfm_fast.io import write_bytes

from ..record import OURS, Document
from . import charts, findings
from .table import processor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT, _MARGIN, _TOP, _BOTTOM = 1200, 630, 64, 158, 84
_INK, _SOFT, _OURS, _OTHER, _GROUND = "#1a1e22", "#5c6570", "#0b5d52", "#8a929b", "#fbfbfa"
_FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")
_MOST_PANELS, _LEAST_PITCH, _MOST_PITCH = 4, 46.0, 62.0


def png(document: Document, path: Path, *, source: str = "") -> None:
    """Draw the picture of a document, which says its `source` where programs look for it.

    Raises:
        UnavailableError: matplotlib is not installed, or the document has nothing to draw.
        StorageError: the file cannot be written.
    """
    try:
        from matplotlib import font_manager, rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UnavailableError("a PNG needs matplotlib; install it with pip install 'xfm-fast[bench]'") from None
    # One chart per kind of work, in the dtype that gains most, like for like.
    document = document.model_copy(update={"rows": [row for row in document.rows if row.dtype != "int8"]})
    best: dict[str, charts.Bars] = {}
    for panel in charts.speeds(document):
        if panel.title not in best or _gain(panel) > _gain(best[panel.title]):
            best[panel.title] = panel
    panels = list(best.values())[:_MOST_PANELS]
    if not panels:
        raise UnavailableError("these results have no two contenders at the same work, so there is nothing to draw")
    installed = set(font_manager.get_font_names())
    content = io.BytesIO()
    with rc_context({"font.family": next(name for name in _FONTS if name in installed), "text.color": _INK}):
        picture = Figure(figsize=(_WIDTH / 100, _HEIGHT / 100), dpi=100, facecolor=_GROUND)
        left, soft = _MARGIN / _WIDTH, {"color": _SOFT, "fontsize": 11.5}
        picture.text(left, 0.895, OURS, fontsize=15, weight="bold", color=_OURS)
        picture.text(left, 0.815, document.title, fontsize=27, weight="bold")
        picture.text(left, 0.055, findings.place(document), **soft)
        across = min(len(panels), 2)
        down, gap = -(-len(panels) // across), 56
        width = (_WIDTH - 2 * _MARGIN - gap * (across - 1)) / across
        # A little room that few bars leave goes above them.
        height = (_HEIGHT - _TOP - _BOTTOM) / down
        spare = height - 48 - max(len(p.bars) for p in panels) * _MOST_PITCH
        top = _TOP + max(spare, 0) / 3
        for place, panel in enumerate(panels):
            row, column = divmod(place, across)
            left, bottom = _MARGIN + column * (width + gap), _HEIGHT - top - (row + 1) * height
            box = (left / _WIDTH, bottom / _HEIGHT, width / _WIDTH)
            axes = picture.add_axes((*box, (height - 48) / _HEIGHT), facecolor=_GROUND)
            title, room = panel.title.split(" (")[0], 90 // across
            while len(title) > room and ", " in title:
                title = title.rpartition(", ")[0]
            title = textwrap.shorten(title, room, placeholder=" …")
            axes.set_title(title, loc="left", fontsize=15, weight="bold", pad=10)
            _bars(axes, panel, height - 48)
        picture.savefig(content, format="png", metadata={"Source": source})
    write_bytes({path: content.getvalue()})


def gains_png(documents: Sequence[Document], path: Path, *, source: str = "") -> None:
    """Draw what `accelerate` gains in fp32 over the untouched model: the models that all documents measured.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    gained: list[dict[str, float]] = []
    for document in documents:
        rows = [row for row in document.rows if row.ours and row.measured and row.dtype == "fp32"]
        pairs = [(row.name.split(", ")[0], document.like_for_like(row)) for row in rows]
        gained.append({name: like.ratio for name, like in pairs if like is not None})
    models = [name for name in gained[0] if all(name in each for each in gained)]
    picture = Figure(figsize=(_WIDTH / 100, _HEIGHT / 100), dpi=100, facecolor=_GROUND)
    picture.text(_MARGIN / _WIDTH, 0.9, OURS, fontsize=15, weight="bold", color=_OURS)
    picture.text(_MARGIN / _WIDTH, 0.82, "accelerate(model) over the untouched model, fp32", fontsize=24, weight="bold")
    axes = picture.add_axes((0.3, 0.08, 0.64, 0.66), facecolor=_GROUND)
    height = 0.8 / len(documents)
    for place, (document, each) in enumerate(zip(documents, gained, strict=True)):
        positions = [row + place * height for row in range(len(models))]
        values = [each[name] for name in models]
        label = f"{processor(document)}, {document.date[:10]}"
        axes.barh(positions, values, height * 0.9, color=(_OURS, _SOFT, _OTHER)[place % 3], label=label)
        for position, value in zip(positions, values, strict=True):
            axes.text(value, position, f" {value:.2f}×", va="center", fontsize=11, color=_INK)
    axes.axvline(1, color=_INK, linewidth=1)
    axes.set_xlim(0, 1.1 * max(max(each.values()) for each in gained))
    axes.set_yticks([row + height * (len(documents) - 1) / 2 for row in range(len(models))], models, fontsize=12)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=11)
    content = io.BytesIO()
    picture.savefig(content, format="png", metadata={"Source": source})
    write_bytes({path: content.getvalue()})


def _gain(panel: charts.Bars) -> float:
    """The speed of xfm-fast over that of the slowest."""
    return max((bar.value for bar in panel.bars if bar.ours), default=0.0) / min(bar.value for bar in panel.bars)


def _bars(axes: Axes, panel: charts.Bars, height: float) -> None:
    """The bars that there is room for: xfm-fast's, the reference's, and the fastest of the others."""
    room = max(2, int(height // _LEAST_PITCH))
    kept = sorted(panel.bars, key=lambda bar: (not bar.ours, bar.factor != "1×", -bar.value))[:room]
    shown = [bar for bar in panel.bars if bar in kept]
    pitch = min(max(height / len(shown), _LEAST_PITCH), _MOST_PITCH)
    size, right = min(pitch / 4, 14.0), {"ha": "right", "transform": axes.get_yaxis_transform()}
    for place, bar in enumerate(shown):
        colour = _OURS if bar.ours else _INK
        axes.barh(place, bar.value, height=0.4, color=_OURS if bar.ours else _OTHER)
        axes.text(0, place - 0.27, bar.label, fontsize=size, color=colour)
        axes.text(1, place - 0.27, bar.text.replace(" ✓", ""), fontsize=size - 1, color=_SOFT, **right)
        factor = {"fontsize": size * (1.5 if bar.ours else 1.1), "weight": "bold", "color": colour}
        axes.text(bar.value, place, f" {bar.factor}", va="center_baseline", **factor)
    axes.set_xlim(0, max(bar.value for bar in shown) * 100 / charts.LONGEST_BAR)
    axes.set_ylim(height / pitch - 0.7, -0.7)
    axes.set_axis_off()
