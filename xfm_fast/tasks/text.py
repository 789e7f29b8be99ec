"""Text and text-pair classification and regression: GLUE and tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from xfm_fast.batches import TensorBatch
from xfm_fast.data.annotations import AnnotationRows, TextRecord, TextScoreRecord
from xfm_fast.data.tables import GLUE, text_rows
from xfm_fast.errors import DataError
from xfm_fast.tasks.classification import (
    ClassificationModel,
    LabelOptions,
    LabelTask,
    class_names,
    class_number,
    class_rows,
    correlations,
    f1_score,
)
from xfm_fast.tasks.evaluation import Evaluation, Metrics, Row
from xfm_fast.tasks.task import Item, register, require_inputs

GlueName = Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
_RESULT_FILES = {"cola": "CoLA.tsv", "mnli": "MNLI-m.tsv", "sst2": "SST-2.tsv", "stsb": "STS-B.tsv"}
_FURTHER_METRICS = {"cola": ("matthews",), "mrpc": ("f1",), "qqp": ("f1",)}
_MOST_SIMILAR = 5.0


class TextTaskOptions(LabelOptions):
    """Text classification or regression."""

    record = TextRecord
    kind: Literal["text"] = "text"
    glue: GlueName | None = Field(
        default=None, description="GLUE task, read from its zip or from datasets"
    )
    regression: bool = Field(default=False, description="predict numbers, as in stsb")
    pairs: bool = Field(
        default=False, description="texts are pairs; detected from the training files"
    )
    max_tokens: int = Field(
        default=128, ge=6, description="with special tokens; truncates the longer text of a pair"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.glue is not None and self.columns:
            raise ValueError(f"the columns of glue={self.glue} are known; leave columns out")
        if self.regression and self.labels:
            raise ValueError("a regression has no classes; leave labels out")
        return self

    def read(
        self, paths: Sequence[Path], split: str, columns: Mapping[str, str]
    ) -> list[AnnotationRows[Any]]:
        return [
            *text_rows(paths, glue=self.glue, split=split, columns=columns, scores=self.regression)
        ]

    def completed(self, train: Sequence[Path], root: Path) -> Self:
        """Options with class names and whether texts are pairs."""
        classes = None if self.glue is None else GLUE[self.glue].classes
        regression = self.regression or (self.glue is not None and classes is None)
        rows = self.read(train, "train", self.columns)
        elements = (
            element for each in rows for element in each.elements if isinstance(element, dict)
        )
        changes: dict[str, Any] = {"regression": regression}
        changes["pairs"] = self.pairs or any(
            element.get("text2") not in (None, "") for element in elements
        )
        if not regression:
            changes["labels"] = class_names(self.labels or classes or (), rows)
        return self.model_copy(update=changes)


@dataclass(frozen=True, kw_only=True)
class LabelledTexts(TensorBatch):
    """B texts with targets."""

    input_ids: Tensor  # `[B, L]` int64, padded
    attention_mask: Tensor  # `[B, L]`, non-zero for real tokens
    targets: Tensor  # `[B]` classes (int64), or values (float32)


@register
class TextTask(LabelTask[TextTaskOptions, LabelledTexts]):
    """Text classification; see `xfm_fast.tasks.classification`. Texts are not cleaned like captions."""

    Options = TextTaskOptions
    image_files = False
    metrics = ("accuracy", "f1", "matthews", "pearson", "spearman")

    def prepare(self) -> None:
        self.check_length(self.options.max_tokens)

    def build(self) -> ClassificationModel:
        return ClassificationModel(self.config, len(self.options.labels) or 1, modality="text")

    def read(
        self, paths: Sequence[Path], split: str, columns: Mapping[str, str]
    ) -> list[AnnotationRows[Any]]:
        return self.options.read(paths, split, columns)

    def _ids(self, record: TextRecord | TextScoreRecord) -> list[int]:
        if record.text2 is not None:
            return self.tokenizer.encode_pair(record.text, record.text2, self.options.max_tokens)
        return self.tokenizer.encode_ids([record.text], self.options.max_tokens)[0]

    def item(self, record: TextRecord | TextScoreRecord, rng: np.random.Generator) -> Item:
        if record.label is None:
            raise DataError(
                "'label' is missing; training needs the class, or the number to predict"
            )
        number = isinstance(record, TextScoreRecord)
        target = record.label if number else class_number(record.label, self.options.labels)
        return Item(ids=self._ids(record), target=target)

    def collate(self, items: list[Item], rng: np.random.Generator) -> LabelledTexts:
        ids, mask = self.padded([item.ids for item in items])
        dtype = torch.float32 if self.options.regression else torch.int64
        targets = torch.tensor([item.target for item in items], dtype=dtype)
        return LabelledTexts(input_ids=ids, attention_mask=mask, targets=targets)

    def losses_of(self, model: ClassificationModel, batch: LabelledTexts) -> dict[str, Tensor]:
        return {"loss": model(None, batch.input_ids, batch.attention_mask, targets=batch.targets)}

    def predict(
        self, model: ClassificationModel, records: Sequence[TextRecord | TextScoreRecord]
    ) -> list[Row]:
        logits = model.logits(
            None, *self.padded([self._ids(record) for record in records], model.device)
        )
        if self.options.regression:
            return [{"answer": value} for value in logits[:, 0].tolist()]
        return class_rows(logits, self.options.labels)

    def metrics_of(self, records: Sequence[TextRecord | TextScoreRecord]) -> Collection[str]:
        if not self.has_truth(records):
            return ()
        if self.options.regression:
            return "pearson", "spearman"
        return "accuracy", *_FURTHER_METRICS.get(self.options.glue or "", ())

    def score(
        self, rows: Sequence[Row], records: Sequence[TextRecord | TextScoreRecord]
    ) -> Metrics:
        pairs: list[Any] = [
            (row["answer"], record.label) for row, record in zip(rows, records, strict=True)
        ]
        if self.options.regression:
            pearson, spearman = correlations(*torch.tensor(pairs, dtype=torch.float64).unbind(1))
            return {"pearson": 100 * pearson, "spearman": 100 * spearman}
        number = self.options.labels.index
        predicted, targets = torch.tensor(
            [(number(answer), number(label)) for answer, label in pairs]
        ).unbind(1)
        values = {
            "accuracy": lambda: (predicted == targets).double().mean().item(),
            "f1": lambda: f1_score(predicted, targets),
            # The Matthews correlation is Pearson's, of two binary variables.
            "matthews": lambda: correlations(predicted, targets)[0],
        }
        return {name: 100 * values[name]() for name in self.metrics_of(records)}

    def files(
        self, rows: Sequence[Row], records: Sequence[TextRecord | TextScoreRecord]
    ) -> dict[str, bytes]:
        """GLUE submission table (`index`, `prediction`) by file name."""
        table, glue = io.StringIO(), self.options.glue
        writer = csv.writer(table, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "prediction"])
        for number, (row, record) in enumerate(zip(rows, records, strict=True)):
            answer = row["answer"]
            if glue == "stsb":
                answer = f"{min(max(answer, 0.0), _MOST_SIMILAR):.3f}"
            writer.writerow([number if record.index is None else record.index, answer])
        name = "predictions.tsv" if glue is None else _RESULT_FILES.get(glue, f"{glue.upper()}.tsv")
        return {name: table.getvalue().encode()}

    def evaluate(
        self,
        model: ClassificationModel,
        records: Sequence[TextRecord | TextScoreRecord],
        work: Evaluation,
    ) -> tuple[Metrics, dict[str, bytes]]:
        metrics, files = super().evaluate(model, records, work)
        # The two halves of MNLI are two files, distinguished only by the split name.
        if self.options.glue == "mnli" and "mismatched" in work.folder.name:
            files = {
                name.replace("MNLI-m.", "MNLI-mm."): content for name, content in files.items()
            }
        return metrics, files

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[Any]:
        if self.options.pairs:
            require_inputs(
                images, texts, "two texts, and no image", ok=not images and len(texts) == 2
            )
            return [TextRecord(text=texts[0], text2=texts[1])]
        require_inputs(images, texts, "texts, and no image", ok=not images and bool(texts))
        return [TextRecord(text=text) for text in texts]
