"""The files of an index: names and stamps in SQLite, and features in a file that is mapped into memory.

Row i of the features belongs to the entry of row i. The committed header counts the rows, so bytes
behind them are what a killed writer left, and are overwritten. Deleted rows are tombstones until
`Writer.compact`. An index may come from anybody: its database is read without writing, its schema
must equal ours, so that no view or trigger runs, and every value is validated.

While a run writes, the database is in WAL mode; at rest it is one file, which can be read from a
read-only folder or a network drive. A rollback journal is never played, since a forged one names
files to delete.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import numpy as np
from annotated_types import Ge, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from xfm_fast.data.collection import Entry
from xfm_fast.errors import DataError, InputError, StorageError
from xfm_fast.io import advice, open_data, open_to_append, require_file

INDEX_FILE = "index.sqlite"
# Rows of a checksum, and of a step of a search or a copy: 64 MB of 256 numbers.
BLOCK_ROWS = 1 << 16
_APPLICATION_ID, _FORMAT = 0x58464D49, 3
_ENTRIES = """CREATE TABLE entries (
    row INTEGER PRIMARY KEY, name TEXT NOT NULL, passage INTEGER NOT NULL, size INTEGER NOT NULL,
    modified INTEGER NOT NULL, item INTEGER, fields TEXT NOT NULL, UNIQUE (name, passage)
)"""
INDEX_TABLES = (
    "CREATE TABLE header (content TEXT NOT NULL)",
    _ENTRIES,
    "CREATE TABLE captions (row INTEGER PRIMARY KEY, texts TEXT NOT NULL)",
    "CREATE TABLE tombstones (row INTEGER PRIMARY KEY)",
    "CREATE TABLE blocks (block INTEGER PRIMARY KEY, crc INTEGER NOT NULL)",
)
# Entries of a listing, with what a worker has made of them: for each passage its captions and
# feature.
_ROWS = """CREATE TABLE rows (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, size INTEGER NOT NULL,
    modified INTEGER NOT NULL, item INTEGER, fields TEXT NOT NULL, captions TEXT, features BLOB
)"""
PART_TABLES = (
    _ROWS,
    "CREATE TABLE missing (id INTEGER PRIMARY KEY, listed INTEGER NOT NULL)",
)
_BUSY_S = 60.0
_MOST_VALUE_BYTES = 64 << 20
# A forged tree of pages may never end: instructions of SQLite per byte of the file, and for any
# file.
_STEPS_PER_BYTE, _STEPS, _STEP = 64, 1 << 24, 1 << 16
# Raised by reading a damaged file.
DAMAGE = (OSError, ValueError, RecursionError, OverflowError, sqlite3.Error)


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds a NUL")
    return text


Text = Annotated[str, AfterValidator(_check_text)]


def _parse(text: Any) -> Any:
    if not isinstance(text, str):
        raise ValueError("it is no text")
    return json.loads(text)


class EntryRow(BaseModel, strict=True):
    """An entry as it is stored."""

    name: Text
    passage: Annotated[int, Ge(0)]
    size: int
    modified: int
    row: Annotated[int, Ge(0)] | None
    fields: Annotated[dict[str, Text], BeforeValidator(_parse)]
    captions: Annotated[list[Text], BeforeValidator(_parse)]

    def entry(self) -> Entry:
        values: dict[str, Any] = dict(self) | {"captions": tuple(self.captions)}
        return Entry(**values)


class Weights(BaseModel, strict=True):
    """The model that an index names."""

    weights: Text | None = None
    tokenizer: Text | None = None
    size: Literal["tiny", "base"] = "tiny"


class Header(BaseModel, strict=True):
    """The description of an index, replaced by every commit."""

    width: Annotated[int, Ge(1), Lt(1 << 20)]
    modality: Literal["image", "text"]
    path: Text
    images: Text | None
    column: Text | None
    model: Weights
    fingerprint: Text
    features: Annotated[str, Field(pattern=r"^features-[0-9a-f]{12}\.f32$")]
    rows: Annotated[int, Ge(0), Lt(1 << 40)] = 0
    commit: int = 0
    columns: list[Text] = []


def encode(text: str) -> bytes:
    """Encode any string, such as a name that is not Unicode, for `CAST(? AS TEXT)`."""
    return text.encode("utf-8", "surrogatepass")


@contextmanager
def connect(
    path: Path, tables: Sequence[str], *, write: bool = False
) -> Iterator[sqlite3.Connection]:
    """Open a database of exactly these tables; `write` creates it.

    Raises `OSError`, `ValueError` or `sqlite3.Error` for a damaged one.
    """
    mode = "ro"
    if write:
        mode = "rwc"
        for suffix in ("", "-wal", "-shm", "-journal"):
            if path.with_name(path.name + suffix).is_symlink():
                raise ValueError(f"{path.name}{suffix} is a link")
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    if not write or path.exists():
        require_file(path)
    location = f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}"
    with closing(
        sqlite3.connect(location, timeout=_BUSY_S, isolation_level=None, uri=True)
    ) as connection:
        connection.text_factory = lambda value: value.decode("utf-8", "surrogatepass")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_VALUE_BYTES)
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA cell_size_check=ON")
        if not write:
            connection.execute("PRAGMA query_only=ON")
            size = path.stat().st_size
            # A writer removes it when it ends.
            with suppress(FileNotFoundError):
                size += path.with_name(f"{path.name}-wal").stat().st_size
            steps = iter(range((_STEPS + _STEPS_PER_BYTE * size) // _STEP))
            connection.set_progress_handler(lambda: next(steps, None) is None, _STEP)
        elif not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN")
            connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={_FORMAT}")
            for table in tables:
                connection.execute(table)
            connection.execute("COMMIT")
        for name, expected in (("application_id", _APPLICATION_ID), ("user_version", _FORMAT)):
            if connection.execute(f"PRAGMA {name}").fetchone()[0] != expected:
                raise ValueError(f"{path.name} is of another format ({name})")
        schema = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 100"
        if sorted(sql for (sql,) in connection.execute(schema)) != sorted(tables):
            raise ValueError(f"{path.name} has other tables")
        if not write:
            yield connection
            return
        connection.execute("PRAGMA journal_mode=WAL")
        try:
            yield connection
        finally:
            connection.rollback()
            # Fails while somebody reads, and then the next run does it.
            with suppress(sqlite3.Error):
                connection.execute("PRAGMA busy_timeout=0")
                connection.execute("PRAGMA journal_mode=DELETE")


@contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Convert the error of a damaged index, or of a full disk."""
    try:
        yield
    except (DataError, InputError, StorageError):
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_BUSY", "SQLITE_CANTOPEN")):
            raise StorageError(
                f"the index {folder} cannot be read or written ({reason}); free space, or end other processes on it"
            ) from error
        if name.startswith("SQLITE_READONLY"):
            raise DataError(f"the index {folder} was left by a killed run; index again") from error
        if isinstance(error, ValidationError):
            problem = error.errors()[0]
            reason = f"{'.'.join(map(str, problem['loc']))}: {advice(problem)}"
        raise DataError(
            f"the index {folder} is damaged ({reason}); delete it and index again"
        ) from None


@dataclass(frozen=True)
class Snapshot:
    """A committed state of an index, while its transaction is open.

    Attributes:
        connection: to the database.
        header: its description.
        features: `[rows, width]` float32, those of deleted rows included.
        live: which rows are not deleted, `[rows]`.
    """

    connection: sqlite3.Connection
    header: Header
    features: np.ndarray
    live: np.ndarray

    def entries(self, rows: Sequence[int] | None = None) -> Iterator[tuple[int, Entry]]:
        """Yield rows with their entries, by default all; raises `ValueError` for one that is missing."""
        sql = (
            "SELECT entries.row, name, passage, size, modified, item, fields, coalesce(texts, '[]') "
            "FROM entries LEFT JOIN captions ON captions.row = entries.row"
        )
        results = [self.connection.execute(f"{sql} ORDER BY entries.row LIMIT {len(self.live)}")]
        if rows is not None:
            results = (
                self.connection.execute(f"{sql} WHERE entries.row = ?", (row,)) for row in rows
            )
        for result in results:
            empty = True
            for row, *values in result:
                empty = False
                stored = dict(zip(EntryRow.model_fields, values, strict=True))
                yield row, EntryRow.model_validate(stored).entry()
            if empty and rows is not None:
                raise ValueError("an entry of the features is missing")

    def select(self, where: Mapping[str, str], glob: str | None) -> np.ndarray:
        """Return which live rows have these values of columns and a name that fits the pattern."""
        if not where and glob is None:
            return self.live
        conditions, values = ["1"], list[bytes]()
        if glob is not None:
            conditions.append("name GLOB CAST(? AS TEXT)")
            values.append(encode(glob))
        for column, value in where.items():
            if column not in self.header.columns:
                existing = ", ".join(map(repr, self.header.columns)) or "none"
                raise InputError(
                    f"the index has no column {column!r} to filter by; it has {existing}"
                )
            conditions.append(
                "EXISTS (SELECT 1 FROM json_each(fields) "
                "WHERE key = CAST(? AS TEXT) AND value = CAST(? AS TEXT))"
            )
            values += [encode(column), encode(value)]
        sql = f"SELECT row FROM entries WHERE {' AND '.join(conditions)} LIMIT {len(self.live)}"
        return self.live & _mask(self.connection.execute(sql, values), len(self.live))


def _mask(rows: Iterator[tuple[int]], count: int) -> np.ndarray:
    """Return `[count]` flags that are set at the rows."""
    indices = np.fromiter((row for (row,) in rows), np.int64)
    mask = np.zeros(count, bool)
    mask[indices[(indices >= 0) & (indices < count)]] = True
    return mask


def features_name() -> str:
    """Return a new name of a file of features."""
    return f"features-{secrets.token_hex(6)}.f32"


def check_blocks(connection: sqlite3.Connection, features: np.ndarray) -> None:
    """Raise `ValueError` if features differ from their checksums."""
    for block, start in enumerate(range(0, len(features), BLOCK_ROWS)):
        row = connection.execute("SELECT crc FROM blocks WHERE block = ?", (block,)).fetchone()
        if row != (zlib.crc32(features[start : start + BLOCK_ROWS].data),):
            raise ValueError(f"the features from row {start} on have another checksum")


class Store:
    """The files of an index, for readers of any thread; every read sees the newest commit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Replaced whole, so that threads need no lock.
        self._features: tuple[str, np.ndarray] = ("", np.empty((0, 1), np.float32))
        self._live: tuple[str, int, np.ndarray] = ("", -1, np.empty(0, bool))

    @contextmanager
    def read(self) -> Iterator[Snapshot]:
        """Read a snapshot; raises `DataError` if the index is damaged."""
        with (
            explaining(self.folder),
            connect(self.folder / INDEX_FILE, INDEX_TABLES) as connection,
        ):
            try:
                header, features = self._begin(connection)
            except FileNotFoundError:
                # A compaction has replaced it in between.
                connection.execute("ROLLBACK")
                header, features = self._begin(connection)
            name, commit, live = self._live
            if (name, commit) != (header.features, header.commit):
                sql = f"SELECT row FROM tombstones LIMIT {header.rows}"
                live = ~_mask(connection.execute(sql), header.rows)
                self._live = (header.features, header.commit, live)
            yield Snapshot(connection, header, features, live)

    def _begin(self, connection: sqlite3.Connection) -> tuple[Header, np.ndarray]:
        """Begin a transaction; returns the header and the features of its state."""
        connection.execute("BEGIN")
        header = read_header(connection)
        name, features = self._features
        if name != header.features or len(features) < header.rows:
            features = map_features(self.folder, header)
            self._features = (header.features, features)
        return header, features[: header.rows]


def read_header(connection: sqlite3.Connection) -> Header:
    """Read the description of an index; raises `ValueError`, or `DataError` if there is none yet."""
    row = connection.execute("SELECT content FROM header LIMIT 1").fetchone()
    if row is None:
        raise DataError(
            "the index was never finished; index again, or wait for the run that writes it"
        )
    return Header.model_validate(_parse(row[0]))


def map_features(folder: Path, header: Header) -> np.ndarray:
    """Map the features of the committed rows into memory; raises `ValueError` for a shorter file."""
    shape = (header.rows, header.width)
    with open_data(folder / header.features) as file:
        if os.fstat(file.fileno()).st_size < 4 * header.rows * header.width:
            raise ValueError(f"{header.features} is shorter than its {header.rows} rows")
        if not header.rows:
            return np.empty(shape, np.float32)
        return np.memmap(file, np.float32, "r", shape=shape).view(np.ndarray)


@contextmanager
def open_writer(folder: Path, header: Header) -> Iterator[Writer]:
    """Open an index for changes, or create it; what is not committed is lost, and an empty index removed."""
    path = folder / INDEX_FILE
    with connect(path, INDEX_TABLES, write=True) as connection:
        if connection.execute("SELECT count(*) FROM header").fetchone()[0]:
            header = read_header(connection)
        writer = Writer(folder, connection, header)
        try:
            yield writer
        finally:
            connection.rollback()
            is_empty = connection.execute("SELECT 1 FROM entries LIMIT 1").fetchone() is None
    if is_empty:
        path.unlink()
        (folder / writer.header.features).unlink(missing_ok=True)


class Writer:
    """Changes of an index by the process that holds its lock; readers see what is committed.

    Attributes:
        header: the description that the next commit stores.
        added: rows that were added.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection, header: Header) -> None:
        self.folder, self.connection, self.header, self.added = folder, connection, header, 0
        self._columns = dict.fromkeys(header.columns)
        self._crcs: dict[int, int] = {}
        self._unwritten: list[np.ndarray] = []
        self._written = header.rows
        connection.execute("BEGIN IMMEDIATE")

    @property
    def count(self) -> int:
        """Live rows."""
        deleted = self.connection.execute("SELECT count(*) FROM tombstones").fetchone()[0]
        return self.header.rows - deleted

    def add(self, entry: Entry, captions: Sequence[Sequence[str]], features: np.ndarray) -> None:
        """Add the rows of an entry, one or a passage each; former versions of it are deleted."""
        stamp = (encode(entry.name), entry.size, entry.modified)
        sql = "SELECT row, (size, modified) = (?2, ?3) FROM entries WHERE name = CAST(?1 AS TEXT)"
        rows = self.connection.execute(sql, stamp).fetchall()
        if any(is_same for _, is_same in rows):
            return
        if rows:
            self.delete([row for row, _ in rows])
        fields = json.dumps(dict(entry.fields))
        for index, texts in enumerate(captions):
            row = self.header.rows + index
            passage = index + 1 if len(captions) > 1 else 0
            self.connection.execute(
                "INSERT INTO entries VALUES (?, CAST(? AS TEXT), ?, ?, ?, ?, ?)",
                (row, stamp[0], passage, *stamp[1:], entry.row, fields),
            )
            if texts:
                content = json.dumps([*texts])
                self.connection.execute("INSERT INTO captions VALUES (?, ?)", (row, content))
        self._append(features)
        self._columns |= dict.fromkeys(entry.fields)
        self.added += len(captions)

    def update(self, row: int, entry: Entry, with_captions: bool) -> None:
        """Replace what features do not depend on: the row number, fields and captions."""
        self._columns |= dict.fromkeys(entry.fields)
        self.connection.execute(
            "UPDATE entries SET item = ?, fields = ? WHERE row = ?",
            (entry.row, json.dumps(dict(entry.fields)), row),
        )
        if with_captions:
            self.connection.execute(
                "INSERT OR REPLACE INTO captions VALUES (?, ?)", (row, json.dumps(entry.captions))
            )

    def delete(self, rows: Sequence[int]) -> None:
        """Delete rows; their features stay until a compaction."""
        values = [(row,) for row in rows]
        self.connection.executemany("INSERT INTO tombstones VALUES (?)", values)
        for table in ("entries", "captions"):
            self.connection.executemany(f"DELETE FROM {table} WHERE row = ?", values)

    def commit(self) -> None:
        """Make all changes visible, durably; an index that never had a row is not stored."""
        if not self.header.rows:
            return
        self._write()
        self.header.columns, self.header.commit = [*self._columns], self.header.commit + 1
        self.connection.execute("DELETE FROM header")
        content = json.dumps(self.header.model_dump())
        self.connection.execute("INSERT INTO header VALUES (?)", (content,))
        self.connection.executemany(
            "INSERT OR REPLACE INTO blocks VALUES (?, ?)", [*self._crcs.items()]
        )
        self.connection.execute("COMMIT")
        self._crcs = {}
        self.connection.execute("BEGIN IMMEDIATE")

    def compact(self) -> None:
        """Copy live rows to a new file of features, without tombstones, and commit."""
        former = self.folder / self.header.features
        features = map_features(self.folder, self.header)
        check_blocks(self.connection, features)
        self.header.features, self.header.rows = features_name(), 0
        self._written, last = 0, -1
        self.connection.execute("DELETE FROM blocks")
        sql = f"SELECT row FROM entries WHERE row > ? ORDER BY row LIMIT {BLOCK_ROWS}"
        while rows := [row for (row,) in self.connection.execute(sql, (last,))]:
            # Rows only fall, so that none meets one that has not moved yet.
            moves = [*zip(count(self.header.rows), rows, strict=False)]
            for table in ("entries", "captions"):
                self.connection.executemany(f"UPDATE {table} SET row = ? WHERE row = ?", moves)
            self._append(features[rows])
            last = rows[-1]
        self.connection.execute("DELETE FROM tombstones")
        self.commit()
        former.unlink()

    def _append(self, features: np.ndarray) -> None:
        self._unwritten.append(features.astype(np.float32, copy=False))
        self.header.rows += len(features)
        if self.header.rows - self._written >= BLOCK_ROWS:
            self._write()

    def _write(self) -> None:
        """Write features that were added, durably."""
        if not self._unwritten:
            return
        features, self._unwritten = np.concatenate(self._unwritten), []
        row, path = self.header.rows - len(features), self.folder / self.header.features
        self._written = self.header.rows
        if path.is_symlink():
            raise ValueError(f"{path.name} is a link")
        with open_to_append(path) as file:
            # What a killed writer has left.
            file.truncate(4 * row * self.header.width)
            file.write(features.data)
            file.flush()
            os.fsync(file.fileno())
        while len(features):
            block, start = divmod(row, BLOCK_ROWS)
            chunk = features[: BLOCK_ROWS - start]
            self._crcs[block] = zlib.crc32(chunk.data, self._crc(block) if start else 0)
            row, features = row + len(chunk), features[len(chunk) :]

    def _crc(self, block: int) -> int:
        if block in self._crcs:
            return self._crcs[block]
        sql = "SELECT crc FROM blocks WHERE block = ?"
        return self.connection.execute(sql, (block,)).fetchone()[0]
