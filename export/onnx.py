"""ONNX files: graphs of the model exported, cleaned and checked, complete on disk or not there at all."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from xfm_fast import __version__
from xfm_fast.errors import StorageError, UnavailableError
from xfm_fast.models.processor import preprocessor_json
from xfm_fast.models.xfm import XFM

from .consumers import DTYPES, LARGEST_FILE, DType, Profile, profile
from .expected import Examples
from .graphs import Graph, check_fixed, frozen, tracing_call
from .manifest import GraphRecord, Manifest, package_versions
from .pipeline import Progress, export_graphs, silent
from .request import OnnxRequest, completed

# Smaller ones stay in the message: shapes are inferred from constants.
_LEAST_BESIDE = 1024
# Weights begin at a page of memory, so that runtimes can map them.
_PAGE = 4096
# Numbers of fields: of a model its graph, of a graph its weights, of a weight its entries.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9

Rewrite = Callable[[GraphRecord, Path], None]
"""Changes the ONNX file of a graph in place, between export and build."""


def export_onnx(
    model: XFM,
    folder: str | Path,
    request: OnnxRequest | None = None,
    *,
    source: str = "a model in memory",
    tokenizer_sha256: str | None = None,
    examples: Examples | None = None,
    compared: bool = True,
    companions: Mapping[str, bytes] = {},
    progress: Progress = silent,
    largest_file: int = LARGEST_FILE,
    **changes: Any,
) -> Manifest:
    """Write graphs of a model as ONNX files, and `manifest.json` beside them.

    Args:
        model: is left as it is; weights are converted graph by graph.
        folder: made if it is not there. Graphs of the same name in it are replaced.
        request: which graphs, and their form.
        source, tokenizer_sha256, examples, compared, companions, progress: see `pipeline.export_graphs`.
        largest_file: bytes beyond which weights go into a file of their own.
        changes: fields of the request: `export_onnx(model, folder, dtype="fp16", graphs=("vision",))`.

    Raises:
        UnavailableError: an unknown consumer, type, opset or graph, a head that the model lacks, or `onnx` is absent.
        InputError: a fixed axis or size that no graph can have.
        StorageError: the folder cannot be written, or has no room for the files.
    """
    request = completed(request, OnnxRequest, changes)
    spelling = check_spelling(request)

    def write(graph: Graph, record: GraphRecord, content: Manifest) -> list[str]:
        progress(f"exporting {record.name}")
        facts = {
            "graph": record.name,
            "version": __version__,
            "commit": content.commit,
            "config": json.dumps(content.config, sort_keys=True),
            "dtype": content.dtype,
            "consumer": content.consumer,
            "attention": content.attention,
            "source": content.source,
            "weights_sha256": content.weights_sha256,
            "tokenizer_sha256": content.tokenizer_sha256,
            "preprocessing": json.dumps(json.loads(preprocessor_json(model.config)), sort_keys=True),
            "special_tokens": json.dumps(_special_tokens(model)),
        }
        metadata = {f"xfm_fast.{name}": value for name, value in facts.items() if value is not None}
        written = write_onnx(
            graph, Path(folder, record.file), spelling, content.dtype, fixed=graph.own_sizes(content.fixed),
            metadata=metadata, largest_file=largest_file,
        )  # fmt: skip
        return [path.name for path in written.files]

    return export_graphs(
        model, Path(folder), request, spelling, write, suffix=".onnx", consumer=request.consumer, opset=spelling.opset,
        versions=package_versions("torch", "onnx", "onnxscript"), source=source, tokenizer_sha256=tokenizer_sha256,
        examples=examples, compared=compared, companions=companions, progress=progress,
    )  # fmt: skip


def _special_tokens(model: XFM) -> dict[str, int]:
    """The ids that begin, end and fill up texts; that of padding where the model has no tokenizer."""
    words = model.tokenizer
    ends = {} if words is None else {"bos": words.bos_token_id, "eos": words.eos_token_id}
    return ends | {"pad": model.config.pad_token_id}


def check_spelling(request: OnnxRequest) -> Profile:
    """The spelling of the graphs of a request, seen before a checkpoint is read.

    Raises:
        UnavailableError: see `consumers.profile`; or `onnx` or its exporter is not installed.
    """
    spelling = profile(request.consumer, request.dtype, request.opset)
    require_onnx()
    return spelling


@dataclass(frozen=True)
class OnnxFile:
    """A file that was written.

    Attributes:
        path: the model; with external data, `path.name + ".data"` lies beside it.
        files: everything that belongs to it.
        opset: version of the standard operators.
    """

    path: Path
    files: tuple[Path, ...]
    opset: int


def write_onnx(
    graph: Graph,
    path: Path,
    profile: Profile,
    dtype: DType,
    *,
    fixed: Mapping[str, int] | None = None,
    metadata: Mapping[str, str] | None = None,
    largest_file: int = LARGEST_FILE,
) -> OnnxFile:
    """Export a graph to `path`.

    Args:
        graph: result of `graphs.build`, its parameters already in `dtype`.
        path: the file, in an existing folder; replaced if it is there.
        profile: opset and form of attention, the one that the graph was built for.
        dtype: fp32, fp16 or bf16.
        fixed: axes that get a constant size; the others stay dynamic.
        metadata: goes into the file as it is.
        largest_file: bytes beyond which the weights go into a file of their own.

    Raises:
        UnavailableError: `onnx` or `onnxscript` is not installed.
        InputError: a fixed axis that the graph does not have, or a size that is not positive.
        StorageError: the file cannot be written; nothing half-written stays.
    """
    onnx = require_onnx()
    fixed = dict(fixed or {})
    check_fixed([graph], fixed)
    inputs, shapes = tracing_call(graph, DTYPES[dtype], fixed)
    with (
        # The exporter's messages about dimensions that it renames.
        quiet("torch.onnx"),
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stderr(io.StringIO()),
        frozen(graph),
    ):
        with _swift_tracing():
            program = torch.onnx.export(
                graph,
                inputs,
                dynamo=True,
                opset_version=profile.opset,
                input_names=[spec.name for spec in graph.inputs],
                output_names=[spec.name for spec in graph.outputs],
                dynamic_shapes=shapes,
                verbose=False,
                optimize=False,
            )
        assert program is not None
        given = [*program.model.graph.initializers.values()]
        program.optimize()
    beside = f"{path.name}.data"
    model, weights = _parted(program.model, beside)
    # The rules of the optimiser keep the graph that they saw last, and it keeps the weights that they folded away.
    for value in given:
        value.const_value = None
    _clean(model, path.stem, metadata or {})
    size = model.ByteSize() + sum(weight.nbytes for weight in weights.values())
    external = size > largest_file
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            written, data = Path(scratch, path.name), Path(scratch, beside)
            with data.open("wb") as file:
                _write_beside(file, model, weights if external else {})
            written.write_bytes(model.SerializeToString())
            # Before weights are in the file: the checker reads it whole, and looks at the form of weights alone. It
            # follows external data only where it is given a path.
            onnx.checker.check_model(str(written), full_check=True)
            if not external:
                data.unlink()
                with written.open("wb") as file:
                    _write_whole(file, model, weights)
            names = sorted(file.name for file in Path(scratch).iterdir())
            for name in names:
                shutil.move(Path(scratch) / name, path.parent / name)
        if not external:
            # Of an earlier export; nothing refers to it any more.
            (path.parent / beside).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written ({error.strerror or error}); free {size / 1e9:.1f} GB or choose another "
            "folder"
        ) from error
    return OnnxFile(path, tuple(path.parent / name for name in names), profile.opset)


def require_onnx() -> Any:
    """The module `onnx`; raises `UnavailableError` where it or the exporter is not installed."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            f"exporting to ONNX needs {error.name!r}, which is not installed; pip install 'xfm-fast[export]'"
        ) from None
    return onnx


@contextlib.contextmanager
def quiet(name: str | None = None) -> Iterator[None]:
    """Silence a logger, by default that of all: quantisers advise to preprocess graphs, which are optimised already."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _swift_tracing() -> Iterator[None]:
    """Spare PyTorch's exporter three things that are a quarter of its time and change nothing of the graph.

    It reads the source of every operator that it knows anew for each graph. Its cache of fake tensors costs more than
    it saves where sizes are symbols. And the collector goes again and again through a hundred thousand objects, all of
    which are still held; none has memory of its own yet.
    """
    from torch._dynamo import config

    collecting = gc.isenabled()
    gc.disable()
    try:
        with config.patch(fake_tensor_cache_enabled=False), _operators_read_once():
            yield
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _operators_read_once() -> Iterator[None]:
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        method, read = vars(ONNXRegistry)["from_torchlib"], ONNXRegistry.from_torchlib
    except (ImportError, KeyError, AttributeError):
        # A part of PyTorch that other versions may have elsewhere: there they are read every time.
        yield
        return
    ONNXRegistry.from_torchlib = staticmethod(functools.partial(_operators, read))
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = method


@functools.cache
def _operators(read: Callable[..., Any], opset_version: int) -> Any:
    """What the exporter reads of its operators for an opset."""
    return read(opset_version)


def _parted(program: Any, beside: str) -> tuple[Any, dict[str, Any]]:
    """The message of a graph, which says that its weights lie in a file `beside`, and the weights by name.

    A message with weights in it is a copy of them all, its serialised form another, and what the checker reads of that
    a third.
    """
    import onnx_ir

    weights: dict[str, Any] = {}
    end = 0
    for name, value in program.graph.initializers.items():
        tensor = value.const_value
        if tensor.nbytes >= _LEAST_BESIDE:
            weights[name] = tensor
            value.const_value = onnx_ir.ExternalTensor(
                beside, end, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
            )
            end += -(-tensor.nbytes // _PAGE) * _PAGE
    return onnx_ir.to_proto(program), weights


def _write_beside(file: BinaryIO, model: Any, weights: Mapping[str, Any]) -> None:
    """Write the file of the weights; of those that are not given there is room alone."""
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            continue
        start, size = int(place["offset"]), int(place["length"])
        if tensor.name in weights:
            file.seek(start)
            weights[tensor.name].tofile(file)
        else:
            file.truncate(start + size)


def _write_whole(file: BinaryIO, model: Any, weights: Mapping[str, Any]) -> None:
    """Write a graph with its weights in it, as protobuf would, one weight at a time."""
    rest, graph = type(model)(), type(model.graph)()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    graph.CopyFrom(model.graph)
    del graph.initializer[:]
    heads = []
    for tensor in model.graph.initializer:
        if tensor.name not in weights:
            graph.initializer.append(tensor)
            continue
        described = type(tensor)()
        described.CopyFrom(tensor)
        described.ClearField("external_data")
        described.ClearField("data_location")
        size = weights[tensor.name].nbytes
        head = described.SerializeToString() + _field(_RAW_DATA, size)
        heads.append((_field(_INITIALIZER, len(head) + size) + head, weights[tensor.name]))
    content = graph.SerializeToString()
    size = len(content) + sum(len(head) + weight.nbytes for head, weight in heads)
    file.write(rest.SerializeToString() + _field(_GRAPH, size) + content)
    for head, weight in heads:
        file.write(head)
        weight.tofile(file)


def _field(number: int, size: int) -> bytes:
    """The begin of a field of a protobuf message that holds so many bytes."""
    head = [number << 3 | 2]
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes([*head, size])


def _clean(model: Any, name: str, metadata: Mapping[str, str]) -> None:
    """Replace the exporter's notes, which name files of this machine, by what a reader of the graph wants."""
    graph = model.graph
    model.producer_name, model.producer_version = "xfm-fast", __version__
    graph.name, model.doc_string, graph.doc_string = name, "", ""
    for parts in (graph.node, graph.value_info, graph.input, graph.output, graph.initializer):
        for part in parts:
            part.doc_string = ""
            del part.metadata_props[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
