"""`pytest benchmarks/`: every operation and stage has a micro-benchmark, which runs and can be compared."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from xfm_fast.kernels import ops
from xfm_fast.models.xfm import XFM

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parents[2]
# Not calls of an inference: building, loading, settings; and what `fuse` and `image_memory` stand for.
NO_STAGES = {
    "from_official", "from_pretrained", "save_pretrained", "push_to_hub", "set_image_size", "require_head",
    "require_encoder", "load_tokenizer", "packed_memory", "encode", "match", "ground", "similarity", "forward", "cast",
    "quantise", "dequantise", "freeze", "unfreeze", "train",
}  # fmt: skip


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-p", "no:cacheprovider", *arguments]
    # pytest-benchmark times nothing in a worker of pytest-xdist, which this process may be.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_every_operation_and_stage_runs_at_the_small_size() -> None:
    done = _pytest("-k", "tiny", "--benchmark-disable", "-v")
    assert done.returncode == 0, done.stdout[-3000:]
    ran = re.findall(r"::(\w+)\[(.*)\] PASSED", done.stdout)
    # A bias that is made once and given back has no gradient; it is a part of relpos_attention's time.
    others = ("Backend", "check_contents", "relpos_bias", "use_backend", "use_fp8")
    operations = {name for name in ops.__all__ if name not in others}
    for test in ("test_forward", "test_forward_and_backward"):
        names = {re.split("-", case)[0] for found, case in ran if found == test}
        assert names == operations
    own = {
        name
        for name, member in inspect.getmembers(XFM, inspect.isfunction)
        if not name.startswith("_") and member.__qualname__.startswith("XFM.")
    }
    stages = {case.split("-")[0] for found, case in ran if found == "test_stage"}
    assert own - NO_STAGES <= stages
    assert len([1 for found, _ in ran if found == "test_training_step"]) == 4
    assert len([1 for found, _ in ran if found == "test_loss"]) == 6


@pytest.mark.slow
def test_runs_can_be_compared(tmp_path: Path) -> None:
    options = ["-k", "tiny and test_forward and layer_norm-tiny-auto", "-q", f"--benchmark-storage={tmp_path.as_uri()}"]
    options += ["--benchmark-min-rounds=2", "--benchmark-max-time=0.01"]
    first = _pytest(*options, "--benchmark-autosave")
    assert first.returncode == 0, first.stdout[-3000:]
    assert list(tmp_path.rglob("*.json"))
    second = _pytest(*options, "--benchmark-compare", "--benchmark-compare-fail=median:100000%")
    assert second.returncode == 0, second.stdout[-3000:]
    assert "Comparing against benchmarks from" in second.stdout + second.stderr


def test_the_tests_of_the_project_leave_them_out() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"]
