"""Files of vision-language tasks: each format gives the records of the official one, and wrong ones are named."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.record_files import picture, write_lines
from xfm_fast.data.annotations import AnnotationRows
from xfm_fast.data.collection import (
    captioning_rows,
    captioning_test_rows,
    retrieval_rows,
    retrieval_test_rows,
)
from xfm_fast.data.files import read_plain_pickle
from xfm_fast.errors import DataError
from xfm_fast.tasks.grounding import grounding_rows
from xfm_fast.tasks.nlvr2 import nlvr2_rows
from xfm_fast.tasks.vqa import vqa_accuracy, vqa_rows


def _write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def _karpathy(path: Path) -> Path:
    def image(index: int, split: str, *captions: str) -> dict[str, Any]:
        names = {"filepath": "val2014", "filename": f"{index}.jpg", "cocoid": index}
        return {
            **names,
            "split": split,
            "sentences": [{"raw": caption, "tokens": []} for caption in captions],
        }

    images = [
        image(1, "train", "a cat", "one cat"),
        image(2, "restval", "a dog"),
        image(3, "test", "a cow", "cows"),
    ]
    return _write(path / "dataset_coco.json", {"images": images, "dataset": "coco"})


def _folder(path: Path) -> Path:
    folder = path / "images"
    folder.mkdir()
    for name, captions in {"a": "a cat\n\none cat\n", "b": "a dog", "c": None}.items():
        (folder / f"{name}.jpg").write_bytes(picture(0))
        if captions is not None:
            (folder / f"{name}.txt").write_text(captions)
    return folder


def test_karpathy_splits(tmp_path: Path) -> None:
    path = _karpathy(tmp_path)
    (train,) = retrieval_rows(path, split="train")
    assert [(record.image, record.caption, record.image_id) for record in train.records()] == [
        ("val2014/1.jpg", "a cat", 1),
        ("val2014/1.jpg", "one cat", 1),
        ("val2014/2.jpg", "a dog", 2),
    ]
    (test,) = retrieval_test_rows(path, split="test")
    assert [(record.image, record.caption) for record in test.records()] == [
        ("val2014/3.jpg", ("a cow", "cows"))
    ]
    with pytest.raises(DataError, match=r"'val'.*restval"):
        retrieval_rows(path, split="val")
    with pytest.raises(DataError, match="split"):
        retrieval_rows(path)


def test_captions_beside_images(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (train,) = retrieval_rows(folder)
    captions = [(Path(record.image).name, record.caption) for record in train.records()]
    assert captions == [("a.jpg", "a cat"), ("a.jpg", "one cat"), ("b.jpg", "a dog")]
    assert train.label(1) == "a.txt:3"
    assert train.notes == (f"{folder}: 1 images without captions were left out (c.jpg)",)
    assert (tmp_path / "anywhere" / train.read(0).image).is_file()
    (test,) = retrieval_test_rows(folder)
    assert [len(record.caption) for record in test.records()] == [2, 1]


def test_coco_captions(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}]
    captions = [
        {"image_id": 8, "caption": "a"},
        {"image_id": 7, "caption": "b"},
        {"image_id": 8, "caption": "c"},
    ]
    path = _write(tmp_path / "a.json", {"images": images, "annotations": captions})
    (train,) = captioning_rows(path)
    assert (train.read(0).image, train.read(0).caption, train.read(0).identity) == ("8.jpg", "a", 8)
    (test,) = captioning_test_rows(path)
    assert [(record.image, record.caption) for record in test.records()] == [
        ("8.jpg", ("a", "c")),
        ("7.jpg", ("b",)),
    ]
    (alone,) = captioning_test_rows(_write(tmp_path / "b.json", {"images": images}))
    assert [record.identity for record in alone.records()] == [7, 8]
    stray = _write(
        tmp_path / "c.json", {"images": images, "annotations": [{"image_id": 9, "caption": "a"}]}
    )
    with pytest.raises(DataError, match=" 9 "):
        captioning_rows(stray)[0].read(0)


def _vqa(
    path: Path,
    *,
    subtype: str = "train2014",
    people: tuple[str, ...] = ("yes",) * 7 + ("no", "", ""),
) -> Path:
    path.mkdir(exist_ok=True)
    questions = [{"image_id": 9, "question": "is it?", "question_id": index} for index in (90, 91)]
    questions.append({"question": "where is it?", "question_id": 92})
    _write(path / "v2_questions.json", {"questions": questions, "data_subtype": subtype})
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": n}
        for n, answer in enumerate(people)
    ]
    annotation = {
        "question_id": 90,
        "answers": answers,
        "question_type": "is",
        "answer_type": "yes/no",
    }
    _write(path / "v2_annotations.json", {"annotations": [annotation], "data_subtype": "train2014"})
    return path


def test_vqa_v2(tmp_path: Path) -> None:
    (rows,) = vqa_rows(_vqa(tmp_path / "a"))
    record = rows.read(0)
    assert record.image == "train2014/COCO_train2014_000000000009.jpg"
    assert dict(record.weighted_answers) == {
        "yes": pytest.approx(7 / 8),
        "no": pytest.approx(1 / 8),
    }
    assert "2 empty answers" in rows.notes[0]
    assert "90, 90" in rows.notes[0]
    # People's empty answers count when scoring.
    assert record.people is not None
    assert len(record.people) == 10
    assert vqa_accuracy(["no"], [record.people], [record.answer_type]) == {
        "overall": 30.0,
        "yes/no": 30.0,
    }
    for row, message in [(1, "question 91"), (2, "question 92")]:
        with pytest.raises(DataError, match=message):
            rows.read(row)


def test_lines_of_nlvr2(tmp_path: Path) -> None:
    line = {"sentence": "two dogs", "label": "True", "left_url": "http://a"}
    lines = [
        {**line, "identifier": "train-10171-0-1", "directory": 22},
        {**line, "identifier": "dev-850-3-0", "label": "False"},
        {**line, "identifier": "nothing"},
        "{",
    ]
    (rows,) = nlvr2_rows(write_lines(tmp_path / "train.json", lines))
    assert rows.read(0).images == (
        "train/22/train-10171-0-img0.png",
        "train/22/train-10171-0-img1.png",
    )
    assert rows.read(1).images[1] == "dev/dev-850-3-img1.png"
    assert (rows.read(0).label, rows.read(1).label, rows.label(3)) == (True, False, 4)
    for row, message in [(2, "identifier 'nothing'"), (3, "JSON")]:
        with pytest.raises(DataError, match=message):
            rows.read(row)


def _refer(folder: Path) -> tuple[Path, Path]:
    def ref(index: int, split: str, *sentences: str) -> dict[str, Any]:
        said = [
            {"tokens": record.split(), "raw": record.upper(), "sent": record, "sent_id": 0}
            for record in sentences
        ]
        return {
            "ref_id": index,
            "ann_id": 10 + index,
            "image_id": 7,
            "split": split,
            "sentences": said,
        }

    refs = [
        ref(0, "train", "left dog", "brown dog"),
        ref(1, "testA", "man"),
        ref(2, "val", "ghost"),
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    boxes = [
        {"id": 10, "bbox": [1, 2, 3.5, 4], "segmentation": [[1, 2]]},
        {"id": 11, "bbox": [90, 0, 20, 10]},
    ]
    images = [{"id": 7, "file_name": "COCO_7.jpg", "width": 100, "height": 80}]
    return folder / "refs(unc).p", _write(
        folder / "instances.json", {"images": images, "annotations": boxes}
    )


def test_references_alone(tmp_path: Path) -> None:
    (rows,) = grounding_rows(_refer(tmp_path))
    first, second = rows.read(0), rows.read(1)
    assert (first.text, second.text, first.image) == ("left dog", "brown dog", "COCO_7.jpg")
    assert (first.bbox, first.ref_id, first.split, first.width, first.height) == (
        (1, 2, 3.5, 4),
        0,
        "train",
        100,
        80,
    )
    for row, message in [(2, "100x80"), (3, "annotation 12")]:
        with pytest.raises(DataError, match=message):
            rows.read(row)
    assert rows.label(2) == "ref_id 1, sentence 0"


def test_official_elements_get_their_boxes(tmp_path: Path) -> None:
    elements = [{"image": "a.jpg", "text": "dog", "ref_id": ref} for ref in (0, 1, 5)]
    official = _write(tmp_path / "a.json", elements)
    (rows,) = grounding_rows([official, *_refer(tmp_path)])
    assert (rows.read(0).bbox, rows.read(0).image, rows.name) == (
        (1, 2, 3.5, 4),
        "a.jpg",
        str(official),
    )
    with pytest.raises(DataError, match="ref_id 5"):
        rows.read(2)
    with pytest.raises(DataError, match=r"1 .* 0 "):
        grounding_rows([official, _refer(tmp_path)[0]])


class _Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([_Harmful()], 0), "posix.mkdir|opcode"),
        (pickle.dumps([_Harmful()], 2), "opcode b'c'"),
        (pickle.dumps([_Harmful()], 4), "opcode"),
        (pickle.dumps([1, 2, 3], 2)[:-3], "pickle"),
    ],
)
def test_nothing_in_a_pickle_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _, instances = _refer(tmp_path)
    (tmp_path / "refs(bad).p").write_bytes(content)
    with pytest.raises(DataError, match=message):
        grounding_rows([tmp_path / "refs(bad).p", instances])
    assert not (tmp_path / "harmed").exists()


def test_a_pickle_reserves_no_more_memory_than_it_has_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.p"
    # A memo index and the length of a byte array, both of two billion.
    path.write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")
    assert read_plain_pickle(path) == []
    path.write_bytes(b"\x80\x05\x96\xff\xff\xff\x7f\x00\x00\x00\x00.")
    with pytest.raises(DataError, match="pickle"):
        read_plain_pickle(path)


def test_boxes_lie_in_their_image(tmp_path: Path) -> None:
    element = {"image": "a", "text": "dog", "ref_id": 1, "width": 100, "height": 50}
    boxes = [
        [90.0, 0, 10.0000001, 50],
        [0, 0, 0, 5],
        [0, 0, float("inf"), 5],
        [-3, 0, 5, 5],
        [5, 5, 96.5, 5],
    ]
    (rows,) = grounding_rows(
        _write(tmp_path / "a.json", [{**element, "bbox": bbox} for bbox in boxes])
    )
    assert rows.read(0).width == 100
    for row in range(1, len(boxes)):
        with pytest.raises(DataError):
            rows.read(row)


Reader = Callable[[Path], list[AnnotationRows[Any]]]


@pytest.mark.parametrize(
    ("reader", "content"),
    [
        (
            captioning_rows,
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [5, {"image_id": []}]},
        ),
        (
            captioning_rows,
            {"images": [{"id": [], "file_name": "a"}], "annotations": [{"image_id": 1}]},
        ),
        (
            vqa_rows,
            {
                "questions": [5, {"question_id": [], "image_id": 1}],
                "annotations": [5, {"question_id": []}],
            },
        ),
        (grounding_rows, {"images": [], "annotations": [5]}),
        (captioning_test_rows, [{"image": "a", "caption": ["b", 5]}]),
    ],
)
def test_nothing_but_data_errors(tmp_path: Path, reader: Reader, content: Any) -> None:
    with pytest.raises(DataError, match=r"a\.json"):
        list(reader(_write(tmp_path / "a.json", content))[0].records())
