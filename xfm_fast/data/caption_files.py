"""Readers of images with captions: official arrays, tables, folders, shards, Karpathy splits and COCO.

A reader (`retrieval_rows`, `captioning_rows`, ...) accepts any mix of supported formats. Elements are validated when
read, so that broken ones can be skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.records import ShardFile, find_reader, first_object, has_shards, open_records
from xfm_fast.data.tables import (
    LINE_SUFFIXES,
    PAIR_COLUMNS,
    TABLE_SUFFIXES,
    caption_table,
    group_captions,
    has_images,
    read_caption_folder,
    read_table,
    resolve_images,
)
from xfm_fast.errors import DataError


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
    return as_rows(map(group_captions, _captions(paths, split, columns, bare=True)), CaptioningTestRecord)


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
            found = [resolve_images(path, each) for each in _captions(table, split, columns, bare=bare)]
        elif path.is_dir() and not has_shards(path):
            found = [read_caption_folder(path, bare=bare)]
        elif path.is_dir() or has_embedded_images(path) or find_reader(path) not in ("lines", "pairs", None):
            yield from map(embedded_elements, sorted(path.glob("*.tar")) if path.is_dir() else [path])
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
            values.append({"image": image, "image_id": image} | ({} if caption is None else {"caption": caption}))
            labels.append(rows.label(row))
    return Elements(str(path), values, labels)


def is_karpathy(content: Any) -> bool:
    """True for the content of a Karpathy `dataset_*.json`."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def karpathy_elements(path: Path, content: Mapping[str, Any], split: str | None) -> Elements:
    """Captions of a Karpathy split, one per element; `train` includes `restval`, `all` is every caption."""
    images = content["images"]
    wanted = {"train", "restval"} if split == "train" else {split}
    values, labels = [], []
    for number, image in enumerate(images):
        if not isinstance(image, dict):
            values.append(DataError(f"is a {type(image).__name__}; expected an object with filename and sentences"))
            labels.append(f"image {number}")
            continue
        if split != "all" and image.get("split") not in wanted:
            continue
        name = "/".join(str(part) for part in (image.get("filepath"), image.get("filename")) if part)
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
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "file_name" in images[0]


def coco_elements(path: Path, content: Mapping[str, Any]) -> Elements:
    """Captions of a COCO file, one per element; test files have images only."""
    names = {
        image["id"]: str(image["file_name"])
        for image in content["images"]
        if isinstance(image, dict) and isinstance(image.get("id"), (int, str)) and "file_name" in image
    }
    if "annotations" not in content:
        return Elements(str(path), [{"image": name, "image_id": identity} for identity, name in names.items()])
    values: list[Any] = []
    for annotation in array_of(path, content["annotations"]):
        identity = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(identity, (int, str)) or identity not in names:
            values.append(DataError(f"image_id {identity!r} is none of the file's images; correct or remove it"))
        else:
            values.append({"image": names[identity], "caption": annotation.get("caption"), "image_id": identity})
    return Elements(str(path), values, [f"annotation {number}" for number in range(len(values))])
