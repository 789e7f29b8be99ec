"""From a model to a folder of ONNX files with their manifest: everything that can fail early fails first."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xfm_fast import __version__
from xfm_fast.errors import InputError, StorageError, UnavailableError
from xfm_fast.models.xfm import XFM

from . import manifest as manifests
from .consumers import DTYPES, Consumer, DType, Profile, profile
from .expected import reference_bytes
from .graphs import (
    DOMAIN,
    GRAPHS,
    OPERATOR,
    Axis,
    Graph,
    GraphName,
    TensorSpec,
    build,
    check_fixed,
    frozen,
    tracing_call,
)
from .manifest import MANIFEST_FILE, AxisRecord, GraphRecord, Manifest, TensorRecord

DEFAULT_GRAPHS: tuple[GraphName, ...] = ("vision", "text", "image_memory", "fusion")
"""What a server composes; `match`, the whole model in one file, is exported on request."""

_TENSOR_TYPES: dict[DType, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Names, shapes and nodes beside the weights.
_ROOM_PER_GRAPH = 4 << 20

LARGEST_FILE = 2**31 - 2**20
"""Protobuf reads no message of two gigabytes; larger graphs keep their weights beside the file."""

Progress = Callable[[str], None]

Rewrite = Callable[[GraphRecord, Path], None]
"""Changes the ONNX file of a graph in place, between export and build."""


def export_onnx(
    model: XFM,
    folder: str | Path,
    *,
    consumer: Consumer = "onnxruntime",
    dtype: DType = "fp32",
    graphs: Sequence[GraphName] | None = None,
    opset: int | None = None,
    fixed: Mapping[str, int] | None = None,
    all_tokens: bool = False,
    source: str = "a model in memory",
    tokenizer_sha256: str | None = None,
    progress: Progress = lambda message: None,
    largest_file: int = LARGEST_FILE,
) -> Manifest:
    """Write graphs of a model as ONNX files, and `manifest.json` beside them.

    The manifest says `unverified`; `verification.verify_export` compares the export with the model.

    Args:
        model: is left as it is; weights are converted graph by graph.
        folder: made if it is not there. Graphs of the same name in it are replaced.
        consumer: who reads the files; decides the form of attention and the opset.
        dtype: of weights, inputs and outputs.
        graphs: which ones; by default `DEFAULT_GRAPHS`.
        opset: of ONNX; see `consumers.profile`.
        fixed: axes (`batch`, `texts`, `length`) that get one size; the others stay dynamic.
        all_tokens: `fusion` returns every token, not token 0 alone.
        source: where the weights come from, in words without paths; goes into the manifest.
        tokenizer_sha256: of the vocabulary that the ids belong to.
        progress: is told what is being done.
        largest_file: bytes beyond which weights go into a file of their own.

    Raises:
        UnavailableError: an unknown consumer, type, opset or graph, a head that the model lacks, or `onnx` is absent.
        InputError: a fixed axis or size that no graph can have.
        StorageError: the folder cannot be written, or has no room for the files.
    """
    folder, fixed = Path(folder), dict(fixed or {})
    spelling = profile(consumer, dtype, opset)
    require_onnx()
    built = build_graphs(model, spelling, graphs, fixed=fixed, all_tokens=all_tokens)
    needed = sum(graph_bytes(graph, model, dtype) for graph in built.values())
    prepare_folder(folder, needed + reference_bytes(model.config))
    content = manifests.new_manifest(
        source=source,
        weights_sha256=weights_sha256(model, built.values()),
        tokenizer_sha256=tokenizer_sha256,
        config=model.config.model_dump(),
        dtype=dtype,
        consumer=consumer,
        opset=spelling.opset,
        attention=spelling.form,
        all_tokens=all_tokens,
        fixed=fixed,
        versions=manifests.package_versions("torch", "onnx", "onnxscript"),
        graphs=[],
        files=[],
        reason="it was not compared with the model",
    )
    # From here on the files change, and an earlier manifest no longer describes them.
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    content.graphs = write_graphs(
        built, folder, spelling, dtype, model, fixed=fixed, metadata=_metadata(content), progress=progress,
        largest_file=largest_file,
    )  # fmt: skip
    content.files = manifests.record_files(folder, [name for graph in content.graphs for name in graph.files])
    content.save(folder)
    return content


def build_graphs(
    model: XFM,
    spelling: Profile,
    names: Sequence[GraphName] | None = None,
    *,
    fixed: Mapping[str, int] | None = None,
    all_tokens: bool = False,
) -> dict[GraphName, Graph]:
    """The graphs to export, checked together; they share the model's parameters.

    Raises:
        UnavailableError: a graph that is unknown or that the model cannot give.
        InputError: no graph, one named twice, or a fixed axis or size that none of them can have.
    """
    names = DEFAULT_GRAPHS if names is None else names
    if not names:
        raise InputError(f"no graph is named; choose from {', '.join(GRAPHS)}")
    twice = sorted({name for name in names if [*names].count(name) > 1})
    if twice:
        raise InputError(f"graph {twice[0]!r} is named twice; name it once")
    built: dict[GraphName, Graph] = {name: build(name, model, spelling.form, all_tokens=all_tokens) for name in names}
    check_fixed(built.values(), fixed or {})
    longest = model.config.max_text_length
    if (fixed or {}).get("length", 0) > longest:
        raise InputError(f"length={(fixed or {})['length']} exceeds the {longest} positions of this model; use fewer")
    return built


def write_graphs(
    built: Mapping[GraphName, Graph],
    folder: Path,
    spelling: Profile,
    dtype: DType,
    model: XFM,
    *,
    fixed: Mapping[str, int] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = lambda message: None,
    largest_file: int = LARGEST_FILE,
) -> list[GraphRecord]:
    """Write graphs from `build_graphs` as `<name>.onnx` into an existing folder.

    Raises:
        StorageError: a file cannot be written.
    """
    records = []
    for name, graph in built.items():
        progress(f"exporting {name}")
        started = time.perf_counter()
        sizes = {axis: size for axis, size in (fixed or {}).items() if axis in _axis_names(graph)}
        converted = in_dtype(graph, dtype)
        written = write_onnx(
            converted, folder / f"{name}.onnx", spelling, dtype, fixed=sizes, largest_file=largest_file,
            metadata={"xfm_fast.graph": name} | dict(metadata or {}),
        )  # fmt: skip
        records.append(
            GraphRecord(
                name=name,
                file=written.path.name,
                files=[path.name for path in written.files],
                build_seconds=round(time.perf_counter() - started, 3),
                **graph_interface(graph, dtype, model, sizes),
            )
        )
    return records


def graph_interface(graph: Graph, dtype: DType, model: XFM, fixed: Mapping[str, int]) -> dict:
    """Inputs, outputs and axes of a graph, as `GraphRecord` has them."""

    def record(spec: TensorSpec) -> TensorRecord:
        dims = [fixed.get(dim.name, dim.name) if isinstance(dim, Axis) else dim for dim in spec.dims]
        return TensorRecord.model_validate(
            {"name": spec.name, "dtype": _TENSOR_TYPES[dtype] if spec.dtype == "compute" else spec.dtype, "dims": dims}
        )

    axes = {axis.name: axis for spec in graph.inputs for axis in spec.axes.values() if axis.name not in fixed}
    most = {"length": model.config.max_text_length}
    return {
        "inputs": [record(spec) for spec in graph.inputs],
        "outputs": [record(spec) for spec in graph.outputs],
        "axes": {name: AxisRecord(least=axis.least, most=most.get(name)) for name, axis in axes.items()},
    }


def in_dtype(graph: Graph, dtype: DType) -> Graph:
    """The graph with parameters in `dtype`: itself where they are, else a copy."""
    wanted = DTYPES[dtype]
    if all(parameter.dtype == wanted for parameter in graph.parameters()):
        return graph
    return copy.deepcopy(graph).to(wanted)


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


def parse_graphs(text: str) -> tuple[GraphName, ...]:
    """Graph names from a list with commas.

    Raises:
        UnavailableError: an unknown one.
        InputError: the list is not blank and names none.
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in GRAPHS:
            raise UnavailableError(f"graph {name!r} is unknown; choose from {', '.join(GRAPHS)}")
    if text.strip() and not names:
        raise InputError(f"--graphs {text!r} names no graph; choose from {', '.join(GRAPHS)}")
    return names  # pyright: ignore[reportReturnType]


def parse_fixed(text: str) -> dict[str, int]:
    """Sizes of axes from a list such as `batch=1,length=40`.

    Raises:
        InputError: an entry that is no name with a whole number.
    """
    fixed = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not name or not size.isdigit():
            raise InputError(f"--fixed {part!r} is not understood; write axis=size, such as batch=1,length=40")
        fixed[name] = int(size)
    return fixed


def _axis_names(graph: Graph) -> set[str]:
    return {axis.name for spec in graph.inputs for axis in spec.axes.values()}


def _metadata(content: Manifest) -> dict[str, str]:
    facts = {
        "version": __version__,
        "commit": content.commit,
        "config": json.dumps(content.config, sort_keys=True),
        "dtype": content.dtype,
        "consumer": content.consumer,
        "attention": content.attention,
        "source": content.source,
        "weights_sha256": content.weights_sha256,
        "tokenizer_sha256": content.tokenizer_sha256,
    }
    return {f"xfm_fast.{name}": value for name, value in facts.items() if value is not None}


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Attributes:
        path: of the model; with external data, `path.name + ".data"` lies beside it.
        files: everything that belongs to it.
        opset: of the standard operators.
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
        graph: from `graphs.build`, its parameters already in `dtype`.
        path: of the file, in an existing folder; replaced if it is there.
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
    model = _export(graph, profile, DTYPES[dtype], fixed)
    if profile.form == "function":
        _add_attention_function(model, profile.opset)
    _clean(model, path.stem, metadata or {})
    size = _bytes(model)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            written = Path(scratch) / path.name
            external = size > largest_file
            onnx.save(
                model, str(written), save_as_external_data=external, location=f"{path.name}.data", size_threshold=1024
            )
            # The checker follows external data only where it is given a path.
            onnx.checker.check_model(str(written), full_check=True)
            names = sorted(file.name for file in Path(scratch).iterdir())
            for name in names:
                shutil.move(Path(scratch) / name, path.parent / name)
        if not external:
            # Of an earlier export; nothing refers to it any more.
            (path.parent / f"{path.name}.data").unlink(missing_ok=True)
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


def _export(graph: Graph, profile: Profile, dtype: torch.dtype, fixed: Mapping[str, int]) -> Any:
    inputs, shapes = tracing_call(graph, dtype, fixed)
    with _quiet(), frozen(graph):
        program = torch.onnx.export(
            graph,
            inputs,
            dynamo=True,
            opset_version=profile.opset,
            input_names=[spec.name for spec in graph.inputs],
            output_names=[spec.name for spec in graph.outputs],
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's messages about dimensions that it renames."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _add_attention_function(model: Any, opset: int) -> None:
    """Give `xfm::Attention` a body, for every runtime that has no kernel of that name."""
    from onnx import AttributeProto, helper

    inputs, outputs = ["q", "k", "v", "bias"], ["out"]
    body = helper.make_node("Attention", inputs, outputs)
    scale = body.attribute.add()
    scale.name, scale.ref_attr_name, scale.type = "scale", "scale", AttributeProto.FLOAT
    function = helper.make_function(
        DOMAIN, OPERATOR, inputs, outputs, [body], [helper.make_opsetid("", opset)], attributes=["scale"]
    )
    model.functions.append(function)
    if all(known.domain != DOMAIN for known in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _bytes(model: Any) -> int:
    """Size of the serialised model, which protobuf itself cannot say beyond two gigabytes."""
    weights = sum(len(part.raw_data) for part in model.graph.initializer)
    return weights + (0 if weights > LARGEST_FILE else model.ByteSize() - weights)


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


def widen(path: Path, out: Path) -> None:
    """Write a copy of a bf16 graph whose inputs, outputs and arithmetic are fp32. Weights keep their value.

    Args:
        path: of the graph; weights that lie beside it are read too.
        out: in an existing folder; weights of more than two gigabytes go into a file beside it.
    """
    import onnx
    from onnx import numpy_helper

    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    model = onnx.load(str(path))
    graph = model.graph

    def widened(tensor: Any) -> None:
        if tensor.data_type == narrow:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    for tensor in graph.initializer:
        widened(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                widened(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == narrow:
                attribute.i = wide
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    size = sum(len(tensor.raw_data) for tensor in graph.initializer)
    onnx.save(model, str(out), save_as_external_data=size > LARGEST_FILE, location=f"{out.name}.data")
