"""Grounding by heat over detections: from files to the metric, with weights of retrieval, and what
is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.cli.runner import invoke
from tests.finetuning.conftest import Make
from xfm_fast import XFM
from xfm_fast.errors import CheckpointError, DataError, InputError
from xfm_fast.finetuning.prediction import load
from xfm_fast.finetuning.recipe import FinetuneRecipe, open_task
from xfm_fast.finetuning.run import evaluate, finetune
from xfm_fast.tasks.weak_grounding import best_box, boxes_of, cross_attention_heatmap


@pytest.fixture
def detections(world: Path, tmp_path: Path) -> dict[str, list[list[float]]]:
    """Write every box of the world's files, as a detector would list them."""
    boxes_by_image: dict[str, list[list[float]]] = {}
    for split in ("val", "test"):
        for element in json.loads((world / f"grounding_{split}.json").read_text()):
            boxes = boxes_by_image.setdefault(element["image"], [])
            if element["bbox"] not in boxes:
                boxes.append(element["bbox"])
    (tmp_path / "dets.json").write_text(json.dumps(boxes_by_image))
    return boxes_by_image


@pytest.fixture
def weak(recipe: Make, world: Path, tmp_path: Path, detections: Any) -> FinetuneRecipe:
    boxes = str(tmp_path / "dets.json")
    splits = {split: [f"grounding_{split}.json", boxes] for split in ("val", "test")}
    data = {"root": str(world), "train": "grounding_train.json", "splits": splits}
    return recipe(
        "weak_grounding", "", task={"augment": False, "max_tokens": 32}, data=data, steps=2
    )


def test_heat_chooses_a_detection(weak: FinetuneRecipe, world: Path, tmp_path: Path) -> None:
    result = finetune(weak)
    assert 0 <= result.metrics["test"]["accuracy"] <= 100
    task = open_task(weak)
    records = task.records(weak.paths_of("test"), "test")[:6]
    predictor = load(weak.checkpoint.folder)
    assert isinstance(predictor.model, XFM)
    rows = task.predict(predictor.model, records)
    for row, record in zip(rows, records, strict=True):
        assert row["bbox"] in [list(box) for box in record.detected]
    # The definition, one expression at a time.
    record, ids = records[0], task.tokenizer.encode([records[0].text], 32, pad_to_longest=True)
    heat = cross_attention_heatmap(
        predictor.model, task.pixels(record.image)[None], *ids, tokens=ids[1]
    )[0]
    selected = best_box(heat, torch.tensor(record.detected), (32, 32))
    assert rows[0]["bbox"] == list(record.detected[selected])
    with pytest.raises(InputError, match="--heatmap OUT"):
        predictor.predict(["a.png"], ["a circle"])

    boxes, drawn = tmp_path / "own.json", tmp_path / "heat.png"
    boxes.write_text(json.dumps({Path(record.image).name: record.detected}))
    options = ["--heatmap", drawn, "--detections", boxes]
    done = invoke(["predict", weak.checkpoint.folder, world / record.image, record.text, *options])
    assert json.loads(done.stdout)["bbox"] in [list(box) for box in record.detected]
    assert Image.open(drawn).size == (32, 32)


def test_weights_of_other_tasks(weak: FinetuneRecipe, recipe: Make, tmp_path: Path) -> None:
    retrieval = recipe(
        "retrieval",
        "retrieval_{}.json",
        steps=1,
        checkpoint={"folder": str(tmp_path / "retrieval")},
    )
    finetune(retrieval)
    assert "accuracy" in evaluate(weak, tmp_path / "retrieval", "val", tmp_path / "a")
    task = {"format": 1, "task": {"kind": "image", "labels": ["a", "b"]}}
    (tmp_path / "retrieval/model/task.json").write_text(json.dumps(task))
    with pytest.raises(CheckpointError, match="image"):
        evaluate(weak, tmp_path / "retrieval", "val", tmp_path / "c")


def test_detections_are_found_or_named(weak: FinetuneRecipe, world: Path) -> None:
    box = torch.ones(1, 4)
    for name in ("a/COCO_train2014_000000000123.jpg", "COCO_train2014_000000000123.jpg", "123"):
        assert boxes_of("a/COCO_train2014_000000000123.jpg", {name: box}) is box
    with pytest.raises(DataError, match=r"x/7\.png.* 7\.png.* 7"):
        boxes_of("x/7.png", {"8": box})
    task = open_task(weak)
    with pytest.raises(DataError, match=r"data\.splits\.val"):
        task.records([world / "grounding_val.json"], "val")
