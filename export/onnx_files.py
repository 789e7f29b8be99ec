"""A graph of the model as an ONNX file: exported, cleaned, checked, and complete on disk or not there at all."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfm_fast import __version__
from xfm_fast.errors import InputError, StorageError, UnavailableError
from xfm_fast.export.attention import DOMAIN, OPERATOR
from xfm_fast.export.consumers import DTYPES, DType, Profile
from xfm_fast.export.graphs import Axis, Graph, TensorSpec

LARGEST_FILE = 2**31 - 2**20
"""Protobuf reads no message of two gigabytes; larger graphs keep their weights beside the file."""

_EXAMPLE_SIZES = {"batch": 2, "texts": 3, "length": 7}
_LARGEST_SIZES = {"batch": 4096, "texts": 4096, "length": 512}


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


def random_inputs(graph: Graph, sizes: Mapping[str, int], dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of a graph at the given sizes of its axes: noise, ids of every vocabulary, texts of falling length."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(_random(spec, sizes, dtype, generator) for spec in graph.inputs)


def _random(spec: TensorSpec, sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    shape = spec.shape(dict(sizes))
    if spec.name == "input_ids":
        ids = torch.randint(4, 200, shape, generator=generator)
        return ids.masked_fill(~_real(shape), 1)
    if spec.name == "attention_mask":
        return _real(shape).long()
    return torch.randn(shape, generator=generator).to(dtype)


def _real(shape: tuple[int, ...]) -> Tensor:
    """Which tokens of texts `[..., L]` are real: text n has n % L tokens less than the longest."""
    length = shape[-1]
    texts = torch.arange(torch.Size(shape[:-1]).numel()).view(*shape[:-1], 1)
    return torch.arange(length).expand(shape) < (length - texts % length)


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


def check_fixed(graphs: Iterable[Graph], fixed: Mapping[str, int]) -> None:
    """Raise `InputError` for a fixed axis that none of the graphs has, or a size that is not positive."""
    known = {axis.name for graph in graphs for spec in graph.inputs for axis in spec.axes.values()}
    for name, size in fixed.items():
        if name not in known:
            raise InputError(f"axis {name!r} cannot be fixed; choose from {', '.join(sorted(known)) or 'none'}")
        if size < 1:
            raise InputError(f"{name}={size} is no size; give a positive number")


def _export(graph: Graph, profile: Profile, dtype: torch.dtype, fixed: Mapping[str, int]) -> Any:
    inputs = random_inputs(graph, _EXAMPLE_SIZES | dict(fixed), dtype)
    dims: dict[str, Any] = {}

    def dimension(axis: Axis) -> Any:
        if axis.name in fixed:
            return None
        return dims.setdefault(axis.name, torch.export.Dim(axis.name, min=axis.least, max=_LARGEST_SIZES[axis.name]))

    shapes = tuple(
        {place: dim for place, axis in spec.axes.items() if (dim := dimension(axis)) is not None}
        for spec in graph.inputs
    )
    with _quiet(), _frozen(graph):
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
def _frozen(graph: Graph) -> Iterator[None]:
    """With parameters that need no gradient: what is derived from trainable ones does not export."""
    trainable = [parameter for parameter in graph.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


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
