"""Stream options, shared by recipes, readers and checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from xfm_fast.data.masking import MaskingOptions

Record = Mapping[str, Any]
"""The fields of a row of pretraining data."""


class Options(BaseModel):
    """Frozen options that reject unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextOptions(Options):
    """Text encoding; defaults are for captions and regions in pretraining."""

    max_tokens: int = Field(default=30, ge=3, description="including `<s>` and `</s>`")
    max_words: int | None = Field(
        default=30,
        gt=0,
        description="clean texts and truncate to this many words; null disables both",
    )
    masking: MaskingOptions = MaskingOptions(0.5, 15)
    language: str | None = Field(
        default=None, description="language to select from multilingual captions; null draws one"
    )
    tokenized: bool = Field(default=False, description="remove WordPiece's ' ##' from texts")


class ImageOptions(Options):
    """Location and processing of a record's image."""

    image_key: str = Field(
        default="binary",
        description="field of the image: base64 (bytes in shards), or a list to draw from",
    )
    image_root: Path | None = Field(
        default=None,
        description="image folder if the field holds paths; absolute paths are unchanged",
    )
    official_pictures: bool = Field(
        default=False,
        description="ignore EXIF orientation and transparency, as the official code does",
    )
    augment: bool = Field(
        default=True, description="random crop, flip and RandAugment; false only resizes"
    )


class RegionOptions(TextOptions, ImageOptions):
    """Region sampling in pretraining; grounding pretraining sets `careful_flip`."""

    max_images: int = Field(default=80, gt=0, le=1 << 20, description="maximum images per batch")
    max_regions: int = Field(
        default=5, gt=0, le=1 << 20, description="maximum captions per image, including its own"
    )
    least_visible: float = Field(
        default=0.5, ge=0, lt=1, description="minimum share of a region's box inside the crop"
    )
    careful_flip: bool = Field(
        default=False, description="do not flip images with left or right in the captions"
    )


class StreamOptions(Options):
    """Options of streams of every kind."""

    shuffle: bool = Field(
        default=True, description="shuffle every epoch; false reads in file order"
    )
    window: int | None = Field(
        default=None,
        gt=0,
        description="shuffle window in rows, for slow disks; null shuffles all rows",
    )
    bad_share: float = Field(
        default=0.01, ge=0, le=1, description="share of broken rows per file at which the run stops"
    )
    hold_out: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="share of the images to leave out, the same as `data.hold_out` of fine-tuning",
    )

    @property
    def record_keys(self) -> dict[str, str]:
        """Keyword arguments of `open_records`."""
        return {
            name: getattr(self, name)
            for name in ("image_key", "caption_key")
            if name in type(self).model_fields
        }


class PairStreamOptions(StreamOptions, TextOptions, ImageOptions):
    """Image-caption pairs."""

    kind: Literal["pairs"] = "pairs"
    caption_key: str = Field(
        default="desc",
        description="field of the caption: a string, or a list or mapping to draw from",
    )


class RegionStreamOptions(StreamOptions, RegionOptions):
    """Images with region captions."""

    kind: Literal["regions"] = "regions"


class ImageStreamOptions(StreamOptions, ImageOptions):
    """Images only; other fields are not read."""

    kind: Literal["images"] = "images"


class TextStreamOptions(StreamOptions, TextOptions):
    """Text only."""

    kind: Literal["text"] = "text"
    caption_key: str = Field(default="desc", description="field of the text")
    max_tokens: int = Field(default=128, ge=3, description="including `<s>` and `</s>`")
    max_words: int | None = Field(
        default=None, gt=0, description="clean texts and truncate to this many words"
    )
    masking: MaskingOptions = MaskingOptions(0.15, 20)


AnyStreamOptions = PairStreamOptions | RegionStreamOptions | ImageStreamOptions | TextStreamOptions
STREAM_KINDS: dict[str, type[AnyStreamOptions]] = {
    "pairs": PairStreamOptions,
    "regions": RegionStreamOptions,
    "images": ImageStreamOptions,
    "text": TextStreamOptions,
}
