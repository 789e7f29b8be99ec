"""A handful of generated images, and a tiny model with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import VOCABULARY, render, scene
from xfm_fast.encoders import Encoder, open_encoder
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import CaptionTokenizer


def write_picture(path: Path, index: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(scene(0, index, "train"), 64)).resize((80, 60)).save(path)
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
    """Save a model."""
    return write_model(tmp_path_factory.mktemp("weights"), seed=0)


@pytest.fixture(scope="session")
def model(weights: Path) -> Encoder:
    return open_encoder(weights)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write 7 images, three of them in a subfolder."""
    folder = tmp_path / "photos"
    for index in range(7):
        write_picture(folder / ("trip" if index % 2 else ".") / f"{index}.png", index)
    return folder
