"""Reports of every kind of document: page, picture, terminal, Markdown, and the commands that show saved results."""

from __future__ import annotations

import io
import re
from email.message import Message
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmarks.report import examples
from tests.cli.runner import invoke
from xfm_fast.benchmarks import files, report
from xfm_fast.benchmarks.record import Comparison, Document, Row
from xfm_fast.benchmarks.report import charts, findings
from xfm_fast.benchmarks.report.table import Column, build, duration, number, seconds, si, tables, times
from xfm_fast.errors import UnavailableError

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


def test_pages_are_well_formed_and_need_nothing_from_elsewhere(document: Document) -> None:
    page = report.html(document)
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.loaded == []
    for word in ("url(", "@import", "<script", "src="):
        assert word not in page
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    assert "prefers-color-scheme: dark" in page
    assert "0123456789abcdef" in page
    assert " ".join(document.command) in page
    assert "numpy 2.1" in page


def test_pages_escape_what_programs_say(document: Document) -> None:
    document.machine = document.machine | {"cpu": "<script>alert(1)</script> & co"}
    page = report.html(document, image='x" onload="y')
    assert "<script" not in page
    assert "&amp; co" in page
    assert 'onload="y' not in page


def test_pages_tell_those_who_are_shown_a_link(document: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    page = report.html(document, image="card.png")
    for said in ("og:title", "og:description", 'og:image" content="card.png"', "summary_large_image"):
        assert said in page
    assert "og:image" not in report.html(document)
    message = Message()
    message["Project-URL"] = "Source, https://example.org/project"
    monkeypatch.setattr(metadata, "metadata", lambda name: message)
    assert '<a class="home" href="https://example.org/project">' in report.html(document)


def test_a_checkout_that_was_never_installed_has_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", absent)
    assert "href" not in report.html(examples.coco())


def test_the_scenarios_page_has_every_chart() -> None:
    page = report.html(examples.scenarios())
    for title in ("Speed", "Latency", "Requests a second under a bound", "Roofline", "All rows"):
        assert f"<h2>{title}</h2>" in page
    assert "RuntimeError: out of &lt;memory&gt;" in page
    assert "TensorRT" in page
    assert "the package tensorrt is not installed" in page
    assert "✓ †" in page


def test_bars_are_sorted_and_of_one_type() -> None:
    made = charts.speeds(examples.scenarios())
    # Three kinds of work in three modes, in fp32 and in bf16.
    assert len(made) == 18
    for chart in made:
        values = [bar.value for bar in chart.bars]
        assert values == sorted(values, reverse=True)
        assert [bar.label.startswith("xfm-fast") for bar in chart.bars] == [bar.ours for bar in chart.bars]
        assert chart.width(values[0]) > charts.LONGEST_BAR / 2
    like = next(chart for chart in made if chart.about.startswith("fp32"))
    assert like.about == "fp32; factors over official algorithm, plain PyTorch, fp32"
    assert {bar.label.rpartition(", ")[2] for bar in like.bars} == {"fp32"}
    assert [bar.factor for bar in like.bars if bar.label.startswith("official")] == ["1×"]
    # The official algorithm was not run in bf16: it stands beside with its own type.
    other = next(chart for chart in made if chart.about.startswith("bf16"))
    assert [bar.label for bar in other.bars] == ["xfm-fast, bf16", "official algorithm, fp32"]


def test_every_speed_up_names_its_types_and_the_like_for_like_ratio_stands_beside_it() -> None:
    text, rerank = findings.headlines(examples.suite())
    assert (text.factor, rerank.factor) == ("10.2×", "46.7×")
    assert "in bf16, against official algorithm, eager, fp32" in rerank.about
    assert rerank.like_for_like == "23.4× like for like, both bf16"
    for medium in (report.html(examples.suite()), _shown(examples.suite(), 90), report.markdown(examples.suite())):
        assert "46.7×" in medium
        assert "23.4×" in medium
    for medium in (report.html(examples.suite()), report.markdown(examples.suite())):
        for head in ("official algorithm fp32", "over fp32", "like for like"):
            assert head in medium


def test_over_fp32_is_said_of_fp32_alone() -> None:
    """A service whose reference ran in bf16 alone is compared with that, and the reference's speed stands beside it."""
    text = report.markdown(files.load(RESULTS / "serve-bf16-cpu-avx512-2threads.json"))
    assert "over fp32" not in text
    assert "| one request at a time, same dtype | like for like |" in text.splitlines()[0]
    assert "| 11.6 | 1.04 | 11.2× |" in text


def test_interrupted_runs_are_marked_in_every_report() -> None:
    document = examples.scenarios()
    document.interrupted = True
    partial = {"status": "partial", "reason": "interrupted after 3 of 20 samples"}
    document.rows[0] = document.rows[0].model_copy(update=partial)
    gone = {"status": "partial", "latency": None, "against": [], "operations": []}
    document.rows[1] = document.rows[1].model_copy(update=gone)
    shown = _shown(document)
    assert "The run was interrupted" in report.html(document)
    assert "interrupted after 3 of 20 samples" in shown
    assert "rows marked * hold the samples until then" in shown
    assert "*" in report.markdown(document)


def test_the_terminal_says_everything_that_was_measured() -> None:
    shown = _shown(examples.scenarios())
    words = ("requests/s", "failed", "out of <memory>", "absent: TensorRT", "matrix products", "72%", "no energy")
    for word in words:
        assert word in shown
    whole = _shown(examples.coco())
    assert findings.headlines(examples.coco())[0].about.endswith("against the official algorithm, fp32")
    assert "13.0×" in whole
    assert "13.9 days" in whole
    assert "193 PFLOP" in whole


def test_the_terminal_tells_of_the_suite() -> None:
    shown = _shown(examples.suite())
    for words in (
        "re-rank 1 image",
        "46.7×",
        "retrieval quality means nothing",
        "R@1/5/10 50/50/50",
        "18 photographs, 90 captions",
        "equal in all 4 comparisons",
        "error 2.0e-02 exceeds 1.0e-05",
        "this processor has no fp16",
        "<b>.jpg",
    ):
        assert words in shown
    step = _shown(examples.train_step())
    assert "peak memory, train-step bf16: 50%" in step
    assert "retrieval" not in step
    assert "<h2>Peak memory</h2>" in report.html(examples.train_step())


@pytest.mark.parametrize("width", [80, 100, 160])
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
    assert shown.count("─" * 20) >= len(tables(document))


def test_a_terminal_without_room_shows_fewer_columns() -> None:
    narrow, wide = (_shown(examples.scenarios(), width) for width in (60, 260))
    assert "xfm-fast" in narrow
    assert "build /" not in narrow
    assert "build /" in wide


def test_markdown_is_a_table(document: Document) -> None:
    blocks = report.markdown(document).strip().split("\n\n")
    for block in blocks:
        lines = block.splitlines()
        assert len(lines) > 2
        assert set(lines[1]) <= {"|", "-", ":"}
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_markdown_says_how_many_times_as_fast() -> None:
    document = examples.scenarios()
    row = next(row for row in document.rows if row.ours and row.mode == "offline")
    against = next(other for other in row.against if other.contender == "official-algorithm")
    heads, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in report.markdown(document).splitlines()
    ]
    line = next(
        line for line in lines if line[0] == f"{row.name}, {row.unit}/s" and line[1].startswith("official algorithm")
    )
    assert line[heads.index("xfm-fast fp32 is")] == times(against.ratio)


def test_markdown_leaves_out_what_says_nothing() -> None:
    """Latencies where no request was alone, and how many times as fast xfm-fast is as itself."""
    document = examples.scenarios()
    assert "| p99 ms |" in report.markdown(document)
    heads, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in report.markdown(document).splitlines()
    ]
    for line in lines:
        assert line[1] != "xfm-fast" or line[heads.index("xfm-fast fp32 is")] == ""
    document.rows = [row for row in document.rows if row.mode == "offline"]
    assert "p99" not in report.markdown(document)


def test_cells_with_bars_do_not_break_a_table() -> None:
    document = examples.suite()
    document.rows[0].name = "a | b"
    assert "a \\| b" in report.markdown(document)


def test_saved_documents_are_shown_again(document: Document, tmp_path: Path) -> None:
    saved = files.save(document, tmp_path / "out", report.html(document))
    assert files.load(saved.document) == document
    shown = invoke(["bench", "report", str(saved.document)])
    assert shown.exit_code == 0, shown.output
    assert "Example CPU" in shown.output
    written = invoke(["bench", "report", str(saved.document), "--markdown"])
    assert written.output == report.markdown(document)
    page = tmp_path / "page.html"
    assert invoke(["bench", "report", str(saved.document), "--html", str(page)]).exit_code == 0
    assert page.read_bytes() == saved.page.read_bytes()


def test_a_picture_beside_a_page_is_named_in_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    saved = files.save(examples.suite(), tmp_path / "out", "")
    options = ["--html", str(tmp_path / "page.html"), "--png", str(tmp_path / "card.png")]
    done = invoke(["bench", "report", str(saved.document), *options])
    assert done.exit_code == 0, done.output
    assert 'og:image" content="card.png"' in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_pictures_have_the_size_that_links_show(document: Document, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    report.png(document, tmp_path / "card.png")
    with Image.open(tmp_path / "card.png") as image:
        assert image.size == (1200, 630)
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    # xfm-fast is dark and others are grey.
    assert {(11, 93, 82), (138, 146, 155)} <= {colour for _, colour in colours}


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UnavailableError, match="nothing to draw"):
        report.png(examples.coco().model_copy(update={"coco": None}), tmp_path / "card.png")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    for option in ("--html", "--png"):
        refused = invoke(["bench", "report", str(STORED[0]), option, str(tmp_path)])
        assert (refused.exit_code, "is a folder" in refused.stderr) == (2, True)


@pytest.mark.parametrize("file", STORED, ids=lambda file: file.stem)
def test_the_results_of_the_checkout_can_all_be_shown(file: Path) -> None:
    document = files.load(file)
    assert report.html(document).startswith("<!doctype html>")
    written = report.markdown(document)
    assert written.startswith("| work")
    shown = invoke(["bench", "report", str(file)])
    assert shown.exit_code == 0
    for row in document.measured:
        for found in filter(None, [document.headline(row)] if row.ours else []):
            assert times(found.ratio) in written
            assert times(found.ratio) in shown.output


def test_axes_hold_their_values_and_have_ticks() -> None:
    for values in ([0.1, 0.11], [3e-6, 2.0], [5.0, 5.0], [1e9, 3.4e11], [0.9, 7.3]):
        axis = charts.log_axis(values)
        assert all(0 <= axis(value) <= 100 for value in values)
        assert 2 <= len(axis.ticks) <= 5, values
        assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
        assert list(axis.ticks) == sorted(axis.ticks)
    for top in (0.003, 1, 7.9, 120, 1e9):
        axis = charts.linear_axis(top)
        assert axis(0) == 0
        assert axis(top) <= 100
        assert 2 <= len(axis.ticks) <= 8


def test_numbers_are_short() -> None:
    assert si(3.4e11, "FLOP/s") == "340 GFLOP/s"
    assert si(0.0021, "s") == "2.1 ms"
    assert si(999.9999e9, "B/s") == "1 TB/s"
    assert si(0, "s") == "0 s"
    assert number(12345.6) == "12,346"
    assert number(0.01234) == "0.0123"
    assert (times(1.064), times(2.88), times(46.7)) == ("1.06×", "2.9×", "46.7×")
    assert (seconds(0.0021), duration(3 * 86400), duration(7200)) == ("2.1 ms", "3.0 days", "2.0 h")


def test_columns_that_say_nothing_are_left_out() -> None:
    rows = [{"a": "1", "b": ""}, {"a": "", "b": ""}]
    table = build("", rows, [Column(head, lambda row, head=head: row[head]) for head in ("a", "b")])
    assert [column.head for column in table.columns] == ["a"]
    assert table.lines == [["1"], [""]]
    assert build("", [], [Column("a", str)]).lines == []


def test_bars_carry_their_intervals() -> None:
    page = report.html(examples.suite())
    chart = charts.speeds(examples.suite())[0]
    ours, other = chart.bars
    assert chart.width(ours.value) == pytest.approx(3 * chart.width(other.value))
    assert ours.low is not None
    assert ours.high is not None
    assert ours.low < ours.value < ours.high
    assert chart.width(ours.high) <= charts.LONGEST_BAR
    whisker = re.search(r'class="interval" x1="([\d.]+)%" x2="([\d.]+)%"', page)
    assert whisker
    assert float(whisker[1]) < chart.width(ours.value) < float(whisker[2])


def _candidate(ratio: float, low: float | None, *, contended: bool = False) -> tuple[Row, Comparison]:
    document = examples.drop_in()
    row = next(row for row in document.rows if row.contended == contended and row.ours)
    high = None if low is None else 2 * ratio - low
    compared = Comparison(contender="untouched", dtype="fp32", like_for_like=False, ratio=ratio, low=low, high=high)
    return row.model_copy(update={"against": [compared]}), compared


def test_a_headline_is_no_lucky_pair() -> None:
    steady, wild = _candidate(3.0, 2.9), _candidate(5.0, 1.2)
    assert findings.best_of([wild, steady]) is steady
    assert findings.best_of([_candidate(9.0, 8.9, contended=True), wild]) is wild
    assert findings.best_of([_candidate(9.0, None), wild]) is wild
    alone = _candidate(9.0, None, contended=True)
    assert findings.best_of([alone, _candidate(2.0, None, contended=True)]) is alone

    def head(row: Row) -> findings.Headline:
        return findings.headlines(examples.drop_in().model_copy(update={"rows": [row]}))[0]

    assert head(alone[0]).factor == "9.0× †"
    assert head(alone[0]).interval == "without an interval"
    assert head(steady[0]).interval == "95% interval 2.90 to 3.10"


def test_the_page_of_drop_in_heads_with_what_was_not_contended() -> None:
    page = report.html(examples.drop_in())
    tiles = page[page.index('<div class="tiles">') : page.index("<h2>Speed")]
    assert "9.8×" in tiles
    assert "1.20×" in tiles
    assert "4.4×" not in tiles
    assert "4.4× †" in page
    assert "no such class in this version" in page
    assert "What was replaced" in page


def test_the_page_of_kernels_says_what_is_wrong() -> None:
    page, shown = report.html(examples.kernels()), _shown(examples.kernels())
    assert "wrong &amp; odd, fp32" in page
    assert "wrong: error 1e-2" in page
    assert "0.92×" in page
    assert "0.92×" in shown
