"""The pipeline of every export: build graphs, check disk space, write, record, compare, save.

Validation comes before any file changes; the manifest is written once, at the end.
"""

from __future__ import annotations

import gc
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xfm_fast.checkpoint.files import write_bytes
from xfm_fast.errors import InputError, StorageError
from xfm_fast.memory import release_freed_memory
from xfm_fast.models.processor import XFMProcessor
from xfm_fast.models.xfm import XFM

from .consumers import DTYPES, DType, Profile, data_type
from .expected import DECODER_GRAPHS, Examples, reference_bytes
from .graphs import (
    LONGEST_ROW,
    ROWS,
    Axis,
    Graph,
    TensorSpec,
    build,
    check_fixed,
    default_graphs,
    in_dtype,
    needs_all_tokens,
)
from .manifest import MANIFEST_FILE, AxisRecord, GraphRecord, Manifest, TensorRecord, new_manifest, record_files
from .readme import README_FILE, readme
from .request import ALL_GRAPHS, ExportRequest, GraphName
from .verification import compare_with_reference, keep_results

Progress = Callable[[str], None]
"""Callback with a line of progress."""

Write = Callable[[Graph, GraphRecord, Manifest], Sequence[str]]
"""Writes a graph in the export's dtype to the record's file; returns all file names, the graph's own first."""

_TENSOR_TYPES: dict[DType, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Names, shapes and nodes.
_ROOM_PER_GRAPH = 4 << 20


def silent(message: str) -> None:
    """No progress output."""


def export_graphs(
    model: XFM,
    folder: Path,
    request: ExportRequest,
    spelling: Profile,
    write: Write,
    *,
    suffix: str,
    room: Callable[[Sequence[int]], int] = sum,
    source: str = "a model in memory",
    tokenizer_sha256: str | None = None,
    examples: Examples | None = None,
    companions: Mapping[str, bytes] = {},
    compared: bool = True,
    progress: Progress = silent,
    **facts: Any,
) -> Manifest:
    """Write graphs of a model into a folder, with their manifest."""
    dtype, fixed = data_type(request.dtype), request.sizes
    companions = XFMProcessor(model.config, model.tokenizer).files() | dict(companions)
    if tokenizer_sha256 is None and model.tokenizer is not None:
        tokenizer_sha256 = model.tokenizer.sha256()
    built = build_graphs(
        model, spelling, request.names, fixed=fixed, all_tokens=request.all_tokens, packed=request.packed
    )
    sizes = [graph_bytes(graph, model, dtype) for graph in built.values()]
    all_tokens = needs_all_tokens(model, request.all_tokens)
    records = graph_records(built, dtype, model, fixed, suffix)
    decodes = not DECODER_GRAPHS.isdisjoint(built)
    prepare_folder(folder, room(sizes) + reference_bytes(model.config, decodes=decodes))
    content = new_manifest(
        source=source,
        weights_sha256=weights_sha256(model, built.values()),
        tokenizer_sha256=tokenizer_sha256,
        config=model.config.model_dump(),
        dtype=dtype,
        attention=spelling.form,
        all_tokens=all_tokens,
        packed=request.packed,
        fixed=fixed,
        graphs=[],
        files=[],
        reason="it was not compared with the model",
        **facts,
    )

    # Joined weights of all graphs together are a fifth of the model.
    del built

    def write_one(record: GraphRecord) -> Sequence[str]:
        graph = build(record.name, model, spelling.form, all_tokens=all_tokens, packed=request.packed)
        converted = in_dtype(graph, DTYPES[dtype])
        files = write(converted, record, content)
        if converted is not graph:
            # An exporter references joined weights and their sources until it sees another graph.
            for parameter in converted.parameters():
                parameter.data = parameter.new_empty(0)
        return files

    def compare(content: Manifest) -> None:
        if examples is None:
            return
        progress("comparing with the model")
        reference = keep_results(content, folder, model, examples)
        if compared:
            # Packages are code, and these are our own.
            compare_with_reference(content, folder, reference, "aoti" if content.kind == "aoti" else "auto")

    return fill_folder(content, folder, records, write_one, compare, companions)


def fill_folder(
    content: Manifest,
    folder: Path,
    records: Iterable[GraphRecord],
    write: Callable[[GraphRecord], Sequence[str]],
    compare: Callable[[Manifest], None] = lambda content: None,
    companions: Mapping[str, bytes] = {},
) -> Manifest:
    """Write the graphs of an export, then its sidecar files and manifest; `content` is completed in place."""
    # From here on the files change, and an earlier manifest does not describe them.
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    graphs = []
    for record in records:
        started = time.perf_counter()
        files = [*write(record)]
        # An exporter leaves programs in reference cycles, which hold joined weights.
        gc.collect()
        release_freed_memory()
        seconds = round(record.build_seconds + time.perf_counter() - started, 3)
        graphs.append(record.model_copy(update={"file": files[0], "files": files, "build_seconds": seconds}))
    content.graphs = graphs
    companions = {**companions, README_FILE: readme(content).encode()}
    write_bytes({folder / name: data for name, data in companions.items()})
    content.files = record_files(folder, [*companions, *(name for graph in graphs for name in graph.files)])
    try:
        compare(content)
    finally:
        # The export is complete even where the comparison fails.
        content.save(folder)
    return content


def build_graphs(
    model: XFM,
    spelling: Profile,
    names: Sequence[GraphName] | None = None,
    *,
    fixed: Mapping[str, int] | None = None,
    all_tokens: bool = False,
    packed: bool = False,
) -> dict[GraphName, Graph]:
    """The graphs to export, validated together; they share the model's parameters."""
    names = default_graphs(model) if names is None else names
    if not names:
        raise InputError(f"no graph is named; choose from {', '.join(ALL_GRAPHS)}")
    twice = sorted({name for name in names if [*names].count(name) > 1})
    if twice:
        raise InputError(f"graph {twice[0]!r} is named twice; name it once")
    all_tokens = needs_all_tokens(model, all_tokens)
    built: dict[GraphName, Graph] = {
        name: build(name, model, spelling.form, all_tokens=all_tokens, packed=packed) for name in names
    }
    check_fixed(built.values(), fixed or {})
    longest = model.config.max_text_length
    for axis, size in (fixed or {}).items():
        if axis in ("length", "past") and size > longest:
            raise InputError(f"{axis}={size} exceeds the {longest} positions of this model; use fewer")
    return built


def graph_records(
    built: Mapping[GraphName, Graph], dtype: DType, model: XFM, fixed: Mapping[str, int], suffix: str = ""
) -> list[GraphRecord]:
    """Records of graphs before they are written."""
    return [
        GraphRecord(
            name=name, file=f"{name}{suffix}", files=[], build_seconds=0, **graph_interface(graph, dtype, model, fixed)
        )
        for name, graph in built.items()
    ]


def graph_interface(graph: Graph, dtype: DType, model: XFM, fixed: Mapping[str, int]) -> dict:
    """Inputs, outputs and axes of a graph, as `GraphRecord` has them."""

    def record(spec: TensorSpec) -> TensorRecord:
        dims = [fixed.get(dim.name, dim.name) if isinstance(dim, Axis) else dim for dim in spec.dims]
        return TensorRecord.model_validate(
            {"name": spec.name, "dtype": _TENSOR_TYPES[dtype] if spec.dtype == "compute" else spec.dtype, "dims": dims}
        )

    axes = {axis.name: axis for spec in graph.inputs for axis in spec.axes.values() if axis.name not in fixed}
    most: dict[str, int] = dict.fromkeys(("length", "past"), model.config.max_text_length)
    if ROWS in axes.values() and "length" in axes:
        most["length"] = max(most["length"], LONGEST_ROW)
    return {
        "inputs": [record(spec) for spec in graph.inputs],
        "outputs": [record(spec) for spec in graph.outputs],
        "axes": {name: AxisRecord(least=axis.least, most=most.get(name)) for name, axis in axes.items()},
    }


def graph_bytes(graph: nn.Module, model: XFM, dtype: DType) -> int:
    """Estimated file size of a graph: parameters, and the position biases of the vision tables."""
    size = DTYPES[dtype].itemsize
    config = model.config
    biases = config.vision_depth * config.vision_heads * config.num_image_tokens**2
    has_vision = any(name.endswith("relative_position_bias_table") for name, _ in graph.named_parameters())
    parameters = sum(parameter.numel() for parameter in graph.parameters())
    return (parameters + (biases if has_vision else 0)) * size + _ROOM_PER_GRAPH


def prepare_folder(folder: Path, needed: int) -> None:
    """Create the folder and check that `needed` bytes are free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except FileExistsError as error:
        raise StorageError(f"{folder} is a file and no folder; choose another name with --out") from error
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written ({error.strerror or error}); choose another folder with --out"
        ) from error
    if free < needed:
        raise StorageError(
            f"{folder} has {free / 1e9:.2f} GB free and the export needs about {needed / 1e9:.2f} GB; free space or "
            "choose another folder"
        )


def companions_of(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The JSON sidecar files of an export, by name."""
    names = [record.name for record in manifest.files if record.name.endswith(".json")]
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise StorageError(f"{error.filename} cannot be read ({error.strerror or error}); export again") from error


def weights_sha256(model: nn.Module, graphs: Iterable[nn.Module]) -> str:
    """Hash of names, dtypes, shapes and values of the parameters that the graphs read."""
    read = {id(parameter) for graph in graphs for parameter in graph.parameters()}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if id(parameter) not in read:
            continue
        digest.update(f"{name} {parameter.dtype} {[*parameter.shape]}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
