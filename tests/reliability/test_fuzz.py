"""Damaged files of every format are read or refused by an error of ours, in bounds; `make fuzz` gives many more."""

import pytest

from tests.reliability.fuzz import FORMATS, attack, edited


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name: str) -> None:
    ends = attack(FORMATS[name], 60)
    # The whole file is read: what is refused is the damage.
    assert ends["whole: read"] == len(FORMATS[name].whole), ends


def test_edits_reach_every_part() -> None:
    data = bytes(range(100))
    ends = {edited(data, [("turn", (at + 0.5) / 100, 0.0, b"\xff")]) for at in range(100)}
    assert len(ends) == 100
    assert edited(data, [("end", 0.5, 0.0, b"x")]) == data[:50]
    assert edited(data, [("insert", 0.0, 0.0, b"ab")]) == b"ab" + data
    assert len(edited(data, [("repeat", 0.0, 1.0, b"x")])) == 100 + 2 * 26
    assert sorted(edited(data, [("move", 0.1, 0.9, b"x")])) == sorted(data)
