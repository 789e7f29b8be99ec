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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xfm_fast.errors import InputError, StorageError
from xfm_fast.io import storing, write_bytes
from xfm_fast.memory import release_freed_memory
from xfm_fast.models.processor import XFMProcessor
from xfm_fast.models.xfm import XFM

from .expected import DECODER_GRAPHS, Examples, reference_bytes
from .graphs import (
    DTYPES,
    Graph,
    build,
    check_fixed,
    default_graphs,
    in_dtype,
    needs_all_tokens,
)
from .manifest import (
    LONGEST_ROW,
    MANIFEST_FILE,
    AxisRecord,
    GraphRecord,
    Manifest,
    TensorRecord,
    new_manifest,
    record_files,
)
from .request import DType, ExportRequest, GraphName, Request
from .runtimes import Spelling, data_type
from .slots import parse_profiles
from .verification import compare_with_reference, keep_results

README_FILE = "README.md"

Progress = Callable[[str], None]
"""Callback with a line of progress."""

Write = Callable[[Graph, GraphRecord, Manifest], Sequence[str]]
"""Writes a graph in the export's dtype to the record's file; returns all file names, the graph's own first."""

_TENSOR_TYPES: dict[DType, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Names, shapes and nodes.
_ROOM_PER_GRAPH = 4 << 20
_FACTS = ("source", "tokenizer_sha256", "companions", "progress", "examples", "compared")


def silent(message: str) -> None:
    """No progress output."""


def split_request(
    request: Request | None, kind: type[Request], given: Mapping[str, Any]
) -> tuple[Request, dict[str, Any]]:
    """A request with changed fields, and the other keyword arguments of an export."""
    facts = {name: given[name] for name in _FACTS if name in given}
    changes = {name: value for name, value in given.items() if name not in facts}
    return replace(request or kind(), **changes), facts


def export_graphs(
    model: XFM,
    folder: Path,
    request: ExportRequest,
    spelling: Spelling,
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
    **manifest: Any,
) -> Manifest:
    """Write graphs of a model into a folder, with their manifest; `room` is the space needed for graphs of sizes."""
    dtype, fixed = data_type(request.dtype), request.sizes
    companions = XFMProcessor(model.config, model.tokenizer).files() | dict(companions)
    if tokenizer_sha256 is None and model.tokenizer is not None:
        tokenizer_sha256 = model.tokenizer.sha256()
    built = build_graphs(model, spelling, request)
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
        **manifest,
    )

    # Joined weights of all graphs together are a fifth of the model.
    del built

    def write_one(record: GraphRecord) -> Sequence[str]:
        progress(f"exporting {record.name}")
        graph = build(
            record.name, model, spelling.form, all_tokens=all_tokens, packed=request.packed
        )
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
            compare_with_reference(
                content, folder, reference, "aoti" if content.kind == "aoti" else "auto"
            )

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
        graphs.append(
            record.model_copy(update={"file": files[0], "files": files, "build_seconds": seconds})
        )
    content.graphs = graphs
    companions = {**companions, README_FILE: readme(content).encode()}
    write_bytes({folder / name: data for name, data in companions.items()})
    content.files = record_files(
        folder, [*companions, *(name for graph in graphs for name in graph.files)]
    )
    try:
        compare(content)
    finally:
        # The export is complete even where the comparison fails.
        content.save(folder)
    return content


def build_graphs(model: XFM, spelling: Spelling, request: ExportRequest) -> dict[GraphName, Graph]:
    """The graphs to export, validated together; they share the model's parameters."""
    names = default_graphs(model) if request.names is None else request.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"graph {twice[0]!r} is named twice; name it once")
    form = {"all_tokens": needs_all_tokens(model, request.all_tokens), "packed": request.packed}
    built: dict[GraphName, Graph] = {
        name: build(name, model, spelling.form, **form) for name in names
    }
    check_fixed(built.values(), request.sizes)
    longest = model.config.max_text_length
    for axis, size in request.sizes.items():
        if axis in ("length", "past") and size > longest:
            raise InputError(
                f"{axis}={size} exceeds the {longest} positions of this model; use fewer"
            )
    return built


def graph_records(
    built: Mapping[GraphName, Graph],
    dtype: DType,
    model: XFM,
    fixed: Mapping[str, int],
    suffix: str = "",
) -> list[GraphRecord]:
    """Records of graphs before they are written."""

    def tensor(each: TensorRecord) -> TensorRecord:
        kind = each.dtype if each.dtype == "int64" else _TENSOR_TYPES[dtype]
        dims = [fixed.get(dim, dim) if isinstance(dim, str) else dim for dim in each.dims]
        return each.model_copy(update={"dtype": kind, "dims": dims})

    records = []
    for name, graph in built.items():
        axes = [axis for axis in graph.axes if axis not in fixed]
        most: dict[str, int] = dict.fromkeys(("length", "past"), model.config.max_text_length)
        if "rows" in axes:
            most["length"] = max(most["length"], LONGEST_ROW)
        records.append(
            GraphRecord(
                name=name,
                file=f"{name}{suffix}",
                files=[],
                inputs=[*map(tensor, graph.inputs)],
                outputs=[*map(tensor, graph.outputs)],
                axes={axis: AxisRecord(least=1, most=most.get(axis)) for axis in axes},
                build_seconds=0,
            )
        )
    return records


def graph_bytes(graph: nn.Module, model: XFM, dtype: DType) -> int:
    """Estimated file size of a graph: parameters, and the position biases of the vision tables."""
    size = DTYPES[dtype].itemsize
    config = model.config
    biases = config.vision_depth * config.vision_heads * config.num_image_tokens**2
    has_vision = any(
        name.endswith("relative_position_bias_table") for name, _ in graph.named_parameters()
    )
    parameters = sum(parameter.numel() for parameter in graph.parameters())
    return (parameters + (biases if has_vision else 0)) * size + _ROOM_PER_GRAPH


def prepare_folder(folder: Path, needed: int) -> None:
    """Create the folder and check that `needed` bytes are free."""
    with storing(folder, "choose another folder with --out"):
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"{folder} is a file and no folder; choose another name with --out")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder} has {free / 1e9:.2f} GB free and the export needs about {needed / 1e9:.2f} GB; free space or "
            "choose another folder"
        )


def sidecar_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The JSON sidecar files of an export, by name."""
    names = [record.name for record in manifest.files if record.name.endswith(".json")]
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise StorageError(
            f"{error.filename} cannot be read ({error.strerror or error}); export again"
        ) from error


def weights_sha256(model: nn.Module, graphs: Iterable[nn.Module]) -> str:
    """Hash of names, dtypes, shapes and values of the parameters that the graphs read."""
    read = {id(parameter) for graph in graphs for parameter in graph.parameters()}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if id(parameter) not in read:
            continue
        digest.update(f"{name} {parameter.dtype} {[*parameter.shape]}".encode())
        digest.update(
            parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
    return digest.hexdigest()


def readme(manifest: Manifest) -> str:
    """The text of `README.md` for a complete manifest."""
    side = manifest.xfm_config.image_size
    session = 'session = Session.load("this folder")'
    rows = []
    for graph in manifest.graphs:
        sides = (
            "<br>".join(f"{each.name} {each.dims}" for each in side)
            for side in (graph.inputs, graph.outputs)
        )
        rows.append(f"| {graph.name} | {graph.file} | {' | '.join(sides)} |")
    inputs = 'inputs = session.processor(images=["photo.jpg"], text=["a caption"])'
    parts = [
        f"# X-FM as {manifest.kind}",
        f"Weights of {manifest.source}, {manifest.dtype}, by xfm-fast {manifest.xfm_fast}.",
        "`manifest.json` has the sizes, and whether the files agree with the model.",
        f"Images of {side}x{side} pixels are prepared as `preprocessor_config.json` says.",
        "Texts are by `tokenizer.json`, where the model had one.",
        f"```python\nfrom xfm_fast.export import Session\n\n{session}\n{inputs}\n```",
        "\n".join(["| graph | file | inputs | outputs |", "|---|---|---|---|", *rows]),
    ]
    if manifest.kind == "onnx":
        typed = "" if manifest.dtype == "fp32" else " --stronglyTyped"
        lines = "\n".join(_trtexec(record, manifest.packed) + typed for record in manifest.graphs)
        parts.append(f"## TensorRT engines without xfm-fast\n\n```sh\n{lines}\n```")
    return "\n\n".join(parts) + "\n"


def _trtexec(record: GraphRecord, packed: bool) -> str:
    """The `trtexec` command of a graph for the sizes of the last default profile."""
    axes = parse_profiles((), packed=packed)[-1].ranges
    options = [f"trtexec --onnx={record.file} --saveEngine={record.name}.engine --noTF32"]
    for name, chosen in (("min", "least"), ("opt", "best"), ("max", "most")) if record.axes else ():
        # A model may accept less than the profile has.
        sizes = {
            axis: min(getattr(axes[axis], chosen), has.most or axes[axis].most)
            for axis, has in record.axes.items()
        }
        shapes = (
            f"{tensor.name}:{'x'.join(str(sizes[dim] if isinstance(dim, str) else dim) for dim in tensor.dims)}"
            for tensor in record.inputs
        )
        options.append(f"--{name}Shapes={','.join(shapes)}")
    return " ".join(options)
