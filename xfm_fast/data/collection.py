"""Images with captions and texts: collections, and the rows of retrieval and captioning.

Formats are folders, lists of paths (CSV, JSON, line JSON), files with embedded images, official
arrays, Karpathy splits and COCO. Any mix of them is one reader. Elements are validated when read,
so that broken ones can be skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from xfm_fast.data.annotations import (
    ARRAY,
    AnnotationRows,
    CaptioningRecord,
    CaptioningTestRecord,
    RetrievalRecord,
    RetrievalTestRecord,
    array_of,
    as_rows,
    identity_of,
)
from xfm_fast.data.files import Paths, find_files, read_json, read_text
from xfm_fast.data.images import decode_image, image_source, image_values
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.records import (
    RecordSet,
    ShardFile,
    find_reader,
    first_object,
    has_shards,
    open_records,
)
from xfm_fast.data.tables import (
    LINE_SUFFIXES,
    PAIR_COLUMNS,
    PICTURE_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    caption_table,
    find_images,
    group_captions,
    match_columns,
    read_caption_folder,
    read_table,
    resolve_images,
    sidecar_captions,
    table_rows,
)
from xfm_fast.errors import DataError, explain_types

Modality = Literal["text", "image"]

_IMAGES = ImageOptions()
_MOST_TEXT_BYTES = 64 << 20
# Characters of a value to filter by; longer columns are prose.
_MOST_FIELD = 256


@dataclass(frozen=True)
class Entry:
    """An image or a text of a collection."""

    name: str  # unique in the collection: a path below its folder, or `FILE#ROW`
    size: int  # bytes of the file or text; -1 if it is missing
    modified: int  # modification time of the file in nanoseconds; digest of a text in a table
    row: int | None = None  # row number of an embedded image
    captions: tuple[str, ...] = ()  # of a text: itself; read with it where files hold it
    fields: Mapping[str, str] = field(default_factory=dict)  # other columns of its table
    passage: int = 0  # number of a passage of a text file, from 1; 0 is the whole

    @property
    def caption(self) -> str | None:
        """The first caption."""
        return self.captions[0] if self.captions else None


class Listing(NamedTuple):
    """Entries by name, and errors of broken rows."""

    entries: list[Entry]
    faults: dict[str, str]


@explain_types
def open_collection(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    column: str | None = None,
    modalities: Sequence[Modality] = ("image",),
) -> Collection:
    """Open a folder tree of images or texts, or a file that lists or embeds images, or lists texts.

    Args:
        path: a folder, with captions in `a.txt` next to `a.jpg` or in a `captions.csv` (`.tsv`,
            `.jsonl`, `.json`); a CSV, TSV, JSON or JSON-lines file with `image` and optionally
            `caption`; JSON lines with `binary` (base64) and `desc`; a WebDataset shard, or a folder
            of shards. Of texts: a folder of `.txt` and `.md` files or one of them; a CSV, TSV or
            JSON-lines file.
        images: folder of the paths in a list; by default that of the file.
        column: the column of a table that holds texts; by default `text`, `caption` or `title`, in
            a table without images.
        modalities: what is wanted; where a collection holds images and texts, images come first.

    Raises:
        DataError: the path does not exist or holds nothing of the modalities.
    """
    path = Path(path).expanduser()
    wants_images, wants_texts = "image" in modalities, "text" in modalities
    if path.is_dir():
        has_images = next(find_images(path, links=False), None) is not None
        if not has_images and wants_images and (shards := sorted(path.glob("*.tar"))):
            return EmbeddedImages(open_records(shards))
        if wants_images and (has_images or not wants_texts):
            return ImageFiles(path, path)
        return TextFiles(path)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; give a folder of images or texts, or a file that lists or embeds them"
        )
    suffix = path.suffix.lower()
    is_table = suffix in (*TABLE_SUFFIXES, *LINE_SUFFIXES)
    if column is None and wants_images and has_embedded_images(path):
        return EmbeddedImages(open_records(path))
    if is_table and wants_texts:
        matches = match_columns(_columns(path), PAIR_COLUMNS)
        if column is not None or not wants_images or "image" not in matches:
            return TextTable(path, column or matches.get("caption"))
    if suffix in TEXT_SUFFIXES and wants_texts:
        return TextFiles(path)
    if wants_images and (is_table or suffix == ".json"):
        return ImageFiles(path, path.parent if images is None else Path(images).expanduser())
    suffixes = list[str](TEXT_SUFFIXES) if wants_texts else []
    suffixes += [*TABLE_SUFFIXES, *LINE_SUFFIXES, *([".json", ".tar"] if wants_images else [])]
    wanted = " or ".join({"image": "images", "text": "texts"}[name] for name in modalities)
    raise DataError(
        f"{path} is neither a folder of {wanted} nor one of {', '.join(suffixes)}; give one of these"
    )


class Collection(ABC):
    """Images or texts that can be listed and loaded.

    Attributes:
        modality: what it holds.
        lists_captions: whether the listing reads captions, or only loading does.
    """

    modality: Modality = "image"
    lists_captions = True

    @abstractmethod
    def walk(self, faults: dict[str, str]) -> Iterator[Entry]:
        """Yield all entries, in order of names or rows, and add broken rows to `faults`."""

    def listing(self) -> Listing:
        """List all entries."""
        faults: dict[str, str] = {}
        return Listing([*self.walk(faults)], faults)

    @abstractmethod
    def load(self, entry: Entry, side: int | None = None) -> tuple[Any, tuple[str, ...]]:
        """Read an image as RGB, see `decode_image`, or a text, and its captions; thread-safe, may raise `DataError`."""

    def location(self, entry: Entry) -> str:
        """Return the path of an entry, or its name if a file embeds it."""
        return entry.name


class ImageFiles(Collection):
    """Images in a folder tree, with captions in text files or a table, or images that a file lists by path."""

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self.images = path, images

    def walk(self, faults: dict[str, str]) -> Iterator[Entry]:
        if not self.path.is_dir():
            yield from self._read_table(self.path, faults)
            return
        rows: dict[str, Entry] = {}
        table = caption_table(self.path)
        for entry in [] if table is None else self._read_table(table, faults):
            name = os.path.normpath(entry.name)
            first = rows.get(name, replace(entry, captions=()))
            rows[name] = replace(first, captions=first.captions + entry.captions)
        for name in _file_names(self.path, PICTURE_SUFFIXES, "images"):
            lines: Iterable[tuple[int, str]] | None = None
            try:
                lines = sidecar_captions(self.path / name) if table is None else None
            except DataError as error:
                faults[str(Path(name).with_suffix(".txt"))] = str(error)
            entry = _stamp(self.images, name, (caption for _, caption in lines or ()))
            row = rows.pop(name, entry)
            yield replace(entry, captions=row.captions, fields=row.fields)
        for name in rows:
            faults[name] = f"image {self.path / name} does not exist; correct {table}"

    def _read_table(self, path: Path, faults: dict[str, str]) -> Iterable[Entry]:
        """List the images of a file, each once, with all captions."""
        entries: dict[str, Entry] = {}
        fields: dict[str, Mapping[str, str]] = {}
        if path.suffix.lower() in (*TABLE_SUFFIXES, *LINE_SUFFIXES):
            for _, row in table_rows(path):
                if isinstance(row, dict):
                    columns = match_columns(row, PAIR_COLUMNS)
                    name = str(row.get(columns.get("image", "")))
                    fields.setdefault(name, _fields(row, columns.values()))
        for rows in captioning_test_rows(path, split="all"):
            for row in range(len(rows)):
                try:
                    record = rows.read(row)
                except DataError as error:
                    faults[f"{path.name}#{rows.label(row)}"] = str(error)
                    continue
                if record.image not in entries:
                    captions, values = record.caption or (), fields.get(record.image, {})
                    entries[record.image] = _stamp(self.images, record.image, captions, values)
        return entries.values()

    def load(self, entry: Entry, side: int | None = None) -> tuple[Image.Image, tuple[str, ...]]:
        return decode_image(self.images / entry.name, side=side), entry.captions

    def location(self, entry: Entry) -> str:
        return str(self.images / entry.name)


class EmbeddedImages(Collection):
    """Images embedded in shards or lines; a changed file invalidates all its images."""

    lists_captions = False

    def __init__(self, records: RecordSet) -> None:
        self.records = records

    def walk(self, faults: dict[str, str]) -> Iterator[Entry]:
        index = 0
        for rows in self.records.files:
            size = os.stat(rows.name).st_size
            for row in range(len(rows)):
                name = f"{Path(rows.name).name}#{rows.label(row)}"
                yield Entry(name, size, rows.modified, index)
                index += 1

    def load(self, entry: Entry, side: int | None = None) -> tuple[Image.Image, tuple[str, ...]]:
        assert entry.row is not None
        if entry.row >= len(self.records):
            raise DataError(f"{entry.name} no longer exists; index the collection again")
        rows, row = self.records.locate(entry.row)
        record = rows.read(row)
        content = image_source(image_values(record, _IMAGES)[0], _IMAGES)
        image = decode_image(content, entry.name, side=side)
        captions = [caption for caption in _captions_of(record) if isinstance(caption, str)]
        return image, tuple(captions)


class TextFiles(Collection):
    """Text files in a folder tree, or one of them."""

    modality = "text"
    lists_captions = False

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path if path.is_dir() else path.parent

    def walk(self, faults: dict[str, str]) -> Iterator[Entry]:
        names = [self.path.name]
        if self.path.is_dir():
            names = _file_names(self.path, TEXT_SUFFIXES, "texts")
        for name in names:
            yield _stamp(self.folder, name)

    def load(self, entry: Entry, side: int | None = None) -> tuple[str, tuple[str, ...]]:
        path = self.folder / entry.name
        text = read_text(path, _MOST_TEXT_BYTES)
        if not text.strip():
            raise DataError(f"{path} holds no text; write some or remove it")
        return text, (text,)


class TextTable(Collection):
    """Texts in a column of a CSV, TSV or line-JSON file."""

    modality = "text"

    def __init__(self, path: Path, column: str | None) -> None:
        columns = _columns(path)
        if column not in columns:
            existing = ", ".join(map(repr, columns)) or "no columns"
            problem = "name the column of texts" if column is None else f"it has no {column!r}"
            raise DataError(f"{path}: {problem} (--column); it has {existing}")
        self.path, self.column = path, column

    def walk(self, faults: dict[str, str]) -> Iterator[Entry]:
        for line, row in table_rows(self.path):
            name = f"{self.path.name}#{line}"
            text = row.get(self.column) if isinstance(row, dict) else None
            if isinstance(row, dict) and isinstance(text, str) and _is_prose(text):
                digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
                fields = _fields(row, [self.column])
                stamp = int.from_bytes(digest, "big")
                yield Entry(name, len(text.encode()), stamp, captions=(text,), fields=fields)
            else:
                fault = row if isinstance(row, DataError) else f"{self.column} holds no text"
                faults[name] = str(fault)

    def load(self, entry: Entry, side: int | None = None) -> tuple[str, tuple[str, ...]]:
        return entry.captions[0], entry.captions


def _file_names(folder: Path, suffixes: Sequence[str], content: str) -> Iterator[str]:
    """Yield the relative POSIX paths of the files in a folder tree; raises `DataError` if there are none."""
    top, name = Path(os.path.abspath(folder)), None
    for path in find_images(top, links=False, suffixes=suffixes):
        name = path.relative_to(top).as_posix()
        yield name
    if name is None:
        raise DataError(
            f"{folder} holds no {content} ({', '.join(suffixes)}), nor do folders below it"
        )


def _stamp(
    folder: Path, name: str, captions: Iterable[str] = (), fields: Mapping[str, str] | None = None
) -> Entry:
    """Make the entry of a file, with its size and modification time."""
    try:
        status = (folder / name).stat()
        size, modified = status.st_size, status.st_mtime_ns
    except (OSError, ValueError):
        size = modified = -1
    return Entry(name, size, modified, captions=tuple(captions), fields=fields or {})


def _is_prose(text: str) -> bool:
    """Return whether a text is not blank, and holds no half of a surrogate pair."""
    return bool(text.strip()) and not re.search("[\ud800-\udfff]", text)


def _columns(path: Path) -> list[str]:
    """Return the columns of the first row of a table."""
    rows = (row for _, row in table_rows(path) if isinstance(row, dict))
    return [*next(rows, {})]


def _fields(row: Mapping[str, Any], left_out: Container[str]) -> dict[str, str]:
    """Return the short values of the other columns as texts."""
    texts = {}
    for column, value in row.items():
        text = value if isinstance(value, str) else json.dumps(value)
        if column not in left_out and value is not None and 0 < len(text) <= _MOST_FIELD:
            texts[column] = text
    return texts


def retrieval_rows(
    paths: Paths, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> list[AnnotationRows[RetrievalRecord]]:
    """Read image-caption pairs for training.

    Formats: official JSON, Karpathy's `dataset_*.json`, CSV, TSV or line JSON with `image` and
    `caption`, image folders with `a.txt` next to `a.jpg` or with `captions.csv`, WebDataset shards,
    line JSON with embedded images. `split` selects a Karpathy split (`train` includes `restval`);
    `columns` maps fields to table columns.
    """
    # The full path: images in two folders may share a name, and captions are grouped by image.
    return as_rows(_captions(paths, split, columns, identity=str), RetrievalRecord)


def retrieval_test_rows(
    paths: Paths, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> list[AnnotationRows[RetrievalTestRecord]]:
    """Read images with all their captions, in first-seen order; arguments as in `retrieval_rows`."""
    return as_rows(map(group_captions, _captions(paths, split, columns)), RetrievalTestRecord)


def captioning_rows(
    paths: Paths, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> list[AnnotationRows[CaptioningRecord]]:
    """Read image-caption pairs; formats of `retrieval_rows` and COCO captions."""
    return as_rows(_captions(paths, split, columns), CaptioningRecord)


def captioning_test_rows(
    paths: Paths, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> list[AnnotationRows[CaptioningTestRecord]]:
    """Read each image once, with all captions that are known; also accepts a folder of images without captions."""
    files = _captions(paths, split, columns, bare=True)
    return as_rows(map(group_captions, files), CaptioningTestRecord)


def _captions(
    paths: Paths,
    split: str | None,
    columns: Mapping[str, str] | None,
    *,
    identity: Callable[[str], int | str] = identity_of,
    bare: bool = False,
) -> Iterator[AnnotationRows[Any]]:
    """Read retrieval and captioning files, unvalidated; `bare` includes images without captions."""
    for path in find_files(paths, is_dataset_folder):
        suffix = path.suffix.lower()
        if path.is_dir() and (table := caption_table(path)) is not None:
            tables = _captions(table, split, columns, identity=identity, bare=bare)
            files = [resolve_images(path, rows) for rows in tables]
        elif path.is_dir() and not has_shards(path):
            files = [read_caption_folder(path, bare=bare)]
        elif path.is_dir() or has_embedded_images(path):
            yield from map(embedded_rows, sorted(path.glob("*.tar")) if path.is_dir() else [path])
            continue
        elif suffix in (*TABLE_SUFFIXES, *LINE_SUFFIXES):
            names = PAIR_COLUMNS | dict(columns or {})
            files = [read_table(path, names, ["caption"] if bare else [])]
        else:
            yield _array_rows(path, split)
            continue
        for rows in files:
            rows.elements = [
                {"image_id": identity(element["image"]), **element}
                if isinstance(element, dict) and isinstance(element.get("image"), str)
                else element
                for element in rows.elements
            ]
            yield rows


def is_dataset_folder(folder: Path) -> bool:
    """Return whether a folder is one dataset: images, a table of them, or shards."""
    return caption_table(folder) is not None or has_shards(folder) or any(find_images(folder))


def has_embedded_images(path: Path) -> bool:
    """Return whether a file embeds its images: a shard, line JSON with base64, or a format added to `READERS`."""
    if path.suffix.lower() in LINE_SUFFIXES and _IMAGES.image_key in first_object(path):
        return True
    return find_reader(path) not in ("lines", "pairs", None)


def embedded_rows(path: Path) -> AnnotationRows[Any]:
    """List the images in a shard or line JSON as `FILE#ROW` (see `image_at`), with their captions."""
    (rows,) = open_records(path).files
    elements: list[Any] = []
    labels: list[int | str] = []
    for row in range(len(rows)):
        try:
            # `image_at` reads the content of an image.
            record = rows.read(row, images=False) if isinstance(rows, ShardFile) else rows.read(row)
        except DataError as error:
            elements.append(error)
            labels.append(rows.label(row))
            continue
        image = f"{path.absolute()}#{row}"
        for caption in _captions_of(record):
            element = {"image": image, "image_id": image}
            if caption is not None:
                element["caption"] = caption
            elements.append(element)
            labels.append(rows.label(row))
    return AnnotationRows(path, elements, labels=labels)


def _captions_of(record: Mapping[str, Any]) -> list[Any]:
    captions = record.get("desc", record.get("caption"))
    return captions if isinstance(captions, list) else [captions]


def _array_rows(path: Path, split: str | None) -> AnnotationRows[Any]:
    """Read the captions of a JSON file: an array, a Karpathy split or COCO."""
    content = read_json(path, f"{ARRAY}, or an object of Karpathy or COCO")
    images = content.get("images") if isinstance(content, dict) else None
    first = images[0] if isinstance(images, list) and images else None
    if isinstance(first, dict) and "sentences" in first:
        if split is None:
            raise DataError(f"{path} holds several splits; name one (train, val, test)")
        return karpathy_rows(path, content, split)
    if isinstance(first, dict) and "file_name" in first:
        return coco_rows(path, content)
    expected = (
        "an array of objects, Karpathy's {images: [{sentences}]}, or COCO's {images, annotations}"
    )
    return AnnotationRows(path, array_of(path, content, expected))


def karpathy_rows(path: Path, content: Mapping[str, Any], split: str) -> AnnotationRows[Any]:
    """Read the captions of a Karpathy split, one per row; `train` includes `restval`, `all` is every caption."""
    images = content["images"]
    splits = {"train", "restval"} if split == "train" else {split}
    elements, labels = [], []
    for index, image in enumerate(images):
        if not isinstance(image, dict):
            name = type(image).__name__
            elements.append(
                DataError(f"is a {name}; expected an object with filename and sentences")
            )
            labels.append(f"image {index}")
            continue
        if split != "all" and image.get("split") not in splits:
            continue
        name = "/".join(str(image[key]) for key in ("filepath", "filename") if image.get(key))
        identity = next((image[key] for key in ("cocoid", "imgid") if key in image), name)
        for order, sentence in enumerate(image.get("sentences") or [None]):
            caption = sentence.get("raw") if isinstance(sentence, dict) else sentence
            elements.append({"image": name, "caption": caption, "image_id": identity})
            labels.append(f"image {index}, sentence {order}")
    if not elements:
        existing = sorted({str(image.get("split")) for image in images if isinstance(image, dict)})
        raise DataError(f"{path} has no split {split!r}; choose one of {', '.join(existing)}")
    return AnnotationRows(path, elements, labels=labels)


def coco_rows(path: Path, content: Mapping[str, Any]) -> AnnotationRows[Any]:
    """Read the captions of a COCO file, one per row; test files have images only."""
    names: dict[int | str, str] = {}
    for image in content["images"]:
        if not isinstance(image, dict) or "file_name" not in image:
            continue
        if isinstance(identity := image.get("id"), (int, str)):
            names[identity] = str(image["file_name"])
    if "annotations" not in content:
        elements = [{"image": name, "image_id": identity} for identity, name in names.items()]
        return AnnotationRows(path, elements)
    elements: list[Any] = []
    for annotation in array_of(path, content["annotations"]):
        identity = annotation.get("image_id") if isinstance(annotation, dict) else None
        if isinstance(identity, (int, str)) and identity in names:
            caption = annotation.get("caption")
            element = {"image": names[identity], "caption": caption, "image_id": identity}
        else:
            element = DataError(
                f"image_id {identity!r} is none of the file's images; correct or remove it"
            )
        elements.append(element)
    labels = [f"annotation {index}" for index in range(len(elements))]
    return AnnotationRows(path, elements, labels=labels)
