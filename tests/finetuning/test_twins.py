"""The tiny twin of every task, a few steps of it: fine-tuned, killed, resumed, evaluated and asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import xfm_fast
from tests.finetuning.test_run import process
from tests.training.small_runs import in_processes
from xfm_fast.finetuning.kinds import TASKS
from xfm_fast.finetuning.recipe import load_finetune_recipe
from xfm_fast.finetuning.run import evaluate
from xfm_fast.reproduce.downstream import TWINS
from xfm_fast.training.recipe import FINETUNING, read_recipe, recipe_names

NAMES = [name for name in recipe_names(FINETUNING) if name.endswith("_tiny_shapes")]
IMAGES = "images/test/000001.png", "images/test/000002.png"
ASKED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "captioning": (IMAGES[:1], ()),
    "grounding": (IMAGES[:1], ("a red circle",)),
    "image": (IMAGES[:1], ()),
    "nlvr2": (IMAGES, ("both images show a star",)),
    "retrieval": (IMAGES[:1], ("a red circle", "a star")),
    "text": ((), ("there is a red circle", "there is a circle")),
    "vqa": (IMAGES[:1], ("what colour is the circle?",)),
}


def test_every_task_has_a_twin_and_a_place_in_the_study() -> None:
    assert {read_recipe(name, FINETUNING)["task"]["kind"] for name in NAMES} == TASKS.keys() - {"weak_grounding"}
    assert {twin.recipe for twin in TWINS} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps(name: str, world: Path, pretrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = [
        f"data.root={world}", "shapes=null", f"init.checkpoint={pretrained}", "epochs=1", "steps=3", "batch_size=4",
        "eval_batch_size=4", f"checkpoint={{folder: {folder}, every: 1}}", "log.every=1", "device=cpu",
    ]  # fmt: skip
    recipe = load_finetune_recipe(name, overrides)
    assert in_processes(process, 1, tmp_path / "meet", recipe, {"at_step": 2}) == [-9]
    assert in_processes(process, 1, tmp_path / "meet", recipe, {}) == [0]
    said: dict[str, Any] = json.loads((folder / "evaluation/test/metrics.json").read_text())["metrics"]
    assert said
    assert set(said) <= set(TASKS[recipe.task.kind].metrics)
    again = evaluate(recipe, folder, "test", tmp_path / "again")
    assert again == pytest.approx(said, abs=1e-6)
    images, texts = ASKED[recipe.task.kind]
    rows = xfm_fast.load(folder).predict([world / image for image in images], texts)
    assert len(rows) == 1
    assert json.loads(json.dumps(rows)) == rows
