"""`manifest.json`: the files of an export, their origin, and the comparison with the model.

Loading a manifest checks sizes and checksums, so that a truncated or edited file is reported before a graph runs.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xfm_fast import __version__
from xfm_fast.config import XFMConfig
from xfm_fast.errors import ExportError, StorageError
from xfm_fast.io import advice, is_plain_name, read_json, write_bytes

from .request import AttentionForm, DType, GraphName, Quantisation, Use

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"

LONGEST_ROW = 512
"""Tokens of a packed row; positions restart with every caption, so the model's positions do not bound it."""


class Axis(NamedTuple):
    """Sizes of a dimension that varies: to trace with, the largest, and one to warm up with."""

    traced: int
    most: int
    small: int


AXES = {
    "batch": Axis(2, 4096, 1),
    "texts": Axis(3, 4096, 4),
    "length": Axis(7, LONGEST_ROW, 16),
    "past": Axis(5, 512, 4),
    "rows": Axis(4, 4096, 2),
}

LIBRARY_OUTPUTS = {
    "token_embeddings": "last_hidden_state",
    "sentence_embedding": "sentence_embedding",
    "scores": "logits",
}
"""Outputs of an encoder's graph by the names that sentence-transformers gives their values."""

# Dimensions of inputs and outputs: axes, sizes of the model, and in brackets what only some graphs have.
_DIMS = {
    "pixels": "batch 3 side side",
    "image_embeds": "batch image_tokens vision_width",
    "image_feature": "batch embed",
    "input_ids": "batch [texts] length",
    "attention_mask": "batch [texts] length",
    "text_embeds": "batch [texts] length width",
    "text_feature": "batch embed",
    "memory_keys": "batch [pair] heads image_tokens size",
    "memory_values": "batch [pair] heads image_tokens size",
    "fused": "batch texts [length] width",
    "match_logits": "batch texts 2",
    "boxes": "batch texts 4",
    "scores": "batch texts",
    "class_logits": "batch [texts] labels",
    "packed_ids": "rows length",
    "positions": "rows length",
    # Number of the caption of a token, from 1; 0 for padding. Unique over the rows of an image.
    "segments": "[batch] rows length",
    # Row of every caption, and position of its token 0 in it.
    "firsts": "batch [texts] 2",
    "packed_embeds": "[batch] rows length width",
    "fused_tokens": "batch rows length width",
    "states": "batch length states_width",
    "memory_mask": "batch length",
    "decoder_keys": "batch heads length size",
    "decoder_values": "batch heads length size",
    "token_ids": "batch texts",
    "past": "batch texts layers 2 heads past size",
    # Zero for tokens that do not exist.
    "past_mask": "batch texts past",
    "logits": "batch [texts] vocabulary",
    "present": "batch texts layers 2 heads size",
    # Of an encoder of another library.
    "token_type_ids": "batch length",
    "pixel_values": "batch 3 side side",
    "last_hidden_state": "batch length width",
    "pooler_output": "batch width",
    "sentence_embedding": "batch width",
}
_INTEGERS = frozenset(
    [
        "input_ids",
        "token_type_ids",
        "packed_ids",
        "token_ids",
        "positions",
        "segments",
        "firsts",
        "attention_mask",
        "token_type_ids",
        "past_mask",
        "memory_mask",
    ]
)


@cache
def tensor_axes(name: str, count: int) -> tuple[str | None, ...]:
    """Return the axis of every dimension of a tensor, None for one that never varies.

    Raises `LookupError` for a tensor that no graph has, or with another number of dimensions.
    """
    words = _DIMS[_table_name(name)].split()
    required = [word for word in words if not word.startswith("[")]
    if count not in (len(required), len(words)):
        raise LookupError(f"{name} has {len(words)} dimensions, not {count}")
    dims = required if count == len(required) else [word.strip("[]") for word in words]
    return tuple(dim if dim in AXES else None for dim in dims)


def _table_name(name: str) -> str:
    """Drop the number of the layer."""
    return name.rstrip("0123456789").rstrip("_")


Status = Literal["verified", "failed", "graphs verified", "unverified"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class FileRecord(_Record):
    """A file of the export, by its name in the folder."""

    name: str
    bytes: int = Field(ge=0)
    sha256: str


class AxisRecord(_Record):
    """The sizes that a dynamic dimension may take."""

    # A session runs every graph once at its least sizes.
    least: int = Field(1, ge=1, le=1 << 16)
    most: int | None = Field(None, ge=1)


class TensorRecord(_Record):
    """An input or output; a dimension is a number or the name of an axis."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    dims: list[int | str]

    @classmethod
    def of(cls, name: str, optional: Collection[str], sizes: Mapping[str, int]) -> Self:
        """Resolve the symbolic dimensions of a tensor, of which those in brackets are there if in `optional`."""
        base = _table_name(name)
        dims: list[int | str] = []
        for word in _DIMS[base].split():
            dim = word.strip("[]")
            if dim == word or dim in optional:
                dims.append(sizes.get(dim, int(dim) if dim.isdigit() else dim))
        return cls(name=name, dtype="int64" if base in _INTEGERS else "float32", dims=dims)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """See `tensor_axes`."""
        return tensor_axes(self.name, len(self.dims))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the dimensions as numbers, for sizes of the axes."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)


class ProfileRecord(_Record):
    """An optimisation profile of an engine: least, best and greatest shape of every input."""

    name: str
    least: dict[str, list[int]]
    best: dict[str, list[int]]
    most: dict[str, list[int]]


class QuantisationRecord(_Record):
    """The 8-bit GEMMs of a graph and their cost."""

    kind: Quantisation
    budget: float
    cosine: float  # least over the calibration inputs
    products: int  # candidates
    kept: list[str]  # layers that stay in the dtype of the graph
    smoothed: int  # tensors with equalised channels
    tables: list[str] = []  # embedding tables in 8 bits by row
    # Of both graphs run in turn on the CPU that quantised; 0 for other devices.
    wide_milliseconds: float = 0.0
    milliseconds: float = 0.0
    # Kernels of each profile of the engine, and of the engine without 8 bits; where the library tells.
    wide_launches: list[int] = []
    launches: list[int] = []


class GraphRecord(_Record):
    """One graph: its files and its interface."""

    name: GraphName
    file: str
    files: list[str] = Field(
        description="the file and what lies beside it, such as external weights"
    )
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    axes: dict[str, AxisRecord]
    build_seconds: float
    profiles: list[ProfileRecord] = []
    quantisation: QuantisationRecord | None = None


class EngineTarget(_Record):
    """The machines that run engines: the library that built them and its version, and the GPUs."""

    library: str
    version: str
    compute_capabilities: list[int]  # such as 89
    version_compatible: bool = False
    hardware_compatibility: str | None = None  # such as `ampere_plus`; None: one architecture


class PackageTarget(_Record):
    """The machines that run compiled packages: machine code bound to one PyTorch."""

    torch: str
    device: Literal["cpu", "cuda"]
    architecture: str  # such as `x86_64`
    instructions: list[str] = []
    compute_capability: int | None = None


class Check(_Record):
    """An output of a graph compared with the model, over all shapes that were run; without limits if only reported."""

    graph: GraphName
    output: str
    shapes: list[list[int]]
    max_error: float | None
    mean_error: float | None
    allowed: float | None
    cosine: float | None = None
    least_cosine: float | None = None
    passed: bool


class RankCheck(_Record):
    """Agreement of the re-ranking order (`verification.rank_agreement`); the graph `all` chains the graphs."""

    graph: GraphName | Literal["all"]
    candidates: int
    agreement: float
    identical: float
    tie: float
    least: float
    passed: bool


class VerificationRecord(_Record):
    """The comparison of an export with its model."""

    runtime: str
    examples: str
    seconds: float
    checks: list[Check]
    ranks: list[RankCheck]

    @property
    def differing(self) -> list[str]:
        """The outputs and ranks that exceed their threshold."""
        outputs = [f"{check.graph} {check.output}" for check in self.checks if not check.passed]
        return outputs + [f"ranks by {check.graph}" for check in self.ranks if not check.passed]


class Manifest(_Record):
    """An export: where it comes from, its graphs and files, and its verification."""

    format: int = FORMAT_VERSION
    kind: str = Field("onnx", description="of the files, see `runtimes.Runtime.kind`")
    created: str
    xfm_fast: str
    commit: str | None
    source: str
    weights_sha256: str
    tokenizer_sha256: str | None
    config: dict[str, Any]
    use: Use | None = Field(None, description="of a model of sentence-transformers; None: X-FM")
    dtype: DType
    consumer: str = Field(description="the runtime that it was made for")
    opset: int | None
    attention: AttentionForm
    all_tokens: bool
    packed: bool = False
    fixed: dict[str, int]
    versions: dict[str, str]
    graphs: list[GraphRecord]
    files: list[FileRecord]
    target: EngineTarget | None = None
    package: PackageTarget | None = None
    options: dict[str, Any] = Field(default={}, description="of the builder, as they were given")
    status: Status = "unverified"
    reason: str = ""
    examples: str = ""
    verification: VerificationRecord | None = None
    graphs_verification: VerificationRecord | None = None

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [name for graph in self.graphs for name in (graph.file, *graph.files)]
        for name in (*names, *(record.name for record in self.files)):
            if not all(map(is_plain_name, name.split("/"))):
                raise ValueError(f"{name!r} is not a file of this folder; give plain names")
        return self

    def unverified(self, **changes: Any) -> Self:
        """Copy the manifest with changes, and without the comparison with the model."""
        reason = "it was not compared with the model"
        reset = {"status": "unverified", "reason": reason, "verification": None}
        return self.model_copy(update={**reset, **changes})

    @property
    def xfm_config(self) -> XFMConfig:
        """Sizes of the exported X-FM; raises `ExportError` for another model."""
        if self.use is not None:
            raise ExportError(
                f"this is an export of {self.source}, not of an X-FM; open it with xfm_fast.encoders.open_encoder"
            )
        return XFMConfig(**self.config)

    @property
    def graph_names(self) -> tuple[GraphName, ...]:
        return tuple(graph.name for graph in self.graphs)

    def require_files(self, folder: Path) -> None:
        """Raise `ExportError` if a graph uses a file without size and checksum in the manifest."""
        listed = {record.name for record in self.files}
        for graph in self.graphs:
            used = {graph.file, *graph.files}
            if self.kind == "onnx" and graph.file in listed:
                subfolder = graph.file[: -len(Path(graph.file).name)]
                used |= {f"{subfolder}{name}" for name in external_files(folder / graph.file)}
            if unlisted := sorted(used - listed):
                raise ExportError(
                    f"graph {graph.name!r} in {folder} uses {unlisted[0]!r}, which {MANIFEST_FILE} does not list "
                    "among its files; export again"
                )

    def graph(self, name: str) -> GraphRecord:
        """Return the record of a graph; raises `ExportError` if it was not exported."""
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise ExportError(
            f"graph {name!r} is not in this export (it has: {', '.join(self.graph_names) or 'none'}); export it with "
            "--graphs"
        )

    def save(self, folder: Path) -> None:
        """Write `manifest.json` atomically."""
        content = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
        write_bytes({folder / MANIFEST_FILE: content.encode()})

    @classmethod
    def load(cls, folder: str | Path, *, check_files: bool = True) -> Self:
        """Read the manifest of an export; `check_files` compares sizes and checksums and names every bad file."""
        manifest = cls._read(Path(folder))
        if check_files:
            problems = list(mismatches(Path(folder), manifest.files))
            if problems:
                raise ExportError(
                    f"{folder} is not what {MANIFEST_FILE} describes: {'; '.join(problems)}; copy the folder again or "
                    "export again"
                )
        return manifest

    @classmethod
    def _read(cls, folder: Path) -> Self:
        path = folder / MANIFEST_FILE
        try:
            content = read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            raise ExportError(
                f"{folder} has no {MANIFEST_FILE}; give the folder of a finished export"
            ) from None
        except OSError as error:
            raise ExportError(
                f"{path} cannot be read ({error.strerror or error}); check its permissions"
            ) from None
        except ValueError as error:
            raise ExportError(
                f"{path} is damaged ({error}); copy the folder again or export again"
            ) from None
        written = content.get("format") if isinstance(content, dict) else None
        if type(written) is not int:
            raise ExportError(
                f"{path} is not a manifest of xfm-fast (it has no format number); export again"
            )
        if written != FORMAT_VERSION:
            by = content.get("xfm_fast", "an unknown version")
            remedy = "upgrade xfm-fast" if written > FORMAT_VERSION else "export again"
            raise ExportError(
                f"{path} has format {written}, written by xfm-fast {by}; this version ({__version__}) reads format "
                f"{FORMAT_VERSION}: {remedy}"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "its files"
            raise ExportError(
                f"{path} is damaged at {field} ({advice(first)}); export again"
            ) from None

    def require_target(self, *, library_version: str, compute_capability: int | None) -> None:
        """Raise `ExportError` if this library version or GPU (None: unchecked) does not run the engines."""
        target = self.target
        if target is None:
            return
        again = f"xfm-fast export --to {target.library}"
        here, there = (
            tuple(int(field) if field.isdigit() else 0 for field in version.split("."))
            for version in (library_version, target.version)
        )
        if library_version != target.version and (here < there or not target.version_compatible):
            raise ExportError(
                f"these engines were built by {target.library} {target.version} and this machine has "
                f"{library_version}; install {target.library}=={target.version} or build again with {again}"
            )
        if compute_capability is None or compute_capability in target.compute_capabilities:
            return
        if target.hardware_compatibility != "ampere_plus" or compute_capability < 80:
            built = ", ".join(f"SM{capability}" for capability in target.compute_capabilities)
            raise ExportError(
                f"these engines were built for {built} and this GPU is SM{compute_capability}; build for it with "
                f"{again} --sm {compute_capability}"
            )


def new_manifest(**fields: Any) -> Manifest:
    """Create a manifest with the current time, version and commit."""
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        xfm_fast=__version__,
        commit=commit(),
        **fields,
    )


def mismatches(folder: Path, files: Iterable[FileRecord]) -> Iterable[str]:
    """Yield a phrase for each file that differs from its record; reads a file only if its size agrees."""
    for record in files:
        path = folder / record.name
        try:
            size = path.stat().st_size
            if size < record.bytes:
                yield f"{record.name} is truncated ({size:,} of {record.bytes:,} bytes)"
            elif size > record.bytes:
                yield f"{record.name} was edited ({size:,} bytes instead of {record.bytes:,})"
            elif sha256(path) != record.sha256:
                yield f"{record.name} was edited (its size is right, its sha256 differs)"
        except FileNotFoundError:
            yield f"{record.name} is missing"
        except OSError as error:
            yield f"{record.name} cannot be read ({error.strerror or error})"


# Messages of ONNX that contain tensors: message → tag of a field → message in it.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def external_files(path: Path) -> set[str]:
    """Return the names of the external weight files of an ONNX graph, parsed without the `onnx` package."""
    names: set[str] = set()
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            pending = [("model", 0, len(content))]
            while pending:
                message, start, end = pending.pop()
                entry: dict[int, bytes] = {}
                for tag, first, last in _fields(content, start, end):
                    if message == "entry":
                        entry[tag] = content[first:last]
                    elif (inner := _MESSAGES[message].get(tag)) is not None:
                        pending.append((inner, first, last))
                if entry.get(1) == b"location":
                    names.add(entry.get(2, b"").decode())
    except (OSError, ValueError, IndexError) as error:
        raise ExportError(
            f"{path} is not an ONNX graph that can be read ({error}); export again"
        ) from None
    return names


def _fields(content: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield tag, start and end of every length-delimited field (protobuf wire type 2) of a message."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = content[at]
            value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
            if byte < 128:
                return value, at
            if shift > 63:
                raise ValueError("a number in it has no end")

    while at < end:
        header, at = varint(at)
        wire_type = header & 7
        size = 0
        if wire_type == 0:
            _, at = varint(at)
        elif wire_type == 2:
            size, at = varint(at)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"a field in it has wire type {wire_type}")
        if at + size > end:
            raise ValueError("a field in it ends behind its message")
        if wire_type == 2:
            yield header >> 3, at, at + size
        at += size


def record_files(folder: Path, names: Iterable[str]) -> list[FileRecord]:
    """Record size and checksum of files in the folder, sorted by name, without repeats."""
    records = []
    for name in sorted(set(names)):
        path = folder / name
        try:
            records.append(FileRecord(name=name, bytes=path.stat().st_size, sha256=sha256(path)))
        except OSError as error:
            raise StorageError(
                f"{path} cannot be read back ({error.strerror or error}); export again"
            ) from error
    return records


def sha256(path: Path) -> str:
    """Hash a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_versions(*names: str) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    versions: dict[str, str] = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@cache
def commit() -> str | None:
    """Return the commit of this checkout, with `+` if files were changed; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        # An installed package may lie inside another project's repository, which does not track it.
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return completed.stdout.strip()
