"""The Triton tests a third time: compiled for GPUs and emulated, in processes of their own, where Triton compiles."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.runner import invoke
from tests.kernels.test_triton_contract import HALF
from tests.kernels.triton_testing import compiling_environment
from xfm_fast.kernels.backend import blackwell_fault, hopper_fault

CONTRACT = "tests/kernels/test_triton_contract.py"
each_target = pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])


def emulate(target: str, *arguments: str) -> None:
    """Run tests emulated, unless this Triton has faults there, which would be reported as hazards."""
    version = importlib.metadata.version("triton")
    faults = {"sm_90": hopper_fault(version, "13.3"), "sm_100": blackwell_fault(version)}
    if fault := faults.get(target):
        pytest.skip(fault)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *arguments,
    ]
    environment = compiling_environment() | {"TRITON_INTERPRET": "0", "XFM_EMULATE": target}
    folder = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("sm_80", marks=pytest.mark.slow),
        "sm_90",
        pytest.param("sm_100", marks=pytest.mark.slow),
        pytest.param("sm_120", marks=pytest.mark.slow),
    ],
)
def test_a_kernel_of_each_family_in_bf16(target: str) -> None:
    names = (
        HALF
        if target != "sm_120"
        else ("bias, windows", "varlen, zeros on both sides", "norm, scaled")
    )
    emulate(
        target, *(f"{CONTRACT}::test_results_and_gradients[{target}-{name}-bf16]" for name in names)
    )


def test_launches_of_any_kernel() -> None:
    emulate("sm_80", "tests/kernels/test_emulated_launches.py")


@pytest.mark.slow
@each_target
def test_the_audit_executes_every_operation(target: str) -> None:
    command = [
        sys.executable,
        "-m",
        "xfm_fast",
        "audit",
        "--execute",
        "--arch",
        target.removeprefix("sm_"),
    ]
    done = subprocess.run(
        command, env=compiling_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    for kernel in ("dkdv_kernel", "add_layer_norm_backward_kernel", "running_softmax_kernel"):
        assert f"{target} {kernel}: " in done.stdout


def test_execution_takes_no_other_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = invoke(["audit", "--execute", "--changed"])
    assert done.exit_code == 2
    assert "--execute" in done.stderr


@pytest.mark.slow
@each_target
def test_all_triton_tests(target: str) -> None:
    files = [str(path) for path in sorted(Path(__file__).parent.glob("test_triton_*.py"))]
    emulate(target, *files, "-m", "not gpu", "--deselect", f"{CONTRACT}::test_large_shapes")
