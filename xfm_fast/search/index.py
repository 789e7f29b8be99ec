"""The index of a collection: features of images or texts, computed only for new and changed ones.

The processes of a build compute whole batches in turn, so that features do not depend on the number
of processes, and write their results to files, so that a killed run resumes. At the end the first
process adds them to the index. Images are not copied: a search reads its few candidates again,
since the embeddings of all patches would take 600 KB per image, features take 1 KB.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, repeat
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch.nn.functional import normalize

from xfm_fast.data.collection import Collection, Entry, Modality, TextFiles, open_collection
from xfm_fast.encoders import Encoder, LibraryEncoder
from xfm_fast.errors import DataError, InputError, explain_types
from xfm_fast.io import hold
from xfm_fast.loading import Source
from xfm_fast.models.processor import batches
from xfm_fast.search.store import (
    DAMAGE,
    INDEX_FILE,
    PART_TABLES,
    Header,
    Store,
    Weights,
    Writer,
    check_blocks,
    connect,
    encode,
    explaining,
    features_name,
    open_writer,
)
from xfm_fast.training.distributed import Processes

INDEX_FOLDER = ".xfm-index"
# Entries of a commit of a worker, the most that a killed run loses.
_COMMIT_ENTRIES = 256
# Batches that threads decode while the model computes.
_PREFETCH = 4
_DATA_FILE = re.compile(
    r"(part-\d+-[0-9a-f]{32}|work)-[0-9a-f]{12}\.sqlite(-wal|-shm|-journal)?|features-[0-9a-f]{12}\.f32"
)
# Characters of a passage: at most what the model reads, at 4 a token.
_PASSAGE, _CHARACTERS_OF_TOKEN = 2_000, 4
# With a smaller share of rows that are not deleted, the features are copied.
_LIVE_SHARE = 0.5
_PASSAGES = TypeAdapter(list[list[str]])


class SearchIndex:
    """An index on disk, for reading from any thread; it shows the state of the last commit.

    Args:
        folder: of the index.
        path: the collection, see `open_collection`; by default the one that the index names.
        images: folder of the images, where a file lists their paths; by default that of the index.
        root: pictures are read below this folder; None shows none, as of an index from anybody.
    """

    def __init__(
        self,
        folder: Path,
        path: Path | None = None,
        images: Path | None = None,
        root: Path | None = None,
    ) -> None:
        self.folder, self.store, self.root = folder, Store(folder), root
        with self.store.read() as snapshot:
            header = snapshot.header
        self.path = path or Path(os.path.normpath(folder / header.path))
        if images is None and header.images:
            images = Path(os.path.normpath(folder / header.images))
        self.images, self.modality = images, header.modality
        self.fingerprint = header.fingerprint
        model = header.model
        tokenizer = Path(model.tokenizer) if model.tokenizer else None
        size = None if model.weights else model.size
        self.model = Source(model.weights, size, tokenizer=tokenizer)

    def __len__(self) -> int:
        with self.store.read() as snapshot:
            return int(snapshot.live.sum())

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns to filter by."""
        with self.store.read() as snapshot:
            return tuple(snapshot.header.columns)

    def entries(self, rows: Sequence[int] | None = None) -> list[Entry]:
        """Return the entries of rows, by default all; raises `DataError` for a row that is gone."""
        with self.store.read() as snapshot:
            return [entry for _, entry in snapshot.entries(rows)]

    @cached_property
    def collection(self) -> Collection:
        """The indexed collection of images; raises `DataError` if only the index names it."""
        if self.root is None:
            raise DataError(
                f"{self.folder} is an index of {self.path}; name that, with the index as --index"
            )
        return open_collection(self.path, self.images)

    def load(self, entry: Entry, side: int | None = None) -> Image.Image:
        """Read a picture, see `decode_image`; raises `DataError` if it is broken or lies outside `root`."""
        if self.modality == "text":
            raise DataError(f"{self.folder} is an index of texts; {entry.name} is no picture")
        path = os.path.abspath(self.collection.location(entry))
        if entry.row is None and not Path(path).is_relative_to(os.path.abspath(self.root or "")):
            raise DataError(
                f"{path} lies outside {self.root}; name the folder of the images as --images"
            )
        return self.collection.load(entry, side)[0]

    def location(self, entry: Entry) -> str:
        """Return the path of an entry; of an embedded image, its name."""
        if self.root is not None and self.modality == "image":
            return self.collection.location(entry)
        folder = self.path if self.path.is_dir() else self.path.parent
        return str(folder / (f"{entry.name}#{entry.passage}" if entry.passage else entry.name))

    def check(self, encoder: Encoder) -> None:
        """Raise `DataError` unless the index was made with this model."""
        if self.fingerprint != encoder.fingerprint:
            raise DataError(
                f"{self.folder} was made with {self.model} ({self.fingerprint[:8]}), this is {encoder.source} "
                f"({encoder.fingerprint[:8]}); use that model, or make another index elsewhere (--index)"
            )

    def verify(self) -> None:
        """Compare all features with their checksums, and check the database; raises `DataError`."""
        with self.store.read() as snapshot:
            check_blocks(snapshot.connection, snapshot.features)
            problem = snapshot.connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if problem != "ok":
                raise ValueError(problem)
            rows = np.fromiter((row for row, _ in snapshot.entries()), np.int64)
            if not np.array_equal(rows, snapshot.live.nonzero()[0]):
                raise ValueError("the entries are not those of the features")


@dataclass(frozen=True)
class IndexReport:
    """Counts of an indexing run; one that was `interrupted` is resumed by the same call.

    Attributes:
        folder: of the index.
        entries: images or texts in the index; each passage of a long text file counts.
        added: entries that were computed.
        removed: entries whose file or row is gone.
        truncated: texts of which the model reads only the beginning.
        faults: reasons why entries were left out, by name.
    """

    folder: Path
    entries: int = 0
    added: int = 0
    removed: int = 0
    truncated: int = 0
    faults: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False
    modality: Modality = "image"


def index_folder(path: str | os.PathLike[str]) -> Path:
    """Return the default folder of the index of a collection: inside its folder, or next to its file."""
    path = Path(path).expanduser()
    return path / INDEX_FOLDER if path.is_dir() else path.with_name(f"{path.name}{INDEX_FOLDER}")


@explain_types
def open_index(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
) -> SearchIndex:
    """Open an index. Pictures are read only below `path` and `images`, whatever paths the index
    names.

    Args:
        path: the indexed collection; or the folder of an index, which then shows no pictures.
        folder: of the index; by default in or next to `path`.
        images: folder of the images, where a file lists their paths; by default that of the file.

    Raises:
        DataError: there is no index, or it is damaged or of another version.
    """
    collection = Path(path).expanduser()
    if folder is None and (collection / INDEX_FILE).is_file():
        return SearchIndex(collection)
    folder = index_folder(collection) if folder is None else Path(folder).expanduser()
    if not (folder / INDEX_FILE).is_file():
        if not collection.exists():
            raise DataError(
                f"{path} does not exist; name an indexed collection, or the folder of an index"
            )
        raise DataError(f"{path} has no index; make one: xfm-fast index {path}")
    if images is not None:
        root = images = Path(images).expanduser()
    else:
        root = collection if collection.is_dir() else collection.parent
    return SearchIndex(folder, collection, images, root)


@explain_types
def build_index(
    path: str | os.PathLike[str],
    encoder: Encoder,
    folder: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    column: str | None = None,
    batch_size: int = 32,
    processes: Processes | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    stop: Event | None = None,
) -> IndexReport:
    """Make or update the index of a collection; files of the same size and modification time, and
    rows of the same text, are not computed again.

    Entries that cannot be read are listed. Long text files are indexed by passages. Several
    processes share the work, and all must see the folder; collective.

    Args:
        path, images, column: the collection; see `open_collection`.
        encoder: a model that embeds it, see `open_encoder`.
        folder: of the index; by default `index_folder(path)`.
        batch_size: entries that are computed together.
        processes: see `join_processes`; by default this process alone.
        progress: called with the numbers of entries done and to do.
        stop: once it is set, the call returns, and another call resumes.

    Raises:
        DataError: there are no entries, none can be read, or the index is of another model or
            version.
        InputError: the model computes no features.
        StorageError: the index cannot be written, or another process is writing it.
    """
    if encoder.use != "embedding":
        raise InputError(f"{encoder.source} is a model for {encoder.use}; give one that embeds")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}; it must be at least 1")
    processes = processes or Processes()
    target = index_folder(path) if folder is None else Path(folder).expanduser()
    path = Path(path).expanduser()
    pictures = None if images is None else Path(images).expanduser()
    collection = processes.together(
        lambda: open_collection(path, pictures, column=column, modalities=encoder.modalities)
    )
    build = _Build(target, path, pictures, collection, encoder, processes, batch_size)
    with ExitStack() as stack:

        def begin() -> tuple[str, int]:
            stack.enter_context(hold(target / ".lock", f"the index {target} (--index)"))
            with explaining(target):
                build.writer = stack.enter_context(open_writer(target, build.header()))
                return build.list_missing()

        work, count = processes.from_first(begin)
        compute = partial(build.compute, target / work, count, progress, stop)
        truncated = 0
        for faults, longer in processes.gather(processes.together(compute)):
            build.faults |= faults
            truncated += longer
        if processes.any(stop is not None and stop.is_set()):
            return IndexReport(target, interrupted=True)
        return processes.from_first(lambda: build.finish(target / work, truncated))


@dataclass
class _Loaded:
    """Entries with the captions of their passages, and the inputs of the model."""

    items: list[tuple[Entry, list[tuple[str, ...]]]] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    truncated: int = 0


@dataclass
class _Build:
    """An update of an index: the first process lists entries, all compute them, the first adds them."""

    folder: Path
    path: Path
    images: Path | None
    collection: Collection
    encoder: Encoder
    processes: Processes
    batch_size: int
    # Of the first process only.
    faults: dict[str, str] = field(default_factory=dict)
    writer: Writer = field(init=False)

    def header(self) -> Header:
        """Describe a new index."""
        source = self.encoder.source

        def absolute(name: str | Path | None) -> str | None:
            """Resolve a local path; a name on the Hub stays."""
            if name is None:
                return None
            local = Path(name).expanduser()
            return str(local.resolve() if local.exists() else name)

        def relative(target: Path) -> str:
            """Return a path relative to the index, so that a folder moves with its index."""
            return os.path.relpath(target.resolve(), self.folder.resolve())

        tokenizer, size = absolute(source.tokenizer), source.random or "tiny"
        return Header(
            width=self.encoder.width,
            modality=self.collection.modality,
            path=relative(self.path),
            images=None if self.images is None else relative(self.images),
            column=getattr(self.collection, "column", None),
            model=Weights(weights=absolute(source.model), tokenizer=tokenizer, size=size),
            fingerprint=self.encoder.fingerprint,
            features=features_name(),
        )

    def list_missing(self) -> tuple[str, int]:
        """Add what a killed run has left; returns the file of entries to compute, and their number."""
        header, current = self.writer.header, self.header()
        if header.commit:
            opened = SearchIndex(self.folder)
            opened.check(self.encoder)
            if opened.path.resolve() != self.path.resolve():
                raise DataError(
                    f"{self.folder} is the index of {opened.path}, this is {self.path}; name another --index"
                )
            if (header.modality, header.column) != (current.modality, current.column):
                raise DataError(
                    f"{self.folder} holds {header.modality}s of {header.column or 'files'}, not {current.modality}s of "
                    f"{current.column or 'files'}; name another --index"
                )
            header.path, header.images, header.model = current.path, current.images, current.model
        work = self.folder / f"work-{secrets.token_hex(6)}.sqlite"
        listing, with_captions = self.collection.walk(self.faults), self.collection.lists_captions
        with connect(work, PART_TABLES, write=True) as connection:
            connection.execute("BEGIN")
            connection.executemany(
                "INSERT OR IGNORE INTO rows VALUES (NULL, CAST(? AS TEXT), ?, ?, ?, ?, ?, NULL)",
                (
                    (*_values(entry), json.dumps(entry.captions) if with_captions else None)
                    for entry in listing
                ),
            )
            connection.execute("COMMIT")
        self._merge(work)
        with self._compare(work, write=True) as connection:
            connection.execute(
                "INSERT INTO missing (listed) SELECT id FROM rows WHERE NOT EXISTS (SELECT 1 FROM "
                "stored.entries AS entry WHERE entry.name = rows.name AND entry.size = rows.size "
                "AND entry.modified = rows.modified) ORDER BY id"
            )
            return work.name, connection.execute("SELECT count(*) FROM missing").fetchone()[0]

    def compute(
        self,
        work: Path,
        count: int,
        progress: Callable[[int, int], None],
        stop: Event | None,
    ) -> tuple[dict[str, str], int]:
        """Write the features of this process's batches; returns faults, and the number of truncated texts."""
        rank, world_size = self.processes.rank, self.processes.world_size
        name = f"part-{rank}-{self.encoder.fingerprint}-{secrets.token_hex(6)}.sqlite"
        rows, faults, truncated, done = list[tuple[Any, ...]](), dict[str, str](), 0, 0
        starts = range(rank * self.batch_size, count, world_size * self.batch_size)
        try:
            for loaded, features in self._embed(self._batches(work, starts)):
                faults |= loaded.faults
                truncated += loaded.truncated
                for entry, captions in loaded.items:
                    vectors, features = features[: len(captions)], features[len(captions) :]
                    if not np.isfinite(vectors).all():
                        faults[entry.name] = "the model computes features that are not finite"
                        continue
                    stored = (json.dumps(captions), vectors.tobytes())
                    rows.append((*_values(entry), *stored))
                if len(rows) >= _COMMIT_ENTRIES:
                    self._store(name, rows)
                    rows = []
                done += len(loaded.items) + len(loaded.faults)
                progress(min(done * world_size, count), count)
                if stop is not None and stop.is_set():
                    break
        finally:
            if rows:
                self._store(name, rows)
        return faults, truncated

    def finish(self, work: Path, truncated: int) -> IndexReport:
        """Add what all processes computed, delete what is gone, and renew what features do not depend on."""
        with explaining(self.folder):
            writer = self.writer
            former = writer.added
            self._merge(work)
            removed, changed = 0, False
            with self._compare(work) as connection:
                stale = connection.execute(
                    "SELECT row, EXISTS (SELECT 1 FROM rows WHERE rows.name = entry.name) "
                    "FROM stored.entries AS entry WHERE NOT EXISTS (SELECT 1 FROM rows WHERE "
                    "rows.name = entry.name AND rows.size = entry.size AND rows.modified = entry.modified)"
                )
                for row, is_listed in stale:
                    writer.delete([row])
                    removed += not is_listed
                    changed = True
                renewed = connection.execute(
                    "SELECT entry.row, rows.name, rows.size, rows.modified, rows.item, rows.fields, rows.captions "
                    "FROM rows JOIN stored.entries AS entry ON rows.name = entry.name "
                    "AND rows.size = entry.size AND rows.modified = entry.modified "
                    "LEFT JOIN stored.captions AS caption ON caption.row = entry.row "
                    "WHERE rows.item IS NOT entry.item OR rows.fields <> entry.fields "
                    "OR rows.captions <> coalesce(caption.texts, '[]')"
                )
                for row, *values in renewed:
                    writer.update(row, _entry(*values), self.collection.lists_captions)
                    changed = True
                count = connection.execute("SELECT count(*) FROM rows").fetchone()[0]
            if not writer.count:
                name, reason = next(iter(self.faults.items()))
                raise DataError(
                    f"none of {count} {self.collection.modality}s can be read, such as {name}: {reason}"
                )
            if changed:
                writer.commit()
            if writer.count < _LIVE_SHARE * writer.header.rows:
                writer.compact()
            keep = (INDEX_FILE, writer.header.features)
            for path in self.folder.iterdir():
                if _DATA_FILE.fullmatch(path.name) and path.name not in keep:
                    with suppress(OSError):
                        path.unlink()
            counts = (writer.count, writer.added - former, removed, truncated)
            return IndexReport(self.folder, *counts, self.faults, modality=self.collection.modality)

    @contextmanager
    def _compare(self, work: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """Open the listing, with the committed index as `stored`."""
        with connect(work, PART_TABLES, write=write) as connection:
            # Limits of forged files do not hold for the listing.
            connection.set_progress_handler(None, 0)
            path = os.fsencode(self.folder.absolute() / INDEX_FILE)
            connection.execute("ATTACH CAST(? AS TEXT) AS stored", (path,))
            yield connection

    def _merge(self, work: Path) -> None:
        """Add the results that fit the listing, and remove their files."""
        sql = (
            "SELECT name, size, modified, item, fields, captions FROM rows "
            "WHERE name = CAST(? AS TEXT) AND size = ? AND modified = ?"
        )
        pattern = f"part-*-{self.encoder.fingerprint}-*.sqlite"
        with connect(work, PART_TABLES) as listing:
            listing.set_progress_handler(None, 0)
            for path in sorted(self.folder.glob(pattern)):
                for name, *stamp, captions, content in _read_part(path):
                    listed: Any = listing.execute(sql, (encode(name), *stamp)).fetchone()
                    with suppress(ValueError):
                        passages = _PASSAGES.validate_json(captions)
                        features = np.frombuffer(content, np.float32)
                        features = features.reshape(len(passages), self.writer.header.width)
                        if listed is not None and np.isfinite(features).all():
                            self.writer.add(_entry(*listed), passages, features)
                self.writer.commit()
                for suffix in ("", "-wal", "-shm"):
                    path.with_name(path.name + suffix).unlink(missing_ok=True)

    def _store(self, name: str, rows: Sequence[tuple[Any, ...]]) -> None:
        with (
            explaining(self.folder),
            connect(self.folder / name, PART_TABLES, write=True) as connection,
        ):
            connection.execute("BEGIN")
            connection.executemany(
                "INSERT INTO rows VALUES (NULL, CAST(? AS TEXT), ?, ?, ?, ?, ?, ?)", rows
            )
            connection.execute("COMMIT")

    def _batches(self, work: Path, starts: Sequence[int]) -> Iterator[list[Entry]]:
        """Read the batches of missing entries that begin at these numbers."""
        sql = (
            "SELECT name, size, modified, item, fields, captions FROM missing JOIN rows "
            "ON rows.id = missing.listed WHERE missing.id > ? AND missing.id <= ? ORDER BY missing.id"
        )
        with connect(work, PART_TABLES) as connection:
            for start in starts:
                rows = connection.execute(sql, (start, start + self.batch_size))
                yield [_entry(*row) for row in rows]

    def _embed(self, work: Iterator[Sequence[Entry]]) -> Iterator[tuple[_Loaded, np.ndarray]]:
        """Compute the L2-normalised features of all passages of each batch; threads load ahead."""
        queue: deque[Future[list[_Loaded]]] = deque()
        with ThreadPoolExecutor(_PREFETCH) as pool:
            # Empty batches at the end flush the queue.
            for batch in chain(work, repeat((), _PREFETCH)):
                queue.append(pool.submit(self._load, batch))
                if len(queue) <= _PREFETCH:
                    continue
                for loaded in queue.popleft().result():
                    outputs = [torch.empty(0, self.encoder.width)]
                    outputs += [self.encoder.run(inputs) for inputs in loaded.inputs]
                    yield loaded, normalize(torch.cat(outputs)).numpy()

    def _load(self, batch: Sequence[Entry]) -> list[_Loaded]:
        """Read a batch, split long text files, and prepare the inputs of the model."""
        loaded, contents = _Loaded(), list[Any]()
        for entry in batch:
            try:
                content, captions = self.collection.load(entry)
            except DataError as error:
                loaded.faults[entry.name] = str(error)
                continue
            if isinstance(self.collection, TextFiles):
                passages = split_passages(content, self._passage)
                loaded.items.append((entry, [(passage,) for passage in passages]))
                contents += passages
            else:
                loaded.items.append((entry, [captions]))
                contents.append(content)
        try:
            for chunk in batches(contents, self.batch_size):
                loaded.inputs.append(self.encoder.prepare(chunk, "document"))
        except DataError as error:
            # One of the texts has no words, say.
            if len(batch) == 1:
                return [_Loaded(faults={batch[0].name: str(error)})]
            return [loaded for entry in batch for loaded in self._load([entry])]
        if isinstance(self.encoder, LibraryEncoder) and self.collection.modality == "text":
            prompt, most = self.encoder.prompt("document") or "", self.encoder.max_tokens
            ids = self.encoder.token_ids([prompt + text for text in contents])
            loaded.truncated = sum(len(tokens) > (most or math.inf) for tokens in ids)
        return [loaded]

    @cached_property
    def _passage(self) -> int:
        """Most characters of a passage: about what the model reads."""
        tokens = self.encoder.max_tokens
        return min(_PASSAGE, _CHARACTERS_OF_TOKEN * tokens) if tokens else _PASSAGE


def split_passages(text: str, limit: int) -> list[str]:
    """Split a text at blank lines, and longer paragraphs at words, into passages of up to `limit` characters."""
    passages = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        for chunk in re.findall(
            rf"\S(?:.{{0,{limit - 1}}}(?!\S)|\S{{0,{limit - 1}}})", paragraph, re.S
        ):
            if len(passages[-1]) + len(chunk) + 2 > limit:
                passages.append("")
            passages[-1] = f"{passages[-1]}\n\n{chunk.rstrip()}".strip()
    return [passage for passage in passages if passage]


def _values(entry: Entry) -> tuple[Any, ...]:
    """Return the columns of `PART_TABLES` that all its files have."""
    fields = json.dumps(dict(entry.fields))
    return encode(entry.name), entry.size, entry.modified, entry.row, fields


def _entry(
    name: str, size: int, modified: int, item: int | None, fields: str, captions: str | None
) -> Entry:
    """Make the entry of a listing's row."""
    texts = tuple(json.loads(captions or "[]"))
    return Entry(name, size, modified, item, texts, json.loads(fields))


def _read_part(path: Path) -> Iterator[tuple[Any, ...]]:
    """Read the results of a worker, up to where their file is damaged."""
    with suppress(*DAMAGE), connect(path, PART_TABLES) as connection:
        sql = "SELECT name, size, modified, captions, features FROM rows ORDER BY id"
        yield from connection.execute(sql)
