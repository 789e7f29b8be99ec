"""Tasks: the interface of training, evaluation and prediction, and the registry `TASKS`.

A task is one file: options, records, items, batches, losses, metrics, predictions and requests, and how an export
answers. Training: files → rows → items → batches → losses. Evaluation: records → groups → result rows → metrics.
Prediction: requests → records → result rows.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import compress
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    Self,
    TypeVar,
    cast,
)

import numpy as np
import torch
from pydantic import BeforeValidator, SerializeAsAny, TypeAdapter, ValidationError
from torch import Tensor

from xfm_fast import checkpoint
from xfm_fast.batches import TensorBatch
from xfm_fast.checkpoint.files import TASK_FILE, TOKENIZER_FILE
from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import Annotation, AnnotationRows, check_images, image_names
from xfm_fast.data.fingerprints import contents_of, held_out
from xfm_fast.data.images import decode_pixels, load_image
from xfm_fast.data.records import Rows, image_at
from xfm_fast.errors import CheckpointError, ConfigError, DataError, InputError
from xfm_fast.io import read_json
from xfm_fast.models.decoder import DecoderMemory, TextDecoder
from xfm_fast.models.hub import Download, local_folder
from xfm_fast.models.processor import read_tokenizer
from xfm_fast.models.xfm import ALL_ENCODERS, XFM, Head, Precision
from xfm_fast.tasks.evaluation import Evaluation, Metrics, Row
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption
from xfm_fast.training.recipe_fields import Section


class TaskModel(XFM):
    """X-FM with the encoders and heads of a task, and new task-specific parts."""

    if TYPE_CHECKING:
        # A task takes what it needs, and returns its loss.
        forward: Callable[..., Any]

    own_parts: ClassVar[tuple[str, ...]] = ()
    """Prefixes of parameters missing in pretraining checkpoints."""
    own_graphs: ClassVar[tuple[str, ...]] = ()
    """Graphs of an export that no other model has."""
    decoder_reads: ClassVar[Literal["image", "fusion"] | None] = None
    """States that `text_decoder` reads: image tokens, or the tokens of the fusion encoder."""

    def graph_results(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> dict[str, Tensor]:
        """Outputs of `own_graphs` for I images and T texts, which an export is compared with."""
        return {}

    def load_official(self, source: str | Path | Mapping[str, Tensor]) -> checkpoint.LoadResult:
        """Load an official pretraining or task checkpoint in place, atomically.

        Unused weights are dropped, position tables are interpolated, and new parts are initialised as in the official
        code. The result lists `fresh` parameters and `surplus` entries.
        """
        what = "state dict" if isinstance(source, Mapping) else f"checkpoint {source}"
        official = source if isinstance(source, Mapping) else checkpoint.read_state_dict(source)
        state, self.load_report = checkpoint.to_ours(official, self.config)
        result = self._load(state, what)
        if result.fresh:
            result.fresh = self._start_own_parts(state | self.load_report.unused, result.fresh)
        return result

    def _load(self, state: Mapping[str, Tensor], what: str) -> checkpoint.LoadResult:
        surplus = [
            f"{encoder}_encoder."
            for encoder in ALL_ENCODERS
            if not hasattr(self, f"{encoder}_encoder")
        ]
        for head, prefixes in checkpoint.HEAD_PREFIXES.items():
            if head not in self.heads:
                surplus += prefixes
        # A checkpoint that has the task's own part must have it whole.
        fine_tuned = any(name.startswith(self.own_parts) for name in state)
        return checkpoint.load_into(
            self, state, what=what, fresh=() if fine_tuned else self.own_parts, surplus=surplus
        )

    def _start_own_parts(self, pretrained: Mapping[str, Tensor], fresh: list[str]) -> list[str]:
        """Initialise new parts; returns the names of parameters that stay random."""
        return fresh

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Tensor],
        config: XFMConfig,
        *,
        heads: Iterable[Head] = (),
        dtype: Precision = torch.float32,
        tokenizer: CaptionTokenizer | str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Build the model and `load_official`; `options` go to the constructor, `heads` is ignored."""
        model = cls(config, **options)
        model.tokenizer = None if tokenizer is None else read_tokenizer(tokenizer, config)
        model.load_official(source)
        return model.cast(dtype).eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        heads: Iterable[Head] | None = None,
        dtype: Precision = torch.float32,
        tokenizer: CaptionTokenizer | str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Load a `save_pretrained` folder of this task or a pretraining model.

        `options` are Hub options of `XFM.from_pretrained` and the constructor arguments of the saved model; `heads` is
        ignored.
        """
        download = {name: options.pop(name) for name in Download.__annotations__ if name in options}
        place = local_folder(folder, **download)
        files = checkpoint.load_pretrained_files(place)
        model = cls(files.config, **options)
        result = model._load(files.state, f"model {folder}")
        if result.fresh:
            model._start_own_parts(files.state | (files.unused or {}), result.fresh)
        model.load_tokenizer(tokenizer, place)
        return model.cast(dtype).eval()


class DecoderModel(TaskModel):
    """A task model with a text decoder, which starts from an encoder of pretraining."""

    own_parts = ("text_decoder.",)
    text_decoder: TextDecoder

    @property
    def writer(self) -> TextDecoder:
        return self.text_decoder

    def states(self, states: Tensor, mask: Tensor | None = None) -> DecoderMemory:
        """Keys and values of states `[B, M, width]`, projected once for all steps and beams."""
        return self.text_decoder.memory(states, mask)

    def _start_own_parts(self, pretrained: Mapping[str, Tensor], fresh: list[str]) -> list[str]:
        return [f"text_decoder.{name}" for name in self.text_decoder.initialise_from(pretrained)]


RecordT = TypeVar("RecordT", bound=Annotation)
OptionsT = TypeVar("OptionsT", bound="TaskOptions")
BatchT = TypeVar("BatchT", bound=TensorBatch)
ItemT = TypeVar("ItemT")

FORMAT_VERSION = 1


class PlainSession:
    """Adds no method to `xfm_fast.export.Session`: the task predicts by what models and sessions share."""


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
        """Options of a registered task, for messages about a recipe."""
        return (
            TASKS[kind].Options
            if cls is TaskOptions and isinstance(kind, str) and kind in TASKS
            else None
        )

    def completed(self, train: Sequence[Path], root: Path) -> Self:
        """Options completed from the training files; `root` is the folder of relative paths in options."""
        return self


class Task(ABC, Generic[OptionsT, RecordT, ItemT, BatchT]):
    """A task: model, data, losses and metrics. Subclasses enter the registry by `register`.

    `images` is the folder of relative image paths. `official_pictures` ignores EXIF orientation and transparency.
    """

    Options: ClassVar[type[TaskOptions]]
    """Section `task` of a recipe."""
    Session: ClassVar[type | None] = PlainSession
    """Methods that an export adds to `xfm_fast.export.Session` to answer; None if no export can."""
    reads_text: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics that `score` may return and `choose.by` may name."""
    losses: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of the losses, which are summed."""
    takes_weights_of: ClassVar[tuple[str, ...]] = ()
    """Other tasks with the same model."""
    large_lr: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of parameters with the learning rate `lr * optimizer.lr_mult`."""
    drop_last: ClassVar[bool] = True
    """Drop the last partial batch; the official loaders of image classification and GLUE keep it."""
    crop: ClassVar[tuple[float, float] | None] = (0.5, 1.0)
    """Range of the random crop's area fraction; None: whole image."""
    check_rows: ClassVar[Callable[[Any], Sequence[AnnotationRows[Any]]] | None] = None
    """Reader of all rows of files, for `xfm-fast data check`; None if there is no format to check."""
    test_record: ClassVar[type[Annotation] | None] = None
    """Record of an element with a list of captions, if that is another one than in training."""
    image_files: bool = True
    """Records name image files, which must exist."""
    truth: ClassVar[str | None] = None
    """Field of a record that holds the ground truth, if records without it can be predicted."""

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
        self.official_pictures, self.hold_out = official_pictures, hold_out
        self._tokenizer = tokenizer
        self._held_out: dict[tuple[str, ...], set[str]] = {}
        self.prepare()

    def prepare(self) -> None:
        """Validate options and precompute shared state; called at the end of the constructor."""

    def check_length(self, max_tokens: int) -> None:
        """Raise `ConfigError` if the model has fewer positions than `max_tokens`."""
        config = self.config
        if max_tokens > config.max_text_length:
            raise ConfigError(
                f"task.max_tokens={max_tokens} exceeds the {config.max_text_length} tokens that "
                f"model.max_positions={config.max_positions} can number; lower it"
            )

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """Tokenizer of a text task."""
        assert self._tokenizer is not None
        return self._tokenizer

    @abstractmethod
    def build(self) -> TaskModel:
        """Model of the task with random weights."""

    @abstractmethod
    def rows(self, paths: Sequence[Path]) -> Sequence[Rows]:
        """Training rows; reading a broken one raises `DataError`."""

    def test_rows(self, paths: Sequence[Path], split: str) -> Sequence[AnnotationRows[Any]]:
        """Evaluation rows, if their format differs; `split` is the name in the recipe."""
        return cast("Sequence[AnnotationRows[Any]]", self.rows(paths))

    def training_rows(self, paths: Sequence[Path]) -> Sequence[Rows]:
        """`rows` without the images that `hold_out` takes for the split `val`."""
        return self._split(self.rows(paths), held=False) if self.hold_out else self.rows(paths)

    def _split(self, files: Sequence[Any], *, held: bool) -> Sequence[AnnotationRows[Any]]:
        """Rows of the images that are held out, or those of all others."""
        if not self.image_files or not all(isinstance(each, AnnotationRows) for each in files):
            raise ConfigError(
                f"data.hold_out={self.hold_out} of the task {self.options.kind} needs files that name images; set "
                "data.hold_out=0 and name data.splits.val"
            )
        names = tuple(dict.fromkeys(image_names(files)))
        if names not in self._held_out:
            mask = held_out(len(names), contents_of([*names], self.images), self.hold_out)
            self._held_out[names] = {*compress(names, mask)}
        return [each.about(self._held_out[names], inverted=not held) for each in files]

    def records(self, paths: Sequence[Path], split: str) -> list[RecordT]:
        """Evaluation records; a broken one or a missing image raises `DataError`."""
        files = self.test_rows(paths, split)
        if self.hold_out and split == HELD_OUT:
            files = self._split(files, held=True)
        records = [record for rows in files for record in rows.records()]
        if self.image_files:
            check_images(records, self.images)
        return records

    @abstractmethod
    def item(self, record: RecordT, rng: np.random.Generator) -> ItemT:
        """Training item of a record; a broken record raises `DataError`."""

    @abstractmethod
    def collate(self, items: list[ItemT], rng: np.random.Generator) -> BatchT:
        """Collate items to a batch."""

    @abstractmethod
    def losses_of(self, model: Any, batch: BatchT) -> dict[str, Tensor]:
        """Losses listed in `losses`, to be summed."""

    def groups(self, records: Sequence[RecordT]) -> list[list[int]]:
        """Indices of records to predict together, e.g. all questions about an image."""
        return [[number] for number in range(len(records))]

    @abstractmethod
    def predict(self, model: Any, records: Sequence[RecordT]) -> list[Row]:
        """One result row per record, in order."""

    def has_truth(self, records: Sequence[RecordT]) -> bool:
        """True if all records have ground truth, false if none has; a mix raises `DataError`."""
        if self.truth is None:
            return True
        absent = sum(getattr(record, self.truth) is None for record in records)
        if 0 < absent < len(records):
            raise DataError(
                f"{absent} of {len(records)} records to evaluate on have no {self.truth}; give it to all of them, or "
                "to none to predict"
            )
        return not absent

    def metrics_of(self, records: Sequence[RecordT]) -> Collection[str]:
        """Names of the metrics that `score` returns for these records."""
        return self.metrics if self.has_truth(records) else ()

    def score(self, rows: Sequence[Row], records: Sequence[RecordT]) -> Metrics:
        """Metrics of a split with ground truth, in percent."""
        return {}

    def settled(self, metrics: Metrics) -> OptionsT:
        """Options updated by validation metrics."""
        return self.options

    def files(self, rows: Sequence[Row], records: Sequence[RecordT]) -> dict[str, bytes]:
        """Result files for the benchmark's evaluation, by name."""
        return {}

    def evaluate(
        self, model: Any, records: Sequence[RecordT], work: Evaluation
    ) -> tuple[Metrics, dict[str, bytes]]:
        """Metrics and files of a split, on the first process; collective."""
        scored = bool(self.metrics_of(records))
        rows = work.rows(self, model, records)
        if not work.processes.first:
            return {}, {}
        return self.score(rows, records) if scored else {}, self.files(rows, records)

    @abstractmethod
    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[RecordT]:
        """Records of a user's images and texts; invalid ones raise `InputError`."""

    def request(self, line: Mapping[str, Any]) -> RecordT:
        """Record of a request line with `image` (or `images`) and `text`, each a string or a list."""
        images, texts = ([] if value is None else value if isinstance(value, list) else [value] for value in (
            line.get("images", line.get("image")), line.get("text")
        ))  # fmt: skip
        if not all(isinstance(value, str) for value in [*images, *texts]):
            raise InputError('"image" and "text" of a request are strings, or lists of strings')
        records = self.requests([Path(image) for image in images], texts)
        if len(records) != 1:
            raise InputError(
                f"a request is answered by one result and this one needs {len(records)}; give a line each"
            )
        return records[0]

    def example(self, image: Path, caption: str) -> RecordT:
        """Record of a captioned photograph, for a benchmark of the training step; by default that of a request."""
        return self.requests([image], [caption])[0]

    def pixels(self, image: str | Path) -> Tensor:
        """Whole image `[3, R, R]` as in evaluation."""
        place = self.images / image
        return load_image(
            image_at(place), self.config.image_size, str(place), official=self.official_pictures
        )

    def augmented(
        self, image: str | Path, rng: np.random.Generator, *, may_flip: bool = True
    ) -> Tensor:
        """Training view `[3, R, R]` of an image, or the whole image without augmentation."""
        from xfm_fast.data.transforms import finetuning_transform

        if not getattr(self.options, "augment", True):
            return self.pixels(image)
        place = self.images / image
        decoded = decode_pixels(image_at(place), str(place), official=self.official_pictures)
        return finetuning_transform(self.config.image_size, self.crop)(
            decoded, rng, may_flip=may_flip
        )

    def caption_ids(self, text: str, max_words: int, max_tokens: int | None = None) -> list[int]:
        """Ids of a caption, cleaned and truncated to `max_words` and `max_tokens`."""
        cleaned = pre_caption(text, max_words)
        return self.tokenizer.encode_ids([cleaned], max_tokens or self.config.max_text_length)[0]

    def padded(
        self, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Ids padded to `[B, L]`, and their mask."""
        ids, mask = self.tokenizer.pad(rows)
        return ids.to(device), mask.to(device)

    def pixels_of(self, images: Sequence[str], model: Any) -> Tensor:
        """Whole images `[I, 3, R, R]` as inputs of a model or session."""
        return torch.stack([self.pixels(image) for image in images]).to(model.device, model.dtype)

    def pair_inputs(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Images and padded texts of items, as the fields of `PairInput`."""
        ids, mask = self.padded([item.ids for item in items])
        return {
            "image": torch.stack([item.image for item in items]),
            "input_ids": ids,
            "attention_mask": mask,
        }


HELD_OUT = "val"
"""Split of the images that `hold_out` takes from the training files."""


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
    """A result file of JSON."""
    return {name: (json.dumps(content, ensure_ascii=False) + "\n").encode()}


def group_by_image(records: Sequence[Any]) -> list[list[int]]:
    """Record indices grouped by image, so that each image is encoded once."""
    of_image: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        of_image.setdefault(record.image, []).append(number)
    return [*of_image.values()]


def unique_images(records: Sequence[Any]) -> tuple[list[str], list[int]]:
    """Distinct images of records in order, and the index of each record's image."""
    places = {
        image: place
        for place, image in enumerate(dict.fromkeys(record.image for record in records))
    }
    return [*places], [places[record.image] for record in records]


def require_inputs(images: Sequence[Path], texts: Sequence[str], what: str, *, ok: bool) -> None:
    """Raise `InputError` for a blank text, or unless `ok`; `what` names the required input."""
    if not ok:
        raise InputError(
            f"{len(images)} images and {len(texts)} texts were given; this model needs {what}"
        )
    if blank := [number for number, text in enumerate(texts) if not text.strip()]:
        raise InputError(f"text {blank[0]} of {len(texts)} is blank; this model needs {what}")


AnyTaskType = type[Task[Any, Any, Any, Any]]
T = TypeVar("T", bound=AnyTaskType)


class Registry(Mapping[str, AnyTaskType]):
    """Tasks by kind; built-in ones are imported on first use."""

    def __init__(self, *kinds: str) -> None:
        self._tasks: dict[str, AnyTaskType | None] = dict.fromkeys(kinds)

    def __getitem__(self, kind: str) -> AnyTaskType:
        if self._tasks[kind] is None:
            import_module(f"xfm_fast.tasks.{kind}")
        task = self._tasks[kind]
        assert task is not None
        return task

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: T) -> T:
        """Class decorator that enters a task under the `kind` of its options."""
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
        raise ValueError(f"kind={kind!r} is no task; choose one of {', '.join(TASKS)}")
    try:
        return options.model_validate(value)
    except ValidationError as error:
        # As for a tagged union, the place of a fault begins with the kind.
        faults: Any = [
            {**each, "loc": (kind, *each["loc"])} for each in error.errors(include_url=False)
        ]
        raise ValidationError.from_exception_data("task", faults) from None


AnyTask = Annotated[SerializeAsAny[TaskOptions], BeforeValidator(_parse_options)]
"""The section `task` of a recipe, discriminated by `kind`."""


def explanation(
    task: Task[Any, Any, Any, Any], options: TaskOptions | None = None
) -> dict[str, bytes]:
    """Metadata files to save with the weights, optionally with other options."""
    document = {"format": FORMAT_VERSION, "task": (options or task.options).model_dump(mode="json")}
    files = {TASK_FILE: (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()}
    return files | ({TOKENIZER_FILE: task.tokenizer.to_json().encode()} if task.reads_text else {})


def task_of(folder: Path) -> TaskOptions | None:
    """Task of a folder of weights; None for a pretrained model."""
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
    *,
    official_pictures: bool = False,
    hold_out: float = 0,
) -> Task[Any, Any, Any, Any]:
    """Create the task of completed options."""
    kind = TASKS[options.kind]
    return kind(
        options,
        config,
        tokenizer,
        images=images,
        official_pictures=official_pictures,
        hold_out=hold_out,
    )
