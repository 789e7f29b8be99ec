"""WebDataset tar shards: any sample by its number, without reading the samples before it.

The convention: files that follow each other and share their path up to the first dot of the name are one sample, and
what follows that dot says what a file is. Shards that the `webdataset` library wrote can be read and the other way
round; reading needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xfm_fast.data.files import check_plain, read_range
from xfm_fast.data.index import IndexedFile
from xfm_fast.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "img", "image")
TEXT_SUFFIXES = ("txt", "text", "caption")

_VERSION = 1
# Rows, members, bytes of the sample keys, bytes of the suffixes, then five arrays and those two texts.
_COUNTS = 4


class ShardFile(IndexedFile):
    """The samples of one tar file as records, in the form of line-JSON rows.

    The fields of a sample's `.json` come first; an image file (`.jpg`, `.png`, ...) is put under `image_key` as bytes,
    a text file (`.txt`) under `caption_key`. Files of other kinds (`.cls`, `.seg.png`, ...) are left alone.

    Args:
        path: an uncompressed tar file.
        image_key: field that receives an image file.
        caption_key: field that receives a text file.

    Raises:
        DataError: (when samples are first counted or read) the file cannot be read, or is no tar file of samples.
    """

    def __init__(self, path: str | os.PathLike[str], *, image_key: str = "binary", caption_key: str = "desc") -> None:
        super().__init__(path, _scan, _VERSION)
        self._image_key = image_key
        self._caption_key = caption_key

    def place(self, row: int) -> str:
        """The key of a sample: the path that its files share."""
        values = self._index.values
        rows, members, keys, _ = (int(count) for count in values[:_COUNTS])
        start = _COUNTS + (rows + 1) + 3 * members
        first, last = (int(value) for value in values[start + row : start + row + 2])
        text = values[start + rows + 1 :].view(np.uint8)[:keys]
        return text[first:last].tobytes().decode("utf-8", "surrogateescape")

    def suffixes(self, row: int) -> list[str]:
        """What the names of a sample's files end in."""
        return [suffix for suffix, _, _ in self._files(row)]

    def members(self, row: int) -> dict[str, bytes]:
        """Suffix and content of each file of a sample.

        Raises:
            DataError: the shard ends within the sample.
        """
        out = {}
        for suffix, start, size in self._files(row):
            content = read_range(self.path, start, size)
            if len(content) < size:
                raise DataError(f"the shard ends within .{suffix} ({len(content):,} of {size:,} bytes); copy it again")
            out[suffix] = content
        return out

    def _files(self, row: int) -> list[tuple[str, int, int]]:
        """Suffix, place in the shard and size of each file of a sample."""
        values = self._index.values
        rows, count, keys, _ = (int(count) for count in values[:_COUNTS])
        first, last = (int(value) for value in values[_COUNTS + row : _COUNTS + row + 2])
        table = values[_COUNTS + rows + 1 : _COUNTS + rows + 1 + 3 * count].reshape(3, count)[:, first:last]
        texts = values[_COUNTS + 2 * (rows + 1) + 3 * count :].view(np.uint8)
        names = texts[_padded(keys) :].tobytes().rstrip(b"\0").decode("utf-8", "surrogateescape").split("\0")
        return [(names[suffix], start, size) for start, size, suffix in table.T.tolist()]

    def raw(self, row: int) -> bytes:
        """The files of a sample one after another, those that can be read in a report first."""
        files = sorted(self.members(row).items(), key=lambda item: item[0] not in ("json", *TEXT_SUFFIXES))
        return b" ".join(f".{suffix} ".encode() + content for suffix, content in files)

    def read(self, row: int) -> dict[str, Any]:
        """A sample as a record.

        Raises:
            DataError: a file of it is incomplete, or its `.json` holds no object.
        """
        record: dict[str, Any] = {}
        files = self.members(row)
        if "json" in files:
            try:
                record = json.loads(files["json"])
            except (ValueError, RecursionError) as error:
                raise DataError(f"the .json of the sample is no JSON ({error})") from None
            if not isinstance(record, dict):
                raise DataError("the .json of the sample holds no object {...}")
        images = [suffix for suffix in files if suffix in IMAGE_SUFFIXES]
        if len(images) > 1:
            raise DataError(f"the sample has {len(images)} images (.{', .'.join(images)}); leave one")
        for suffix, content in files.items():
            if suffix in IMAGE_SUFFIXES:
                record[self._image_key] = content
            elif suffix in TEXT_SUFFIXES:
                try:
                    record[self._caption_key] = content.decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"the .{suffix} of the sample is not UTF-8 (byte {error.start})") from None
        return record


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case suffix of a member: `a/b.seg.png` is (`a/b`, `seg.png`); None for names without a suffix."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot and suffix else None


def _scan(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise DataError(f"{path} is empty (0 bytes); download or write it again")
    check_plain(path, start)
    keys: list[str] = []
    first: list[int] = []
    table: list[tuple[int, int, int]] = []
    suffixes: dict[str, int] = {}
    inside: set[str] = set()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in _members(path, archive):
                parts = split_name(member.name) if member.isreg() else None
                if parts is None:
                    continue
                key, suffix = parts
                if not keys or key != keys[-1]:
                    keys.append(key)
                    first.append(len(table))
                    inside = set()
                if suffix in inside:
                    raise DataError(f"{path} holds {member.name} twice in one sample; write the shard anew")
                inside.add(suffix)
                table.append((member.offset_data, member.size, suffixes.setdefault(suffix, len(suffixes))))
    except tarfile.TarError as error:
        raise DataError(f"{path} is no tar file ({error}); give WebDataset shards or line-JSON files") from None
    if not keys:
        raise DataError(f"{path} holds no sample: files named key.suffix, such as 0001.jpg and 0001.json")
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    names = "\0".join(suffixes).encode("utf-8", "surrogateescape")
    bounds = np.cumsum([0, *map(len, encoded)])
    return np.concatenate(
        [
            np.array([len(keys), len(table), bounds[-1], len(names)], np.int64),
            np.array([*first, len(table)], np.int64),
            np.array(table, np.int64).T.reshape(-1),
            bounds.astype(np.int64),
            _as_int64(b"".join(encoded)),
            _as_int64(names),
        ]
    )


def _members(path: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a shard up to where it was cut, the cut one included: its sample fails when it is read."""
    while True:
        # The list that the library keeps of all members is not needed.
        setattr(archive, "members", [])  # noqa: B010, the type stubs leave it out
        try:
            member = archive.next()
        except tarfile.ReadError:
            return
        if member is None:
            break
        yield member
    # The library takes a damaged header for the end.
    header = read_range(path, archive.offset, tarfile.BLOCKSIZE)
    if len(header) == tarfile.BLOCKSIZE and header.strip(b"\0"):
        raise DataError(
            f"{path} is damaged at byte {archive.offset:,}, and what follows there cannot be found; copy it again"
        )


def _padded(count: int) -> int:
    return -(-count // 8) * 8


def _as_int64(text: bytes) -> np.ndarray:
    return np.frombuffer(text.ljust(_padded(len(text)), b"\0"), np.int64)
