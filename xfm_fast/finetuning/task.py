"""A task as the loop, the evaluation and the prediction see it: a file a task, with the functions that are named here.

Training asks a task for rows of its files, items of rows, batches of items and losses of a batch; evaluation for
records, groups of records that belong together, rows of results and metrics of these; prediction for records that
stand for files and strings of a user.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import numpy as np
from torch import Tensor

from xfm_fast.batches import TensorBatch
from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import Annotation, AnnotationRows, check_images
from xfm_fast.data.images import decode_pixels, load_image
from xfm_fast.data.records import Rows, image_at
from xfm_fast.data.transforms import finetuning_transform
from xfm_fast.errors import ConfigError, InputError
from xfm_fast.finetuning.evaluation import Evaluation, Metrics, Row
from xfm_fast.tasks.task_model import TaskModel
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption
from xfm_fast.training.recipe_fields import Section

RecordT = TypeVar("RecordT", bound=Annotation)
OptionsT = TypeVar("OptionsT", bound="TaskOptions")
BatchT = TypeVar("BatchT", bound=TensorBatch)
ItemT = TypeVar("ItemT")


class TaskOptions(Section):
    """The section `task` of a recipe, whose `kind` says which task it is.

    What a task learns about itself from its data, such as the names of its classes, is an option too, so that
    `task.json` in a folder of weights says all of it.
    """

    kind: Any
    free: ClassVar[tuple[str, ...]] = ()
    """Options that a recipe may still choose for weights that exist, such as how many answers are ranked."""
    learns: ClassVar[bool] = True
    """False where `completed` does not read the files of training, which then need not be there for an evaluation."""

    def completed(self, train: Sequence[Path], root: Path) -> Self:
        """The options with what the files say that training reads.

        Args:
            train: the files.
            root: folder that relative paths in options lie in.

        Raises:
            DataError: a file cannot be read, or does not hold what the task needs.
        """
        return self


class Task(ABC, Generic[OptionsT, RecordT, ItemT, BatchT]):
    """A task: its model, its data, what it minimises, and what it is judged by.

    Args:
        options: completed ones.
        config: of the model.
        tokenizer: of the model's vocabulary.
        images: folder that relative paths of images lie in.
        official_pictures: ignore EXIF orientation and transparency, see `xfm_fast.data.images.decode_image`.

    Raises:
        ConfigError: the options do not go with the model.
        DataError: the vocabulary is not the model's.
    """

    reads_text: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ()
    """Names of what `score` may give, by one of which a recipe chooses."""
    losses: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of what is minimised, as a sum."""
    takes_weights_of: ClassVar[tuple[str, ...]] = ()
    """Other tasks whose model is the same."""
    large_lr: ClassVar[tuple[str, ...]] = ()
    """First parts of the names of parameters that learn `optimizer.lr_mult` times faster."""
    drop_last: ClassVar[bool] = True
    """Leave out the last, incomplete batch of an epoch; the official loaders of image classes and of GLUE keep it."""
    crop: ClassVar[tuple[float, float] | None] = (0.5, 1.0)
    """Smallest and largest share of an image's area in a random view; None for all of it."""

    def __init__(
        self,
        options: OptionsT,
        config: XFMConfig,
        tokenizer: CaptionTokenizer | None = None,
        *,
        images: Path = Path(),
        official_pictures: bool = False,
    ) -> None:
        if self.reads_text:
            if tokenizer is None:
                raise ConfigError(f"the task {options.kind} reads text; name its vocabulary by tokenizer=<folder>")
            tokenizer.check(config)
        self.options, self.config, self.images = options, config, images
        self.official_pictures = official_pictures
        self._tokenizer = tokenizer
        self.prepare()

    def prepare(self) -> None:
        """Check the options against the model, and make what all items need; the end of the constructor."""

    def check_length(self, max_tokens: int) -> None:
        """Raise `ConfigError` unless the model can number so many tokens of a text."""
        config = self.config
        if max_tokens > config.max_text_length:
            raise ConfigError(
                f"task.max_tokens={max_tokens} exceeds the {config.max_text_length} tokens that "
                f"model.max_positions={config.max_positions} can number; lower it"
            )

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """The tokenizer of a task that reads text."""
        assert self._tokenizer is not None
        return self._tokenizer

    @abstractmethod
    def build(self) -> TaskModel:
        """The model of the task, with random weights."""

    @abstractmethod
    def rows(self, paths: Sequence[Path]) -> Sequence[Rows]:
        """The rows of the files to train on; reading one gives a record, or raises `DataError` where it is broken."""

    def test_rows(self, paths: Sequence[Path], split: str) -> Sequence[AnnotationRows[Any]]:
        """The rows of files to evaluate on, where these have another form than those to train on.

        Args:
            paths: the files.
            split: its name in the recipe, for files that hold several splits.
        """
        return cast("Sequence[AnnotationRows[Any]]", self.rows(paths))

    def records(self, paths: Sequence[Path], split: str) -> list[RecordT]:
        """The records of files to evaluate on; arguments as of `test_rows`.

        Raises:
            DataError: one of them is broken, or its image missing: a metric over the others would be one of something
                else.
        """
        records = [record for rows in self.test_rows(paths, split) for record in rows.records()]
        check_images(records, self.images)
        return records

    @abstractmethod
    def item(self, record: RecordT, rng: np.random.Generator) -> ItemT:
        """A training item of a record; raises `DataError` when it cannot be made, such as for want of the image."""

    @abstractmethod
    def collate(self, items: list[ItemT], rng: np.random.Generator) -> BatchT:
        """The batch of some items."""

    @abstractmethod
    def losses_of(self, model: Any, batch: BatchT) -> dict[str, Tensor]:
        """The scalars that `losses` names, whose sum is minimised."""

    def groups(self, records: Sequence[RecordT]) -> list[list[int]]:
        """The numbers of records that are predicted together, such as all questions about an image."""
        return [[number] for number in range(len(records))]

    @abstractmethod
    def predict(self, model: Any, records: Sequence[RecordT]) -> list[Row]:
        """The results of records, one row for each, in their order."""

    def metrics_of(self, records: Sequence[RecordT]) -> Collection[str]:
        """The names of what `score` gives for some records, so that a run need not evaluate to know them.

        Raises:
            DataError: some of them hold the truth and others do not.
        """
        return self.metrics

    @abstractmethod
    def score(self, rows: Sequence[Row], records: Sequence[RecordT]) -> Metrics:
        """The metrics of all rows of a split, in percent; empty where the records hold no truth."""

    def settled(self, metrics: Metrics) -> OptionsT:
        """The options, with those that are chosen by the metrics of a validation."""
        return self.options

    def files(self, rows: Sequence[Row], records: Sequence[RecordT]) -> dict[str, bytes]:
        """The results in the form that the benchmark's own evaluation takes, by file name."""
        return {}

    def evaluate(self, model: Any, records: Sequence[RecordT], work: Evaluation) -> tuple[Metrics, dict[str, bytes]]:
        """Metrics and files of a split; all processes must ask, and the first one is answered."""
        rows = work.rows(self, model, records)
        return (self.score(rows, records), self.files(rows, records)) if work.processes.first else ({}, {})

    @abstractmethod
    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[RecordT]:
        """The records that a user means who names some images and some texts.

        Raises:
            InputError: they are not what the task needs.
        """

    def request(self, line: Mapping[str, Any]) -> RecordT:
        """The record of a line of requests: `image` (or `images`) and `text`, which may be a list each.

        Raises:
            InputError: the line is not what the task needs, or asks for several results.
        """
        images, texts = ([] if value is None else value if isinstance(value, list) else [value] for value in (
            line.get("images", line.get("image")), line.get("text")
        ))  # fmt: skip
        if not all(isinstance(value, str) for value in [*images, *texts]):
            raise InputError('"image" and "text" of a request are strings, or lists of strings')
        records = self.requests([Path(image) for image in images], texts)
        if len(records) != 1:
            raise InputError(f"a request is answered by one result and this one needs {len(records)}; give a line each")
        return records[0]

    def pixels(self, image: str | Path) -> Tensor:
        """`[3, R, R]`: a whole image as evaluation sees it."""
        place = self.images / image
        return load_image(image_at(place), self.config.image_size, str(place), official=self.official_pictures)

    def augmented(self, image: str | Path, rng: np.random.Generator, *, may_flip: bool = True) -> Tensor:
        """`[3, R, R]`: a random view of an image, as training sees it, or all of it where the options say so."""
        if not getattr(self.options, "augment", True):
            return self.pixels(image)
        place = self.images / image
        decoded = decode_pixels(image_at(place), str(place), official=self.official_pictures)
        return finetuning_transform(self.config.image_size, self.crop)(decoded, rng, may_flip=may_flip)

    def caption_ids(self, text: str, max_words: int, max_tokens: int | None = None) -> list[int]:
        """Ids of a caption, cleaned and cut to `max_words`, and to `max_tokens` where it is not None."""
        cleaned = pre_caption(text, max_words)
        return self.tokenizer.encode_ids([cleaned], max_tokens or self.config.max_text_length)[0]

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids `[B, L]`, padded to the longest, and the mask of the real ones."""
        return self.tokenizer.pad(rows)


@dataclass(frozen=True, kw_only=True)
class PairInput(TensorBatch):
    """Images and texts of a batch.

    Attributes:
        image: `[I, 3, R, R]` normalised pixels.
        input_ids: `[T, L]` int64, padded.
        attention_mask: `[T, L]`, non-zero for real tokens.
    """

    image: Tensor
    input_ids: Tensor
    attention_mask: Tensor


def by_image(records: Sequence[Any]) -> list[list[int]]:
    """The numbers of the records of each image, so that it is encoded once."""
    of_image: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        of_image.setdefault(record.image, []).append(number)
    return [*of_image.values()]


def need(images: Sequence[Path], texts: Sequence[str], what: str, *, ok: bool) -> None:
    """Raise `InputError` unless a request is `ok` and none of its texts blank, saying `what` the task needs."""
    if not ok:
        raise InputError(f"{len(images)} images and {len(texts)} texts were given; this model needs {what}")
    if blank := [number for number, text in enumerate(texts) if not text.strip()]:
        raise InputError(f"text {blank[0]} of {len(texts)} is blank; this model needs {what}")
