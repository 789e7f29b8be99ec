"""Tasks: the interface of training, evaluation and prediction, and the registry `TASKS`.

A task is one file: options, records, batches, losses, predictions, metrics, requests, and how an export answers.
Training: files → rows → items → batches → losses. Evaluation: files → records → result rows → metrics. Prediction:
requests → records → result rows.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, Self, TypeVar, cast

import numpy as np
import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, TypeAdapter, ValidationError
from torch import Tensor

from xfm_fast.batches import TensorBatch
from xfm_fast.checkpoint.files import TASK_FILE, TOKENIZER_FILE
from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import Annotation, AnnotationRows, check_images, image_names
from xfm_fast.data.fingerprints import contents_of, held_out
from xfm_fast.data.images import decode_pixels, load_image
from xfm_fast.data.records import image_at
from xfm_fast.errors import CheckpointError, ConfigError, DataError, InputError
from xfm_fast.io import read_json
from xfm_fast.models.hub import PREPROCESSOR_FILE
from xfm_fast.models.processor import preprocessor_json
from xfm_fast.tasks.evaluation import Evaluation, Metrics, Row
from xfm_fast.tasks.models import TaskModel
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption
from xfm_fast.training.recipe_fields import Section

Rng = np.random.Generator
Losses = dict[str, Tensor]
"""Losses by name, to be summed."""

FORMAT_VERSION = 1
HELD_OUT = "val"
"""Split of the images that `hold_out` takes from the training files."""


class TaskOptions(Section):
    """The section `task` of a recipe; `kind` selects the task.

    Options read from the data, e.g. class names, are saved in `task.json` with the weights.
    """

    kind: Any
    free: ClassVar[tuple[str, ...]] = ()
    """Options that a recipe may change for existing weights, e.g. the number of ranked answers."""
    learns: ClassVar[bool] = True
    """False if `completed` needs no training files, so that evaluation works without them."""

    @classmethod
    def of_kind(cls, kind: object) -> type[TaskOptions] | None:
        """Return the options of a registered task, for messages about a recipe."""
        if cls is not TaskOptions or not isinstance(kind, str) or kind not in TASKS:
            return None
        return TASKS[kind].Options

    def completed(self, train: Sequence[Path], root: Path) -> Self:
        """Fill in options from the training files; relative paths in options refer to `root`."""
        return self


class AugmentedOptions(TaskOptions):
    """Options of tasks that draw training views by `Preprocessing.augmented`."""

    augment: bool = Field(
        default=True, description="random crop, flip and RandAugment; false only resizes"
    )


OptionsT = TypeVar("OptionsT", bound=TaskOptions)


class Preprocessing(Generic[OptionsT]):
    """Conversion of a task's images and texts to tensors."""

    options: OptionsT
    config: XFMConfig
    tokenizer: CaptionTokenizer  # None if the task reads no text
    images: Path  # folder of relative image paths
    official_pictures: bool  # ignore EXIF orientation and transparency
    crop: ClassVar[tuple[float, float] | None] = (0.5, 1.0)
    """Range of the random crop's area fraction; None: whole image."""

    def check_length(self, max_tokens: int) -> None:
        """Raise `ConfigError` if the model has fewer positions than `max_tokens`."""
        config = self.config
        if max_tokens > config.max_text_length:
            raise ConfigError(
                f"task.max_tokens={max_tokens} exceeds the {config.max_text_length} tokens that "
                f"model.max_positions={config.max_positions} can number; lower it"
            )

    def pixels(self, image: str | Path) -> Tensor:
        """Read a whole image `[3, R, R]` as in evaluation."""
        path = self.images / image
        size = self.config.image_size
        return load_image(image_at(path), size, str(path), official=self.official_pictures)

    def pixels_of(self, images: Sequence[str], model: Any) -> Tensor:
        """Read whole images `[I, 3, R, R]` as inputs of a model or session."""
        return torch.stack([self.pixels(image) for image in images]).to(model.device, model.dtype)

    def augmented(self, image: str | Path, rng: Rng, *, may_flip: bool = True) -> Tensor:
        """Draw a training view `[3, R, R]` of an image; without augmentation read the whole image."""
        from xfm_fast.data.transforms import finetuning_transform

        if not getattr(self.options, "augment", True):
            return self.pixels(image)
        path = self.images / image
        decoded = decode_pixels(image_at(path), str(path), official=self.official_pictures)
        transform = finetuning_transform(self.config.image_size, self.crop)
        return transform(decoded, rng, may_flip=may_flip)

    def caption_ids(self, text: str, max_words: int, max_tokens: int | None = None) -> list[int]:
        """Clean a caption, truncate it to `max_words` and `max_tokens`, and return its ids."""
        cleaned = pre_caption(text, max_words)
        return self.tokenizer.encode_ids([cleaned], max_tokens or self.config.max_text_length)[0]

    def padded(
        self, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Pad ids to `[B, L]`; return them and their mask."""
        ids, mask = self.tokenizer.pad(rows)
        return ids.to(device), mask.to(device)

    def pair_inputs(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Stack the images and pad the texts of items, as the fields of `PairInput`."""
        ids, mask = self.padded([item.ids for item in items])
        image = torch.stack([item.image for item in items])
        return {"image": image, "input_ids": ids, "attention_mask": mask}


class PlainSession:
    """A plain `xfm_fast.export.Session`: `predict` needs only what models have too."""


class Task(Preprocessing[OptionsT], ABC):
    """A task: model, data, losses and metrics. Subclasses enter the registry by `register`."""

    Options: ClassVar[type[TaskOptions]]
    """Section `task` of a recipe."""
    reads_text: ClassVar[bool] = True
    Session: ClassVar[type | None] = PlainSession
    """Methods that `predict` needs of an export's session; None if no export can answer."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics that `score` may return and `choose.by` may name."""
    losses: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of the losses, which are summed."""
    takes_weights_of: ClassVar[tuple[str, ...]] = ()
    """Other tasks with the same model."""
    large_lr: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of parameters with the learning rate `lr * optimizer.lr_mult`."""
    drop_last: ClassVar[bool] = True
    """Drop the last partial batch; the official loaders of images and GLUE keep it."""
    check_rows: ClassVar[Callable[[Any], Sequence[AnnotationRows[Any]]] | None] = None
    """Reader of all rows of files for `xfm-fast data check`, if there is a format to check."""
    test_record: ClassVar[type[Annotation] | None] = None
    """Record of an element with a list of captions, if it differs from that of training."""
    truth: ClassVar[str | None] = None
    """Field of a record that holds the ground truth, if records without it can be predicted."""
    image_files: bool = True
    """Records name image files, which must exist."""
    groups_by_image: bool = False
    """Predict all records of an image together, so that it is encoded once."""

    def __init__(
        self,
        options: OptionsT,
        config: XFMConfig,
        tokenizer: CaptionTokenizer | None = None,
        *,
        images: Path = Path(),
        official_pictures: bool = False,
        hold_out: float = 0,
    ) -> None:
        if self.reads_text:
            if tokenizer is None:
                raise ConfigError(
                    f"the task {options.kind} reads text; name its vocabulary by tokenizer=<folder>"
                )
            tokenizer.check(config)
        self.options, self.config, self.images = options, config, images
        self.tokenizer = cast("CaptionTokenizer", tokenizer)
        self.official_pictures, self.hold_out = official_pictures, hold_out
        self._held_out: dict[tuple[str, ...], set[str]] = {}
        self.prepare()

    def prepare(self) -> None:
        """Validate options and precompute shared state; called at the end of the constructor."""

    @abstractmethod
    def build(self) -> TaskModel:
        """Build the model with random weights."""

    @abstractmethod
    def rows(self, paths: Sequence[Path], split: str | None = None) -> Sequence[Any]:
        """Open files as `Rows` to train on, or as `AnnotationRows` of an evaluation split.

        Reading a broken row raises `DataError`.
        """

    @abstractmethod
    def item(self, record: Any, rng: Rng) -> Any:
        """Make a training item of a record; a broken record raises `DataError`."""

    @abstractmethod
    def collate(self, items: list[Any], rng: Rng) -> Any:
        """Collate items to a `TensorBatch`."""

    @abstractmethod
    def losses_of(self, model: Any, batch: Any) -> Losses:
        """Compute the losses listed in `losses`, to be summed."""

    @abstractmethod
    def predict(self, model: Any, records: Sequence[Any]) -> list[Row]:
        """Return one result row per record, in order."""

    @abstractmethod
    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[Any]:
        """Make records of a user's images and texts; invalid ones raise `InputError`."""

    def score(self, rows: Sequence[Row], records: Sequence[Any]) -> Metrics:
        """Compute the metrics of a split with ground truth, in percent."""
        return {}

    def files(self, rows: Sequence[Row], records: Sequence[Any]) -> dict[str, bytes]:
        """Return result files for the benchmark's evaluation, by name."""
        return {}

    def metrics_of(self, records: Sequence[Any]) -> Collection[str]:
        """Return the names of the metrics that `score` gives for these records."""
        return self.metrics if self.has_truth(records) else ()

    def has_truth(self, records: Sequence[Any]) -> bool:
        """Return whether the records have ground truth; if only some have it, raise `DataError`."""
        if self.truth is None:
            return True
        absent = sum(getattr(record, self.truth) is None for record in records)
        if 0 < absent < len(records):
            raise DataError(
                f"{absent} of {len(records)} records to evaluate on have no {self.truth}; give it to all of them, or "
                "to none to predict"
            )
        return not absent

    def evaluate(
        self, model: Any, records: Sequence[Any], work: Evaluation
    ) -> tuple[Metrics, dict[str, bytes]]:
        """Compute metrics and files of a split; collective, other processes than the first return none."""
        scored = bool(self.metrics_of(records))
        rows = work.rows(self, model, records)
        if not work.processes.first:
            return {}, {}
        return self.score(rows, records) if scored else {}, self.files(rows, records)

    def settled(self, metrics: Metrics) -> OptionsT:
        """Return the options after a validation with these metrics."""
        return self.options

    def training_rows(self, paths: Sequence[Path]) -> Sequence[Any]:
        """Open training files without the images that `hold_out` takes for the split `val`."""
        rows = self.rows(paths)
        return self._select_images(rows, held=False) if self.hold_out else rows

    def records(self, paths: Sequence[Path], split: str) -> list[Any]:
        """Read evaluation records; a broken one or a missing image raises `DataError`."""
        files = self.rows(paths, split)
        if self.hold_out and split == HELD_OUT:
            files = self._select_images(files, held=True)
        records = [record for rows in files for record in rows.records()]
        if self.image_files:
            check_images(records, self.images)
        return records

    def _select_images(self, files: Sequence[Any], *, held: bool) -> list[AnnotationRows[Any]]:
        """Select the rows of held-out images, or all except them."""
        if not self.image_files or not all(isinstance(rows, AnnotationRows) for rows in files):
            raise ConfigError(
                f"data.hold_out={self.hold_out} of the task {self.options.kind} needs files that name images; set "
                "data.hold_out=0 and name data.splits.val"
            )
        names = tuple(dict.fromkeys(image_names(files)))
        if names not in self._held_out:
            mask = held_out(len(names), contents_of([*names], self.images), self.hold_out)
            self._held_out[names] = {*compress(names, mask)}
        return [rows.about(self._held_out[names], inverted=not held) for rows in files]


class Item(NamedTuple):
    """A training item: the view `[3, R, R]` of an image, ids of a text, and the target."""

    image: Any = None
    ids: Sequence[int] = ()
    target: Any = None


@dataclass(frozen=True, kw_only=True)
class PairInput(TensorBatch):
    """Images and texts of a batch."""

    image: Tensor  # `[I, 3, R, R]` normalised pixels
    input_ids: Tensor  # `[T, L]` int64, padded
    attention_mask: Tensor  # `[T, L]`, non-zero for real tokens


def json_file(name: str, content: Any) -> dict[str, bytes]:
    """Return a JSON result file by its name."""
    return {name: (json.dumps(content, ensure_ascii=False) + "\n").encode()}


def unique_images(records: Sequence[Any]) -> tuple[list[str], list[int]]:
    """Return the distinct images of records in order, and the index of each record's image."""
    images = [*dict.fromkeys(record.image for record in records)]
    index = {image: position for position, image in enumerate(images)}
    return images, [index[record.image] for record in records]


def require_inputs(images: Sequence[Path], texts: Sequence[str], what: str, *, ok: bool) -> None:
    """Raise `InputError` for a blank text, or unless `ok`; `what` names the required input."""
    if not ok:
        raise InputError(
            f"{len(images)} images and {len(texts)} texts were given; this model needs {what}"
        )
    for index, text in enumerate(texts):
        if not text.strip():
            raise InputError(f"text {index} of {len(texts)} is blank; this model needs {what}")


TaskType = TypeVar("TaskType", bound=type[Task[Any]])


class Registry(Mapping[str, type[Task[Any]]]):
    """Tasks by kind; built-in ones are imported on first use."""

    def __init__(self, *kinds: str) -> None:
        self._tasks: dict[str, type[Task[Any]] | None] = dict.fromkeys(kinds)

    def __getitem__(self, kind: str) -> type[Task[Any]]:
        if self._tasks[kind] is None:
            import_module(f"xfm_fast.tasks.{kind}")
        task = self._tasks[kind]
        assert task is not None
        return task

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: TaskType) -> TaskType:
        """Enter a task under the `kind` of its options; a class decorator."""
        self._tasks[task.Options.model_fields["kind"].default] = task
        return task


TASKS = Registry(
    "captioning", "grounding", "image", "nlvr2", "retrieval", "text", "vqa", "weak_grounding"
)
register = TASKS.add


def _parse_options(value: Any) -> TaskOptions:
    if isinstance(value, TaskOptions):
        return value
    kind = value.get("kind") if isinstance(value, Mapping) else None
    options = TaskOptions.of_kind(kind)
    if options is None:
        raise ValueError(f"kind={kind!r} is not a task; choose one of {', '.join(TASKS)}")
    try:
        return options.model_validate(value)
    except ValidationError as error:
        # As for a tagged union, the location of a fault begins with the kind.
        faults: list[Any] = [
            {**fault, "loc": (kind, *fault["loc"])} for fault in error.errors(include_url=False)
        ]
        raise ValidationError.from_exception_data("task", faults) from None


AnyTask = Annotated[SerializeAsAny[TaskOptions], BeforeValidator(_parse_options)]
"""The section `task` of a recipe, discriminated by `kind`."""


def explanation(task: Task[Any], options: TaskOptions | None = None) -> dict[str, bytes]:
    """Return the metadata files to save with the weights, optionally with other options."""
    document = {"format": FORMAT_VERSION, "task": (options or task.options).model_dump(mode="json")}
    files = {
        TASK_FILE: (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode(),
        PREPROCESSOR_FILE: preprocessor_json(task.config),
    }
    if task.reads_text:
        files[TOKENIZER_FILE] = task.tokenizer.to_json().encode()
    return files


def task_of(folder: Path) -> TaskOptions | None:
    """Read the task options of a folder of weights; None for a pretrained model."""
    path = folder / TASK_FILE
    try:
        content = read_json(path)
        if not isinstance(content, Mapping) or content.get("format") != FORMAT_VERSION:
            version = content.get("format") if isinstance(content, Mapping) else None
            raise CheckpointError(
                f"{path} has format {version!r}; this version reads {FORMAT_VERSION}"
            )
        return TypeAdapter(AnyTask).validate_python(content.get("task"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} does not describe a task ({reason}); copy the folder again"
        ) from None


def make_task(
    options: TaskOptions,
    config: XFMConfig,
    tokenizer: CaptionTokenizer | None,
    images: Path = Path(),
    **settings: Any,
) -> Task[Any]:
    """Create the task of completed options; `settings` are the constructor's."""
    return TASKS[options.kind](options, config, tokenizer, images=images, **settings)
