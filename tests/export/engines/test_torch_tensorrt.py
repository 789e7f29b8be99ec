"""Our graphs as `torch.compile(backend="tensorrt")` takes them: which operators no engine has, told without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.export.engines import torch_tensorrt_report

pytestmark = [
    pytest.mark.slow,  # downloads the package, four megabytes
    pytest.mark.skipif(sys.platform != "linux", reason="the package that is asked for is that of Linux"),
]
GRAPHS = ("vision", "text", "image_memory", "fusion", "nlvr2", "decoder_memory", "decoder_step")


def _package(cache: Path, version: str) -> Path:
    """Torch-TensorRT for RTX, less its libraries; kept for the next run of the tests."""
    folder = cache / version
    if not (folder / "torch_tensorrt").is_dir():
        options = ["--no-deps", "--only-binary=:all:", "--retries=0", "--timeout=10", "--quiet"]
        packages = [f"torch-tensorrt-rtx=={version}", "dllist", "psutil", "filelock"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), *packages],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"{packages[0]} cannot be had here ({done.stderr.strip()[-200:]})")
    # Without them the package is Python alone, which needs neither CUDA nor the TensorRT that they are linked to.
    for library in (folder / "torch_tensorrt").rglob("*.so"):
        if library.name.startswith(("libtorchtrt", "_C.")):
            library.unlink()
    return folder


@pytest.mark.parametrize("version", sorted({torch.__version__.partition("+")[0], "2.14.0"}))
def test_operators_go_into_engines(
    request: pytest.FixtureRequest, version: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """All of 2.14, whose Python takes an older PyTorch. Before it the numbers of positions stay with PyTorch: a running
    sum, which its engines have for known sizes alone.
    """
    pytest.importorskip("tensorrt_rtx", reason="the package looks at its version")
    # Without pytest's cache (-p no:cacheprovider) it is kept for this run.
    cache = getattr(request.config, "cache", None)
    kept = tmp_path_factory.mktemp("torch-tensorrt") if cache is None else cache.mkdir("torch-tensorrt")
    folder = _package(kept, version)
    done = subprocess.run(
        [sys.executable, "-m", torch_tensorrt_report.__name__, str(folder), *GRAPHS],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3], env=os.environ.copy(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "tensorrt" in found.pop("backends")
    older = [int(part) for part in version.split(".")[:2]] < [2, 14]
    left = {name: each["left"] for name, each in found.items() if each["left"]}
    assert left == ({"text": ["torch.ops.aten.cumsum.default"]} if older else {})
    parts = {name: len(each["parts"]) for name, each in found.items()}
    assert parts == dict.fromkeys(GRAPHS, 1) | ({"text": 3} if older else {})
