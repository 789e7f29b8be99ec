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

from xfm_fast.benchmarks import device_stages, record
from xfm_fast.benchmarks.device import STAGES, Plan, Stage, read_entries, run
from xfm_fast.benchmarks.record import Result

ROOT = Path(__file__).resolve().parents[2]
# Stages without work, so that the schedule is tested in seconds.
MADE_UP = """
import os, subprocess, sys, time

def fine(context):
    context.add("made up", "work", "ours", dtype="bf16", seconds=[1e-3, 2e-3], host_s=5e-6, timed_by="graph replay")
    context.append(machine={"gpus": [{"name": "Made-up GPU"}], "torch": "9.9"})

def failing(context):
    context.add("made up", "before the failure", "ours", seconds=[1e-3])
    raise RuntimeError("the GPU fell off")

def hanging(context):
    context.add("made up", "before the limit", "ours", seconds=[1e-3])
    with (context.out / "rows.jsonl").open("a") as file:
        file.write('{"stage": "hanging", "row": {"half')
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (context.out / "child").write_text(str(child.pid))
    time.sleep(60)
"""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made_up_stages.py").write_text(MADE_UP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def stage(name: str, seconds: float = 10.0, **options: Any) -> Stage:
    return Stage(name, seconds, f"made_up_stages:{name}", **{"needs": (), **options})


def plan(out: Path, *stages: Stage, budget: float = 60.0, **options: Any) -> Plan:
    return Plan(stages, out, budget, "cpu", small=True, command=["device"], **options)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [entry["row"] for entry in read_entries(out / "rows.jsonl") if "row" in entry]


def has_ended(process: int) -> bool:
    """True if a process is gone, or a zombie of whoever adopted it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_stage_that_fails_hangs_or_lacks_something_is_a_row(
    made_up: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (
        stage("failing", 300), stage("hanging", 20), stage("fine", 300), stage("fine", gpu=True),
        stage("fine", needs=("no_such_package",)), stage("fine", tool="no-such-program"),
    )  # fmt: skip
    # The limit of the one that hangs is its share of what is left.
    assert run(plan(made_up, *stages, budget=90.0)) == 1
    rows = rows_of(made_up)
    status = [row["status"] for row in rows if row["work"] == "stage"]
    assert status == ["failed", "partial", "measured", "absent", "absent", "absent"]
    # Rows of a stage that was killed are kept, and its torn line spoils no other.
    names = [row["name"] for row in rows if row["work"] == "made up"]
    assert names == ["before the failure", "before the limit", "work"]
    child = int((made_up / "child").read_text())
    for _ in range(200):
        if has_ended(child):
            break
        time.sleep(0.1)
    assert has_ended(child)
    assert "Made-up GPU" in capsys.readouterr().out
    table = (made_up / "table.txt").read_text()
    for part in (
        "Made-up GPU, PyTorch 9.9",
        "1.5 ms",
        "5 µs",
        "no_such_package",
        "no-such-program",
        "the GPU fell off",
    ):
        assert part in table, table


def test_every_stage_has_its_program() -> None:
    assert all(callable(getattr(device_stages, one.program)) for one in STAGES)
    assert sum(one.seconds for one in STAGES) == 540
    # Stages of kernels need PyTorch and Triton alone.
    models = {"encoder", "step", "coco"}
    assert {one.name for one in STAGES if "pydantic" in one.needs} == models


def rehearse(out: Path, *arguments: str, path: Path | None = None) -> list[Result]:
    """The rows of the program, run as a user would, without a GPU."""
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
    return record.load(out / "device.json").rows


@pytest.mark.slow
def test_kernel_stages_need_no_pydantic(tmp_path: Path) -> None:
    for name in ("pydantic", "cyclopts", "scipy", "annotated_types"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('{name} must not be needed here')\n")
    rows = rehearse(tmp_path / "out", "--stages", "tests,operations,tune", "--budget", "3000", path=tmp_path)
    ours = [row for row in rows if row.work == "relpos_attention" and row.ours]
    assert {row.mode for row in ours} == {"forward", "backward"}
    assert all(row.measured and row.parity is not None and row.parity.passed for row in ours)
    assert any(other.backend == "eager" for other in ours[0].against)
    assert [row.status for row in rows if row.work == "stage"] == ["measured", "measured", "absent"]
    tested = next(row for row in rows if row.work == "tests" and row.name == "test_triton_contract.py")
    assert tested.items > 0
    assert tested.status == "measured"


@pytest.mark.slow
def test_the_whole_program_is_rehearsed(tmp_path: Path) -> None:
    rows = rehearse(tmp_path / "out", "--budget", "5400")
    stages = {row.name.removeprefix("stage "): row for row in rows if row.work == "stage"}
    assert list(stages) == [one.name for one in STAGES]
    for one in STAGES:
        assert stages[one.name].status == ("absent" if one.gpu else "measured"), stages[one.name].reason
    done = {row.work for row in rows if row.status == "measured"}
    assert {"ceiling", "tests", "relpos_attention", "encoder", "train-step", "rerank"} <= done
    assert {row.name.split()[0] for row in rows if row.work == "ceiling"} == {"copy", "product"}
    assert json.loads((tmp_path / "out" / "device.json").read_text())["machine"]["cores_logical"]
    assert {row.status for row in rows if row.work == "encoder" and row.backend == "CUDA graph"} == {"absent"}
