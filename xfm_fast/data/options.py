"""Stream options, shared by recipes, readers and checks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from xfm_fast.data.masking import MaskingOptions


class Options(BaseModel):
    """Frozen options that reject unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TextOptions(Options):
    """Text encoding; defaults are those of captions and regions in pretraining."""

    max_tokens: int = Field(default=30, ge=3, description="`<s>` and `</s>` counted in")
    max_words: int | None = Field(
        default=30, gt=0, description="texts are cleaned and cut to this many words; null leaves a text as it is"
    )
    masking: MaskingOptions = MaskingOptions(0.5, 15)
    language: str | None = Field(
        default=None, description="which text to take where there is one for each of several languages; null draws one"
    )
    tokenized: bool = Field(default=False, description="texts hold WordPiece's ' ##', which is removed")


class ImageOptions(Options):
    """Location and processing of a record's image."""

    image_key: str = Field(
        default="binary",
        description="field of the image: base64 (bytes, in shards), or a list of such, of which one is drawn",
    )
    image_root: Path | None = Field(
        default=None,
        description="folder of the images, where the field holds paths instead; absolute ones stay as they are",
    )
    official_pictures: bool = Field(
        default=False, description="as the official code: EXIF orientation and transparency are ignored"
    )
    augment: bool = Field(default=True, description="random crop, flip and RandAugment; else images are only resized")


class RegionOptions(TextOptions, ImageOptions):
    """Region sampling in pretraining; grounding pretraining sets `careful_flip`."""

    max_images: int = Field(default=80, gt=0, description="images of a batch, at most")
    max_regions: int = Field(default=5, gt=0, description="captions of an image, its own counted in, at most")
    least_visible: float = Field(
        default=0.5, ge=0, lt=1, description="a region stays if more than this share of its box lies inside the crop"
    )
    careful_flip: bool = Field(default=False, description="do not mirror images whose captions say left or right")


class StreamOptions(Options):
    """Options of streams of every kind."""

    shuffle: bool = Field(default=True, description="an order of its own for each epoch; else rows come as they lie")
    window: int | None = Field(
        default=None, gt=0, description="shuffle within so many rows, for disks that seek slowly; null shuffles all"
    )
    bad_share: float = Field(
        default=0.01, ge=0, le=1, description="share of unreadable rows of a file at which a run stops"
    )

    @property
    def record_keys(self) -> dict[str, str]:
        """Keyword arguments of `open_records`."""
        return {name: getattr(self, name) for name in ("image_key", "caption_key") if name in type(self).model_fields}


class PairStreamOptions(StreamOptions, TextOptions, ImageOptions):
    """Image-caption pairs."""

    kind: Literal["pairs"] = "pairs"
    caption_key: str = Field(
        default="desc",
        description="field of the caption: a string, or a list or mapping of such, of which one is drawn",
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
    max_tokens: int = Field(default=128, ge=3, description="`<s>` and `</s>` counted in")
    max_words: int | None = Field(default=None, gt=0, description="clean texts and cut them to this many words")
    masking: MaskingOptions = MaskingOptions(0.15, 20)


AnyStreamOptions = PairStreamOptions | RegionStreamOptions | ImageStreamOptions | TextStreamOptions
STREAM_KINDS: dict[str, type[AnyStreamOptions]] = {
    "pairs": PairStreamOptions,
    "regions": RegionStreamOptions,
    "images": ImageStreamOptions,
    "text": TextStreamOptions,
}
