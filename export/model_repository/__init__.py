"""A model repository of NVIDIA's Triton Inference Server, made from an export.

A graph is a model of the platform `onnxruntime` or `tensorrt`, and `rank` is a Python model over them. The models are
written to a temporary folder, which is renamed into place with a receipt.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from xfm_fast import __version__
from xfm_fast.errors import ExportError, InputError, StorageError
from xfm_fast.io import advice, read_json, sync_folder, write_bytes
from xfm_fast.models.processor import find_tokenizer
from xfm_fast.tokenizer import CaptionTokenizer

from ..manifest import AxisRecord, FileRecord, GraphRecord, Manifest, Status, TensorRecord, commit, record_files
from ..pipeline import Progress, prepare_folder, silent
from ..request import DEFAULT_GRAPHS, RepositoryOptions
from ..slots import Slot, graph_slots, largest

PLATFORMS = {"onnx": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
"""The platforms of Triton by kind of export; other exports are not served by Triton."""

RECEIPT_FILE = "repository.json"
"""Next to the folders of the models, where Triton does not look."""

TOKENIZER_FILE = "tokenizer.json"

_RANK_SCRIPT = f"from {__name__}.rank import TritonPythonModel as TritonPythonModel\n"
# Captions are truncated to this length in the official evaluation.
_OFFICIAL_TOKENS = 40
# Configurations and vocabulary.
_ROOM = 8 << 20
# Requests of the rank model in one batch.
_RANK_BATCH = 8
_DTYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}


class ModelReceipt(BaseModel):
    """A model, its platform, and the rows that Triton may batch (0: no batching)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    platform: str
    max_batch_size: int


class Receipt(BaseModel):
    """The origin and the files of a repository, by path."""

    model_config = ConfigDict(extra="forbid", strict=True)

    created: str
    xfm_fast: str
    commit: str | None
    kind: str
    dtype: str
    source: str
    weights_sha256: str
    tokenizer_sha256: str | None
    status: Status
    models: list[ModelReceipt]
    files: list[FileRecord]

    @classmethod
    def load(cls, folder: str | Path) -> Receipt:
        """Read the receipt of a repository; raises `StorageError` where it is missing or damaged."""
        path = Path(folder) / RECEIPT_FILE
        try:
            return cls.model_validate(read_json(path))
        except OSError as error:
            raise StorageError(f"{path} cannot be read ({error.strerror or error}); choose another folder") from None
        except ValueError as error:
            reason = advice(error.errors()[0]) if isinstance(error, ValidationError) else error
            raise StorageError(f"{path} is damaged ({reason}); choose another folder") from None


@dataclass(frozen=True)
class PlannedModel:
    """A model of the repository: that of a graph, or `rank` with the manifest of its graphs."""

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
    overwrite: bool = False,
    progress: Progress = silent,
) -> Receipt:
    """Write a repository with a model for every graph of an export and, by default, `rank` over them."""
    folder, out = Path(folder), Path(out)
    options = options or RepositoryOptions()
    options.check()
    export, repository = folder.resolve(), out.resolve()
    if export == repository or export in repository.parents or repository in export.parents:
        raise InputError(f"{out} and the export {folder} contain each other; choose a separate folder")
    check_free(out, overwrite)
    progress("comparing the export with its manifest")
    manifest = Manifest.load(folder)
    if tokenizer is None and options.pipeline == "rank":
        tokenizer = find_tokenizer(folder, manifest.xfm_config)
    models = plan_models(manifest, options, tokenizer)
    served = {name for model in models if model.graph for name in model.graph.files}
    prepare_folder(repository.parent, sum(file.bytes for file in manifest.files if file.name in served) + _ROOM)
    temporary = repository.with_name(f".{repository.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for model in models:
            progress(f"writing {model.name}")
            _write_model(model, folder, temporary / model.name, tokenizer)
        receipt = Receipt(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            xfm_fast=__version__,
            commit=commit(),
            **manifest.model_dump(include={"kind", "dtype", "source", "weights_sha256", "status"}),
            tokenizer_sha256=tokenizer.sha256() if tokenizer and options.pipeline == "rank" else None,
            models=[
                ModelReceipt(
                    name=model.name,
                    platform=model.config.get("platform", "python"),
                    max_batch_size=model.config["max_batch_size"],
                )
                for model in models
            ],
            files=record_files(temporary, _files(temporary)),
        )
        write_bytes({temporary / RECEIPT_FILE: receipt.model_dump_json(indent=1).encode() + b"\n"})
        _move_into_place(temporary, repository)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{out} cannot be written ({error.strerror or error}) and is unchanged; free space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return receipt


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def check_free(out: Path, overwrite: bool) -> None:
    """Raise `StorageError` unless `out` is free, or a repository without foreign files that may be replaced."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise StorageError(f"{out} cannot be read ({error.strerror or error}); choose another folder") from None
    if not (out / RECEIPT_FILE).is_file():
        raise StorageError(f"{out} has no {RECEIPT_FILE}, so xfm-fast did not write it; choose another folder")
    if not overwrite:
        raise StorageError(f"{out} holds a repository already; replace it with --overwrite, or choose another folder")
    if foreign := _files(out) - {file.name for file in Receipt.load(out).files} - {RECEIPT_FILE}:
        raise StorageError(f"{out / min(foreign)} is not a file of xfm-fast; move it before --overwrite")


def _write_model(model: PlannedModel, export: Path, home: Path, tokenizer: CaptionTokenizer | None) -> None:
    version = home / "1"
    version.mkdir(parents=True)
    for name in model.graph.files if model.graph else ():
        shutil.copyfile(export / name, version / name)
        with (version / name).open("rb") as file:
            os.fsync(file.fileno())
    contents = {home / "config.pbtxt": render(model.config).encode()}
    if model.manifest is not None and tokenizer is not None:
        contents[version / "model.py"] = _RANK_SCRIPT.encode()
        tokenizer.save(version / TOKENIZER_FILE)
        model.manifest.model_copy(update={"files": record_files(version, [TOKENIZER_FILE])}).save(version)
    write_bytes(contents)


def _move_into_place(made: Path, out: Path) -> None:
    """Two renames where a repository is replaced; a failure of the second undoes the first."""
    earlier = made.with_name(f"{made.name}.old")
    if out.exists():
        out.rename(earlier)
    try:
        made.rename(out)
    except OSError:
        if earlier.exists():
            earlier.rename(out)
        raise
    sync_folder(out.parent)
    with suppress(OSError):
        shutil.rmtree(earlier)


def plan_models(
    manifest: Manifest, options: RepositoryOptions, tokenizer: CaptionTokenizer | None
) -> list[PlannedModel]:
    """The models of a repository; raises an `XFMError` for exports, options and tokenizers that do not fit."""
    options.check()
    if manifest.status == "failed":
        raise ExportError(f"this export failed verification ({manifest.reason}); export again in another --dtype")
    if manifest.packed:
        raise ExportError("the graphs take packed captions and Triton's models padded ones; export without --packed")
    if manifest.kind not in PLATFORMS:
        raise ExportError(f"Triton runs {' and '.join(PLATFORMS)}, not {manifest.kind}; export to one of them")
    if manifest.kind == "tensorrt":
        if options.device == "cpu":
            raise ExportError("device cpu does not run engines of tensorrt; leave out --device, or export to onnx")
        options = replace(options, device="gpu")
    models = [
        PlannedModel(name, graph_config(name, record, PLATFORMS[manifest.kind], options), graph=record)
        for record in manifest.graphs
        for name in [f"{options.prefix}_{record.name}"]
    ]
    if options.pipeline == "rank":
        models.append(_plan_rank(manifest, options, tokenizer))
    return models


def _plan_rank(manifest: Manifest, options: RepositoryOptions, tokenizer: CaptionTokenizer | None) -> PlannedModel:
    graphs = "choose --pipeline graphs"
    if missing := [graph for graph in DEFAULT_GRAPHS if graph not in manifest.graph_names]:
        raise ExportError(f"rank needs the graphs {', '.join(missing)}; export them with --graphs, or {graphs}")
    if all(output.name != "match_logits" for output in manifest.graph("fusion").outputs):
        raise ExportError(f"rank needs match logits; export a model with the 'matching' head, or {graphs}")
    if tokenizer is None:
        raise InputError(f"rank reads captions and there is no tokenizer; give one with --tokenizer, or {graphs}")
    tokenizer.check(manifest.xfm_config)
    if manifest.tokenizer_sha256 not in (None, tokenizer.sha256()):
        raise InputError(f"{tokenizer.origin} is not the export's tokenizer; give the tokenizer of the export")
    records = []
    for graph in DEFAULT_GRAPHS:
        record = manifest.graph(graph)
        rows = most_batch(record, options.most_batch)
        if rows and not record.profiles:
            # The batch limit of Triton, `max_batch_size`.
            batch = AxisRecord(least=record.axes["batch"].least, most=rows)
            record = record.model_copy(update={"axes": record.axes | {"batch": batch}})
        records.append(record)
    longest = [largest(graph_slots(record), "length") for record in records if record.name in ("text", "fusion")]
    tokens = min(_OFFICIAL_TOKENS, manifest.xfm_config.max_text_length, *filter(None, longest))
    if tokens < 3:
        raise ExportError(f"the graphs take captions of {tokens} tokens, too few for a word; export with more")
    name = f"{options.prefix}_rank"
    config = rank_config(name, tokens, options)
    return PlannedModel(name, config, manifest=manifest.model_copy(update={"graphs": records, "files": []}))


class Symbol(str):
    """The name of an enumeration's value, which has no quotes."""


def most_batch(record: GraphRecord, most: int) -> int:
    """Rows that Triton may batch (`most` if unbounded); 0 unless the largest batch accepts all other sizes too."""
    slots = graph_slots(record)
    if any(isinstance(tensor.dims[0], int) for tensor in record.inputs):
        return 0
    top = largest(slots, "batch")
    if top is None:
        return most

    def covers(wide: Slot, slot: Slot) -> bool:
        pairs = ((wide.ranges[axis], sizes) for axis, sizes in slot.ranges.items() if axis != "batch")
        return wide.ranges["batch"].least <= 1 and all(
            wider.least <= sizes.least and (sizes.most or inf) <= (wider.most or inf) for wider, sizes in pairs
        )

    widest = [slot for slot in slots if slot.ranges["batch"].most == top]
    return top if top > 1 and any(all(covers(wide, slot) for slot in slots) for wide in widest) else 0


def graph_config(name: str, record: GraphRecord, platform: str, options: RepositoryOptions) -> dict[str, Any]:
    """The configuration of a graph's model."""
    batch, slots = most_batch(record, options.most_batch), graph_slots(record)
    # One group for all profiles: an instance then has a context per profile and takes the closest to a request.
    profiles = [str(slot.number) for slot in slots] if record.profiles else []
    group = {"count": options.instances, "kind": Symbol(f"KIND_{options.device.upper()}"), "profile": profiles}
    config: dict[str, Any] = {
        "name": name,
        "platform": platform,
        "default_model_filename": record.file,
        "max_batch_size": batch,
        "input": [_tensor(tensor, batch) for tensor in record.inputs],
        "output": [_tensor(tensor, batch) for tensor in record.outputs],
        "instance_group": [group],
        "model_warmup": _warmups(record, slots, batch),
    }
    if batch:
        # Preferred batches: the tuned ones, else powers of two.
        tuned = {slot.ranges["batch"].best for slot in slots} - {None}
        sizes = sorted(size for size in tuned or {2**power for power in range(2, 12)} if size and 1 < size <= batch)
        config["dynamic_batching"] = _batching(sizes, options)
    if profiles:
        config["optimization"] = {"cuda": {"graphs": True, "graph_spec": _cuda_graphs(record, slots, batch)}}
    return config


def rank_config(name: str, tokens: int, options: RepositoryOptions) -> dict[str, Any]:
    """The configuration of the Python model from images and captions, truncated to `tokens`, to scores."""

    def tensor(name: str, dtype: str, *dims: int, **more: Any) -> dict[str, Any]:
        return {"name": name, "data_type": Symbol(dtype), "dims": list(dims), **more}

    names = ("prefix", "most_images", "most_captions", "cache_mb")
    values = {"tokens": tokens, **{name: getattr(options, name) for name in names}}
    # By default Triton copies the inputs of Python models to the host.
    values |= {} if options.device == "cpu" else {"FORCE_CPU_ONLY_INPUT_TENSORS": "no"}
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": _RANK_BATCH,
        # Ragged: requests with different numbers of images and captions share a batch.
        "input": [tensor(each, "TYPE_STRING", -1, allow_ragged_batch=True) for each in ("images", "captions")],
        "output": [
            tensor("scores", "TYPE_FP32", -1, -1),
            tensor("caption_order", "TYPE_INT64", -1, -1),
            tensor("image_order", "TYPE_INT64", -1, -1),
            tensor("reused", "TYPE_BOOL", -1),
        ],
        "dynamic_batching": _batching([], options),
        # One instance, because instances do not share the cache of image memories.
        "instance_group": [{"count": 1, "kind": Symbol("KIND_GPU" if options.device == "gpu" else "KIND_CPU")}],
        "parameters": [{"key": key, "value": {"string_value": str(value)}} for key, value in values.items()],
    }


def _tensor(tensor: TensorRecord, batch: int) -> dict[str, Any]:
    dims = [dim if isinstance(dim, int) else -1 for dim in tensor.dims]
    return {"name": tensor.name, "data_type": Symbol(_DTYPES[tensor.dtype]), "dims": dims[1:] if batch else dims}


def _batching(preferred: list[int], options: RepositoryOptions) -> dict[str, Any]:
    return {"preferred_batch_size": preferred, "max_queue_delay_microseconds": options.queue_delay}


def _warmups(record: GraphRecord, slots: Sequence[Slot], batch: int) -> list[dict[str, Any]]:
    warmups: dict[str, dict[str, Any]] = {}
    for slot in slots:
        for sizes in (slot.example("small"), slot.example("large")):
            # Zeros are padding, which gives finite results; random values are no valid ids.
            inputs = []
            for tensor in record.inputs:
                dims = [*tensor.shape(sizes)][1 if batch else 0 :]
                value = {"data_type": Symbol(_DTYPES[tensor.dtype]), "dims": dims, "zero_data": True}
                inputs.append({"key": tensor.name, "value": value})
            rows = min(sizes["batch"], batch) if batch else 1
            label = " ".join(f"{axis}={size}" for axis, size in sizes.items())
            warmups.setdefault(label, {"name": f"{slot.name}: {label}", "batch_size": rows, "inputs": inputs})
    return list(warmups.values())


def _cuda_graphs(record: GraphRecord, slots: Sequence[Slot], batch: int) -> list[dict[str, Any]]:
    """The shapes that Triton captures as CUDA graphs: the tuned one of each profile.

    A graph also serves smaller batches, but no shorter captions: Triton leaves the rest of its inputs uninitialised.
    """
    specs = []
    for slot in slots:
        best = {axis: sizes.best or sizes.least for axis, sizes in slot.ranges.items()}
        shapes = [
            {"key": tensor.name, "value": {"dim": [*tensor.shape(best)][1 if batch else 0 :]}}
            for tensor in record.inputs
        ]
        spec: dict[str, Any] = {"batch_size": best["batch"]} if batch else {}
        spec["input"] = shapes
        if batch:
            spec["graph_lower_bound"] = {"batch_size": slot.ranges["batch"].least, "input": shapes}
        specs.append(spec)
    return specs


def render(message: Mapping[str, Any]) -> str:
    """A protobuf message as text, one field a line; a mapping is a message, a list repeats its field."""
    return "".join(f"{line}\n" for line in _fields(message, ""))


def _fields(message: Mapping[str, Any], margin: str) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield f"{margin}{name} {{"
            yield from _fields(value, margin + "  ")
            yield f"{margin}}}"
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for item in value:
                yield from _fields({name: item}, margin)
        elif isinstance(value, list):
            if value:
                yield f"{margin}{name}: [{', '.join(map(_scalar, value))}]"
        else:
            yield f"{margin}{name}: {_scalar(value)}"


def _scalar(value: str | float) -> str:
    return value if isinstance(value, Symbol) else json.dumps(value)
