"""`xfm-fast export tensorrt-rtx` and `export tensorrt` from the command line; the whole base model when time allows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.fake_tensorrt import make_tensorrt
from xfm_fast import cli
from xfm_fast.export.manifest import Manifest


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["xfm-fast", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def rtx(out: Path, *more: str) -> tuple[str, ...]:
    return ("export", "tensorrt-rtx", "--out", str(out), "--preset", "tiny", "--sm", "80,89,120", *more)


def test_engines_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    arguments = ("--graphs", "image_memory", "--dtype", "fp16", "--profile", "latency:batch=1..1..2")
    assert run(monkeypatch, *rtx(tmp_path, *arguments)) == 0
    manifest = Manifest.load(tmp_path)
    assert manifest.status == ("verified" if torch.cuda.is_available() else "unverified")
    assert manifest.graph("image_memory").profiles[0].most == {"image_embeds": [2, 17, 64]}
    assert "image_memory.engine" in capsys.readouterr().out
    assert {"image_memory.engine", "manifest.json"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sm", "75"), "SM75 has no bf16"),
        (("--sm", "90"), "does not build for SM90"),
        (("--profile", "a:batch=1..9..8"), "tuned for 9"),
        (("--opset", "12"), "opset 12 is not supported"),
        (("--dtype", "fp8"), "dtype 'fp8' is unknown"),
        (("--quantize", "fp8"), "SM80 has no fp8"),
        (("--graphs", "visoin"), "graph 'visoin' is unknown"),
    ],
)
def test_bad_options_are_refused_at_once(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("xfm_fast.cli.export_model.load_subject", lambda *_, **__: pytest.fail("a model was made"))
    assert run(monkeypatch, *rtx(tmp_path, *arguments)) == 2
    assert message in capsys.readouterr().err


def test_tensorrt_without_tensorrt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("export", "tensorrt", "--out", str(tmp_path), "--preset", "tiny")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert run(monkeypatch, *command) == 2
    assert "pip install 'xfm-fast[tensorrt]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt())
    monkeypatch.setattr("xfm_fast.export.engine_library.local_capability", lambda: 89)
    for more, message in (
        (("--hardware-compatible", "all"), "choose from ampere_plus, same_compute_capability"),
        (("--plugins", "--quantize", "int8"), "choose one of them"),
        (("--sm", "80"), "not for SM80"),
    ):
        assert run(monkeypatch, *command, *more) == 2
        assert message in capsys.readouterr().err


def test_bars_follow_the_builder() -> None:
    from rich.progress import Progress

    from xfm_fast.cli.export_engines import _Bars

    bars = Progress(disable=True)
    shown: Any = _Bars(bars)
    shown.graph("vision", 1, 2)
    shown.phase("Building engine", 0, 6, 0)
    shown.phase("Optimizing graph", 3, 30, 1)
    assert [(task.description.strip(), task.completed, task.total) for task in bars.tasks] == [
        ("graph vision", 0, 2), ("Building engine", 0, 6), ("Optimizing graph", 3, 30),
    ]  # fmt: skip
    shown.phase("Computing profile costs", 1, 5, 1)
    shown.graph("text", 2, 2)
    assert [(task.description, task.completed) for task in bars.tasks] == [("graph text", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_engines_of_the_base_model(dtype: str, tmp_path: Path) -> None:
    """All four graphs at their real size, dynamic shapes, three architectures; each engine is about its weights."""
    pytest.importorskip("tensorrt_rtx")
    from xfm_fast.cli.export_model import load_subject
    from xfm_fast.export.engine_library import EngineOptions
    from xfm_fast.export.engines import export_engines

    model = load_subject(None, "base").model
    manifest = export_engines(
        model, tmp_path, "tensorrt-rtx", dtype=dtype, options=EngineOptions(targets=(80, 89, 120))  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    megabytes = {record.name.removesuffix(".engine"): record.bytes / 1e6 for record in manifest.files}
    assert set(megabytes) == {"vision", "text", "image_memory", "fusion"}
    for name, size in (("vision", 172), ("text", 249), ("image_memory", 28), ("fusion", 227)):
        assert size * 0.9 < megabytes[name] < size * 1.4, megabytes
