"""A task from outside the package: how well does a caption fit an image, by the cosine of their
features?
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xfm_fast.data.annotations import (
    Annotation,
    AnnotationRows,
    Text,
    as_rows,
    read_array,
)
from xfm_fast.data.files import Paths, find_files
from xfm_fast.tasks.evaluation import Metrics, Row
from xfm_fast.tasks.models import TaskModel
from xfm_fast.tasks.task import Item, PairInput, Task, TaskOptions, register, require_inputs


class LikenessRecord(Annotation):
    image: Text
    caption: Text
    likeness: float | None = None


class LikenessOptions(TaskOptions):
    kind: Literal["likeness"] = "likeness"


@dataclass(frozen=True, kw_only=True)
class LikenessBatch(PairInput):
    targets: Tensor


def likeness_rows(paths: Paths) -> list[AnnotationRows[LikenessRecord]]:
    files = [AnnotationRows(path, read_array(path)) for path in find_files(paths)]
    return as_rows(files, LikenessRecord)


def cosine(model: Any, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    image_features = model.project_image(model.encode_image(image))
    text_features = model.project_text(model.encode_text(ids, mask))
    return (image_features * text_features).sum(-1)


@register
class LikenessTask(Task[LikenessOptions]):
    Options = LikenessOptions
    metrics = ("closeness",)
    check_rows = staticmethod(likeness_rows)

    def build(self) -> TaskModel:
        return TaskModel(self.config, heads=("contrastive",))

    def rows(
        self, paths: Sequence[Path], split: str | None = None
    ) -> list[AnnotationRows[LikenessRecord]]:
        return likeness_rows(paths)

    def item(self, record: LikenessRecord, rng: Any) -> Item:
        ids = self.caption_ids(record.caption, 30)
        return Item(self.pixels(record.image), ids, record.likeness or 0.0)

    def collate(self, items: list[Item], rng: Any) -> LikenessBatch:
        targets = torch.tensor([item.target for item in items])
        return LikenessBatch(**self.pair_inputs(items), targets=targets)

    def losses_of(self, model: Any, batch: LikenessBatch) -> dict[str, Tensor]:
        likeness = cosine(model, batch.image, batch.input_ids, batch.attention_mask)
        return {"loss": (likeness - batch.targets).square().mean()}

    def predict(self, model: Any, records: Sequence[LikenessRecord]) -> list[Row]:
        ids, mask = self.padded([self.caption_ids(record.caption, 30) for record in records])
        pixels = self.pixels_of([record.image for record in records], model)
        return [{"likeness": value} for value in cosine(model, pixels, ids, mask).tolist()]

    def score(self, rows: Sequence[Row], records: Sequence[LikenessRecord]) -> Metrics:
        errors = [
            abs(row["likeness"] - (record.likeness or 0))
            for row, record in zip(rows, records, strict=True)
        ]
        return {"closeness": 100 - 100 * sum(errors) / len(errors)}

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[LikenessRecord]:
        require_inputs(images, texts, "an image and a caption", ok=len(images) == len(texts) == 1)
        return [LikenessRecord(image=str(images[0]), caption=texts[0])]
