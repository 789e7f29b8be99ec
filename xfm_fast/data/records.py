"""Random access to rows of line JSON, WebDataset shards, tables, image folders and in-memory lists.

`READERS` holds the file formats; what is added to it is read by training, checks, conversion and
search. WebDataset convention: consecutive archive members that share their path up to the first dot
of the name are one sample; the rest of the name is the field.
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

from xfm_fast.data.annotations import AnnotationRows, read_array
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
from xfm_fast.data.options import ImageOptions, Record
from xfm_fast.data.tables import (
    LINE_SUFFIXES,
    PAIR_COLUMNS,
    PICTURE_SUFFIXES,
    TABLE_SUFFIXES,
    caption_table,
    find_images,
    group_captions,
    read_caption_folder,
    read_table,
    resolve_images,
)
from xfm_fast.errors import DataError, explain_types
from xfm_fast.io import check_text

Data = Paths | Sequence[Record]

# More than a loader should hold in memory; usually a file with broken line ends.
MOST_LINE_BYTES = 256 << 20
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "img", "image")
TEXT_SUFFIXES = ("txt", "text", "caption")

_LINES_VERSION, _SHARD_VERSION = 1, 2
_CHUNK = 16 << 20
_NEWLINE = 10
_BOM = b"\xef\xbb\xbf"
# Bytes of a line below which it may be blank.
_SHORT_LINE = 8


class Rows(Protocol):
    """Rows of one file."""

    name: str  # in error messages

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
        """Return the line number of a row, counting from 1."""
        # Line numbers follow the offsets where they differ from row numbers.
        lines = self.index[2 + len(self) :]
        return int(lines[row]) if len(lines) else row + 1

    def raw(self, row: int) -> bytes:
        start, end = self.range(row)
        if end - start > MOST_LINE_BYTES:
            raise DataError(
                f"the line has {end - start:,} bytes, over the limit of {MOST_LINE_BYTES:,}; check its line ends"
            )
        return read_range(self.path, start, end - start).strip()

    def read(self, row: int) -> dict[str, Any]:
        return parse_object(self.raw(row), "the line")


def parse_object(text: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object; raises `DataError`."""
    try:
        record = json.loads(text)
        check_text(record, text)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 (byte {error.start}: {error.reason}); convert the file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name} is not JSON ({error}); expected one object, such as {{...}}"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{name} holds a JSON {type(record).__name__} instead of an object {{...}}")
    return record


def _line_begins(path: Path, start: int) -> bool:
    before = read_range(path, max(0, start - len(_BOM)), min(start, len(_BOM)))
    return not before or before.endswith(b"\n") or (before == _BOM and start == len(_BOM))


def _scan_lines(path: Path) -> np.ndarray:
    """Build the index: row count, row offsets, file size, then line numbers if there are blank lines."""
    buffer = bytearray(_CHUNK)
    view = np.frombuffer(buffer, np.uint8)
    ends, size = [], 0
    with open_file(path) as file:
        start = os.pread(file.fileno(), 4096, 0)
        check_plain(path, start)
        if start.removeprefix(_BOM).lstrip().startswith(b"["):
            raise DataError(
                f"{path} is a JSON array, as fine-tuning files are; pretraining reads one object per line: write "
                "every element on its own line"
            )
        while count := file.readinto(buffer):
            ends.append(np.flatnonzero(view[:count] == _NEWLINE) + size)
            size += count
        newlines = np.concatenate(ends)
        starts = np.concatenate([[len(_BOM) if start.startswith(_BOM) else 0], newlines + 1])
        lengths = np.concatenate([newlines, [size]]) - starts
        full = lengths > 0
        # Short lines may be blank: spaces, or the CR of a blank line.
        for line in np.flatnonzero(full & (lengths <= _SHORT_LINE)):
            full[line] = bool(
                os.pread(file.fileno(), int(lengths[line]), int(starts[line])).strip()
            )
    rows = np.flatnonzero(full)
    if not len(rows):
        raise DataError(f"{path} holds blank lines only; download or write it again")
    sections = [np.array([len(rows)]), starts[rows], np.array([size])]
    if len(rows) != rows[-1] + 1:
        sections.append(rows + 1)
    return np.concatenate(sections).astype(np.int64)


class ShardFile(IndexedFile):
    """Samples of an uncompressed tar file as records.

    The fields of the sample's `.json` come first; an image (`.jpg`, `.png`, ...) is stored under
    `image_key` as bytes, `.txt` under `caption_key`. Other files (`.cls`, `.seg.png`, ...) are
    ignored.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, image_key: str = "binary", caption_key: str = "desc"
    ) -> None:
        super().__init__(path, _scan_shard, _SHARD_VERSION, _member_begins)
        self._image_key = image_key
        self._caption_key = caption_key

    def label(self, row: int) -> str:
        """Return the key of a sample: the path prefix that its files share."""
        first = next(self._files(row), None)
        return f"sample {row}" if first is None else first.key

    def suffixes(self, row: int) -> list[str]:
        """Return the suffixes of the files of a sample."""
        return [file.suffix for file in self._files(row)]

    def members(self, row: int, *, without: Collection[str] = ()) -> dict[str, bytes]:
        """Read the files of a sample, by suffix."""
        contents = {}
        for file in self._files(row):
            if file.suffix in without:
                continue
            contents[file.suffix] = content = read_range(self.path, file.start, file.size)
            if len(content) < file.size:
                sizes = f"{len(content):,} of {file.size:,} bytes"
                raise DataError(f"the shard ends within .{file.suffix} ({sizes}); copy it again")
        return contents

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
            if name := split_name(info.name):
                yield _Member(*name, start, content, info.size)
            start = content + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def raw(self, row: int) -> bytes:
        """Concatenate the files of a sample, text files first."""
        contents = self.members(row)
        texts_first = sorted(contents, key=lambda suffix: suffix not in ("json", *TEXT_SUFFIXES))
        return b" ".join(f".{suffix} ".encode() + contents[suffix] for suffix in texts_first)

    def read(self, row: int, *, images: bool = True) -> dict[str, Any]:
        """Read a sample; without `images` their contents stay in the file."""
        files = self.members(row, without=() if images else IMAGE_SUFFIXES)
        return sample_record(files, self._image_key, self._caption_key)


def sample_record(files: Mapping[str, bytes], image_key: str, caption_key: str) -> dict[str, Any]:
    """Make a record of the files of a sample, by suffix; raises `DataError`."""
    record = parse_object(files["json"], "the .json of the sample") if "json" in files else {}
    image_suffixes = [suffix for suffix in files if suffix in IMAGE_SUFFIXES]
    if len(image_suffixes) > 1:
        raise DataError(
            f"the sample has {len(image_suffixes)} images (.{', .'.join(image_suffixes)}); leave one"
        )
    for suffix, content in files.items():
        if suffix in IMAGE_SUFFIXES:
            record[image_key] = content
        elif suffix in TEXT_SUFFIXES:
            try:
                record[caption_key] = content.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"the .{suffix} of the sample is not UTF-8 (byte {error.start})"
                ) from None
    return record


class _Member(NamedTuple):
    """A file in a shard."""

    key: str  # of its sample
    suffix: str  # in lower case
    header: int  # offset of the header
    start: int  # offset of the content
    size: int


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name, `a/b.seg.png` → (`a/b`, `seg.png`); None without a suffix."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot and suffix else None


def _members(
    path: Path, file: BinaryIO, start: int = 0, end: int | None = None
) -> Iterator[_Member]:
    """Yield the files `key.suffix` between two offsets, including a truncated last one, which fails when read."""
    file.seek(start)
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, the caller closes `file`
    except tarfile.TarError as error:
        raise DataError(
            f"{path} is not a tar file ({error}); give WebDataset shards or line-JSON files"
        ) from None
    while True:
        # The library would keep a list of all members.
        setattr(archive, "members", [])  # noqa: B010, the type stubs leave it out
        try:
            member = archive.next()
        except tarfile.ReadError:
            return
        if member is None or (end is not None and member.offset >= end):
            break
        if member.isreg() and (name := split_name(member.name)):
            yield _Member(*name, member.offset, member.offset_data, member.size)
    # The library takes a damaged header for the end.
    header = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
    if member is None and len(header) == tarfile.BLOCKSIZE and header.strip(b"\0"):
        raise DataError(
            f"{path} is damaged at byte {archive.offset:,}, and later members cannot be found; copy it again"
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
    """Build the index: sample count, offset of the first header of each sample, file size."""
    starts: list[int] = []
    key, suffixes = None, set[str]()
    with open_file(path) as file:
        check_plain(path, os.pread(file.fileno(), 512, 0))
        for member in _members(path, file):
            if member.key != key or not starts:
                key, suffixes = member.key, set()
                starts.append(member.header)
            if member.suffix in suffixes:
                raise DataError(
                    f"{path} holds {key}.{member.suffix} twice in one sample; write the shard again"
                )
            suffixes.add(member.suffix)
        size = os.fstat(file.fileno()).st_size
    if not starts:
        raise DataError(
            f"{path} holds no sample: files named key.suffix, such as 0001.jpg and 0001.json"
        )
    return np.array([len(starts), *starts, size], np.int64)


class RecordSet:
    """Rows of several files as one sequence; `rows` selects some of them by number."""

    def __init__(self, files: Sequence[Rows], rows: NDArray[np.intp] | None = None) -> None:
        self.files, self._rows = list(files), rows
        self._ends = np.cumsum([len(file) for file in self.files])
        if not len(self):
            raise DataError("the data hold no rows; give at least one")

    def __len__(self) -> int:
        if self._rows is not None:
            return len(self._rows)
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[Rows, int]:
        """Find the file of a row, and the row's number in it."""
        if self._rows is not None:
            index = int(self._rows[index])
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[file], index - (int(self._ends[file - 1]) if file else 0)


class Schema(NamedTuple):
    """Fields of image and caption in files that name their fields, and in the records read."""

    image_key: str = "binary"
    caption_key: str = "desc"


OFFICIAL = Schema()
"""The fields of the official line JSON."""


class Reader(NamedTuple):
    """A file format: a test for its files or folders, and the function that opens one."""

    accepts: Callable[[Path, Schema], bool]
    open: Callable[[Path, Schema], Rows]


def open_pairs(path: Path, schema: Schema) -> AnnotationRows[Any]:
    """Open the images of a table or folder in first-seen order, each with all its captions (a list if several)."""
    table = caption_table(path) if path.is_dir() else path
    folder = path if table is None else table.parent
    if table is None:
        rows = read_caption_folder(path)
    elif table.suffix == ".json":
        rows = AnnotationRows(table, read_array(table))
    else:
        rows = read_table(table, PAIR_COLUMNS)
    rows = group_captions(resolve_images(path, rows) if path.is_dir() else rows)
    return AnnotationRows(
        path, rows.elements, partial(_as_pair, folder, schema), labels=rows.labels
    )


def _as_pair(folder: Path, schema: Schema, element: Any) -> Record:
    if isinstance(element, DataError):
        raise element
    image = captions = None
    if isinstance(element, dict):
        image, captions = element.get("image"), element.get("caption")
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
    """Return the name of the reader of a file or folder."""
    for name, reader in reversed(READERS.items()):
        if reader.accepts(path, schema):
            return name
    return None


@explain_types
def open_records(data: Data, *, image_key: str = "binary", caption_key: str = "desc") -> RecordSet:
    """Open files, or a list of records, as one indexed sequence of rows.

    Files are `.tar` shards, line JSON with embedded images, CSV, TSV or line JSON with `image` and
    `caption`, folders of images with captions in text files or in a table of `CAPTION_TABLES`, or
    of a format added to `READERS`.

    Args:
        data: paths (see `find_files`) or records.
        image_key: field of the image, in line JSON and in the records returned.
        caption_key: field of the captions.

    Raises:
        DataError: no data, or an unknown file format.
    """
    if not isinstance(data, (str, os.PathLike)) and data and isinstance(data[0], Mapping):
        labels = range(len(data))
        return RecordSet([AnnotationRows("records in memory", data, labels=labels, modified=0)])
    schema = Schema(image_key, caption_key)
    files: list[Rows] = []
    for path in find_files(data, lambda folder: find_reader(folder, schema) is not None):  # type: ignore[arg-type]
        name = find_reader(path, schema)
        if name is None:
            raise DataError(f"{path} is in no readable format; use one of {', '.join(READERS)}")
        files.append(READERS[name].open(path, schema))
    return RecordSet(files)


def image_at(path: Path) -> Path | bytes:
    """Return an image's path, or the image bytes in row 3 of `SHARD.tar#3` or `LINES.jsonl#3`."""
    location = row_of(os.fspath(path))
    if location is None or path.exists():
        return path
    file, row = location
    try:
        modified = os.stat(file).st_mtime_ns
    except OSError:
        modified = 0
    records = _open_records(file, modified)
    if row >= len(records):
        raise DataError(
            f"{path}: the file has {len(records):,} rows; write the list of images again"
        )
    options = ImageOptions()
    return image_source(image_values(records.files[0].read(row), options)[0], options)


@lru_cache(maxsize=64)
def _open_records(path: str, modified: int) -> RecordSet:
    return open_records(path)


def has_shards(folder: Path) -> bool:
    """Return whether a folder holds WebDataset shards."""
    return any(path.is_file() for path in folder.glob("*.tar"))


def is_image_folder(folder: Path) -> bool:
    """Return whether a folder tree holds images with captions in text files or a table, and no other data files."""
    if caption_table(folder) is not None:
        return True
    for path in folder.iterdir():
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix.lower() not in (*PICTURE_SUFFIXES, ".txt"):
            return False
    return any(find_images(folder))


def first_object(path: Path) -> Mapping[str, Any]:
    """Read the first object of a line-JSON file, for format detection; empty if it is not an object."""
    try:
        with open_file(path) as file:
            value = json.loads(file.readline(MOST_LINE_BYTES))
    except (DataError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
