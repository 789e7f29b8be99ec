"""Files with one JSON object a line: any row by its number, without reading the rows before it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from xfm_fast.data.files import check_plain, read_range
from xfm_fast.data.index import IndexedFile
from xfm_fast.errors import DataError

# Nothing that a loader should hold in memory; usually a file whose line ends were lost.
MOST_LINE_BYTES = 256 << 20

_VERSION = 1
_CHUNK = 16 << 20
_NEWLINE = 10
_MARK = b"\xef\xbb\xbf"
_SHORT = 8


class LineFile(IndexedFile):
    """The rows of one file of line-delimited JSON. Blank lines are no rows.

    Args:
        path: UTF-8, with or without a byte-order mark; lines end in LF or CRLF, the last one may lack it.

    Raises:
        DataError: (when rows are first counted or read) the file cannot be read, is empty, compressed, UTF-16, or a
            JSON array.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, _scan, _VERSION)

    def place(self, row: int) -> int:
        """The line of a row, counted from 1 and with blank lines, as editors count."""
        count = len(self)
        values = self._index.values
        return int(values[2 + count + row]) if len(values) > 2 + count else row + 1

    def raw(self, row: int) -> bytes:
        """The bytes of a row, without those that surround the object.

        Raises:
            DataError: the line is too long to be one.
        """
        start, end = (int(value) for value in self._index.values[1 + row : 3 + row])
        if end - start > MOST_LINE_BYTES:
            raise DataError(
                f"the line has {end - start:,} bytes, over the limit of {MOST_LINE_BYTES:,}; check its line ends"
            )
        return read_range(self.path, start, end - start).strip()

    def read(self, row: int) -> dict[str, Any]:
        """The object of a row.

        Raises:
            DataError: the line is no JSON object.
        """
        line = self.raw(row)
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(f"the line is not UTF-8 (byte {error.start}: {error.reason}); convert the file") from None
        except (ValueError, RecursionError) as error:
            place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"the line is no JSON{place} ({said}); expected one object a line, such as {{...}}"
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"the line holds a JSON {_kind(record)} instead of an object {{...}}")
        return record


def _kind(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _scan(path: Path) -> np.ndarray:
    """Number of rows, where each begins, the size of the file; then the line of each row if there are blank lines."""
    buffer = bytearray(_CHUNK)
    view = np.frombuffer(buffer, np.uint8)
    ends = []
    size = 0
    with open(path, "rb", buffering=0) as file:
        start = os.pread(file.fileno(), 4096, 0)
        if not start:
            raise DataError(f"{path} is empty (0 bytes); download or write it again")
        _check_start(path, start)
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


def _check_start(path: Path, start: bytes) -> None:
    check_plain(path, start)
    text = start.removeprefix(_MARK).lstrip()
    if text.startswith(b"["):
        raise DataError(
            f"{path} is a JSON array, as fine-tuning files are; pretraining reads one object a line: write every "
            "element on a line of its own"
        )
