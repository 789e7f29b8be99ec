"""The index of a collection: features on disk, mapped into memory, of which only what is new or changed is made.

Processes append what they have done to parts of their own, so that a killed run goes on; at the end the first one puts
the parts and what is still valid together, in the order of the collection, and swaps the new index in. Images stay
where they are: the candidates of a search are few and read again, while the embeddings of all patches would take
600 KB an image at 224 pixels, features 1 KB.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xfm_fast.checkpoint import write_bytes, write_files
from xfm_fast.data.collection import Collection, Entry, open_collection
from xfm_fast.data.images import evaluation_transform
from xfm_fast.documents import MOST_JSON_BYTES, is_plain_name, read_bytes, require_file
from xfm_fast.errors import DataError, StorageError
from xfm_fast.models.processor import batches
from xfm_fast.models.xfm import XFM
from xfm_fast.search.model import ModelSource, SearchModel
from xfm_fast.search.neighbours import Graph, graph_of, open_graph, wants_graph
from xfm_fast.training.distributed import Processes

FORMAT_VERSION = 2
INDEX_FOLDER, INDEX_FILE = ".xfm-index", "index.json"
# Images whose features a killed run may lose.
_PART = 256
# Batches that are read and decoded while the model computes.
_AHEAD = 3
_BLOCK = 1 << 14
_OURS = re.compile(r"(part-\d+|features|images|graph)-[0-9a-f]{12}\.(f32|jsonl|usearch)")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SearchIndex:
    """An index as it lies on disk.

    Attributes:
        folder: of the index.
        entries: the images, by row.
        features: `[I, embed_dim]` float32, L2-normalised, mapped.
        faults: reasons why images or rows could not be read, by their name.
        broken: the images among them, which are tried again when they change.
        model: where the weights come from.
        fingerprint: identifies the weights.
        path, images: the collection; see `open_collection`.
        graph_file, graph_bytes: name and size of the graph of neighbours; None where there is none.
        root: folder below which pictures are read; None for that of the index, since it may come from anybody.
    """

    folder: Path
    entries: list[Entry]
    features: np.ndarray
    faults: dict[str, str]
    broken: list[Entry]
    model: ModelSource
    fingerprint: str
    path: Path
    images: Path | None
    graph_file: str | None = None
    graph_bytes: int = 0
    root: Path | None = None

    @cached_property
    def graph(self) -> Any | None:
        """The graph of neighbours; None where all features are compared.

        Raises:
            DataError: it is damaged.
        """
        if self.graph_file is None:
            return None
        images, width = self.features.shape
        return open_graph(self.folder / self.graph_file, images, width, self.graph_bytes)

    @cached_property
    def collection(self) -> Collection:
        """What was indexed.

        Raises:
            DataError: the index names a place outside its folder, and nobody else does.
        """
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
                f"{self.folder} was made with {self.model} ({self.fingerprint[:8]}), and this is {model.source} "
                f"({model.fingerprint[:8]}), whose features are others; use that model, delete the index, or make "
                "another one elsewhere (--index)"
            )


@dataclass(frozen=True)
class IndexReport:
    """What indexing did.

    Attributes:
        folder: of the index.
        images: in the index now.
        added: of these, those that are new or have changed.
        removed: images that were in the index and are gone.
        faults: reasons why images or rows could not be read, by their name.
        interrupted: a signal came; the same call goes on from there.
    """

    folder: Path
    images: int = 0
    added: int = 0
    removed: int = 0
    faults: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False


def index_folder(path: str | os.PathLike[str]) -> Path:
    """Where the index of a collection lies unless another folder is named: in its folder, or beside its file."""
    path = Path(path).expanduser()
    return path / INDEX_FOLDER if path.is_dir() else path.with_name(f"{path.name}{INDEX_FOLDER}")


def open_index(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
) -> SearchIndex:
    """Read an index. Pictures are read below `path` and `images` alone, whatever the index names.

    Args:
        path: what was indexed; or the folder of an index, which then shows no pictures from elsewhere.
        folder: of the index; by default in or beside `path`.
        images: folder of the images, where a file lists their paths; by default that of the file.

    Raises:
        DataError: there is none, it is damaged, or of another version.
    """
    given = Path(path).expanduser()
    places = [given, index_folder(given)] if folder is None else [Path(folder).expanduser()]
    place = next((each for each in places if (each / INDEX_FILE).is_file()), None)
    if place is None:
        if not given.exists():
            raise DataError(f"{path} is not there; name what was indexed, or the folder of the index")
        raise DataError(f"{path} has no index; make one: xfm-fast index {path}")
    found = _opened(place)
    if place == given:
        return found
    pictures = None if images is None else Path(images).expanduser()
    root = pictures or (given if given.is_dir() else given.parent)
    return replace(found, path=given, images=pictures or found.images, root=root)


def _opened(folder: Path) -> SearchIndex:
    try:
        return _read(folder)
    except FileNotFoundError:
        # Another process has put a new index in its place, and taken the old one's files away.
        try:
            return _read(folder)
        except FileNotFoundError as error:
            raise DataError(f"the index {folder} lacks {error.filename}; delete it and index again") from None


def _read(folder: Path) -> SearchIndex:
    try:
        # Names of images may hold what no other text of ours may: bytes that are no UTF-8.
        said = json.loads(read_bytes(folder / INDEX_FILE, MOST_JSON_BYTES))
        if said["format"] != FORMAT_VERSION:
            raise DataError(
                f"{folder} has format {said['format']!r}, and this version reads {FORMAT_VERSION}; delete it and index "
                "again"
            )
        for name in (said["entries"], said["features"], said["graph"]):
            if name is not None and not is_plain_name(name):
                raise ValueError(f"{name!r} is no file of this folder")
        lines = require_file(folder / said["entries"]).read_text(encoding="utf-8").splitlines()
        count, width = int(said["images"]), int(said["width"])
        entries = [_entry(json.loads(line)) for line in lines]
        if len(entries) != count or (folder / said["features"]).stat().st_size != 4 * count * width:
            raise ValueError(f"{len(entries)} entries for {count} images")
        features: np.ndarray = np.empty((0, width), np.float32)
        if count:
            features = np.memmap(folder / said["features"], np.float32, "r", shape=(count, width)).view(np.ndarray)
        return SearchIndex(
            folder, entries, features, dict(said["faults"]), [_entry(each) for each in said["broken"]],
            ModelSource(**said["model"]), str(said["fingerprint"]), _beside(folder, said["path"]),
            None if said["picture_folder"] is None else _beside(folder, said["picture_folder"]),
            said["graph"], int(said["graph_bytes"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, (DataError, FileNotFoundError)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the index {folder} is damaged ({reason}); delete it and index again") from None


def build_index(
    path: str | os.PathLike[str],
    model: SearchModel,
    folder: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    workers: int = 4,
    processes: Processes | None = None,
    progress: Progress = lambda done, of: None,
    stop: Event | None = None,
    graph: Graph = "auto",
) -> IndexReport:
    """Make or renew the index of a collection; images that have not changed, by size and time, are not read.

    All of several processes must see the folder, and each computes its share. Images that cannot be read are listed.

    Args:
        path, images: the collection; see `open_collection`.
        model: see `open_model`.
        folder: of the index; by default `index_folder(path)`.
        batch_size: images that are computed together.
        workers: threads that read and decode images.
        processes: see `join_processes`; by default this one alone.
        progress: called with images done and to do.
        stop: once it is set, the call returns, and another one goes on from there.
        graph: of neighbours, by which many images are searched: `auto` makes one beyond 200,000 images if `usearch` is
            installed.

    Raises:
        DataError: there are no images, none can be read, or the index is of another model or version.
        StorageError: the index cannot be written, or another process is writing it.
        UnavailableError: a graph was asked for, and `usearch` is not installed.
    """
    processes = processes or Processes()
    target = index_folder(path) if folder is None else Path(folder).expanduser()
    place = _Place(Path(path).expanduser(), None if images is None else Path(images).expanduser())
    collection = processes.together(lambda: open_collection(place.path, place.images))
    # Before hours of work, not behind them.
    processes.together(lambda: wants_graph(graph, 0))
    with _locked(target, processes):

        def begin() -> tuple[list[Entry], dict[str, str], list[Entry]]:
            entries, faults = collection.listing()
            old = open_index(target) if (target / INDEX_FILE).exists() else None
            if old is not None:
                old.check(model)
                if old.path.resolve() != place.path.resolve():
                    raise DataError(
                        f"{target} is the index of {old.path}, and this is {place.path}; name another folder "
                        "(--index), or delete that one"
                    )
            done = _versions(old, _parts(target, model))
            return entries, faults, [entry for entry in entries if entry.version not in done]

        entries, faults, todo = processes.from_first(begin)
        share = todo[processes.rank :: processes.world_size]

        def work() -> None:
            with _Parts(target, model, processes.rank) as parts:
                for number, made in enumerate(_embed(collection, share, model.model, batch_size, workers), start=1):
                    parts.add(made)
                    progress(number * processes.world_size, len(todo))
                    if stop is not None and stop.is_set():
                        break

        processes.together(work)
        if processes.any(stop is not None and stop.is_set()):
            return IndexReport(target, interrupted=True)
        return processes.from_first(lambda: _assemble(target, model, place, entries, faults, todo, graph))


class _Made(NamedTuple):
    """An image, and its feature or the reason why it has none."""

    entry: Entry
    feature: np.ndarray | None
    fault: str | None


class _Place(NamedTuple):
    """Where a collection is."""

    path: Path
    images: Path | None


class _Part(NamedTuple):
    """A finished part: entries, the features of those that have one, and the faults of the others."""

    entries: list[Entry]
    features: np.ndarray
    faults: list[str | None]


def _embed(
    collection: Collection, entries: Sequence[Entry], model: XFM, batch_size: int, workers: int
) -> Iterator[_Made]:
    """Images with their features, in order, read ahead by threads."""
    transform = evaluation_transform(model.config.image_size)

    def load(entry: Entry) -> tuple[Entry, Tensor | str]:
        try:
            image, captions = collection.load(entry)
            return replace(entry, captions=captions), transform(image)
        except DataError as error:
            return entry, str(error)

    waiting: deque[list[Future[tuple[Entry, Tensor | str]]]] = deque()
    left = batches(entries, batch_size)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        while True:
            while len(waiting) < _AHEAD and (batch := next(left, None)) is not None:
                waiting.append([pool.submit(load, entry) for entry in batch])
            if not waiting:
                return
            loaded = [future.result() for future in waiting.popleft()]
            pixels = [found for _, found in loaded if isinstance(found, Tensor)]
            features: Iterator[np.ndarray] = iter(())
            if pixels:
                with torch.no_grad():
                    embeds = model.encode_image(torch.stack(pixels).to(model.device))
                    features = iter(model.project_image(embeds).float().cpu().numpy())
            for entry, found in loaded:
                yield _Made(entry, None, found) if isinstance(found, str) else _Made(entry, next(features), None)


class _Parts:
    """The parts that a process writes, each whole or not at all."""

    def __init__(self, folder: Path, model: SearchModel, rank: int) -> None:
        self._folder, self._model, self._rank = folder, model, rank
        self._waiting: list[_Made] = []

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What is done is done, whatever ended the work.
        with suppress(StorageError) if kind else nullcontext():
            self._write()

    def add(self, made: _Made) -> None:
        """Take an image; now and then what was taken is written."""
        self._waiting.append(made)
        if len(self._waiting) >= _PART:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        made, self._waiting = self._waiting, []
        name = f"part-{self._rank}-{secrets.token_hex(6)}"
        lines = [{"of": self._model.fingerprint}]
        lines += [asdict(each.entry) | {"fault": each.fault} for each in made]
        features = [each.feature for each in made if each.feature is not None]
        width = self._model.model.config.embed_dim
        stacked = np.stack(features).astype(np.float32) if features else np.empty((0, width), np.float32)
        # The entries come last: where they are, the features are.
        write_bytes({self._folder / f"{name}.f32": stacked.tobytes()})
        write_bytes({self._folder / f"{name}.jsonl": _lines(lines)})


def _parts(folder: Path, model: SearchModel) -> list[_Part]:
    """The finished parts of work with this model."""
    found = []
    width = model.model.config.embed_dim
    for path in sorted(_files_of_indexing(folder)):
        if path.suffix != ".jsonl" or not path.name.startswith("part-"):
            continue
        try:
            said, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if said != {"of": model.fingerprint}:
                continue
            faults = [line.pop("fault") for line in lines]
            features = np.fromfile(path.with_suffix(".f32"), np.float32).reshape(-1, width)
            part = _Part([_entry(line) for line in lines], features, faults)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            # A part that is damaged is made again.
            continue
        if len(features) == faults.count(None):
            found.append(part)
    return found


def _versions(old: SearchIndex | None, parts: Sequence[_Part]) -> set[tuple[str, int, int, int | None]]:
    done = set() if old is None else {entry.version for entry in (*old.entries, *old.broken)}
    return done | {entry.version for part in parts for entry in part.entries}


def _assemble(
    folder: Path,
    model: SearchModel,
    place: _Place,
    entries: Sequence[Entry],
    faults: Mapping[str, str],
    todo: Sequence[Entry],
    graph: Graph,
) -> IndexReport:
    """The new index out of the old one and the parts, in the order of the collection."""
    old = open_index(folder) if (folder / INDEX_FILE).exists() else None
    # Where each image's feature lies; None for those that have none.
    sources: dict[tuple[str, int, int, int | None], tuple[Entry, np.ndarray | None]] = {}
    reasons = dict(faults)
    if old is not None:
        sources |= {entry.version: (entry, row) for entry, row in zip(old.entries, old.features, strict=True)}
        sources |= {entry.version: (entry, None) for entry in old.broken}
    told = {} if old is None else old.faults
    for part in _parts(folder, model):
        rows = iter(part.features)
        for entry, fault in zip(part.entries, part.faults, strict=True):
            sources[entry.version] = (entry, next(rows) if fault is None else None)
            if fault is not None:
                told = {**told, entry.name: fault}
    kept: list[Entry] = []
    broken: list[Entry] = []
    features: list[np.ndarray] = []
    for entry in entries:
        known, feature = sources[entry.version]
        if feature is None:
            broken.append(entry)
            reasons[entry.name] = told.get(entry.name, "it could not be read")
        else:
            kept.append(replace(entry, captions=entry.captions or (known.captions if entry.row is not None else ())))
            features.append(feature)
    if not kept:
        name, reason = next(iter(reasons.items()))
        raise DataError(f"none of {len(entries)} images of {place.path} can be read, such as {name}: {reason}")
    names = {entry.name for entry in entries}
    new = {entry.version for entry in todo}
    report = IndexReport(
        folder, len(kept), sum(entry.version in new for entry in kept),
        0 if old is None else sum(entry.name not in names for entry in old.entries), reasons,
    )  # fmt: skip
    with_graph = wants_graph(graph, len(kept))
    same = old is not None and (kept, broken, reasons) == (old.entries, old.broken, old.faults)
    if same and not todo and old is not None and with_graph == (old.graph_file is not None):
        # A run that was killed behind its last rename has left what it was made of.
        _tidy(folder)
        return report
    name = secrets.token_hex(6)
    files = {"features": f"features-{name}.f32", "entries": f"images-{name}.jsonl"}

    def write_features(file: BinaryIO) -> None:
        for some in batches(features, _BLOCK):
            file.write(np.stack(some).tobytes())

    stored = graph_of(np.stack(features)) if with_graph else b""
    if with_graph:
        files["graph"] = f"graph-{name}.usearch"
    said: dict[str, Any] = {"graph": None, "graph_bytes": len(stored)} | {
        "format": FORMAT_VERSION, "images": len(kept), "width": model.model.config.embed_dim, **files,
        "model": asdict(_absolute(model.source)), "fingerprint": model.fingerprint,
        "path": _from(folder, place.path),
        "picture_folder": None if place.images is None else _from(folder, place.images),
        "faults": reasons, "broken": [asdict(entry) for entry in broken],
    }  # fmt: skip
    lines = _lines([asdict(entry) for entry in kept])
    writers: dict[Path, Callable[[BinaryIO], object]] = {
        folder / files["features"]: write_features,
        folder / files["entries"]: lambda file: file.write(lines),
    }
    if with_graph:
        writers[folder / files["graph"]] = lambda file: file.write(stored)
    write_files(writers)
    write_bytes({folder / INDEX_FILE: (json.dumps(said, indent=1) + "\n").encode()})
    _tidy(folder)
    return report


def _tidy(folder: Path) -> None:
    """Remove the files of indexing that the index does not consist of."""
    said = json.loads(read_bytes(folder / INDEX_FILE, MOST_JSON_BYTES))
    for path in _files_of_indexing(folder):
        if path.name not in (said["entries"], said["features"], said["graph"]):
            with suppress(OSError):
                path.unlink()


def _files_of_indexing(folder: Path) -> list[Path]:
    """Regular files that have the names of ours; a folder may hold others."""
    return [path for path in folder.iterdir() if _OURS.fullmatch(path.name) and path.is_file()]


@contextmanager
def _locked(folder: Path, processes: Processes) -> Iterator[None]:
    """The folder, made if need be, which no other run writes to meanwhile."""

    def take() -> int:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageError(
                f"the index {folder} cannot be written ({error.strerror or error}); name another folder (--index)"
            ) from error
        try:
            import fcntl

            # The system lets go of it when the process ends, however it does.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            os.close(handle)
            raise StorageError(f"the index {folder} is being written by another process; wait for it") from None
        return handle

    handle: list[int] = []
    processes.from_first(lambda: handle.append(take()))
    try:
        yield
    finally:
        for each in handle:
            os.close(each)


def _lines(values: Sequence[Mapping[str, Any]]) -> bytes:
    # ASCII, for names need not be Unicode, and some characters of captions end a line.
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _entry(values: Mapping[str, Any]) -> Entry:
    return Entry(**{**values, "captions": tuple(values["captions"])})


def _absolute(source: ModelSource) -> ModelSource:
    """A folder by its whole path, so that a search from elsewhere finds it; names on the Hub stay as they are."""
    changes = {
        name: str(Path(value).expanduser().resolve())
        for name, value in (("weights", source.weights), ("tokenizer", source.tokenizer))
        if value is not None and Path(value).expanduser().exists()
    }
    return replace(source, **changes)


def _from(folder: Path, path: Path) -> str:
    """A path as the index keeps it: relative where it holds or adjoins the index, so that both can move together."""
    path, folder = path.resolve(), folder.resolve()
    return os.path.relpath(path, folder) if path == folder.parent or path.parent == folder.parent else str(path)


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _beside(folder: Path, path: str) -> Path:
    # An absolute path stays as it is.
    return Path(os.path.normpath(folder / path))
