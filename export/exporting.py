"""From a model to a folder of ONNX files with their manifest: everything that can fail early fails first."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from xfm_fast import __version__
from xfm_fast.errors import InputError, StorageError, UnavailableError
from xfm_fast.export import manifest as manifests
from xfm_fast.export.consumers import DTYPES, Consumer, DType, Profile, profile
from xfm_fast.export.graphs import GRAPHS, Axis, Graph, GraphName, TensorSpec, build
from xfm_fast.export.manifest import MANIFEST_FILE, AxisRecord, GraphRecord, Manifest, TensorRecord
from xfm_fast.export.onnx_files import LARGEST_FILE, require_onnx, write_onnx
from xfm_fast.export.reference import reference_bytes
from xfm_fast.export.tracing import check_fixed
from xfm_fast.models.xfm import XFM

DEFAULT_GRAPHS: tuple[GraphName, ...] = ("vision", "text", "image_memory", "fusion")
"""What a server composes; `match`, the whole model in one file, is exported on request."""

_TENSOR_TYPES: dict[DType, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Names, shapes and nodes beside the weights.
_ROOM_PER_GRAPH = 4 << 20

Progress = Callable[[str], None]


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
