"""Heat maps equal Grad-CAM on a plain fusion encoder; boxes are selected by the published rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.agreement import relative_error
from xfm_fast import XFM, XFMConfig
from xfm_fast.errors import DataError, InputError
from xfm_fast.tasks.grounding import GroundingModel
from xfm_fast.tasks.weak_grounding import best_box, cross_attention_heatmap, read_detections

CONFIG = XFMConfig.preset("tiny", fusion_layers=4)
LENGTHS = (9, 3, 6, 4, 7)
BUILDERS: dict[str, Callable[[], XFM]] = {
    "matching": lambda: XFM(CONFIG, heads=("matching", "contrastive")),
    "boxes": lambda: GroundingModel(CONFIG),
}


@pytest.fixture(scope="module", params=list(BUILDERS))
def model(request: pytest.FixtureRequest) -> XFM:
    torch.manual_seed(3)
    model = BUILDERS[request.param]().double().eval()
    with torch.no_grad():
        # As initialised, all patches would be attended to alike.
        for name, parameter in model.named_parameters():
            if "crossattention.self" in name or "itm_head" in name or "bbox_head" in name:
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of as many images as texts, and texts of different lengths."""
    torch.manual_seed(4)
    ids = torch.randint(4, CONFIG.vocab_size, (len(LENGTHS), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return (
        torch.randn(len(LENGTHS), 3, 32, 32).double(),
        ids.where(mask, torch.tensor(CONFIG.pad_token_id)),
        mask.long(),
    )


def _attention(block: Any, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities `[H, t, M]` of a layer's attention, and the values `[H, M, D]` that they weigh."""
    attention = block.self
    q, k, v = (
        linear(states).unflatten(-1, (attention.heads, -1)).transpose(0, 1)
        for linear, states in (
            (attention.query, x),
            (attention.key, memory),
            (attention.value, memory),
        )
    )
    return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1), v


def _add_norm(end: Any, branch: Tensor, x: Tensor) -> Tensor:
    return F.layer_norm(
        x + end.dense(branch),
        x.shape[-1:],
        end.LayerNorm.weight,
        end.LayerNorm.bias,
        end.LayerNorm.eps,
    )


def _plain_heat(
    model: XFM, pixels: Tensor, ids: Tensor, mask: Tensor, layer: int, counted: Tensor
) -> Tensor:
    """Compute the heat map `[grid, grid]` of one text over one image, without padding."""
    with torch.no_grad():
        memory = model.encode_image(pixels[None])[0]
        x = model.encode_text(ids[None], mask[None])[0][mask.bool()]
    recorded = torch.empty(0)
    for index, block in enumerate(model.fusion_encoder.roberta.encoder):
        for attention in (block.attention, block.crossattention):
            crossing = attention is block.crossattention
            probabilities, values = _attention(attention, x, memory if crossing else x)
            if index == layer and crossing:
                recorded = probabilities
            x = _add_norm(attention.output, (probabilities @ values).transpose(0, 1).flatten(1), x)
        x = _add_norm(block.output, F.gelu(block.intermediate.dense(x)), x)
    if "matching" in model.heads:
        (gradient,) = torch.autograd.grad(model.itm_head(x[:1])[0, 1], recorded)
        weight = gradient.clamp(min=0)
    else:
        box = model.bbox_head(x[:1]).sigmoid()[0]
        weight = sum(
            torch.autograd.grad(coordinate, recorded, retain_graph=True)[0].abs()
            for coordinate in box
        )
    heat = (weight * recorded).mean(0)[counted[mask.bool()].bool()].mean(0)[1:]
    return heat.detach().view(CONFIG.grid, CONFIG.grid)


def _inner(mask: Tensor) -> Tensor:
    """Tokens between the first and the last real one."""
    counted = mask.clone()
    for row in counted:
        positions = row.nonzero().flatten()
        row[positions[0]] = row[positions[-1]] = 0
    return counted


@pytest.mark.parametrize(("layer", "shared"), [(0, False), (2, True)])
def test_equals_plain_grad_cam(
    model: XFM, batch: tuple[Tensor, Tensor, Tensor], layer: int, shared: bool
) -> None:
    pixels, ids, mask = batch
    index = torch.tensor([2, 0, 2, 4, 0]) if shared else None
    heat = cross_attention_heatmap(model, pixels, ids, mask, layer=layer, image_index=index)
    images = torch.arange(len(ids)) if index is None else index
    truth = torch.stack(
        [
            _plain_heat(model, pixels[i], ids[p], mask[p], layer, _inner(mask)[p])
            for p, i in enumerate(images.tolist())
        ]
    )
    assert heat.shape == (len(ids), CONFIG.grid, CONFIG.grid)
    assert not heat.requires_grad
    assert float(truth.flatten(1).amax(1).min()) > 0
    for actual, expected in zip(heat, truth, strict=True):
        assert relative_error(actual, expected) < 1e-10


def test_chosen_tokens_and_masks_with_holes(
    model: XFM, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    pixels, ids, mask = batch
    mask = mask.clone()
    mask[0, 3] = mask[4, 1] = 0
    tokens = torch.zeros_like(mask)
    tokens[:, 0] = tokens[:, 1] = 1
    for layer, counted in ((1, None), (1, tokens), (3, tokens | mask)):
        selected = (mask if counted is None else counted).clone()
        if layer == 3:
            selected[4, 1] = 1
        heat = cross_attention_heatmap(
            model, pixels, ids, mask, layer=layer, tokens=None if counted is None else selected
        )
        for p, actual in enumerate(heat):
            expected = _inner(mask)[p] if counted is None else selected[p] * mask[p]
            assert (
                relative_error(
                    actual, _plain_heat(model, pixels[p], ids[p], mask[p], layer, expected)
                )
                < 1e-10
            )


def test_the_model_is_left_as_it_was(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    pixels, ids, mask = batch
    model = XFM(XFMConfig.preset("tiny"), heads=("matching",)).double().train()
    model.vision_encoder.eval()
    before = [module.training for module in model.modules()]
    block = model.fusion_encoder.roberta.encoder[0]
    assert isinstance(block, nn.Module)
    attributes = set(vars(block))
    with torch.inference_mode():
        first = cross_attention_heatmap(model, pixels.clone(), ids.clone(), mask.clone())
    # Dropout was off, or two calls would differ.
    torch.testing.assert_close(first, cross_attention_heatmap(model, pixels, ids, mask))
    assert [module.training for module in model.modules()] == before
    assert set(vars(block)) == attributes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_best_box_is_the_published_rule() -> None:
    generator = torch.Generator().manual_seed(5)
    width, height = 61, 47
    for _ in range(20):
        heat = torch.rand(6, 6, generator=generator) ** 8
        corners = torch.rand(12, 2, generator=generator) * torch.tensor([50.0, 40.0])
        boxes = torch.cat(
            [corners, 1 + torch.rand(12, 2, generator=generator) * 30], dim=1
        ).double()
        dense = F.interpolate(heat.double()[None, None], size=(height, width), mode="bicubic")[0, 0]
        scores = [
            float(dense[int(y) : int(y + h), int(x) : int(x + w)].sum()) / (w * h) ** 0.5
            for x, y, w, h in boxes.tolist()
        ]
        assert best_box(heat, boxes, (width, height)) == int(np.argmax(scores))
    heat = torch.zeros(4, 4)
    heat[0, 0] = 1
    assert best_box(heat, [[20, 20, 10, 10], [-5, -5, 16, 16], [0, 0, 40, 40]], (40, 40)) == 1
    for shape in ((0, 4), (3, 5), (4,)):
        with pytest.raises(InputError, match="boxes are"):
            best_box(heat, torch.ones(shape), (40, 40))


def test_both_forms_of_detections(tmp_path: Path) -> None:
    listed = [
        {"det_id": 0, "image_id": 7, "box": [1, 2, 3, 4], "category_id": 1, "score": 0.9},
        {"image": "a.png", "box": [0, 0, 5, 5]},
        {"image_id": 7, "box": [1.5, 2, 3, 4]},
    ]
    for content in (listed, {"7": [[1, 2, 3, 4, 0.9], [1.5, 2, 3, 4]], "a.png": [[0, 0, 5, 5]]}):
        (tmp_path / "dets.json").write_text(json.dumps(content))
        actual = {
            image: boxes.tolist()
            for image, boxes in read_detections(tmp_path / "dets.json").items()
        }
        assert actual == {"7": [[1, 2, 3, 4], [1.5, 2, 3, 4]], "a.png": [[0, 0, 5, 5]]}


@pytest.mark.parametrize(
    ("content", "location"),
    [
        ("{", "dets"),
        ("[[1, 2, 3, 4]]", "element 0"),
        (
            '[{"image_id": 1, "box": [1, 2, 3, 4]}, {"image_id": 1, "box": [1, 2, 0, 4]}]',
            "element 1",
        ),
        ('{"1": [[1, 2, 3, NaN]]}', "image 1, box 0"),
    ],
)
def test_bad_detections(tmp_path: Path, content: str, location: str) -> None:
    (tmp_path / "dets.json").write_text(content)
    with pytest.raises(DataError, match=location):
        read_detections(tmp_path / "dets.json")
