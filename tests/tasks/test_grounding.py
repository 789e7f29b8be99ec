"""The RefCOCO metric, and boxes of expressions that share an image."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import load_json
from xfm_fast.tasks.grounding import box_accuracy, pixel_boxes, pixel_iou


def test_official_metric() -> None:
    rows = load_json("metrics/grounding_inputs")
    boxes = torch.tensor([row["pred_cxcywh_norm"] for row in rows])
    sizes = torch.tensor([[row["width"], row["height"]] for row in rows])
    reference = torch.tensor([row["ref_box_xywh"] for row in rows])
    overlap = pixel_iou(pixel_boxes(boxes, sizes), reference)
    assert overlap.tolist() == pytest.approx([row["iou"] for row in rows], abs=1e-5)
    accuracy = box_accuracy(pixel_boxes(boxes, sizes), reference, [row["split"] for row in rows])
    assert {f"{split}_d": value for split, value in accuracy.items()} == load_json(
        "metrics/metrics"
    )["grounding"]["result"]


def test_pixel_convention() -> None:
    for case in load_json("metrics/metrics")["iou_edge_cases"]:
        a, b = (
            torch.tensor([case["a"]], dtype=torch.float64),
            torch.tensor([case["b"]], dtype=torch.float64),
        )
        assert pixel_iou(a, b).item() == pytest.approx(case["iou"], rel=1e-12)
        assert pixel_iou(b, a).item() == pytest.approx(case["iou"], rel=1e-12)
    assert pixel_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_accuracy_without_splits() -> None:
    """Half of the pixels is enough."""
    boxes, reference = (
        torch.tensor([[0.0, 0, 4, 4], [9, 9, 2, 2]]),
        torch.tensor([[0.0, 0, 4, 2], [0, 0, 2, 2]]),
    )
    assert box_accuracy(boxes, reference) == {"all": 0.5}
