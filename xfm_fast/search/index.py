"""The image index: features in a memory-mapped file, computed only for new and changed images, and their model.

The processes of a build compute whole batches in turn, so that features do not depend on their number, and write parts,
so that a killed run resumes. At the end the first one merges them with the valid rows of the old index, in the order of
the collection, and replaces index.json. Images stay where they are: a search reads its few candidates
again, since the embeddings of all patches would take 600 KB an image, features take 1 KB.
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
# A killed run loses the features of at most this many images.
_PART = 256
# Threads that decode images, and batches that they decode while the model computes.
_THREADS, _PREFETCH = 8, 3
_OUR_FILES = re.compile(
    r"(part-\d+(-[0-9a-f]{32})?|features|images|graph)-[0-9a-f]{12}\.(f32|jsonl|usearch)"
)
# Counts changes of the image transform, which change features too.
_TRANSFORM_VERSION = 2
_FEATURE_WEIGHTS = ("vision_encoder.", "vision_proj.", "text_encoder.roberta.", "text_proj.")
# What reading a damaged file raises.
_DAMAGE = (OSError, ValueError, RecursionError)

Row = tuple[Entry, np.ndarray]
"""An image with its feature."""


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
        return (
            self.model.processor.tokenizer
            if isinstance(self.model, Session)
            else self.model.tokenizer
        )


def open_model(source: str | Path | Source) -> SearchModel:
    """Load a model with a contrastive head; features of another dtype are close enough to search the same index.

    Args:
        source: a run, a folder, a Hub name, an official checkpoint file or an export, for the CPU; or the options of
            the model.
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
    # The collection; see `open_collection`.
    path: Path
    images: Path | None
    # Pictures are read below this folder; None for an index that may come from anybody, which shows none.
    root: Path | None = None

    @cached_property
    def collection(self) -> Collection:
        """The indexed collection; raises `DataError` where only the index names it."""
        if self.root is None:
            raise DataError(
                f"{self.folder} is an index of {self.path}; name that, with the index as --index"
            )
        return open_collection(self.path, self.images)

    def load(self, entry: Entry) -> Image.Image:
        """The picture of an entry; raises `DataError` where it is broken or lies outside `root`."""
        place = os.path.abspath(self.collection.location(entry))
        if entry.row is None and not Path(place).is_relative_to(os.path.abspath(self.root or "")):
            raise DataError(
                f"{place} lies outside {self.root}; name the folder of the images as --images"
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
    """Counts of an indexing run; `interrupted` by a signal, the same call resumes."""

    folder: Path
    images: int = 0
    added: int = 0
    removed: int = 0
    faults: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False


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
        path: the indexed collection; or the folder of an index, which then shows no pictures.
        folder: of the index; by default in or next to `path`.
        images: folder of the images, where a file lists their paths; by default that of the file.

    Raises:
        DataError: there is no index, or it is damaged or of another version.
    """
    given = Path(path).expanduser()
    pictures = None if images is None else Path(images).expanduser()
    alone = folder is None and (given / INDEX_FILE).is_file()
    place = given if alone else index_folder(given) if folder is None else Path(folder).expanduser()
    if not (place / INDEX_FILE).is_file():
        if not given.exists():
            raise DataError(
                f"{path} does not exist; name an indexed collection, or the folder of an index"
            )
        raise DataError(f"{path} has no index; make one: xfm-fast index {path}")
    index = _read_index(place)
    if alone:
        return index
    root = pictures or (given if given.is_dir() else given.parent)
    return replace(index, path=given, images=pictures or index.images, root=root)


def _checked_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds a NUL")
    return text


def _checked_name(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("it is no file of this folder")
    return name


Text = Annotated[str, AfterValidator(_checked_text)]
FileName = Annotated[str, AfterValidator(_checked_name)]


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
    """`index.json`; sums are CRC-32 of the files, absent in older indexes."""

    format: Literal[2]
    images: int
    width: Annotated[int, Ge(1), Lt(1 << 20)]
    entries: FileName
    features: FileName
    path: Text
    picture_folder: Text | None
    model: _Weights
    fingerprint: str
    sums: dict[str, int] = {}


def _read_index(folder: Path) -> SearchIndex:
    try:
        # Names of images may hold bytes that are no UTF-8, which `parse_json` refuses.
        header = _Header.model_validate(
            json.loads(read_bytes(folder / INDEX_FILE, MOST_JSON_BYTES))
        )
        entries, features = _read_rows(
            folder / header.entries, folder / header.features, header.width, header.sums
        )
        if len(entries) != header.images:
            raise ValueError(f"{len(entries)} entries for {header.images} images")
    except _DAMAGE as error:
        words = " ".join(str(error).split())
        if isinstance(error, ValidationError):
            reason = error.errors()[0]
            words = f"{'.'.join(map(str, reason['loc']))}: {advice(reason)}"
        raise DataError(
            f"the index {folder} is damaged ({words[:200]}); delete it and index again"
        ) from None
    weights, tokenizer = header.model.weights, header.model.tokenizer
    source = Source(
        weights,
        None if weights else header.model.size,
        tokenizer=Path(tokenizer) if tokenizer else None,
    )
    path = Path(os.path.normpath(folder / header.path))
    images = header.picture_folder and Path(os.path.normpath(folder / header.picture_folder))
    return SearchIndex(folder, entries, features, source, header.fingerprint, path, images or None)


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
    """Make or update the index of a collection; images of the same size and modification time are not read again.

    Images that cannot be read are listed. Several processes share the work, and all must see the folder; collective.

    Args:
        path, images: the collection; see `open_collection`.
        model: see `open_model`.
        folder: of the index; by default `index_folder(path)`.
        batch_size: images that are computed together.
        processes: see `join_processes`; by default this process alone.
        progress: called with the numbers of images done and to do.
        stop: once it is set, the call returns, and another call resumes.

    Raises:
        DataError: there are no images, no image can be read, or the index is of another model or version.
        StorageError: the index cannot be written, or another process is writing it.
    """
    processes = processes or Processes()
    target = index_folder(path) if folder is None else Path(folder).expanduser()
    place, pictures = Path(path).expanduser(), None if images is None else Path(images).expanduser()
    collection = processes.together(lambda: open_collection(place, pictures))
    # Of the first process only.
    entries, faults, old = list[Entry](), dict[str, str](), None

    with ExitStack() as stack:

        def begin() -> list[Entry]:
            nonlocal entries, faults, old
            stack.enter_context(hold(target / ".lock", f"the index {target} (--index)"))
            entries, faults = collection.listing()
            old = open_index(target) if (target / INDEX_FILE).exists() else None
            if old is not None:
                old.check(model)
                if old.path.resolve() != place.resolve():
                    raise DataError(
                        f"{target} is the index of {old.path}, this is {place}; name another --index"
                    )
            rows = _stored_rows(target, model, old)
            return [entry for entry in entries if entry.version not in rows]

        def work() -> dict[str, str]:
            part, broken = list[Row](), dict[str, str]()

            def write_part() -> None:
                if part:
                    name = f"part-{processes.rank}-{model.fingerprint}-{secrets.token_hex(6)}"
                    _write_rows(target / f"{name}.jsonl", target / f"{name}.f32", part)
                    part.clear()

            share = [*batches(todo, batch_size)][processes.rank :: processes.world_size]
            try:
                for number, (entry, result) in enumerate(
                    _embed(collection, share, model.model), start=1
                ):
                    if isinstance(result, str):
                        broken[entry.name] = result
                    else:
                        part.append((entry, result))
                    if len(part) >= _PART:
                        write_part()
                    progress(min(number * processes.world_size, len(todo)), len(todo))
                    if stop is not None and stop.is_set():
                        break
            finally:
                write_part()
            return broken

        def finish() -> IndexReport:
            rows, good = _stored_rows(target, model, old), list[Row]()
            for entry in entries:
                if entry.version in rows:
                    known, feature = rows[entry.version]
                    # Captions of rows in a file are known once the row is read.
                    good.append((entry if entry.row is None else known, feature))
            if not good:
                name, reason = next(iter(faults.items()))
                raise DataError(
                    f"none of {len(entries)} images can be read, such as {name}: {reason}"
                )
            if old is None or old.entries != [entry for entry, _ in good]:
                _write_index(target, model, good, place, pictures)
            _remove_old_files(target)
            names, new = {entry.name for entry in entries}, {entry.version for entry in todo}
            removed = 0 if old is None else sum(entry.name not in names for entry in old.entries)
            return IndexReport(
                target, len(good), sum(entry.version in new for entry, _ in good), removed, faults
            )

        todo = processes.from_first(begin)
        for broken in processes.gather(processes.together(work)):
            faults |= broken
        if processes.any(stop is not None and stop.is_set()):
            return IndexReport(target, interrupted=True)
        return processes.from_first(finish)


def _embed(
    collection: Collection, work: Sequence[Sequence[Entry]], model: XFM | Session
) -> Iterator[tuple[Entry, np.ndarray | str]]:
    """Features of images, in order; threads decode ahead."""
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
            pixels = [found for _, found in loaded if isinstance(found, Tensor)]
            features: Iterator[np.ndarray] = iter(())
            if pixels:
                with torch.no_grad():
                    embeds = model.encode_image(torch.stack(pixels).to(model.device))
                    features = iter(model.project_image(embeds).float().cpu().numpy())
            yield from (
                (entry, found if isinstance(found, str) else next(features))
                for entry, found in loaded
            )


def _stored_rows(folder: Path, model: SearchModel, old: SearchIndex | None) -> dict[Any, Row]:
    """Rows by version of the old index and of the parts by this model; a damaged part is computed again."""
    rows: list[Row] = [] if old is None else [*zip(old.entries, old.features, strict=True)]
    for path in sorted(folder.glob(f"part-*-{model.fingerprint}-*.jsonl")):
        with suppress(*_DAMAGE):
            rows += zip(
                *_read_rows(path, path.with_suffix(".f32"), model.model.config.embed_dim),
                strict=True,
            )
    return {row[0].version: row for row in rows}


def _write_index(
    folder: Path, model: SearchModel, rows: Sequence[Row], path: Path, images: Path | None
) -> None:
    token, source = secrets.token_hex(6), model.source
    files = {"features": f"features-{token}.f32", "entries": f"images-{token}.jsonl"}
    weights, tokenizer = (
        str(local.resolve())
        if name is not None and (local := Path(name).expanduser()).exists()
        else name
        for name in (source.model, source.tokenizer and str(source.tokenizer))
    )
    # Relative, so that a folder moves with its index.
    places = [
        place and os.path.relpath(place.resolve(), folder.resolve()) for place in (path, images)
    ]
    header = {
        "format": 2, "images": len(rows), "width": model.model.config.embed_dim, **files,
        "path": places[0], "picture_folder": places[1], "fingerprint": model.fingerprint,
        "model": {"weights": weights, "tokenizer": tokenizer, "size": source.random or "tiny"},
        "sums": _write_rows(folder / files["entries"], folder / files["features"], rows),
    }  # fmt: skip
    write_bytes({folder / INDEX_FILE: (json.dumps(header, indent=1) + "\n").encode()})


def _remove_old_files(folder: Path) -> None:
    """Remove parts, the former index, and what a run left that was killed after its last rename."""
    current = json.loads(read_bytes(folder / INDEX_FILE, MOST_JSON_BYTES))
    for path in folder.iterdir():
        if _OUR_FILES.fullmatch(path.name) and path.name not in (
            current["entries"],
            current["features"],
        ):
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

    # ASCII, since names need not be Unicode, and some characters of captions end a line.
    lines = "".join(json.dumps(asdict(entry)) + "\n" for entry, _ in rows).encode()
    # In this order: where the entries are, the features are.
    write_files({features_file: write_features, entries_file: lambda file: file.write(lines)})
    return {entries_file.name: zlib.crc32(lines), features_file.name: crc}


def _read_rows(
    entries_file: Path, features_file: Path, width: int, sums: Mapping[str, int] | None = None
) -> tuple[list[Entry], np.ndarray]:
    """Entries and their features; the checksums are of the returned content."""
    content = read_bytes(entries_file, entries_file.stat().st_size)
    lines = [_Line.model_validate(json.loads(text)) for text in content.decode().splitlines()]
    entries = [
        Entry(line.name, line.size, line.modified, line.row, tuple(line.captions)) for line in lines
    ]
    features: np.ndarray = np.empty((0, width), np.float32)
    with open_data(features_file) as file:
        if os.fstat(file.fileno()).st_size != 4 * len(entries) * width:
            raise ValueError(f"{features_file.name} is not of {len(entries)} images")
        if entries:
            features = np.memmap(file, np.float32, "r", shape=(len(entries), width)).view(
                np.ndarray
            )
    # Over the mapping that a search reads, so that the file is read once.
    for name, data in (entries_file.name, content), (features_file.name, features.data):
        if sums and name in sums and zlib.crc32(data) != sums[name]:
            raise ValueError(f"{name} has another checksum")
    return entries, features
