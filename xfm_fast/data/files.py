"""Which files a user's paths name, and reading any part of them from any process."""

from __future__ import annotations

import glob
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from xfm_fast.errors import DataError

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# Fewer than any system's limit on open files, and enough for the files that a window of reading touches.
_MOST_OPEN = 128
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


def find_files(paths: Paths) -> list[Path]:
    """The data files that paths name, in an order that does not depend on the file system.

    A string may hold several paths, separated by commas. Each is a file, a pattern (`*`, `?`, `[...]`; sorted) or a
    folder, of which all files count that are not hidden (sorted). Names that contain `_SUCCESS` are left out, as in
    the official reader.

    Raises:
        DataError: a path names nothing, or the same file is named twice.
    """
    found: list[Path] = []
    for part in _parts(paths):
        path = Path(part)
        if path.is_dir():
            inside = sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
        elif path.exists():
            inside = [path]
        else:
            inside = [Path(each) for each in sorted(glob.glob(part)) if Path(each).is_file()]
            if not inside:
                raise DataError(f"{part} does not exist and matches no file; check the path")
        inside = [each for each in inside if "_SUCCESS" not in each.name]
        if not inside:
            raise DataError(f"folder {part} holds no data files; give the files, or a folder that holds them")
        found.extend(inside)
    if not found:
        raise DataError("no data files were named; give at least one path")
    seen: set[Path] = set()
    for path in found:
        if (real := path.resolve()) in seen:
            raise DataError(f"{path} is named twice; its rows would be read twice as often: name it once")
        seen.add(real)
    return found


def _parts(paths: Paths) -> list[str]:
    if isinstance(paths, (str, os.PathLike)):
        text = os.fspath(paths)
        # A comma may be part of a name.
        if os.path.exists(text) or not isinstance(paths, str):
            return [text]
        return [part.strip() for part in text.split(",") if part.strip()]
    return [part for path in paths for part in _parts(path)]


def check_plain(path: Path, start: bytes) -> None:
    """Raise `DataError` if the first bytes of a file are those of a compressed or UTF-16 file.

    Rows are read by their place in the file, which a compressed file does not have.
    """
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            raise DataError(f"{path} is compressed ({name}) and cannot be read from the middle; decompress it first")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")


class _OpenFiles(threading.local):
    """Each thread has its own, so that none closes what another reads."""

    def __init__(self) -> None:
        self.handles: OrderedDict[str, int] = OrderedDict()


_open_files = _OpenFiles()


def read_range(path: Path, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start`; fewer only where the file ends.

    Safe after a fork: reading moves no position that processes could share.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        handle = _handle(str(path))
        parts = []
        while size > 0 and (part := os.pread(handle, min(size, 1 << 30), start)):
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """What to raise when the operating system refuses a data file."""
    return DataError(f"{path} cannot be read ({error.strerror or error}); check that it is a readable file")


def _handle(path: str) -> int:
    handles = _open_files.handles
    handle = handles.pop(path, None)
    if handle is None:
        handle = os.open(path, os.O_RDONLY)
        if len(handles) >= _MOST_OPEN:
            os.close(handles.popitem(last=False)[1])
    handles[path] = handle
    return handle
