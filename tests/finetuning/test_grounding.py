"""Grounding from its files to its metrics, and the stage on captions of regions before it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.agreement import inputs_of, tensors, with_weights
from tests.cli.runner import invoke
from tests.conftest import config, load_json
from tests.finetuning.conftest import Make
from xfm_fast.config import XFMConfig
from xfm_fast.errors import DataError
from xfm_fast.finetuning.run import finetune
from xfm_fast.tasks.grounding import GroundingBatch, GroundingModel, GroundingOptions, GroundingRecord, GroundingTask
from xfm_fast.tokenizer import CaptionTokenizer

FILES = "grounding", "grounding_{}.json"
Open = Callable[..., GroundingTask]


@pytest.fixture
def task(world: Path, pretrained: Path) -> Open:
    """Makes the task on the small world."""

    def make(**options: Any) -> GroundingTask:
        tokenizer = CaptionTokenizer.from_files(pretrained)
        return GroundingTask(
            GroundingOptions(**options), XFMConfig.load(pretrained / "config.json"), tokenizer, images=world
        )

    return make


def record(**fields: Any) -> GroundingRecord:
    return GroundingRecord.model_validate({"image": "a.png", "text": "red star", "ref_id": 0} | fields)


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """An image of 60 x 40 pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_losses_are_the_official_ones(task: Open) -> None:
    x = {name.partition("/")[2]: t for name, t in inputs_of("tiny_b/ft_inputs", torch.float64).items()
         if name.startswith("grounding/")}  # fmt: skip
    truth = tensors("tiny_b/ft_outputs")
    model = with_weights(GroundingModel(config("tiny_b")), "tiny_b", torch.float64, "grounding")
    batch = GroundingBatch(
        image=x["image"], input_ids=x["text_ids"], attention_mask=x["text_atts"], boxes=x["target_bbox"]
    )
    losses = task().losses_of(model, batch)
    values = {name: loss.detach() for name, loss in losses.items()}
    assert set(losses) == set(GroundingTask.losses)
    assert float(values["bbox_l1"]) == pytest.approx(float(truth["grounding/loss_bbox"]), rel=1e-10)
    assert float(values["bbox_giou"]) == pytest.approx(float(truth["grounding/loss_giou"]), rel=1e-10)


@pytest.mark.parametrize("augment", [False, True])
def test_boxes_at_the_edge(task: Open, photo: Path, augment: bool) -> None:
    made = task(augment=augment)
    rounded = record(image=str(photo), bbox=(-0.5, 10, 60.9, 30.25))
    item: Any = made.item(rounded, generator())
    cx, cy, w, h = item.box.tolist()
    assert min(cx - w / 2, cy - h / 2) >= -1e-6
    assert max(cx + w / 2, cy + h / 2) <= 1 + 1e-6
    for box in ((10, 10, 55, 5), (0, 30, 5, 12)):
        with pytest.raises(DataError, match="60x40"):
            made.item(record(image=str(photo), bbox=box), generator())
    with pytest.raises(DataError, match=r"expression 0.*refs"):
        made.item(record(image=str(photo)), generator())


@torch.no_grad()
def test_boxes_are_in_pixels_and_expressions_grouped_by_image(task: Open, world: Path, photo: Path) -> None:
    made = task()
    records = [*made.records([world / "grounding_test.json"], "test")[:7], record(image=str(photo))]
    together = made.predict(made.build().eval(), records)
    cx, cy, w, h = together[-1]["relative"]
    assert together[-1]["bbox"] == pytest.approx([60 * (cx - w / 2), 40 * (cy - h / 2), 60 * w, 40 * h])
    groups = made.groups(records)
    assert sorted(number for group in groups for number in group) == [*range(8)]
    assert all(len({records[number].image for number in group}) == 1 for group in groups)
    assert len(groups) == len({each.image for each in records})


def test_score_and_file(task: Open) -> None:
    made = task()
    golden = load_json("metrics/grounding_inputs")
    records = [record(ref_id=each["ref_id"], bbox=each["ref_box_xywh"], split=each["split"]) for each in golden]
    rows = []
    for each in golden:
        cx, cy, w, h = each["pred_cxcywh_norm"]
        width, height = each["width"], each["height"]
        bbox = [width * (cx - w / 2), height * (cy - h / 2), width * w, height * h]
        rows.append({"bbox": bbox, "relative": each["pred_cxcywh_norm"]})
    metrics = made.score(rows, records)
    official = load_json("metrics/metrics")["grounding"]["result"]
    assert {f"{name.removeprefix('accuracy_')}_d": value / 100 for name, value in metrics.items()} == pytest.approx(
        official | {"accuracy_d": sum(each["iou"] >= 0.5 for each in golden) / len(golden)}
    )
    (file,) = made.files(rows, records).values()
    assert json.loads(file)[0] == {
        "ref_id": golden[0]["ref_id"], "pred": golden[0]["pred_cxcywh_norm"], "bbox": rows[0]["bbox"]
    }  # fmt: skip
    assert set(made.score(rows[:2], [record(bbox=each.bbox) for each in records[:2]])) == {"accuracy"}
    assert made.score(rows[:2], [record()] * 2) == {}
    with pytest.raises(DataError, match="1 of 2"):
        made.score(rows[:2], [record(), records[0]])


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


@pytest.fixture
def refer(tmp_path: Path) -> list[Path]:
    """RefCOCO's two files about four images, one a split."""
    splits = ("train", "val", "testA", "testB")
    refs = [
        {"ref_id": n, "ann_id": 10 + n, "image_id": n, "split": split, "sentences": [{"sent": "left star"}]}
        for n, split in enumerate(splits)
    ]
    instances = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 60, "height": 40} for n in range(4)],
        "annotations": [{"id": 10 + n, "bbox": [n, 2, 20, 10]} for n in range(4)],
    }
    paths = [tmp_path / "refs(unc).p", tmp_path / "instances.json"]
    paths[0].write_bytes(pickle.dumps(refs, protocol=2))
    paths[1].write_text(json.dumps(instances))
    return paths


def test_files_of_refer(task: Open, refer: list[Path], tmp_path: Path) -> None:
    """With arrays without boxes, and alone; training takes the split train, evaluation the others."""
    made = task()
    (alone,) = made.rows(refer)
    assert [alone.read(n).bbox for n in range(len(alone))] == [(0, 2, 20, 10)]
    (others,) = made.test_rows(refer, "test")
    assert [each.split for each in others.records()] == ["val", "testA", "testB"]
    assert others.label(0) == "ref_id 1, sentence 0"
    arrays = tmp_path / "arrays.json"
    arrays.write_text(json.dumps([{"image": "x.png", "text": "star", "ref_id": n} for n in (2, 3)]))
    (rows,) = made.test_rows([arrays, *refer], "test")
    assert [(each.image, each.bbox, each.split) for each in rows.records()] == [
        ("x.png", (2, 2, 20, 10), "testA"), ("x.png", (3, 2, 20, 10), "testB")
    ]  # fmt: skip
    with pytest.raises(DataError, match="train"):
        made.rows([arrays, *refer])
    with pytest.raises(DataError, match=r"1 .* 0 "):
        made.rows([arrays, refer[0]])


REGIONS = {"max_images": 4, "texts": 10, "max_tokens": 32}


def test_captions_of_regions(task: Open, world: Path) -> None:
    made = task(regions=REGIONS)
    (rows,) = made.rows([world / "regions_train.jsonl"])
    items = [made.item(rows.read(n), np.random.default_rng(n)) for n in range(4)]
    batch, half = made.collate(items, generator()), made.collate(items[:2], generator())
    assert (len(batch.input_ids), len(half.input_ids)) == (10, 5)
    assert batch.image_index is not None
    assert batch.is_image is not None
    assert batch.is_image.any()
    model = made.build().eval()
    losses = made.losses_of(model, batch)
    wanted = model(batch.image, batch.input_ids, batch.attention_mask, batch.boxes, batch.image_index, batch.is_image)
    assert (losses["bbox_l1"], losses["bbox_giou"]) == (wanted.l1, wanted.giou)
    # Captions of whole images have no box.
    boxed = ~batch.is_image
    only = model(
        batch.image, batch.input_ids[boxed], batch.attention_mask[boxed], batch.boxes[boxed], batch.image_index[boxed]
    )
    assert losses["bbox_l1"].item() == pytest.approx(only.l1.item(), rel=1e-5)


def test_regions_first_then_expressions(recipe: Make, world: Path, photo: Path, tmp_path: Path) -> None:
    domain = recipe(
        *FILES,
        task={"regions": REGIONS},
        steps=2,
        batch_size=4,
        data={"root": str(world), "train": "regions_train.jsonl"},
    )
    finetune(domain)
    after = recipe(
        *FILES, task={"augment": False}, steps=2, init={"checkpoint": domain.checkpoint.folder},
        checkpoint={"folder": str(tmp_path / "after")}, choose={"by": "accuracy", "split": "val"},
    )  # fmt: skip
    result = finetune(after)
    assert set(result.metrics) == {"val", "test"}
    boxes = json.loads((tmp_path / "after/evaluation/test/boxes.json").read_text())
    assert len(boxes) == len(json.loads((world / "grounding_test.json").read_text()))
    done = invoke(["predict", tmp_path / "after", photo, "red star", "circle"])
    assert [len(json.loads(line)["bbox"]) for line in done.stdout.splitlines()] == [4, 4]
    done = invoke(["evaluate", tmp_path / "after", "--split", "test", "--json"])
    assert json.loads(done.stdout) == {"test": result.metrics["test"]}
