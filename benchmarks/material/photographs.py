"""Photographs with captions: those that scikit-image and scikit-learn install, or a user's own."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from xfm_fast.data.collection import Entry, open_collection
from xfm_fast.data.images import decode_image, evaluation_transform
from xfm_fast.errors import DataError
from xfm_fast.tokenizer import pre_caption

MOST_PHOTOS = 64


class Skipped(NamedTuple):
    """Something that could not be used, and why."""

    what: str
    reason: str


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
        entries.append((f"{package}/{photo['file']}", partial(_photo, path, photo["captions"])))
    if not entries:
        raise DataError(
            'no photographs: scikit-image and scikit-learn are not installed; pip install "xfm-fast[bench]", or name a '
            "data of your own with --data"
        )
    collection = _collected("the photographs of scikit-image and scikit-learn, captions written for xfm-fast", entries)
    collection.skipped += [Skipped(package, reason) for package, reason in absent.items()]
    return collection


def _photo(path: Path, captions: Sequence[str]) -> tuple[Image.Image, Sequence[str]]:
    return decode_image(path), captions


def from_files(path: str | Path, most: int = MOST_PHOTOS) -> Collection:
    """Photographs with their captions, in any of the forms of `xfm_fast.data.collection`.

    What cannot be used is skipped and listed in the result.

    Args:
        path: folder of images, or a file that lists or holds them.
        most: photographs to read.

    Raises:
        DataError: the folder or file cannot be read, or nothing usable is left.
    """
    pictures = open_collection(path)
    entries, faults = pictures.listing()

    def opened(entry: Entry) -> Callable[[], tuple[Image.Image, Sequence[str]]]:
        return lambda: pictures.load(entry)

    found = _collected(str(path), ((entry.name, opened(entry)) for entry in entries), most)
    found.skipped[:0] = [Skipped(name, reason) for name, reason in faults.items()]
    if not found.names:
        reasons = "; ".join(f"{what}: {reason}" for what, reason in found.skipped[:3])
        raise DataError(
            f"nothing in {path} can be used ({reasons}); give images with captions: a folder with captions.csv or with "
            "name.txt beside each image, a CSV of image and caption, or a WebDataset shard"
        )
    return found


def _collected(
    origin: str,
    entries: Iterable[tuple[str, Callable[[], tuple[Image.Image, Sequence[str]]]]],
    most: int = MOST_PHOTOS,
) -> Collection:
    """Photographs by name, each opened in its turn."""
    out = Collection(origin)
    for name, load in entries:
        if len(out.names) == most:
            out.left_unread += 1
            continue
        try:
            image, said = load()
        except DataError as error:
            out.skipped.append(Skipped(name, str(error)))
            continue
        captions = []
        for caption in said:
            try:
                captions.append(pre_caption(caption))
            except DataError as error:
                out.skipped.append(Skipped(name, str(error)))
        if not captions:
            out.skipped.append(Skipped(name, "has no usable caption"))
            continue
        out.photo_of += [len(out.names)] * len(captions)
        out.captions += captions
        out.names.append(name)
        out.images.append(image)
    return out
