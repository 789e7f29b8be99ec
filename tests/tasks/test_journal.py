"""A journal keeps what was completed, whatever a kill, a power cut or a full disk left behind it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from xfm_fast.errors import StorageError
from xfm_fast.tasks.evaluation import Journal, read_journal

ENTRIES = [[0, [1.5, -2.0]], [1, ["\u2028"]], [2, [0.1]]]
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "last byte": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "torn": lambda data: data[:-4],
    "another value": lambda data: data.replace(b"0.1", b"0.2"),
    "zeros": lambda data: data[: data.rindex(b"\n", 0, -1) + 1] + bytes(4096),
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with Journal(tmp_path / "a/j.jsonl", "f") as journal:
        for entry in ENTRIES:
            journal.append(entry)
    return tmp_path / "a/j.jsonl"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_computed_again(written: Path, damage: str) -> None:
    written.write_bytes(DAMAGES[damage](written.read_bytes()))
    with Journal(written, "f") as journal:
        assert journal.entries == ENTRIES[:2]
        journal.append(ENTRIES[2])
    assert read_journal(written) == ("f", ENTRIES)


def test_other_work_starts_over(written: Path) -> None:
    with Journal(written, "g") as journal:
        assert journal.entries == []
    written.write_bytes(bytes(100))
    assert read_journal(written) == read_journal(written.with_name("none")) == (None, [])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_clear_error(written: Path) -> None:
    journal = Journal(written, "f")
    with open("/dev/full", "wb", buffering=0) as full:
        journal._file = full
        with pytest.raises(StorageError, match=r"j\.jsonl.*space"):
            journal.append(1)
    assert read_journal(written) == ("f", ENTRIES)
