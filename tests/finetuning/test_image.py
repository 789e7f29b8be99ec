"""Images in classes: the recipe's path against the module and golden, mixing, torchvision's sets,
what is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import xfm_fast
from tests.finetuning.conftest import Make
from tests.finetuning.official_data import fer, mnist
from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.finetuning.recipe import FinetuneRecipe, open_task
from xfm_fast.finetuning.run import finetune
from xfm_fast.tasks.image import ImageTask, ImageTaskOptions, open_torchvision
from xfm_fast.tasks.task import Item


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def mixing(**options: Any) -> ImageTask:
    return ImageTask(ImageTaskOptions(labels=("a", "b", "c"), **options), XFMConfig.preset("tiny"))


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_is_a_function_of_the_batch(options: dict[str, float]) -> None:
    task = mixing(**options)
    items = [Item(torch.full((3, 8, 8), float(n)), target=n) for n in range(3)]
    state = torch.get_rng_state()
    first, again, different = (task.collate(items, rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.targets, different.targets)
    assert torch.allclose(first.targets.sum(1), torch.ones(3))
    # Pixels are mixed in the proportion of the classes.
    classes = first.targets @ torch.arange(3.0)
    assert torch.allclose(first.image.mean((1, 2, 3)), classes, atol=1e-5)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Write two folders with two classes each, which a pixel tells apart."""
    for split in ("train", "val"):
        for name, colour in (("dark", 20), ("light", 220)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 36), (colour + index,) * 3).save(folder / f"{index}.png")
    return tmp_path


def of_folders(recipe: Make, folder: Path, **changes: Any) -> FinetuneRecipe:
    data = {"root": str(folder), "train": "train", "splits": {"val": "val"}}
    return recipe("image", "", data=data, **{"steps": 2, **changes})


def test_folders_of_classes(recipe: Make, folders: Path) -> None:
    result = finetune(
        of_folders(recipe, folders, task={"frozen": True, "mixup": 0.2, "label_smoothing": 0.1})
    )
    assert result.metrics["val"]["top5"] == 100
    said = json.loads((folders / "run/evaluation/val/predictions.json").read_text())
    assert [Path(row["image"]).parts[-2:] for row in said][::7] == [
        ("dark", "0.png"),
        ("light", "3.png"),
    ]
    predictor = xfm_fast.load(result.folder)
    first, second = predictor.predict([folders / "val/dark/0.png", folders / "val/light/1.png"])
    assert set(first["probabilities"]) == set(second["probabilities"]) == {"dark", "light"}
    with pytest.raises(InputError, match="images"):
        predictor.predict([], ["a"])


def test_a_set_of_torchvision(recipe: Make, tmp_path: Path) -> None:
    mnist(tmp_path)
    data = {"root": str(tmp_path), "train": ".", "splits": {"test": "."}}
    task = {"dataset": "mnist", "view": "probe", "frozen": True}
    probe = recipe("image", "", data=data, task=task, steps=2, workers=1)
    opened = open_task(probe)
    assert isinstance(opened, ImageTask)
    assert opened.options.labels[:2] == ("0 - zero", "1 - one")
    records = opened.records([tmp_path], "test")
    assert [(record.image, record.label) for record in records] == [
        ("test/0", "1 - one"),
        ("test/1", "0 - zero"),
    ]
    pixels = opened.view(records[0])
    assert pixels.shape == (3, 32, 32)
    assert float(pixels.mean()) == pytest.approx((210 / 255 - 0.5) / 0.5, abs=0.01)
    assert "top1" in finetune(probe).metrics["test"]


def test_a_set_without_splits_is_split_always_alike(tmp_path: Path) -> None:
    for name in ("001.axe", "002.bear"):
        folder = tmp_path / "caltech256" / "256_ObjectCategories" / name
        folder.mkdir(parents=True)
        for number in range(1, 6):
            Image.new("L", (9, 9)).save(folder / f"{name[:3]}_{number:04d}.jpg")
    train, test, again = (
        open_torchvision("Caltech256", tmp_path, split) for split in ("train", "test", "test")
    )
    assert sorted([*train.indices, *test.indices]) == [*range(10)]
    assert (len(test.indices), test.indices) == (2, again.indices)
    assert train.classes == ["001.axe", "002.bear"]
    assert [index // 5 for index in train.indices] == train.targets
    assert test.picture(test.indices[0]).mode == "RGB"


def test_the_test_split_of_fer2013_is_the_private_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fer(tmp_path)
    monkeypatch.setattr(
        torchvision.datasets.fer2013, "check_integrity", lambda path, md5=None: Path(path).exists()
    )
    assert [*open_torchvision("fer2013", tmp_path, "test").indices] == [3, 4]
