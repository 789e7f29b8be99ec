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
from xfm_fast.tasks.evaluation import Metrics, Row
from xfm_fast.tasks.models import ClassificationModel, HeadKind
from xfm_fast.tasks.task import Item, Losses, Rng, json_file, register, require_inputs
from xfm_fast.tasks.text import LabelOptions, LabelTask, class_index, class_names, class_rows

with needs("vision"):
    from torchvision import datasets
    from torchvision.transforms import v2

_TRAINING_SHARE = 0.8


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
        """Fill in class names."""
        if self.dataset is None:
            labels = class_names(self.labels, image_rows(train, columns=self.columns))
        else:
            classes = open_torchvision(self.dataset, train[0], self.train_split).classes
            labels = class_names(self.labels or classes, ())
        return self.model_copy(update={"labels": labels})


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
class ImageTask(LabelTask[ImageTaskOptions]):
    """Image classification."""

    Options = ImageTaskOptions
    metrics = ("top1", "top5")
    reads_text = False

    def prepare(self) -> None:
        options, size = self.options, self.config.image_size
        dataset = (options.dataset or "").lower()
        self.image_files = options.dataset is None
        self._train_transform: Callable[[Picture, np.random.Generator], Tensor] | None = None
        self._test_transform: Callable[[Image.Image], Tensor] = evaluation_transform(size)
        if options.view == "imagenet":
            self._train_transform = imagenet_training_transform(size)
            self._test_transform = imagenet_evaluation_transform(size)
        elif options.view == "probe":
            self._train_transform = probe_training_transform(size, dataset)
            self._test_transform = probe_evaluation_transform(size, dataset)
        mixes: list[Any] = []
        if options.mixup:
            mixes.append(v2.MixUp(alpha=options.mixup, num_classes=len(options.labels)))
        if options.cutmix:
            mixes.append(v2.CutMix(alpha=options.cutmix, num_classes=len(options.labels)))
        self._mix = v2.RandomChoice(mixes) if mixes else None
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

    def rows(self, paths: Sequence[Path], split: str | None = None) -> list[AnnotationRows[Any]]:
        if split is None:
            return self.read(paths, self.options.train_split, self.options.columns)
        return super().rows(paths, split)

    def read(
        self, paths: Sequence[Path], split: str, columns: Mapping[str, str]
    ) -> list[AnnotationRows[Any]]:
        if self.options.dataset is None:
            return [*image_rows(paths, columns=columns)]
        files: list[AnnotationRows[Any]] = []
        for path in paths:
            images = open_torchvision(self.options.dataset, path, split)
            self._sets[str(path), split] = images
            count = len(images.indices)
            fields = {
                "image": [f"{split}/{index}" for index in images.indices],
                "label": [images.classes[target] for target in images.targets],
                "folder": [str(path)] * count,
                "split": [split] * count,
                "number": images.indices,
            }
            files.append(AnnotationRows(path, Columns(fields), TorchvisionRecord))
        return files

    def item(self, record: ImageLabelRecord, rng: Rng) -> Item:
        target = class_index(record.label, self.options.labels)
        if self._train_transform is None:
            view = self.view(record)
        elif self.options.grey or isinstance(record, TorchvisionRecord):
            view = self._train_transform(self._picture(record), rng)
        else:
            # Decoding to a tensor takes two thirds of the time.
            path = self.images / record.image
            view = self._train_transform(decode_pixels(path, official=self.official_pictures), rng)
        return Item(view, target=target)

    def view(self, record: ImageLabelRecord) -> Tensor:
        """Read the view `[3, R, R]` of evaluation."""
        return self._test_transform(self._picture(record))

    def _picture(self, record: ImageLabelRecord) -> Image.Image:
        if isinstance(record, TorchvisionRecord):
            picture = self._sets[record.folder, record.split].picture(record.number)
        else:
            picture = decode_image(self.images / record.image, official=self.official_pictures)
        return picture.convert("L").convert("RGB") if self.options.grey else picture

    def collate(self, items: list[Item], rng: Rng) -> LabelledImages:
        image = torch.stack([item.image for item in items])
        targets = torch.tensor([item.target for item in items])
        if self._mix is not None:
            # torchvision draws from the CPU's global generator, which is seeded here for the batch
            # alone. (torch.manual_seed would seed the GPU's too, and repeat the same dropout in
            # every batch.)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(rng.integers(1 << 63)))
                image, targets = self._mix(image, targets)
        return LabelledImages(image=image, targets=targets)

    def losses_of(self, model: ClassificationModel, batch: LabelledImages) -> Losses:
        smoothing = self.options.label_smoothing
        return {"loss": model(batch.image, targets=batch.targets, label_smoothing=smoothing)}

    def predict(self, model: ClassificationModel, records: Sequence[ImageLabelRecord]) -> list[Row]:
        pixels = torch.stack([self.view(record) for record in records])
        return class_rows(model.logits(pixels.to(model.device)), self.options.labels)

    def score(self, rows: Sequence[Row], records: Sequence[ImageLabelRecord]) -> Metrics:
        first = top = 0
        for row, record in zip(rows, records, strict=True):
            first += row["answer"] == record.label
            top += record.label in row["probabilities"]
        return {"top1": 100 * first / len(records), "top5": 100 * top / len(records)}

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
    """A split of a torchvision dataset: image `indices`, and their classes `targets`."""

    data: Any
    classes: Sequence[str]
    indices: Sequence[int]
    targets: Sequence[int]

    def picture(self, index: int) -> Image.Image:
        try:
            return self.data[index][0].convert("RGB")
        except (OSError, ValueError) as error:
            raise DataError(
                f"image {index} of {type(self.data).__name__} cannot be read ({error})"
            ) from None


def open_torchvision(name: str, folder: Path, split: str) -> TorchvisionSet:
    """Open a split of the torchvision dataset `name` (in any case) in `folder`, without download.

    Datasets without splits, e.g. Caltech101, get a fixed random 80/20 `train` and `test` split (the
    official code redraws it in every run). The test split of FER2013 is `PrivateTest`.
    """
    classes_of = {
        key.lower(): value
        for key, value in vars(datasets).items()
        if isinstance(value, type) and "root" in inspect.signature(value).parameters
    }
    if name.lower() not in classes_of:
        raise ConfigError(
            f"task.dataset={name} is not a torchvision dataset; choose one, such as CIFAR10 or Food101"
        )
    dataset: Any = classes_of[name.lower()]
    parameters = inspect.signature(dataset.__init__).parameters
    options: dict[str, Any] = {"download": False} if "download" in parameters else {}
    if "split" in parameters:
        options["split"] = split
    elif split not in ("train", "test"):
        raise DataError(f"{dataset.__name__} has no split {split!r}; choose train or test")
    elif "train" in parameters:
        options["train"] = split == "train"
    try:
        data = dataset(folder, **options)
    except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{dataset.__name__}, split {split!r}, cannot be read from {folder} ({reason}); put the files there as "
            "torchvision lays them out: nothing is downloaded here"
        ) from None
    targets = _targets(data)
    indices = range(len(targets))
    if dataset is datasets.FER2013 and split == "test":
        indices = _private_test(folder)
    elif not options.keys() & {"split", "train"}:
        shuffled = np.random.default_rng(0).permutation(len(targets)).tolist()
        boundary = int(_TRAINING_SHARE * len(shuffled))
        indices = shuffled[:boundary] if split == "train" else shuffled[boundary:]
    classes = list(getattr(data, "classes", None) or getattr(data, "categories", None) or ())
    if len(classes) <= max(targets):
        classes = range(max(targets) + 1)
    return TorchvisionSet(
        data, [*map(str, classes)], indices, [targets[index] for index in indices]
    )


def _private_test(folder: Path) -> list[int]:
    """Return the rows of `PrivateTest` in torchvision's FER2013 test split."""
    paths = [folder / "fer2013" / name for name in ("fer2013.csv", "icml_face_data.csv")]
    path = next(path for path in paths if path.exists())
    with io.TextIOWrapper(open_file(path), "utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    column = [name.strip() for name in header].index("Usage")
    usages = [row[column] for row in rows if row[column] in ("PublicTest", "PrivateTest")]
    return [index for index, usage in enumerate(usages) if usage == "PrivateTest"]


def _targets(data: Any) -> list[int]:
    """Return the classes of all images; datasets store them under different names."""
    classes: Any = None
    for name in ("targets", "_labels", "labels", "y"):
        if classes is None:
            classes = getattr(data, name, None)
    if classes is None:
        samples = getattr(data, "_samples", None) or getattr(data, "samples", None)
        if not samples:
            samples = (data[index] for index in range(len(data)))
        classes = [sample[1] for sample in samples]
    try:
        targets = [int(target) for target in classes]
    except (TypeError, ValueError):
        targets = []
    if len(targets) != len(data) or not targets or min(targets) < 0:
        raise ConfigError(
            f"{type(data).__name__} does not have one class per image; choose another task.dataset"
        )
    return targets
