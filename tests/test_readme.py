"""Every command and program of the README works, and its numbers are those of the committed measurement."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import load_tensors
from xfm_fast import XFM, XFMConfig
from xfm_fast.benchmarks.files import load
from xfm_fast.benchmarks.report.readme import regenerated
from xfm_fast.benchmarks.report.table import number, times
from xfm_fast.data.shapes import write_world
from xfm_fast.errors import DataError
from xfm_fast.export.onnx import export_onnx
from xfm_fast.export.verification import verify_export
from xfm_fast.reproduce.ablations import TITLES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def _commands(program: str) -> list[str]:
    """Lines of the shell blocks that start `program`, without their comments."""
    lines = [line.split("#")[0].strip() for block in _blocks("bash") for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith(program + " ")})


def _mentioned(program: str) -> list[str]:
    """Commands in running text; some take minutes or need a GPU or the reader's own files."""
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    return sorted(set(re.findall(rf"`({program} [^`]*)`", text)))


def _small(program: str) -> str:
    """The same program on the model of milliseconds."""
    program = program.replace('"base"', '"tiny"').replace("384", "48").replace("224", "32")
    return program.replace("1230", "123")


@pytest.mark.parametrize("number", range(len(_blocks("python"))))
def test_programs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(_small(_blocks("python")[number]), f"README.md block {number}", "exec"), {})


@pytest.mark.parametrize("command", sorted({*_commands("make"), *_mentioned("make")}))
def test_make_targets(command: str) -> None:
    dry = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert dry.returncode == 0, dry.stderr
    if command.startswith("make bench"):
        assert "xfm-fast bench" in dry.stdout


@pytest.mark.parametrize("command", _commands("xfm-fast"))
def test_command_line(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "convert":
        config = XFMConfig.preset("tiny")
        if words[1] == "folder":
            XFM(config).save_pretrained(tmp_path / "folder")
        else:
            torch.save({"model": load_tensors("tiny_b/weights")}, tmp_path / words[1])
            words += ["--config", str(ROOT / "tests/golden/tiny_b/config.json")]
    if words[:2] == ["data", "check"]:
        write_world(tmp_path / "world", images={"train": 8, "val": 2, "test": 2})
    if words[:2] in (["export", "verify"], ["export", "model-repository"]):
        model = XFM(XFMConfig.preset("tiny")).eval()
        export_onnx(model, tmp_path / words[2], consumer="onnxruntime", dtype="fp32", graphs=("image_memory",))
        verify_export(tmp_path / words[2], model)
    run = [sys.executable, "-m", "xfm_fast.cli", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", _mentioned("xfm-fast"))
def test_commands_in_running_text_exist(command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if not word.startswith("-") and not word.isupper()]
    run = [sys.executable, "-m", "xfm_fast.cli", *words, "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    for option in re.findall(r"--[a-z-]+", command):
        assert option in done.stdout


def test_the_tables_are_those_of_the_committed_results() -> None:
    assert re.findall(r"<!-- bench:begin (\S+) -->", README), "the README has no generated table"
    assert regenerated(ROOT / "README.md") == README, "a table is stale: run make readme"


def test_a_stale_table_is_found_and_rewritten(tmp_path: Path) -> None:
    file = "benchmarks/results/cpu-avx2-2threads.json"
    (tmp_path / file).parent.mkdir(parents=True)
    shutil.copy(ROOT / file, tmp_path / file)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n<!-- bench:begin {file} -->\n| old |\n<!-- bench:end -->\nafter\n", encoding="utf-8")
    fresh = regenerated(readme)
    document = load(ROOT / file)
    rows = [row for row in document.measured if row.ours]
    assert len(rows) == 5
    for row in rows:
        official, ratio = document.reference_row(row), document.headline(row)
        assert row.throughput
        assert row.efficiency
        assert row.efficiency.mfu
        assert ratio
        assert official
        assert official.throughput
        rates = f"{number(row.throughput.value)} | {number(official.throughput.value)}"
        factor = f"{times(ratio.ratio)}{' †' if row.contended else ''} | {times(ratio.ratio)}"
        assert f"| {row.name}, {row.unit}/s | {row.dtype} | {rates} | {factor} | " in fresh
        assert f"| {row.efficiency.mfu:.0%} |" in fresh
    assert fresh.startswith("before\n<!-- bench:begin")
    assert fresh.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in fresh
    readme.write_text(fresh, encoding="utf-8")
    assert regenerated(readme) == fresh


def test_markers_that_do_not_pair_up_are_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:begin results.json -->\n| old |\n", encoding="utf-8")
    with pytest.raises(DataError, match="do not pair up"):
        regenerated(readme)


def test_the_ablations_are_those_of_the_committed_study() -> None:
    document = json.loads((ROOT / "benchmarks/results/ablations-tiny-shapes.json").read_text(encoding="utf-8"))
    for variant, title in TITLES.items():
        runs = [run for run in document["runs"] if run["variant"] == variant]
        assert runs
        cells = [
            ", ".join(f"{run['metrics'][metric]:.0f}" for run in runs)
            for metric in ("image_to_text_r1", "text_to_image_r1", "grounding")
        ]
        minutes = sum(run["cost"]["cpu_seconds"] for run in runs) / len(runs) / 60
        assert f"| {title} | {len(runs)} | {' | '.join(cells)} | {minutes:.1f} |" in README


def test_the_readme_has_the_sections_that_people_look_for() -> None:
    for heading in ("Two commands", "One real output", "Measured", "Use it", "Plug it into your own model", "Export"):
        assert f"\n## {heading}\n" in README
