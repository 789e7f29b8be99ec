"""From a record and random numbers to one item of a batch, and from items to the batch: one class for each stream."""

from __future__ import annotations

import binascii
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xfm_fast.batches import IGNORED, Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.config import XFMConfig
from xfm_fast.data.images import decode_pixels
from xfm_fast.data.masking import block_mask
from xfm_fast.data.regions import RegionOptions, RegionSample, sample_regions
from xfm_fast.data.texts import CAPTIONS, TEXTS, EncodedText, TextOptions, encode_pair_text, encode_text
from xfm_fast.data.transforms import TrainingTransform, normalise, pretraining_transform, resize_crop
from xfm_fast.errors import DataError, InputError
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


def collate_texts(
    texts: Sequence[EncodedText], *, pad_token_id: int, width: int | None = None, most: int | None = None
) -> TextBatch:
    """Pad B texts to one length.

    No loss depends on the padding, so the default is as little of it as possible; the official code pads to
    `max_tokens` and `max_masks`, for which `width` and `most` ask.

    Args:
        width: of the ids; the longest text by default.
        most: places for masked tokens; the largest number in a text by default.

    Raises:
        InputError: there is no text, or one is longer than `width` or has more masked tokens than `most`.
    """
    return TextBatch(**_padded(texts, pad_token_id, width, most))


def collate_pairs(
    images: Sequence[Tensor],
    texts: Sequence[EncodedText],
    *,
    pad_token_id: int,
    image_ids: Sequence[int] | None = None,
    patch_masks: Sequence[NDArray[np.bool_]] | None = None,
    width: int | None = None,
    most: int | None = None,
) -> PairBatch:
    """B images `[3, R, R]`, a text of each, and the `[N]` patches of each to hide; texts as in `collate_texts`."""
    if len(images) != len(texts):
        raise InputError(f"there are {len(images)} images and {len(texts)} texts; a pair has one of each")
    return PairBatch(
        **_padded(texts, pad_token_id, width, most),
        image=torch.stack(list(images)),
        image_ids=None if image_ids is None else torch.tensor(list(image_ids), dtype=torch.int64),
        patch_mask=_patch_masks(patch_masks, len(images)),
    )


def collate_images(images: Sequence[Tensor], *, patch_masks: Sequence[NDArray[np.bool_]] | None = None) -> ImageBatch:
    """B images `[3, R, R]` and the `[N]` patches of each to hide."""
    if not images:
        raise InputError("a batch of 0 images holds nothing to learn from; it needs at least 1")
    return ImageBatch(image=torch.stack(list(images)), patch_mask=_patch_masks(patch_masks, len(images)))


def collate_regions(
    samples: Sequence[RegionSample],
    texts: Sequence[Sequence[EncodedText]],
    batch_size: int,
    rng: np.random.Generator,
    *,
    pad_token_id: int,
    width: int | None = None,
    most: int | None = None,
) -> RegionBatch:
    """Exactly `batch_size` texts about regions of some images.

    Of too many texts a random subset stays; of too few, random ones are repeated. Texts of an image stand together.
    Images of which no text stays are left out: nothing would read them.

    Args:
        samples: as `sample_regions` gives them; at most `max_images` of them in the official code.
        texts: the encoded texts of every sample.

    Raises:
        DataError: no sample has a text.
        InputError: texts and samples do not belong together.
    """
    counts = [len(sample.texts) for sample in samples]
    if [len(each) for each in texts] != counts:
        raise InputError(f"samples have {counts} texts and {[len(each) for each in texts]} are encoded; encode each")
    owner = np.repeat(np.arange(len(samples)), counts)
    if not len(owner):
        raise DataError(f"none of {len(samples)} images has a usable region; raise max_images or correct the data")
    kept = np.sort(_exactly(batch_size, len(owner), rng))
    used, image_index = np.unique(owner[kept], return_inverse=True)
    flat = [text for each in texts for text in each]
    chosen = torch.from_numpy(kept)
    return RegionBatch(
        **_padded([flat[place] for place in kept], pad_token_id, width, most),
        image=torch.stack([samples[place].image for place in used]),
        image_index=torch.from_numpy(image_index.astype(np.int64)),
        region_mask=torch.cat([sample.region_mask for sample in samples])[chosen],
        boxes=torch.cat([sample.boxes for sample in samples])[chosen],
        is_image=torch.cat([sample.is_image for sample in samples])[chosen],
    )


def _exactly(wanted: int, available: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Random indices below `available`: distinct ones, or as evenly repeated as can be."""
    whole, rest = divmod(wanted, available)
    return np.concatenate([np.tile(np.arange(available), whole), rng.permutation(available)[:rest]])


def _patch_masks(masks: Sequence[NDArray[np.bool_]] | None, images: int) -> Tensor | None:
    if masks is None:
        return None
    if len(masks) != images:
        raise InputError(f"there are {images} images and {len(masks)} patch masks; give one for each image, or none")
    return torch.from_numpy(np.stack(list(masks)))


class _Texts(TypedDict):
    """The fields that every batch of texts has."""

    input_ids: Tensor
    attention_mask: Tensor
    masked_input_ids: Tensor
    masked_positions: Tensor
    masked_labels: Tensor


def _padded(texts: Sequence[EncodedText], pad_token_id: int, width: int | None, most: int | None) -> _Texts:
    if not texts:
        raise InputError("a batch of 0 texts holds nothing to learn from; it needs at least 1")
    lengths = np.array([len(text.ids) for text in texts])
    counts = np.array([len(text.positions) for text in texts])
    width, most = width or int(lengths.max()), most or int(counts.max())
    if lengths.max() > width or counts.max() > most:
        raise InputError(
            f"a text has {lengths.max()} tokens and one has {counts.max()} masked; width={width} and most={most} do "
            "not hold them: raise these or cut the texts"
        )
    real, masked = np.arange(width) < lengths[:, None], np.arange(most) < counts[:, None]

    def rows(values: list[list[int]], where: NDArray[np.bool_], padding: int) -> Tensor:
        out = np.full(where.shape, padding, dtype=np.int64)
        out[where] = [value for row in values for value in row]
        return torch.from_numpy(out)

    return {
        "input_ids": rows([text.ids for text in texts], real, pad_token_id),
        "attention_mask": torch.from_numpy(real.astype(np.int64)),
        "masked_input_ids": rows([text.masked_ids for text in texts], real, pad_token_id),
        "masked_positions": rows([text.positions for text in texts], masked, 0),
        "masked_labels": rows([text.labels for text in texts], masked, IGNORED),
    }
