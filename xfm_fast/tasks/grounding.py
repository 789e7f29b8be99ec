"""Visual grounding: predict the box of a referring expression.

Official recipe (RefCOCO+): 384 pixels, 20 expressions per GPU, lr 2e-5, 15 epochs, optionally after
two epochs on region captions at 224 pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import (
    ARRAY,
    Annotation,
    AnnotationRows,
    Identity,
    Text,
    array_of,
    as_rows,
)
from xfm_fast.data.files import Paths, find_files, read_json, read_plain_pickle, unreadable
from xfm_fast.data.images import decode_image, decode_pixels, evaluation_transform, image_size
from xfm_fast.data.options import RegionOptions, RegionStreamOptions
from xfm_fast.data.records import open_records
from xfm_fast.errors import DataError, InputError
from xfm_fast.models import inputs
from xfm_fast.models.processor import pixel_boxes
from xfm_fast.objectives import box_giou_loss, box_l1_loss
from xfm_fast.tasks.evaluation import Metrics, Row
from xfm_fast.tasks.models import TaskModel
from xfm_fast.tasks.task import (
    Item,
    Losses,
    PairInput,
    Rng,
    Task,
    TaskOptions,
    json_file,
    register,
    require_inputs,
    unique_images,
)

if TYPE_CHECKING:
    from xfm_fast.data.regions import Rectangle

# Boxes of COCO reach past the edge by rounding, in pixels.
_EDGE = 1.0
# Ten times the largest file of referring expressions.
_MAX_PICKLE_BYTES = 512 << 20


class BoxesOfTexts:
    """Prediction of boxes by a model or a session."""

    def boxes(
        self: Any,
        pixels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Predict boxes `[P, 4]` (cx, cy, w, h) of expressions `[P, L]` on images `image_index` `[P]`."""
        mask = inputs.check_tokens(input_ids, attention_mask, self.config)
        memory = self.image_memory(self.encode_image(pixels))
        text = self.encode_text(input_ids, mask)
        fused = self.fuse(text, mask, memory, image_index, first_token_only=True)
        # In bf16 a coordinate would be off by up to a 512th of the image.
        with torch.autocast(fused.device.type, enabled=False):
            return self.predict_boxes(fused.to(self.dtype))


class GroundingLosses(NamedTuple):
    """The two loss terms, to be summed."""

    l1: Tensor
    giou: Tensor


class GroundingModel(BoxesOfTexts, TaskModel):
    """X-FM with its box head, trained with the box losses of pretraining."""

    def __init__(self, config: XFMConfig) -> None:
        super().__init__(config, heads=("boxes",))

    def forward(
        self,
        pixels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        target: Tensor,
        image_index: Tensor | None = None,
        is_image: Tensor | None = None,
    ) -> GroundingLosses:
        """Compute losses against `target` `[P, 4]`, except for captions of whole images (`is_image`)."""
        predicted = self.boxes(pixels, input_ids, attention_mask, image_index)
        return GroundingLosses(
            box_l1_loss(predicted, target, is_image), box_giou_loss(predicted, target, is_image)
        )


def pixel_iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the IoU `[P]` of (x, y, w, h) boxes as the RefCOCO evaluation does.

    Right and bottom edges are inclusive (x + w - 1), so boxes that share one row or column do not
    overlap, and one- pixel boxes have IoU 0. Boxes without area have IoU 0 (the official code
    divides by zero).
    """
    low = torch.maximum(a[:, :2], b[:, :2])
    high = torch.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - 1
    overlapping = (low < high).all(1)
    shared = (high - low + 1).prod(1) * overlapping
    union = a[:, 2:].prod(1) + b[:, 2:].prod(1) - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))


def box_accuracy(
    boxes: Tensor, reference: Tensor, splits: Sequence[str] | None = None, *, threshold: float = 0.5
) -> dict[str, float]:
    """Return the share of (x, y, w, h) boxes with IoU of at least `threshold`: `all`, or by split."""
    count = boxes.shape[0]
    names = ["all"] * count if splits is None else list(splits)
    if not count or reference.shape != (count, 4) or len(names) != count:
        raise InputError(
            f"{count} boxes, reference boxes {[*reference.shape]} and {len(names)} splits do not belong together; "
            "there must be one of each per expression"
        )
    hits: dict[str, list[bool]] = {}
    for name, hit in zip(names, (pixel_iou(boxes, reference) >= threshold).tolist(), strict=True):
        hits.setdefault(name, []).append(hit)
    return {name: sum(values) / len(values) for name, values in hits.items()}


class GroundingRecord(Annotation):
    """A phrase and its box; `grounding_rows` looks up boxes of official files by `ref_id`."""

    image: Text
    text: Text
    ref_id: Identity
    bbox: tuple[float, float, float, float] | None = Field(
        default=None, description="x, y, w, h in pixels"
    )
    split: str | None = Field(default=None, description="val, testA, ...")
    width: int | None = Field(default=None, gt=0, description="of the image, in pixels")
    height: int | None = Field(default=None, gt=0, description="of the image, in pixels")

    @model_validator(mode="after")
    def _check_box(self) -> GroundingRecord:
        if self.bbox is not None:
            x, y, w, h = self.bbox
            if not all(map(math.isfinite, self.bbox)) or w <= 0 or h <= 0:
                raise PydanticCustomError("box", "has no area; expected x, y, w, h in pixels")
            right, bottom = self.width or math.inf, self.height or math.inf
            if min(x, y) < -_EDGE or x + w > right + _EDGE or y + h > bottom + _EDGE:
                size = f" {self.width}x{self.height}" if self.width and self.height else ""
                raise PydanticCustomError("box", "is not inside the{size} image", {"size": size})
        return self


def grounding_rows(paths: Paths) -> list[AnnotationRows[GroundingRecord]]:
    """Open referring expressions with boxes.

    Formats: JSON arrays with `image`, `text`, `ref_id` and optionally `bbox`; refer's `refs(*).p` with
    `instances.json`, which add boxes to arrays or are read as data.
    """

    def drop_segmentation(fields: dict[str, Any]) -> dict[str, Any]:
        """Drop most of the file; an `object_hook`."""
        fields.pop("segmentation", None)
        return fields

    arrays: list[AnnotationRows[Any]] = []
    refs: list[Path] = []
    instances: list[tuple[Path, Any]] = []
    for path in find_files(paths):
        if path.suffix.lower() in (".p", ".pkl", ".pickle"):
            refs.append(path)
            continue
        content = read_json(path, f"{ARRAY}, or COCO instances", drop_segmentation)
        if isinstance(content, dict):
            instances.append((path, content))
        else:
            arrays.append(AnnotationRows(path, array_of(path, content)))
    if len(refs) != len(instances) or len(refs) > 1:
        files = ", ".join(map(str, [*refs, *(path for path, _ in instances)]))
        raise DataError(
            f"{len(refs)} files of references and {len(instances)} of instances were given ({files}); give refs(*).p "
            "and instances.json of one data set, or neither"
        )
    if refs:
        refer = Refer(refs[0], *instances[0])
        arrays = [refer.join_all(rows) for rows in arrays] or [refer.elements()]
    return as_rows(arrays, GroundingRecord)


class Reference(NamedTuple):
    """A RefCOCO reference: image, annotation of its box, split and expressions."""

    image: int
    annotation: int
    split: str
    sentences: list[str]


# The files of train, val and test are read one after another, and refer to the same references.
@lru_cache(maxsize=1)
def _references(path: Path, modified: int, size: int) -> dict[Any, Reference]:
    """Read the references of a `refs(*).p`, a pickle of plain values, by `ref_id`."""
    if size > _MAX_PICKLE_BYTES:
        raise DataError(
            f"{path} has {size:,} bytes, over the limit of {_MAX_PICKLE_BYTES:,} for references; check the file"
        )
    content = read_plain_pickle(path)
    references = {}
    try:
        for ref in content:
            sentences = [str(text.get("sent", text.get("raw"))) for text in ref["sentences"]]
            references[ref["ref_id"]] = Reference(
                ref["image_id"], ref["ann_id"], str(ref["split"]), sentences
            )
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} is not a list of references ({error!r}); expected ref_id, ann_id, image_id, split and sentences"
        ) from None
    return references


class Refer:
    """References of a RefCOCO data set with the boxes and images of its COCO instances."""

    def __init__(self, refs: Path, instances: Path, content: Any) -> None:
        try:
            status = os.stat(refs)
        except OSError as error:
            raise unreadable(refs, error) from None
        self.files = (refs, instances)
        self.references = _references(refs, status.st_mtime_ns, status.st_size)
        try:
            self.boxes = {box["id"]: box["bbox"] for box in content["annotations"]}
            self.images = {
                image["id"]: (image["file_name"], image.get("width"), image.get("height"))
                for image in content["images"]
            }
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{instances} is not a file of COCO instances ({error!r}); expected images and annotations"
            ) from None

    def join(self, identity: Any, element: dict[str, Any]) -> dict[str, Any] | DataError:
        """Add box, split, image size and a missing image of a reference to an element."""
        try:
            ref = self.references[identity]
            (image, width, height), box = self.images[ref.image], self.boxes[ref.annotation]
        except (KeyError, TypeError) as error:
            return DataError(
                f"ref_id {identity!r}: there is no reference, image or annotation {error} in "
                f"{' and '.join(map(str, self.files))}; check that all are of one data set"
            )
        size = {"width": width, "height": height}
        return {"image": image, **element, "bbox": box, "split": ref.split, **size}

    def elements(self) -> AnnotationRows[Any]:
        """Return every sentence of every reference."""
        values, labels = [], []
        for identity, ref in self.references.items():
            for index, text in enumerate(ref.sentences):
                values.append(self.join(identity, {"text": text, "ref_id": identity}))
                labels.append(f"ref_id {identity}, sentence {index}")
        return AnnotationRows(self.files[0], values, labels=labels, sources=self.files[1:])

    def join_all(self, rows: AnnotationRows[Any]) -> AnnotationRows[Any]:
        """Join official elements by their `ref_id`."""
        values = [
            self.join(value["ref_id"], value)
            if isinstance(value, dict) and "ref_id" in value
            else value
            for value in rows.elements
        ]
        return AnnotationRows(rows.name, values, labels=rows.labels, sources=self.files)


class CaptionedRegions(RegionOptions):
    """Image regions in pretraining's line JSON, instead of expressions.

    A row is an image, so the recipe's `batch_size` counts images; a random subset of their texts
    makes the batch.
    """

    careful_flip: bool = Field(
        default=True, description="do not flip images with left or right in the captions"
    )
    max_tokens: int = Field(default=40, ge=3, description="including `<s>` and `</s>`")
    max_words: int | None = Field(
        default=40, gt=0, description="clean texts and truncate to this many words"
    )
    max_images: int = Field(default=28, gt=0, description="images per `texts` texts")
    texts: int = Field(
        default=64, gt=0, description="texts per `max_images` images, in proportion to the batch"
    )


class GroundingOptions(TaskOptions):
    """Grounding."""

    kind: Literal["grounding"] = "grounding"
    augment: bool = Field(
        default=True,
        description="random crop around the box, flip and RandAugment; false only resizes",
    )
    careful_flip: bool = Field(
        default=True, description="do not flip images with left or right in the expression"
    )
    max_words: int = Field(default=30, gt=0, description="of an expression")
    max_tokens: int | None = Field(
        default=None, ge=3, description="of an expression in training; null: unlimited"
    )
    regions: CaptionedRegions | None = Field(
        default=None, description="train on region captions; splits still list expressions"
    )


@dataclass(frozen=True, kw_only=True)
class GroundingBatch(PairInput):
    """Images and their texts."""

    boxes: Tensor  # `[T, 4]` (cx, cy, w, h) relative to the image
    image_index: Tensor | None = None  # `[T]` image of each text; None for one text per image
    # `[T]`, true for captions of the whole image, which have no box; None if there are none
    is_image: Tensor | None = None


@register
class GroundingTask(Task[GroundingOptions]):
    """Grounding of expressions, or of region captions (items `xfm_fast.data.items.Regions`).

    Splits list arrays of expressions with boxes, or arrays without boxes plus refer's `refs(*).p`
    and `instances.json`, which can also be read without arrays. Expressions marked with a split are
    used for training only if it is `train`.
    """

    Options, Session = GroundingOptions, BoxesOfTexts
    check_rows = staticmethod(grounding_rows)
    truth = "bbox"
    groups_by_image = True
    metrics = ("accuracy", "accuracy_val", "accuracy_testA", "accuracy_testB")
    losses = ("bbox_l1", "bbox_giou")

    def prepare(self) -> None:
        if (regions := self.options.regions) is not None:
            from xfm_fast.data.items import RegionItems

            values = regions.model_dump(exclude={"texts"})
            if regions.image_root is not None:
                values["image_root"] = self.images / regions.image_root
            values["official_pictures"] |= self.official_pictures
            self._regions = RegionItems(
                RegionStreamOptions(**values), self.config, self.tokenizer, regions.texts
            )

    def build(self) -> GroundingModel:
        return GroundingModel(self.config)

    def rows(self, paths: Sequence[Path], split: str | None = None) -> Sequence[Any]:
        regions = self.options.regions
        if split is None and regions is not None:
            return open_records(paths, image_key=regions.image_key).files
        return [expressions_of(rows, training=split is None) for rows in grounding_rows(paths)]

    def records(self, paths: Sequence[Path], split: str) -> list[GroundingRecord]:
        records = super().records(paths, split)
        check_boxes(records, self.images, official=self.official_pictures)
        return records

    def item(self, record: GroundingRecord | Mapping[str, Any], rng: Rng) -> Any:
        from xfm_fast.data.regions import Rectangle, relative_box, sample_grounding
        from xfm_fast.data.transforms import picture_size

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
            box = _box_inside(record.bbox, width, height)
            return Item(image, ids, torch.tensor(relative_box(box, Rectangle(0, 0, width, height))))
        picture = decode_pixels(self.images / record.image, official=self.official_pictures)
        image, target = sample_grounding(
            picture,
            _clip_rounding(record.bbox, *picture_size(picture)),
            record.text,
            rng,
            size=self.config.image_size,
            careful_flip=self.options.careful_flip,
        )
        return Item(image, ids, target)

    def collate(self, items: list[Any], rng: Rng) -> GroundingBatch:
        regions = self.options.regions
        if regions is None:
            boxes = torch.stack([item.target for item in items])
            return GroundingBatch(**self.pair_inputs(items), boxes=boxes)
        texts = -(-regions.texts * len(items) // regions.max_images)
        batch = replace(self._regions, batch_size=texts).collate(items, rng)
        names = [field.name for field in fields(GroundingBatch)]
        return GroundingBatch(**{name: getattr(batch, name) for name in names})

    def losses_of(self, model: GroundingModel, batch: GroundingBatch) -> Losses:
        losses = model(
            batch.image,
            batch.input_ids,
            batch.attention_mask,
            batch.boxes,
            batch.image_index,
            batch.is_image,
        )
        return {"bbox_l1": losses.l1, "bbox_giou": losses.giou}

    def predict(self, model: GroundingModel, records: Sequence[GroundingRecord]) -> list[Row]:
        """Predict rows of `bbox` (x, y, w, h in pixels) and `relative` (cx, cy, w, h)."""
        images, indices = unique_images(records)
        pixels, sizes = zip(*map(self._view, images), strict=True)
        views = torch.stack(pixels).to(model.device, model.dtype)
        texts = [self.caption_ids(record.text, self.options.max_words) for record in records]
        ids, mask = self.padded(texts, model.device)
        image_index = torch.tensor(indices)
        boxes = model.boxes(views, ids, mask, image_index.to(model.device))
        relative = boxes.double().cpu()
        absolute = pixel_boxes(relative, torch.tensor(sizes, dtype=torch.float64)[image_index])
        return [
            {"bbox": box, "relative": shares}
            for box, shares in zip(absolute.tolist(), relative.tolist(), strict=True)
        ]

    def metrics_of(self, records: Sequence[GroundingRecord]) -> Collection[str]:
        """Return `accuracy`, and `accuracy_<split>` if all records have a split."""
        if not records or not self.has_truth(records):
            return []
        splits = dict.fromkeys(record.split for record in records)
        return ["accuracy", *(f"accuracy_{split}" for split in splits if all(splits))]

    def score(self, rows: Sequence[Row], records: Sequence[GroundingRecord]) -> Metrics:
        """Compute the share of boxes with IoU of at least 0.5, as named by `metrics_of`."""
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64)
        reference = torch.tensor([record.bbox for record in records], dtype=torch.float64)
        metrics = {"accuracy": 100 * box_accuracy(boxes, reference)["all"]}
        splits = [record.split or "" for record in records]
        if all(splits):
            for split, share in box_accuracy(boxes, reference, splits).items():
                metrics[f"accuracy_{split}"] = 100 * share
        return metrics

    def files(self, rows: Sequence[Row], records: Sequence[GroundingRecord]) -> dict[str, bytes]:
        """Return `boxes.json` for the official evaluation; `pred` is the relative box."""
        entries = [
            {"ref_id": record.ref_id, "pred": row["relative"], "bbox": row["bbox"]}
            for row, record in zip(rows, records, strict=True)
        ]
        return json_file("boxes.json", entries)

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[GroundingRecord]:
        valid = len(images) == 1 and len(texts) > 0
        require_inputs(images, texts, "an image and one expression or several", ok=valid)
        image = str(images[0])
        return [
            GroundingRecord(image=image, text=text, ref_id=index)
            for index, text in enumerate(texts)
        ]

    def _view(self, image: str) -> tuple[Tensor, tuple[int, int]]:
        """Read a whole image `[3, R, R]` as in evaluation, and its (width, height) in pixels."""
        decoded = decode_image(self.images / image, official=self.official_pictures)
        return evaluation_transform(self.config.image_size)(decoded), decoded.size


def check_boxes(records: Sequence[GroundingRecord], images: Path, *, official: bool) -> None:
    """Raise `DataError` for reference boxes outside their image."""
    sizes: dict[str, tuple[int, int]] = {}
    for record in records:
        # Records with an image size, e.g. those of refer's files, were validated when read.
        if record.width is not None or record.bbox is None:
            continue
        if record.image not in sizes:
            sizes[record.image] = image_size(images / record.image, official=official)
        try:
            _box_inside(record.bbox, *sizes[record.image])
        except DataError as error:
            raise DataError(f"expression {record.ref_id} of {record.image}: {error}") from None


def expressions_of(
    rows: AnnotationRows[GroundingRecord], *, training: bool
) -> AnnotationRows[GroundingRecord]:
    """Drop expressions marked with another split than that of training, or of evaluation."""
    selected = []
    for row, element in enumerate(rows.elements):
        split = element.get("split") if isinstance(element, dict) else None
        if split is None or (split == "train") == training:
            selected.append(row)
    if not selected:
        expected = "the split train" if training else "a split other than train"
        raise DataError(f"{rows.name} has no element of {expected}; give the file of another split")
    return rows.select(selected)


def _box_inside(box: Sequence[float], width: int, height: int) -> Rectangle:
    from xfm_fast.data.regions import box_inside

    return box_inside(_clip_rounding(box, width, height), width, height)


def _clip_rounding(
    box: Sequence[float], width: int, height: int
) -> tuple[float, float, float, float]:
    """Clip a box that exceeds the image by a rounding error; return any other one unchanged."""
    x, y, w, h = box
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + w, float(width)), min(y + h, float(height))
    excess = max(left - x, top - y, x + w - right, y + h - bottom)
    if 0 < excess <= _EDGE:
        return left, top, right - left, bottom - top
    return x, y, w, h
