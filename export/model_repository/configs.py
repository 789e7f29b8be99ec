"""The `config.pbtxt` of every model: what Triton has to know to load it, to batch its requests and to warm it up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ..manifest import GraphRecord, TensorRecord
from ..request import RankLimits, RepositoryOptions, ServedDevice
from ..slots import Slot, graph_slots, largest, tensor_shape

ModelBackend = Literal["tensorrt", "onnxruntime", "python"]

_DTYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}
_KINDS: dict[ServedDevice, str] = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}
_PLATFORMS: dict[ModelBackend, str] = {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx"}
# A graph without profiles is warmed up with a small request and with a large one.
_BUCKETS = ({"batch": 1, "texts": 4, "length": 16, "past": 4}, {"batch": 4, "texts": 16, "length": 40, "past": 16})
# Requests of the rank model that are answered together.
_RANK_BATCH = 8


def most_batch(record: GraphRecord, most: int) -> int:
    """The rows that Triton may put into a batch of a graph; 0 where it may not, and batches are the client's business.

    It may where the batch has no fixed size and every other size that the graph takes, it takes in the largest batch:
    of two profiles, one for small batches of long texts and one for large batches of short ones, none takes a batch
    that Triton puts together from requests of the former. `most` is for graphs that take batches of any size.
    """
    slots = graph_slots(record)
    if any(isinstance(tensor.dims[0], int) for tensor in record.inputs):
        return 0
    top = largest(slots, "batch")
    if top is None:
        return most
    widest = [slot for slot in slots if slot.ranges["batch"].most == top]
    nested = any(all(_within(slot, wide) for slot in slots) for wide in widest)
    return top if nested and top > 1 else 0


def _within(slot: Slot, wide: Slot) -> bool:
    """True where a slot accepts, but for the batch, no more than another."""
    for axis, sizes in slot.ranges.items():
        allowed = wide.ranges[axis]
        if axis == "batch":
            if allowed.least > 1:
                return False
        elif sizes.least < allowed.least or (
            allowed.most is not None and (sizes.most is None or sizes.most > allowed.most)
        ):
            return False
    return True


def graph_config(
    name: str,
    record: GraphRecord,
    backend: ModelBackend,
    options: RepositoryOptions,
    device: ServedDevice,
    runtime: str = "auto",
) -> dict[str, Any]:
    """The configuration of a graph's model, which a backend runs on a device; a Python model in a session's runtime."""
    batch = most_batch(record, options.most_batch)
    slots = graph_slots(record)
    if device == "auto" and backend == "tensorrt":
        device = "gpu"
    # All profiles in one group: each instance has a context for every profile and takes the closest to a request.
    # With a group for each, a request could come to an instance whose profile does not take it.
    profiles = [str(slot.number) for slot in slots] if backend == "tensorrt" and record.profiles else []
    config: dict[str, Any] = {"name": name}
    if backend == "python":
        config["backend"] = "python"
    else:
        config |= {"platform": _PLATFORMS[backend], "default_model_filename": record.file}
    config |= {
        "max_batch_size": batch,
        "input": [_tensor(tensor, batch) for tensor in record.inputs],
        "output": [_tensor(tensor, batch) for tensor in record.outputs],
    }
    if batch:
        # Batches worth waiting for: those that profiles were tuned for, else powers of two.
        tuned = {slot.ranges["batch"].best for slot in slots} - {None}
        sizes = sorted(size for size in tuned or {2**power for power in range(2, 12)} if size and 1 < size <= batch)
        config["dynamic_batching"] = _batching(sizes, options.queue_delay)
    config |= {
        "instance_group": [{"count": options.instances, "kind": Symbol(_KINDS[device]), "profile": profiles}],
        "model_warmup": _warmups(record, slots, batch),
    }
    if profiles:
        config["optimization"] = {"cuda": {"graphs": True, "graph_spec": _cuda_graphs(record, slots, batch)}}
    if backend == "python":
        given = {"export_folder": ".", "graph": record.name, "device": device, "runtime": runtime}
        config["parameters"] = _parameters(given, device)
    return config


def rank_config(
    name: str, tokenizer: str, limits: RankLimits, options: RepositoryOptions, device: ServedDevice
) -> dict[str, Any]:
    """The configuration of the model from images and captions to scores.

    Args:
        tokenizer: file in the version folder.
        limits: bounds of a request to this export.
        device: where tensors are between graphs.
    """

    def tensor(name: str, dtype: str, *dims: int, **more: Any) -> dict[str, Any]:
        return {"name": name, "data_type": Symbol(dtype), "dims": list(dims), **more}

    parameters = {
        "export_folder": ".",
        "prefix": options.prefix,
        "tokenizer": tokenizer,
        "most_images": limits.images,
        "most_captions": limits.captions,
        "most_image_bytes": limits.image_bytes,
        "most_caption_characters": limits.caption_characters,
        "most_tokens": limits.tokens,
        "cache_bytes": options.cache_bytes,
    }
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": _RANK_BATCH,
        # Requests of different numbers of images and captions are answered together.
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
        "dynamic_batching": _batching([], options.queue_delay),
        # One instance: each would have image memories of its own.
        "instance_group": [{"count": 1, "kind": Symbol("KIND_GPU" if device == "gpu" else "KIND_CPU")}],
        "parameters": _parameters(parameters, device),
    }


def _tensor(tensor: TensorRecord, batch: int) -> dict[str, Any]:
    dims = [dim if isinstance(dim, int) else -1 for dim in tensor.dims]
    return {"name": tensor.name, "data_type": Symbol(_DTYPES[tensor.dtype]), "dims": dims[1:] if batch else dims}


def _batching(preferred: list[int], queue_delay: int) -> dict[str, Any]:
    return {"preferred_batch_size": preferred, "max_queue_delay_microseconds": queue_delay}


def _warmups(record: GraphRecord, slots: Sequence[Slot], batch: int) -> list[dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    for slot in slots:
        tuned = any(sizes.best is not None for sizes in slot.ranges.values())
        for bucket in _BUCKETS[:1] if tuned else _BUCKETS:
            sizes = slot.example(bucket)
            rows = min(sizes["batch"], batch) if batch else 1
            inputs = [
                {
                    "key": tensor.name,
                    "value": {
                        "data_type": Symbol(_DTYPES[tensor.dtype]),
                        "dims": [*tensor_shape(tensor, sizes)][1 if batch else 0 :],
                        # Texts of padding alone give finite results, and random ids would be none.
                        "zero_data": True,
                    },
                }
                for tensor in record.inputs
            ]
            label = " ".join(f"{axis}={size}" for axis, size in sizes.items())
            made.setdefault(label, {"name": f"{slot.name}: {label}", "batch_size": rows, "inputs": inputs})
    return list(made.values())


def _cuda_graphs(record: GraphRecord, slots: Sequence[Slot], batch: int) -> list[dict[str, Any]]:
    """The shapes that Triton captures as CUDA graphs: of each profile the one that it is tuned for.

    A graph serves smaller batches too, since no row reads another. It serves no shorter texts: Triton does not fill
    what lies between with zeros, and a mask of what happens to be there hides nothing.
    """
    made = []
    for slot in slots:
        best = {axis: sizes.best or sizes.least for axis, sizes in slot.ranges.items()}
        shapes = [
            {"key": tensor.name, "value": {"dim": [*tensor_shape(tensor, best)][1 if batch else 0 :]}}
            for tensor in record.inputs
        ]
        if not batch:
            made.append({"input": shapes})
            continue
        least = {"batch_size": slot.ranges["batch"].least, "input": shapes}
        made.append({"batch_size": best["batch"], "input": shapes, "graph_lower_bound": least})
    return made


def _parameters(values: Mapping[str, Any], device: ServedDevice) -> list[dict[str, Any]]:
    # Triton brings tensors to the host for Python models unless told otherwise.
    stay = {} if device == "cpu" else {"FORCE_CPU_ONLY_INPUT_TENSORS": "no"}
    return [{"key": key, "value": {"string_value": str(value)}} for key, value in {**values, **stay}.items()]


class Symbol(str):
    """The name of an enumeration's value, which is written without quotes."""


def render(message: Mapping[str, Any]) -> str:
    """A message as text, one field a line.

    Args:
        message: fields in the order of the text. A mapping is a message, a list repeats its field; empty lists are
            left out.

    Raises:
        TypeError: a value that is no string, symbol, number, truth value, mapping or list.
    """
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


def _scalar(value: Any) -> str:
    if isinstance(value, Symbol):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}, which has no form in the text of a protocol buffer")


def _quoted(text: str) -> str:
    """In quotes; everything but printable ASCII as octal bytes, which every reader understands."""
    written = []
    for byte in text.encode():
        character = chr(byte)
        if character in '"\\':
            written.append(f"\\{character}")
        else:
            written.append(character if 32 <= byte < 127 else f"\\{byte:03o}")
    return f'"{"".join(written)}"'
