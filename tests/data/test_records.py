"""Rows of line JSON and samples of shards by number, good, odd and damaged, and the index beside a file."""

import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.record_files import pairs, picture, write_lines, write_tar
from xfm_fast.data import records
from xfm_fast.data.files import find_files
from xfm_fast.data.records import LineFile, ShardFile
from xfm_fast.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def _plain(path: Path) -> list[tuple[int, object]]:
    """Read the whole file line by line: the slow twin."""
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    return [
        (index, json.loads(line)) for index, line in enumerate(text.split(b"\n"), 1) if line.strip()
    ]


def _all(file: LineFile | ShardFile) -> list[tuple[int | str, object]]:
    return [(file.label(row), file.read(row)) for row in range(len(file))]


objects = st.dictionaries(
    st.text(max_size=5), st.one_of(st.text(max_size=30), st.integers(), st.none()), max_size=4
)
blank = st.sampled_from(["", " ", "\t ", "\r"])


@given(
    lines=st.lists(st.one_of(objects.map(json.dumps), blank), min_size=1, max_size=30),
    mark=st.booleans(), carriage=st.booleans(), last=st.booleans(), chunk=st.sampled_from([1, 3, 64, 1 << 20]),
)  # fmt: skip
def test_any_row_is_what_reading_line_by_line_gives(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    mark: bool,
    carriage: bool,
    last: bool,
    chunk: int,
) -> None:
    end = "\r\n" if carriage else "\n"
    content = end.join(lines) + (end if last else "")
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + content.encode())
    before = records._CHUNK
    records._CHUNK = chunk
    try:
        if not any(line.strip() for line in lines):
            with pytest.raises(DataError, match=r"blank|empty"):
                len(LineFile(path))
            return
        assert _all(LineFile(path)) == _plain(path)
        # For a second time from the side file.
        assert _all(LineFile(path)) == _plain(path)
    finally:
        records._CHUNK = before


def test_index_is_kept_beside_the_data_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"a": 2}])
    assert len(LineFile(path)) == 2
    side = tmp_path / ".a.jsonl.index"
    assert side.is_file()
    scans = []
    monkeypatch.setattr(records, "_scan_lines", lambda path: scans.append(path))
    assert LineFile(path).read(1) == {"a": 2}
    assert not scans
    monkeypatch.undo()
    for damage in (b"", b"garbage", side.read_bytes()[:-8]):
        side.write_bytes(damage)
        assert [row for _, row in _all(LineFile(path))] == [{"a": 1}, {"a": 2}]
    write_lines(path, [{"a": 1}, {"a": 2}, {"a": 3}])
    assert len(LineFile(path)) == 3
    # The same size at another time is another file.
    write_lines(path, [{"a": 1}, "", {"a": 234567890}])
    os.utime(path, ns=(1, 1))
    assert [row for _, row in _all(LineFile(path))] == [{"a": 1}, {"a": 234567890}]
    assert LineFile(path).label(1) == 3


def _indexed(path: Path, change: Callable[[np.ndarray], Any]) -> None:
    """Replace the index beside a file by a changed one."""
    side = path.with_name(f".{path.name}.index")
    index = np.fromfile(side, np.int64)
    changed = change(index)
    (index if changed is None else changed).tofile(side)


FOREIGN: dict[str, Callable[[np.ndarray], Any]] = {
    "10¹² rows": lambda index: index.__setitem__(3, 10**12),
    "no rows": lambda index: index.__setitem__(3, 0),
    "negative rows": lambda index: index.__setitem__(3, -1),
    "an offset before the file": lambda index: index.__setitem__(4, -5),
    "an offset behind the file": lambda index: index.__setitem__(5, 1 << 40),
    "offsets of another file": lambda index: index.__setitem__(slice(5, 7), index[5:7] + 3),
    "offsets in another order": lambda index: index.__setitem__(
        slice(4, 7), index[4:7][::-1].copy()
    ),
    "a shorter file": lambda index: index.__setitem__(7, index[7] - 1),
    "a number too many": lambda index: np.append(index, 7),
    "a number too few": lambda index: index[:-1],
    "the head alone": lambda index: index[:3],
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("name", ["lines", "shard"])
def test_foreign_indexes_are_made_again(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], Any]
) -> None:
    if name == "lines":
        path = write_lines(tmp_path / "a.jsonl", pairs(3))
    else:
        path = write_tar(
            tmp_path / "a.tar", {f"{n}.json": json.dumps({"n": n}).encode() for n in range(3)}
        )
    opened = LineFile if name == "lines" else ShardFile
    expected = _all(opened(path))
    _indexed(path, change)
    assert _all(opened(path)) == expected
    # And kept.
    assert _all(opened(path)) == expected


@pytest.mark.parametrize("shut", [False, True])
def test_a_pipe_beside_the_data_is_passed_over(
    tmp_path: Path, shut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere" if shut else str(tmp_path / "cache"))
    path = write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"a": 2}])
    pipe = tmp_path / ".a.jsonl.index"
    os.mkfifo(pipe)
    for _ in range(2):
        assert [row for _, row in _all(LineFile(path))] == [{"a": 1}, {"a": 2}]
    assert pipe.is_fifo()
    assert len([*tmp_path.glob("cache/xfm-fast/index/*")]) == (0 if shut else 1)


@pytest.mark.parametrize("line", ["[1, 2]", '{"a": "cut he', "[" * 100_000, b'{"a": "\xff"}'])
def test_broken_lines_are_named(
    tmp_path: Path, line: str | bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + (line.encode() if isinstance(line, str) else line))
    file = LineFile(path)
    assert file.read(0) == {"a": 1}
    with pytest.raises(DataError, match=r"JSON|UTF-8"):
        file.read(1)
    monkeypatch.setattr(records, "MOST_LINE_BYTES", 1)
    with pytest.raises(DataError, match="limit of 1"):
        file.read(1)


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("part-1", "part-0", "_SUCCESS", ".part-0.index", "b/x.jsonl", "c,d.jsonl"):
        (tmp_path / name).write_text("{}")
    paths = [tmp_path / "c,d.jsonl", tmp_path / "part-0", tmp_path / "part-1"]
    assert find_files(tmp_path) == paths
    assert find_files(f"{tmp_path}/part-*, {tmp_path}/b") == [
        *paths[1:],
        tmp_path / "b" / "x.jsonl",
    ]
    assert find_files([tmp_path / "part-1", f"{tmp_path}/c,d.jsonl"]) == [paths[2], paths[0]]
    for wrong in (f"{tmp_path}/absent*", [tmp_path / "part-0", tmp_path], []):
        with pytest.raises(DataError):
            find_files(wrong)


def _sample(index: int) -> dict[str, bytes]:
    return {
        f"{index:04d}.jpg": picture(index),
        f"{index:04d}.txt": f"picture {index}".encode(),
        f"{index:04d}.json": json.dumps({"id": index}).encode(),
    }


def _members(count: int) -> dict[str, bytes]:
    return {name: content for index in range(count) for name, content in _sample(index).items()}


def _samples(file: ShardFile) -> list[tuple[str, dict[str, bytes]]]:
    return [(file.label(row), file.members(row)) for row in range(len(file))]


def _webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Read the archive from front to back: the slow twin."""
    out: list[tuple[str, dict[str, bytes]]] = []
    with tarfile.open(path) as archive:
        for member in archive:
            paths = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]+)", member.name, re.DOTALL)
            if not member.isreg() or paths is None:
                continue
            if not out or out[-1][0] != paths[1]:
                out.append((paths[1], {}))
            file = archive.extractfile(member)
            assert file is not None
            out[-1][1][paths[2].lower()] = file.read()
    return out


def test_samples_become_records(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", _members(3))
    with tarfile.open(path, "a") as archive:
        for name, file_format in (
            ("0003.jpg", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("README", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = file_format, "0000.jpg"
            archive.addfile(info)
    file = ShardFile(path, image_key="img", caption_key="text")
    assert len(file) == 3
    assert file.read(2) == {"id": 2, "img": picture(2), "text": "picture 2"}
    assert file.label(2) == "0002"
    assert file.suffixes(1) == ["jpg", "txt", "json"]
    assert _samples(file) == _webdataset(path)


names = st.text("abcé/", min_size=1, max_size=150).map(lambda text: "x" + text.strip("/"))
contents = st.dictionaries(
    st.sampled_from(["jpg", "txt", "json", "cls", "seg.png"]), st.binary(max_size=700), min_size=1
)


@given(st.dictionaries(names, contents, min_size=1, max_size=8))
def test_any_shard_reads_as_from_front_to_back(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, dict[str, bytes]]
) -> None:
    members = {
        f"{key}.{suffix}": data for key, files in samples.items() for suffix, data in files.items()
    }
    path = write_tar(tmp_path_factory.mktemp("shards") / "a.tar", members)
    assert _samples(ShardFile(path)) == _webdataset(path)
    again = pickle.loads(pickle.dumps(ShardFile(path)))
    assert _samples(again) == _webdataset(path)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", _members(4))
    with tarfile.open(path) as archive:
        offset = archive.getmember("0002.jpg").offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 200] = b"\xaa" * 200
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{offset:,}"):
        len(ShardFile(path))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.json": b"[1]"}, "object"),
        ({"a.txt": b"\xff\xfe"}, "UTF-8"),
        ({"a.jpg": b"1", "a.png": b"2"}, "2 images"),
        ({"a.jpg": b"x", "a.JPG": b"y"}, "twice"),
    ],
)
def test_samples_that_are_no_records(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ShardFile(write_tar(tmp_path / "a.tar", members)).read(0)
