"""Photographs with captions: those of scikit-image and scikit-learn, or the user's own."""

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

from xfm_fast.data.collection import open_collection
from xfm_fast.data.images import decode_image, evaluation_transform
from xfm_fast.errors import DataError
from xfm_fast.tokenizer import pre_caption

MOST_PHOTOS = 64


class Skipped(NamedTuple):
    """A photograph or package that cannot be used, and why."""

    what: str
    reason: str


@dataclass
class Collection:
    """Decoded photographs with cleaned captions; `photo_of` has the photograph of every caption.

    `skipped` lists what cannot be used, and `left_unread` counts photographs beyond the limit.
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
        """The captions of a photograph."""
        return [caption for caption, owner in zip(self.captions, self.photo_of, strict=True) if owner == photo]

    def texts(self, count: int) -> list[str]:
        """`count` captions: the first of every photograph, then the second, and from the start if there are too few."""
        earlier = [self.photo_of[:index].count(owner) for index, owner in enumerate(self.photo_of)]
        order = sorted(range(len(earlier)), key=earlier.__getitem__)
        return [self.captions[order[i % len(order)]] for i in range(count)]

    def add(self, name: str, load: Callable[[], tuple[Image.Image, Sequence[str]]]) -> None:
        """Add a photograph, or list it as skipped."""
        try:
            image, captions = load()
        except DataError as error:
            self.skipped.append(Skipped(name, str(error)))
            return
        cleaned = []
        for caption in captions:
            try:
                cleaned.append(pre_caption(caption))
            except DataError as error:
                self.skipped.append(Skipped(name, str(error)))
        if not cleaned:
            self.skipped.append(Skipped(name, "has no usable caption"))
            return
        self.photo_of += [len(self.names)] * len(cleaned)
        self.captions += cleaned
        self.names.append(name)
        self.images.append(image)


def bundled() -> Collection:
    """The photographs of scikit-image and scikit-learn, with our captions; `DataError` if neither is installed."""
    table = json.loads(Path(__file__).with_name("captions.json").read_text(encoding="utf-8"))
    collection = Collection("the photographs of scikit-image and scikit-learn, captions written for xfm-fast")
    absent: set[str] = set()
    for photo in table["photos"]:
        package = photo["package"]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            absent.add(package)
            continue
        path = Path(spec.origin).parent / table["folders"][package] / photo["file"]
        collection.add(f"{package}/{photo['file']}", partial(_open, path, photo["captions"]))
    if not collection.names:
        raise DataError(
            'no photographs: scikit-image and scikit-learn are not installed; pip install "xfm-fast[bench]", or name '
            "your own with --data"
        )
    collection.skipped += [Skipped(package, f"{package} is not installed") for package in sorted(absent)]
    return collection


def _open(path: Path, captions: Sequence[str]) -> tuple[Image.Image, Sequence[str]]:
    return decode_image(path), captions


def from_files(path: str | Path, most: int = MOST_PHOTOS) -> Collection:
    """At most `most` photographs with captions, in any form of `xfm_fast.data.collection`.

    Raises `DataError` if the folder or file cannot be read, or nothing in it can be used.
    """
    pictures = open_collection(path)
    entries, faults = pictures.listing()
    collection = Collection(str(path), skipped=[Skipped(name, reason) for name, reason in faults.items()])
    for number, entry in enumerate(entries):
        if len(collection.names) == most:
            collection.left_unread = len(entries) - number
            break
        collection.add(entry.name, partial(pictures.load, entry))
    if not collection.names:
        reasons = "; ".join(f"{what}: {reason}" for what, reason in collection.skipped[:3])
        raise DataError(
            f"nothing in {path} can be used ({reasons}); give images with captions: a folder with captions.csv or with "
            "name.txt next to each image, a CSV of image and caption, or a WebDataset shard"
        )
    return collection
