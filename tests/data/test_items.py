"""Batches: what is real is in its place, what is padding does not matter, and regions fill a batch exactly."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from xfm_fast.batches import RegionBatch, TextBatch
from xfm_fast.data.items import collate_images, collate_pairs, collate_regions, collate_texts
from xfm_fast.data.masking import EncodedText, block_mask
from xfm_fast.data.regions import RegionSample

PAD = 1


@st.composite
def encoded(draw: st.DrawFn) -> EncodedText:
    ids = [0, *draw(st.lists(st.integers(3, 900), min_size=1, max_size=12)), 2]
    positions = sorted(draw(st.sets(st.integers(1, len(ids) - 1), min_size=1)))
    masked = [999 if position in positions else index for position, index in enumerate(ids)]
    return EncodedText(ids, masked, positions, [ids[position] for position in positions])


def _check(batch: TextBatch, texts: list[EncodedText]) -> None:
    """Row by row and entry by entry."""
    for row, text in enumerate(texts):
        length, count = len(text.ids), len(text.positions)
        width, masked_count = batch.input_ids.shape[1], batch.masked_positions.shape[1]
        assert batch.input_ids[row].tolist() == text.ids + [PAD] * (width - length)
        assert batch.masked_input_ids[row].tolist() == text.masked_ids + [PAD] * (width - length)
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (width - length)
        assert batch.masked_positions[row].tolist() == text.positions + [0] * (masked_count - count)
        assert batch.masked_labels[row].tolist() == text.labels + [-100] * (masked_count - count)
    for name in (
        "input_ids",
        "masked_input_ids",
        "attention_mask",
        "masked_positions",
        "masked_labels",
    ):
        assert getattr(batch, name).dtype == torch.int64
        assert len(getattr(batch, name)) == len(texts)


@given(texts=st.lists(encoded(), min_size=1, max_size=6), more=st.integers(0, 5))
def test_texts_are_padded(texts: list[EncodedText], more: int) -> None:
    width, masked_count = (
        max(len(text.ids) for text in texts),
        max(len(text.positions) for text in texts),
    )
    batch = collate_texts(texts, pad_token_id=PAD)
    assert batch.input_ids.shape[1] == width
    assert batch.masked_positions.shape[1] == masked_count
    _check(batch, texts)
    _check(batch.prepare(), texts)
    wide = collate_texts(texts, pad_token_id=PAD, width=width + more, masked=masked_count + more)
    assert wide.input_ids.shape[1] == width + more
    _check(wide, texts)


def test_pairs_and_images() -> None:
    rng = np.random.default_rng(0)
    images = [torch.full((3, 8, 8), float(index)) for index in range(3)]
    texts = [EncodedText([0, index, 2], [0, 9, 2], [1], [index]) for index in (5, 6, 7)]
    masks = [block_mask(4, 6, 2, rng) for _ in images]
    batch = collate_pairs(images, texts, pad_token_id=PAD, image_ids=[4, 4, 8], patch_masks=masks)
    _check(batch, texts)
    assert batch.image[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch.image_ids.tolist() == [4, 4, 8]
    assert batch.patch_mask.dtype == torch.bool
    assert batch.patch_mask.sum(1).tolist() == [6, 6, 6]
    assert np.array_equal(batch.patch_mask[1].numpy(), masks[1])
    plain = collate_pairs(images, texts, pad_token_id=PAD)
    assert plain.image_ids is None
    assert plain.patch_mask is None
    alone = collate_images(images, patch_masks=masks)
    assert torch.equal(alone.image, batch.image)
    assert alone.patch_mask.tolist() == batch.patch_mask.tolist()
    assert collate_images(images).patch_mask is None


def _samples(counts: list[int]) -> tuple[list[RegionSample], list[list[EncodedText]]]:
    """Images whose pixels are their number, with texts, boxes and masks that tell (image, text)."""
    samples, texts = [], []
    for image, count in enumerate(counts):
        numbers = torch.arange(count)
        mask = torch.zeros(count, 17, dtype=torch.bool)
        mask[:, 0] = True
        mask[numbers, 1 + numbers] = True
        samples.append(
            RegionSample(
                image=torch.full((3, 4, 4), float(image)),
                texts=tuple(f"{image} {index}" for index in range(count)),
                boxes=torch.stack(
                    [torch.full((count,), image / 100), numbers / 10, numbers, numbers], 1
                ).float(),
                region_mask=mask,
                is_image=numbers == 0,
            )
        )
        texts.append(
            [
                EncodedText([0, 100 * image + n, 2], [0, 9, 2], [1], [100 * image + n])
                for n in range(count)
            ]
        )
    return samples, texts


def _regions(counts: list[int], batch_size: int, seed: int = 0) -> RegionBatch:
    samples, texts = _samples(counts)
    return collate_regions(
        samples, texts, batch_size, np.random.default_rng(seed), pad_token_id=PAD
    )


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_regions_fill_the_batch_exactly(counts: list[int], batch_size: int, seed: int) -> None:
    batch = _regions(counts, batch_size, seed)
    assert (
        len(batch.input_ids)
        == len(batch.boxes)
        == len(batch.region_mask)
        == len(batch.is_image)
        == batch_size
    )
    assert batch.image_index.dtype == torch.int64
    numbers = batch.input_ids[:, 1]
    images, within = numbers // 100, numbers % 100
    # Every text still has its image, box, mask and flag.
    assert torch.equal(batch.image[batch.image_index, 0, 0, 0].long(), images)
    torch.testing.assert_close(batch.boxes[:, 0], images / 100)
    torch.testing.assert_close(batch.boxes[:, 1], within / 10)
    assert torch.equal(batch.region_mask[:, 1:].long().argmax(1), within)
    assert batch.region_mask.sum(1).tolist() == [2] * batch_size
    assert torch.equal(batch.is_image, within == 0)
    # No image without a text, texts of an image together, none oftener than need be.
    assert batch.image_index.unique().tolist() == list(range(len(batch.image)))
    assert (batch.image_index.diff() >= 0).all()
    repeats = Counter(numbers.tolist())
    assert max(repeats.values()) == -(-batch_size // sum(counts))
    if batch_size >= sum(counts):
        assert len(repeats) == sum(counts)
        assert max(repeats.values()) - min(repeats.values()) <= 1
