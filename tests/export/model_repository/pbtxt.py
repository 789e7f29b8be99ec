"""A strict reader of the protobuf text that `config.pbtxt` is written in, with the types of the fields it may hold."""

import json
import re
from collections.abc import Iterator
from typing import Any


class Enum(str):
    """A name without quotes."""


TENSOR = {"name": str, "data_type": Enum, "dims": [int], "allow_ragged_batch": bool}
PARAMETER = {"key": str, "value": {"string_value": str}}
WARM_INPUT = {"key": str, "value": {"data_type": Enum, "dims": [int], "zero_data": bool}}
SHAPE = {"key": str, "value": {"dim": [int]}}
GRAPH_SPEC = {"batch_size": int, "input": [SHAPE], "graph_lower_bound": {"batch_size": int, "input": [SHAPE]}}
# Fields and types as model_config.proto of Triton's common repository has them; a list is a repeated field.
MODEL_CONFIG: dict[str, Any] = {
    "name": str,
    "platform": str,
    "backend": str,
    "default_model_filename": str,
    "max_batch_size": int,
    "input": [TENSOR],
    "output": [TENSOR],
    "dynamic_batching": {"preferred_batch_size": [int], "max_queue_delay_microseconds": int},
    "instance_group": [{"count": int, "kind": Enum, "profile": [str]}],
    "model_warmup": [{"name": str, "batch_size": int, "inputs": [WARM_INPUT]}],
    "optimization": {"cuda": {"graphs": bool, "graph_spec": [GRAPH_SPEC]}},
    "parameters": [PARAMETER],
}


def read(text: str) -> dict[str, Any]:
    """The message; an unknown field, a wrong type or a singular field given twice is an error."""
    return _message(iter(text.splitlines()), MODEL_CONFIG)


def parameters(config: dict[str, Any]) -> dict[str, str]:
    """The map of parameters."""
    return {entry["key"]: entry["value"]["string_value"] for entry in config.get("parameters", [])}


def _message(lines: Iterator[str], schema: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for line in lines:
        if line.strip() == "}":
            return made
        field = re.fullmatch(r"\s*(\w+)(?: \{|: (.*))", line)
        assert field is not None, line
        name, text = field.groups()
        assert name in schema, f"unknown field {name}"
        repeated = isinstance(schema[name], list)
        kind = schema[name][0] if repeated else schema[name]
        if text is None:
            values = [_message(lines, kind)]
        else:
            values = [_scalar(part, kind) for part in (text[1:-1].split(", ") if text[0] == "[" else [text])]
        assert repeated or name not in made, f"{name} is given twice"
        made[name] = made.get(name, []) + values if repeated else values[0]
    return made


def _scalar(text: str, kind: type) -> Any:
    if kind is Enum:
        assert re.fullmatch(r"[A-Z]\w*", text), text
        return Enum(text)
    value = json.loads(text)
    assert type(value) is kind, (kind, text)
    return value
