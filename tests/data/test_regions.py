"""Regions: what a crop shows is what its boxes, masks and texts say."""

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xfm_fast.data.options import RegionOptions
from xfm_fast.data.regions import (
    Rectangle,
    RegionSample,
    patch_mask,
    sample_grounding,
    sample_regions,
)
from xfm_fast.errors import DataError

SIZE, PATCH = 32, 8
GRID = SIZE // PATCH


@st.composite
def records(draw: st.DrawFn) -> tuple[dict[str, Any], np.ndarray]:
    """Draw a record of valid boxes, and an image of its size."""
    width, height = draw(st.integers(2, 60)), draw(st.integers(2, 60))
    elements = []
    for index in range(draw(st.integers(1, 7))):
        x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        w, h = draw(st.integers(1, width - x)), draw(st.integers(1, height - y))
        elements.append({"bb": [x, y, w, h], "caption": f"thing {index}"})
    record: dict[str, Any] = {"elems": elements}
    if draw(st.booleans()):
        record["caption"] = "everything"
    return record, np.zeros((height, width, 3), np.uint8)


def _sample(record: dict[str, Any], image: np.ndarray, seed: int, **options: Any) -> RegionSample:
    rng = np.random.default_rng(seed)
    return sample_regions(
        record, image, rng, size=SIZE, patch_size=PATCH, options=RegionOptions(**options)
    )


@given(made=records(), seed=st.integers(0, 2**32 - 1), most=st.integers(1, 6))
def test_invariants(made: tuple[dict[str, Any], np.ndarray], seed: int, most: int) -> None:
    record, image = made
    sample = _sample(record, image, seed, max_regions=most)
    count = len(sample.texts)
    captions = int("caption" in record)
    assert captions <= count <= most
    assert count >= min(most, captions + 1), "the element that was cropped around is seen whole"
    assert sample.image.shape == (3, SIZE, SIZE)
    assert sample.boxes.shape == (count, 4)
    assert sample.region_mask.shape == (count, 1 + GRID**2)
    assert sample.is_image.tolist() == [True] * captions + [False] * (count - captions)
    assert sample.texts[:captions] == ("everything",) * captions
    assert len(set(sample.texts)) == count, "no element comes twice"
    assert not sample.skipped
    low, high = (
        sample.boxes[:, :2] - sample.boxes[:, 2:] / 2,
        sample.boxes[:, :2] + sample.boxes[:, 2:] / 2,
    )
    assert (low >= -1e-6).all()
    assert (high <= 1 + 1e-6).all()
    assert (sample.boxes[:, 2:] > 0).all()
    assert sample.region_mask[:, 0].all()
    assert sample.region_mask[:, 1:].any(1).all()
    if captions:
        assert sample.boxes[0].tolist() == [0.5, 0.5, 1, 1]
        assert sample.region_mask[0].all()
    again = _sample(record, image, seed, max_regions=most)
    assert torch.equal(sample.boxes, again.boxes)
    assert sample.texts == again.texts


@given(
    numbers=st.tuples(*[st.integers(0, 50)] * 2, *[st.integers(1, 50)] * 2),
    frame=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    grid=st.integers(1, 14),
)
def test_patches_are_those_that_share_area_with_the_box(
    numbers: tuple[int, int, int, int], frame: tuple[int, int], grid: int
) -> None:
    x, y, w, h = numbers
    box, captions = (
        Rectangle(x, y, w, h),
        Rectangle(0, 0, x + w + frame[0] - 1, y + h + frame[1] - 1),
    )
    width, height = Fraction(int(captions.w), grid), Fraction(int(captions.h), grid)
    expected = [
        min(x + w, (column + 1) * width) > max(x, column * width)
        and min(y + h, (row + 1) * height) > max(y, row * height)
        for row in range(grid)
        for column in range(grid)
    ]
    mask = patch_mask(box, captions, grid)
    assert mask.tolist() == [True, *expected]
    assert mask[1:].any()


def _painted(width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    x, y, w, h = box
    image[y : y + h, x : x + w] = 255
    return image


def _white(image: torch.Tensor) -> tuple[float, float, float, float]:
    """(cx, cy, w, h) of the bright part of an image, relative to it; equalisation adds the blur of its border."""
    bright = image.mean(0) > 0
    rows, columns = torch.nonzero(bright.any(1)).flatten(), torch.nonzero(bright.any(0)).flatten()
    size = image.shape[1]
    left, right, top, bottom = (
        int(value) for value in (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1)
    )
    return (
        (left + right) / 2 / size,
        (top + bottom) / 2 / size,
        (right - left) / size,
        (bottom - top) / size,
    )


def test_the_box_is_where_the_object_is_seen() -> None:
    record = {"elems": [{"bb": [30, 20, 50, 40], "caption": "white"}]}
    image = _painted(120, 90, (30, 20, 50, 40))
    mirrored = 0
    for seed in range(60):
        sample = sample_regions(record, image, np.random.default_rng(seed), size=96, patch_size=16)
        assert np.abs(np.array(_white(sample.image)) - sample.boxes[0].numpy()).max() < 3.5 / 96
        mirrored += bool(sample.boxes[0, 0] > 0.5)
    assert 10 < mirrored < 50


@pytest.mark.parametrize(("x", "kept"), [(-10, False), (-9, True)])
def test_exactly_half_is_too_little(x: int, kept: bool) -> None:
    record = {
        "elems": [
            {"bb": [0, 0, 20, 20], "caption": "all"},
            {"bb": [x, 0, 20, 10], "caption": "part"},
        ]
    }
    for seed in range(5):
        assert ("part" in _sample(record, np.zeros((20, 20, 3), np.uint8), seed).texts) is kept


def test_texts_come_with_attributes_and_clean() -> None:
    record = {
        "caption": ["A Photo!", "a photo"],
        "elems": [{"bb": [0, 0, 9, 9], "caption": ["Cat."], "attributes": ["Big", "big"]}],
    }
    sample = _sample(record, np.zeros((10, 10, 3), np.uint8), 0)
    assert sample.texts == ("a photo", "big cat")
    short = _sample(record, np.zeros((10, 10, 3), np.uint8), 0, max_words=1)
    assert short.texts == ("a", "big")
    tokenized = {"elems": [{"bb": [0, 0, 9, 9], "caption": "skate ##board ##er"}]}
    sample = _sample(tokenized, np.zeros((10, 10, 3), np.uint8), 0, tokenized=True)
    assert sample.texts == ("skateboarder",)


@pytest.mark.parametrize(
    "texts",
    [
        {"caption": {"en": "a", "de": "Right"}},
        {"elems": [{"bb": [2, 2, 10, 6], "caption": "x", "attributes": "LEFT"}]},
    ],
)
def test_careful_flip(texts: dict[str, Any]) -> None:
    record = {"elems": [{"bb": [2, 2, 10, 6], "caption": "x"}], **texts}
    image = np.tile(np.linspace(0, 255, 40, dtype=np.uint8)[None, :, None], (20, 1, 3))

    def flips(**options: bool) -> list[bool]:
        samples = (_sample(record, image, seed, **options) for seed in range(40))
        return [bool(sample.image[0, 0, 0] > sample.image[0, 0, -1]) for sample in samples]

    assert not any(flips(careful_flip=True))
    assert 8 < sum(flips()) < 32


BAD: list[tuple[Any, str]] = [
    ({"bb": [3, 3, 0, 5], "caption": "a"}, r"box \[3, 3, 0, 5\] shows nothing"),
    ({"bb": [3, 3, math.nan, 5], "caption": "a"}, "finite"),
    ({"bb": "abcd", "caption": "a"}, "four numbers"),
    ("cat", "not a mapping with 'bb' and 'caption'"),
]


@pytest.mark.parametrize(("element", "message"), BAD)
def test_broken_elements_are_skipped_and_named(element: Any, message: str) -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    record = {"elems": [{"bb": [2, 2, 10, 10], "caption": "good"}, element]}
    for seed in range(5):
        sample = _sample(record, image, seed)
        assert sample.texts == ("good",)
        (reason,) = sample.skipped
        assert reason.startswith("element 1: ")
        assert re.search(message, reason)
    with pytest.raises(DataError, match=message):
        _sample({"elems": [element]}, image, 0)


def test_grounding_views() -> None:
    image = _painted(120, 90, (30, 20, 50, 40))
    mirrored = 0
    for seed in range(60):
        view, box = sample_grounding(
            image, [30, 20, 50, 40], "the white one", np.random.default_rng(seed), size=96
        )
        assert view.shape == (3, 96, 96)
        assert np.abs(np.array(_white(view)) - box.numpy()).max() < 3.5 / 96
        mirrored += bool(box[0] > 0.5)
    assert 10 < mirrored < 50
    fractions = sample_grounding(
        image, [30.25, 20.5, 50.5, 40.125], "x", np.random.default_rng(0), size=96
    )[1]
    assert (fractions[2:] > 0).all()
    ramp = np.tile(np.linspace(0, 255, 40, dtype=np.uint8)[None, :, None], (20, 1, 3))
    for seed in range(30):
        rng = np.random.default_rng(seed)
        view, _ = sample_grounding(ramp, [5, 5, 10, 10], "the left one", rng, size=16)
        assert view[0, 0, 0] < view[0, 0, -1]
