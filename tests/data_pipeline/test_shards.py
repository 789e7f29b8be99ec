"""WebDataset shards by sample number, good, odd and damaged; and the webdataset library as a second opinion."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data_pipeline.record_files import picture, write_tar
from xfm_fast.data import shards
from xfm_fast.data.shards import ShardFile, split_name
from xfm_fast.errors import DataError


def _sample(number: int) -> dict[str, bytes]:
    return {
        f"{number:04d}.jpg": picture(number),
        f"{number:04d}.txt": f"picture {number}".encode(),
        f"{number:04d}.json": json.dumps({"id": number}).encode(),
    }


def _members(count: int) -> dict[str, bytes]:
    return {name: content for number in range(count) for name, content in _sample(number).items()}


def _samples(file: ShardFile) -> list[tuple[str, dict[str, bytes]]]:
    return [(file.place(row), file.members(row)) for row in range(len(file))]


def _plain(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """The twin: the archive read from front to back."""
    out: list[tuple[str, dict[str, bytes]]] = []
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            parts = split_name(member.name)
            if file is None or parts is None:
                continue
            if not out or out[-1][0] != parts[0]:
                out.append((parts[0], {}))
            out[-1][1][parts[1]] = file.read()
    return out


def test_samples_become_records(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", _members(3))
    file = ShardFile(path, image_key="img", caption_key="text")
    assert len(file) == 3
    assert file.read(2) == {"id": 2, "img": picture(2), "text": "picture 2"}
    assert file.place(2) == "0002"
    assert file.suffixes(1) == ["jpg", "txt", "json"]
    assert _samples(file) == _plain(path)


names = st.text("abcé/", min_size=1, max_size=150).map(lambda text: "x" + text.strip("/"))
files = st.dictionaries(st.sampled_from(["jpg", "txt", "json", "cls", "seg.png"]), st.binary(max_size=700), min_size=1)


@given(st.dictionaries(names, files, min_size=1, max_size=8))
def test_any_shard_reads_as_from_front_to_back(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, dict[str, bytes]]
) -> None:
    members = {f"{key}.{suffix}": data for key, each in samples.items() for suffix, data in each.items()}
    path = write_tar(tmp_path_factory.mktemp("shards") / "a.tar", members)
    assert _samples(ShardFile(path)) == _plain(path)
    again = pickle.loads(pickle.dumps(ShardFile(path)))
    assert _samples(again) == _plain(path)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.jpg", ("a/b", "jpg")),
        ("b.seg.PNG", ("b", "seg.png")),
        ("a.d/b.txt", ("a.d/b", "txt")),
        ("none", None),
        (".hidden", None),
        ("b.", None),
        ("a.d/b", None),
    ],
)
def test_names(name: str, parts: tuple[str, str] | None) -> None:
    assert split_name(name) == parts


def test_other_members_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("folder.jpg", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0000.jpg"
            archive.addfile(info)
        for name, content in {"README": b"text", **_sample(0)}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert [key for key, _ in _samples(ShardFile(path))] == ["0000"]


def test_a_cut_shard_keeps_what_is_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", _members(4))
    with tarfile.open(path) as archive:
        places = {member.name: member.offset_data for member in archive}
    whole = path.read_bytes()
    path.write_bytes(whole[: places["0002.jpg"] + 100])
    file = ShardFile(path)
    assert len(file) == 3
    assert file.read(1)["id"] == 1
    with pytest.raises(DataError, match=r"ends within \.jpg \(100 of"):
        file.read(2)
    # Cut within a header: the sample before it is whole.
    path.write_bytes(whole[: places["0002.jpg"] - 300])
    assert [key for key, _ in _samples(ShardFile(path))] == ["0000", "0001"]


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", _members(4))
    with tarfile.open(path) as archive:
        place = archive.getmember("0002.jpg").offset
    whole = bytearray(path.read_bytes())
    whole[place : place + 200] = b"\xaa" * 200
    path.write_bytes(whole)
    with pytest.raises(DataError, match=f"damaged at byte {place:,}"):
        len(ShardFile(path))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.json": b"{"}, "no JSON"),
        ({"a.json": b"[1]"}, "no object"),
        ({"a.txt": b"\xff\xfe"}, "not UTF-8"),
        ({"a.jpg": b"1", "a.png": b"2"}, "2 images"),
    ],
)
def test_samples_that_are_no_records(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ShardFile(write_tar(tmp_path / "a.tar", members)).read(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"x" * 2000, "no tar file"),
        (gzip.compress(b"x" * 2000, mtime=0), "compressed"),
        (b"\0" * 10240, "no sample|no tar file"),
    ],
)
def test_files_that_are_no_shards(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        len(ShardFile(path))


def test_no_samples_and_twofold_members(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample"):
        len(ShardFile(write_tar(tmp_path / "a.tar", {"README": b"x"})))
    path = write_tar(tmp_path / "b.tar", {"a.jpg": b"x", "a.JPG": b"y"})
    with pytest.raises(DataError, match="twice in one sample"):
        len(ShardFile(path))


def test_the_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", _members(2))
    expected = _samples(ShardFile(path))
    monkeypatch.setattr(shards, "_scan", lambda path: pytest.fail("scanned again"))
    assert _samples(ShardFile(path)) == expected
    assert (tmp_path / ".a.tar.index").is_file()


def test_shards_of_the_webdataset_library(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for number in range(3):
            sink.write(
                {"__key__": f"k/{number}", "jpg": picture(number), "txt": f"text {number}", "json": {"n": number}}
            )
    file = ShardFile(tmp_path / "a.tar")
    assert [file.place(row) for row in range(3)] == ["k/0", "k/1", "k/2"]
    assert file.read(1) == {"n": 1, "binary": picture(1), "desc": "text 1"}
