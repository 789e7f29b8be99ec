"""The shapes dataset: pure scenes, splits without leaks, true texts (parsed independently), stable bytes."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xfm_fast.data.shapes import Scene, Split, captions, render, scene, write_world
from xfm_fast.data.shapes.language import ANSWERS, questions, references
from xfm_fast.data.shapes.scenes import (
    CANVAS,
    HELD_OUT,
    PAIRS,
    SPLITS,
    Thing,
    allowed_pairs,
    pixel_box,
)
from xfm_fast.errors import DataError

SCENES = {split: [scene(11, index, split) for index in range(150)] for split in SPLITS}
NUMBERS = ["no", "one", "two", "three", "four", "five", "six"]
CANON = {
    "to the left of": "left of",
    "to the right of": "right of",
    "over": "above",
    "under": "below",
}
RELATION = re.compile(r" ((?:to the )?(?:left|right) of|above|over|below|under) ")
COUNTS: dict[Split, int] = {"train": 24, "val": 8, "test": 8, "known": 8}
each_split = pytest.mark.parametrize("split", SPLITS)


def _is(thing: Thing, noun: str) -> bool:
    """Return whether every word of "small red circle" is true of the object; "object" is true of all."""
    words = [word for word in noun.split() if word not in ("a", "an", "the", "object")]
    return all(word in (thing.size, thing.colour, thing.texture, thing.shape) for word in words)


def _stands(a: Thing, relation: str, b: Thing) -> bool:
    (ax, ay), (bx, by) = ((thing.x + thing.side / 2, thing.y + thing.side / 2) for thing in (a, b))
    distances = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}
    return distances[CANON.get(relation, relation)] >= 8


def _meant(current: Scene, expression: str) -> list[Thing]:
    noun, *words = RELATION.split(expression, maxsplit=1)
    things = [thing for thing in current.things if _is(thing, noun)]
    if not words:
        return things
    relation, anchor = words
    anchors = _meant(current, anchor)
    assert len(anchors) == 1, expression
    return [
        thing
        for thing in things
        if thing is not anchors[0] and _stands(thing, relation, anchors[0])
    ]


def test_a_scene_follows_from_seed_split_and_index() -> None:
    """Pin the generator, whose change would silently change every dataset of a seed."""
    assert scene(0, 0, "train") == Scene(
        things=(
            Thing("triangle", "yellow", "large", "plain", 36, 38, 25),
            Thing("square", "cyan", "small", "plain", 21, 5, 18),
        ),
        ground=181,
    )
    assert (
        len(
            {
                scene(seed, index, split)
                for seed in (1, 2)
                for index in range(20)
                for split in SPLITS
            }
        )
        == 160
    )


@each_split
def test_objects_lie_apart_and_show_the_combinations_of_their_split(split: Split) -> None:
    foreign = set().union(*(HELD_OUT[name] for name in SPLITS if name != split))
    seen: set[tuple[str, str]] = set()
    for index in range(300):
        current = scene(3, index, split)
        pairs = {(thing.colour, thing.shape) for thing in current.things}
        assert not pairs & foreign
        assert not HELD_OUT[split] or pairs & HELD_OUT[split]
        seen |= pairs
        cover = np.zeros((CANVAS, CANVAS), int)
        for thing in current.things:
            assert min(thing.x, thing.y) >= 1
            assert max(thing.x, thing.y) + thing.side < CANVAS
            cover[
                thing.y - 1 : thing.y + thing.side + 1, thing.x - 1 : thing.x + thing.side + 1
            ] += 1
        assert cover.max() == 1
    assert seen == allowed_pairs(split)
    assert allowed_pairs("train") == PAIRS - HELD_OUT["val"] - HELD_OUT["test"]


@each_split
def test_references_and_answers_are_right(split: Split) -> None:
    for current in SCENES[split]:
        for index, thing in enumerate(current.things):
            assert all(
                _meant(current, str(reference)) == [thing]
                for reference in references(current, index)
            )
        for question, answer in questions(current, split):
            assert answer in ANSWERS
            assert answer == _answer(current, question), question


def _answer(current: Scene, question: str) -> str:
    if question == "how many objects are there":
        return NUMBERS[len(current.things)]
    if match := re.fullmatch("is there (?:a|an) (.*)", question):
        return "yes" if _meant(current, match[1]) else "no"
    if match := re.fullmatch("what (color|size|shape) is the (.*)", question):
        (thing,) = _meant(current, match[2])
        return {"color": thing.colour, "size": thing.size, "shape": thing.shape}[match[1]]
    if match := re.fullmatch("what shape is (left of|right of|above|below) the (.*)", question):
        (anchor,) = _meant(current, match[2])
        (thing,) = [
            candidate
            for candidate in current.things
            if candidate is not anchor and _stands(candidate, match[1], anchor)
        ]
        return thing.shape
    match = re.fullmatch("is the (.*) (left of|right of|above|below) the (.*)", question)
    assert match, question
    (a,), (b,) = _meant(current, match[1]), _meant(current, match[3])
    return "yes" if _stands(a, match[2], b) else "no"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "world"
    write_world(folder, seed=4, images=COUNTS)
    return folder


def _read(path: Path) -> Any:
    text = path.read_text()
    return (
        [json.loads(line) for line in text.splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(text)
    )


@each_split
def test_files_of_a_split(world: Path, split: Split) -> None:
    scenes = [scene(4, index, split) for index in range(COUNTS[split])]
    pairs = _read(world / f"pairs_{split}.jsonl")
    assert [row["desc"] for row in pairs] == [captions(current) for current in scenes]
    boxes: dict[str, dict[str, list[int]]] = {}
    for row, current in zip(pairs, scenes, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["binary"]))))
        assert np.array_equal(picture, render(current))
        things = enumerate(current.things)
        boxes[row["binary"]] = {
            str(ref): [*pixel_box(thing)] for i, thing in things for ref in references(current, i)
        }
    assert not {row["binary"] for row in pairs} & {
        row["binary"] for row in _read(world / f"images_{split}.jsonl")
    }
    for row in _read(world / f"regions_{split}.jsonl"):
        for element in row["elems"]:
            texts = (
                element["caption"] if isinstance(element["caption"], list) else [element["caption"]]
            )
            for text in texts:
                assert (
                    boxes[row["binary"]][f"{element.get('attributes', '')} {text}".strip()]
                    == element["bb"]
                )
    nlvr = _read(world / f"nlvr_{split}.json")
    assert [row["label"] for row in nlvr].count("True") == len(nlvr) / 2
    if split != "train":
        retrieval = _read(world / f"retrieval_{split}.json")
        assert len({row["caption"][0] for row in retrieval}) == len(retrieval) > 0
    with (world / f"text_{split}.tsv").open(newline="") as file:
        text = list(csv.DictReader(file, delimiter="\t"))
    assert [row["label"] for row in text] == ["yes", "no"] * (len(text) // 2)
    with (world / f"image_{split}.csv").open(newline="") as file:
        image = list(csv.DictReader(file))
    labels = [row["label"] for row in image]
    for row, label in zip(image, labels, strict=True):
        assert (
            label
            == max(scenes[int(Path(row["image"]).stem)].things, key=lambda thing: thing.side).shape
        )
    assert split == "train" or len({labels.count(label) for label in labels}) == 1


def test_bytes_follow_from_the_arguments(world: Path, tmp_path: Path) -> None:
    """Another digest would make numbers on the dataset of a seed incomparable; the files here hold no image."""
    files = sorted(path for path in world.iterdir() if path.is_file() and path.name != "world.json")
    texts = [path for path in files if not path.name.startswith(("pairs", "regions", "images"))]
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in texts)
    assert hashlib.sha256(digests.encode()).hexdigest()[:32] == "a61c6c361e82442d9730a2e267083dfa"
    (tmp_path / "again").mkdir()
    described = write_world(tmp_path / "again", seed=4, images=dict(reversed(COUNTS.items())))
    assert described == _read(world / "world.json")
    assert [path.read_bytes() for path in files] == [
        (tmp_path / "again" / path.name).read_bytes() for path in files
    ]


def test_a_folder_is_reused_or_refused(world: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert write_world(world, seed=4, images=COUNTS) == _read(world / "world.json")
    with pytest.raises(DataError, match=r"seed 4.*5"):
        write_world(world, seed=5, images=COUNTS)
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="shapes"):
        write_world(tmp_path, images={"train": 1})
    assert [*tmp_path.iterdir()] == [tmp_path / "notes.txt"]
