"""Classification and regression of images, texts (GLUE) and image-text pairs.

Official recipes: ImageNet at 224 pixels, 128 images per GPU, lr 4e-5, 100 epochs, Mixup and CutMix; linear probes with
a frozen encoder; GLUE with lr 1e-5 to 5e-5, 3 to 20 epochs, batch size 32.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from xfm_fast.batches import TensorBatch
from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import Annotation, AnnotationRows, label_names
from xfm_fast.errors import DataError, InputError, needs
from xfm_fast.models import inputs
from xfm_fast.models.text import DeepMLPHead, MLPHead
from xfm_fast.models.xfm import Encoder
from xfm_fast.packing import Packing
from xfm_fast.tasks.evaluation import Row
from xfm_fast.tasks.task import Item, Task, TaskModel, TaskOptions

Modality = Literal["image", "text", "pair"]
HeadKind = Literal["linear", "mlp", "official_image"]
_ENCODERS: dict[Modality, tuple[Encoder, ...]] = {
    "image": ("vision",),
    "text": ("text",),
    "pair": ("vision", "text", "fusion"),
}
_READS = {"image": ("pixels",), "text": ("input_ids",), "pair": ("pixels", "input_ids")}


class ClassificationModel(TaskModel):
    """A classification head on the image token, text token 0, or fused token 0; unused encoders are not built.

    `labels=1` is a regression. Heads: `linear` (default if `frozen`), `mlp` (Linear·LayerNorm·GELU·Linear, official
    for texts and pairs), `official_image` (five linear layers on the image token concatenated with the mean of the
    patches: identical vectors unless `local_attn_depth > 0`). A `frozen` encoder stays in evaluation mode without
    gradients; the official "linear probe" (81.2 on ImageNet) trains `official_image` and leaves DropPath active.
    """

    own_parts = ("cls_head.",)

    def __init__(
        self,
        config: XFMConfig,
        labels: int,
        *,
        modality: Modality,
        head: HeadKind | None = None,
        frozen: bool = False,
    ) -> None:
        if modality not in _ENCODERS:
            raise InputError(
                f"modality {modality!r} is unknown; choose from {', '.join(_ENCODERS)}"
            )
        if labels < 1:
            raise InputError(f"labels={labels}; a classifier has at least one output")
        if head == "official_image" and modality != "image":
            raise InputError(
                f"head 'official_image' reads an image; for modality {modality!r} choose 'mlp' or 'linear'"
            )
        super().__init__(config, heads=(), encoders=_ENCODERS[modality])
        self.labels = labels
        self.modality: Modality = modality
        self.head: HeadKind = head or ("linear" if frozen else "mlp")
        self.frozen = frozen
        width = config.vision_width if modality == "image" else config.text_width
        if self.head == "official_image":
            self.cls_head: nn.Module = DeepMLPHead(2 * width, labels, config.head_layer_norm_eps)
        elif self.head == "mlp":
            self.cls_head = MLPHead(width, labels, config.head_layer_norm_eps)
        else:
            self.cls_head = nn.Linear(width, labels)
        if frozen:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.startswith("cls_head."))
            self.train(self.training)

    def train(self, mode: bool = True) -> ClassificationModel:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            for name, part in self.named_children():
                part.train(mode and name == "cls_head")
        return self

    def features(
        self,
        pixels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Head inputs: `[B, width]`, or `[B, 2 · vision_width]` for the official image head."""
        for name, value, other in (("pixels", pixels, "text"), ("input_ids", input_ids, "image")):
            if (self.modality == other) != (value is None):
                raise InputError(
                    f"{name} is {'missing' if value is None else 'given'}; a classifier of modality "
                    f"{self.modality!r} reads {' and '.join(_READS[self.modality])}"
                )
        with torch.no_grad() if self.frozen else nullcontext():
            if pixels is None:
                assert input_ids is not None
                packing = Packing.from_mask(
                    inputs.check_tokens(input_ids, attention_mask, self.config)
                )
                return packing.restore(self.text_encoder(input_ids, packing, first_token_only=True))
            image = self.encode_image(pixels)
            if input_ids is not None:
                mask = inputs.check_tokens(input_ids, attention_mask, self.config)
                text = self.encode_text(input_ids, mask)
                return self.fuse(text, mask, self.image_memory(image), first_token_only=True)[:, 0]
            if self.head == "official_image":
                return torch.cat([image[:, 0], image[:, 1:].mean(1)], dim=-1)
            return image[:, 0]

    def logits(
        self,
        pixels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """`[B, labels]`; arguments as in `features`."""
        return self.cls_head(self.features(pixels, input_ids, attention_mask))

    def forward(
        self,
        pixels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        targets: Tensor,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy of `[B]` classes or `[B, labels]` probabilities; mean squared error for regression."""
        logits = self.logits(pixels, input_ids, attention_mask)
        if self.labels == 1:
            return F.mse_loss(logits[:, 0], targets.to(logits.dtype))
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def f1_score(predicted: Tensor, targets: Tensor) -> float:
    """F1 of class 1 for two binary `[B]` tensors (MRPC, QQP); 0 without positives."""
    hits = int((predicted.bool() & targets.bool()).sum())
    positives = int(predicted.bool().sum()) + int(targets.bool().sum())
    return 2 * hits / positives if positives else 0.0


def correlations(predicted: Tensor, targets: Tensor) -> tuple[float, float]:
    """Pearson and Spearman correlation of two `[B]` tensors (STS-B); 0 if either is constant."""
    # SciPy's statistics take a second to import.
    with needs("train"):
        from scipy import stats

    a, b = (values.double().cpu().numpy() for values in (predicted, targets))
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return 0.0, 0.0
    measures: tuple[Any, ...] = (stats.pearsonr, stats.spearmanr)
    pearson, spearman = (float(measure(a, b).statistic) for measure in measures)
    return pearson, spearman


class ClassificationSession:
    """What an export adds to `xfm_fast.export.Session`: the head is an output of the last graph."""

    def logits(
        self: Any,
        pixels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """`ClassificationModel.logits`."""
        if input_ids is None:
            if pixels is None:
                raise InputError(
                    "pixels and input_ids are missing; a classifier reads one of them, or both"
                )
            return self.class_logits(self.encode_image(pixels), "encode_image")
        mask = inputs.check_tokens(input_ids, attention_mask, self.config)
        texts = self.encode_text(input_ids, mask)
        if pixels is None:
            return self.class_logits(texts, "encode_text")
        memory = self.image_memory(self.encode_image(pixels))
        return self.class_logits(self.fuse(texts, mask, memory, first_token_only=True), "fuse")


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
    def _columns_exist(self) -> Self:
        fields = self.record.model_fields
        if unknown := [field for field in self.columns if field not in fields]:
            raise ValueError(f"columns: {unknown[0]} is no field; known here: {', '.join(fields)}")
        return self


LabelOptionsT = TypeVar("LabelOptionsT", bound=LabelOptions)
BatchT = TypeVar("BatchT", bound=TensorBatch)


class LabelTask(Task[LabelOptionsT, Any, Item, BatchT]):
    """A task with labelled records; evaluation files may lack labels, to predict only."""

    Session = ClassificationSession
    large_lr = ("cls_head",)
    drop_last = False
    truth = "label"

    @abstractmethod
    def read(
        self, paths: Sequence[Path], split: str, columns: Mapping[str, str]
    ) -> list[AnnotationRows[Any]]:
        """Rows of files, or of a split in folders."""

    def rows(self, paths: Sequence[Path]) -> list[AnnotationRows[Any]]:
        return self.read(paths, "train", self.options.columns)

    def test_rows(self, paths: Sequence[Path], split: str) -> list[AnnotationRows[Any]]:
        columns = self.options.columns
        try:
            return self.read(paths, split, columns)
        except DataError:
            # A file to predict for may lack the renamed label column.
            if "label" not in columns:
                raise
            return self.read(
                paths, split, {field: name for field, name in columns.items() if field != "label"}
            )

    def records(self, paths: Sequence[Path], split: str) -> list[Any]:
        """Evaluation records; classes that training does not know raise `DataError`."""
        records = super().records(paths, split)
        # The labels of a regression are numbers.
        known = {None, *self.options.labels}
        foreign = Counter(
            label for each in records if isinstance(label := each.label, str) and label not in known
        )
        if foreign:
            label, times = foreign.most_common(1)[0]
            raise DataError(
                f"{foreign.total()} of {len(records)} records to evaluate on have a class that training does not know, "
                f"such as {label!r} ({times}); correct them, or name all classes by task.labels=[...]"
            )
        return records


def class_names(given: Sequence[str], rows: Iterable[AnnotationRows[Any]]) -> tuple[str, ...]:
    """Ordered class names: `given`, else the sorted labels of the training rows; fewer than two raise `DataError`."""
    names = tuple(given or label_names(rows))
    if len(names) < 2:
        raise DataError(
            f"there is one class only, {', '.join(names)!r}; a classifier needs at least two"
        )
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"the class {twice[0]!r} is named twice in task.labels; name it once")
    return names


def class_number(label: str | None, names: Sequence[str]) -> int:
    """Index of a label; a missing or unknown label raises `DataError`."""
    if label not in names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise DataError(
            f"label {label!r} is none of the {len(names)} classes ({shown}); correct it"
        )
    return names.index(label)


def class_rows(logits: Tensor, names: Sequence[str], most: int = 5) -> list[Row]:
    """Rows of `answer` and the `most` largest `probabilities` from logits `[B, classes]`."""
    shares, places = logits.double().softmax(-1).topk(min(most, len(names)))
    rows = []
    for values, numbers in zip(shares.tolist(), places.tolist(), strict=True):
        ranked = {names[number]: value for number, value in zip(numbers, values, strict=True)}
        rows.append({"answer": names[numbers[0]], "probabilities": ranked})
    return rows
