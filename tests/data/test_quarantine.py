"""Broken rows are listed once by all processes that meet them, and too many of them stop a run."""

import json
import pickle
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.data.record_files import write_lines
from xfm_fast.data.annotations import AnnotationRows
from xfm_fast.data.records import LineFile
from xfm_fast.data.streams import Quarantine
from xfm_fast.errors import DataError, StorageError

ERROR = DataError("broken for a test")


def _entries(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _file(path: Path, rows: int = 1000) -> LineFile:
    return LineFile(write_lines(path, ({"a": index} for index in range(rows))))


def test_an_entry_says_what_and_where(tmp_path: Path) -> None:
    rows = _file(tmp_path / "a.jsonl")
    Quarantine(tmp_path / "bad" / "q.jsonl").add(rows, 7, ERROR)
    (entry,) = _entries(tmp_path / "bad" / "q.jsonl")
    assert entry == {
        "file": str(tmp_path / "a.jsonl"), "row": 8, "reason": "broken for a test", "excerpt": '{"a": 7}',
        "modified": (tmp_path / "a.jsonl").stat().st_mtime_ns,
    }  # fmt: skip


def test_rows_are_listed_once_over_processes_and_restarts(tmp_path: Path) -> None:
    rows = _file(tmp_path / "a.jsonl")
    first, second = (Quarantine(tmp_path / "q.jsonl") for _ in range(2))
    for quarantine in (
        first,
        second,
        first,
        pickle.loads(pickle.dumps(second)),
        Quarantine(tmp_path / "q.jsonl"),
    ):
        quarantine.add(rows, 3, ERROR)
        quarantine.add(rows, 4, ERROR)
    assert [entry["row"] for entry in _entries(tmp_path / "q.jsonl")] == [4, 5]
    assert first.count(rows) == 2
    # Half a line of a killed writer does no harm.
    with (tmp_path / "q.jsonl").open("a") as file:
        file.write('{"file": "cut')
    for row in (5, 6):
        Quarantine(tmp_path / "q.jsonl").add(rows, row, ERROR)
    assert Quarantine(tmp_path / "q.jsonl").count(rows) == 4


@pytest.mark.parametrize(
    ("rows", "tolerate", "allowed"), [(199, 0.01, 1), (200, 0.01, 2), (1000, 0.0, 1)]
)
def test_the_limit(tmp_path: Path, rows: int, tolerate: float, allowed: int) -> None:
    file = AnnotationRows("memory", [{}] * rows, modified=0)
    quarantine = Quarantine(
        tmp_path / "q.jsonl", tolerate_bad=tolerate, setting="streams.pairs.bad_share"
    )
    for row in range(allowed):
        quarantine.add(file, row, ERROR)
    with pytest.raises(
        DataError, match=rf"memory.*{allowed + 1} of {rows}.*streams\.pairs\.bad_share$"
    ):
        pickle.loads(pickle.dumps(quarantine)).add(file, allowed, ERROR)
    with pytest.raises(DataError, match=r"1\.5"):
        Quarantine(tolerate_bad=1.5)


def test_the_list_is_temporary_without_a_path_and_must_be_writable(tmp_path: Path) -> None:
    rows = AnnotationRows("memory", [{}] * 1000, modified=0)
    quarantine = Quarantine()
    quarantine.add(rows, 0, ERROR)
    path = quarantine.path
    assert (path.is_file(), quarantine.count(rows)) == (True, 1)
    del quarantine
    assert not path.exists()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="quarantine"):
        Quarantine(tmp_path / "file" / "q.jsonl").add(rows, 0, ERROR)


def _write_many(process: int, folder: Path) -> None:
    quarantine = Quarantine(folder / "q.jsonl", tolerate_bad=1.0)
    rows = LineFile(folder / "a.jsonl")
    for row in range(60):
        quarantine.add(rows, (row * 7 + process) % 60, ERROR)


def test_processes_write_together(tmp_path: Path) -> None:
    _file(tmp_path / "a.jsonl", 100)
    # Forked, since importing everything anew would take most of the time of this file.
    processes = [
        get_context("fork").Process(target=_write_many, args=(index, tmp_path))
        for index in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(int(str(entry["row"])) for entry in _entries(tmp_path / "q.jsonl")) == list(
        range(1, 61)
    )
