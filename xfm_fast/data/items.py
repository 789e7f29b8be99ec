"""From a record and random numbers to one item of a batch, and from items to the batch: one class for each stream."""

from __future__ import annotations

import binascii
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xfm_fast.batches import Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.config import XFMConfig
from xfm_fast.data.block_masks import block_mask
from xfm_fast.data.collation import collate_images, collate_pairs, collate_regions, collate_texts
from xfm_fast.data.images import decode_pixels
from xfm_fast.data.regions import RegionOptions, RegionSample, sample_regions
from xfm_fast.data.texts import CAPTIONS, TEXTS, EncodedText, TextOptions, encode_pair_text, encode_text
from xfm_fast.data.transforms import TrainingTransform, normalise, pretraining_transform, resize_crop
from xfm_fast.errors import DataError
from xfm_fast.tokenizer import CaptionTokenizer

Item = TypeVar("Item")
BatchT = TypeVar("BatchT", bound=Batch, covariant=True)
IDS_KEY = "input_ids"
"""Field of a record with the token ids of its text, which then is not cleaned and not tokenised."""


class Items(Protocol, Generic[Item, BatchT]):
    """How records of a kind become items, and items a batch."""

    def item(self, record: Mapping[str, Any], rng: np.random.Generator) -> Item:
        """One item; raises `DataError` when the record is broken."""
        ...

    def collate(self, items: list[Item], rng: np.random.Generator) -> BatchT:
        """The batch of some items; the generator is that of the batch."""
        ...


@dataclass(frozen=True)
class ImageField:
    """Where the image of a record is.

    Attributes:
        key: of the field: base64 text (bytes, where the record comes from a shard), or a list of such.
        root: folder of the images, where the field holds paths instead. Absolute paths stay as they are.
    """

    key: str = "binary"
    root: str | os.PathLike[str] | None = None

    def choose(self, record: Mapping[str, Any], rng: np.random.Generator) -> Path | bytes:
        """The encoded image, or its path; one of them if there are several.

        Raises:
            DataError: the field is missing, empty, or no base64.
        """
        value = record.get(self.key)
        if isinstance(value, list):
            if not value:
                raise DataError(f"the list in {self.key!r} is empty; give at least one image")
            value = value[rng.integers(len(value))]
        return self.source(value)

    def source(self, value: Any) -> Path | bytes:
        """The encoded image, or its path, that a value of the field stands for."""
        if isinstance(value, bytes):
            return value
        if value is None:
            raise DataError(f"the record has no field {self.key!r}; name the field that holds the image")
        if not isinstance(value, str):
            raise DataError(f"{self.key!r} holds a {type(value).__name__}; base64 text or a path is needed")
        if self.root is not None:
            return Path(self.root) / value
        try:
            return binascii.a2b_base64(value)
        except ValueError as error:
            remedy = "write the image anew, or name the folder if these are paths (image_root)"
            raise DataError(f"{self.key!r} ({len(value)} characters) is no base64 ({error}); {remedy}") from None

    def pixels(self, record: Mapping[str, Any], rng: np.random.Generator) -> Tensor:
        """8-bit pixels `[3, H, W]`; raises `DataError` when the image is broken."""
        source = self.choose(record, rng)
        return decode_pixels(source, f"in {self.key!r}" if isinstance(source, bytes) else None)

    def transformed(self, record: Mapping[str, Any], size: int, augment: bool, rng: np.random.Generator) -> Tensor:
        """Normalised pixels `[3, size, size]`: the transform of pretraining, or a resize alone."""
        pixels = self.pixels(record, rng)
        if augment:
            return _transform(size)(pixels, rng)
        return normalise(resize_crop(pixels, (0, 0, pixels.shape[2], pixels.shape[1]), size))


def text_of(record: Mapping[str, Any], key: str, tokenizer: CaptionTokenizer) -> Any:
    """The text of a record: its token ids without `<s>` and `</s>` if it has any, and otherwise the field `key`.

    Raises:
        DataError: the ids are not those of this vocabulary, or there is no such field.
    """
    ids = record.get(IDS_KEY)
    if ids is None:
        if key not in record:
            raise DataError(f"the record has neither {key!r} nor {IDS_KEY!r}; name the field that holds the text")
        return record[key]
    if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < tokenizer.vocab_size for each in ids):
        raise DataError(
            f"{IDS_KEY!r} must be a list of ids from 0 to {tokenizer.vocab_size - 1}; tokenise the text anew"
        )
    begins, ends = ids[:1] == [tokenizer.bos_token_id], ids[-1:] == [tokenizer.eos_token_id]
    return tuple(ids[int(begins) : len(ids) - int(ends)])


def _encoded(
    text: Any, tokenizer: CaptionTokenizer, options: TextOptions, rng: np.random.Generator, several: bool = False
) -> EncodedText:
    if isinstance(text, tuple):
        return encode_text(text, tokenizer, options, rng)
    return encode_pair_text(text, tokenizer, options, rng, one_of_many=several)


@lru_cache
def _transform(size: int) -> TrainingTransform:
    return pretraining_transform(size)


def _patches(config: XFMConfig, rng: np.random.Generator) -> NDArray[np.bool_]:
    return block_mask(config.grid, config.num_masking_patches, config.min_num_patches, rng)


class Pair(NamedTuple):
    """An image, its caption and the patches to hide."""

    image: Tensor
    text: EncodedText
    patch_mask: NDArray[np.bool_]


@dataclass(frozen=True)
class PairItems:
    """Images with captions: the official image-text records."""

    tokenizer: CaptionTokenizer
    config: XFMConfig
    image: ImageField = ImageField()
    caption_key: str = "desc"
    text: TextOptions = CAPTIONS
    augment: bool = True

    def item(self, record: Mapping[str, Any], rng: np.random.Generator) -> Pair:
        # The text first: it is cheap, and where it is broken the image need not be decoded.
        text = text_of(record, self.caption_key, self.tokenizer)
        several = isinstance(record.get(self.image.key), list)
        encoded = _encoded(text, self.tokenizer, self.text, rng, several)
        image = self.image.transformed(record, self.config.image_size, self.augment, rng)
        return Pair(image, encoded, _patches(self.config, rng))

    def collate(self, items: list[Pair], rng: np.random.Generator) -> PairBatch:
        images, texts, masks = zip(*items, strict=True)
        # Processes that share a global batch exchange texts, which then must be equally wide.
        width = self.text.max_tokens
        return collate_pairs(images, texts, pad_token_id=self.tokenizer.pad_token_id, patch_masks=masks, width=width)


@dataclass(frozen=True)
class ImageItems:
    """Images alone; other fields of the records are not read."""

    config: XFMConfig
    image: ImageField = ImageField()
    augment: bool = True

    def item(self, record: Mapping[str, Any], rng: np.random.Generator) -> tuple[Tensor, NDArray[np.bool_]]:
        image = self.image.transformed(record, self.config.image_size, self.augment, rng)
        return image, _patches(self.config, rng)

    def collate(self, items: list[tuple[Tensor, NDArray[np.bool_]]], rng: np.random.Generator) -> ImageBatch:
        images, masks = zip(*items, strict=True)
        return collate_images(images, patch_masks=masks)


@dataclass(frozen=True)
class TextItems:
    """Text alone."""

    tokenizer: CaptionTokenizer
    text_key: str = "desc"
    text: TextOptions = TEXTS

    def item(self, record: Mapping[str, Any], rng: np.random.Generator) -> EncodedText:
        return _encoded(text_of(record, self.text_key, self.tokenizer), self.tokenizer, self.text, rng)

    def collate(self, items: list[EncodedText], rng: np.random.Generator) -> TextBatch:
        return collate_texts(items, pad_token_id=self.tokenizer.pad_token_id)


REGIONS = RegionOptions()
"""Regions as in pretraining."""


class Regions(NamedTuple):
    """A crop, what was found in it, and the texts encoded."""

    sample: RegionSample
    texts: Sequence[EncodedText]


@dataclass(frozen=True)
class RegionItems:
    """Images with regions.

    Attributes:
        batch_size: texts that a batch holds.
    """

    tokenizer: CaptionTokenizer
    config: XFMConfig
    batch_size: int
    image: ImageField = ImageField()
    regions: RegionOptions = REGIONS

    def item(self, record: Mapping[str, Any], rng: np.random.Generator) -> Regions:
        if not isinstance(record.get("elems"), list) or not record["elems"]:
            raise DataError("the record has no regions; 'elems' is a list of {'bb': [x, y, w, h], 'caption': text}")
        pixels = self.image.pixels(record, rng)
        size, patch = self.config.image_size, self.config.patch_size
        sample = sample_regions(record, pixels, rng, size=size, patch_size=patch, options=self.regions)
        if not sample.texts:
            raise DataError(f"no region of the record can be used: {'; '.join(sample.skipped)}")
        # Captions of regions are cleaned before they are chosen; they must not be cleaned for a second time.
        return Regions(sample, [encode_text(text, self.tokenizer, self._cleaned, rng) for text in sample.texts])

    def collate(self, items: list[Regions], rng: np.random.Generator) -> RegionBatch:
        samples, texts = zip(*items, strict=True)
        width = self.regions.text.max_tokens
        return collate_regions(
            samples, texts, self.batch_size, rng, pad_token_id=self.tokenizer.pad_token_id, width=width
        )

    @property
    def _cleaned(self) -> TextOptions:
        return TextOptions(self.regions.text.max_tokens, None, self.regions.text.masking)
