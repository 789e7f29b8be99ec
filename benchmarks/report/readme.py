"""The tables of measurements in README and docs, written from the stored results that they name.

    python -m xfm_fast.benchmarks.report.readme           # rewrite them: make readme
    python -m xfm_fast.benchmarks.report.readme --check   # exit code 1 where one is stale

A table stands between `<!-- bench:begin FILE -->` and `<!-- bench:end -->`; FILE is a results document, relative to the
page. The form `gains` has a line per model of `bench drop-in` and, of several files, a column each; `int8` has the
same in int8, and `columns` has a column per backend: `<!-- bench:begin FILE columns -->`.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from xfm_fast.errors import DataError
from xfm_fast.io import write_bytes

from ..record import OURS, load
from .tables import by_backend, drop_in_rows, gains, int8_gains, markdown, processor

REGION = re.compile(
    r"(?P<begin><!-- bench:begin (?P<files>\S+\.json(?: \S+\.json)*)(?: (?P<form>gains|columns|int8))? -->\n)"
    r"(?P<table>.*?)(?P<end><!-- bench:end -->)",
    re.DOTALL,
)
FORMS: dict[str | None, Callable[..., str]] = {
    None: markdown, "gains": gains, "columns": by_backend, "int8": int8_gains
}  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs/accelerate.png"
INK, SOFT, DARK, GREY = "#1a1e22", "#5c6570", "#0b5d52", "#8a929b"
# The results in the README's picture.
PICTURED = tuple(
    ROOT / f"benchmarks/results/drop-in-cpu-{name}-2threads.json" for name in ("avx512", "avx512-zen4", "amx")
)


def pages() -> list[Path]:
    """The README and the docs of this checkout."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def picture_is_stale() -> bool:
    """True unless the metadata of the picture name the stored results."""
    try:
        with Image.open(PICTURE) as picture:
            return picture.info.get("Source") != _digest()
    except OSError:
        return True


def _digest() -> str:
    content = b"".join(path.read_bytes() for path in PICTURED)
    return f"sha256 {hashlib.sha256(content).hexdigest()}"


def regenerated(page: Path) -> str:
    """The text of a page with every table as its results have it; raises `DataError` for markers without a pair."""
    text = page.read_text(encoding="utf-8")
    begun, ended = text.count("<!-- bench:begin"), text.count("<!-- bench:end -->")
    if not begun == ended == len(REGION.findall(text)):
        raise DataError(
            f"{page} has {begun} begin and {ended} end markers that do not pair up; write "
            "<!-- bench:begin FILE --> and <!-- bench:end --> around every table"
        )

    def table(region: re.Match[str]) -> str:
        documents = (load(page.parent / file) for file in region["files"].split())
        return region["begin"] + FORMS[region["form"]](*documents) + region["end"]

    return REGION.sub(table, text)


def draw_picture() -> None:
    """Draw the gains of `accelerate` in fp32 over the untouched model: the models in all of the results."""
    # It belongs to an extra.
    from matplotlib.figure import Figure

    documents = [load(path) for path in PICTURED]
    gained: list[dict[str, float]] = []
    for document in documents:
        pairs = [
            (row.name.split(", ")[0], document.like_for_like(row))
            for row in drop_in_rows(document)
            if row.measured and row.dtype == "fp32"
        ]
        gained.append({name: like.ratio for name, like in pairs if like is not None})
    models = [name for name in gained[0] if all(name in each for each in gained)]
    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="#fbfbfa")
    figure.text(0.053, 0.9, OURS, fontsize=15, weight="bold", color=DARK)
    title = "accelerate(model) over the untouched model, fp32"
    figure.text(0.053, 0.82, title, fontsize=24, weight="bold", color=INK)
    axes = figure.add_axes((0.3, 0.08, 0.64, 0.66), facecolor="none")
    height = 0.8 / len(documents)
    for place, (document, each) in enumerate(zip(documents, gained, strict=True)):
        positions = [row + place * height for row in range(len(models))]
        values, label = [each[name] for name in models], f"{processor(document)}, {document.date[:10]}"
        axes.barh(positions, values, height * 0.9, color=(DARK, SOFT, GREY)[place % 3], label=label)
        for position, value in zip(positions, values, strict=True):
            axes.text(value, position, f" {value:.2f}×", va="center", fontsize=11, color=INK)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlim(0, 1.1 * max(max(each.values()) for each in gained))
    axes.set_yticks([row + height * (len(documents) - 1) / 2 for row in range(len(models))], models, fontsize=12)
    axes.invert_yaxis()
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
