"""`xfm-fast reproduce ablations`: what it prints, what it writes, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from xfm_fast import cli_reproduce
from xfm_fast.errors import ConfigError
from xfm_fast.reproduce import ablations
from xfm_fast.reproduce.ablations import VARIANTS, Run
from xfm_fast.reproduce.evaluation import METRICS


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    def pretend(variant: str, seed: int, recipe: Any) -> Run | None:
        if variant == "neither" and seed == 1:
            return None
        return Run(variant, seed, dict.fromkeys(METRICS, 70.0 + seed), {"steps": 1, "seconds": 1, "cpu_seconds": 60})

    monkeypatch.setattr(ablations, "_train", pretend)
    made = typer.Typer()
    cli_reproduce.register(made)
    return made


def test_a_finished_study(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["reproduce", "ablations", "--seeds", "1", "--variants", "full, neither", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert "full method" in result.output
    assert "neither confirms nor refutes" in " ".join(result.output.split())
    content = json.loads((tmp_path / "ablations.json").read_text())
    assert [run["variant"] for run in content["runs"]] == ["full", "neither"]


def test_a_stopped_study_keeps_what_is_finished(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["reproduce", "ablations", "--seeds", "2", "--out", str(tmp_path)])
    assert result.exit_code == cli_reproduce.INTERRUPTED
    assert "1 runs are missing" in result.output
    content = json.loads((tmp_path / "ablations.json").read_text())
    assert len(content["runs"]) == 2 * len(VARIANTS) - 1
    assert content["missing"] == [{"variant": "neither", "seed": 1}]


def test_an_unknown_variant_is_refused(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["reproduce", "ablations", "--variants", "half", "--out", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    assert not list(tmp_path.iterdir())
