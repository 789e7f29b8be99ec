"""The real `tritonserver` of the nvidia-pytriton wheel, in an environment of its own: its stub needs NumPy below 2.

The environment holds the wheel and its needs; everything else is read from the environment that the tests run in. It is
made once, in `XFM_FAST_TRITON_ENV` or in a cache folder.
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[3]
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_WHEEL = "nvidia-pytriton>=0.7,<0.8"


def environment() -> Path:
    """Folder of the environment; the test is skipped, with the reason, where it cannot be had."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip(f"nvidia-pytriton has no wheel for {sys.platform} on {platform.machine()}")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    named = os.environ.get("XFM_FAST_TRITON_ENV")
    folder = Path(named) if named else cache / "xfm-fast" / f"tritonserver-py{_VERSION}"
    if not (folder / "bin" / "python").exists():
        _make(folder)
    site = folder / "lib" / f"python{_VERSION}" / "site-packages"
    if not (site / "pytriton" / "tritonserver" / "python_backend_stubs" / _VERSION).is_dir():
        pytest.skip(f"nvidia-pytriton in {folder} has no stub for Python {_VERSION}")
    # Behind the environment's own packages, so that its NumPy comes first.
    (site / "xfm_fast_tests.pth").write_text(f"{_ROOT}\n{sysconfig.get_paths()['purelib']}\n")
    return folder


def _make(folder: Path) -> None:
    try:
        venv.create(folder, with_pip=True)
        subprocess.run(
            [folder / "bin" / "python", "-m", "pip", "install", "--quiet", _WHEEL],
            check=True, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        pytest.skip(f"{_WHEEL} cannot be installed into an environment of its own: {reason}")


@contextmanager
def serving(repository: Path, folder: Path, scratch: Path) -> Iterator[str]:
    """Start the server, wait until all models are ready, and stop it afterwards; gives its HTTP address."""
    site = folder / "lib" / f"python{_VERSION}" / "site-packages"
    server = site / "pytriton" / "tritonserver"
    backends = scratch / "backends"
    shutil.copytree(server / "backends" / "python", backends / "python")
    shutil.copy(server / "python_backend_stubs" / _VERSION / "triton_python_backend_stub", backends / "python")
    libraries = [str(site / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    # The stub embeds Python and takes the environment of the `python3` that it finds.
    variables = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(libraries),
        "OMP_NUM_THREADS": "2",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    log = scratch / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                server / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={backends}",
                "--http-address=127.0.0.1", f"--http-port={address.rpartition(':')[2]}", "--allow-grpc=false",
                "--allow-metrics=false", "--exit-timeout-secs=10",
            ],
            env=variables, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            _wait(process, address, log)
            yield address
            assert process.poll() is None, f"the server died: {_tail(log)}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert process.poll() is None, f"the server did not start: {_tail(log)}"
        try:
            with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.3)
    raise AssertionError(f"the server is not ready after three minutes: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_bytes().decode(errors="replace")[-20_000:]
