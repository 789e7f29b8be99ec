"""`bench sessions`: sessions beside their libraries, cost as texts grow, and rows of several runs in one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.runner import invoke
from xfm_fast.benchmarks import files
from xfm_fast.benchmarks.contenders.registry import ALL, ALONE
from xfm_fast.benchmarks.options import SessionOptions
from xfm_fast.benchmarks.record import OURS, Document, Row
from xfm_fast.benchmarks.report import markdown
from xfm_fast.benchmarks.report.table import contenders
from xfm_fast.benchmarks.work import sessions
from xfm_fast.errors import DataError, StorageError, UnavailableError


def _row(work: str, contender: str, seconds: list[float], dtype: str = "fp32") -> Row:
    return Row(
        work=work, name=work, contender=contender, label=contender, dtype=dtype, status="measured", unit="texts",
        items=2, seconds=seconds,
    )  # fmt: skip


def _document(*rows: Row) -> Document:
    made = Document.begun("sessions", {}, [], "cpu")
    return made.model_copy(update={"rows": list(rows)})


def test_every_session_has_its_library() -> None:
    names = {contender.name for contender in ALL}
    assert {*ALONE} <= names
    assert {*ALONE.values()} <= names
    assert ALONE["onnxruntime-packed"] == ALONE["onnxruntime"] == "onnxruntime-alone"
    assert ALONE["openvino-int8"] == "openvino-int8-alone"
    assert ALONE["aoti"] == "aoti-alone"
    assert OURS not in ALONE


def test_a_session_is_compared_with_its_library() -> None:
    rows = [
        _row("embed-text", "openvino", [1.0, 1.0, 1.0]),
        _row("embed-text", "openvino-alone", [1.5, 1.5, 1.5]),
        _row("embed-text", "openvino-alone", [9.0] * 3, "bf16"),
    ]
    for row in rows:
        sessions._beside_library(row, rows)
    ((found,), *others) = [row.against for row in rows]
    assert (found.contender, found.dtype, found.ratio, found.low, found.high) == (
        "openvino-alone", "fp32", 1.5, 1.5, 1.5,
    )  # fmt: skip
    assert others == [[], []]
    head, _, line, *_ = markdown(_document(*rows)).splitlines()
    assert "over the library" in head
    assert "1.50×" in line
    head, _, fp32, bf16 = contenders(_document(*rows)).splitlines()
    assert head == "| work | dtype | openvino | openvino-alone |"
    assert fp32 == "| embed-text, ms | fp32 | 1,000 (1.50×) | 1,500 |"
    assert bf16 == "| embed-text, ms | bf16 |  | 9,000 |"


def test_rows_of_other_work_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """xfm-fast alone is measured, so that nothing is exported."""
    monkeypatch.setattr(sessions, "_forms", list)
    monkeypatch.setattr(sessions, "_INT8", OURS)
    path = tmp_path / "rows.json"

    def run(*work: str) -> Document:
        options = SessionOptions(preset="tiny", quick=True, dtype=("fp32",), work=work)  # pyright: ignore[reportArgumentType]
        document = sessions.run(options, into=path)
        files.save_as(document, path)
        return document

    first = run("rerank")
    both = run("tokens", "embed-text")
    assert [(row.work, row.over) for row in both.rows] == [
        ("rerank", None), ("embed-text", None), ("embed-text", "tokens"), ("embed-text", "tokens"),
    ]  # fmt: skip
    assert both.rows[0] == first.rows[0]
    assert all(row.parity is not None and row.parity.passed for row in both.rows)
    assert len({row.x for row in both.rows}) == 3
    assert run("rerank").rows[-1].seconds != first.rows[0].seconds
    files.save_as(first.model_copy(update={"machine": first.machine | {"threads": 999}}), path)
    with pytest.raises(DataError, match=r"rows\.json is of another number of threads \(999, now .*\); name another"):
        run("rerank")
    path.write_text("{}")
    with pytest.raises(DataError, match="schema version"):
        run("rerank")


def test_what_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options, error, message in (
        ({"baselines": ("onnx",)}, UnavailableError, "baseline 'onnx' is unknown"),
        ({"exports": tmp_path / "file" / "here"}, StorageError, "cannot be made"),
    ):
        with pytest.raises(error, match=message):
            sessions.run(SessionOptions(preset="tiny", **options))


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file, exports = tmp_path / "rows.json", tmp_path / "exports"
    names = "onnxruntime,onnxruntime-alone,onnxruntime-packed,onnxruntime-int8,onnxruntime-int8-alone"
    common = ["bench", "sessions", "--quick", "--preset", "tiny", "--dtype", "fp32", "--baselines", names]
    kept = ["--exports", str(exports), "--json", str(file)]
    for work in ("embed-text,tokens", "rerank"):
        done = invoke([*common, "--work", work, *kept])
        assert done.exit_code == 0, done.output
    document = files.load(file)
    assert all(row.measured and row.parity is not None and row.parity.passed for row in document.rows), done.output
    assert {row.work for row in document.rows} == {"embed-text", "rerank"}
    for row in document.rows:
        compared = [other.contender for other in row.against]
        assert row.ours or compared == [ALONE[row.contender]] * (row.contender in ALONE)
    grown = [row for row in document.rows if row.over == "tokens" and row.contender == "onnxruntime-packed"]
    assert len({row.x for row in grown}) == 2
    made = {path.name: (path / "manifest.json").stat().st_mtime_ns for path in exports.iterdir()}
    assert json.loads((exports / "onnxruntime-fp32-packed-text-32" / "manifest.json").read_text())["packed"] is True
    assert invoke([*common, "--work", "embed-text", *kept]).exit_code == 0
    # What lies there already is used again.
    assert {path.name: (path / "manifest.json").stat().st_mtime_ns for path in exports.iterdir()} == made
