"""A log of skipped samples, written by all workers and ranks."""

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
from xfm_fast.errors import DataError, StorageError
from xfm_fast.io import parse_json

_EXCERPT = 120
_REASON = 400


class Quarantine:
    """Logs broken rows, and stops a run if a file has too many.

    Each row is logged once across workers, ranks, epochs and restarts: writers lock the file and first read new
    entries. A changed file starts at zero. `path=None` uses a temporary file shared by the workers of one loader.
    `tolerate_bad` is the maximum share of broken rows per file, but one broken row never stops a run. `setting` names
    the option in errors.
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
        """Log a broken row unless it is listed; too many of them raise `DataError`."""
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
        """Known broken rows of a file, over all processes."""
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
        """Read entries appended since the last read."""
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
