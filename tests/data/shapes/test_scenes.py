"""The shapes world: scenes are pure functions, splits do not leak, and pictures show what the scenes say."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from xfm_fast.data.shapes import (
    CANVAS,
    HELD_OUT,
    SPLITS,
    Scene,
    Split,
    Thing,
    allowed_pairs,
    captions,
    pixel_box,
    render,
    render_batch,
    scene,
)
from xfm_fast.data.shapes.rendering import RGB
from xfm_fast.data.shapes.scenes import COLOURS, PAIRS, SHAPES, SIZES, TEXTURES
from xfm_fast.errors import DataError

each_split = pytest.mark.parametrize("split", SPLITS)


def _scenes(split: Split, count: int = 300) -> list[Scene]:
    return [scene(3, index, split) for index in range(count)]


def _pairs(made: Scene) -> set[tuple[str, str]]:
    return {(thing.colour, thing.shape) for thing in made.things}


@each_split
def test_a_scene_follows_from_seed_split_and_index_alone(split: Split) -> None:
    forward = [scene(1, index, split) for index in range(20)]
    assert [scene(1, index, split) for index in reversed(range(20))] == forward[::-1]
    assert len(set(forward)) == 20
    assert [scene(2, index, split) for index in range(20)] != forward


def test_another_process_makes_the_same_scenes() -> None:
    program = (
        "from xfm_fast.data.shapes import captions, scene; print(captions(scene(5, 7, 'test')), scene(5, 7, 'val'))"
    )
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert made.strip() == f"{captions(scene(5, 7, 'test'))} {scene(5, 7, 'val')}"


def test_the_published_worlds_stay_what_they_are() -> None:
    """A change of the generator would silently change every world of a given seed."""
    assert scene(0, 0, "train") == Scene(
        things=(
            Thing("triangle", "yellow", "large", "plain", 36, 38, 25),
            Thing("square", "cyan", "small", "plain", 21, 5, 18),
        ),
        ground=181,
    )


@each_split
def test_objects_lie_apart_inside_the_canvas(split: Split) -> None:
    for made in _scenes(split):
        assert 1 <= len(made.things) <= 3
        cover = np.zeros((CANVAS, CANVAS), int)
        for thing in made.things:
            x, y, width, height = thing.box
            assert min(x, y) >= 1
            assert max(x + width, y + height) < CANVAS
            cover[y - 1 : y + height + 1, x - 1 : x + width + 1] += 1
        assert cover.max() == 1


def test_combinations_are_held_out() -> None:
    assert not HELD_OUT["train"]
    assert not HELD_OUT["known"]
    assert not HELD_OUT["val"] & HELD_OUT["test"]
    for split in ("val", "test"):
        assert len(HELD_OUT[split]) == 8
        assert {colour for colour, _ in HELD_OUT[split]} == set(COLOURS)
        assert {shape for _, shape in HELD_OUT[split]} == set(SHAPES)
    assert allowed_pairs("train") == PAIRS - HELD_OUT["val"] - HELD_OUT["test"]


@each_split
def test_no_scene_shows_a_combination_of_another_split(split: Split) -> None:
    foreign = set().union(*(HELD_OUT[other] for other in SPLITS if other != split))
    seen: set[tuple[str, str]] = set()
    for made in _scenes(split, 1000):
        assert not _pairs(made) & foreign
        if HELD_OUT[split]:
            assert _pairs(made) & HELD_OUT[split]
        seen |= _pairs(made)
    assert seen == allowed_pairs(split)


def test_train_uses_all_attributes_evenly() -> None:
    things = [thing for made in _scenes("train", 2000) for thing in made.things]
    for name, values in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("texture", TEXTURES)):
        shares = [sum(getattr(thing, name) == value for thing in things) / len(things) for value in values]
        # Two or three of the eight colours of a shape are held out, so colours and shapes cannot be exactly even.
        assert max(shares) < 1.6 * min(shares), name
    counts = [len(made.things) for made in _scenes("train", 2000)]
    for count, share in ((1, 0.2), (2, 0.55), (3, 0.25)):
        assert abs(counts.count(count) / 2000 - share) < 0.04


@pytest.mark.parametrize(("seed", "index", "split"), [(-1, 0, "train"), (0, -1, "train"), (0, 0, "dev")])
def test_impossible_scenes_are_refused(seed: int, index: int, split: Split) -> None:
    with pytest.raises(DataError):
        scene(seed, index, split)


@pytest.mark.parametrize("resolution", [16, 32, 64, 96])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("texture", TEXTURES)
def test_an_object_fills_its_box_and_nothing_else(resolution: int, shape: str, texture: str) -> None:
    made = Scene((Thing(shape, "black", "large", texture, 20, 30, 24),), ground=210)
    picture, empty = render(made, resolution), render(Scene((), made.ground), resolution)
    assert picture.shape == (resolution, resolution, 3)
    rows, columns = np.nonzero((picture != empty).any(2))
    x, y, width, height = pixel_box(made.things[0], resolution)
    assert x <= columns.min()
    assert columns.max() < x + width
    assert y <= rows.min()
    assert rows.max() < y + height
    if resolution == CANVAS:
        # Tight, but for dots on the very edge and the anti-aliased tip of a star.
        assert columns.max() - columns.min() >= width - 3
        assert rows.max() - rows.min() >= height - 3


def test_pixels_have_the_colour_that_the_scene_says() -> None:
    for made in _scenes("test", 100):
        picture = render(made).astype(int)
        for thing in made.things:
            if thing.texture != "plain" or thing.shape in ("star", "cross"):
                continue
            y, x = thing.y + thing.side // 2, thing.x + thing.side // 2
            expected = np.clip(np.array(RGB[thing.colour]) + _light_at(x, y) / 2, 0, 255)
            assert np.abs(picture[y, x] - expected).max() <= 2


def _light_at(x: int, y: int) -> np.ndarray:
    """From -44 at the left or upper edge to 44 at the other, in red across and in blue downwards."""
    red, blue = (88 * place / (CANVAS - 1) - 44 for place in (x, y))
    return np.array([red, -(red + blue) / 2, blue])


def test_every_place_of_the_ground_has_its_own_light() -> None:
    empty = render(Scene((), 200)).astype(int)
    for x, y in ((0, 0), (63, 0), (0, 63), (63, 63), (31, 31), (10, 50)):
        assert np.abs(empty[y, x] - 200 - _light_at(x, y)).max() <= 1


def test_looks_change_pixels() -> None:
    pictures = {
        (shape, colour, texture): render(Scene((Thing(shape, colour, "large", texture, 20, 20, 22),), 200)).tobytes()
        for shape in SHAPES
        for colour in COLOURS
        for texture in TEXTURES
    }
    assert len(set(pictures.values())) == len(pictures)


def test_a_batch_is_its_images_one_by_one() -> None:
    scenes = _scenes("val", 12)
    batch = render_batch(scenes)
    assert batch.dtype == np.uint8
    assert all(np.array_equal(image, render(made)) for image, made in zip(batch, scenes, strict=True))
    assert render_batch([]).shape == (0, CANVAS, CANVAS, 3)


def test_blending_agrees_with_floating_point() -> None:
    """The plain twin: cover the ground with the colour, sample by sample, without fixed-point weights."""
    from xfm_fast.data.shapes.rendering import _gaps, _inside

    for made in _scenes("train", 30):
        light = np.array([[_light_at(x, y) for x in range(CANVAS)] for y in range(CANVAS)])
        light = light.repeat(4, 0).repeat(4, 1)
        expected = made.ground + light
        for thing in made.things:
            n = thing.side * 4
            points = (np.arange(n) + 0.5) / 4
            unit = 2 * points / thing.side - 1
            inside = _inside(thing.shape, unit[None, :], unit[:, None])
            gap = _gaps(thing.texture, points[None, :], points[:, None])
            cover = (inside * (1 - 0.75 * gap))[:, :, None]
            window = np.s_[4 * thing.y : 4 * thing.y + n, 4 * thing.x : 4 * thing.x + n]
            expected[window] = (
                cover * (np.array(RGB[thing.colour]) + light[window] / 2) + (1 - cover) * expected[window]
            )
        expected = np.clip(expected.reshape(CANVAS, 4, CANVAS, 4, 3).mean((1, 3)), 0, 255)
        # Three roundings down, and weights of 7 bits.
        assert np.abs(render(made) - expected).max() <= 4


def test_a_resolution_without_shapes_is_refused() -> None:
    with pytest.raises(DataError, match="resolution=8"):
        render(scene(0, 0), 8)
