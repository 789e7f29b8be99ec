"""The kernel benchmark measures what it says, checks before it times, and reports what could not run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.runner import invoke
from xfm_fast.benchmarks import kernels, markdown, results, stored
from xfm_fast.benchmarks.kernel_cases import Case, cases
from xfm_fast.benchmarks.kernels import measure
from xfm_fast.benchmarks.page import render
from xfm_fast.kernels import roofline

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = cases(CPU, torch.float32, small=True)


@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_every_contender_is_right_and_timed(case: Case) -> None:
    rows = measure(case, CPU, roofline.H100)
    for row in rows:
        if row.contender in case.bounds:
            assert row.error is None
            continue
        assert row.seconds is not None, row.note
        assert len(row.samples) >= 5
        assert row.share_of_floor is not None
        assert row.error is not None
        assert row.error < 1e-5
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
        assert rows["wrong", direction].seconds is None
        assert rows["wrong", direction].note.startswith("wrong: error 1")
        assert rows["broken", direction].seconds is None
        assert "size" in rows["broken", direction].note
        assert rows["xfm-fast", direction].seconds is not None


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
    assert {"machine", "commit", "command", "date", "rows"} <= document.keys()
    assert all(row["seconds"] > 0 for row in document["rows"] if row["contender"] == "xfm-fast")


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
    results.save_as(
        kernels.run(kernels.KernelOptions(small=True), command=["xfm-fast", "bench", "kernels"]).content, path
    )
    loaded = stored.load(path)
    eager = next(row for row in loaded["rows"] if row["contender"] == "eager" and row["direction"] == "forward")
    ours = next(row for row in loaded["rows"] if row["contender"] == "xfm-fast")
    ratio = stored.kernel_ratio(eager, loaded["rows"])
    assert ratio == eager["seconds"] / ours["seconds"]
    assert stored.kernel_ratio(ours, loaded["rows"]) is None
    page, table = render(loaded), markdown.tables(loaded)
    for row in loaded["rows"]:
        assert row["case"] in page
        assert (row["seconds"] is None) == (f"| {row['case']} | {row['direction']} | {row['contender']} |" not in table)
    assert f"{ratio:.2f}×" in page
    assert f"{ratio:.2f}x" in table
    assert "wrong &amp; odd: wrong: error" in page
    shown = invoke(["bench", "report", str(path)])
    assert f"{ratio:.2f}x" in shown.output, shown.output
    compared = invoke(["bench", "compare", str(path), str(path)])
    assert compared.exit_code == 0, compared.output
    assert "no difference" in compared.output


@pytest.mark.usefixtures("few_cases")
def test_an_interrupted_run_keeps_whole_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def once(case: Case, device: torch.device, gpu: roofline.GPU | None) -> list[kernels.KernelRow]:
        if done:
            raise KeyboardInterrupt
        done.append(case.name)
        return measure(case, device, gpu)

    monkeypatch.setattr(kernels, "measure", once)
    document = kernels.run(kernels.KernelOptions(small=True))
    assert document.interrupted
    assert {row["case"] for row in document.rows} == {SMALL[0].name}
    assert "interrupted" in render(document.content)


def test_an_unknown_dtype_is_one_line() -> None:
    command = [sys.executable, "-m", "xfm_fast.cli", "bench", "kernels", "--small", "--dtype", "int4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "--dtype 'int4' is unknown; choose one of fp32, fp16, bf16" in done.stderr
    assert "Traceback" not in done.stderr
