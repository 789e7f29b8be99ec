"""An index holds the features of the current images, and computes none twice."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from tests.data.record_files import pairs, write_lines
from tests.search.conftest import write_model, write_picture
from tests.training.small_runs import in_processes, join_group
from xfm_fast.errors import DataError, StorageError
from xfm_fast.search import (
    IndexReport,
    SearchModel,
    build_index,
    index,
    index_folder,
    open_index,
    open_model,
)
from xfm_fast.training.distributed import join_processes


def indexed(photos: Path, model: SearchModel, **options: Any) -> tuple[IndexReport, int]:
    """Index, and count the images that were read."""
    numbers = [0]
    report = build_index(photos, model, progress=lambda done, of: numbers.append(done), **options)
    return report, max(numbers)


def check_features(photos: Path, model: SearchModel) -> list[str]:
    """Compare the features of an index with `encode`; returns the names of its images."""
    opened = open_index(photos)
    names = [entry.name for entry in opened.entries]
    np.testing.assert_allclose(
        opened.features, model.model.encode([photos / name for name in names]), atol=1e-5
    )
    return names


def test_only_new_and_changed_images_are_read(photos: Path, model: SearchModel) -> None:
    report = build_index(photos, model, batch_size=3)
    assert (report.images, report.added, report.removed, dict(report.faults)) == (7, 7, 0, {})
    names = check_features(photos, model)
    assert names == sorted(names)
    assert isinstance(open_index(photos).features.base, np.memmap)
    before = {path.name: path.stat().st_mtime_ns for path in index_folder(photos).iterdir()}
    assert indexed(photos, model)[1] == 0
    assert {path.name: path.stat().st_mtime_ns for path in index_folder(photos).iterdir()} == before
    write_picture(photos / "7.png", 7)
    write_picture(photos / "0.png", 9)
    os.utime(photos / "0.png", ns=(1, 1))
    (photos / "2.png").unlink()
    report, read = indexed(photos, model)
    assert (report.images, report.added, report.removed, read) == (7, 2, 1, 2)
    assert "2.png" not in check_features(photos, model)


def test_captions_are_renewed_without_their_images(photos: Path, model: SearchModel) -> None:
    (photos / "0.txt").write_text("a star")
    build_index(photos, model)
    (photos / "0.txt").write_text("a red star\na star\n")
    (photos / "trip/1.txt").write_text("a trip")
    assert indexed(photos, model)[1] == 0
    captions = {
        entry.name: entry.captions for entry in open_index(photos).entries if entry.captions
    }
    assert captions == {"0.png": ("a red star", "a star"), "trip/1.png": ("a trip",)}
    (photos / "0.txt").unlink()
    build_index(photos, model)
    assert open_index(photos).entries[0].captions == ()


def test_broken_images_are_listed(photos: Path, model: SearchModel) -> None:
    (photos / "3.png").write_bytes(b"none")
    for expected in (8, 1):
        report, read = indexed(photos, model)
        assert (report.images, [*report.faults], read) == (7, ["3.png"], expected)
    write_picture(photos / "3.png", 3)
    assert build_index(photos, model).images == 8


def test_a_killed_run_resumes(
    photos: Path, model: SearchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_SHARD_IMAGES", 2)

    def kill(done: int, of: int) -> None:
        if done == 4:
            os._exit(9)

    if (child := os.fork()) == 0:
        build_index(photos, model, batch_size=1, progress=kill)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (index_folder(photos) / "index.json").exists()
    # Half a part is none; files of other names stay.
    ours = [f"part-0-{model.fingerprint}-0123456789ab.jsonl", "images-0123456789ab.jsonl"]
    foreign = ["part-1.jpg", "images-2024.jsonl", "features-old.f32"]
    for name in (*ours, *foreign):
        (index_folder(photos) / name).write_text('{"name":')
    report, read = indexed(photos, model)
    assert (report.images, read) == (7, 3)
    check_features(photos, model)
    left = {path.name for path in index_folder(photos).iterdir()}
    assert {*foreign} < left
    assert len(left) == len(foreign) + 3


def test_a_stopped_run_resumes_and_one_runs_at_a_time(photos: Path, model: SearchModel) -> None:
    stop = Event()
    stop.set()
    report, read = indexed(photos, model, stop=stop)
    assert (report, read) == (IndexReport(index_folder(photos), interrupted=True), 1)

    def second(done: int, of: int) -> None:
        assert of == 6
        with pytest.raises(StorageError, match="in use"):
            build_index(photos, model)

    assert build_index(photos, model, progress=second).images == 7


def test_another_model_or_collection_is_refused(
    photos: Path, model: SearchModel, tmp_path: Path
) -> None:
    build_index(photos, model)
    second = open_model(write_model(tmp_path / "other", seed=1))
    for call in (lambda: build_index(photos, second), lambda: open_index(photos).check(second)):
        with pytest.raises(DataError, match="other"):
            call()
    # The number format is none of its identity.
    open_index(photos).check(open_model(replace(model.source, dtype="bf16")))
    build_index(photos, model, tmp_path / "index")
    with pytest.raises(DataError, match=r"photos.*trip"):
        build_index(photos / "trip", model, tmp_path / "index")


@pytest.fixture(scope="module")
def built(model: SearchModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an index of two images."""
    folder = tmp_path_factory.mktemp("whole")
    for seed in range(2):
        write_picture(folder / f"{seed}.png", seed)
    return build_index(folder, model).folder


@pytest.mark.parametrize(
    ("pattern", "damage", "word"),
    [
        ("index.json", lambda header: header | {"format": 1}, "format"),
        ("index.json", lambda header: header | {"images": 5}, "5 images"),
        ("index.json", lambda header: header | {"entries": "/dev/zero"}, "entries"),
        ("index.json", lambda header: header | {"features": "../images"}, "features"),
        ("index.json", lambda header: header | {"features": "missing"}, "missing"),
        ("index.json", lambda header: [], "damaged"),
        ("features-*", lambda content: content[:-4], "features"),
        ("features-*", lambda content: content[:-4] + b"1234", "checksum"),
        ("images-*", lambda content: content.replace(b"0.png", b"1.png", 1), "checksum"),
        ("images-*", lambda content: b"5\n" * 2, "damaged"),
    ],
)
def test_a_damaged_index_is_refused(
    built: Path, tmp_path: Path, pattern: str, damage: Any, word: str
) -> None:
    folder = shutil.copytree(built, tmp_path / "index")
    path = next(folder.glob(pattern))
    content = path.read_bytes()
    damaged = (
        json.dumps(damage(json.loads(content))).encode()
        if path.suffix == ".json"
        else damage(content)
    )
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=word):
        open_index(folder)


def test_an_index_moves_with_its_folder(photos: Path, model: SearchModel, tmp_path: Path) -> None:
    build_index(photos, model)
    moved = Path(shutil.move(photos, tmp_path / "moved"))
    opened = open_index(moved)
    assert opened.load(opened.entries[0]).size == (80, 60)
    assert indexed(moved, model)[1] == 0


def test_rows_of_a_file(tmp_path: Path, model: SearchModel) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", [*pairs(3), {"binary": "!", "desc": "broken"}])
    report = build_index(path, model)
    assert (report.images, [*report.faults]) == (3, ["pairs.jsonl#4"])
    opened = open_index(path)
    assert opened.entries[1].caption == "picture number 1 of a cat"
    assert opened.folder == tmp_path / "pairs.jsonl.xfm-index"


def test_what_cannot_be_indexed(photos: Path, model: SearchModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/index"):
        build_index(photos, model, tmp_path / "file" / "index")
    for path in (photos, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=path.name):
            open_index(path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"a\.png"):
        build_index(tmp_path / "broken", model)


def _build(
    rank: int,
    world_size: int,
    photos: Path,
    weights: Path,
    folder: Path,
    shard_images: int,
    last: int,
) -> None:
    """Build an index as one of several processes, which is stopped after `last` images."""
    join_group(rank, world_size, folder.with_name(f"meet-{folder.name}-{world_size}-{last}"))
    index._SHARD_IMAGES = shard_images
    stop = Event()

    def count(done: int, of: int) -> None:
        if done >= last:
            stop.set()

    with join_processes("cpu") as processes:
        report = build_index(
            photos,
            open_model(weights),
            folder,
            batch_size=2,
            processes=processes,
            progress=count,
            stop=stop,
        )
    assert report.interrupted == (last < 7)
    assert report.interrupted or (report.images, [*report.faults]) == (7, ["broken.png"])


def test_processes_share_the_work_bit_by_bit(photos: Path, weights: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"none")
    runs = {"alone": [(1, 99)], "two": [(2, 99)], "three": [(3, 99)], "stopped": [(2, 2), (3, 99)]}
    for name, steps in runs.items():
        for processes, last in steps:
            assert not any(
                in_processes(_build, processes, photos, weights, tmp_path / name, 1, last)
            ), name
    alone = open_index(tmp_path / "alone")
    assert len(alone.entries) == 7
    for name in runs:
        opened = open_index(tmp_path / name)
        assert opened.entries == alone.entries
        np.testing.assert_array_equal(opened.features, alone.features)
        assert {path.name.split("-")[0] for path in opened.folder.iterdir()} == {
            "features",
            "images",
            "index.json",
        }


def test_a_pipe_in_an_index_is_refused_at_once(built: Path, tmp_path: Path) -> None:
    for pattern in ("index.json", "features-*", "images-*"):
        folder = shutil.copytree(built, tmp_path / pattern.strip("-*"))
        path = next(folder.glob(pattern))
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DataError, match=r"damaged|no index"):
            open_index(folder)
