"""The graphs compute what the model computes: padded or in rows here, packed there, to the last digits of fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xfm_fast.errors import UnavailableError
from xfm_fast.export.expected import graph_memory
from xfm_fast.export.graphs import build
from xfm_fast.export.request import GraphName
from xfm_fast.export.slots import Layout
from xfm_fast.models.xfm import XFM

MakeModel = Callable[..., XFM]
LENGTHS = (1, 7, 3, 12, 5, 12)


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> XFM:
    return make_model().double()


def _texts(model: XFM) -> tuple[Tensor, Tensor]:
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(4, model.config.vocab_size, mask.shape)
    ids[:, 0] = model.config.bos_token_id
    return ids.masked_fill(mask == 0, model.config.pad_token_id), mask


def _pixels(model: XFM, images: int) -> Tensor:
    size = model.config.image_size
    return torch.randn(images, 3, size, size).to(model.dtype)


def _run(name: GraphName, model: XFM, *inputs: Tensor, **options: bool) -> tuple[Tensor, ...]:
    graph = build(name, model, "opset23", **options)
    with torch.no_grad():
        results = graph(*inputs)
    sizes = {}
    for spec, value in zip((*graph.inputs, *graph.outputs), (*inputs, *results), strict=True):
        for size, axis in zip(value.shape, spec.dims, strict=True):
            assert not isinstance(axis, str) or sizes.setdefault(axis, size) == size, spec.name
        assert value.shape == spec.shape(sizes), spec.name
    return results


def _close(value: Tensor, expected: Tensor) -> None:
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [-1, 1], ids=["pooled", "local"])
@torch.no_grad()
def test_vision(make_model: MakeModel, depth: int) -> None:
    model = make_model(local_attn_depth=depth).double()
    pixels = _pixels(model, 3)
    embeds, feature = _run("vision", model, pixels)
    expected = model.encode_image(pixels)
    _close(embeds, expected)
    _close(feature, model.project_image(expected))


@torch.no_grad()
def test_text_of_ragged_lengths(model: XFM) -> None:
    ids, mask = _texts(model)
    embeds, feature = _run("text", model, ids, mask)
    expected = model.encode_text(ids, mask)
    _close(embeds[mask.bool()], expected[mask.bool()])
    _close(feature, model.project_text(expected))
    # A row without any token stays finite.
    assert all(
        value.isfinite().all()
        for value in _run("text", model, torch.ones_like(ids), torch.zeros_like(mask))
    )


@torch.no_grad()
def test_image_memory(model: XFM) -> None:
    embeds = torch.randn(
        2, model.config.num_image_tokens, model.config.vision_width, dtype=model.dtype
    )
    expected = graph_memory(model.image_memory(embeds)).values()
    for value, target in zip(_run("image_memory", model, embeds), expected, strict=True):
        _close(value, target)


def _fusion_inputs(model: XFM, images: int) -> tuple[Tensor, Tensor, Tensor]:
    ids, mask = _texts(model)
    embeds = torch.randn(
        images, model.config.num_image_tokens, model.config.vision_width, dtype=model.dtype
    )
    with torch.no_grad():
        return model.encode_text(ids, mask), mask, embeds


@pytest.mark.parametrize("all_tokens", [False, True], ids=["first", "all"])
@pytest.mark.parametrize(
    ("images", "texts"), [(1, 6), (6, 1), (2, 3)], ids=["shared memory", "memory per text", "both"]
)
@torch.no_grad()
def test_fusion(model: XFM, all_tokens: bool, images: int, texts: int) -> None:
    text_embeds, mask, image_embeds = _fusion_inputs(model, images)
    memory = model.image_memory(image_embeds)
    expected = model.fuse(text_embeds, mask, memory, torch.arange(images).repeat_interleave(texts))
    grouped = text_embeds.unflatten(0, (images, texts)), mask.unflatten(0, (images, texts))
    fused, logits, boxes = _run(
        "fusion", model, *grouped, *graph_memory(memory).values(), all_tokens=all_tokens
    )
    if all_tokens:
        _close(fused.flatten(0, 1)[mask.bool()], expected[mask.bool()])
    else:
        _close(fused.flatten(0, 1), expected[:, 0])
    _close(logits.flatten(0, 1), model.match_logits(expected))
    _close(boxes.flatten(0, 1), model.predict_boxes(expected))


def _in_rows(images: list[list[list[int]]], length: int) -> Layout:
    layout = Layout.of(images, LENGTHS, length)
    # Every token is found again where it was written.
    spread = layout.spread(torch.arange(sum(LENGTHS)) + 1, 0)
    assert torch.equal(spread.flatten()[layout.target], layout.source + 1)
    assert (
        int((spread == 0).sum())
        == int((layout.segments == 0).sum())
        == spread.numel() - len(layout.target)
    )
    return layout


@pytest.mark.parametrize(
    ("rows", "length"),
    [([[3], [1, 2, 0], [5], [4]], 14), ([[0, 1, 2, 3, 4, 5]], 40)],
    ids=["rows", "one row"],
)
@torch.no_grad()
def test_texts_in_rows(model: XFM, rows: list[list[int]], length: int) -> None:
    ids, mask = _texts(model)
    real, layout, padding = mask.bool(), _in_rows([rows], length), model.config.pad_token_id
    positions = model.text_encoder.roberta.embeddings.position_ids(ids)
    spread_values = (layout.spread(value[real], padding)[0] for value in (ids, positions))
    embeds, feature = _run(
        "text", model, *spread_values, layout.segments[0], layout.firsts[0], packed=True
    )
    expected = model.encode_text(ids, mask)
    _close(embeds.flatten(0, 1)[layout.target], expected[real][layout.source])
    _close(feature[layout.results], model.project_text(expected)[layout.texts])


@pytest.mark.parametrize("all_tokens", [False, True], ids=["first", "all"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "images",
    [[[[3], [1, 2, 0], [5], [4]]], [[[0, 1], [3]], [[2], []], [[4], [5]]]],
    ids=["shared memory", "several memories"],
)
@torch.no_grad()
def test_fusion_in_rows(
    make_model: MakeModel, all_tokens: bool, layers: int, images: list[list[list[int]]]
) -> None:
    model = make_model(fusion_layers=layers).double()
    text_embeds, mask, image_embeds = _fusion_inputs(model, len(images))
    real, layout = mask.bool(), _in_rows(images, 14)
    index = torch.tensor(
        [
            next(i for i, rows in enumerate(images) if any(t in row for row in rows))
            for t in range(6)
        ]
    )
    memory = model.image_memory(image_embeds)
    expected = model.fuse(text_embeds, mask, memory, index)
    fused, logits, boxes, *every = _run(
        "fusion", model, layout.spread(text_embeds[real]), layout.segments, layout.firsts,
        *graph_memory(memory).values(), all_tokens=all_tokens, packed=True,
    )  # fmt: skip
    for value, target in (
        (fused, expected[:, 0]), (logits, model.match_logits(expected)), (boxes, model.predict_boxes(expected)),
    ):  # fmt: skip
        _close(value.flatten(0, 1)[layout.results], target[layout.texts])
    assert len(every) == int(all_tokens)
    for tokens in every:
        _close(tokens.flatten(0, 2)[layout.target], expected[real][layout.source])


def test_missing_parts_of_a_model_are_named(small_model: XFM) -> None:
    config = small_model.config
    cases: list[tuple[GraphName, XFM, str]] = [
        ("match", XFM(config, heads=("boxes",)), "'matching'"),
        ("fusion", XFM(config, heads=(), encoders=("vision",)), "'fusion'"),
        ("image_memory", XFM(config.replace(fusion_layers=0), heads=()), "fusion layers"),
        ("nlvr2", small_model, "'nlvr2'"),
        ("decoder_step", small_model, "'decoder_step'"),
        ("nonsense", small_model, "'nonsense'"),  # pyright: ignore[reportAssignmentType]
    ]
    for name, model, missing in cases:
        with pytest.raises(UnavailableError, match=missing):
            build(name, model, "opset23")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@torch.no_grad()
def test_a_feature_of_zeros_is_zeros(make_model: MakeModel, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    model.vision_proj.weight.zero_()
    model.vision_proj.bias.zero_()
    _, feature = build("vision", model, "opset23")(_pixels(model, 1))
    assert not feature.any()
