"""Readers of vision-language task files: official arrays, tables, folders, Karpathy splits, COCO, VQA v2, RefCOCO.

A reader (`retrieval_rows`, `vqa_rows`, ...) accepts any mix of supported formats. Elements are validated when read, so
that broken ones can be skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from xfm_fast.data.annotations import (
    ARRAY,
    AnnotationRows,
    CaptioningRecord,
    CaptioningTestRecord,
    Elements,
    GroundingRecord,
    NLVR2Record,
    RetrievalRecord,
    RetrievalTestRecord,
    VQARecord,
    answer_text,
    array_of,
    as_rows,
    identity_of,
    read_array,
)
from xfm_fast.data.files import Paths, find_files, read_json, read_plain_pickle, unreadable
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.records import ShardFile, first_object, has_shards, open_records
from xfm_fast.data.tables import (
    LINE_SUFFIXES,
    PAIR_COLUMNS,
    TABLE_SUFFIXES,
    caption_table,
    has_images,
    read_caption_folder,
    read_lines,
    read_table,
)
from xfm_fast.errors import DataError

VQA_IMAGE = "{split}/COCO_{split}_{image_id:012d}.jpg"
NLVR2_IMAGE = "{folder}/{stem}-img{side}.png"
COCO_IMAGE = "{file_name}"

# Ten times the largest file of referring expressions.
_MOST_PICKLE = 512 << 20
_SHOWN = 3


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
    return as_rows(map(_grouped, _captions(paths, split, columns)), RetrievalTestRecord)


def captioning_rows(
    paths: Paths,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    image_name: str = COCO_IMAGE,
) -> list[AnnotationRows[CaptioningRecord]]:
    """Image-caption pairs; formats of `retrieval_rows` and COCO captions, whose image paths follow `image_name`."""
    return as_rows(_captions(paths, split, columns, image_name), CaptioningRecord)


def captioning_test_rows(
    paths: Paths,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    image_name: str = COCO_IMAGE,
) -> list[AnnotationRows[CaptioningTestRecord]]:
    """Each image once with all known captions; also accepts a folder of images without captions."""
    return as_rows(map(_grouped, _captions(paths, split, columns, image_name, bare=True)), CaptioningTestRecord)


def vqa_rows(paths: Paths, *, image_name: str = VQA_IMAGE) -> list[AnnotationRows[VQARecord]]:
    """Questions: official JSON, or VQA v2's `*_questions.json` and `*_annotations.json` (paths as in `image_name`)."""
    arrays, documents = [], []
    for path in find_files(paths):
        content = read_json(path, "official JSON or VQA v2 questions and annotations", answer_only)
        if isinstance(content, dict) and ("questions" in content or "annotations" in content):
            documents.append((path, content))
        else:
            known = "an array of objects, or VQA v2's {questions} or {annotations}"
            arrays.append(Elements(str(path), array_of(path, content, known)))
    found = arrays + (vqa_elements(documents, image_name) if documents else [])
    return as_rows([each._replace(notes=_empty_answers(each)) for each in found], VQARecord)


def nlvr2_rows(paths: Paths, *, image_name: str = NLVR2_IMAGE) -> list[AnnotationRows[NLVR2Record]]:
    """Statements about two images: official JSON, or NLVR2's lines, whose image paths follow `image_name`."""
    found = [
        nlvr2_elements(path, image_name) if _first_byte(path) == b"{" else Elements(str(path), read_array(path))
        for path in find_files(paths)
    ]
    return as_rows(found, NLVR2Record)


def grounding_rows(
    paths: Paths, *, split: str | None = None, image_name: str = COCO_IMAGE
) -> list[AnnotationRows[GroundingRecord]]:
    """Referring expressions with boxes.

    Formats: JSON arrays with `image`, `text`, `ref_id` and optionally `bbox`; `refs(*).p` with `instances.json`, which
    add boxes to arrays or are read as data. `split` (`train`, `val`, `testA`, `testB`) and `image_name` apply to
    refer's files.
    """
    arrays: list[Elements] = []
    refs: list[Path] = []
    instances: list[Instances] = []
    for path in find_files(paths):
        if is_pickle(path):
            refs.append(path)
            continue
        content = read_json(path, f"{ARRAY}, or COCO instances", drop_segmentation)
        if isinstance(content, dict):
            instances.append(read_instances(path, content))
        else:
            arrays.append(Elements(str(path), array_of(path, content)))
    if len(refs) != len(instances) or len(refs) > 1:
        raise DataError(
            f"{len(refs)} files of references and {len(instances)} of instances were given; give refs(*).p and "
            "instances.json of one data set, or neither"
        )
    if refs and arrays:
        arrays = [join_boxes(each, refs[0], instances[0], split) for each in arrays]
    elif refs:
        arrays = [referring_elements(refs[0], instances[0], split, image_name)]
    elif split is not None:
        raise DataError(f"split={split!r} needs refer's files; give refs(*).p and instances.json")
    return as_rows(arrays, GroundingRecord)


def _captions(
    paths: Paths,
    split: str | None,
    columns: Mapping[str, str] | None,
    image_name: str = COCO_IMAGE,
    *,
    identity: Callable[[str], int | str] = identity_of,
    bare: bool = False,
) -> Iterator[Elements]:
    """Elements of retrieval and captioning files; `bare` includes images without captions."""
    names = PAIR_COLUMNS | dict(columns or {})
    for path in find_files(paths, is_dataset_folder):
        suffix = path.suffix.lower()
        if path.is_dir() and (table := caption_table(path)) is not None:
            found = [_resolve_images(path, each) for each in _captions(table, split, columns, image_name, bare=bare)]
        elif path.is_dir() and not has_shards(path):
            found = [read_caption_folder(path, bare=bare)]
        elif path.is_dir() or ".tar" in path.suffixes or has_embedded_images(path):
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
                yield coco_elements(path, content, image_name)
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


def _resolve_images(folder: Path, elements: Elements) -> Elements:
    """Elements of a table with image paths relative to its folder."""
    values = [
        {**value, "image": str(folder.absolute() / value["image"])}
        if isinstance(value, dict) and isinstance(value.get("image"), str)
        else value
        for value in elements.values
    ]
    return elements._replace(values=values)


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


def _grouped(elements: Elements) -> Elements:
    """Group captions by image, in first-seen order."""
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


def _empty_answers(elements: Elements) -> tuple[str, ...]:
    """A note that counts empty answers, which are dropped (the official code trains on them)."""
    found = [
        str(element.get("question_id"))
        for element in elements.values
        if isinstance(element, dict) and isinstance(answers := element.get("answer"), list)
        for answer in map(answer_text, answers)
        if isinstance(answer, str) and not answer.strip()
    ]
    if not found:
        return ()
    return (f"{elements.name}: {len(found)} empty answers were left out (question {', '.join(found[:_SHOWN])})",)


def _first_byte(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except OSError as error:
        raise unreadable(path, error) from None


def image_path(pattern: str, **fields: str | int) -> str:
    """Format an image name from a pattern, e.g. `train2014/{file_name}`."""
    try:
        return pattern.format(**fields)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        known = ", ".join(f"{{{name}}}" for name in fields)
        raise DataError(f"image_name={pattern!r} cannot be filled in ({error}); it may use {known}") from None


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


def coco_elements(path: Path, content: Mapping[str, Any], pattern: str = COCO_IMAGE) -> Elements:
    """Captions of a COCO file, one per element; test files have images only."""
    names = {
        image["id"]: image_path(pattern, file_name=image["file_name"], image_id=image["id"])
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


def answer_only(fields: dict[str, Any]) -> Any:
    """`object_hook` that reduces a VQA v2 answer to its text, to save gigabytes."""
    return fields["answer"] if "answer" in fields and "answer_id" in fields else fields


def vqa_elements(documents: Iterable[tuple[Path, Mapping[str, Any]]], pattern: str = VQA_IMAGE) -> list[Elements]:
    """VQA v2 questions joined with their annotations, one `Elements` per question file."""
    documents = list(documents)
    answers: dict[Any, Mapping[str, Any]] = {}
    sets, files = set(), []
    for path, content in documents:
        if "annotations" in content:
            files.append(path)
            sets.add(content.get("data_subtype"))
            answers.update(
                (each["question_id"], each)
                for each in array_of(path, content["annotations"])
                if isinstance(each, dict) and isinstance(each.get("question_id"), (int, str))
            )
    found = []
    for path, content in documents:
        if "questions" in content:
            annotated = content.get("data_subtype") in sets
            # test-dev2015 is a subset of the questions about test2015 images.
            split = str(content.get("data_subtype", "")).replace("-dev", "")
            values = [
                _question(each, answers, annotated, split, pattern) if isinstance(each, dict) else each
                for each in array_of(path, content["questions"])
            ]
            found.append(Elements(str(path), values, others=tuple(files)))
    if not found:
        raise DataError(f"{files[0]} holds only annotations; give their questions file too")
    return found


def _question(
    question: Mapping[str, Any], annotations: Mapping[Any, Any], annotated: bool, split: str, pattern: str
) -> dict[str, Any] | DataError:
    identity, image = question.get("question_id"), question.get("image_id")
    if not isinstance(image, int):
        return DataError(f"question {identity} has no image (image_id is {image!r}); correct or remove it")
    value = {
        "image": image_path(pattern, split=split, image_id=image),
        "question": question.get("question"),
        "question_id": identity,
    }
    annotation = annotations.get(identity) if isinstance(identity, (int, str)) else None
    if annotation is None:
        return (
            DataError(f"question {identity} has no annotation; add it or remove the question") if annotated else value
        )
    kinds = {name: annotation[name] for name in ("question_type", "answer_type") if name in annotation}
    # Training takes the people's answers, and so does scoring.
    return value | kinds | {"answer": annotation.get("answers"), "answers": annotation.get("answers")}


def nlvr2_elements(path: Path, pattern: str = NLVR2_IMAGE) -> Elements:
    """Lines of NLVR2 (`train.json`, `dev.json`, `test1.json`).

    `pattern` may use `{stem}` (identifier without its last number), `{side}` (0 or 1) and `{folder}` (`train/DIRECTORY`
    for lines with a `directory`, else the split).
    """
    found = read_lines(path)
    values = [_statement(value, pattern) if isinstance(value, dict) else value for value in found.values]
    return found._replace(values=values)


def _statement(line: Mapping[str, Any], pattern: str) -> Mapping[str, Any] | DataError:
    identifier = line.get("identifier")
    if identifier is None:
        # An official element, one a line.
        return line
    stem, dash, _ = str(identifier).rpartition("-")
    if not dash:
        return DataError(f"identifier {identifier!r} is not of the form split-set-pair-sentence; correct the line")
    folder = stem.partition("-")[0] + (f"/{line['directory']}" if "directory" in line else "")
    images = [image_path(pattern, folder=folder, stem=stem, side=side) for side in (0, 1)]
    return {**line, "images": images}


class Referred(NamedTuple):
    """A RefCOCO reference: its box in pixels, image and split."""

    image_id: int
    annotation: int
    split: str
    sentences: tuple[str, ...]


def is_pickle(path: Path) -> bool:
    """True for names of refer's files, e.g. `refs(unc).p`."""
    return path.suffix.lower() in (".p", ".pkl", ".pickle")


def read_refs(path: Path) -> dict[int, Referred]:
    """References by `ref_id` of a `refs(*).p`; the pickle may contain only containers, strings and numbers."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    return _refs(path, status.st_mtime_ns, status.st_size)


# The files of train, val and test are read one after another, and refer to the same references.
@lru_cache(maxsize=1)
def _refs(path: Path, modified: int, size: int) -> dict[int, Referred]:
    if size > _MOST_PICKLE:
        raise DataError(f"{path} has {size:,} bytes, over the limit of {_MOST_PICKLE:,} for references; check the file")
    content = read_plain_pickle(path)
    try:
        return {
            ref["ref_id"]: Referred(
                ref["image_id"],
                ref["ann_id"],
                str(ref["split"]),
                tuple(str(each.get("sent", each.get("raw"))) for each in ref["sentences"]),
            )
            for ref in content
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} is no list of references ({error!r}); expected ref_id, ann_id, image_id, split and sentences"
        ) from None


class Instances(NamedTuple):
    """COCO instances: boxes by annotation, and file name, width and height by image."""

    path: Path
    boxes: dict[int, Sequence[float]]
    images: dict[int, tuple[str, int | None, int | None]]


def drop_segmentation(fields: dict[str, Any]) -> dict[str, Any]:
    """`object_hook` that drops segmentations, which are most of the file."""
    fields.pop("segmentation", None)
    return fields


def read_instances(path: Path, content: Any) -> Instances:
    """Boxes and images of a COCO instances file."""
    try:
        return Instances(
            path,
            {each["id"]: each["bbox"] for each in content["annotations"]},
            {each["id"]: (each["file_name"], each.get("width"), each.get("height")) for each in content["images"]},
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is no file of COCO instances ({error!r}); expected images and annotations") from None


def referring_elements(
    refs_path: Path, instances: Instances, split: str | None = None, pattern: str = COCO_IMAGE
) -> Elements:
    """Every sentence of every reference, with its box."""
    refs = read_refs(refs_path)
    values, labels = [], []
    for identity, ref in refs.items():
        if split is None or ref.split == split:
            known = _place(identity, refs, instances)
            if isinstance(known, dict):
                name = image_path(pattern, file_name=instances.images[ref.image_id][0], image_id=ref.image_id)
                known = {**known, "image": name, "ref_id": identity}
            for number, sentence in enumerate(ref.sentences):
                values.append({**known, "text": sentence} if isinstance(known, dict) else known)
                labels.append(f"ref_id {identity}, sentence {number}")
    if not values:
        known_splits = sorted({ref.split for ref in refs.values()})
        raise DataError(f"{refs_path} has no split {split!r}; choose one of {', '.join(known_splits)}")
    return Elements(str(refs_path), values, labels, others=(instances.path,))


def join_boxes(elements: Elements, refs_path: Path, instances: Instances, split: str | None = None) -> Elements:
    """Official elements joined with box, split and image size by `ref_id`."""
    refs = read_refs(refs_path)
    values, labels = [], []
    for number, element in enumerate(elements.values):
        value = element
        if isinstance(element, dict) and "ref_id" in element:
            known = _place(element["ref_id"], refs, instances)
            if isinstance(known, dict) and split is not None and known["split"] != split:
                continue
            value = {**element, **known} if isinstance(known, dict) else known
        values.append(value)
        labels.append(f"element {number}")
    if not values:
        raise DataError(f"{elements.name} has no element of split {split!r} of {refs_path}; choose another split")
    return elements._replace(values=values, labels=labels, others=(refs_path, instances.path))


def _place(identity: Any, refs: Mapping[int, Referred], instances: Instances) -> dict[str, Any] | DataError:
    """Box, split and image size of a reference."""
    try:
        ref = refs[identity]
    except (KeyError, TypeError):
        return DataError(f"ref_id {identity!r} is none of the references; check that both are of one data set")
    if ref.annotation not in instances.boxes or ref.image_id not in instances.images:
        return DataError(
            f"ref_id {identity}: annotation {ref.annotation} or image {ref.image_id} is not in {instances.path}; "
            "check that both are of one data set"
        )
    _, width, height = instances.images[ref.image_id]
    return {"bbox": instances.boxes[ref.annotation], "split": ref.split, "width": width, "height": height}
