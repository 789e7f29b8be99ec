"""The studies in miniature: plan, reuse of finished runs, and the probe of the claims."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.cli.runner import invoke
from xfm_fast.errors import ConfigError, XFMError
from xfm_fast.io import write_bytes
from xfm_fast.models.xfm import XFM
from xfm_fast.reproduce import claims, tasks
from xfm_fast.reproduce.claims import PARTS, fit_probe, run_claims
from xfm_fast.tasks.task import TASKS


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Replaces the commands by the files that they leave; returns the arguments of each."""
    made: list[dict[str, str]] = []

    def pretend(command: Sequence[str]) -> None:
        arguments = dict(each.split("=", 1) for each in command[2:])
        made.append({"command": f"{command[0]} {command[1]}"} | arguments)
        folder = Path(arguments["checkpoint.folder"])
        if command[0] == "pretrain":
            (folder / "model").mkdir(parents=True)
            return
        names = TASKS[command[1].removesuffix("_tiny_shapes")].metrics
        for split, value in {"known": 80.0, "test": 60.0}.items():
            (folder / "evaluation" / split).mkdir(parents=True)
            metrics = dict.fromkeys(names, value + int(arguments["seed"]))
            # Whole, as the command writes it, because another thread reads the results so far.
            write_bytes({folder / "evaluation" / split / "metrics.json": json.dumps({"metrics": metrics}).encode()})

    monkeypatch.setattr(tasks, "_run", pretend)
    return made


def test_tasks_are_evaluated_on_both_splits_once(calls: list[dict[str, str]], tmp_path: Path) -> None:
    command = ["reproduce", "downstream", "--seeds", "2", "--out", str(tmp_path), "model.patch_size=4"]
    assert invoke(command).exit_code == 0
    plan = [f"finetune {recipe}" for recipe in tasks.RECIPES]
    assert sorted(call["command"] for call in calls) == sorted(["pretrain pretrain_tiny_shapes", *plan, *plan])
    for call in calls[1:]:
        assert "model.patch_size" not in call
        assert call["init.checkpoint"] == str(tmp_path / "pretrain_tiny_shapes")
        assert "_known." in call["data.splits.known"]
    results = json.loads((tmp_path / "downstream-tiny-shapes.json").read_text())
    assert results["missing"] == []
    by_seed = {"known": {"0": 80.0, "1": 81.0}, "test": {"0": 60.0, "1": 61.0}}
    assert [row["by_seed"] for row in results["rows"]] == [by_seed] * len(plan)
    page = (tmp_path / "downstream-tiny-shapes.md").read_text()
    assert "| `vqa_tiny_shapes` | exact_match | 80.0, 81.0 | 60.0, 61.0 |" in page

    assert invoke(command).exit_code == 0
    assert len(calls) == 1 + 2 * len(plan)
    with pytest.raises(XFMError, match=r"model\.patch_size=4"):
        tasks.run_tasks(tmp_path, overrides=())
    with pytest.raises(ConfigError, match="model"):
        tasks.run_tasks(tmp_path / "new", overrides=["model.patch=4"])
    assert not (tmp_path / "new").exists()


def test_failures_are_quoted() -> None:
    with pytest.raises(XFMError, match="no-such-command"):
        tasks._run(["no-such-command"])


SMALL = (
    "shapes={seed: 7, train: 60, val: 2, test: 2, resolution: 32}", "steps=2", "log.every=1", "model.vision_depth=1",
    "model.text_layers=1", "model.fusion_layers=1",
)  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "documentation", lambda: [f"sentence {n} of the documentation" for n in range(120)])
    monkeypatch.setattr(claims, "_VOCABULARY", 400)
    monkeypatch.setattr(claims, "_FITTED", 40)
    monkeypatch.setattr(claims, "_TESTED", 20)


@pytest.mark.slow
def test_claims_are_trained_measured_and_not_repeated(small: None, tmp_path: Path) -> None:
    """Two steps of every part: the parts start from each other, and a finished study is read."""
    done = invoke(["reproduce", "claims", *SMALL, "--seeds", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "claims-tiny-shapes.json").read_text())
    assert content["missing"] == []
    found = {name: by_seed["0"] for name, by_seed in content["parts"].items()}
    assert [*found] == [*PARTS]
    assert all(math.isfinite(value) for each in found.values() for value in each.values())
    # Language differs by stop-gradient, images by the target.
    losses = [found[name]["masked-word loss"] for name in ("text", "stop-gradient", "no stop-gradient")]
    assert len(set(losses)) == 3
    weights = [
        XFM.from_pretrained(tmp_path / "seed-0" / name / "model").encode_image(torch.ones(1, 3, 32, 32))
        for name in ("guided", "frozen", "no-MIM")
    ]
    assert not torch.allclose(weights[0], weights[1], rtol=0, atol=1e-7)
    assert not torch.allclose(weights[1], weights[2], rtol=0, atol=1e-7)
    rows = {(row["metric"], row["part"], row["minus"]): row for row in content["differences"]}
    row = rows["masked-word loss", "no stop-gradient", "stop-gradient"]
    assert (row["mean"], row["half"]) == (pytest.approx(losses[2] - losses[1]), None)
    assert "| no MIM | 1 |" in (tmp_path / "claims-tiny-shapes.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert json.loads(json.dumps(run_claims(tmp_path, seeds=1, overrides=SMALL))) == content
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == before
    with pytest.raises(XFMError, match="steps=2"):
        run_claims(tmp_path, seeds=1)


@pytest.mark.slow
def test_documentation_is_sentences() -> None:
    texts = claims.documentation()
    assert len(texts) == len(set(texts)) > 5000
    assert 0.1 < sum(map(claims.is_held_out, texts)) / len(texts) < 0.15


def test_probe_is_the_minimum_of_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(80, 6, generator=generator) * torch.tensor([1.0, 10, 0.1, 1, 1, 1]) + 3
    target = features[:, 1] / 10 + features[:, 3] > 4.5
    scores = fit_probe(features, target[:, None], strength=0.1, test=features)[:, 0]
    x = (features.double() - features.double().mean(0)) / features.double().std(0, correction=0)
    weights = torch.where(target, 0.5 / target.sum(), 0.5 / (~target).sum()).double()
    y = torch.where(target, 1.0, -1.0).double()
    # The normal equations of the weighted loss, with a column of ones for the bias.
    columns = torch.cat([x, torch.ones(80, 1)], 1)
    penalty = torch.diag(torch.tensor([0.1] * 6 + [0.0], dtype=torch.float64))
    solution = torch.linalg.solve(columns.T @ (weights[:, None] * columns) + penalty, columns.T @ (weights * y))
    torch.testing.assert_close(scores, columns @ solution, atol=1e-6, rtol=1e-6)
    constant = fit_probe(torch.ones(5, 2), target[:5, None], strength=0.1, test=torch.ones(3, 2))
    assert constant.isfinite().all()
