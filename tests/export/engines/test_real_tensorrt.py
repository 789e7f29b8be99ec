"""Our calls of TensorRT against its real Python module, of several versions; see `real_tensorrt`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.export.engines import real_tensorrt

VERSIONS = ("10.14.1.48.post1", "11.1.0.106", "11.4.0.106")

pytestmark = [
    pytest.mark.slow,  # downloads the bindings, a megabyte for each version
    pytest.mark.skipif(sys.platform != "linux", reason="the bindings that are asked for are those of Linux"),
]


@pytest.fixture(scope="module", params=VERSIONS)
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a version's bindings, kept from one run of the tests to the next, and of stubs of its libraries."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("the stubs are compiled by a C compiler")
    # Without pytest's cache (-p no:cacheprovider) they are kept for this run.
    cache = getattr(request.config, "cache", None)
    kept = tmp_path_factory.mktemp("tensorrt") if cache is None else cache.mkdir("tensorrt")
    folder = kept / request.param
    if not folder.is_dir():
        package = f"tensorrt-cu13-bindings=={request.param}"
        options = ["--no-deps", "--only-binary=:all:", "--retries=0", "--timeout=10", "--quiet"]
        with tempfile.TemporaryDirectory(dir=kept) as scratch:
            made = Path(scratch) / "bindings"
            done = subprocess.run(
                [sys.executable, "-m", "pip", "install", *options, "--target", str(made), package],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                pytest.skip(f"{package} cannot be had here ({done.stderr.strip()[-200:]})")
            # Another process of the tests may have been faster.
            with contextlib.suppress(OSError):
                made.rename(folder)
    stubs = tmp_path_factory.mktemp("stubs")
    real_tensorrt.compile_stubs(compiler, stubs, int(request.param.split(".")[0]))
    return folder, stubs


@pytest.mark.parametrize("scenario", real_tensorrt.SCENARIOS)
def test_calls_of_the_real_module(bindings: tuple[Path, Path], scenario: str, tmp_path: Path) -> None:
    folder, stubs = bindings
    done = subprocess.run(
        [sys.executable, "-m", real_tensorrt.__name__, str(folder), scenario, str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
        env=os.environ | {"LD_LIBRARY_PATH": str(stubs), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
