"""Weakly supervised grounding: heat maps of a retrieval model select among detector boxes.

Training is that of retrieval on images and expressions; see `xfm_fast.tasks.heatmap`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from xfm_fast.data.annotations import AnnotationRows, RetrievalRecord, check_images
from xfm_fast.data.images import image_size
from xfm_fast.errors import DataError, InputError
from xfm_fast.tasks.evaluation import Row
from xfm_fast.tasks.grounding import (
    GroundingRecord,
    GroundingTask,
    check_boxes,
    expressions_of,
    grounding_rows,
)
from xfm_fast.tasks.heatmap import best_box, cross_attention_heatmap, read_detections
from xfm_fast.tasks.retrieval import PairOptions, PairTask
from xfm_fast.tasks.task import Item, group_by_image, register, unique_images
from xfm_fast.tasks.task_model import TaskModel


class WeakGroundingOptions(PairOptions):
    """Weakly supervised grounding."""

    kind: Literal["weak_grounding"] = "weak_grounding"
    free = ("layer",)
    layer: int | None = Field(
        default=None, ge=0, description="fusion layer of the heat map; default: the last of the first half"
    )


class DetectedRecord(GroundingRecord):
    """An expression with the detector boxes of its image."""

    detected: tuple[tuple[float, float, float, float], ...]


@register
class WeakGroundingTask(PairTask[WeakGroundingOptions]):
    """Splits list expression files as in grounding, plus a JSON file of detections.

    Detections name an image by path, file name or COCO id. Training images are whole, because a crop may remove the
    referred object.
    """

    Options, Session = WeakGroundingOptions, None
    truth = "bbox"
    metrics = GroundingTask.metrics
    metrics_of: Any = GroundingTask.metrics_of
    score: Any = GroundingTask.score
    takes_weights_of = ("retrieval",)
    crop = None

    def rows(self, paths: Sequence[Path]) -> Sequence[AnnotationRows[Any]]:
        return [expressions_of(rows, training=True) for rows in grounding_rows(paths)]

    def records(self, paths: Sequence[Path], split: str) -> list[DetectedRecord]:
        detections: dict[Path, dict[str, Tensor]] = {}
        for path in paths:
            with suppress(DataError):
                detections |= {path: read_detections(path)} if path.suffix == ".json" else {}
        if not detections:
            raise DataError(
                f"data.splits.{split} lists no detections; add the JSON of boxes by image, such as MAttNet's dets.json"
            )
        expressions = grounding_rows([path for path in paths if path not in detections])
        found = {image: boxes for each in detections.values() for image, boxes in each.items()}
        records = [record for rows in expressions for record in expressions_of(rows, training=False).records()]
        check_images(records, self.images)
        check_boxes(records, self.images, official=self.official_pictures)
        return [
            DetectedRecord.model_validate({**record.model_dump(), "detected": boxes_of(record.image, found).tolist()})
            for record in records
        ]

    def item(self, record: GroundingRecord, rng: np.random.Generator) -> Item:
        # Expressions of one image describe it all, and are no negatives of each other.
        return super().item(RetrievalRecord(image=record.image, caption=record.text, image_id=record.image), rng)

    def groups(self, records: Sequence[DetectedRecord]) -> list[list[int]]:
        return group_by_image(records)

    def predict(self, model: TaskModel, records: Sequence[DetectedRecord]) -> list[Row]:
        """Rows of `bbox`: the selected detection, (x, y, w, h) in pixels."""
        images, places = unique_images(records)
        texts = [self.caption_ids(record.text, self.options.max_words) for record in records]
        ids, mask = self.padded(texts, model.device)
        # All tokens, `<s>` and `</s>` among them, as in the official code.
        heat = cross_attention_heatmap(
            model, self.pixels_of(images, model), ids, mask, layer=self.options.layer, tokens=mask,
            image_index=torch.tensor(places, device=model.device),
        ).cpu()  # fmt: skip
        sizes = {image: image_size(self.images / image, official=self.official_pictures) for image in images}
        return [
            {"bbox": list(record.detected[best_box(of_text, record.detected, sizes[record.image])])}
            for of_text, record in zip(heat, records, strict=True)
        ]

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[DetectedRecord]:
        raise InputError(
            "this model chooses among detections: xfm-fast predict RUN FILE TEXT --heatmap OUT.png --detections JSON"
        )


def boxes_of(image: str, detections: Mapping[str, Tensor]) -> Tensor:
    """Detections of an image, `[N, 4]`; none raise `DataError` with the names tried."""
    path = Path(image)
    names = (image, path.name, path.stem.rpartition("_")[2].lstrip("0") or "0")
    boxes = next((detections[name] for name in names if name in detections), None)
    if boxes is None or not len(boxes):
        raise DataError(f"the detections have no box for the image {' or '.join(dict.fromkeys(names))}; add some")
    return boxes
