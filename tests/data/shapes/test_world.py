"""The shapes world on disk: official formats, the same bytes every time, never over something else."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xfm_fast.data.shapes import SPLITS, Split, captions, pixel_box, references, render, scene, write_world
from xfm_fast.data.shapes import world as world_module
from xfm_fast.errors import DataError, StorageError

COUNTS: dict[Split, int] = {"train": 24, "val": 8, "test": 8, "known": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "world"
    write_world(folder, seed=4, images=COUNTS)
    return folder


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _picture(binary: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(binary))))


@pytest.mark.parametrize("split", SPLITS)
def test_pretraining_files(world: Path, split: Split) -> None:
    pairs = _lines(world / f"pairs_{split}.jsonl")
    assert len(pairs) == COUNTS[split]
    for index, row in enumerate(pairs):
        made = scene(4, index, split)
        assert row["desc"] == captions(made)
        assert np.array_equal(_picture(row["binary"]), render(made))
    regions = _lines(world / f"regions_{split}.jsonl")
    named = [row for index, row in enumerate(pairs) if any(_names(index, split))]
    assert [row["binary"] for row in regions] == [row["binary"] for row in named]
    assert len(_lines(world / f"images_{split}.jsonl")) == len(_lines(world / f"texts_{split}.jsonl")) == COUNTS[split]
    binaries = {row["binary"] for row in pairs}
    assert not binaries & {row["binary"] for row in _lines(world / f"images_{split}.jsonl")}


def _names(index: int, split: Split) -> list[bool]:
    made = scene(4, index, split)
    return [bool(references(made, i)) for i in range(len(made.things))]


def test_regions_have_the_boxes_of_what_they_say(world: Path) -> None:
    regions = iter(_lines(world / "regions_train.jsonl"))
    seen = {"attributes": 0, "relations": 0}
    for index in range(COUNTS["train"]):
        if not any(_names(index, "train")):
            continue
        made = scene(4, index, "train")
        for element in next(regions)["elems"]:
            said = element["caption"] if isinstance(element["caption"], list) else [element["caption"]]
            said = [f"{element.get('attributes', '')} {text}".strip() for text in said]
            boxes = {
                str(ref): list(pixel_box(thing)) for i, thing in enumerate(made.things) for ref in references(made, i)
            }
            assert [boxes[text] for text in said] == [element["bb"]] * len(said)
            seen["attributes" if "attributes" in element else "relations"] += 1
    assert min(seen.values()) > 5


@pytest.mark.parametrize("split", SPLITS)
def test_fine_tuning_files(world: Path, split: Split) -> None:
    answers = json.loads((world / "answers.json").read_text())
    vqa = json.loads((world / f"vqa_{split}.json").read_text())
    assert len({row["question_id"] for row in vqa}) == len(vqa)
    assert {answer for row in vqa for answer in row["answer"]} <= set(answers)
    nlvr = json.loads((world / f"nlvr_{split}.json").read_text())
    assert [row["label"] for row in nlvr].count("True") == len(nlvr) / 2
    retrieval = json.loads((world / f"retrieval_{split}.json").read_text())
    if split == "train":
        assert len(retrieval) == 4 * COUNTS[split]
        assert len({row["image_id"] for row in retrieval}) == COUNTS[split]
    else:
        assert len({row["caption"][0] for row in retrieval}) == len(retrieval) > 0
    grounding = json.loads((world / f"grounding_{split}.json").read_text())
    assert len({row["ref_id"] for row in grounding}) == len(grounding) > 0
    named = {path for rows in (vqa, retrieval, grounding) for path in (row["image"] for row in rows)}
    for path in named | {path for row in nlvr for path in row["images"]}:
        index = int(Path(path).stem)
        assert np.array_equal(np.asarray(Image.open(world / path)), render(scene(4, index, split)))


@pytest.mark.parametrize("split", SPLITS)
def test_captioning_files(world: Path, split: Split) -> None:
    rows = json.loads((world / f"captioning_{split}.json").read_text())
    assert {row["image_id"] for row in rows} == set(range(COUNTS[split]))
    assert all(row["image"] == f"images/{split}/{row['image_id']:06d}.png" for row in rows)
    said = {index: captions(scene(4, index, split)) for index in range(COUNTS[split])}
    truth = world / f"captioning_{split}_gt.json"
    if split == "train":
        assert [row["caption"] for row in rows] == [caption for index in said for caption in said[index]]
        assert not truth.exists()
        return
    assert {row["image_id"]: row["caption"] for row in rows} == said
    found = json.loads(truth.read_text())
    assert [(row["id"], row["file_name"]) for row in found["images"]] == [
        (row["image_id"], row["image"]) for row in rows
    ]
    references = {index: [row["caption"] for row in found["annotations"] if row["image_id"] == index] for index in said}
    assert references == said
    assert len({row["id"] for row in found["annotations"]}) == len(found["annotations"])


@pytest.mark.parametrize("split", SPLITS)
def test_text_pairs_need_both_sentences(world: Path, split: Split) -> None:
    rows = _table(world / f"text_{split}.tsv", "\t")
    assert len(rows) >= COUNTS[split]
    assert [row["label"] for row in rows] == ["yes", "no"] * (len(rows) // 2)
    for yes, no in zip(rows[::2], rows[1::2], strict=True):
        assert yes["sentence1"] != no["sentence1"]
        if yes["sentence2"] != no["sentence2"]:
            opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
            assert [opposite.get(word, word) for word in yes["sentence2"].split()] == no["sentence2"].split()


@pytest.mark.parametrize("split", SPLITS)
def test_image_labels_are_the_shape_of_what_stands_out(world: Path, split: Split) -> None:
    rows = _table(world / f"image_{split}.csv", ",")
    labels = [row["label"] for row in rows]
    for row in rows:
        made = scene(4, int(Path(row["image"]).stem), split)
        assert row["label"] == max(made.things, key=lambda thing: thing.side).shape
    assert labels
    if split != "train":
        assert len({labels.count(label) for label in labels}) == 1


def _table(path: Path, separator: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter=separator))


def test_the_published_files_stay_what_they_are(world: Path) -> None:
    """Another digest would make numbers on the world of a seed incomparable; these files hold no picture."""
    digests = json.loads((world / "world.json").read_text())["sha256"]
    assert {task: digests[f"{task}_test.json"][:16] for task in ("vqa", "nlvr", "retrieval", "grounding")} == {
        "vqa": "8ca39c171312bd39",
        "nlvr": "c007961d31a0c54d",
        "retrieval": "8be1e6bc4ae2b824",
        "grounding": "80c093b30819f85f",
    }


def test_world_json_describes_the_files(world: Path) -> None:
    described = json.loads((world / "world.json").read_text())
    assert described["seed"] == 4
    assert described["images"] == COUNTS
    assert described["labels"]["text"] == ["no", "yes"]
    assert described["held_out"]["train"] == []
    assert "red circle" in described["held_out"]["test"]
    for name, digest in described["sha256"].items():
        assert hashlib.sha256((world / name).read_bytes()).hexdigest() == digest
    on_disk = {path.name for path in world.iterdir() if path.is_file()}
    assert on_disk == {*described["sha256"], "world.json"}


def test_the_same_world_twice_is_the_same_bytes(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "again", seed=4, images=dict(reversed(COUNTS.items())))
    files = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((world / path).read_bytes() == (tmp_path / "again" / path).read_bytes() for path in files)
    assert list(tmp_path.iterdir()) == [tmp_path / "again"]


def test_a_complete_world_is_left_as_it_is(world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert write_world(world, seed=4, images=COUNTS) == json.loads((world / "world.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_another_world_is_not_overwritten(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"seed 4.*5"):
        write_world(world, seed=5, images=COUNTS)
    with pytest.raises(DataError, match="images"):
        write_world(world, seed=4, images={"train": 3})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="shapes"):
        write_world(tmp_path, images={"train": 1})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_interrupted_world_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full_disk(path: Path, data: bytes) -> str:
        written.append(path)
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)
        return ""

    monkeypatch.setattr(world_module, "_write", full_disk)
    with pytest.raises(StorageError, match="space"):
        write_world(tmp_path / "world", images={"train": 9})
    assert not list(tmp_path.iterdir())


def test_the_second_writer_takes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes the same world, or another one, between the first look and the renaming."""
    made = write_world(tmp_path / "world", images={"val": 2})
    looks = iter([None])
    look = world_module._existing
    monkeypatch.setattr(world_module, "_existing", lambda *given: next(looks, look(*given)))
    assert write_world(tmp_path / "world", images={"val": 2}) == made
    looks = iter([None])
    with pytest.raises(DataError, match="shapes"):
        write_world(tmp_path / "world", images={"val": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


@pytest.mark.parametrize("images", [{"train": 0}, {"dev": 3}])
def test_impossible_counts_are_refused(tmp_path: Path, images: dict[Any, int]) -> None:
    with pytest.raises(DataError):
        write_world(tmp_path / "world", images=images)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    write_world(tmp_path / "world", images={"test": 2}, resolution=32)
    row = _lines(tmp_path / "world" / "pairs_test.jsonl")[0]
    assert _picture(row["binary"]).shape == (32, 32, 3)
