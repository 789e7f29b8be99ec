"""Two results documents set side by side: what is called faster or slower, what is flagged, what is refused."""

from __future__ import annotations

import io
import random
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmarks.report import examples
from tests.cli.runner import invoke
from xfm_fast.benchmarks.files import load
from xfm_fast.benchmarks.record import Document
from xfm_fast.benchmarks.report import Changes, compare, print_changes
from xfm_fast.benchmarks.report.compare import Change
from xfm_fast.errors import DataError

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


def _suite() -> Document:
    return load(RESULTS / "cpu-amx-2threads.json")


def _ours(found: Changes) -> list[Change]:
    return [change for change in found.changes if change.contender == "xfm-fast"]


def _jittered(document: Document, seed: int) -> Document:
    """The same machine on another day: every sample drawn anew around its row's median."""
    draw, made = random.Random(seed), document.model_copy(deep=True)
    for row in made.rows:
        for times in (row.seconds, row.latency.samples if row.latency else []):
            times[:] = [draw.choice(times) * draw.gauss(1, 0.002) for _ in times]
    return made


def test_a_document_equals_itself() -> None:
    content = examples.scenarios()
    found = compare(content, content.model_copy(deep=True))
    assert found.flags == []
    assert found.worse == []
    assert {change.verdict for change in _ours(found)} <= {"no difference", "not tested"}
    assert all(change.ratio == pytest.approx(1) for change in found.changes)


def test_chance_is_not_called_a_difference() -> None:
    content = examples.scenarios()
    for seed in range(5):
        found = compare(_jittered(content, seed), _jittered(content, seed + 100))
        assert not [change for change in found.changes if change.verdict in ("faster", "slower")]


def test_slower_rows_are_found_and_only_they() -> None:
    found = compare(examples.scenarios(), examples.scenarios(1.3))
    for change in found.changes:
        if "server" in change.name:
            assert change.verdict in ("not tested", "contended")
            assert change.p is None
        elif change.contender == "xfm-fast":
            assert change.verdict == "slower"
            assert change.ratio == pytest.approx(1 / 1.3)
            assert change.low is not None
            assert change.high is not None
            assert change.low <= 1 / 1.3 <= change.high
            assert change.control == pytest.approx(1)
        else:
            assert change.verdict in ("no difference", "contended")
    assert len(found.worse) == 3 * 2 * 2


def test_a_faster_row_is_not_worse() -> None:
    found = compare(examples.scenarios(1.3), examples.scenarios())
    assert found.worse == []
    assert "faster" in {change.verdict for change in _ours(found)}


def test_a_machine_that_slowed_down_is_taken_out_by_the_control() -> None:
    before = examples.scenarios(dtypes=("fp32",))
    after = before.model_copy(deep=True)
    for row in after.rows:
        row.seconds = [1.5 * second for second in row.seconds]
    changes = _ours(compare(before, after))
    rows = [one for one in changes if not one.name.endswith(("single-stream", "server"))]
    assert rows
    for change in rows:
        assert change.verdict == "slower"
        assert change.ratio == pytest.approx(1 / 1.5)
        assert change.relative == pytest.approx(1)


def test_a_difference_below_two_percent_is_none_however_sure() -> None:
    before, after = (examples.scenarios(pace, count=80) for pace in (1.0, 1.015))
    assert {c.verdict for c in _ours(compare(before, after))} == {"no difference", "not tested"}


def test_three_samples_decide_nothing() -> None:
    before, after = (examples.scenarios(pace, count=3) for pace in (1.0, 2.0))
    assert {change.verdict for change in _ours(compare(before, after))} == {"too few samples", "not tested"}


def test_contended_rows_are_not_judged() -> None:
    before, after = (examples.scenarios(pace) for pace in (1.0, 2.0))
    for row in after.rows:
        if row.conditions:
            row.conditions.contended = True
    found = compare(before, after)
    assert {change.verdict for change in _ours(found)} == {"contended"}
    assert found.worse == []


def test_rows_that_lost_their_numbers_are_worse() -> None:
    before = examples.scenarios()
    after = before.model_copy(deep=True)
    failed = {"status": "parity failed", "reason": "error 1e-2 exceeds 1e-5", "latency": None}
    after.rows[0] = after.rows[0].model_copy(update=failed)
    gone = after.rows.pop(1)
    found = compare(before, after)
    assert [change.verdict for change in found.worse] == ["lost", "lost"]
    assert "error 1e-2" in found.worse[0].reason
    assert found.worse[1].dtype == gone.dtype
    assert [change.verdict for change in compare(after, before).changes if change.verdict == "new"] == ["new", "new"]


def test_other_circumstances_are_named() -> None:
    before = examples.scenarios()
    after = before.model_copy(deep=True)
    after.interrupted = True
    after.machine = before.machine | {
        "cpu": "Other CPU",
        "torch": "2.10.0",
        "versions": {"numpy": "2.2", "triton": None},
        "dirty": True,
    }
    flags = compare(before, after).flags
    assert flags == [
        "other machine: processor Example CPU and Other CPU",
        "other torch: 2.9.0 and 2.10.0",
        "other numpy: 2.1 and 2.2",
        "B was measured on a changed checkout",
        "B was interrupted: its last rows are partial or missing",
    ]


def test_the_suites_own_documents_have_both_sides() -> None:
    content = _suite()
    assert {row.dtype for row in content.measured if not row.ours} == {"fp32", "bf16"}
    for row in content.measured:  # whatever the day it was measured on: enough samples, and no neighbour
        row.conditions, row.seconds = None, [statistics.median(row.seconds) * (1 + k / 1000) for k in range(5)]
    slower = content.model_copy(deep=True)
    for row in slower.rows:
        row.seconds = [2 * second for second in row.seconds] if row.ours else row.seconds
    found = compare(content, slower)
    assert len(found.changes) == len(content.measured)
    text = next(c for c in _ours(found) if "captions" in c.name and c.dtype == "fp32" and c.name.startswith("embed"))
    assert text.verdict == "slower"
    assert text.ratio == pytest.approx(0.5)
    assert text.control == pytest.approx(1)


def test_other_benchmarks_and_other_work_are_refused() -> None:
    scenarios = examples.scenarios()
    with pytest.raises(DataError, match="of suite"):
        compare(_suite(), scenarios)
    other = scenarios.model_copy(deep=True)
    for row in other.rows:
        row.name += ", more of it"
    with pytest.raises(DataError, match="no row of A is in B"):
        compare(scenarios, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 7, "rows": []}', "has schema version 7"),
        ('{"schema_version": 1, "rows": []}', "has schema version 1"),
        ('{"schema": "xfm-fast kernels 1"}', "has schema version None"),
        ("[1, 2]", "has schema version None"),
        ("{broken", "is not JSON"),
        ('{"schema_version": 3, "rows": []}', "is damaged: benchmark"),
        ('{"schema_version": 3, "rows": [{"name": "a"}]}', "is damaged"),
    ],
)
def test_files_that_are_no_results_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load(path)


def test_an_absent_file_is_named() -> None:
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read"):
        load("nowhere.json")


def test_exit_codes(tmp_path: Path) -> None:
    paths = {}
    for name, pace in (("fast", 1.0), ("slow", 1.3)):
        paths[name] = str(tmp_path / f"{name}.json")
        Path(paths[name]).write_bytes(examples.scenarios(pace).encoded())
    better = invoke(["bench", "compare", paths["slow"], paths["fast"]])
    assert better.exit_code == 0, better.output
    assert "faster" in better.output
    worse = invoke(["bench", "compare", paths["fast"], paths["slow"]])
    assert worse.exit_code == 1
    assert "12 slower" in worse.output
    refused = invoke(["bench", "compare", paths["fast"], str(tmp_path / "none.json")])
    assert (refused.exit_code, "cannot be read" in refused.stderr) == (2, True)


def test_the_table_says_the_rule_and_the_flags() -> None:
    before, after = (examples.scenarios(pace) for pace in (1.0, 1.3))
    after.machine = after.machine | {"cpu": "Other CPU"}
    console = Console(width=170, record=True, file=io.StringIO())
    print_changes(compare(before, after), console)
    shown = console.export_text()
    assert "slower" in shown
    assert "other machine: processor Example CPU and Other CPU" in shown
    assert "Mann-Whitney" in shown
    assert "0.77×" in shown
