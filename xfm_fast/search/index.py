"""The image index: features in a memory-mapped file, computed only for new and changed images.

Each process writes parts, so that a killed run resumes. At the end the first process merges them with the valid rows of
the old index, in the order of the collection, and replaces index.json. Images stay where they are: a search reads its
few candidates again, since the embeddings of all patches would take 600 KB an image, features take 1 KB.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from threading import Event
from typing import Annotated, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Lt
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from torch import Tensor

from xfm_fast.data.collection import Collection, Entry, open_collection
from xfm_fast.data.images import evaluation_transform
from xfm_fast.errors import DataError, explain_types
from xfm_fast.export.session import Session
from xfm_fast.io import MOST_JSON_BYTES, advice, hold, is_plain_name, read_bytes, require_file, write_bytes, write_files
from xfm_fast.loading import Source
from xfm_fast.models.processor import batches
from xfm_fast.models.xfm import XFM
from xfm_fast.search.model import SearchModel
from xfm_fast.training.distributed import Processes

FORMAT_VERSION = 2
INDEX_FOLDER, INDEX_FILE = ".xfm-index", "index.json"
# A killed run loses the features of at most this many images.
_PART = 256
# Batches that are decoded while the model computes.
_PREFETCH = 3
_OUR_FILES = re.compile(r"(part-\d+(-[0-9a-f]{32})?|features|images|graph)-[0-9a-f]{12}\.(f32|jsonl|usearch)")


@dataclass(frozen=True)
class SearchIndex:
    """An index on disk: `features` `[I, embed_dim]` float32, L2-normalised, row i of `entries[i]`."""

    folder: Path
    entries: list[Entry]
    features: np.ndarray
    # Reasons by name of an image or row; `broken` are the images among them.
    faults: dict[str, str]
    broken: list[Entry]
    model: Source
    fingerprint: str
    # The collection; see `open_collection`.
    path: Path
    images: Path | None
    # Pictures are read below this folder; None for the folder of the index, which may come from anybody.
    root: Path | None = None

    @cached_property
    def collection(self) -> Collection:
        """The indexed collection; raises `DataError` where only the index names a place outside its folder."""
        if self.root is None and not _is_below(self.path, self.folder):
            raise DataError(f"{self.folder} is an index of {self.path}; name that, with the index as --index")
        return open_collection(self.path, self.images)

    def load(self, entry: Entry) -> Image.Image:
        """The picture of an entry; raises `DataError` where it is broken or lies outside `root`."""
        root = self.root or self.folder
        if entry.row is None and not _is_below(place := Path(self.collection.location(entry)), root):
            raise DataError(f"{place} lies outside {root}; name the folder of the images as --images")
        return self.collection.load(entry)[0]

    def check(self, model: SearchModel) -> None:
        """Raise `DataError` unless the index was made with this model."""
        if self.fingerprint != model.fingerprint:
            raise DataError(
                f"{self.folder} was made with {self.model} ({self.fingerprint[:8]}), this is {model.source} "
                f"({model.fingerprint[:8]}); use that model, or make another index elsewhere (--index)"
            )


@dataclass(frozen=True)
class IndexReport:
    """Counts of an indexing run; `interrupted` by a signal, the same call resumes."""

    folder: Path
    images: int = 0
    added: int = 0
    removed: int = 0
    faults: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False


class _Row(NamedTuple):
    """An image and its feature, or the reason why it has none."""

    entry: Entry
    feature: np.ndarray | None
    fault: str | None = None


class _Rows(NamedTuple):
    """A file of rows: entries with their features, and rows without one."""

    entries: list[Entry]
    features: np.ndarray
    broken: list[_Row]


def index_folder(path: str | os.PathLike[str]) -> Path:
    """The default folder of the index of a collection: inside its folder, or next to its file."""
    path = Path(path).expanduser()
    return path / INDEX_FOLDER if path.is_dir() else path.with_name(f"{path.name}{INDEX_FOLDER}")


@explain_types
def open_index(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
) -> SearchIndex:
    """Read an index. Pictures are read only below `path` and `images`, whichever places the index names.

    Args:
        path: the indexed collection; or the folder of an index, which then shows no pictures from elsewhere.
        folder: of the index; by default in or next to `path`.
        images: folder of the images, where a file lists their paths; by default that of the file.

    Raises:
        DataError: there is no index, or it is damaged or of another version.
    """
    given = Path(path).expanduser()
    places = [given, index_folder(given)] if folder is None else [Path(folder).expanduser()]
    place = next((each for each in places if (each / INDEX_FILE).is_file()), None)
    if place is None:
        if not given.exists():
            raise DataError(f"{path} does not exist; name an indexed collection, or the folder of an index")
        raise DataError(f"{path} has no index; make one: xfm-fast index {path}")
    try:
        found = _read(place)
    except FileNotFoundError:
        # Another process has replaced the index and removed the old files.
        try:
            found = _read(place)
        except FileNotFoundError as error:
            raise DataError(f"the index {place} lacks {error.filename}; delete it and index again") from None
    if place == given:
        return found
    pictures = None if images is None else Path(images).expanduser()
    root = pictures or (given if given.is_dir() else given.parent)
    return replace(found, path=given, images=pictures or found.images, root=root)


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds a NUL")
    return text


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("it is no file of this folder")
    return name


Text = Annotated[str, AfterValidator(_no_nul)]
Count = Annotated[int, Ge(0), Lt(1 << 63)]


class _Line(BaseModel):
    """A line of entries, and an entry of the header."""

    model_config = ConfigDict(strict=True)

    name: Text
    size: Annotated[int, Ge(-1), Lt(1 << 63)]
    modified: Annotated[int, Ge(-(1 << 63)), Lt(1 << 63)]
    row: Count | None = None
    captions: list[Text] = []
    fault: str | None = None

    @property
    def entry(self) -> Entry:
        return Entry(self.name, self.size, self.modified, self.row, tuple(self.captions))


class _Weights(BaseModel):
    model_config = ConfigDict(strict=True)

    weights: Text | None = None
    tokenizer: Text | None = None
    size: Literal["tiny", "base"] = "tiny"

    @property
    def source(self) -> Source:
        tokenizer = None if self.tokenizer is None else Path(self.tokenizer)
        return Source(self.weights, None if self.weights else self.size, tokenizer=tokenizer)


class _Header(BaseModel):
    """`index.json`; sums are CRC-32 of the files, absent in older indexes."""

    model_config = ConfigDict(strict=True)

    format: Literal[2]
    images: Count
    width: Annotated[int, Ge(1), Lt(1 << 20)]
    entries: Annotated[str, AfterValidator(_plain)]
    features: Annotated[str, AfterValidator(_plain)]
    path: Text
    picture_folder: Text | None
    model: _Weights
    fingerprint: str
    faults: dict[str, str]
    broken: list[_Line]
    sums: dict[str, int] = {}


def _read_header(folder: Path) -> _Header:
    # Names of images may hold bytes that are no UTF-8, which `parse_json` refuses.
    values = json.loads(read_bytes(folder / INDEX_FILE, MOST_JSON_BYTES))
    if isinstance(values, dict) and values.get("format") != FORMAT_VERSION:
        raise DataError(f"{folder} has format {values.get('format')!r}, not {FORMAT_VERSION}; delete and make it again")
    return _Header.model_validate(values)


def _read(folder: Path) -> SearchIndex:
    try:
        header = _read_header(folder)
        for name, crc in header.sums.items():
            if _crc(folder / _plain(name)) != crc:
                raise ValueError(f"{name} has another checksum")
        rows = _read_rows(folder / header.entries, folder / header.features, header.width)
        if len(rows.entries) != header.images or rows.broken:
            raise ValueError(f"{len(rows.entries)} entries for {header.images} images")
        return SearchIndex(
            folder, rows.entries, rows.features, header.faults, [each.entry for each in header.broken],
            header.model.source, header.fingerprint, _resolve(folder, header.path),
            None if header.picture_folder is None else _resolve(folder, header.picture_folder),
        )  # fmt: skip
    except _DAMAGE as error:
        if isinstance(error, (DataError, FileNotFoundError)):
            raise
        reason = error.errors()[0] if isinstance(error, ValidationError) else {}
        words = f"{'.'.join(map(str, reason['loc']))}: {advice(reason)}" if reason else " ".join(str(error).split())
        raise DataError(f"the index {folder} is damaged ({words[:200]}); delete it and index again") from None


_DAMAGE = (OSError, ValueError, RecursionError)


def _crc(path: Path) -> int:
    crc = 0
    with require_file(path).open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


@explain_types
def build_index(
    path: str | os.PathLike[str],
    model: SearchModel,
    folder: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    workers: int = 4,
    processes: Processes | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    stop: Event | None = None,
) -> IndexReport:
    """Make or update the index of a collection; images of the same size and modification time are not read again.

    All of several processes must see the folder, and each computes its share. Images that cannot be read are listed.

    Args:
        path, images: the collection; see `open_collection`.
        model: see `open_model`.
        folder: of the index; by default `index_folder(path)`.
        batch_size: images that are computed together.
        workers: threads that read and decode images.
        processes: see `join_processes`; by default this process.
        progress: called with the numbers of images done and to do.
        stop: once it is set, the call returns, and another call resumes.

    Raises:
        DataError: there are no images, none can be read, or the index is of another model or version.
        StorageError: the index cannot be written, or another process is writing it.
    """
    processes = processes or Processes()
    target = index_folder(path) if folder is None else Path(folder).expanduser()
    place, pictures = Path(path).expanduser(), None if images is None else Path(images).expanduser()
    collection = processes.together(lambda: open_collection(place, pictures))
    with ExitStack() as stack:
        processes.from_first(lambda: stack.enter_context(hold(target / ".lock", f"the index {target} (--index)")))

        def begin() -> tuple[list[Entry], dict[str, str], list[Entry]]:
            entries, faults = collection.listing()
            if (old := _old_index(target)) is not None:
                old.check(model)
                if old.path.resolve() != place.resolve():
                    raise DataError(f"{target} is the index of {old.path}, this is {place}; name another --index")
            done = {row.entry.version for row in _rows(target, model)}
            return entries, faults, [entry for entry in entries if entry.version not in done]

        entries, faults, todo = processes.from_first(begin)
        share = todo[processes.rank :: processes.world_size]

        def work() -> None:
            pending: list[_Row] = []
            try:
                for number, row in enumerate(_embed(collection, share, model.model, batch_size, workers), start=1):
                    pending.append(row)
                    if len(pending) >= _PART:
                        part, pending = pending, []
                        _write_part(target, model, processes.rank, part)
                    progress(number * processes.world_size, len(todo))
                    if stop is not None and stop.is_set():
                        break
            finally:
                _write_part(target, model, processes.rank, pending)

        processes.together(work)
        if processes.any(stop is not None and stop.is_set()):
            return IndexReport(target, interrupted=True)
        header = {"path": _relative(target, place), "picture_folder": pictures and _relative(target, pictures)}
        return processes.from_first(lambda: _merge(target, model, header, entries, faults, todo))


def _embed(
    collection: Collection, entries: Sequence[Entry], model: XFM | Session, batch_size: int, workers: int
) -> Iterator[_Row]:
    """Features of images, in order; threads decode ahead."""
    transform = evaluation_transform(model.config.image_size)

    def load(entry: Entry) -> tuple[Entry, Tensor | str]:
        try:
            image, captions = collection.load(entry)
            return replace(entry, captions=captions), transform(image)
        except DataError as error:
            return entry, str(error)

    queue: deque[list[Future[tuple[Entry, Tensor | str]]]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        # Empty batches at the end flush the queue.
        for batch in chain(batches(entries, batch_size), repeat((), _PREFETCH)):
            queue.append([pool.submit(load, entry) for entry in batch])
            if len(queue) <= _PREFETCH:
                continue
            loaded = [future.result() for future in queue.popleft()]
            pixels = [found for _, found in loaded if isinstance(found, Tensor)]
            features: Iterator[np.ndarray] = iter(())
            if pixels:
                with torch.no_grad():
                    embeds = model.encode_image(torch.stack(pixels).to(model.device))
                    features = iter(model.project_image(embeds).float().cpu().numpy())
            for entry, found in loaded:
                yield _Row(entry, None, found) if isinstance(found, str) else _Row(entry, next(features))


def _write_part(folder: Path, model: SearchModel, rank: int, rows: Sequence[_Row]) -> None:
    if rows:
        name = f"part-{rank}-{model.fingerprint}-{secrets.token_hex(6)}"
        _write_rows(folder / f"{name}.jsonl", folder / f"{name}.f32", rows)


def _rows(folder: Path, model: SearchModel) -> Iterator[_Row]:
    """The rows of the old index, then of the parts by this model; a damaged part is skipped and computed again."""
    if (old := _old_index(folder)) is not None:
        yield from map(_Row, old.entries, old.features)
        yield from (_Row(entry, None, old.faults.get(entry.name)) for entry in old.broken)
    for path in sorted(folder.glob(f"part-*-{model.fingerprint}-*.jsonl")):
        with suppress(*_DAMAGE):
            part = _read_rows(path, path.with_suffix(".f32"), model.model.config.embed_dim)
            yield from map(_Row, part.entries, part.features)
            yield from part.broken


def _merge(
    folder: Path,
    model: SearchModel,
    places: Mapping[str, str | None],
    entries: Sequence[Entry],
    faults: Mapping[str, str],
    todo: Sequence[Entry],
) -> IndexReport:
    """Write the new index from the rows of the old one and the parts, in the order of `entries`."""
    old = _old_index(folder)
    rows = {row.entry.version: row for row in _rows(folder, model)}
    reasons = dict(faults)
    good: list[_Row] = []
    broken: list[Entry] = []
    for entry in entries:
        row = rows[entry.version]
        if row.feature is None:
            broken.append(entry)
            reasons[entry.name] = row.fault or "it could not be read"
        else:
            # Captions of rows in a file are known once the row is read.
            captions = row.entry.captions if entry.row is not None else ()
            good.append(_Row(replace(entry, captions=entry.captions or captions), row.feature))
    if not good:
        name, reason = next(iter(reasons.items()))
        raise DataError(f"none of {len(entries)} images can be read, such as {name}: {reason}")
    names, new = {entry.name for entry in entries}, {entry.version for entry in todo}
    removed = 0 if old is None else sum(entry.name not in names for entry in old.entries)
    report = IndexReport(folder, len(good), sum(row.entry.version in new for row in good), removed, reasons)
    new_entries = [row.entry for row in good]
    if not todo and old is not None and (old.entries, old.broken, old.faults) == (new_entries, broken, reasons):
        # A run that was killed after its last rename has left its parts.
        _tidy(folder)
        return report
    token, source = secrets.token_hex(6), model.source
    files = {"features": f"features-{token}.f32", "entries": f"images-{token}.jsonl"}
    _write_rows(folder / files["entries"], folder / files["features"], good)
    header = {
        "format": FORMAT_VERSION, "images": len(good), "width": model.model.config.embed_dim, **files, **places,
        "model": {
            "weights": _absolute(source.model), "tokenizer": _absolute(source.tokenizer),
            "size": source.random or "tiny",
        },
        "fingerprint": model.fingerprint, "sums": {name: _crc(folder / name) for name in files.values()},
        "faults": reasons, "broken": [asdict(entry) for entry in broken],
        # Earlier versions of this format may have a graph of neighbours.
        "graph": None, "graph_bytes": 0,
    }  # fmt: skip
    write_bytes({folder / INDEX_FILE: (json.dumps(header, indent=1) + "\n").encode()})
    _tidy(folder)
    return report


def _write_rows(entries_file: Path, features_file: Path, rows: Sequence[_Row]) -> None:
    def write_features(file: BinaryIO) -> None:
        for row in rows:
            if row.feature is not None:
                file.write(row.feature.tobytes())

    values = (asdict(row.entry) | ({"fault": row.fault} if row.feature is None else {}) for row in rows)
    # ASCII, since names need not be Unicode, and some characters of captions end a line.
    lines = "".join(json.dumps(value) + "\n" for value in values).encode()
    # In this order: where the entries are, the features are.
    write_files({features_file: write_features, entries_file: lambda file: file.write(lines)})


def _read_rows(entries_file: Path, features_file: Path, width: int) -> _Rows:
    texts = require_file(entries_file).read_text(encoding="utf-8").splitlines()
    lines = [_Line.model_validate(json.loads(text)) for text in texts]
    broken = [_Row(line.entry, None, line.fault) for line in lines if line.fault is not None]
    entries = [line.entry for line in lines if line.fault is None]
    if require_file(features_file).stat().st_size != 4 * len(entries) * width:
        raise ValueError(f"{features_file.name} is not of {len(entries)} images")
    features: np.ndarray = np.empty((0, width), np.float32)
    if entries:
        features = np.memmap(features_file, np.float32, "r", shape=(len(entries), width)).view(np.ndarray)
    return _Rows(entries, features, broken)


def _old_index(folder: Path) -> SearchIndex | None:
    return open_index(folder) if (folder / INDEX_FILE).exists() else None


def _tidy(folder: Path) -> None:
    """Remove files of ours that are no part of the index."""
    header = _read_header(folder)
    for path in _our_files(folder):
        if path.name not in (header.entries, header.features):
            with suppress(OSError):
                path.unlink()


def _our_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _OUR_FILES.fullmatch(path.name) and path.is_file()]


def _absolute(name: str | Path | None) -> str | None:
    """The absolute path of a local folder; a name on the Hub stays."""
    if name is None:
        return None
    place = Path(name).expanduser()
    return str(place.resolve() if place.exists() else name)


def _relative(folder: Path, path: Path) -> str:
    """A path as the index stores it: relative where it contains or adjoins the index, so that both can move."""
    path, folder = path.resolve(), folder.resolve()
    return os.path.relpath(path, folder) if path == folder.parent or path.parent == folder.parent else str(path)


def _resolve(folder: Path, path: str) -> Path:
    return Path(os.path.normpath(folder / path))


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
