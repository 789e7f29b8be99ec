"""Photographs with captions: those that scikit-image and scikit-learn install, or any folder of a user."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from xfm_fast.data.images import decode_image, evaluation_transform
from xfm_fast.errors import DataError
from xfm_fast.tokenizer import pre_caption

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
_TABLES = ("captions.json", "captions.jsonl", "captions.csv", "captions.tsv")
MOST_PHOTOS = 64


class Skipped(NamedTuple):
    """Something that could not be used, and why."""

    what: str
    reason: str


class _Entry(NamedTuple):
    name: str
    path: Path
    captions: list[Any]
    where: str


@dataclass
class Collection:
    """Decoded photographs and their cleaned captions.

    Attributes:
        origin: where they come from, for reports.
        names: of the photographs.
        images: decoded to RGB.
        captions: cleaned, all photographs' in one list.
        photo_of: index of the photograph of each caption.
        skipped: what was left out.
        left_unread: photographs beyond the limit, which were not looked at.
    """

    origin: str
    names: list[str] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    photo_of: list[int] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    left_unread: int = 0

    def pixels(self, indices: Iterable[int], image_size: int) -> Tensor:
        """The official test transform of some photographs: `[B, 3, R, R]`."""
        transform = evaluation_transform(image_size)
        return torch.stack([transform(self.images[i]) for i in indices])

    def captions_of(self, photo: int) -> list[str]:
        return [caption for caption, owner in zip(self.captions, self.photo_of, strict=True) if owner == photo]

    def texts(self, count: int) -> list[str]:
        """`count` captions, one of each photograph in turn; repeated from the start when there are too few."""
        by_turn: dict[int, list[int]] = {}
        seen = dict.fromkeys(range(len(self.names)), 0)
        for index, owner in enumerate(self.photo_of):
            by_turn.setdefault(seen[owner], []).append(index)
            seen[owner] += 1
        order = [index for turn in sorted(by_turn) for index in by_turn[turn]]
        return [self.captions[order[i % len(order)]] for i in range(count)]


def bundled() -> Collection:
    """The photographs that scikit-image and scikit-learn ship, with captions of our own.

    Raises:
        DataError: neither package is installed.
    """
    table = json.loads(Path(__file__).with_name("captions.json").read_text(encoding="utf-8"))
    entries = []
    absent: dict[str, str] = {}
    for photo in table["photos"]:
        package = photo["package"]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            absent[package] = f"{package} is not installed"
            continue
        path = Path(spec.origin).parent / table["folders"][package] / photo["file"]
        entries.append(_Entry(f"{package}/{photo['file']}", path, photo["captions"], "captions.json"))
    if not entries:
        raise DataError(
            'no photographs: scikit-image and scikit-learn are not installed; pip install "xfm-fast[bench]", or name a '
            "folder of your own with --data"
        )
    collection = _collected("the photographs of scikit-image and scikit-learn, captions written for xfm-fast", entries)
    collection.skipped += [Skipped(package, reason) for package, reason in absent.items()]
    return collection


def from_folder(folder: str | Path, most: int = MOST_PHOTOS) -> Collection:
    """Photographs of a folder with their captions.

    Captions come from `captions.json` (a list of `{"image": path, "caption": text or list}`, or a mapping of paths to
    captions), `captions.jsonl` (one such object a line), `captions.csv` or `captions.tsv` (columns image and caption),
    or, without any of these, from `name.txt` beside `name.jpg`, one caption a line. Paths are relative to the folder.

    What cannot be used is skipped and listed in the result.

    Raises:
        DataError: the folder or its table cannot be read, or nothing usable is left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"--data {folder} is not a folder; name a folder of images with captions")
    skipped: list[Skipped] = []
    table = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    records = _beside(folder) if table is None else _READERS[table.suffix](table, skipped)
    merged: dict[str, _Entry] = {}
    for image, captions, where in records:
        if not isinstance(image, str) or not image:
            skipped.append(Skipped(where, f"image is {image!r}, not a path"))
        elif image in merged:
            merged[image].captions.extend(captions)
        else:
            merged[image] = _Entry(image, folder / image, list(captions), where)
    collection = _collected(str(folder), merged.values(), most)
    collection.skipped[:0] = skipped
    if not collection.names:
        reasons = "; ".join(f"{what}: {reason}" for what, reason in collection.skipped[:3]) or "it holds no images"
        raise DataError(
            f"nothing in {folder} can be used ({reasons}); give images with captions.json, .jsonl, .csv or "
            ".tsv, or a name.txt beside each image"
        )
    return collection


def _collected(origin: str, entries: Iterable[_Entry], most: int = MOST_PHOTOS) -> Collection:
    out = Collection(origin)
    for entry in entries:
        if len(out.names) == most:
            out.left_unread += 1
            continue
        captions = []
        for caption in entry.captions:
            try:
                if not isinstance(caption, str):
                    raise DataError(f"caption is {caption!r}, not text")
                captions.append(pre_caption(caption))
            except DataError as error:
                out.skipped.append(Skipped(f"{entry.name} ({entry.where})", str(error)))
        if not captions:
            out.skipped.append(Skipped(entry.name, "has no usable caption"))
            continue
        try:
            image = decode_image(entry.path, entry.name)
        except DataError as error:
            out.skipped.append(Skipped(entry.name, str(error)))
            continue
        out.photo_of += [len(out.names)] * len(captions)
        out.captions += captions
        out.names.append(entry.name)
        out.images.append(image)
    return out


_Records = Iterator[tuple[Any, list[Any], str]]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None


def _listed(record: Any, where: str, skipped: list[Skipped]) -> _Records:
    if not isinstance(record, dict) or not {"image", "caption"} <= record.keys():
        skipped.append(Skipped(where, 'is not an object with "image" and "caption"'))
        return
    captions = record["caption"]
    yield record["image"], captions if isinstance(captions, list) else [captions], where


def _from_json(path: Path, skipped: list[Skipped]) -> _Records:
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON ({error}); mend it") from None
    if isinstance(content, dict):
        content = [{"image": image, "caption": caption} for image, caption in content.items()]
    if not isinstance(content, list):
        raise DataError(f"{path} holds a {type(content).__name__}; a list of objects with image and caption is needed")
    for number, record in enumerate(content):
        yield from _listed(record, f"{path.name} entry {number}", skipped)


def _from_jsonl(path: Path, skipped: list[Skipped]) -> _Records:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        where = f"{path.name} line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            skipped.append(Skipped(where, f"is not valid JSON ({error})"))
            continue
        yield from _listed(record, where, skipped)


def _from_table(path: Path, skipped: list[Skipped]) -> _Records:
    rows = csv.DictReader(_text(path).splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",")
    if not {"image", "caption"} <= set(rows.fieldnames or ()):
        raise DataError(f"{path} has the columns {rows.fieldnames or 'none'}; image and caption are needed")
    for number, row in enumerate(rows, start=2):
        yield row["image"], [row["caption"] or ""], f"{path.name} line {number}"


def _beside(folder: Path) -> _Records:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in _SUFFIXES:
            continue
        name = path.relative_to(folder).as_posix()
        text = path.with_suffix(".txt")
        captions = [line for line in _text(text).splitlines() if line.strip()] if text.is_file() else []
        yield name, list(captions), text.name


_READERS = {".json": _from_json, ".jsonl": _from_jsonl, ".csv": _from_table, ".tsv": _from_table}
