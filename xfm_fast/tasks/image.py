"""Image classification: class folders, tables and torchvision datasets."""

from __future__ import annotations

import csv
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from xfm_fast.batches import TensorBatch
from xfm_fast.data.annotations import AnnotationRows, ImageLabelRecord
from xfm_fast.data.files import open_file
from xfm_fast.data.images import decode_image, decode_pixels, evaluation_transform
from xfm_fast.data.tables import Columns, image_rows
from xfm_fast.data.transforms import (
    Picture,
    imagenet_evaluation_transform,
    imagenet_training_transform,
    probe_evaluation_transform,
    probe_training_transform,
)
from xfm_fast.errors import ConfigError, DataError, needs
from xfm_fast.tasks.classification import (
    ClassificationModel,
    HeadKind,
    LabelOptions,
    LabelTask,
    class_names,
    class_number,
    class_rows,
)
from xfm_fast.tasks.evaluation import Metrics, Row
from xfm_fast.tasks.task import Item, json_file, register, require_inputs

with needs("vision"):
    from torchvision import datasets
    from torchvision.transforms import v2

_TRAINED_SHARE = 0.8


class ImageTaskOptions(LabelOptions):
    """Image classification."""

    record = ImageLabelRecord
    kind: Literal["image"] = "image"
    dataset: str | None = Field(
        default=None,
        description="torchvision dataset, e.g. CIFAR10; data.train is its folder, and so is each of data.splits, "
        "named by the dataset: {test: cifar}",
    )
    train_split: str = Field(
        default="train", description="torchvision split, e.g. trainval of OxfordIIITPet"
    )
    view: Literal["imagenet", "probe", "whole"] = Field(
        default="imagenet",
        description="imagenet: crop, flip, RandAugment, erasing, and a centre crop to evaluate; probe: crop, flip; "
        "whole: resize only, as in the evaluation of other tasks",
    )
    grey: bool = Field(default=False, description="convert images to greyscale")
    head: HeadKind | None = Field(
        default=None,
        description="linear, mlp, or official_image with its five layers; linear if frozen, else mlp",
    )
    frozen: bool = Field(
        default=False, description="train only the head; with head=linear a linear probe"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0, description="alpha of Mixup; 0 for none")
    cutmix: float = Field(
        default=0.0,
        ge=0,
        description="alpha of CutMix; with mixup each is used in half the batches",
    )

    def completed(self, train: Sequence[Path], root: Path) -> Self:
        """Options with class names."""
        if self.dataset is not None:
            found = open_torchvision(self.dataset, train[0], self.train_split)
            return self.model_copy(update={"labels": class_names(self.labels or found.classes, ())})
        rows = image_rows(train, columns=self.columns)
        return self.model_copy(update={"labels": class_names(self.labels, rows)})


@dataclass(frozen=True, kw_only=True)
class LabelledImages(TensorBatch):
    """B images and their classes."""

    image: Tensor  # `[B, 3, R, R]` normalised pixels
    targets: Tensor  # `[B]` int64 classes, or `[B, classes]` probabilities after Mixup or CutMix


class TorchvisionRecord(ImageLabelRecord):
    """An image of a torchvision dataset by index."""

    folder: str
    split: str
    number: int


@register
class ImageTask(LabelTask[ImageTaskOptions, LabelledImages]):
    """Image classification; see `xfm_fast.tasks.classification`."""

    Options = ImageTaskOptions
    metrics = ("top1", "top5")
    reads_text = False

    def prepare(self) -> None:
        options, size, count = self.options, self.config.image_size, len(self.options.labels)
        name, self.image_files = (options.dataset or "").lower(), options.dataset is None
        self._train_view: Callable[[Picture, np.random.Generator], Tensor] | None = None
        self._test_view: Callable[[Image.Image], Tensor] = evaluation_transform(size)
        if options.view == "imagenet":
            self._train_view, self._test_view = (
                imagenet_training_transform(size),
                imagenet_evaluation_transform(size),
            )
        elif options.view == "probe":
            self._train_view = probe_training_transform(size, name)
            self._test_view = probe_evaluation_transform(size, name)
        mixes = ((v2.MixUp, options.mixup), (v2.CutMix, options.cutmix))
        chosen = [mix(alpha=alpha, num_classes=count) for mix, alpha in mixes if alpha]
        self._mix = v2.RandomChoice(chosen) if chosen else None
        self._sets: dict[tuple[str, str], TorchvisionSet] = {}

    def build(self) -> ClassificationModel:
        options = self.options
        return ClassificationModel(
            self.config,
            len(options.labels),
            modality="image",
            head=options.head,
            frozen=options.frozen,
        )

    def read(
        self, paths: Sequence[Path], split: str, columns: Mapping[str, str]
    ) -> list[AnnotationRows[Any]]:
        if self.options.dataset is None:
            return [*image_rows(paths, columns=columns)]
        rows: list[AnnotationRows[Any]] = []
        for path in paths:
            found = self._sets[str(path), split] = open_torchvision(
                self.options.dataset, path, split
            )
            count = len(found.numbers)
            columns_of_set = {
                "image": [f"{split}/{number}" for number in found.numbers],
                "label": [found.classes[target] for target in found.targets],
                "folder": [str(path)] * count,
                "split": [split] * count,
                "number": found.numbers,
            }
            rows.append(AnnotationRows(path, Columns(columns_of_set), TorchvisionRecord))
        return rows

    def rows(self, paths: Sequence[Path]) -> list[AnnotationRows[Any]]:
        return self.read(paths, self.options.train_split, self.options.columns)

    def item(self, record: ImageLabelRecord, rng: np.random.Generator) -> Item:
        target = class_number(record.label, self.options.labels)
        if self._train_view is None:
            return Item(self.pixels_of_record(record), target=target)
        if self.options.grey or isinstance(record, TorchvisionRecord):
            return Item(self._train_view(self._picture(record), rng), target=target)
        # In two thirds of the time.
        pixels = decode_pixels(self.images / record.image, official=self.official_pictures)
        return Item(self._train_view(pixels, rng), target=target)

    def pixels_of_record(self, record: ImageLabelRecord) -> Tensor:
        """View `[3, R, R]` of evaluation."""
        return self._test_view(self._picture(record))

    def _picture(self, record: ImageLabelRecord) -> Image.Image:
        if isinstance(record, TorchvisionRecord):
            picture = self._sets[record.folder, record.split].picture(record.number)
        else:
            picture = decode_image(self.images / record.image, official=self.official_pictures)
        return picture.convert("L").convert("RGB") if self.options.grey else picture

    def collate(self, items: list[Item], rng: np.random.Generator) -> LabelledImages:
        image = torch.stack([item.image for item in items])
        targets = torch.tensor([item.target for item in items])
        if self._mix is not None:
            # torchvision draws from the CPU's global state, which here is the batch's for so long. (torch.manual_seed
            # would seed the GPU's too, and repeat the same dropout in every batch.)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(rng.integers(1 << 63)))
                image, targets = self._mix(image, targets)
        return LabelledImages(image=image, targets=targets)

    def losses_of(self, model: ClassificationModel, batch: LabelledImages) -> dict[str, Tensor]:
        smoothing = self.options.label_smoothing
        return {"loss": model(batch.image, targets=batch.targets, label_smoothing=smoothing)}

    def predict(self, model: ClassificationModel, records: Sequence[ImageLabelRecord]) -> list[Row]:
        pixels = torch.stack([self.pixels_of_record(record) for record in records])
        return class_rows(model.logits(pixels.to(model.device)), self.options.labels)

    def score(self, rows: Sequence[Row], records: Sequence[ImageLabelRecord]) -> Metrics:
        pairs = [*zip(rows, records, strict=True)]
        first = sum(row["answer"] == record.label for row, record in pairs)
        among = sum(record.label in row["probabilities"] for row, record in pairs)
        return {"top1": 100 * first / len(pairs), "top5": 100 * among / len(pairs)}

    def files(self, rows: Sequence[Row], records: Sequence[ImageLabelRecord]) -> dict[str, bytes]:
        entries = [
            {"image": record.image, **row} for row, record in zip(rows, records, strict=True)
        ]
        return json_file("predictions.json", entries)

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[ImageLabelRecord]:
        require_inputs(images, texts, "images, and no text", ok=bool(images) and not texts)
        return [ImageLabelRecord(image=str(image)) for image in images]


@dataclass(frozen=True)
class TorchvisionSet:
    """A split of a torchvision dataset: `numbers` are image indices, `targets` their classes."""

    data: Any
    classes: Sequence[str]
    numbers: Sequence[int]
    targets: Sequence[int]

    def picture(self, number: int) -> Image.Image:
        try:
            return self.data[number][0].convert("RGB")
        except (OSError, ValueError) as error:
            raise DataError(
                f"image {number} of {type(self.data).__name__} cannot be read ({error})"
            ) from None


def open_torchvision(name: str, folder: Path, split: str) -> TorchvisionSet:
    """Open a split of a torchvision dataset (class `name`, case-insensitive) in `folder`, without download.

    Datasets without splits, e.g. Caltech101, get a fixed random 80/20 `train` and `test` split (the official code
    redraws it in every run). The test split of FER2013 is `PrivateTest`.
    """
    kinds: dict[str, type[Any]] = {
        kind.lower(): value
        for kind, value in vars(datasets).items()
        if isinstance(value, type) and "root" in inspect.signature(value).parameters
    }
    if name.lower() not in kinds:
        raise ConfigError(
            f"task.dataset={name} is no data set of torchvision; choose one, such as CIFAR10 or Food101"
        )
    kind = kinds[name.lower()]
    known = inspect.signature(kind.__init__).parameters
    options: dict[str, Any] = {"download": False} if "download" in known else {}
    if "split" in known:
        options["split"] = split
    elif split not in ("train", "test"):
        raise DataError(f"{kind.__name__} has no split {split!r}; choose train or test")
    elif "train" in known:
        options["train"] = split == "train"
    try:
        data = kind(folder, **options)
    except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{kind.__name__}, split {split!r}, cannot be read from {folder} ({reason}); put the files there as "
            "torchvision lays them out: nothing is downloaded here"
        ) from None
    targets = _targets(data)
    numbers = range(len(targets))
    if kind is datasets.FER2013 and split == "test":
        numbers = _private_test(folder)
    elif not options.keys() & {"split", "train"}:
        drawn = np.random.default_rng(0).permutation(len(targets)).tolist()
        trained = int(_TRAINED_SHARE * len(drawn))
        numbers = drawn[:trained] if split == "train" else drawn[trained:]
    classes = list(getattr(data, "classes", None) or getattr(data, "categories", None) or ())
    if len(classes) <= max(targets):
        classes = [str(number) for number in range(max(targets) + 1)]
    return TorchvisionSet(
        data, [*map(str, classes)], numbers, [targets[number] for number in numbers]
    )


def _private_test(folder: Path) -> list[int]:
    """Rows of `PrivateTest` in torchvision's FER2013 test split."""
    named = (folder / "fer2013" / name for name in ("fer2013.csv", "icml_face_data.csv"))
    with io.TextIOWrapper(
        open_file(next(path for path in named if path.exists())), "utf-8", newline=""
    ) as file:
        header, *rows = csv.reader(file)
    place = [column.strip() for column in header].index("Usage")
    usages = [row[place] for row in rows if row[place] in ("PublicTest", "PrivateTest")]
    return [number for number, usage in enumerate(usages) if usage == "PrivateTest"]


def _targets(data: Any) -> list[int]:
    """Classes of all images; datasets store them under different names."""
    held = next(
        (
            value
            for name in ("targets", "_labels", "labels", "y")
            if (value := getattr(data, name, None)) is not None
        ),
        None,
    )
    if held is None:
        pairs = getattr(data, "_samples", None) or getattr(data, "samples", None)
        held = [pair[1] for pair in (pairs or (data[number] for number in range(len(data))))]
    try:
        targets = [int(target) for target in held]
    except (TypeError, ValueError):
        targets = []
    if len(targets) != len(data) or not targets or min(targets) < 0:
        raise ConfigError(
            f"{type(data).__name__} is no set of images with a class each; choose another task.dataset"
        )
    return targets
