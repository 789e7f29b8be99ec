"""Region captions of an image: one random crop, with boxes and patch masks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from numpy.random import Generator
from torch import Tensor

from xfm_fast.data.options import Record, RegionOptions
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
    record: Record,
    picture: Picture,
    rng: Generator,
    *,
    size: int,
    patch_size: int,
    options: RegionOptions = PRETRAINING,
) -> RegionSample:
    """Crop around a random region and return the texts of all visible regions.

    Each crop border is uniform between the element's border and the image's. Other elements follow
    in random order if more than `least_visible` of their box is inside; boxes are clipped, flipped
    and scaled with the crop. Elements with an unusable box or caption are skipped and reported.
    `elems` of the record is a list of `{"bb": [x, y, w, h], "caption": ..., "attributes": ...}`;
    attributes precede the caption.
    """
    width, height = picture_size(picture)
    elements, anchors, skipped = _usable_elements(record, width, height)
    crop = crop_around(anchors[rng.integers(len(anchors))], width, height, rng)
    flip = bool(rng.random() < 0.5)
    if options.careful_flip and mentions_side(*_all_texts(record)):
        flip = False
    if options.augment:
        image = RegionTransform(size)(picture, crop, flip, rng)
    else:
        crop, flip, image = (0, 0, width, height), False, whole_image(picture, size)
    frame = Rectangle(0, 0, crop[2] - crop[0], crop[3] - crop[1])

    texts: list[str] = []
    boxes: list[Rectangle] = []

    def append(name: str, fields: list[Any], box: Rectangle) -> None:
        try:
            words = [choose_text(field, rng, language=options.language) for field in fields]
            texts.append(clean_text(" ".join(words), options))
            boxes.append(box)
        except DataError as error:
            skipped.append(f"{name}: {error}")

    if "caption" in record:
        append("the caption of the image", [record["caption"]], frame)
    captions = len(texts)
    for index in rng.permutation(len(elements)).tolist():
        if len(texts) >= options.max_regions:
            break
        box, element = elements[index]
        visible = visible_part(box, crop, flip)
        if _is_visible(visible, box, options):
            append(f"the element at {_format(box)}", _text_fields(element), visible)
    grid = size // patch_size
    masks = [patch_mask(box, frame, grid) for box in boxes]
    relative = [relative_box(box, frame) for box in boxes]
    return RegionSample(
        image=image,
        texts=tuple(texts),
        boxes=torch.tensor(relative, dtype=torch.float32).reshape(-1, 4),
        region_mask=torch.stack(masks) if masks else torch.zeros(0, 1 + grid * grid).bool(),
        is_image=torch.arange(len(texts)) < captions,
        skipped=tuple(skipped),
    )


def crop_around(box: Rectangle, width: int, height: int, rng: Generator) -> Box:
    """Draw a crop that contains the box: each border uniform between the box's and the image's."""
    left, top = int(rng.integers(math.floor(box.x) + 1)), int(rng.integers(math.floor(box.y) + 1))
    right = int(rng.integers(min(math.ceil(box.x + box.w), width), width + 1))
    bottom = int(rng.integers(min(math.ceil(box.y + box.h), height), height + 1))
    return left, top, right, bottom


def visible_part(box: Rectangle, crop: Box, flip: bool) -> Rectangle:
    """Clip a box to a crop, in crop pixels; non-positive sides if there is no overlap."""
    left, top = max(box.x, crop[0]), max(box.y, crop[1])
    w, h = min(box.x + box.w, crop[2]) - left, min(box.y + box.h, crop[3]) - top
    x = crop[2] - left - w if flip else left - crop[0]
    return Rectangle(x, top - crop[1], w, h)


def relative_box(box: Rectangle, frame: Rectangle) -> tuple[float, float, float, float]:
    """Return (cx, cy, w, h) relative to `frame`."""
    cx, cy = box.x + box.w / 2, box.y + box.h / 2
    return cx / frame.w, cy / frame.h, box.w / frame.w, box.h / frame.h


def patch_mask(box: Rectangle, frame: Rectangle, grid: int) -> Tensor:
    """Mask token 0 and every patch that intersects the box, at least one: boolean `[1 + grid * grid]`."""

    def patches(low: float, extent: float, side: float) -> slice:
        # Integers are multiplied before the division, so that a border between patches is exact.
        first = math.floor(low * grid / side)
        end = math.ceil((low + extent) * grid / side)
        return slice(min(first, grid - 1), max(end, first + 1))

    rows, columns = patches(box.y, box.h, frame.h), patches(box.x, box.w, frame.w)
    mask = torch.zeros(1 + grid * grid, dtype=torch.bool)
    mask[0] = True
    mask[1:].view(grid, grid)[rows, columns] = True
    return mask


def sample_grounding(
    picture: Picture,
    box: Sequence[float],
    caption: str,
    rng: Generator,
    *,
    size: int,
    careful_flip: bool = True,
) -> tuple[Tensor, Tensor]:
    """Crop randomly around the box and flip with probability 1/2: the training view of grounding.

    `box` is (x, y, w, h) in pixels. With `careful_flip` a caption that mentions left or right
    disables the flip. Returns normalised pixels `[3, size, size]` and the box `[4]` as (cx, cy, w,
    h) relative to them.
    """
    width, height = picture_size(picture)
    rectangle = box_inside(box, width, height)
    crop = crop_around(rectangle, width, height, rng)
    flip = bool(rng.random() < 0.5) and not (careful_flip and mentions_side(caption))
    frame = Rectangle(0, 0, crop[2] - crop[0], crop[3] - crop[1])
    target = relative_box(visible_part(rectangle, crop, flip), frame)
    pixels = RegionTransform(size)(picture, crop, flip, rng)
    return pixels, torch.tensor(target, dtype=torch.float32)


def elements_of(record: Record) -> list[Any]:
    """Return the regions of a record; none raises `DataError`."""
    elements = record.get("elems")
    if not isinstance(elements, list) or not elements:
        raise DataError(
            "regions record has no elems; give a list of {'bb': [x, y, w, h], 'caption': text} or remove the record"
        )
    return elements


def every_region_text(
    record: Record, width: int, height: int, options: RegionOptions
) -> tuple[list[str], list[list[str]], list[str]]:
    """List captions of the image, texts of each visible element, and reasons for unusable ones, before cleaning."""
    elements, _, skipped = _usable_elements(record, width, height)
    captions: list[str] = []
    texts: list[list[str]] = []

    def combine(fields: list[Any]) -> list[str]:
        options_of_fields = [every_text(field, language=options.language) for field in fields]
        combinations = [" ".join(words) for words in product(*options_of_fields)]
        for text in combinations:
            clean_text(text, options)
        return combinations

    try:
        if "caption" in record:
            captions = combine([record["caption"]])
    except DataError as error:
        skipped.append(f"the caption of the image: {error}")
    for box, element in elements:
        try:
            if not _is_visible(visible_part(box, (0, 0, width, height), False), box, options):
                raise DataError(f"too little of it lies inside the {width}x{height} image")
            texts.append(combine(_text_fields(element)))
        except DataError as error:
            skipped.append(f"the element at {_format(box)}: {error}")
    return captions, texts, skipped


def _usable_elements(
    record: Record, width: int, height: int
) -> tuple[list[tuple[Rectangle, Record]], list[Rectangle], list[str]]:
    """Return elements with a visible box, boxes fully inside the image, and reasons for the other elements."""
    elements: list[tuple[Rectangle, Record]] = []
    skipped: list[str] = []
    for index, element in enumerate(elements_of(record)):
        try:
            if not isinstance(element, Mapping) or "bb" not in element or "caption" not in element:
                raise DataError(f"{element!r} is not a mapping with 'bb' and 'caption'")
            # The official code drops fractions.
            box = Rectangle(*map(int, _parse_box(element["bb"])))
            visible = visible_part(box, (0, 0, width, height), False)
            if visible.w <= 0 or visible.h <= 0:
                raise DataError(f"box {_format(box)} shows nothing of the {width}x{height} image")
            elements.append((box, element))
        except DataError as error:
            skipped.append(f"element {index}: {error}")
    inside = [box for box, _ in elements if _is_inside(box, width, height)]
    if not inside:
        reason = "; ".join(skipped)
        reason = reason or f"no box of {len(elements)} lies inside the {width}x{height} image"
        raise DataError(
            f"regions record has no element to crop around ({reason}); correct it or remove the record"
        )
    return elements, inside, skipped


def _text_fields(element: Record) -> list[Any]:
    return [element[name] for name in ("attributes", "caption") if name in element]


def _is_visible(visible: Rectangle, box: Rectangle, options: RegionOptions) -> bool:
    if visible.w <= 0 or visible.h <= 0:
        return False
    return visible.w * visible.h > options.least_visible * box.w * box.h


def _all_texts(record: Record) -> Iterator[str]:
    """Yield all captions and attributes of a record."""
    values = [
        mapping.get(field)
        for mapping in (record, *record["elems"])
        for field in ("caption", "attributes")
    ]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)


def box_inside(box: Sequence[float], width: int, height: int) -> Rectangle:
    """Parse a box; one without area or outside the image raises `DataError`."""
    rectangle = _parse_box(box)
    if not _is_inside(rectangle, width, height):
        raise DataError(
            f"box {_format(rectangle)} is not inside the {width}x{height} image; correct or remove it"
        )
    return rectangle


def _is_inside(box: Rectangle, width: int, height: int) -> bool:
    if box.w <= 0 or box.h <= 0 or box.x < 0 or box.y < 0:
        return False
    return box.x + box.w <= width and box.y + box.h <= height


def _parse_box(value: Any) -> Rectangle:
    try:
        box = Rectangle(*map(float, value))
    except (TypeError, ValueError):
        raise DataError(f"box {value!r} is not four numbers [x, y, w, h]") from None
    if not all(map(math.isfinite, box)):
        raise DataError(f"box {value!r} is not four finite numbers [x, y, w, h]")
    return box


def _format(box: Rectangle) -> str:
    return "[" + ", ".join(f"{side:g}" for side in box) + "]"
