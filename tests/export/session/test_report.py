"""The report measures every graph at the shapes that matter, and its numbers hang together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.runner import invoke
from xfm_fast.errors import InputError
from xfm_fast.export.session import Session
from xfm_fast.export.session.report import LEAST_RUNS, measure_session, report_shapes
from xfm_fast.export.slots import SizeRange, Slot
from xfm_fast.memory import PeakMemory, resident_bytes

pytest.importorskip("onnxruntime", reason="sessions over ONNX files need onnxruntime")


def test_every_graph_is_measured(exported_fp32: Path) -> None:
    session = Session.load(exported_fp32, "onnxruntime", "cpu")
    told: list[str] = []
    report = measure_session(session, seconds=0.0, progress=told.append)
    assert [graph.graph for graph in report.graphs] == [*session.manifest.graph_names]
    assert len(told) == sum(len(graph.rows) for graph in report.graphs) == 10
    for graph in report.graphs:
        record = session.manifest.graph(graph.graph)
        assert graph.artifact_bytes == (exported_fp32 / record.file).stat().st_size
        assert graph.build_seconds == record.build_seconds
        assert graph.load_seconds > 0
        for row in graph.rows:
            assert row.runs == LEAST_RUNS
            assert 0 < row.p50 <= row.p90 <= row.p99
            assert row.items == row.sizes["batch"] * row.sizes.get("texts", 1)
            assert row.items / row.p99 <= row.throughput
            assert (row.enqueue, row.host_to_device, row.device_to_host) == (None, None, None)
    assert json.loads(json.dumps(report.as_json()))["graphs"][0]["rows"][0]["sizes"] == {"batch": 1}
    with pytest.raises(InputError, match="seconds=-1"):
        measure_session(session, seconds=-1)


def test_profiles_are_measured_where_they_are_tuned_and_at_their_largest() -> None:
    def slot(name: str, number: int, batch: tuple[int, int]) -> Slot:
        best, most = batch
        return Slot(name, number, {"batch": SizeRange(1, most, best), "length": SizeRange(1, 40, 16)})

    found = list(report_shapes("text", [slot("latency", 0, (1, 1)), slot("bulk", 1, (16, 64))]))
    assert [(at.name, shape["batch"], shape["length"]) for at, shape in found] == [
        ("latency", 1, 16), ("latency", 1, 40), ("bulk", 16, 16), ("bulk", 64, 40),
    ]  # fmt: skip
    fixed = Slot("fixed", 0, {"batch": SizeRange(2, 2), "length": SizeRange(12, 12)})
    assert [shape for _, shape in report_shapes("text", [fixed])] == [{"batch": 2, "length": 12}]


@pytest.mark.parametrize("without_mark", [False, True])
def test_peaks_that_are_over_are_seen(without_mark: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if without_mark:

        def refuse(*_: object) -> int:
            raise PermissionError

        monkeypatch.setattr(Path, "write_text", refuse)
    size = 64 << 20
    before = resident_bytes()
    with PeakMemory() as memory:
        block = bytearray(b"x" * size)
        for _ in range(200):
            # Time for whoever only looks now and then.
            sum(block[:: 1 << 12])
        del block
    assert memory.peak - memory.start > size // 2
    assert memory.start >= before // 2


def test_command(exported_fp32: Path) -> None:
    arguments = ["export", "report", str(exported_fp32), "--seconds", "0"]
    shown = invoke(arguments)
    assert shown.exit_code == 0, shown.output
    for word in ("onnxruntime", "vision", "image_memory", "p99", "load s", "peak MB"):
        assert word in shown.output
    assert "enqueue" not in shown.output
    as_json = invoke([*arguments, "--json"])
    assert json.loads(as_json.output)["dtype"] == "fp32"
