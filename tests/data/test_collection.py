"""Images of folders, lists, lines and shards, each by a name of its own."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.record_files import picture, write_lines, write_tar
from tests.search.conftest import photos as photos
from tests.search.conftest import write_picture
from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import check_images
from xfm_fast.data.collection import (
    captioning_test_rows,
    open_collection,
    retrieval_rows,
    retrieval_test_rows,
)
from xfm_fast.data.images import decode_pixels, record_pixels
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.records import image_at, open_records
from xfm_fast.errors import DataError
from xfm_fast.tasks.checking import Options, check


def test_a_folder(photos: Path) -> None:
    write_picture(photos / ".hidden" / "a.png", 1)
    (photos / "note.txt").write_text("no image")
    collection = open_collection(photos)
    entries, faults = collection.listing()
    assert [entry.name for entry in entries] == [
        "0.png", "2.png", "4.png", "6.png", "trip/1.png", "trip/3.png", "trip/5.png"
    ]  # fmt: skip
    assert not faults
    assert entries[4].size == (photos / "trip/1.png").stat().st_size
    assert collection.load(entries[4])[0].size == (80, 60)
    assert collection.location(entries[4]) == str(photos / "trip/1.png")


def test_captions_beside_images_and_in_a_table(photos: Path) -> None:
    (photos / "0.txt").write_text("a red circle\n\n a blue star \n")
    (photos / "trip/1.txt").write_bytes(b"\xff")
    collection = open_collection(photos)
    entries, faults = collection.listing()
    assert entries[0].captions == collection.load(entries[0])[1] == ("a red circle", "a blue star")
    assert entries[1].caption is None
    assert [*faults] == ["trip/1.txt"]
    assert "is not UTF-8" in faults["trip/1.txt"]
    (photos / "captions.csv").write_text(
        "image,caption\n./2.png,two\ntrip/3.png,three\n2.png,again\ngone.png,none\n"
    )
    entries, faults = collection.listing()
    assert {entry.name: entry.captions for entry in entries if entry.captions} == {
        "2.png": ("two", "again"), "trip/3.png": ("three",)
    }  # fmt: skip
    assert len(entries) == 7
    assert "captions.csv" in faults["gone.png"]


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_a_list_of_paths(photos: Path, form: str) -> None:
    rows = [{"image": "0.png", "caption": "one"}, {"image": "trip/1.png", "caption": "two"}]
    rows += [{"image": "0.png", "caption": "again"}, {"image": "gone.png", "caption": "three"}]
    path = photos / f"list.{form}"
    if form == "csv":
        path.write_text(
            "image,caption\n" + "".join(f"{row['image']},{row['caption']}\n" for row in rows)
        )
    else:
        path.write_text(
            json.dumps(rows) if form == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        )
    collection = open_collection(path)
    entries, faults = collection.listing()
    assert [(entry.name, entry.captions) for entry in entries] == [
        ("0.png", ("one", "again")), ("trip/1.png", ("two",)), ("gone.png", ("three",))
    ]  # fmt: skip
    assert not faults
    assert collection.load(entries[1])[0].size == (80, 60)
    with pytest.raises(DataError):
        collection.load(entries[2])
    elsewhere = photos.parent / "lists"
    elsewhere.mkdir()
    moved = path.rename(elsewhere / path.name)
    assert open_collection(moved, photos).load(entries[1])[0].size == (80, 60)


def written(folder: Path, form: str) -> Path:
    """Write two images, the second with two captions, in one of four formats."""
    names = ("a", "b")
    said = {"a": ["a red circle"], "b": ["a blue star", "a star"]}
    if form == "lines":
        rows = [
            {"binary": base64.b64encode(picture(n)).decode(), "desc": said[name]}
            for n, name in enumerate(names)
        ]
        return write_lines(folder / "pairs.jsonl", rows)
    if form == "shard":
        members = {f"{name}.jpg": picture(index) for index, name in enumerate(names)}
        members |= {f"{name}.json": json.dumps({"desc": said[name]}).encode() for name in names}
        return write_tar(folder / "0.tar", dict(sorted(members.items())))
    for index, name in enumerate(names):
        (folder / f"{name}.jpg").write_bytes(picture(index))
    if form == "folder":
        for name in names:
            (folder / f"{name}.txt").write_text("\n".join(said[name]) + "\n")
        return folder
    table = folder / ("captions.csv" if form == "folder of a table" else "pairs.csv")
    table.write_text(
        "image,caption\n"
        + "".join(f"{name}.jpg,{caption}\n" for name in names for caption in said[name])
    )
    return table if form == "table" else folder


@pytest.mark.parametrize("form", ["lines", "shard", "folder", "table", "folder of a table"])
def test_one_convention_everywhere(form: str, tmp_path: Path) -> None:
    path = written(tmp_path, form)
    pixels = [decode_pixels(picture(index)) for index in range(2)]
    # Search, benchmarks and exports.
    collection = open_collection(path)
    loaded = [collection.load(entry) for entry in collection.listing().entries]
    assert [captions for _, captions in loaded] == [("a red circle",), ("a blue star", "a star")]
    # Pretraining.
    records = open_records(path, image_key="binary", caption_key="desc")
    assert len(records) == 2
    rng = np.random.default_rng(0)
    for index in range(2):
        rows, row = records.locate(index)
        record = rows.read(row)
        assert torch.equal(record_pixels(record, ImageOptions(), rng), pixels[index])
        said = record["desc"]
        assert (
            [said]
            if isinstance(said, str)
            else said == [["a red circle"], ["a blue star", "a star"]][index]
        )
    report = check(path, "pairs", Options(XFMConfig.preset("tiny")))
    assert (report.rows, report.broken) == (2, 0)
    # Fine-tuning, and its evaluation.
    tests = [record for rows in captioning_test_rows(path) for record in rows.records()]
    assert [record.caption for record in tests] == [("a red circle",), ("a blue star", "a star")]
    check_images(tests, tmp_path)
    for index, record in enumerate(tests):
        assert torch.equal(decode_pixels(image_at(tmp_path / record.image)), pixels[index])
    texts = [
        text
        for rows in retrieval_test_rows(path)
        for record in rows.records()
        for text in record.caption
    ]
    assert texts == ["a red circle", "a blue star", "a star"]
    trained = [record for rows in retrieval_rows(path) for record in rows.records()]
    assert [record.caption for record in trained] == texts
    assert trained[1].image_id == trained[2].image_id != trained[0].image_id


def test_a_table_in_a_folder_names_images_of_the_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in (folder / "a.jpg", tmp_path / "private.jpg"):
        path.write_bytes(picture(0))
    rows = [{"image": "./a.jpg", "caption": "a cat"}, {"image": "a.jpg", "caption": "one cat"}]
    rows += [
        {"image": name, "caption": "a secret"}
        for name in ("../private.jpg", str(tmp_path / "private.jpg"))
    ]
    (folder / "captions.json").write_text(json.dumps(rows))
    (read,) = open_records(folder).files
    assert (len(read), read.read(0)) == (
        3,
        {"binary": folder / "a.jpg", "desc": ["a cat", "one cat"]},
    )
    for reader in (open_records(folder).files[0], captioning_test_rows(folder)[0]):
        for row in (1, 2):
            with pytest.raises(DataError, match=r"private\.jpg"):
                reader.read(row)
    entries, faults = open_collection(folder).listing()
    assert [entry.name for entry in entries] == ["a.jpg"]
    assert len(faults) == 2


def test_pipes_are_not_read(tmp_path: Path) -> None:
    """Refuse a pipe beside an image, or in place of a table or an image: reading it would block for ever."""
    (tmp_path / "a.jpg").write_bytes(picture(0))
    os.mkfifo(tmp_path / "a.txt")
    entries, faults = open_collection(tmp_path).listing()
    assert ([entry.name for entry in entries], [*faults]) == (["a.jpg"], ["a.txt"])
    os.mkfifo(tmp_path / "b.csv")
    for read in (lambda path: open_collection(path).listing(), open_records, retrieval_rows):
        with pytest.raises(DataError, match=r"b\.csv"):
            read(tmp_path / "b.csv")
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.csv").write_text("image,caption\nb.jpg,a\na\0.jpg,b\n")
    collection = open_collection(tmp_path / "c.csv")
    for entry in collection.listing().entries:
        with pytest.raises(DataError, match="image"):
            collection.load(entry)


def test_images_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_picture(tmp_path / name / "1.jpg", 0)
    (tmp_path / "captions.csv").write_text("image,caption\na/1.jpg,one\nb/1.jpg,two\n")
    for path in (tmp_path, tmp_path / "captions.csv"):
        (rows,) = retrieval_rows([path])
        assert len({record.image_id for record in rows.records()}) == 2
