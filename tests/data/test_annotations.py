"""Fine-tuning files: valid elements, named errors of others, and what two splits share."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from xfm_fast.data.annotations import (
    AnnotationRows,
    RetrievalRecord,
    TextRecord,
    check_images,
    overlap,
    overlap_of_texts,
    read_array,
)
from xfm_fast.errors import DataError
from xfm_fast.tasks.vqa import read_answer_list

PAIR = {"image": "a.jpg", "caption": "a cat", "image_id": "coco_1"}


def _write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image": "a",}]', ":1:16: "),
        ('{"image": "a"}\n{"image": "b"}\n', ":2:1: "),
        ("[" * 100_000, "nested"),
        ("é".encode("latin-1"), "UTF-8"),
        (gzip.compress(b"[]", mtime=0), "compressed"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content) if isinstance(content, bytes) else _write(path, content)
    with pytest.raises(DataError, match=rf"a\.json.*{message}"):
        read_array(path)
    path.write_bytes(json.dumps([PAIR]).encode("utf-8-sig"))
    assert read_array(path) == [PAIR]


def _rows(tmp_path: Path, *images: object) -> AnnotationRows[RetrievalRecord]:
    elements = [{"image": image, "caption": "a", "image_id": 1} for image in images]
    return AnnotationRows(_write(tmp_path / "rows.json", elements), elements, RetrievalRecord)


def test_images_that_do_not_exist_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    rows = _rows(tmp_path, "a.jpg", "b.jpg", "c.jpg", "b.jpg", "d.jpg", "e.jpg", 5)
    with pytest.raises(DataError, match=r"4 of 5 .*'b.jpg', 'c.jpg', 'd.jpg', \.\.\."):
        check_images([rows], tmp_path)
    check_images([rows.read(0), "a.jpg", tmp_path / "a.jpg"], tmp_path)


def test_what_two_splits_share(tmp_path: Path) -> None:
    train = _rows(tmp_path, *(f"{name}.jpg" for name in "abcdef"))
    assert overlap([train], ["./e.jpg", "z.jpg", "e.jpg", "c.jpg"]) == (2, ("e.jpg", "c.jpg"))
    assert overlap([train], ["z.jpg"]) == (0, ())
    elements = [{"text": "a", "text2": "b"}, {"text": "a" * 99}, DataError("broken")]
    texts = AnnotationRows(tmp_path / "rows.json", elements, TextRecord)
    records = [TextRecord(text="a", text2="b"), TextRecord(text="a"), TextRecord(text="a" * 99)]
    assert overlap_of_texts([texts], records) == (2, ("a / b", "a" * 60))


def test_answer_lists(tmp_path: Path) -> None:
    assert read_answer_list(_write(tmp_path / "b.json", ["yes", "no"])) == ["yes", "no"]
    with pytest.raises(DataError, match="'yes'"):
        read_answer_list(_write(tmp_path / "a.json", ["yes", "no", "yes"]))
