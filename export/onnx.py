"""ONNX files: graphs of the model exported, cleaned, checked and written atomically."""

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
from pathlib import Path
from typing import Any, BinaryIO

import torch

from xfm_fast import __version__
from xfm_fast.errors import ExportError, StorageError, UnavailableError, explain_types
from xfm_fast.models.processor import preprocessor_json
from xfm_fast.models.xfm import XFM

from .graphs import DTYPES, Graph
from .manifest import GraphRecord, Manifest, package_versions
from .pipeline import check_fixed, export_graphs, frozen, split_request, tracing_call
from .request import DType, OnnxRequest
from .runtimes import LARGEST_FILE, Exporter, Runtime, Spelling, find_runtime
from .verification import verify

# Smaller ones stay in the message: shapes are inferred from constants.
_LEAST_BESIDE = 1024
# Weights begin at a page of memory, so that runtimes can map them.
_PAGE = 4096
# Numbers of fields: of a model its graph, of a graph its weights, of a weight its entries.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9


@explain_types
def export_onnx(
    model: Any,
    folder: str | Path,
    request: OnnxRequest | None = None,
    *,
    examples: Any = None,
    compared: bool = True,
    largest_file: int = LARGEST_FILE,
    **options: Any,
) -> Manifest:
    """Write graphs of a model as ONNX files with a `manifest.json`.

    Args:
        model: An X-FM, or a model of sentence-transformers, left unchanged; weights are converted graph by graph.
        folder: Created if missing. Graphs of the same name in it are replaced.
        request: The graphs and their form.
        examples: `Examples`, or `library.Samples`, to compare the export with the model on; without them the status
            is `unverified`.
        compared: False defers the comparison to `verify`, which needs no model in memory.
        largest_file: Bytes beyond which weights go into a separate file.
        options: Fields of the request, as in `export_onnx(model, folder, dtype="fp16", graphs=("vision",))`; and for
            the manifest `source`, the origin of the weights in words, `tokenizer_sha256` and `companions`, sidecar
            files by name; `progress` is called with lines of progress.

    Raises:
        UnavailableError: An unknown consumer, dtype, opset or graph, a head that the model lacks, or a missing `onnx`.
        InputError: A fixed axis or size that no graph can have.
        StorageError: The folder is not writable or too small.
    """
    request, facts = split_request(request, OnnxRequest, options)
    spelling = check_spelling(request)
    tokens: dict[str, str] = {}
    if isinstance(model, XFM):
        special_tokens = {"pad": model.config.pad_token_id}
        if (tokenizer := model.tokenizer) is not None:
            ends = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
            special_tokens = ends | special_tokens
        preprocessing = json.loads(preprocessor_json(model.config))
        tokens = {
            "preprocessing": json.dumps(preprocessing, sort_keys=True),
            "special_tokens": json.dumps(special_tokens),
        }

    def write(graph: Graph, record: GraphRecord, content: Manifest) -> list[str]:
        properties = {
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
            **tokens,
        }
        files = write_onnx(
            graph,
            Path(folder, record.file),
            spelling,
            content.dtype,
            fixed=graph.relevant(content.fixed),
            metadata={
                f"xfm_fast.{name}": value for name, value in properties.items() if value is not None
            },
            largest_file=largest_file,
        )
        return [path.relative_to(folder).as_posix() for path in files]

    return export_graphs(
        model,
        Path(folder),
        request,
        spelling,
        write,
        suffix=".onnx",
        consumer=request.consumer,
        opset=spelling.opset,
        versions=package_versions("torch", "onnx", "onnxscript"),
        examples=examples,
        compared=compared,
        **facts,
    )


def check_spelling(request: OnnxRequest) -> Spelling:
    """Return attention form and opset of a request; raises `UnavailableError` before a checkpoint is read."""
    spelling = find_runtime(request.consumer).spelling(request.dtype, request.opset)
    require_onnx()
    return spelling


def exporter_of(runtime: type[Runtime]) -> Exporter:
    """Return the exporter of a runtime: its own, or that of ONNX files."""
    return runtime.exporter() or Exporter(check_spelling, functools.partial(_start, runtime.name))


def export_for(
    runtime: type[Runtime],
    model: Any,
    folder: str | Path,
    request: Any = None,
    **options: Any,
) -> Manifest:
    """Export graphs of a model for a runtime; the options are those of `export_onnx`."""
    with exporter_of(runtime).start(model, folder, request, **options) as finish:
        return finish()


@contextlib.contextmanager
def _start(
    consumer: str, model: Any, folder: str | Path, request: Any = None, **options: Any
) -> Iterator[Callable[[], Manifest]]:
    request = request or OnnxRequest(consumer=consumer)
    manifest = export_onnx(model, folder, request, **options, compared=False)
    del model
    compares = options.get("examples") is not None
    yield lambda: verify(folder, check_files=False) if compares else manifest


def write_onnx(
    graph: Graph,
    path: Path,
    spelling: Spelling,
    dtype: DType,
    *,
    fixed: Mapping[str, int] | None = None,
    metadata: Mapping[str, str] | None = None,
    largest_file: int = LARGEST_FILE,
) -> list[Path]:
    """Export a graph with parameters in `dtype` and return the files: `path`, and a large graph's weights beside it."""
    onnx = require_onnx()
    fixed = dict(fixed or {})
    check_fixed([graph], fixed)
    inputs, shapes = tracing_call(graph, DTYPES[dtype], fixed)
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stderr(io.StringIO()),
        frozen(graph),
    ):
        with _fast_tracing():
            program = torch.onnx.export(
                graph,
                inputs,
                dynamo=True,
                opset_version=spelling.opset,
                input_names=[tensor.name for tensor in graph.inputs],
                output_names=[tensor.name for tensor in graph.outputs],
                dynamic_shapes=shapes,
                verbose=False,
                optimize=False,
            )
        assert program is not None
        for tensor, value in zip(graph.inputs, program.model.graph.inputs, strict=True):
            for dim, size in zip(tensor.dims, value.shape or (), strict=True):
                # Where its first strategy fails, PyTorch goes on with one that makes constants.
                if isinstance(dim, str) and dim not in fixed and isinstance(size, int):
                    raise ExportError(
                        f"the code of {path.stem} works for {dim}={size} alone, that of its trace; fix it: --fixed "
                        f"{dim}={size}, or use a model whose code reads no sizes"
                    )
        initializers = [*program.model.graph.initializers.values()]
        with _named_weights(program.model.graph):
            program.optimize()
    beside = f"{path.name}.data"
    model, weights = _split_weights(program.model, beside)
    # The optimiser's rules reference the last graph, and with it the weights that they folded.
    for value in initializers:
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
            # Before the weights are in the file: the checker reads it whole, and only checks shape and dtype of
            # weights. It follows external data only where it gets a path.
            onnx.checker.check_model(str(written), full_check=True)
            if not external:
                data.unlink()
                with written.open("wb") as file:
                    _write_whole(file, model, weights)
            names = sorted(file.name for file in Path(scratch).iterdir())
            for name in names:
                shutil.move(Path(scratch) / name, path.parent / name)
        if not external:
            # A leftover of an earlier export.
            (path.parent / beside).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written ({error.strerror or error}); free {size / 1e9:.1f} GB or choose another "
            "folder"
        ) from error
    return [path.parent / name for name in names]


def require_onnx() -> Any:
    """Import `onnx`; raises `UnavailableError` if it or the exporter is not installed."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            f"exporting to ONNX needs {error.name!r}, which is not installed; pip install '.[export]'"
        ) from None
    return onnx


@contextlib.contextmanager
def _fast_tracing() -> Iterator[None]:
    """Speed up torch's exporter by a quarter: operators read once, no fake-tensor cache, no garbage collection.

    Its messages about dimensions that it renames are silenced.
    """
    from torch._dynamo import config

    logger = logging.getLogger("torch.onnx")
    collecting, level = gc.isenabled(), logger.level
    gc.disable()
    logger.setLevel(logging.ERROR)
    try:
        with config.patch(fake_tensor_cache_enabled=False), _cached_operators():
            yield
    finally:
        logger.setLevel(level)
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _cached_operators() -> Iterator[None]:
    """Let the exporter read its table of operators once per opset instead of once per graph."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        method, read = vars(ONNXRegistry)["from_torchlib"], ONNXRegistry.from_torchlib
    except (ImportError, KeyError, AttributeError):
        # Private to PyTorch; where it moved, operators are read every time.
        yield
        return
    ONNXRegistry.from_torchlib = staticmethod(functools.partial(_read_operators, read))
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = method


@functools.cache
def _read_operators(read: Callable[..., Any], opset_version: int) -> Any:
    return read(opset_version)


@contextlib.contextmanager
def _named_weights(graph: Any) -> Iterator[None]:
    """Give transposed weights that the optimiser folds the names of their parameters."""
    parameters = {
        node.outputs[0].name: node.inputs[0].name
        for node in graph
        if node.op_type == "Transpose" and node.inputs[0].name in graph.initializers
    }
    yield
    for name, parameter in parameters.items():
        if name in graph.initializers and parameter not in graph.initializers:
            value = graph.initializers.pop(name)
            value.name = parameter
            graph.initializers[parameter] = value


def _split_weights(program: Any, beside: str) -> tuple[Any, dict[str, Any]]:
    """Return the graph message, its weights external in `beside`, and the weights by name, without copies of them."""
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
    """Write the weight file; weights that are not in `weights` are left as holes."""
    for tensor in model.graph.initializer:
        location = {entry.key: entry.value for entry in tensor.external_data}
        if not location:
            continue
        start, size = int(location["offset"]), int(location["length"])
        if tensor.name in weights:
            file.seek(start)
            weights[tensor.name].tofile(file)
        else:
            file.truncate(start + size)


def _write_whole(file: BinaryIO, model: Any, weights: Mapping[str, Any]) -> None:
    """Write a graph with embedded weights, one weight at a time, as protobuf would."""
    header, graph = type(model)(), type(model.graph)()
    header.CopyFrom(model)
    header.ClearField("graph")
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
    file.write(header.SerializeToString() + _field(_GRAPH, size) + content)
    for head, weight in heads:
        file.write(head)
        weight.tofile(file)


def _field(tag: int, size: int) -> bytes:
    """Encode the header of a length-delimited protobuf field."""
    head = [tag << 3 | 2]
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes([*head, size])


def _clean(model: Any, name: str, metadata: Mapping[str, str]) -> None:
    """Replace the exporter's metadata, which names local files, by ours."""
    graph = model.graph
    model.producer_name, model.producer_version = "xfm-fast", __version__
    graph.name, model.doc_string, graph.doc_string = name, "", ""
    for messages in (graph.node, graph.value_info, graph.input, graph.output, graph.initializer):
        for message in messages:
            message.doc_string = ""
            del message.metadata_props[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
