"""Each loss by itself: golden values, gradients, edge cases, and the distribution of the negatives drawn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tests.agreement import assert_agrees, tensors
from tests.conftest import CASES
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.objectives import (
    AllPairs,
    box_giou_loss,
    box_l1_loss,
    contrastive_loss,
    contrastive_rows,
    generalized_iou,
    hard_negative_weights,
    masked_image_loss,
    masked_lm_loss,
    masked_token_loss,
    matching_loss,
    sample_hard_negatives,
)


def features(count: int, width: int = 6) -> tuple[Tensor, Tensor]:
    image, text = (
        F.normalize(torch.randn(count, width, dtype=torch.float64), dim=-1) for _ in range(2)
    )
    return image, text


@pytest.mark.parametrize("case", CASES)
def test_golden_losses_from_golden_tensors(case: str) -> None:
    """Each loss alone, fed with the official tensors, so that a failure points at the loss and not at the model."""
    x, out = tensors(f"{case}/inputs"), tensors(f"{case}/outputs")
    pair = out["image_feat"], out["text_feat"], tensors(f"{case}/weights")["temp"].double()
    itm, r_itm = out["itm_logits"], out["r_itm_logits"]
    boxes = out["r_bbox_coord"], x["r_target_bbox"].double()
    mim = out["image_embeds_masked"], out["image_embeds"], x["image_mask"]
    found = {
        "loss_itc": contrastive_loss(*pair),
        "loss_itc_idx": contrastive_loss(*pair, x["idx"]),
        "hard_neg_weights_t2i": hard_negative_weights(*pair)[0],
        "hard_neg_weights_i2t_idx": hard_negative_weights(*pair, x["idx"])[1],
        "loss_itm": matching_loss(itm, torch.arange(len(itm)) < len(itm) // 3),
        "r_forward_loss_itm": matching_loss(r_itm, torch.arange(len(r_itm)) < len(r_itm) // 3),
        "loss_imlm": masked_lm_loss(out["imlm_logits"], x["masked_ids"]),
        "loss_mlm_text": masked_lm_loss(out["mlm_text_logits"], x["t_masked_ids"]),
        "loss_mim": masked_image_loss(*mim),
        "loss_mim_patches_only": masked_image_loss(*mim, patches_only=True),
        "r_loss_bbox": box_l1_loss(*boxes, x["r_is_image"]),
        "r_loss_giou": box_giou_loss(*boxes, x["r_is_image"]),
        "r_loss_bbox_noisimage": box_l1_loss(*boxes),
        "r_loss_giou_noisimage": box_giou_loss(*boxes),
    }
    for name, value in found.items():
        assert_agrees(name, value, out[name], (), torch.float64)


PATCHES = torch.tensor([[1, 0, 1], [0, 0, 1]])
BOXES = torch.tensor(
    [[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.2, 0.2], [0.7, 0.2, 0.3, 0.3]], dtype=torch.float64
)
OTHERS = torch.tensor(
    [[0.45, 0.55, 0.5, 0.2], [0.8, 0.2, 0.1, 0.1], [0.71, 0.22, 0.1, 0.1]], dtype=torch.float64
)


def test_image_modelling_does_not_move_its_target() -> None:
    masked, whole = (torch.randn(2, 4, 3, requires_grad=True) for _ in range(2))
    masked_image_loss(masked, whole, PATCHES).backward()
    assert masked.grad is not None
    assert whole.grad is None
    # Visible patches are not asked for anything.
    assert torch.equal(masked.grad[:, 1:].any(-1), PATCHES.bool())


def test_nothing_to_predict_is_zero_with_a_graph() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = masked_lm_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    masked = torch.randn(2, 4, 3)
    assert (
        masked_image_loss(masked, torch.randn(2, 4, 3), torch.zeros(2, 3), patches_only=True).item()
        == 0
    )
    every = torch.ones(3)
    assert box_l1_loss(BOXES, OTHERS, every).item() == 0
    assert box_giou_loss(BOXES, OTHERS, every).item() == 0


coordinate = st.floats(-1, 2, width=32)
side = st.floats(0, 1, width=32)
box = st.tuples(coordinate, coordinate, side, side)


def plain_giou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    def corners(box: tuple[float, ...]) -> tuple[float, float, float, float]:
        x, y, w, h = box[0], box[1], max(box[2], 0), max(box[3], 0)
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2

    ax0, ay0, ax1, ay1 = corners(a)
    bx0, by0, bx1, by1 = corners(b)
    shared = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - shared
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return (shared / union if union > 0 else 0) - ((hull - union) / hull if hull > 0 else 0)


@given(st.lists(st.tuples(box, box), min_size=1, max_size=5))
def test_giou_of_any_boxes(pairs: list[tuple[tuple[float, ...], tuple[float, ...]]]) -> None:
    a, b = (
        torch.tensor([pair[i] for pair in pairs], dtype=torch.float64, requires_grad=True)
        for i in (0, 1)
    )
    found = generalized_iou(a, b)
    # Areas near the smallest numbers are all rounding; elsewhere the definition holds.
    for value, pair in zip(found.tolist(), pairs, strict=True):
        assert -1 - 1e-9 <= value <= 1 + 1e-9
        if all(s == 0 or s > 1e-4 for b in pair for s in b[2:]):
            assert value == pytest.approx(plain_giou(*pair), abs=1e-9)
    assert torch.allclose(found, generalized_iou(b, a), rtol=0, atol=1e-12)
    found.sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_one_degenerate_box_does_not_switch_off_the_batch() -> None:
    """The official code returns a GIoU loss of zero for all boxes as soon as one has a negative side."""
    boxes = BOXES.clone()
    boxes[1, 2] = -0.2
    losses = [box_giou_loss(boxes[i : i + 1], OTHERS[i : i + 1]).item() for i in range(3)]
    assert box_giou_loss(boxes, OTHERS).item() == pytest.approx(sum(losses) / 3)
    assert losses[0] == pytest.approx(box_giou_loss(BOXES[:1], OTHERS[:1]).item())
    # A side below zero counts as zero.
    boxes[1, 2] = 0
    assert losses[1] == pytest.approx(box_giou_loss(boxes[1:2], OTHERS[1:2]).item())


def test_negatives_are_drawn_with_their_weights() -> None:
    image, text = features(5)
    ids = torch.tensor([0, 1, 0, 2, 3])
    weights = hard_negative_weights(image, text, 0.4, ids)
    generator = torch.Generator().manual_seed(1)
    draws = 4000
    counts = torch.zeros(2, 5, 5)
    for _ in range(draws):
        drawn = sample_hard_negatives(image, text, 0.4, ids, generator=generator)
        for side, index in enumerate(drawn):
            counts[side, torch.arange(5), index] += 1
    for side in range(2):
        assert not counts[side][ids[:, None] == ids].any()
        expected = weights[side] / weights[side].sum(1, keepdim=True) * draws
        for row in range(5):
            drawable = expected[row] > 0
            observed, predicted = (
                counts[side, row][drawable].numpy(),
                expected[row][drawable].numpy(),
            )
            assert stats.chisquare(observed, predicted).pvalue > 1e-4


def test_a_negative_of_negligible_similarity_can_still_be_drawn() -> None:
    """fp32 softmax underflows at a low temperature; the floor of 1e-5 leaves something to draw."""
    image = torch.eye(3)
    text = torch.eye(3)
    weights, _ = hard_negative_weights(image, text, 0.001)
    assert torch.equal(weights, (torch.ones(3, 3) - torch.eye(3)) * 1e-5)
    assert (sample_hard_negatives(image, text, 0.001).images != torch.arange(3)).all()


def test_nothing_to_draw_from() -> None:
    with pytest.raises(InputError, match=r"1 pair\(s\)"):
        sample_hard_negatives(*features(1), 0.1)
    with pytest.raises(InputError, match=r"pair 0 \(image id 7\)"):
        sample_hard_negatives(*features(3), 0.1, torch.tensor([7, 7, 7]))


@pytest.mark.parametrize("shared", [False, True])
def test_rows_of_all_processes_average_to_the_whole(shared: bool) -> None:
    image, text = features(6)
    ids = torch.tensor([0, 1, 0, 2, 1, 1]) if shared else None
    whole = contrastive_loss(image, text, 0.3, ids)
    weights = hard_negative_weights(image, text, 0.3, ids)
    rows = []
    for first in (0, 2, 4):
        own = slice(first, first + 2)
        local = None if ids is None else ids[own]
        gathered = AllPairs(image, text, first, ids)
        rows.append(contrastive_rows(image[own], text[own], 0.3, gathered, local))
        for _ in range(30):
            drawn = sample_hard_negatives(image[own], text[own], 0.3, local, gathered=gathered)
            for side, index in enumerate(drawn):
                assert (weights[side][own].gather(1, index[:, None]) > 0).all()
    assert torch.stack(rows).mean().item() == pytest.approx(whole.item(), rel=1e-12)


def test_no_masked_token_costs_nothing() -> None:
    words = torch.randn(7, 3, requires_grad=True)
    loss = masked_token_loss(torch.randn(0, 3), words, None, torch.empty(0, dtype=torch.long))
    (gradient,) = torch.autograd.grad(loss, words)
    assert loss == 0
    assert not gradient.any()


def test_a_mean_over_one_is_that_one() -> None:
    """One hidden patch, one word, one box."""
    masked, whole, hidden = torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.zeros(2, 3)
    hidden[1, 2] = 1
    patches = masked_image_loss(masked, whole, hidden, patches_only=True)
    torch.testing.assert_close(patches, (masked[1, 3] - whole[1, 3]).square().mean())
    logits, targets = torch.randn(4, 7), torch.full((4,), -100)
    targets[2] = 5
    word = F.cross_entropy(logits[2:3], targets[2:3])
    torch.testing.assert_close(masked_lm_loss(logits, targets), word)
    torch.testing.assert_close(
        ops.linear_cross_entropy(logits, torch.eye(7), None, targets, backend="reference"), word
    )
    a, b = torch.rand(3, 4), torch.rand(3, 4)
    whole_images = torch.tensor([1, 0, 1])
    torch.testing.assert_close(box_l1_loss(a, b, whole_images), (a[1] - b[1]).abs().sum())
    torch.testing.assert_close(box_l1_loss(a[:1], b[:1]), (a[0] - b[0]).abs().sum())
