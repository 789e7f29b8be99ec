"""The command line as a user meets it: in a process of its own."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import xfm_fast

ROOT = Path(__file__).resolve().parents[2]
TINY = ["bench", "--preset", "tiny", "--quick", "--threads", "1"]


def _run(
    *arguments: str, cwd: Path = ROOT, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "140"}
    return subprocess.run(
        [sys.executable, "-m", "xfm_fast.cli", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        preexec_fn=before,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        Image.fromarray(noise.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text(f"a picture called {name} that shows nothing but coloured noise\n")
    (folder / "broken.jpg").write_bytes((folder / "one.jpg").read_bytes()[:500])
    (folder / "broken.txt").write_text("a file that was cut\n")
    return folder


def test_help_is_quick_and_does_not_load_torch() -> None:
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        done = _run("--help")
        best = min(best, time.perf_counter() - begun)
        assert done.returncode == 0
    assert all(command in done.stdout for command in ("bench", "info", "convert"))
    assert best < 1.5
    code = "import sys, xfm_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_version() -> None:
    assert _run("--version").stdout.strip() == f"xfm-fast {xfm_fast.__version__}"


def test_bench_from_end_to_end(photos: Path, tmp_path: Path) -> None:
    done = _run(*TINY, "--data", str(photos), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout
    assert re.search(r"skipped 1:\s+broken\.jpg: .*truncated", done.stdout)
    assert "random weights" in done.stdout
    latest = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert latest["data"]["photos"] == 3
    assert latest["command"][:2] == ["xfm-fast", "bench"]
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_full_disk_prints_the_table_and_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    done = _run(*TINY, "--data", str(photos), "--out", str(tmp_path / "out"), before=small_files_only)
    assert done.returncode == 2
    assert "speed-up" in done.stdout
    assert done.stderr.startswith("xfm-fast: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--preset", "huge"], "choose one of base, tiny"),
        ([*TINY, "--dtype", "fp8"], "choose from fp32, bf16"),
        ([*TINY, "--data", "absent"], "not a folder"),
        ([*TINY, "--checkpoint", "absent.pth"], "does not exist"),
        ([*TINY, "--tokenizer", "absent"], "holds no tokenizer"),
        (["convert", "absent.th", "out"], "does not exist"),
        (["convert", "absent.th", "out", "--to", "onnx"], 'Choose from: "official", "xfm"'),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = _run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_info_as_tables_and_as_json() -> None:
    done = _run("info")
    assert done.returncode == 0, done.stderr
    for word in ("processor", "AVX2" if "x86" in os.uname().machine else "NEON", "onnxruntime", "flash-attn", "linear"):
        assert word in done.stdout
    facts = json.loads(_run("info", "--json").stdout)
    assert facts.keys() == {"machine", "packages", "paths"}
    assert {path["operation"] for path in facts["paths"]} >= {"linear", "linear_gelu", "linear_residual"}
    assert all(path["chosen"] for path in facts["paths"])


def test_convert_reports(
    load_tensors: Callable[[str], dict[str, Tensor]], golden: Callable[[str], Path], tmp_path: Path
) -> None:
    torch.save({"model": load_tensors("tiny_a/weights")}, tmp_path / "official.th")
    config = str(golden("tiny_a/config.json"))
    done = _run("convert", "official.th", str(tmp_path / "ours"), "--config", config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no output depends on" in done.stdout
    assert (tmp_path / "ours" / "model.safetensors").is_file()
    back = _run("convert", "ours", "back.th", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    assert "wrote back.th" in back.stdout
