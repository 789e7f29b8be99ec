"""Image captioning: a decoder over vision features continues a prompt, e.g. "a picture of".

Official recipe: 384 pixels, 32 images per GPU, lr 1e-5, 5 epochs, label smoothing 0.1, captions of 5 to 20 tokens, 3
beams. The official model class cannot be constructed (its decoder lacks label smoothing); this is its intended
behaviour, verified by parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import Annotation, AnnotationRows, CaptioningRecord, CaptioningTestRecord
from xfm_fast.data.caption_files import captioning_rows, captioning_test_rows, is_dataset_folder
from xfm_fast.data.files import find_files, read_json
from xfm_fast.data.images import record_pixels
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.records import Rows, open_records
from xfm_fast.data.texts import choose_text
from xfm_fast.errors import ConfigError, DataError, InputError
from xfm_fast.models import inputs
from xfm_fast.models.decoder import TextDecoder, generate
from xfm_fast.packing import ImageGroups
from xfm_fast.tasks.caption_metrics import caption_metrics
from xfm_fast.tasks.evaluation import Metrics, Row
from xfm_fast.tasks.task import Item, PairInput, Task, TaskOptions, json_file, register, require_inputs
from xfm_fast.tasks.task_model import DecoderModel
from xfm_fast.tokenizer import pre_caption


class CaptionsByDecoder:
    """Generation of captions by a model or a session."""

    def decoder_memory(self: Any, pixels: Tensor) -> Any:
        """Keys and values of images `[B, 3, R, R]`, projected once for all steps and beams."""
        return self.states(self.encode_image(pixels))

    def generate(
        self: Any,
        pixels: Tensor,
        prompt_ids: Tensor,
        *,
        max_length: int = 20,
        min_length: int = 5,
        num_beams: int = 3,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
    ) -> Tensor:
        """Generate captions `[B, length]` from prompt ids `[S]` or `[B, S]`; lengths include the prompt."""
        if prompt_ids.ndim == 1:
            prompt_ids = prompt_ids.expand(pixels.shape[0], -1)
        inputs.check_tokens(prompt_ids, None, self.config)
        with torch.no_grad():
            memory = self.decoder_memory(pixels)
        return generate(
            self.writer, memory, prompt_ids, max_length=max_length, min_length=min_length, num_beams=num_beams,
            length_penalty=length_penalty, early_stopping=early_stopping,
            pad_token_id=self.config.pad_token_id, eos_token_id=self.config.eos_token_id,
        )  # fmt: skip


class CaptioningModel(CaptionsByDecoder, DecoderModel):
    """Vision encoder with a text decoder; the language and fusion encoders are not built.

    The decoder starts from the fusion encoder (officially from the text encoder, which leaves cross-attention random);
    `decoder_layers` defaults to its depth.
    """

    decoder_reads = "image"

    def __init__(self, config: XFMConfig, *, decoder_layers: int | None = None) -> None:
        super().__init__(config, heads=(), encoders=("vision",))
        layers = config.fusion_layers if decoder_layers is None else decoder_layers
        self.text_decoder = TextDecoder(config, layers, config.vision_width)

    def token_losses(
        self,
        pixels: Tensor,
        caption_ids: Tensor,
        caption_mask: Tensor | None = None,
        *,
        prompt_length: int,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy per caption token `[B, L - 1]`, zero for the prompt (`prompt_length` tokens) and padding."""
        mask = inputs.check_tokens(caption_ids, caption_mask, self.config)
        images, length = caption_ids.shape
        if pixels.shape[0] != images:
            raise InputError(f"there are {pixels.shape[0]} images for {images} captions")
        if not 1 <= prompt_length < length:
            raise InputError(f"prompt_length={prompt_length}; captions of {length} tokens need 1 to {length - 1}")
        if mask.device.type == "cpu" and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise InputError("caption_mask has gaps; the real tokens of a caption come first")
        groups = ImageGroups(torch.arange(images + 1, device=mask.device))
        return self.text_decoder.token_losses(
            caption_ids, mask, self.decoder_memory(pixels), groups, given=prompt_length, label_smoothing=label_smoothing
        )

    def forward(
        self,
        pixels: Tensor,
        caption_ids: Tensor,
        caption_mask: Tensor | None = None,
        *,
        prompt_length: int,
        label_smoothing: float = 0.1,
    ) -> Tensor:
        """Mean of `token_losses` over predicted tokens."""
        mask = inputs.check_tokens(caption_ids, caption_mask, self.config)
        losses = self.token_losses(
            pixels, caption_ids, mask, prompt_length=prompt_length, label_smoothing=label_smoothing
        )
        return losses.sum() / mask[:, prompt_length:].sum().clamp_min(1)


class CaptionedImages(ImageOptions):
    """Image-caption pairs in pretraining formats (line JSON, shards), instead of captioning files."""

    caption_key: str = Field(
        default="desc",
        description="field of the caption: a string, or a list or mapping to draw from",
    )
    language: str | None = Field(
        default=None, description="language to select from multilingual captions; null draws one"
    )


class CaptioningOptions(TaskOptions):
    """Captioning."""

    kind: Literal["captioning"] = "captioning"
    augment: bool = Field(default=True, description="random crop, flip and RandAugment; false only resizes")
    prompt: str = Field(default="a picture of ", description="prefix of captions, excluded from the loss")
    max_words: int = Field(default=40, gt=0, description="of a training caption")
    max_tokens: int = Field(default=40, ge=3, description="of a training caption, including `<s>`, prompt and `</s>`")
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    max_length: int = Field(default=20, gt=0, description="maximum tokens of a generated caption, as in max_tokens")
    min_length: int = Field(default=5, ge=0, description="minimum tokens before `</s>`, including the prompt")
    num_beams: int = Field(default=3, gt=0, description="1 is greedy decoding")
    pairs: CaptionedImages | None = Field(
        default=None,
        description="train on pretraining pairs; splits still list captioning files",
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_retired(cls, values: Any) -> Any:
        """Runs of earlier versions recorded the option `facts`."""
        return {name: each for name, each in values.items() if name != "facts"} if isinstance(values, dict) else values


@register
class CaptioningTask(Task[CaptioningOptions, CaptioningTestRecord, Item, PairInput]):
    """Captioning: `image` `[B, 3, R, R]` and one prompted caption per image, `input_ids` `[B, L]`.

    Splits list images with all captions, or images plus a COCO captions file with the images' ids. A folder of images
    without captions is captioned without metrics.
    """

    Options, Session = CaptioningOptions, CaptionsByDecoder
    metrics = ("CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L")
    check_rows = staticmethod(partial(captioning_rows, split="all"))
    test_record = CaptioningTestRecord
    truth = "caption"

    def prepare(self) -> None:
        options, config = self.options, self.config
        self.prompt = self.tokenizer.encode_prompt(options.prompt)
        least, longest = len(self.prompt) + 2, config.max_text_length
        for name, value in (("max_tokens", options.max_tokens), ("max_length", options.max_length)):
            if not least <= value <= longest:
                raise ConfigError(
                    f"task.{name}={value}; the prompt {options.prompt!r} and a word need {least}, and the model has "
                    f"{longest} positions"
                )

    def build(self) -> CaptioningModel:
        return CaptioningModel(self.config)

    def rows(self, paths: Sequence[Path]) -> Sequence[Rows]:
        if (pairs := self.options.pairs) is not None:
            return open_records(paths, image_key=pairs.image_key, caption_key=pairs.caption_key).files
        return captioning_rows(paths, split="train")

    def test_rows(self, paths: Sequence[Path], split: str) -> list[AnnotationRows[CaptioningTestRecord]]:
        return captioning_test_rows(paths, split=split)

    def records(self, paths: Sequence[Path], split: str) -> list[CaptioningTestRecord]:
        files = find_files(paths, is_dataset_folder)
        truth = {path: captions for path in files if (captions := _coco_captions(path)) is not None}
        images = [path for path in files if path not in truth]
        # Without images, a COCO captions file names them itself.
        records = super().records(images or files, split)
        captions_of = {identity: texts for each in truth.values() for identity, texts in each.items()} if images else {}
        first: dict[int | str, str] = {}
        for number, record in enumerate(records):
            if record.caption is None and record.identity in captions_of:
                records[number] = record.model_copy(update={"caption": tuple(captions_of[record.identity])})
            if (other := first.setdefault(record.identity, record.image)) != record.image:
                raise DataError(
                    f"images {other} and {record.image} both have the id {record.identity}, by which captions are "
                    "scored; give each an image_id of its own"
                )
        return records

    def item(self, record: Annotation | Mapping[str, Any], rng: np.random.Generator) -> Item:
        from xfm_fast.data.transforms import pretraining_transform, whole_image

        pairs, size = self.options.pairs, self.config.image_size
        if isinstance(record, CaptioningRecord):
            if record.caption is None:
                raise DataError(f"image {record.image} has no caption to learn; add one, or remove the element")
            return Item(self.augmented(record.image, rng), self._ids(record.caption))
        assert pairs is not None
        assert isinstance(record, Mapping)
        if pairs.caption_key not in record:
            raise DataError(f"the record has no field {pairs.caption_key!r}; name the field of the caption")
        # The text first: where it is broken the image need not be decoded.
        ids = self._ids(choose_text(record[pairs.caption_key], rng, language=pairs.language))
        root = None if pairs.image_root is None else self.images / pairs.image_root
        official = pairs.official_pictures or self.official_pictures
        options = pairs.model_copy(update={"image_root": root, "official_pictures": official})
        picture = record_pixels(record, options, rng)
        view = pretraining_transform(size)(picture, rng) if pairs.augment else whole_image(picture, size)
        return Item(view, ids)

    def collate(self, items: list[Item], rng: np.random.Generator) -> PairInput:
        return PairInput(**self.pair_inputs(items))

    def losses_of(self, model: CaptioningModel, batch: PairInput) -> dict[str, Tensor]:
        loss = model(
            batch.image, batch.input_ids, batch.attention_mask, prompt_length=len(self.prompt),
            label_smoothing=self.options.label_smoothing,
        )  # fmt: skip
        return {"loss": loss}

    def predict(self, model: CaptioningModel, records: Sequence[CaptioningTestRecord]) -> list[Row]:
        """Rows of `image` (path) and `caption` (without the prompt)."""
        options = self.options
        written = model.generate(
            self.pixels_of([record.image for record in records], model), self.prompt.to(model.device),
            max_length=options.max_length, min_length=options.min_length, num_beams=options.num_beams,
        )  # fmt: skip
        texts = [self.tokenizer.decode(ids) for ids in written[:, len(self.prompt) :].tolist()]
        # The first token includes the space after the prompt.
        return [
            {"image": record.image, "caption": " ".join(text.split())}
            for record, text in zip(records, texts, strict=True)
        ]

    def score(self, rows: Sequence[Row], records: Sequence[CaptioningTestRecord]) -> Metrics:
        """`BLEU-1` … `BLEU-4`, `ROUGE-L` and `CIDEr-D` times 100."""
        candidates = {record.identity: row["caption"] for row, record in zip(rows, records, strict=True)}
        found = caption_metrics(candidates, {record.identity: record.caption or () for record in records})
        return {name: 100 * value for name, value in found.items()}

    def files(self, rows: Sequence[Row], records: Sequence[CaptioningTestRecord]) -> dict[str, bytes]:
        """`captions.json` for the COCO evaluation."""
        pairs = zip(rows, records, strict=True)
        found = [{"image_id": record.identity, "caption": row["caption"]} for row, record in pairs]
        return json_file("captions.json", found)

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[CaptioningTestRecord]:
        require_inputs(images, texts, "one image or several, and no text", ok=len(images) > 0 and not texts)
        return [CaptioningTestRecord(image=str(image)) for image in images]

    def _ids(self, caption: str) -> list[int]:
        text = pre_caption(caption, self.options.max_words)
        if prompt := self.options.prompt.rstrip():
            text = f"{prompt} {text}"
        return self.tokenizer.encode_ids([text], self.options.max_tokens)[0]


def _coco_captions(path: Path) -> dict[int | str, list[str]] | None:
    """Captions by image id of a COCO ground-truth file; None for any other file."""
    if path.suffix.lower() != ".json":
        return None
    content = read_json(path, "one JSON array of objects, or COCO captions")
    if not isinstance(content, dict) or "annotations" not in content:
        return None
    found: dict[int | str, list[str]] = {}
    for number, annotation in enumerate(content["annotations"]):
        try:
            identity, caption = annotation["image_id"], annotation["caption"]
            found.setdefault(identity, []).append(caption.strip())
        except (TypeError, KeyError, AttributeError):
            raise DataError(f"{path}, annotation {number} lacks image_id or caption; correct or remove it") from None
    return found
