"""Line JSON to shards and back: the identity, atomic, and never over existing files."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.data.record_files import base64_picture, pairs, picture, region, write_lines, write_tar
from xfm_fast.data.converting import to_lines, to_shards
from xfm_fast.data.records import open_records
from xfm_fast.data.streams import Quarantine
from xfm_fast.errors import DataError, StorageError

WRAPPED = "\n".join(
    base64_picture(0)[start : start + 60] for start in range(0, len(base64_picture(0)), 60)
)
RECORDS: list[dict[str, Any]] = [
    *pairs(3),
    region(3),
    {"desc": "text only"},
    {"desc": ["several", "texts"]},
    {"desc": {"en": "a", "de": "b"}, "binary": [base64_picture(1), base64_picture(2)]},
    {"desc": "", "binary": base64_picture(4, form="PNG"), "image_id": 7},
    {"input_ids": [5, 6, 7]},
    {"desc": "line\r\nend é ☕", "binary": base64_picture(5, form="WEBP")},
    {"desc": None, "binary": None},
    {"desc": "another spelling of base64", "binary": WRAPPED},
]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _there_and_back(
    records: list[dict[str, Any]], folder: Path, **options: Any
) -> list[dict[str, Any]]:
    to_shards(write_lines(folder / "a.jsonl", records), folder / "shards", **options)
    to_lines(folder / "shards", folder / "b.jsonl")
    return _rows(folder / "b.jsonl")


def test_there_and_back_is_the_identity(tmp_path: Path) -> None:
    assert _there_and_back(RECORDS, tmp_path, samples_per_shard=4) == RECORDS
    names = sorted(path.name for path in (tmp_path / "shards").iterdir() if path.suffix == ".tar")
    assert names == [f"{index:06d}.tar" for index in range(3)]


def test_shards_are_deterministic_webdataset(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", pairs(3))
    done = to_shards(lines, tmp_path / "shards", samples_per_shard=2)
    assert (done.rows, done.skipped, len(done.files)) == (3, 0, 2)
    with tarfile.open(done.files[0]) as archive:
        assert archive.getnames() == [
            "000000000.jpg",
            "000000000.txt",
            "000000001.jpg",
            "000000001.txt",
        ]
    to_shards(lines, tmp_path / "again", samples_per_shard=2)
    assert done.files[0].read_bytes() == (tmp_path / "again" / done.files[0].name).read_bytes()
    assert len(to_shards(lines, tmp_path / "small", bytes_per_shard=3000).files) > 1
    assert len(open_records(tmp_path / "small")) == 3
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset([str(path) for path in done.files], shardshuffle=False))
    assert [(sample["jpg"], sample["txt"].decode()) for sample in samples] == [
        (picture(index), pairs(3)[index]["desc"]) for index in range(3)
    ]


def test_broken_rows_are_left_out_and_listed(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [*pairs(2), "{cut", {"binary": "a", "desc": "b"}])
    done = to_shards(
        lines, tmp_path / "shards", quarantine=Quarantine(tmp_path / "q.jsonl", tolerate_bad=0.5)
    )
    assert (done.rows, done.skipped) == (2, 2)
    assert [entry["row"] for entry in _rows(tmp_path / "q.jsonl")] == [3, 4]
    for convert, target in ((to_shards, "other"), (to_lines, "other.jsonl")):
        with pytest.raises(DataError, match="2 of 4"):
            convert(lines, tmp_path / target)
        assert not (tmp_path / target).exists()
    shard = write_tar(
        tmp_path / "a.tar",
        {"0.jpg": picture(0), "0.cls": b"1", "1.jpg": picture(1), "1.seg.png": b"x"},
    )
    assert to_lines(shard, tmp_path / "b.jsonl").ignored == {"cls": 1, "seg.png": 1}


def test_existing_files_stay_and_failures_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", pairs(1))
    (tmp_path / "empty").mkdir()
    to_shards(lines, tmp_path / "empty")
    for convert, target in ((to_shards, tmp_path / "empty"), (to_shards, lines), (to_lines, lines)):
        with pytest.raises(DataError, match="exists"):
            convert(lines, target)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(StorageError, match="space"):
        to_shards(lines, tmp_path / "shards")
    with pytest.raises(StorageError):
        to_lines(lines, lines / "b.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", ".a.jsonl.index", "empty"}


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
def test_tables_of_file_names_carry_their_images(tmp_path: Path, name: str) -> None:
    """Shards and lines hold the images that a table names, relative to its folder."""
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_bytes(picture(index))
    rows = [{"image": f"{index}.jpg", "caption": f"picture {index}"} for index in (0, 1, 2, 9)]
    rows.append({"image": "0.jpg", "caption": "again"})
    if name.endswith(".csv"):
        (tmp_path / name).write_text(
            "image,caption\n" + "".join(f"{row['image']},{row['caption']}\n" for row in rows)
        )
    else:
        write_lines(tmp_path / name, rows)
    bad = Quarantine(None, tolerate_bad=0.5)
    assert to_shards(tmp_path / name, tmp_path / "shards", quarantine=bad).rows == 3
    done = to_lines(
        tmp_path / name, tmp_path / "lines.jsonl", quarantine=Quarantine(None, tolerate_bad=0.5)
    )
    assert (done.rows, done.skipped) == (3, 1)
    expected = [{"binary": base64_picture(index), "desc": f"picture {index}"} for index in range(3)]
    expected[0]["desc"] = ["picture 0", "again"]  # type: ignore[assignment]
    samples = [
        {key: row[key] for key in ("binary", "desc")} for row in _rows(tmp_path / "lines.jsonl")
    ]
    assert samples == expected
    to_lines(tmp_path / "shards", tmp_path / "back.jsonl")
    assert _rows(tmp_path / "back.jsonl") == expected
