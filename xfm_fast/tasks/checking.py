"""Validation of data files by the readers of training: broken rows, statistics and cost."""

from __future__ import annotations

import io
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import AnnotationRows, image_names, parse_annotation
from xfm_fast.data.images import (
    decode_pixels,
    image_source,
    image_values,
    is_transparent,
    orientation,
    read_image,
    upright_size,
)
from xfm_fast.data.items import ITEMS
from xfm_fast.data.options import (
    STREAM_KINDS,
    AnyStreamOptions,
    ImageOptions,
    RegionOptions,
    TextOptions,
)
from xfm_fast.data.records import RecordSet, Rows, image_at, open_records
from xfm_fast.data.regions import every_region_text
from xfm_fast.data.streams import item_generator
from xfm_fast.data.texts import IDS_KEY, clean_text, every_text, text_of
from xfm_fast.data.transforms import finetuning_transform
from xfm_fast.errors import DataError
from xfm_fast.tasks.task import TASKS
from xfm_fast.tokenizer import CaptionTokenizer

_FINETUNING = TextOptions(max_tokens=40)
# Validation does not depend on the batch size.
_BATCH = 96
# Rows that are timed as a training worker reads them.
_TIMED_ROWS = 64


@dataclass(frozen=True)
class Options:
    """How files are read; `image_key` to `tokenized` are as in a stream."""

    config: XFMConfig
    tokenizer: CaptionTokenizer | None = None  # None counts words only
    image_key: str = "binary"
    caption_key: str = "desc"
    image_root: Path | None = None  # for fine-tuning files by default the folder of the file
    tokenized: bool = False
    tolerate_bad: float = 0.01  # maximum share of broken rows per file
    max_problems: int = 20

    def stream(self, task: str) -> AnyStreamOptions:
        """Return the recipe's stream options for these files."""
        stream = STREAM_KINDS[task]
        names = ("image_key", "caption_key", "image_root", "tokenized")
        return stream(
            **{name: getattr(self, name) for name in names if name in stream.model_fields}
        )


def checkable_tasks() -> list[str]:
    """Return the stream kinds of pretraining, and tasks with a file format to check."""
    return [*STREAM_KINDS, *(kind for kind, task in TASKS.items() if task.check_rows is not None)]


def check(
    data: Any,
    task: str,
    options: Options,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read every row and decode every image as `task` does; `progress` receives (rows done, total)."""
    if task not in (tasks := checkable_tasks()):
        raise DataError(f"task {task!r} is unknown; choose one of {', '.join(tasks)}")
    report = Report(task, tolerate_bad=options.tolerate_bad)
    if task in STREAM_KINDS:
        records = open_records(data, **options.stream(task).record_keys)
        reader: _Reader = _StreamReader(report, options)
    else:
        read = TASKS[task].check_rows
        assert read is not None
        records, reader = RecordSet(read(data)), _AnnotationReader(report, options)
    digests = array("Q")
    done = 0
    for rows in records.files:
        counts = FileCount(rows.name, len(rows))
        report.files.append(counts)
        for row in range(len(rows)):
            try:
                digest = blake2b(rows.raw(row), digest_size=8).digest()
                digests.append(int.from_bytes(digest, "little"))
                reader.inspect(reader.record(rows, row), Path(rows.name))
            except DataError as error:
                counts.broken += 1
                if len(report.problems) < options.max_problems:
                    report.problems.append(Problem(rows.name, rows.label(row), str(error)))
            done += 1
            if progress is not None and (done % 100 == 0 or done == len(records)):
                progress(done, len(records))
    report.duplicates = len(digests) - len(np.unique(np.frombuffer(digests, np.uint64)))
    _measure_cost(records, reader, report)
    return report


def _measure_cost(records: RecordSet, reader: _Reader, report: Report) -> None:
    """Time some rows as a worker prepares them, without the first one, which includes set-up."""
    seconds: list[float] = []
    sizes: list[int] = []
    count = min(_TIMED_ROWS, len(records))
    for index in np.linspace(0, len(records) - 1, count).astype(int).tolist():
        rows, row = records.locate(index)
        started = time.perf_counter()
        try:
            sizes.append(reader.prepare(reader.record(rows, row), Path(rows.name)))
        except DataError:
            continue
        seconds.append(time.perf_counter() - started)
    if seconds:
        report.seconds_per_row = float(np.mean(seconds[1:] or seconds))
        report.bytes_per_row = round(float(np.mean(sizes)))


class _Reader:
    """Reads and counts the records of a task."""

    def __init__(self, report: Report, options: Options) -> None:
        self.report, self.options = report, options
        self._sizes: dict[Path, tuple[int, int]] = {}

    def record(self, rows: Rows, row: int) -> Any:
        """Parse a row; a broken one raises `DataError`."""
        return rows.read(row)

    def inspect(self, record: Any, file: Path) -> None:
        """Add a record to the report; a broken one raises `DataError`."""
        raise NotImplementedError

    def prepare(self, record: Any, file: Path) -> int:
        """Prepare a record as a training worker does; return its bytes in a batch."""
        raise NotImplementedError

    def count_text(self, text: str, options: TextOptions) -> None:
        """Count a text before truncation; an empty one raises `DataError`."""
        limit = options.max_words
        if limit is not None:
            # Every text has fewer words than characters.
            options = options.model_copy(update={"max_words": len(text) + 1})
        cleaned = clean_text(text, options)
        words = len(cleaned.split())
        self.report.texts += 1
        self.report.words[words] += 1
        cut = limit is not None and words > limit
        if self.options.tokenizer is None:
            self.report.cut += cut
        else:
            (ids,) = self.options.tokenizer.encode_ids([cleaned], len(cleaned.encode()) + 2)
            self.count_tokens(len(ids), options, cut)

    def count_tokens(self, count: int, options: TextOptions, cut: bool = False) -> None:
        self.report.tokens[count] += 1
        self.report.cut += cut or count > options.max_tokens

    def count_image(self, source: Path | bytes, *, decode: bool = True) -> tuple[int, int]:
        """Count an image, once per file; an undecodable one raises `DataError`."""
        if isinstance(source, Path) and source in self._sizes:
            return self._sizes[source]
        name = None if isinstance(source, Path) else f"in {self.options.image_key!r}"
        name, data = read_image(source, name)
        if decode:
            decode_pixels(data, name)
        with Image.open(io.BytesIO(data)) as opened:
            size = upright_size(opened)
            self.report.formats[str(opened.format)] += 1
            self.report.turned += orientation(opened) != 1
            self.report.transparent += is_transparent(opened)
        if isinstance(source, Path):
            self._sizes[source] = size
        self.report.images += 1
        self.report.sizes[size] += 1
        return size


class _StreamReader(_Reader):
    """Pretraining rows; a row is broken if any random draw rejects it."""

    def __init__(self, report: Report, options: Options) -> None:
        super().__init__(report, options)
        make_items, config = ITEMS[report.task], options.config
        self.stream = stream = options.stream(report.task)
        # Any vocabulary detects broken rows.
        self._tokenizer = options.tokenizer or CaptionTokenizer.train_on_texts(
            ["a picture of a thing"], 300
        )
        self._trained = make_items(stream, config, self._tokenizer, 1)
        if isinstance(stream, ImageOptions):
            # Augmentation is slow and rejects no row.
            stream = stream.model_copy(update={"augment": False})
        self._items = make_items(stream, config, self._tokenizer, _BATCH)
        self._generator = item_generator(0, 0, 0, 0)

    def prepare(self, record: Mapping[str, Any], file: Path) -> int:
        item = self._trained.item(record, self._generator)
        batch = self._trained.collate([item], self._generator)
        values = [getattr(batch, field.name) for field in fields(batch)]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    def inspect(self, record: Mapping[str, Any], file: Path) -> None:
        stream, text = self.stream, None
        if isinstance(stream, TextOptions) and not isinstance(stream, RegionOptions):
            if record.get(IDS_KEY) is not None and self.options.tokenizer is None:
                # Only their own vocabulary can validate ids.
                record = {**record, IDS_KEY: [self._tokenizer.pad_token_id]}
            text = text_of(record, stream.caption_key, self._tokenizer)
        self._items.item(record, self._generator)
        # One draw was good; check what other draws could find.
        size = (0, 0)
        if isinstance(stream, ImageOptions):
            values = image_values(record, stream)
            for value in values:
                size = self.count_image(image_source(value, stream), decode=len(values) > 1)
        if isinstance(stream, RegionOptions):
            captions, elements, skipped = every_region_text(record, *size, stream)
            for caption in chain(captions, *elements):
                self.count_text(caption, stream)
            self.report.unusable_regions += len(skipped)
            self.report.regions[len(elements)] += 1
        elif isinstance(stream, TextOptions):
            if not isinstance(text, tuple):
                for caption in every_text(text, language=stream.language):
                    self.count_text(caption, stream)
            elif self.options.tokenizer is not None:
                self.count_tokens(len(text) + 2, stream)


class _AnnotationReader(_Reader):
    """Elements of fine-tuning files."""

    def __init__(self, report: Report, options: Options) -> None:
        super().__init__(report, options)
        self._transform = finetuning_transform(options.config.image_size)
        self._generator = item_generator(0, 0, 0, 0)

    def _images(self, record: Any, file: Path) -> list[Path | bytes]:
        folder = self.options.image_root or file.parent
        return [image_at(folder / image) for image in image_names([record])]

    def prepare(self, record: Any, file: Path) -> int:
        # Ids and mask of the text.
        size = 2 * 8 * _FINETUNING.max_tokens
        for image in self._images(record, file):
            size += self._transform(decode_pixels(image), self._generator).nbytes
        return size

    def record(self, rows: Rows, row: int) -> Any:
        assert isinstance(rows, AnnotationRows)
        element = rows.elements[row]
        test_record = TASKS[self.report.task].test_record
        captions = element.get("caption") if isinstance(element, dict) else None
        # Evaluation files list all captions of an image.
        if test_record is not None and isinstance(captions, list):
            return parse_annotation(element, test_record)
        return rows.read(row)

    def inspect(self, record: Any, file: Path) -> None:
        sizes = [self.count_image(image) for image in self._images(record, file)]
        element = record.model_dump()
        if {"width", "height"} <= element.keys():
            width, height = sizes[0]
            parse_annotation({**element, "width": width, "height": height}, type(record))
        names = ("caption", "question", "sentence", "text")
        texts = next(element[name] for name in names if name in element)
        for text in (texts,) if isinstance(texts, str) else texts or ():
            self.count_text(text, _FINETUNING)


@dataclass(frozen=True)
class Problem:
    """A broken row."""

    file: str
    row: int | str
    reason: str


@dataclass
class FileCount:
    """Rows of a file and how many are broken."""

    file: str
    rows: int = 0
    broken: int = 0


@dataclass
class Report:
    """Results of a check."""

    task: str
    files: list[FileCount] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    duplicates: int = 0  # rows identical to an earlier one
    texts: int = 0
    # Histograms before truncation: of words after cleaning, and of tokens with `<s>` and `</s>`.
    words: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    cut: int = 0
    images: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    turned: int = 0  # images with an EXIF orientation
    transparent: int = 0  # images with transparent pixels, composited on white
    regions: Counter[int] = field(default_factory=Counter)
    unusable_regions: int = 0  # skipped regions
    seconds_per_row: float | None = None  # of one training worker here, measured on a sample
    bytes_per_row: int = 0  # in a batch
    tolerate_bad: float = 0.01

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def broken(self) -> int:
        return sum(file.broken for file in self.files)

    @property
    def over_limit(self) -> list[FileCount]:
        """Files with too many broken rows for a run; one is always tolerated, as in `Quarantine`."""
        return [file for file in self.files if file.broken > max(1, self.tolerate_bad * file.rows)]

    @property
    def ok(self) -> bool:
        """True if no file exceeds the limit."""
        return not self.over_limit and self.broken < self.rows

    @property
    def hours_per_epoch(self) -> float | None:
        """Hours in which one worker reads all good rows."""
        if self.seconds_per_row is None:
            return None
        return self.seconds_per_row * (self.rows - self.broken) / 3600

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        widths, heights = zip(*self.sizes.elements(), strict=True) if self.sizes else ((), ())
        return {
            "task": self.task,
            "ok": self.ok,
            "rows": self.rows,
            "broken": self.broken,
            "duplicates": self.duplicates,
            "tolerate_bad": self.tolerate_bad,
            "files": [vars(file) for file in self.files],
            "problems": [vars(problem) for problem in self.problems],
            "texts": {
                "count": self.texts,
                "cut": self.cut,
                "words": dict(sorted(self.words.items())),
                "tokens": dict(sorted(self.tokens.items())),
            },
            "images": {
                "count": self.images,
                "formats": dict(self.formats),
                "turned": self.turned,
                "transparent": self.transparent,
                "width": _spread(widths),
                "height": _spread(heights),
            },
            "regions": {
                "per_image": dict(sorted(self.regions.items())),
                "unusable": self.unusable_regions,
            },
            "cost": {
                "seconds_per_row": self.seconds_per_row,
                "hours_per_epoch": self.hours_per_epoch,
                "bytes_per_row": self.bytes_per_row,
            },
        }


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    low, middle, high = np.percentile(values, [0, 50, 100]).tolist()
    return {"least": low, "median": middle, "most": high}
