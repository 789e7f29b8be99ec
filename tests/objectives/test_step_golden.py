"""`pretraining_losses` against the official code: every loss and gradient, alone and summed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.agreement import assert_gradient_norms, tensors
from tests.conftest import CASES, load_json
from tests.objectives.steps import BATCHES, gradients, model_of, negatives_of, total
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses

# Far below the 1e-8 that counts as the same function; the sums are taken in another order, no more.
SAME = 1e-9

Run = Callable[[str], tuple[XFM, dict[str, Tensor]]]


@cache
def run(case: str, kind: str, **overrides: object) -> tuple[XFM, dict[str, Tensor]]:
    model = model_of(case, **overrides)
    batch = BATCHES[kind](case)
    given = negatives_of(case, batch) if kind in ("pairs", "pairs with ids", "regions") else None
    return model, pretraining_losses(model, batch, hard_negatives=given)


# Golden loss -> the step that has it, and its name there; None for the sum of all.
GOLDEN: dict[str, tuple[Run, str | None]] = {
    "itc": (lambda case: run(case, "pairs"), "itc"),
    "itc_idx": (lambda case: run(case, "pairs with ids"), "itc"),
    "itm": (lambda case: run(case, "pairs"), "itm"),
    "imlm": (lambda case: run(case, "pairs"), "imlm"),
    "imlm_nodetach": (lambda case: run(case, "pairs", detach_text_for_mlm=False), "imlm"),
    "mim": (lambda case: run(case, "pairs"), "mim"),
    "mim_patches_only": (lambda case: run(case, "pairs", mim_patches_only=True), "mim"),
    "mlm_text": (lambda case: run(case, "texts"), "mlm"),
    "r_bbox": (lambda case: run(case, "regions"), "bbox_l1"),
    "r_giou": (lambda case: run(case, "regions"), "bbox_giou"),
    "total_image": (lambda case: run(case, "pairs"), None),
    "total_region": (lambda case: run(case, "regions"), None),
    "total_imagenet": (lambda case: run(case, "images"), None),
    "total_text": (lambda case: run(case, "texts"), None),
}
VALUES = {
    "pairs": {
        "itc": "forward_loss_itc",
        "itm": "forward_loss_itm",
        "imlm": "forward_loss_mlm",
        "mim": "forward_loss_mim",
    },
    "pairs with ids": {"itc": "loss_itc_idx", "itm": "loss_itm", "imlm": "loss_imlm", "mim": "loss_mim"},
    "regions": {
        "itc": "r_forward_loss_itc",
        "itm": "r_forward_loss_itm",
        "imlm": "r_forward_loss_mlm",
        "bbox_l1": "r_forward_loss_bbox",
        "bbox_giou": "r_forward_loss_giou",
    },
    "images": {"mim": "forward_imagenet_loss_mim"},
    "texts": {"mlm": "loss_mlm_text"},
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("case", CASES)
def test_values(case: str, kind: str) -> None:
    _, losses = run(case, kind)
    stored = tensors(f"{case}/outputs")
    assert set(losses) == set(VALUES[kind])
    for name, golden in VALUES[kind].items():
        assert losses[name].shape == ()
        assert losses[name].item() == pytest.approx(stored[golden].item(), rel=SAME), name


@pytest.mark.parametrize("loss", GOLDEN)
@pytest.mark.parametrize("case", CASES)
def test_gradient_norms(case: str, loss: str) -> None:
    golden = load_json(f"{case}/grads")[loss]
    step, name = GOLDEN[loss]
    model, losses = step(case)
    value = total(losses) if name is None else losses[name]
    assert value.item() == pytest.approx(golden["value"], rel=SAME)
    assert_gradient_norms(gradients(model, value), golden["grad_norm"], loss)


@pytest.mark.parametrize(("case", "depth"), [("tiny_a", 1), ("tiny_b", 1), ("tiny_b", 2)])
def test_regions_by_local_attention(case: str, depth: int) -> None:
    golden = load_json(f"local_attn/{case}_depth{depth}_grads")["total_region"]
    stored = tensors(f"local_attn/{case}_depth{depth}")
    model, losses = run(case, "regions", local_attn_depth=depth)
    for name, key in VALUES["regions"].items():
        assert losses[name].item() == pytest.approx(stored[key].item(), rel=SAME), name
    value = total(losses)
    assert value.item() == pytest.approx(golden["value"], rel=SAME)
    assert_gradient_norms(gradients(model, value), golden["grad_norm"], "total_region")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["pairs", "regions"])
def test_each_loss_asked_for_alone_is_the_same(case: str, kind: str) -> None:
    """What is left out changes nothing of what remains, though other paths compute it."""
    model, together = run(case, kind)
    batch = BATCHES[kind](case)
    for name, value in together.items():
        alone = pretraining_losses(model, batch, hard_negatives=negatives_of(case, batch), losses={name})
        assert set(alone) == {name}
        assert alone[name].item() == pytest.approx(value.item(), rel=1e-12)
        expected, found = gradients(model, value), gradients(model, alone[name])
        for parameter, gradient in found.items():
            other = expected[parameter]
            if gradient is None or other is None:
                assert gradient is other, f"{name}: {parameter}"
            else:
                assert torch.allclose(gradient, other, rtol=1e-9, atol=1e-14), f"{name}: {parameter}"
