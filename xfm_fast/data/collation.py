"""From items to the batches that a step of pretraining reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xfm_fast.batches import IGNORED, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.data.regions import RegionSample
from xfm_fast.data.texts import EncodedText
from xfm_fast.errors import DataError, InputError


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
