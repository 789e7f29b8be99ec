"""Visual grounding."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from xfm_fast.data.annotations import AnnotationRows, GroundingRecord
from xfm_fast.data.images import decode_image, decode_pixels, evaluation_transform, image_size
from xfm_fast.data.items import RegionItems, Regions
from xfm_fast.data.options import RegionOptions, RegionStreamOptions
from xfm_fast.data.records import Rows, open_records
from xfm_fast.data.regions import Rectangle, box_inside, relative_box, sample_grounding
from xfm_fast.data.task_files import grounding_rows
from xfm_fast.data.transforms import picture_size
from xfm_fast.errors import DataError
from xfm_fast.finetuning.evaluation import Metrics, Row
from xfm_fast.finetuning.task import PairInput, Task, TaskOptions, group_by_image, require_inputs
from xfm_fast.tasks.grounding import GroundingModel, box_accuracy, pixel_boxes

# Boxes of COCO reach past the edge by rounding, in pixels.
_EDGE = 1.0


class CaptionedRegions(RegionOptions):
    """Image regions in pretraining's line JSON, instead of expressions.

    A row is an image, so the recipe's `batch_size` counts images; a random subset of their texts makes the batch.
    """

    careful_flip: bool = Field(default=True, description="do not flip images with left or right in the captions")
    max_tokens: int = Field(default=40, ge=3, description="including `<s>` and `</s>`")
    max_words: int | None = Field(default=40, gt=0, description="clean texts and truncate to this many words")
    max_images: int = Field(default=28, gt=0, description="images per `texts` texts")
    texts: int = Field(default=64, gt=0, description="texts per `max_images` images, in proportion to the batch")


class GroundingOptions(TaskOptions):
    """Grounding."""

    kind: Literal["grounding"] = "grounding"
    augment: bool = Field(
        default=True, description="random crop around the box, flip and RandAugment; false only resizes"
    )
    careful_flip: bool = Field(default=True, description="do not flip images with left or right in the expression")
    max_words: int = Field(default=30, gt=0, description="of an expression")
    max_tokens: int | None = Field(default=None, ge=3, description="of an expression in training; null: unlimited")
    regions: CaptionedRegions | None = Field(
        default=None, description="train on region captions; splits still list expressions"
    )


class Expression(NamedTuple):
    """An image view, expression ids and the box `[4]` (cx, cy, w, h) relative to the view."""

    image: Tensor
    ids: list[int]
    box: Tensor


@dataclass(frozen=True, kw_only=True)
class GroundingBatch(PairInput):
    """Images and their texts."""

    boxes: Tensor  # `[T, 4]` (cx, cy, w, h) relative to the image
    image_index: Tensor | None = None  # `[T]` image of each text; None for one text per image
    # `[T]`, true for captions of the whole image, which have no box; None if there are none
    is_image: Tensor | None = None


class GroundingTask(Task[GroundingOptions, GroundingRecord, Expression | Regions, GroundingBatch]):
    """Grounding; see `xfm_fast.tasks.grounding`.

    Splits list arrays of expressions with boxes, or arrays without boxes plus refer's `refs(*).p` and `instances.json`,
    which can also be read without arrays. Expressions marked with a split are used for training only if it is `train`.
    """

    metrics = ("accuracy", "accuracy_val", "accuracy_testA", "accuracy_testB")
    losses = ("bbox_l1", "bbox_giou")

    def prepare(self) -> None:
        options, config, images = self.options, self.config, self.images
        if (regions := options.regions) is not None:
            values = regions.model_dump(exclude={"texts"})
            if regions.image_root is not None:
                values["image_root"] = images / regions.image_root
            values["official_pictures"] |= self.official_pictures
            self._regions = RegionItems(RegionStreamOptions(**values), config, self.tokenizer, regions.texts)

    def build(self) -> GroundingModel:
        return GroundingModel(self.config)

    def rows(self, paths: Sequence[Path]) -> Sequence[Rows]:
        if (regions := self.options.regions) is not None:
            return open_records(paths, image_key=regions.image_key).files
        return [expressions_of(rows, training=True) for rows in grounding_rows(paths)]

    def test_rows(self, paths: Sequence[Path], split: str) -> list[AnnotationRows[GroundingRecord]]:
        return [expressions_of(rows, training=False) for rows in grounding_rows(paths)]

    def records(self, paths: Sequence[Path], split: str) -> list[GroundingRecord]:
        records = super().records(paths, split)
        check_boxes(records, self.images, official=self.official_pictures)
        return records

    def item(self, record: GroundingRecord | Mapping[str, Any], rng: np.random.Generator) -> Expression | Regions:
        if not isinstance(record, GroundingRecord):
            return self._regions.item(record, rng)
        ids = self.caption_ids(record.text, self.options.max_words, self.options.max_tokens)
        if record.bbox is None:
            raise DataError(
                f"expression {record.ref_id} has no box; give it a bbox, or name refs(*).p and instances.json of its "
                "data set among the files"
            )
        if not self.options.augment:
            image, (width, height) = self._view(record.image)
            box = box_inside(_clip_rounding(record.bbox, width, height), width, height)
            return Expression(image, ids, torch.tensor(relative_box(box, Rectangle(0, 0, width, height))))
        picture = decode_pixels(self.images / record.image, official=self.official_pictures)
        image, target = sample_grounding(
            picture, _clip_rounding(record.bbox, *picture_size(picture)), record.text, rng,
            size=self.config.image_size, careful_flip=self.options.careful_flip,
        )  # fmt: skip
        return Expression(image, ids, target)

    def collate(self, items: list[Expression | Regions], rng: np.random.Generator) -> GroundingBatch:
        if (regions := self.options.regions) is not None:
            texts = -(-regions.texts * len(items) // regions.max_images)
            batch = replace(self._regions, batch_size=texts).collate(items, rng)  # type: ignore[arg-type]
            return GroundingBatch(
                image=batch.image, input_ids=batch.input_ids, attention_mask=batch.attention_mask, boxes=batch.boxes,
                image_index=batch.image_index, is_image=batch.is_image,
            )  # fmt: skip
        images, texts, boxes = zip(*items, strict=True)
        ids, mask = self.padded(texts)
        return GroundingBatch(image=torch.stack(images), input_ids=ids, attention_mask=mask, boxes=torch.stack(boxes))

    def losses_of(self, model: GroundingModel, batch: GroundingBatch) -> dict[str, Tensor]:
        losses = model(
            batch.image, batch.input_ids, batch.attention_mask, batch.boxes, batch.image_index, batch.is_image
        )
        return {"bbox_l1": losses.l1, "bbox_giou": losses.giou}

    def groups(self, records: Sequence[GroundingRecord]) -> list[list[int]]:
        return group_by_image(records)

    def predict(self, model: GroundingModel, records: Sequence[GroundingRecord]) -> list[Row]:
        """Rows of `bbox` (x, y, w, h in pixels) and `relative` (cx, cy, w, h)."""
        number = {image: place for place, image in enumerate(dict.fromkeys(record.image for record in records))}
        pixels, sizes = zip(*map(self._view, number), strict=True)
        index = torch.tensor([number[record.image] for record in records])
        ids, mask = self.padded([self.caption_ids(record.text, self.options.max_words) for record in records])
        given = (each.to(model.device) for each in (torch.stack(pixels), ids, mask, index))
        relative = model.boxes(*given).double().cpu()
        inside = pixel_boxes(relative, torch.tensor(sizes, dtype=torch.float64)[index])
        return [
            {"bbox": box, "relative": shares} for box, shares in zip(inside.tolist(), relative.tolist(), strict=True)
        ]

    def metrics_of(self, records: Sequence[GroundingRecord]) -> Collection[str]:
        return grounding_metric_names(records)

    def score(self, rows: Sequence[Row], records: Sequence[GroundingRecord]) -> Metrics:
        return grounding_metrics(rows, records)

    def files(self, rows: Sequence[Row], records: Sequence[GroundingRecord]) -> dict[str, bytes]:
        """`boxes.json` for the official evaluation; `pred` is the relative box."""
        found = [
            {"ref_id": record.ref_id, "pred": row["relative"], "bbox": row["bbox"]}
            for row, record in zip(rows, records, strict=True)
        ]
        return {"boxes.json": (json.dumps(found) + "\n").encode()}

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[GroundingRecord]:
        require_inputs(images, texts, "an image and one expression or several", ok=len(images) == 1 and len(texts) > 0)
        image = str(images[0])
        return [
            GroundingRecord.model_validate({"image": image, "text": text, "ref_id": number})
            for number, text in enumerate(texts)
        ]

    def _view(self, image: str) -> tuple[Tensor, tuple[int, int]]:
        """Whole image `[3, R, R]` as in evaluation, and its (width, height) in pixels."""
        decoded = decode_image(self.images / image, official=self.official_pictures)
        return evaluation_transform(self.config.image_size)(decoded), decoded.size


def check_boxes(records: Sequence[GroundingRecord], images: Path, *, official: bool) -> None:
    """Raise `DataError` for reference boxes outside their image."""
    # Refer's files say how large images are, and their boxes were held to it.
    unsure = [(record, record.bbox) for record in records if record.width is None and record.bbox is not None]
    sizes = {image: image_size(images / image, official=official) for image in {record.image for record, _ in unsure}}
    for record, box in unsure:
        size = sizes[record.image]
        try:
            box_inside(_clip_rounding(box, *size), *size)
        except DataError as error:
            raise DataError(f"expression {record.ref_id} of {record.image}: {error}") from None


def grounding_metric_names(records: Sequence[GroundingRecord]) -> list[str]:
    """`accuracy`, or `accuracy_<split>` if records have splits; empty without boxes, mixed raise `DataError`."""
    lacking = sum(record.bbox is None for record in records)
    if lacking == len(records):
        return []
    if lacking:
        raise DataError(f"{lacking} of {len(records)} expressions have no box; give a box to each, or to none")
    splits = [record.split for record in records]
    return ["accuracy", *(f"accuracy_{split}" for split in dict.fromkeys(splits) if all(splits))]


def grounding_metrics(rows: Sequence[Row], records: Sequence[GroundingRecord]) -> Metrics:
    """Share of boxes with IoU of at least 0.5, by `grounding_metric_names`."""
    if not grounding_metric_names(records):
        return {}
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64)
    reference = torch.tensor([record.bbox for record in records], dtype=torch.float64)
    metrics = {"accuracy": 100 * box_accuracy(boxes, reference)["all"]}
    if all(splits := [record.split for record in records]):
        shares = box_accuracy(boxes, reference, [str(split) for split in splits])
        metrics |= {f"accuracy_{split}": 100 * share for split, share in shares.items()}
    return metrics


def expressions_of(rows: AnnotationRows[GroundingRecord], *, training: bool) -> AnnotationRows[GroundingRecord]:
    """Rows without expressions marked with another split."""

    def kept(element: Any) -> bool:
        split = element.get("split") if isinstance(element, dict) else None
        return split is None or (split == "train") == training

    chosen = [number for number, element in enumerate(rows.elements) if kept(element)]
    if len(chosen) == len(rows):
        return rows
    if not chosen:
        wanted = "the split train" if training else "a split other than train"
        raise DataError(f"{rows.name} has no element of {wanted}; give the file of another split")
    return AnnotationRows(
        rows.name, [rows.elements[number] for number in chosen], rows.kind,
        labels=[rows.label(number) for number in chosen], notes=rows.notes,
    )  # fmt: skip


def _clip_rounding(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Clip a box that exceeds the image by a rounding error; others are unchanged."""
    x, y, w, h = box
    left, top, right, below = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    past = max(left - x, top - y, x + w - right, y + h - below)
    return (left, top, right - left, below - top) if 0 < past <= _EDGE else (x, y, w, h)
