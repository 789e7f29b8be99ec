"""`xfm-fast export` as a user meets it."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.cli.runner import invoke
from xfm_fast.cli import export as commands
from xfm_fast.config import XFMConfig
from xfm_fast.export import onnx
from xfm_fast.export.expected import Reference, keep_reference
from xfm_fast.export.graphs import DTYPES, is_memory
from xfm_fast.export.manifest import Manifest, QuantisationRecord

pytest.importorskip("onnx", reason="exports to ONNX need onnx")
pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
pytest.importorskip("onnxruntime", reason="verification needs onnxruntime")


def _run(*arguments: str, expect: int = 0) -> str:
    """Run a command, check its exit code, and return its output."""
    done = invoke(["export", *arguments])
    assert done.exit_code == expect, done.output
    return done.output


def test_exit_codes_say_how_much_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    output = _run(
        "--random", "tiny", "--out", str(out), "--graphs", "image_memory", "--dtype", "fp16"
    )
    assert "verified" in output
    assert re.search(r"image_memory +memory .* ok", output)
    manifest = Manifest.load(out)
    assert (manifest.status, manifest.dtype, manifest.graph_names) == (
        "verified",
        "fp16",
        ("image_memory",),
    )
    assert manifest.source == "random weights of preset tiny"
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    assert "verified" in _run("verify", str(out))
    manifest, reference = Manifest.load(out), Reference.load(out)
    # Engines that cannot run here, built from graphs that were compared; and from graphs that were not.
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    engines = manifest.model_copy(
        update={"kind": "tensorrt-rtx", "graphs_verification": manifest.verification}
    )
    engines.save(out)
    assert "graphs verified: engine not run here: " in _run("verify", str(out), expect=3)
    engines.model_copy(update={"graphs_verification": None}).save(out)
    assert "unverified: " in _run("verify", str(out), expect=4)
    # Compared with the results of another model.
    shifted = {name: value + is_memory(name) for name, value in reference.tensors.items()}
    keep_reference(manifest, out, Reference(shifted, reference.rounding))
    manifest.save(out)
    assert "failed: " in _run("verify", str(out), expect=1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "--random"),
        (["--random", "tiny", "--sm", "80"], "--sm"),
        (["absent.th"], "absent.th"),
        (["--to", "tensorrt-rtx", "--random", "tiny", "--sm", "75"], "SM75"),
    ],
)
def test_errors_come_before_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], reason: str
) -> None:
    if "tensorrt-rtx" in options:
        pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(onnx, "write_onnx", lambda *_, **__: pytest.fail("exported"))
    assert reason in _run("--out", str(tmp_path / "out"), *options, expect=2)
    assert not (tmp_path / "out").exists()


def test_examples_are_photographs_where_there_are_any() -> None:
    pytest.importorskip("skimage")
    examples = commands.load_examples(XFMConfig.preset("tiny"), None, None, {"length": 40})
    assert "photographs" in examples.origin
    assert examples.pixels.shape[1:] == (3, 32, 32)
    assert {1, 2, 3, 5, 8, 13, 21, 34, 40} <= {*examples.attention_mask.sum(1).tolist()}


# Linux counts what a parent held at the start of a process into the peak of the process: this parent holds little.
_STARTER = """
import os, subprocess, sys

process = subprocess.Popen(sys.argv[2:])
_, status, used = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(used.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def _export(out: Path, command: str, preset: str, *options: str) -> tuple[int, int]:
    """Export a preset in a process of its own; returns its exit code and its peak in bytes."""
    started = [sys.executable, "-m", "xfm_fast", "export", "--to", command, "--random", preset]
    peak = out.with_name(f"{out.name}-peak")
    done = subprocess.run(
        [sys.executable, "-c", _STARTER, peak, *started, *options, "--out", str(out)], check=False
    )
    return done.returncode, int(peak.read_text()) << 10


@cache
def _library_bytes(command: str) -> int:
    """Return the peak of the same command on a model of less than 1 MB."""
    with tempfile.TemporaryDirectory() as scratch:
        return _export(Path(scratch, "tiny"), command, "tiny")[1]


def _base(out: Path, command: str, dtype: str, *options: str, expect: int = 0) -> Manifest:
    """Export the base model, which holds at most twice the fp32 weights, all together, beside the libraries."""
    code, peak = _export(out, command, "base", "--dtype", dtype, *options)
    assert code == expect
    manifest = Manifest.load(out)
    weights = sum(file.bytes for file in manifest.files if file.name.endswith((".onnx", ".engine")))
    fp32_bytes = weights * (4 // DTYPES[manifest.dtype].itemsize)
    assert peak - _library_bytes(command) <= 2 * fp32_bytes
    record = manifest.verification or manifest.graphs_verification
    assert record is not None
    assert not record.differing
    assert all(ranks.agreement >= 0.99 for ranks in record.ranks)
    return manifest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "size"), [("fp32", 224), ("fp32", 384), ("fp16", 224), ("bf16", 224)]
)
def test_base_model_on_photographs(tmp_path: Path, dtype: str, size: int) -> None:
    """Check the promise of fp32: 1e-4 on embeddings and scores, lengths 1 to 40, the order of candidates, memory."""
    manifest = _base(tmp_path / "out", "onnx", dtype, "--image-size", str(size))
    assert (manifest.status, manifest.reason) == ("verified", "")
    assert manifest.verification is not None
    errors = [check.max_error for check in manifest.verification.checks]
    assert dtype != "fp32" or all(error is not None and error <= 1e-4 for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_engines_of_the_base_model(dtype: str, tmp_path: Path) -> None:
    """Build all four graphs at their real size for three architectures; each engine is about its weights."""
    pytest.importorskip("tensorrt_rtx")
    manifest = _base(
        tmp_path,
        "tensorrt-rtx",
        dtype,
        "--sm",
        "80,89,120",
        expect=0 if torch.cuda.is_available() else 3,
    )
    megabytes = {
        record.name.removesuffix(".engine"): record.bytes / 1e6
        for record in manifest.files
        if record.name.endswith(".engine")
    }
    assert set(megabytes) == {"vision", "text", "image_memory", "fusion"}
    for name, size in (("vision", 172), ("text", 249), ("image_memory", 28), ("fusion", 227)):
        assert size * 0.9 < megabytes[name] * 2 / DTYPES[manifest.dtype].itemsize < size * 1.4, (
            megabytes
        )


@pytest.mark.parametrize(
    ("milliseconds", "launches", "lines"),
    [
        ((3.0, 2.0), [], ["1.50x the speed here (3.0 → 2.0 ms, run in turn)"]),
        ((2.0, 2.5), [], ["not faster here: 0.80x (2.0 → 2.5 ms, run in turn)"]),
        (
            (0.0, 0.0),
            [27, 28],
            ["launches of the engine's profiles: 27 and 28, without 8 bits 23 and 24"],
        ),
    ],
)
def test_what_8_bits_gain_is_said(
    milliseconds: tuple[float, float], launches: list[int], lines: list[str]
) -> None:
    wide, narrow = milliseconds
    record = QuantisationRecord(
        kind="int8", budget=0.99, cosine=0.995, products=24, kept=[], smoothed=0, wide_milliseconds=wide,
        milliseconds=narrow, launches=launches, wide_launches=[23, 24] if launches else [],
    )  # fmt: skip
    assert [*commands._costs(record)] == lines
