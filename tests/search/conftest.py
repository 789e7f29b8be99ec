"""A handful of generated images, and a tiny model with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import VOCABULARY, render, scene
from xfm_fast.models.xfm import XFM
from xfm_fast.search import SearchModel, open_model
from xfm_fast.tokenizer import CaptionTokenizer


def write_picture(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(scene(0, number, "train"), 64)).resize((80, 60)).save(path)
    return path


def write_model(folder: Path, seed: int) -> Path:
    tokenizer = CaptionTokenizer.train_on_texts([" ".join(VOCABULARY)], 500)
    torch.manual_seed(seed)
    sizes = {"vision_depth": 1, "text_layers": 1, "fusion_layers": 1}
    model = XFM(XFMConfig.preset("tiny", vocab_size=tokenizer.vocab_size, **sizes))
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it."""
    return write_model(tmp_path_factory.mktemp("weights"), seed=0)


@pytest.fixture(scope="session")
def model(weights: Path) -> SearchModel:
    return open_model(weights)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with 7 images, three of them in a folder of their own."""
    folder = tmp_path / "photos"
    for number in range(7):
        write_picture(folder / ("trip" if number % 2 else ".") / f"{number}.png", number)
    return folder
