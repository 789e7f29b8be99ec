"""What a check of files counts and finds broken; and that it agrees with what training would skip."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.record_files import (
    base64_picture,
    pairs,
    picture,
    region,
    tiny_config,
    tiny_tokenizer,
    write_lines,
)
from xfm_fast.data.options import STREAM_KINDS
from xfm_fast.data.streams import Quarantine, Stream
from xfm_fast.tasks.checking import Options, Report, check


def _check(data: object, task: str, **options: Any) -> Report:
    return check(data, task, Options(config=tiny_config(), **options))


def _array(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_counts_of_good_pairs(tmp_path: Path) -> None:
    rows = [
        *pairs(3),
        {
            "binary": base64_picture(9, size=(60, 20), form="PNG"),
            "desc": ["a cat!", "a (red) dog runs"],
        },
    ]
    report = _check(
        write_lines(tmp_path / "a.jsonl", [*rows, rows[0]]), "pairs", tokenizer=tiny_tokenizer()
    )
    assert (report.rows, report.broken, report.duplicates, report.ok) == (5, 0, 1, True)
    assert report.texts == 6
    assert report.words == {6: 4, 2: 1, 4: 1}
    assert report.tokens.total() == 6
    assert report.sizes == {(40, 30): 4, (60, 20): 1}
    assert report.formats == {"JPEG": 4, "PNG": 1}
    # Pixels in fp32, the patch mask, and three rows of 30 ids with what is masked.
    bytes_per_row = 4 * 3 * 32 * 32 + 8 * 3 * 30
    assert bytes_per_row < report.bytes_per_row < bytes_per_row + 1000
    assert report.seconds_per_row is not None
    assert report.hours_per_epoch == pytest.approx(report.seconds_per_row * 5 / 3600)


def test_turned_and_transparent_images_are_counted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGBA", (40, 30)).save(tmp_path / "b.png")
    Image.new("RGBA", (40, 30), "red").save(tmp_path / "c.png")
    rows = [
        {"image": name, "caption": "a dog", "image_id": name}
        for name in ("a.jpg", "b.png", "c.png")
    ]
    report = _check(_array(tmp_path / "a.json", rows), "retrieval")
    assert (report.turned, report.transparent, report.broken) == (1, 1, 0)
    assert report.sizes == {(30, 40): 1, (40, 30): 2}
    assert report.as_dict()["images"]["turned"] == 1


BROKEN = {
    "pairs": [
        "{cut", {"desc": "a"}, {"binary": base64_picture(0)}, {"binary": base64_picture(0), "desc": "?!"},
        {"binary": base64_picture(0), "desc": 5}, {"binary": [], "desc": "a"},
        {"binary": base64.b64encode(picture(0, size=(99, 99))[:500]).decode(), "desc": "a"},
    ],
    "images": [{"binary": "a"}, {"binary": 5}, {}],
    "text": [{"desc": " "}, {"desc": []}, {"desc": {}}],
    "regions": [
        {"binary": base64_picture(0)}, {**region(0), "elems": []}, {**region(0), "elems": [{"bb": [0, 0, 90, 9]}]},
        {**region(0), "elems": [{"bb": [1, 2, 3], "caption": "a"}]},
        {**region(0), "elems": [{"bb": [1, 2, 3, 0], "caption": "a"}]}, {**region(0), "elems": [5]},
    ],
}  # fmt: skip
GOOD: dict[str, Any] = {
    "pairs": pairs(1)[0],
    "images": pairs(1)[0],
    "text": {"desc": "a cat"},
    "regions": region(1),
}


@pytest.mark.parametrize("task", BROKEN)
def test_broken_rows_are_those_that_training_skips(tmp_path: Path, task: str) -> None:
    rows = [*BROKEN[task], GOOD[task]]
    data = write_lines(tmp_path / "a.jsonl", rows)
    report = _check(data, task)
    assert [problem.row for problem in report.problems] == list(range(1, len(rows)))
    assert not report.ok
    listed = Quarantine(tmp_path / "q.jsonl", tolerate_bad=1)
    overrides: dict[str, Any] = {
        "text": {"max_tokens": 40},
        "regions": {"max_images": 2 * len(rows)},
    }
    stream = Stream(
        data, STREAM_KINDS[task](**overrides.get(task, {})), config=tiny_config(), tokenizer=tiny_tokenizer(),
        batch_size=2 * len(rows), seed=0, quarantine=listed,
    )  # fmt: skip
    stream.batch(0)
    skipped = {json.loads(line)["row"] for line in (tmp_path / "q.jsonl").read_text().splitlines()}
    assert skipped == set(range(1, len(rows)))


def test_the_limit_is_that_of_training(tmp_path: Path) -> None:
    rows: list[Any] = [{"desc": f"a cat {index}"} for index in range(100)]
    for broken, ok in ((1, True), (2, False)):
        report = _check(
            write_lines(tmp_path / "a.jsonl", [*rows[broken:], *["{"] * broken]), "text"
        )
        assert (report.broken, report.ok) == (broken, ok)
    assert _check(tmp_path / "a.jsonl", "text", tolerate_bad=0.05).ok
    assert len(_check(tmp_path / "a.jsonl", "text", max_problems=1).problems) == 1
    assert not _check(write_lines(tmp_path / "b.jsonl", ["{"]), "text").ok


def _elements(folder: Path) -> dict[str, list[dict[str, Any]]]:
    (folder / "0.jpg").write_bytes(picture(0))
    image = {"image": "0.jpg"}
    return {
        "retrieval": [
            {**image, "caption": "a cat", "image_id": 0},
            {**image, "caption": ["a cat", "one cat"]},
        ],
        "vqa": [{**image, "question": "what is it?", "question_id": 0, "answer": ["cat"]}],
        "nlvr2": [{"images": ["0.jpg", "0.jpg"], "sentence": "two cats", "label": "True"}],
        "grounding": [{**image, "text": "a cat", "ref_id": 0, "bbox": [0, 0, 40, 30]}],
        "captioning": [
            {**image, "caption": "a cat", "image_id": 0},
            image,
            {**image, "caption": ["a cat", "one cat"]},
        ],
    }


@pytest.mark.parametrize("task", ["retrieval", "vqa", "nlvr2", "grounding", "captioning"])
def test_fine_tuning_files(tmp_path: Path, task: str) -> None:
    good = _elements(tmp_path)[task]
    report = _check(_array(tmp_path / "a.json", good), task)
    assert (report.rows, report.broken, report.ok) == (len(good), 0, True)
    assert report.images == 1
    assert report.texts > 0
    absent = json.loads(json.dumps(good[0]).replace("0.jpg", "absent.jpg"))
    report = _check(_array(tmp_path / "b.json", [*good, absent, {}, 5]), task)
    assert [problem.row for problem in report.problems] == [
        f"element {len(good) + broken}" for broken in range(3)
    ]
    assert "absent.jpg" in report.problems[0].reason
    assert "is missing" in report.problems[1].reason


@pytest.mark.parametrize("task", ["text", "images", "regions"])
def test_the_cost_of_other_streams(tmp_path: Path, task: str) -> None:
    rows = {
        "text": {"desc": "a red cat"},
        "images": {"binary": base64_picture(0)},
        "regions": region(0),
    }
    report = _check(write_lines(tmp_path / "a.jsonl", ["{broken", *[rows[task]] * 3]), task)
    assert report.bytes_per_row > (0 if task == "text" else 4 * 3 * 32 * 32)
    assert report.as_dict()["cost"]["hours_per_epoch"] == pytest.approx(
        (report.seconds_per_row or 0) * 3 / 3600
    )


def test_files_without_a_good_row_cost_nothing(tmp_path: Path) -> None:
    report = _check(write_lines(tmp_path / "a.jsonl", ["{broken"] * 3), "text")
    assert report.as_dict()["cost"] == {
        "seconds_per_row": None,
        "hours_per_epoch": None,
        "bytes_per_row": 0,
    }
