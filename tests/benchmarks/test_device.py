"""The program for a bare GPU machine, rehearsed without a GPU: its limits, its rows, and what it must not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xfm_fast.benchmarks import device_stages, record
from xfm_fast.benchmarks.device import STAGES, Context, Plan, Stage, read_entries, run
from xfm_fast.benchmarks.record import Result
from xfm_fast.kernels import backend, prepared

ROOT = Path(__file__).resolve().parents[2]
# Stages without work, so that the schedule is tested in seconds.
MADE_UP = """
import os, subprocess, sys, time

def fine(context):
    context.add("made up", "work", "ours", dtype="bf16", seconds=[1e-3, 2e-3], host_s=5e-6, timed_by="graph replay")
    context.append(machine={"gpus": [{"name": "Made-up GPU"}], "torch": "9.9"})

def checking(context):
    context.append(absent={"fine": "the compilers have a fault"})

def unprepared(context):
    from xfm_fast.kernels.prepared import NotPreparedError
    raise NotPreparedError("dq_kernel is not among the prepared kernels")

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
        stage("failing", 300),
        stage("hanging", 20),
        stage("fine", 300),
        stage("fine", gpu=True),
        stage("fine", needs=("no_such_package",)),
        stage("fine", tool="no-such-program"),
    )
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
    for word in (
        "Made-up GPU, PyTorch 9.9",
        "1.5 ms",
        "5 µs",
        "no_such_package",
        "no-such-program",
        "the GPU fell off",
    ):
        assert word in table, table


def test_what_cannot_run_is_absent_with_the_reason(made_up: Path) -> None:
    """Known from the first stage before it begins, or when a kernel is refused."""
    assert run(plan(made_up, stage("checking"), stage("fine"), stage("unprepared", 60))) == 0
    reasons = {row["name"]: (row["status"], row.get("reason")) for row in rows_of(made_up)}
    assert reasons == {
        "stage checking": ("measured", None),
        "stage fine": ("absent", "the compilers have a fault"),
        "stage unprepared": ("absent", "dq_kernel is not among the prepared kernels"),
    }


def test_kernels_of_another_folder_have_a_cache_of_their_own(
    made_up: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton does not replace what it finds in its cache."""
    (made_up.parent / "made_up_stages.py").write_text(
        "import os\n\ndef fine(context):\n    context.append(cache=os.environ['TRITON_CACHE_DIR'])\n"
    )
    caches = []
    for manifest in (None, "{}", "{ }"):
        if manifest is not None:
            (made_up / "manifest.json").write_text(manifest)
            monkeypatch.setenv("XFM_PREPARED_KERNELS", str(made_up))
        assert run(plan(made_up, stage("fine"))) == 0
        caches += [
            entry["cache"] for entry in read_entries(made_up / "rows.jsonl") if "cache" in entry
        ]
    assert len(set(caches)) == 3
    assert caches[0] == str(made_up / "triton")


MACHINE = {"get_device_capability": (9, 0), "get_device_name": "Made-up H100", "is_available": True}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[dict[str, str], str]]:
    """Pretend to be a Hopper GPU with Triton 3.6; return a check: reasons by stage, and that of its row."""
    for name, value in MACHINE.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(backend, "compiler_versions", lambda arch=90: ("3.6.0", "12.8"))
    monkeypatch.setattr(device_stages, "compiler_versions", lambda arch=90: ("3.6.0", "12.8"))
    monkeypatch.setattr(device_stages, "_launch_one", lambda device: None)
    monkeypatch.delenv("XFM_PREPARED_KERNELS", raising=False)

    def check(out: Path) -> tuple[dict[str, str], str]:
        device_stages.check_stages(Context("check", "cuda", False, out, time.monotonic() + 60))
        absent, row = read_entries(out / "rows.jsonl")[-2:]
        return absent["absent"], row["row"]["reason"]

    return check


def test_the_check_says_which_stages_can_run(
    tmp_path: Path,
    hopper: Callable[[Path], tuple[dict[str, str], str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention = {"sanitizer", "encoder", "step", "coco", "tune"}
    absent, note = hopper(tmp_path)
    assert absent.keys() == attention
    assert all(
        "Triton 3.6.0 lacks fences" in reason and "--kernels" in reason
        for reason in absent.values()
    )
    assert "Made-up H100, compute capability 9.0; Triton 3.6.0, ptxas 12.8" in note

    monkeypatch.setenv("XFM_PREPARED_KERNELS", str(tmp_path / "none"))
    absent, note = hopper(tmp_path)
    assert absent.keys() == attention
    assert "cannot be read" in absent["tune"]

    manifest = prepared.Manifest(1, 90, ["3.9.0", "13.4"], "", {"operations": 9, "encoder": 2}, [])
    monkeypatch.setattr(prepared, "install", lambda folder, arch: manifest)
    absent, note = hopper(tmp_path)
    assert absent.keys() == attention - {"encoder"}
    assert "kernels for sm_90 by Triton 3.9.0 and ptxas 13.4" in note

    # A kernel that is wrong, or that cannot be compiled.
    monkeypatch.setattr(
        device_stages, "_launch_one", lambda device: torch.testing.assert_close(1.0, 2.0)
    )
    absent, note = hopper(tmp_path)
    assert absent.keys() == {stage.name for stage in STAGES if stage.gpu or "triton" in stage.needs}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent, note = hopper(tmp_path)
    assert absent.keys() == {stage.name for stage in STAGES} - {"check"}
    assert "finds no device 'cuda'" in note


def test_every_stage_has_its_program() -> None:
    assert all(callable(getattr(device_stages, stage.program)) for stage in STAGES)
    assert sum(stage.seconds for stage in STAGES) == 540
    # Stages of kernels need PyTorch and Triton alone.
    models = {"encoder", "step", "coco"}
    assert {stage.name for stage in STAGES if "pydantic" in stage.needs} == models


def rehearse(out: Path, *arguments: str, path: Path | None = None) -> list[Result]:
    """Run the program as a user would, without a GPU, and return its rows."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*([str(path)] if path else []), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        # As on a machine without make, git and a home of its own.
        "PATH": str(Path(sys.executable).parent),
    }
    command = [
        sys.executable,
        "-m",
        "xfm_fast.benchmarks.device",
        "--device",
        "cpu",
        "--small",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, *arguments],
        env=environment,
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=6000,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-3000:]
    return record.load(out / "device.json").rows


@pytest.mark.slow
def test_kernel_stages_need_no_pydantic(tmp_path: Path) -> None:
    for name in ("pydantic", "cyclopts", "scipy", "annotated_types"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            f"raise ImportError('{name} must not be needed here')\n"
        )
    rows = rehearse(
        tmp_path / "out", "--stages", "tests,operations,tune", "--budget", "3000", path=tmp_path
    )
    ours = [row for row in rows if row.work == "relpos_attention" and row.ours]
    assert {row.mode for row in ours} == {"forward", "backward"}
    assert all(row.measured and row.parity is not None and row.parity.passed for row in ours)
    assert any(other.backend == "eager" for other in ours[0].against)
    # The check is always there.
    assert [row.status for row in rows if row.work == "stage"] == [
        "measured",
        "measured",
        "measured",
        "absent",
    ]
    tested = next(
        row for row in rows if row.work == "tests" and row.name == "test_triton_contract.py"
    )
    assert tested.items > 0
    assert tested.status == "measured"


@pytest.mark.slow
def test_the_whole_program_is_rehearsed(tmp_path: Path) -> None:
    rows = rehearse(tmp_path / "out", "--budget", "5400")
    stages = {row.name.removeprefix("stage "): row for row in rows if row.work == "stage"}
    assert list(stages) == [stage.name for stage in STAGES]
    for stage in STAGES:
        assert stages[stage.name].status == ("absent" if stage.gpu else "measured"), stages[
            stage.name
        ].reason
    done = {row.work for row in rows if row.status == "measured"}
    assert {"ceiling", "tests", "relpos_attention", "encoder", "train-step", "rerank"} <= done
    assert {row.name.split()[0] for row in rows if row.work == "ceiling"} == {"copy", "GEMM"}
    assert json.loads((tmp_path / "out" / "device.json").read_text())["machine"]["cores_logical"]
    assert {
        row.status for row in rows if row.work == "encoder" and row.backend == "CUDA graph"
    } == {"absent"}
