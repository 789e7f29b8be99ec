"""A small shapes dataset, and a pretrained model with random weights and its vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import write_world
from xfm_fast.finetuning.recipe import FinetuneRecipe
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

SMALL: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "vision_width": 32, "vision_depth": 2, "vision_heads": 2, "text_width": 32,
    "text_heads": 2, "text_layers": 2, "text_intermediate": 64, "fusion_layers": 2, "embed_dim": 16,
    "num_masking_patches": 6, "min_num_patches": 2, "hidden_dropout": 0.1, "drop_path_rate": 0.1,
}  # fmt: skip

Make = Callable[..., FinetuneRecipe]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a shapes world of 40 training scenes."""
    folder = tmp_path_factory.mktemp("shapes") / "world"
    write_world(folder, images={"train": 40, "val": 12, "test": 12}, resolution=32)
    return folder


@pytest.fixture(scope="session")
def pretrained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder as pretraining does."""
    texts = [
        json.loads(line)["desc"] for line in (world / "texts_train.jsonl").read_text().splitlines()
    ]
    said = [
        pre_caption(text)
        for caption in texts
        for text in (caption if isinstance(caption, list) else [caption])
    ]
    tokenizer = CaptionTokenizer.train_on_texts(said, 1000)
    torch.manual_seed(0)
    model = XFM(XFMConfig.preset("tiny", vocab_size=tokenizer.vocab_size, **SMALL))
    folder = tmp_path_factory.mktemp("pretrained")
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def recipe(world: Path, pretrained: Path, tmp_path: Path) -> Make:
    return make_recipe(world, pretrained, tmp_path)


def make_recipe(world: Path, pretrained: Path, folder: Path) -> Make:
    """Makes recipes of a task on the world; `recipe("nlvr2", "nlvr_{}.json", epochs=1, ...)`."""

    def make(kind: str, files: str, **changes: Any) -> FinetuneRecipe:
        values: dict[str, Any] = {
            "task": {"kind": kind} | changes.pop("task", {}),
            "model": changes.pop("model", {}),
            "init": {"checkpoint": str(pretrained)},
            "data": {
                "root": str(world),
                "train": files.format("train"),
                "splits": {split: files.format(split) for split in ("val", "test")},
            },
            "epochs": 2,
            "batch_size": 8,
            "eval_batch_size": 4,
            "optimizer": {"lr": 1e-3, "clip_norm": None},
            "device": "cpu",
            "checkpoint": {"folder": str(folder / "run"), "every": 2},
            "log": {"every": 1},
        }
        return FinetuneRecipe(**(values | changes))

    return make
