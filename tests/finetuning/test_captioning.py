"""Captioning from its files to its metrics, and training on pairs of pretraining."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import xfm_fast
from tests.cli.runner import invoke
from tests.finetuning.conftest import Make
from xfm_fast.data.images import load_image
from xfm_fast.errors import DataError
from xfm_fast.finetuning.recipe import open_task
from xfm_fast.finetuning.run import finetune
from xfm_fast.tasks.captioning import CaptioningTask

FILES = "captioning", "captioning_{}.json"
# Captions need not be whole.
SHORT = {"max_length": 12, "num_beams": 2}
Open = Callable[..., CaptioningTask]


@pytest.fixture
def task(recipe: Make) -> Open:
    """Makes the task on the small world."""
    return lambda **options: cast(CaptioningTask, open_task(recipe(*FILES, task=options)))


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_truth_in_a_file_of_its_own(task: Open, world: Path, tmp_path: Path) -> None:
    """Official: images in one file, and COCO captions, which need not name their images, in
    another.
    """
    opened = task()
    expected = opened.records([world / "captioning_val.json"], "test")
    images = tmp_path / "val.json"
    images.write_text(json.dumps([{"image": record.image} for record in expected]))
    truth = json.loads((world / "captioning_val_gt.json").read_text())
    for record in truth["images"]:
        del record["file_name"]
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(truth))
    records = opened.records([images, path], "test")
    assert [(record.identity, record.caption) for record in records] == [
        (record.identity, record.caption) for record in expected
    ]
    assert {record.caption for record in opened.records([images], "test")} == {None}
    alone = opened.records([world / "captioning_val_gt.json"], "test")
    assert [(record.image, record.caption) for record in alone] == [
        (record.image, record.caption) for record in expected
    ]
    path.write_text(json.dumps({"images": [], "annotations": [{"image_id": 1}]}))
    with pytest.raises(DataError, match=r"gt\.json.*annotation 0"):
        opened.records([images, path], "test")
    for name in ("twice/a_1.png", "twice/b_1.png"):
        (tmp_path / "twice").mkdir(exist_ok=True)
        shutil.copy(world / "images/test/000000.png", tmp_path / name)
    with pytest.raises(DataError, match=r"a_1\.png.*b_1\.png.* 1"):
        opened.records([tmp_path / "twice"], "test")


def test_pairs_of_pretraining(task: Open, world: Path, tmp_path: Path) -> None:
    opened = task(pairs={"augment": False})
    (rows,) = opened.rows([world / "pairs_train.jsonl"])
    record: Any = rows.read(0)
    item = opened.item(record, generator())
    assert torch.allclose(item.image, load_image(world / "images/train/000000.png", 32), atol=1e-5)
    assert opened.tokenizer.decode(item.ids).removeprefix("a picture of ") in record["desc"]
    assert opened.item(record, generator()).ids == item.ids
    with pytest.raises(DataError, match="'desc'"):
        opened.item({"binary": record["binary"]}, generator())
    by_path = task(
        pairs={
            "augment": False,
            "image_key": "image",
            "image_root": "images",
            "caption_key": "text",
        }
    )
    again = by_path.item({"image": "train/000000.png", "text": "a star"}, generator())
    assert torch.equal(again.image, item.image)


def test_captions_of_a_folder(recipe: Make, world: Path, tmp_path: Path) -> None:
    """And of one image."""
    opened = recipe(*FILES, task={"augment": False, **SHORT}, steps=2)
    result = finetune(opened)
    assert {"BLEU-4", "CIDEr-D", "ROUGE-L"} <= set(result.metrics["test"])
    written = json.loads((tmp_path / "run/evaluation/test/captions.json").read_text())
    assert [record["image_id"] for record in written] == [*range(12)]
    done = invoke(["predict", tmp_path / "run", world / "images/test"])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(row["image"]).name for row in rows] == [f"{index:06d}.png" for index in range(12)]
    assert [row["caption"] for row in rows] == [record["caption"] for record in written]
    (row,) = xfm_fast.load(tmp_path / "run").predict([world / "images/test/000003.png"])
    assert row["caption"] == written[3]["caption"]
