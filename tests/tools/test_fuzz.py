"""Damaged files of every format are read or refused by an error of ours, in bounds; `make fuzz` gives many more."""

import random

import pytest

from tools.fuzz import FORMATS, MOST_SECONDS, attack, changed, edited

JSON = [name for name, form in FORMATS.items() if form.values]


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name: str) -> None:
    ends = attack(FORMATS[name], 40)
    # The whole file is read: what is refused is the damage.
    assert ends["whole: read"] == len(FORMATS[name].whole), ends


@pytest.mark.parametrize("name", JSON)
def test_values_of_other_types(name: str) -> None:
    ends = attack(FORMATS[name], 150, values=True)
    assert len([end for end in ends if not end.startswith("whole")]) > 1 or name in (
        "a.json",
        "log.jsonl",
    ), ends


@pytest.mark.slow
@pytest.mark.parametrize("name", JSON)
def test_many_values_of_other_types(name: str) -> None:
    attack(FORMATS[name], 100_000, values=True, most_seconds=MOST_SECONDS)


def test_edits_reach_every_part() -> None:
    data = bytes(range(100))
    ends = {edited(data, [("turn", (at + 0.5) / 100, 0.0, b"\xff")]) for at in range(100)}
    assert len(ends) == 100
    assert edited(data, [("end", 0.5, 0.0, b"x")]) == data[:50]
    assert edited(data, [("insert", 0.0, 0.0, b"ab")]) == b"ab" + data
    assert sorted(edited(data, [("move", 0.1, 0.9, b"x")])) == sorted(data)
    found = {
        changed(b'{"a": 1, "b": [2, {"c": "x"}]}', random.Random(number)) for number in range(300)
    }
    assert len(found) > 100
    assert any(b"Infinity" in each for each in found)
