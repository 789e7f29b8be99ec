"""Reports of scenarios, sweeps and evaluations: page, terminal, Markdown, and the commands that show saved results."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.benchmarks import example_documents
from tests.cli.runner import invoke
from xfm_fast.benchmarks import markdown, results, terminal
from xfm_fast.benchmarks.page import render
from xfm_fast.benchmarks.page.charts import Bar, bars, linear_axis, log_axis, number, si
from xfm_fast.benchmarks.page.headline import Candidate, best_of, tile
from xfm_fast.benchmarks.page.plots import Palette, scaling
from xfm_fast.benchmarks.rows import read_document

VOID = {"meta", "link", "br"}
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
DOCUMENTS = {name: getattr(example_documents, name) for name in ("scenarios", "sweep", "coco")}


class _Tags(HTMLParser):
    """Checks nesting; SVG's own empty elements close themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(params=DOCUMENTS)
def content(request: pytest.FixtureRequest) -> dict[str, Any]:
    return DOCUMENTS[request.param]().as_content()


def _shown(content: dict[str, Any]) -> str:
    console = Console(width=180, record=True, file=io.StringIO())
    terminal.print_scenarios(content, console)
    return console.export_text()


def test_pages_are_well_formed_and_need_nothing_from_elsewhere(content: dict[str, Any]) -> None:
    page = render(content)
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    for word in ("http", "url(", "@import", "<script", "src="):
        assert word not in page
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    assert "0123456789abcdef" in page
    assert " ".join(content["command"]) in page
    assert "numpy 2.1" in page


def test_pages_escape_what_programs_say(content: dict[str, Any]) -> None:
    content["machine"] = content["machine"] | {"cpu": "<script>alert(1)</script> & co"}
    page = render(content)
    assert "<script" not in page
    assert "&amp; co" in page


def test_the_scenarios_page_has_every_chart() -> None:
    page = render(example_documents.scenarios().as_content())
    for title in ("Speed-up", "Latency", "Requests a second under a bound", "Throughput", "Roofline", "All rows"):
        assert f"<h2>{title}</h2>" in page
    assert "RuntimeError: out of &lt;memory&gt;" in page
    assert "TensorRT" in page
    assert "the package tensorrt is not installed" in page
    assert "✓ †" in page
    assert "e = " not in page


def test_the_sweep_page_prints_the_exponent_and_draws_its_line() -> None:
    content = example_documents.sweep().as_content()
    page = render(content)
    assert "e = 0.93 (0.91 to 0.95)" in page
    drawn = scaling(content, Palette(content["rows"]))
    lines = [re.findall(r"([\d.]+),([\d.]+)", points) for points in re.findall(r'points="([^"]+)"', drawn)]
    segments = [line for line in lines if len(line) == 2]
    assert len(segments) == 2
    for (x0, y0), (x1, y1) in segments:
        assert float(x1) > float(x0)
        assert float(y1) < float(y0)  # downwards in SVG: more work takes longer


def test_interrupted_runs_are_marked_in_every_report() -> None:
    content = example_documents.scenarios().as_content()
    content["interrupted"] = True
    content["rows"][0] |= {"status": "partial", "reason": "interrupted after 3 of 20 samples"}
    content["rows"][1] |= {"status": "partial", "latency": None, "against": [], "operations": []}
    assert "The run was interrupted" in render(content)
    assert "interrupted after 3 of 20 samples" in _shown(content)
    assert "rows marked * hold the samples until then" in _shown(content)
    assert "*" in markdown.tables(content)


def test_the_terminal_says_everything_that_was_measured() -> None:
    shown = _shown(example_documents.scenarios().as_content())
    for words in ("requests/s", "failed", "out of <memory>", "absent: TensorRT", "matrix products 72%", "no energy"):
        assert words in shown
    assert "time ~ requests together ^ 0.93" in _shown(example_documents.sweep().as_content())
    whole = _shown(example_documents.coco().as_content())
    assert "13.0x" in whole
    assert "13.9 days" in whole
    assert "193 PFLOP" in whole


def test_markdown_is_a_table(content: dict[str, Any]) -> None:
    blocks = markdown.tables(content).strip().split("\n\n")
    for block in blocks:
        lines = block.splitlines()
        assert len(lines) > 2
        assert set(lines[1]) <= {"|", "-"}
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_markdown_says_how_many_times_as_fast() -> None:
    content = example_documents.scenarios().as_content()
    row = next(row for row in content["rows"] if row["contender"] == "xfm-fast" and row["mode"] == "offline")
    against = next(other for other in row["against"] if other["contender"] == "official-algorithm")
    line = next(
        line
        for line in markdown.tables(content).splitlines()
        if row["name"] in line and "| offline | official algorithm" in line
    )
    assert f"{against['ratio']:.1f}x (fp32)" in line


def test_markdown_leaves_out_what_says_nothing() -> None:
    """Latencies where no request was alone, and how many times as fast xfm-fast is as itself."""
    content = example_documents.scenarios().as_content()
    assert "| p99 |" in markdown.tables(content)
    for line in markdown.tables(content).splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[2] != "xfm-fast" or cells[-2] == ""
    content["rows"] = [row for row in content["rows"] if row["mode"] == "offline"]
    assert "p99" not in markdown.tables(content)


def test_saved_documents_are_shown_again(content: dict[str, Any], tmp_path: Path) -> None:
    saved = results.save(content, tmp_path / "out")
    assert read_document(saved.document).as_content() == content
    shown = invoke(["bench", "report", str(saved.document)])
    assert shown.exit_code == 0, shown.output
    assert "Example CPU" in shown.output
    written = invoke(["bench", "report", str(saved.document), "--markdown"])
    assert written.output == markdown.tables(content)
    page = tmp_path / "page.html"
    assert invoke(["bench", "report", str(saved.document), "--html", str(page)]).exit_code == 0
    assert page.read_bytes() == saved.page.read_bytes()


def test_the_suites_documents_are_shown_again(tmp_path: Path) -> None:
    file = RESULTS / "cpu-amx-2threads.json"
    shown = invoke(["bench", "report", str(file)])
    assert shown.exit_code == 0, shown.output
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        assert f"{row['ratio']:.1f}x" in shown.output
    refused = invoke(["bench", "report", str(file), "--html", str(tmp_path)])
    assert refused.exit_code == 2
    assert "is a folder" in refused.stderr


def test_axes_hold_their_values_and_have_ticks() -> None:
    for values in ([0.1, 0.11], [3e-6, 2.0], [5.0, 5.0], [1e9, 3.4e11], [0.9, 7.3]):
        axis = log_axis(values, 0, 100)
        assert all(0 <= axis(value) <= 100 for value in values)
        assert 2 <= len(axis.ticks) <= 6, values
        assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
        assert list(axis.ticks) == sorted(axis.ticks)
    for top in (0.003, 1, 7.9, 120, 1e9):
        axis = linear_axis(top, 0, 100)
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


def test_bars_carry_their_intervals() -> None:
    drawn = bars("speed", [Bar("a", 2.0, "2×", "s0", 1.5, 2.5), Bar("b", 1.0, "1×", "s1")], reference=1)
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', drawn)]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.1)
    whisker = re.search(r'class=whisker x1="([\d.]+)" x2="([\d.]+)"', drawn)
    assert whisker
    assert float(whisker[1]) < widths[0] < float(whisker[2])
    assert drawn.count("class=reference") == 1


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*-2threads.json")), ids=lambda file: file.stem)
def test_the_results_of_the_checkout_can_all_be_shown(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    assert render(content).startswith("<!doctype html>")
    assert markdown.tables(content).startswith(("| work", "| model and work", "| operation"))
    assert invoke(["bench", "report", str(file)]).exit_code == 0


def _candidate(ratio: float, low: float | None, *, contended: bool = False) -> Candidate:
    return Candidate(ratio, low, None if low is None else 2 * ratio - low, contended, {})


def test_a_headline_is_no_lucky_pair() -> None:
    steady, wild = _candidate(3.0, 2.9), _candidate(5.0, 1.2)
    assert best_of([wild, steady]) is steady
    assert best_of([_candidate(9.0, 8.9, contended=True), wild]) is wild
    assert best_of([_candidate(9.0, None), wild]) is wild
    alone = _candidate(9.0, None, contended=True)
    assert best_of([alone, _candidate(2.0, None, contended=True)]) is alone
    text = tile(alone, "texts", "32 texts/s")
    assert "9.0× †" in text
    assert "without an interval" in text
    assert "95% interval 2.9 to 3.1" in tile(steady, "texts", "32 texts/s")


def test_the_page_of_drop_in_heads_with_what_was_not_contended() -> None:
    page = render(example_documents.drop_in())
    tiles = page[page.index("<div class=tiles>") : page.index("<h2>Speed-up")]
    assert "9.8×" in tiles
    assert "1.2×" in tiles
    assert "4.4×" not in tiles
    assert "4.40× †" in page
    assert "no such class in this version" in page
