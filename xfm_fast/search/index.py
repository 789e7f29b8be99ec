"""The image index: features in a memory-mapped file, computed only for new and changed images, and their model.

Each process writes parts, so that a killed run resumes. At the end the first process merges them with the valid rows of
the old index, in the order of the collection, and replaces index.json. Images stay where they are: a search reads its
few candidates again, since the embeddings of all patches would take 600 KB an image, features take 1 KB.
"""

from __future__ import annotations

import hashlib
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
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Lt
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from torch import Tensor

from xfm_fast import loading
from xfm_fast.data.collection import Collection, Entry, open_collection
from xfm_fast.data.images import evaluation_transform
from xfm_fast.errors import DataError, UnavailableError, explain_types
from xfm_fast.export.session import Session
from xfm_fast.io import MOST_JSON_BYTES, advice, hold, is_plain_name, read_bytes, require_file, write_bytes, write_files
from xfm_fast.loading import Source
from xfm_fast.models.processor import batches
from xfm_fast.models.xfm import PRECISIONS, XFM, Precision
from xfm_fast.tasks.journal import checksum
from xfm_fast.tasks.reranking import Rank
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.distributed import Processes

FORMAT_VERSION = 2
INDEX_FOLDER, INDEX_FILE = ".xfm-index", "index.json"
# A killed run loses the features of at most this many images.
_PART = 256
# Batches that are decoded while the model computes.
_PREFETCH = 3
_OUR_FILES = re.compile(r"(part-\d+(-[0-9a-f]{32})?|features|images|graph)-[0-9a-f]{12}\.(f32|jsonl|usearch)")
# Counts changes of the image transform, which change features too.
_TRANSFORM_VERSION = 2
_FEATURE_WEIGHTS = ("vision_encoder.", "vision_proj.", "text_encoder.roberta.", "text_proj.")


@dataclass(frozen=True)
class SearchModel:
    """A model in evaluation mode; `rank` is the rule that its run recorded, see `xfm_fast.tasks.reranking`."""

    # An `XFM`, or the `Session` of an export.
    model: Any
    source: Source
    # Digest of everything that features depend on: weights, resolution and image transform.
    fingerprint: str
    rank: Rank = "match"

    @property
    def tokenizer(self) -> CaptionTokenizer | None:
        """Tokenizer of the queries."""
        return self.model.processor.tokenizer if isinstance(self.model, Session) else self.model.tokenizer


def open_model(
    source: str | Path | Source, *, device: str | torch.device | None = None, dtype: Precision | None = None
) -> SearchModel:
    """Load a model with a contrastive head; features of another dtype are close enough to search the same index.

    Args:
        source: a run, a folder, a Hub name, an official checkpoint file or an export; or the options of the model.
        device: of the model; by default that of `source`, "cpu" for a name.
        dtype: of the model; by default that of `source`.
    """
    if not isinstance(source, Source):
        source = Source(str(source), device="cpu")
    if source.is_export:
        opened = loading.open_session(source)
        if "contrastive" not in opened.model.heads:
            raise UnavailableError(f"{source} has no contrastive head; export a model that has one")
        return SearchModel(opened.model, source, opened.model.fingerprint()[:32], opened.rank)
    opened = loading.open_model(replace(source, dtype=None), needs=("contrastive",), tasks=("retrieval",), device="cpu")
    # Before the cast, so that an index made in bf16 fits the same model in fp32.
    digest = hashlib.sha256(f"{_TRANSFORM_VERSION} {opened.model.config.image_size}".encode())
    for name, tensor in opened.model.state_dict().items():
        if name.startswith(_FEATURE_WEIGHTS):
            digest.update(f"{name} {[*tensor.shape]} {checksum(tensor):08x}".encode())
    model = opened.model.to(device or source.choose_device()).cast(dtype or PRECISIONS[source.dtype or "fp32"])
    return SearchModel(model.eval(), source, digest.hexdigest()[:32], opened.rank)


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
    found = _read_index(place)
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
FileName = Annotated[str, AfterValidator(_plain)]
Count = Annotated[int, Ge(0), Lt(1 << 63)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Line(_Strict):
    """A line of entries, and an entry of the header."""

    name: Text
    size: Annotated[int, Ge(-1), Lt(1 << 63)]
    modified: Annotated[int, Ge(-(1 << 63)), Lt(1 << 63)]
    row: Count | None = None
    captions: list[Text] = []
    fault: str | None = None

    @property
    def entry(self) -> Entry:
        return Entry(self.name, self.size, self.modified, self.row, tuple(self.captions))


class _Weights(_Strict):
    weights: Text | None = None
    tokenizer: Text | None = None
    size: Literal["tiny", "base"] = "tiny"


class _Header(_Strict):
    """`index.json`; sums are CRC-32 of the files, absent in older indexes."""

    format: Literal[2]
    images: Count
    width: Annotated[int, Ge(1), Lt(1 << 20)]
    entries: FileName
    features: FileName
    path: Text
    picture_folder: Text | None
    model: _Weights
    fingerprint: str
    faults: dict[str, str]
    broken: list[_Line]
    sums: dict[str, int] = {}


_DAMAGE = (OSError, ValueError, RecursionError)


def _read_header(folder: Path) -> _Header:
    # Names of images may hold bytes that are no UTF-8, which `parse_json` refuses.
    values = json.loads(read_bytes(folder / INDEX_FILE, MOST_JSON_BYTES))
    if isinstance(values, dict) and values.get("format") != FORMAT_VERSION:
        raise DataError(f"{folder} has format {values.get('format')!r}, not {FORMAT_VERSION}; delete and make it again")
    return _Header.model_validate(values)


def _read_index(folder: Path, *, again: bool = True) -> SearchIndex:
    try:
        header = _read_header(folder)
        entries, features, broken = _read_rows(
            folder / header.entries, folder / header.features, header.width, header.sums
        )
        if broken or len(entries) != header.images:
            raise ValueError(f"{len(entries)} entries for {header.images} images")
    except FileNotFoundError as error:
        # Another process may have replaced the index and removed the old files.
        if again:
            return _read_index(folder, again=False)
        raise DataError(f"the index {folder} lacks {error.filename!r}; delete it and index again") from None
    except DataError:
        raise
    except _DAMAGE as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else {}
        words = f"{'.'.join(map(str, reason['loc']))}: {advice(reason)}" if reason else " ".join(str(error).split())
        raise DataError(f"the index {folder} is damaged ({words[:200]}); delete it and index again") from None
    weights, tokenizer, pictures = header.model.weights, header.model.tokenizer, header.picture_folder
    source = Source(weights, None if weights else header.model.size, tokenizer=Path(tokenizer) if tokenizer else None)
    return SearchIndex(
        folder, entries, features, header.faults, [each.entry for each in header.broken], source,
        header.fingerprint, _absolute(folder, header.path), None if pictures is None else _absolute(folder, pictures),
    )  # fmt: skip


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
    entries, faults = list[Entry](), dict[str, str]()
    # The first process alone knows the old index.
    old: SearchIndex | None = None

    def begin() -> list[Entry]:
        nonlocal entries, faults, old
        entries, faults = collection.listing()
        if (target / INDEX_FILE).exists():
            old = open_index(target)
            old.check(model)
            if old.path.resolve() != place.resolve():
                raise DataError(f"{target} is the index of {old.path}, this is {place}; name another --index")
        done = _stored_rows(target, model, old)
        return [entry for entry in entries if entry.version not in done]

    def work() -> None:
        pending: list[_Row] = []
        share = todo[processes.rank :: processes.world_size]

        def write_part() -> None:
            if pending:
                name = f"part-{processes.rank}-{model.fingerprint}-{secrets.token_hex(6)}"
                _write_rows(target / f"{name}.jsonl", target / f"{name}.f32", pending)
                pending.clear()

        try:
            for number, row in enumerate(_embed(collection, share, model.model, batch_size, workers), start=1):
                pending.append(row)
                if len(pending) >= _PART:
                    write_part()
                progress(number * processes.world_size, len(todo))
                if stop is not None and stop.is_set():
                    break
        finally:
            write_part()

    def finish() -> IndexReport:
        header = {"path": _relative(target, place), "picture_folder": pictures and _relative(target, pictures)}
        return _merge(target, model, header, entries, faults, todo, old)

    with ExitStack() as stack:
        processes.from_first(lambda: stack.enter_context(hold(target / ".lock", f"the index {target} (--index)")))
        todo = processes.from_first(begin)
        processes.together(work)
        if processes.any(stop is not None and stop.is_set()):
            return IndexReport(target, interrupted=True)
        return processes.from_first(finish)


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


def _stored_rows(folder: Path, model: SearchModel, old: SearchIndex | None) -> dict[Any, _Row]:
    """Rows of the old index and of the parts by this model; a damaged part is skipped and computed again."""
    rows: list[_Row] = []
    if old is not None:
        rows += map(_Row, old.entries, old.features)
        rows += (_Row(entry, None, old.faults.get(entry.name)) for entry in old.broken)
    for path in sorted(folder.glob(f"part-*-{model.fingerprint}-*.jsonl")):
        with suppress(*_DAMAGE):
            entries, features, broken = _read_rows(path, path.with_suffix(".f32"), model.model.config.embed_dim)
            rows += [*map(_Row, entries, features), *broken]
    return {row.entry.version: row for row in rows}


def _merge(
    folder: Path,
    model: SearchModel,
    places: Mapping[str, str | None],
    entries: Sequence[Entry],
    faults: Mapping[str, str],
    todo: Sequence[Entry],
    old: SearchIndex | None,
) -> IndexReport:
    """Write the new index from the rows of the old one and the parts, in the order of `entries`."""
    rows = _stored_rows(folder, model, old)
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
    if todo or old is None or (old.entries, old.broken, old.faults) != (new_entries, broken, reasons):
        token, source = secrets.token_hex(6), model.source
        files = {"features": f"features-{token}.f32", "entries": f"images-{token}.jsonl"}
        weights, tokenizer = (
            str(path.resolve()) if name is not None and (path := Path(name).expanduser()).exists() else name
            for name in (source.model, source.tokenizer and str(source.tokenizer))
        )
        header = {
            "format": FORMAT_VERSION, "images": len(good), "width": model.model.config.embed_dim, **files, **places,
            "model": {"weights": weights, "tokenizer": tokenizer, "size": source.random or "tiny"},
            "fingerprint": model.fingerprint,
            "sums": _write_rows(folder / files["entries"], folder / files["features"], good),
            "faults": reasons, "broken": [asdict(entry) for entry in broken],
            # Earlier versions of this format may have a graph of neighbours.
            "graph": None, "graph_bytes": 0,
        }  # fmt: skip
        write_bytes({folder / INDEX_FILE: (json.dumps(header, indent=1) + "\n").encode()})
    # Also what a run left that was killed after its last rename.
    current = _read_header(folder)
    for path in folder.iterdir():
        ours = _OUR_FILES.fullmatch(path.name) and path.name not in (current.entries, current.features)
        if ours and path.is_file():
            with suppress(OSError):
                path.unlink()
    return report


def _write_rows(entries_file: Path, features_file: Path, rows: Sequence[_Row]) -> dict[str, int]:
    """Write entries and features; returns the checksums of both files."""
    crc = 0

    def write_features(file: BinaryIO) -> None:
        nonlocal crc
        for row in rows:
            if row.feature is not None:
                content = row.feature.tobytes()
                crc = zlib.crc32(content, crc)
                file.write(content)

    values = (asdict(row.entry) | ({"fault": row.fault} if row.feature is None else {}) for row in rows)
    # ASCII, since names need not be Unicode, and some characters of captions end a line.
    lines = "".join(json.dumps(value) + "\n" for value in values).encode()
    # In this order: where the entries are, the features are.
    write_files({features_file: write_features, entries_file: lambda file: file.write(lines)})
    return {entries_file.name: zlib.crc32(lines), features_file.name: crc}


def _read_rows(
    entries_file: Path, features_file: Path, width: int, sums: Mapping[str, int] | None = None
) -> tuple[list[Entry], np.ndarray, list[_Row]]:
    """Entries, their features, and rows without one; the checksums are those of what is returned."""
    content = read_bytes(entries_file, entries_file.stat().st_size)
    lines = [_Line.model_validate(json.loads(text)) for text in content.decode().splitlines()]
    broken = [_Row(line.entry, None, line.fault) for line in lines if line.fault is not None]
    entries = [line.entry for line in lines if line.fault is None]
    if require_file(features_file).stat().st_size != 4 * len(entries) * width:
        raise ValueError(f"{features_file.name} is not of {len(entries)} images")
    features: np.ndarray = np.empty((0, width), np.float32)
    if entries:
        features = np.memmap(features_file, np.float32, "r", shape=(len(entries), width)).view(np.ndarray)
    # Over the mapping that a search reads, so that the file is read once.
    for name, data in (entries_file.name, content), (features_file.name, features.data):
        if sums and name in sums and zlib.crc32(data) != sums[name]:
            raise ValueError(f"{name} has another checksum")
    return entries, features, broken


def _relative(folder: Path, path: Path) -> str:
    """A path as the index stores it: relative where it contains or adjoins the index, so that both can move."""
    path, folder = path.resolve(), folder.resolve()
    return os.path.relpath(path, folder) if path == folder.parent or path.parent == folder.parent else str(path)


def _absolute(folder: Path, path: str) -> Path:
    return Path(os.path.normpath(folder / path))


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
