"""Every input that a model refuses: one error that names the thing, its value and the remedy."""

from __future__ import annotations

import ast
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError, UnavailableError, XFMError
from xfm_fast.models import inputs
from xfm_fast.models.xfm import XFM

CONFIG = XFMConfig.preset("tiny", text_layers=1, fusion_layers=1, vision_depth=1)


@pytest.fixture(scope="module")
def model() -> XFM:
    return XFM(CONFIG).eval()


def pixels(*shape: int) -> Tensor:
    return torch.zeros(shape or (2, 3, 32, 32))


def poisoned(value: float) -> Tensor:
    images = pixels(3, 3, 32, 32)
    images[1, 2, 5, 5] = value
    return images


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows or ([0, 5, 2], [0, 7, 2]))


def regions(model: XFM, index: Tensor, mask: Tensor) -> object:
    return model.encode_regions(pixels(), index, mask)


def fuse(model: XFM, text: Tensor | None = None, mask: Tensor | None = None, index: Tensor | None = None) -> object:
    memory = model.image_memory(torch.zeros(2, 17, 64))
    text = torch.zeros(3, 4, 64) if text is None else text
    return model.fuse(text, torch.ones(3, 4) if mask is None else mask, memory, index)


EMPTY_TEXT = torch.tensor([[1, 1, 0], [0, 0, 0]])
EMPTY_REGION = torch.ones(2, 17)
EMPTY_REGION[1, 1:] = 0

# (call, what the message names: the thing, its value, the remedy)
REFUSED: dict[str, tuple[Callable[[XFM], object], list[str]]] = {
    "an array": (lambda m: m.encode_image(cast("Any", pixels().numpy())), ["pixels", "ndarray", "torch.from_numpy"]),
    "an additive mask": (lambda m: fuse(m, mask=torch.full((3, 4), -1.0)), ["attention_mask", "1"]),
    "pixels without batch": (lambda m: m.encode_image(pixels(3, 32, 32)), ["pixels", "[3, 32, 32]", "[B, 3, 32, 32]"]),
    "grey pixels": (lambda m: m.encode_image(pixels(2, 1, 32, 32)), ["pixels", "[2, 1, 32, 32]", "[B, 3, 32, 32]"]),
    "bytes": (lambda m: m.encode_image(pixels().byte()), ["pixels", "torch.uint8", "normalise"]),
    "no multiple of the patch": (lambda m: m.encode_image(pixels(1, 3, 32, 36)), ["32x36", "36", "8"]),
    "another size": (lambda m: m.encode_image(pixels(1, 3, 48, 48)), ["48x48", "32x32", "set_image_size"]),
    "NaN": (
        lambda m: m.encode_image(poisoned(float("nan"))),
        ["pixels of image 1", "NaN"],
    ),
    "infinity": (lambda m: m.encode_image(poisoned(-float("inf"))), ["pixels of image 1", "infinity"]),
    "patch mask": (lambda m: m.encode_image(pixels(), torch.ones(2, 17)), ["patch_mask", "[2, 17]", "[2, 16]"]),
    "flat ids": (lambda m: m.encode_text(torch.tensor([0, 5, 2])), ["input_ids", "[3]", "[B, L]"]),
    "floating ids": (lambda m: m.encode_text(ids().float()), ["input_ids", "torch.float32", "integers"]),
    "long text": (
        lambda m: m.encode_text(torch.full((1, 65), 5)),
        ["input_ids", "65", str(CONFIG.max_text_length)],
    ),
    "id beyond the vocabulary": (
        lambda m: m.encode_text(ids([0, 512, 2])),
        ["input_ids", "512", "vocabulary of 512"],
    ),
    "negative id": (lambda m: m.encode_text(ids([0, -100, 2])), ["input_ids", "-100", "tokenizer"]),
    "mask of another shape": (lambda m: m.encode_text(ids(), torch.ones(2, 4)), ["attention_mask", "[2, 4]", "[2, 3]"]),
    "empty text": (
        lambda m: m.encode_text(ids(), EMPTY_TEXT),
        ["attention_mask of text 1", "zeros"],
    ),
    "left padding": (
        lambda m: m.encode_text(ids([0, 5, 2], [0, 5, 2]), torch.tensor([[1, 1, 0], [0, 1, 1]])),
        ["attention_mask of text 1", "right"],
    ),
    "ids padded on the left": (lambda m: m.encode_text(ids([1, 0, 2])), ["text 0", "right"]),
    "text of padding": (lambda m: m.encode_text(ids([0, 5, 2], [1, 1, 1])), ["text 1", "zeros"]),
    "text embeddings": (lambda m: fuse(m, torch.zeros(3, 4, 63)), ["text embeddings", "[3, 4, 63]", "[B, tokens, 64]"]),
    "fused mask": (lambda m: fuse(m, None, torch.ones(3, 5)), ["attention_mask", "[3, 5]", "[3, 4]"]),
    "unpaired": (lambda m: fuse(m), ["3 texts and 2 images", "pass image_index"]),
    "short index": (lambda m: fuse(m, index=torch.tensor([0, 1])), ["image_index", "[2]", "3 texts"]),
    "floating index": (lambda m: fuse(m, index=torch.zeros(3)), ["image_index", "torch.float32", "3 texts"]),
    "index too large": (
        lambda m: fuse(m, index=torch.tensor([0, 2, 1])),
        ["image_index", "2"],
    ),
    "negative index": (lambda m: fuse(m, index=torch.tensor([0, -1, 1])), ["image_index", "-1", "2 images"]),
    "image embeddings": (
        lambda m: m.image_memory(torch.zeros(2, 17, 32)),
        ["image embeddings", "[2, 17, 32]", "[B, tokens, 64]"],
    ),
    "token mask": (
        lambda m: m.image_memory(torch.zeros(2, 17, 64), torch.ones(2, 16)),
        ["token_mask", "[2, 16]", "[2, 17]"],
    ),
    "projected images": (lambda m: m.project_image(torch.zeros(2, 64)), ["image embeddings", "[2, 64]"]),
    "projected texts": (lambda m: m.project_text(torch.zeros(2, 4, 8)), ["text embeddings", "[2, 4, 8]"]),
    "matched": (lambda m: m.match_logits(torch.zeros(2, 64)), ["fused embeddings", "[2, 64]"]),
    "boxes": (lambda m: m.predict_boxes(torch.zeros(2, 1, 32)), ["fused embeddings", "[2, 1, 32]"]),
    "region index": (
        lambda m: regions(m, torch.tensor([0, 2]), torch.ones(2, 17)),
        ["image_index", "2 images"],
    ),
    "region index length": (
        lambda m: regions(m, torch.tensor([0]), torch.ones(2, 17)),
        ["image_index", "[1]", "2 regions"],
    ),
    "region mask": (
        lambda m: regions(m, torch.tensor([0, 1]), torch.ones(2, 16)),
        ["region_mask", "[2, 16]", "[2, 17]"],
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


def test_every_check_is_tried(model: XFM) -> None:
    """Every `raise` of inputs.py is reached by an entry above, so that a new check needs a new case."""
    source = Path(inputs.__file__)
    checks = {node.lineno for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Raise)}
    tried = set()
    for call, _ in REFUSED.values():
        try:
            call(model)
        except InputError as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            if Path(last.filename) == source:
                # Of a statement over several lines, some Python versions name another line than the first.
                tried.add(max(line for line in checks if last.lineno is not None and line <= last.lineno))
    assert tried == checks


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_any_integer_is_an_id(model: XFM, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        assert torch.equal(model.encode_text(ids().to(dtype)), model.encode_text(ids()))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_any_number_is_a_mask(model: XFM, dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with torch.inference_mode():
        text = model.encode_text(ids(), mask.to(dtype))
        assert torch.equal(text, model.encode_text(ids(), mask))
        assert not text[0, 2].any()


@pytest.mark.parametrize(
    ("head", "call"),
    [
        ("contrastive", lambda m: m.project_image(torch.zeros(2, 17, 64))),
        ("contrastive", lambda m: m.project_text(torch.zeros(2, 4, 64))),
        ("matching", lambda m: m.match_logits(torch.zeros(2, 1, 64))),
        ("boxes", lambda m: m.predict_boxes(torch.zeros(2, 1, 64))),
        ("mlm", lambda m: m.mlm_logits(torch.zeros(2, 64))),
        ("imlm", lambda m: m.imlm_logits(torch.zeros(2, 64))),
    ],
)
def test_heads_that_were_not_built(head: str, call: Callable[[XFM], object]) -> None:
    with pytest.raises(UnavailableError, match=head):
        call(XFM(CONFIG, heads=()))


def test_unknown_head_and_missing_fusion() -> None:
    with pytest.raises(InputError, match=r"'mim'.*mlm"):
        XFM(CONFIG, heads=("mim",))  # type: ignore[arg-type]
    without = XFM(CONFIG.replace(fusion_layers=0), heads=())
    with pytest.raises(UnavailableError, match="fusion_layers=0"):
        without.image_memory(torch.zeros(1, 17, 64))
    assert issubclass(UnavailableError, XFMError)


WRONG_KINDS: dict[str, Callable[[XFM, Any], object]] = {
    "pixels": lambda m, x: m.encode_image(x),
    "patch_mask": lambda m, x: m.encode_image(pixels(), x),
    "input_ids": lambda m, x: m.encode_text(x),
    "attention_mask": lambda m, x: m.encode_text(ids(), x),
    "image embeddings": lambda m, x: m.image_memory(x),
    "text embeddings": lambda m, x: m.project_text(x),
    "token_mask": lambda m, x: m.image_memory(torch.zeros(2, 17, 64), x),
    "image_index": lambda m, x: regions(m, x, torch.ones(2, 17)),
    "fused embeddings": lambda m, x: m.match_logits(x),
}


@pytest.mark.parametrize(("name", "call"), WRONG_KINDS.items(), ids=WRONG_KINDS)
@pytest.mark.parametrize("value", [np.zeros((2, 3)), [[1.0]], "text"], ids=["array", "list", "text"])
def test_what_is_no_tensor_is_named(model: XFM, name: str, call: Callable[[XFM, Any], object], value: Any) -> None:
    with pytest.raises(InputError, match=rf"{name} is a {type(value).__name__}"):
        call(model, value)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), -10000.0])
@pytest.mark.parametrize(
    "call",
    [
        lambda m, bad: m.encode_text(ids(), torch.tensor([[0, 0, bad], [0, 0, 0]])),
        lambda m, bad: m.image_memory(torch.zeros(1, 17, 64), torch.full((1, 17), bad)),
        lambda m, bad: m.encode_image(pixels(1, 3, 32, 32), torch.full((1, 16), bad)),
        lambda m, bad: regions(m, torch.tensor([0]), torch.full((1, 17), bad)),
    ],
    ids=["text", "memory", "patches", "regions"],
)
def test_masks_that_are_added_and_nan_are_refused(model: XFM, call: Callable[..., object], bad: float) -> None:
    with pytest.raises(InputError, match=r"mask .*NaN"):
        call(model, bad)


def test_missing_encoders_are_named() -> None:
    with pytest.raises(InputError, match=r"'x'.*vision, text, fusion"):
        XFM(CONFIG, encoders=("x",))  # type: ignore[arg-type]
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
        several = model.fuse(texts, torch.ones(0, 5), model.image_memory(model.encode_image(one)), index)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_values_are_not_infinite_because_their_sum_is(dtype: torch.dtype) -> None:
    config = XFMConfig.preset("tiny")
    large = torch.full((2, 3, config.image_size, config.image_size), torch.finfo(dtype).max, dtype=dtype)
    inputs.check_pixels(large, config)
    large[1, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="pixels of image 1 "):
        inputs.check_pixels(large, config)
