"""One pass of the last layer, the frozen encoder of a probe, and the GLUE metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.tasks.classification import ClassificationModel, correlations, f1_score
from xfm_fast.tasks.grounding import GroundingModel
from xfm_fast.tasks.nlvr2 import NLVR2Model
from xfm_fast.tasks.task_model import TaskModel

CONFIG = XFMConfig.preset("tiny")


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, CONFIG.image_size, CONFIG.image_size)


TEXT = torch.tensor([[0, 7, 8, 2], [0, 9, 2, 1]])


@pytest.mark.parametrize(
    ("build", "images", "encoder"),
    [
        (NLVR2Model, 4, "fusion_encoder"),
        (GroundingModel, 2, "fusion_encoder"),
        (partial(ClassificationModel, labels=3, modality="pair"), 2, "fusion_encoder"),
        (partial(ClassificationModel, labels=3, modality="text"), 0, "text_encoder"),
    ],
)
def test_one_pass_computes_token_0_alone_in_its_last_layer(
    build: Callable[[XFMConfig], TaskModel], images: int, encoder: str
) -> None:
    """Both images of NLVR2 share it."""
    model, rows = build(CONFIG).eval(), []
    *_, last = getattr(model, encoder).roberta.encoder
    feed_forward = last.feed_forward
    last.feed_forward = lambda x: rows.append(len(x)) or feed_forward(x)
    predict: Any = model.boxes if isinstance(model, GroundingModel) else model.logits
    predict(pixels(images) if images else None, TEXT)
    assert rows == [max(images, len(TEXT))]


def test_a_probe_trains_its_head_alone() -> None:
    model = ClassificationModel(CONFIG, 3, modality="image", frozen=True).train()
    assert model.cls_head.training
    assert not model.vision_encoder.training
    images = pixels()
    assert torch.equal(model.features(images), model.features(images))
    model(images, targets=torch.tensor([0, 2])).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"cls_head.weight", "cls_head.bias"}


def test_glue_metrics() -> None:
    a, b = torch.tensor([1.0, 2.5, 2.5, 0.1, 4.0]), torch.tensor([2.0, 1.0, 3.0, 0.0, 3.0])
    pearson, spearman = correlations(a, b)
    assert pearson == pytest.approx(stats.pearsonr(a.numpy(), b.numpy())[0], rel=1e-6)
    assert spearman == pytest.approx(stats.spearmanr(a.numpy(), b.numpy())[0], rel=1e-12)
    assert correlations(a[:2], b[:2]) == pytest.approx((-1, -1))
    assert correlations(a[:1], b[:1]) == (0, 0)
    predicted, targets = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    assert f1_score(predicted, targets) == pytest.approx(2 / 3)
    # tp 2, tn 1, fp 1, fn 1
    assert correlations(predicted, targets)[0] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)
    assert correlations(torch.ones(3), torch.tensor([1, 0, 1])) == (0, 0)
    assert f1_score(torch.zeros(3), torch.zeros(3)) == 0
