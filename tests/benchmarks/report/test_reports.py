"""Reports of every kind of document: page, picture, terminal, Markdown, and the commands that show stored results."""

from __future__ import annotations

import errno
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmarks.report import examples
from tests.cli.runner import invoke
from xfm_fast.benchmarks import files, report
from xfm_fast.benchmarks.record import Document
from xfm_fast.benchmarks.report import charts, findings
from xfm_fast.benchmarks.report.table import Column, build, duration, number, seconds, si, tables, times
from xfm_fast.errors import StorageError, UnavailableError

VOID = {"meta", "link", "br", "rect", "line", "circle", "path", "polyline"}
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
STORED = sorted(RESULTS.glob("*-2threads.json"))


class _Tags(HTMLParser):
    """Checks nesting; SVG's own empty elements close themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "img", "link", "iframe", "object", "use", "image"):
            self.loaded.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(params=examples.DOCUMENTS)
def document(request: pytest.FixtureRequest) -> Document:
    return examples.DOCUMENTS[request.param]()


def _shown(document: Document, width: int = 180) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    report.terminal(document, console)
    return console.export_text()


def test_pages_are_well_formed_and_self_contained(document: Document) -> None:
    document.machine = document.machine | {"cpu": "<script>alert(1)</script> & co"}
    page = report.html(document, image='x" onload="y')
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.loaded == []
    for word in ("url(", "@import", "<script", "src=", 'onload="y'):
        assert word not in page
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    for word in ("prefers-color-scheme: dark", "0123456789abcdef", "&amp; co", " ".join(document.command), "numpy 2.1"):
        assert word in page
    assert "og:image" not in report.html(document)


def test_the_scenarios_page_has_every_chart() -> None:
    page = report.html(examples.scenarios())
    for title in ("Speed", "Latency", "Requests a second under a bound", "Roofline", "All rows"):
        assert f"<h2>{title}</h2>" in page
    for words in ("RuntimeError: out of &lt;memory&gt;", "the package tensorrt is not installed", "✓ †"):
        assert words in page
    assert "<h2>Peak memory</h2>" in report.html(examples.train_step())


def test_bars_are_sorted_and_of_one_dtype() -> None:
    found = charts.speeds(examples.scenarios())
    # Three kinds of work in three modes, in fp32 and in bf16.
    assert len(found) == 18
    for chart in found:
        values = [bar.value for bar in chart.bars]
        assert values == sorted(values, reverse=True)
        assert [bar.label.startswith("xfm-fast") for bar in chart.bars] == [bar.ours for bar in chart.bars]
    like = next(chart for chart in found if chart.about.startswith("fp32"))
    assert {bar.label.rpartition(", ")[2] for bar in like.bars} == {"fp32"}
    assert [bar.factor for bar in like.bars if bar.label.startswith("official")] == ["1×"]
    # The official algorithm was not run in bf16: its bar has its own dtype.
    other = next(chart for chart in found if chart.about.startswith("bf16"))
    assert [bar.label for bar in other.bars] == ["xfm-fast, bf16", "official algorithm, fp32"]
    ours, official = charts.speeds(examples.suite())[0].bars
    assert ours.value == pytest.approx(3 * official.value)
    assert ours.low is not None
    assert ours.high is not None
    assert ours.low < ours.value < ours.high


def test_every_speed_up_names_its_dtypes() -> None:
    text, rerank = findings.headlines(examples.suite())
    assert (text.factor, rerank.factor) == ("10.2×", "46.7×")
    assert "in bf16, against official algorithm, eager, fp32" in rerank.about
    assert rerank.like_for_like == "23.4× like for like, both bf16"
    for medium in (report.html(examples.suite()), _shown(examples.suite(), 90), report.markdown(examples.suite())):
        assert "46.7×" in medium
        assert "23.4×" in medium
    for head in ("official algorithm fp32", "over fp32", "like for like"):
        assert head in report.markdown(examples.suite())
    # A service whose reference ran in bf16 alone.
    stored = report.markdown(files.load(RESULTS / "serve-bf16-cpu-avx512-2threads.json"))
    assert "over fp32" not in stored
    assert "| 11.6 | 1.04 | 11.2× |" in stored


def test_a_headline_is_no_lucky_or_contended_pair() -> None:
    steady, wild, contended = (row for row in examples.drop_in().rows[:3])
    contended.contended = True
    steady.against = [examples.comparison("untouched", "fp32", "fp32", 3.0)]
    wild.against = [steady.against[0].model_copy(update={"ratio": 5.0, "low": 1.2})]
    candidates = [(row, row.against[0]) for row in (wild, steady)]
    assert findings.best_of(candidates) is candidates[1]
    contended_pair = (contended, steady.against[0].model_copy(update={"low": 99.0}))
    assert findings.best_of([contended_pair, candidates[0]]) is candidates[0]
    tiles = report.html(examples.drop_in())
    tiles = tiles[tiles.index('<div class="tiles">') : tiles.index("<h2>Speed")]
    assert "9.8×" in tiles
    assert "1.20×" in tiles
    assert "4.4×" not in tiles


def test_interrupted_runs_are_marked_in_every_report() -> None:
    document = examples.scenarios()
    document.interrupted = True
    document.rows[0].status, document.rows[0].reason = "partial", "interrupted after 3 of 20 samples"
    document.rows[1] = examples.absent(document.rows[1], "partial", "interrupted before its first sample")
    shown = _shown(document)
    assert "The run was interrupted" in report.html(document)
    assert "interrupted after 3 of 20 samples" in shown
    assert "*" in report.markdown(document)


def test_the_terminal_shows_what_was_measured() -> None:
    shown = _shown(examples.scenarios())
    for words in ("requests/s", "failed", "out of <memory>", "absent: TensorRT", "matrix products", "72%", "no energy"):
        assert words in shown
    whole = _shown(examples.coco())
    for words in ("13.0×", "193 PFLOP", "25.6", "Receipt"):
        assert words in whole
    shown = _shown(examples.suite())
    for words in (
        "re-rank 1 image", "46.7×", "R@1/5/10 50/50/50", "equal in all 4 comparisons",
        "error 2.0e-02 exceeds 1.0e-05", "this processor has no fp16", "<b>.jpg",
    ):  # fmt: skip
        assert words in shown
    step = " ".join(_shown(examples.train_step()).split())
    assert "peak memory, train-step bf16: 50%" in step
    assert "33% with activation checkpointing" in step


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminals_tables_fit_with_whole_words(document: Document, width: int) -> None:
    shown = _shown(document, width)
    known = {word for table in tables(document) for line in table.lines for cell in line for word in cell.split()}
    known |= {word for table in tables(document) for column in table.columns for word in column.head.split()}
    known |= {word for table in tables(document) for word in table.title.split()}
    for line in shown.splitlines():
        # Sentences wrap where the terminal does; tables are as wide as it is.
        if line.endswith(" ") or "─" in line:
            assert len(line) <= width
            assert set(line.replace("─", " ").split()) <= known, line


def test_markdown_is_a_table(document: Document) -> None:
    document.rows[0].name += "a | b"
    for block in report.markdown(document).strip().split("\n\n"):
        lines = block.splitlines()
        assert len(lines) > 2
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_markdown_has_the_comparison_of_each_backend() -> None:
    document = examples.scenarios()
    row = next(row for row in document.rows if row.ours and row.mode == "offline")
    against = next(other for other in row.against if other.backend == "official-algorithm")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.markdown(document).splitlines()]
    heads, lines = table[0], table[2:]
    line = next(line for line in lines if line[0] == f"{row.name}, {row.unit}/s" and line[1].startswith("official"))
    assert line[heads.index("xfm-fast fp32 is")] == times(against.ratio)
    assert all(line[heads.index("xfm-fast fp32 is")] == "" for line in lines if line[1] == "xfm-fast")
    assert "p99 ms" in heads
    document.rows = [row for row in document.rows if row.mode == "offline"]
    assert "p99" not in report.markdown(document)


def test_saved_documents_are_shown_again(document: Document, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    saved = files.save(document, tmp_path / "out", report.html(document))
    assert files.load(saved.document) == document
    page, card = tmp_path / "page.html", tmp_path / "card.png"
    written = invoke(["bench", "report", str(saved.document), "--markdown"])
    assert written.output == report.markdown(document)
    done = invoke(["bench", "report", str(saved.document), "--html", str(page), "--png", str(card)])
    assert done.exit_code == 0, done.output
    assert 'og:image" content="card.png"' in page.read_text(encoding="utf-8")
    with Image.open(card) as image:
        assert image.size == (1200, 630)
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    # xfm-fast is dark and others are grey.
    assert {(11, 93, 82), (138, 146, 155)} <= {colour for _, colour in colours}
    for option in ("--html", "--png"):
        assert invoke(["bench", "report", str(saved.document), option, str(tmp_path)]).exit_code == 2


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UnavailableError):
        report.png(examples.coco().model_copy(update={"rows": []}), tmp_path / "card.png")


def test_saving_never_leaves_a_half_or_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document, folder = examples.coco(), tmp_path / "deep" / "out"
    saved = files.save(document, folder, "page")
    assert (folder / "latest.json").read_bytes() == saved.document.read_bytes()
    assert files.save(document, folder, "page").document != saved.document
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 6

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        files.save(document, folder, "page")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(StorageError):
        files.save(document, saved.document / "out", "page")


def test_results_of_a_gpu_are_kept_under_its_name(tmp_path: Path) -> None:
    document = examples.train_step()
    document.machine = document.machine | {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}
    path = files.save_reference(document, tmp_path)
    assert path.name == "train-step-nvidia-h100-80gb-hbm3.json"
    assert files.load(path) == document


@pytest.mark.parametrize("file", STORED, ids=lambda file: file.stem)
def test_the_stored_results_can_all_be_shown(file: Path) -> None:
    document = files.load(file)
    assert report.html(document).startswith("<!doctype html>")
    written = report.markdown(document)
    assert written.startswith("| work")
    for row in document.measured:
        for found in filter(None, [document.headline(row)] if row.ours else []):
            assert times(found.ratio) in written


def test_axes_hold_their_values_and_have_ticks() -> None:
    for values in ([0.1, 0.11], [3e-6, 2.0], [5.0, 5.0], [1e9, 3.4e11]):
        axis = charts.log_axis(values)
        assert all(0 <= axis(value) <= 100 for value in values)
        assert 2 <= len(axis.ticks) <= 5, values
        assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    for top in (0.003, 7.9, 1e9):
        axis = charts.linear_axis(top)
        assert axis(0) == 0
        assert axis(top) <= 100
        assert 2 <= len(axis.ticks) <= 8


def test_numbers_are_short() -> None:
    assert (si(3.4e11, "FLOP/s"), si(0.0021, "s"), si(999.9999e9, "B/s")) == ("340 GFLOP/s", "2.1 ms", "1 TB/s")
    assert (number(12345.6), number(0.01234)) == ("12,346", "0.0123")
    assert (times(1.064), times(2.88), times(46.7)) == ("1.06×", "2.9×", "46.7×")
    assert (seconds(0.0021), duration(3 * 86400), duration(7200)) == ("2.1 ms", "3.0 days", "2.0 h")
    rows = [{"a": "1", "b": ""}, {"a": "", "b": ""}]
    table = build("", rows, [Column(head, lambda row, head=head: row[head]) for head in ("a", "b")])
    assert ([column.head for column in table.columns], table.lines) == (["a"], [["1"], [""]])
