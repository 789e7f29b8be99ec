"""NLVR2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from xfm_fast.data.annotations import AnnotationRows, NLVR2Record
from xfm_fast.data.task_files import nlvr2_rows
from xfm_fast.finetuning.evaluation import Metrics, Row
from xfm_fast.finetuning.task import PairInput, Task, TaskOptions, require_inputs
from xfm_fast.tasks.nlvr2 import NLVR2Model

RESULT_FILE = "nlvr2_result.csv"


class NLVR2Line(NLVR2Record):
    """A statement in the benchmark's format, with its identifier."""

    identifier: str | None = Field(default=None, description="split-set-pair-sentence, e.g. test1-0-1-0")


class NLVR2Options(TaskOptions):
    """NLVR2."""

    kind: Literal["nlvr2"] = "nlvr2"
    augment: bool = Field(default=True, description="random crop, flip and RandAugment; false only resizes")
    max_words: int = Field(default=30, gt=0, description="of a sentence")
    max_tokens: int | None = Field(default=None, ge=3, description="of a sentence in training; null: unlimited")


class Statement(NamedTuple):
    """Two images, sentence ids and the label."""

    images: tuple[Tensor, Tensor]
    ids: list[int]
    label: bool


@dataclass(frozen=True, kw_only=True)
class NLVR2Batch(PairInput):
    """`image` `[2B, 3, R, R]`: all first images, then all second ones; `targets` `[B]`."""

    targets: Tensor


class NLVR2Task(Task[NLVR2Options, NLVR2Record, Statement, NLVR2Batch]):
    """NLVR2; see `xfm_fast.tasks.nlvr2`."""

    metrics = ("accuracy",)
    large_lr = ("cls_head",)

    def build(self) -> NLVR2Model:
        return NLVR2Model(self.config)

    def rows(self, paths: Sequence[Path]) -> list[AnnotationRows[NLVR2Record]]:
        found = nlvr2_rows(paths)
        for rows in found:
            rows.kind = NLVR2Line
        return found

    def item(self, record: NLVR2Record, rng: np.random.Generator) -> Statement:
        ids = self.caption_ids(record.sentence, self.options.max_words, self.options.max_tokens)
        first, second = (self.augmented(image, rng) for image in record.images)
        return Statement((first, second), ids, record.label)

    def collate(self, items: list[Statement], rng: np.random.Generator) -> NLVR2Batch:
        ids, mask = self.padded([item.ids for item in items])
        images = [item.images[place] for place in (0, 1) for item in items]
        targets = torch.tensor([item.label for item in items], dtype=torch.int64)
        return NLVR2Batch(image=torch.stack(images), input_ids=ids, attention_mask=mask, targets=targets)

    def losses_of(self, model: NLVR2Model, batch: NLVR2Batch) -> dict[str, Tensor]:
        return {"loss": model(batch.image, batch.input_ids, batch.attention_mask, batch.targets)}

    def predict(self, model: NLVR2Model, records: Sequence[NLVR2Record]) -> list[Row]:
        sentences = [self.caption_ids(record.sentence, self.options.max_words) for record in records]
        ids, mask = (each.to(model.device) for each in self.padded(sentences))
        pixels = torch.stack([self.pixels(record.images[place]) for place in (0, 1) for record in records])
        shares = model.logits(pixels.to(model.device), ids, mask).double().softmax(-1)[:, 1].tolist()
        return [{"answer": share > 0.5, "probability": share} for share in shares]

    def score(self, rows: Sequence[Row], records: Sequence[NLVR2Record]) -> Metrics:
        right = [row["answer"] == record.label for row, record in zip(rows, records, strict=True)]
        return {"accuracy": 100 * sum(right) / len(right)}

    def files(self, rows: Sequence[Row], records: Sequence[NLVR2Record]) -> dict[str, bytes]:
        """Lines `identifier,label` for the benchmark's script, numbered if there are no identifiers."""
        names = [getattr(record, "identifier", None) or number for number, record in enumerate(records)]
        lines = [f"{name},{row['answer']}\n" for name, row in zip(names, rows, strict=True)]
        return {RESULT_FILE: "".join(lines).encode()}

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[NLVR2Record]:
        require_inputs(images, texts, "two images and a sentence about both", ok=len(images) == 2 and len(texts) == 1)
        pair = (str(images[0]), str(images[1]))
        return [NLVR2Record(images=pair, sentence=texts[0], label=False)]
