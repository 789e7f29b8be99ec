"""Rows of many files, in line JSON, WebDataset shards or memory, under one numbering."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xfm_fast.data.files import Paths, find_files
from xfm_fast.data.line_json import LineFile
from xfm_fast.data.shards import ShardFile
from xfm_fast.errors import DataError

Record = Mapping[str, Any]
Data = Paths | Sequence[Record]


class Rows(Protocol):
    """The rows of one file."""

    @property
    def name(self) -> str:
        """What messages call the file."""
        ...

    @property
    def modified(self) -> int:
        """When the file was last changed, in nanoseconds."""
        ...

    def __len__(self) -> int: ...

    def place(self, row: int) -> int | str:
        """What messages call a row: its line, the key of a sample, or an index from 0 in a list."""
        ...

    def raw(self, row: int) -> bytes:
        """A row as it is stored, for excerpts."""
        ...

    def read(self, row: int) -> Record:
        """A row as a mapping of its fields. Raises `DataError` when it is broken."""
        ...


class ListRows:
    """Records in memory, read as the rows of a file are."""

    modified = 0

    def __init__(self, records: Sequence[Record], name: str = "records in memory") -> None:
        self.name = name
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def place(self, row: int) -> int:
        return row

    def raw(self, row: int) -> bytes:
        return json.dumps(self._records[row], default=repr).encode()

    def read(self, row: int) -> Record:
        record = self._records[row]
        if not isinstance(record, Mapping):
            raise DataError(f"the record is of type {type(record).__name__} instead of a mapping of fields")
        return record


class RecordSet:
    """The rows of several files as one sequence, in the order of the files."""

    def __init__(self, files: Sequence[Rows]) -> None:
        self.files = list(files)
        self._ends = np.cumsum([len(each) for each in self.files])
        if not len(self):
            raise DataError("the data hold no rows; give at least one")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, number: int) -> tuple[Rows, int]:
        """The file of a row, and its number there."""
        file = int(np.searchsorted(self._ends, number, side="right"))
        return self.files[file], number - (int(self._ends[file - 1]) if file else 0)


def open_records(data: Data, *, image_key: str = "binary", caption_key: str = "desc") -> RecordSet:
    """The rows of files, which are `.tar` shards or line JSON, or of a list of records.

    Args:
        data: paths (see `find_files`) or records.
        image_key: field under which a shard's image files appear.
        caption_key: field under which a shard's text files appear.

    Raises:
        DataError: nothing is there, or a file can be read in neither form.
    """
    if not isinstance(data, (str, os.PathLike)) and data and isinstance(data[0], Mapping):
        return RecordSet([ListRows(data)])  # type: ignore[arg-type]
    if not isinstance(data, (str, os.PathLike)) and not data:
        raise DataError("the list of records or paths is empty; give at least one")
    paths = find_files(data)  # type: ignore[arg-type]
    return RecordSet(
        [
            ShardFile(path, image_key=image_key, caption_key=caption_key) if is_shard(path) else LineFile(path)
            for path in paths
        ]
    )


def is_shard(path: Path) -> bool:
    """Whether a file is read as a WebDataset shard, which its name says."""
    return ".tar" in path.suffixes
