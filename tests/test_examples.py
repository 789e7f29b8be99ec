"""The examples run, and print what they did."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.search.conftest import write_model, write_picture
from xfm_fast import XFM

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example in a folder of its own, without the seconds that a process takes to start; what it prints."""

    def example(name: str, *arguments: str | Path) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return example


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(4):
        write_picture(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def test_they_are_short_and_all_are_tested() -> None:
    tested = {
        "accelerate_my_model", "search_my_photos", "finetune_on_my_csv", "build_an_engine", "what_fp8_costs",
        "gradient_flow", "emulate_a_kernel",
    }  # fmt: skip
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 50, path


def test_accelerate_my_model(run: Run) -> None:
    pytest.importorskip("transformers")
    out = run("accelerate_my_model")
    assert "0 not replaced" in out
    assert "times as fast" in out


def test_what_fp8_costs(run: Run, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_model(tmp_path / "weights", seed=0)
    for arguments in ((photos,), (photos, tmp_path / "weights")):
        out = run("what_fp8_costs", *arguments)
        assert "4 photographs: cosine 0.9" in out
        assert "of them keep the photograph" in out


def test_gradient_flow(run: Run, tmp_path: Path) -> None:
    write_model(tmp_path / "weights", seed=0)
    for arguments in ((), (tmp_path / "weights",)):
        head, *lines = (line.split() for line in run("gradient_flow", *arguments).splitlines())
        assert head == ["loss", "language", "vision", "fusion"]
        trained = {
            loss: "".join("0" if norm == "0" else "1" for norm in norms) for loss, *norms in lines
        }
        assert trained == {"mlm": "100", "itc": "110", "itm": "011", "imlm": "011", "mim": "010"}
    # Weights whose configuration lets the fusion losses through, and a vision encoder that nothing reaches.
    path = tmp_path / "weights/config.json"
    right = json.loads(path.read_text())
    path.write_text(json.dumps(right | {"detach_text_for_mlm": False}))
    with pytest.raises(SystemExit, match=r"imlm: language$"):
        run("gradient_flow", tmp_path / "weights")
    path.write_text(json.dumps(right))
    model = XFM.from_pretrained(tmp_path / "weights")
    torch.nn.init.zeros_(model.vision_proj.weight)
    model.save_pretrained(tmp_path / "weights")
    with pytest.raises(SystemExit, match="itc: vision"):
        run("gradient_flow", tmp_path / "weights")


def test_emulate_a_kernel() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, str(EXAMPLES / "emulate_a_kernel.py")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.count("0 hazards, right: True") == 4
    assert "load of 2 bytes" in out.splitlines()[-1]


def test_search_my_photos(run: Run, photos: Path, tmp_path: Path) -> None:
    (photos / "1.txt").write_text("a star\n")
    (photos / "broken.png").write_text("no image")
    write_model(tmp_path / "weights", seed=0)
    out = run("search_my_photos", photos, "a red circle", tmp_path / "weights")
    assert "4 images, of which 4 were read now" in out
    assert "left out broken.png: " in out
    assert out.count("%  ") == 4
    assert (tmp_path / "found.html").is_file()


def test_finetune_on_my_csv(run: Run, photos: Path, tmp_path: Path) -> None:
    rows = "".join(f'{number}.png,"a red circle, {number}"\n' for number in range(4))
    (photos / "pairs.csv").write_text("image,caption\n" + rows)
    write_model(tmp_path / "weights", seed=0)
    out = run(
        "finetune_on_my_csv", photos / "pairs.csv", tmp_path / "weights", "epochs=1", "workers=0"
    )
    assert "saved: runs/retrieval_csv" in out
    assert out.count("  a red circle, ") == 3


@pytest.mark.slow
def test_build_an_engine(run: Run, tmp_path: Path) -> None:
    for package in ("onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(package)
    write_model(tmp_path / "weights", seed=0)
    out = run("build_an_engine", tmp_path / "weights", tmp_path / "out")
    assert "ONNX Runtime differs from the model by" in out
    assert "for sm_80" in out or "no engine: " in out
