"""The `config.pbtxt` of every model: interface, batching, warm-up and device."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

from ..manifest import GraphRecord, Kind, TensorRecord
from ..request import RepositoryOptions, ServedDevice
from ..slots import LARGE_SIZES, SMALL_SIZES, Slot, graph_slots, largest, tensor_shape

PLATFORMS: dict[Kind, str] = {"onnx": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
"""The platforms of Triton by kind of export; other exports are not served by Triton."""

_DTYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}
_KINDS: dict[ServedDevice, str] = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}
# Requests of the rank model in one batch.
_RANK_BATCH = 8


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
    widest = [slot for slot in slots if slot.ranges["batch"].most == top]
    return top if top > 1 and any(all(_within(slot, wide) for slot in slots) for wide in widest) else 0


def _within(slot: Slot, wide: Slot) -> bool:
    """Whether `wide` accepts every request of `slot`, batches aside."""
    for axis, sizes in slot.ranges.items():
        allowed = wide.ranges[axis]
        least, most = (1, 1) if axis == "batch" else (sizes.least, inf if sizes.most is None else sizes.most)
        if least < allowed.least or most > (inf if allowed.most is None else allowed.most):
            return False
    return True


def graph_config(name: str, record: GraphRecord, kind: Kind, options: RepositoryOptions) -> dict[str, Any]:
    """The configuration of a graph's model."""
    batch, slots, device = most_batch(record, options.most_batch), graph_slots(record), options.device
    # One group for all profiles: an instance then has a context per profile and takes the closest to a request.
    profiles = [str(slot.number) for slot in slots] if record.profiles else []
    group = {"count": options.instances, "kind": Symbol(_KINDS[device]), "profile": profiles}
    config: dict[str, Any] = {
        "name": name,
        "platform": PLATFORMS[kind],
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
        "input": [
            tensor("images", "TYPE_STRING", -1, allow_ragged_batch=True),
            tensor("captions", "TYPE_STRING", -1, allow_ragged_batch=True),
        ],
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
        tuned = any(sizes.best is not None for sizes in slot.ranges.values())
        for bucket in (SMALL_SIZES,) if tuned else (SMALL_SIZES, LARGE_SIZES):
            sizes = slot.example(bucket)
            inputs = []
            for tensor in record.inputs:
                dims = [*tensor_shape(tensor, sizes)][1 if batch else 0 :]
                # Zeros are padding, which gives finite results; random values are no valid ids.
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
            {"key": tensor.name, "value": {"dim": [*tensor_shape(tensor, best)][1 if batch else 0 :]}}
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
