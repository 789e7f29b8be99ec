"""Random access to rows of line JSON, WebDataset shards, tables, image folders and in-memory lists.

`READERS` holds the file formats; what is added to it is read by training, checks, conversion and search.
WebDataset convention: consecutive archive members that share their path up to the first dot of the name are one sample;
the rest of the name is the field.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from xfm_fast.data.annotations import AnnotationRows, Elements, read_array
from xfm_fast.data.files import (
    IndexedFile,
    Paths,
    check_plain,
    find_files,
    open_file,
    read_range,
    row_of,
)
from xfm_fast.data.images import image_source, image_values
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.tables import (
    LINE_SUFFIXES,
    PAIR_COLUMNS,
    PICTURE_SUFFIXES,
    TABLE_SUFFIXES,
    caption_table,
    group_captions,
    has_images,
    read_caption_folder,
    read_table,
    resolve_images,
)
from xfm_fast.errors import DataError, explain_types
from xfm_fast.io import check_text

Record = Mapping[str, Any]
Data = Paths | Sequence[Record]

# More than a loader should hold in memory; usually a file with broken line ends.
MOST_LINE_BYTES = 256 << 20
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "img", "image")
TEXT_SUFFIXES = ("txt", "text", "caption")

_LINES_VERSION, _SHARD_VERSION = 1, 2
_CHUNK = 16 << 20
_NEWLINE = 10
_MARK = b"\xef\xbb\xbf"
_SHORT = 8


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
        super().__init__(path, _scan_lines, _LINES_VERSION, _line_begins)

    def label(self, row: int) -> int:
        """Line number of a row, counting from 1."""
        count = len(self)
        values = self.index
        return int(values[2 + count + row]) if len(values) > 2 + count else row + 1

    def raw(self, row: int) -> bytes:
        """Bytes of a row without surrounding whitespace."""
        start, end = self.range(row)
        if end - start > MOST_LINE_BYTES:
            raise DataError(
                f"the line has {end - start:,} bytes, over the limit of {MOST_LINE_BYTES:,}; check its line ends"
            )
        return read_range(self.path, start, end - start).strip()

    def read(self, row: int) -> dict[str, Any]:
        return _parse_object(self.raw(row), "the line")


def _parse_object(text: bytes, name: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
        check_text(record, text)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 (byte {error.start}: {error.reason}); convert the file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name} is no JSON ({error}); expected one object, such as {{...}}"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{name} holds a JSON {type(record).__name__} instead of an object {{...}}")
    return record


def _line_begins(path: Path, start: int) -> bool:
    before = read_range(path, max(0, start - len(_MARK)), min(start, len(_MARK)))
    return not before or before.endswith(b"\n") or (before == _MARK and start == len(_MARK))


def _scan_lines(path: Path) -> np.ndarray:
    """Index: row count, row offsets, file size, then line numbers if there are blank lines."""
    buffer = bytearray(_CHUNK)
    view = np.frombuffer(buffer, np.uint8)
    ends = []
    size = 0
    with open_file(path) as file:
        start = os.pread(file.fileno(), 4096, 0)
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
            full[line] = bool(
                os.pread(file.fileno(), int(lengths[line]), int(starts[line])).strip()
            )
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

    def __init__(
        self, path: str | os.PathLike[str], *, image_key: str = "binary", caption_key: str = "desc"
    ) -> None:
        super().__init__(path, _scan_shard, _SHARD_VERSION, _member_begins)
        self._image_key = image_key
        self._caption_key = caption_key

    def label(self, row: int) -> str:
        """Key of a sample: the path prefix shared by its files."""
        first = next(self._files(row), None)
        return f"sample {row}" if first is None else first.key

    def suffixes(self, row: int) -> list[str]:
        """Suffixes of the files of a sample."""
        return [file.suffix for file in self._files(row)]

    def members(self, row: int, *, without: Collection[str] = ()) -> dict[str, bytes]:
        """Contents of a sample's files by suffix."""
        out = {}
        for file in self._files(row):
            if file.suffix not in without:
                out[file.suffix] = content = read_range(self.path, file.start, file.size)
                if len(content) < file.size:
                    sizes = f"{len(content):,} of {file.size:,} bytes"
                    raise DataError(
                        f"the shard ends within .{file.suffix} ({sizes}); copy it again"
                    )
        return out

    def _files(self, row: int) -> Iterator[_Member]:
        start, end = self.range(row)
        while start < end:
            try:
                header = read_range(self.path, start, tarfile.BLOCKSIZE)
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                # Long names and other headers of several blocks.
                with open_file(self.path) as file:
                    yield from _members(self.path, file, start, end)
                return
            content = start + tarfile.BLOCKSIZE
            if name := _split_name(info.name):
                yield _Member(*name, start, content, info.size)
            start = content + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def raw(self, row: int) -> bytes:
        """Concatenated files of a sample, text files first."""
        files = sorted(
            self.members(row).items(), key=lambda item: item[0] not in ("json", *TEXT_SUFFIXES)
        )
        return b" ".join(f".{suffix} ".encode() + content for suffix, content in files)

    def read(self, row: int) -> dict[str, Any]:
        return self._record(self.members(row))

    def texts(self, row: int) -> dict[str, Any]:
        """`read` without the image."""
        return self._record(self.members(row, without=IMAGE_SUFFIXES))

    def _record(self, files: Mapping[str, bytes]) -> dict[str, Any]:
        record = _parse_object(files["json"], "the .json of the sample") if "json" in files else {}
        images = [suffix for suffix in files if suffix in IMAGE_SUFFIXES]
        if len(images) > 1:
            raise DataError(
                f"the sample has {len(images)} images (.{', .'.join(images)}); leave one"
            )
        for suffix, content in files.items():
            if suffix in IMAGE_SUFFIXES:
                record[self._image_key] = content
            elif suffix in TEXT_SUFFIXES:
                try:
                    record[self._caption_key] = content.decode()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"the .{suffix} of the sample is not UTF-8 (byte {error.start})"
                    ) from None
        return record


class _Member(NamedTuple):
    """A file in a shard: key of its sample, lower-case suffix, offsets of header and content, and size."""

    key: str
    suffix: str
    header: int
    start: int
    size: int


def _split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case suffix of a member, `a/b.seg.png` → (`a/b`, `seg.png`); None without a suffix."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot and suffix else None


def _members(
    path: Path, file: BinaryIO, start: int = 0, end: int | None = None
) -> Iterator[_Member]:
    """Files `key.suffix` between two offsets, including a truncated last one, which fails when read."""
    file.seek(start)
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, `file` is what there is to close
    except tarfile.TarError as error:
        raise DataError(
            f"{path} is no tar file ({error}); give WebDataset shards or line-JSON files"
        ) from None
    while True:
        # The list that the library keeps of all members is not needed.
        setattr(archive, "members", [])  # noqa: B010, the type stubs leave it out
        try:
            member = archive.next()
        except tarfile.ReadError:
            return
        if member is None or (end is not None and member.offset >= end):
            break
        if member.isreg() and (name := _split_name(member.name)):
            yield _Member(*name, member.offset, member.offset_data, member.size)
    # The library takes a damaged header for the end.
    header = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
    if member is None and len(header) == tarfile.BLOCKSIZE and header.strip(b"\0"):
        raise DataError(
            f"{path} is damaged at byte {archive.offset:,}, and what follows there cannot be found; copy it again"
        )


def _member_begins(path: Path, start: int) -> bool:
    try:
        tarfile.TarInfo.frombuf(
            read_range(path, start, tarfile.BLOCKSIZE), "utf-8", "surrogateescape"
        )
    except tarfile.HeaderError:
        return False
    return True


def _scan_shard(path: Path) -> np.ndarray:
    """Index: sample count, offsets of the first header of each sample, file size."""
    starts: list[int] = []
    key, inside = None, set[str]()
    with open_file(path) as file:
        check_plain(path, os.pread(file.fileno(), 512, 0))
        for member in _members(path, file):
            if member.key != key or not starts:
                key, inside = member.key, set()
                starts.append(member.header)
            if member.suffix in inside:
                raise DataError(
                    f"{path} holds {key}.{member.suffix} twice in one sample; write the shard again"
                )
            inside.add(member.suffix)
        size = os.fstat(file.fileno()).st_size
    if not starts:
        raise DataError(
            f"{path} holds no sample: files named key.suffix, such as 0001.jpg and 0001.json"
        )
    return np.array([len(starts), *starts, size], np.int64)


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
            raise DataError(
                f"the record is of type {type(record).__name__} instead of a mapping of fields"
            )
        return record


class RecordSet:
    """Rows of several files as one sequence, or those of them that `rows` numbers."""

    def __init__(self, files: Sequence[Rows], rows: NDArray[np.intp] | None = None) -> None:
        self.files, self._rows = list(files), rows
        self._ends = np.cumsum([len(each) for each in self.files])
        if not len(self):
            raise DataError("the data hold no rows; give at least one")

    def __len__(self) -> int:
        if self._rows is not None:
            return len(self._rows)
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, number: int) -> tuple[Rows, int]:
        """File of a row and the row number in it."""
        if self._rows is not None:
            number = int(self._rows[number])
        file = int(np.searchsorted(self._ends, number, side="right"))
        return self.files[file], number - (int(self._ends[file - 1]) if file else 0)


class Schema(NamedTuple):
    """Fields of image and caption in files that name their fields, and in the records read."""

    image_key: str = "binary"
    caption_key: str = "desc"


OFFICIAL = Schema()
"""The fields of the official line JSON."""


class Reader(NamedTuple):
    """A file format: which files or folders are of it, and how one is opened."""

    accepts: Callable[[Path, Schema], bool]
    open: Callable[[Path, Schema], Rows]


def open_pairs(path: Path, schema: Schema) -> AnnotationRows[Any]:
    """Images of a table or folder in first-seen order, each with all its captions (a list if several)."""
    table = caption_table(path) if path.is_dir() else path
    folder = path if table is None else table.parent
    if table is None:
        found = read_caption_folder(path)
    elif table.suffix == ".json":
        found = Elements(str(table), read_array(table))
    else:
        found = read_table(table, PAIR_COLUMNS)
    found = group_captions(resolve_images(path, found) if path.is_dir() else found)
    return AnnotationRows(path, found.values, partial(_pair, folder, schema), labels=found.labels)


def _pair(folder: Path, schema: Schema, value: Any) -> Record:
    if isinstance(value, DataError):
        raise value
    image, captions = (
        (value.get("image"), value.get("caption")) if isinstance(value, dict) else (None, None)
    )
    if not (isinstance(image, str) and image and isinstance(captions, list) and captions):
        raise DataError(
            f"expected the path of an image and a caption, not {image!r} and {captions!r}"
        )
    return {
        schema.image_key: folder / image,
        schema.caption_key: captions[0] if len(captions) == 1 else captions,
    }


def _has_pairs(path: Path, schema: Schema) -> bool:
    if path.is_dir():
        return is_image_folder(path)
    if path.suffix.lower() in LINE_SUFFIXES:
        first = first_object(path)
        return "image" in first and schema.image_key not in first
    return path.suffix.lower() in TABLE_SUFFIXES


READERS: dict[str, Reader] = {
    "lines": Reader(lambda path, _: path.is_file(), lambda path, _: LineFile(path)),
    "pairs": Reader(_has_pairs, open_pairs),
    "shards": Reader(
        lambda path, _: path.is_file() and ".tar" in path.suffixes,
        lambda path, schema: ShardFile(
            path, image_key=schema.image_key, caption_key=schema.caption_key
        ),
    ),
}
"""File formats by name; the last one that accepts a path reads it."""


def find_reader(path: Path, schema: Schema = OFFICIAL) -> str | None:
    """Name of the reader of a file or folder."""
    return next(
        (name for name, reader in reversed(READERS.items()) if reader.accepts(path, schema)), None
    )


def open_rows(path: Path, schema: Schema = OFFICIAL) -> Rows:
    """Open one file or folder as rows, by the reader that accepts it."""
    name = find_reader(path, schema)
    if name is None:
        raise DataError(f"{path} is of no format that is read; use one of {', '.join(READERS)}")
    return READERS[name].open(path, schema)


@explain_types
def open_records(data: Data, *, image_key: str = "binary", caption_key: str = "desc") -> RecordSet:
    """Open files, or a list of records, as one indexed sequence of rows.

    Files are `.tar` shards, line JSON with embedded images, CSV, TSV or line JSON with `image` and `caption`, folders
    of images with captions in text files or in a table of `CAPTION_TABLES`, or of a format added to `READERS`.

    Args:
        data: paths (see `find_files`) or records.
        image_key: field of the image, in line JSON and in the records returned.
        caption_key: field of the captions.

    Raises:
        DataError: no data, or an unknown file format.
    """
    if not isinstance(data, (str, os.PathLike)) and data and isinstance(data[0], Mapping):
        return RecordSet([ListRows(data)])  # type: ignore[arg-type]
    schema = Schema(image_key, caption_key)
    paths = find_files(data, lambda folder: find_reader(folder, schema) is not None)  # type: ignore[arg-type]
    return RecordSet([open_rows(path, schema) for path in paths])


def image_at(path: Path) -> Path | bytes:
    """Image path, or the image bytes in row 3 of `SHARD.tar#3` or `LINES.jsonl#3`."""
    found = row_of(os.fspath(path))
    if found is None or path.exists():
        return path
    file, row = found
    try:
        modified = os.stat(file).st_mtime_ns
    except OSError:
        modified = 0
    records = _opened(file, modified)
    if row >= len(records):
        raise DataError(
            f"{path}: the file has {len(records):,} rows; write the list of images again"
        )
    options = ImageOptions()
    return image_source(image_values(records.files[0].read(row), options)[0], options)


@lru_cache(maxsize=64)
def _opened(path: str, modified: int) -> RecordSet:
    return open_records(path)


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
        with open_file(path) as file:
            found = json.loads(file.readline(MOST_LINE_BYTES))
    except (DataError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
