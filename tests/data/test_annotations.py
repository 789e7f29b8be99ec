"""Fine-tuning files: what is read of them, and what is said of wrong ones."""

import gzip
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from xfm_fast.data.annotations import (
    AnnotationRows,
    CaptioningRecord,
    RetrievalRecord,
    RetrievalTestRecord,
    TextRecord,
    check_images,
    overlap,
    overlap_of_texts,
    read_annotations,
)
from xfm_fast.data.quarantine import Quarantine
from xfm_fast.errors import DataError
from xfm_fast.tasks.grounding import GroundingRecord
from xfm_fast.tasks.nlvr2 import NLVR2Record
from xfm_fast.tasks.vqa import VQARecord, read_answer_list

retrieval_records = partial(read_annotations, kind=RetrievalRecord)
retrieval_test_records = partial(read_annotations, kind=RetrievalTestRecord)
nlvr2_records = partial(read_annotations, kind=NLVR2Record)
vqa_records = partial(read_annotations, kind=VQARecord)
grounding_records = partial(read_annotations, kind=GroundingRecord)
captioning_records = partial(read_annotations, kind=CaptioningRecord)


def _write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_retrieval(tmp_path: Path) -> None:
    train = [
        {"image": "a.jpg", "caption": "a cat", "image_id": "coco_1", "extra": 1},
        {"image": "b", "caption": "c", "image_id": 2},
    ]
    first, second = retrieval_records(_write(tmp_path / "a.json", train))
    assert (first.image, first.caption, first.image_id, second.image_id) == ("a.jpg", "a cat", "coco_1", 2)
    (test,) = retrieval_test_records(_write(tmp_path / "b.json", [{"image": "a.jpg", "caption": ["a cat", "one cat"]}]))
    assert test.caption == ("a cat", "one cat")


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    for name in ("b", "a"):
        _write(tmp_path / f"{name}.json", [{"image": name, "caption": name, "image_id": name}])
    assert [each.image for each in retrieval_records(f"{tmp_path}/b.json,{tmp_path}/a.json")] == ["b", "a"]


@pytest.mark.parametrize(("label", "truth"), [("True", True), ("False", False), (True, True), (False, False)])
def test_nlvr2(tmp_path: Path, label: object, truth: bool) -> None:
    rows = [{"images": ["a.png", "b.png"], "sentence": "both are red", "label": label}]
    (record,) = nlvr2_records(_write(tmp_path / "a.json", rows))
    assert (record.images, record.label) == (("a.png", "b.png"), truth)


def test_answers_weigh_their_share(tmp_path: Path) -> None:
    base = {"image": "a.jpg", "question": "what?", "question_id": 1}
    rows = [
        {**base, "answer": ["yes", "no", "yes", "yes"]},
        {**base, "answer": "two", "dataset": "vg"},
        {**base, "answer": "two", "dataset": "gqa"},
        base,
    ]
    vqa, vg, gqa, test = vqa_records(_write(tmp_path / "a.json", rows))
    assert vqa.weighted_answers == [("yes", 0.75), ("no", 0.25)]
    assert vg.weighted_answers == [("two", 0.5)]
    assert gqa.weighted_answers == [("two", 1.0)]
    assert test.weighted_answers == []


def test_grounding_and_captioning(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"image": "a.jpg", "text": "left dog", "ref_id": 3}]
    rows.append({**rows[0], "bbox": [1, 2, 3.5, 4]})
    plain, boxed = grounding_records(_write(tmp_path / "a.json", rows))
    assert plain.bbox is None
    assert boxed.bbox == (1, 2, 3.5, 4)
    train, test = captioning_records(
        _write(tmp_path / "b.json", [{"image": "a", "caption": "b", "image_id": 5}, {"image": "val_00012.jpg"}])
    )
    assert (train.caption, test.caption) == ("b", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image": "a",}]', r"a\.json:1:16: "),
        ('[\n {"image": "a"}\n {"image": "b"}]', r"a\.json:3:2: "),
        ('{"image": "a"}\n{"image": "b"}\n', r"a\.json:2:1: "),
        ("[" * 100_000, r"a\.json"),
        ("", "empty"),
        ("[]", "elements"),
        ({"image": "a"}, "dict"),
        ([{"image": "a", "image_id": 1}], r"element 0.*'caption'"),
        ([{"image": "", "caption": "c", "image_id": 1}], r"element 0.*'image' is ''"),
        ([{"image": "a", "caption": 5, "image_id": 1}], r"element 0.*'caption' is 5"),
        ([{"image": "a", "caption": ["c"], "image_id": 1}], r"'caption' is \['c'\]"),
        ([5], r"element 0.*int"),
        ([{"image": 1}] * 9, "6 more"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: Any, message: str) -> None:
    path = _write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=message) as caught:
        retrieval_records(path)
    assert "a.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ({"images": ["a"], "sentence": "s", "label": "True"}, "'images'"),
        ({"images": ["a", "b"], "sentence": "s", "label": "maybe"}, "'label' is 'maybe'"),
    ],
)
def test_wrong_nlvr2(tmp_path: Path, element: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        nlvr2_records(_write(tmp_path / "a.json", [element]))


def test_other_encodings(tmp_path: Path) -> None:
    content = json.dumps([{"image": "é", "caption": "c", "image_id": 1}], ensure_ascii=False)
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("utf-8-sig"))
    assert retrieval_records(path)[0].image == "é"
    for data, message in [
        (content.encode("latin-1"), "UTF-8"),
        (content.encode("utf-16"), "UTF-16"),
        (gzip.compress(content.encode(), mtime=0), "compressed"),
    ]:
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            retrieval_records(path)


def _rows(tmp_path: Path, *images: object) -> AnnotationRows[RetrievalRecord]:
    path = _write(tmp_path / "rows.json", [{"image": image, "caption": "a", "image_id": 1} for image in images])
    return AnnotationRows(path, json.loads(path.read_text()), RetrievalRecord)


def test_broken_elements_are_set_aside(tmp_path: Path) -> None:
    rows = pickle.loads(pickle.dumps(_rows(tmp_path, "a.jpg", "", *"bcd")))
    quarantine = Quarantine(tmp_path / "broken.jsonl", tolerate_bad=0.3)
    with pytest.raises(DataError, match="'image'") as caught:
        rows.read(1)
    quarantine.add(rows, 1, caught.value)
    assert (quarantine.count(rows), rows.read(4).image) == (1, "d")
    (listed,) = map(json.loads, (tmp_path / "broken.jsonl").read_text().splitlines())
    assert (listed["row"], json.loads(listed["excerpt"])["image"]) == ("element 1", "")


def test_images_that_do_not_exist_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    rows = _rows(tmp_path, "a.jpg", "b.jpg", "c.jpg", "b.jpg", "d.jpg", "e.jpg", 5)
    with pytest.raises(DataError, match=r"4 of 5 .*'b.jpg', 'c.jpg', 'd.jpg', \.\.\."):
        check_images([rows], tmp_path)
    check_images([rows.read(0), "a.jpg", tmp_path / "a.jpg"], tmp_path)
    pair = NLVR2Record(images=("a.jpg", "z.jpg"), sentence="s", label=True)
    with pytest.raises(DataError, match="1 of 2"):
        check_images([pair], tmp_path)


def test_images_of_two_splits(tmp_path: Path) -> None:
    train = _rows(tmp_path, *(f"{name}.jpg" for name in "abcdef"))
    assert overlap([train], ["./e.jpg", "z.jpg", "e.jpg", "c.jpg"]) == (2, ("e.jpg", "c.jpg"))
    assert overlap([train], ["z.jpg"]) == (0, ())


def test_texts_of_two_splits(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.touch()
    train = AnnotationRows(path, [{"text": "a", "text2": "b"}, {"text": "a" * 99}, DataError("broken")], TextRecord)
    records = [TextRecord(text="a", text2="b"), TextRecord(text="a"), TextRecord(text="a" * 99)]
    assert overlap_of_texts([train], records) == (2, ("a / b", "a" * 60))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["yes", "no", "yes"], "'yes'"),
        (["yes", " "], r"answer 1.*' '"),
        (["yes", None], r"answer 1.*None"),
        ([], "elements"),
        ({"yes": 0}, "array of strings"),
    ],
)
def test_wrong_answer_lists(tmp_path: Path, content: Any, message: str) -> None:
    assert read_answer_list(_write(tmp_path / "b.json", ["yes", "no"])) == ["yes", "no"]
    with pytest.raises(DataError, match=message):
        read_answer_list(_write(tmp_path / "a.json", content))


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_blank_texts_are_refused(tmp_path: Path, blank: str) -> None:
    path = _write(tmp_path / "a.json", [{"image": "a", "caption": blank, "image_id": 1}])
    with pytest.raises(DataError, match="'caption'"):
        retrieval_records(path)
