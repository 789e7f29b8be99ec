"""Reads CSV, TSV, line JSON, GLUE, image folders and `datasets` folders."""

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
    Elements,
    ImageLabelRecord,
    TextRecord,
    TextScoreRecord,
    as_rows,
)
from xfm_fast.data.files import Paths, check_plain, find_files, open_file, read_file, unreadable
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

_SHOWN = 3
# A cell of megabytes is an unclosed quotation mark.
_MOST_CELL = 1 << 22


class Columns(Sequence[dict[str, Any]]):
    """Column-wise storage of elements, to save memory."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
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
    """Texts or text pairs with classes or scores.

    Formats: CSV, TSV or line JSON with `text` and optionally `text2`, `label`, `index`; GLUE files or folders (`glue`
    names the task); folders of `datasets.save_to_disk`. `split` selects a file or split of a folder, including
    `val_mismatched` and `test_mismatched` of MNLI; `columns` maps fields to columns; `scores` reads labels as numbers.
    """
    classes = glue_set(glue).classes if glue is not None else None
    names = {name: name for name in ("text", "text2", "label", "index")} | dict(columns or {})
    optional = [name for name in ("text2", "label", "index") if name not in (columns or {})]
    found = []
    for path in find_files(paths, lambda folder: glue is not None or on_disk(folder)):
        if path.is_dir() and on_disk(path):
            found.append(read_dataset(path, names, split, glue))
        elif glue is not None:
            found.append(read_glue(path, glue, split))
        elif path.suffix.lower() in (*TABLE_SUFFIXES, *LINE_SUFFIXES):
            found.append(read_table(path, names, optional))
        else:
            raise DataError(
                f"{path} is no .csv, .tsv or .jsonl; convert it, or name the set of GLUE that it is of"
            )
    if scores or (glue is not None and classes is None):
        return as_rows(found, TextScoreRecord)
    return as_rows(found, TextRecord)


def image_rows(
    paths: Paths, *, columns: Mapping[str, str] | None = None
) -> list[AnnotationRows[ImageLabelRecord]]:
    """Images with classes: class folders, or CSV, TSV or line JSON with `image` and optionally `label`."""
    names = {"image": "image", "label": "label"} | dict(columns or {})
    found = []
    for path in find_files(paths, lambda _: True):
        if path.is_dir():
            found.append(read_class_folder(path))
        elif path.suffix.lower() in (*TABLE_SUFFIXES, *LINE_SUFFIXES):
            found.append(read_table(path, names, [] if "label" in (columns or {}) else ["label"]))
        else:
            raise DataError(
                f"{path} is no folder of class folders, .csv, .tsv or .jsonl; give one of these"
            )
    return as_rows(found, ImageLabelRecord)


def read_table(
    path: Path, columns: Mapping[str, str | Sequence[str]], optional: Sequence[str] = ()
) -> Elements:
    """Rows of a CSV or TSV file with a header, or of line JSON; the first existing column of each field is read."""
    if path.suffix.lower() in LINE_SUFFIXES:
        found = read_lines(path)
        values = [
            {field: value[column] for field, column in _present(value, columns).items()}
            if isinstance(value, dict)
            else value
            for value in found.values
        ]
        return found._replace(values=values)
    lines = _cells(path)
    _, header = next(lines, (0, []))
    places = {field: header.index(column) for field, column in _present(header, columns).items()}
    if absent := [field for field in columns if field not in places and field not in optional]:
        lacking = [columns[field] for field in absent]
        lacking = [names if isinstance(names, str) else names[0] for names in lacking]
        raise DataError(
            f"{path} has no column {', '.join(map(repr, lacking))}, but {', '.join(map(repr, header)) or 'no header'}; "
            f"rename one, or name it: task.columns.{absent[0]}=..."
        )
    values, labels = [], []
    for line, cells in lines:
        labels.append(line)
        values.append(_chosen(cells, places, len(header)))
    return _require_rows(Elements(str(path), values, labels))


def _present(names: Collection[str], columns: Mapping[str, str | Sequence[str]]) -> dict[str, str]:
    """Column of each field, matched exactly or in lower case."""
    known = {name.strip().lower(): name for name in reversed([*names])}
    found: dict[str, str] = {}
    for field, options in columns.items():
        for option in (options,) if isinstance(options, str) else options:
            if (name := option if option in names else known.get(option)) is not None:
                found.setdefault(field, name)
    return found


def _chosen(
    cells: Sequence[str], places: Mapping[str, int], width: int
) -> dict[str, str] | DataError:
    if len(cells) != width:
        return DataError(
            f"the line has {len(cells)} columns and the header {width}; check its separators and quotes"
        )
    return {field: cells[place] for field, place in places.items()}


def _require_rows(elements: Elements) -> Elements:
    if not len(elements.values):
        raise DataError(f"{elements.name} holds no elements; give at least one")
    return elements


def _cells(path: Path, *, quotes: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each non-blank row of a CSV or TSV file."""
    previous = csv.field_size_limit(_MOST_CELL)
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
            f"{path} is no table ({error}); check for an unclosed quotation mark"
        ) from None
    finally:
        csv.field_size_limit(previous)


def read_lines(path: Path) -> Elements:
    """Read line JSON; a line that is not an object becomes a `DataError` element."""
    data = read_file(path)
    check_plain(path, data[:16])
    values, labels = [], []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            labels.append(number)
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                values.append(
                    DataError(
                        f"the line is no JSON ({error}); expected one object a line, such as {{...}}"
                    )
                )
    if values and all(isinstance(value, DataError) for value in values):
        raise DataError(
            f"{path}: none of {len(values)} lines can be read; of the first: {values[0]}"
        )
    return _require_rows(Elements(str(path), values, labels))


def read_glue(path: Path, name: str, split: str | None = None) -> Elements:
    """Read an official GLUE file, or the split's file in a folder; MNLI lines labelled `-` are dropped and counted."""
    form = glue_set(name)
    if path.is_dir():
        files = _MNLI_FILES if name == "mnli" else _SPLIT_FILES
        if split not in files:
            raise DataError(
                f"split {split!r} of {name} is unknown; choose one of {', '.join(files)}"
            )
        path = path / files[split]
    # Quotation marks are text there, and often unpaired.
    lines = _cells(path, quotes=False)
    first = next(lines, (0, []))
    header = first[1]
    if name == "cola" and len(header) == 4:
        header = ["source", form.label, "mark", form.text]
        rows = [first, *lines]
    else:
        rows = list(lines)
    wanted = {"text": form.text, "text2": form.text2, "label": form.label}
    places = {field: header.index(column) for field, column in wanted.items() if column in header}
    if absent := [
        column
        for field, column in wanted.items()
        if column and field != "label" and field not in places
    ]:
        raise DataError(
            f"{path} has no column {', '.join(map(repr, absent))} of {name}, but {', '.join(map(repr, header))}; "
            "give the files of the official zip, and the set that they are of"
        )
    number = next((header.index(column) for column in ("index", "id") if column in header), None)
    values, labels, dropped = [], [], []
    for row, (line, cells) in enumerate(rows):
        value = _chosen(cells, places, len(header))
        if isinstance(value, dict):
            if name == "mnli" and value.get("label") in ("-", "-1"):
                dropped.append(line)
                continue
            label, index = value.get("label"), row if number is None else cells[number]
            known = not form.classes or label is None or label in form.classes
            message = (
                f"label {label!r} is none of {', '.join(form.classes or ())}; correct the line"
            )
            value = {**value, "index": index} if known else DataError(message)
        values.append(value)
        labels.append(line)
    notes = ()
    if dropped:
        shown = ", ".join(map(str, dropped[:_SHOWN]))
        notes = (
            f"{path}: {len(dropped)} lines without an agreed label were left out (line {shown})",
        )
    return _require_rows(Elements(str(path), values, labels, notes))


def glue_set(name: str) -> GlueSet:
    """A GLUE task by name."""
    if name not in GLUE:
        raise DataError(
            f"{name!r} is no set of GLUE that is known; choose one of {', '.join(GLUE)}"
        )
    return GLUE[name]


def on_disk(path: Path) -> bool:
    """True for a folder written by `datasets.save_to_disk`."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def read_dataset(
    path: Path, columns: Mapping[str, str], split: str | None = None, glue: str | None = None
) -> Elements:
    """Rows of a `datasets.save_to_disk` folder, class ids replaced by names; `val` also matches `validation`."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UnavailableError(
            f"{path} was written by the package datasets, which is not installed; install it (pip install datasets) "
            "or save the set as CSV"
        ) from None
    try:
        found: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read by datasets ({error}); save it again") from error
    if isinstance(found, Mapping):
        names = [split, {"val": "validation"}.get(str(split), split)]
        if glue == "mnli":
            kind, _, which = str(split).partition("_")
            names.append(f"{'validation' if kind == 'val' else kind}_{which or 'matched'}")
        chosen = next((name for name in names if name in found), None)
        if chosen is None:
            raise DataError(f"{path} has no split {split!r}; choose one of {', '.join(found)}")
        found = found[chosen]
    classes = None
    if glue is not None:
        form, classes = _ON_DISK.get(glue, GLUE[glue]), GLUE[glue].classes
        label = "label" if "label" in found.column_names else form.label
        columns = {"text": form.text, "label": label, "index": "idx"} | (
            {"text2": form.text2} if form.text2 else {}
        )
    present = {field: column for field, column in columns.items() if column in found.column_names}
    if "text" not in present:
        raise DataError(
            f"{path} has no column {columns['text']!r}, but {', '.join(found.column_names)}; name the columns to read"
        )
    values = {field: list(found[column]) for field, column in present.items()}
    if "label" in values:
        names = classes or getattr(found.features[present["label"]], "names", None)
        # Test sets of the Hub have the label -1 if it is hidden.
        if names is not None:
            values["label"] = [
                (names[label] if label >= 0 else None) if isinstance(label, int) else label
                for label in values["label"]
            ]
        elif glue is not None:
            values["label"] = [None if label == -1 else label for label in values["label"]]
    return _require_rows(Elements(str(path), Columns(values)))


def find_images(folder: Path, *, links: bool = True) -> list[Path]:
    """Sorted images in a folder tree, without hidden files; `links` follows links to folders."""
    return [*_walk_images(folder, links=links)]


def _walk_images(folder: Path, *, links: bool) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename or folder), error)

    for place, folders, names in os.walk(
        os.path.abspath(folder), followlinks=links, onerror=refuse
    ):
        # In place, so that the walk goes on in this order.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES:
                yield Path(place, name)


def has_images(folder: Path) -> bool:
    """True if a folder tree contains an image."""
    return next(_walk_images(folder, links=True), None) is not None


def caption_table(folder: Path) -> Path | None:
    """Caption table of an image folder; None if captions are in text files."""
    return next((folder / name for name in CAPTION_TABLES if (folder / name).is_file()), None)


def sidecar_captions(image: Path) -> list[tuple[int, str]] | None:
    """Captions in `a.txt` next to `a.jpg`, one per line, with line numbers; None if there is no such file."""
    path = image.with_suffix(".txt")
    if not path.exists():
        return None
    try:
        lines = read_file(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it") from None
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_caption_folder(folder: Path, *, bare: bool = False) -> Elements:
    """Folder tree of images with captions in `a.txt` next to `a.jpg`; `bare` includes images without captions."""
    values, labels, left_out = [], [], []
    for image in find_images(folder):
        captions = sidecar_captions(image)
        if captions is None:
            if bare:
                values.append({"image": str(image)})
                labels.append(image.name)
            else:
                left_out.append(image.name)
            continue
        if not captions:
            values.append(
                DataError(f"{image.with_suffix('.txt')} holds no caption; write one a line")
            )
            labels.append(image.name)
        for number, caption in captions:
            values.append({"image": str(image), "caption": caption})
            labels.append(f"{image.with_suffix('.txt').name}:{number}")
    if not values:
        raise DataError(
            f"{folder} holds no image with captions; write those of a.jpg to a.txt, one per line"
        )
    notes = ()
    if left_out:
        notes = (
            f"{folder}: {len(left_out)} images without captions were left out ({', '.join(left_out[:_SHOWN])})",
        )
    return Elements(str(folder), values, labels, notes)


def resolve_images(folder: Path, elements: Elements) -> Elements:
    """Image paths of the caption table of a folder, made absolute; one outside of the folder becomes a `DataError`."""
    top, values = os.path.abspath(folder), []
    for value in elements.values:
        if isinstance(value, dict) and isinstance(image := value.get("image"), str):
            path = os.path.normpath(os.path.join(top, image))
            value = value | {"image": path}
            if not path.startswith(top + os.sep):
                value = DataError(
                    f"image {image} is outside of {folder}; move it there, or name the table as the data"
                )
        values.append(value)
    return elements._replace(values=values)


def group_captions(elements: Elements) -> Elements:
    """Group captions by image, in first-seen order: `caption` becomes a list."""
    first: dict[str, dict[str, Any]] = {}
    values, labels = [], []
    for number, value in enumerate(elements.values):
        image = value.get("image") if isinstance(value, dict) else None
        caption = value.get("caption") if isinstance(value, dict) else None
        captions = caption if isinstance(caption, list) else [] if caption is None else [caption]
        if isinstance(image, str) and image in first:
            first[image].setdefault("caption", []).extend(captions)
            continue
        if isinstance(image, str):
            value = first[image] = {name: each for name, each in value.items() if name != "caption"}
            if captions:
                value["caption"] = [*captions]
        values.append(value)
        labels.append(f"element {number}" if elements.labels is None else elements.labels[number])
    return elements._replace(values=values, labels=labels)


def read_class_folder(folder: Path) -> Elements:
    """Folder with one subfolder of images per class, sorted by name (torchvision's ImageFolder)."""
    classes: list[Path] = []
    with suppress(NotADirectoryError):
        classes = sorted(
            each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")
        )
    if not classes:
        raise DataError(f"{folder} holds no class folders; expected class/image.jpg in it")
    images: list[str] = []
    labels: list[str] = []
    for each in classes:
        found = find_images(each)
        if not found:
            raise DataError(
                f"class folder {each} holds no images ({', '.join(PICTURE_SUFFIXES)}); add some or remove the folder"
            )
        images += map(str, found)
        labels += [each.name] * len(found)
    return Elements(str(folder), Columns({"image": images, "label": labels}), images)
