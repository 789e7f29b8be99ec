"""Random access to rows of line JSON, WebDataset shards, tables, image folders and in-memory lists.

WebDataset convention: consecutive archive members that share their path up to the first dot of the name are one sample;
the rest of the name is the field.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xfm_fast.data.annotations import Elements
from xfm_fast.data.files import IndexedFile, Paths, check_plain, find_files, read_range, row_of
from xfm_fast.data.images import image_source, image_values
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.tables import (
    LINE_SUFFIXES,
    PAIR_COLUMNS,
    PICTURE_SUFFIXES,
    TABLE_SUFFIXES,
    caption_table,
    has_images,
    read_caption_folder,
    read_table,
)
from xfm_fast.documents import check_text
from xfm_fast.errors import DataError

Record = Mapping[str, Any]
Data = Paths | Sequence[Record]

# More than a loader should hold in memory; usually a file with broken line ends.
MOST_LINE_BYTES = 256 << 20
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "img", "image")
TEXT_SUFFIXES = ("txt", "text", "caption")
# The fields of a table, and of line JSON that names its images by their paths.
IMAGE_COLUMN, CAPTION_COLUMN = "image", "caption"

_LINES_VERSION = 1
_CHUNK = 16 << 20
_NEWLINE = 10
_MARK = b"\xef\xbb\xbf"
_SHORT = 8
_SHARD_VERSION = 1
# Rows, members, bytes of the sample keys, bytes of the suffixes, then five arrays and the two texts.
_COUNTS = 4


class Rows(Protocol):
    """Rows of one file."""

    @property
    def name(self) -> str:
        """File name in error messages."""
        ...

    @property
    def modified(self) -> int:
        """Modification time in nanoseconds."""
        ...

    def __len__(self) -> int: ...

    def label(self, row: int) -> int | str:
        """Name of a row in error messages: line, sample key or index."""
        ...

    def raw(self, row: int) -> bytes:
        """Stored bytes of a row, for excerpts."""
        ...

    def read(self, row: int) -> Any:
        """Parse a row to a mapping or `Annotation`; a broken row raises `DataError`."""
        ...


class LineFile(IndexedFile):
    """Rows of a line-delimited JSON file (UTF-8, LF or CRLF); blank lines are skipped."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, _scan_lines, _LINES_VERSION)

    def label(self, row: int) -> int:
        """Line number of a row, counting from 1."""
        count = len(self)
        values = self.index
        return int(values[2 + count + row]) if len(values) > 2 + count else row + 1

    def raw(self, row: int) -> bytes:
        """Bytes of a row without surrounding whitespace."""
        start, end = (int(value) for value in self.index[1 + row : 3 + row])
        if end - start > MOST_LINE_BYTES:
            raise DataError(
                f"the line has {end - start:,} bytes, over the limit of {MOST_LINE_BYTES:,}; check its line ends"
            )
        return read_range(self.path, start, end - start).strip()

    def read(self, row: int) -> dict[str, Any]:
        line = self.raw(row)
        try:
            record = json.loads(line)
            check_text(record, line)
        except UnicodeDecodeError as error:
            raise DataError(f"the line is not UTF-8 (byte {error.start}: {error.reason}); convert the file") from None
        except (ValueError, RecursionError) as error:
            place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"the line is no JSON{place} ({reason}); expected one object a line, such as {{...}}"
            ) from None
        if not isinstance(record, dict):
            names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
            raise DataError(f"the line holds a JSON {names.get(type(record), 'null')} instead of an object {{...}}")
        return record


def _scan_lines(path: Path) -> np.ndarray:
    """Index: row count, row offsets, file size, then line numbers if there are blank lines."""
    buffer = bytearray(_CHUNK)
    view = np.frombuffer(buffer, np.uint8)
    ends = []
    size = 0
    with open(path, "rb", buffering=0) as file:
        start = os.pread(file.fileno(), 4096, 0)
        if not start:
            raise DataError(f"{path} is empty (0 bytes); download or write it again")
        check_plain(path, start)
        if start.removeprefix(_MARK).lstrip().startswith(b"["):
            raise DataError(
                f"{path} is a JSON array, as fine-tuning files are; pretraining reads one object a line: write every "
                "element on a line of its own"
            )
        while count := file.readinto(buffer):
            ends.append(np.flatnonzero(view[:count] == _NEWLINE) + size)
            size += count
        newlines = np.concatenate(ends)
        starts = np.concatenate([[len(_MARK) if start.startswith(_MARK) else 0], newlines + 1])
        lengths = np.concatenate([newlines, [size]]) - starts
        full = lengths > 0
        # Too short for an object: spaces, the CR of a blank line, or a last line that was cut.
        for line in np.flatnonzero(full & (lengths <= _SHORT)):
            full[line] = bool(os.pread(file.fileno(), int(lengths[line]), int(starts[line])).strip())
    rows = np.flatnonzero(full)
    if not len(rows):
        raise DataError(f"{path} holds blank lines only; download or write it again")
    parts = [np.array([len(rows)]), starts[rows], np.array([size])]
    if len(rows) != rows[-1] + 1:
        parts.append(rows + 1)
    return np.concatenate(parts).astype(np.int64)


class ShardFile(IndexedFile):
    """Samples of an uncompressed tar file as records.

    The fields of the sample's `.json` come first; an image (`.jpg`, `.png`, ...) is stored under `image_key` as bytes,
    `.txt` under `caption_key`. Other files (`.cls`, `.seg.png`, ...) are ignored.
    """

    def __init__(self, path: str | os.PathLike[str], *, image_key: str = "binary", caption_key: str = "desc") -> None:
        super().__init__(path, _scan_shard, _SHARD_VERSION)
        self._image_key = image_key
        self._caption_key = caption_key

    def label(self, row: int) -> str:
        """Key of a sample: the path prefix shared by its files."""
        values = self.index
        rows, members, keys, _ = (int(count) for count in values[:_COUNTS])
        start = _COUNTS + (rows + 1) + 3 * members
        first, last = (int(value) for value in values[start + row : start + row + 2])
        text = values[start + rows + 1 :].view(np.uint8)[:keys]
        return text[first:last].tobytes().decode("utf-8", "surrogateescape")

    def suffixes(self, row: int) -> list[str]:
        """Suffixes of the files of a sample."""
        return [suffix for suffix, _, _ in self._files(row)]

    def members(self, row: int) -> dict[str, bytes]:
        """Contents of a sample's files by suffix."""
        return self._contents(self._files(row))

    def _contents(self, files: Iterable[tuple[str, int, int]]) -> dict[str, bytes]:
        out = {}
        for suffix, start, size in files:
            content = read_range(self.path, start, size)
            if len(content) < size:
                raise DataError(f"the shard ends within .{suffix} ({len(content):,} of {size:,} bytes); copy it again")
            out[suffix] = content
        return out

    def texts(self, row: int) -> dict[str, Any]:
        """`read` without the image."""
        return self._record(self._contents(each for each in self._files(row) if each[0] not in IMAGE_SUFFIXES))

    def _files(self, row: int) -> list[tuple[str, int, int]]:
        """Suffix, offset and size of each file of a sample."""
        values = self.index
        rows, count, keys, _ = (int(count) for count in values[:_COUNTS])
        first, last = (int(value) for value in values[_COUNTS + row : _COUNTS + row + 2])
        table = values[_COUNTS + rows + 1 : _COUNTS + rows + 1 + 3 * count].reshape(3, count)[:, first:last]
        texts = values[_COUNTS + 2 * (rows + 1) + 3 * count :].view(np.uint8)
        names = texts[_padded(keys) :].tobytes().rstrip(b"\0").decode("utf-8", "surrogateescape").split("\0")
        return [(names[suffix], start, size) for start, size, suffix in table.T.tolist()]

    def raw(self, row: int) -> bytes:
        """Concatenated files of a sample, text files first."""
        files = sorted(self.members(row).items(), key=lambda item: item[0] not in ("json", *TEXT_SUFFIXES))
        return b" ".join(f".{suffix} ".encode() + content for suffix, content in files)

    def read(self, row: int) -> dict[str, Any]:
        return self._record(self.members(row))

    def _record(self, files: Mapping[str, bytes]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if "json" in files:
            try:
                record = json.loads(files["json"])
                check_text(record, files["json"])
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
    """Key and lower-case suffix of a member, e.g. `a/b.seg.png` → (`a/b`, `seg.png`); None without a suffix."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot and suffix else None


def _scan_shard(path: Path) -> np.ndarray:
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
                    raise DataError(f"{path} holds {member.name} twice in one sample; write the shard again")
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
    """Members of a shard, including a truncated last one, which fails when read."""
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


class ListRows:
    """In-memory records with the interface of a file."""

    modified = 0

    def __init__(self, records: Sequence[Record], name: str = "records in memory") -> None:
        self.name = name
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def label(self, row: int) -> int:
        return row

    def raw(self, row: int) -> bytes:
        return json.dumps(self._records[row], default=repr).encode()

    def read(self, row: int) -> Record:
        record = self._records[row]
        if not isinstance(record, Mapping):
            raise DataError(f"the record is of type {type(record).__name__} instead of a mapping of fields")
        return record


class RecordSet:
    """Rows of several files as one sequence."""

    def __init__(self, files: Sequence[Rows]) -> None:
        self.files = list(files)
        self._ends = np.cumsum([len(each) for each in self.files])
        if not len(self):
            raise DataError("the data hold no rows; give at least one")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, number: int) -> tuple[Rows, int]:
        """File of a row and the row number in it."""
        file = int(np.searchsorted(self._ends, number, side="right"))
        return self.files[file], number - (int(self._ends[file - 1]) if file else 0)


class PairRows:
    """Images of a table or folder in first-seen order, each with all its captions (a list if several)."""

    def __init__(self, path: Path, *, image_key: str, caption_key: str) -> None:
        self.name = str(path)
        self._keys = image_key, caption_key
        table = caption_table(path) if path.is_dir() else path
        if table is None:
            elements, folder = read_caption_folder(path), path
        else:
            elements, folder = read_table(table, PAIR_COLUMNS), table.parent
        self._rows = _by_image(elements, folder)

    @property
    def modified(self) -> int:
        return os.stat(self.name).st_mtime_ns

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, row: int) -> int | str:
        return self._rows[row][0]

    def raw(self, row: int) -> bytes:
        return json.dumps(self._rows[row][1], default=str).encode()

    def read(self, row: int) -> Record:
        found = self._rows[row][1]
        if isinstance(found, DataError):
            raise found
        image, captions = found
        return dict(zip(self._keys, (image, captions[0] if len(captions) == 1 else captions), strict=True))


def _by_image(elements: Elements, folder: Path) -> list[tuple[int | str, tuple[Path, list[str]] | DataError]]:
    rows: list[tuple[int | str, tuple[Path, list[str]] | DataError]] = []
    known: dict[Path, list[str]] = {}
    for number, value in enumerate(elements.values):
        label = number if elements.labels is None else elements.labels[number]
        image, text = (value.get(IMAGE_COLUMN), value.get(CAPTION_COLUMN)) if isinstance(value, dict) else (None, None)
        captions = [text] if isinstance(text, str) else text
        if isinstance(value, DataError):
            rows.append((label, value))
        elif not (isinstance(image, str) and image and isinstance(captions, list) and captions):
            rows.append((label, DataError(f"expected the path of an image and a caption, not {image!r} and {text!r}")))
        elif (path := folder / image) in known:
            known[path].extend(captions)
        else:
            known[path] = [*captions]
            rows.append((label, (path, known[path])))
    return rows


def image_at(path: Path) -> Path | bytes:
    """Image path, or the image bytes in row 3 of `SHARD.tar#3` or `LINES.jsonl#3`."""
    found = row_of(os.fspath(path))
    if found is None or path.exists():
        return path
    file, row = found
    records = _opened(file, _modified(file))
    if row >= len(records):
        raise DataError(f"{path}: the file has {len(records):,} rows; write the list of images again")
    options = ImageOptions()
    return image_source(image_values(records.files[0].read(row), options)[0], options)


@lru_cache(maxsize=64)
def _opened(path: str, modified: int) -> RecordSet:
    return open_records(path)


def _modified(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def has_shards(folder: Path) -> bool:
    """True for a folder of WebDataset shards."""
    return any(each.is_file() for each in folder.glob("*.tar"))


def is_image_folder(folder: Path) -> bool:
    """True for a folder tree of images with captions in text files or a table, and no other data files."""
    if caption_table(folder) is not None:
        return True
    beside = (*PICTURE_SUFFIXES, ".txt")
    files = [each for each in folder.iterdir() if each.is_file() and not each.name.startswith(".")]
    return all(each.suffix.lower() in beside for each in files) and has_images(folder)


def first_object(path: Path) -> Mapping[str, Any]:
    """First object of a line-JSON file, for format detection; empty if it is not an object."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.readline(MOST_LINE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def open_records(data: Data, *, image_key: str = "binary", caption_key: str = "desc") -> RecordSet:
    """Open files, or a list of records, as one indexed sequence of rows.

    Files are `.tar` shards, line JSON with embedded images, CSV, TSV or line JSON with `image` and `caption`, or
    folders of images with captions in text files or in a table of `CAPTION_TABLES`.

    Args:
        data: paths (see `find_files`) or records.
        image_key: field of the image, in line JSON and in the records returned.
        caption_key: field of the captions.

    Raises:
        DataError: no data, or an unknown file format.
    """
    if not isinstance(data, (str, os.PathLike)) and data and isinstance(data[0], Mapping):
        return RecordSet([ListRows(data)])  # type: ignore[arg-type]
    if not isinstance(data, (str, os.PathLike)) and not data:
        raise DataError("the list of records or paths is empty; give at least one")
    paths = find_files(data, is_image_folder)  # type: ignore[arg-type]
    return RecordSet([_rows_of(path, image_key, caption_key) for path in paths])


def _rows_of(path: Path, image_key: str, caption_key: str) -> Rows:
    if ".tar" in path.suffixes:
        return ShardFile(path, image_key=image_key, caption_key=caption_key)
    suffix = path.suffix.lower()
    tabular = path.is_dir() or suffix in TABLE_SUFFIXES
    if not tabular and suffix in LINE_SUFFIXES:
        first = first_object(path)
        tabular = IMAGE_COLUMN in first and image_key not in first
    return PairRows(path, image_key=image_key, caption_key=caption_key) if tabular else LineFile(path)
