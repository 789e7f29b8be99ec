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
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from tarfile import HeaderError
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, Self, TypedDict

from annotated_types import Ge

from xfm_fast import __version__
from xfm_fast.encoders import (
    Encoder,
    LibraryEncoder,
    Modality,
    Role,
    XFMEncoder,
    batch_tokens,
    open_encoder,
)
from xfm_fast.errors import DataError, InputError, XFMError, needs
from xfm_fast.io import ahead, make_folder, require_file, storing, write_files
from xfm_fast.loading import Source

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec import AbstractFileSystem

METADATA = b"xfm_fast"
"""Entry of the Parquet file's metadata: JSON of the model and the options."""

_TABLES = {".csv": ",", ".tsv": "\t"}
_FORMATS = (".parquet", *_TABLES, ".jsonl", ".ndjson", ".json", ".tar")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_KEY = "__key__"
# Beginnings of the names of types.
_TYPES: dict[Modality, tuple[str, ...]] = {
    "text": ("string", "large_string", "dictionary<values=string", "null"),
    "image": ("binary", "large_binary", "struct<bytes: "),
}
# Rows of a window.
_ROWS: dict[Modality, int] = {"text": 4096, "image": 256}
# Tokens that an image counts, and a long text of a model without a limit.
_IMAGE_TOKENS, _LONG_TEXT = 256, 512
_BYTES_PER_TOKEN = 4
_READ_BYTES, _CELL_LIMIT = 1 << 20, 1 << 22


@dataclass(frozen=True)
class EmbedOptions:
    """Columns and embeddings.

    Attributes:
        column: Column of the texts or images. [image if the model embeds images and there is one, else
            text; a WebDataset sample has both by its suffixes]
        id: Column of the ids. [the key of a WebDataset sample, else the column id, else the number of the row]
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


class Job(TypedDict):
    """A shard, and the Parquet file of its embeddings."""

    shard: str
    file: str


@dataclass
class ShardReport:
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


def plan(sources: Sequence[str], out: str) -> list[Job]:
    """List shards, each with the Parquet file of its embeddings, in deterministic order.

    Files are named as shards are below the folder that all have in common, such as de/0.csv.parquet.

    Args:
        sources: Files, glob patterns, folders (searched recursively), or .txt files that list such, on
            any file system of fsspec.
        out: Folder of the Parquet files, whose files are not sources.

    Raises:
        DataError: A source names no shard.
    """
    shards = [*dict.fromkeys(chain.from_iterable(_find_shards(name, out) for name in sources))]
    paths = [shard.split("/") for shard in shards]
    depth = len(os.path.commonprefix([path[:-1] for path in paths]))  # noqa: RUF071, of lists
    names = ["/".join(path[depth:]).removesuffix(".parquet") for path in paths]
    files = [f"{out.rstrip('/')}/{name}.parquet" for name in names]
    return [Job(shard=shard, file=file) for shard, file in zip(shards, files, strict=True)]


def _find_shards(source: str, out: str) -> Iterator[str]:
    files, path = _locate(source)
    folder = _locate(out)[1]
    with _reading(source):
        is_file = files.isfile(path)
        if is_file and path.endswith(".txt"):
            text: Any = files.read_text(path)
            for line in text.splitlines():
                yield from _find_shards(line, out) if line.strip() else ()
            return
        names = [path] if is_file else files.expand_path(path, recursive=True)
    top = path.partition("*")[0]
    names = [
        name
        for name in names
        if _suffix(name) in _FORMATS
        and not name.startswith(f"{folder}/")
        and "/." not in f"/{name.removeprefix(top)}"
    ]
    if not names:
        raise DataError(f"{source} names no shard; give files of {', '.join(_FORMATS)}")
    for name in sorted(names):
        yield (
            source if "::" in source else name if _is_local(files) else files.unstrip_protocol(name)
        )


def _suffix(shard: str) -> str:
    """Return the suffix of the format, without that of a compression."""
    stem, suffix = posixpath.splitext(shard)
    suffix = posixpath.splitext(stem)[1] if suffix in _COMPRESSIONS else suffix
    return suffix.lower()


def _locate(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path in it."""
    with needs("embed"):
        from fsspec.core import url_to_fs
    with _reading(url):
        return url_to_fs(url)


def _modality(dtype: pa.DataType) -> Modality | None:
    """Return what the values of a type are."""
    for modality, names in _TYPES.items():
        if str(dtype).startswith(names):
            return modality
    return None


def _is_local(files: AbstractFileSystem) -> bool:
    return "file" in files.protocol


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Convert exceptions of the block, which reads `name`, to a `DataError`."""
    try:
        yield
    except (XFMError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist; check the path") from error
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
) -> ShardReport:
    """Write a Parquet file with the ids, the kept columns and the embeddings of a shard, if it is not there.

    The file appears complete or not at all. Its schema's metadata names the model and the options. A
    row that cannot be embedded has a null.

    Args:
        encoder: A model of embeddings.
        shard: A .parquet, .csv, .tsv, .jsonl or .json (lines) file, or a .tar of WebDataset, compressed or
            not: a path or a URL of fsspec.
        file: Path or URL of the Parquet file.
        options: Columns and embeddings.
        progress: Called with the number of embedded rows after every batch; may raise to stop.

    Raises:
        DataError: The shard cannot be read or lacks a column.
        InputError: The model does not embed such a column, or `file` has other embeddings.
        StorageError: The file cannot be written.
    """
    import numpy as np

    with needs("embed"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    if encoder.use != "embedding":
        raise InputError(f"{encoder.name} is a model of {encoder.use}; give one of embeddings")
    run: Callable[[Any], Any] = encoder.run
    if isinstance(encoder, LibraryEncoder):
        run = partial(encoder.run, normalise=options.normalise)
    elif options.prompt is not None:
        raise InputError(
            f"--prompt {options.prompt!r}: {encoder.name} has no prompts; leave it out"
        )
    for name in {*(options.keep or ())} & {"id", "embedding"}:
        raise InputError(f"--keep {name}: {name} is the name of another column of the output")
    metadata = _metadata(encoder, shard, options)
    rows = _count_rows(file, metadata)
    if rows is not None:
        return ShardReport(shard, file, rows, existed=True)
    report = ShardReport(shard, file)
    field = pa.field("embedding", pa.list_(getattr(pa, options.store)(), encoder.width))

    def write(sink: BinaryIO) -> None:
        writer, count = None, 0
        with ExitStack() as stack:
            windows = stack.enter_context(closing(ahead(_windows(encoder, options, report))))
            for table, batches in windows:
                features = np.zeros((len(table), encoder.width), np.float32)
                is_missing = np.ones(len(table), bool)
                for indices, inputs in batches:
                    features[indices] = run(inputs).numpy()
                    is_missing[indices] = False
                    count += len(indices)
                    progress(count)
                with np.errstate(over="ignore"):
                    values = features.astype(options.store).ravel()
                if not np.isfinite(values).all():
                    raise DataError(
                        f"an embedding of {shard} is not finite in {options.store}; use --store float32 or --dtype fp32"
                    )
                mask = pa.array(is_missing)
                array = pa.FixedSizeListArray.from_arrays(values, type=field.type, mask=mask)
                if writer is None:
                    schema = table.schema.append(field)
                    schema = schema.with_metadata({METADATA: json.dumps(metadata)})
                    names: Any = table.column_names
                    writer = pq.ParquetWriter(
                        sink, schema, use_dictionary=names, write_statistics=names
                    )
                    stack.enter_context(writer)
                writer.write_table(table.append_column(field, array))

    _write(file, write)
    return report


def _metadata(encoder: Encoder, shard: str, options: EmbedOptions) -> dict[str, Any]:
    files, path = _locate(shard)
    with _reading(shard):
        values = {"shard": posixpath.basename(path), "bytes": files.size(path)}
    modules = encoder.model if isinstance(encoder, LibraryEncoder) else ()
    normalises = not modules or "Normalize" in {type(module).__name__ for module in modules}
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
        sink: Any
        with files.open(path, "wb") as sink:
            writer(sink)


def _windows(
    encoder: Encoder, options: EmbedOptions, report: ShardReport
) -> Iterator[tuple[pa.Table, list[tuple[list[int], Any]]]]:
    """Yield the columns to write of some rows, and batches of their indices and inputs."""
    import pyarrow as pa

    with _reading(report.shard), ThreadPoolExecutor() as threads:
        for chunk, content, id in _read(report.shard, encoder, options):
            array, keep = chunk[content], options.keep
            is_text = _modality(array.type) == "text"
            if keep is None:
                keep = (content,) if is_text else ()
            rows = range(report.rows, report.rows + len(chunk))
            ids = pa.array(rows, pa.int64()) if id is None else chunk[id]
            table = pa.table([ids, *(chunk[name] for name in keep)], ["id", *keep])
            if pa.types.is_struct(array.type):
                array = array.field("bytes")
            mapper = map if is_text else threads.map
            yield table, [*_batches(array.to_pylist(), mapper, encoder, options, report)]
            report.rows += len(chunk)


def _batches(
    contents: Sequence[str | bytes | None],
    mapper: Callable[..., Iterator[Any]],
    encoder: Encoder,
    options: EmbedOptions,
    report: ShardReport,
) -> Iterator[tuple[list[int], Any]]:
    """Yield the indices and the inputs of batches, the longest texts first."""
    longest = encoder.max_tokens or _LONG_TEXT
    costs = [_IMAGE_TOKENS] * len(contents)
    for index, content in enumerate(contents):
        if isinstance(content, str):
            costs[index] = min(2 + len(content.encode()) // _BYTES_PER_TOKEN, longest)
    queue = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)
    limit = options.batch_tokens or batch_tokens(encoder.device)
    prompt = {} if options.prompt is None else {"prompt": options.prompt}
    decode = partial(_decode, encoder)
    while queue:
        size = max(1, limit // costs[queue[0]])
        batch, queue = queue[:size], queue[size:]
        items = {}
        results = mapper(decode, [contents[index] for index in batch])
        for index, item in zip(batch, results, strict=True):
            if isinstance(item, DataError):
                report.missing += 1
                reason = f"row {report.rows + index} of {report.shard}: {item}"
                report.reason = report.reason or reason
            else:
                items[index] = item
        if items:
            yield [*items], encoder.prepare([*items.values()], options.role, **prompt)


def _decode(encoder: Encoder, content: str | bytes | None) -> Any:
    """Return a text, a decoded image, or the `DataError` of a broken one."""
    from xfm_fast.data.images import decode_image

    try:
        if not content or content.isspace():
            raise DataError("it is empty or broken")
        if isinstance(content, bytes):
            return decode_image(content)
        if isinstance(encoder, XFMEncoder):
            # Nothing may be left of a text after cleaning.
            encoder.prepare([content])
        return content
    except DataError as error:
        return error


def _read(
    shard: str, encoder: Encoder, options: EmbedOptions
) -> Iterator[tuple[pa.RecordBatch, str, str | None]]:
    """Yield windows of rows, at least one, and the names of the columns of contents and ids."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    content, id = "", options.id

    def select(names: Sequence[str]) -> list[str]:
        nonlocal content, id
        default = (name for name in reversed(encoder.modalities) if name in names)
        content = options.column or next(default, "text")
        id = id or next((name for name in (_KEY, "id") if name in names), None)
        columns = {content, *(options.keep or ()), id or content}
        if absent := ", ".join(sorted(columns - {*names})):
            existing = ", ".join(names) or "none, since it has no rows"
            raise DataError(f"{shard} has no column {absent}, but {existing}")
        return [*columns]

    def check(schema: pa.Schema) -> Modality:
        dtype = schema.field(content).type
        modality = _modality(dtype)
        if modality is None or modality not in encoder.modalities:
            raise InputError(
                f"column {content!r} of {shard} holds {dtype}, and {encoder.name} embeds "
                f"{' and '.join(encoder.modalities)}; name another with --column"
            )
        return modality

    suffix, (files, path) = _suffix(shard), _locate(shard)
    if _is_local(files):
        require_file(path)
    with fsspec.open(shard, compression=None if suffix == ".tar" else "infer") as file:
        if suffix == ".parquet":
            # Read by page: a row group may be larger than the memory.
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_READ_BYTES)
            schema = parquet.schema_arrow
            columns = select(schema.names)
            chunks = parquet.iter_batches(_ROWS[check(schema)], columns=columns)
            if not parquet.metadata.num_rows:
                chunks = [pa.RecordBatch.from_pylist([], schema)]
            for chunk in chunks:
                yield chunk, content, id
            return
        records = _records(file, suffix)
        size = _ROWS["image" if suffix == ".tar" else "text"]
        columns = dtype = None
        while (window := [*islice(records, size)]) or columns is None:
            columns = columns or select([*dict.fromkeys(chain(*window))])
            rows = [{name: record.get(name) for name in columns} for record in window]
            array = pa.array(rows, dtype)
            dtype, chunk = array.type, pa.RecordBatch.from_struct_array(array)
            check(chunk.schema)
            yield chunk, content, id


def _records(file: Any, suffix: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table, of line JSON or of a WebDataset archive; broken ones are empty."""
    from xfm_fast.data.records import MOST_LINE_BYTES, parse_object, sample_record, split_name

    def parse(parser: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        try:
            return parser(*args)
        except DataError:
            return {}

    if suffix in _TABLES:
        csv.field_size_limit(_CELL_LIMIT)
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        for record in csv.DictReader(text, delimiter=_TABLES[suffix], strict=True):
            yield {} if None in record else record
    elif suffix == ".tar":
        archive: Any = tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member)  # noqa: SIM115
        members = (
            (*name, archive.extractfile(member).read())
            for member in iter(archive.next, None)
            if member.isreg() and (name := split_name(member.name))
        )
        for key, group in groupby(members, itemgetter(0)):
            contents = {suffix: content for _, suffix, content in group}
            # The library would keep a list of all members.
            archive.members.clear()
            yield parse(sample_record, contents, "image", "text") | {_KEY: key}
    else:
        for line in iter(partial(file.readline, MOST_LINE_BYTES), b""):
            if line.strip():
                yield parse(parse_object, line, "the line")


class _Member(tarfile.TarInfo):
    """A member whose damaged header is not taken for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ in ("InvalidHeaderError", "TruncatedHeaderError"):
                raise OSError(f"member at byte {tarfile.offset:,}: {error}") from None
            raise
