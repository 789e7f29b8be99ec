"""Region captions of an image: one random crop, with boxes and patch masks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xfm_fast.data.options import RegionOptions, TextOptions
from xfm_fast.data.texts import choose_text, clean_text, every_text
from xfm_fast.data.transforms import (
    Box,
    Picture,
    RegionTransform,
    mentions_side,
    picture_size,
    whole_image,
)
from xfm_fast.errors import DataError

PRETRAINING = RegionOptions()
"""Default region options."""


class Rectangle(NamedTuple):
    """A box in pixels: x, y, width, height."""

    x: float
    y: float
    w: float
    h: float


@dataclass(frozen=True)
class RegionSample:
    """One crop with K texts."""

    image: Tensor  # `[3, R, R]` normalised pixels
    texts: tuple[str, ...]  # K cleaned captions
    boxes: Tensor  # `[K, 4]` (cx, cy, w, h) relative to the crop; (0.5, 0.5, 1, 1) for a caption of the whole image
    region_mask: Tensor  # `[K, 1 + N]` boolean, True for token 0 and patches that intersect the box
    is_image: Tensor  # `[K]` boolean, True for a caption of the whole image
    skipped: tuple[str, ...] = ()  # reasons for skipped elements


def sample_regions(
    record: Mapping[str, Any],
    picture: Picture,
    rng: np.random.Generator,
    *,
    size: int,
    patch_size: int,
    options: RegionOptions = PRETRAINING,
) -> RegionSample:
    """Crop around a random region and return the texts of all visible regions.

    Each crop border is uniform between the chosen element's border and the image's. Other elements follow in random
    order if more than `least_visible` of their box is inside; boxes are clipped, flipped and scaled with the crop.
    Elements with an unusable box or caption are skipped and reported. `elems` of the record is a list of `{"bb": [x, y,
    w, h], "caption": ..., "attributes": ...}`; attributes precede the caption.
    """
    width, height = picture_size(picture)
    usable, whole, skipped = _usable(record, width, height)
    crop = crop_around(whole[rng.integers(len(whole))], width, height, rng)
    flip = bool(rng.random() < 0.5) and not (
        options.careful_flip and mentions_side(*_all_texts(record))
    )
    if options.augment:
        image = RegionTransform(size)(picture, crop, flip, rng)
    else:
        crop, flip, image = (0, 0, width, height), False, whole_image(picture, size)

    found: list[tuple[str, Rectangle]] = []
    frame = Rectangle(0, 0, crop[2] - crop[0], crop[3] - crop[1])
    if "caption" in record:
        _append_text(
            found, skipped, "the caption of the image", [record["caption"]], frame, options, rng
        )
    images = len(found)
    for choice in rng.permutation(len(usable)).tolist():
        if len(found) >= options.max_regions:
            break
        box, element = usable[choice]
        seen = visible_part(box, crop, flip)
        if _enough(seen, box, options):
            _append_text(
                found,
                skipped,
                f"the element at {_numbers(box)}",
                _fields(element),
                seen,
                options,
                rng,
            )
    grid = size // patch_size
    masks = [patch_mask(box, frame, grid) for _, box in found]
    return RegionSample(
        image=image,
        texts=tuple(text for text, _ in found),
        boxes=torch.tensor(
            [relative_box(box, frame) for _, box in found], dtype=torch.float32
        ).reshape(-1, 4),
        region_mask=torch.stack(masks)
        if masks
        else torch.zeros(0, 1 + grid * grid, dtype=torch.bool),
        is_image=torch.arange(len(found)) < images,
        skipped=tuple(skipped),
    )


def crop_around(box: Rectangle, width: int, height: int, rng: np.random.Generator) -> Box:
    """Random crop that contains the box: each border uniform between the box's and the image's."""
    left, top = int(rng.integers(math.floor(box.x) + 1)), int(rng.integers(math.floor(box.y) + 1))
    right = int(rng.integers(min(math.ceil(box.x + box.w), width), width + 1))
    bottom = int(rng.integers(min(math.ceil(box.y + box.h), height), height + 1))
    return left, top, right, bottom


def visible_part(box: Rectangle, crop: Box, flip: bool) -> Rectangle:
    """Part of a box inside a crop, in crop pixels; non-positive sides if there is no overlap."""
    left, top = max(box.x, crop[0]), max(box.y, crop[1])
    w, h = min(box.x + box.w, crop[2]) - left, min(box.y + box.h, crop[3]) - top
    return Rectangle(crop[2] - left - w if flip else left - crop[0], top - crop[1], w, h)


def relative_box(box: Rectangle, frame: Rectangle) -> tuple[float, float, float, float]:
    """(cx, cy, w, h) relative to `frame`."""
    return (
        (box.x + box.w / 2) / frame.w,
        (box.y + box.h / 2) / frame.h,
        box.w / frame.w,
        box.h / frame.h,
    )


def patch_mask(box: Rectangle, frame: Rectangle, grid: int) -> Tensor:
    """`[1 + grid * grid]` boolean: token 0 and every patch that intersects the box, at least one."""
    # Whole numbers are multiplied before they are divided, so that a border between patches is met exactly.
    rows, columns = (
        slice(
            min(math.floor(low * grid / side), grid - 1),
            max(math.ceil((low + extent) * grid / side), math.floor(low * grid / side) + 1),
        )
        for low, extent, side in ((box.y, box.h, frame.h), (box.x, box.w, frame.w))
    )
    mask = torch.zeros(1 + grid * grid, dtype=torch.bool)
    mask[0] = True
    mask[1:].view(grid, grid)[rows, columns] = True
    return mask


def sample_grounding(
    picture: Picture,
    box: Sequence[float],
    caption: str,
    rng: np.random.Generator,
    *,
    size: int,
    careful_flip: bool = True,
) -> tuple[Tensor, Tensor]:
    """Training view of grounding: random crop containing the box, flipped with probability 1/2.

    `box` is (x, y, w, h) in pixels. With `careful_flip` a caption that mentions left or right disables the flip.
    Returns normalised pixels `[3, size, size]` and the box `[4]` as (cx, cy, w, h) relative to them.
    """
    width, height = picture_size(picture)
    rectangle = box_inside(box, width, height)
    crop = crop_around(rectangle, width, height, rng)
    flip = bool(rng.random() < 0.5) and not (careful_flip and mentions_side(caption))
    frame = Rectangle(0, 0, crop[2] - crop[0], crop[3] - crop[1])
    target = relative_box(visible_part(rectangle, crop, flip), frame)
    return RegionTransform(size)(picture, crop, flip, rng), torch.tensor(
        target, dtype=torch.float32
    )


def elements_of(record: Mapping[str, Any]) -> list[Any]:
    """Regions of a record; an empty list raises `DataError`."""
    elements = record.get("elems")
    if not isinstance(elements, list) or not elements:
        raise DataError(
            "regions record has no elems; give a list of {'bb': [x, y, w, h], 'caption': text} or remove the record"
        )
    return elements


def every_region_text(
    record: Mapping[str, Any], width: int, height: int, options: RegionOptions
) -> tuple[list[str], list[list[str]], list[str]]:
    """Captions of the image, texts of each visible element, and reasons for unusable ones, before cleaning."""
    usable, _, skipped = _usable(record, width, height)
    captions: list[str] = []
    elements: list[list[str]] = []
    whole = (0, 0, width, height)

    def strings(fields: list[Any]) -> list[str]:
        choices = product(*(every_text(field, language=options.language) for field in fields))
        texts = [" ".join(words) for words in choices]
        for text in texts:
            clean_text(text, options)
        return texts

    try:
        captions = strings([record["caption"]]) if "caption" in record else []
    except DataError as error:
        skipped.append(f"the caption of the image: {error}")
    for box, element in usable:
        try:
            if not _enough(visible_part(box, whole, False), box, options):
                raise DataError(f"too little of it lies inside the {width}x{height} image")
            elements.append(strings(_fields(element)))
        except DataError as error:
            skipped.append(f"the element at {_numbers(box)}: {error}")
    return captions, elements, skipped


def _usable(
    record: Mapping[str, Any], width: int, height: int
) -> tuple[list[tuple[Rectangle, Mapping[str, Any]]], list[Rectangle], list[str]]:
    """Elements with a visible box, boxes fully inside the image, and reasons for the rest."""
    usable: list[tuple[Rectangle, Mapping[str, Any]]] = []
    skipped: list[str] = []
    for number, element in enumerate(elements_of(record)):
        try:
            if not isinstance(element, Mapping) or "bb" not in element or "caption" not in element:
                raise DataError(f"{element!r} is no mapping with 'bb' and 'caption'")
            # The official code drops fractions.
            box = Rectangle(*map(int, _four_numbers(element["bb"])))
            if min(box.x + box.w, width) <= max(box.x, 0) or min(box.y + box.h, height) <= max(
                box.y, 0
            ):
                raise DataError(f"box {_numbers(box)} shows nothing of the {width}x{height} image")
            usable.append((box, element))
        except DataError as error:
            skipped.append(f"element {number}: {error}")
    whole = [box for box, _ in usable if _inside(box, width, height)]
    if not whole:
        reason = (
            "; ".join(skipped) or f"no box of {len(usable)} lies inside the {width}x{height} image"
        )
        raise DataError(
            f"regions record has no element to crop around ({reason}); correct it or remove the record"
        )
    return usable, whole, skipped


def _fields(element: Mapping[str, Any]) -> list[Any]:
    return [element[name] for name in ("attributes", "caption") if name in element]


def _enough(seen: Rectangle, box: Rectangle, options: RegionOptions) -> bool:
    return seen.w > 0 and seen.h > 0 and seen.w * seen.h > options.least_visible * box.w * box.h


def _append_text(
    found: list[tuple[str, Rectangle]],
    skipped: list[str],
    name: str,
    fields: list[Any],
    box: Rectangle,
    text: TextOptions,
    rng: np.random.Generator,
) -> None:
    """Append the cleaned text and its box to `found`, or the reason to `skipped`."""
    try:
        words = " ".join(choose_text(field, rng, language=text.language) for field in fields)
        found.append((clean_text(words, text), box))
    except DataError as error:
        skipped.append(f"{name}: {error}")


def _all_texts(record: Mapping[str, Any]) -> Iterator[str]:
    """All captions and attributes of a record."""
    todo = [
        part.get(field)
        for part in (record, *record["elems"])
        for field in ("caption", "attributes")
    ]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)


def box_inside(box: Sequence[float], width: int, height: int) -> Rectangle:
    """Parse a box; one without area or outside the image raises `DataError`."""
    rectangle = _four_numbers(box)
    if not _inside(rectangle, width, height):
        raise DataError(
            f"box {_numbers(rectangle)} is not inside the {width}x{height} image; correct or remove it"
        )
    return rectangle


def _inside(box: Rectangle, width: int, height: int) -> bool:
    positive = box.w > 0 and box.h > 0
    return (
        positive
        and box.x >= 0
        and box.y >= 0
        and box.x + box.w <= width
        and box.y + box.h <= height
    )


def _four_numbers(value: Any) -> Rectangle:
    try:
        box = Rectangle(*map(float, value))
    except (TypeError, ValueError):
        raise DataError(f"box {value!r} is not four numbers [x, y, w, h]") from None
    if not all(map(math.isfinite, box)):
        raise DataError(f"box {value!r} is not four finite numbers [x, y, w, h]")
    return box


def _numbers(box: Rectangle) -> str:
    return "[" + ", ".join(f"{number:g}" for number in box) + "]"
