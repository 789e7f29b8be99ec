"""Reports of stored documents: page, terminal, Markdown, and the commands that show them."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from tests.cli.runner import invoke
from xfm_fast.benchmarks import record, report
from xfm_fast.benchmarks.record import Comparison, Document
from xfm_fast.benchmarks.report import page
from xfm_fast.benchmarks.report.tables import times

VOID = {"meta", "br", "rect", "line"}
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
STORED = sorted(RESULTS.glob("*-2threads.json"))
KINDS = ("cpu-avx512", "kernels-cpu-avx512")


def _load(name: str) -> Document:
    return record.load(RESULTS / f"{name}-2threads.json")


@pytest.fixture(params=KINDS)
def document(request: pytest.FixtureRequest) -> Document:
    return _load(request.param)


def _shown(document: Document, width: int = 180) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    report.terminal(document, console)
    return console.export_text()


class _Tags(HTMLParser):
    """Checks nesting; SVG's own empty elements close themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "img", "link", "iframe", "object", "use", "image")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_pages_are_well_formed_and_self_contained(document: Document) -> None:
    document.machine = document.machine | {"cpu": "<b>alert</b> & co"}
    text = report.html(document)
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    for word in ("url(", "@import", "<script", "src=", "<b>alert"):
        assert word not in text
    assert not re.search(
        r"\b(nan|inf|None)\b", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    )
    for word in ("&amp; co", document.machine["commit"], "<h2>Speed</h2>", "<h2>All rows</h2>"):
        assert word in text


def test_a_speed_up_names_both_dtypes_and_is_no_lucky_or_contended_one() -> None:
    document = _load("cpu-avx512")
    row = next(row for row in document.rows if row.ours and row.dtype == "bf16")
    document.rows = [other for other in document.rows if other.place == row.place]
    compared, like = document.headline(row), document.like_for_like(row)
    assert compared is not None
    assert like is not None
    (headline,) = page.headlines(document)
    assert headline.factor == times(compared.ratio)
    assert "in bf16, against " in headline.about
    assert headline.about.endswith("fp32")
    assert headline.like_for_like == f"{times(like.ratio)} like for like, both bf16"
    for medium in (report.html(document), _shown(document), report.markdown(document)):
        assert times(compared.ratio) in medium
        assert times(like.ratio) in medium
    fp32 = next(other for other in document.rows if other.ours and other.dtype == "fp32")
    fp32.against = [
        Comparison(
            backend=document.reference, dtype="fp32", like_for_like=True, ratio=99.0, low=1.0
        )
    ]
    assert page.headlines(document)[0].factor == times(compared.ratio)
    row.contended = True
    assert page.headlines(document)[0].factor == "99.0×"


def test_saved_documents_are_shown_again(tmp_path: Path) -> None:
    document = _load("embed-image-224-cpu-avx512")
    saved = record.save(document, tmp_path / "out", report.html(document))
    assert record.load(saved) == document
    page, tables = tmp_path / "page.html", tmp_path / "tables.md"
    for out in (page, tables):
        done = invoke(["bench", "report", saved, "--out", out])
        assert done.exit_code == 0, done.output
    assert page.read_text(encoding="utf-8") == report.html(document)
    assert tables.read_text(encoding="utf-8") == report.markdown(document)
    for out in (tmp_path, tmp_path / "page.pdf"):
        assert invoke(["bench", "report", saved, "--out", out]).exit_code == 2


def test_the_stored_results_can_all_be_shown() -> None:
    for file in STORED:
        document = record.load(file)
        assert report.html(document).startswith("<!doctype html>")
        written = report.markdown(document)
        assert written.startswith("| work")
        for row in document.measured:
            for comparison in filter(None, [document.headline(row)] if row.ours else []):
                assert times(comparison.ratio) in written, file
