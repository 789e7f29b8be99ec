"""The README's tables of measurements, written from the committed results they name.

    python -m xfm_fast.benchmarks.report.readme           # rewrite them: make readme
    python -m xfm_fast.benchmarks.report.readme --check   # exit code 1 where one is stale

A table stands between `<!-- bench:begin FILE -->` and `<!-- bench:end -->`; FILE is a results document, relative to the
README. A further table needs its two markers and nothing else.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from xfm_fast.checkpoint.files import write_bytes
from xfm_fast.errors import DataError

from ..files import load
from .table import markdown

REGION = re.compile(
    r"(?P<begin><!-- bench:begin (?P<file>\S+) -->\n)(?P<table>.*?)(?P<end><!-- bench:end -->)", re.DOTALL
)


def regenerated(readme: Path) -> str:
    """The text of a README with every table as its results have it.

    Raises:
        DataError: a marker without its other half, or results that are absent or of another schema.
    """
    text = readme.read_text(encoding="utf-8")
    begun, ended = text.count("<!-- bench:begin"), text.count("<!-- bench:end -->")
    if not begun == ended == len(REGION.findall(text)):
        raise DataError(
            f"{readme} has {begun} begin and {ended} end markers that do not pair up; write "
            "<!-- bench:begin FILE --> and <!-- bench:end --> around every table"
        )

    def table(region: re.Match[str]) -> str:
        return region["begin"] + markdown(load(readme.parent / region["file"])) + region["end"]

    return REGION.sub(table, text)


def main(arguments: list[str]) -> int:
    """Rewrite the README of this checkout, or with `--check` say whether that would change it."""
    readme = Path(__file__).resolve().parents[2] / "README.md"
    text = regenerated(readme)
    stale = text != readme.read_text(encoding="utf-8")
    if "--check" in arguments:
        print("README.md: tables are stale; run make readme" if stale else "README.md: tables are up to date")
        return int(stale)
    if stale:
        write_bytes({readme: text.encode()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
