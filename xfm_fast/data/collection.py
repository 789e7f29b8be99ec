"""Images with captions: collections of images, and the rows of retrieval and captioning.

Formats are folders, lists of paths (CSV, JSON, line JSON), files with embedded images, official arrays, Karpathy splits
and COCO. Any mix of them is one reader. Elements are validated when read, so that broken ones can be skipped.
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
    Elements,
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
    has_images,
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
def open_collection(
    path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> Collection:
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
        raise DataError(
            f"{path} does not exist; give a folder of images, or a file that lists or holds some"
        )
    kinds = (*TABLE_SUFFIXES, *LINE_SUFFIXES, ".json")
    if path.suffix.lower() in kinds and not has_embedded_images(path):
        return Files(path, path.parent if images is None else Path(images).expanduser())
    if path.suffix.lower() in LINE_SUFFIXES or find_reader(path) not in ("lines", "pairs", None):
        return Records(open_records(path))
    raise DataError(
        f"{path} is neither a folder of images nor a file of one of {', '.join(kinds)}, .tar; give these"
    )


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
            raise DataError(
                f"{self.path} holds no images ({', '.join(PICTURE_SUFFIXES)}), nor do folders below it"
            )
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
                captions[name] = tuple(
                    caption for _, caption in sidecar_captions(self.path / name) or ()
                )
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
                    entries.setdefault(
                        record.image, self._entry(record.image, record.caption or ())
                    )
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


def retrieval_rows(
    paths: Paths, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> list[AnnotationRows[RetrievalRecord]]:
    """Image-caption pairs for training.

    Formats: official JSON, Karpathy's `dataset_*.json`, CSV, TSV or line JSON with `image` and `caption`, image folders
    with `a.txt` next to `a.jpg` or with `captions.csv`, WebDataset shards, line JSON with embedded images. `split`
    selects a Karpathy split (`train` includes `restval`); `columns` maps fields to table columns.
    """
    # The full path: images in two folders may share a name, and captions are grouped by image.
    return as_rows(_captions(paths, split, columns, identity=str), RetrievalRecord)


def retrieval_test_rows(
    paths: Paths, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> list[AnnotationRows[RetrievalTestRecord]]:
    """Images with all their captions, in first-seen order; arguments as in `retrieval_rows`."""
    return as_rows(map(group_captions, _captions(paths, split, columns)), RetrievalTestRecord)


def captioning_rows(
    paths: Paths, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> list[AnnotationRows[CaptioningRecord]]:
    """Image-caption pairs; formats of `retrieval_rows` and COCO captions."""
    return as_rows(_captions(paths, split, columns), CaptioningRecord)


def captioning_test_rows(
    paths: Paths, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> list[AnnotationRows[CaptioningTestRecord]]:
    """Each image once with all known captions; also accepts a folder of images without captions."""
    return as_rows(
        map(group_captions, _captions(paths, split, columns, bare=True)), CaptioningTestRecord
    )


def _captions(
    paths: Paths,
    split: str | None,
    columns: Mapping[str, str] | None,
    *,
    identity: Callable[[str], int | str] = identity_of,
    bare: bool = False,
) -> Iterator[Elements]:
    """Elements of retrieval and captioning files; `bare` includes images without captions."""
    names = PAIR_COLUMNS | dict(columns or {})
    for path in find_files(paths, is_dataset_folder):
        suffix = path.suffix.lower()
        if path.is_dir() and (table := caption_table(path)) is not None:
            found = [
                resolve_images(path, each) for each in _captions(table, split, columns, bare=bare)
            ]
        elif path.is_dir() and not has_shards(path):
            found = [read_caption_folder(path, bare=bare)]
        elif (
            path.is_dir()
            or has_embedded_images(path)
            or find_reader(path) not in ("lines", "pairs", None)
        ):
            yield from map(
                embedded_elements, sorted(path.glob("*.tar")) if path.is_dir() else [path]
            )
            continue
        elif suffix in (*TABLE_SUFFIXES, *LINE_SUFFIXES):
            found = [read_table(path, names, ["caption"] if bare else [])]
        else:
            content = read_json(path, f"{ARRAY}, or an object of Karpathy or COCO")
            if is_karpathy(content):
                if split is None:
                    raise DataError(f"{path} holds several splits; name one (train, val, test)")
                yield karpathy_elements(path, content, split)
            elif is_coco(content):
                yield coco_elements(path, content)
            else:
                known = "an array of objects, Karpathy's {images: [{sentences}]}, or COCO's {images, annotations}"
                yield Elements(str(path), array_of(path, content, known))
            continue
        for each in found:
            values = [
                {"image_id": identity(image), **value}
                if isinstance(value, dict) and isinstance(image := value.get("image"), str)
                else value
                for value in each.values
            ]
            yield each._replace(values=values)


def is_dataset_folder(folder: Path) -> bool:
    """True for a folder that is one dataset: images, a table of them, or shards."""
    return caption_table(folder) is not None or has_shards(folder) or has_images(folder)


def has_embedded_images(path: Path) -> bool:
    """True for line JSON with embedded images."""
    return path.suffix.lower() in LINE_SUFFIXES and ImageOptions().image_key in first_object(path)


def embedded_elements(path: Path) -> Elements:
    """Images in a shard or line JSON as `FILE#ROW` (see `image_at`), with captions."""
    (rows,) = open_records(path).files
    values: list[Any] = []
    labels: list[int | str] = []
    for row in range(len(rows)):
        try:
            # The content of an image is read where it is used.
            record = rows.texts(row) if isinstance(rows, ShardFile) else rows.read(row)
        except DataError as error:
            values.append(error)
            labels.append(rows.label(row))
            continue
        captions = record.get("desc", record.get("caption"))
        image = f"{path.absolute()}#{row}"
        for caption in captions if isinstance(captions, list) else [captions]:
            values.append(
                {"image": image, "image_id": image}
                | ({} if caption is None else {"caption": caption})
            )
            labels.append(rows.label(row))
    return Elements(str(path), values, labels)


def is_karpathy(content: Any) -> bool:
    """True for the content of a Karpathy `dataset_*.json`."""
    images = content.get("images") if isinstance(content, dict) else None
    return (
        isinstance(images, list)
        and bool(images)
        and isinstance(images[0], dict)
        and "sentences" in images[0]
    )


def karpathy_elements(path: Path, content: Mapping[str, Any], split: str | None) -> Elements:
    """Captions of a Karpathy split, one per element; `train` includes `restval`, `all` is every caption."""
    images = content["images"]
    wanted = {"train", "restval"} if split == "train" else {split}
    values, labels = [], []
    for number, image in enumerate(images):
        if not isinstance(image, dict):
            values.append(
                DataError(
                    f"is a {type(image).__name__}; expected an object with filename and sentences"
                )
            )
            labels.append(f"image {number}")
            continue
        if split != "all" and image.get("split") not in wanted:
            continue
        name = "/".join(
            str(part) for part in (image.get("filepath"), image.get("filename")) if part
        )
        identity = next((image[key] for key in ("cocoid", "imgid") if key in image), name)
        for place, sentence in enumerate(image.get("sentences") or [None]):
            caption = sentence.get("raw") if isinstance(sentence, dict) else sentence
            values.append({"image": name, "caption": caption, "image_id": identity})
            labels.append(f"image {number}, sentence {place}")
    if not values:
        known = sorted({str(image.get("split")) for image in images if isinstance(image, dict)})
        raise DataError(f"{path} has no split {split!r}; choose one of {', '.join(known)}")
    return Elements(str(path), values, labels)


def is_coco(content: Any) -> bool:
    """True for the content of a COCO file: `images` with `file_name`."""
    images = content.get("images") if isinstance(content, dict) else None
    return (
        isinstance(images, list)
        and bool(images)
        and isinstance(images[0], dict)
        and "file_name" in images[0]
    )


def coco_elements(path: Path, content: Mapping[str, Any]) -> Elements:
    """Captions of a COCO file, one per element; test files have images only."""
    names = {
        image["id"]: str(image["file_name"])
        for image in content["images"]
        if isinstance(image, dict)
        and isinstance(image.get("id"), (int, str))
        and "file_name" in image
    }
    if "annotations" not in content:
        return Elements(
            str(path), [{"image": name, "image_id": identity} for identity, name in names.items()]
        )
    values: list[Any] = []
    for annotation in array_of(path, content["annotations"]):
        identity = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(identity, (int, str)) or identity not in names:
            values.append(
                DataError(
                    f"image_id {identity!r} is none of the file's images; correct or remove it"
                )
            )
        else:
            values.append(
                {
                    "image": names[identity],
                    "caption": annotation.get("caption"),
                    "image_id": identity,
                }
            )
    return Elements(str(path), values, [f"annotation {number}" for number in range(len(values))])
