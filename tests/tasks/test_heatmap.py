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
from xfm_fast.errors import DataError
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
    made = BUILDERS[request.param]().double().eval()
    with torch.no_grad():
        # As initialised, all patches would be attended to alike.
        for name, parameter in made.named_parameters():
            if "crossattention.self" in name or "itm_head" in name or "bbox_head" in name:
                parameter.normal_(0, 0.3)
    return made


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
    own = block.self
    q, k, v = (
        linear(states).unflatten(-1, (own.heads, -1)).transpose(0, 1)
        for linear, states in ((own.query, x), (own.key, memory), (own.value, memory))
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
    """One text over one image, without padding: `[grid, grid]`."""
    with torch.no_grad():
        memory = model.encode_image(pixels[None])[0]
        x = model.encode_text(ids[None], mask[None])[0][mask.bool()]
    kept = torch.empty(0)
    for number, block in enumerate(model.fusion_encoder.roberta.encoder):
        for attention in (block.attention, block.crossattention):
            crossing = attention is block.crossattention
            probabilities, values = _attention(attention, x, memory if crossing else x)
            if number == layer and crossing:
                kept = probabilities
            x = _add_norm(attention.output, (probabilities @ values).transpose(0, 1).flatten(1), x)
        x = _add_norm(block.output, F.gelu(block.intermediate.dense(x)), x)
    if "matching" in model.heads:
        (gradient,) = torch.autograd.grad(model.itm_head(x[:1])[0, 1], kept)
        weight = gradient.clamp(min=0)
    else:
        box = model.bbox_head(x[:1]).sigmoid()[0]
        weight = sum(torch.autograd.grad(each, kept, retain_graph=True)[0].abs() for each in box)
    heat = (weight * kept).mean(0)[counted[mask.bool()].bool()].mean(0)[1:]
    return heat.detach().view(CONFIG.grid, CONFIG.grid)


def _inner(mask: Tensor) -> Tensor:
    """Tokens between the first and the last real one."""
    counted = mask.clone()
    for row in counted:
        places = row.nonzero().flatten()
        row[places[0]] = row[places[-1]] = 0
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
    for found, wanted in zip(heat, truth, strict=True):
        assert relative_error(found, wanted) < 1e-10


def test_chosen_tokens_and_masks_with_holes(
    model: XFM, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    pixels, ids, mask = batch
    mask = mask.clone()
    mask[0, 3] = mask[4, 1] = 0
    tokens = torch.zeros_like(mask)
    tokens[:, 0] = tokens[:, 1] = 1
    for layer, counted in ((1, None), (1, tokens), (3, tokens | mask)):
        given = (mask if counted is None else counted).clone()
        if layer == 3:
            given[4, 1] = 1
        heat = cross_attention_heatmap(
            model, pixels, ids, mask, layer=layer, tokens=None if counted is None else given
        )
        for p, found in enumerate(heat):
            wanted = _inner(mask)[p] if counted is None else given[p] * mask[p]
            assert (
                relative_error(found, _plain_heat(model, pixels[p], ids[p], mask[p], layer, wanted))
                < 1e-10
            )


def test_the_model_is_left_as_it_was(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    pixels, ids, mask = batch
    made = XFM(XFMConfig.preset("tiny"), heads=("matching",)).double().train()
    made.vision_encoder.eval()
    before = [module.training for module in made.modules()]
    block = made.fusion_encoder.roberta.encoder[0]
    assert isinstance(block, nn.Module)
    attributes = set(vars(block))
    with torch.inference_mode():
        first = cross_attention_heatmap(made, pixels.clone(), ids.clone(), mask.clone())
    # Dropout was off, or two calls would differ.
    torch.testing.assert_close(first, cross_attention_heatmap(made, pixels, ids, mask))
    assert [module.training for module in made.modules()] == before
    assert set(vars(block)) == attributes
    assert all(parameter.grad is None for parameter in made.parameters())


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


def test_both_forms_of_detections(tmp_path: Path) -> None:
    listed = [
        {"det_id": 0, "image_id": 7, "box": [1, 2, 3, 4], "category_id": 1, "score": 0.9},
        {"image": "a.png", "box": [0, 0, 5, 5]},
        {"image_id": 7, "box": [1.5, 2, 3, 4]},
    ]
    for content in (listed, {"7": [[1, 2, 3, 4, 0.9], [1.5, 2, 3, 4]], "a.png": [[0, 0, 5, 5]]}):
        (tmp_path / "dets.json").write_text(json.dumps(content))
        found = {
            image: boxes.tolist()
            for image, boxes in read_detections(tmp_path / "dets.json").items()
        }
        assert found == {"7": [[1, 2, 3, 4], [1.5, 2, 3, 4]], "a.png": [[0, 0, 5, 5]]}


@pytest.mark.parametrize(
    ("content", "place"),
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
def test_bad_detections(tmp_path: Path, content: str, place: str) -> None:
    (tmp_path / "dets.json").write_text(content)
    with pytest.raises(DataError, match=place):
        read_detections(tmp_path / "dets.json")
