"""`pretraining_losses` against the official code: every loss and gradient, alone and summed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.agreement import assert_gradient_norms, tensors
from tests.conftest import CASES, config, load_json
from tests.objectives.steps import BATCHES, gradients, model_of, negatives_of, total
from xfm_fast.batches import ImageBatch, PairBatch
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.models.xfm import ALL_HEADS, XFM
from xfm_fast.objectives import masked_image_loss, pretraining_losses

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
    "pairs with ids": {
        "itc": "loss_itc_idx",
        "itm": "loss_itm",
        "imlm": "loss_imlm",
        "mim": "loss_mim",
    },
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
        alone = pretraining_losses(
            model, batch, hard_negatives=negatives_of(case, batch), losses={name}
        )
        assert set(alone) == {name}
        assert alone[name].item() == pytest.approx(value.item(), rel=1e-12)
        expected, found = gradients(model, value), gradients(model, alone[name])
        for parameter, gradient in found.items():
            other = expected[parameter]
            if gradient is None or other is None:
                assert gradient is other, f"{name}: {parameter}"
            else:
                assert torch.allclose(gradient, other, rtol=1e-9, atol=1e-14), (
                    f"{name}: {parameter}"
                )


def by_brightness(image: Tensor) -> Tensor:
    """Codes below 5 of the patches of `tiny_a`."""
    assert not torch.is_grad_enabled()
    patches = F.avg_pool2d(image.mean(1, keepdim=True), config("tiny_a").patch_size).flatten(1)
    return ((8 * patches).sigmoid() * 5).long().clamp(max=4)


@pytest.mark.parametrize("kind", ["pairs", "images"])
def test_masked_images_predict_the_codes_of_a_tokenizer(kind: str) -> None:
    torch.manual_seed(0)
    model = XFM(config("tiny_a", codebook_size=5), heads=(*ALL_HEADS, "codes")).double().eval()
    batch = BATCHES[kind]("tiny_a")
    assert isinstance(batch, PairBatch | ImageBatch)
    assert batch.patch_mask is not None
    hidden = batch.patch_mask.bool()
    with torch.no_grad():
        codes = by_brightness(batch.image)
    plain = F.cross_entropy(
        model.lm_head(model.encode_image(batch.image, hidden)[:, 1:][hidden]), codes[hidden]
    )
    given = negatives_of("tiny_a", batch) if kind == "pairs" else None
    losses = pretraining_losses(model, batch, hard_negatives=given, mim_target=by_brightness)
    assert losses["mim"].item() == pytest.approx(plain.item(), rel=1e-10)
    expected, found = gradients(model, plain), gradients(model, losses["mim"])
    assert found["lm_head.weight"] is not None
    for name, gradient in found.items():
        other = expected[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-12)
    guided = pretraining_losses(model, batch, hard_negatives=given)
    assert guided.keys() == losses.keys()
    for name in guided.keys() - {"mim"}:
        assert losses[name].item() == pytest.approx(guided[name].item(), rel=1e-12)
    assert guided["mim"].item() != pytest.approx(losses["mim"].item())


def test_codes_that_do_not_fit() -> None:
    batch = BATCHES["images"]("tiny_a")
    model = XFM(config("tiny_a", codebook_size=3), heads=("codes",)).double()
    with pytest.raises(InputError, match="vocabulary of 3"):
        pretraining_losses(model, batch, mim_target=lambda image: by_brightness(image) + 3)
    with pytest.raises(InputError, match=r"mim_target returned codes \[\d+, 1\]"):
        pretraining_losses(model, batch, mim_target=lambda image: by_brightness(image)[:, :1])
    with pytest.raises(UnavailableError, match="codes"):
        pretraining_losses(model_of("tiny_a"), batch, mim_target=by_brightness)


def test_masked_images_predict_the_embeddings_of_another_encoder() -> None:
    model, batch = model_of("tiny_a"), BATCHES["images"]("tiny_a")
    assert isinstance(batch, ImageBatch)
    assert batch.patch_mask is not None
    torch.manual_seed(0)
    teacher = XFM(config("tiny_a")).double().eval()
    loss = pretraining_losses(model, batch, mim_target=teacher.encode_image)["mim"]
    masked = model.encode_image(batch.image, batch.patch_mask)
    plain = masked_image_loss(masked, teacher.encode_image(batch.image), batch.patch_mask)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    model.zero_grad()
