"""Where the weights of a fine-tuning model come from: official pretraining, official fine-tuning,
our own folders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.agreement import tensors
from tests.conftest import config, official_keys
from xfm_fast.config import XFMConfig
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.captioning import CaptioningModel
from xfm_fast.tasks.grounding import GroundingModel
from xfm_fast.tasks.models import ClassificationModel, TaskModel
from xfm_fast.tasks.nlvr2 import NLVR2Model
from xfm_fast.tasks.vqa_model import VQAModel

MODELS: dict[str, tuple[type[TaskModel], dict[str, Any], str]] = {
    "vqa": (VQAModel, {"decoder_layers": 2}, "text_decoder."),
    # One layer more than the fusion encoder has, which stays fresh.
    "captioning": (CaptioningModel, {"decoder_layers": 3}, "text_decoder."),
    "nlvr2": (NLVR2Model, {}, "cls_head."),
    "grounding": (GroundingModel, {}, ""),
    "image": (ClassificationModel, {"labels": 3, "modality": "image"}, "cls_head."),
    "text": (ClassificationModel, {"labels": 3, "modality": "text"}, "cls_head."),
    "pair": (ClassificationModel, {"labels": 3, "modality": "pair"}, "cls_head."),
}
each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_from_official_pretraining(name: str) -> None:
    cls, options, new = MODELS[name]
    state = tensors("tiny_b/weights")
    model = cls.from_official(state, config("tiny_b", image_size=56), **options)
    result = model.load_official(state)
    assert all(new and entry.startswith(new) for entry in result.fresh)
    assert bool(result.fresh) == bool(new)
    assert not model.training
    for entry, value in model.state_dict().items():
        if entry in state and value.shape == state[entry].shape:
            assert torch.equal(value, state[entry]), entry


BASE: dict[str, Callable[[XFMConfig], XFM]] = {
    "XFMForVQA": lambda cfg: VQAModel(cfg, decoder_layers=12),
    "XFMForNLVR": NLVR2Model,
    "XFMForGrounding": GroundingModel,
    "XFMForClassification_imagenet": lambda cfg: ClassificationModel(
        cfg, 1000, modality="image", head="official_image"
    ),
    "XFMForClassification_glue_mrpc": lambda cfg: ClassificationModel(cfg, 3, modality="text"),
}
SIZES = {"XFMForVQA": 480, "XFMForNLVR": 384, "XFMForGrounding": 384}


@pytest.mark.parametrize("official", BASE)
def test_base_size_names_and_shapes(official: str) -> None:
    """Our parameters are the official ones of the same name; nothing travels that no task reads."""
    with torch.device("meta"):
        model = BASE[official](config("base", image_size=SIZES.get(official, 224)))
    official_names = official_keys(official)
    for name, value in model.state_dict().items():
        official_name = name.replace("text_encoder.roberta.", "text_encoder.")
        assert [*value.shape] == official_names[official_name]["shape"], name
    ours: dict[str, Tensor] = dict(model.named_parameters())
    assert sum(p.numel() for p in ours.values()) < sum(
        torch.Size(entry["shape"]).numel()
        for entry in official_names.values()
        if entry["dtype"] == "float32"
    )
