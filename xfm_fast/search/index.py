"""The image index: features in a memory-mapped file, computed only for new and changed images, and
their model.

The processes of a build compute whole batches in turn, so that features do not depend on the number
of processes, and write shards, so that a killed run resumes. At the end the first process merges
them with the valid rows of the old index, in the order of the collection, and replaces index.json.
Images are not copied: a search reads its few candidates again, since the embeddings of all patches
would take 600 KB per image, features take 1 KB.
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
from functools import cached_property, partial
from itertools import chain, repeat
from pathlib import Path
from threading import Event
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import torch
from annotated_types import Ge, Lt
from PIL import Image
from pydantic import AfterValidator, BaseModel, ValidationError
from torch import Tensor

from xfm_fast import loading
from xfm_fast.data.collection import Collection, Entry, open_collection
from xfm_fast.data.images import evaluation_transform
from xfm_fast.errors import DataError, UnavailableError, explain_types
from xfm_fast.export.session import Session
from xfm_fast.io import (
    MOST_JSON_BYTES,
    advice,
    hold,
    is_plain_name,
    open_data,
    read_bytes,
    write_bytes,
    write_files,
)
from xfm_fast.loading import Source
from xfm_fast.models.processor import batches
from xfm_fast.models.xfm import PRECISIONS, XFM
from xfm_fast.tasks.evaluation import checksum
from xfm_fast.tasks.reranking import Rank
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.distributed import Processes

INDEX_FOLDER, INDEX_FILE = ".xfm-index", "index.json"
# Images of a shard, the most that a killed run loses.
_SHARD_IMAGES = 256
# Threads that decode images, and batches that they decode while the model computes.
_THREADS, _PREFETCH = 8, 3
_DATA_FILE = re.compile(r"(part-\d+-[0-9a-f]{32}|features|images)-[0-9a-f]{12}\.(f32|jsonl)")
# Counts changes of the image transform, which change features too.
_TRANSFORM_VERSION = 2
_FEATURE_WEIGHTS = ("vision_encoder.", "vision_proj.", "text_encoder.roberta.", "text_proj.")
# Raised by reading a damaged file.
_DAMAGE = (OSError, ValueError, RecursionError)

Row = tuple[Entry, np.ndarray]
"""An image with its feature."""


@dataclass(frozen=True)
class SearchModel:
    """A model in evaluation mode."""

    model: Any  # an `XFM`, or the `Session` of an export
    source: Source
    fingerprint: (
        str  # digest of everything that features depend on: weights, resolution and image transform
    )
    rank: Rank = "match"  # rule of its run, see `xfm_fast.tasks.reranking`

    @property
    def tokenizer(self) -> CaptionTokenizer | None:
        """Tokenizer of the queries."""
        model = self.model
        return model.processor.tokenizer if isinstance(model, Session) else model.tokenizer


def open_model(source: str | Path | Source) -> SearchModel:
    """Load a model with a contrastive head; an index is searched in any dtype.

    Args:
        source: a run, a folder, a Hub name, an official checkpoint file or an export, for the CPU;
            or the options of the model.
    """
    if not isinstance(source, Source):
        source = Source(str(source), device="cpu")
    if source.is_export:
        opened = loading.open_session(source)
        if "contrastive" not in opened.model.heads:
            raise UnavailableError(f"{source} has no contrastive head; export a model that has one")
        return SearchModel(opened.model, source, opened.model.fingerprint()[:32], opened.rank)
    opened = loading.open_model(
        replace(source, dtype=None), needs=("contrastive",), tasks=("retrieval",), device="cpu"
    )
    # Before the cast, so that an index made in bf16 fits the same model in fp32.
    digest = hashlib.sha256(f"{_TRANSFORM_VERSION} {opened.model.config.image_size}".encode())
    for name, tensor in opened.model.state_dict().items():
        if name.startswith(_FEATURE_WEIGHTS):
            digest.update(f"{name} {[*tensor.shape]} {checksum(tensor):08x}".encode())
    model = opened.model.to(source.choose_device()).cast(PRECISIONS[source.dtype or "fp32"])
    return SearchModel(model.eval(), source, digest.hexdigest()[:32], opened.rank)


@dataclass(frozen=True)
class SearchIndex:
    """An index on disk: `features` `[I, embed_dim]` float32, L2-normalised, row i of `entries[i]`."""

    folder: Path
    entries: list[Entry]
    features: np.ndarray
    model: Source
    fingerprint: str
    path: Path  # the collection, see `open_collection`
    images: Path | None
    root: Path | None = (
        None  # pictures are read below this folder; None shows none, as of an index from anybody
    )

    @cached_property
    def collection(self) -> Collection:
        """The indexed collection; raises `DataError` if only the index names it."""
        if self.root is None:
            raise DataError(
                f"{self.folder} is an index of {self.path}; name that, with the index as --index"
            )
        return open_collection(self.path, self.images)

    def load(self, entry: Entry) -> Image.Image:
        """Read the picture of an entry; raises `DataError` if it is broken or lies outside `root`."""
        path = os.path.abspath(self.collection.location(entry))
        if entry.row is None and not Path(path).is_relative_to(os.path.abspath(self.root or "")):
            raise DataError(
                f"{path} lies outside {self.root}; name the folder of the images as --images"
            )
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
    """Counts of an indexing run; one that was `interrupted` is resumed by the same call."""

    folder: Path
    images: int = 0
    added: int = 0
    removed: int = 0
    faults: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False


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
    """Read an index. Pictures are read only below `path` and `images`, whatever paths the index
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
        return _read_index(collection)
    folder = index_folder(collection) if folder is None else Path(folder).expanduser()
    if not (folder / INDEX_FILE).is_file():
        if not collection.exists():
            raise DataError(
                f"{path} does not exist; name an indexed collection, or the folder of an index"
            )
        raise DataError(f"{path} has no index; make one: xfm-fast index {path}")
    index = _read_index(folder)
    if images is not None:
        root = images = Path(images).expanduser()
    else:
        root, images = collection if collection.is_dir() else collection.parent, index.images
    return replace(index, path=collection, images=images, root=root)


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds a NUL")
    return text


def _check_name(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("it is not a file of this folder")
    return name


Text = Annotated[str, AfterValidator(_check_text)]
FileName = Annotated[str, AfterValidator(_check_name)]


class _Line(BaseModel, strict=True):
    """A line of entries."""

    name: Text
    size: int
    modified: int
    row: Annotated[int, Ge(0), Lt(1 << 63)] | None = None
    captions: list[Text] = []


class _Weights(BaseModel, strict=True):
    weights: Text | None = None
    tokenizer: Text | None = None
    size: Literal["tiny", "base"] = "tiny"


class _Header(BaseModel, strict=True):
    """`index.json`; sums are the CRC-32 of the files."""

    format: Literal[2]
    images: int
    width: Annotated[int, Ge(1), Lt(1 << 20)]
    entries: FileName
    features: FileName
    path: Text
    picture_folder: Text | None
    model: _Weights
    fingerprint: str
    sums: dict[str, int]


def _read_index(folder: Path) -> SearchIndex:
    """Read an index without `root`, by the paths that it names."""
    try:
        # Names of images may hold bytes that are not UTF-8, which `parse_json` refuses.
        header = _Header.model_validate(
            json.loads(read_bytes(folder / INDEX_FILE, MOST_JSON_BYTES))
        )
        entries, features = _read_rows(
            folder / header.entries, folder / header.features, header.width, header.sums
        )
        if len(entries) != header.images:
            raise ValueError(f"{len(entries)} entries for {header.images} images")
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {advice(first)}"
        raise DataError(
            f"the index {folder} is damaged ({reason[:200]}); delete it and index again"
        ) from None
    model = header.model
    source = Source(
        model.weights,
        None if model.weights else model.size,
        tokenizer=Path(model.tokenizer) if model.tokenizer else None,
    )
    path = Path(os.path.normpath(folder / header.path))
    images = None
    if header.picture_folder:
        images = Path(os.path.normpath(folder / header.picture_folder))
    return SearchIndex(folder, entries, features, source, header.fingerprint, path, images)


@explain_types
def build_index(
    path: str | os.PathLike[str],
    model: SearchModel,
    folder: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    processes: Processes | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    stop: Event | None = None,
) -> IndexReport:
    """Make or update the index of a collection; images of the same size and modification time are
    not read again.

    Images that cannot be read are listed. Several processes share the work, and all must see the
    folder; collective.

    Args:
        path, images: the collection; see `open_collection`.
        model: see `open_model`.
        folder: of the index; by default `index_folder(path)`.
        batch_size: images that are computed together.
        processes: see `join_processes`; by default this process alone.
        progress: called with the numbers of images done and to do.
        stop: once it is set, the call returns, and another call resumes.

    Raises:
        DataError: there are no images, no image can be read, or the index is of another model or
            version.
        StorageError: the index cannot be written, or another process is writing it.
    """
    processes = processes or Processes()
    target = index_folder(path) if folder is None else Path(folder).expanduser()
    path = Path(path).expanduser()
    pictures = None if images is None else Path(images).expanduser()
    collection = processes.together(lambda: open_collection(path, pictures))
    build = _Build(target, path, pictures, collection, model, processes)
    with ExitStack() as stack:

        def begin() -> list[Entry]:
            stack.enter_context(hold(target / ".lock", f"the index {target} (--index)"))
            return build.list_missing()

        missing = processes.from_first(begin)
        work = partial(build.compute, missing, batch_size, progress, stop)
        for faults in processes.gather(processes.together(work)):
            build.faults |= faults
        if processes.any(stop is not None and stop.is_set()):
            return IndexReport(target, interrupted=True)
        return processes.from_first(lambda: build.merge(missing))


@dataclass
class _Build:
    """An update of an index: the first process lists images, all compute them, the first merges."""

    folder: Path
    path: Path
    images: Path | None
    collection: Collection
    model: SearchModel
    processes: Processes
    # Of the first process only.
    entries: list[Entry] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    old: SearchIndex | None = None

    def list_missing(self) -> list[Entry]:
        """List the images without stored features."""
        self.entries, self.faults = self.collection.listing()
        if (self.folder / INDEX_FILE).exists():
            self.old = open_index(self.folder)
            self.old.check(self.model)
            if self.old.path.resolve() != self.path.resolve():
                raise DataError(
                    f"{self.folder} is the index of {self.old.path}, this is {self.path}; name another --index"
                )
        rows = self._stored_rows()
        return [entry for entry in self.entries if entry.version not in rows]

    def compute(
        self,
        missing: Sequence[Entry],
        batch_size: int,
        progress: Callable[[int, int], None],
        stop: Event | None,
    ) -> dict[str, str]:
        """Write shards of this process's batches; returns the faults."""
        rank, world_size = self.processes.rank, self.processes.world_size
        batches_of_rank = [*batches(missing, batch_size)][rank::world_size]
        shard, faults = list[Row](), dict[str, str]()
        results = _embed(self.collection, batches_of_rank, self.model.model)
        try:
            for count, (entry, result) in enumerate(results, start=1):
                if isinstance(result, str):
                    faults[entry.name] = result
                else:
                    shard.append((entry, result))
                if len(shard) >= _SHARD_IMAGES:
                    self._write_shard(shard)
                    shard = []
                progress(min(count * world_size, len(missing)), len(missing))
                if stop is not None and stop.is_set():
                    break
        finally:
            if shard:
                self._write_shard(shard)
        return faults

    def merge(self, missing: Sequence[Entry]) -> IndexReport:
        """Write the index of all images with stored features."""
        rows, merged = self._stored_rows(), list[Row]()
        for entry in self.entries:
            if entry.version in rows:
                stored, feature = rows[entry.version]
                # The listing has no captions of embedded images.
                merged.append((entry if entry.row is None else stored, feature))
        if not merged:
            name, reason = next(iter(self.faults.items()))
            raise DataError(
                f"none of {len(self.entries)} images can be read, such as {name}: {reason}"
            )
        before = [] if self.old is None else self.old.entries
        if before != [entry for entry, _ in merged]:
            _write_index(self.folder, self.model, merged, self.path, self.images)
        _remove_old_files(self.folder)
        names, new = {entry.name for entry in self.entries}, {entry.version for entry in missing}
        added = sum(entry.version in new for entry, _ in merged)
        removed = sum(entry.name not in names for entry in before)
        return IndexReport(self.folder, len(merged), added, removed, self.faults)

    def _stored_rows(self) -> dict[Any, Row]:
        """Map versions to rows of the old index and of this model's shards; damaged shards are skipped."""
        rows: list[Row] = []
        if self.old is not None:
            rows += zip(self.old.entries, self.old.features, strict=True)
        width = self.model.model.config.embed_dim
        for path in sorted(self.folder.glob(f"part-*-{self.model.fingerprint}-*.jsonl")):
            with suppress(*_DAMAGE):
                rows += zip(*_read_rows(path, path.with_suffix(".f32"), width), strict=True)
        return {row[0].version: row for row in rows}

    def _write_shard(self, rows: Sequence[Row]) -> None:
        token = secrets.token_hex(6)
        name = f"part-{self.processes.rank}-{self.model.fingerprint}-{token}"
        _write_rows(self.folder / f"{name}.jsonl", self.folder / f"{name}.f32", rows)


def _embed(
    collection: Collection, work: Sequence[Sequence[Entry]], model: XFM | Session
) -> Iterator[tuple[Entry, np.ndarray | str]]:
    """Compute the features of images, in order, or the fault of an image; threads decode ahead."""
    transform = evaluation_transform(model.config.image_size)

    def load(entry: Entry) -> tuple[Entry, Tensor | str]:
        try:
            image, captions = collection.load(entry)
            return replace(entry, captions=captions), transform(image)
        except DataError as error:
            return entry, str(error)

    queue: deque[list[Future[tuple[Entry, Tensor | str]]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        # Empty batches at the end flush the queue.
        for batch in chain(work, repeat((), _PREFETCH)):
            queue.append([pool.submit(load, entry) for entry in batch])
            if len(queue) <= _PREFETCH:
                continue
            loaded = [future.result() for future in queue.popleft()]
            pixels = [result for _, result in loaded if isinstance(result, Tensor)]
            features: Iterator[np.ndarray] = iter(())
            if pixels:
                with torch.no_grad():
                    embeds = model.encode_image(torch.stack(pixels).to(model.device))
                    features = iter(model.project_image(embeds).float().cpu().numpy())
            for entry, result in loaded:
                yield entry, result if isinstance(result, str) else next(features)


def _write_index(
    folder: Path, model: SearchModel, rows: Sequence[Row], path: Path, images: Path | None
) -> None:
    token, source = secrets.token_hex(6), model.source
    features, entries = f"features-{token}.f32", f"images-{token}.jsonl"

    def absolute(name: str | Path | None) -> str | None:
        """Resolve a local path; a name on the Hub stays."""
        if name is None:
            return None
        local = Path(name).expanduser()
        return str(local.resolve() if local.exists() else name)

    def relative(target: Path) -> str:
        """Return a path relative to the index, so that a folder moves with its index."""
        return os.path.relpath(target.resolve(), folder.resolve())

    header = {
        "format": 2,
        "images": len(rows),
        "width": model.model.config.embed_dim,
        "features": features,
        "entries": entries,
        "path": relative(path),
        "picture_folder": images and relative(images),
        "fingerprint": model.fingerprint,
        "model": {
            "weights": absolute(source.model),
            "tokenizer": absolute(source.tokenizer),
            "size": source.random or "tiny",
        },
        "sums": _write_rows(folder / entries, folder / features, rows),
    }
    write_bytes({folder / INDEX_FILE: (json.dumps(header, indent=1) + "\n").encode()})


def _remove_old_files(folder: Path) -> None:
    """Remove shards, the former index, and the files of a run that was killed after its last rename."""
    header = json.loads(read_bytes(folder / INDEX_FILE, MOST_JSON_BYTES))
    for path in folder.iterdir():
        current = path.name in (header["entries"], header["features"])
        if _DATA_FILE.fullmatch(path.name) and not current:
            with suppress(OSError):
                path.unlink()


def _write_rows(entries_file: Path, features_file: Path, rows: Sequence[Row]) -> dict[str, int]:
    """Write entries and features; returns the checksums of both files."""
    crc = 0

    def write_features(file: BinaryIO) -> None:
        nonlocal crc
        for _, feature in rows:
            content = feature.tobytes()
            crc = zlib.crc32(content, crc)
            file.write(content)

    # ASCII, since names may not be Unicode, and some characters of captions end a line.
    lines = "".join(json.dumps(asdict(entry)) + "\n" for entry, _ in rows).encode()
    # Features first: where the entries exist, the features do.
    write_files({features_file: write_features, entries_file: lambda file: file.write(lines)})
    return {entries_file.name: zlib.crc32(lines), features_file.name: crc}


def _read_rows(
    entries_file: Path, features_file: Path, width: int, sums: Mapping[str, int] | None = None
) -> tuple[list[Entry], np.ndarray]:
    """Read entries and their features, and verify checksums."""
    content = read_bytes(entries_file, entries_file.stat().st_size)
    entries = []
    for text in content.decode().splitlines():
        line = _Line.model_validate(json.loads(text))
        entry = Entry(line.name, line.size, line.modified, line.row, tuple(line.captions))
        entries.append(entry)
    features: np.ndarray = np.empty((0, width), np.float32)
    with open_data(features_file) as file:
        if os.fstat(file.fileno()).st_size != 4 * len(entries) * width:
            raise ValueError(f"{features_file.name} is not of {len(entries)} images")
        if entries:
            mapped = np.memmap(file, np.float32, "r", shape=(len(entries), width))
            features = mapped.view(np.ndarray)
    # Of the mapping that a search reads, so that the file is read once.
    for name, data in (entries_file.name, content), (features_file.name, features.data):
        if sums is not None and name in sums and zlib.crc32(data) != sums[name]:
            raise ValueError(f"{name} has another checksum")
    return entries, features
