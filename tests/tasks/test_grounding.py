"""The RefCOCO metric, and boxes of expressions that share an image."""

from __future__ import annotations

import pytest
import torch

from tests.agreement import inputs_of, with_weights
from tests.conftest import config, load_json
from xfm_fast.errors import InputError
from xfm_fast.tasks.grounding import GroundingModel, box_accuracy, grounding_accuracy, pixel_boxes, pixel_iou


def test_official_metric() -> None:
    rows = load_json("metrics/grounding_inputs")
    boxes = torch.tensor([row["pred_cxcywh_norm"] for row in rows])
    sizes = torch.tensor([[row["width"], row["height"]] for row in rows])
    reference = torch.tensor([row["ref_box_xywh"] for row in rows])
    overlap = pixel_iou(pixel_boxes(boxes, sizes), reference)
    assert overlap.tolist() == pytest.approx([row["iou"] for row in rows], abs=1e-5)
    accuracy = grounding_accuracy(boxes, sizes, reference, [row["split"] for row in rows])
    assert {f"{split}_d": value for split, value in accuracy.items()} == load_json("metrics/metrics")["grounding"][
        "result"
    ]


def test_pixel_convention() -> None:
    for case in load_json("metrics/metrics")["iou_edge_cases"]:
        a, b = torch.tensor([case["a"]], dtype=torch.float64), torch.tensor([case["b"]], dtype=torch.float64)
        assert pixel_iou(a, b).item() == pytest.approx(case["iou"], rel=1e-12)
        assert pixel_iou(b, a).item() == pytest.approx(case["iou"], rel=1e-12)
    assert pixel_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_accuracy_without_splits() -> None:
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    sizes, reference = torch.tensor([[100, 50], [100, 50]]), torch.tensor([[0.0, 0, 100, 50], [50, 25, 50, 25]])
    assert grounding_accuracy(boxes, sizes, reference) == {"all": 0.5}
    with pytest.raises(InputError):
        grounding_accuracy(boxes, sizes[:1], reference)
    # Half of the pixels is enough.
    assert box_accuracy(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[0.0, 0, 4, 2]])) == {"all": 1.0}


@torch.inference_mode()
def test_expressions_that_share_an_image() -> None:
    model = with_weights(GroundingModel(config("tiny_b")), "tiny_b", torch.float64, "grounding")
    x = inputs_of("tiny_b/ft_inputs", torch.float64)
    text = x["grounding/text_ids"], x["grounding/text_atts"]
    index = torch.tensor([2, 0, 2])
    shared = model.boxes(x["grounding/image"], *text, index)
    apart = model.boxes(x["grounding/image"][index], *text)
    assert torch.allclose(shared, apart, rtol=0, atol=1e-12)
