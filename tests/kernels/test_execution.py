"""The Triton tests exist twice, interpreted and compiled; the way to a GPU and back is proved without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.triton_testing import INTERPRETED, Carried, compiled_kernels, compiling_environment

from tests.kernels.cases import CASES, leaves, results  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# Half precision is there to be tested where the hardware computes it.
LEAST = {"test_triton_contract": 100, "test_triton_attention": 60, "test_triton_rows": 15}


def test_tests_of_a_gpu_are_collected_on_any_machine(tmp_path: Path) -> None:
    """Also on one that has PyTorch and Triton, and nothing that configurations of models need."""
    (tmp_path / "pydantic.py").write_text("raise ImportError('pydantic must not be needed here')\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-n0"]
    modules = sorted(path.stem for path in Path(__file__).parent.glob("test_triton_*.py"))
    files = [*(f"tests/kernels/{module}.py" for module in modules), "tests/kernels/test_gpu.py"]
    environment = compiling_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = [line for line in done.stdout.splitlines() if "::" in line]
    for module in modules:
        own = [line for line in listed if f"/{module}.py::" in line]
        assert len(own) >= LEAST.get(module, 1), f"{module}: {len(own)}"
        assert all("compiled" in line for line in own)
    assert any(re.search(r"compiled.*bf16|bf16.*compiled|dtype\d", line) for line in listed)
    # The model, the device guard: what is no test of a single kernel.
    for name in ("whole_model", "equal_bits", "other_gpu", "golden"):
        assert any(name in line for line in listed), name


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a GPU here, where the tests themselves are carried")
class TestCarrying:
    @pytest.mark.parametrize("name", ["relpos", "varlen", "linear_cross_entropy"])
    def test_operations_reach_the_launchers(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a GPU: CPU tensors, no interpreter that the backend would know of."""
        arguments = CASES[name].arguments(grad=True)
        expected = CASES[name].operation(**arguments, backend="triton")
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="triton"):
            CASES[name].operation(**arguments, backend="triton")
        with compiled_kernels(CPU):
            found = CASES[name].operation(**arguments, backend="triton")
            torch.autograd.grad(found.sum(), leaves(arguments))
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        "name", ["relpos", "varlen", "add_layer_norm", "embed_layer_norm", "linear_gelu", "linear_cross_entropy"]
    )
    def test_launchers_let_the_host_read_nothing(self, name: str) -> None:
        """Operators are one operation to whoever records a graph of the model: this looks at what is in them."""
        from xfm_fast.graphs import NoHostReads

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                seen.append(function.__name__)
                with NoHostReads():
                    return function(*args, **kwargs)

            return call

        arguments, seen = CASES[name].arguments(grad=True), list[str]()
        with compiled_kernels(CPU):
            modules = [m for n, m in sys.modules.items() if n.startswith("xfm_fast.kernels.triton.")]
            launchers = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, Carried)}
            for launcher in launchers.values():
                launcher.function = watched(launcher.function)
            found = results(CASES[name].operation(**arguments, backend="triton"))
            torch.autograd.grad(found, leaves(arguments), [torch.ones_like(t) for t in found])
        assert any("backward" in name for name in seen), seen
