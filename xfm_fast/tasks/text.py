"""Classification and regression of texts (GLUE, tables); images share the options and labels.

Official recipes: ImageNet at 224 pixels, 128 images per GPU, lr 4e-5, 100 epochs, Mixup and CutMix;
linear probes with a frozen encoder; GLUE with lr 1e-5 to 5e-5, 3 to 20 epochs, batch size 32.
"""

from __future__ import annotations

import csv
import io
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from xfm_fast.batches import TensorBatch
from xfm_fast.data.annotations import (
    Annotation,
    AnnotationRows,
    TextRecord,
    TextScoreRecord,
    label_names,
)
from xfm_fast.data.tables import GLUE, text_rows
from xfm_fast.errors import DataError, needs
from xfm_fast.tasks.evaluation import Evaluation, Metrics, Row
from xfm_fast.tasks.models import ClassificationModel, ClassificationSession
from xfm_fast.tasks.task import Item, Losses, Rng, Task, TaskOptions, register, require_inputs

GlueName = Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
_RESULT_FILES = {"cola": "CoLA.tsv", "mnli": "MNLI-m.tsv", "sst2": "SST-2.tsv", "stsb": "STS-B.tsv"}
_FURTHER_METRICS = {"cola": ("matthews",), "mrpc": ("f1",), "qqp": ("f1",)}
_MOST_SIMILAR = 5.0


class LabelOptions(TaskOptions):
    """Options of tasks with labelled records."""

    record: ClassVar[type[Annotation]]
    columns: dict[str, str] = Field(
        default={}, description="renamed table columns: {FIELD: COLUMN}"
    )
    labels: tuple[str, ...] = Field(
        default=(), description="classes; default: sorted classes of the training files"
    )

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        fields = self.record.model_fields
        if unknown := [field for field in self.columns if field not in fields]:
            raise ValueError(
                f"columns: {unknown[0]} is not a field; choose from {', '.join(fields)}"
            )
        return self


LabelOptionsT = TypeVar("LabelOptionsT", bound=LabelOptions)


class LabelTask(Task[LabelOptionsT]):
    """A task with labelled records; evaluation files may lack labels, to predict only."""

    Session = ClassificationSession
    large_lr = ("cls_head",)
    drop_last = False
    truth = "label"

    @abstractmethod
    def read(
        self, paths: Sequence[Path], split: str, columns: Mapping[str, str]
    ) -> list[AnnotationRows[Any]]:
        """Open files, or a split in folders."""

    def rows(self, paths: Sequence[Path], split: str | None = None) -> list[AnnotationRows[Any]]:
        columns = self.options.columns
        try:
            return self.read(paths, split or "train", columns)
        except DataError:
            if split is None or "label" not in columns:
                raise
            # A file to predict for may lack the renamed label column.
            columns = {field: name for field, name in columns.items() if field != "label"}
            return self.read(paths, split, columns)

    def records(self, paths: Sequence[Path], split: str) -> list[Any]:
        """Read evaluation records; classes that training does not have raise `DataError`."""
        records = super().records(paths, split)
        # The labels of a regression are numbers.
        labels = [record.label for record in records if isinstance(record.label, str)]
        unknown = Counter(label for label in labels if label not in self.options.labels)
        if unknown:
            label, times = unknown.most_common(1)[0]
            raise DataError(
                f"{unknown.total()} of {len(records)} records to evaluate on have a class that training does not know, "
                f"such as {label!r} ({times}); correct them, or name all classes by task.labels=[...]"
            )
        return records


def class_names(names: Sequence[str], rows: Iterable[AnnotationRows[Any]]) -> tuple[str, ...]:
    """Return `names`, else the sorted labels of the training rows; check that there are two."""
    classes = tuple(names or label_names(rows))
    if len(classes) < 2:
        raise DataError(
            f"there is one class only, {', '.join(classes)!r}; a classifier needs at least two"
        )
    if repeated := [name for name, times in Counter(classes).items() if times > 1]:
        raise DataError(f"the class {repeated[0]!r} is named twice in task.labels; name it once")
    return classes


def class_index(label: str | None, names: Sequence[str]) -> int:
    """Return the index of a label; a missing or unknown label raises `DataError`."""
    if label not in names:
        first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise DataError(
            f"label {label!r} is not among the {len(names)} classes ({first}); correct it"
        )
    return names.index(label)


def class_rows(logits: Tensor, names: Sequence[str], count: int = 5) -> list[Row]:
    """Make rows of `answer` and the `count` largest `probabilities` from logits `[B, classes]`."""
    probabilities, indices = logits.double().softmax(-1).topk(min(count, len(names)))
    rows = []
    for values, classes in zip(probabilities.tolist(), indices.tolist(), strict=True):
        ranked = {names[index]: value for index, value in zip(classes, values, strict=True)}
        rows.append({"answer": names[classes[0]], "probabilities": ranked})
    return rows


def f1_score(predicted: Tensor, targets: Tensor) -> float:
    """Compute F1 of class 1 for two binary `[B]` tensors (MRPC, QQP); 0 without positives."""
    hits = int((predicted.bool() & targets.bool()).sum())
    positives = int(predicted.bool().sum()) + int(targets.bool().sum())
    return 2 * hits / positives if positives else 0.0


def correlations(predicted: Tensor, targets: Tensor) -> tuple[float, float]:
    """Compute the Pearson and Spearman correlation of two `[B]` tensors; 0 for a constant one."""
    # SciPy's statistics take a second to import.
    with needs("train"):
        from scipy import stats

    a, b = (values.double().cpu().numpy() for values in (predicted, targets))
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return 0.0, 0.0
    pearson: Any = stats.pearsonr(a, b)
    spearman: Any = stats.spearmanr(a, b)
    return float(pearson.statistic), float(spearman.statistic)


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
    def _check_labels(self) -> Self:
        if self.glue is not None and self.columns:
            raise ValueError(f"the columns of glue={self.glue} are known; leave columns out")
        if self.regression and self.labels:
            raise ValueError("a regression has no classes; leave labels out")
        return self

    def read(
        self, paths: Sequence[Path], split: str, columns: Mapping[str, str]
    ) -> list[AnnotationRows[Any]]:
        scores = self.regression
        return [*text_rows(paths, glue=self.glue, split=split, columns=columns, scores=scores)]

    def completed(self, train: Sequence[Path], root: Path) -> Self:
        """Fill in class names and whether texts are pairs."""
        classes = None if self.glue is None else GLUE[self.glue].classes
        regression = self.regression or (self.glue is not None and classes is None)
        files = self.read(train, "train", self.columns)
        pairs = self.pairs
        for element in (element for rows in files for element in rows.elements):
            if isinstance(element, dict) and element.get("text2") not in (None, ""):
                pairs = True
                break
        changes: dict[str, Any] = {"regression": regression, "pairs": pairs}
        if not regression:
            changes["labels"] = class_names(self.labels or classes or (), files)
        return self.model_copy(update=changes)


@dataclass(frozen=True, kw_only=True)
class LabelledTexts(TensorBatch):
    """B texts with targets."""

    input_ids: Tensor  # `[B, L]` int64, padded
    attention_mask: Tensor  # `[B, L]`, non-zero for real tokens
    targets: Tensor  # `[B]` classes (int64), or values (float32)


@register
class TextTask(LabelTask[TextTaskOptions]):
    """Text classification and regression. Texts are not cleaned like captions."""

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

    def item(self, record: TextRecord | TextScoreRecord, rng: Rng) -> Item:
        target = record.label
        if target is None:
            raise DataError(
                "'label' is missing; training needs the class, or the number to predict"
            )
        if isinstance(target, str):
            target = class_index(target, self.options.labels)
        return Item(ids=self._ids(record), target=target)

    def collate(self, items: list[Item], rng: Rng) -> LabelledTexts:
        ids, mask = self.padded([item.ids for item in items])
        dtype = torch.float32 if self.options.regression else torch.int64
        targets = torch.tensor([item.target for item in items], dtype=dtype)
        return LabelledTexts(input_ids=ids, attention_mask=mask, targets=targets)

    def losses_of(self, model: ClassificationModel, batch: LabelledTexts) -> Losses:
        return {"loss": model(None, batch.input_ids, batch.attention_mask, targets=batch.targets)}

    def predict(
        self, model: ClassificationModel, records: Sequence[TextRecord | TextScoreRecord]
    ) -> list[Row]:
        ids, mask = self.padded([self._ids(record) for record in records], model.device)
        logits = model.logits(None, ids, mask)
        if self.options.regression:
            return [{"answer": value} for value in logits[:, 0].tolist()]
        return class_rows(logits, self.options.labels)

    def metrics_of(self, records: Sequence[TextRecord | TextScoreRecord]) -> Collection[str]:
        if not self.has_truth(records):
            return ()
        if self.options.regression:
            return "pearson", "spearman"
        return "accuracy", *_FURTHER_METRICS.get(self.options.glue or "", ())

    def score(self, rows: Sequence[Row], records: Sequence[Any]) -> Metrics:
        answers = [row["answer"] for row in rows]
        labels = [record.label for record in records]
        if self.options.regression:
            values = torch.tensor([answers, labels], dtype=torch.float64)
            pearson, spearman = correlations(values[0], values[1])
            return {"pearson": 100 * pearson, "spearman": 100 * spearman}
        index = self.options.labels.index
        predicted = torch.tensor([index(answer) for answer in answers])
        targets = torch.tensor([index(label) for label in labels])
        metrics = {"accuracy": 100 * (predicted == targets).double().mean().item()}
        names = self.metrics_of(records)
        if "f1" in names:
            metrics["f1"] = 100 * f1_score(predicted, targets)
        if "matthews" in names:
            # The Matthews correlation is Pearson's, of two binary variables.
            metrics["matthews"] = 100 * correlations(predicted, targets)[0]
        return metrics

    def files(self, rows: Sequence[Row], records: Sequence[Any]) -> dict[str, bytes]:
        """Return the GLUE submission table (`index`, `prediction`) by file name."""
        table, glue = io.StringIO(), self.options.glue
        writer = csv.writer(table, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "prediction"])
        for position, (row, record) in enumerate(zip(rows, records, strict=True)):
            answer = row["answer"]
            if glue == "stsb":
                answer = f"{min(max(answer, 0.0), _MOST_SIMILAR):.3f}"
            writer.writerow([position if record.index is None else record.index, answer])
        name = "predictions.tsv" if glue is None else _RESULT_FILES.get(glue, f"{glue.upper()}.tsv")
        return {name: table.getvalue().encode()}

    def evaluate(
        self, model: ClassificationModel, records: Sequence[Any], work: Evaluation
    ) -> tuple[Metrics, dict[str, bytes]]:
        metrics, files = super().evaluate(model, records, work)
        # The two halves of MNLI are two files, distinguished only by the split name.
        if self.options.glue == "mnli" and "mismatched" in work.folder.name:
            files = {name.replace("MNLI-m.", "MNLI-mm."): table for name, table in files.items()}
        return metrics, files

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[TextRecord]:
        if self.options.pairs:
            valid = not images and len(texts) == 2
            require_inputs(images, texts, "two texts, and no image", ok=valid)
            return [TextRecord(text=texts[0], text2=texts[1])]
        require_inputs(images, texts, "texts, and no image", ok=not images and bool(texts))
        return [TextRecord(text=text) for text in texts]
