"""The list of seeded faults is one of this code, and each was caught; `make mutants` tries them again."""

from __future__ import annotations

import ast
import json

from tools.seeded_faults import BY_HAND, COVERED_BY, RESULTS, ROOT, Fault, faults

FAULTS: dict[tuple[str, str, str], Fault] = {fault.key: fault for fault in faults()}


def test_faults_change_the_code_and_leave_it_python() -> None:
    for fault in FAULTS.values():
        assert fault.text != (ROOT / fault.file).read_text(encoding="utf-8"), fault.key
        ast.parse(fault.text)
    assert {fault.file for fault in FAULTS.values()} == COVERED_BY.keys()
    assert {*BY_HAND} <= {fault.file for fault in FAULTS.values()}


def test_tests_that_cover_exist() -> None:
    assert all((ROOT / test).is_file() for tests in COVERED_BY.values() for test in tests)


def test_every_fault_was_caught() -> None:
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert kept["of"] >= 60
    assert [row for row in kept["faults"] if not row["caught_by"]] == []
    for row in kept["faults"]:
        assert row["caught_by"].split("::")[0] in COVERED_BY[row["file"]], row
