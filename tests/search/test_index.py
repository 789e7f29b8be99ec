"""An index holds the features of what is there now, and makes none twice."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.record_files import pairs, write_lines
from tests.search.conftest import write_model, write_picture
from tests.training.small_runs import in_processes, join_group
from xfm_fast.errors import DataError, StorageError
from xfm_fast.search import IndexReport, SearchModel, build_index, index, index_folder, open_index, open_model
from xfm_fast.training.distributed import join_processes


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that were read."""
    names: list[str] = []
    embed = index._embed

    def watched(collection: Any, entries: Any, *rest: Any) -> Any:
        names.extend(entry.name for entry in entries)
        return embed(collection, entries, *rest)

    monkeypatch.setattr(index, "_embed", watched)
    return names


def expected(model: SearchModel, photos: Path, names: list[str]) -> np.ndarray:
    return model.model.encode([photos / name for name in names]).numpy()


def test_features_are_those_of_encode(photos: Path, model: SearchModel) -> None:
    report = build_index(photos, model, batch_size=3)
    assert (report.images, report.added, report.removed, dict(report.faults)) == (7, 7, 0, {})
    found = open_index(photos)
    names = [entry.name for entry in found.entries]
    assert names == sorted(names)
    assert isinstance(found.features.base, np.memmap)
    np.testing.assert_allclose(found.features, expected(model, photos, names), atol=1e-5)
    assert {path.name.split("-")[0] for path in index_folder(photos).iterdir()} == {"index.json", "features", "images"}


def test_only_what_is_new_or_changed_is_read(photos: Path, model: SearchModel, read: list[str]) -> None:
    build_index(photos, model)
    read.clear()
    before = {path.name: path.stat().st_mtime_ns for path in index_folder(photos).iterdir()}
    assert build_index(photos, model).added == 0
    assert {path.name: path.stat().st_mtime_ns for path in index_folder(photos).iterdir()} == before
    write_picture(photos / "7.png", 7)
    write_picture(photos / "0.png", 9)
    os.utime(photos / "0.png", ns=(1, 1))
    (photos / "2.png").unlink()
    report = build_index(photos, model)
    assert read == ["0.png", "7.png"]
    assert (report.images, report.added, report.removed) == (7, 2, 1)
    found = open_index(photos)
    names = [entry.name for entry in found.entries]
    assert "2.png" not in names
    np.testing.assert_allclose(found.features, expected(model, photos, names), atol=1e-5)


def test_captions_are_renewed_without_their_images(photos: Path, model: SearchModel, read: list[str]) -> None:
    (photos / "0.txt").write_text("a star")
    build_index(photos, model)
    read.clear()
    (photos / "0.txt").write_text("a red star\na star\n")
    (photos / "trip/1.txt").write_text("a trip")
    build_index(photos, model)
    assert read == []
    said = {entry.name: entry.captions for entry in open_index(photos).entries if entry.captions}
    assert said == {"0.png": ("a red star", "a star"), "trip/1.png": ("a trip",)}
    (photos / "0.txt").unlink()
    build_index(photos, model)
    assert open_index(photos).entries[0].captions == ()


def test_broken_images_are_listed_and_tried_again_when_they_change(
    photos: Path, model: SearchModel, read: list[str]
) -> None:
    (photos / "3.png").write_bytes(b"none")
    report = build_index(photos, model)
    assert report.images == 7
    assert [*report.faults] == ["3.png"]
    assert "in no format that Pillow reads" in report.faults["3.png"]
    read.clear()
    assert [*build_index(photos, model).faults] == ["3.png"]
    assert read == []
    write_picture(photos / "3.png", 3)
    assert build_index(photos, model).images == 8
    assert read == ["3.png"]


def test_a_killed_run_goes_on(
    photos: Path, model: SearchModel, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_PART", 2)
    written = 0
    write = index._write_part

    def killed(*arguments: Any) -> None:
        nonlocal written
        if written == 2:
            os._exit(9)
        written += 1
        write(*arguments)

    monkeypatch.setattr(index, "_write_part", killed)
    if (child := os.fork()) == 0:
        build_index(photos, model, batch_size=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.setattr(index, "_write_part", write)
    assert not (index_folder(photos) / "index.json").exists()
    # Half a part is none.
    (index_folder(photos) / f"part-0-{model.fingerprint}-0123456789ab.jsonl").write_text('{"name":')
    report = build_index(photos, model)
    assert len(read) == 3
    assert report.images == 7
    found = open_index(photos)
    np.testing.assert_allclose(
        found.features, expected(model, photos, [entry.name for entry in found.entries]), atol=1e-5
    )
    assert not [*index_folder(photos).glob("part-*")]


def test_what_a_run_that_was_killed_at_its_end_left_is_removed(photos: Path, model: SearchModel) -> None:
    build_index(photos, model)
    foreign = ("part-1.jpg", "images-2024.jsonl", "features-old.f32", "graph-paper.pdf")
    for name in foreign:
        (index_folder(photos) / name).write_text("")
    whole = sorted(path.name for path in index_folder(photos).iterdir())
    ours = ("part-0-{}.jsonl", f"part-0-{model.fingerprint}-{{}}.f32", "features-{}.f32", "graph-{}.usearch")
    for name in ours:
        (index_folder(photos) / name.format("0123456789ab")).write_text("")
    build_index(photos, model)
    assert sorted(path.name for path in index_folder(photos).iterdir()) == whole


def test_a_stopped_run_goes_on(photos: Path, model: SearchModel, read: list[str]) -> None:
    stop = Event()
    stop.set()
    assert build_index(photos, model, stop=stop) == IndexReport(index_folder(photos), interrupted=True)
    read.clear()
    assert build_index(photos, model).images == 7
    assert len(read) == 6


def _share(rank: int, world_size: int, folder: Path, photos: Path, weights: Path) -> None:
    join_group(rank, world_size, folder)
    with join_processes("cpu") as processes:
        report = build_index(photos, open_model(weights), processes=processes)
        assert report.images == 7


@pytest.mark.slow
def test_processes_share_the_images(photos: Path, weights: Path, model: SearchModel, tmp_path: Path) -> None:
    assert in_processes(_share, 2, tmp_path / "group", photos, weights) == [0, 0]
    shared = open_index(photos)
    build_index(photos, model, tmp_path / "alone")
    alone = open_index(tmp_path / "alone")
    assert alone.entries == shared.entries
    np.testing.assert_allclose(alone.features, shared.features, atol=1e-5)


def test_another_model_is_refused(photos: Path, model: SearchModel, tmp_path: Path) -> None:
    build_index(photos, model)
    other = open_model(write_model(tmp_path / "other", seed=1))
    for call in (lambda: build_index(photos, other), lambda: open_index(photos).check(other)):
        with pytest.raises(DataError, match=r"was made with .*this is .*other"):
            call()
    # The number format is none of its identity.
    open_index(photos).check(open_model(model.source, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda said: said | {"format": 1}, "has format 1"),
        (lambda said: said | {"images": 5}, "is damaged .*entries for 5 images"),
        (lambda said: said | {"images": -1}, "is damaged .*images"),
        (lambda said: {"format": 2}, "is damaged"),
        (lambda said: said | {"entries": "/dev/zero"}, "is damaged .*entries"),
        (lambda said: said | {"features": "../images"}, "is damaged .*features"),
        (lambda said: said | {"entries": [1]}, "is damaged"),
        (lambda said: said | {"sums": {said["features"]: 1}}, "checksum"),
        (lambda said: [], "is damaged"),
    ],
)
def test_a_damaged_index_is_refused(photos: Path, model: SearchModel, damage: Any, message: str) -> None:
    build_index(photos, model)
    path = index_folder(photos) / "index.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=message):
        open_index(photos)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("features-*", lambda content: content[:-4]),
        ("images-*", lambda content: content.replace(b'"row": null', b'"row": null, "fault": "?"', 1)),
        ("images-*", lambda content: b"5\n" * 7),
    ],
    ids=["cut", "fault", "number"],
)
def test_damaged_rows_are_refused(photos: Path, model: SearchModel, name: str, damage: Any) -> None:
    build_index(photos, model)
    path = next(index_folder(photos).glob(name))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="is damaged"):
        open_index(photos)


def test_an_index_that_is_swapped_meanwhile_is_read_again(
    photos: Path, model: SearchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(photos, model)
    write_picture(photos / "7.png", 7)
    loads, swapped = json.loads, False

    def late(text: str | bytes) -> Any:
        nonlocal swapped
        said = loads(text)
        if "features" in said and not swapped:
            swapped = True
            build_index(photos, model)
        return said

    monkeypatch.setattr(json, "loads", late)
    assert len(open_index(photos).entries) == 8
    next(index_folder(photos).glob("images-*")).unlink()
    with pytest.raises(DataError, match=r"lacks .*images-"):
        open_index(photos)


def test_an_index_moves_with_its_folder(photos: Path, model: SearchModel, tmp_path: Path, read: list[str]) -> None:
    build_index(photos, model)
    moved = Path(shutil.move(photos, tmp_path / "moved"))
    found = open_index(moved)
    assert found.collection.load(found.entries[0])[0].size == (80, 60)
    read.clear()
    assert build_index(moved, model).images == 7
    assert read == []


def test_the_index_of_another_collection_is_refused(photos: Path, model: SearchModel, tmp_path: Path) -> None:
    build_index(photos, model, tmp_path / "index")
    with pytest.raises(DataError, match=r"is the index of .*photos, this is .*trip"):
        build_index(photos / "trip", model, tmp_path / "index")


def test_rows_of_a_file(tmp_path: Path, model: SearchModel) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", [*pairs(3), {"binary": "!", "desc": "broken"}])
    report = build_index(path, model)
    assert (report.images, [*report.faults]) == (3, ["pairs.jsonl#4"])
    found = open_index(path)
    assert found.entries[1].caption == "picture number 1 of a cat"
    assert found.folder == tmp_path / "pairs.jsonl.xfm-index"


def test_what_cannot_be_indexed(photos: Path, model: SearchModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/index"):
        build_index(photos, model, tmp_path / "file" / "index")
    with pytest.raises(DataError, match="has no index; make one"):
        open_index(photos)
    with pytest.raises(DataError, match="nowhere"):
        open_index(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"none of 1 images .* a\.png"):
        build_index(broken, model)


def test_one_run_at_a_time(photos: Path, model: SearchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = index._embed

    def second(*arguments: Any) -> Any:
        monkeypatch.setattr(index, "_embed", embed)
        with pytest.raises(StorageError, match=r"index .* is in use"):
            build_index(photos, model)
        return embed(*arguments)

    monkeypatch.setattr(index, "_embed", second)
    assert build_index(photos, model).images == 7
