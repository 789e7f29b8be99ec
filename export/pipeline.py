"""The pipeline of every export: build the graphs, find room, begin a manifest, write, record, compare, save.

Everything that can fail early fails before a file of the folder changes. The manifest is written once, at the end.
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
from xfm_fast.memory import give_back
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
    wants_all_tokens,
)
from .manifest import MANIFEST_FILE, AxisRecord, GraphRecord, Manifest, TensorRecord, new_manifest, record_files
from .readme import README_FILE, readme
from .request import ALL_GRAPHS, ExportRequest, GraphName
from .verification import compare_with_reference, keep_results

Progress = Callable[[str], None]
"""Is told what is being done."""

Write = Callable[[Graph, GraphRecord, Manifest], Sequence[str]]
"""Writes a graph, its parameters in the type of the export and its file named by the record; returns the names of all
its files, the graph's own first."""

_TENSOR_TYPES: dict[DType, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Names, shapes and nodes beside the weights.
_ROOM_PER_GRAPH = 4 << 20


def silent(message: str) -> None:
    """Shows no progress."""


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
    """Write graphs of a model into a folder, with their manifest.

    Args:
        request: which graphs, and their form.
        spelling: form of attention and opset.
        write: writes one graph.
        suffix: ending of the graphs' files.
        room: bytes needed, from the estimated sizes of the graphs.
        source: where the weights come from, in words without paths; goes into the manifest.
        tokenizer_sha256: of the vocabulary that the ids belong to; by default of the model's tokenizer.
        examples: compare the export with the model on them; without, the manifest says `unverified`.
        compared: False leaves the comparison to `verification.verify`, when the model need not be in memory any more:
            what it computes is in the folder.
        companions: files that lie beside the graphs, by name, such as those that say what a fine-tuned model is for.
            The model's tokenizer and the preparation of images are always among them.
        facts: further fields of the manifest.

    Raises:
        UnavailableError, InputError: see `build_graphs`.
        StorageError: the folder cannot be written, or has no room for the files.
    """
    dtype, fixed = data_type(request.dtype), request.sizes
    companions = XFMProcessor(model.config, model.tokenizer).files() | dict(companions)
    if tokenizer_sha256 is None and model.tokenizer is not None:
        tokenizer_sha256 = model.tokenizer.sha256()
    built = build_graphs(
        model, spelling, request.names, fixed=fixed, all_tokens=request.all_tokens, packed=request.packed
    )
    sizes = [graph_bytes(graph, model, dtype) for graph in built.values()]
    all_tokens = wants_all_tokens(model, request.all_tokens)
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

    # A graph joins weights into new ones, and those of all together are a fifth of the model.
    del built

    def write_one(record: GraphRecord) -> Sequence[str]:
        graph = build(record.name, model, spelling.form, all_tokens=all_tokens, packed=request.packed)
        converted = in_dtype(graph, DTYPES[dtype])
        files = write(converted, record, content)
        if converted is not graph:
            # An exporter keeps weights that a graph joined, and what it was joined from, until it sees another graph.
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
    """Write the graphs of an export, and its manifest when all is there.

    Args:
        content: the manifest; gets its graphs, files and verification here.
        records: graphs that are to be written; time spent on them before counts.
        write: writes one and returns the names of its files, the graph's own first.
        compare: enters into the manifest what a comparison with the model says.
        companions: further files, by name.
    """
    # From here on the files change, and an earlier manifest no longer describes them.
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    graphs = []
    for record in records:
        started = time.perf_counter()
        files = [*write(record)]
        # An exporter leaves programs in circles, which hold the weights that the graph joined.
        gc.collect()
        give_back()
        seconds = round(record.build_seconds + time.perf_counter() - started, 3)
        graphs.append(record.model_copy(update={"file": files[0], "files": files, "build_seconds": seconds}))
    content.graphs = graphs
    companions = {**companions, README_FILE: readme(content).encode()}
    write_bytes({folder / name: data for name, data in companions.items()})
    content.files = record_files(folder, [*companions, *(name for graph in graphs for name in graph.files)])
    try:
        compare(content)
    finally:
        # Complete, if unverified, whatever became of the comparison.
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
    """The graphs to export, checked together; they share the model's parameters.

    Raises:
        UnavailableError: a graph that is unknown or that the model cannot give.
        InputError: no graph, one named twice, or a fixed axis or size that none of them can have.
    """
    names = default_graphs(model) if names is None else names
    if not names:
        raise InputError(f"no graph is named; choose from {', '.join(ALL_GRAPHS)}")
    twice = sorted({name for name in names if [*names].count(name) > 1})
    if twice:
        raise InputError(f"graph {twice[0]!r} is named twice; name it once")
    all_tokens = wants_all_tokens(model, all_tokens)
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
    """Records of graphs that are to be written."""
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
    """An estimate of a graph's file: its parameters, and the position biases that export makes of the vision tables."""
    size = DTYPES[dtype].itemsize
    config = model.config
    biases = config.vision_depth * config.vision_heads * config.num_image_tokens**2
    has_vision = any(name.endswith("relative_position_bias_table") for name, _ in graph.named_parameters())
    parameters = sum(parameter.numel() for parameter in graph.parameters())
    return (parameters + (biases if has_vision else 0)) * size + _ROOM_PER_GRAPH


def prepare_folder(folder: Path, needed: int) -> None:
    """Make the folder and see that it can take `needed` bytes, before minutes are spent on what goes there.

    Raises:
        StorageError: it cannot be made or written, or too little is free.
    """
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
    """The files of an export that say what its model is for, by name.

    Raises:
        StorageError: one cannot be read.
    """
    names = [record.name for record in manifest.files if record.name.endswith(".json")]
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise StorageError(f"{error.filename} cannot be read ({error.strerror or error}); export again") from error


def weights_sha256(model: nn.Module, graphs: Iterable[nn.Module]) -> str:
    """Identifies weights: of the names, types, shapes and values of the parameters that the graphs read."""
    read = {id(parameter) for graph in graphs for parameter in graph.parameters()}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if id(parameter) not in read:
            continue
        digest.update(f"{name} {parameter.dtype} {[*parameter.shape]}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
