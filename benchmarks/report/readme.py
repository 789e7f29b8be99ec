"""The tables of measurements in README and docs, written from the committed results they name.

    python -m xfm_fast.benchmarks.report.readme           # rewrite them: make readme
    python -m xfm_fast.benchmarks.report.readme --check   # exit code 1 where one is stale

A table stands between `<!-- bench:begin FILE -->` and `<!-- bench:end -->`; FILE is a results document, relative to the
page. The form `gains` has a line per model of `bench drop-in` and, of several files, a column each; `int8` has the
same in int8, and `columns` has a column per backend: `<!-- bench:begin FILE columns -->`.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from xfm_fast.errors import DataError
from xfm_fast.io import write_bytes

from ..files import load
from .card import gains_png
from .table import contenders, gains, int8_gains, markdown

REGION = re.compile(
    r"(?P<begin><!-- bench:begin (?P<files>\S+\.json(?: \S+\.json)*)(?: (?P<form>gains|columns|int8))? -->\n)"
    r"(?P<table>.*?)(?P<end><!-- bench:end -->)",
    re.DOTALL,
)


ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs/accelerate.png"
PICTURED = tuple(
    ROOT / f"benchmarks/results/drop-in-cpu-{name}-2threads.json" for name in ("avx512", "avx512-zen4", "amx")
)
"""The README's picture, and the results that it shows."""


def pages() -> list[Path]:
    """The README and the docs of this checkout."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def picture_is_stale() -> bool:
    """True where the picture does not say that it shows the results of now."""
    try:
        with Image.open(PICTURE) as picture:
            return picture.info.get("Source") != _digest()
    except OSError:
        return True


def _digest() -> str:
    content = b"".join(path.read_bytes() for path in PICTURED)
    return f"sha256 {hashlib.sha256(content).hexdigest()}"


def regenerated(page: Path) -> str:
    """The text of a page with every table as its results have it.

    Raises:
        DataError: a marker without its other half, or results that are absent or of another schema.
    """
    text = page.read_text(encoding="utf-8")
    begun, ended = text.count("<!-- bench:begin"), text.count("<!-- bench:end -->")
    if not begun == ended == len(REGION.findall(text)):
        raise DataError(
            f"{page} has {begun} begin and {ended} end markers that do not pair up; write "
            "<!-- bench:begin FILE --> and <!-- bench:end --> around every table"
        )

    def table(region: re.Match[str]) -> str:
        draw: Callable[..., str] = {"gains": gains, "columns": contenders, "int8": int8_gains}.get(
            region["form"], markdown
        )
        documents = (load(page.parent / file) for file in region["files"].split())
        return region["begin"] + draw(*documents) + region["end"]

    return REGION.sub(table, text)


def main(arguments: list[str]) -> int:
    """Rewrite the tables of this checkout, or with `--check` say whether that would change a page."""
    fresh = {page: regenerated(page) for page in pages()}
    stale = {page: text for page, text in fresh.items() if text != page.read_text(encoding="utf-8")}
    names = [page.name for page in stale] + ([PICTURE.name] if picture_is_stale() else [])
    if "--check" in arguments:
        for name in names:
            print(f"{name} is stale; run make readme")
        return int(bool(names))
    write_bytes({page: text.encode() for page, text in stale.items()})
    if picture_is_stale():
        gains_png([load(path) for path in PICTURED], PICTURE, source=_digest())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
