"""Inputs that a model refuses, beyond those of the attacks, and what it accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.models import inputs
from xfm_fast.models.xfm import XFM

CONFIG = XFMConfig.preset("tiny", text_layers=1, fusion_layers=1, vision_depth=1)


@pytest.fixture(scope="module")
def model() -> XFM:
    return XFM(CONFIG).eval()


def pixels(*shape: int) -> Tensor:
    return torch.zeros(shape or (2, 3, 32, 32))


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows or ([0, 5, 2], [0, 7, 2]))


def regions(model: XFM, index: Tensor, mask: Tensor) -> object:
    return model.encode_regions(pixels(), index, mask)


def fuse(
    model: XFM, text: Tensor | None = None, mask: Tensor | None = None, index: Tensor | None = None
) -> object:
    memory = model.image_memory(torch.zeros(2, 17, 64))
    text = torch.zeros(3, 4, 64) if text is None else text
    return model.fuse(text, torch.ones(3, 4) if mask is None else mask, memory, index)


EMPTY_REGION = torch.ones(2, 17)
EMPTY_REGION[1, 1:] = 0

# (call, what the message names: the thing and its value)
REFUSED: dict[str, tuple[Callable[[XFM], object], list[str]]] = {
    "no multiple of the patch": (lambda m: m.encode_image(pixels(1, 3, 32, 36)), ["32x36"]),
    "patch mask": (
        lambda m: m.encode_image(pixels(), torch.ones(2, 17)),
        ["patch_mask", "[2, 17]", "[2, 16]"],
    ),
    "left padding": (
        lambda m: m.encode_text(ids(), torch.tensor([[1, 1, 0], [0, 1, 1]])),
        ["attention_mask of text 1"],
    ),
    "texts without tokens": (lambda m: m.encode_text(ids()[:, :0]), ["text 0"]),
    "ids padded on the left": (lambda m: m.encode_text(ids([1, 0, 2])), ["text 0"]),
    "fused mask": (
        lambda m: fuse(m, None, torch.ones(3, 5)),
        ["attention_mask", "[3, 5]", "[3, 4]"],
    ),
    "no memory": (
        lambda m: m.fuse(torch.zeros(1, 4, 64), torch.ones(1, 4), cast("Any", None)),
        ["memory", "NoneType"],
    ),
    "unpaired": (lambda m: fuse(m), ["3 texts", "2 images", "image_index"]),
    "short index": (
        lambda m: fuse(m, index=torch.tensor([0, 1])),
        ["image_index", "[2]", "3 texts"],
    ),
    "token mask": (
        lambda m: m.image_memory(torch.zeros(2, 17, 64), torch.ones(2, 16)),
        ["token_mask", "[2, 16]"],
    ),
    "region index": (
        lambda m: regions(m, torch.tensor([0, 2]), torch.ones(2, 17)),
        ["image_index", "2 images"],
    ),
    "region mask": (
        lambda m: regions(m, torch.tensor([0, 1]), torch.ones(2, 16)),
        ["region_mask", "[2, 16]"],
    ),
    "empty region": (
        lambda m: regions(m, torch.tensor([0, 1]), EMPTY_REGION),
        ["region_mask of region 1"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(model: XFM, name: str) -> None:
    call, named = REFUSED[name]
    with torch.inference_mode(), pytest.raises(InputError) as caught:
        call(model)
    message = str(caught.value)
    for part in named:
        assert part in message, f"{message!r} does not name {part!r}"


def test_any_integer_is_an_id_and_any_number_a_mask(model: XFM) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with torch.inference_mode():
        wanted = model.encode_text(ids(), mask)
        assert not wanted[0, 2].any()
        for of_ids, of_mask in ((torch.int32, torch.bool), (torch.uint8, torch.float32)):
            found = model.encode_text(ids().to(of_ids), mask.to(of_mask))
            torch.testing.assert_close(found, wanted)


def test_heads_that_were_not_built() -> None:
    model, states = XFM(CONFIG, heads=()), torch.zeros(2, 4, 64)
    calls: dict[str, tuple[Callable[[Tensor], object], ...]] = {
        "contrastive": (model.project_image, model.project_text),
        "matching": (model.match_logits,),
        "boxes": (model.predict_boxes,),
        "mlm": (model.mlm_logits,),
        "imlm": (model.imlm_logits,),
    }
    for head, refused in calls.items():
        for call in refused:
            with pytest.raises(UnavailableError, match=head):
                call(states)


def test_missing_encoders_are_named() -> None:
    without = XFM(CONFIG.replace(fusion_layers=0), heads=())
    with pytest.raises(UnavailableError, match="fusion_layers=0"):
        without.image_memory(torch.zeros(1, 17, 64))
    without = XFM(CONFIG, heads=(), encoders=())
    calls: dict[str, Callable[[], object]] = {
        "vision": lambda: without.encode_image(pixels()),
        "text": lambda: without.encode_text(ids()),
        "fusion": lambda: without.image_memory(torch.zeros(1, 17, 64)),
    }
    for name, call in calls.items():
        with pytest.raises(UnavailableError, match=f"{name} encoder"):
            call()


@pytest.mark.parametrize("depth", [-1, 1])
def test_nothing_gives_empty_tensors(depth: int) -> None:
    model = XFM(CONFIG.replace(local_attn_depth=depth)).eval()
    none, one = pixels(0, 3, 32, 32), pixels(2, 3, 32, 32)
    index, mask = torch.empty(0, dtype=torch.long), torch.empty(0, 17)
    with torch.no_grad():
        images = model.encode_image(none, torch.zeros(0, 16))
        texts = model.encode_text(torch.empty(0, 5, dtype=torch.long))
        fused = model.fuse(texts, torch.ones(0, 5), model.image_memory(images))
        several = model.fuse(
            texts, torch.ones(0, 5), model.image_memory(model.encode_image(one)), index
        )
        shapes = [
            (images, (0, 17, 64)), (texts, (0, 5, 64)), (fused, (0, 5, 64)), (several, (0, 5, 64)),
            (model.project_image(images), (0, 32)), (model.project_text(texts), (0, 32)),
            (model.match_logits(fused), (0, 2)), (model.predict_boxes(fused), (0, 4)),
            (model.mlm_logits(texts), (0, 5, 512)), (model.imlm_logits(fused), (0, 5, 512)),
            *((found, (0, 17, 64)) for found in model.encode_regions(one, index, mask)),
            (model.encode_region_tokens(one, index, mask)[0], (0, 17 if depth > 0 else 1, 64)),
            (model.encode_region_tokens(one, index, mask)[1], (2, 17, 64)),
            (model.encode_region_tokens(none, index, mask)[1], (0, 17, 64)),
        ]  # fmt: skip
    for number, (found, shape) in enumerate(shapes):
        assert found.shape == shape, number


def test_large_values_are_not_infinite_because_their_sum_is() -> None:
    large = pixels().fill_(torch.finfo(torch.float32).max)
    inputs.check_pixels(large, CONFIG)
    large[1, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="pixels of image 1 "):
        inputs.check_pixels(large, CONFIG)
