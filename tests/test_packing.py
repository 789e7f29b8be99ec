"""Packed batches against padded ones: holes in masks, orders, empty texts, and what fusion does with them."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.agreement import inputs_of, with_weights
from tests.conftest import config
from tests.models.hidden_states import record_hidden_states
from xfm_fast import packing as packing_module
from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import ImageGroups, Packing, Reads, offsets


@st.composite
def masks(draw: st.DrawFn, *, empty: bool = True) -> Tensor:
    """`[P, L]` boolean with any pattern of holes, P from 0."""
    texts, length = draw(st.integers(0 if empty else 1, 6)), draw(st.integers(1, 7))
    bits = draw(st.lists(st.booleans(), min_size=texts * length, max_size=texts * length))
    mask = torch.tensor(bits, dtype=torch.bool).view(texts, length)
    if not empty:
        # Padding is on the right; holes may be anywhere else.
        mask[:, 0] = True
    return mask


@st.composite
def ordered_masks(draw: st.DrawFn) -> tuple[Tensor, Tensor | None]:
    mask = draw(masks())
    order = draw(st.one_of(st.none(), st.permutations(range(len(mask)))))
    return mask, None if order is None else torch.tensor(order, dtype=torch.long)


@given(ordered_masks())
def test_packing_moves_real_tokens_and_nothing_else(case: tuple[Tensor, Tensor | None]) -> None:
    mask, order = case
    texts, length = mask.shape
    padded = torch.arange(1, texts * length + 1).view(texts, length)
    packing = Packing.from_mask(mask, order=order)
    packed = packing.pack(padded)
    rows = range(texts) if order is None else order.tolist()
    assert packed.tolist() == [value for row in rows for value in padded[row][mask[row]].tolist()]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.diff().tolist() == [int(mask[row].sum()) for row in rows]
    assert packing.longest == max((int(row.sum()) for row in mask), default=0)
    assert torch.equal(packing.unpad(packed), padded * mask)


@given(ordered_masks())
def test_keeping_padding_keeps_every_token_and_marks_the_real_ones(
    case: tuple[Tensor, Tensor | None],
) -> None:
    mask, order = case
    packing = Packing.from_mask(mask, order=order, keep_padding=True)
    padded = torch.arange(mask.numel()).view(mask.shape)
    assert torch.equal(packing.unpad(packing.pack(padded)), padded)
    assert packing.key_mask is not None
    assert torch.equal(packing.unpad(packing.key_mask), mask)


@given(st.lists(st.integers(0, 3), max_size=8))
def test_groups_of_any_index(index: list[int]) -> None:
    groups = ImageGroups.from_index(torch.tensor(index, dtype=torch.long), 4)
    assert groups.cu_texts.diff().tolist() == [index.count(image) for image in range(4)]
    order = range(len(index)) if groups.order is None else groups.order.tolist()
    assert [index[text] for text in order] == sorted(index)
    assert sorted(order) == list(range(len(index)))
    # Grouped texts keep their order, which spares the permutation where there is nothing to sort.
    assert (groups.order is None) == (index == sorted(index))


@given(masks(empty=False))
def test_packing_by_lengths_that_the_host_knows(mask: Tensor) -> None:
    """On a GPU the positions are found without asking it how many there are."""
    lengths = mask.sum(1).tolist()
    expected = Packing.from_mask(mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "on_host", lambda tensor: False)
        found = Packing.from_mask(mask, lengths=lengths)
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.cu_seqlens, expected.cu_seqlens)
    assert found.longest == expected.longest
    with pytest.raises(InputError, match="lengths"):
        Packing.from_mask(mask, lengths=[*lengths[:-1], (lengths[-1] + 1) % (mask.shape[1] + 1)])


def test_nothing_waits_for_a_device_where_the_host_knows_the_lengths() -> None:
    """A tensor on `meta` has no values to read."""
    mask = torch.ones(3, 5, device="meta")
    packing = Packing.from_mask(mask, lengths=[2, 5, 0])
    assert packing.positions.shape == (7,)
    assert packing.longest == 5
    kept = Packing.from_mask(mask, keep_padding=True)
    assert kept.positions.shape == (15,)
    assert kept.longest == 5
    groups = ImageGroups.from_index(torch.tensor([1, 0, 1]), 2, torch.device("meta"))
    assert groups.cu_texts.device.type == "meta"
    assert groups.order is not None
    with pytest.raises(InputError, match="lengths"):
        Packing.from_mask(mask, lengths=[2, 6, 0])


@settings(max_examples=20)
@given(masks(empty=False), st.integers(0, 10**6))
def test_a_last_layer_that_computes_reads_alone(mask: Tensor, seed: int) -> None:
    """Any tokens of any text, some twice, some texts without one."""
    model = MODEL
    ids, embeds = batch(model, mask, len(mask))
    packing = Packing.from_mask(mask)
    draw = random.Random(seed)
    places = [draw.choices(range(length), k=draw.randint(0, 3)) for length in mask.sum(1).tolist()]
    starts = packing.cu_seqlens.tolist()
    rows = torch.tensor(
        [starts[text] + place for text, of in enumerate(places) for place in of], dtype=torch.long
    )
    reads = Reads(cu_seqlens=offsets(torch.tensor([len(of) for of in places])), rows=rows)
    with torch.inference_mode():
        whole = model.text_encoder(ids, packing)
        assert torch.allclose(
            model.text_encoder(ids, packing, reads=reads), whole[rows], rtol=0, atol=1e-12
        )
        memory, groups = (
            model.image_memory(embeds),
            ImageGroups.from_index(torch.arange(len(mask)), len(mask)),
        )
        fused = model.fusion_encoder(whole, packing, memory, groups)
        read = model.fusion_encoder(whole, packing, memory, groups, reads=reads)
        assert torch.allclose(read, fused[rows], rtol=0, atol=1e-12)


torch.manual_seed(0)
MODEL = XFM(XFMConfig.preset("tiny")).double().eval()


def batch(model: XFM, mask: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Text ids with `pad` where the mask is 0, and image embeddings."""
    ids = torch.randint(4, model.config.vocab_size, mask.shape)
    embeds = torch.randn(
        images, model.config.num_image_tokens, model.config.vision_width, dtype=torch.float64
    )
    return ids.masked_fill(~mask, model.config.pad_token_id), embeds


@settings(max_examples=20)
@given(masks(empty=False))
def test_holes_are_left_out_and_zero(mask: Tensor) -> None:
    """A text with holes is the text without them; padded positions are zero."""
    model = MODEL
    ids, embeds = batch(model, mask, len(mask))
    with torch.inference_mode():
        text = model.encode_text(ids, mask)
        fused = model.fuse(text, mask, model.image_memory(embeds))
        for row, real in enumerate(mask):
            alone = model.encode_text(ids[row : row + 1, real])
            assert torch.allclose(text[row, real], alone[0], rtol=0, atol=1e-12)
            memory = model.image_memory(embeds[row : row + 1])
            assert torch.allclose(
                fused[row, real], model.fuse(alone, real[real][None], memory)[0], rtol=0, atol=1e-12
            )
    assert not text[~mask].any()
    assert not fused[~mask].any()


@settings(max_examples=20)
@given(masks(empty=False), st.data())
def test_shuffled_texts_are_fused_as_pair_by_pair(mask: Tensor, data: st.DataObject) -> None:
    model, images = MODEL, 3
    index = torch.tensor(
        data.draw(st.lists(st.integers(0, images - 1), min_size=len(mask), max_size=len(mask)))
    )
    ids, embeds = batch(model, mask, images)
    visible = torch.rand(images, embeds.shape[1]) < 0.7
    visible[:, 0] = True
    with torch.inference_mode():
        text = model.encode_text(ids, mask)
        memory = model.image_memory(embeds, visible)
        with record_hidden_states(model) as states:
            fused = model.fuse(text, mask, memory, index)
        first = model.fuse(text, mask, memory, index, first_token_only=True)
        padded = model.fuse(text, mask, memory, index, keep_padding=True)
        for row, image in enumerate(index.tolist()):
            one = slice(row, row + 1)
            alone = model.fuse(text[one], mask[one], memory.select(slice(image, image + 1)))
            assert torch.allclose(fused[one], alone, rtol=0, atol=1e-12)
    leading = fused[torch.arange(len(mask)), mask.long().argmax(1)]
    assert torch.allclose(first[:, 0], leading, rtol=0, atol=1e-12)
    assert torch.allclose(padded[mask], fused[mask], rtol=0, atol=1e-12)
    assert torch.equal(states.fusion[-1], fused)


@torch.inference_mode()
def test_selected_memory() -> None:
    """`select` of images in any order is the memory of those images; a slice copies nothing."""
    model = with_weights(XFM(config("tiny_b")), "tiny_b", torch.float64)
    x = inputs_of("tiny_b/inputs", torch.float64)
    embeds, visible = (
        model.encode_image(x["image"]),
        torch.rand(3, model.config.num_image_tokens) < 0.5,
    )
    memory = model.image_memory(embeds, visible)
    index = torch.tensor([2, 0, 2, 1])
    chosen, again = memory.select(index), model.image_memory(embeds[index], visible[index])
    assert chosen.images == 4
    assert chosen.token_mask is not None
    assert torch.equal(chosen.token_mask, visible[index])
    for a, b in zip(chosen.layers, again.layers, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    part = memory.select(slice(1, 3))
    assert part.layers[0].data_ptr() == memory.layers[0][1:].data_ptr()
    assert memory.nbytes == sum(layer.nbytes for layer in memory.layers)
