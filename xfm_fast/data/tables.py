"""Readers of CSV, TSV, line JSON, GLUE, image folders and `datasets` folders: unvalidated rows."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from xfm_fast.data.annotations import (
    AnnotationRows,
    ImageLabelRecord,
    TextRecord,
    TextScoreRecord,
    as_rows,
)
from xfm_fast.data.files import Paths, check_plain, find_files, open_file, read_text, unreadable
from xfm_fast.errors import DataError, UnavailableError

TABLE_SUFFIXES = (".csv", ".tsv", ".tab")
LINE_SUFFIXES = (".jsonl", ".ndjson")
CAPTION_TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "captions.json")
"""File names of a caption table in an image folder."""
PICTURE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
TEXT_SUFFIXES = (".txt", ".md")

PAIR_COLUMNS: dict[str, Sequence[str]] = {
    "image": (
        "image",
        "file_name",
        "filename",
        "filepath",
        "image_path",
        "image_name",
        "path",
        "file",
    ),
    "caption": ("caption", "text", "title", "description", "sentence", "comment"),
}
"""Accepted column names of images and captions; the first existing one is read."""

_EXAMPLES = 3
_NOT_OBJECT = "expected one object per line, such as {...}"
# Bytes of a cell; one of megabytes is an unclosed quotation mark.
_CELL_LIMIT = 1 << 22


class Columns(Sequence[dict[str, Any]]):
    """Elements stored by column, to save memory."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        return {field: values[row] for field, values in self._columns.items()}


class GlueSet(NamedTuple):
    """Columns and labels of a GLUE task; `classes` is None for regression."""

    text: str
    text2: str | None
    label: str
    classes: tuple[str, ...] | None


GLUE = {
    "cola": GlueSet("sentence", None, "label", ("0", "1")),
    "mnli": GlueSet(
        "sentence1", "sentence2", "gold_label", ("entailment", "neutral", "contradiction")
    ),
    "mrpc": GlueSet("#1 String", "#2 String", "Quality", ("0", "1")),
    "qnli": GlueSet("question", "sentence", "label", ("entailment", "not_entailment")),
    "qqp": GlueSet("question1", "question2", "is_duplicate", ("0", "1")),
    "rte": GlueSet("sentence1", "sentence2", "label", ("entailment", "not_entailment")),
    "sst2": GlueSet("sentence", None, "label", ("0", "1")),
    "stsb": GlueSet("sentence1", "sentence2", "score", None),
}
# The columns that `datasets` gives these sets.
_ON_DISK = {
    "mrpc": GlueSet("sentence1", "sentence2", "label", None),
    "mnli": GlueSet("premise", "hypothesis", "label", None),
}
_SPLIT_FILES = {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}
_MNLI_FILES = {
    "train": "train.tsv",
    "val": "dev_matched.tsv",
    "val_mismatched": "dev_mismatched.tsv",
    "test": "test_matched.tsv",
    "test_mismatched": "test_mismatched.tsv",
}


def text_rows(
    paths: Paths,
    *,
    glue: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    scores: bool = False,
) -> list[AnnotationRows[TextRecord]] | list[AnnotationRows[TextScoreRecord]]:
    """Read texts or text pairs with classes or scores.

    Formats: CSV, TSV or line JSON with `text` and optionally `text2`, `label`, `index`; GLUE files
    or folders (`glue` names the task); folders of `datasets.save_to_disk`. `split` selects a file
    or split of a folder, including `val_mismatched` and `test_mismatched` of MNLI; `columns` maps
    fields to columns; `scores` reads labels as numbers.
    """
    classes = glue_set(glue).classes if glue is not None else None
    names = {name: name for name in ("text", "text2", "label", "index")} | dict(columns or {})
    optional = [name for name in ("text2", "label", "index") if name not in (columns or {})]
    files = []
    for path in find_files(paths, lambda folder: glue is not None or on_disk(folder)):
        if path.is_dir() and on_disk(path):
            files.append(read_dataset(path, names, split, glue))
        elif glue is not None:
            files.append(read_glue(path, glue, split))
        elif path.suffix.lower() in (*TABLE_SUFFIXES, *LINE_SUFFIXES):
            files.append(read_table(path, names, optional))
        else:
            raise DataError(
                f"{path} is not a .csv, .tsv or .jsonl file; convert it, or name its GLUE task"
            )
    if scores or (glue is not None and classes is None):
        return as_rows(files, TextScoreRecord)
    return as_rows(files, TextRecord)


def image_rows(
    paths: Paths, *, columns: Mapping[str, str] | None = None
) -> list[AnnotationRows[ImageLabelRecord]]:
    """Read images with classes: class folders, or CSV, TSV or line JSON with `image` and optionally `label`."""
    names = {"image": "image", "label": "label"} | dict(columns or {})
    optional = [] if "label" in (columns or {}) else ["label"]
    files = []
    for path in find_files(paths, lambda _: True):
        if path.is_dir():
            files.append(read_class_folder(path))
        elif path.suffix.lower() in (*TABLE_SUFFIXES, *LINE_SUFFIXES):
            files.append(read_table(path, names, optional))
        else:
            raise DataError(
                f"{path} is neither a folder of class folders nor a .csv, .tsv or .jsonl file; "
                "give one of these"
            )
    return as_rows(files, ImageLabelRecord)


def read_table(
    path: Path, columns: Mapping[str, str | Sequence[str]], optional: Sequence[str] = ()
) -> AnnotationRows[Any]:
    """Read a CSV or TSV file with a header, or line JSON; a field is read from its first existing column."""
    if path.suffix.lower() in LINE_SUFFIXES:
        rows = read_lines(path)
        rows.elements = [
            {field: value[column] for field, column in match_columns(value, columns).items()}
            if isinstance(value, dict)
            else value
            for value in rows.elements
        ]
        return rows
    lines = _cells(path)
    _, header = next(lines, (0, []))
    matches = match_columns(header, columns)
    absent = [field for field in columns if field not in matches and field not in optional]
    if absent:
        names = [columns[field] for field in absent]
        names = [repr(name if isinstance(name, str) else name[0]) for name in names]
        existing = ", ".join(map(repr, header)) or "no header"
        raise DataError(
            f"{path} has no column {', '.join(names)}, but {existing}; "
            f"rename one, or name it: task.columns.{absent[0]}=..."
        )
    indices = {field: header.index(column) for field, column in matches.items()}
    elements, labels = [], []
    for line, cells in lines:
        labels.append(line)
        elements.append(_select_cells(cells, indices, len(header)))
    return _require_rows(AnnotationRows(path, elements, labels=labels))


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Yield the line number and the values by column of each row of a CSV, TSV or line-JSON file."""
    if path.suffix.lower() in LINE_SUFFIXES:
        for line, row in _lines(path):
            yield line, row if isinstance(row, dict | DataError) else DataError(_NOT_OBJECT)
        return
    lines = _cells(path)
    _, header = next(lines, (0, []))
    indices = {column: index for index, column in enumerate(header)}
    for line, cells in lines:
        yield line, _select_cells(cells, indices, len(header))


def match_columns(
    names: Collection[str], columns: Mapping[str, str | Sequence[str]]
) -> dict[str, str]:
    """Map each field to its first existing column, matched exactly or in lower case."""
    lower = {name.strip().lower(): name for name in reversed([*names])}
    matches: dict[str, str] = {}
    for field, options in columns.items():
        for option in (options,) if isinstance(options, str) else options:
            name = option if option in names else lower.get(option)
            if name is not None:
                matches.setdefault(field, name)
    return matches


def _select_cells(
    cells: Sequence[str], indices: Mapping[str, int], width: int
) -> dict[str, str] | DataError:
    if len(cells) != width:
        return DataError(
            f"the line has {len(cells)} columns and the header {width}; check its separators and quotes"
        )
    return {field: cells[index] for field, index in indices.items()}


def _require_rows(rows: AnnotationRows[Any]) -> AnnotationRows[Any]:
    if not len(rows):
        raise DataError(f"{rows.name} holds no elements; give at least one")
    return rows


def _cells(path: Path, *, quotes: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the cells of each non-blank row of a CSV or TSV file."""
    previous = csv.field_size_limit(_CELL_LIMIT)
    try:
        with open_file(path) as file:
            check_plain(path, file.peek(16)[:16])
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            reader = csv.reader(
                text,
                delimiter="," if path.suffix.lower() == ".csv" else "\t",
                quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
            )
            line = 1
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it") from None
    except csv.Error as error:
        raise DataError(
            f"{path} is not a table ({error}); check for an unclosed quotation mark"
        ) from None
    finally:
        csv.field_size_limit(previous)


def read_lines(path: Path) -> AnnotationRows[Any]:
    """Read line JSON; a line that is not JSON becomes a `DataError` element."""
    rows = [*_lines(path)]
    labels, elements = [line for line, _ in rows], [element for _, element in rows]
    if elements and all(isinstance(element, DataError) for element in elements):
        raise DataError(
            f"{path}: none of {len(elements)} lines can be read; of the first: {elements[0]}"
        )
    return _require_rows(AnnotationRows(path, elements, labels=labels))


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each non-blank line of line JSON, a `DataError` if it is not JSON."""
    with open_file(path) as file:
        check_plain(path, file.peek(16)[:16])
        for number, line in enumerate(file, 1):
            if text := line.removeprefix(b"\xef\xbb\xbf").strip():
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError) as error:
                    value = DataError(f"the line is not JSON ({error}); {_NOT_OBJECT}")
                yield number, value


def read_glue(path: Path, name: str, split: str | None = None) -> AnnotationRows[Any]:
    """Read an official GLUE file, or the split's file in a folder; MNLI lines labelled `-` are dropped and counted."""
    task = glue_set(name)
    if path.is_dir():
        files = _MNLI_FILES if name == "mnli" else _SPLIT_FILES
        if split not in files:
            raise DataError(
                f"split {split!r} of {name} is unknown; choose one of {', '.join(files)}"
            )
        path = path / files[split]
    # Quotation marks are text there, and often unpaired.
    lines = [*_cells(path, quotes=False)]
    header = lines[0][1] if lines else []
    if name == "cola" and len(header) == 4:
        header = ["source", task.label, "mark", task.text]
    else:
        lines = lines[1:]
    columns = {"text": task.text, "text2": task.text2, "label": task.label}
    indices = {field: header.index(column) for field, column in columns.items() if column in header}
    absent = [column for field, column in columns.items() if column and field not in indices]
    # Test files have no labels.
    if absent := [column for column in absent if column != task.label]:
        raise DataError(
            f"{path} has no column {', '.join(map(repr, absent))} of {name}, but {', '.join(map(repr, header))}; "
            "give the files of the official zip and the name of their task"
        )
    numbering = next((header.index(column) for column in ("index", "id") if column in header), None)
    elements, labels, dropped = [], [], []
    for row, (line, cells) in enumerate(lines):
        element = _select_cells(cells, indices, len(header))
        if isinstance(element, dict):
            label = element.get("label")
            if name == "mnli" and label in ("-", "-1"):
                dropped.append(line)
                continue
            if task.classes and label is not None and label not in task.classes:
                element = DataError(
                    f"label {label!r} is none of {', '.join(task.classes)}; correct the line"
                )
            else:
                index = row if numbering is None else cells[numbering]
                element = {**element, "index": index}
        elements.append(element)
        labels.append(line)
    notes = ()
    if dropped:
        examples = ", ".join(map(str, dropped[:_EXAMPLES]))
        notes = (
            f"{path}: {len(dropped)} lines without an agreed label were left out (line {examples})",
        )
    return _require_rows(AnnotationRows(path, elements, labels=labels, notes=notes))


def glue_set(name: str) -> GlueSet:
    """Look up a GLUE task."""
    if name not in GLUE:
        raise DataError(f"{name!r} is not a task of GLUE; choose one of {', '.join(GLUE)}")
    return GLUE[name]


def on_disk(path: Path) -> bool:
    """Return whether a folder was written by `datasets.save_to_disk`."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def read_dataset(
    path: Path, columns: Mapping[str, str], split: str | None = None, glue: str | None = None
) -> AnnotationRows[Any]:
    """Read a `datasets.save_to_disk` folder with the names of classes; `val` also matches `validation`."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UnavailableError(
            f"{path} was written by the package datasets, which is not installed; install it (pip install datasets) "
            "or save the set as CSV"
        ) from None
    try:
        dataset: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read by datasets ({error}); save it again") from error
    if isinstance(dataset, Mapping):
        names = [split, {"val": "validation"}.get(str(split), split)]
        if glue == "mnli":
            base, _, variant = str(split).partition("_")
            names.append(f"{'validation' if base == 'val' else base}_{variant or 'matched'}")
        match = next((name for name in names if name in dataset), None)
        if match is None:
            raise DataError(f"{path} has no split {split!r}; choose one of {', '.join(dataset)}")
        dataset = dataset[match]
    classes = None
    if glue is not None:
        task, classes = _ON_DISK.get(glue, GLUE[glue]), GLUE[glue].classes
        label = "label" if "label" in dataset.column_names else task.label
        columns = {"text": task.text, "label": label, "index": "idx"}
        if task.text2:
            columns["text2"] = task.text2
    present = {field: name for field, name in columns.items() if name in dataset.column_names}
    if "text" not in present:
        existing = ", ".join(dataset.column_names)
        raise DataError(
            f"{path} has no column {columns['text']!r}, but {existing}; name the columns to read"
        )
    values = {field: list(dataset[column]) for field, column in present.items()}
    if "label" in values:
        names = classes or getattr(dataset.features[present["label"]], "names", None)
        # Test sets of the Hub hide labels as -1.
        if names is not None:
            values["label"] = [
                (names[label] if label >= 0 else None) if isinstance(label, int) else label
                for label in values["label"]
            ]
        elif glue is not None:
            values["label"] = [None if label == -1 else label for label in values["label"]]
    return _require_rows(AnnotationRows(path, Columns(values)))


def find_images(
    folder: Path, *, links: bool = True, suffixes: Sequence[str] = PICTURE_SUFFIXES
) -> Iterator[Path]:
    """Yield the images of a folder tree in order, without hidden files; `links` follows links to folders."""

    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename or folder), error)

    top = os.path.abspath(folder)
    for parent, folders, names in os.walk(top, followlinks=links, onerror=refuse):
        # In place, so that the walk goes on in this order.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(parent, name)


def caption_table(folder: Path) -> Path | None:
    """Return the caption table of an image folder; None if captions are in text files."""
    return next((folder / name for name in CAPTION_TABLES if (folder / name).is_file()), None)


def sidecar_captions(image: Path) -> list[tuple[int, str]] | None:
    """Read the captions in `a.txt` next to `a.jpg`: line numbers and lines; None if there is no such file."""
    path = image.with_suffix(".txt")
    if not path.exists():
        return None
    lines = read_text(path).splitlines()
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_caption_folder(folder: Path, *, bare: bool = False) -> AnnotationRows[Any]:
    """Read a tree of images with captions in `a.txt` next to `a.jpg`; `bare` includes images without captions."""
    elements, labels, left_out = [], [], []
    for image in find_images(folder):
        captions = sidecar_captions(image)
        if captions is None and not bare:
            left_out.append(image.name)
        elif captions:
            for number, caption in captions:
                elements.append({"image": str(image), "caption": caption})
                labels.append(f"{image.with_suffix('.txt').name}:{number}")
        else:
            empty = DataError(f"{image.with_suffix('.txt')} holds no caption; write one per line")
            elements.append({"image": str(image)} if captions is None else empty)
            labels.append(image.name)
    if not elements:
        raise DataError(
            f"{folder} holds no image with captions; write those of a.jpg to a.txt, one per line"
        )
    notes = ()
    if left_out:
        examples = ", ".join(left_out[:_EXAMPLES])
        notes = (f"{folder}: {len(left_out)} images without captions were left out ({examples})",)
    return AnnotationRows(folder, elements, labels=labels, notes=notes)


def resolve_images(folder: Path, rows: AnnotationRows[Any]) -> AnnotationRows[Any]:
    """Make the image paths of a folder's caption table absolute; one outside the folder becomes a `DataError`."""
    top, elements = os.path.abspath(folder), []
    for element in rows.elements:
        if isinstance(element, dict) and isinstance(image := element.get("image"), str):
            path = os.path.normpath(os.path.join(top, image))
            element = element | {"image": path}
            if not path.startswith(top + os.sep):
                element = DataError(
                    f"image {image} is outside of {folder}; move it there, or name the table as the data"
                )
        elements.append(element)
    rows.elements = elements
    return rows


def group_captions(rows: AnnotationRows[Any]) -> AnnotationRows[Any]:
    """Group captions by image, in first-seen order: `caption` becomes a list."""
    groups: dict[str, dict[str, Any]] = {}
    elements, labels = [], []
    for row, element in enumerate(rows.elements):
        if isinstance(element, dict) and isinstance(image := element.get("image"), str):
            element = dict(element)
            captions = element.pop("caption", None)
            if captions is not None and not isinstance(captions, list):
                captions = [captions]
            group = groups.setdefault(image, element)
            if captions:
                group.setdefault("caption", []).extend(captions)
            if group is not element:
                continue
        elements.append(element)
        labels.append(rows.label(row))
    rows.elements, rows.labels = elements, labels
    return rows


def read_class_folder(folder: Path) -> AnnotationRows[Any]:
    """Read a folder with one subfolder of images per class, sorted by name (torchvision's ImageFolder)."""
    classes: list[Path] = []
    with suppress(NotADirectoryError):
        classes = sorted(
            path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
    if not classes:
        raise DataError(f"{folder} holds no class folders; expected class/image.jpg in it")
    images: list[str] = []
    labels: list[str] = []
    for path in classes:
        count = len(images)
        images += map(str, find_images(path))
        if len(images) == count:
            raise DataError(
                f"class folder {path} holds no images ({', '.join(PICTURE_SUFFIXES)}); add some or remove the folder"
            )
        labels += [path.name] * (len(images) - count)
    return AnnotationRows(folder, Columns({"image": images, "label": labels}), labels=images)
