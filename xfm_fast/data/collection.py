"""Image collections: folders, lists of paths (CSV, JSON, line JSON), and files with embedded images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from xfm_fast.data.caption_files import captioning_test_rows, has_embedded_images
from xfm_fast.data.images import decode_image, image_source, image_values
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.records import RecordSet, find_reader, open_records
from xfm_fast.data.tables import (
    LINE_SUFFIXES,
    PICTURE_SUFFIXES,
    TABLE_SUFFIXES,
    caption_table,
    find_images,
    sidecar_captions,
)
from xfm_fast.errors import DataError, explain_types

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


@explain_types
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
        return Records(open_records(shards)) if shards and not _names(path) else Files(path, path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of images, or a file that lists or holds some")
    kinds = (*TABLE_SUFFIXES, *LINE_SUFFIXES, ".json")
    if path.suffix.lower() in kinds and not has_embedded_images(path):
        return Files(path, path.parent if images is None else Path(images).expanduser())
    if path.suffix.lower() in LINE_SUFFIXES or find_reader(path) not in ("lines", "pairs", None):
        return Records(open_records(path))
    raise DataError(f"{path} is neither a folder of images nor a file of one of {', '.join(kinds)}, .tar; give these")


class Files:
    """Images in a folder tree, with captions in text files or a table, or images that a file lists by path."""

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self.images = path, images

    def listing(self) -> Listing:
        """All images, in order of names or rows."""
        if not self.path.is_dir():
            return self._table(self.path)
        names = _names(self.path)
        if not names:
            raise DataError(f"{self.path} holds no images ({', '.join(PICTURE_SUFFIXES)}), nor do folders below it")
        captions: dict[str, tuple[str, ...]] = {}
        faults: dict[str, str] = {}
        table = caption_table(self.path)
        if table is not None:
            entries, faults = self._table(table)
            for entry in entries:
                name = os.path.normpath(entry.name)
                captions[name] = captions.get(name, ()) + entry.captions
            for name in captions.keys() - set(names):
                faults[name] = f"image {self.path / name} does not exist; correct {table.name}"
        for name in names if table is None else ():
            try:
                captions[name] = tuple(caption for _, caption in sidecar_captions(self.path / name) or ())
            except DataError as error:
                faults[str(Path(name).with_suffix(".txt"))] = str(error)
        return Listing([self._entry(name, captions.get(name, ())) for name in names], faults)

    def _table(self, path: Path) -> Listing:
        """Images listed in a file, each once, with all captions."""
        entries: dict[str, Entry] = {}
        faults: dict[str, str] = {}
        for rows in captioning_test_rows(path, split="all"):
            for row in range(len(rows)):
                try:
                    record = rows.read(row)
                except DataError as error:
                    faults[f"{path.name}#{rows.label(row)}"] = str(error)
                else:
                    entries.setdefault(record.image, self._entry(record.image, record.caption or ()))
        return Listing([*entries.values()], faults)

    def _entry(self, name: str, captions: Iterable[str]) -> Entry:
        try:
            status = (self.images / name).stat()
        except (OSError, ValueError):
            return Entry(name, -1, -1, captions=tuple(captions))
        return Entry(name, status.st_size, status.st_mtime_ns, captions=tuple(captions))

    def load(self, entry: Entry) -> tuple[Image.Image, tuple[str, ...]]:
        """RGB image and its captions; thread-safe, a broken image raises `DataError`."""
        return decode_image(self.images / entry.name), entry.captions

    def location(self, entry: Entry) -> str:
        """Path of an image, or its name if embedded."""
        return str(self.images / entry.name)


class Records:
    """Images embedded in shards or lines; a changed file invalidates all its images."""

    def __init__(self, records: RecordSet) -> None:
        self.records = records

    def listing(self) -> Listing:
        entries = []
        for rows in self.records.files:
            size = os.stat(rows.name).st_size
            for row in range(len(rows)):
                name = f"{Path(rows.name).name}#{rows.label(row)}"
                entries.append(Entry(name, size, rows.modified, len(entries)))
        return Listing(entries, {})

    def load(self, entry: Entry) -> tuple[Image.Image, tuple[str, ...]]:
        assert entry.row is not None
        if entry.row >= len(self.records):
            raise DataError(f"{entry.name} is no longer there; index the collection again")
        rows, row = self.records.locate(entry.row)
        record = rows.read(row)
        image = decode_image(image_source(image_values(record, _IMAGES)[0], _IMAGES), entry.name)
        captions = record.get("desc", record.get("caption"))
        listed = captions if isinstance(captions, list) else [captions]
        return image, tuple(each for each in listed if isinstance(each, str))

    def location(self, entry: Entry) -> str:
        return entry.name


Collection = Files | Records
"""Images that can be listed and loaded."""


def _names(folder: Path) -> list[str]:
    """Sorted relative POSIX paths of images in a folder tree."""
    top = Path(os.path.abspath(folder))
    return sorted(path.relative_to(top).as_posix() for path in find_images(top, links=False))
