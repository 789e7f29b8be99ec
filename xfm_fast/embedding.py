"""`embed_shard`: a pure map from a shard of texts or images to a Parquet file of their embeddings.

A shard is read in windows of rows. Within a window, texts of similar length form batches of a
number of tokens; a thread reads, decodes and tokenises the next window while the model computes.
Batches never cross shards, so a file does not depend on the processes that share the work.
PyTorch, pyarrow and fsspec are imported when they are used.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from tarfile import InvalidHeaderError, TruncatedHeaderError
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, Self, TypeVar

import numpy as np
from annotated_types import Ge

from xfm_fast import __version__
from xfm_fast.encoders import Encoder, LibraryEncoder, Modality, Role, XFMEncoder, open_encoder
from xfm_fast.errors import DataError, InputError, UnavailableError, XFMError, needs
from xfm_fast.io import make_folder, require_file, storing, write_files
from xfm_fast.loading import Source

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec import AbstractFileSystem

T = TypeVar("T")

METADATA = b"xfm_fast"
"""Entry of the Parquet file's metadata: JSON of the model and the options."""

_TABLES = {".csv": ",", ".tsv": "\t"}
_FORMATS = (".parquet", *_TABLES, ".jsonl", ".ndjson", ".json", ".tar", ".tgz")
_KEY = "__key__"
# Beginnings of the names of types.
_TYPES: dict[Modality, tuple[str, ...]] = {
    "text": ("string", "large_string", "dictionary<values=string", "null"),
    "image": ("binary", "large_binary", "struct<bytes: "),
}
# Rows of a window of texts and of one of images.
_TEXT_ROWS, _IMAGE_ROWS = 4096, 256
# Tokens of a batch on a CPU and on a GPU, and what an image and a long text count.
_CPU_TOKENS, _GPU_TOKENS, _IMAGE_TOKENS, _LONG_TEXT = 4096, 65536, 256, 512
_BYTES_PER_TOKEN = 4
_READ_BYTES, _CELL_LIMIT = 1 << 20, 1 << 22


@dataclass(frozen=True)
class EmbedOptions:
    """Columns and embeddings.

    Attributes:
        column: Column of the texts or images. [image if the model embeds images and there is one, else
            text; a WebDataset sample has both by its suffixes]
        id: Column of the ids. [the key of a WebDataset sample, else the number of the row]
        keep: Columns to copy. [the texts]
        role: What texts are to a search, which selects the model's prompt.
        prompt: Words before each text, in place of the model's prompt.
        normalise: Divide embeddings by their L2 norms.
        store: Type of the stored numbers.
        batch_tokens: Tokens of a batch. [4096 on a CPU, 65536 on a GPU]
    """

    column: str | None = None
    id: str | None = None
    keep: tuple[str, ...] | None = None
    role: Role | None = None
    prompt: str | None = None
    normalise: bool = False
    store: Literal["float16", "float32"] = "float16"
    batch_tokens: Annotated[int | None, Ge(1)] = None


@dataclass
class Report:
    """A written file; `missing` rows have no embedding, the first of them for `reason`."""

    shard: str
    file: str
    rows: int = 0
    missing: int = 0
    reason: str = ""
    existed: bool = False


class EmbedShard:
    """Embed batches of shards, as a callable class for Ray Data.

    `ray.data.from_items(plan(sources, out)).map_batches(EmbedShard, fn_constructor_args=[model])`
    with one actor for each device.

    Args:
        model: The model, as `open_encoder` takes it.
        options: Fields of `EmbedOptions`.
    """

    def __init__(self, model: str | Source, **options: Any) -> None:
        self.encoder = open_encoder(model)
        self.options = EmbedOptions(**options)

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Return the reports of shards, by column."""
        shards = zip(map(str, batch["shard"]), map(str, batch["file"]), strict=True)
        reports = [vars(embed_shard(self.encoder, *shard, self.options)) for shard in shards]
        return {name: [report[name] for report in reports] for name in reports[0]}


def plan(sources: Sequence[str], out: str) -> list[dict[str, str]]:
    """List shards, each with the Parquet file of its embeddings, in deterministic order.

    Files are named as shards are, below the folder that all have in common.

    Args:
        sources: Files, glob patterns, folders (searched recursively), or .txt files that list such, on
            any file system of fsspec.
        out: Folder of the Parquet files, whose files are not sources.

    Raises:
        DataError: A source names no shard, or two shards differ by their suffix only.
    """
    shards = [*dict.fromkeys(chain.from_iterable(_find_shards(name, out) for name in sources))]
    paths = [shard.split("/") for shard in shards]
    depth = len(os.path.commonprefix([path[:-1] for path in paths]))  # noqa: RUF071, of lists
    files: dict[str, str] = {}
    for shard, path in zip(shards, paths, strict=True):
        name = "/".join([*path[depth:-1], _split_format(shard)[0]])
        file = f"{out.rstrip('/')}/{name}.parquet"
        if file in files:
            raise DataError(f"{shard} and {files[file]} have one name; embed them to two folders")
        files[file] = shard
    return [{"shard": shard, "file": file} for file, shard in files.items()]


def _find_shards(source: str, out: str) -> Iterator[str]:
    files, path = _locate(source)
    folder = _locate(out)[1]
    with _reading(source):
        is_file = files.isfile(path)
        if is_file and path.endswith(".txt"):
            for line in files.cat_file(path).decode().splitlines():
                yield from _find_shards(line, out) if line.strip() else ()
            return
        names = [path] if is_file else files.expand_path(path, recursive=True)
    names = [
        name
        for name in names
        if _split_format(name)[1] in _FORMATS
        and not name.startswith(f"{folder}/")
        and not posixpath.basename(name).startswith(".")
    ]
    if not names:
        raise DataError(f"{source} names no shard; give files of {', '.join(_FORMATS)}")
    for name in sorted(names):
        yield (
            source if "::" in source else name if _is_local(files) else files.unstrip_protocol(name)
        )


def _split_format(shard: str) -> tuple[str, str]:
    """Return the name of a shard, without its folder, and the suffix of its format."""
    stem, suffix = posixpath.splitext(posixpath.basename(shard))
    if suffix in (".gz", ".bz2", ".xz", ".zst"):
        stem, suffix = posixpath.splitext(stem)
    return stem, suffix


def _locate(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path in it."""
    with needs("embed"):
        from fsspec.core import url_to_fs
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UnavailableError(
            f"{url} cannot be opened ({error}); install the package of its file system"
        ) from error


def _is_local(files: AbstractFileSystem) -> bool:
    return "file" in files.protocol


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Convert exceptions of the block, which reads `name`, to a `DataError`."""
    try:
        yield
    except (XFMError, MemoryError):
        raise
    except Exception as error:  # the libraries raise anything for a foreign file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{name} cannot be read ({reason}); check it, or write it again") from error


def embed_shard(
    encoder: Encoder,
    shard: str,
    file: str,
    options: EmbedOptions = EmbedOptions(),
    *,
    progress: Callable[[int], object] = lambda rows: None,
) -> Report:
    """Write a Parquet file with the ids, the kept columns and the embeddings of a shard, if it is not there.

    The file appears complete or not at all. Its schema's metadata names the model and the options. A
    row that cannot be embedded has a null.

    Args:
        encoder: A model of embeddings.
        shard: A .parquet, .csv, .tsv, .jsonl or .json (lines) file, or a .tar of WebDataset, compressed or
            not: a path or a URL of fsspec.
        file: Path or URL of the Parquet file.
        options: Columns and embeddings.
        progress: Called with the number of rows after every batch; may raise to stop.

    Raises:
        DataError: The shard cannot be read or lacks a column.
        InputError: The model does not embed such a column, or `file` has other embeddings.
        StorageError: The file cannot be written.
    """
    with needs("embed"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    if encoder.use != "embedding":
        raise InputError(f"{encoder.name} is a model of {encoder.use}; give one of embeddings")
    run, is_library = encoder.run, isinstance(encoder, LibraryEncoder)
    if options.prompt is not None and not is_library:
        raise InputError(
            f"--prompt {options.prompt!r}: {encoder.name} has no prompts; leave it out"
        )
    for name in {*(options.keep or ())} & {"id", "embedding"}:
        raise InputError(f"--keep {name}: {name} is the name of another column of the output")
    if options.normalise and is_library:
        run = partial(encoder.run, normalise=True)
    metadata = _metadata(encoder, shard, options)
    rows = _count_rows(file, metadata)
    if rows is not None:
        return Report(shard, file, rows, existed=True)
    report = Report(shard, file)
    field = pa.field("embedding", pa.list_(getattr(pa, options.store)(), encoder.width))

    def write(sink: BinaryIO) -> None:
        windows = _ahead(_windows(encoder, options, report))
        first = next(windows)
        columns = first[0].schema
        schema = columns.append(field).with_metadata({METADATA: json.dumps(metadata)})
        settings: Any = {"use_dictionary": columns.names, "write_statistics": columns.names}
        with pq.ParquetWriter(sink, schema, **settings) as writer:
            for table, batches in chain([first], windows):
                features = np.zeros((len(table), encoder.width), np.float32)
                is_missing = np.ones(len(table), bool)
                for indices, inputs in batches:
                    features[indices] = run(inputs).numpy()
                    is_missing[indices] = False
                    progress(len(indices))
                with np.errstate(over="ignore"):
                    values = features.astype(options.store)
                if not np.isfinite(values).all():
                    raise DataError(
                        f"an embedding of {shard} is not finite in {options.store}; use --store float32 or --dtype fp32"
                    )
                array = pa.FixedSizeListArray.from_arrays(
                    values.ravel(), type=field.type, mask=pa.array(is_missing)
                )
                writer.write_table(table.append_column(field, array))

    _write(file, write)
    return report


def _metadata(encoder: Encoder, shard: str, options: EmbedOptions) -> dict[str, Any]:
    files, path = _locate(shard)
    with _reading(shard):
        values = {"shard": posixpath.basename(path), "bytes": files.size(path)}
    modules = {type(module).__name__ for module in getattr(encoder.model, "children", list)()}
    normalises = isinstance(encoder, XFMEncoder) or "Normalize" in modules
    values |= asdict(options) | {"normalise": options.normalise or normalises}
    values |= {"version": __version__, "model": encoder.name, "fingerprint": encoder.fingerprint}
    return json.loads(json.dumps(values | {"dtype": encoder.source.dtype or "fp32"}))


def _count_rows(file: str, metadata: Mapping[str, Any]) -> int | None:
    """Count the rows of a finished file, None if there is none; one of other embeddings raises `InputError`."""
    import pyarrow.parquet as pq

    files, path = _locate(file)
    if not files.exists(path):
        return None
    written, rows = {}, 0
    with suppress(OSError, ValueError, LookupError), files.open(path, "rb") as stream:
        header = pq.read_metadata(stream)
        written, rows = json.loads(header.metadata[METADATA]), header.num_rows
    for name, value in metadata.items():
        if written.get(name) != value and name not in ("version", "model", "batch_tokens"):
            raise InputError(
                f"{file} holds other data ({name} {written.get(name)!r} instead of {value!r}); remove it, or choose "
                "another --out"
            )
    return rows


def _write(file: str, writer: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically to a local disk or an object store."""
    files, path = _locate(file)
    if _is_local(files):
        make_folder(Path(path).parent)
        write_files({Path(path): writer})
        return
    # Within a transaction, an upload is completed only if the block succeeds.
    with storing(file, "check the address and your rights"), files.transaction:
        files.makedirs(posixpath.dirname(path), exist_ok=True)
        with files.open(path, "wb") as sink:
            writer(sink)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items of an iterator, each computed by a thread while the previous one is used."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item


def _windows(
    encoder: Encoder, options: EmbedOptions, report: Report
) -> Iterator[tuple[pa.Table, list[tuple[list[int], Any]]]]:
    """Yield the columns to write of some rows, and batches of their indices and inputs."""
    import pyarrow as pa

    from xfm_fast.data.images import decode_image

    shard, prompt = report.shard, {} if options.prompt is None else {"prompt": options.prompt}
    with _reading(shard), ThreadPoolExecutor(os.cpu_count()) as threads:
        columns = _Columns(encoder, options, shard)
        for chunk in _read(shard, columns):
            contents, is_image = chunk[columns.content], columns.is_image(chunk.schema)
            if pa.types.is_struct(contents.type):
                contents = contents.field("bytes")
            contents = contents.to_pylist()

            def load(
                indices: Sequence[int], contents: Any = contents, is_image: bool = is_image
            ) -> Any:
                items = [contents[index] for index in indices]
                if is_image:
                    items = [*threads.map(decode_image, items)]
                return encoder.prepare(items, options.role, **prompt)

            rows = range(report.rows, report.rows + len(chunk))
            ids = pa.array(rows, pa.int64()) if columns.id is None else chunk[columns.id]
            keep = options.keep
            if keep is None:
                keep = () if is_image else (columns.content,)
            table = pa.table([ids, *(chunk[name] for name in keep)], ["id", *keep])
            yield table, [*_batches(encoder, options, report, contents, load)]
            report.rows += len(chunk)


def _batches(
    encoder: Encoder,
    options: EmbedOptions,
    report: Report,
    contents: Sequence[Any],
    load: Callable[[Sequence[int]], Any],
) -> Iterator[tuple[list[int], Any]]:
    """Yield the indices and the inputs of batches, the longest texts first."""

    def miss(index: int, reason: object) -> None:
        report.missing += 1
        report.reason = report.reason or f"row {report.rows + index} of {report.shard}: {reason}"

    limit = _CPU_TOKENS if encoder.device.type == "cpu" else _GPU_TOKENS
    longest = getattr(encoder, "max_tokens", None) or _LONG_TEXT
    costs = {}
    for index, content in enumerate(contents):
        if not content or content.isspace():
            miss(index, "it is empty or broken")
        elif isinstance(content, str):
            costs[index] = min(2 + len(content.encode()) // _BYTES_PER_TOKEN, longest)
        else:
            costs[index] = _IMAGE_TOKENS
    queue = sorted(costs, key=costs.__getitem__, reverse=True)
    while queue:
        size = max(1, (options.batch_tokens or limit) // costs[queue[0]])
        batch, queue = queue[:size], queue[size:]
        try:
            yield batch, load(batch)
            continue
        except DataError:
            usable = []
        for index in batch:
            try:
                load([index])
                usable.append(index)
            except DataError as error:
                miss(index, error)
        if usable:
            yield usable, load(usable)


class _Columns:
    """The columns of a shard that are read."""

    def __init__(self, encoder: Encoder, options: EmbedOptions, shard: str) -> None:
        self.encoder, self.options, self.shard = encoder, options, shard
        self.content, self.id = "", options.id

    def select(self, names: Sequence[str]) -> list[str]:
        """Choose the columns of contents and ids; returns all columns to read."""
        if not names:
            raise DataError(f"{self.shard} holds no rows; write it again, or leave it out")
        default = (name for name in reversed(self.encoder.modalities) if name in names)
        self.content = self.options.column or next(default, "text")
        if _KEY in names:
            self.id = self.id or _KEY
        columns = {self.content, *(self.options.keep or ()), self.id or self.content}
        if columns - {*names}:
            absent = ", ".join(sorted(columns - {*names}))
            raise DataError(f"{self.shard} has no column {absent}, but {', '.join(names)}")
        return [*columns]

    def is_image(self, schema: pa.Schema) -> bool:
        """Return whether contents are images, not texts; raises `InputError` for values of another type."""
        dtype, modalities = str(schema.field(self.content).type), self.encoder.modalities
        for modality in modalities:
            if dtype.startswith(_TYPES[modality]):
                return modality == "image"
        raise InputError(
            f"column {self.content!r} of {self.shard} holds {dtype}, and {self.encoder.name} embeds "
            f"{' and '.join(modalities)}; name another with --column"
        )


def _read(shard: str, columns: _Columns) -> Iterator[pa.RecordBatch]:
    """Yield the columns of windows, at least one."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    suffix, (files, path) = _split_format(shard)[1], _locate(shard)
    is_archive = suffix in (".tar", ".tgz")
    if _is_local(files):
        require_file(path)
    with fsspec.open(shard, compression=None if is_archive else "infer") as file:
        if suffix == ".parquet":
            # Read by page: a row group may be larger than the memory.
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_READ_BYTES)
            schema = parquet.schema_arrow
            names = columns.select(schema.names)
            size = _IMAGE_ROWS if columns.is_image(schema) else _TEXT_ROWS
            yield from parquet.iter_batches(size, columns=names)
            if not parquet.metadata.num_rows:
                yield pa.RecordBatch.from_pylist([], schema)
            return
        records = _records(file, suffix)
        size = _IMAGE_ROWS if is_archive else _TEXT_ROWS
        names = dtype = None
        while (window := [*islice(records, size)]) or names is None:
            names = names or columns.select([*dict.fromkeys(chain(*window))])
            rows = [{name: record.get(name) for name in names} for record in window]
            array = pa.array(rows, dtype)
            dtype = array.type
            yield pa.RecordBatch.from_struct_array(array)


def _records(file: Any, suffix: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table, of line JSON or of a WebDataset archive; broken ones are empty."""
    from xfm_fast.data.records import MOST_LINE_BYTES, parse_object, sample_record

    def parse(parser: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        try:
            return parser(*args)
        except DataError:
            return {}

    if suffix in _TABLES:
        csv.field_size_limit(_CELL_LIMIT)
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        for record in csv.DictReader(text, delimiter=_TABLES[suffix]):
            yield {} if None in record else record
    elif suffix in (".tar", ".tgz"):
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as archive:
            for key, group in groupby(_members(archive), itemgetter(0)):
                contents = {suffix: content for _, suffix, content in group}
                yield parse(sample_record, contents, "image", "text") | {_KEY: key}
    else:
        for line in iter(partial(file.readline, MOST_LINE_BYTES), b""):
            if line.strip():
                yield parse(parse_object, line, "the line")


def _members(archive: Any) -> Iterator[tuple[str, str, bytes]]:
    """Yield the key, the suffix and the content of the files of an archive."""
    from xfm_fast.data.records import split_name

    while member := archive.next():
        # The library would keep a list of all members.
        archive.members.clear()
        if member.isreg() and (name := split_name(member.name)):
            yield *name, archive.extractfile(member).read()


class _Member(tarfile.TarInfo):
    """A member whose damaged header is not taken for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except (InvalidHeaderError, TruncatedHeaderError) as error:
            raise OSError(f"member at byte {tarfile.offset:,}: {error}") from None
