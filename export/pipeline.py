"""The pipeline of every export: build graphs, check disk space, trace, write, record, compare, save.

Validation comes before any file changes; the manifest is written once, at the end.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xfm_fast.errors import ExportError, InputError, StorageError, XFMError
from xfm_fast.io import storing, write_bytes
from xfm_fast.memory import release_freed_memory
from xfm_fast.models.processor import XFMProcessor
from xfm_fast.models.xfm import XFM

from .expected import (
    DECODER_GRAPHS,
    REFERENCE_FILE,
    Reference,
    keep_results,
    reference_bytes,
)
from .forms import encoder_graphs
from .graphs import DTYPES, Graph, build, default_graphs, in_dtype, needs_all_tokens
from .manifest import (
    AXES,
    MANIFEST_FILE,
    AxisRecord,
    GraphRecord,
    Manifest,
    TensorRecord,
    new_manifest,
    record_files,
)
from .request import DType, ExportRequest, GraphName, Request
from .runtimes import Spelling, check_dtype, first_line
from .slots import TORCH_DTYPES, parse_profiles
from .verification import compare_with_reference

README_FILE = "README.md"

Progress = Callable[[str], None]
"""Callback with a line of progress."""

Write = Callable[[Graph, GraphRecord, Manifest], Sequence[str]]
"""Writes a graph in the export's dtype to the record's file; returns all file names, the graph's first."""


class Subject(NamedTuple):
    """What an export takes from its model besides the graphs."""

    files: Mapping[str, bytes]
    """Sidecar files by name."""
    fields: Mapping[str, Any]
    """Fields of the manifest."""
    build: Callable[[GraphName], Graph]
    """Builds a graph once more."""
    keep_results: Callable[..., Reference]
    """Writes the reference, from (manifest, folder, model, examples)."""
    reference_bytes: int


_TENSOR_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Names, shapes and nodes.
_ROOM_PER_GRAPH = 4 << 20
# As other programs name them, by the number of graphs.
_ONNX_FILES = {
    ("encoder", 1): "onnx/model",
    ("encoder", 2): "onnx/text_model",
    ("image_encoder", 2): "onnx/vision_model",
}
# Room for the results on sentences.
_LIBRARY_REFERENCE = 64 << 20
_FACTS = ("source", "tokenizer_sha256", "companions", "progress", "examples", "compared")


def silent(message: str) -> None:
    """Drop a line of progress."""


def split_request(
    request: Request | None, request_type: type[Request], options: Mapping[str, Any]
) -> tuple[Request, dict[str, Any]]:
    """Apply the options that are fields of a request to it; returns the request and the other options."""
    facts = {name: options[name] for name in _FACTS if name in options}
    changes = {name: value for name, value in options.items() if name not in facts}
    return replace(request or request_type(), **changes), facts


def export_graphs(
    model: Any,
    folder: Path,
    request: ExportRequest,
    spelling: Spelling,
    write: Write,
    *,
    suffix: str,
    room: Callable[[Sequence[int]], int] = sum,
    runtime: str = "auto",
    source: str = "a model in memory",
    tokenizer_sha256: str | None = None,
    examples: Any = None,
    companions: Mapping[str, bytes] = {},
    compared: bool = True,
    progress: Progress = silent,
    **manifest: Any,
) -> Manifest:
    """Write graphs of a model into a folder, with their manifest, and compare them with the model in `runtime`.

    `room` estimates the disk space from the sizes of the graphs.
    """
    dtype, fixed = check_dtype(request.dtype), request.sizes
    graphs = build_graphs(model, spelling, request)
    sizes = [graph_bytes(graph, dtype) for graph in graphs.values()]
    records = graph_records(graphs, dtype, fixed, suffix)
    subject = _subject(model, spelling, request, graphs)
    prepare_folder(folder, room(sizes) + subject.reference_bytes)
    fields = {**subject.fields, **manifest}
    if tokenizer_sha256 is not None:
        fields["tokenizer_sha256"] = tokenizer_sha256
    content = new_manifest(
        source=source,
        dtype=dtype,
        attention=spelling.form,
        packed=request.packed,
        fixed=fixed,
        graphs=[],
        files=[],
        reason="it was not compared with the model",
        **fields,
    )

    # Joined weights of all graphs together are a fifth of the model.
    del graphs

    def write_graph(record: GraphRecord) -> Sequence[str]:
        progress(f"exporting {record.name}")
        with tracing(model):
            graph = subject.build(record.name)
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
        reference = subject.keep_results(content, folder, model, examples)
        if compared:
            compare_with_reference(content, folder, reference, runtime)

    companions = {**subject.files, **companions}
    return fill_folder(content, folder, records, write_graph, compare, companions)


def _subject(
    model: Any, spelling: Spelling, request: ExportRequest, graphs: Mapping[GraphName, Graph]
) -> Subject:
    if not isinstance(model, XFM):
        from . import library

        files = library.model_files(model)
        tokenizer = files.get("tokenizer.json")
        fields = {
            "use": library.use_of(model),
            "weights_sha256": weights_sha256(model, [model]),
            "tokenizer_sha256": tokenizer and hashlib.sha256(tokenizer).hexdigest(),
            "config": json.loads(files["config.json"]),
            "all_tokens": False,
        }
        return Subject(
            files,
            fields,
            lambda name: encoder_graphs(model)[name],
            library.keep_results,
            _LIBRARY_REFERENCE,
        )
    all_tokens = needs_all_tokens(model, request.all_tokens)
    fields = {
        "weights_sha256": weights_sha256(model, graphs.values()),
        "tokenizer_sha256": None if model.tokenizer is None else model.tokenizer.sha256(),
        "config": model.config.model_dump(),
        "all_tokens": all_tokens,
    }

    def rebuild(name: GraphName) -> Graph:
        return build(name, model, spelling.form, all_tokens=all_tokens, packed=request.packed)

    return Subject(
        XFMProcessor(model.config, model.tokenizer).files(),
        fields,
        rebuild,
        keep_results,
        reference_bytes(model.config, decodes=not DECODER_GRAPHS.isdisjoint(graphs)),
    )


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
        (folder / record.file).parent.mkdir(exist_ok=True)
        files = [*write(record)]
        # An exporter leaves programs in reference cycles, which hold joined weights.
        gc.collect()
        release_freed_memory()
        seconds = round(record.build_seconds + time.perf_counter() - started, 3)
        changes = {"file": files[0], "files": files, "build_seconds": seconds}
        graphs.append(record.model_copy(update=changes))
    content.graphs = graphs
    companions = {**companions, README_FILE: readme(content).encode()}
    write_companions(folder, companions)
    graph_files = (name for graph in graphs for name in graph.files)
    content.files = record_files(folder, [*companions, *graph_files])
    try:
        compare(content)
    finally:
        # The export is complete even where the comparison fails.
        content.save(folder)
    return content


def build_graphs(
    model: nn.Module, spelling: Spelling, request: ExportRequest
) -> dict[GraphName, Graph]:
    """Build and validate the graphs of a request; they share the model's parameters."""
    graphs: dict[GraphName, Graph] = {}
    if isinstance(model, XFM):
        names = default_graphs(model) if request.names is None else request.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"graph {twice[0]!r} is named twice; name it once")
        all_tokens = needs_all_tokens(model, request.all_tokens)
        for name in names:
            graphs[name] = build(
                name, model, spelling.form, all_tokens=all_tokens, packed=request.packed
            )
    else:
        from . import library

        if request.packed or request.all_tokens:
            raise InputError("packed and all_tokens are for X-FM's graphs; leave them out")
        library.use_of(model)
        with tracing(model):
            graphs |= encoder_graphs(model)
        if unknown := sorted({*(request.names or ())} - {*graphs}):
            raise InputError(
                f"{type(model).__name__} has no graph {unknown[0]!r}; choose from {', '.join(graphs)}"
            )
        graphs = {name: graphs[name] for name in request.names or graphs}
    check_fixed(graphs.values(), request.sizes)
    return graphs


@contextlib.contextmanager
def tracing(model: nn.Module) -> Iterator[None]:
    """Convert errors of the code of a library's model, which runs in the block, to an `ExportError`."""
    try:
        yield
    except (XFMError, OSError):
        raise
    except Exception as error:  # of any class
        if isinstance(model, XFM):
            raise
        reason = first_line(error if error.__cause__ is None else error.__cause__)  # pyright: ignore[reportArgumentType]
        raise ExportError(
            f"PyTorch does not trace this {type(model).__name__} ({reason}); serve the model itself, or upgrade its "
            "library"
        ) from error


def check_fixed(graphs: Collection[Graph], fixed: Mapping[str, int]) -> None:
    """Raise `InputError` for a fixed axis that no graph has, or a size below 1 or above its limit."""
    axes = {axis for graph in graphs for axis in graph.axes}
    for name, size in fixed.items():
        if name not in axes:
            raise InputError(
                f"axis {name!r} cannot be fixed; choose from {', '.join(sorted(axes)) or 'none'}"
            )
        if size < 1:
            raise InputError(f"{name}={size} is not a size; give a positive number")
        longest = min(graph.limits.get(name, size) for graph in graphs if name in graph.axes)
        if size > longest:
            raise InputError(
                f"{name}={size} exceeds the {longest} positions of this model; use fewer"
            )


def graph_records(
    graphs: Mapping[GraphName, Graph],
    dtype: DType,
    fixed: Mapping[str, int],
    suffix: str = "",
) -> list[GraphRecord]:
    """Describe graphs before they are written."""

    def described(tensor: TensorRecord) -> TensorRecord:
        tensor_dtype = "int64" if tensor.dtype == "int64" else _TENSOR_DTYPES[DTYPES[dtype]]
        dims = [fixed.get(dim, dim) if isinstance(dim, str) else dim for dim in tensor.dims]
        return tensor.model_copy(update={"dtype": tensor_dtype, "dims": dims})

    records = []
    names = _ONNX_FILES if suffix == ".onnx" else {}
    for name, graph in graphs.items():
        axes = [axis for axis in graph.axes if axis not in fixed]
        records.append(
            GraphRecord(
                name=name,
                file=f"{names.get((name, len(graphs)), name)}{suffix}",
                files=[],
                inputs=[*map(described, graph.inputs)],
                outputs=[*map(described, graph.outputs)],
                axes={axis: AxisRecord(least=1, most=graph.limits.get(axis)) for axis in axes},
                build_seconds=0,
            )
        )
    return records


def trace(
    graph: Graph, dtype: DType, fixed: Mapping[str, int], device: str = "cpu"
) -> torch.export.ExportedProgram:
    """Export a graph with parameters in `dtype` to a program on a device."""
    inputs, shapes = tracing_call(graph, DTYPES[dtype], graph.relevant(fixed))
    with torch.no_grad(), frozen(graph):
        program = torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
    if device == "cuda":
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(program, device)
    return program


def tracing_call(
    graph: Graph, dtype: torch.dtype, fixed: Mapping[str, int]
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Return inputs to trace a graph with, and the dynamic dimensions of each, in `forward`'s order."""
    dims = {
        name: torch.export.Dim(name, min=1, max=graph.limits.get(name, axis.most))
        for name, axis in AXES.items()
        if name not in fixed
    }
    shapes = []
    for tensor in graph.inputs:
        axes = {i: axis for i, axis in enumerate(tensor.dims) if isinstance(axis, str)}
        shapes.append({i: dims[axis] for i, axis in axes.items() if axis in dims})
    sizes = {name: axis.traced for name, axis in AXES.items()} | dict(fixed)
    if graph.gathered:
        shapes[-graph.gathered :] = [tuple(shapes[-graph.gathered :])]
    return random_inputs(graph, sizes, dtype), tuple(shapes)


def random_inputs(
    graph: Graph, sizes: Mapping[str, int], dtype: torch.dtype, *, seed: int = 0
) -> tuple[Tensor, ...]:
    """Generate inputs of a graph at given axis sizes: noise, small ids, captions of decreasing length."""
    generator = torch.Generator().manual_seed(seed)

    def values(tensor: TensorRecord) -> Tensor:
        name, shape = tensor.name, tensor.shape(sizes)
        if name == "token_type_ids":
            return torch.zeros(shape, dtype=torch.int64)
        if name.endswith("_ids"):
            ids = torch.randint(4, 200, shape, generator=generator)
            return ids.masked_fill(~_real_tokens(shape), 1) if name == "input_ids" else ids
        if name.endswith("_mask"):
            return _real_tokens(shape).long()
        if name == "positions":
            real = _real_tokens(shape)
            return torch.where(real, real.cumsum(-1) + 1, 1)
        if name == "segments":
            # A text in every row.
            return torch.where(_real_tokens(shape), torch.arange(shape[-2])[:, None] + 1, 0)
        if name == "firsts":
            rows = torch.arange(shape[-2]) % sizes["rows"]
            return torch.stack([rows, torch.zeros_like(rows)], -1).expand(shape).clone()
        return torch.randn(shape, generator=generator).to(dtype)

    return tuple(map(values, graph.inputs))


def _real_tokens(shape: tuple[int, ...]) -> Tensor:
    """Return a mask of captions `[..., L]`: caption n is n % L tokens shorter than the longest."""
    length = shape[-1]
    texts = torch.arange(torch.Size(shape[:-1]).numel()).view(*shape[:-1], 1)
    return torch.arange(length).expand(shape) < (length - texts % length)


@contextlib.contextmanager
def frozen(graph: Graph) -> Iterator[None]:
    """Disable gradients of the parameters: tensors derived from trainable parameters do not export."""
    trainable = [parameter for parameter in graph.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def graph_bytes(graph: nn.Module, dtype: DType) -> int:
    """Estimate the file size of a graph from its parameters, joined weights and position biases."""
    entries = sum(tensor.numel() for tensor in (*graph.parameters(), *graph.buffers()))
    return entries * DTYPES[dtype].itemsize + _ROOM_PER_GRAPH


def prepare_folder(folder: Path, needed: int) -> None:
    """Create the folder and check that `needed` bytes are free."""
    with storing(folder, "choose another folder with --out"):
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"{folder} is a file, not a folder; choose another name with --out")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder} has {free / 1e9:.2f} GB free and the export needs about {needed / 1e9:.2f} GB; free space or "
            "choose another folder"
        )


def write_companions(folder: Path, companions: Mapping[str, bytes]) -> None:
    """Write sidecar files by name, in subfolders too."""
    for name in companions:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_bytes({folder / name: data for name, data in companions.items()})


def sidecar_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Read the files of an export that are neither graphs nor written anew, by name."""
    others = {
        README_FILE,
        REFERENCE_FILE,
        *(name for graph in manifest.graphs for name in graph.files),
    }
    names = [record.name for record in manifest.files if record.name not in others]
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise StorageError(
            f"{error.filename} cannot be read ({error.strerror or error}); export again"
        ) from error


def weights_sha256(model: nn.Module, graphs: Iterable[nn.Module]) -> str:
    """Hash names, dtypes, shapes and values of the parameters that the graphs read."""
    read = {id(parameter) for graph in graphs for parameter in graph.parameters()}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if id(parameter) not in read:
            continue
        digest.update(f"{name} {parameter.dtype} {[*parameter.shape]}".encode())
        values = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def readme(manifest: Manifest) -> str:
    """Write the text of `README.md` for a complete manifest."""
    rows = ["| graph | file | inputs | outputs |", "|---|---|---|---|"]
    for graph in manifest.graphs:
        inputs, outputs = (
            "<br>".join(f"{tensor.name} {tensor.dims}" for tensor in tensors)
            for tensors in (graph.inputs, graph.outputs)
        )
        rows.append(f"| {graph.name} | {graph.file} | {inputs} | {outputs} |")
    if manifest.use is None:
        name, side = "X-FM", manifest.xfm_config.image_size
        code = (
            "from xfm_fast.export import Session\n\n"
            'session = Session.load("this folder")\n'
            'inputs = session.processor(images=["photo.jpg"], text=["a caption"])'
        )
        preparation = [
            f"Images of {side}x{side} pixels are prepared as `preprocessor_config.json` says.",
            "Texts are by `tokenizer.json`, where the model had one.",
        ]
    else:
        name = manifest.source
        code = (
            "from xfm_fast.encoders import open_encoder\n\n"
            'model = open_encoder("this folder").model  # of sentence-transformers'
        )
        preparation = ["The other files are those of sentence-transformers."]
    sections = [
        f"# {name} as {manifest.kind}",
        f"Weights of {manifest.source}, {manifest.dtype}, by xfm-fast {manifest.xfm_fast}.",
        "`manifest.json` has the sizes, and whether the files agree with the model.",
        *preparation,
        f"```python\n{code}\n```",
        "\n".join(rows),
    ]
    if manifest.kind == "onnx":
        typed = "" if manifest.dtype == "fp32" else " --stronglyTyped"
        lines = "\n".join(_trtexec(record, manifest.packed) + typed for record in manifest.graphs)
        sections.append(f"## TensorRT engines without xfm-fast\n\n```sh\n{lines}\n```")
    return "\n\n".join(sections) + "\n"


def _trtexec(record: GraphRecord, packed: bool) -> str:
    """Return the `trtexec` command of a graph for the sizes of the last default profile."""
    command = [f"trtexec --onnx={record.file} --saveEngine={record.name}.engine --noTF32"]
    profile = parse_profiles((), packed=packed)[-1].ranges
    for option, bound in (
        (("min", "least"), ("opt", "best"), ("max", "most")) if record.axes else ()
    ):
        sizes = {}
        for axis, accepted in record.axes.items():
            # A model may accept less than the profile has.
            size = getattr(profile[axis], bound)
            sizes[axis] = size if accepted.most is None else min(size, accepted.most)
        shapes = [f"{t.name}:{'x'.join(map(str, t.shape(sizes)))}" for t in record.inputs]
        command.append(f"--{option}Shapes={','.join(shapes)}")
    return " ".join(command)
