"""Images of folders, lists, lines and shards, each by a name of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.data.record_files import pairs, picture, write_lines, write_tar
from tests.search.conftest import write_picture
from xfm_fast.errors import DataError
from xfm_fast.search import open_collection


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


def test_photos_stand_upright(tmp_path: Path) -> None:
    picture_of = Image.new("RGB", (80, 60))
    exif = picture_of.getexif()
    exif[0x0112] = 6
    picture_of.save(tmp_path / "a.jpg", exif=exif)
    picture_of.save(tmp_path / "b.jpg", exif=b"Exif\0\0damaged")
    collection = open_collection(tmp_path)
    assert [collection.load(entry)[0].size for entry in collection.listing().entries] == [(60, 80), (80, 60)]


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_a_list_of_paths(photos: Path, form: str) -> None:
    rows = [{"image": "0.png", "caption": "one"}, {"image": "trip/1.png", "caption": "two"}]
    rows += [{"image": "0.png", "caption": "again"}, {"image": "gone.png", "caption": "three"}]
    path = photos / f"list.{form}"
    if form == "csv":
        path.write_text("image,caption\n" + "".join(f"{row['image']},{row['caption']}\n" for row in rows))
    else:
        path.write_text(json.dumps(rows) if form == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    collection = open_collection(path)
    entries, faults = collection.listing()
    assert [(entry.name, entry.caption) for entry in entries] == [
        ("0.png", "one"), ("trip/1.png", "two"), ("gone.png", "three")
    ]  # fmt: skip
    assert not faults
    assert collection.load(entries[1])[0].size == (80, 60)
    with pytest.raises(DataError, match="does not exist"):
        collection.load(entries[2])
    elsewhere = photos.parent / "lists"
    elsewhere.mkdir()
    moved = path.rename(elsewhere / path.name)
    assert open_collection(moved, photos).load(entries[1])[0].size == (80, 60)


def test_broken_rows_of_a_list(photos: Path) -> None:
    path = photos / "list.jsonl"
    write_lines(path, [{"image": "0.png"}, {"caption": "of nothing"}, "{cut"])
    entries, faults = open_collection(path).listing()
    assert [entry.name for entry in entries] == ["0.png"]
    assert [*faults] == ["list.jsonl#2", "list.jsonl#3"]


def test_official_lines_and_shards(tmp_path: Path) -> None:
    lines = open_collection(write_lines(tmp_path / "pairs.jsonl", pairs(3)))
    entries, _ = lines.listing()
    assert [entry.name for entry in entries] == ["pairs.jsonl#1", "pairs.jsonl#2", "pairs.jsonl#3"]
    image, caption = lines.load(entries[2])
    assert (image.size, caption) == ((40, 30), "picture number 2 of a cat")
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        members = {f"{shard}{row}.{form}": content for row in range(2) for form, content in sample(row).items()}
        write_tar(folder / f"{shard}.tar", members)
    for place, names in ((folder / "1.tar", ["1.tar#10", "1.tar#11"]), (folder, ["0.tar#00", "0.tar#01", "1.tar#10"])):
        shards = open_collection(place)
        entries, _ = shards.listing()
        assert [entry.name for entry in entries][: len(names)] == names
        assert shards.load(entries[-1])[1] == "row 1"


def sample(row: int) -> dict[str, bytes]:
    return {"jpg": picture(row), "txt": f"row {row}".encode()}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "nowhere does not exist"),
        ("a.parquet", b"PAR1", "neither a folder of images nor a file of one of"),
        ("a.csv", b"picture\na.png\n", "has no column 'image'"),
        ("empty", "folder", "empty holds no images"),
    ],
)
def test_what_is_no_collection(tmp_path: Path, name: str, content: bytes | str | None, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(DataError, match=message):
        open_collection(path).listing()
