"""Masked image modelling against codes: what a step makes of it, beside the other losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.objectives.steps import image_batch, image_codes, model_of, pair_batch
from xfm_fast.batches import ImageBatch, PairBatch
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import ImageCodes, pretraining_losses


def expected(model: XFM, batch: PairBatch | ImageBatch, codes: ImageCodes) -> Tensor:
    """The loss by plain operations on the hidden patches alone."""
    mask = batch.patch_mask
    assert mask is not None
    with torch.no_grad():
        targets = codes._tokenizer[0](batch.image)
    logits = codes.head(model.encode_image(batch.image, mask)[:, 1:][mask.bool()])
    return nn.functional.cross_entropy(logits, targets[mask.bool()])


@pytest.mark.parametrize("kind", ["pairs", "images"])
def test_a_step_predicts_codes(kind: str) -> None:
    model, batch = model_of("tiny_a"), pair_batch("tiny_a") if kind == "pairs" else image_batch("tiny_a")
    codes = image_codes(model.config)
    draw = [torch.Generator().manual_seed(1) for _ in range(2)]
    found = pretraining_losses(model, batch, image_codes=codes, generator=draw[0])
    plain = expected(model, batch, codes)
    assert found["mim"].item() == pytest.approx(plain.item(), rel=1e-10)
    trained = [*model.vision_encoder.parameters(), *codes.parameters()]
    ours, theirs = (torch.autograd.grad(loss, trained, allow_unused=True) for loss in (found["mim"], plain))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    guided = pretraining_losses(model, batch, generator=draw[1])
    assert guided.keys() == found.keys()
    assert guided.pop("mim") != found.pop("mim")
    for name, loss in guided.items():
        assert loss.item() == pytest.approx(found[name].item(), rel=1e-12), name


def test_images_alone_pass_the_encoder_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embeddings of the whole image are no target, so they are not computed."""
    model, batch, passes = model_of("tiny_a"), image_batch("tiny_a"), []
    encode = XFM.encode_image
    monkeypatch.setattr(XFM, "encode_image", lambda *given: passes.append(len(given)) or encode(*given))
    pretraining_losses(model, batch, image_codes=image_codes(model.config))
    assert passes == [3]
    pretraining_losses(model, batch)
    assert sorted(passes) == [2, 3, 3]


def test_a_tokenizer_is_neither_trained_nor_saved() -> None:
    codes = ImageCodes(nn.Sequential(nn.Flatten(1), nn.Linear(48, 4)), width=8, codes=3)
    assert {name: tuple(p.shape) for name, p in codes.named_parameters()} == {"head.weight": (3, 8), "head.bias": (3,)}
    assert codes.state_dict().keys() == {"head.weight", "head.bias"}
