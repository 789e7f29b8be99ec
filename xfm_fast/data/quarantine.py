"""The list of rows that could not be used: one line of JSON each, written by all workers and ranks together."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from xfm_fast.data.records import Rows
from xfm_fast.documents import parse_json
from xfm_fast.errors import DataError, StorageError

_EXCERPT = 120
_REASON = 400


class Quarantine:
    """Counts and lists broken rows, and stops a run that would silently train on half of its data.

    Each broken row is listed once, however many workers, ranks, epochs and restarts meet it: writers take turns by a
    lock on the file and first read what the others wrote. A file that was mended (its time of change differs) starts
    with a clean sheet.

    Args:
        path: the list, extended if it exists. None keeps it in a temporary file while the process lives, so that the
            workers of one loader still count together.
        tolerate_bad: largest share of broken rows in each file. One broken row alone never stops a run, so in files of
            fewer than 200 rows it takes two to be over 1%.
        setting: where a user sets this share, for the message that it is exceeded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        tolerate_bad: float = 0.01,
        setting: str = "tolerate_bad",
    ) -> None:
        if not 0 <= tolerate_bad <= 1:
            raise DataError(f"tolerate_bad={tolerate_bad} is no share of rows; use one from 0 to 1")
        self.tolerate_bad, self._setting = tolerate_bad, setting
        self._temporary = path is None
        if path is None:
            handle, path = tempfile.mkstemp(prefix="xfm-fast-quarantine-", suffix=".jsonl")
            os.close(handle)
            weakref.finalize(self, _remove, path, os.getpid())
        self.path = Path(path)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("tolerate_bad", "path", "_setting", "_temporary")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def add(self, rows: Rows, row: int, error: Exception) -> None:
        """List a broken row, unless it is listed already.

        Raises:
            DataError: the file that it is of has more broken rows than are tolerated.
            StorageError: the list cannot be written.
        """
        key = (rows.name, rows.label(row), rows.modified)
        if key in self._known:
            return
        raw = b""
        with suppress(DataError):
            raw = rows.raw(row)
        entry = {
            "file": rows.name,
            "row": rows.label(row),
            "reason": str(error)[:_REASON],
            "excerpt": raw[:_EXCERPT].decode("utf-8", "replace") + ("..." if len(raw) > _EXCERPT else ""),
            "modified": rows.modified,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                with suppress(ImportError, OSError):
                    import fcntl

                    fcntl.flock(handle, fcntl.LOCK_EX)
                self._catch_up(handle)
                if key not in self._known:
                    # A writer that was killed may have left half a line.
                    line = (b"\n" if self._tail else b"") + json.dumps(entry).encode() + b"\n"
                    if os.write(handle, line) != len(line):
                        raise OSError(28, "No space left on device")
                    self._catch_up(handle)
            finally:
                os.close(handle)
        except OSError as problem:
            raise StorageError(
                f"broken rows cannot be listed in {self.path} ({problem.strerror or problem}); choose another "
                "quarantine file"
            ) from problem
        bad, of = self.count(rows), len(rows)
        if bad > max(1, self.tolerate_bad * of):
            raise DataError(
                f"{rows.name}: {bad} of {of} rows are broken, more than the {self.tolerate_bad:.2%} that are "
                f"tolerated; the last: {error}. "
                + ("" if self._temporary else f"They are listed in {self.path}. ")
                + f"Mend the file (xfm-fast data check lists what is wrong) or raise {self._setting}"
            )

    def count(self, rows: Rows) -> int:
        """The number of rows of a file that are known to be broken, to any process."""
        with suppress(OSError):
            handle = os.open(self.path, os.O_RDONLY)
            try:
                self._catch_up(handle)
            finally:
                os.close(handle)
        return self._counts[rows.name, rows.modified]

    def _forget(self) -> None:
        self._known: set[tuple[str, int | str, int]] = set()
        self._counts: Counter[tuple[str, int]] = Counter()
        self._read = 0
        self._tail = b""

    def _catch_up(self, handle: int) -> None:
        """Read what was added to the list since the last look at it."""
        if os.fstat(handle).st_size < self._read:
            self._forget()
        while part := os.pread(handle, 1 << 20, self._read):
            self._read += len(part)
            *lines, self._tail = (self._tail + part).split(b"\n")
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    entry = parse_json(line)
                    key = (entry["file"], entry["row"], entry["modified"])
                    if key not in self._known:
                        self._known.add(key)
                        self._counts[key[0], key[2]] += 1


def _remove(path: str, process: int) -> None:
    # A forked worker inherits the finaliser, and the file is not its own.
    if os.getpid() == process:
        with suppress(OSError):
            os.unlink(path)
