"""Grounding from its files to its metrics, and batches of captioned regions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from tests.finetuning.conftest import Make
from xfm_fast.errors import DataError
from xfm_fast.finetuning.recipe import open_task
from xfm_fast.finetuning.run import finetune
from xfm_fast.tasks.evaluation import Evaluation
from xfm_fast.tasks.grounding import GroundingRecord, GroundingTask

FILES = "grounding", "grounding_{}.json"
Open = Callable[..., GroundingTask]


@pytest.fixture
def task(recipe: Make) -> Open:
    """Makes the task on the small world."""
    return lambda **options: cast(GroundingTask, open_task(recipe(*FILES, task=options)))


def record(**fields: Any) -> GroundingRecord:
    return GroundingRecord.model_validate(
        {"image": "a.png", "text": "red star", "ref_id": 0} | fields
    )


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Write an image of 60 x 40 pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("augment", [False, True])
def test_boxes_at_the_edge(task: Open, photo: Path, augment: bool) -> None:
    opened = task(augment=augment)
    rounded = record(image=str(photo), bbox=(-0.5, 10, 60.9, 30.25))
    item: Any = opened.item(rounded, generator())
    cx, cy, w, h = item.target.tolist()
    assert min(cx - w / 2, cy - h / 2) >= -1e-6
    assert max(cx + w / 2, cy + h / 2) <= 1 + 1e-6
    for box in ((10, 10, 55, 5), (0, 30, 5, 12)):
        with pytest.raises(DataError, match="60x40"):
            opened.item(record(image=str(photo), bbox=box), generator())
    with pytest.raises(DataError, match=r"expression 0.*refs"):
        opened.item(record(image=str(photo)), generator())


@torch.no_grad()
def test_boxes_are_in_pixels_and_expressions_grouped_by_image(
    task: Open, world: Path, photo: Path, tmp_path: Path
) -> None:
    opened = task()
    records = [
        *opened.records([world / "grounding_test.json"], "test")[:7],
        record(image=str(photo)),
    ]
    *_, last = opened.predict(opened.build().eval(), records)
    cx, cy, w, h = last["relative"]
    assert last["bbox"] == pytest.approx([60 * (cx - w / 2), 40 * (cy - h / 2), 60 * w, 40 * h])
    assert opened.groups_by_image
    batches = Evaluation(tmp_path, batch_size=1).batches(records, by_image=True)
    assert sorted(index for batch in batches for index in batch) == [*range(8)]
    assert all(len({records[index].image for index in batch}) == 1 for batch in batches)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([30, 30, 20, 20], r"expression 0 .*images/val/000000\.png.*32x32"),
        (None, "1 of 2"),
        ([1, 1, 0, 3], r"val\.json, element 0: .*area"),
    ],
)
def test_boxes_to_evaluate_on_are_judged_before_the_first_step(
    box: list[int] | None, message: str, recipe: Make, world: Path, tmp_path: Path
) -> None:
    good = {"image": "images/val/000000.png", "text": "a star", "ref_id": 1, "bbox": [3, 4, 5, 6]}
    path = tmp_path / "val.json"
    path.write_text(json.dumps([good | {"ref_id": 0, "bbox": box}, good]))
    data = {"root": str(world), "train": "grounding_train.json", "splits": {"val": str(path)}}
    with pytest.raises(DataError, match=message):
        finetune(recipe("grounding", "", data=data, steps=1))
    assert not (tmp_path / "run").exists()


def test_training_takes_the_split_train_and_evaluation_the_others(
    task: Open, tmp_path: Path
) -> None:
    path, splits = tmp_path / "arrays.json", ("train", "val", None)
    elements = [
        {"image": "x.png", "text": "star", "ref_id": n, "split": split}
        for n, split in enumerate(splits)
    ]
    path.write_text(json.dumps(elements))
    (rows,), (evaluated,) = task().rows([path]), task().rows([path], "test")
    trained: list[Any] = [rows.read(row) for row in range(len(rows))]
    assert [element.ref_id for element in trained] == [0, 2]
    assert [(element.ref_id, evaluated.label(n)) for n, element in enumerate(evaluated.records())] == [
        (1, "element 1"), (2, "element 2")
    ]  # fmt: skip
    path.write_text(json.dumps(elements[1:2]))
    with pytest.raises(DataError, match="train"):
        task().rows([path])


REGIONS = {"max_images": 4, "texts": 10, "max_tokens": 32}


def test_captions_of_regions(task: Open, world: Path) -> None:
    opened = task(regions=REGIONS)
    (rows,) = opened.rows([world / "regions_train.jsonl"])
    items = [opened.item(rows.read(n), np.random.default_rng(n)) for n in range(4)]
    batch, half = opened.collate(items, generator()), opened.collate(items[:2], generator())
    assert (len(batch.input_ids), len(half.input_ids)) == (10, 5)
    assert batch.image_index is not None
    assert batch.is_image is not None
    assert batch.is_image.any()
    model = opened.build().eval()
    losses = opened.losses_of(model, batch)
    expected = model(
        batch.image,
        batch.input_ids,
        batch.attention_mask,
        batch.boxes,
        batch.image_index,
        batch.is_image,
    )
    assert (losses["bbox_l1"], losses["bbox_giou"]) == (expected.l1, expected.giou)
    # Captions of whole images have no box.
    boxed = ~batch.is_image
    only = model(
        batch.image,
        batch.input_ids[boxed],
        batch.attention_mask[boxed],
        batch.boxes[boxed],
        batch.image_index[boxed],
    )
    assert losses["bbox_l1"].item() == pytest.approx(only.l1.item(), rel=1e-5)
