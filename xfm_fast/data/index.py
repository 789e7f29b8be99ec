"""Where each row of a data file begins: found by one fast pass over the file, kept beside it for the next time.

An index is a flat array of int64. Reading one maps the file into memory, so that the workers of a loader share it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from xfm_fast.checkpoint.files import write_files
from xfm_fast.data.files import unreadable
from xfm_fast.errors import StorageError

# The head of an index: version of the format, size and time of change of the file that it is of.
_HEAD = 3


class FileIndex:
    """The index of one file, made when first needed.

    Args:
        path: the data file.
        build: scans the file and returns the array; only called when there is no valid index yet.
        version: of what `build` returns, so that indexes of another format are made anew.
    """

    def __init__(self, path: Path, build: Callable[[Path], np.ndarray], version: int) -> None:
        self.path = path
        self._build = build
        self._version = version
        self._values: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would be pickled with its content; another process maps the file again.
        mapped = self._values is not None and not self._values.flags.owndata
        return self.__dict__ | {"_values": None if mapped else self._values}

    @property
    def modified(self) -> int:
        """When the file was last changed as its index was made, in nanoseconds."""
        return int(self._loaded()[_HEAD - 1])

    @property
    def values(self) -> np.ndarray:
        """What `build` returned, int64.

        Raises:
            DataError: the file cannot be read.
        """
        return self._loaded()[_HEAD:]

    def _loaded(self) -> np.ndarray:
        if self._values is None:
            self._values = self._load()
        return self._values

    def _load(self) -> np.ndarray:
        try:
            with open(self.path, "rb") as data:
                # Ranks that start together scan a file once: the first holds the lock, the others find its index.
                with suppress(ImportError, OSError):
                    import fcntl

                    fcntl.flock(data, fcntl.LOCK_EX)
                status = os.fstat(data.fileno())
                head = np.array([self._version, status.st_size, status.st_mtime_ns], np.int64)
                for place in _places(self.path):
                    if (found := _read(place, head)) is not None:
                        return found
                made = np.concatenate([head, self._build(self.path)])
                return _write(made, head, _places(self.path))
        except OSError as error:
            raise unreadable(self.path, error) from None


class IndexedFile:
    """A data file whose index begins with the number of its rows.

    Args:
        path: the data file.
        build, version: see `FileIndex`.
    """

    def __init__(self, path: str | os.PathLike[str], build: Callable[[Path], np.ndarray], version: int) -> None:
        self.path = Path(path)
        self._index = FileIndex(self.path, build, version)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def modified(self) -> int:
        """See `FileIndex.modified`."""
        return self._index.modified

    def __len__(self) -> int:
        return int(self._index.values[0])


def _places(path: Path) -> list[Path]:
    """Where the index of a file may lie: beside it, or in a cache folder when the data may not be changed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xfm-fast" / "index"
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return [path.with_name(f".{path.name}.index"), cache / f"{name}.index"]


def _read(place: Path, head: np.ndarray) -> np.ndarray | None:
    try:
        found = np.load(place, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    valid = found.dtype == np.int64 and found.ndim == 1 and np.array_equal(found[:_HEAD], head)
    # The subclass for mapped arrays takes three times as long for every element.
    return found.view(np.ndarray) if valid else None


def _write(made: np.ndarray, head: np.ndarray, places: list[Path]) -> np.ndarray:
    for place in places:
        with suppress(StorageError, OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_files({place: lambda file: np.save(file, made)})
            if (mapped := _read(place, head)) is not None:
                return mapped
    return made
