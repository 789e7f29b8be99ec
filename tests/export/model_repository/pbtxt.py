"""A strict reader of the protobuf text that `config.pbtxt` is written in, with the types of the fields it may hold."""

import json
import re
from typing import Any

_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<word>[A-Za-z_]\w*)|(?P<number>-?\d+)|(?P<mark>[{}\[\]:,]))'
)


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
    tokens = list(_tokens(text))
    message, rest = _message(tokens, MODEL_CONFIG, None)
    assert not rest, rest
    return message


def parameters(config: dict[str, Any]) -> dict[str, str]:
    """The map of parameters."""
    return {entry["key"]: entry["value"]["string_value"] for entry in config.get("parameters", [])}


def _tokens(text: str) -> Any:
    place = 0
    text = text.rstrip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        assert found, f"not understood: {text[place : place + 40]!r}"
        place = found.end()
        yield found.lastgroup, found.group(found.lastgroup or 0)


def _message(tokens: list, schema: dict[str, Any], end: str | None) -> tuple[dict[str, Any], list]:
    made: dict[str, Any] = {}
    while tokens:
        kind, name = tokens[0]
        if (kind, name) == ("mark", end):
            return made, tokens[1:]
        assert kind == "word", name
        assert name in schema, f"unknown field {name}"
        value, tokens = _value(tokens[1:], schema[name], name)
        if isinstance(schema[name], list):
            made.setdefault(name, []).extend(value)
        else:
            assert name not in made, f"{name} is given twice"
            made[name] = value
    assert end is None, "unclosed message"
    return made, []


def _value(tokens: list, schema: Any, name: str) -> tuple[Any, list]:
    if isinstance(schema, list) and isinstance(schema[0], dict):
        assert tokens[0] == ("mark", "{"), name
        value, tokens = _message(tokens[1:], schema[0], "}")
        return [value], tokens
    if isinstance(schema, dict):
        assert tokens[0] == ("mark", "{"), name
        return _message(tokens[1:], schema, "}")
    assert tokens[0] == ("mark", ":"), name
    tokens = tokens[1:]
    if isinstance(schema, list):
        assert tokens[0] == ("mark", "["), name
        values, tokens = [_scalar(tokens[1], schema[0], name)], tokens[2:]
        while tokens[0] == ("mark", ","):
            values.append(_scalar(tokens[1], schema[0], name))
            tokens = tokens[2:]
        assert tokens[0] == ("mark", "]"), name
        return values, tokens[1:]
    return _scalar(tokens[0], schema, name), tokens[1:]


def _scalar(token: tuple[str, str], schema: type, name: str) -> Any:
    kind, text = token
    if schema is bool:
        assert text in ("true", "false"), name
        return text == "true"
    assert kind == {int: "number", str: "string", Enum: "word"}[schema], (name, text)
    if schema is int:
        return int(text)
    if schema is Enum:
        return Enum(text)
    return json.loads(text)
