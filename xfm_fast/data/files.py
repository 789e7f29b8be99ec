"""Data files: finding them, reading byte ranges, and row indexes cached on disk.

A row index is a flat int64 array, memory-mapped so that loader workers share it.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xfm_fast.errors import DataError, StorageError
from xfm_fast.io import check_text, open_data, read_bytes, require_file, write_files
from xfm_fast.kernels.files import cache_folder, is_stream

_ROW = re.compile(r"(.+\.\w+)#(\d+)", re.DOTALL)

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# Several times the annotations of Visual Genome, in one file.
_FILE_LIMIT = 4 << 30
# Below any system's limit on open files, and enough for the files of a shuffle window.
_OPEN_LIMIT = 128
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
# Pickle opcodes that make containers, strings and numbers, or handle the stack; none of them
# imports or calls.
_PLAIN_OPCODES = (
    "MARK STOP POP POP_MARK DUP PROTO FRAME GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE NONE NEWTRUE "
    "NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES DICT EMPTY_DICT SETITEM SETITEMS LIST EMPTY_LIST "
    "APPEND APPENDS TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3"
)
# Head of an index: version of the format, and size and modification time of the indexed file.
_HEAD = 3
# Rows of a stored index that are verified in the file.
_SAMPLES = 64


def row_of(image: str) -> tuple[str, int] | None:
    """Split the name of an embedded image, e.g. `SHARD.tar#3`, into file and row; None for an image file."""
    match = _ROW.fullmatch(image)
    return None if match is None else (match[1], int(match[2]))


def file_of(image: str) -> str:
    """Return the path of an image file, or of the file that embeds it (see `row_of`)."""
    location = row_of(image)
    return image if location is None or os.path.exists(image) else location[0]


def find_files(
    paths: Paths, is_dataset: Callable[[Path], bool] = lambda folder: False
) -> list[Path]:
    """List the data files named by paths, in deterministic order.

    A string may contain several comma-separated paths: files, glob patterns (sorted) or folders,
    which stand for their visible files (sorted). Names with `_SUCCESS` are skipped, as in the
    official reader. Folders that satisfy `is_dataset` are returned themselves.
    """
    files: list[Path] = []
    for name in _split_paths(paths):
        path = Path(name)
        if path.is_dir() and is_dataset(path):
            matches = [path]
        elif path.is_dir():
            visible = (file for file in path.iterdir() if not file.name.startswith("."))
            matches = sorted(file for file in visible if file.is_file())
        elif path.exists():
            try:
                matches = [require_file(path)]
            except OSError as error:
                raise unreadable(path, error) from None
        else:
            matches = [file for file in map(Path, sorted(glob.glob(name))) if file.is_file()]
            if not matches:
                raise DataError(f"{name} does not exist and matches no file; check the path")
        matches = [file for file in matches if "_SUCCESS" not in file.name]
        if not matches:
            raise DataError(
                f"folder {name} holds no data files; give the files, or a folder that holds them"
            )
        files.extend(matches)
    if not files:
        raise DataError("no data files were named; give at least one path")
    seen: set[Path] = set()
    for path in files:
        if (real := path.resolve()) in seen:
            raise DataError(
                f"{path} is named twice; its rows would be read twice as often: name it once"
            )
        seen.add(real)
    return files


def _split_paths(paths: Paths) -> list[str]:
    if not isinstance(paths, (str, os.PathLike)):
        return [name for path in paths for name in _split_paths(path)]
    text = os.fspath(paths)
    # A comma may be part of a name.
    if os.path.exists(text) or not isinstance(paths, str):
        return [text]
    return [name.strip() for name in text.split(",") if name.strip()]


def open_file(path: Path) -> io.BufferedReader:
    """Open a data file for reading; one that is not regular (a pipe may never end) raises `DataError`."""
    try:
        return open_data(path)
    except OSError as error:
        raise unreadable(path, error) from None


def read_file(path: Path) -> bytes:
    """Read a data file that is parsed as a whole; one of more than 4 GiB raises `DataError`."""
    try:
        return read_bytes(path, _FILE_LIMIT)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def read_text(path: Path, limit: int = _FILE_LIMIT) -> str:
    """Read a text file of at most `limit` bytes; raises `DataError`."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def check_plain(path: Path, start: bytes) -> None:
    """Raise `DataError` for empty, compressed or UTF-16 files, which have no row offsets."""
    if not start:
        raise DataError(f"{path} is empty (0 bytes); download or write it again")
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path} is compressed ({name}) and cannot be read from the middle; decompress it first"
            )
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")


def read_json(
    path: Path,
    expected: str,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
    *,
    lines: str | None = None,
) -> Any:
    """Read a JSON file, with or without BOM; `expected` and `lines` complete error messages."""
    data = read_file(path)
    check_plain(path, data.strip()[:16])
    try:
        value = json.loads(data.decode("utf-8-sig"), object_hook=object_hook)
        check_text(value, data)
        return value
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it") from None
    except json.JSONDecodeError as error:
        if lines and error.msg == "Extra data" and data.lstrip().startswith(b"{"):
            expected += lines
        raise DataError(
            f"{path}:{error.lineno}:{error.colno}: {error.msg}; expected {expected}"
        ) from None
    except RecursionError:
        raise DataError(f"{path} is nested too deeply; expected {expected}") from None
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}; expected {expected}") from None


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of containers, strings and numbers without executing it; Python 2 strings are Latin-1."""
    data = read_file(path)
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except _NotPlain as error:
        raise DataError(
            f"{path} holds more than containers, strings and numbers ({error}) and is not unpickled; get the file from "
            "its authors"
        ) from None
    except Exception as error:
        # Damaged bytes can raise any exception.
        raise DataError(f"{path} is not a readable pickle ({error!r}); download it again") from None


class _NotPlain(Exception):
    """A pickle opcode that imports or calls something."""


class _PlainOpcodes(dict[int, Any]):
    def __missing__(self, opcode: int) -> Any:
        raise _NotPlain(f"opcode {bytes([opcode])!r}")


# The C unpickler cannot restrict opcodes, and a crafted memo index makes it allocate gigabytes.
class _PlainUnpickler(pickle._Unpickler):
    dispatch = _PlainOpcodes()
    for _name in _PLAIN_OPCODES.split():
        _code = ord(getattr(pickle, _name))
        dispatch[_code] = pickle._Unpickler.dispatch[_code]

    def find_class(self, module: str, name: str) -> Any:
        raise _NotPlain(f"{module}.{name}")


@contextmanager
def new_folder(folder: Path, name: str) -> Iterator[Path]:
    """Make a temporary folder, which is renamed to `folder` on success and deleted on failure."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        # Remove an empty folder of that name; over a full one the renaming fails.
        with suppress(OSError):
            folder.rmdir()
        os.rename(temporary, folder)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{name} could not be written ({error.strerror or error}); nothing was left behind: free space or choose "
            "another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _OpenFiles(threading.local):
    """Open file handles per thread, so that threads do not close each other's files."""

    def __init__(self) -> None:
        # By device and inode, since a file may be replaced and a relative name may change its
        # meaning.
        self.handles: OrderedDict[tuple[int, int], int] = OrderedDict()


_open_files = _OpenFiles()


def read_range(path: Path, start: int, size: int) -> bytes:
    """Read `size` bytes from `start` (fewer at the end of the file), with positional reads that are fork-safe."""
    try:
        status, handles = os.stat(path), _open_files.handles
        key = status.st_dev, status.st_ino
        handle = handles.pop(key, None)
        if handle is None:
            with open_data(path) as file:
                handle = os.dup(file.fileno())
            if len(handles) >= _OPEN_LIMIT:
                os.close(handles.popitem(last=False)[1])
        handles[key] = handle
        chunks = []
        while size > 0 and (chunk := os.pread(handle, min(size, 1 << 30), start)):
            chunks.append(chunk)
            start, size = start + len(chunk), size - len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError | ValueError) -> DataError:
    """Make the `DataError` for a data file that cannot be opened or read."""
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path} cannot be read ({reason}); check that it is a readable file")


class IndexedFile:
    """A data file with a cached row index, built on first use.

    `build` scans the file, and `begins` tells whether a row can begin at an offset. A changed
    `version` invalidates cached indexes. A cached index may come from anybody, so its offsets are
    verified.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        build: Callable[[Path], np.ndarray],
        version: int,
        begins: Callable[[Path, int], bool],
    ) -> None:
        self.path = Path(path)
        self.name = str(self.path)
        self._build, self._version, self._begins = build, version, begins

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would be pickled with its content; another process maps the file again.
        return {
            name: value
            for name, value in self.__dict__.items()
            if name != "_loaded" or value.flags.owndata
        }

    def __len__(self) -> int:
        return int(self.index[0])

    @property
    def modified(self) -> int:
        """Modification time at indexing, in nanoseconds."""
        return int(self._loaded[_HEAD - 1])

    @property
    def index(self) -> np.ndarray:
        """The int64 array of `build`: row count, row offsets, end of the last row, then numbers of the format."""
        return self._loaded[_HEAD:]

    def range(self, row: int) -> tuple[int, int]:
        """Return the offsets of the first byte of a row and of the next row."""
        start, end = self.index[1 + row : 3 + row].tolist()
        return start, end

    @cached_property
    def _loaded(self) -> np.ndarray:
        # Beside the file, or in a cache folder when the data may not be changed.
        cache = cache_folder("index")
        name = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:32]
        paths = [self.path.with_name(f".{self.path.name}.index"), cache / f"{name}.index"]
        try:
            with open_file(self.path) as data:
                # Of ranks that start together, the first scans the file, and the others wait for
                # its index.
                with suppress(ImportError, OSError):
                    import fcntl

                    fcntl.flock(data, fcntl.LOCK_EX)
                status = os.fstat(data.fileno())
                head = np.array([self._version, status.st_size, status.st_mtime_ns], np.int64)
                for path in paths:
                    if (index := self._read(path, head)) is not None:
                        return index
                built = np.concatenate([head, self._build(self.path)])
                for path in (path for path in paths if not is_stream(path)):
                    with suppress(StorageError, OSError):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_files({path: lambda file: file.write(built.data)})
                        if (index := self._read(path, head)) is not None:
                            return index
                return built
        except OSError as error:
            raise unreadable(self.path, error) from None

    def _read(self, path: Path, head: np.ndarray) -> np.ndarray | None:
        """Read a stored index; None unless it is one of this file."""
        try:
            with open_data(path) as file:
                # np.memmap itself takes three times as long to index.
                index = np.memmap(file, np.int64, "r").view(np.ndarray)
        except (OSError, ValueError):
            return None
        if len(index) <= _HEAD or not np.array_equal(index[:_HEAD], head):
            return None
        count, size = int(index[_HEAD]), int(head[1])
        # A format may add a number for each row.
        if count < 1 or len(index) - _HEAD - 2 - count not in (0, count):
            return None
        ends = index[_HEAD + 1 : _HEAD + 2 + count]
        if ends[0] < 0 or ends[-1] != size or not (ends[1:] > ends[:-1]).all():
            return None
        sample = np.linspace(0, count - 1, min(count, _SAMPLES)).astype(int)
        return index if all(self._begins(self.path, int(ends[row])) for row in sample) else None
