"""The bundled photographs and folders of users, good and bad."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.record_files import picture, write_tar
from xfm_fast.benchmarks.material import photographs
from xfm_fast.benchmarks.material.photographs import bundled, from_files
from xfm_fast.errors import DataError
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

TABLE = json.loads(Path(photographs.__file__).with_name("captions.json").read_text())


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)


def test_captions_are_many_and_of_usual_length() -> None:
    captions = [pre_caption(caption) for photo in TABLE["photos"] for caption in photo["captions"]]
    assert len(captions) == len(set(captions))
    assert all(len(photo["captions"]) >= 5 for photo in TABLE["photos"])
    assert all(8 <= len(caption.split()) <= 14 for caption in captions)
    lengths = CaptionTokenizer.train_on_texts(captions, 50265).encode(captions)[1].sum(1)
    assert lengths.min() >= 10
    assert lengths.max() <= 16


def test_bundled_photographs_decode() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    collection = bundled()
    assert not collection.skipped
    assert len(collection.names) == len(TABLE["photos"])
    assert collection.pixels([0, 1], 32).shape == (2, 3, 32, 32)
    texts = collection.texts(200)
    assert len(texts) == 200
    assert len(set(texts[: len(collection.captions)])) == len(collection.captions)
    assert texts[0] in collection.captions_of(0)
    assert texts[1] in collection.captions_of(1)


def test_nothing_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"xfm-fast\[bench\]"):
        bundled()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _picture(tmp_path / "a.jpg")
    _picture(tmp_path / "sub" / "b.png")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:400])
    return tmp_path


RECORDS = [
    {"image": "a.jpg", "caption": "a noisy picture"},
    {"image": "sub/b.png", "caption": ["another one", "?!", "with two captions"]},
    {"image": "broken.jpg", "caption": "half a file"},
    {"image": "absent.png", "caption": "no file"},
    {"image": "a.jpg", "caption": "second caption of a"},
]


def _check(folder: Path, table: str = "") -> None:
    collection = from_files(folder / table)
    assert collection.names == ["a.jpg", "sub/b.png"]
    assert collection.captions == ["a noisy picture", "second caption of a", "another one", "with two captions"]
    assert collection.photo_of == [0, 0, 1, 1]
    reasons = dict(collection.skipped)
    assert "empty after cleaning" in reasons["sub/b.png"]
    assert "truncated" in reasons["broken.jpg"]
    assert "does not exist" in reasons["absent.png"]


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "tsv"])
def test_a_table_in_the_folder_or_named(folder: Path, form: str) -> None:
    separator = {"csv": ",", "tsv": "\t"}.get(form)
    text = json.dumps(RECORDS)
    if form == "jsonl":
        lines = ["{", "[1]", '{"image": 3, "caption": "x"}', *map(json.dumps, RECORDS)]
        text = "\n".join(lines) + "\n"
    elif separator is not None:
        rows = [("image", "caption")]
        for record in RECORDS:
            captions = record["caption"] if isinstance(record["caption"], list) else [record["caption"]]
            rows += [(str(record["image"]), caption) for caption in captions]
        text = "\ufeff" + "\n".join(separator.join(row) for row in rows)
    table = folder / f"captions.{form}"
    table.write_text(text)
    for named in ("", table.name):
        _check(folder, named)
    if form == "jsonl":
        skipped = {what for what, _ in from_files(folder).skipped}
        assert {f"captions.jsonl#{line}" for line in (1, 2, 3)} <= skipped


def test_texts_beside_images(folder: Path) -> None:
    (folder / "a.txt").write_text("a noisy picture\nsecond caption of a\n")
    (folder / "sub" / "b.txt").write_text("another one\n?!\nwith two captions\n")
    (folder / "broken.txt").write_text("half a file\n")
    _picture(folder / "alone.png")
    collection = from_files(folder)
    assert collection.names == ["a.jpg", "sub/b.png"]
    assert ("alone.png", "has no usable caption") in collection.skipped


def test_a_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"0.jpg": picture(0), "0.txt": b"a noisy picture", "1.jpg": picture(1)})
    collection = from_files(tmp_path / "0.tar")
    assert collection.captions == ["a noisy picture"]
    assert collection.skipped == [("0.tar#1", "has no usable caption")]


def test_no_more_photographs_than_asked_for(folder: Path) -> None:
    (folder / "captions.json").write_text(json.dumps(RECORDS))
    collection = from_files(folder, most=1)
    assert collection.names == ["a.jpg"]
    assert collection.left_unread == 2


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        from_files(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        from_files(tmp_path / "absent")
    (tmp_path / "a.json").write_text('[{"image": "x.png", "caption": "gone"}]')
    with pytest.raises(DataError, match=r"nothing in .*x\.png does not exist"):
        from_files(tmp_path / "a.json")
    _picture(tmp_path / "a.png")
    (tmp_path / "captions.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        from_files(tmp_path)
    (tmp_path / "captions.json").write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="UTF-8"):
        from_files(tmp_path)
