"""Validation of data files against what a task reads: what is there, what is broken, what it will cost."""

from __future__ import annotations

import io
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import (
    Annotation,
    CaptioningRecord,
    GroundingRecord,
    NLVR2Record,
    RetrievalRecord,
    RetrievalTestRecord,
    VQARecord,
    parse_annotation,
    read_array,
)
from xfm_fast.data.files import find_files
from xfm_fast.data.images import decode_pixels
from xfm_fast.data.items import IDS_KEY, ImageField, ImageItems, Items, PairItems, RegionItems, TextItems, text_of
from xfm_fast.data.order import item_generator
from xfm_fast.data.records import ListRows, Rows, open_records
from xfm_fast.data.texts import CAPTIONS, TEXTS, clean_text
from xfm_fast.data.transforms import finetuning_transform
from xfm_fast.errors import DataError
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

STREAM_TASKS = ("pairs", "regions", "images", "text")
ARRAY_TASKS = ("retrieval", "vqa", "nlvr2", "grounding", "captioning")
TASKS = (*STREAM_TASKS, *ARRAY_TASKS)

# Reading this many rows in the way of training says how fast a worker is.
_TIMED_ROWS = 64
_FLOAT = 4


@dataclass(frozen=True)
class Options:
    """How files are read, and what the estimates are for.

    Attributes:
        config: of the model; its image size counts.
        batch_size: of the memory estimate.
        tokenizer: to count tokens; None counts words alone.
        image_key: field of the image in line JSON.
        caption_key: field of the text in line JSON.
        image_root: folder of the images where files hold paths. In fine-tuning files, by default that of the file.
        tolerate_bad: largest share of broken rows in a file.
        most_problems: how many broken rows are listed.
    """

    config: XFMConfig
    batch_size: int = 96
    tokenizer: CaptionTokenizer | None = None
    image_key: str = "binary"
    caption_key: str = "desc"
    image_root: Path | None = None
    tolerate_bad: float = 0.01
    most_problems: int = 20


def check(
    data: Any, task: str, options: Options, *, progress: Callable[[int, int], None] = lambda done, of: None
) -> Report:
    """Read every row as the task would, decode every image, and count.

    Args:
        data: paths (see `find_files`).
        task: one of `TASKS`.
        progress: called now and then with the rows that are done, and all.

    Raises:
        DataError: the task is unknown, or files cannot be read at all.
    """
    if task not in TASKS:
        raise DataError(f"task {task!r} is unknown; choose one of {', '.join(TASKS)}")
    report = Report(task, tolerate_bad=options.tolerate_bad, batch_size=options.batch_size)
    files: list[Rows]
    if task in STREAM_TASKS:
        files = open_records(data, image_key=options.image_key, caption_key=options.caption_key).files
    else:
        files = [ListRows(read_array(path), str(path)) for path in find_files(data)]
    inspect = _Inspector(report, options, task)
    digests = array("Q")
    total, done = sum(map(len, files)), 0
    for rows in files:
        counts = FileCount(rows.name, len(rows))
        report.files.append(counts)
        for row in range(len(rows)):
            try:
                digests.append(int.from_bytes(blake2b(rows.raw(row), digest_size=8).digest(), "little"))
                inspect(rows, row)
            except DataError as error:
                counts.broken += 1
                if len(report.problems) < options.most_problems:
                    report.problems.append(Problem(rows.name, rows.place(row), str(error)))
            done += 1
            if done % 100 == 0 or done == total:
                progress(done, total)
    report.duplicates = len(digests) - len(np.unique(np.frombuffer(digests, np.uint64)))
    _estimate(report, files, options)
    return report


class _Inspector:
    """Reads rows of one task and adds what they hold to the report."""

    def __init__(self, report: Report, options: Options, task: str) -> None:
        self._report = report
        self._options = options
        self._task = task
        self._field = ImageField(options.image_key, options.image_root)
        self._decoded: set[Path] = set()

    def __call__(self, rows: Rows, row: int) -> None:
        record = rows.read(row)
        if self._task in ARRAY_TASKS:
            self._array_element(record, Path(rows.name))
            return
        if self._task in ("pairs", "text"):
            self._stream_text(record)
        if self._task != "text":
            size = self._stream_images(record)
            if self._task == "regions":
                self._elements(record, size)

    def _stream_text(self, record: Mapping[str, Any]) -> None:
        options = TEXTS if self._task == "text" else CAPTIONS
        if record.get(IDS_KEY) is not None and self._options.tokenizer is not None:
            count = len(text_of(record, self._options.caption_key, self._options.tokenizer))
            if not count:
                raise DataError(f"{IDS_KEY!r} is empty")
            self._add_tokens(count + 2, options.max_tokens)
            return
        if record.get(IDS_KEY) is not None:
            return
        if self._options.caption_key not in record:
            raise DataError(
                f"the record has no field {self._options.caption_key!r} (it has {', '.join(record)}); name the field "
                "that holds the text"
            )
        for text in _all_texts(record[self._options.caption_key]):
            self._add_text(text, options.max_words, options.max_tokens)

    def _stream_images(self, record: Mapping[str, Any]) -> tuple[int, int]:
        value = record.get(self._options.image_key)
        size = (0, 0)
        if value == []:
            raise DataError(f"the list in {self._options.image_key!r} is empty; give at least one image")
        for each in value if isinstance(value, list) else [value]:
            size = self._add_image(self._field.source(each))
        return size

    def _elements(self, record: Mapping[str, Any], size: tuple[int, int]) -> None:
        elements = record.get("elems")
        if not isinstance(elements, list) or not elements:
            raise DataError("'elems' is missing or empty; it is a list of {'bb': [x, y, w, h], 'caption': text}")
        if "caption" in record:
            for text in _all_texts(record["caption"]):
                self._add_text(text, CAPTIONS.max_words, CAPTIONS.max_tokens)
        wrong = []
        for number, element in enumerate(elements):
            try:
                _check_box(element.get("bb") if isinstance(element, Mapping) else None, "bb", size)
                for text in _all_texts(element.get("caption")):
                    self._add_text(text, CAPTIONS.max_words, CAPTIONS.max_tokens)
            except DataError as error:
                wrong.append(f"element {number}: {error}")
        self._report.unusable_regions += len(wrong)
        if len(wrong) == len(elements):
            raise DataError(f"no region can be used: {wrong[0]}")
        self._report.regions[len(elements) - len(wrong)] += 1

    def _array_element(self, record: Mapping[str, Any], file: Path) -> None:
        root = self._options.image_root or file.parent
        parsed = parse_annotation(record, _kind(self._task, record))
        images = parsed.images if isinstance(parsed, NLVR2Record) else (parsed.image,)  # type: ignore[attr-defined]
        sizes = [self._add_image(root / image) for image in images]
        match parsed:
            case RetrievalRecord() | CaptioningRecord():
                texts: tuple[str, ...] = (parsed.caption,) if parsed.caption is not None else ()
            case RetrievalTestRecord():
                texts = parsed.caption
            case VQARecord():
                texts = (parsed.question,)
            case NLVR2Record():
                texts = (parsed.sentence,)
            case GroundingRecord():
                texts = (parsed.text,)
                if parsed.bbox is not None:
                    _check_box(list(parsed.bbox), "bbox", sizes[0])
            case _:
                texts = ()
        for text in texts:
            self._add_text(text, 30, 40)

    def _add_text(self, text: str, max_words: int | None, max_tokens: int) -> None:
        cleaned = pre_caption(text, len(text) + 1) if max_words is not None else clean_text(text, TEXTS)
        words = len(cleaned.split())
        self._report.texts += 1
        self._report.words[words] += 1
        if self._options.tokenizer is not None:
            (ids,) = self._options.tokenizer.encode_ids([cleaned], len(cleaned.encode()) + 2)
            self._add_tokens(len(ids), max_tokens, max_words is not None and words > max_words)
        elif max_words is not None and words > max_words:
            self._report.cut += 1

    def _add_tokens(self, count: int, most: int, cut: bool = False) -> None:
        self._report.tokens[count] += 1
        self._report.cut += cut or count > most

    def _add_image(self, source: Path | bytes) -> tuple[int, int]:
        if isinstance(source, Path):
            # Fine-tuning files name an image once for every text about it.
            if source in self._decoded:
                with Image.open(source) as opened:
                    return opened.size
            pixels = decode_pixels(source)
            self._decoded.add(source)
        else:
            pixels = decode_pixels(source, f"in {self._options.image_key!r}")
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as opened:
            self._report.formats[str(opened.format)] += 1
        size = (pixels.shape[2], pixels.shape[1])
        self._report.images += 1
        self._report.sizes[size] += 1
        return size


def _kind(task: str, record: Any) -> type[Annotation]:
    if task == "retrieval":
        # Evaluation files list all captions of an image.
        listed = isinstance(record, Mapping) and isinstance(record.get("caption"), list)
        return RetrievalTestRecord if listed else RetrievalRecord
    kinds = {"vqa": VQARecord, "nlvr2": NLVR2Record, "grounding": GroundingRecord, "captioning": CaptioningRecord}
    return kinds[task]


def _all_texts(value: Any) -> Iterator[str]:
    """Every text that could be drawn from a caption field."""
    for each in value if isinstance(value, list) and value else [value]:
        for text in each.values() if isinstance(each, Mapping) and each else [each]:
            if not isinstance(text, str):
                raise DataError(
                    f"the caption is {value!r}; a string, a list of strings or a mapping to strings is needed"
                )
            yield text


def _check_box(box: Any, name: str, size: tuple[int, int]) -> None:
    numbers = isinstance(box, list) and len(box) == 4 and all(type(each) in (int, float) for each in box)
    if not numbers:
        raise DataError(f"{name!r} is {box!r}; four numbers [x, y, w, h] in pixels are needed")
    x, y, w, h = box
    if w < 1 or h < 1 or x < 0 or y < 0 or x + w > size[0] + 1 or y + h > size[1] + 1:
        raise DataError(f"{name!r} {box} is empty or reaches outside the {size[0]}x{size[1]} image")


def _estimate(report: Report, files: list[Rows], options: Options) -> None:
    size, batch = options.config.image_size, options.batch_size
    image_bytes = 3 * size * size * _FLOAT
    patches = options.config.num_patches
    # Ids, mask, masked ids in int64; positions and labels besides.
    text_bytes = 8 * (3 * CAPTIONS.max_tokens + 2 * CAPTIONS.masking.most)
    per_row = {
        "pairs": image_bytes + patches + text_bytes,
        "images": image_bytes + patches,
        "text": 8 * (3 * TEXTS.max_tokens + 2 * TEXTS.masking.most),
        "regions": image_bytes + text_bytes + 1 + patches + 16,
        "nlvr2": 2 * image_bytes + 2 * 8 * 40,
    }
    report.batch_bytes = batch * per_row.get(report.task, image_bytes + 2 * 8 * 40)
    report.seconds_per_item = _measure(report, files, options)


def _measure(report: Report, files: list[Rows], options: Options) -> float | None:
    """Seconds of one item, of rows spread over all files, as a worker makes it."""
    make = _maker(report.task, options)
    places = np.linspace(0, report.rows - 1, min(_TIMED_ROWS, report.rows)).astype(int)
    ends = np.cumsum([len(rows) for rows in files])
    made, spent = 0, 0.0
    for place in places:
        file = int(np.searchsorted(ends, place, side="right"))
        rows, row = files[file], int(place - (ends[file - 1] if file else 0))
        begun = time.perf_counter()
        try:
            make(rows, row)
        except DataError:
            continue
        # What is set up for the first item is not what an item costs.
        if made:
            spent += time.perf_counter() - begun
        made += 1
    return spent / (made - 1) if made > 1 else None


def _maker(task: str, options: Options) -> Callable[[Rows, int], Any]:
    generator = item_generator(0, 0, 0, 0)
    image = ImageField(options.image_key, options.image_root)
    # Any vocabulary takes about as long.
    tokenizer = options.tokenizer or CaptionTokenizer.train_on_texts(["a picture of a thing"], 300)
    items: dict[str, Items[Any, Any]] = {
        "pairs": PairItems(tokenizer, options.config, image, options.caption_key),
        "images": ImageItems(options.config, image),
        "text": TextItems(tokenizer, options.caption_key),
        "regions": RegionItems(tokenizer, options.config, options.batch_size, image),
    }
    if task in items:
        return lambda rows, row: items[task].item(rows.read(row), generator)
    transform = finetuning_transform(options.config.image_size)

    def element(rows: Rows, row: int) -> None:
        record = rows.read(row)
        names = record.get("images") or [record.get("image")]
        for name in names:
            transform(decode_pixels((options.image_root or Path(rows.name).parent) / str(name)), generator)

    return element


@dataclass(frozen=True)
class Problem:
    """A broken row."""

    file: str
    row: int | str
    reason: str


@dataclass
class FileCount:
    """Rows of a file, and how many of them are broken."""

    file: str
    rows: int = 0
    broken: int = 0


@dataclass
class Report:
    """What `check` found.

    Attributes:
        task: what the files were checked for.
        files: counts of each.
        problems: the first broken rows.
        duplicates: rows that repeat an earlier one to the byte.
        texts: how many texts there are.
        words: histogram of their words after cleaning, before cutting.
        tokens: histogram of their ids with `<s>` and `</s>`, where there was a tokenizer; before cutting.
        cut: texts that are longer than the task reads.
        images: how many images were decoded.
        sizes: histogram of (width, height).
        formats: histogram of their formats.
        regions: histogram of regions in an image.
        unusable_regions: regions that would be skipped.
        batch_bytes: memory of one batch in float32.
        batch_size: rows of that batch.
        seconds_per_item: of one worker, measured on some of the rows.
        tolerate_bad: the limit that `ok` is judged by.
    """

    task: str
    files: list[FileCount] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    duplicates: int = 0
    texts: int = 0
    words: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    cut: int = 0
    images: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    regions: Counter[int] = field(default_factory=Counter)
    unusable_regions: int = 0
    batch_bytes: int = 0
    batch_size: int = 0
    seconds_per_item: float | None = None
    tolerate_bad: float = 0.01

    @property
    def rows(self) -> int:
        return sum(each.rows for each in self.files)

    @property
    def broken(self) -> int:
        return sum(each.broken for each in self.files)

    @property
    def over_limit(self) -> list[FileCount]:
        """Files that would stop a run: as in `Quarantine`, one broken row alone does not."""
        return [each for each in self.files if each.broken > max(1, self.tolerate_bad * each.rows)]

    @property
    def ok(self) -> bool:
        """Whether training on these files would run through."""
        return not self.over_limit and self.broken < self.rows

    @property
    def hours_per_epoch(self) -> float | None:
        """Of one worker."""
        return None if self.seconds_per_item is None else self.seconds_per_item * (self.rows - self.broken) / 3600

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        widths = [width for (width, _), times in self.sizes.items() for _ in range(times)]
        heights = [height for (_, height), times in self.sizes.items() for _ in range(times)]
        return {
            "task": self.task,
            "ok": self.ok,
            "rows": self.rows,
            "broken": self.broken,
            "duplicates": self.duplicates,
            "tolerate_bad": self.tolerate_bad,
            "files": [vars(each) for each in self.files],
            "problems": [vars(each) for each in self.problems],
            "texts": {
                "count": self.texts,
                "cut": self.cut,
                "words": dict(sorted(self.words.items())),
                "tokens": dict(sorted(self.tokens.items())),
            },
            "images": {
                "count": self.images,
                "formats": dict(self.formats),
                "width": _spread(widths),
                "height": _spread(heights),
            },
            "regions": {"per_image": dict(sorted(self.regions.items())), "unusable": self.unusable_regions},
            "estimates": {
                "batch_size": self.batch_size,
                "batch_bytes": self.batch_bytes,
                "items_per_second_and_worker": None if not self.seconds_per_item else 1 / self.seconds_per_item,
                "hours_per_epoch_and_worker": self.hours_per_epoch,
            },
        }


def _spread(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    low, middle, high = np.percentile(values, [0, 50, 100]).tolist()
    return {"least": low, "median": middle, "most": high}
