"""Images with captions: collections of images, and the rows of retrieval and captioning.

Formats are folders, lists of paths (CSV, JSON, line JSON), files with embedded images, official
arrays, Karpathy splits and COCO. Any mix of them is one reader. Elements are validated when read,
so that broken ones can be skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
from xfm_fast.data.files import Paths, find_files, read_json
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
    caption_table,
    find_images,
    group_captions,
    read_caption_folder,
    read_table,
    resolve_images,
    sidecar_captions,
)
from xfm_fast.errors import DataError, explain_types

_IMAGES = ImageOptions()


@dataclass(frozen=True)
class Entry:
    """An image of a collection."""

    name: str  # unique in the collection: a path below its folder, or `FILE#ROW`
    size: int  # bytes of the file; -1 if it is missing
    modified: int  # modification time of the file in nanoseconds
    row: int | None = None  # row number of an embedded image
    captions: tuple[str, ...] = ()  # empty for embedded images until they are loaded

    @property
    def caption(self) -> str | None:
        """The first caption."""
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
def open_collection(
    path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> Collection:
    """Open a folder tree of images, or a file that lists or embeds images.

    Args:
        path: a folder, with captions in `a.txt` next to `a.jpg` or in a `captions.csv` (`.tsv`,
            `.jsonl`, `.json`); a CSV, TSV, JSON or JSON-lines file with `image` and optionally
            `caption`; JSON lines with `binary` (base64) and `desc`; a WebDataset shard, or a folder
            of shards.
        images: folder of the paths in a list; by default that of the file.

    Raises:
        DataError: the path does not exist or has no images.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        # A folder may hold shards. Data files next to images describe the images.
        shards = sorted(path.glob("*.tar"))
        if shards and not _image_names(path):
            return EmbeddedImages(open_records(shards))
        return ImageFiles(path, path)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; give a folder of images, or a file that lists or embeds images"
        )
    if has_embedded_images(path):
        return EmbeddedImages(open_records(path))
    suffixes = (*TABLE_SUFFIXES, *LINE_SUFFIXES, ".json")
    if path.suffix.lower() in suffixes:
        return ImageFiles(path, path.parent if images is None else Path(images).expanduser())
    raise DataError(
        f"{path} is neither a folder of images nor one of {', '.join(suffixes)}, .tar; give one of these"
    )


class ImageFiles:
    """Images in a folder tree, with captions in text files or a table, or images that a file lists by path."""

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self.images = path, images

    def listing(self) -> Listing:
        """List all images, in order of names or rows."""
        if not self.path.is_dir():
            return self._read_table(self.path)
        names = _image_names(self.path)
        if not names:
            raise DataError(
                f"{self.path} holds no images ({', '.join(PICTURE_SUFFIXES)}), nor do folders below it"
            )
        captions: dict[str, tuple[str, ...]] = {}
        faults: dict[str, str] = {}
        table = caption_table(self.path)
        if table is None:
            for name in names:
                try:
                    lines = sidecar_captions(self.path / name) or ()
                    captions[name] = tuple(caption for _, caption in lines)
                except DataError as error:
                    faults[str(Path(name).with_suffix(".txt"))] = str(error)
        else:
            entries, faults = self._read_table(table)
            for entry in entries:
                name = os.path.normpath(entry.name)
                captions[name] = captions.get(name, ()) + entry.captions
            for name in captions.keys() - set(names):
                faults[name] = f"image {self.path / name} does not exist; correct {table.name}"
        return Listing([self._entry(name, captions.get(name, ())) for name in names], faults)

    def _read_table(self, path: Path) -> Listing:
        """List the images of a file, each once, with all captions."""
        entries: dict[str, Entry] = {}
        faults: dict[str, str] = {}
        for rows in captioning_test_rows(path, split="all"):
            for row in range(len(rows)):
                try:
                    record = rows.read(row)
                except DataError as error:
                    faults[f"{path.name}#{rows.label(row)}"] = str(error)
                else:
                    entry = self._entry(record.image, record.caption or ())
                    entries.setdefault(record.image, entry)
        return Listing([*entries.values()], faults)

    def _entry(self, name: str, captions: Iterable[str]) -> Entry:
        try:
            status = (self.images / name).stat()
        except (OSError, ValueError):
            return Entry(name, -1, -1, captions=tuple(captions))
        return Entry(name, status.st_size, status.st_mtime_ns, captions=tuple(captions))

    def load(self, entry: Entry) -> tuple[Image.Image, tuple[str, ...]]:
        """Read an image as RGB, and its captions; thread-safe, a broken image raises `DataError`."""
        return decode_image(self.images / entry.name), entry.captions

    def location(self, entry: Entry) -> str:
        """Return the path of an image, or its name if it is embedded."""
        return str(self.images / entry.name)


class EmbeddedImages:
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
            raise DataError(f"{entry.name} no longer exists; index the collection again")
        rows, row = self.records.locate(entry.row)
        record = rows.read(row)
        image = decode_image(image_source(image_values(record, _IMAGES)[0], _IMAGES), entry.name)
        captions = [caption for caption in _captions_of(record) if isinstance(caption, str)]
        return image, tuple(captions)

    def location(self, entry: Entry) -> str:
        return entry.name


Collection = ImageFiles | EmbeddedImages
"""Images that can be listed and loaded."""


def _image_names(folder: Path) -> list[str]:
    """Return the sorted relative POSIX paths of the images in a folder tree."""
    top = Path(os.path.abspath(folder))
    return sorted(path.relative_to(top).as_posix() for path in find_images(top, links=False))


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
