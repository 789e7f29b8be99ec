"""Image collections: folders, lists of paths (CSV, JSON, line JSON), shards and lines with embedded images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from xfm_fast.data.caption_files import captioning_test_rows, has_embedded_images
from xfm_fast.data.images import decode_image, image_source, image_values
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.records import RecordSet, open_records
from xfm_fast.data.tables import LINE_SUFFIXES, PICTURE_SUFFIXES, TABLE_SUFFIXES, caption_table, sidecar_captions
from xfm_fast.errors import DataError

_IMAGES = ImageOptions()


@dataclass(frozen=True)
class Entry:
    """An image of a collection."""

    name: str  # unique in the collection: a path below its folder, or `FILE#ROW`
    size: int  # file size in bytes; -1 for embedded images
    modified: int  # modification time of the file in nanoseconds
    row: int | None = None  # row number of an embedded image
    captions: tuple[str, ...] = ()  # empty for embedded images until they are loaded

    @property
    def caption(self) -> str | None:
        """First caption."""
        return self.captions[0] if self.captions else None

    @property
    def version(self) -> tuple[str, int, int, int | None]:
        """Key that changes with the image."""
        return self.name, self.size, self.modified, self.row


class Listing(NamedTuple):
    """Images by name, and errors of broken rows."""

    entries: list[Entry]
    faults: dict[str, str]


class Collection(Protocol):
    """Images that can be listed and loaded."""

    def listing(self) -> Listing:
        """All images, in order of names or rows."""
        ...

    def load(self, entry: Entry) -> tuple[Image.Image, tuple[str, ...]]:
        """RGB image and its captions; thread-safe, a broken image raises `DataError`."""
        ...

    def location(self, entry: Entry) -> str:
        """Path of an image, or its name if embedded."""
        ...


def open_collection(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> Collection:
    """Open a folder tree of images, or a file that lists or embeds images.

    Args:
        path: a folder, with captions in `a.txt` next to `a.jpg` or in a `captions.csv` (`.tsv`, `.jsonl`, `.json`); a
            CSV, TSV, JSON or JSON-lines file with `image` and optionally `caption`; JSON lines with `binary` (base64)
            and `desc`; a WebDataset shard, or a folder of shards.
        images: folder of the paths in a list; by default that of the file.

    Raises:
        DataError: the path does not exist or has no images.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        # A folder may hold shards. Data files next to images describe the images.
        shards = sorted(path.glob("*.tar"))
        return Records(path, open_records(shards)) if shards and not _files(path) else Folder(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of images, or a file that lists or holds some")
    suffix = path.suffix.lower()
    if ".tar" in path.suffixes:
        return Records(path, open_records(path))
    if has_embedded_images(path):
        return Records(path, open_records(path))
    if suffix in (*TABLE_SUFFIXES, *LINE_SUFFIXES, ".json"):
        return Table(path, path.parent if images is None else Path(images).expanduser())
    kinds = ", ".join((*TABLE_SUFFIXES, *LINE_SUFFIXES, ".json", ".tar"))
    raise DataError(f"{path} is neither a folder of images nor a file of one of {kinds}; give one of these")


class Folder:
    """Images in a folder tree, with captions in text files or a table; hidden files are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def listing(self) -> Listing:
        names = _files(self.path)
        if not names:
            raise DataError(f"{self.path} holds no images ({', '.join(PICTURE_SUFFIXES)}), nor do folders below it")
        table = caption_table(self.path)
        if table is not None:
            listed, faults = Table(table, self.path).listing()
            by_name: dict[str, tuple[str, ...]] = {}
            for entry in listed:
                name = os.path.normpath(entry.name)
                by_name[name] = by_name.get(name, ()) + entry.captions
            faults |= {
                name: f"image {self.path / name} does not exist; correct {table.name}"
                for name in by_name.keys() - map(os.path.normpath, names)
            }
            return Listing(
                [_entry(name, self.path / name, by_name.get(os.path.normpath(name), ())) for name in names], faults
            )
        entries, faults = [], {}
        for name in names:
            captions: Iterable[tuple[int, str]] = ()
            try:
                captions = sidecar_captions(self.path / name) or ()
            except DataError as error:
                faults[str(Path(name).with_suffix(".txt"))] = str(error)
            entries.append(_entry(name, self.path / name, tuple(caption for _, caption in captions)))
        return Listing(entries, faults)

    def load(self, entry: Entry) -> tuple[Image.Image, tuple[str, ...]]:
        return decode_image(self.path / entry.name), entry.captions

    def location(self, entry: Entry) -> str:
        return str(self.path / entry.name)


class Table:
    """Images listed by path in a file, each once, with all captions."""

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self.images = path, images

    def listing(self) -> Listing:
        entries: dict[str, Entry] = {}
        faults: dict[str, str] = {}
        for rows in captioning_test_rows(self.path, split="all"):
            for row in range(len(rows)):
                try:
                    record = rows.read(row)
                except DataError as error:
                    faults[f"{self.path.name}#{rows.label(row)}"] = str(error)
                    continue
                entries.setdefault(record.image, _entry(record.image, self.images / record.image, record.caption or ()))
        return Listing([*entries.values()], faults)

    def load(self, entry: Entry) -> tuple[Image.Image, tuple[str, ...]]:
        return decode_image(self.images / entry.name), entry.captions

    def location(self, entry: Entry) -> str:
        return str(self.images / entry.name)


class Records:
    """Images embedded in shards or lines; a changed file invalidates all its images."""

    def __init__(self, path: Path, records: RecordSet) -> None:
        self.path, self.records = path, records

    def listing(self) -> Listing:
        entries = []
        number = 0
        for rows in self.records.files:
            size = os.stat(rows.name).st_size
            for row in range(len(rows)):
                name = f"{Path(rows.name).name}#{rows.label(row)}"
                entries.append(Entry(name, size, rows.modified, number))
                number += 1
        return Listing(entries, {})

    def load(self, entry: Entry) -> tuple[Image.Image, tuple[str, ...]]:
        assert entry.row is not None
        if entry.row >= len(self.records):
            raise DataError(f"{entry.name} is no longer there; index the collection again")
        rows, row = self.records.locate(entry.row)
        record = rows.read(row)
        image = decode_image(image_source(image_values(record, _IMAGES)[0], _IMAGES), entry.name)
        return image, _texts(record.get("desc", record.get("caption")))

    def location(self, entry: Entry) -> str:
        return entry.name


def _files(folder: Path) -> list[str]:
    """Sorted relative POSIX paths of images in a folder tree."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        below = Path(parent).relative_to(folder)
        for name in files:
            if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("."):
                found.append((below / name).as_posix())
    return sorted(found)


def _entry(name: str, path: Path, captions: tuple[str, ...]) -> Entry:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return Entry(name, -1, -1, captions=captions)
    return Entry(name, status.st_size, status.st_mtime_ns, captions=captions)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))
