"""Builds items from records and batches from items: one class per stream kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypedDict, TypeVar

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from xfm_fast.batches import IGNORED, ImageBatch, PairBatch, RegionBatch, TensorBatch, TextBatch
from xfm_fast.config import XFMConfig
from xfm_fast.data.images import record_pixels
from xfm_fast.data.masking import EncodedText, block_mask
from xfm_fast.data.options import (
    ImageOptions,
    ImageStreamOptions,
    PairStreamOptions,
    Record,
    RegionStreamOptions,
    TextStreamOptions,
)
from xfm_fast.data.regions import RegionSample, elements_of, sample_regions
from xfm_fast.data.texts import encode_pair_text, encode_text, text_of
from xfm_fast.data.transforms import pretraining_transform, whole_image
from xfm_fast.errors import DataError, InputError
from xfm_fast.tokenizer import CaptionTokenizer

Options = TypeVar("Options")
BatchT = TypeVar("BatchT", bound=TensorBatch, covariant=True)


class ItemMaker(Protocol[BatchT]):
    """Converts records to items and items to a batch."""

    def item(self, record: Any, rng: Generator) -> Any:
        """Convert a record to an item; a broken record raises `DataError`."""
        ...

    def collate(self, items: list[Any], rng: Generator) -> BatchT:
        """Collate items to a batch, with the batch's generator."""
        ...


@dataclass(frozen=True)
class Items(ItemMaker[BatchT], Generic[Options, BatchT]):
    """Makes batches of `batch_size` pairs, images or texts per rank."""

    options: Options
    config: XFMConfig
    tokenizer: CaptionTokenizer
    batch_size: int


class Pair(NamedTuple):
    """An image, its caption and its patch mask."""

    image: Tensor
    text: EncodedText
    patch_mask: NDArray[np.bool_]


class Picture(NamedTuple):
    """An image and its patch mask."""

    image: Tensor
    patch_mask: NDArray[np.bool_]


class Regions(NamedTuple):
    """A region sample and its encoded texts."""

    sample: RegionSample
    texts: Sequence[EncodedText]


class ImageItems(Items[ImageStreamOptions, ImageBatch]):
    """Images only; other fields are not read."""

    def item(self, record: Record, rng: Generator) -> Picture:
        return _masked_picture(record, self.options, self.config, rng)

    def collate(self, items: list[Picture], rng: Generator) -> ImageBatch:
        images, masks = zip(*items, strict=True)
        return collate_images(images, patch_masks=masks)


class PairItems(Items[PairStreamOptions, PairBatch]):
    """Image-caption records."""

    def item(self, record: Record, rng: Generator) -> Pair:
        # The text is cheap: a broken one saves decoding the image.
        text = text_of(record, self.options.caption_key, self.tokenizer)
        shared = isinstance(record.get(self.options.image_key), list)
        encoded = encode_pair_text(text, self.tokenizer, self.options, rng, one_of_many=shared)
        image, patch_mask = _masked_picture(record, self.options, self.config, rng)
        return Pair(image, encoded, patch_mask)

    def collate(self, items: list[Pair], rng: Generator) -> PairBatch:
        images, texts, masks = zip(*items, strict=True)
        # Processes that share a global batch exchange texts, which then must be equally wide.
        width = self.options.max_tokens
        return collate_pairs(
            images, texts, pad_token_id=self.tokenizer.pad_token_id, patch_masks=masks, width=width
        )


class TextItems(Items[TextStreamOptions, TextBatch]):
    """Text only."""

    def item(self, record: Record, rng: Generator) -> EncodedText:
        text = text_of(record, self.options.caption_key, self.tokenizer)
        return encode_pair_text(text, self.tokenizer, self.options, rng)

    def collate(self, items: list[EncodedText], rng: Generator) -> TextBatch:
        return collate_texts(items, pad_token_id=self.tokenizer.pad_token_id)


class RegionItems(Items[RegionStreamOptions, RegionBatch]):
    """Images with regions."""

    def item(self, record: Record, rng: Generator) -> Regions:
        # A record without regions saves decoding the image.
        elements_of(record)
        pixels = record_pixels(record, self.options, rng)
        size, patch = self.config.image_size, self.config.patch_size
        sample = sample_regions(
            record, pixels, rng, size=size, patch_size=patch, options=self.options
        )
        if not sample.texts:
            raise DataError(f"no region of the record can be used: {'; '.join(sample.skipped)}")
        texts = [
            encode_text(text, self.tokenizer, self.options, rng, cleaned=True)
            for text in sample.texts
        ]
        return Regions(sample, texts)

    def collate(self, items: list[Regions], rng: Generator) -> RegionBatch:
        samples, texts = zip(*items, strict=True)
        pad, width = self.tokenizer.pad_token_id, self.options.max_tokens
        return collate_regions(samples, texts, self.batch_size, rng, pad_token_id=pad, width=width)


ITEMS: dict[str, Callable[..., Items[Any, Any]]] = {
    "pairs": PairItems,
    "regions": RegionItems,
    "images": ImageItems,
    "text": TextItems,
}
"""Items of each stream kind; the position of a kind seeds its random numbers."""


def _masked_picture(
    record: Record, options: ImageOptions, config: XFMConfig, rng: Generator
) -> Picture:
    """Decode, transform and mask the image of a record."""
    pixels = record_pixels(record, options, rng)
    size = config.image_size
    if options.augment:
        image = pretraining_transform(size)(pixels, rng)
    else:
        image = whole_image(pixels, size)
    mask = block_mask(config.grid, config.num_masking_patches, config.min_num_patches, rng)
    return Picture(image, mask)


def collate_texts(
    texts: Sequence[EncodedText],
    *,
    pad_token_id: int,
    width: int | None = None,
    masked: int | None = None,
) -> TextBatch:
    """Pad B texts to the longest, or to `width` tokens and `masked` positions as the official code does."""
    return TextBatch(**_pad(texts, pad_token_id, width, masked))


def collate_pairs(
    images: Sequence[Tensor],
    texts: Sequence[EncodedText],
    *,
    pad_token_id: int,
    image_ids: Sequence[int] | None = None,
    patch_masks: Sequence[NDArray[np.bool_]] | None = None,
    width: int | None = None,
    masked: int | None = None,
) -> PairBatch:
    """Collate B images `[3, R, R]`, their texts and `[N]` patch masks."""
    if len(images) != len(texts):
        raise InputError(
            f"there are {len(images)} images and {len(texts)} texts; a pair has one of each"
        )
    return PairBatch(
        **_pad(texts, pad_token_id, width, masked),
        image=torch.stack(list(images)),
        image_ids=None if image_ids is None else torch.tensor(list(image_ids), dtype=torch.int64),
        patch_mask=_patch_masks(patch_masks, len(images)),
    )


def collate_images(
    images: Sequence[Tensor], *, patch_masks: Sequence[NDArray[np.bool_]] | None = None
) -> ImageBatch:
    """Collate B images `[3, R, R]` and `[N]` patch masks."""
    if not images:
        raise InputError("a batch of 0 images is empty; give at least 1")
    return ImageBatch(
        image=torch.stack(list(images)), patch_mask=_patch_masks(patch_masks, len(images))
    )


def collate_regions(
    samples: Sequence[RegionSample],
    texts: Sequence[Sequence[EncodedText]],
    batch_size: int,
    rng: Generator,
    *,
    pad_token_id: int,
    width: int | None = None,
) -> RegionBatch:
    """Collate exactly `batch_size` texts about regions, grouped by image.

    Excess texts are dropped at random, missing ones repeated at random; images without texts are
    dropped.
    """
    counts = [len(sample.texts) for sample in samples]
    encoded = [len(rows) for rows in texts]
    if encoded != counts:
        raise InputError(f"samples have {counts} texts and {encoded} are encoded; encode each")
    owner = np.repeat(np.arange(len(samples)), counts)
    total = len(owner)
    if not total:
        raise DataError(
            f"none of {len(samples)} images has a usable region; raise max_images or correct the data"
        )
    # Every text `repeats` times, and a random subset once more.
    repeats, remainder = divmod(batch_size, total)
    rows = np.concatenate([np.tile(np.arange(total), repeats), rng.permutation(total)[:remainder]])
    rows.sort()
    used, image_index = np.unique(owner[rows], return_inverse=True)
    flat = [text for rows_of_image in texts for text in rows_of_image]
    index = torch.from_numpy(rows)
    return RegionBatch(
        **_pad([flat[row] for row in rows], pad_token_id, width),
        image=torch.stack([samples[image].image for image in used]),
        image_index=torch.from_numpy(image_index.astype(np.int64)),
        region_mask=torch.cat([sample.region_mask for sample in samples])[index],
        boxes=torch.cat([sample.boxes for sample in samples])[index],
        is_image=torch.cat([sample.is_image for sample in samples])[index],
    )


def _patch_masks(masks: Sequence[NDArray[np.bool_]] | None, images: int) -> Tensor | None:
    if masks is None:
        return None
    if len(masks) != images:
        raise InputError(
            f"there are {images} images and {len(masks)} patch masks; give one for each image, or none"
        )
    return torch.from_numpy(np.stack(list(masks)))


class _Texts(TypedDict):
    """Fields of every batch of texts."""

    input_ids: Tensor
    attention_mask: Tensor
    masked_input_ids: Tensor
    masked_positions: Tensor
    masked_labels: Tensor


def _pad(
    texts: Sequence[EncodedText],
    pad_token_id: int,
    width: int | None = None,
    masked: int | None = None,
) -> _Texts:
    if not texts:
        raise InputError("a batch of 0 texts is empty; give at least 1")
    lengths = np.array([len(text.ids) for text in texts])
    counts = np.array([len(text.positions) for text in texts])
    width, masked = width or int(lengths.max()), masked or int(counts.max())
    if lengths.max() > width or counts.max() > masked:
        raise InputError(
            f"a text has {lengths.max()} tokens and one has {counts.max()} masked; width={width} and masked={masked} "
            "do not hold them: raise these or cut the texts"
        )
    is_token = np.arange(width) < lengths[:, None]
    is_masked = np.arange(masked) < counts[:, None]

    def rows(values: list[list[int]], mask: NDArray[np.bool_], padding: int) -> Tensor:
        out = np.full(mask.shape, padding, dtype=np.int64)
        out[mask] = [value for row in values for value in row]
        return torch.from_numpy(out)

    return {
        "input_ids": rows([text.ids for text in texts], is_token, pad_token_id),
        "attention_mask": torch.from_numpy(is_token.astype(np.int64)),
        "masked_input_ids": rows([text.masked_ids for text in texts], is_token, pad_token_id),
        "masked_positions": rows([text.positions for text in texts], is_masked, 0),
        "masked_labels": rows([text.labels for text in texts], is_masked, IGNORED),
    }
