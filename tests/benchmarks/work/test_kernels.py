"""The kernel benchmark measures what it says, checks before it times, and reports what could not run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.runner import invoke
from xfm_fast.benchmarks import files, report
from xfm_fast.benchmarks.options import KernelOptions
from xfm_fast.benchmarks.record import Row
from xfm_fast.benchmarks.timing import Clocked
from xfm_fast.benchmarks.work import kernels
from xfm_fast.benchmarks.work.kernel_cases import Case, cases
from xfm_fast.benchmarks.work.kernels import measure
from xfm_fast.kernels import roofline

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
SMALL = cases(CPU, torch.float32, small=True)


@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_every_contender_is_right_and_timed(case: Case) -> None:
    rows = measure(case, CPU, roofline.H100)
    for row in rows:
        assert row.bounds == (row.contender in case.bounds)
        if row.bounds:
            assert row.parity is None
            continue
        assert row.median_s is not None, row.reason
        assert len(row.samples) >= 5
        assert row.efficiency is not None
        assert row.efficiency.share_of_floor is not None
        assert row.parity is not None
        assert row.parity.error is not None
        assert row.parity.error < 1e-5
    directions = {row.direction for row in rows}
    assert directions == ({"forward", "backward"} if case.backward_work else {"forward and backward"})


def test_a_wrong_contender_is_not_timed() -> None:
    case = dataclasses.replace(
        SMALL[0],
        others={
            "wrong": lambda *a: SMALL[0].ours(*a) * 1.001,
            "broken": lambda *a: torch.zeros(3) @ torch.zeros(4),
        },
    )
    rows = {(row.contender, row.direction): row for row in measure(case, CPU, None)}
    for direction in ("forward", "backward"):
        assert not rows["wrong", direction].seconds
        assert str(rows["wrong", direction].reason).startswith("wrong: error 1")
        assert not rows["broken", direction].seconds
        assert "size" in str(rows["broken", direction].reason)
        assert rows["xfm-fast", direction].seconds


class MadeUpTritonError(Exception):
    """As Triton's own: of no class that PyTorch knows."""


def test_an_error_of_any_library_costs_its_own_rows_alone() -> None:
    def failing(*inputs: torch.Tensor) -> torch.Tensor:
        raise MadeUpTritonError("out of resource: shared memory")

    kept: list[Row] = []
    case = dataclasses.replace(SMALL[0], others={"failing": failing}, bounds={}, absent={"Liger": "not installed"})
    rows = measure(case, CPU, None, add=kept.extend)
    assert kept == rows
    found = {(row.contender, row.direction): row for row in rows}
    for direction in ("forward", "backward"):
        assert found["failing", direction].status == "failed"
        assert found["failing", direction].reason == "MadeUpTritonError: out of resource: shared memory"
        assert found["xfm-fast", direction].seconds
        assert found["xfm-fast", direction].timed_by == "clock"
        assert (found["Liger", direction].status, found["Liger", direction].reason) == ("absent", "not installed")


def test_a_contender_without_gradient_keeps_its_forward_pass() -> None:
    """As cuDNN's attention, which has no gradient of a bias."""

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
            return SMALL[0].truth(*inputs)

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            raise MadeUpTritonError("no gradient of a bias")

    case = dataclasses.replace(SMALL[0], others={"half": NoGradient.apply}, bounds={})
    rows = {(row.contender, row.direction): row for row in measure(case, CPU, None)}
    assert rows["half", "forward"].seconds
    assert rows["half", "backward"].status == "failed"
    assert "no gradient of a bias" in str(rows["half", "backward"].reason)


def test_rows_are_kept_as_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A definition that fails loses its operation; what was measured before and comes after is there."""

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise MadeUpTritonError("no such instruction")

    few = [dataclasses.replace(SMALL[3], truth=broken), dataclasses.replace(SMALL[3], others={}, bounds={})]
    monkeypatch.setattr(kernels, "cases", lambda *_, **__: few)
    seen: list[int] = []
    document = kernels.run(KernelOptions(small=True), keep=lambda d: seen.append(len(d.rows)))
    assert seen == [1, 2, 3]
    assert [row.status for row in document.rows] == ["failed", "measured", "measured"]
    assert "no such instruction" in str(document.rows[0].reason)


class TestGraphReplay:
    """The way of a call through the clock of a GPU, with streams, events and graphs of a made-up one."""

    @pytest.fixture(autouse=True)
    def made_up_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Stream:
            def __init__(self, *_: Any) -> None: ...
            def wait_stream(self, other: Any) -> None: ...
            def synchronize(self) -> None: ...
            def __enter__(self) -> None: ...
            def __exit__(self, *_: object) -> None: ...

        class Event(Stream):
            def record(self) -> None: ...
            def elapsed_time(self, other: Any) -> float:
                return 0.25

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event())
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def test_time_is_that_of_one_run_of_a_graph(self) -> None:
        calls, recorded = [0], []

        def prepare() -> Any:
            return lambda: calls.__setitem__(0, calls[0] + 1)

        def recorder(run: Any, runs: int, stream: Any) -> Any:
            recorded.append(runs)
            return lambda: [run() for _ in range(runs)]

        clocked = Clocked(prepare, torch.device("cuda"), recorder)
        assert clocked() == clocked() == [pytest.approx(0.25e-3 / 4)]
        # A run of 0.25 ms: four of them fill a graph.
        assert recorded == [4]
        assert clocked.by == "graph replay"
        assert clocked.host_s is not None
        assert clocked.host_s < 0.01
        assert clocked.reason is None

    def test_work_that_no_graph_holds_is_timed_by_events(self) -> None:
        def recorder(run: Any, runs: int, stream: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

        clocked = Clocked(lambda: lambda: None, torch.device("cuda"), recorder)
        assert clocked() == [pytest.approx(0.25e-3)]
        assert clocked.by == "events"
        assert "not permitted" in str(clocked.reason)


def test_command_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "xfm_fast.cli",
        "bench",
        "kernels",
        "--small",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "relpos_attention" in done.stdout
    document = json.loads((tmp_path / "rows.json").read_text())
    assert {"machine", "command", "date", "rows"} <= document.keys()
    assert "commit" in document["machine"]
    assert all(min(row["seconds"]) > 0 for row in document["rows"] if row["contender"] == "xfm-fast")


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cases", lambda *_, **__: SMALL[:2])


@pytest.mark.usefixtures("few_cases")
def test_results_are_shown_again_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*inputs: torch.Tensor) -> torch.Tensor:
        return SMALL[0].ours(*inputs) * 1.001

    monkeypatch.setitem(SMALL[0].others, "wrong & odd", wrong)
    # Its error is no number, which JSON cannot hold.
    monkeypatch.setitem(SMALL[0].others, "of another shape", lambda *inputs: SMALL[0].ours(*inputs)[:1])
    path = tmp_path / "rows.json"
    files.save_as(kernels.run(KernelOptions(small=True), command=["xfm-fast", "bench", "kernels"]), path)
    loaded = files.load(path)
    ours = next(row for row in loaded.rows if row.ours and row.direction == "forward")
    eager, against = loaded.reference_row(ours), loaded.headline(ours)
    assert eager is not None
    assert against is not None
    assert (eager.contender, eager.direction) == ("eager", "forward")
    assert against.ratio == (eager.median_s or 0) / (ours.median_s or 1)
    assert not eager.against
    ratio, page, table = against.ratio, report.html(loaded), report.markdown(loaded)
    for row in loaded.rows:
        assert row.name in page
    assert {row.status for row in loaded.rows if row.contender in ("wrong & odd", "of another shape")} == {
        "parity failed"
    }
    assert f"{ratio:.2f}×" in page
    assert f"{ratio:.2f}×" in table
    assert "wrong &amp; odd" in page
    shown = invoke(["bench", "report", str(path)])
    assert f"{ratio:.2f}×" in shown.output, shown.output
    compared = invoke(["bench", "compare", str(path), str(path)])
    assert compared.exit_code == 0, compared.output
    assert "no difference" in compared.output


@pytest.mark.usefixtures("few_cases")
def test_an_interrupted_run_keeps_whole_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def once(case: Case, *others: Any) -> list[Row]:
        if done:
            raise KeyboardInterrupt
        done.append(case.name)
        return measure(case, *others)

    monkeypatch.setattr(kernels, "measure", once)
    document = kernels.run(KernelOptions(small=True))
    assert document.interrupted
    assert {row.name for row in document.rows} == {SMALL[0].name}
    assert "interrupted" in report.html(document)


def test_an_unknown_dtype_is_one_line() -> None:
    command = [sys.executable, "-m", "xfm_fast.cli", "bench", "kernels", "--small", "--dtype", "int4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert 'Invalid value "int4" for --dtype. Choose from: "fp32", "fp16", "bf16"' in done.stderr
    assert "Traceback" not in done.stderr
