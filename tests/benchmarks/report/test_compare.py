"""Two results documents compared: what is called faster or slower, what is flagged, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.benchmarks.report import examples
from tests.cli.runner import invoke
from xfm_fast.benchmarks.files import load
from xfm_fast.benchmarks.record import Document
from xfm_fast.benchmarks.report import Changes, compare
from xfm_fast.benchmarks.report.compare import Change
from xfm_fast.errors import DataError


def _ours(found: Changes) -> list[Change]:
    return [change for change in found.changes if change.contender == "xfm-fast"]


def _jittered(document: Document, seed: int) -> Document:
    """The same machine on another day: every sample drawn anew around its row's median."""
    draw, copy = random.Random(seed), document.model_copy(deep=True)
    for row in copy.rows:
        row.seconds = [draw.choice(row.seconds) * draw.gauss(1, 0.002) for _ in row.seconds]
    return copy


def test_chance_is_not_called_a_difference() -> None:
    content = examples.scenarios()
    same = compare(content, content.model_copy(deep=True))
    assert (same.flags, same.worse) == ([], [])
    assert all(change.ratio == pytest.approx(1) for change in same.changes)
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
    assert compare(examples.scenarios(1.3), examples.scenarios()).worse == []


def test_a_machine_that_slowed_down_is_taken_out_by_the_control() -> None:
    before = examples.scenarios(dtypes=("fp32",))
    after = before.model_copy(deep=True)
    for row in after.rows:
        row.seconds = [1.5 * second for second in row.seconds]
    changes = [one for one in _ours(compare(before, after)) if not one.name.endswith("server")]
    assert changes
    for change in changes:
        assert (change.verdict, change.ratio) == ("slower", pytest.approx(1 / 1.5))
        assert change.relative == pytest.approx(1)


def test_small_effects_few_samples_and_contention_decide_nothing() -> None:
    before, after = (examples.scenarios(pace, count=80) for pace in (1.0, 1.015))
    assert {change.verdict for change in _ours(compare(before, after))} == {"no difference", "not tested"}
    before, after = (examples.scenarios(pace, count=3) for pace in (1.0, 2.0))
    assert {change.verdict for change in _ours(compare(before, after))} == {"too few samples", "not tested"}
    before, after = (examples.scenarios(pace) for pace in (1.0, 2.0))
    for row in after.rows:
        row.contended = True
    found = compare(before, after)
    assert {change.verdict for change in _ours(found)} == {"contended"}
    assert found.worse == []


def test_rows_that_lost_their_numbers_are_worse() -> None:
    before = examples.scenarios()
    after = before.model_copy(deep=True)
    after.rows[0] = examples.absent(after.rows[0], "parity failed", "error 1e-2 exceeds 1e-5")
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
    after.machine = before.machine | {"cpu": "Other CPU", "versions": {"numpy": "2.2", "triton": None}, "dirty": True}
    flags = compare(before, after).flags
    assert len(flags) == 4
    for words, flag in zip(("Other CPU", "2.1 and 2.2", "changed checkout", "interrupted"), flags, strict=True):
        assert words in flag


def test_other_benchmarks_and_other_work_are_refused() -> None:
    scenarios = examples.scenarios()
    with pytest.raises(DataError, match="suite"):
        compare(examples.suite(), scenarios)
    other = scenarios.model_copy(deep=True)
    for row in other.rows:
        row.name += ", more of it"
    with pytest.raises(DataError):
        compare(scenarios, other)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"schema_version": 3, "rows": []}', "version 3"),
        ('{"schema": "xfm-fast kernels 1"}', "version None"),
        ("[1, 2]", "version None"),
        ("{broken", "JSON"),
        ('{"schema_version": 4, "rows": []}', "benchmark"),
        ('{"schema_version": 4, "surprise": 1, "rows": [{"name": "a"}]}', "damaged"),
        (None, "read"),
    ],
)
def test_files_that_are_no_results_are_refused(content: str | None, named: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=named):
        load(path)


def test_damaged_values_are_refused(tmp_path: Path) -> None:
    for field, value in (("mode", "batch"), ("seconds", "1"), ("extra", {"mfu": [1]}), ("status", None)):
        content = json.loads(examples.suite().encoded())
        content["rows"][0][field] = value
        (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(DataError, match=field):
            load(tmp_path / "results.json")


def test_the_command_prints_the_rule_and_its_exit_code(tmp_path: Path) -> None:
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
    assert "Mann-Whitney" in worse.output
    assert invoke(["bench", "compare", paths["fast"], str(tmp_path / "none.json")]).exit_code == 2
