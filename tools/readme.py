"""The tables of measurements in README and docs, written from the stored results that they name.

    python -m tools.readme           # rewrite them: make readme
    python -m tools.readme --check   # exit code 1 if one is stale

A table stands between `<!-- bench:begin FILE -->` and `<!-- bench:end -->`; FILE is a results document, relative to the
page, and a word behind it a form of `FORMS`: `<!-- bench:begin FILE gains -->`.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from xfm_fast.benchmarks.record import OURS, RERANKER, load
from xfm_fast.benchmarks.report.tables import (
    by_backend,
    fp32_gains,
    gains,
    int8_gains,
    machine_line,
    markdown,
    times,
)
from xfm_fast.errors import DataError
from xfm_fast.io import write_bytes

REGION = re.compile(
    r"(?P<begin><!-- bench:begin (?P<file>\S+\.json)(?: (?P<form>\w+))? -->\n)"
    r"(?P<table>.*?)(?P<end><!-- bench:end -->)",
    re.DOTALL,
)
FORMS: dict[str | None, Callable[..., str]] = {
    None: markdown,
    "columns": by_backend,
    "gains": gains,
    "int8": int8_gains,
    "reranker": partial(gains, label=RERANKER),
}

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/accelerate.png"
INK, SOFT, DARK, GREY = "#1a1e22", "#5c6570", "#0b5d52", "#8a929b"
# The results in the README's picture.
PICTURED = ROOT / "benchmarks/results/drop-in-cpu-avx512-zen4-2threads.json"


def pages() -> list[Path]:
    """Return the README and the docs of this checkout."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def picture_is_stale() -> bool:
    """Return whether the picture is not of the stored results, which its metadata name."""
    try:
        with Image.open(PICTURE) as picture:
            return picture.info.get("Source") != _digest()
    except OSError:
        return True


def _digest() -> str:
    return f"sha256 {hashlib.sha256(PICTURED.read_bytes()).hexdigest()}"


def regenerated(page: Path) -> str:
    """Return the text of a page with fresh tables; raises `DataError` for markers without a pair."""
    text = page.read_text(encoding="utf-8")
    begins, ends = text.count("<!-- bench:begin"), text.count("<!-- bench:end -->")
    if not begins == ends == len(REGION.findall(text)):
        raise DataError(
            f"{page} has {begins} begin and {ends} end markers that do not pair up; write "
            "<!-- bench:begin FILE --> and <!-- bench:end --> around every table"
        )

    def table(region: re.Match[str]) -> str:
        document = load(page.parent / region["file"])
        return region["begin"] + FORMS[region["form"]](document) + region["end"]

    return REGION.sub(table, text)


def draw_picture() -> None:
    """Draw the speed-ups over eager PyTorch in fp32, a group of bars per call."""
    # It belongs to an extra.
    from matplotlib.figure import Figure

    document = load(PICTURED)
    calls = fp32_gains(document)
    colors = {OURS: DARK, "ONNX Runtime": SOFT, "OpenVINO": GREY}
    figure = Figure(figsize=(12, 1.6 + 0.52 * len(calls)), dpi=100, facecolor="#fbfbfa")
    title = "Speed of the same call over eager PyTorch, fp32, same outputs"
    axes = figure.add_axes((0.4, 0.03, 0.55, 0.88), facecolor="none")
    figure.text(0.03, 0.955, title, fontsize=20, weight="bold", color=INK)
    figure.text(0.03, 0.93, machine_line(document).strip("*"), fontsize=10, color=SOFT)
    height = 0.8 / len(colors)
    for index, (runtime, color) in enumerate(colors.items()):
        positions, values = [], []
        for row, call in enumerate(calls):
            if runtime in call.ratios:
                positions.append(row + index * height)
                values.append(call.ratios[runtime])
        axes.barh(positions, values, height * 0.9, color=color, label=runtime)
        for position, value in zip(positions, values, strict=True):
            axes.text(value, position, f" {times(value)}", va="center", fontsize=9, color=INK)
    axes.axvline(1, color=INK, linewidth=1)
    labels = [f"{call.call}\n{call.inputs}" for call in calls]
    axes.set_yticks([row + height for row in range(len(calls))], labels, fontsize=9)
    axes.set_ylim(len(calls), -0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Source": _digest()})
    write_bytes({PICTURE: content.getvalue()})


def main(arguments: list[str]) -> int:
    """Rewrite the tables of this checkout; with `--check` return 1 if that would change a page."""
    fresh = {page: regenerated(page) for page in pages()}
    stale = {page: text for page, text in fresh.items() if text != page.read_text(encoding="utf-8")}
    redraw = picture_is_stale()
    if "--check" in arguments:
        names = [page.name for page in stale] + ([PICTURE.name] if redraw else [])
        for name in names:
            print(f"{name} is stale; run make readme")
        return int(bool(names))
    write_bytes({page: text.encode() for page, text in stale.items()})
    if redraw:
        draw_picture()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
