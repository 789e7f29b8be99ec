"""Two results documents compared: what is called faster or slower, what is flagged, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.cli.runner import invoke
from xfm_fast.benchmarks.record import OURS, Document, load
from xfm_fast.benchmarks.report import compare
from xfm_fast.errors import DataError

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


def _measured(
    pace: float = 1.0, *, count: int = 20, spread: float = 0.02, seed: int = 0
) -> Document:
    """Load a stored suite with samples drawn around its medians; `pace` multiplies the times of xfm-fast."""
    draw, document = random.Random(seed), load(RESULTS / "cpu-avx512-2threads.json")
    document.machine["dirty"] = False
    for row in document.rows:
        middle = (row.median_s or 0.0) * (pace if row.ours else 1.0)
        row.seconds = [middle * draw.gauss(1, spread) for _ in range(count)]
    return document


def test_chance_is_not_called_a_difference() -> None:
    same = compare(_measured(), _measured())
    assert (same.flags, same.worse) == ([], [])
    assert all(change.ratio == pytest.approx(1) for change in same.changes)
    for seed in range(2):
        changes = compare(_measured(seed=seed), _measured(seed=seed + 100))
        assert not [change for change in changes.changes if change.verdict in ("faster", "slower")]


def test_slower_rows_are_found_and_only_they() -> None:
    changes = compare(_measured(), _measured(1.3))
    ours = [change for change in changes.changes if change.backend == OURS]
    assert changes.worse == ours
    for change in ours:
        assert change.ratio == pytest.approx(1 / 1.3)
        assert change.low is not None
        assert change.high is not None
        assert change.low <= 1 / 1.3 <= change.high
        assert change.control == pytest.approx(1)
    assert {change.verdict for change in changes.changes if change.backend != OURS} == {
        "no difference"
    }
    assert compare(_measured(1.3), _measured()).worse == []


@pytest.mark.parametrize(
    ("pace", "count", "verdict"), [(1.015, 80, "no difference"), (2.0, 3, "too few samples")]
)
def test_small_effects_and_few_samples_decide_nothing(
    pace: float, count: int, verdict: str
) -> None:
    before, after = (_measured(each, count=count, spread=0.001) for each in (1.0, pace))
    changes = compare(before, after)
    assert {change.verdict for change in changes.changes if change.backend == OURS} == {verdict}
    for row in after.rows:
        row.contended = True
    assert {change.verdict for change in compare(before, after).changes} == {"contended"}
    for document, rate in ((before, 10.0), (after, 5.0)):
        for row in document.rows:
            row.seconds, row.contended, row.extra = [], False, {"max_qps": rate}
    changes = compare(before, after)
    assert {(change.verdict, change.ratio) for change in changes.changes} == {("not tested", 0.5)}


def test_rows_that_lost_their_numbers_are_worse() -> None:
    before, after = _measured(), _measured()
    lost, gone = [row for row in after.rows if row.ours][:2]
    lost.status, lost.reason, lost.seconds = "parity failed", "error 1e-2 exceeds 1e-5", []
    after.rows.remove(gone)
    changes = compare(before, after)
    assert [change.verdict for change in changes.worse] == ["lost", "lost"]
    assert "error 1e-2" in changes.worse[0].reason
    assert changes.worse[1].dtype == gone.dtype
    assert [
        change.verdict for change in compare(after, before).changes if change.verdict == "new"
    ] == ["new", "new"]


def test_other_benchmarks_and_other_work_are_refused() -> None:
    with pytest.raises(DataError, match="kernels"):
        compare(_measured(), load(RESULTS / "kernels-cpu-avx512-2threads.json"))
    document = _measured()
    for row in document.rows:
        row.name += ", more of it"
    with pytest.raises(DataError):
        compare(_measured(), document)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "results.json", json.loads(_measured().encoded())
    faults: list[tuple[str, object]] = [
        ("mode", "batch"),
        ("seconds", "1"),
        ("extra", {"mfu": [1]}),
        ("status", None),
        ("surplus", 1),
    ]
    damaged = [
        (field, content | {"rows": [content["rows"][0] | {field: value}]})
        for field, value in faults
    ]
    headers = (
        ("version 3", {"schema_version": 3}),
        ("version None", [1]),
        ("benchmark", {"schema_version": 4}),
    )
    for message, value in (*damaged, *headers):
        path.write_text(json.dumps(value), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load(path)
    path.write_text("{broken")
    for file in (path, tmp_path / "absent.json"):
        with pytest.raises(DataError, match=file.name):
            load(file)


def test_the_command_prints_the_rule_and_its_exit_code(tmp_path: Path) -> None:
    paths = {}
    for name, pace in (("fast", 1.0), ("slow", 1.3)):
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_bytes(_measured(pace).encoded())
    better = invoke(["bench", "compare", paths["slow"], paths["fast"]])
    assert better.exit_code == 0, better.output
    assert "faster" in better.output
    worse = invoke(["bench", "compare", paths["fast"], paths["slow"]])
    assert worse.exit_code == 1
    assert " slower" in worse.output
    assert "Mann-Whitney" in worse.output
    assert invoke(["bench", "compare", paths["fast"], tmp_path / "none.json"]).exit_code == 2
