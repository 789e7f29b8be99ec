"""The frozen encoder of a probe, and the GLUE metrics."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from xfm_fast.config import XFMConfig
from xfm_fast.tasks.models import ClassificationModel
from xfm_fast.tasks.text import correlations, f1_score

CONFIG = XFMConfig.preset("tiny")


def test_a_probe_trains_its_head_alone() -> None:
    model = ClassificationModel(CONFIG, 3, modality="image", frozen=True).train()
    assert model.cls_head.training
    assert not model.vision_encoder.training
    images = torch.randn(2, 3, CONFIG.image_size, CONFIG.image_size)
    torch.testing.assert_close(model.features(images), model.features(images))
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
    assert correlations(predicted, targets)[0] == pytest.approx(
        (2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5
    )
    assert correlations(torch.ones(3), torch.tensor([1, 0, 1])) == (0, 0)
    assert f1_score(torch.zeros(3), torch.zeros(3)) == 0
