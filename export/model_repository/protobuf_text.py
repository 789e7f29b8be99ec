"""Protocol buffers as text, which `config.pbtxt` is written in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


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
