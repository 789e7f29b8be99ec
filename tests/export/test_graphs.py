"""The graphs compute what the model computes: padded here, packed there, to the last digits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xfm_fast.errors import UnavailableError
from xfm_fast.export.expected import graph_memory
from xfm_fast.export.graphs import AttentionForm, GraphName, build, in_dtype
from xfm_fast.export.layout import Layout
from xfm_fast.export.request import GRAPHS
from xfm_fast.models.xfm import XFM

MakeModel = Callable[..., XFM]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
LENGTHS = (1, 7, 3, 12, 5, 12)

# That of TensorRT for RTX has the biases of keys and values elsewhere.
each_form = pytest.mark.parametrize("form", ["opset23", "primitives"])
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])


def _texts(model: XFM, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    length = max(lengths)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, model.config.vocab_size, mask.shape)
    ids[:, 0] = model.config.bos_token_id
    return ids.masked_fill(mask == 0, model.config.pad_token_id), mask


def _pixels(model: XFM, images: int) -> Tensor:
    size = model.config.image_size
    return torch.randn(images, 3, size, size, dtype=torch.float32).to(model.dtype)


def _run(
    name: GraphName, model: XFM, *inputs: Tensor, form: AttentionForm = "opset23", **options: bool
) -> tuple[Tensor, ...]:
    graph = build(name, model, form, **options)
    with torch.no_grad():
        results = graph(*inputs)
    sizes = {}
    for spec, value in zip((*graph.inputs, *graph.outputs), (*inputs, *results), strict=True):
        for place, axis in spec.axes.items():
            assert sizes.setdefault(axis.name, value.shape[place]) == value.shape[place], spec.name
        assert value.shape == spec.shape(sizes), spec.name
    return results


def _close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[found.dtype])


@each_dtype
@pytest.mark.parametrize("depth", [-1, 1], ids=["pooled", "local"])
def test_vision(make_model: MakeModel, dtype: torch.dtype, depth: int) -> None:
    model = make_model(local_attn_depth=depth).to(dtype)
    pixels = _pixels(model, 3)
    embeds, feature = _run("vision", model, pixels)
    with torch.no_grad():
        expected = model.encode_image(pixels)
        _close(embeds, expected)
        _close(feature, model.project_image(expected))


@each_dtype
@each_form
def test_text_of_ragged_lengths(make_model: MakeModel, dtype: torch.dtype, form: AttentionForm) -> None:
    model = make_model().to(dtype)
    ids, mask = _texts(model)
    embeds, feature = _run("text", model, ids, mask, form=form)
    with torch.no_grad():
        expected = model.encode_text(ids, mask)
        _close(embeds[mask.bool()], expected[mask.bool()])
        _close(feature, model.project_text(expected))


@each_dtype
def test_image_memory(make_model: MakeModel, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    embeds = torch.randn(2, model.config.num_image_tokens, model.config.vision_width, dtype=dtype)
    memory = _run("image_memory", model, embeds)
    with torch.no_grad():
        for found, expected in zip(memory, graph_memory(model.image_memory(embeds)).values(), strict=True):
            _close(found, expected)


def _fusion_inputs(model: XFM, images: int) -> tuple[Tensor, Tensor, Tensor]:
    ids, mask = _texts(model)
    embeds = torch.randn(images, model.config.num_image_tokens, model.config.vision_width, dtype=model.dtype)
    with torch.no_grad():
        return model.encode_text(ids, mask), mask, embeds


@each_dtype
@each_form
@pytest.mark.parametrize("all_tokens", [False, True], ids=["first", "all"])
@pytest.mark.parametrize(
    ("images", "texts"), [(1, 6), (6, 1), (2, 3)], ids=["shared memory", "memory per text", "both"]
)
def test_fusion(
    make_model: MakeModel, dtype: torch.dtype, form: AttentionForm, all_tokens: bool, images: int, texts: int
) -> None:
    model = make_model().to(dtype)
    text_embeds, mask, image_embeds = _fusion_inputs(model, images)
    with torch.no_grad():
        memory = model.image_memory(image_embeds)
        index = torch.arange(images).repeat_interleave(texts)
        expected = model.fuse(text_embeds, mask, memory, index)
        logits, boxes = model.match_logits(expected), model.predict_boxes(expected)
    grouped = text_embeds.unflatten(0, (images, texts)), mask.unflatten(0, (images, texts))
    fused, match_logits, found_boxes = _run(
        "fusion", model, *grouped, *graph_memory(memory).values(), form=form, all_tokens=all_tokens
    )
    if all_tokens:
        _close(fused.flatten(0, 1)[mask.bool()], expected[mask.bool()])
    else:
        _close(fused.flatten(0, 1), expected[:, 0])
    _close(match_logits.flatten(0, 1), logits)
    _close(found_boxes.flatten(0, 1), boxes)


def _in_rows(images: list[list[list[int]]], length: int, lengths: tuple[int, ...] = LENGTHS) -> Layout:
    layout = Layout.of(images, lengths, length)
    # What is written down is where every token is found again.
    tokens = torch.arange(sum(lengths))
    spread = layout.spread(tokens + 1)
    assert torch.equal(spread.flatten()[layout.place], layout.source + 1)
    assert int((spread == 0).sum()) == int((layout.segments == 0).sum()) == spread.numel() - len(layout.place)
    return layout


@each_dtype
@pytest.mark.parametrize(
    ("rows", "length"), [([[3], [1, 2, 0], [5], [4]], 14), ([[0, 1, 2, 3, 4, 5]], 40)], ids=["rows", "one row"]
)
def test_texts_in_rows_are_texts(
    make_model: MakeModel, dtype: torch.dtype, rows: list[list[int]], length: int
) -> None:  # fmt: skip
    model = make_model().to(dtype)
    ids, mask = _texts(model)
    real = mask.bool()
    layout = _in_rows([rows], length)
    positions = model.text_encoder.roberta.embeddings.position_ids(ids)
    padding = model.config.pad_token_id
    given = (layout.spread(value[real], padding)[0] for value in (ids, positions))
    embeds, feature = _run("text", model, *given, layout.segments[0], layout.firsts[0], packed=True)
    with torch.no_grad():
        expected = model.encode_text(ids, mask)
        _close(embeds.flatten(0, 1)[layout.place], expected[real][layout.source])
        _close(feature[layout.found], model.project_text(expected)[layout.texts])


@each_dtype
@pytest.mark.parametrize("all_tokens", [False, True], ids=["first", "all"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "images",
    [[[[3], [1, 2, 0], [5], [4]]], [[[0]], [[1]], [[2]], [[3]], [[4]], [[5]]], [[[0, 1], [3]], [[2], []], [[4], [5]]]],
    ids=["shared memory", "memory per text", "both"],
)
def test_fusion_in_rows(
    make_model: MakeModel, dtype: torch.dtype, all_tokens: bool, layers: int, images: list[list[list[int]]]
) -> None:
    model = make_model(fusion_layers=layers).to(dtype)
    text_embeds, mask, image_embeds = _fusion_inputs(model, len(images))
    real, layout = mask.bool(), _in_rows(images, 14)
    index = torch.tensor([next(i for i, rows in enumerate(images) if any(t in row for row in rows)) for t in range(6)])
    with torch.no_grad():
        memory = model.image_memory(image_embeds)
        expected = model.fuse(text_embeds, mask, memory, index)
        logits, boxes = model.match_logits(expected), model.predict_boxes(expected)
    fused, match_logits, found_boxes, *every = _run(
        "fusion", model, layout.spread(text_embeds[real]), layout.segments, layout.firsts,
        *graph_memory(memory).values(), all_tokens=all_tokens, packed=True,
    )  # fmt: skip
    for found, wanted in ((fused, expected[:, 0]), (match_logits, logits), (found_boxes, boxes)):
        _close(found.flatten(0, 1)[layout.found], wanted[layout.texts])
    assert len(every) == int(all_tokens)
    for tokens in every:
        _close(tokens.flatten(0, 2)[layout.place], expected[real][layout.source])


@each_dtype
def test_match_is_the_whole_way(make_model: MakeModel, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    pixels = _pixels(model, 2)
    ids, mask = _texts(model)
    (scores,) = _run("match", model, pixels, ids.view(2, 3, -1), mask.view(2, 3, -1))
    with torch.no_grad():
        memory = model.image_memory(model.encode_image(pixels))
        fused = model.fuse(model.encode_text(ids, mask), mask, memory, torch.arange(2).repeat_interleave(3))
        _close(scores.flatten(), model.match_logits(fused)[:, 1])


def test_padding_changes_nothing(small_model: XFM) -> None:
    ids, mask = _texts(small_model, (5, 2))
    _, feature = _run("text", small_model, ids, mask)
    wide = torch.nn.functional.pad(ids, (0, 30), value=1), torch.nn.functional.pad(mask, (0, 30))
    _close(_run("text", small_model, *wide)[1], feature)


def test_a_row_of_padding_stays_finite(small_model: XFM) -> None:
    ids, mask = torch.ones(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)
    assert all(value.isfinite().all() for value in _run("text", small_model, ids, mask))


def test_graphs_share_the_parameters(small_model: XFM) -> None:
    ours = {id(parameter) for parameter in small_model.parameters()}
    for name in GRAPHS:
        graph = build(name, small_model, "primitives")
        assert {id(parameter) for parameter in graph.parameters()} <= ours


def test_memory_graph_holds_keys_and_values_alone(small_model: XFM) -> None:
    config = small_model.config
    numbers = sum(p.numel() for p in build("image_memory", small_model, "opset23").parameters())
    assert numbers == config.fusion_layers * 2 * config.text_width * (config.vision_width + 1)


def test_outputs_follow_the_heads(small_model: XFM) -> None:
    def outputs(name: GraphName, *heads: str) -> list[str]:
        return [spec.name for spec in build(name, XFM(small_model.config, heads=heads), "opset23").outputs]  # pyright: ignore[reportArgumentType]

    assert outputs("vision") == ["image_embeds"]
    assert outputs("text", "contrastive") == ["text_embeds", "text_feature"]
    assert outputs("fusion", "boxes") == ["fused", "boxes"]
    assert outputs("fusion", "matching") == ["fused", "match_logits"]


def test_what_a_model_cannot_give_is_named(small_model: XFM) -> None:
    config = small_model.config
    with pytest.raises(UnavailableError, match="'matching'"):
        build("match", XFM(config, heads=("boxes",)), "opset23")
    with pytest.raises(UnavailableError, match="'fusion'"):
        build("fusion", XFM(config, heads=(), encoders=("vision",)), "opset23")
    with pytest.raises(UnavailableError, match="fusion layers"):
        build("image_memory", XFM(config.replace(fusion_layers=0), heads=()), "opset23")
    with pytest.raises(UnavailableError, match="'nonsense'"):
        build("nonsense", small_model, "opset23")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["vision", "text"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_feature_of_zeros_is_zeros(make_model: MakeModel, dtype: torch.dtype, name: GraphName) -> None:
    model = make_model().to(dtype)
    with torch.no_grad():
        for projection in (model.vision_proj, model.text_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        inputs = (_pixels(model, 1),) if name == "vision" else _texts(model, (4,))
        _, feature = build(name, model, "opset23")(*inputs)
    assert torch.equal(feature, torch.zeros_like(feature))


def test_a_graph_in_another_type_is_converted_weight_by_weight(make_model: MakeModel) -> None:
    """As if the copy of all were converted, with shared weights still shared, and the model left alone."""
    model = make_model()
    graph = build("match", model, "opset23")
    assert in_dtype(graph, torch.float32) is graph
    made, expected = in_dtype(graph, torch.bfloat16), copy.deepcopy(graph).to(torch.bfloat16)
    for part in ("named_parameters", "named_buffers"):
        mine, theirs = dict(getattr(made, part)()), dict(getattr(expected, part)())
        assert [*mine] == [*theirs]
        assert all(torch.equal(mine[name], theirs[name]) and type(mine[name]) is type(theirs[name]) for name in mine)
    assert {parameter.requires_grad for parameter in made.parameters()} == {True}
    assert model.dtype == torch.float32
    assert not {each.data_ptr() for each in made.parameters()} & {each.data_ptr() for each in graph.parameters()}
