"""Other weights for engines that are there: those of a fine-tuned model, in graphs of the same structure.

An engine that was built `refittable` has no weights. They lie beside it, in the ONNX graph that it was built from, and
are put in when it is loaded. So no library and no GPU is needed to give a folder of engines other weights: the graphs
are made anew from the other model, by the way that made them first, because products that are joined and biases that
are gathered for export are none of the model's parameters. A library would put the weights of another graph in as
well, as far as names and sizes agree, and compute nonsense; therefore both graphs are compared node by node.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xfm_fast.errors import ExportError, InputError
from xfm_fast.models.xfm import XFM

from ..expected import DECODER_GRAPHS, Examples, reference_bytes
from ..manifest import GraphRecord, Manifest
from ..onnx import check_spelling, export_onnx, require_onnx
from ..pipeline import Progress, build_graphs, copy_files, graph_bytes, graph_records, prepare_folder, silent
from ..request import OnnxRequest
from ..verification import compare_with_reference, keep_reference, keep_results
from .build import fill_engines

# What only training reads.
_TRAINING = frozenset(
    (
        "attention_dropout", "detach_text_for_mlm", "drop_path_rate", "hidden_dropout", "layer_scale_init",
        "learnable_temperature", "max_temperature", "mim_patches_only", "min_num_patches", "min_temperature",
        "num_masking_patches", "temperature",
    )
)  # fmt: skip


def refit_engines(
    model: XFM,
    engines: str | Path,
    folder: str | Path,
    *,
    source: str = "a model in memory",
    tokenizer_sha256: str | None = None,
    examples: Examples | None = None,
    companions: Mapping[str, bytes] = {},
    progress: Progress = silent,
) -> Manifest:
    """Make a folder of engines with the weights of another model, without a build.

    Args:
        model: of the sizes and heads of the one that the engines were built from.
        engines: a folder of engines that were built `refittable`.
        folder: receives the engines, the graphs with the weights, and a manifest of its own.
        source, tokenizer_sha256, companions, progress: see `pipeline.export_graphs`.
        examples: see `build.export_engines`.

    Raises:
        ExportError: the folder holds no such engines.
        InputError: the model is of another structure, which is named, or both folders are one.
        UnavailableError: `onnx` is not installed, or the model lacks a head.
        StorageError: the folder cannot be written, or has no room.
    """
    engines, folder = Path(engines), Path(folder)
    given, request = refittable(engines)
    if engines.resolve() == folder.resolve():
        raise InputError(f"{folder} holds the engines themselves; choose another folder for those with other weights")
    check_sizes(model, given)
    built = build_graphs(
        model, check_spelling(request), given.graph_names, fixed=given.fixed, all_tokens=given.all_tokens,
        packed=given.packed,
    )  # fmt: skip
    for record in graph_records(built, given.dtype, model, given.fixed):
        _check_interface(record, given.graph(record.name))
    kept = sum(record.bytes for record in given.files if record.name.endswith(".engine"))
    weights = sum(graph_bytes(graph, model, given.dtype) for graph in built.values())
    decodes = not DECODER_GRAPHS.isdisjoint(built)
    prepare_folder(folder, kept + 2 * weights + reference_bytes(model.config, decodes=decodes))
    del built
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as scratch:
        onnx = Path(scratch)
        exported = export_onnx(
            model, onnx, request, source=source, tokenizer_sha256=tokenizer_sha256, companions=companions,
            progress=progress,
        )  # fmt: skip
        for record in exported.graphs:
            earlier = given.graph(record.name)
            assert earlier.weights is not None
            check_structure(record.name, engines / earlier.weights, onnx / record.file)
        reference = None
        if examples is not None:
            progress("comparing with the model")
            reference = keep_results(exported, onnx, model, examples)
            compare_with_reference(exported, onnx, reference)

        def compare(content: Manifest) -> None:
            if reference is not None:
                keep_reference(content, folder, reference)
                compare_with_reference(content, folder, reference)

        assert given.target is not None
        return fill_engines(
            exported, onnx, folder, given.target, given.options,
            {record.name: record.profiles for record in given.graphs},
            lambda record, engine: copy_files(engines, engine.parent, [engine.name]), compare, weights_beside=True,
        )  # fmt: skip


def refittable(folder: Path) -> tuple[Manifest, OnnxRequest]:
    """The manifest of engines that take other weights, and what their graphs were exported by.

    Raises:
        ExportError: the folder is not what its manifest says, or holds other things than such engines.
    """
    given = Manifest.load(folder)
    if given.target is None or not given.graphs:
        raise ExportError(
            f"{folder} holds {given.kind} and no engines; a fine-tuned model is exported with xfm-fast export "
            f"{given.kind}"
        )
    if any(record.weights is None for record in given.graphs):
        raise ExportError(
            f"the engines in {folder} hold their weights; build them once more with xfm-fast export "
            f"{given.target.library} --refittable, and give those other weights"
        )
    assert given.consumer != "aoti"
    return given, OnnxRequest(
        dtype=given.dtype,
        graphs=given.graph_names,
        fixed=[f"{axis}={size}" for axis, size in given.fixed.items()],
        all_tokens=given.all_tokens,
        packed=given.packed,
        consumer=given.consumer,
        opset=given.opset,
    )


def check_sizes(model: XFM, given: Manifest) -> None:
    """See that a model has the sizes of the one that engines were built from, before minutes are spent.

    Raises:
        InputError: names the first that differs.
    """
    sizes = model.config.model_dump()
    for name, size in given.config.items():
        if name not in _TRAINING and sizes.get(name) != size:
            raise InputError(
                f"the engines were built for a model of {name} {size} and this one has {sizes.get(name)}; build "
                f"engines of it: xfm-fast export {given.kind}"
            )


def _check_interface(found: GraphRecord, known: GraphRecord) -> None:
    for side in ("inputs", "outputs"):
        mine, theirs = ([f"{t.name} {t.dims}" for t in getattr(record, side)] for record in (found, known))
        if mine != theirs:
            raise InputError(
                f"graph {found.name!r} of this model has the {side} {', '.join(mine)}, and the engine has "
                f"{', '.join(theirs)}: models with other heads want engines of their own"
            )


def check_structure(graph: str, known: Path, found: Path) -> None:
    """See that two ONNX graphs differ in the values of their weights alone.

    Raises:
        InputError: names the first node, input, output, constant or weight that differs.
    """
    theirs, mine = _structure(known), _structure(found)
    for part in [*theirs, *mine]:
        if theirs.get(part) != mine.get(part):
            how = "is missing" if part not in mine else "is new" if part not in theirs else "is another"
            raise InputError(
                f"graph {graph!r} of this model is not the one that the engine was built from: {part} {how}. Weights "
                "that are equal are stored once, so a model in which some became equal, or no longer are, wants "
                "engines of its own too"
            )


def _structure(path: Path) -> dict[str, Any]:
    """What a graph is made of but for the values of its weights, by name: one part for each thing to be compared."""
    onnx = require_onnx()
    graph = onnx.load(str(path), load_external_data=False).graph
    integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
    parts: dict[str, Any] = {}
    for node in graph.node:
        parts[f"node {node.name}"] = node.SerializeToString(deterministic=True)
    for value in (*graph.input, *graph.output):
        parts[f"{value.name}"] = value.SerializeToString(deterministic=True)
    for weight in graph.initializer:
        # Numbers that are no weights say which entries are read, and how they are laid out.
        constant = onnx.numpy_helper.to_array(weight).tobytes() if weight.data_type in integers else b""
        parts[f"weight {weight.name}"] = (weight.data_type, [*weight.dims], constant)
    return parts
