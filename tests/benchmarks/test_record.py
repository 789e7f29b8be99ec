"""The schema of results documents: what is refused, and how rows of one work find each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.report import examples
from xfm_fast.benchmarks.files import load
from xfm_fast.benchmarks.record import OFFICIAL, OURS, groups
from xfm_fast.errors import DataError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "schema version 1"),
        ({"schema_version": 2}, "schema version 2"),
        ({"schema_version": 99}, "schema version 99"),
        ({"rows": [{"work": "rerank"}]}, "damaged: rows"),
        ({"surprise": 1}, "damaged: surprise"),
    ],
)
def test_documents_of_another_schema_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {
        "schema_version": 3, "benchmark": "scenario", "date": "2026-01-01T00:00:00+00:00", "command": [],
        "options": {}, "device": "cpu", "machine": {},
    }  # fmt: skip
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    assert load(path).rows == []
    path.write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=message):
        load(path)


def test_files_that_are_no_documents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"schema_version": 3, "rows"')
    with pytest.raises(DataError, match="not JSON"):
        load(tmp_path / "cut.json")


def test_rows_of_one_work_belong_together() -> None:
    document = examples.suite()
    compared = [group for group in groups(document.rows) if any(row.against for row in group)]
    assert len(compared) > 1
    for group in compared:
        ours = next(row for row in group if row.against)
        assert ours.ours
        reference = document.reference_row(ours)
        assert reference is not None
        assert (reference.contender, reference.dtype, reference in group) == (OFFICIAL, "fp32", True)
        headline = document.headline(ours)
        assert headline is not None
        assert (headline.contender, headline.dtype) == (OFFICIAL, "fp32")
        same = document.like_for_like(ours)
        assert same is None or (same.dtype, same.like_for_like) == (ours.dtype, True)
        assert {row.place for row in group} == {ours.place}
        assert OURS in ours.key
