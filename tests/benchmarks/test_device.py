"""The program for a bare GPU machine, rehearsed without a GPU: its limits, its rows, and what it must not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from xfm_fast.benchmarks import files
from xfm_fast.benchmarks.device import counters, proofs, schedule
from xfm_fast.benchmarks.device.__main__ import main
from xfm_fast.benchmarks.device.journal import Journal, row
from xfm_fast.benchmarks.device.schedule import Plan, run
from xfm_fast.benchmarks.device.stages import STAGES, Stage
from xfm_fast.benchmarks.device.table import duration
from xfm_fast.benchmarks.record import Document, Row
from xfm_fast.benchmarks.work import kernel_cases

ROOT = Path(__file__).resolve().parents[2]
# A stage that needs nothing, so that the schedule is tested in milliseconds.
MADE_UP = """
import os, subprocess, sys, time

def fine(context):
    context.add("made up", "work", "ours", dtype="bf16", seconds=[1e-3, 2e-3], host_s=5e-6, timed_by="graph replay")
    context.add_machine({"gpus": [{"name": "Made-up GPU"}], "torch": "9.9"})

def failing(context):
    context.add("made up", "before the failure", "ours", seconds=[1e-3])
    raise RuntimeError("the GPU fell off")

def hanging(context):
    context.add("made up", "before the limit", "ours", seconds=[1e-3])
    with context.journal.path.open("a") as file:
        file.write('{"stage": "hanging", "row": {"half')
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (context.out / "child").write_text(str(child.pid))
    time.sleep(60)

def told(context):
    context.add("made up", f"{context.device} {context.small} {context.left:.0f}", "ours")

def compiling(context):
    context.add("made up", os.environ["TRITON_CACHE_DIR"], "ours")
"""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made_up_stages.py").write_text(MADE_UP)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def stage(name: str, seconds: float = 10.0, **options: Any) -> Stage:
    return Stage(name, seconds, f"made_up_stages:{name}", (), **options)


def plan(out: Path, *stages: Stage, budget: float = 60.0, **options: Any) -> Plan:
    return Plan(stages, out, budget, "cpu", small=True, command=["device"], **options)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [entry["row"] for entry in Journal(out / "rows.jsonl").entries() if "row" in entry]


def ended(process: int) -> bool:
    """True if a process is gone, or waits to be buried by whoever adopted it."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


@pytest.mark.parametrize("carried", [None, "of another machine"])
def test_stages_share_what_is_compiled(carried: str | None, made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if carried is None:
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("TRITON_CACHE_DIR", carried)
    assert run(plan(made_up, stage("compiling"))) == 0
    assert carried or str(made_up / "triton") in [row["name"] for row in rows_of(made_up)]


def test_graphs_replay_attention_with_the_bias_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model gives it: captured graphs would make it anew at each replay."""
    (case, *_) = kernel_cases.cases(torch.device("cpu"), torch.float32, small=True)
    given: list[bool] = []
    attention = kernel_cases.ops.relpos_attention

    def recorded(*args: Any, bias: Any = None) -> Any:
        given.append(bias is not None)
        return attention(*args, bias=bias)

    monkeypatch.setattr(kernel_cases.ops, "relpos_attention", recorded)
    with torch.no_grad():
        case.ours(*case.inputs)
    case.ours(*case.inputs)
    assert given == [True, False]


def test_a_stage_that_fails_hangs_or_lacks_something_is_a_row(
    made_up: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (
        stage("failing", 300), stage("hanging", 20), stage("fine", 300), stage("fine", gpu=True),
        Stage("lacking", 10, "made_up_stages:fine", ("no_such_package",)), stage("fine", tool="no-such-program"),
    )  # fmt: skip
    # The limit of the one that hangs is a share of what is left.
    assert run(plan(made_up, *stages, budget=90.0)) == 1
    found = rows_of(made_up)
    status = [(row["name"], row["status"]) for row in found if row["work"] == "stage"]
    assert status == [
        ("stage failing", "failed"), ("stage hanging", "partial"), ("stage fine", "measured"),
        ("stage fine", "absent"), ("stage lacking", "absent"), ("stage fine", "absent"),
    ]  # fmt: skip
    reasons = {row["name"]: row["reason"] for row in found if row["status"] == "failed"}
    assert "RuntimeError: the GPU fell off" in reasons["stage failing"]
    names = [row["name"] for row in found if row["work"] == "made up"]
    assert names == ["before the failure", "before the limit", "work"], "what was measured before is kept"
    # Nothing that a stage started outlives it.
    child = int((made_up / "child").read_text())
    for _ in range(200):
        if ended(child):
            break
        time.sleep(0.1)
    assert ended(child)
    assert "Made-up GPU" in capsys.readouterr().out
    table = (made_up / "table.txt").read_text()
    for part in ("Made-up GPU, PyTorch 9.9", "2 ms", "5 µs", "no_such_package is not installed", "the GPU fell off"):
        assert part in table, table


def test_the_document_is_of_the_common_schema(made_up: Path) -> None:
    assert run(plan(made_up, stage("fine"), commit="abc123")) == 0
    document = files.load(made_up / "device.json")
    assert isinstance(document, Document)
    assert document.benchmark == "device"
    assert document.machine["commit"] == "abc123"
    measured = next(row for row in document.rows if row.work == "made up")
    assert (measured.host_s, measured.timed_by, measured.median_s) == (5e-6, "graph replay", 1.5e-3)
    assert document.ok


def test_a_budget_is_never_exceeded(made_up: Path) -> None:
    """Each of the stages would end by itself after a minute; none is let."""
    stages = [stage("hanging", 4) for _ in range(3)]
    assert run(plan(made_up, *stages, budget=6.0)) == 1
    statuses = [row["status"] for row in rows_of(made_up) if row["work"] == "stage"]
    assert statuses[0] == "partial"
    assert set(statuses) <= {"partial", "absent"}
    assert len(statuses) == 3


def test_an_earlier_run_leaves_nothing_behind(made_up: Path) -> None:
    for _ in range(2):
        run(plan(made_up, stage("told")))
    rows = rows_of(made_up)
    assert len(rows) == 2
    device, small, left = rows[0]["name"].split()
    assert (device, small) == ("cpu", "True")
    assert 0 < int(left) < 58, "a stage alone has the whole budget, but for what ends it"


def test_journal_survives_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    journal.add("one", row=row("w", "n", "c", seconds=[float("inf")]))
    with journal.path.open("a") as file:
        file.write('{"stage": "one", "row')
    journal.end_line()
    journal.add("two", row=row("w", "n", "c"))
    assert [entry["stage"] for entry in journal.entries()] == ["one", "two"]
    assert journal.entries()[0]["row"]["seconds"] == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--stages", "operations,nonsense"], "nonsense is unknown"), (["--budget", "0"], "leaves no time")],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "name another folder" in capsys.readouterr().err


def test_every_stage_has_its_program() -> None:
    from importlib import import_module

    for one in STAGES:
        module, _, function = one.program.partition(":")
        assert callable(getattr(import_module(f"xfm_fast.benchmarks.device.{module}"), function))
    assert sum(one.seconds for one in STAGES) == 540
    # Stages of kernels run where nothing but PyTorch and Triton is.
    kernels = ("machine", "ceilings", "precompile", "tests", "sanitizer", "operations", "counters", "tune")
    assert all("pydantic" not in one.needs for one in STAGES if one.name in kernels)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "tests/kernels/test_triton_gelu.py::test_strided[compiled-a b] PASSED [ 3%]",
            ("test_triton_gelu.py", "test_strided[compiled-a b]", "PASSED"),
        ),
        (
            "[gw3] [ 12%] FAILED tests/kernels/test_gpu.py::test_equal[x] ",
            ("test_gpu.py", "test_equal[x]", "FAILED"),
        ),
        ("FAILED tests/kernels/test_gpu.py::test_equal[x] - AssertionError", None),
        ("collected 3 items", None),
    ],
)  # fmt: skip
def test_outcomes_are_read(line: str, found: tuple[str, str, str] | None) -> None:
    assert proofs.outcome(line) == found


def test_modules_that_cannot_be_loaded_are_read() -> None:
    assert proofs.module_error("ERROR tests/kernels/test_gpu.py - ModuleNotFoundError") == "test_gpu.py"
    assert proofs.module_error("ERROR tests/kernels/test_gpu.py::test_x") is None


def test_counters_are_read(tmp_path: Path) -> None:
    file = tmp_path / "ncu.csv"
    file.write_text(
        "==PROF== Connected\n"
        '"ID","Kernel Name","gpu__time_duration.sum","sm__cycles_elapsed.max"\n'
        '"","","us","cycle"\n"0","forward_kernel","38.5","60,123"\n"1","dkdv_kernel","1,095.25","1"\n'
    )
    assert counters.read(file) == [
        ("forward_kernel", pytest.approx(38.5e-6)),
        ("dkdv_kernel", pytest.approx(1.09525e-3)),
    ]
    assert counters.read(tmp_path / "absent.csv") == []


def test_durations() -> None:
    assert [duration(value) for value in (None, 2.5, 0.0123, 3.25e-5)] == ["", "2.5 s", "12.3 ms", "32.5 µs"]


def test_a_gpu_stage_names_what_it_lacks() -> None:
    sanitizer = next(one for one in STAGES if one.name == "sanitizer")
    assert schedule.why_absent(sanitizer, "cpu") == "has nothing to do without a GPU"


def rehearse(out: Path, *arguments: str, path: Path | None = None) -> list[Row]:
    """The rows of the program itself, run as a user would, without a GPU."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*([str(path)] if path else []), str(ROOT)]), "OMP_NUM_THREADS": "1",
        # As on a machine without make, git and a home of its own.
        "PATH": str(Path(sys.executable).parent),
    }  # fmt: skip
    command = [sys.executable, "-m", "xfm_fast.benchmarks.device", "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(
        [*command, *arguments], env=environment, cwd=out.parent, capture_output=True, text=True, timeout=6000
    )
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-3000:]
    assert "saved:" in done.stdout
    return files.load(out / "device.json").rows


def test_kernel_stages_need_no_pydantic(tmp_path: Path) -> None:
    for name in ("pydantic", "cyclopts", "scipy", "annotated_types"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('{name} must not be needed here')\n")
    rows = rehearse(tmp_path / "out", "--stages", "operations,tune", "--budget", "3000", path=tmp_path)
    ours = [row for row in rows if row.work == "relpos_attention" and row.ours]
    assert {row.direction for row in ours} == {"forward", "backward"}
    assert all(row.measured and row.parity is not None and row.parity.passed for row in ours)
    assert any(other.contender == "eager" for other in ours[0].against)
    assert [row.status for row in rows if row.work == "stage"] == ["measured", "absent"]


@pytest.mark.slow
def test_the_whole_program_is_rehearsed(tmp_path: Path) -> None:
    rows = rehearse(tmp_path / "out", "--budget", "5400")
    stages = {row.name.removeprefix("stage "): row for row in rows if row.work == "stage"}
    assert list(stages) == [one.name for one in STAGES]
    for one in STAGES:
        assert stages[one.name].status == ("absent" if one.gpu else "measured"), stages[one.name].reason
    done = {row.work for row in rows if row.measured or row.status == "measured"}
    assert {"ceiling", "precompile", "tests", "relpos_attention", "encoder", "train-step", "rerank"} <= done
    assert {row.name.split()[0] for row in rows if row.work == "ceiling"} == {"copy", "product"}
    assert json.loads((tmp_path / "out" / "device.json").read_text())["machine"]["cores_logical"]
    tested = next(row for row in rows if row.work == "tests" and row.name == "test_triton_gelu.py")
    assert tested.items > 0
    assert {row.reason for row in rows if row.work == "encoder" and row.contender == "CUDA graph"} == {
        "CUDA graphs need a model on a GPU, not on cpu; call model.cuda() first"
    }
