"""A step asks no tensor for a number: on an accelerator each question would stop the host until the device is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.steps import image_batch, model_of, negatives_of, pair_batch, region_batch, text_batch, total
from xfm_fast.batches import Batch
from xfm_fast.kernels import attention, norms, products
from xfm_fast.kernels import losses as kernel_losses
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses

METHODS = (
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__index__",
    "__float__",
    "nonzero",
    "argwhere",
    "unique",
    "bincount",
    "masked_select",
)
FUNCTIONS = ("nonzero", "argwhere", "unique", "bincount", "masked_select", "is_nonzero")
BATCHES: dict[str, Callable[[], Batch]] = {
    "pairs": lambda: pair_batch("tiny_a"),
    "pairs with ids": lambda: pair_batch("tiny_a", ids=True),
    "regions": lambda: region_batch("tiny_a"),
    "images": lambda: image_batch("tiny_a"),
    "texts": lambda: text_batch("tiny_a"),
}


@contextmanager
def no_questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def forbid(owner: Any, name: str) -> None:
        def asked(*_: object, **__: object) -> None:
            raise AssertionError(f"{name} of a tensor: on an accelerator the host would wait here")

        context.setattr(owner, name, asked)

    with monkeypatch.context() as context:
        for name in METHODS:
            forbid(Tensor, name)
        for name in FUNCTIONS:
            forbid(torch, name)
        yield


def fresh(**overrides: object) -> XFM:
    model = model_of("tiny_a", **overrides)
    model.zero_grad(set_to_none=True)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_no_step_asks(
    monkeypatch: pytest.MonkeyPatch, kind: str, given: bool, prepared: bool, dtype: torch.dtype
) -> None:
    model, batch = fresh().to(dtype), BATCHES[kind]()
    try:
        if prepared:
            batch = batch.prepare()
        negatives = negatives_of("tiny_a", batch) if given and kind not in ("images", "texts") else None
        with no_questions(monkeypatch):
            losses = pretraining_losses(model, batch, hard_negatives=negatives)
            total(losses).backward()
    finally:
        model.double().zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", ["pairs", "regions", "texts"])
def test_nor_in_training_mode(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = fresh().train()
    try:
        with no_questions(monkeypatch):
            total(pretraining_losses(model, BATCHES[kind]())).backward()
    finally:
        model.eval().zero_grad(set_to_none=True)


def test_nor_when_masks_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    batch = type(image := image_batch("tiny_a"))(image=image.image)
    with no_questions(monkeypatch):
        pretraining_losses(model, batch)["mim"].backward()
    model.zero_grad(set_to_none=True)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device without values, whose kernels are known by the shapes of their results: to ask for one is an error."""
    for module in (attention, kernel_losses, norms, products):
        monkeypatch.setattr(module, "resolve", lambda *_, **__: "triton")
    monkeypatch.setattr(attention, "_TRITON_HEAD_DIMS", (16,))
    # Autocast does not know such a device.
    monkeypatch.setattr(XFM, "_cast", lambda _, pixels: pixels)
    return "meta"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_an_accelerator_is_never_waited_for(accelerator: str, kind: str, given: bool, training: bool) -> None:
    """The whole path that a GPU takes, forward and backward, with negatives of a fixed capacity."""
    batch = BATCHES[kind]()
    config = model_of("tiny_a").config
    with torch.device(accelerator):
        model = XFM(config).double().train(training)
    negatives = None
    if given and kind not in ("images", "texts"):
        first, second = negatives_of("tiny_a", batch)
        negatives = first.to(accelerator), second.to(accelerator)
    losses = pretraining_losses(model, batch.to(accelerator), hard_negatives=negatives)
    assert all(loss.device.type == accelerator for loss in losses.values())
    total(losses).backward()


def test_questions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(1)
    for question in (
        lambda: tensor.item(),
        lambda: tensor.tolist(),
        lambda: bool(tensor),
        lambda: int(tensor),
        lambda: tensor.nonzero(),
    ):
        with no_questions(monkeypatch), pytest.raises(AssertionError):
            question()
