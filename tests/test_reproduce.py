"""The studies in miniature: plan, reuse of finished runs, baselines without images, and the probe of the claims."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.cli.runner import invoke
from xfm_fast.cli.options import UNFINISHED
from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import write_world
from xfm_fast.errors import ConfigError, XFMError
from xfm_fast.models.xfm import XFM
from xfm_fast.reproduce import claims, tasks
from xfm_fast.reproduce.claims import PARTS, fit_probe, run_claims
from xfm_fast.tasks.task import TASKS
from xfm_fast.tokenizer import CaptionTokenizer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Replaces the commands by the files that they leave; returns the arguments of each."""
    made: list[dict[str, str]] = []
    names = {name for kind in TASKS for name in TASKS[kind].metrics}

    def pretend(command: Sequence[str]) -> None:
        given = dict(each.split("=", 1) for each in command[2:])
        made.append({"command": f"{command[0]} {command[1]}"} | given)
        folder = Path(given["checkpoint.folder"])
        if command[0] == "pretrain":
            write_world(given["data"], images={"train": 60, "val": 4, "test": 6, "known": 6}, resolution=32)
            tokenizer = CaptionTokenizer.train_on_texts(["a red circle left of a star"], 300)
            config = XFMConfig.preset(
                "tiny", image_size=32, patch_size=8, vision_width=32, vision_depth=1, vision_heads=2, text_width=32,
                text_heads=2, text_layers=1, text_intermediate=32, fusion_layers=1, embed_dim=8,
                num_masking_patches=4, min_num_patches=1, vocab_size=tokenizer.vocab_size,
            )  # fmt: skip
            XFM(config).save_pretrained(folder / "model")
            tokenizer.save(folder / "model" / "tokenizer.json")
            return
        seed = int(given["seed"])
        for split, value in {"known": 80.0 + seed, "test": 60.0 + seed}.items():
            (folder / "evaluation" / split).mkdir(parents=True)
            metrics = dict.fromkeys(names, value)
            (folder / "evaluation" / split / "metrics.json").write_text(json.dumps({"metrics": metrics}))

    monkeypatch.setattr(tasks, "_run", pretend)
    return made


def test_tasks_are_evaluated_on_both_splits_once(calls: list[dict[str, str]], tmp_path: Path) -> None:
    given = ["reproduce", "downstream", "--seeds", "2", "--jobs", "1", "--out", str(tmp_path)]
    assert invoke([*given, "model.patch_size=4"]).exit_code == 0
    plan = [f"finetune {recipe}" for recipe in tasks.RECIPES]
    assert [call["command"] for call in calls] == ["pretrain pretrain_tiny_shapes", *plan, *plan]
    for call in calls[1:]:
        assert "model.patch_size" not in call
        assert call["init.checkpoint"] == str(tmp_path / "pretrain_tiny_shapes")
        assert (tmp_path / "shapes_world" / call["data.splits.known"]).is_file()
    results = json.loads((tmp_path / "downstream-tiny-shapes.json").read_text())
    assert results["missing"] == []
    by_seed = {"known": {"0": 80.0, "1": 81.0}, "test": {"0": 60.0, "1": 61.0}}
    assert all(row["by_seed"] == by_seed for row in results["rows"])

    chance = {row["recipe"]: row["without_looking"] for row in results["rows"]}
    assert chance["text_tiny_shapes"] == {"known": 50.0, "test": 50.0}
    files = {s: json.loads((tmp_path / f"shapes_world/vqa_{s}.json").read_text()) for s in ("train", "known")}
    answers = {split: [row["answer"][0] for row in rows] for split, rows in files.items()}
    common = max(dict.fromkeys(answers["train"]), key=answers["train"].count)
    expected = 100 * answers["known"].count(common) / len(answers["known"])
    assert chance["vqa_tiny_shapes"]["known"] == pytest.approx(expected)
    page = (tmp_path / "downstream-tiny-shapes.md").read_text()
    assert f"| `vqa_tiny_shapes` | exact_match | 80.0, 81.0 | 60.0, 61.0 | {expected:.1f}, " in page

    assert invoke([*given, "model.patch_size=4"]).exit_code == 0
    assert len(calls) == 1 + 2 * len(plan)
    with pytest.raises(XFMError, match=r"model\.patch_size=4"):
        tasks.run_tasks(tmp_path, jobs=1, overrides=())
    with pytest.raises(ConfigError, match="model"):
        tasks.run_tasks(tmp_path / "new", overrides=["model.patch=4"])
    assert not (tmp_path / "new").exists()


def test_failures_are_quoted() -> None:
    with pytest.raises(XFMError, match="no-such-command"):
        tasks._run(["no-such-command"])


def test_random_ranking() -> None:
    # One caption for each of four images: the right one is first once in four, and always among the first five.
    assert tasks.random_recall([1] * 4) == pytest.approx((25 + 100 + 100) / 3)
    # Of an image with two captions among four, one is first half of the time.
    assert tasks.random_recall([2, 2]) == pytest.approx((50 + 100 + 100 + 50 + 100 + 100) / 6)


SMALL = (
    "shapes={seed: 7, train: 60, val: 2, test: 2, resolution: 32}", "steps=2", "log.every=1", "model.vision_depth=1",
    "model.text_layers=1", "model.fusion_layers=1",
)  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "documentation", lambda: [f"sentence {n} of the documentation" for n in range(400)])
    monkeypatch.setattr(claims, "_VOCABULARY", 400)
    monkeypatch.setattr(claims, "_FITTED", 40)
    monkeypatch.setattr(claims, "_TESTED", 20)


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


def test_an_interrupted_study_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    monkeypatch.setattr(claims, "_run", lambda out, seed, name, overrides: False)
    done = invoke(["reproduce", "claims", "--seeds", "2", "--out", str(tmp_path)])
    assert done.exit_code == UNFINISHED
    assert len(json.loads((tmp_path / "claims-tiny-shapes.json").read_text())["missing"]) == 2 * len(PARTS)


def test_documentation_is_sentences() -> None:
    texts = claims.documentation()
    assert len(texts) == len(set(texts)) > 5000
    assert 0.1 < sum(map(claims.is_held_out, texts)) / len(texts) < 0.15


def test_probe_is_the_minimum_of_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(80, 6, generator=generator) * torch.tensor([1.0, 10, 0.1, 1, 1, 1]) + 3
    target = features[:, 1] / 10 + features[:, 3] > 4.5
    scores = fit_probe(features, target[:, None], strength=0.1, test=features)[:, 0]
    x = ((features - features.mean(0)) / features.std(0, correction=0)).double()
    weights = torch.where(target, 0.5 / target.sum(), 0.5 / (~target).sum()).double()
    y = torch.where(target, 1.0, -1.0).double()
    weight = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weights * (y - x @ weight - bias) ** 2).sum() + 0.1 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(scores, (x @ weight + bias).detach(), atol=1e-5, rtol=1e-4)
    constant = fit_probe(torch.ones(5, 2), target[:5, None], strength=0.1, test=torch.ones(3, 2))
    assert constant.isfinite().all()
