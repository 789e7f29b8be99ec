"""A model repository of NVIDIA's Triton Inference Server, made from an export.

Each graph becomes a model of the platform ONNX Runtime or TensorRT, and `rank` a Python model over
them. Models are written to a temporary folder that is then renamed. Instances, batching delays, and
limits and cache of `rank` are lines of `config.pbtxt`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from xfm_fast.errors import ExportError, InputError, StorageError
from xfm_fast.io import staged, storing, write_bytes
from xfm_fast.models.processor import find_tokenizer
from xfm_fast.tokenizer import CaptionTokenizer

from ..manifest import AxisRecord, GraphRecord, Manifest, TensorRecord, record_files
from ..pipeline import Progress, prepare_folder, silent
from ..request import DEFAULT_GRAPHS, RepositoryOptions
from ..slots import Slot, graph_slots, largest

PLATFORMS = {"onnx": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
"""The platforms of Triton by kind of export; other exports are not served by Triton."""

TOKENIZER_FILE = "tokenizer.json"

_RANK_SCRIPT = f"from {__name__}.rank import TritonPythonModel as TritonPythonModel\n"
# Limits of a rank request, and megabytes of image memories that the model caches between requests.
_RANK_LIMITS = {"most_images": 16, "most_captions": 1024, "cache_mb": 1024}
# Captions are truncated to this length in the official evaluation.
_OFFICIAL_TOKENS = 40
# Configurations and vocabulary.
_ROOM = 8 << 20
# Requests of the rank model in one batch.
_RANK_BATCH = 8
_BATCHING = {"max_queue_delay_microseconds": 500}
_DTYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
}


@dataclass(frozen=True)
class PlannedModel:
    """A model of the repository: of a graph, or `rank` with the manifest of its graphs."""

    name: str
    config: dict[str, Any]
    graph: GraphRecord | None = None
    manifest: Manifest | None = None


def write_model_repository(
    folder: str | Path,
    out: str | Path,
    options: RepositoryOptions | None = None,
    *,
    tokenizer: CaptionTokenizer | None = None,
    progress: Progress = silent,
) -> list[PlannedModel]:
    """Write a repository with a model for every graph of an export and, by default, `rank`; `out` must not exist."""
    folder, out, options = Path(folder), Path(out), options or RepositoryOptions()
    export, repository = folder.resolve(), out.resolve()
    if export == repository or export in repository.parents or repository in export.parents:
        raise InputError(
            f"{out} and the export {folder} contain each other; choose a separate folder"
        )
    progress("comparing the export with its manifest")
    manifest = Manifest.load(folder)
    if manifest.use is not None:
        # It has no rank model; clients send tokens.
        options = replace(options, pipeline="graphs")
    if tokenizer is None and options.pipeline == "rank":
        tokenizer = find_tokenizer(folder, manifest.xfm_config)
    models = plan_models(manifest, options, tokenizer)
    with storing(out, "free space or choose another --out"):
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise StorageError(f"{out} exists; delete it, or choose another folder")
        prepare_folder(repository.parent, sum(file.bytes for file in manifest.files) + _ROOM)
        with staged(repository) as scratch:
            for model in models:
                progress(f"writing {model.name}")
                _write_model(model, folder, scratch / model.name, tokenizer)
    return models


def _write_model(
    model: PlannedModel, export: Path, folder: Path, tokenizer: CaptionTokenizer | None
) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    for name in model.graph.files if model.graph else ():
        copy = version / Path(name).name
        shutil.copyfile(export / name, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
    config = "".join(f"{line}\n" for line in render(model.config))
    contents = {folder / "config.pbtxt": config.encode()}
    if model.manifest is not None and tokenizer is not None:
        contents[version / "model.py"] = _RANK_SCRIPT.encode()
        tokenizer.save(version / TOKENIZER_FILE)
        files = record_files(version, [TOKENIZER_FILE])
        model.manifest.model_copy(update={"files": files}).save(version)
    write_bytes(contents)


def plan_models(
    manifest: Manifest, options: RepositoryOptions, tokenizer: CaptionTokenizer | None
) -> list[PlannedModel]:
    """Plan the models of a repository; raises an `XFMError` for exports, options and tokenizers that do not fit."""
    options.check()
    if manifest.status == "failed":
        raise ExportError(
            f"this export failed verification ({manifest.reason}); export again in another --dtype"
        )
    if manifest.packed:
        raise ExportError(
            "the graphs take packed captions and Triton's models padded ones; export without --packed"
        )
    if manifest.kind not in PLATFORMS:
        raise ExportError(
            f"Triton runs {' and '.join(PLATFORMS)}, not {manifest.kind}; export to one of them"
        )
    if manifest.kind == "tensorrt":
        if options.device == "cpu":
            raise ExportError(
                "device cpu does not run engines of tensorrt; leave it out, or export to onnx"
            )
        options = replace(options, device="gpu")
    models = []
    for record in manifest.graphs:
        name = record.name if manifest.use else f"{options.prefix}_{record.name}"
        config = graph_config(name, record, PLATFORMS[manifest.kind], options)
        models.append(PlannedModel(name, config, graph=record))
    if options.pipeline == "rank":
        models.append(_plan_rank(manifest, options, tokenizer))
    return models


def _plan_rank(
    manifest: Manifest, options: RepositoryOptions, tokenizer: CaptionTokenizer | None
) -> PlannedModel:
    alternative = "choose --pipeline graphs"
    if missing := [graph for graph in DEFAULT_GRAPHS if graph not in manifest.graph_names]:
        raise ExportError(
            f"rank needs the graphs {', '.join(missing)}; export them with --graphs, or {alternative}"
        )
    if all(output.name != "match_logits" for output in manifest.graph("fusion").outputs):
        raise ExportError(
            f"rank needs match logits; export a model with the 'matching' head, or {alternative}"
        )
    if tokenizer is None:
        raise InputError(
            f"rank needs a tokenizer for captions; export the model with --tokenizer, or {alternative}"
        )
    tokenizer.check(manifest.xfm_config)
    if manifest.tokenizer_sha256 not in (None, tokenizer.sha256()):
        raise InputError(
            f"{tokenizer.origin} is not the export's tokenizer; give the tokenizer of the export"
        )
    records = []
    for graph in DEFAULT_GRAPHS:
        record = manifest.graph(graph)
        rows = batch_limit(record, options.most_batch)
        if rows and not record.profiles:
            # The batch limit of Triton, `max_batch_size`.
            batch = AxisRecord(least=record.axes["batch"].least, most=rows)
            record = record.model_copy(update={"axes": record.axes | {"batch": batch}})
        records.append(record)
    tokens = min(_OFFICIAL_TOKENS, manifest.xfm_config.max_text_length)
    for record in records:
        if record.name in ("text", "fusion"):
            tokens = min(tokens, largest(graph_slots(record), "length") or tokens)
    name = f"{options.prefix}_rank"
    config = rank_config(name, tokens, options)
    manifest = manifest.model_copy(update={"graphs": records, "files": []})
    return PlannedModel(name, config, manifest=manifest)


class Symbol(str):
    """The name of an enumeration's value, which is written without quotes."""


def batch_limit(record: GraphRecord, default: int) -> int:
    """Return the rows that Triton may batch, `default` if unbounded; 0 if the largest batch refuses other sizes."""
    slots = graph_slots(record)
    if any(isinstance(tensor.dims[0], int) for tensor in record.inputs):
        return 0
    top = largest(slots, "batch")
    if top is None:
        return default

    def covers(wide: Slot, slot: Slot) -> bool:
        if wide.ranges["batch"].least > 1:
            return False
        for axis in slot.ranges.keys() - {"batch"}:
            outer, inner = wide.ranges[axis], slot.ranges[axis]
            if outer.least > inner.least or (outer.most or inf) < (inner.most or inf):
                return False
        return True

    widest = [slot for slot in slots if slot.ranges["batch"].most == top]
    covering = any(all(covers(wide, slot) for slot in slots) for wide in widest)
    return top if top > 1 and covering else 0


def graph_config(
    name: str, record: GraphRecord, platform: str, options: RepositoryOptions
) -> dict[str, Any]:
    """Return the configuration of a graph's model."""
    batch, slots = batch_limit(record, options.most_batch), graph_slots(record)
    # The batch dimension is implicit for models that Triton batches.
    first = 1 if batch else 0

    def tensor(spec: TensorRecord) -> dict[str, Any]:
        dims = [dim if isinstance(dim, int) else -1 for dim in spec.dims]
        return {
            "name": spec.name,
            "data_type": Symbol(_DTYPES[spec.dtype]),
            "dims": dims[first:],
        }

    def warmup(slot: Slot) -> dict[str, Any]:
        sizes, inputs = slot.example(), []
        for spec in record.inputs:
            # Zeros are padding, which gives finite results; random values are not valid ids.
            value = {
                "data_type": Symbol(_DTYPES[spec.dtype]),
                "dims": [*spec.shape(sizes)][first:],
                "zero_data": True,
            }
            inputs.append({"key": spec.name, "value": value})
        rows = min(sizes["batch"], batch) if batch else 1
        return {"name": slot.name, "batch_size": rows, "inputs": inputs}

    # One group for all profiles: an instance then has a context per profile and takes the closest to a request.
    profiles = [str(slot.index) for slot in slots] if record.profiles else []
    config: dict[str, Any] = {
        "name": name,
        "platform": platform,
        "default_model_filename": Path(record.file).name,
        "max_batch_size": batch,
        "input": [*map(tensor, record.inputs)],
        "output": [*map(tensor, record.outputs)],
        "instance_group": [
            {"count": 1, "kind": Symbol(f"KIND_{options.device.upper()}"), "profile": profiles}
        ],
        "model_warmup": [*map(warmup, slots)],
    }
    if batch:
        tuned = sorted({slot.ranges["batch"].best or 0 for slot in slots})
        preferred = [rows for rows in tuned if 1 < rows <= batch]
        config["dynamic_batching"] = {"preferred_batch_size": preferred, **_BATCHING}
    if profiles:
        graphs = _cuda_graphs(record, slots, batch)
        config["optimization"] = {"cuda": {"graphs": True, "graph_spec": graphs}}
    return config


def _cuda_graphs(record: GraphRecord, slots: Sequence[Slot], batch: int) -> list[dict[str, Any]]:
    """Return the shapes that Triton captures: those that the profiles are tuned for.

    A captured graph also serves smaller batches, but no shorter texts: Triton leaves the rest of its inputs as it is.
    """
    specs = []
    for slot in slots:
        sizes = slot.example()
        shapes = [
            {"key": tensor.name, "value": {"dim": [*tensor.shape(sizes)][1 if batch else 0 :]}}
            for tensor in record.inputs
        ]
        if batch:
            lower = {"batch_size": slot.ranges["batch"].least, "input": shapes}
            specs.append(
                {"batch_size": sizes["batch"], "input": shapes, "graph_lower_bound": lower}
            )
        else:
            specs.append({"input": shapes})
    return specs


def rank_config(name: str, tokens: int, options: RepositoryOptions) -> dict[str, Any]:
    """Return the configuration of the Python model from images and captions, cut to `tokens`, to scores."""

    def tensor(name: str, dtype: str, *dims: int, **fields: Any) -> dict[str, Any]:
        return {"name": name, "data_type": Symbol(dtype), "dims": list(dims), **fields}

    values: dict[str, Any] = {"tokens": tokens, "prefix": options.prefix, **_RANK_LIMITS}
    if options.device != "cpu":
        # By default Triton copies the inputs of Python models to the host.
        values["FORCE_CPU_ONLY_INPUT_TENSORS"] = "no"
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": _RANK_BATCH,
        # Ragged: requests with different numbers of images and captions share a batch.
        "input": [
            tensor(name, "TYPE_STRING", -1, allow_ragged_batch=True)
            for name in ("images", "captions")
        ],
        "output": [
            tensor("scores", "TYPE_FP32", -1, -1),
            tensor("caption_order", "TYPE_INT64", -1, -1),
            tensor("image_order", "TYPE_INT64", -1, -1),
            tensor("reused", "TYPE_BOOL", -1),
        ],
        "dynamic_batching": _BATCHING,
        # One instance, because instances do not share the cache of image memories.
        "instance_group": [
            {"count": 1, "kind": Symbol("KIND_GPU" if options.device == "gpu" else "KIND_CPU")}
        ],
        "parameters": [
            {"key": key, "value": {"string_value": str(value)}} for key, value in values.items()
        ],
    }


def render(message: Mapping[str, Any], margin: str = "") -> Iterator[str]:
    """Yield a protobuf message as lines of text, one field each; a mapping is a message, a list repeats its field."""
    for name, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                yield f"{margin}{name} {{"
                yield from render(item, margin + "  ")
                yield f"{margin}}}"
            else:
                yield f"{margin}{name}: {item if isinstance(item, Symbol) else json.dumps(item)}"
